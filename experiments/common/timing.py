"""Functions compiled and timed in turns, so that they can be compared."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree
from tqdm import tqdm


def compile_and_time(
    functions: dict[str, tuple[Callable, tuple[Any, ...]]], repeats: int
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Compiles all functions, then calls them in turns.

    Args:
        functions: jitted functions and their arguments by name.
        repeats: number of timed calls of each; one more before them is not timed.

    Returns:
        By name, `compile_seconds` (tracing and lowering included) with `seconds`, a
        list; and by name what the functions returned.
    """
    timings: dict[str, dict[str, Any]] = {}
    compiled, values = {}, {}
    for name, (function, arguments) in functions.items():
        begin = time.perf_counter()
        jitted: Any = function
        compiled[name] = jitted.lower(*arguments).compile()
        compile_seconds = time.perf_counter() - begin
        timings[name] = {"compile_seconds": compile_seconds, "seconds": []}
        values[name] = jax.block_until_ready(compiled[name](*arguments))
    for _ in tqdm(range(repeats), unit="round", leave=False):
        for name, (_, arguments) in functions.items():
            begin = time.perf_counter()
            jax.block_until_ready(compiled[name](*arguments))
            timings[name]["seconds"].append(time.perf_counter() - begin)
    return timings, values


def quartiles(seconds: list[float]) -> tuple[float, float, float]:
    """The quartiles of timings, in milliseconds."""
    first, median, third = (1000 * np.percentile(seconds, (25, 50, 75))).tolist()
    return first, median, third


def largest_difference(found: PyTree[Array], reference: PyTree[Array]) -> float:
    """The largest difference of any entry, relative to the largest of all entries."""
    largest = lambda tree: max(
        float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(tree)
    )
    return largest(jax.tree.map(jnp.subtract, found, reference)) / largest(reference)
