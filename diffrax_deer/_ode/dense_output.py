"""Dense output of a window: the inner solver's own interpolation of each step."""

from collections.abc import Callable

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .._custom_types import DenseInfo, RealScalarLike


class WindowInterpolation(diffrax.AbstractLocalInterpolation):
    """Interpolates the N steps of a window, to the inner solver's order.

    Finding the step costs O(log N), evaluating it what the inner solver's interpolation
    costs. `evaluate` and `derivative` as for any `diffrax.AbstractPath`.
    """

    t0: RealScalarLike
    t1: RealScalarLike
    ts: Float[Array, " times"]
    infos: PyTree[Array]
    interpolation_cls: Callable = eqx.field(static=True)

    def _step(
        self, t: RealScalarLike, left: bool
    ) -> diffrax.AbstractLocalInterpolation:
        side = "left" if left else "right"
        index = jnp.searchsorted(self.ts[1:-1], t, side=side)
        info = jax.tree.map(lambda x: x[index], self.infos)
        return self.interpolation_cls(t0=self.ts[index], t1=self.ts[index + 1], **info)

    def evaluate(
        self, t0: RealScalarLike, t1: RealScalarLike | None = None, left: bool = True
    ) -> PyTree[Array]:
        """The solution at `t0`, or its increment from `t0` to `t1`."""
        if t1 is None:
            return self._step(t0, left).evaluate(t0, left=left)
        start, end = self.evaluate(t0, left=left), self.evaluate(t1, left=left)
        return jax.tree.map(lambda a, b: b - a, start, end)


class WindowInterpolations(eqx.Module):
    """Makes a `WindowInterpolation` from dense information: `interpolation_cls`.

    A module and not a closure, because diffrax keeps it as a static field and compares.
    """

    interpolation_cls: Callable = eqx.field(static=True)

    def __call__(
        self,
        *,
        t0: RealScalarLike,
        t1: RealScalarLike,
        ts: Float[Array, " times"],
        infos: DenseInfo,
    ) -> WindowInterpolation:
        """The arguments are the entries of the dense information of one window."""
        return WindowInterpolation(t0, t1, ts, infos, self.interpolation_cls)


def windows_of_one_step(ends: tuple[Array, Array], infos: DenseInfo) -> DenseInfo:
    """The dense information of such windows, from that of each step between `ends`."""
    infos = jax.tree.map(lambda x: x[:, None], infos)
    return {"ts": jnp.stack(ends, axis=1), "infos": infos}
