"""One cell: all its methods compiled, compared and timed in turns."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from experiments.benchmark import methods, workloads
from experiments.benchmark.matching import matching_tolerance
from experiments.benchmark.methods import BASELINE, METHODS, MethodName
from experiments.benchmark.settings import Config
from experiments.benchmark.workloads import Workload
from experiments.common.affordable import (
    Prepared,
    expected_seconds,
    prepare,
    take_affordable_turns,
    too_slow,
)
from experiments.common.timing import Compiled, compile_ahead, largest_difference

# Where all methods are measured.
_HEADLINES = (
    {"workload": "mlp", "dim": 2, "width": 32, "num_steps": 128},
    {"workload": "fitzhugh_nagumo", "num_steps": 1000},
    {"workload": "lotka_volterra", "num_steps": 1000},
)
# In a quick check of all workloads, since they differ little from others.
_LEFT_OUT = ("deer_sequential", "deer_newton")


def is_headline(cell: dict[str, Any]) -> bool:
    """Whether all methods are compared there."""
    return any(each.items() <= cell.items() for each in _HEADLINES)


def names_for(cell: dict[str, Any], config: Config) -> list[MethodName]:
    """The methods of a cell, the baseline first, since all are compared with it."""
    names = [name for name, method in METHODS.items() if method.everywhere]
    if is_headline(cell):
        names = [name for name in METHODS if name != "paper"]
    elif config.smoke:
        names = [name for name in names if name not in _LEFT_OUT]
    return [name for name in names if name in config.methods]


def analyze(compiled: Compiled) -> dict[str, Any]:
    """What the compiler knows of a function: time, memory, operations.

    What is in a loop is counted once, however often it is repeated.
    """
    costs = compiled.function.cost_analysis() or {}
    costs = costs[0] if isinstance(costs, list) else costs
    memory = compiled.function.memory_analysis()
    return {
        "compile_seconds": compiled.compile_seconds,
        "temporary_bytes": None if memory is None else memory.temp_size_in_bytes,
        "flops": costs.get("flops"),
        "bytes_accessed": costs.get("bytes accessed"),
    }


def error(found: PyTree, reference: PyTree) -> float:
    """The largest error, relative to the largest entry, computed in float64."""
    with jax.enable_x64(True):
        return largest_difference(found, reference)


@dataclasses.dataclass
class _Cell:
    """What the methods of a cell have in common.

    Attributes:
        before: the workload before a step of training.
        workload: the workload after it, which is timed.
        mode: what is computed.
        reference: the solution, to many digits.
    """

    before: Workload
    workload: Workload
    mode: str
    reference: PyTree

    def tolerance_of(self, name: MethodName, target: float) -> tuple[float, float]:
        """The largest tolerance with an error of at most `target`, and that error."""
        arguments = self.workload.params, self.workload.y0s, None

        def solve(tolerance, *arguments):
            function = methods.make_function(
                name, "forward", self.workload, tolerance, throw=False
            )
            return function(*arguments).ys

        tolerance = jnp.zeros((), jax.tree.leaves(self.workload.y0s)[0].dtype)
        compiled = compile_ahead(jax.jit(solve), (tolerance, *arguments)).function
        error_of = lambda value: error(
            compiled(jnp.asarray(value, tolerance.dtype), *arguments), self.reference
        )
        return matching_tolerance(
            error_of, target, float(jnp.finfo(tolerance.dtype).eps)
        )

    def prepare(
        self, name: MethodName, entry: dict[str, Any], target: float, most: float
    ) -> Prepared | dict[str, Any]:
        """Compiles a method and calls it for the first time; see `prepare`."""
        if name == "floor":
            return prepare(*methods.make_floor(self.mode, self.workload), most)
        tolerance = None
        if METHODS[name].adaptive:
            tolerance, _ = self.tolerance_of(name, target)
            entry["tolerance"] = tolerance
        function = methods.make_function(name, self.mode, self.workload, tolerance)
        states = methods.cold_states(name, self.workload)
        params = (self.before if METHODS[name].warm else self.workload).params
        found = prepare(function, (params, self.workload.y0s, states), most)
        if isinstance(found, Prepared) and METHODS[name].warm:
            arguments = self.workload.params, self.workload.y0s, found.value.state
            found.compiled.arguments = arguments
            found.value = found.compiled.call()
        return found


def _reason_to_skip(
    name: MethodName, cell: dict[str, Any], cells: list[dict[str, Any]], config: Config
) -> dict[str, Any] | None:
    """Why the method is left out before anything is compiled, if it is."""
    if name == BASELINE:
        return None
    others = {key: value for key, value in cell.items() if key != "num_steps"}
    shorter = [
        each
        for each in cells
        if others.items() <= each.items()
        and each["num_steps"] < cell["num_steps"]
        and name in each["methods"]
    ]
    if not shorter:
        return None
    longest = max(shorter, key=lambda each: each["num_steps"])
    ratio = cell["num_steps"] / longest["num_steps"]
    expected = expected_seconds(longest["methods"][name], ratio)
    if expected is None or expected <= config.most_seconds:
        return None
    return too_slow(expected)


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
    place = _Cell(before, workload, cell["mode"], workload.reference())
    entries: dict[str, dict[str, Any]] = {}
    prepared: dict[str, Prepared] = {}
    baseline, target = None, 0.0
    for name in names_for(cell, config):
        skipped = _reason_to_skip(name, cell, cells, config)
        entry: dict[str, Any] = {}
        found = skipped or place.prepare(name, entry, target, config.most_gigabytes)
        if isinstance(found, dict):
            entries[name] = found
            continue
        prepared[name] = found
        entries[name] = entry | analyze(found.compiled)
        if name == "floor":
            continue
        entries[name]["error"] = error(found.value.ys, place.reference)
        if name == BASELINE:
            baseline, target = found.value, entries[name]["error"]
        elif baseline is not None:
            entries[name] |= _compare(found.value, baseline)
    # What is claimed rests on the headlines: all repeats, however long they take.
    limit = math.inf if is_headline(cell) else config.cell_seconds
    take_affordable_turns(list(prepared.values()), limit, config.repeats)
    for name, each in prepared.items():
        entries[name]["seconds"] = each.compiled.seconds
    return cell | {"methods": entries}


def _compare(found: methods.Outcome, baseline: methods.Outcome) -> dict[str, Any]:
    entry = {"value_difference": largest_difference(found.ys, baseline.ys)}
    if found.gradient is not None:
        pair = found.gradient, baseline.gradient
        entry["gradient_difference"] = largest_difference(*pair)
    if found.num_iterations is not None:
        entry["num_iterations"] = int(jnp.max(found.num_iterations))
    return entry
