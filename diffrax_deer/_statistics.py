"""What a solve says about itself, and how it fails loudly where that is wanted."""

import functools as ft
from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array, Bool, Float, Int


class Statistics(eqx.Module):
    r"""What a solve has to say about itself.

    - `num_iterations`: how many times the trajectory, or a window of it, was updated; 0
        if the steps were made one after another.
    - `residual`: the largest component of $|\Phi_n(y_{n-1}) - y_n|$, in the units of y,
        measured on the result: over all steps, or over those up to the end of the
        window where the solve has stopped. Infinite where a step has no value; `None`
        if nothing was measured, because the steps were made one after another.
    - `num_solved`: the leading steps that are solved, N on success.
    - `result`: an `optimistix.RESULTS`.
    - `method`, `gradient`: how the solution was found, and how it is differentiated,
        with all choices made that were left open.
    """

    num_iterations: Int[Array, ""]
    residual: Float[Array, ""] | None
    num_solved: Int[Array, ""]
    result: optx.RESULTS
    method: Any = None
    gradient: Any = None


def nan_unless(succeeded: Bool[Array, ""], x: Array) -> Array:
    """`x`, or NaN; which is made only then, since `jax_debug_nans` sees constants."""
    nan = jnp.sqrt(jnp.where(succeeded, 1.0, -1.0)).astype(x.dtype)
    return jnp.where(succeeded, x, nan)


def raise_if_failed(tree: Any, result: optx.RESULTS, messages: list[str]) -> Any:
    """`tree`, which raises an error at run time unless the result is a success.

    The first message is for values that are not finite, the second for too few
    iterations.
    """
    failed = result != optx.RESULTS.successful
    which = jnp.where(result == optx.RESULTS.nonfinite, 0, 1)
    smooth, rest = eqx.partition(tree, eqx.is_inexact_array)
    if not jax.tree.leaves(smooth):
        return tree
    # Not the tree itself: it would be copied through the condition.
    failed = eqxi.branched_error_if(failed, failed, which, messages)
    smooth = jax.tree.map(ft.partial(nan_unless, ~failed), smooth)
    return eqx.combine(smooth, rest)
