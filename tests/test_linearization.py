"""The transition of every linearization against its definition."""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from diffrax_deer._linearization import (
    DiagonalJacobian,
    FullJacobian,
    Picard,
    PiecewiseConstant,
    StepMap,
    value_and_jacobian,
)

from .helpers import (
    Problem,
    linearizations,
    primitives,
    problems,
    relative_error,
    rk4,
)

_H = 0.3
_PREV, _NEXT = np.array([1.3, -0.4]), np.array([0.9, -0.8])


def _step_map(name: str, dtype=jnp.float64) -> tuple[StepMap, Problem]:
    problem = problems[name].cast(dtype)
    return rk4(problem.field, problem.args), problem


def _linearize(linearization, dtype=jnp.float64):
    """One step of the Van der Pol oscillator, whose Jacobian is known by hand."""
    step_map, _ = _step_map("van_der_pol", dtype)
    x = (jnp.asarray(1.0, dtype), jnp.asarray(1.0 + _H, dtype))
    prev, following = (jnp.asarray(y, dtype) for y in (_PREV, _NEXT))
    transition = jax.jit(ft.partial(linearization, step_map))(x, prev, following)
    return transition, ft.partial(step_map.step, x), prev


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("name", linearizations)
def test_every_linearization_keeps_the_type_of_the_state(name, dtype):
    transition, *_ = _linearize(linearizations[name], dtype)
    assert transition.dtype == dtype
    assert transition.shape in ((2,), (2, 2))


def test_the_full_jacobian_is_that_of_the_step():
    transition, step, prev = _linearize(FullJacobian())
    assert relative_error(transition, jax.jacrev(step)(prev)) < 1e-14
    columns = [(step(prev + d) - step(prev - d)) / 2e-5 for d in 1e-5 * jnp.eye(2)]
    assert relative_error(transition, jnp.stack(columns, axis=1)) < 1e-9


def test_the_diagonal_is_that_of_the_full_jacobian():
    transition, step, prev = _linearize(DiagonalJacobian())
    assert relative_error(transition, np.diag(jax.jacrev(step)(prev))) < 1e-14


def _network(state: int, coupling: float):
    """A step with a Jacobian known by hand, at a point, and that Jacobian."""
    rng = np.random.default_rng(state)
    weights = jnp.asarray(np.eye(state) + coupling * rng.normal(size=(state, state)))
    y = jnp.asarray(rng.normal(size=state))
    step_map = StepMap(lambda x, y: y + x * jnp.tanh(weights @ y))
    slope = _H * (1 - np.tanh(weights @ y) ** 2)
    return step_map, y, np.eye(state) + slope[:, None] * np.asarray(weights)


# One, and several with some left over, of the tangents that are taken at once.
@pytest.mark.parametrize("state", [1, 5, 16, 17, 40])
def test_the_diagonal_of_large_states_is_exact(state):
    step_map, y, jacobian = _network(state, 1.0)
    diagonal = jax.jit(
        lambda y: jax.vmap(ft.partial(DiagonalJacobian(), step_map, _H))(y, y)
    )(jnp.stack([y, 0 * y]))
    assert relative_error(diagonal[0], np.diag(jacobian)) < 1e-14


@pytest.mark.parametrize("num_probes", [1, 3])
def test_probes_are_exact_where_components_do_not_couple(num_probes):
    step_map, y, jacobian = _network(20, 0.0)
    diagonal = DiagonalJacobian(num_probes)(step_map, _H, y, y)
    assert relative_error(diagonal, np.diag(jacobian)) < 1e-14


def test_probes_estimate_the_diagonal_without_bias():
    step_map, y, jacobian = _network(20, 1.0)
    beside = jacobian - np.diag(np.diag(jacobian))
    deviation = np.sqrt(np.sum(beside**2, axis=1))
    for num_probes in (4, 64, 4096):
        diagonal = DiagonalJacobian(num_probes)(step_map, _H, y, y)
        errors = (np.asarray(diagonal) - np.diag(jacobian)) / deviation
        # Standard deviations of the mean: of 20 errors about one, neither zero nor ten.
        scaled = np.sqrt(np.mean(errors**2) * num_probes)
        assert 0.6 < scaled < 1.5, num_probes


def test_probes_are_the_same_at_every_step():
    matrix = jnp.asarray(np.random.default_rng(0).normal(size=(20, 20)))
    step_map = StepMap(lambda x, y: matrix @ y)
    linearize = ft.partial(DiagonalJacobian(num_probes=2), step_map, None)
    ys = jnp.asarray(np.random.default_rng(1).normal(size=(3, 20)))
    diagonals = jax.vmap(linearize)(ys, ys)
    again = jax.jit(linearize)(ys[0], ys[0])
    assert relative_error(diagonals, jnp.broadcast_to(again, (3, 20))) < 1e-14
    assert relative_error(again, jnp.diag(matrix)) > 0.1


@pytest.mark.parametrize(("num_probes", "error"), [(0, ValueError), (2.0, TypeError)])
def test_a_wrong_number_of_probes_is_an_error(num_probes, error):
    with pytest.raises(error, match="`num_probes` must be"):
        DiagonalJacobian(num_probes)


def test_piecewise_constant_is_the_exponential_at_the_middle_of_the_step():
    transition, *_ = _linearize(PiecewiseConstant())
    position, velocity = (_PREV + _NEXT) / 2
    jacobian = [[0, 1], [-2 * position * velocity - 1, 1 - position**2]]
    expected = scipy.linalg.expm(_H * np.array(jacobian))
    assert relative_error(transition, expected) < 1e-14


def test_piecewise_constant_takes_the_field_at_the_middle_of_the_time():
    # dy/dt = t y from t = 1: the Jacobian in the middle is 1 + h / 2.
    step_map = rk4(lambda t, y, args: t * y, None)
    x = (jnp.array(1.0), jnp.array(1.0 + _H))
    y = jnp.array([2.0])
    transition = PiecewiseConstant()(step_map, x, y, y)
    assert relative_error(transition, np.exp([[_H * (1 + _H / 2)]])) < 1e-14


def test_picard_is_the_identity_and_differentiates_nothing():
    transition, _, prev = _linearize(Picard())
    np.testing.assert_array_equal(transition, np.ones(2))
    # A callback has no derivative: asking for one would raise.
    undifferentiable = lambda x, y: jax.pure_callback(lambda y: 2 * y, y, y)
    transition = Picard()(StepMap(undifferentiable), None, prev, prev)
    np.testing.assert_array_equal(transition, np.ones(2))


def test_piecewise_constant_of_a_recurrence_names_the_remedy():
    recurrence = StepMap(lambda x, y: x * y)
    y = jnp.ones(2)
    with pytest.raises(TypeError, match="Use `FullJacobian"):
        PiecewiseConstant()(recurrence, 1.0, y, y)


@pytest.mark.parametrize("name", ["van_der_pol", "mlp", "two_body"])
def test_piecewise_constant_is_a_third_order_approximation_of_newton(name):
    step_map, problem = _step_map(name)

    @jax.jit
    @jax.vmap
    def difference(h):
        x = (jnp.array(0.2), 0.2 + h)
        y_next = step_map.step(x, problem.y0)
        approximate = PiecewiseConstant()(step_map, x, problem.y0, y_next)
        exact = FullJacobian()(step_map, x, problem.y0, y_next)
        return jnp.max(jnp.abs(approximate - exact))

    errors = np.asarray(difference(0.02 * 0.5 ** jnp.arange(4.0)))
    orders = np.log2(errors[:-1] / errors[1:])
    assert np.all((orders > 2.8) & (orders < 3.3)), orders


def test_piecewise_constant_is_exact_for_a_linear_field_and_an_exact_step():
    _, problem = _step_map("linear")
    exponential = scipy.linalg.expm(_H * np.asarray(problem.args))
    step_map = StepMap(
        lambda x, y: jnp.asarray(exponential) @ y, lambda x, y: _H * problem.args @ y
    )
    y = problem.y0
    transition = PiecewiseConstant()(step_map, None, y, y)
    assert relative_error(transition, exponential) < 1e-14


@pytest.mark.parametrize("state", [1, 5])
def test_value_and_jacobian_are_those_of_the_function(state, getkey):
    weights = jax.random.normal(getkey(), (state, state), jnp.float64)
    y = jax.random.normal(getkey(), (state,), jnp.float64)
    f = lambda y: jnp.tanh(weights @ y)
    value, jacobian = jax.jit(ft.partial(value_and_jacobian, f))(y)
    assert relative_error(value, jnp.tanh(weights @ y)) < 1e-14
    expected = (1 - value**2)[:, None] * weights
    assert relative_error(jacobian, expected) < 1e-14


def test_the_jacobian_evaluates_the_step_once():
    # Once with tangents, not once for the value and once more for the Jacobian.
    _, problem = _step_map("mlp")
    f = lambda y: problem.field(0.0, y, problem.args)
    jaxpr = jax.make_jaxpr(ft.partial(value_and_jacobian, f))(problem.y0)
    count = sum(e.primitive.name == "tanh" for e in primitives(jaxpr))
    assert count == 1
