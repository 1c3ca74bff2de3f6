"""Two programs that people have, with another solver: a neural ODE, and a flow.

They have the structure of the examples in diffrax's documentation: a neural ODE that
is fitted to trajectories (an adaptive controller, `vmap`, `SaveAt(ts=...)`), and a
continuous normalizing flow (backward time, a tuple for a state, modules in `args`,
`fori_loop`). Reduced by default; `DIFFRAX_DEER_FULL=1` runs them in their full size.
"""

import os
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxtyping import Array

from diffrax_deer import DEERAdjoint, DEERSolver, WholeInterval

_FULL = os.environ.get("DIFFRAX_DEER_FULL", "") not in ("", "0")
pytestmark = [pytest.mark.slow, *([pytest.mark.timeout(3600)] if _FULL else [])]


# ---- A neural ODE, fitted to spirals ----


class NeuralODE(eqx.Module):
    mlp: eqx.nn.MLP

    def __init__(self, size: int, width: int, key: Array):
        self.mlp = eqx.nn.MLP(
            size, size, width, depth=2, activation=jax.nn.softplus, key=key
        )

    def __call__(self, ts, y0, solver, adjoint):
        field = lambda t, y, args: self.mlp(y)
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            solver,
            t0=ts[0],
            t1=ts[-1],
            dt0=ts[1] - ts[0],
            y0=y0,
            saveat=diffrax.SaveAt(ts=ts),
            stepsize_controller=diffrax.PIDController(rtol=1e-3, atol=1e-6),
            adjoint=adjoint,
        )
        return solution.ys


def _spirals(ts, number: int, key):
    def one(key):
        y0 = jax.random.uniform(key, (2,), minval=-0.6, maxval=1.0)

        def field(t, y, args):
            y = y / (1 + y)
            return jnp.stack([y[1], -y[0]])

        controller = diffrax.PIDController(rtol=1e-6, atol=1e-8)
        return diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            diffrax.Tsit5(),
            ts[0],
            ts[-1],
            dt0=0.1,
            y0=y0,
            saveat=diffrax.SaveAt(ts=ts),
            stepsize_controller=controller,
        ).ys

    return jax.vmap(one)(jax.random.split(key, number))


def _fit(solver, adjoint) -> np.ndarray:
    """The losses of all training steps."""
    # In full, two stages: first a part of each trajectory, then all of it.
    stages = ((500, 0.1), (500, 1.0)) if _FULL else ((30, 1.0),)
    size, width, batch = (100, 64, 32) if _FULL else (50, 32, 8)
    data_key, model_key, batch_key = jax.random.split(jax.random.key(0), 3)
    ts = jnp.linspace(0.0, 10.0 if _FULL else 3.0, size)
    data = jax.jit(_spirals, static_argnums=1)(ts, 256, data_key)
    model = NeuralODE(2, width, model_key)
    losses = []
    optimizer = optax.adabelief(3e-3)

    @eqx.filter_value_and_grad
    def loss(model, ts, ys):
        predict = lambda y0: model(ts, y0, solver, adjoint)
        return jnp.mean((ys - jax.vmap(predict)(ys[:, 0])) ** 2)

    @eqx.filter_jit
    def step(model, state, ts, ys):
        value, gradient = loss(model, ts, ys)
        updates, state = optimizer.update(gradient, state)
        return value, eqx.apply_updates(model, updates), state

    for steps, part in stages:
        length = int(size * part)
        state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
        for i in range(steps):
            chosen = jax.random.choice(jax.random.fold_in(batch_key, i), 256, (batch,))
            ys = data[chosen, :length]
            value, model, state = step(model, state, ts[:length], ys)
            losses.append(float(value))
    return np.array(losses)


def test_neural_ode_reaches_the_loss_of_tsit5_with_only_the_solver_changed():
    default = diffrax.RecursiveCheckpointAdjoint()
    expected = _fit(diffrax.Tsit5(), default)
    assert expected[-1] < expected[len(expected) // 2]
    # At a tolerance of 1e-3 the whole interval is about ten steps.
    deer = DEERSolver(diffrax.Tsit5(), num_steps=8)
    for adjoint in [DEERAdjoint()] if _FULL else [default]:
        found = _fit(deer, adjoint)
        np.testing.assert_allclose(found[-1], expected[-1], rtol=5e-3)


# ---- A continuous normalizing flow ----


class Field(eqx.Module):
    """Layers that are scaled and shifted by functions of time (concat-squash)."""

    layers: list[tuple[eqx.nn.Linear, eqx.nn.Linear, eqx.nn.Linear]]

    def __init__(self, size: int, width: int, depth: int, key):
        widths = [size, *[width] * depth, size]
        self.layers = []
        for i, (n, m) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            keys = jax.random.split(jax.random.fold_in(key, i), 3)
            self.layers.append(
                (
                    eqx.nn.Linear(n, m, key=keys[0]),
                    eqx.nn.Linear(1, m, key=keys[1]),
                    eqx.nn.Linear(1, m, use_bias=False, key=keys[2]),
                )
            )

    def __call__(self, t, y):
        t = jnp.asarray(t)[None]
        for i, (linear, gate, shift) in enumerate(self.layers):
            y = jnp.tanh(y) if i > 0 else y
            y = linear(y) * jax.nn.sigmoid(gate(t)) + shift(t)
        return y


def _exact_trace(t, y, args):
    """The field, and the trace of its Jacobian: a module among the arguments."""
    y, _ = y
    _, field = args
    value, push = jax.linearize(lambda y: field(t, y), y)
    columns = jax.vmap(push)(jnp.eye(y.size, dtype=y.dtype))
    return value, jnp.trace(columns)


def _estimated_trace(t, y, args):
    y, _ = y
    eps, field = args
    value, pull = jax.vjp(lambda y: field(t, y), y)
    return value, jnp.sum(pull(eps)[0] * eps)


class Flow(eqx.Module):
    """Several fields, one after another; stacked, so that a loop goes through them."""

    fields: Field
    number: int
    t0: float = 0.0
    t1: float = 0.5
    dt0: float = 0.05

    def __init__(self, number: int, width: int, depth: int, key):
        make = lambda key: Field(2, width, depth, key)
        self.fields = eqx.filter_vmap(make)(jax.random.split(key, number))
        self.number = number

    def log_likelihood(self, y, key, solve: dict[str, Any], exact: bool):
        """From the data back to the normal distribution, through all the fields."""
        eps = jax.random.normal(key, y.shape)
        trace = _exact_trace if exact else _estimated_trace

        def back(carry, field):
            y, total = carry
            solution = diffrax.diffeqsolve(
                diffrax.ODETerm(trace),
                t0=self.t1,
                t1=self.t0,
                dt0=-self.dt0,
                y0=(y, 0.0),
                args=(eps, field),
                **solve,
            )
            ys: Any = solution.ys
            return (ys[0][0], total + ys[1][0]), None

        (y, total), _ = jax.lax.scan(back, (y, 0.0), self.fields, reverse=True)
        return total - 0.5 * (y.size * np.log(2 * np.pi) + jnp.sum(y**2))

    def sample(self, z, solve: dict[str, Any]):
        """From the normal distribution to the data."""

        def through(i, y):
            return diffrax.diffeqsolve(
                diffrax.ODETerm(lambda t, y, field: field(t, y)),
                t0=self.t0,
                t1=self.t1,
                dt0=self.dt0,
                y0=y,
                args=jax.tree.map(lambda x: x[i], self.fields),
                **solve,
            ).ys[-1]

        return jax.lax.fori_loop(0, self.number, through, z)


def _flow() -> Flow:
    sizes = (64, 3) if _FULL else (16, 1)
    return Flow(2, *sizes, jax.random.key(1))


_solves: dict[str, dict[str, Any]] = {
    "tsit5": dict(solver=diffrax.Tsit5()),
    "solver_changed": dict(solver=DEERSolver(diffrax.Tsit5(), num_steps=4)),
    "whole_interval": dict(
        solver=DEERSolver(diffrax.Tsit5(), num_steps=10),
        stepsize_controller=WholeInterval(),
    ),
    "adjoint": dict(
        solver=DEERSolver(diffrax.Tsit5(), num_steps=10),
        stepsize_controller=WholeInterval(),
        adjoint=DEERAdjoint(),
    ),
}


@pytest.mark.parametrize("exact", [True, False] if _FULL else [True])
def test_flow_has_the_same_likelihood_gradient_and_samples(exact):
    flow, number = _flow(), 500 if _FULL else 5
    data = jax.random.normal(jax.random.key(2), (number, 2)) * 0.7 + 0.2
    keys = jax.random.split(jax.random.key(3), number)

    @eqx.filter_jit
    def run(flow, solve):
        def loss(flow):
            each = lambda y, key: flow.log_likelihood(y, key, solve, exact)
            values = jax.vmap(each)(data, keys)
            return -jnp.mean(values), values

        (_, values), gradient = eqx.filter_value_and_grad(loss, has_aux=True)(flow)
        samples = jax.vmap(lambda z: flow.sample(z, solve))(data)
        return values, gradient, samples

    expected = run(flow, _solves["tsit5"])
    for name in ("solver_changed", "adjoint"):
        found = run(flow, _solves[name])
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5, err_msg=name)


def test_flow_is_trained_by_the_same_losses_and_gradients():
    """At every step of a training, which itself would take rounding further apart."""
    steps, number = (100, 100) if _FULL else (5, 8)
    angles = np.linspace(0, 2 * np.pi, 512, endpoint=False)
    data = jnp.asarray(np.stack([np.cos(angles), np.sin(angles)], 1))
    flow, optimizer = _flow(), optax.adam(1e-2)
    state = optimizer.init(eqx.filter(flow, eqx.is_inexact_array))

    @eqx.filter_jit
    def both(flow, key):
        chosen, noise = jax.random.split(key)
        batch = jax.random.choice(chosen, data, (number,))
        keys = jax.random.split(noise, number)

        def loss(flow, solve):
            each = lambda y, key: flow.log_likelihood(y, key, solve, False)
            return -jnp.mean(jax.vmap(each)(batch, keys))

        of = eqx.filter_value_and_grad(loss)
        return of(flow, _solves["tsit5"]), of(flow, _solves["whole_interval"])

    for i in range(steps):
        expected, found = both(flow, jax.random.fold_in(jax.random.key(4), i))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
        updates, state = optimizer.update(expected[1], state)
        flow = eqx.apply_updates(flow, updates)
