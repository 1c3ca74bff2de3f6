"""Where the steps lie: on one device, or in equal parts on those of a mesh axis.

What is here leaves the steps where they are: a prefix over all of them is one over each
part, and one over the ends of the parts.
"""

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PyTree

from ._prefix import shift


class TimeAxis(eqx.Module):
    """Along the axis `name` of `mesh`, or on one device if there is none."""

    mesh: Mesh | None = eqx.field(static=True, default=None)
    name: str | None = eqx.field(static=True, default=None)

    @property
    def is_sharded(self) -> bool:
        """Whether there is a mesh, if only of one device."""
        return self.mesh is not None

    def place(self, tree: PyTree[Array]) -> PyTree[Array]:
        """`tree`, leaves of leading axis `time` or `parts`, each where it belongs."""
        return self._constrained(tree, PartitionSpec(self.name))

    def share(self, tree: PyTree[Array]) -> PyTree[Array]:
        """`tree`, the same on all devices of the axis."""
        return self._constrained(tree, PartitionSpec())

    def _constrained(self, tree: PyTree[Array], spec: PartitionSpec) -> PyTree[Array]:
        if self.mesh is None:
            return tree
        return lax.with_sharding_constraint(tree, NamedSharding(self.mesh, spec))

    def cut(self, x: Array) -> Array:
        """`(time, ...)` to `(parts, steps, ...)`, filled up with zeros at the end."""
        num_parts = 1 if self.mesh is None else self.mesh.shape[self.name]
        missing = -len(x) % num_parts
        padding = (0, missing, 0), *[(0, 0, 0)] * (x.ndim - 1)
        x = lax.pad(x, jnp.zeros((), x.dtype), padding)
        return self.place(x.reshape(num_parts, -1, *x.shape[1:]))

    def join(self, parts: Array, num_steps: int) -> Array:
        """The inverse of `cut`."""
        return self.place(parts.reshape(-1, *parts.shape[2:])[:num_steps])

    def cummax(self, x: Float[Array, "time ..."]) -> Float[Array, "time ..."]:
        """The maximum over all steps so far."""
        if self.mesh is None:
            return lax.cummax(x)
        parts = lax.cummax(self.cut(x), axis=1)
        ends = lax.cummax(self.share(parts[:, -1]))
        before = self.share(shift(jnp.full_like(ends[0], -jnp.inf), ends))
        return self.join(jnp.maximum(parts, before[:, None]), len(x))
