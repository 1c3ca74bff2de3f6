"""`DEERAdjoint`: the solve without the loop that diffrax has around it."""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from ._checks import check_count
from ._events import EventSearch
from ._saving import Final, SaveTimes, dense, interpolate, interpolation, save
from ._solver import DEERSolver
from ._step_map import ravel
from ._successive import is_fixed, one_after_another
from ._together import together
from ._windows import Carry, Outcome, Windows, as_arrays

# What is kept of windows whose number is not known. More takes time, to fill it with
# zeros, and memory, in each sample of a batch.
_MOST_ENTRIES = 2**15
_LEAST_WINDOWS = 128


class DEERAdjoint(diffrax.AbstractAdjoint):
    r"""Solves and differentiates `DEERSolver`'s windows in parallel.

    The values are those that any other adjoint gives, found with less waiting:

    - all save times are read out at once, in every form of `SaveAt`;
    - windows that are known beforehand, `WholeInterval` and `StepTo`, are solved all
        together, in one Newton iteration and without any loop around it; others one
        after another, as the controller chooses them;
    - value and gradient together take one Newton solve a window, since the converged
        trajectory is kept;
    - windows of `PIDController` and `ConstantStepSize` are differentiated many at a
        time, however short they are: `DEERSolver(num_steps=1)` makes the steps that
        its inner solver would make, with a gradient that is parallel in time;
    - events are looked for at every inner step, not only at the ends of windows, and
        the solution ends at the first one, or at its root inside of that step.

    Derivatives are exact, in forward and reverse mode and of any order, with respect to
    `y0`, `args`, all that the vector field closes over, `t0`, `t1` and save times.

    `sol.stats` has, beside diffrax's numbers of steps (= windows) made, accepted and
    rejected: `num_newton_iterations`, all of them, `max_newton_iterations`, those of
    the window with most, and `residual`, the largest of all accepted windows, in the
    units of y. Windows that are solved together count as one here.

    **Arguments:**

    - `max_windows`: for how many windows, rejected ones included, there is memory to
        keep their trajectories, where their number is not known beforehand. Any more,
        up to diffrax's `max_steps`, are right too, but made one step after the other,
        and their Newton iterations are not counted; with `SaveAt(dense=True)` they are
        an error. Half of the time to compile is theirs, and is saved if `max_steps` is
        not larger. `None`: 128, or, if that is more and there are neither events nor
        other controllers than the two above, as many as have 2^15 numbers.

    **Raises:** `ValueError` for any other solver than `DEERSolver`.

    **Cost** for N steps a window, W windows, D state components: memory
    O(W N D), with W = `max_windows` where the number of windows is not known, whatever
    `max_steps` is; while it differentiates O(N D²) more, for one window at a time (for
    at most 1024 steps at a time where windows are shorter), or O(W N D²) where they are
    solved together. Both are O(N D) and O(W N D) where D is above 16 and the
    linearization is not dense.
    """

    max_windows: int | None = None

    def __check_init__(self):
        if self.max_windows is not None:
            check_count("max_windows", self.max_windows)

    def loop(
        self,
        *,
        args,
        terms,
        solver,
        stepsize_controller,
        event,
        saveat,
        t0,
        t1,
        dt0,
        max_steps,
        throw,
        init_state,
        passed_solver_state,
        passed_controller_state,
        progress_meter,
    ) -> Any:
        """Called by `diffrax.diffeqsolve`."""
        del passed_solver_state
        _check_solver(solver)
        # The times of all subs, together.
        is_sub = lambda x: isinstance(x, diffrax.SubSaveAt)
        subs = jax.tree.leaves(saveat.subs, is_leaf=is_sub)
        all_ts = [sub.ts for sub in subs if sub.ts is not None]
        all_ts = jnp.concatenate([jnp.asarray(t0)[None][:0], *all_ts])
        max_windows = self.max_windows
        if max_windows is None:
            max_windows = _LEAST_WINDOWS
            if is_fixed(stepsize_controller, event):
                num_entries = solver.num_steps * max(1, ravel(init_state.y)[0].size)
                max_windows = max(max_windows, _MOST_ENTRIES // num_entries)
        search = None
        if event is not None:
            call = lambda function, t, y: function(
                t,
                y,
                args,
                terms=terms,
                solver=solver,
                t0=t0,
                t1=t1,
                dt0=dt0,
                saveat=saveat,
                stepsize_controller=stepsize_controller,
                max_steps=max_steps,
            )
            search = EventSearch(event, call)
        windows = Windows(
            solver=solver,
            terms=terms,
            args=args,
            controller=stepsize_controller,
            event=search,
            progress_meter=progress_meter,
            t0=t0,
            t1=t1,
            save_ts=all_ts,
            max_steps=max_steps,
            max_windows=max_windows,
            save_ends=any(sub.steps != 0 for sub in subs),
            save_dense=saveat.dense,
        )
        carry = _first_carry(init_state, windows)
        meter = init_state.progress_meter_state
        knots = None if passed_controller_state else windows.knots(init_state.tnext)
        if knots is None or len(knots) < 2:
            outcome, meter = one_after_another(windows, carry, meter)
        else:
            outcome = together(windows, carry, knots)
            meter = windows.advance(meter, outcome.carry.t_prev)
        carry = outcome.carry
        inner = windows.inner_step(init_state.y)

        result = carry.result
        final = Final(carry.t_prev, carry.y, carry.num_accepted, False)
        if search is not None and search.event.root_finder is not None:
            t, y, root = search.locate(
                carry.event_mask, interpolation(inner, carry.last)
            )
            started = carry.num_steps > 0
            occurred = result == diffrax.RESULTS.event_occurred
            keep = lambda a, b: jnp.where(started & occurred, a, b)
            failed = started & occurred & (root != diffrax.RESULTS.successful)
            result = diffrax.RESULTS.where(failed, root, result)
            t, y = jax.tree.map(keep, (t, y), (final.t, final.y))
            final = Final(t, y, carry.num_accepted, True)
        running = (carry.t_prev < t1) & diffrax.is_successful(result)
        result = diffrax.RESULTS.where(
            running,
            diffrax.RESULTS.max_steps_reached,  # pyright: ignore
            result,
        )
        save_state = _save_all(saveat, init_state, windows, outcome, inner, final)
        dense_ts = dense_infos = index = None
        if saveat.dense:
            contiguous = knots is not None
            dense_ts, dense_infos, index = dense(inner, outcome.steps, t0, contiguous)
            if not contiguous and throw and max_windows < max_steps:
                msg = (
                    "`SaveAt(dense=True)` with `DEERAdjoint` keeps at most "
                    f"`max_windows={max_windows}` windows, rejected ones "
                    "included, and the solve took more. Pass a larger `max_windows` to "
                    "`DEERAdjoint`, or take fewer windows: a larger `dt0`, more "
                    "`num_steps`, `PIDController` or `WholeInterval`."
                )
                dense_ts = eqx.error_if(dense_ts, running, msg)
        final_state = eqx.tree_at(
            lambda s: (
                s.save_state,
                s.dense_ts,
                s.dense_infos,
                s.dense_save_index,
                s.solver_state,
                s.controller_state,
                s.made_jump,
                s.progress_meter_state,
                s.num_steps,
                s.num_accepted_steps,
                s.num_rejected_steps,
                s.result,
                s.event_mask,
            ),
            init_state,
            (
                save_state,
                dense_ts,
                dense_infos,
                index,
                carry.solver_state,
                carry.controller_state,
                carry.made_jump,
                meter,
                carry.num_steps,
                carry.num_accepted,
                carry.num_steps - carry.num_accepted,
                result,
                None if event is None else carry.event_mask,
            ),
            is_leaf=lambda x: x is None,
        )
        stats = {
            "num_newton_iterations": carry.num_iterations,
            "max_newton_iterations": carry.most_iterations,
            "residual": carry.residual,
        }
        return final_state, stats


def _check_solver(solver: Any) -> None:
    # `type`: a wrapped solver answers `isinstance` in the name of its inner one.
    if issubclass(type(solver), DEERSolver):
        return
    name = type(solver).__name__
    msg = (
        f"`DEERAdjoint` is for `DEERSolver`; got `solver={name}(...)`. Use "
        f"`DEERSolver({name}())` to make the same steps in parallel, or leave "
        "`adjoint` out."
    )
    if type(solver) is diffrax.HalfSolver and isinstance(solver.solver, DEERSolver):
        msg = (
            "`DEERAdjoint` is for `DEERSolver`; got one inside of a `HalfSolver`. "
            "`DEERSolver` has an error estimate of its own: use it as it is, or "
            "`DEERSolver(HalfSolver(...))`, or leave `adjoint` out."
        )
    raise ValueError(msg)


def _first_carry(init_state: Any, windows: Windows) -> Carry:
    flat, _ = ravel(init_state.y)
    zero = jnp.zeros((), int)
    event_state = None, None
    if windows.event is not None:
        event_state = init_state.event_values, init_state.event_mask
    return as_arrays(
        Carry(
            t_prev=init_state.tprev,
            t_next=init_state.tnext,
            y=init_state.y,
            made_jump=init_state.made_jump,
            solver_state=init_state.solver_state,
            controller_state=init_state.controller_state,
            result=init_state.result,
            num_steps=zero,
            num_accepted=zero,
            last=windows.no_step(init_state.y),
            event_values=event_state[0],
            event_mask=event_state[1],
            num_iterations=zero,
            most_iterations=zero,
            residual=jnp.zeros((), flat.dtype),
        )
    )


def _save_all(
    saveat: diffrax.SaveAt,
    init_state: Any,
    windows: Windows,
    outcome: Outcome,
    inner: Any,
    final: Final,
) -> PyTree[Any]:
    """Diffrax's save states, filled."""
    ts, t0, y0 = windows.save_ts, windows.t0, init_state.y
    ys, found = None, outcome.found
    if len(ts) > 0:
        # What has not been found is at t0, where everything is finite.
        ys = interpolate(inner, outcome, jnp.where(found, ts, t0))
        empty = jnp.asarray(t0 == windows.t1)
        spread = lambda y, y0: jnp.where(empty, y0[None], y)
        ys, found = jax.tree.map(spread, ys, y0), found | empty
    ends = None
    if outcome.ends is not None:
        ends = outcome.ends, jax.vmap(inner.unravel)(outcome.ends.ys)
    start = 0

    def fill(sub, state):
        nonlocal start
        times = None
        if sub.ts is not None and len(sub.ts) > 0:
            part = slice(start, start + len(sub.ts))
            start = part.stop
            pick = lambda x: x[part]
            times = SaveTimes(sub.ts, jax.tree.map(pick, ys), found[part])
        buffers = state.ts, state.ys
        filled = save(sub, buffers, windows.args, (t0, y0), times, ends, final)
        return eqx.tree_at(lambda s: (s.ts, s.ys), state, filled)

    is_sub = lambda x: isinstance(x, diffrax.SubSaveAt)
    return jax.tree.map(fill, saveat.subs, init_state.save_state, is_leaf=is_sub)
