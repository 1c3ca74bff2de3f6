"""Functions compiled and timed in turns, so that they can be compared."""

import dataclasses
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree
from tqdm import tqdm


@dataclasses.dataclass
class Compiled:
    """A compiled function with its arguments, and how long it takes.

    Attributes:
        function: what the compiler returned.
        arguments: what to call it with.
        compile_seconds: for tracing, lowering and compiling.
        seconds: the timed calls.
    """

    function: Any
    arguments: tuple[Any, ...]
    compile_seconds: float
    seconds: list[float] = dataclasses.field(default_factory=list)

    def call(self) -> Any:
        """Calls it and waits for the result."""
        return jax.block_until_ready(self.function(*self.arguments))


def compile_ahead(function: Callable, arguments: tuple[Any, ...]) -> Compiled:
    """Compiles a jitted function for its arguments, without calling it."""
    begin = time.perf_counter()
    jitted: Any = function
    compiled = jitted.lower(*arguments).compile()
    return Compiled(compiled, arguments, time.perf_counter() - begin)


def take_turns(functions: Iterable[Compiled], repeats: int) -> None:
    """Times all functions, one after the other.

    In its turn a function is called twice, and timed the second time: in training it
    follows itself, and does not find the caches filled by something else.
    """
    functions = list(functions)
    for _ in tqdm(range(repeats), unit="round", leave=False):
        for function in functions:
            function.call()
            begin = time.perf_counter()
            function.call()
            function.seconds.append(time.perf_counter() - begin)


def quartiles(seconds: list[float]) -> tuple[float, float, float]:
    """The quartiles of timings, in milliseconds."""
    first, median, third = (1000 * np.percentile(seconds, (25, 50, 75))).tolist()
    return first, median, third


def describe_seconds(seconds: list[float], spec: str = ".3g") -> str:
    """Median and quartiles of timings in milliseconds, as they stand in a table."""
    first, median, third = (format(value, spec) for value in quartiles(seconds))
    return f"{median} [{first}, {third}]"


def largest_difference(found: PyTree[Array], reference: PyTree[Array]) -> float:
    """The largest difference of any entry, relative to the largest of all entries."""
    largest = lambda tree: max(
        float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(tree)
    )
    return largest(jax.tree.map(jnp.subtract, found, reference)) / largest(reference)
