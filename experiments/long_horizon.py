"""Fits of a neural ODE to long trajectories: value and gradient, at equal steps.

python -m experiments.long_horizon

A multilayer perceptron in D dimensions is fitted to observations along a trajectory of
many steps, in batches of several sizes. All methods make the same steps of Dopri5, so
that values and gradients are equal. Newton's method starts without a guess, and warm,
as in training: from the solution for the parameters before the last step of Adam. In
single precision, as neural ODEs are trained.
"""

import dataclasses
from pathlib import Path
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array

from diffrax_deer import (
    DEERAdjoint,
    DEERSolver,
    ParallelForward,
    SequentialForward,
    WholeInterval,
    WindowState,
)
from experiments.common.command_line import run
from experiments.common.errors import ExperimentError
from experiments.common.results import format_table, head, report
from experiments.common.timing import compile_and_time, largest_difference, quartiles

_BASELINE = "dopri5"
_WARM = "deer_newton_warm"
_FORWARDS = {
    "deer": None,
    _WARM: ParallelForward(),
    "deer_newton": ParallelForward(),
    "deer_sequential": SequentialForward(),
}
_METHODS = (*_FORWARDS, _BASELINE)
_LENGTH = 20.0


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings.

    Attributes:
        dims: Dimensions of the state.
        batch_sizes: Numbers of trajectories, solved under `jax.vmap`.
        width: Width of the two hidden layers.
        num_steps: Steps of Dopri5 on [0, 20].
        num_observations: Times at which the loss compares with data.
        learning_rate: Of the step of Adam between the warm start and the timed solve.
        repeats: Timed calls of each method; they take turns.
        out: Where to write the results.
        smoke: Only a quick check that everything runs.
    """

    dims: tuple[int, ...] = (2, 8)
    batch_sizes: tuple[int, ...] = (1, 4, 16, 64)
    width: int = 32
    num_steps: int = 512
    num_observations: int = 64
    learning_rate: float = 1e-3
    repeats: int = 20
    out: Path = Path("runs/long_horizon/results.json")
    smoke: bool = False

    def check(self) -> None:
        """Raises an error that names the first setting that makes no sense."""
        counts = dataclasses.asdict(self)
        for name in ("width", "num_steps", "num_observations", "repeats"):
            if counts[name] < 1:
                msg = (
                    f"--{name.replace('_', '-')} is {counts[name]}. Choose at least 1."
                )
                raise ExperimentError(msg)
        if not (self.dims and self.batch_sizes):
            msg = "--dims and --batch-sizes need at least one value each."
            raise ExperimentError(msg)
        if min(*self.dims, *self.batch_sizes) < 1:
            msg = "--dims and --batch-sizes must be at least 1."
            raise ExperimentError(msg)


def _vector_field(t: Any, y: Array, model: eqx.nn.MLP) -> Array:
    del t
    # Bounded and recurrent: trajectories neither leave nor settle.
    half = (y.size + 1) // 2
    rotated = jnp.concatenate([y[half:], -y[: y.size - half], jnp.zeros(y.size % 2)])
    return rotated[: y.size] + model(y) - 0.1 * y


def make_value_and_grad(method: str, config: Config) -> Any:
    """The mean square over all observations, its gradient, and the solver's state."""
    ts = jnp.linspace(0.0, _LENGTH, config.num_observations)
    grid = jnp.linspace(0.0, _LENGTH, config.num_steps + 1)
    solver, adjoint = diffrax.Dopri5(), diffrax.RecursiveCheckpointAdjoint()
    controller: Any = diffrax.StepTo(grid)
    if method != _BASELINE:
        solver = DEERSolver(num_steps=config.num_steps, forward=_FORWARDS[method])
        controller, adjoint = WholeInterval(), DEERAdjoint()

    def solve(y0, model, state):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(_vector_field),
            solver,
            0.0,
            _LENGTH,
            None,
            y0,
            model,
            saveat=diffrax.SaveAt(ts=ts, solver_state=True),
            stepsize_controller=controller,
            adjoint=adjoint,
            max_steps=config.num_steps,
            solver_state=state if method == _WARM else None,
        )
        return solution.ys, solution.solver_state

    def loss(model, y0s, states):
        ys, states = jax.vmap(solve, in_axes=(0, None, 0))(y0s, model, states)
        return jnp.mean((jnp.asarray(ys) - jnp.cos(ts)[:, None]) ** 2), states

    return eqx.filter_jit(eqx.filter_value_and_grad(loss, has_aux=True))


def measure_cell(dim: int, batch_size: int, config: Config) -> dict[str, Any]:
    """All methods for one dimension and batch size."""
    model_key, state_key = jr.split(jr.key(0))
    model = eqx.nn.MLP(dim, dim, config.width, 2, jnp.tanh, key=model_key)
    y0s = jr.normal(state_key, (batch_size, dim))
    init = lambda y0: DEERSolver(num_steps=config.num_steps).init(
        diffrax.ODETerm(_vector_field), 0.0, _LENGTH, y0, model
    )
    cold: WindowState = jax.vmap(init)(y0s)
    functions = {name: make_value_and_grad(name, config) for name in _METHODS}
    (_, warm), gradient = functions[_WARM](model, y0s, cold)
    optimizer = optax.adam(config.learning_rate)
    params = eqx.filter(model, eqx.is_array)
    updates, _ = optimizer.update(gradient, optimizer.init(params))
    moved = eqx.apply_updates(model, updates)
    timings, values = compile_and_time(
        {name: (function, (moved, y0s, warm)) for name, function in functions.items()},
        config.repeats,
    )
    _, reference = values[_BASELINE]
    for name, ((_, state), found) in values.items():
        difference = largest_difference(found, reference)
        timings[name]["gradient_difference"] = difference
        timings[name]["num_iterations"] = None
        if name != _BASELINE:
            counts = jnp.mean(state.num_iterations, dtype=jnp.float32)
            timings[name]["num_iterations"] = float(counts)
    return {"dim": dim, "batch_size": batch_size, "methods": timings}


def table(results: dict[str, Any]) -> str:
    """One line for each dimension and batch size, in Markdown."""
    rows = []
    for cell in results["cells"]:
        methods = cell["methods"]
        first, median, third = quartiles(methods[_BASELINE]["seconds"])
        row = [f"{cell['dim']}", f"{cell['batch_size']}"]
        row.append(f"{median:.1f} [{first:.1f}, {third:.1f}]")
        for name in _METHODS[:-1]:
            own = quartiles(methods[name]["seconds"])
            row.append(f"{own[1]:.1f} [{own[0]:.1f}, {own[2]:.1f}]")
            row.append(f"{median / own[1]:.1f}×")
        row.append(f"{methods[_WARM]['num_iterations']:.1f}")
        rows.append(row)
    head = ["D", "batch", "Dopri5 (ms)"]
    for name in ("deer", "Newton, warm", "Newton", "in sequence"):
        head += [f"{name} (ms)", "speed-up"]
    return format_table((*head, "iterations, warm"), rows)


def main(config: Config) -> dict[str, Any]:
    """Measures, prints and writes the results."""
    config.check()
    if config.smoke:
        small = dict(dims=(2,), batch_sizes=(1, 2), num_steps=16, repeats=2)
        config = dataclasses.replace(config, **small)
    cells = []
    for dim in config.dims:
        for batch_size in config.batch_sizes:
            cells.append(measure_cell(dim, batch_size, config))
            print(f"D = {dim}, batch {batch_size}: done", flush=True)
    methods = [cell["methods"].values() for cell in cells]
    results = {
        **head("long_horizon", config, str(jnp.zeros(()).dtype)),
        "gradient_difference": max(
            m["gradient_difference"] for c in methods for m in c
        ),
        "cells": cells,
    }
    report(config.out, results, table(results))
    return results


if __name__ == "__main__":
    run(main, Config)
