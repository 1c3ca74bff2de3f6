"""One cell: all its methods compiled, compared and timed in turns."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from experiments.benchmark import workloads
from experiments.benchmark.matching import matching_tolerance
from experiments.benchmark.settings import Config
from experiments.common import hand_written
from experiments.common.affordable import (
    Prepared,
    measure_methods,
    prepare,
    reason_to_skip,
)
from experiments.common.solvers import BASELINE, BENCHMARKED, METHODS, MethodName
from experiments.common.timing import Compiled, compile_ahead, largest_difference
from experiments.common.workload import (
    Comparison,
    Workload,
    make_function,
    prepare_solve,
)

# Where all methods are measured.
_HEADLINES = (
    {"workload": "mlp", "dim": 2, "width": 32, "num_steps": 128},
    {"workload": "fitzhugh_nagumo", "num_steps": 1000},
    {"workload": "lotka_volterra", "num_steps": 1000},
)
# What is measured in every cell, and what of it is left out of a quick check, since it
# differs little from the rest.
EVERYWHERE: tuple[MethodName, ...] = (
    BASELINE,
    "scan_rk45",
    "deer",
    "deer_sequential",
    "deer_newton",
    "deer_newton_warm",
    "floor",
)
_LEFT_OUT = ("deer_sequential", "deer_newton")


def is_headline(cell: dict[str, Any]) -> bool:
    """Whether all methods are compared there."""
    return any(each.items() <= cell.items() for each in _HEADLINES)


def names_for(cell: dict[str, Any], config: Config) -> list[MethodName]:
    """The methods of a cell, the baseline first, since all are compared with it."""
    names = [name for name in BENCHMARKED if name in EVERYWHERE]
    if is_headline(cell):
        names = [name for name in BENCHMARKED if name != "paper"]
    elif config.smoke:
        names = [name for name in names if name not in _LEFT_OUT]
    return [name for name in names if name in config.methods]


def analyze(compiled: Compiled) -> dict[str, Any]:
    """What the compiler knows of a function: memory and operations.

    What is in a loop is counted once, however often it is repeated.
    """
    costs = compiled.function.cost_analysis() or {}
    costs = costs[0] if isinstance(costs, list) else costs
    memory = compiled.function.memory_analysis()
    return {
        "temporary_bytes": None if memory is None else memory.temp_size_in_bytes,
        "flops": costs.get("flops"),
        "bytes_accessed": costs.get("bytes accessed"),
    }


def error(found: PyTree, reference: PyTree) -> float:
    """The largest error, relative to the largest entry, computed in float64."""
    with jax.enable_x64(True):
        return largest_difference(found, reference)


def make_floor(mode: str, workload: Workload) -> tuple[Any, tuple[Any, ...]]:
    """What no method in parallel can do without, and what to call it with.

    All steps once, from the states of the solution, and how parameters and states
    enter into them once.
    """
    field, bounds = workload.field, (workload.t0, workload.t1)
    num_steps = workload.interval().known_steps
    trajectory = lambda y0, params: hand_written.trajectory(
        field, *bounds, num_steps, y0, params
    )
    whole = jax.vmap(trajectory, in_axes=(0, None))
    ys = jax.jit(whole)(workload.y0s, workload.params)
    join = lambda y0, ys: jnp.concatenate([y0[:, None], ys[:, :-1]], axis=1)
    befores = jax.tree.map(join, workload.y0s, ys)

    def forward(params, befores):
        step = lambda y: hand_written.all_steps(field, *bounds, y, params)
        return jax.vmap(step)(befores)

    def gradient(params, befores):
        ys, pull_back = jax.vjp(forward, params, befores)
        return ys, pull_back(ys)

    function = jax.jit(forward if mode == "forward" else gradient)
    return function, (workload.params, befores)


@dataclasses.dataclass
class _Cell:
    """What the methods of a cell have in common.

    Attributes:
        before: the workload before a step of training.
        workload: the workload after it, which is timed.
        mode: what is computed.
        reference: the solution, to many digits.
        comparison: with the baseline.
        entries: by name, what else is known.
    """

    before: Workload
    workload: Workload
    mode: str
    reference: PyTree
    comparison: Comparison = dataclasses.field(default_factory=Comparison)
    entries: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def tolerance_of(self, name: MethodName) -> float:
        """The largest tolerance with at most the error of the baseline."""
        arguments = self.workload.params, self.workload.y0s, None

        def solve(tolerance, *arguments):
            function = make_function(
                METHODS[name], "forward", self.workload, tolerance, throw=False
            )
            return function(*arguments).ys

        tolerance = jnp.zeros((), jax.tree.leaves(self.workload.y0s)[0].dtype)
        compiled = compile_ahead(jax.jit(solve), (tolerance, *arguments)).function
        error_of = lambda value: error(
            compiled(jnp.asarray(value, tolerance.dtype), *arguments), self.reference
        )
        target = self.entries[BASELINE]["error"]
        eps = float(jnp.finfo(tolerance.dtype).eps)
        return matching_tolerance(error_of, target, eps)[0]

    def prepare(self, name: MethodName, max_gigabytes: float) -> Any:
        """Compiles a method and calls it for the first time; see `prepare`."""
        if name == "floor":
            return prepare(*make_floor(self.mode, self.workload), max_gigabytes)
        entry = self.entries.setdefault(name, {})
        if METHODS[name].is_adaptive:
            entry["tolerance"] = self.tolerance_of(name)
        return prepare_solve(
            METHODS[name],
            self.mode,
            self.workload,
            self.before,
            entry.get("tolerance"),
            max_gigabytes,
        )

    def describe(self, name: str, prepared: Prepared) -> dict[str, Any]:
        """What there is to say about a method beside its timings."""
        analysis = analyze(prepared.compiled)
        if name == "floor":
            return analysis
        entry = self.entries[name]
        entry["error"] = error(prepared.value.ys, self.reference)
        return entry | analysis | self.comparison(name, prepared)


def measure(
    cell: dict[str, Any], cells: list[dict[str, Any]], config: Config
) -> dict[str, Any]:
    """All methods at one place.

    Args:
        cell: where: `workload`, `mode` and sizes.
        cells: those measured before.
        config: the settings.

    Returns:
        The cell, with its methods.
    """
    before = workloads.make(cell)
    workload = before.after_one_step()
    place = _Cell(before, workload, cell["mode"], workload.reference().ys)

    def prepared():
        for name in names_for(cell, config):
            skipped = None
            if name != BASELINE:
                skipped = reason_to_skip(name, cell, cells, config.max_seconds)
            yield name, skipped or place.prepare(name, config.max_gigabytes)

    # What is claimed rests on the headlines: all repeats, however long they take.
    limit = math.inf if is_headline(cell) else config.cell_seconds
    entries = measure_methods(prepared(), place.describe, limit, config.repeats)
    return cell | {"methods": entries}
