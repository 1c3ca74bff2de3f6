r"""Windows that a controller chooses: a search, and then one grid for the derivative.

A loop without derivatives lets the controller choose the windows, records their states
and finds all that is to be saved. Their ends have no derivative with respect to the
solution under the controllers that this is for, so that all recorded windows are one
known grid: a second pass takes the recorded states for the solution, and only
differentiates, a group of windows at a time. The gradient is parallel in time within a
group, though the windows were found one after another.

What is made depends on the windows that were needed, never on how many may be; there is
memory for so many.
"""

import functools as ft
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PyTree

from .._custom_types import State, States
from .._defaults import MAX_RECORD_TIMES, NUM_SKIPPED_GROUPS, group_size
from .._gradient import AbstractGradient
from .._method import Given
from .._ode.grid_solve import Trajectory, solve_grid
from .._prefix import hold_last, with_derivative_of
from .._ravel import ravel
from .._varying import uniform
from .loop_state import LoopState, Outcome, Windows, as_arrays
from .window_search import Record, decide, search_windows


def adaptive_windows(
    windows: Windows, state: LoopState, meter: PyTree[Any]
) -> tuple[Outcome, PyTree[Any]]:
    """At most `max_steps` windows; also returns the state of the progress meter."""
    assert windows.max_steps is not None
    flat, unravel = ravel(state.y)
    num_windows = max(1, group_size(flat.size**2) // windows.solver.window_steps)
    num_windows = min(num_windows, windows.max_steps)
    num_groups = -(-windows.max_steps // num_windows)
    search = lambda state, meter: search_windows(
        windows, state, meter, num_groups * num_windows
    )
    search = eqx.filter_closure_convert(search, state, meter)
    arrays, rest = eqx.partition((search, state), eqx.is_array)
    search, start = eqx.combine(lax.stop_gradient(arrays), rest)
    last, records, saved, meter = search(start, meter)
    _, gradient = windows.choices(state.y)
    replay = _Replay(windows, gradient, records, state, last, num_windows)
    t, y, ys = replay.solve(flat, num_groups)
    last = eqx.tree_at(
        lambda s: (s.t_prev, s.y, s.gradient),
        last,
        (t, unravel(with_derivative_of(y, ravel(last.y)[0])), gradient),
        is_leaf=lambda x: x is last.gradient,
    )
    ys = with_derivative_of(ys, saved.ys)
    found = jnp.arange(len(ys)) < saved.count
    return Outcome(last, jax.vmap(unravel)(ys), found), meter


@eqx.filter_custom_jvp
def _starts(first: Any, *, y: State, order: Any, records: Record):
    """Where windows begin, and the last one ends, `(windows + 1,)`.

    `first` is what this depends on differentiably: the controller, the end of all, and
    the first interval. `y` is the initial state. That derivative is a symbolic zero in
    training; only where it is not, the controller is asked once more.
    """
    del y, order
    _, _, (t_prev, _, _) = first
    return jnp.concatenate([t_prev[None], records.t_prev])


@_starts.def_jvp
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
            return (flat, interval), t_prev

        _, t_prev = lax.scan(window, (flat, interval), records)
        return jnp.concatenate([interval[0][None], t_prev])

    return eqx.filter_jvp(again, primals, tangents)


class _Replay(eqx.Module):
    """The recorded windows again, differentiably, `num_windows` at a time.

    `state` and `last` are those before the first window and after the last one.
    """

    windows: Windows
    gradient: AbstractGradient
    records: Record
    state: LoopState
    last: LoopState
    num_windows: int = eqx.field(static=True)

    def solve(self, y0: State, num_groups: int) -> tuple[Array, State, States]:
        """Time and state at the end, and the states at all save times.

        Of the states only the derivative is right, not the value.
        """
        windows, state = self.windows, self.state
        # A window that failed is the last one, and not a part of the solution.
        success = self.last.result == diffrax.RESULTS.successful
        num_made = self.last.num_steps - jnp.where(success, 0, 1)
        # A controller may divide by the number of windows it has planned.
        is_empty = windows.t0 == windows.t1
        count = lambda x: jnp.where(is_empty, jnp.ones_like(x), x)
        controller_state = jax.tree.map(count, state.controller_state)
        interval = state.t_prev, state.t_next, controller_state
        starts = _starts(
            (windows.controller, windows.t1, interval),
            y=lax.stop_gradient(y0),
            order=windows.solver.error_order(windows.terms),
            records=self.records,
        )

        def group(carry, index):
            y, saved = carry
            y, found = self._group(starts, index * self.num_windows, num_made, y)
            return y, saved + found

        saved = jnp.zeros((len(windows.save_ts), y0.size), y0.dtype)
        groups_made = -(-eqxi.unvmap_max(num_made) // self.num_windows)
        init = uniform((y0, saved))
        y, saved = _fold(group, init, groups_made, num_groups)
        return starts[self.last.num_steps], y, saved

    def _group(
        self, starts: Float[Array, " ends"], first: Array, num_made: Array, y: State
    ) -> tuple[State, States]:
        """The state after the windows from `first` on, and what is saved in them."""
        windows, size = self.windows, self.num_windows
        part = lambda x: lax.dynamic_slice_in_dim(x, first, size)
        # Those that were kept, in order: what was rejected moves nothing, and a step of
        # length zero may have no derivative.
        kept = part(self.records.keep) & (first + jnp.arange(size) < num_made)
        num_kept = jnp.sum(kept, dtype=int)
        order = jnp.nonzero(kept, size=size, fill_value=0)[0]
        ends = lax.dynamic_slice_in_dim(starts, first, size + 1)
        ends = jnp.concatenate([ends[:1], ends[1:][order]])
        here = jnp.arange(size + 1) <= num_kept
        ends = jnp.where(here, ends, lax.stop_gradient(ends[num_kept]))
        ys = part(self.records.ys)[order].reshape(-1, y.size)
        num_steps, inner = windows.solver.window_steps, windows.inner_step(self.state.y)
        # A fixed grid looks at nothing but the ends.
        place, state = windows.solver.places.place, self.state.solver_state
        nodes, _ = place(inner, ends, num_steps, y, state)
        num_solved = num_kept * num_steps
        ys = hold_last(y, ys, num_solved)
        trajectory = solve_grid(inner, nodes, y, ys, Given(num_solved), self.gradient)
        begun = lax.stop_gradient(ends[0]) > windows.t0
        after = jnp.where(begun, ends[0], -jnp.inf)
        saved = _saved(windows, trajectory, num_solved, after)
        past = jnp.concatenate([y[None], trajectory.ys])
        return past[num_solved], saved


def _fold(f: Callable, init: Any, count: Int[Array, ""], max_count: int) -> Any:
    """`f(carry, index)` for the first `count` of `max_count` indices.

    Differentiable in both modes. What is done is done again for the derivative, so that
    memory is that of the carries; what is not costs little, since many at a time are
    skipped. (Not `eqxi.while_loop(kind="bounded")`, which writes down all that `f`
    closes over each time.)
    """
    checkpoint = ft.partial(jax.checkpoint, prevent_cse=False)

    def unless_idle(f, carry, index):
        step = lambda carry: f(carry, index)
        return lax.cond(index < count, step, lambda carry: carry, carry), None

    def many(carry, first):
        return lax.scan(one, carry, first + jnp.arange(NUM_SKIPPED_GROUPS))[0]

    one = checkpoint(ft.partial(unless_idle, f))
    starts = jnp.arange(0, max_count, NUM_SKIPPED_GROUPS)
    return lax.scan(checkpoint(ft.partial(unless_idle, many)), init, starts)[0]


def _saved(
    windows: Windows,
    trajectory: Trajectory,
    num_kept: Int[Array, ""],
    after: Array,
) -> States:
    """The solution at the save times later than `after`, zero where it is not here."""
    ts, (points, _) = windows.save_ts, trajectory.points()
    num_times, size = len(ts), trajectory.y0.size
    if num_times == 0:
        return jnp.zeros((0, size), trajectory.y0.dtype)
    length = min(num_times, MAX_RECORD_TIMES)
    num_parts = -(-num_times // length)
    num_missing = num_parts * length - num_times
    missing = jnp.full(num_missing, jnp.inf, ts.dtype)
    all_ts = jnp.concatenate([ts, missing]).reshape(num_parts, length)
    ends, steps = lax.stop_gradient(trajectory.ends), (points, trajectory.dense_infos)

    def look_up(t, here, which):
        (t0, t1), infos = jax.tree.map(lambda x: x[which], steps)
        # Where nothing is looked up the first step may be one of length zero.
        t0, t1 = jnp.where(here, t0, t - 1), jnp.where(here, t1, t)
        path = lambda t0, t1, info: windows.solver.solver.interpolation_cls(
            t0=t0, t1=t1, **info
        )
        evaluate = lambda t, *step: ravel(path(*step).evaluate(t))[0]
        found = jax.vmap(evaluate)(t, t0, t1, infos).astype(trajectory.y0.dtype)
        return jnp.where(here[:, None], found, 0)

    def at(t):
        which = jnp.sum(ends[None] < t[:, None], axis=1, dtype=int)
        here = (t > after) & (which < num_kept)
        t, which = jnp.where(here, t, 0), jnp.where(here, which, 0)
        zeros = uniform(jnp.zeros((length, size), trajectory.y0.dtype), t)
        return lax.cond(
            eqxi.unvmap_any(here), look_up, lambda *_: zeros, t, here, which
        )

    return lax.map(at, all_ts).reshape(-1, size)[:num_times]
