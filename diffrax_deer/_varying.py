"""Inside `jax.shard_map`, the type of a value says over which mesh axes it varies.

Loops, branches and derivatives want the same type on both sides. Where some operand
varies, all are made to, by `jax.lax.pcast`; its transpose is the sum over the devices.
"""

from typing import Any

import equinox as eqx
import jax
from jax import lax
from jaxtyping import PyTree


def _axes(tree: PyTree[Any]) -> frozenset[Any]:
    types = [jax.typeof(x) for x in jax.tree.leaves(tree) if eqx.is_array(x)]
    return frozenset().union(*(t.manual_axis_type.varying for t in types))


def varies(tree: PyTree[Any]) -> bool:
    """Whether some array in `tree` does; no, where `shard_map` does not keep count."""
    return bool(_axes(tree))


def uniform(tree: PyTree[Any], like: PyTree[Any] = None) -> PyTree[Any]:
    """All arrays in `tree` varying over the axes that any, or any of `like`, does."""
    axes = _axes((tree, like))

    def cast(x):
        missing = axes - _axes(x)
        return lax.pcast(x, tuple(missing), to="varying") if missing else x

    return jax.tree.map(lambda x: cast(x) if eqx.is_array(x) else x, tree)
