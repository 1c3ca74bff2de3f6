"""Where the steps lie: on one device, or in equal parts on those of a mesh axis.

What is here leaves the steps where they are: a prefix over all of them is one over each
part, and one over the ends of the parts.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PyTree

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

    @property
    def num_parts(self) -> int:
        """The number of devices along the axis."""
        return 1 if self.mesh is None else self.mesh.shape[self.name]

    def cut(self, x: Array, fill: float = 0) -> Array:
        """`(time, ...)` to `(parts, steps, ...)`, filled up at the end."""
        missing = -len(x) % self.num_parts
        padding = (0, missing, 0), *[(0, 0, 0)] * (x.ndim - 1)
        x = lax.pad(x, jnp.array(fill, x.dtype), padding)
        return self.place(x.reshape(self.num_parts, -1, *x.shape[1:]))

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

    def searchsorted(
        self, x: Float[Array, " time"], new: Float[Array, " times"]
    ) -> Int[Array, " times"]:
        """How many of `x`, which increase, are less than each of `new`."""
        if self.mesh is None:
            return jnp.searchsorted(x, new)
        parts, count = self.cut(x, jnp.inf), lambda new, x: jnp.searchsorted(x, new)
        if len(new) * self.num_parts > len(x):
            return self._meet(count, new, parts)
        counts = jax.vmap(count, (None, 0))(self.share(new), parts)
        return self.share(jnp.sum(counts, axis=0, dtype=counts.dtype))

    def take(self, tree: PyTree[Array], index: Int[Array, " times"]) -> PyTree[Array]:
        """`x[index]` of leaves of leading axis `time`; in parts, if that is much."""
        num_steps = len(jax.tree.leaves(tree)[0])
        if self.mesh is None or len(index) * self.num_parts <= num_steps:
            return self.share(jax.tree.map(lambda x: x[index], tree))

        def pick(index, part):
            first, tree = part
            # Beyond the end, where there is nothing, also for what lies before.
            index = jnp.where(index < first, num_steps, index - first)
            look_up = lambda x: x.at[index].get(mode="fill", fill_value=0)
            return jax.tree.map(look_up, tree)

        tree = jax.tree.map(self.cut, tree)
        first = jnp.arange(self.num_parts, dtype=index.dtype)
        first *= -(-num_steps // self.num_parts)
        return self._meet(pick, index, (self.place(first), tree))

    def _meet(self, f: Callable, x: Array, parts: PyTree[Array]) -> PyTree[Array]:
        """The sum of `f(x, part)`; each part passes all devices, one after another."""
        size, x, every = len(x), self.cut(x), jax.vmap(f)
        onwards = lambda part: self.place(jnp.roll(part, 1, axis=0))

        # What `f` makes of each part is not kept for the derivative.
        @jax.checkpoint
        def step(carry, _):
            total, parts = carry
            total = jax.tree.map(jnp.add, total, every(x, parts))
            return (total, jax.tree.map(onwards, parts)), None

        zeros = lambda s: jnp.zeros(s.shape, s.dtype)
        total = jax.tree.map(zeros, jax.eval_shape(every, x, parts))
        (total, _), _ = lax.scan(step, (total, parts), length=self.num_parts)
        return jax.tree.map(lambda y: self.join(y, size), total)
