"""How many copies `jax.vmap` makes of a program: work that fills a device."""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Int, PyTree


@ft.cache
def _counter(count: int) -> Callable:
    """A function of arrays that returns `count`, times the size of any batch."""

    @custom_vmap
    def counter(arrays: list[Array]) -> Array:
        del arrays
        return jnp.array(count, jnp.int32)

    @counter.def_vmap
    def _(size: int, is_batched: Any, arrays: list[Array]) -> tuple[Array, bool]:
        (flags,) = is_batched
        pairs = zip(arrays, flags, strict=True)
        # Whoever else maps it must still be able to see that.
        one = lambda x: x[0] if size else jnp.zeros(x.shape[1:], x.dtype)
        arrays = [one(x) if batched else x for x, batched in pairs]
        return _counter(count * size)(arrays), False

    return counter


def batch_size(tree: PyTree[Any]) -> Int[Array, ""]:
    """The product of the sizes of all `jax.vmap` around that map any array of `tree`.

    A constant in the compiled program, hence also a choice made by it.
    """
    arrays = [x for x in jax.tree.leaves(tree) if eqx.is_inexact_array(x)]
    return _counter(1)(lax.stop_gradient(arrays))


def by_amount(
    tree: PyTree[Any],
    amount: int,
    most: int,
    few: Callable[[], Any],
    many: Callable[[], Any],
) -> Any:
    """That of `few` if `amount` times the batch is at most `most`, else that of `many`.

    `amount` is that of one sample; the batch is that of `tree`. Both are traced, unless
    one sample is too much, and one is compiled.
    """
    if amount > most:
        return many()
    return lax.cond(batch_size(tree) * amount <= most, few, many)
