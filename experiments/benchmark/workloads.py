"""What is solved, by name: networks, fits of parameters, a flow."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array

from experiments.common import densities, two_body
from experiments.common.flow import DURATION, ConcatSquash, Flow
from experiments.common.hamiltonian import HamiltonianNetwork
from experiments.common.problems import (
    FITZHUGH_NAGUMO,
    LOTKA_VOLTERRA,
    PROBLEMS,
    fitzhugh_nagumo,
    lotka_volterra,
)
from experiments.common.workload import Workload, save_times, with_arrays

_NUM_OBSERVATIONS = 100


def _mean_square(ys: Any) -> Array:
    return jnp.mean(ys**2)


def _mlp(cell: dict[str, Any]) -> Workload:
    model_key, state_key = jr.split(jr.key(0))
    dim, width = cell["dim"], cell["width"]
    model = eqx.nn.MLP(dim, dim, width, 2, jnp.tanh, dtype=jnp.float32, key=model_key)
    return Workload(
        **with_arrays(model, lambda t, y, model: model(y)),
        y0s=jr.normal(state_key, (cell["batch_size"], dim), jnp.float32),
        t0=0.0,
        t1=10.0,
        num_steps=cell["num_steps"],
        loss=_mean_square,
    )


def _fit(cell: dict[str, Any]) -> Workload:
    """Parameters of an equation, fitted to data of others that are close."""
    name, num_steps = cell["workload"], cell["num_steps"]
    field, truth = {
        "fitzhugh_nagumo": (fitzhugh_nagumo, FITZHUGH_NAGUMO),
        "lotka_volterra": (lotka_volterra, LOTKA_VOLTERRA),
    }[name]
    problem = PROBLEMS[f"{name}_100"]
    every = max(1, num_steps // _NUM_OBSERVATIONS)
    # The first is that of the problem, whatever the batch.
    factors = 1 + 0.1 * jnp.arange(cell["batch_size"]) / cell["batch_size"]
    workload = Workload(
        field=field,
        params=jnp.asarray(truth, jnp.float64),
        y0s=factors[:, None] * problem.y0,
        t0=0.0,
        t1=problem.t1,
        num_steps=num_steps,
        loss=_mean_square,
        ts=save_times(0.0, problem.t1, num_steps, every),
    )
    solve = jax.jit(workload.solve_by_hand)
    data = solve(problem.y0, 1.02 * workload.params)
    loss = lambda ys: _mean_square(ys - data)
    return dataclasses.replace(workload, loss=loss)


def _hnn(cell: dict[str, Any]) -> Workload:
    size = two_body.STATE_DIM, cell["width"], cell["depth"]
    model = HamiltonianNetwork(*size, jnp.float32, jr.key(0))
    y0s = two_body.initial_states(cell["batch_size"], np.random.default_rng(0))
    horizon, num_steps = two_body.HORIZON, cell["num_steps"]
    ts = save_times(0.0, horizon, num_steps, 1)
    data = jnp.asarray(two_body.integrate(y0s, ts), jnp.float32)
    return Workload(
        **with_arrays(model, lambda t, y, model: model(t, y, None)),
        y0s=jnp.asarray(y0s, jnp.float32),
        t0=0.0,
        t1=horizon,
        num_steps=num_steps,
        loss=lambda ys: _mean_square(ys - data),
        ts=ts,
    )


def _cnf(cell: dict[str, Any]) -> Workload:
    batch_size = cell["batch_size"]
    model = Flow(ConcatSquash(2, cell["width"], 3, jr.key(0)), 2)
    points = next(densities.load("two_moons").batches_from(batch_size, 0, 0))
    return Workload(
        **with_arrays(model, lambda t, y, model: model.field_and_trace(t, y, None)),
        y0s=(jnp.asarray(points), jnp.zeros(batch_size, jnp.float32)),
        t0=DURATION,
        t1=0.0,
        num_steps=cell["num_steps"],
        loss=lambda ys: -jnp.mean(jax.vmap(model.read_out)(ys)),
    )


_MAKERS: dict[str, Callable[[dict[str, Any]], Workload]] = {
    "mlp": _mlp,
    "fitzhugh_nagumo": _fit,
    "lotka_volterra": _fit,
    "two_body_hnn": _hnn,
    "cnf": _cnf,
}


def make(cell: dict[str, Any]) -> Workload:
    """What the cell is about: `workload`, with its sizes."""
    return _MAKERS[cell["workload"]](cell)
