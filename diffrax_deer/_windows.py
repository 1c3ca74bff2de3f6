r"""All the windows of a solve: the values first, then their derivatives.

The answer of a solve is one recurrence, whatever windows it was found in. Two ways:

- *Together.* Where a step size controller makes steps that are known beforehand, their
  windows are one grid, solved at once. Everything is differentiable as it stands.
- *One after another.* A loop without derivatives lets the controller choose the windows
  and records their trajectories. A second pass goes through the same windows with the
  recorded solutions as given: no iteration, only functions of the solution, which JAX
  differentiates. Hence one Newton solve a window for value and gradient together.

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

from ._checks import check_window_state
from ._controller import WholeInterval
from ._custom_types import Args, RealScalarLike, States, Y
from ._events import EventSearch
from ._newton import AbstractForward, SequentialForward, Statistics
from ._solver import DEERSolver, WindowState, window_state
from ._step_map import SolverStep, ravel
from ._trajectory import Trajectory, largest_error

# Without `max_steps`, at most so many times `max_windows`.
_MANY = 4096


class Steps(eqx.Module):
    """Inner steps in the order of time, not all of which have been taken.

    - `t0s`, `t1s`, `(time,)`, and `y0s`, `(time, state)`: where to evaluate the step,
        one of length zero where there is no solution.
    - `ends`, `(time,)`, and `y1s`, `(time, state)`: where the step leads.
    - `taken`, `(time,)`: whether it belongs to the solution.
    """

    t0s: Float[Array, " time"]
    t1s: Float[Array, " time"]
    y0s: States
    ends: Float[Array, " time"]
    y1s: States
    taken: Bool[Array, " time"]

    def locate(
        self, ts: Float[Array, " times"]
    ) -> tuple[Int[Array, " times"], Bool[Array, " times"]]:
        """The step that each of `ts` lies in, and whether there is one."""
        # Increasing, also where a step has not been taken.
        ends = lax.cummax(jnp.where(self.taken, self.ends, -jnp.inf))
        index = jnp.searchsorted(lax.stop_gradient(ends), ts)
        return jnp.minimum(index, len(ends) - 1), index < len(ends)

    def __getitem__(self, index: Any) -> "Steps":
        return jax.tree.map(lambda x: x[index], self)


class Ends(eqx.Module):
    """The ends of windows: `SaveAt(steps=...)` saves there.

    - `ts`, `(windows,)`: where the next window begins, just after a jump.
    - `last`, `(windows,)`: the end of the last step, just before it.
    - `ys`, `(windows, state)`.
    - `counts`, `(windows,)`: the number of accepted windows so far.
    - `kept`, `(windows,)`: whether the window was accepted.
    """

    ts: Float[Array, " windows"]
    last: Float[Array, " windows"]
    ys: States
    counts: Int[Array, " windows"]
    kept: Bool[Array, " windows"]


class Carry(eqx.Module):
    """What one window hands on to the next."""

    t_prev: RealScalarLike
    t_next: RealScalarLike
    y: Y
    made_jump: Bool[Array, ""]
    solver_state: WindowState
    controller_state: PyTree[Any]
    result: diffrax.RESULTS
    num_steps: Int[Array, ""]
    num_accepted: Int[Array, ""]
    # The last step that was taken, of leading axis 1.
    last: Steps
    event_values: PyTree[Array]
    event_mask: PyTree[Bool[Array, ""]]
    num_iterations: Int[Array, ""]
    most_iterations: Int[Array, ""]
    residual: Float[Array, ""]


class Record(eqx.Module):
    """What the search found out about a window, and its solution."""

    keep: Bool[Array, ""]
    t_prev: Float[Array, ""]
    t_next: Float[Array, ""]
    event_index: Int[Array, ""]
    mask: PyTree[Bool[Array, ""]]
    ys: States
    statistics: Statistics


class Outcome(eqx.Module):
    """The whole solve.

    - `carry`: as after the last window.
    - `steps`: those to look save times up in, at `index`, `(times,)`, if `found`.
    - `ends`: of all windows, if they are to be saved.
    """

    carry: Carry
    steps: Steps
    index: Int[Array, " times"]
    found: Bool[Array, " times"]
    ends: Ends | None


class _Recorded(AbstractForward):
    """The solution is known, or else found in sequence."""

    known: bool | Bool[Array, ""]
    ys: States
    statistics: Statistics

    def __call__(self, step_map, y0, xs, guess, iteration):
        recorded = lambda: (self.ys, self.statistics)
        if self.known is True:
            return recorded()
        find = lambda: SequentialForward()(step_map, y0, xs, guess, iteration)
        return lax.cond(eqxi.unvmap_all(self.known), recorded, find)


def as_arrays(tree: PyTree[Any]) -> PyTree[Array]:
    """Python numbers made arrays, of types that do not depend on others' (`weak`)."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), tree)


def _where(pred: Bool[Array, ""], a: PyTree[Any], b: PyTree[Any]) -> PyTree[Any]:
    return jax.tree.map(lambda a, b: jnp.where(pred, a, b), a, b)


class Windows(eqx.Module):
    """A differential equation and how it is to be cut into windows.

    The fields are the arguments of `diffrax.AbstractAdjoint.loop`; `save_ts`,
    `(times,)`, are all the times to save at, `max_windows` those of records.
    """

    solver: DEERSolver
    terms: PyTree[diffrax.AbstractTerm]
    args: Args
    controller: diffrax.AbstractStepSizeController
    event: EventSearch | None
    progress_meter: Any
    t0: RealScalarLike
    t1: RealScalarLike
    save_ts: Float[Array, " times"]
    max_steps: int | None
    max_windows: int
    save_ends: bool
    save_dense: bool

    def inner_step(self, y: Y) -> SolverStep:
        """One inner step."""
        return self.solver.inner_step(self.terms, y, self.args)

    def knots(self, t_next: RealScalarLike) -> Float[Array, " windows+1"] | None:
        """The ends of the windows, if they are known beforehand.

        `t_next` is the first of them, of which diffrax has checked that it is right.
        """
        t0, t1 = jnp.asarray(self.t0), jnp.asarray(self.t1)
        if type(self.controller) is WholeInterval:
            following = t0[None][:0]
        elif type(self.controller) is diffrax.StepTo:
            following = self.controller.ts[2:].astype(t0.dtype)
            following = following.at[-1:].set(t1)
        else:
            return None
        start = jnp.stack([t0, jnp.asarray(t_next)])
        knots = jnp.concatenate([start, following])
        return knots if self.max_steps is None else knots[: self.max_steps + 1]

    def _event_values(self, ts: Float[Array, " time"], ys: States, unravel) -> Any:
        event = self.event
        assert event is not None
        return jax.vmap(lambda t, y: event.values(t, unravel(y)))(ts, ys)

    def _running(self, carry: Carry) -> Bool[Array, ""]:
        successful = jnp.asarray(diffrax.is_successful(carry.result))
        return jnp.asarray(carry.t_prev < self.t1) & successful

    def advance(self, meter: PyTree[Any], t: RealScalarLike) -> PyTree[Any]:
        """Moves the progress meter; `t` comes from the solution, so it runs behind."""
        length = jnp.where(self.t1 == self.t0, 1, self.t1 - self.t0)
        return self.progress_meter.step(meter, (t - self.t0) / length)

    def no_step(self, y: Y) -> Steps:
        """One step of length zero, which has not been taken."""
        t, (flat, _) = jnp.asarray(self.t0)[None], ravel(y)
        flat = lax.stop_gradient(flat)[None]
        return Steps(t, t, flat, t, flat, jnp.zeros(1, bool))

    # ---- Together ----

    def together(self, carry: Carry, knots: Float[Array, " windows+1"]) -> Outcome:
        """One Newton solve of all windows; `knots` are their ends."""
        num_windows, num_steps = len(knots) - 1, self.solver.num_steps
        grids = jax.vmap(self.solver.grid)(knots[:-1], knots[1:])
        ts = jnp.concatenate([grids[:, :-1].reshape(-1), knots[-1:]])
        trajectory = self.solver.trajectory(
            self.terms,
            ts,
            carry.y,
            self.args,
            carry.solver_state,
            num_windows=num_windows,
        )
        _, _, inner_okay = trajectory.details()
        num_solved = jnp.minimum(
            trajectory.statistics.num_solved,
            jnp.where(jnp.all(inner_okay), len(inner_okay), jnp.argmin(inner_okay)),
        )
        # A window that fails is the last one, and counts.
        num_done = jnp.minimum(num_solved // num_steps + 1, num_windows)
        result, last = trajectory.result(inner_okay), num_done * num_steps - 1
        event_values, mask = carry.event_values, carry.event_mask
        if self.event is not None:
            valid = jnp.arange(len(ts) - 1) < num_solved
            values = self._event_values(ts[1:], trajectory.ys, trajectory.inner.unravel)
            index, mask = self.event.first(carry.event_values, values, valid)
            happened = index < len(valid)
            last = jnp.where(happened, index, last)
            num_done = last // num_steps + 1
            result = _event_result(happened, result)
        started = self._running(carry)
        steps = _steps(trajectory, started & (jnp.arange(len(ts) - 1) <= last))
        flat = jnp.where(started, trajectory.ys[last], trajectory.y0)
        statistics = trajectory.statistics
        y = trajectory.inner.unravel(flat)
        num_done = jnp.where(started, num_done, 0)
        new = Carry(
            t_prev=jnp.where(started, ts[last + 1], carry.t_prev),
            t_next=ts[-1],
            y=y,
            made_jump=jnp.array(False),
            solver_state=window_state(trajectory),
            controller_state=_step_to_state(self.controller, carry, num_done),
            result=diffrax.RESULTS.where(started, result, carry.result),
            num_steps=num_done,
            num_accepted=num_done,
            last=_at(steps, last),
            event_values=event_values,
            event_mask=_where(started, mask, carry.event_mask),
            num_iterations=statistics.num_iterations,
            most_iterations=statistics.num_iterations,
            residual=statistics.residual,
        )
        ends = None
        if self.save_ends:
            index = jnp.arange(num_windows)
            at = jnp.minimum((index + 1) * num_steps - 1, last)
            ends = Ends(
                ts=ts[at + 1],
                last=ts[at + 1],
                ys=trajectory.ys[at],
                counts=index + 1,
                kept=index < num_done,
            )
        return Outcome(new, steps, *steps.locate(self.save_ts), ends)

    # ---- One after another ----

    def _attempt(
        self,
        carry: Carry,
        forward: AbstractForward | None = None,
        record: Record | None = None,
        known: bool | Bool[Array, ""] = False,
    ) -> tuple[Carry, Record, Steps, Ends]:
        """One window; its decisions are those of `record` if it is `known`."""

        def decide(name, new):
            if record is None:
                return new
            old = getattr(record, name)
            return old if known is True else _where(jnp.asarray(known), old, new)

        def pin(name, t):
            # The recorded value, with the derivative of the one computed again.
            return lax.stop_gradient(decide(name, t)) + t - lax.stop_gradient(t)

        ts = self.solver.grid(carry.t_prev, carry.t_next)
        trajectory = self.solver.trajectory(
            self.terms, ts, carry.y, self.args, carry.solver_state, forward=forward
        )
        errors, _, inner_okay = trajectory.details()
        result = trajectory.result(inner_okay)
        unravel, num_steps = trajectory.inner.unravel, len(inner_okay)
        error = largest_error(errors, result)
        keep, t_prev, t_next, made_jump, controller_state, controller_result = (
            self.controller.adapt_step_size(
                carry.t_prev,
                carry.t_next,
                carry.y,
                unravel(trajectory.ys[-1]),
                self.args,
                None if error is None else unravel(error),
                self.solver.error_order(self.terms),  # pyright: ignore
                carry.controller_state,
            )
        )
        keep = decide("keep", jnp.asarray(keep))
        t_prev = jnp.minimum(t_prev, self.t1)
        t_next = _clip_to_end(t_prev, t_next, self.t1, keep)
        t_prev, t_next = pin("t_prev", t_prev), pin("t_next", t_next)

        result = diffrax.RESULTS.where(keep, result, diffrax.RESULTS.successful)
        result = diffrax.RESULTS.where(
            diffrax.is_okay(result), controller_result, result
        )
        last, index = jnp.array(num_steps - 1), jnp.array(num_steps)
        event_values, mask = carry.event_values, carry.event_mask
        end = t_prev
        if self.event is not None:
            valid = keep & (jnp.arange(num_steps) < trajectory.statistics.num_solved)
            values = self._event_values(ts[1:], trajectory.ys, unravel)
            index, mask = self.event.first(event_values, values, valid)
            index, mask = decide("event_index", index), decide("mask", mask)
            happened = index < num_steps
            last = jnp.where(happened, index, last)
            end = jnp.where(happened, ts[last + 1], t_prev)
            result = _event_result(happened, result)
            final = jax.tree.map(lambda v: v[-1], values)
            event_values = _where(keep, final, event_values)

        statistics, flat = trajectory.statistics, trajectory.ys[last]
        steps = _steps(trajectory, keep & (jnp.arange(num_steps) <= last))
        num_accepted = carry.num_accepted + jnp.where(keep, 1, 0)
        most = jnp.maximum(carry.most_iterations, statistics.num_iterations)
        new = Carry(
            t_prev=end,
            t_next=t_next,
            y=unravel(jnp.where(keep, flat, trajectory.y0)),
            made_jump=jnp.where(keep, jnp.asarray(made_jump), carry.made_jump),
            solver_state=_where(keep, window_state(trajectory), carry.solver_state),
            controller_state=controller_state,
            result=result,
            num_steps=carry.num_steps + 1,
            num_accepted=num_accepted,
            last=_where(keep, _at(steps, last), carry.last),
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
        self, carry: Carry, meter: PyTree[Any], capacity: int
    ) -> tuple[Record, PyTree[Any]]:
        """Chooses the first `capacity` windows, and records them; no derivatives."""
        shape = eqx.filter_eval_shape(self._attempt, carry)[1]
        records = jax.tree.map(
            lambda s: jnp.zeros((capacity, *s.shape), s.dtype), shape
        )

        def running(state):
            carry, *_ = state
            return self._running(carry) & (carry.num_steps < capacity)

        def step(state):
            carry, records, meter = state
            index = carry.num_steps
            carry, record, _, _ = self._attempt(carry)
            records = jax.tree.map(lambda b, r: b.at[index].set(r), records, record)
            return carry, records, self.advance(meter, carry.t_prev)

        _, records, meter = lax.while_loop(running, step, (carry, records, meter))
        return records, meter

    def one_after_another(
        self, carry: Carry, meter: PyTree[Any]
    ) -> tuple[Outcome, PyTree[Any]]:
        """As many windows as it takes; also returns the state of the progress meter."""
        check_window_state(carry.solver_state, self.solver.num_steps)
        limit = _MANY * self.max_windows if self.max_steps is None else self.max_steps
        capacity = min(limit, self.max_windows)
        num_chunks = 1 if self.save_dense else -(-limit // capacity)
        limit = min(limit, num_chunks * capacity)
        types = eqx.filter_eval_shape(self._attempt, carry)[0]
        carry = jax.tree.map(lambda x, s: jnp.asarray(x, s.dtype), carry, types)
        search = eqx.filter_closure_convert(
            lambda carry, meter: self._search(carry, meter, capacity), carry, meter
        )
        arrays, rest = eqx.partition((search, carry), eqx.is_array)
        search, start = eqx.combine(lax.stop_gradient(arrays), rest)
        records, meter = search(start, meter)

        repeat = lambda tree, n: jax.tree.map(lambda x: jnp.repeat(x, n, 0), tree)
        nothing = self.no_step(carry.y)
        times = repeat(nothing, len(self.save_ts))
        found = jnp.zeros(len(self.save_ts), bool)
        ends = None
        if self.save_ends:
            t, count = nothing.ends, jnp.zeros(1, carry.num_accepted.dtype)
            ends = Ends(t, t, nothing.y1s, count, nothing.taken)
            ends = repeat(ends, num_chunks * capacity)

        def chunk(state):
            index, carry, times, found, ends = state
            known = True if num_chunks == 1 else index == 0
            carry, steps, new_ends = self._again(carry, records, known, limit)
            where, here = steps.locate(self.save_ts)
            here = here & ~found
            times = jax.vmap(_where)(here, steps[where], times)
            if ends is not None:
                update = lambda b, x: lax.dynamic_update_slice_in_dim(
                    b, x, index * capacity, axis=0
                )
                ends = jax.tree.map(update, ends, new_ends)
            return (index + 1, carry, times, found | here, ends), steps

        state = jnp.array(0, int), carry, times, found, ends
        if num_chunks == 1:
            (_, carry, times, found, ends), steps = chunk(state)
            if self.save_dense:
                return Outcome(carry, steps, *steps.locate(self.save_ts), ends), meter
        else:
            _, carry, times, found, ends = eqxi.while_loop(
                lambda state: self._running(state[1]) & (state[1].num_steps < limit),
                lambda state: chunk(state)[0],
                state,
                max_steps=num_chunks,
                kind="bounded",
            )
        return Outcome(carry, times, jnp.arange(len(found)), found, ends), meter

    def _again(
        self, carry: Carry, records: Record, known: Any, limit: int
    ) -> tuple[Carry, Steps, Ends]:
        """The windows of the records once more, differentiably."""
        shapes = eqx.filter_eval_shape(self._attempt, carry)[2:]
        nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

        def window(carry, record):
            active = self._running(carry) & (carry.num_steps < limit)

            def attempt(carry):
                # What has nothing left to do, in a batch, must not make NaNs.
                num_solved = jnp.where(active, record.statistics.num_solved, 0)
                statistics = eqx.tree_at(
                    lambda s: s.num_solved, record.statistics, num_solved
                )
                forward = _Recorded(known, record.ys, statistics)
                new, _, steps, end = self._attempt(carry, forward, record, known)
                steps = eqx.tree_at(lambda s: s.taken, steps, steps.taken & active)
                end = eqx.tree_at(lambda e: e.kept, end, end.kept & active)
                return _where(active, new, carry), (steps, end)

            # Recomputed for the derivative, so that memory is that of trajectories,
            # not that of all that happens inside of the vector field.
            attempt = jax.checkpoint(attempt, prevent_cse=False)
            skip = lambda carry: (carry, nothing)
            return lax.cond(eqxi.unvmap_any(active), attempt, skip, carry)

        carry, (steps, ends) = lax.scan(window, carry, records)
        flatten = lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
        return carry, jax.tree.map(flatten, steps), ends


def _steps(trajectory: Trajectory, taken: Bool[Array, " time"]) -> Steps:
    (t0s, t1s), y0s = trajectory.points()
    return Steps(t0s, t1s, y0s, trajectory.ts[1:], trajectory.ys, taken)


def _at(steps: Steps, index: Int[Array, ""]) -> Steps:
    return jax.tree.map(lambda x: x[index][None], steps)


def _event_result(
    happened: Bool[Array, ""], result: diffrax.RESULTS
) -> diffrax.RESULTS:
    return diffrax.RESULTS.where(
        happened,
        diffrax.RESULTS.event_occurred,  # pyright: ignore
        result,
    )


def _clip_to_end(t_prev: Array, t_next: Any, t1: Any, keep: Bool[Array, ""]) -> Array:
    """As in diffrax: a last step of a few rounding units joins the one before."""
    floor = lax.fori_loop(
        0, 100, lambda _, t: eqxi.prevbefore(t), lax.stop_gradient(jnp.asarray(t1))
    )
    clipped = jnp.where(keep, t1, t_prev + 0.5 * (t1 - t_prev))
    return jnp.where(t_next > floor, clipped, t_next)


def _step_to_state(controller: Any, carry: Carry, num_done: Array) -> Any:
    """`StepTo` counts; `WholeInterval` has no state."""
    if type(controller) is diffrax.StepTo:
        return carry.controller_state + num_done
    return carry.controller_state
