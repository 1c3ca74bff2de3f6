"""Events, looked for at every inner step of a window."""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import optimistix as optx
from jax import lax
from jaxtyping import Array, Bool, Int, PyTree

from .._custom_types import RealScalarLike, Y


class EventSearch(eqx.Module):
    """The condition functions of a `diffrax.Event`, in the order of its leaves.

    - `event`: the event.
    - `call`: calls one condition function, given it, a time and a state.
    """

    event: diffrax.Event
    call: Callable[[Callable, RealScalarLike, Y], Array]

    def _flat(self) -> tuple[list[Callable], list[bool | None], Any]:
        functions, treedef = jax.tree.flatten(self.event.cond_fn, is_leaf=callable)
        return functions, treedef.flatten_up_to(self.event.direction), treedef

    def values(self, t: RealScalarLike, y: Y) -> PyTree[Array]:
        """All conditions, Boolean or real, each a scalar."""
        functions, _, treedef = self._flat()
        values = [jnp.asarray(self.call(function, t, y)) for function in functions]
        return jax.tree.unflatten(treedef, values)

    def first(
        self, before: PyTree[Array], values: PyTree[Array], valid: Bool[Array, " time"]
    ) -> tuple[Int[Array, ""], PyTree[Bool[Array, ""]]]:
        """The first step at whose end an event has occurred, N if none, and which.

        **Arguments:**

        - `before`: the values at the beginning of the first step.
        - `values`: those at the end of each step, leaves of shape `(time,)`.
        - `valid`: whether the step has been solved.
        """
        _, directions, treedef = self._flat()
        old, new = treedef.flatten_up_to(before), treedef.flatten_up_to(values)
        occurred = [
            valid & _occurred(jnp.concatenate([b[None], v[:-1]]), v, direction)
            for b, v, direction in zip(old, new, directions, strict=True)
        ]
        any_occurred = jnp.any(jnp.stack(occurred), axis=0)
        happened = jnp.any(any_occurred)
        index = jnp.where(happened, jnp.argmax(any_occurred), len(valid))
        # Of several events in one step the first leaf is the one that counts.
        mask, open_ = [], happened
        for o in occurred:
            here = open_ & o[jnp.minimum(index, len(valid) - 1)]
            mask.append(here)
            open_ = open_ & ~here
        return index, jax.tree.unflatten(treedef, mask)

    def locate(
        self,
        mask: PyTree[Bool[Array, ""]],
        interpolation: diffrax.AbstractLocalInterpolation,
    ) -> tuple[Array, Y, diffrax.RESULTS]:
        """Time, state and result of the root in the step in which an event occurred.

        A Boolean event, or none at all, is at the end of the step.
        """
        functions, _, treedef = self._flat()
        t0, t1 = jnp.asarray(interpolation.t0), jnp.asarray(interpolation.t1)

        def residual(t, _):
            y = interpolation.evaluate(t)
            residual = t1 - t
            for function, here in zip(
                functions, treedef.flatten_up_to(mask), strict=True
            ):
                value = jnp.asarray(self.call(function, t, y))
                if jnp.issubdtype(value.dtype, jnp.floating):
                    residual = jnp.where(here, value.astype(t.dtype), residual)
            return residual

        def find():
            root = optx.root_find(
                residual,
                self.event.root_finder,  # pyright: ignore
                y0=t1,
                options={"lower": t0, "upper": t1},
                throw=False,
            )
            return root.value, diffrax.RESULTS.promote(root.result)

        happened = jnp.any(jnp.stack(jax.tree.leaves(mask)))
        t, result = lax.cond(
            eqxi.unvmap_any(happened),
            find,
            lambda: (t1, diffrax.RESULTS.promote(optx.RESULTS.successful)),
        )
        return t, interpolation.evaluate(t), result


def _occurred(old: Array, new: Array, direction: bool | None) -> Bool[Array, " time"]:
    """Whether an event occurs between two values, as diffrax defines it."""
    if new.dtype == bool:
        return new
    old, new = jnp.sign(old), jnp.sign(new)
    if direction is None:
        return old != new
    return (old <= 0) & (new > 0) if direction else (old > 0) & (new <= 0)
