r"""Windows that a controller chooses: a search, and then one grid for the derivative.

A loop without derivatives lets the controller choose the windows and records their
trajectories. Their ends have no derivative with respect to the solution under the
controllers that this is for, so that all recorded windows are one known grid: a second
pass takes the recorded states for the solution, and only differentiates. The gradient
is parallel in time, though the windows were found one after another.
"""

import dataclasses
import functools as ft
import math
from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._checks import check_window_state
from .._custom_types import State, States, Y
from .._defaults import NUM_SKIPPED_GROUPS, group_size
from .._method import Given
from .._ode.grid_solve import solve_grid
from .._prefix import select
from .._ravel import ravel
from .loop_state import Ends, LoopState, Outcome, Steps, Windows, as_arrays, steps_of
from .window_search import Record, decide, search_windows


def adaptive_windows(
    windows: Windows, state: LoopState, meter: PyTree[Any], max_windows: int
) -> tuple[Outcome, PyTree[Any]]:
    """At most `max_windows` windows; also returns the state of the progress meter."""
    check_window_state(state.solver_state, windows.solver.num_steps)
    search = lambda state, meter: search_windows(windows, state, meter, max_windows)
    search = eqx.filter_closure_convert(search, state, meter)
    arrays, rest = eqx.partition((search, state), eqx.is_array)
    search, start = eqx.combine(lax.stop_gradient(arrays), rest)
    last, records, meter = search(start, meter)
    new, steps, ends = _replay(windows, state, last, records)
    index, found = jnp.zeros(0, int), jnp.zeros(0, bool)
    if steps is not None:
        index, found = steps.locate(windows.save_ts)
    return Outcome(new, steps, index, found, ends), meter


def _prepend(t: Array, ts: Float[Array, " windows"]) -> Array:
    return jnp.concatenate([t[None], ts])


@eqx.filter_custom_jvp
def _window_ends(first: Any, *, y: State, order: Any, records: Record):
    """Where windows begin and end, and one more; each of shape `(windows + 1,)`.

    `first` is what this depends on differentiably: the controller, the end of all, and
    the first interval. `y` is the initial state. That derivative is a symbolic zero in
    training; only where it is not, the controller is asked once more.
    """
    del y, order
    _, _, (t_prev, t_next, _) = first
    return _prepend(t_prev, records.t_prev), _prepend(t_next, records.t_next)


@_window_ends.def_jvp
def _(primals, tangents, *, y, order, records):
    def again(first):
        controller, t1, interval = first
        flat, unravel = ravel(y)

        def window(carry, record):
            flat, interval = carry
            error = None if record.error is None else unravel(record.error)
            states = unravel(flat), unravel(record.ys[-1]), error
            new = decide(controller, t1, interval, states, None, order)
            # The recorded value, with the derivative of the one computed again.
            pin = lambda new, t: lax.stop_gradient(new) + t - lax.stop_gradient(t)
            t_prev, t_next = (
                pin(record.t_prev, new.t_prev),
                pin(record.t_next, new.t_next),
            )
            interval = as_arrays((t_prev, t_next, new.controller_state))
            flat = jnp.where(record.keep, record.ys[-1], flat)
            return (flat, interval), interval[:2]

        _, (t_prev, t_next) = lax.scan(window, (flat, interval), records)
        return _prepend(interval[0], t_prev), _prepend(interval[1], t_next)

    return eqx.filter_jvp(again, primals, tangents)


class _Group(eqx.Module):
    """Consecutive recorded windows, and their numbers; leaves of axis `windows`."""

    index: Int[Array, " windows"]
    kept: Bool[Array, " windows"]
    starts: Float[Array, " windows"]
    ends: Float[Array, " windows"]
    ys: Float[Array, "windows time state"]


def _differentiable(
    windows: Windows, group: _Group, y: Y, num_solved: Int[Array, ""]
) -> tuple[Y, Steps, States]:
    """The steps of recorded windows from `y` on, of which `num_solved` are solved.

    Returns the state after them, the steps, `(windows, time)`, and the states at the
    ends of the windows. A window that was rejected is one of length zero here.
    """
    flat, unravel = ravel(y)
    size, num_steps, _ = group.ys.shape
    # Nothing moves in a window that was rejected.
    latest = lax.cummax(jnp.where(group.kept, jnp.arange(size), -1))
    start = jax.vmap(select, (0, 0, None))(latest >= 0, group.ys[latest, -1], flat)
    start = jnp.broadcast_to(start[:, None], group.ys.shape)
    ys = _merge(jax.vmap(select)(group.kept, group.ys, start))
    grids = jax.vmap(windows.solver.grid)(group.starts, group.ends)
    ts = jnp.concatenate([grids[:, :-1].reshape(-1), group.ends[-1:]])
    here = jnp.clip(num_solved - group.index[0] * num_steps, 0, size * num_steps)
    inner, gradient = windows.inner_step(y), windows.solver.gradient
    trajectory = solve_grid(inner, ts, flat, ys, Given(here), gradient)
    steps = steps_of(trajectory, jnp.repeat(group.kept, num_steps))
    steps = jax.tree.map(lambda x: x.reshape(size, num_steps, *x.shape[1:]), steps)
    past = jnp.concatenate([trajectory.y0[None], trajectory.ys])
    ends = trajectory.ys[num_steps - 1 :: num_steps]
    return unravel(past[trajectory.statistics.num_solved]), steps, ends


def _merge(tree: PyTree[Array]) -> PyTree[Array]:
    """The two leading axes made one."""
    # Not -1, of which an empty state makes zero by zero.
    merge = lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
    return jax.tree.map(merge, tree)


def _groups(
    windows: Windows, records: Record, starts: Array, kept: Array, y: Y
) -> _Group:
    """The records in groups of groups, of axes `(many, groups, windows)`."""
    max_windows, num_steps = records.ys.shape[:2]
    size = max(1, group_size(ravel(y)[0].size ** 2) // num_steps)
    size = min(max_windows, size)
    num_groups = min(NUM_SKIPPED_GROUPS, -(-max_windows // size))
    shape = -(-max_windows // (size * num_groups)), num_groups, size
    index = jnp.arange(math.prod(shape))
    # A step ends where the next one starts, also the last one of all.
    times = jnp.pad(starts, (0, len(index) - max_windows), mode="edge")

    def grouped(x):
        missing = jnp.zeros((len(index) - len(x), *x.shape[1:]), x.dtype)
        return jnp.concatenate([x, missing]).reshape(*shape, *x.shape[1:])

    parts = _Group(index, kept, times[:-1], times[1:], records.ys)
    return jax.tree.map(grouped, parts)


def _made(
    windows: Windows, groups: _Group, y: Y, num_made: Array, num_solved: Array
) -> tuple[Y, tuple[Steps | None, States | None]]:
    """The state after all groups, and their steps and ends if they are to be saved."""

    def differentiable(y, group):
        y, steps, ends = _differentiable(windows, group, y, num_solved)
        wanted = steps if windows.save_steps else None
        return y, (wanted, ends if windows.save_ends else None)

    first = jax.tree.map(lambda x: x[0, 0], groups)
    shapes = eqx.filter_eval_shape(differentiable, y, first)[1]

    def unless_idle(f, y, group):
        axes = group.index.shape[:-1]
        zeros = lambda s: jnp.zeros((*axes, *s.shape), s.dtype)
        skip = lambda y: (y, jax.tree.map(zeros, shapes))
        is_idle = group.index.reshape(-1)[0] >= num_made
        return lax.cond(eqxi.unvmap_all(is_idle), skip, lambda y: f(y, group), y)

    # Made again for the derivative, so that memory is that of trajectories. Idle groups
    # are skipped many at a time.
    checkpoint = ft.partial(jax.checkpoint, prevent_cse=False)
    one = checkpoint(ft.partial(unless_idle, differentiable))
    many = checkpoint(ft.partial(unless_idle, lambda y, part: lax.scan(one, y, part)))
    return lax.scan(many, y, groups)


def _replay(
    windows: Windows, state: LoopState, last: LoopState, records: Record
) -> tuple[LoopState, Steps | None, Ends | None]:
    """The recorded windows from `state` to `last` again, differentiably.

    Also their steps and ends, where they are to be saved.
    """
    max_windows, num_steps = records.ys.shape[:2]
    interval = state.t_prev, state.t_next, state.controller_state
    starts, ends = _window_ends(
        (windows.controller, windows.t1, interval),
        y=lax.stop_gradient(ravel(state.y)[0]),
        order=windows.solver.error_order(windows.terms),
        records=records,
    )
    num_made = last.num_steps - state.num_steps
    made = jnp.arange(max_windows) < num_made
    kept = made & records.keep
    # Only the last one may be unsolved, in part: that is the end.
    unsolved = jnp.where(kept, num_steps - records.num_solved, 0)
    num_solved = num_made * num_steps - jnp.sum(unsolved)
    groups = _groups(windows, records, starts, kept, state.y)
    y, found = _made(windows, groups, state.y, num_made, num_solved)
    steps, at_ends = jax.tree.map(lambda x: x[:max_windows], _merge(_merge(found)))
    # Where nothing was made there are zeros, at which a field, or what is saved of a
    # state, may have no derivative.
    nothing = windows.no_step(state.y)[0]
    if steps is not None:
        fill = jax.vmap(jax.vmap(select, (None, 0, None)), (0, 0, None))
        steps = fill(made, steps, nothing)
    if at_ends is not None:
        counts = state.num_accepted + jnp.cumsum(kept, dtype=state.num_accepted.dtype)
        at_ends = jax.vmap(select, (0, 0, None))(made, at_ends, nothing.y1s)
        ts = jnp.where(made, starts[1:], nothing.ends)
        at_ends = Ends(ts, ends[:-1], at_ends, counts, kept)
    t_prev, t_next = starts[num_made], ends[num_made]
    done = dataclasses.replace(last, t_prev=t_prev, t_next=t_next, y=y)
    return done, _merge(steps), at_ends
