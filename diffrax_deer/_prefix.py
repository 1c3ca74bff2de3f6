"""Trajectories of which a leading part is known: `(time, state)` and how to cut it."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from ._custom_types import State, States


def shift(y0: State, ys: States) -> States:
    """The predecessors `(y_0, ..., y_{N-1})` of the states `(y_1, ..., y_N)`."""
    return jnp.concatenate([y0[None], ys[:-1]])


def max_norm(x: Float[Array, "... state"]) -> Float[Array, "..."]:
    """The maximum norm of a state: unlike a component, it rarely passes through 0.

    Infinite where a component is NaN, which `jnp.max` drops from large arrays on a CPU.
    """
    return jnp.max(jnp.where(jnp.isnan(x), jnp.inf, jnp.abs(x)), axis=-1)


def count_leading_true(mask: Bool[Array, " time"]) -> Int[Array, ""]:
    """The number of leading `True`s."""
    return jnp.where(jnp.all(mask), mask.size, jnp.argmin(mask))


def hold_last(y0: State, ys: States, num_known: Int[Array, ""]) -> States:
    """The `num_known` leading states, then the last of them (or `y0`) repeated."""
    last = jnp.where(num_known == 0, y0, ys[jnp.maximum(num_known - 1, 0)])
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
