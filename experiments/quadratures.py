"""What it is worth to leave the log-density of a flow out of the Newton system.

python -m experiments.quadratures

Value and gradient of the log-density of a continuous normalizing flow in two dimensions
with an exact trace: once as it is, where the log-density is found to feed back into
nothing, and once with zero times the log-density added to the vector field, after which
the dataflow says that everything is coupled, a system of three dimensions.
"""

import dataclasses
from pathlib import Path
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

from diffrax_deer import (
    ConstantPredictor,
    DEERAdjoint,
    DEERSolver,
    ParallelForward,
    SequentialForward,
    WholeInterval,
)
from experiments.common.command_line import run
from experiments.common.errors import ExperimentError
from experiments.common.flow import DURATION, ConcatSquash, Flow
from experiments.common.results import format_table, head, report
from experiments.common.timing import compile_and_time, largest_difference, quartiles

_CONSTANT = "deer, Newton, constant guess"
_FORWARDS = {
    "deer": None,
    "deer, Newton": ParallelForward(),
    _CONSTANT: ParallelForward(),
    "deer in sequence": SequentialForward(),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings.

    Attributes:
        num_steps: Steps of Dopri5.
        batch_sizes: Numbers of points, solved under `jax.vmap`.
        width: Width of the three hidden layers.
        scale: Factor of the initial weights: a trained flow is stronger than a new one.
        repeats: Timed calls of each method; they take turns.
        out: Where to write the results.
        smoke: Only a quick check that everything runs.
    """

    num_steps: int = 64
    batch_sizes: tuple[int, ...] = (1, 16)
    width: int = 64
    scale: float = 2.0
    repeats: int = 30
    out: Path = Path("runs/quadratures/results.json")
    smoke: bool = False


def make_value_and_grad(method: str, num_steps: int, coupled: bool) -> Any:
    """The mean log-density and its gradient, with the iterations that it took.

    If `coupled`, there is a dataflow from the log-density to everything.
    """
    if method == "dopri5":
        grid = jnp.linspace(DURATION, 0.0, num_steps + 1)
        options = {
            "solver": diffrax.Dopri5(),
            "stepsize_controller": diffrax.StepTo(grid),
        }
    else:
        predictor = ConstantPredictor() if method == _CONSTANT else None
        options = {
            "solver": DEERSolver(
                num_steps=num_steps, forward=_FORWARDS[method], predictor=predictor
            ),
            "stepsize_controller": WholeInterval(),
            "adjoint": DEERAdjoint(),
        }

    def field(t, state, flow):
        value, trace = flow.field_and_trace(t, state, None)
        none = 0 * state[1] if coupled else jnp.zeros((), value.dtype)
        return value + none, trace + none

    def loss(flow, xs):
        solve = lambda x: diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            t0=DURATION,
            t1=0.0,
            dt0=None,
            y0=(x, jnp.zeros((), x.dtype)),
            args=flow,
            **options,
        )
        solutions = jax.vmap(solve)(xs)
        iterations = solutions.stats.get("num_newton_iterations", jnp.zeros(()))
        return jnp.mean(jax.vmap(flow.read_out)(solutions.ys)), jnp.mean(iterations)

    return eqx.filter_jit(eqx.filter_value_and_grad(loss, has_aux=True))


def measure_cell(batch_size: int, config: Config) -> dict[str, Any]:
    """All methods for one batch size."""
    flow_key, point_key = jr.split(jr.key(0))
    flow = Flow(ConcatSquash(2, config.width, 3, flow_key), 2)
    flow = jax.tree.map(lambda x: config.scale * x if eqx.is_array(x) else x, flow)
    xs = jr.normal(point_key, (batch_size, 2), jnp.float32)
    functions = {}
    for name in _FORWARDS:
        for coupled in (False, True):
            function = make_value_and_grad(name, config.num_steps, coupled)
            functions[f"{name}: whole" if coupled else name] = function, (flow, xs)
    baseline = make_value_and_grad("dopri5", config.num_steps, coupled=False)
    functions["dopri5"] = baseline, (flow, xs)
    timings, values = compile_and_time(functions, config.repeats)
    (_, reference) = values["dopri5"]
    for name, ((_, iterations), gradient) in values.items():
        difference = largest_difference(gradient, reference)
        timings[name]["gradient_difference"] = difference
        timings[name]["num_iterations"] = float(iterations)
    return {"batch_size": batch_size, "methods": timings}


def table(results: dict[str, Any]) -> str:
    """One line for each batch size and method, in Markdown."""
    rows = []
    for cell in results["cells"]:
        methods = cell["methods"]
        _, dopri5, _ = quartiles(methods["dopri5"]["seconds"])
        for name in _FORWARDS:
            part, whole = (
                quartiles(methods[key]["seconds"]) for key in (name, f"{name}: whole")
            )
            row = [name, f"{cell['batch_size']}"]
            row += [f"{q[1]:.2f} [{q[0]:.2f}, {q[2]:.2f}]" for q in (part, whole)]
            row.append(f"{whole[1] / part[1]:.2f}")
            row.append(f"{methods[name]['num_iterations']:.0f}")
            row.append(f"{dopri5:.2f}")
            rows.append(row)
    head = ("method", "batch", "left out (ms)", "whole system (ms)", "ratio")
    return format_table((*head, "iterations", "Dopri5 (ms)"), rows)


def main(config: Config) -> dict[str, Any]:
    """Measures, prints and writes the results."""
    if min(config.num_steps, config.width, config.repeats, *config.batch_sizes) < 1:
        msg = "--num-steps, --width, --repeats and --batch-sizes must be at least 1."
        raise ExperimentError(msg)
    if config.smoke:
        small = dict(num_steps=4, batch_sizes=(2,), width=4, repeats=2)
        config = dataclasses.replace(config, **small)
    cells = [measure_cell(batch_size, config) for batch_size in config.batch_sizes]
    timings = [timing for cell in cells for timing in cell["methods"].values()]
    results = {
        **head("quadratures", config, "float32"),
        "gradient_difference": max(t["gradient_difference"] for t in timings),
        "cells": cells,
    }
    report(config.out, results, table(results))
    return results


if __name__ == "__main__":
    run(main, Config)
