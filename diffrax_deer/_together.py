"""Windows that are known beforehand, solved all together.

One grid, one Newton iteration, and everything is differentiable as it stands.
"""

from typing import Any

import diffrax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._causal import prefix, select
from ._solver import window_state
from ._windows import (
    Carry,
    Ends,
    Outcome,
    Windows,
    event_result,
    steps_of,
)


def together(windows: Windows, carry: Carry, knots: Float[Array, " knots"]) -> Outcome:
    """One Newton solve of all windows; `knots` are their ends."""
    num_windows, num_steps = len(knots) - 1, windows.solver.num_steps
    grids = jax.vmap(windows.solver.grid)(knots[:-1], knots[1:])
    ts = jnp.concatenate([grids[:, :-1].reshape(-1), knots[-1:]])
    trajectory = windows.solver.trajectory(
        windows.terms,
        ts,
        carry.y,
        windows.args,
        carry.solver_state,
        num_windows=num_windows,
    )
    okay = trajectory.okay
    num_solved = jnp.minimum(
        trajectory.statistics.num_solved,
        prefix(okay),
    )
    # A window that fails is the last one, and counts.
    num_done = jnp.minimum(num_solved // num_steps + 1, num_windows)
    result, last = trajectory.result(), num_done * num_steps - 1
    event_values, mask = carry.event_values, carry.event_mask
    if windows.event is not None:
        valid = jnp.arange(len(ts) - 1) < num_solved
        values = windows.event_values(ts[1:], trajectory.ys, trajectory.inner.unravel)
        index, mask = windows.event.first(carry.event_values, values, valid)
        happened = index < len(valid)
        last = jnp.where(happened, index, last)
        num_done = last // num_steps + 1
        result = event_result(happened, result)
    started = windows.running(carry)
    steps = steps_of(trajectory, started & (jnp.arange(len(ts) - 1) <= last))
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
        controller_state=_step_to_state(windows.controller, carry, num_done),
        result=diffrax.RESULTS.where(started, result, carry.result),
        num_steps=num_done,
        num_accepted=num_done,
        last=steps[last][None],
        event_values=event_values,
        event_mask=select(started, mask, carry.event_mask),
        num_iterations=statistics.num_iterations,
        most_iterations=statistics.num_iterations,
        residual=statistics.residual,
    )
    ends = None
    if windows.save_ends:
        index = jnp.arange(num_windows)
        at = jnp.minimum((index + 1) * num_steps - 1, last)
        ends = Ends(
            ts=ts[at + 1],
            last=ts[at + 1],
            ys=trajectory.ys[at],
            counts=index + 1,
            kept=index < num_done,
        )
    index, found = steps.locate(windows.save_ts)
    dense_infos = None if trajectory.is_divided else trajectory.dense_infos
    return Outcome(new, steps, index, found, ends, dense_infos)


def _step_to_state(controller: Any, carry: Carry, num_done: Array) -> Any:
    """`StepTo` counts; `WholeInterval` has no state."""
    if type(controller) is diffrax.StepTo:
        return carry.controller_state + num_done
    return carry.controller_state
