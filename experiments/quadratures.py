"""What it is worth to leave the log-density of a flow out of the Newton system.

python -m experiments.quadratures

Value and gradient of the log-density of a continuous normalizing flow in D dimensions
with an exact trace: once as it is, where the log-density is found to feed back into
nothing, and once with zero times the log-density added to the vector field, after which
the dataflow says that everything is coupled, a system of D + 1 dimensions.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

from experiments.common.affordable import measure_methods
from experiments.common.command_line import run
from experiments.common.errors import check_least, check_lists
from experiments.common.flow import DURATION, ConcatSquash, Flow
from experiments.common.measurement import TimedConfig, for_all_sizes, ready
from experiments.common.results import conclude, format_table
from experiments.common.solvers import LABELS, METHODS
from experiments.common.timing import describe_seconds, quartiles
from experiments.common.workload import (
    Comparison,
    Workload,
    prepare_solve,
    with_arrays,
)

_BASELINE = "dopri5"
_COMPARED = ("deer", "deer_newton", "deer_newton_constant", "deer_sequential")
_WHOLE = ": whole"


@dataclasses.dataclass(frozen=True)
class Config(TimedConfig):
    """The settings.

    Attributes:
        dims: Dimensions of the flow.
        num_steps: Steps of Dopri5.
        batch_sizes: Numbers of points, solved under `jax.vmap`.
        width: Width of the three hidden layers.
        scale: Factor of the initial weights: a trained flow is stronger than a new one.
    """

    dims: tuple[int, ...] = (2, 10)
    num_steps: int = 64
    batch_sizes: tuple[int, ...] = (1, 16)
    width: int = 64
    scale: float = 2.0
    out: Path = Path("runs/quadratures/results.json")

    def reduced(self) -> Self:
        """The same measurement, small enough to take seconds."""
        small = dict(dims=(2,), num_steps=4, batch_sizes=(2,), width=4, repeats=2)
        return dataclasses.replace(self, **small)

    def check(self) -> None:
        """Raises an error that names the first setting that makes no sense."""
        super().check()
        check_least(self, num_steps=1, width=1)
        check_lists(self, "dims", "batch_sizes")


def make_workload(dim: int, batch_size: int, coupled: bool, config: Config) -> Workload:
    """The mean log-density of some points.

    If `coupled`, there is a dataflow from the log-density to everything.
    """
    flow_key, point_key = jr.split(jr.key(0))
    flow = Flow(ConcatSquash(dim, config.width, 3, flow_key), dim)
    flow = jax.tree.map(lambda x: config.scale * x if eqx.is_array(x) else x, flow)

    def field(t, state, flow):
        value, trace = flow.field_and_trace(t, state, None)
        none = 0 * state[1] if coupled else jnp.zeros((), value.dtype)
        return value + none, trace + none

    xs = jr.normal(point_key, (batch_size, dim), jnp.float32)
    return Workload(
        **with_arrays(flow, field),
        y0s=(xs, jnp.zeros(batch_size, jnp.float32)),
        t0=DURATION,
        t1=0.0,
        num_steps=config.num_steps,
        loss=lambda ys: jnp.mean(jax.vmap(flow.read_out)(ys)),
    )


def measure_cell(dim: int, batch_size: int, config: Config) -> dict[str, Any]:
    """All methods for one dimension and batch size."""
    alone, coupled = (
        make_workload(dim, batch_size, coupled, config) for coupled in (False, True)
    )

    def prepared():
        yield _BASELINE, prepare_solve(METHODS[_BASELINE], "gradient", alone)
        for name in _COMPARED:
            yield LABELS[name], prepare_solve(METHODS[name], "gradient", alone)
            whole = prepare_solve(METHODS[name], "gradient", coupled)
            yield f"{LABELS[name]}{_WHOLE}", whole

    methods = measure_methods(prepared(), Comparison(), math.inf, config.repeats)
    return {"dim": dim, "batch_size": batch_size, "methods": methods}


def table(results: dict[str, Any]) -> str:
    """One line for each dimension, batch size and method, in Markdown."""
    rows = []
    for cell in results["cells"]:
        methods = cell["methods"]
        for name in methods:
            if f"{name}{_WHOLE}" not in methods:
                continue
            part, whole = methods[name], methods[f"{name}{_WHOLE}"]
            seconds = [each["seconds"] for each in (part, whole)]
            (_, own, _), (_, other, _) = map(quartiles, seconds)
            row = [name, str(cell.get("dim", 2)), str(cell["batch_size"])]
            row += [describe_seconds(each, ".2f") for each in seconds]
            row += [f"{other / own:.2f}", f"{part['num_iterations']:.0f}"]
            _, dopri5, _ = quartiles(methods[_BASELINE]["seconds"])
            rows.append([*row, f"{dopri5:.2f}"])
    head = ("method", "D", "batch", "left out (ms)", "whole system (ms)", "ratio")
    return format_table((*head, "iterations", "Dopri5 (ms)"), rows)


def main(config: Config) -> dict[str, Any]:
    """Measures, prints and writes the results."""
    config = ready(config)
    cells = for_all_sizes(config, measure_cell)
    return conclude("quadratures", config, "float32", table, cells=cells)


if __name__ == "__main__":
    run(main, Config)
