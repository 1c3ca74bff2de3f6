r"""Windows that a controller chooses, one after another.

A loop without derivatives lets the controller choose the windows and records their
trajectories. A second pass goes through the same windows with the recorded solutions as
given: no iteration, only functions of the solution, which JAX differentiates. Hence one
Newton solve a window for value and gradient together.

Records need memory that is allocated beforehand, for `max_windows` windows. In the rare
solve that takes more, the second pass makes the steps of the others in sequence.
"""

from typing import Any

import diffrax
import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from ._causal import prefix, select
from ._checks import check_window_state
from ._custom_types import States
from ._forward import AbstractForward, SequentialForward, Strategy
from ._newton import Statistics
from ._solver import window_state
from ._trajectory import largest_error
from ._windows import (
    Carry,
    Ends,
    Outcome,
    Steps,
    Windows,
    as_arrays,
    event_result,
    steps_of,
)

# Without `max_steps`, at most so many times `max_windows`.
_MANY = 4096


class Record(eqx.Module):
    """What the search found out about a window, and its solution."""

    keep: Bool[Array, ""]
    t_prev: Float[Array, ""]
    t_next: Float[Array, ""]
    event_index: Int[Array, ""]
    mask: PyTree[Bool[Array, ""]]
    ys: States
    statistics: Statistics


class _Recorded(AbstractForward):
    """The guess is known to be the solution."""

    statistics: Statistics

    def __call__(self, step_map, y0, xs, guess, iteration):
        return guess, self.statistics, None


def _attempt(
    windows: Windows,
    carry: Carry,
    forward: AbstractForward | Strategy | None = None,
    record: Record | None = None,
) -> tuple[Carry, Record, Steps, Ends]:
    """One window; its decisions are those of `record`, if there is one."""

    def decide(name, new):
        return new if record is None else getattr(record, name)

    def pin(name, t):
        # The recorded value, with the derivative of the one computed again.
        return lax.stop_gradient(decide(name, t)) + t - lax.stop_gradient(t)

    ts = windows.solver.grid(carry.t_prev, carry.t_next)
    trajectory = windows.solver.trajectory(
        windows.terms,
        ts,
        carry.y,
        windows.args,
        carry.solver_state,
        guess=None if record is None else record.ys,
        forward=forward,
    )
    result = trajectory.result()
    unravel, num_steps = trajectory.inner.unravel, len(trajectory.ys)
    error = largest_error(trajectory.errors, result)
    keep, t_prev, t_next, made_jump, controller_state, controller_result = (
        windows.controller.adapt_step_size(
            carry.t_prev,
            carry.t_next,
            carry.y,
            unravel(trajectory.ys[-1]),
            windows.args,
            None if error is None else unravel(error),
            windows.solver.error_order(windows.terms),  # pyright: ignore
            carry.controller_state,
        )
    )
    keep = decide("keep", jnp.asarray(keep))
    t_prev = jnp.minimum(t_prev, windows.t1)
    t_next = _clip_to_end(t_prev, t_next, windows.t1, keep)
    t_prev, t_next = pin("t_prev", t_prev), pin("t_next", t_next)

    result = diffrax.RESULTS.where(keep, result, diffrax.RESULTS.successful)
    result = diffrax.RESULTS.where(diffrax.is_okay(result), controller_result, result)
    last, index = jnp.array(num_steps - 1), jnp.array(num_steps)
    event_values, mask = carry.event_values, carry.event_mask
    end = t_prev
    if windows.event is not None:
        num_solved = trajectory.statistics.num_solved
        num_solved = jnp.minimum(num_solved, prefix(trajectory.okay))
        valid = keep & (jnp.arange(num_steps) < num_solved)
        values = windows.event_values(ts[1:], trajectory.ys, unravel)
        index, mask = windows.event.first(event_values, values, valid)
        index, mask = decide("event_index", index), decide("mask", mask)
        happened = index < num_steps
        last = jnp.where(happened, index, last)
        end = jnp.where(happened, ts[last + 1], t_prev)
        result = event_result(happened, result)
        final = jax.tree.map(lambda v: v[-1], values)
        event_values = select(keep, final, event_values)

    statistics, flat = trajectory.statistics, trajectory.ys[last]
    steps = steps_of(trajectory, keep & (jnp.arange(num_steps) <= last))
    num_accepted = carry.num_accepted + jnp.where(keep, 1, 0)
    most = jnp.maximum(carry.most_iterations, statistics.num_iterations)
    new = Carry(
        t_prev=end,
        t_next=t_next,
        y=unravel(jnp.where(keep, flat, trajectory.y0)),
        made_jump=jnp.where(keep, jnp.asarray(made_jump), carry.made_jump),
        solver_state=select(keep, window_state(trajectory), carry.solver_state),
        controller_state=controller_state,
        result=result,
        num_steps=carry.num_steps + 1,
        num_accepted=num_accepted,
        last=select(keep, steps[last][None], carry.last),
        event_values=event_values,
        event_mask=mask,
        num_iterations=carry.num_iterations + statistics.num_iterations,
        most_iterations=most,
        residual=jnp.where(
            keep, jnp.maximum(carry.residual, statistics.residual), carry.residual
        ),
    )
    found = Record(keep, t_prev, t_next, index, mask, trajectory.ys, statistics)
    return as_arrays(
        (new, found, steps, Ends(end, ts[last + 1], flat, num_accepted, keep))
    )


def _search(
    windows: Windows, carry: Carry, meter: PyTree[Any], record: Record, capacity: int
) -> tuple[Record, PyTree[Any]]:
    """Chooses the first `capacity` windows, and records them; no derivatives.

    `record` holds the shapes.
    """
    records = jax.tree.map(lambda s: jnp.zeros((capacity, *s.shape), s.dtype), record)

    def running(state):
        carry, *_ = state
        return windows.running(carry) & (carry.num_steps < capacity)

    def step(state):
        carry, records, meter = state
        index = carry.num_steps
        carry, record, _, _ = _attempt(windows, carry)
        records = jax.tree.map(lambda b, r: b.at[index].set(r), records, record)
        return carry, records, windows.advance(meter, carry.t_prev)

    _, records, meter = lax.while_loop(running, step, (carry, records, meter))
    return records, meter


def one_after_another(
    windows: Windows, carry: Carry, meter: PyTree[Any]
) -> tuple[Outcome, PyTree[Any]]:
    """As many windows as it takes; also returns the state of the progress meter."""
    check_window_state(carry.solver_state, windows.solver.num_steps)
    limit = (
        _MANY * windows.max_windows if windows.max_steps is None else windows.max_steps
    )
    capacity = min(limit, windows.max_windows)
    num_chunks = 1 if windows.save_dense else -(-limit // capacity)
    limit = min(limit, num_chunks * capacity)
    types, record, *others = eqx.filter_eval_shape(_attempt, windows, carry)
    carry = jax.tree.map(lambda x, s: jnp.asarray(x, s.dtype), carry, types)
    search = lambda carry, meter: _search(windows, carry, meter, record, capacity)
    search = eqx.filter_closure_convert(search, carry, meter)
    arrays, rest = eqx.partition((search, carry), eqx.is_array)
    search, start = eqx.combine(lax.stop_gradient(arrays), rest)
    records, meter = search(start, meter)

    skipped = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype), _wanted(windows, *others)
    )
    repeat = lambda tree, n: jax.tree.map(lambda x: jnp.repeat(x, n, 0), tree)
    nothing = windows.no_step(carry.y)
    times = repeat(nothing, len(windows.save_ts))
    found = jnp.zeros(len(windows.save_ts), bool)
    ends = None
    if windows.save_ends:
        t, count = nothing.ends, jnp.zeros(1, carry.num_accepted.dtype)
        ends = Ends(t, t, nothing.y1s, count, nothing.taken)
        ends = repeat(ends, num_chunks * capacity)

    def chunk(state, records):
        index, carry, times, found, ends = state
        carry, steps, new_ends = _again(
            windows, carry, records, skipped, capacity, limit
        )
        if len(found) > 0:
            where, here = steps.locate(windows.save_ts)
            here = here & ~found
            times = jax.vmap(select)(here, steps[where], times)
            found = found | here
        if ends is not None:
            update = lambda b, x: lax.dynamic_update_slice_in_dim(
                b, x, index * capacity, axis=0
            )
            ends = jax.tree.map(update, ends, new_ends)
        return (index + 1, carry, times, found, ends), steps

    def is_unfinished(state):
        return windows.running(state[1]) & (state[1].num_steps < limit)

    # Made again for the derivative: else the memory for what is hardly ever needed
    # would be filled with zeros, which takes several times as long as all the rest.
    @jax.checkpoint
    def others_in_sequence(state):
        step = lambda state: chunk(state, None)[0]
        most = num_chunks - 1
        return eqxi.while_loop(
            is_unfinished, step, state, max_steps=most, kind="bounded"
        )

    state, steps = chunk((jnp.array(0, int), carry, times, found, ends), records)
    if num_chunks > 1:
        state = lax.cond(
            eqxi.unvmap_any(is_unfinished(state)),
            others_in_sequence,
            lambda state: state,
            state,
        )
    _, carry, times, found, ends = state
    if windows.save_dense:
        where, found = steps.locate(windows.save_ts)
        return Outcome(carry, steps, where, found, ends), meter
    return Outcome(carry, times, jnp.arange(len(found)), found, ends), meter


def _wanted(windows: Windows, steps: Any, ends: Any) -> tuple[Any, Any]:
    """What has to be kept of each window, beside its end."""
    has_times = windows.save_dense or len(windows.save_ts) > 0
    return steps if has_times else None, ends if windows.save_ends else None


def _again(
    windows: Windows,
    carry: Carry,
    records: Record | None,
    skipped: tuple[Any, Any],
    num_windows: int,
    limit: int,
) -> tuple[Carry, Any, Any]:
    """The next windows, differentiably: those of the records, or new ones in sequence.

    Also what is `_wanted` of each; `skipped` if there is nothing left to do.
    """

    def window(carry, record):
        active = windows.running(carry) & (carry.num_steps < limit)

        def attempt(carry):
            forward = SequentialForward()
            if record is not None:
                # What has nothing left to do, in a batch, must not make NaNs.
                num_solved = jnp.where(active, record.statistics.num_solved, 0)
                forward = _Recorded(
                    eqx.tree_at(lambda s: s.num_solved, record.statistics, num_solved)
                )
            if windows.solver.forward is None:
                forward = Strategy(forward)
            new, _, steps, end = _attempt(windows, carry, forward, record)
            steps = eqx.tree_at(lambda s: s.taken, steps, steps.taken & active)
            end = eqx.tree_at(lambda e: e.kept, end, end.kept & active)
            return select(active, new, carry), _wanted(windows, steps, end)

        # Recomputed for the derivative, so that memory is that of trajectories,
        # not that of all that happens inside of the vector field.
        attempt = jax.checkpoint(attempt, prevent_cse=False)
        skip = lambda carry: (carry, skipped)
        return lax.cond(eqxi.unvmap_any(active), attempt, skip, carry)

    carry, (steps, ends) = lax.scan(window, carry, records, length=num_windows)
    flatten = lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
    return carry, jax.tree.map(flatten, steps), ends


def _clip_to_end(t_prev: Array, t_next: Any, t1: Any, keep: Bool[Array, ""]) -> Array:
    """As in diffrax: a last step of a few rounding units joins the one before."""
    floor = lax.fori_loop(
        0, 100, lambda _, t: eqxi.prevbefore(t), lax.stop_gradient(jnp.asarray(t1))
    )
    clipped = jnp.where(keep, t1, t_prev + 0.5 * (t1 - t_prev))
    return jnp.where(t_next > floor, clipped, t_next)
