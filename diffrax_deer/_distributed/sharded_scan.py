r"""The affine recurrence over steps that lie on several devices.

A part of the steps is itself an affine map of the state before it. Each device composes
its own steps to that map; the maps of all devices, which are few, are composed by every
device for itself; and each solves its own steps from the state that reaches them:
O(N/P) steps and one exchange of P (D² + D) numbers for P devices.
"""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, Mesh

from .._affine_scan import AbstractScan, apply, compose, default_scan
from .._checks import check_instance
from .._custom_types import State, States
from .._defaults import prefers_sequential_scan
from .._linalg.transitions import AbstractTransition
from .._time_axis import TimeAxis


class ShardedScan(AbstractScan):
    """All steps at once, in equal parts on the devices of one axis of a mesh.

    For trajectories that are too long for one device, under `jax.jit`:

        mesh = jax.make_mesh((8,), ("time",), axis_types=(jax.sharding.AxisType.Auto,))
        scan = ShardedScan(mesh, "time")
        method, gradient = Newton(scan=scan), ParallelGradient(scan=scan)

    `Newton` then iterates on all steps, whatever its window, and predicts constant
    states unless told otherwise. The other axes of the mesh are free for a batch, by
    `jax.vmap`. The number of steps N need not be a multiple of that of devices P.

    An error at run time would leave the other devices waiting for ever, so that
    `deer_scan` and `DEERRNN` have to be called with `throw=False`; so has
    `diffrax.diffeqsolve`, which nothing reminds of it.

    **Arguments:**

    - `mesh`: a `jax.sharding.Mesh` with an axis `axis` of type `AxisType.Auto`.
    - `axis`: the name of the axis that the steps are laid over.

    **Raises:** `TypeError` or `ValueError` for a mesh without such an axis.

    **Cost** on each device: O(N/P D³) work for dense transitions, and O(N/P D²) memory;
    O(P D²) numbers are exchanged, once.

    ??? cite "Reference"

        The three phases are those of Blelloch, *Prefix sums and their applications*,
        CMU-CS-90-190 (1990), section 1.3.
    """

    mesh: Mesh = eqx.field(static=True)
    axis: str = eqx.field(static=True)

    def __check_init__(self):
        check_instance("mesh", self.mesh, Mesh, 'jax.make_mesh((8,), ("time",), ...)')
        types = dict(zip(self.mesh.axis_names, self.mesh.axis_types, strict=True))
        if types.get(self.axis) is not AxisType.Auto:
            msg = (
                f"`mesh` must have an axis {self.axis!r} of type `AxisType.Auto`; got "
                f"{types}. Make it with `jax.make_mesh(shape, names, axis_types="
                "(jax.sharding.AxisType.Auto,) * len(names))`."
            )
            raise ValueError(msg)

    @property
    def time_axis(self):
        """That of the mesh."""
        return TimeAxis(self.mesh, self.axis)

    def __call__(self, a, b, *, reverse=False):
        axis, num_steps = self.time_axis, len(b)
        a, b = jax.tree.map(axis.cut, (a, b))
        maps = axis.share(jax.vmap(ft.partial(_map, reverse=reverse))(a, b))
        _, ends = lax.associative_scan(jax.vmap(compose), maps, reverse=reverse)
        zero = jnp.zeros_like(ends[:1])
        parts = [ends[1:], zero] if reverse else [zero, ends[:-1]]
        incoming = axis.place(axis.share(jnp.concatenate(parts)))
        solve = jax.vmap(ft.partial(_solve, reverse=reverse))
        return axis.join(solve(a, b, incoming), num_steps)


def _map(
    a: AbstractTransition, b: States, *, reverse: bool
) -> tuple[AbstractTransition, State]:
    """What the steps of one part, one after another, make of what comes in.

    In reverse that is `a[n] y[n]`, so that no transition of another part is needed.
    """
    maps = (a, jax.vmap(apply)(a, b)) if reverse else (a, b)
    first, last = (slice(-1, None), 0) if reverse else (slice(0, 1), -1)
    if not prefers_sequential_scan():
        maps = lax.associative_scan(jax.vmap(compose), maps, reverse=reverse)
        return jax.tree.map(lambda x: x[last], maps)
    start = jax.tree.map(lambda x: x[first][0], maps)
    rest = slice(None, -1) if reverse else slice(1, None)
    step = lambda total, new: (compose(total, new), None)
    rest = jax.tree.map(lambda x: x[rest], maps)
    return lax.scan(step, start, rest, reverse=reverse)[0]


def _solve(a: AbstractTransition, b: States, y: State, *, reverse: bool) -> States:
    """The steps of one part, with what comes in."""
    end = -1 if reverse else 0
    if not reverse:
        y = apply(jax.tree.map(lambda x: x[0], a), y)
    return default_scan()(a, b.at[end].add(y), reverse=reverse)
