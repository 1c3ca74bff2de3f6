"""`SaveAt`: the solution interpolated at all times at once."""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._custom_types import Args, DenseInfo, RealScalarLike, Y
from .._ode.grid_solve import Trajectory
from .._ode.solver_step import SolverStep
from .._prefix import select, with_derivative_of
from .._time_axis import TimeAxis
from .loop_state import Ends, Steps


def _dense_info(inner: SolverStep, step: Steps) -> DenseInfo:
    return inner.full((step.t0s, step.t1s), step.y0s).dense_info


def _interpolation(
    inner: SolverStep, step: Steps, info: DenseInfo
) -> diffrax.AbstractLocalInterpolation:
    return inner.solver.interpolation_cls(t0=step.t0s, t1=step.t1s, **info)


def interpolation(inner: SolverStep, step: Steps) -> diffrax.AbstractLocalInterpolation:
    """The inner solver's interpolation of one step, `(1,)` of them."""
    return _interpolation(inner, step[0], _dense_info(inner, step[0]))


def _recompute(known: DenseInfo, inner: SolverStep, steps: Steps) -> DenseInfo:
    """What is `known`, recomputed from few `steps`, but differentiated as known.

    A loop over all steps then has nothing to write down, and XLA makes one function of
    it. For the derivative all steps are linearized in any case.
    """
    again = jax.vmap(lambda step: _dense_info(inner, step))(steps)
    return jax.tree.map(with_derivative_of, known, again)


def interpolate(
    trajectory: Trajectory,
    steps: Steps,
    ts: Float[Array, " times"],
    index: Int[Array, " times"],
    axis: TimeAxis,
) -> PyTree[Array]:
    """The solution at all of `ts`, each in the step of that index.

    Leaves of leading axis `times`. `axis`: where the steps lie.
    """
    inner, infos = trajectory.inner, trajectory.dense_infos
    few = len(ts) < len(steps.ends)
    if few:
        steps, infos = axis.take((steps, infos), index)
        infos = _recompute(infos, inner, steps)
    # The interpolation itself is looked up, with what it has prepared: fewer numbers
    # than the stages that it is made from.
    path = lambda step, info: _interpolation(inner, step, info)
    paths = jax.vmap(path)(steps, infos)
    paths = paths if few else axis.take(paths, index)
    return jax.vmap(lambda t, path: path.evaluate(t))(ts, paths)


def dense(
    inner: SolverStep, steps: Steps, t0: RealScalarLike
) -> tuple[Float[Array, " times"], DenseInfo, Int[Array, ""]]:
    """Times, dense information and number of the steps, each one a window of its own.

    Those that have been taken come first.
    """
    count = jnp.sum(steps.taken, dtype=jnp.int32)
    infos = jax.vmap(inner.full)((steps.t0s, steps.t1s), steps.y0s).dense_info
    here = jnp.arange(len(steps.ends), dtype=count.dtype) < count
    ends = jnp.where(here, steps.ends, jnp.inf)
    return jnp.concatenate([jnp.asarray(t0)[None], ends]), infos, count


class Final(eqx.Module):
    """Where the solve has ended.

    `cut`: whether this may be before the end of the last step, at the root of an event.
    """

    t: RealScalarLike
    y: Y
    result: diffrax.RESULTS
    num_accepted: Int[Array, ""]
    cut: bool = eqx.field(static=True)


class SaveTimes(eqx.Module):
    """The part of the solution at the times of one `SubSaveAt`."""

    ts: Float[Array, " times"]
    ys: PyTree[Array]
    found: Bool[Array, " times"]


def save(
    sub: diffrax.SubSaveAt,
    buffers: tuple[Array, PyTree[Array]],
    args: Args,
    start: tuple[RealScalarLike, Y],
    times: SaveTimes | None,
    ends: tuple[Ends, PyTree[Array]] | None,
    final: Final,
) -> tuple[Array, PyTree[Array]]:
    """Fills the `buffers` of one `SubSaveAt`, in the order that diffrax has.

    That order is: t0, then `ts` and the ends of steps by time, t1, and what is left is
    infinite.
    """
    function = lambda t, y: sub.fn(t, y, args)
    one = lambda t, y: jax.tree.map(lambda x: x[None], (jnp.asarray(t), function(t, y)))
    offset, num_saved = (1 if sub.t0 else 0), 0
    # Positions are beyond the end for what is not to be saved.
    size, parts = len(buffers[0]), []
    if sub.t0:
        parts.append((jnp.zeros(1, int), one(*start)))
    saved_ends = None
    if ends is not None and sub.steps != 0:
        counts = 1 + jnp.arange(len(ends[0].ts))
        saved_ends = ends[0].kept & (counts % sub.steps == 0)
        if final.cut:
            saved_ends = saved_ends & (ends[0].ts <= final.t)
    if times is not None:
        found = times.found
        if final.cut:
            found = found & (times.ts <= final.t)
        values = times.ts, jax.vmap(function)(times.ts, times.ys)
        if ends is not None and saved_ends is not None:
            where = offset + jnp.arange(len(found))
            num_ends = jnp.concatenate([jnp.zeros(1, int), jnp.cumsum(saved_ends)])
            where = where + num_ends[jnp.searchsorted(ends[0].ts, times.ts)]
            parts.append((jnp.where(found, where, size), values))
        else:
            # Known places: what lies on several devices stays there.
            values = jax.tree.map(lambda x, b: x.astype(b.dtype), values, buffers)
            here = slice(offset, offset + len(found))
            old = jax.tree.map(lambda b: b[here], buffers)
            put = lambda b, x: lax.dynamic_update_slice_in_dim(b, x, offset, 0)
            buffers = jax.tree.map(put, buffers, jax.vmap(select)(found, values, old))
        num_saved = num_saved + jnp.sum(found)
    if saved_ends is not None:
        assert ends is not None
        where = offset + jnp.cumsum(saved_ends) - 1
        if times is not None:
            before = jnp.searchsorted(times.ts, ends[0].ts, side="right")
            where = where + jnp.minimum(before.astype(int), num_saved)
        values = jax.vmap(function)(ends[0].ts, ends[1])
        parts.append((jnp.where(saved_ends, where, size), (ends[0].ts, values)))
        num_saved = num_saved + jnp.sum(saved_ends)
    write = _saves_end(sub, final)
    if write is not False:
        where = jnp.where(write, offset + num_saved, size)
        parts.append((where[None], one(final.t, final.y)))
    for where, values in parts:
        set_ = lambda b, x, where=where: b.at[where].set(x.astype(b.dtype), mode="drop")
        buffers = jax.tree.map(set_, buffers, values)
    return buffers


def _saves_end(sub: diffrax.SubSaveAt, final: Final) -> Any:
    """Whether the final value is to be saved, beside what `steps` saves."""
    each = sub.steps == 1
    by_steps = sub.steps != 0 and (each or final.num_accepted % sub.steps == 0)
    if final.cut:
        # The end of the step beyond the root has not been saved.
        return sub.t1 | by_steps
    not_by_steps = not by_steps if isinstance(by_steps, bool) else ~by_steps
    return sub.t1 & not_by_steps
