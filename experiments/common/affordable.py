"""What of a measurement takes too long or too much memory, and is left out.

In place of its timings it has an entry `skipped`, with a word (`why`), a short reason
for tables (`detail`) and, if it was too slow, `expected_seconds`.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from experiments.common.timing import (
    Compiled,
    compile_ahead,
    describe_seconds,
    quartiles,
    take_turns,
)


@dataclasses.dataclass
class Prepared:
    """A compiled function, what it returned when first called, and how long it took."""

    compiled: Compiled
    value: Any
    seconds: float


def too_slow(seconds: float) -> dict[str, Any]:
    """The entry of what is not called, since one call would take so long."""
    detail = f"{seconds:.0f} s expected"
    return {"skipped": {"why": "time", "detail": detail, "expected_seconds": seconds}}


def too_large(detail: str) -> dict[str, Any]:
    """The entry of what does not fit into the memory."""
    return {"skipped": {"why": "memory", "detail": detail}}


def expected_seconds(measured: dict[str, Any], ratio: float) -> float | None:
    """What a call on `ratio` times as much data takes, if twice takes twice as long.

    Args:
        measured: the entry of the smaller one, timed or left out.
        ratio: how many times as much data there are.

    Returns:
        The seconds, or `None` if nothing is known.
    """
    if "skipped" in measured:
        seconds = measured["skipped"].get("expected_seconds")
        return None if seconds is None else ratio * seconds
    _, median, _ = quartiles(measured["seconds"])
    return ratio * median / 1000


def reason_to_skip(
    name: str,
    cell: dict[str, Any],
    cells: Iterable[dict[str, Any]],
    max_seconds: float,
) -> dict[str, Any] | None:
    """Why a method is left out before anything is compiled, if it is.

    Args:
        name: the method.
        cell: where: all that tells it from other cells, `num_steps` among it.
        cells: those measured before.
        max_seconds: what one call may take, judged by the next smaller number of
            steps.
    """
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
    if expected is None or expected <= max_seconds:
        return None
    return too_slow(expected)


def prepare(
    function: Callable, arguments: tuple[Any, ...], max_gigabytes: float
) -> Prepared | dict[str, Any]:
    """Compiles and calls a function of `jax.jit`, if it fits into the memory.

    Args:
        function: what to compile.
        arguments: what for.
        max_gigabytes: how much memory it may need beside its arguments.

    Returns:
        The compiled function; or, where it was not called, its entry.
    """
    try:
        compiled = compile_ahead(function, arguments)
        memory = compiled.function.memory_analysis()
        needed = (memory.temp_size_in_bytes + memory.output_size_in_bytes) / 1e9
        if needed > max_gigabytes:
            return too_large(f"{needed:.0f} GB needed")
        begin = time.perf_counter()
        value = compiled.call()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return too_large("too little memory")
    return Prepared(compiled, value, time.perf_counter() - begin)


def take_affordable_turns(
    prepared: Sequence[Prepared], seconds: float, repeats: int
) -> None:
    """Times what was prepared, in turns, as often as there is time, at least once.

    Args:
        prepared: what to time.
        seconds: what all calls may take together, as far as first calls show.
        repeats: calls of each, at most.
    """
    if not prepared:
        return
    # Each turn is two calls.
    affordable = seconds / (2 * sum(each.seconds for each in prepared))
    compiled = [each.compiled for each in prepared]
    take_turns(compiled, int(min(max(affordable, 1), repeats)))


def measure_methods(
    prepared: Iterable[tuple[str, Prepared | dict[str, Any]]],
    describe: Callable[[str, Prepared], dict[str, Any]],
    seconds: float,
    repeats: int,
) -> dict[str, dict[str, Any]]:
    """Compiles the methods of a cell, describes what they return, and times them.

    Args:
        prepared: names, with what `prepare` returns; made one after another.
        describe: what to keep of the first call of a method beside its timings.
        seconds: see `take_affordable_turns`.
        repeats: see `take_affordable_turns`.

    Returns:
        By name, what is kept of the method, or why it was left out.
    """
    entries: dict[str, dict[str, Any]] = {}
    timed: dict[str, Prepared] = {}
    for name, found in prepared:
        if isinstance(found, dict):
            entries[name] = found
            continue
        timed[name] = found
        compile_seconds = {"compile_seconds": found.compiled.compile_seconds}
        entries[name] = compile_seconds | describe(name, found)
    take_affordable_turns(list(timed.values()), seconds, repeats)
    for name, each in timed.items():
        entries[name]["seconds"] = each.compiled.seconds
    return entries


def speed_up(methods: dict[str, dict[str, Any]], name: str, over: str) -> float | str:
    """How often faster than another method, or in a word why that is not known."""
    for each in (name, over):
        if each not in methods:
            return "none"
        if "skipped" in methods[each]:
            return methods[each]["skipped"]["why"]
    own, other = (quartiles(methods[each]["seconds"])[1] for each in (name, over))
    return other / own


def describe_difference(methods: dict[str, dict[str, Any]]) -> str:
    """The largest difference of values or gradients, as it stands in a table."""
    keys = ("value_difference", "gradient_difference")
    known = [each[key] for each in methods.values() for key in keys if key in each]
    return f"{max(known):.0e}" if known else "-"


def describe_time(method: dict[str, Any], spec: str = ".3g") -> str:
    """Median and quartiles in milliseconds, or why there are none."""
    if "skipped" in method:
        return f"left out: {method['skipped']['detail']}"
    return describe_seconds(method["seconds"], spec)
