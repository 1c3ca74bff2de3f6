r"""The matrices $A_n$ of an affine recurrence, by their structure.

Each class holds the entries of one matrix, or with a leading axis `time` of all
matrices, and knows how to multiply. The methods are written for one matrix and meant
for `jax.vmap`, which maps over a transition as over any pytree. A structure of one's
own is one more such class.
"""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._custom_types import State, States
from .products import matmul, matvec

# Traced once, not again on every level of a parallel scan.
_matmul, _matvec = jax.jit(matmul), jax.jit(matvec)


class AbstractTransition(eqx.Module):
    """A square matrix of shape `(state, state)`, in some compressed form.

    - `entries`: the numbers that are held, of a real floating type.
    """

    entries: eqx.AbstractVar[Array]

    @abc.abstractmethod
    def matvec(self, y: State) -> State:
        """The product with a vector `(state,)`."""

    @abc.abstractmethod
    def matmul(self, other: "AbstractTransition") -> "AbstractTransition":
        """The product with another transition of the same class, in that order."""

    @abc.abstractmethod
    def transpose(self) -> "AbstractTransition":
        """The transposed matrix."""

    @abc.abstractmethod
    def clear_columns(self, mask: Bool[Array, " state"]) -> "AbstractTransition":
        """Zero in the columns that `mask` names, whatever was there.

        The product with a vector that is zero there stays finite where entries are not.
        """


class Dense(AbstractTransition):
    """All entries, `(state, state)`. A product with a vector costs O(D²)."""

    entries: Float[Array, "*time state state"]

    def matvec(self, y):
        return _matvec(self.entries, y)

    def matmul(self, other):
        return Dense(_matmul(self.entries, other.entries))

    def transpose(self):
        return Dense(self.entries.T)

    def clear_columns(self, mask):
        return Dense(jnp.where(mask[None, :], 0.0, self.entries))


class Diagonal(AbstractTransition):
    """The diagonal, `(state,)`; everything beside it is zero. Products cost O(D)."""

    entries: Float[Array, "*time state"]

    def matvec(self, y):
        return self.entries * y

    def matmul(self, other):
        return Diagonal(self.entries * other.entries)

    def transpose(self):
        return self

    def clear_columns(self, mask):
        return Diagonal(jnp.where(mask, 0.0, self.entries))


class BlockDiagonal(AbstractTransition):
    """The diagonal blocks, `(blocks, block, block)`; everything beside them is zero.

    The state consists of the blocks one after the other. A product with a vector costs
    O(D b) for blocks of size b.
    """

    entries: Float[Array, "*time blocks block block"]

    def matvec(self, y):
        blocks = y.reshape(self.entries.shape[:2])
        return jax.vmap(_matvec)(self.entries, blocks).reshape(-1)

    def matmul(self, other):
        return BlockDiagonal(jax.vmap(_matmul)(self.entries, other.entries))

    def transpose(self):
        return BlockDiagonal(jnp.swapaxes(self.entries, -1, -2))

    def clear_columns(self, mask):
        mask = mask.reshape(self.entries.shape[0], 1, self.entries.shape[2])
        return BlockDiagonal(jnp.where(mask, 0.0, self.entries))


def multiply(a: AbstractTransition, ys: States) -> States:
    """The products of all transitions, of leading axis `time`, with all of `ys`."""
    return jax.vmap(lambda a, y: a.matvec(y))(a, ys)


def are_finite(a: AbstractTransition) -> Bool[Array, " time"]:
    """Whether all entries are finite, for each step."""
    axes = tuple(range(1, a.entries.ndim))
    return jnp.all(jnp.isfinite(a.entries), axis=axes)


def zero_unless(
    mask: Bool[Array, " time"], a: AbstractTransition
) -> AbstractTransition:
    """`a` at the steps that `mask` names, zero at the others."""
    keep = lambda m, x: jnp.where(m, x, jnp.zeros_like(x))
    return jax.tree.map(lambda x: jax.vmap(keep)(mask, x), a)
