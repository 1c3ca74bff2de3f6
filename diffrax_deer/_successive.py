r"""Windows that a controller chooses, one after another.

A loop without derivatives lets the controller choose the windows and records their
trajectories. A second pass goes through the same windows with the recorded solutions as
given: no iteration, only functions of the solution, which JAX differentiates. Hence one
Newton solve a window for value and gradient together.

Where the ends of windows have no derivative with respect to the solution, as those of
`PIDController`, the second pass knows them beforehand, and many short windows are one
grid: their gradient is parallel in time, though a controller has found them singly.

Records need memory that is allocated beforehand, for `max_windows` windows. In the rare
solve that takes more, the second pass makes the steps of the others in sequence.
"""

import functools as ft
import math
from typing import Any

import diffrax
import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import optimistix as optx
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from ._causal import prefix, select
from ._checks import check_window_state
from ._custom_types import (
    Args,
    BoolScalarLike,
    RealScalarLike,
    State,
    States,
    Y,
)
from ._forward import AbstractForward, SequentialForward, StepByStep, Strategy
from ._newton import Statistics
from ._platform import by_platform
from ._solver import DEERSolver, window_state
from ._step_map import ravel
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
# Their factors carry no derivative, so that the ends of windows depend on one another,
# but not on the solution.
_WITHOUT_DERIVATIVE = diffrax.ConstantStepSize, diffrax.PIDController
# So many groups of recorded windows are skipped together where nothing is left to do.
_GROUPS = 16


def _most_at_once(num_entries: int) -> int:
    """How many steps of recorded windows to differentiate at once.

    The last group is made as a whole, also where nothing is left to do in it. That is
    work, of which a CPU has too much; other devices wait for the groups. `num_entries`
    is the size of a Jacobian.
    """
    if jax.default_backend() == "cpu":
        return 8
    return min(1024, 2**22 // max(1, num_entries))


class Record(eqx.Module):
    """What the search found out about a window, and its solution.

    - `keep`: whether it was accepted.
    - `t_prev`, `t_next`: where the next one begins and ends.
    - `event`: the step in which one happened, and which did; `None` without events.
    - `num_solved` and `ys`, `(time, state)`: as those of a `Trajectory`.
    - `error`, `(state,)`: the largest of any step, `None` if it is not estimated.
    """

    keep: Bool[Array, ""]
    t_prev: Float[Array, ""]
    t_next: Float[Array, ""]
    event: tuple[Int[Array, ""], PyTree[Bool[Array, ""]]] | None
    num_solved: Int[Array, ""]
    ys: States
    error: State | None


class _Recorded(AbstractForward):
    """The guess is known to be the solution, of so many steps."""

    num_solved: Int[Array, ""]

    def __call__(self, step_map, y0, xs, guess, iteration):
        result = optx.RESULTS.where(
            self.num_solved == len(guess),
            optx.RESULTS.successful,
            optx.RESULTS.nonlinear_divergence,
        )
        zero = jnp.zeros((), guess.dtype)
        statistics = Statistics(jnp.array(0, int), zero, self.num_solved, result)
        return guess, statistics, None


class _Decision(eqx.Module):
    """What a controller makes of a window: the arguments of the next one."""

    keep: Bool[Array, ""]
    t_prev: Float[Array, ""]
    t_next: Float[Array, ""]
    made_jump: BoolScalarLike
    controller_state: PyTree[Any]
    result: diffrax.RESULTS


def _decide(
    controller: diffrax.AbstractStepSizeController,
    t1: RealScalarLike,
    interval: tuple[RealScalarLike, RealScalarLike, PyTree[Any]],
    states: tuple[Y, Y, Y | None],
    args: Args,
    order: RealScalarLike | None,
    record: Record | None,
) -> _Decision:
    """Calls `controller` as diffrax does; the values are those of `record`, if any.

    `interval` are the ends of the window and the state of the controller, `states` are
    those at its ends and the error.
    """
    t_prev, t_next, controller_state = interval
    y0, y1, error = states
    keep, t_prev, t_next, made_jump, controller_state, result = (
        controller.adapt_step_size(
            t_prev,
            t_next,
            y0,
            y1,
            args,
            error,
            order,  # pyright: ignore
            controller_state,
        )
    )
    keep = jnp.asarray(keep) if record is None else record.keep
    t_prev, t_next = jnp.minimum(t_prev, t1), jnp.asarray(t_next)
    t_next = _clip_to_end(t_prev, t_next, t1, keep)
    if record is not None:
        # The recorded value, with the derivative of the one computed again.
        pin = lambda new, t: lax.stop_gradient(new) + t - lax.stop_gradient(t)
        t_prev, t_next = pin(record.t_prev, t_prev), pin(record.t_next, t_next)
    return _Decision(keep, t_prev, t_next, made_jump, controller_state, result)


def _attempt(
    windows: Windows,
    carry: Carry,
    forward: AbstractForward | Strategy | None = None,
    record: Record | None = None,
) -> tuple[Carry, Record, Steps, Ends]:
    """One window; its decisions are those of `record`, if there is one."""
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
    y1, y_error = unravel(trajectory.ys[-1]), None if error is None else unravel(error)
    decision = _decide(
        windows.controller,
        windows.t1,
        (carry.t_prev, carry.t_next, carry.controller_state),
        (carry.y, y1, y_error),
        windows.args,
        windows.solver.error_order(windows.terms),
        record,
    )
    keep, t_prev, t_next = decision.keep, decision.t_prev, decision.t_next
    result = diffrax.RESULTS.where(keep, result, diffrax.RESULTS.successful)
    result = diffrax.RESULTS.where(diffrax.is_okay(result), decision.result, result)
    last, found_event = jnp.array(num_steps - 1), None
    event_values, mask = carry.event_values, carry.event_mask
    end = t_prev
    if windows.event is not None:
        num_solved = trajectory.statistics.num_solved
        num_solved = jnp.minimum(num_solved, prefix(trajectory.okay))
        valid = keep & (jnp.arange(num_steps) < num_solved)
        values = windows.event_values(ts[1:], trajectory.ys, unravel)
        index, mask = windows.event.first(event_values, values, valid)
        if record is not None and record.event is not None:
            index, mask = record.event
        found_event = index, mask
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
        made_jump=jnp.where(keep, jnp.asarray(decision.made_jump), carry.made_jump),
        solver_state=select(keep, window_state(trajectory), carry.solver_state),
        controller_state=decision.controller_state,
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
    found = Record(
        keep,
        t_prev,
        t_next,
        found_event,
        statistics.num_solved,
        trajectory.ys,
        error,
    )
    return as_arrays(
        (new, found, steps, Ends(end, ts[last + 1], flat, num_accepted, keep))
    )


def is_fixed(controller: diffrax.AbstractStepSizeController, event: Any) -> bool:
    """Whether the derivative of the ends of windows does not need the solution."""
    return event is None and type(controller) in _WITHOUT_DERIVATIVE


def _search(
    windows: Windows, carry: Carry, meter: PyTree[Any], record: Record, capacity: int
) -> tuple[Carry, Record, PyTree[Any]]:
    """Chooses the first `capacity` windows, and records them; no derivatives.

    `record` holds the shapes.
    """
    records = jax.tree.map(lambda s: jnp.zeros((capacity, *s.shape), s.dtype), record)

    # The condition and the place to write at are those of a whole batch: where each
    # sample has its own, every window costs a copy of all the records.
    def running(state):
        index, carry, *_ = state
        return eqxi.unvmap_any(windows.running(carry)) & (index < capacity)

    def attempt(carry):
        if windows.solver.forward is not None:
            return _attempt(windows, carry)[:2]
        # Nothing here is differentiated.
        on_cpu = lambda: _attempt(windows, carry, StepByStep())[:2]
        return by_platform(on_cpu, lambda: _attempt(windows, carry)[:2])

    def step(state):
        index, carry, records, meter = state
        active = windows.running(carry)
        new, record = attempt(carry)
        carry = select(active, new, carry)
        records = jax.tree.map(lambda b, r: b.at[index].set(r), records, record)
        return index + 1, carry, records, windows.advance(meter, carry.t_prev)

    state = jnp.array(0, int), carry, records, meter
    return lax.while_loop(running, step, state)[1:]


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
    wanted = _wanted(windows, *others)
    carry = jax.tree.map(lambda x, s: jnp.asarray(x, s.dtype), carry, types)
    search = lambda carry, meter: _search(windows, carry, meter, record, capacity)
    search = eqx.filter_closure_convert(search, carry, meter)
    arrays, rest = eqx.partition((search, carry), eqx.is_array)
    search, start = eqx.combine(lax.stop_gradient(arrays), rest)
    last, records, meter = search(start, meter)

    repeat = lambda tree, n: jax.tree.map(lambda x: jnp.repeat(x, n, 0), tree)
    nothing = windows.no_step(carry.y)
    times = repeat(nothing, len(windows.save_ts))
    found = jnp.zeros(len(windows.save_ts), bool)
    ends = None
    if windows.save_ends:
        t, count = nothing.ends, jnp.zeros(1, carry.num_accepted.dtype)
        ends = Ends(t, t, nothing.y1s, count, nothing.taken)
        ends = repeat(ends, num_chunks * capacity)

    def again(carry, records):
        if records is None or not is_fixed(windows.controller, windows.event):
            found = _again(windows, carry, records, wanted, capacity, limit)
        else:
            found = _at_once(windows, carry, last, records, wanted)
        if records is None:
            return found
        new, *found = found
        counted = lambda c: (c.result, c.num_iterations, c.most_iterations, c.residual)
        return eqx.tree_at(counted, new, counted(last)), *found

    def chunk(state, records):
        index, carry, times, found, ends = state
        carry, steps, new_ends = again(carry, records)
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


def _flat(tree: PyTree[Array]) -> PyTree[Array]:
    """The two leading axes made one."""
    # Not -1, of which an empty state makes zero by zero.
    flat = lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
    return jax.tree.map(flat, tree)


def _known(solver: DEERSolver, forward: AbstractForward) -> AbstractForward | Strategy:
    """`forward`, and how to differentiate it is a choice if `solver` makes one."""
    return Strategy(forward) if solver.forward is None else forward


def _again(
    windows: Windows,
    carry: Carry,
    records: Record | None,
    wanted: tuple[Any, Any],
    num_windows: int,
    limit: int,
) -> tuple[Carry, Any, Any]:
    """The next windows, differentiably: those of the records, or new ones in sequence.

    Also what is `wanted` of each, as `_wanted` has it.
    """

    def window(carry, record):
        active = windows.running(carry) & (carry.num_steps < limit)

        def attempt(carry):
            forward = SequentialForward()
            if record is not None:
                # What has nothing left to do, in a batch, must not make NaNs.
                forward = _Recorded(jnp.where(active, record.num_solved, 0))
            forward = _known(windows.solver, forward)
            new, _, steps, end = _attempt(windows, carry, forward, record)
            steps = eqx.tree_at(lambda s: s.taken, steps, steps.taken & active)
            end = eqx.tree_at(lambda e: e.kept, end, end.kept & active)
            return select(active, new, carry), _wanted(windows, steps, end)

        # Recomputed for the derivative, so that memory is that of trajectories,
        # not that of all that happens inside of the vector field.
        attempt = jax.checkpoint(attempt, prevent_cse=False)
        nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), wanted)
        skip = lambda carry: (carry, nothing)
        return lax.cond(eqxi.unvmap_any(active), attempt, skip, carry)

    carry, (steps, ends) = lax.scan(window, carry, records, length=num_windows)
    return carry, _flat(steps), ends


def _joined(t: Array, ts: Float[Array, " windows"]) -> Array:
    """One time before the others."""
    return jnp.concatenate([t[None], ts])


@eqx.filter_custom_jvp
def _times(first: Any, *, y: State, order: Any, records: Record):
    """Where the windows begin and end, and one more; each of shape `(windows + 1,)`.

    `first` is what this depends on differentiably: the controller, the end of all, and
    the first interval. `y` is the initial state. Hardly ever does anyone want that
    derivative, and then the controller is asked once more.
    """
    del y, order
    _, _, (t_prev, t_next, _) = first
    return _joined(t_prev, records.t_prev), _joined(t_next, records.t_next)


@_times.def_jvp
def _(primals, tangents, *, y, order, records):
    def again(first):
        controller, t1, interval = first
        flat, unravel = ravel(y)

        def window(state, record):
            flat, interval = state
            error = None if record.error is None else unravel(record.error)
            states = unravel(flat), unravel(record.ys[-1]), error
            new = _decide(controller, t1, interval, states, None, order, record)
            interval = as_arrays((new.t_prev, new.t_next, new.controller_state))
            flat = jnp.where(record.keep, record.ys[-1], flat)
            return (flat, interval), interval[:2]

        _, (t_prev, t_next) = lax.scan(window, (flat, interval), records)
        return _joined(interval[0], t_prev), _joined(interval[1], t_next)

    return eqx.filter_jvp(again, primals, tangents)


def _at_once(
    windows: Windows,
    carry: Carry,
    last: Carry,
    records: Record,
    wanted: tuple[Any, Any],
) -> tuple[Carry, Any, Any]:
    """As `_again`, for the windows of the records, many of them at once.

    `last` is the carry after them. A window that was rejected is one of length zero
    here.
    """
    num_steps, capacity = windows.solver.num_steps, len(records.keep)
    num_entries = ravel(carry.y)[0].size ** 2
    size = min(capacity, max(1, _most_at_once(num_entries) // num_steps))
    num_groups = min(_GROUPS, -(-capacity // size))
    num_many = -(-capacity // (size * num_groups))
    interval = carry.t_prev, carry.t_next, carry.controller_state
    starts, ends = _times(
        (windows.controller, windows.t1, interval),
        y=lax.stop_gradient(carry.y),
        order=windows.solver.error_order(windows.terms),
        records=records,
    )
    num_made = last.num_steps - carry.num_steps
    made = jnp.arange(capacity) < num_made
    kept = made & records.keep
    # Only the last one may be unsolved, in part: that is the end.
    unsolved = jnp.where(kept, num_steps - records.num_solved, 0)
    num_solved = num_made * num_steps - jnp.sum(unsolved)

    def group(y, inputs):
        index, *inputs = inputs

        def differentiable(y):
            kept, starts, nexts, ys = inputs
            # Nothing moves in a window that was rejected.
            flat, _ = ravel(y)
            latest = lax.cummax(jnp.where(kept, jnp.arange(size), -1))
            start = jax.vmap(select, (0, 0, None))(latest >= 0, ys[latest, -1], flat)
            start = jnp.broadcast_to(start[:, None], ys.shape)
            ys = jax.vmap(select)(kept, ys, start)
            grids = jax.vmap(windows.solver.grid)(starts, nexts)
            here = jnp.clip(num_solved - index[0] * num_steps, 0, size * num_steps)
            trajectory = windows.solver.trajectory(
                windows.terms,
                jnp.concatenate([grids[:, :-1].reshape(-1), nexts[-1:]]),
                y,
                windows.args,
                carry.solver_state,
                guess=_flat(ys),
                forward=_known(windows.solver, _Recorded(here)),
                num_windows=size,
            )
            steps = steps_of(trajectory, jnp.zeros(size * num_steps, bool))
            steps = jax.tree.map(
                lambda x: x.reshape(size, num_steps, *x.shape[1:]), steps
            )
            at_ends = trajectory.ys[num_steps - 1 :: num_steps]
            past = jnp.concatenate([trajectory.y0[None], trajectory.ys])
            y = trajectory.inner.unravel(past[trajectory.statistics.num_solved])
            return y, _wanted(windows, steps, at_ends)

        return unless_idle(differentiable, y, index, (size,))

    def unless_idle(f, y, index, shape):
        zeros = lambda s: jnp.zeros((*shape, *s.shape), s.dtype)
        steps, ends = wanted
        nothing = jax.tree.map(zeros, (steps, ends and ends.ys))
        is_idle = index.reshape(-1)[0] >= num_made
        return lax.cond(eqxi.unvmap_all(is_idle), lambda y: (y, nothing), f, y)

    # Made again for the derivative: memory is that of trajectories. Idle groups, too,
    # are skipped many at a time.
    group = jax.checkpoint(group, prevent_cse=False)

    @ft.partial(jax.checkpoint, prevent_cse=False)
    def many(y, parts):
        scan = lambda y: lax.scan(group, y, parts)
        return unless_idle(scan, y, parts[0], (num_groups, size))

    shape = num_many, num_groups, size
    index = jnp.arange(math.prod(shape))
    # A step ends where the next one starts, also the last one of all.
    knots = jnp.pad(starts, (0, len(index) - capacity), mode="edge")

    def grouped(x):
        missing = jnp.zeros((len(index) - len(x), *x.shape[1:]), x.dtype)
        return jnp.concatenate([x, missing]).reshape(*shape, *x.shape[1:])

    parts = index, kept, knots[:-1], knots[1:], records.ys
    parts = jax.tree.map(grouped, parts)
    y, found = lax.scan(many, carry.y, parts)
    steps, at_ends = jax.tree.map(lambda x: x[:capacity], _flat(_flat(found)))
    if steps is not None:
        taken = jnp.broadcast_to(kept[:, None], steps.taken.shape)
        steps = _flat(eqx.tree_at(lambda s: s.taken, steps, taken))
    if at_ends is not None:
        counts = jnp.cumsum(kept, dtype=carry.num_accepted.dtype)
        counts = carry.num_accepted + counts
        at_ends = Ends(starts[1:], ends[:-1], at_ends, counts, kept)
    done = starts[num_made], ends[num_made], y
    carry = eqx.tree_at(lambda c: (c.t_prev, c.t_next, c.y), last, done)
    return carry, steps, at_ends


def _clip_to_end(t_prev: Array, t_next: Any, t1: Any, keep: Bool[Array, ""]) -> Array:
    """As in diffrax: a last step of a few rounding units joins the one before."""
    floor = lax.fori_loop(
        0, 100, lambda _, t: eqxi.prevbefore(t), lax.stop_gradient(jnp.asarray(t1))
    )
    clipped = jnp.where(keep, t1, t_prev + 0.5 * (t1 - t_prev))
    return jnp.where(t_next > floor, clipped, t_next)
