"""Windows that are static, solved all together.

One grid, one Newton iteration, and everything is differentiable as it stands.
"""

import dataclasses
from typing import Any

import diffrax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from .._ode.grid_solve import Trajectory, short_step
from .._prefix import at, count_leading_true, select
from .._ravel import ravel
from .._time_axis import TimeAxis
from .loop_state import (
    Ends,
    LoopState,
    Outcome,
    Steps,
    Windows,
    event_result,
    steps_of,
)
from .saveat import interpolate


def _solve(
    windows: Windows, state: LoopState, window_ends: Float[Array, " ends"]
) -> tuple[Trajectory, Any]:
    """Also returns the state of the solver: of single steps what any solve begins with.

    That of windows is a guess for the next solve.
    """
    solver, inner = windows.solver, windows.inner_step(state.y)
    trajectory, new = solver.solve_windows(
        inner, window_ends, state.y, state.solver_state
    )
    return trajectory, state.solver_state if solver.makes_single_steps else new


def _stand_in(
    windows: Windows, state: LoopState, ends: Float[Array, " ends"]
) -> tuple[LoopState, Float[Array, " ends"]]:
    """What is solved where there is nothing to solve: a where before the solve.

    Its derivative is multiplied by zero, and is finite: by all but a constant `y0`.
    """
    y = select(windows.running(state), state.y, lax.stop_gradient(state.y))
    short = jnp.linspace(
        *short_step(windows.inner_step(y), ends[0], ends[-1]), len(ends)
    )
    ends = jnp.where(ends[0] < ends[-1], ends, short.astype(ends.dtype))
    return dataclasses.replace(state, y=y), ends


def static_windows(
    windows: Windows, state: LoopState, window_ends: Float[Array, " ends"]
) -> Outcome:
    """One solve of all windows, which lie between `window_ends`."""
    num_windows, num_steps = len(window_ends) - 1, windows.solver.window_steps
    started = windows.running(state)
    first, window_ends = _stand_in(windows, state, window_ends)
    trajectory, solver_state = _solve(windows, first, window_ends)
    statistics, succeeded = trajectory.statistics, trajectory.succeeded
    num_solved = jnp.minimum(statistics.num_solved, count_leading_true(succeeded))
    # A window that fails is the last one, and counts.
    num_done = jnp.minimum(num_solved // num_steps + 1, num_windows)
    result, last = trajectory.result(), num_done * num_steps - 1
    mask, index = state.event_mask, jnp.arange(len(trajectory.ys))
    if windows.event is not None:
        values, valid = windows.event_values(trajectory), index < num_solved
        where, mask = windows.event.first(state.event_values, values, valid)
        happened = where < len(valid)
        last = jnp.where(happened, where, last)
        num_done = last // num_steps + 1
        result = event_result(happened, result)
    steps = steps_of(trajectory, started & (index <= last))
    flat = jnp.where(started, at(trajectory.ys, last), ravel(state.y)[0])
    num_done = jnp.where(started, num_done, 0)
    controller_state = state.controller_state
    if type(windows.controller) is diffrax.StepTo:
        controller_state = controller_state + num_done
    new = LoopState(
        t_prev=jnp.where(started, at(trajectory.ends, last), state.t_prev),
        t_next=trajectory.ends[-1],
        y=trajectory.inner.unravel(flat),
        made_jump=jnp.array(False),
        solver_state=solver_state,
        controller_state=controller_state,
        result=diffrax.RESULTS.where(started, result, state.result),
        num_steps=num_done,
        num_accepted=num_done,
        event_values=state.event_values,
        event_mask=select(started, mask, state.event_mask),
        num_iterations=statistics.num_iterations,
        max_iterations=statistics.num_iterations,
        residual=statistics.residual,
        method=statistics.method,
        gradient=statistics.gradient,
    )
    ends = _ends(trajectory, num_steps, last, num_done) if windows.save_ends else None
    ys, found = _saved(windows, trajectory, steps)
    return Outcome(new, ys, found, steps, steps[last][None], ends)


def _saved(windows: Windows, trajectory: Trajectory, steps: Steps) -> tuple[Any, Array]:
    """The solution at all save times, and which of them have been `found`."""
    ts, scan = windows.save_ts, trajectory.statistics.method.sharded_scan
    axis = TimeAxis() if scan is None else scan.time_axis
    index, found = steps.locate(ts, axis)
    # What has not been found is at t0, where everything is finite.
    ts = jnp.where(found, ts, windows.t0)
    ys = interpolate(trajectory, steps, ts, index, axis) if len(ts) > 0 else None
    return ys, found


def _ends(trajectory: Trajectory, num_steps: int, last: Array, num_done: Array) -> Ends:
    """The ends of windows of `num_steps` steps, up to the step `last`."""
    index = jnp.arange(len(trajectory.ys) // num_steps)
    at = jnp.minimum((index + 1) * num_steps - 1, last)
    return Ends(trajectory.ends[at], trajectory.ys[at], index < num_done)
