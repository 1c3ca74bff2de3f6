"""Pytrees as one real vector: here, and nowhere else."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from ._custom_types import RealScalarLike, State, Y


def widest(*dtypes: jnp.dtype) -> jnp.dtype:
    """The floating type of most bits; promotion may be strict, and would refuse."""
    return max(dtypes, key=lambda dtype: jnp.finfo(dtype).bits)


class Unravel(eqx.Module):
    """From a vector `(state,)` back to a pytree; hashable, and equal for equal leaves.

    - `leaves`: shapes and types of the leaves.
    - `treedef`: the structure.
    """

    leaves: tuple[jax.ShapeDtypeStruct, ...] = eqx.field(static=True)
    treedef: Any = eqx.field(static=True)

    def __call__(self, flat: State) -> Y:
        """The pytree of the components `flat`."""
        out, start = [], 0
        for leaf in self.leaves:
            is_complex = jnp.issubdtype(leaf.dtype, jnp.complexfloating)
            width = leaf.size * (2 if is_complex else 1)
            part = flat[start : start + width].astype(jnp.finfo(leaf.dtype).dtype)
            if is_complex:
                part = jax.lax.complex(part[: leaf.size], part[leaf.size :])
            out.append(part.reshape(leaf.shape))
            start += width
        return jax.tree.unflatten(self.treedef, out)


def ravel(y: Y) -> tuple[State, Unravel]:
    """The leaves of `y` as one real vector, and the way back.

    Complex leaves become their real and imaginary parts. The vector has the widest
    floating type of the leaves, at least float32; each leaf gets its own type back.
    Unlike `jax.flatten_util.ravel_pytree` it takes mixed types under strict promotion.
    """
    leaves, treedef = jax.tree.flatten(y)
    leaves = [jnp.asarray(x) for x in leaves]
    reals = [jnp.finfo(x.dtype).dtype for x in leaves]
    dtype = widest(jnp.dtype("float32"), *reals)

    def flatten(x: Array) -> Array:
        parts = [x.real, x.imag] if jnp.iscomplexobj(x) else [x]
        return jnp.concatenate([part.reshape(-1).astype(dtype) for part in parts])

    flat = jnp.concatenate([flatten(x) for x in leaves]) if leaves else jnp.zeros(0)
    shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves)
    return flat, Unravel(shapes, treedef)


def promoted(y: Y, *times: RealScalarLike) -> Y:
    """The leaves with the type that `diffrax.diffeqsolve` gives an initial value."""
    with jax.numpy_dtype_promotion("standard"):
        time = jnp.result_type(*times)
        if not jnp.issubdtype(time, jnp.floating):
            time = jnp.result_type(float)
        return jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x, time)), y)


def rounding(y: Y) -> float:
    """The rounding unit of the coarsest floating type in `y`.

    Not one for each component: what depends on a leaf of fewer digits jumps by their
    rounding, below which nothing converges but from the front (294 iterations for 300
    steps, where the coarsest takes 18).
    """
    dtypes = [jnp.result_type(x) for x in jax.tree.leaves(y)] or [jnp.dtype("float32")]
    return max(float(jnp.finfo(d).eps) for d in dtypes)
