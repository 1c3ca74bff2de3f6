"""What of a measurement takes too long or too much memory, and is left out.

In place of its timings it has an entry `skipped`, with a word (`why`), a short reason
for tables (`detail`) and, if it was too slow, `expected_seconds`.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from experiments.common.timing import Compiled, compile_ahead, quartiles, take_turns


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


def prepare(
    function: Callable, arguments: tuple[Any, ...], most_gigabytes: float
) -> Prepared | dict[str, Any]:
    """Compiles and calls a function of `jax.jit`, if it fits into the memory.

    Args:
        function: what to compile.
        arguments: what for.
        most_gigabytes: how much memory it may need beside its arguments.

    Returns:
        The compiled function; or, where it was not called, its entry.
    """
    try:
        compiled = compile_ahead(function, arguments)
        memory = compiled.function.memory_analysis()
        needed = (memory.temp_size_in_bytes + memory.output_size_in_bytes) / 1e9
        if needed > most_gigabytes:
            return too_large(f"{needed:.0f} GB needed")
        begin = time.perf_counter()
        value = compiled.call()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return too_large("too little memory")
    except ValueError as error:
        # The library refuses more Jacobians than fit into any memory.
        if "too many to hold" not in str(error):
            raise
        return too_large("too many Jacobians")
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


def speed_up(methods: dict[str, dict[str, Any]], name: str, over: str) -> float | str:
    """How often faster than another method, or in a word why that is not known."""
    for each in (name, over):
        if "skipped" in methods[each]:
            return methods[each]["skipped"]["why"]
    own, other = (quartiles(methods[each]["seconds"])[1] for each in (name, over))
    return other / own


def describe_time(method: dict[str, Any]) -> str:
    """Median and quartiles in milliseconds, or why there are none."""
    if "skipped" in method:
        return f"left out: {method['skipped']['detail']}"
    first, median, third = quartiles(method["seconds"])
    return f"{median:.3g} [{first:.3g}, {third:.3g}]"
