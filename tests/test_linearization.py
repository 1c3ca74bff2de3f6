"""The transition of every linearization against its definition."""

import functools as ft
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from diffrax_deer import (
    BlockDiagonalJacobian,
    DiagonalJacobian,
    FullJacobian,
    Jacobi,
    Picard,
    PiecewiseConstant,
    StepMap,
)
from diffrax_deer._linearization import _random_signs
from diffrax_deer._step_map import value_and_jacobian

from .helpers import linearizations, problems, relative_error, rk4

_H = 0.3
_PREV, _NEXT = np.array([1.3, -0.4]), np.array([0.9, -0.8])


def _jacobian() -> np.ndarray:
    """That of one step of the Van der Pol oscillator, in the other mode."""
    x = jnp.array(1.0), jnp.array(1.0 + _H)
    step = ft.partial(_van_der_pol(jnp.float64).step, x)
    jacobian = jax.jacrev(step)(jnp.asarray(_PREV))
    moves = 1e-5 * jnp.eye(2)
    columns = [(step(_PREV + d) - step(_PREV - d)) / 2e-5 for d in moves]
    assert relative_error(jacobian, jnp.stack(columns, axis=1)) < 1e-9
    return np.asarray(jacobian)


def _exponential() -> np.ndarray:
    """That of the field's Jacobian, known by hand, in the middle of the step."""
    position, velocity = (_PREV + _NEXT) / 2
    jacobian = [[0, 1], [-2 * position * velocity - 1, 1 - position**2]]
    return np.asarray(scipy.linalg.expm(_H * np.array(jacobian)))


def _signed_sums() -> np.ndarray:
    """Blocks of one component that do couple: the Jacobian times random signs."""
    signs = _random_signs(2)
    return (signs * (_jacobian() @ signs))[:, None, None]


# A linearization that is added to the registry has to be added here.
_DEFINITIONS = {
    "full_jacobian": _jacobian,
    "piecewise_constant": _exponential,
    "diagonal_jacobian": lambda: np.diag(_jacobian()),
    "block_diagonal_jacobian": _signed_sums,
    "picard": lambda: np.ones(2),
    "jacobi": lambda: np.zeros(2),
}


def _van_der_pol(dtype) -> StepMap:
    problem = problems["van_der_pol"].cast(dtype)
    return rk4(problem.field, problem.args)


@pytest.mark.parametrize("name", linearizations)
def test_transition_is_what_its_definition_says_in_both_precisions(name):
    expected = _DEFINITIONS[name]()
    for dtype, tolerance in ((jnp.float32, 1e-6), (jnp.float64, 1e-14)):
        x = jnp.asarray(1.0, dtype), jnp.asarray(1.0 + _H, dtype)
        states = (jnp.asarray(y, dtype) for y in (_PREV, _NEXT))
        linearize = ft.partial(linearizations[name], _van_der_pol(dtype))
        entries = jax.jit(linearize)(x, *states).entries
        assert entries.dtype == dtype
        assert relative_error(entries, expected) < tolerance


# ---- Full ----


def test_value_and_jacobian_come_from_one_evaluation():
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(5, 5)))
    y, calls = jnp.linspace(-1.0, 1.0, 5), []

    def f(y):
        calls.append(y)
        return jnp.tanh(weights @ y)

    value, jacobian = value_and_jacobian(f, y)
    expected = np.tanh(weights @ y)
    assert relative_error(value, expected) < 1e-14
    assert relative_error(jacobian, (1 - expected**2)[:, None] * weights) < 1e-14
    assert len(calls) == 1


# ---- Diagonal ----


def _network(state: int, coupling: float):
    """A step with a Jacobian known by hand, at a point, and that Jacobian."""
    rng = np.random.default_rng(state)
    weights = jnp.asarray(np.eye(state) + coupling * rng.normal(size=(state, state)))
    y = jnp.asarray(rng.normal(size=state))
    step_map = StepMap(lambda x, y: y + x * jnp.tanh(weights @ y))
    slope = _H * (1 - np.tanh(weights @ y) ** 2)
    return step_map, y, np.eye(state) + slope[:, None] * np.asarray(weights)


def test_diagonal_of_a_large_state_is_exact():
    # All tangents at once, and several of those with some left over.
    for state in (16, 40):
        step_map, y, jacobian = _network(state, 1.0)
        linearize = jax.vmap(ft.partial(DiagonalJacobian(), step_map, _H))
        diagonals = jax.jit(linearize)(*[jnp.stack([y, 0 * y])] * 2)
        assert relative_error(diagonals.entries[0], np.diag(jacobian)) < 1e-14


def test_probes_are_exact_where_components_do_not_couple():
    step_map, y, jacobian = _network(20, 0.0)
    for num_probes in (1, 3):
        diagonal = DiagonalJacobian(num_probes)(step_map, _H, y, y)
        assert relative_error(diagonal.entries, np.diag(jacobian)) < 1e-14


def test_probes_estimate_the_diagonal_without_bias():
    step_map, y, jacobian = _network(20, 1.0)
    beside = jacobian - np.diag(np.diag(jacobian))
    deviation = np.sqrt(np.sum(beside**2, axis=1))
    for num_probes in (4, 64, 4096):
        diagonal = DiagonalJacobian(num_probes)(step_map, _H, y, y)
        errors = (np.asarray(diagonal.entries) - np.diag(jacobian)) / deviation
        # Standard deviations of the mean: of 20 errors about one, neither zero nor ten.
        scaled = np.sqrt(np.mean(errors**2) * num_probes)
        assert 0.6 < scaled < 1.5, num_probes


def test_probes_are_the_same_at_every_step_and_call():
    matrix = jnp.asarray(np.random.default_rng(0).normal(size=(20, 20)))
    step_map = StepMap(lambda x, y: matrix @ y)
    linearize = ft.partial(DiagonalJacobian(num_probes=2), step_map, None)
    ys = jnp.asarray(np.random.default_rng(1).normal(size=(3, 20)))
    diagonals = jax.vmap(linearize)(ys, ys).entries
    again = jax.jit(linearize)(ys[0], ys[0]).entries
    assert relative_error(diagonals, jnp.broadcast_to(again, (3, 20))) < 1e-14
    assert relative_error(again, jnp.diag(matrix)) > 0.1


# ---- Blocks ----


def _blocks(step_map, x, y, block_size: int) -> np.ndarray:
    """The transition in full."""
    linearize = ft.partial(BlockDiagonalJacobian(block_size), step_map)
    transition = jax.jit(linearize)(x, y, y)
    assert transition.entries.shape == (y.size // block_size, block_size, block_size)
    return np.asarray(scipy.linalg.block_diag(*np.asarray(transition.entries)))


def test_blocks_that_do_not_couple_are_the_whole_jacobian():
    rng = np.random.default_rng(0)
    weights = jnp.asarray(scipy.linalg.block_diag(*rng.normal(size=(4, 3, 3))))
    y = jnp.asarray(rng.normal(size=12))
    step_map = StepMap(lambda x, y: y + x * jnp.tanh(weights @ y))
    slope = _H * (1 - np.tanh(weights @ y) ** 2)
    jacobian = np.eye(12) + slope[:, None] * np.asarray(weights)
    for block_size in (3, 6, 12):
        matrix = _blocks(step_map, _H, y, block_size)
        assert relative_error(matrix, jacobian) < 1e-14


def test_blocks_that_couple_are_estimated_without_bias():
    rng = np.random.default_rng(0)
    inside = np.asarray(scipy.linalg.block_diag(*rng.normal(size=(10, 2, 2))))
    beside = rng.normal(size=(20, 20))
    beside[scipy.linalg.block_diag(*np.ones((10, 2, 2))) == 1] = 0
    step_map, y = StepMap(lambda x, y: x @ y), jnp.zeros(20)
    for matrix in (inside + beside, inside + np.abs(beside)):
        blocks = _blocks(step_map, jnp.asarray(matrix), y, 2)
        errors = (blocks - inside)[inside != 0]
        # Nine other blocks contribute: without signs the mean of the second would be 7.
        assert 1.5 < np.sqrt(np.mean(errors**2)) < 4.5
        assert abs(np.mean(errors)) < 1.5


def test_blocks_of_a_state_that_they_do_not_divide_are_an_error():
    step_map, y = StepMap(lambda x, y: y), jnp.ones(12)
    with pytest.raises(ValueError, match="Pass a divisor of 12"):
        BlockDiagonalJacobian(5)(step_map, None, y, y)


# ---- Piecewise constant ----


def test_piecewise_constant_takes_the_field_in_the_middle_of_the_time():
    # dy/dt = t y from t = 1: the Jacobian in the middle is 1 + h / 2.
    step_map = rk4(lambda t, y, args: t * y, None)
    x, y = (jnp.array(1.0), jnp.array(1.0 + _H)), jnp.array([2.0])
    transition = PiecewiseConstant()(step_map, x, y, y)
    expected = np.exp([[_H * (1 + _H / 2)]])
    assert relative_error(transition.entries, expected) < 1e-14


def test_piecewise_constant_is_a_third_order_approximation_of_the_jacobian():
    for name in ("van_der_pol", "two_body"):
        problem = problems[name].cast(jnp.float64)
        step_map = rk4(problem.field, problem.args)

        def difference(h, step_map=step_map, y0=problem.y0):
            x = (jnp.array(0.2), 0.2 + h)
            y_next = step_map.step(x, y0)
            approximate = PiecewiseConstant()(step_map, x, y0, y_next)
            exact = FullJacobian()(step_map, x, y0, y_next)
            return jnp.max(jnp.abs(approximate.entries - exact.entries))

        sizes = 0.02 * 0.5 ** jnp.arange(4.0)
        errors = np.asarray(jax.jit(jax.vmap(difference))(sizes))
        orders = np.log2(errors[:-1] / errors[1:])
        assert np.all((orders > 2.8) & (orders < 3.3)), (name, orders)


def test_piecewise_constant_of_a_recurrence_is_an_error_that_names_others():
    recurrence, y = StepMap(lambda x, y: x * y), jnp.ones(2)
    with pytest.raises(TypeError, match="Use `FullJacobian"):
        PiecewiseConstant()(recurrence, 1.0, y, y)


# ---- All ----


def test_picard_and_jacobi_differentiate_nothing():
    # A callback has no derivative: asking for one would raise.
    step_map = StepMap(lambda x, y: jax.pure_callback(lambda y: 2 * y, y, y))
    for linearization, value in ((Picard(), 1.0), (Jacobi(), 0.0)):
        entries = linearization(step_map, None, jnp.ones(2), jnp.ones(2)).entries
        np.testing.assert_array_equal(entries, np.full(2, value))


def test_sizes_of_the_wrong_type_or_range_are_errors():
    makers: list[Any] = [DiagonalJacobian, BlockDiagonalJacobian]
    for make in makers:
        with pytest.raises(ValueError, match="must be at least 1"):
            make(0)
        with pytest.raises(TypeError, match="must be a Python int"):
            make(2.0)
