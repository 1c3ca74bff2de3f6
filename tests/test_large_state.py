"""Derivatives of states too large for their Jacobians, and a training with them."""

import functools as ft
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffrax_deer import DEERAdjoint, WholeInterval
from diffrax_deer._blocks import BlockDiagonalJacobian
from diffrax_deer._implicit import solve
from diffrax_deer._linearization import (
    AbstractLinearization,
    DiagonalJacobian,
    FullJacobian,
    Picard,
    StepMap,
)

from .helpers import (
    constant_guess,
    forwards,
    newton,
    newton_solver,
    primitives,
    random_like,
    relative_error,
    scans,
    sequential,
    weighted_loss,
)

_LINEARIZATIONS: dict[str, AbstractLinearization] = {
    "diagonal": DiagonalJacobian(),
    "probes": DiagonalJacobian(num_probes=2),
    "blocks": BlockDiagonalJacobian(block_size=4),
    "leaves": BlockDiagonalJacobian(),
    "samples": BlockDiagonalJacobian(batch_axis=0),
    "picard": Picard(),
}
each_linearization = pytest.mark.parametrize("name", _LINEARIZATIONS)

_STATE, _STEPS = 28, 30


def _parameters(dtype=jnp.float64, size=_STATE):
    """Initial value, input of every step and weights."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(size, 8)) / np.sqrt(size), rng.normal(size=(8, size)) / 3
    xs = 0.1 + 0.05 * np.sin(np.arange(_STEPS))
    return jax.tree.map(
        lambda x: jnp.asarray(x, dtype), (rng.normal(size=size), xs, weights)
    )


def _step_map(weights):
    """The weights are in the closure only. A state of 4 samples with 7 components."""
    w_in, w_out = weights
    dtype, rows = w_in.dtype, len(w_in) // 4

    def step(x, y):
        return y + x * (jnp.tanh(y @ w_in) @ w_out - jnp.sin(2 * y))

    shapes = (4, rows - 1), (4,)
    leaves = tuple(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)
    return StepMap(step, leaves=leaves)


def _unroll(parameters):
    y0, xs, weights = parameters
    return sequential(_step_map(weights), y0, xs)


def _solve(parameters, *, linearization, scan="sequential", forward="parallel"):
    y0, xs, weights = parameters
    tolerance = 1e-12 if y0.dtype == jnp.float64 else 1e-6
    iteration = newton(linearization, scans[scan], tolerance=tolerance)
    step_map, guess = _step_map(weights), constant_guess(y0, _STEPS)
    return solve(step_map, y0, xs, guess, forwards[forward], iteration)[0]


def _first(trajectory, parameters):
    """Value, gradient and the derivative along a direction."""
    pushed = jax.jvp(trajectory, (parameters,), (random_like(parameters),))
    return jax.value_and_grad(ft.partial(weighted_loss, trajectory))(parameters), pushed


def _second(trajectory, parameters):
    """Products with the Hessian, forward over reverse and reverse over reverse."""
    direction = random_like(parameters)
    grad = jax.grad(ft.partial(weighted_loss, trajectory))
    dot = lambda a, b: sum(jax.tree.leaves(jax.tree.map(jnp.vdot, a, b)))
    over_reverse = jax.grad(lambda p: dot(grad(p), direction))
    return jax.jvp(grad, (parameters,), (direction,))[1], over_reverse(parameters)


@pytest.fixture(scope="module")
def expected():
    """What every solve has to give."""
    return jax.jit(ft.partial(_first, _unroll))(_parameters())


@each_linearization
def test_both_modes_are_those_of_the_loop(name, expected):
    trajectory = ft.partial(_solve, linearization=_LINEARIZATIONS[name])
    got = jax.jit(ft.partial(_first, trajectory))(_parameters())
    assert relative_error(got, expected) < 1e-9


@pytest.mark.parametrize(
    ("scan", "forward"), [("associative", "parallel"), ("platform", "sequential")]
)
def test_scan_and_forward_do_not_matter(scan, forward, expected):
    choice = {"linearization": _LINEARIZATIONS["samples"], "scan": scan}
    trajectory = ft.partial(_solve, **choice, forward=forward)
    got = jax.jit(ft.partial(_first, trajectory))(_parameters())
    assert relative_error(got, expected) < 1e-9


def test_single_precision_has_the_same_derivatives(expected):
    parameters = _parameters(jnp.float32)
    trajectory = ft.partial(_solve, linearization=_LINEARIZATIONS["leaves"])
    got = jax.jit(ft.partial(_first, trajectory))(parameters)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(got))
    assert relative_error(got, expected) < 1e-4


@pytest.mark.parametrize("name", ["probes", "blocks"])
def test_products_with_the_hessian_are_those_of_the_loop(name):
    trajectory = ft.partial(_solve, linearization=_LINEARIZATIONS[name])
    got, reference = (
        jax.jit(ft.partial(_second, f))(_parameters()) for f in (trajectory, _unroll)
    )
    assert relative_error(got, (reference[0], reference[0])) < 1e-8
    assert relative_error(reference[1], reference[0]) < 1e-8


def test_batches_of_gradients_agree():
    y0, *rest = _parameters()
    y0s = jnp.stack([y0, -y0, 0.3 * y0])

    @jax.jit
    def compare(y0s):
        def grad(trajectory, y0):
            return jax.grad(ft.partial(weighted_loss, trajectory))((y0, *rest))

        own = ft.partial(_solve, linearization=_LINEARIZATIONS["diagonal"])
        return [jax.vmap(ft.partial(grad, f))(y0s) for f in (own, _unroll)]

    got, reference = compare(y0s)
    assert relative_error(got, reference) < 1e-9


@pytest.mark.parametrize("rotation", [0.1, 2.0])
def test_an_unstable_recurrence_has_the_exact_gradient(rotation):
    # The derivative grows by 1.5 a step; of errors made by the diagonal, a sweep makes
    # larger ones, whose products overflow where nothing holds them.
    num_steps, size = 400, 20
    turn = np.kron(np.eye(size // 2), [[0.0, 1.0], [-1.0, 0.0]])
    matrix = jnp.asarray(1.5 * (np.cos(rotation) * np.eye(size) + turn))
    xs = jnp.sin(jnp.arange(num_steps * size, dtype=float)).reshape(num_steps, size)

    @jax.jit
    @ft.partial(jax.value_and_grad, argnums=(0, 1, 2))
    def own(matrix, y0, xs):
        step_map = StepMap(lambda x, y: jnp.matmul(matrix, y) + x)
        iteration, guess = newton(DiagonalJacobian()), constant_guess(y0, num_steps)
        forward = forwards["sequential"]
        return jnp.sum(solve(step_map, y0, xs, guess, forward, iteration)[0][-1])

    @jax.jit
    @ft.partial(jax.value_and_grad, argnums=(0, 1, 2))
    def reference(matrix, y0, xs):
        step_map = StepMap(lambda x, y: jnp.matmul(matrix, y) + x)
        return jnp.sum(sequential(step_map, y0, xs)[-1])

    y0 = jnp.ones(size)
    got, expected = own(matrix, y0, xs), reference(matrix, y0, xs)
    assert np.all(np.isfinite(expected[0]))
    assert relative_error(got, expected) < 1e-9


def test_a_failed_solve_has_a_gradient_that_can_be_discarded():
    def loss(y0):
        # The root is that of a negative number after a few steps.
        step_map = StepMap(lambda x, y: y - jnp.sqrt(y) * x)
        iteration, guess = newton(DiagonalJacobian()), constant_guess(y0, 10)
        xs = jnp.full(10, 0.2)
        ys, statistics, _ = solve(
            step_map, y0, xs, guess, forwards["parallel"], iteration
        )
        return jnp.where(statistics.num_solved < 10, 0.0, jnp.sum(ys))

    gradient = jax.jit(jax.vmap(jax.grad(loss)))
    failed, solved = gradient(jnp.stack([jnp.full(20, 0.3), jnp.full(20, 30.0)]))
    np.testing.assert_array_equal(failed, np.zeros(20))
    assert np.all(solved > 5)


# ---- Memory ----


def _largest(linearization) -> int:
    """The most elements of any array in value and gradient."""
    parameters = _parameters(size=256)
    trajectory = ft.partial(_solve, linearization=linearization)
    grad = jax.value_and_grad(ft.partial(weighted_loss, trajectory))
    equations = primitives(jax.make_jaxpr(grad)(parameters))
    return max(out.aval.size for equation in equations for out in equation.outvars)


# Not by leaves: most of the state is in one.
@pytest.mark.parametrize("name", sorted({*_LINEARIZATIONS} - {"leaves"}))
def test_no_array_has_the_size_of_all_jacobians(name):
    assert _largest(_LINEARIZATIONS[name]) < _STEPS * 256**2


def test_dense_transitions_have_the_size_of_all_jacobians():
    # The measure measures.
    assert _largest(FullJacobian()) >= _STEPS * 256**2


# ---- Training ----


def _train(size: int, solver: Any, controller: Any, adjoint: Any):
    """Losses of a few steps of Adam, and the first gradient."""
    rng = np.random.default_rng(0)
    random = lambda *shape: jnp.asarray(rng.normal(size=shape))
    weights = random(size, 64) / np.sqrt(size), random(64), random(64, size) / 8
    y0, target = random(size), jnp.tanh(random(size))
    optimizer = optax.adam(3e-3)

    def field(t, y, args):
        w_in, bias, w_out = args
        return jnp.tanh(y @ w_in + bias * jnp.cos(t)) @ w_out

    def loss(weights):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            solver,
            0.0,
            1.0,
            None,
            y0,
            weights,
            stepsize_controller=controller,
            adjoint=adjoint,
            max_steps=24,
        )
        ys: Any = sol.ys
        return jnp.mean((ys[-1] - target) ** 2)

    @jax.jit
    def step(weights, state):
        value, gradient = jax.value_and_grad(loss)(weights)
        with jax.numpy_dtype_promotion("standard"):  # for optax
            updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(weights, updates), state, value, gradient

    state, losses, gradients = optimizer.init(weights), [], []
    for _ in range(4):
        weights, state, value, gradient = step(weights, state)
        losses.append(float(value))
        gradients.append(gradient)
    return losses, gradients[0]


@pytest.mark.parametrize(
    ("size", "names"),
    [
        (256, ["picard"]),
        pytest.param(256, ["probes", "blocks"], marks=pytest.mark.slow),
        pytest.param(784, ["picard", "probes"], marks=pytest.mark.slow),
    ],
)
def test_a_large_neural_ode_trains_as_in_sequence(size, names):
    grid = diffrax.StepTo(jnp.linspace(0.0, 1.0, 25))
    adjoint = diffrax.RecursiveCheckpointAdjoint()
    expected = _train(size, diffrax.Dopri5(), grid, adjoint)
    assert np.all(np.diff(expected[0]) < 0)
    for name in names:
        solver = newton_solver(num_steps=24, linearization=_LINEARIZATIONS[name])
        losses, gradient = _train(size, solver, WholeInterval(), DEERAdjoint())
        assert relative_error(gradient, expected[1]) < 1e-9
        np.testing.assert_allclose(losses, expected[0], rtol=1e-9)
