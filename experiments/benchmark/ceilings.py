"""What the machine can do at the most: multiply matrices, and move numbers."""

from typing import Any

import jax
import jax.numpy as jnp

from experiments.common.timing import compile_ahead, take_turns

_SIZE = 2048
_BYTES = 256e6
_REPEATS = 7


def measure(smoke: bool) -> dict[str, float]:
    """Gflop/s of matrix products in both precisions, and GB/s of `a + s * b`."""
    size, num_bytes = (256, 1e6) if smoke else (_SIZE, _BYTES)
    found = {}
    for dtype in (jnp.float32, jnp.float64):
        with jax.enable_x64(dtype == jnp.float64):
            matrix = jnp.ones((size, size), dtype)
            seconds = _least_seconds(lambda a, b: a @ b, (matrix, matrix))
        found[f"matmul_gflops_{dtype.__name__}"] = 2 * size**3 / seconds / 1e9
    vector = jnp.ones(int(num_bytes) // 4, jnp.float32)
    seconds = _least_seconds(lambda a, b: a + 3 * b, (vector, vector))
    # Two are read and one is written.
    found["bandwidth_gigabytes"] = 3 * vector.nbytes / seconds / 1e9
    return found


def _least_seconds(function: Any, arguments: tuple[Any, ...]) -> float:
    compiled = compile_ahead(jax.jit(function), arguments)
    compiled.call()
    take_turns([compiled], _REPEATS)
    return min(compiled.seconds)
