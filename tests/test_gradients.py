"""Derivatives through `diffeqsolve`, against those of the sequential solver."""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrax_deer import (
    ExponentialRosenbrockEuler,
    SequentialForward,
    WholeInterval,
)

from .helpers import linearizations, newton_solver

_STEPS = 12
_ADJOINTS = {
    "checkpoint": diffrax.RecursiveCheckpointAdjoint(),
    "direct": diffrax.DirectAdjoint(),
}


def _loss(solver, controller_of, adjoint=None, closed_over=True, between=True):
    """A scalar that depends on the final state and on the solution in between."""
    adjoint = diffrax.DirectAdjoint() if adjoint is None else adjoint

    def loss(parameters):
        t0, t1 = parameters["t0"], parameters["t1"]
        weights = parameters["weights"]

        def field(t, y, args):
            used = weights if closed_over else args["weights"]
            x, v = y
            force = args["force"] * jnp.sin(2 * t)
            return v, jnp.tanh(used @ jnp.stack([x, v]))[0] - x + force

        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            solver,
            t0,
            t1,
            None,
            tuple(parameters["y0"]),
            {"force": parameters["force"], "weights": weights},
            stepsize_controller=controller_of(t0, t1),
            saveat=(
                diffrax.SaveAt(ts=t0 + (t1 - t0) * jnp.array([0.31, 0.7, 1.0]))
                if between
                else diffrax.SaveAt(t1=True)
            ),
            adjoint=adjoint,
            max_steps=_STEPS,
        )
        ys: Any = sol.ys
        xs, vs = ys
        return jnp.sum(jnp.sin(xs) * jnp.linspace(0.5, 1.5, len(xs))) + vs[-1] ** 2

    return loss


def _parameters():
    return {
        "y0": jnp.array([1.2, -0.4]),
        "weights": jnp.array([[0.5, -1.0], [0.3, 0.8]]),
        "force": jnp.array(0.7),
        "t0": jnp.array(0.2),
        "t1": jnp.array(2.9),
    }


def _sequential(solver, **kwargs):
    grid = lambda t0, t1: diffrax.StepTo(jnp.linspace(t0, t1, _STEPS + 1))
    return _loss(solver, grid, **kwargs)


def _parallel(solver, adjoint=None, closed_over=True, between=True, **kwargs):
    solver = newton_solver(solver, num_steps=_STEPS, **kwargs)
    whole = lambda t0, t1: WholeInterval()
    return _loss(solver, whole, adjoint, closed_over, between)


def _assert_close(a, b, rtol):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * 1e-2)


@pytest.fixture(scope="module")
def reference():
    """The gradient of the same steps in sequence, as the oracle of this module."""
    return jax.jit(jax.grad(_sequential(diffrax.Heun())))(_parameters())


def test_the_reference_agrees_with_finite_differences(reference):
    loss = jax.jit(_sequential(diffrax.Heun()))
    parameters = _parameters()
    for name, index in (("t0", ()), ("t1", ()), ("force", ()), ("weights", (0, 1))):
        step = 1e-5
        moved = lambda h, name=name, index=index: {
            **parameters,
            name: parameters[name].at[index].add(h),
        }
        slope = (loss(moved(step)) - loss(moved(-step))) / (2 * step)
        np.testing.assert_allclose(slope, reference[name][index], rtol=1e-7)


@pytest.mark.parametrize(
    ("linearization", "adjoint"),
    [("full_jacobian", "checkpoint"), *((name, "direct") for name in linearizations)],
)
def test_gradients_are_exact_for_every_linearization(linearization, adjoint, reference):
    loss = _parallel(
        diffrax.Heun(),
        _ADJOINTS[adjoint],
        linearization=linearizations[linearization],
    )
    _assert_close(jax.jit(jax.grad(loss))(_parameters()), reference, 1e-9)


@pytest.mark.parametrize("closed_over", [False, True])
def test_gradients_are_exact_when_the_steps_are_made_in_sequence(
    closed_over, reference
):
    loss = _parallel(
        diffrax.Heun(), closed_over=closed_over, forward=SequentialForward()
    )
    _assert_close(jax.jit(jax.grad(loss))(_parameters()), reference, 1e-12)


@pytest.mark.slow
def test_second_derivatives_are_exact_in_every_order_of_modes():
    select = lambda parameters: {
        "weights": parameters["weights"],
        "t1": parameters["t1"],
    }
    rest = _parameters()

    def restricted(loss):
        return lambda parameters: loss({**rest, **parameters})

    direction = jax.tree.map(lambda x: jnp.cos(x + 1), select(rest))

    def forward_over_reverse(loss):
        return lambda p: jax.jvp(jax.grad(loss), (p,), (direction,))[1]

    def reverse_over_reverse(loss):
        dot = lambda a, b: sum(jax.tree.leaves(jax.tree.map(jnp.vdot, a, b)))
        return jax.grad(lambda p: dot(jax.grad(loss)(p), direction))

    sequential = restricted(_sequential(diffrax.Heun(), between=False))
    expected = jax.jit(forward_over_reverse(sequential))(select(rest))
    loss = restricted(_parallel(diffrax.Heun(), between=False))
    for curvature in (forward_over_reverse(loss), reverse_over_reverse(loss)):
        _assert_close(jax.jit(curvature)(select(rest)), expected, 1e-8)
    # The default adjoint of diffrax admits forward over reverse only, and no `ts`.
    default = diffrax.RecursiveCheckpointAdjoint()
    loss = restricted(_parallel(diffrax.Heun(), default, between=False))
    curvature = jax.jit(forward_over_reverse(loss))
    _assert_close(curvature(select(rest)), expected, 1e-8)


@pytest.mark.slow
def test_gradients_of_a_batch_are_the_gradients_one_by_one():
    loss = _parallel(diffrax.Heun(), _ADJOINTS["checkpoint"], between=False)
    batch = jax.tree.map(lambda x: jnp.stack([x, x * 1.1, x * 0.7]), _parameters())
    gradient = jax.jit(jax.grad(loss))
    batched = jax.jit(jax.vmap(jax.grad(loss)))(batch)
    for i in range(3):
        pick = lambda tree, i=i: jax.tree.map(lambda x: x[i], tree)
        _assert_close(pick(batched), gradient(pick(batch)), 1e-9)


def test_single_precision_gradients_have_single_precision(reference):
    parameters = jax.tree.map(lambda x: x.astype(jnp.float32), _parameters())
    with jax.numpy_dtype_promotion("standard"), jax.enable_x64(False):
        gradient = jax.jit(jax.grad(_parallel(diffrax.Heun())))(parameters)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(gradient))
    for x, y in zip(jax.tree.leaves(gradient), jax.tree.leaves(reference), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_modules_as_arguments_and_gradients_of_their_weights():
    model = eqx.nn.MLP(2, 2, 8, 1, jnp.tanh, key=jax.random.key(0))

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def loss(model, solver, controller):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, model: model(y)),
            solver,
            0.0,
            1.0,
            None,
            jnp.array([1.0, -1.0]),
            model,
            stepsize_controller=controller,
        )
        return jnp.sum(sol.ys**2)

    solver = ExponentialRosenbrockEuler()
    value, gradient = loss(model, newton_solver(solver, num_steps=8), WholeInterval())
    grid = diffrax.StepTo(jnp.linspace(0.0, 1.0, 9))
    expected_value, expected = loss(model, solver, grid)
    np.testing.assert_allclose(value, expected_value, rtol=1e-12)
    _assert_close(
        eqx.filter(gradient, eqx.is_array), eqx.filter(expected, eqx.is_array), 1e-9
    )
