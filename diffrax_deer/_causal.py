"""What trajectories, whose steps depend on none after them, are handled with."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from ._custom_types import State, States


def shift(y0: State, ys: States) -> States:
    """The predecessors `(y_0, ..., y_{N-1})` of the states `(y_1, ..., y_N)`."""
    return jnp.concatenate([y0[None], ys[:-1]])


def norm(x: Float[Array, "... state"]) -> Float[Array, "..."]:
    """The norm of a state: unlike its components, it rarely passes through zero."""
    return jnp.max(jnp.abs(x), axis=-1)


def prefix(good: Bool[Array, " time"]) -> Int[Array, ""]:
    """The number of leading `True`s."""
    return jnp.where(jnp.all(good), good.size, jnp.argmin(good))


def hold(y0: State, ys: States, num_known: Int[Array, ""]) -> States:
    """From the end of the `num_known` leading states on the last of them, or `y0`."""
    last = jnp.where(num_known == 0, y0, ys[jnp.maximum(num_known - 1, 0)])
    return jnp.where(jnp.arange(len(ys))[:, None] < num_known, ys, last)


def select(pred: Bool[Array, ""], a: PyTree[Any], b: PyTree[Any]) -> PyTree[Any]:
    """All leaves of `a` if `pred`, else those of `b`."""
    return jax.tree.map(lambda a, b: jnp.where(pred, a, b), a, b)
