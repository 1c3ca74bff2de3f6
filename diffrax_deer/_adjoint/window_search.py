"""The search for the windows that a controller chooses: a loop without derivatives."""

import dataclasses
from typing import Any

import diffrax
import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._custom_types import BoolScalarLike, RealScalarLike, State, States, Y
from .._defaults import NUM_SAVED_AT_ONCE
from .._diffrax_conventions import clip_to_end
from .._prefix import select
from .._ravel import ravel
from .._varying import uniform
from .loop_state import LoopState, Windows, as_arrays


class Record(eqx.Module):
    """What the search found out about a window.

    - `keep`: whether it belongs to the solution.
    - `t_prev`, `t_next`: where the next one begins and ends.
    - `ys`, `(time, state)`: its states.
    - `error`, `(state,)`: the largest of any step, `None` if it is not estimated.
    """

    keep: Bool[Array, ""]
    t_prev: Float[Array, ""]
    t_next: Float[Array, ""]
    ys: States
    error: State | None


class Saved(eqx.Module):
    """The solution `ys`, `(times, state)`, at the first `count` of the save times."""

    ys: States
    count: Int[Array, ""]


class Decision(eqx.Module):
    """What a controller makes of a window: the arguments of the next one."""

    keep: Bool[Array, ""]
    t_prev: Float[Array, ""]
    t_next: Float[Array, ""]
    made_jump: BoolScalarLike
    controller_state: PyTree[Any]
    result: diffrax.RESULTS


def decide(
    controller: diffrax.AbstractStepSizeController,
    t1: RealScalarLike,
    interval: tuple[RealScalarLike, RealScalarLike, PyTree[Any]],
    states: tuple[Y, Y, Y | None],
    args: Any,
    order: Any,
) -> Decision:
    """Calls `controller` as diffrax does.

    `interval` are the ends of the window and the state of the controller, `states` are
    those at its ends and the error.
    """
    t_prev, t_next, controller_state = interval
    y0, y1, error = states
    keep, t_prev, t_next, made_jump, controller_state, result = (
        controller.adapt_step_size(
            t_prev, t_next, y0, y1, args, error, order, controller_state
        )
    )
    keep = jnp.asarray(keep)
    t_prev = jnp.minimum(t_prev, t1)
    t_next = clip_to_end(t_prev, jnp.asarray(t_next), t1, keep)
    return Decision(keep, t_prev, t_next, made_jump, controller_state, result)


def _attempt(
    windows: Windows, state: LoopState
) -> tuple[LoopState, Record, diffrax.AbstractLocalInterpolation]:
    """One window."""
    solver, terms, args = windows.solver, windows.terms, windows.args
    interval = state.t_prev, state.t_next
    y1, error, dense_info, solver_state, result, statistics = solver.solve_window(
        terms, *interval, state.y, args, state.solver_state, state.made_jump
    )
    decision = decide(
        windows.controller,
        windows.t1,
        (*interval, state.controller_state),
        (state.y, y1, error),
        args,
        solver.error_order(terms),
    )
    keep, success = decision.keep, diffrax.RESULTS.successful
    result = diffrax.RESULTS.where(keep, result, success)
    keep_record = keep & (result == success)
    result = diffrax.RESULTS.where(diffrax.is_okay(result), decision.result, result)
    kept = lambda new, old: select(keep, new, old)
    new = dataclasses.replace(
        state.count(statistics, keep),
        t_prev=decision.t_prev,
        t_next=decision.t_next,
        y=kept(y1, state.y),
        made_jump=kept(jnp.asarray(decision.made_jump), state.made_jump),
        solver_state=kept(solver_state, state.solver_state),
        controller_state=decision.controller_state,
        result=result,
    )
    flat_error = None if error is None else ravel(error)[0]
    ys = solver.states(solver_state, y1)
    record = Record(keep_record, decision.t_prev, decision.t_next, ys, flat_error)
    path = solver.interpolation_cls(t0=interval[0], t1=interval[1], **dense_info)
    return *as_arrays((new, record)), path


def _save(
    ts: Float[Array, " times"],
    saved: Saved,
    path: diffrax.AbstractLocalInterpolation,
    end: RealScalarLike,
    keep: Bool[Array, ""],
) -> Saved:
    """The times up to `end` too, if the window that ends there is kept."""
    if len(ts) == 0:
        return saved
    stop = jnp.searchsorted(ts, end, side="right").astype(saved.count.dtype)
    stop = jnp.where(keep, stop, saved.count)
    size = min(len(ts), NUM_SAVED_AT_ONCE)

    # Places are those of a whole batch: one slice for all.
    def step(carry):
        first, ys = carry
        place = jnp.minimum(first, len(ts) - size)
        index = place + jnp.arange(size)
        here = (saved.count <= index) & (index < stop)
        new = jax.vmap(lambda t: ravel(path.evaluate(t))[0])(
            lax.dynamic_slice_in_dim(ts, place, size)
        )
        old = lax.dynamic_slice_in_dim(ys, place, size)
        new = jnp.where(here[:, None], new.astype(ys.dtype), old)
        return first + size, lax.dynamic_update_slice_in_dim(ys, new, place, 0)

    is_new = stop > saved.count
    last = eqxi.unvmap_max(jnp.where(is_new, stop, 0))
    first = -eqxi.unvmap_max(-jnp.where(is_new, saved.count, len(ts)))
    _, ys = lax.while_loop(lambda carry: carry[0] < last, step, (first, saved.ys))
    return Saved(ys, stop)


def search_windows(
    windows: Windows, state: LoopState, meter: PyTree[Any], capacity: int
) -> tuple[LoopState, Record, Saved, PyTree[Any]]:
    """Chooses all windows and records them, `capacity` at most; without derivatives."""
    assert windows.max_steps is not None
    max_steps, ts = windows.max_steps, windows.save_ts
    types, record, _ = eqx.filter_eval_shape(_attempt, windows, state)
    known = types.residual, types.method, types.gradient
    known = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), known)
    residual, method, gradient = known
    state = dataclasses.replace(
        state, residual=residual, method=method, gradient=gradient
    )
    state = jax.tree.map(lambda x, s: jnp.asarray(x, s.dtype), state, types)
    zeros = lambda s: jnp.zeros((capacity, *s.shape), s.dtype)
    records = jax.tree.map(zeros, record)
    # At t0, and where the solve does not get, there is the initial state.
    flat, _ = ravel(state.y)
    count = jnp.searchsorted(ts, windows.t0, side="right").astype(int)
    saved = Saved(jnp.broadcast_to(flat, (len(ts), flat.size)), count)

    # The condition and the place to write at are those of a whole batch: where each
    # sample has its own, every window costs a copy of all the records.
    def running(carry):
        index, state, *_ = carry
        return eqxi.unvmap_any(windows.running(state)) & (index < max_steps)

    def step(carry):
        index, state, records, saved, meter = carry
        here = windows.running(state)
        new, record, path = _attempt(windows, state)
        saved = _save(ts, saved, path, state.t_next, here & record.keep)
        state = select(here, new, state)
        records = jax.tree.map(lambda b, r: b.at[index].set(r), records, record)
        meter = windows.advance(meter, state.t_prev)
        return index + 1, state, records, saved, meter

    init = uniform((jnp.array(0, int), state, records, saved, meter))
    return lax.while_loop(running, step, init)[1:]
