"""Trajectories of which a leading part is known: `(time, state)` and how to cut it."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from ._custom_types import IntScalarLike, State, States
from ._defaults import has_all_steps


def shift(y0: State, ys: States) -> States:
    """The predecessors `(y_0, ..., y_{N-1})` of the states `(y_1, ..., y_N)`."""
    # Not by a concatenation, which moves all steps where they lie on several devices.
    first = jnp.expand_dims(jnp.arange(len(ys)) == 0, range(1, ys.ndim))
    return jnp.where(first, y0[None], jnp.roll(ys, 1, axis=0))


def at(x: Shaped[Array, "time ..."], index: IntScalarLike) -> Shaped[Array, "..."]:
    """`x[index]`, as a sum, of which each of several devices has a part.

    Zero beyond the end. `x` itself is looked up where it holds no numbers, but keys.
    """
    if not jnp.issubdtype(x.dtype, jnp.number):
        return x[index]
    if has_all_steps():
        return x.at[index].get(mode="fill", fill_value=0)
    here = jnp.expand_dims(jnp.arange(len(x)) == index, range(1, x.ndim))
    return jnp.sum(jnp.where(here, x, jnp.zeros_like(x)), axis=0, dtype=x.dtype)


def max_norm(x: Float[Array, "... state"]) -> Float[Array, "..."]:
    """The maximum norm of a state: unlike a component, it rarely passes through 0.

    Infinite where a component is NaN, which `jnp.max` drops from large arrays on a CPU.
    """
    return jnp.max(jnp.where(jnp.isnan(x), jnp.inf, jnp.abs(x)), axis=-1)


def count_leading_true(mask: Bool[Array, " time"]) -> Int[Array, ""]:
    """The number of leading `True`s."""
    return jnp.min(jnp.where(mask, mask.size, jnp.arange(mask.size)))


def hold_last(y0: State, ys: States, num_known: Int[Array, ""]) -> States:
    """The `num_known` leading states, then the last of them (or `y0`) repeated."""
    last = jnp.where(num_known == 0, y0, at(ys, num_known - 1))
    return jnp.where(jnp.arange(len(ys))[:, None] < num_known, ys, last)


def select(pred: Bool[Array, ""], a: PyTree[Any], b: PyTree[Any]) -> PyTree[Any]:
    """All leaves of `a` if `pred`, else those of `b`."""
    return jax.tree.map(lambda a, b: jnp.where(pred, a, b), a, b)


@jax.custom_jvp
def with_derivative_of(computed: Array, known: Array) -> Array:
    """`known`, differentiated as `computed`, of which nothing else is needed."""
    del computed
    return known


@with_derivative_of.defjvp
def _(primals, tangents):
    return with_derivative_of(*primals), tangents[0]
