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
from .._diffrax_conventions import clip_to_end
from .._ode.grid_solve import solve_grid
from .._ode.window_state import window_state
from .._prefix import select
from .._ravel import ravel
from .loop_state import LoopState, Windows, as_arrays, steps_of


class Record(eqx.Module):
    """What the search found out about a window, and its solution.

    - `keep`: whether it was accepted.
    - `t_prev`, `t_next`: where the next one begins and ends.
    - `num_solved` and `ys`, `(time, state)`: as those of a `Trajectory`.
    - `error`, `(state,)`: the largest of any step, `None` if it is not estimated.
    """

    keep: Bool[Array, ""]
    t_prev: Float[Array, ""]
    t_next: Float[Array, ""]
    num_solved: Int[Array, ""]
    ys: States
    error: State | None


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


def _attempt(windows: Windows, state: LoopState) -> tuple[LoopState, Record]:
    """One window."""
    solver, terms, args = windows.solver, windows.terms, windows.args
    ts = solver.grid(state.t_prev, state.t_next)
    (flat, unravel), inner = ravel(state.y), windows.inner_step(state.y)
    guess = solver.initial_guess(terms, ts, state.y, state.solver_state)
    trajectory = solve_grid(inner, ts, flat, guess, solver.method, solver.gradient)
    error, y1 = trajectory.largest_error(), unravel(trajectory.ys[-1])
    decision = decide(
        windows.controller,
        windows.t1,
        (state.t_prev, state.t_next, state.controller_state),
        (state.y, y1, None if error is None else unravel(error)),
        args,
        solver.error_order(terms),
    )
    keep = decision.keep
    success = diffrax.RESULTS.successful
    result = diffrax.RESULTS.where(keep, trajectory.result(), success)
    result = diffrax.RESULTS.where(diffrax.is_okay(result), decision.result, result)
    kept = lambda new, old: select(keep, new, old)
    steps = steps_of(trajectory, jnp.broadcast_to(keep, len(ts) - 1))
    statistics = trajectory.statistics
    new = dataclasses.replace(
        state.count(statistics, keep),
        t_prev=decision.t_prev,
        t_next=decision.t_next,
        y=kept(y1, state.y),
        made_jump=kept(jnp.asarray(decision.made_jump), state.made_jump),
        solver_state=kept(window_state(trajectory), state.solver_state),
        controller_state=decision.controller_state,
        result=result,
        last=kept(steps[-1:], state.last),
    )
    t_prev, t_next = decision.t_prev, decision.t_next
    ys, num_solved = trajectory.ys, statistics.num_solved
    return as_arrays((new, Record(keep, t_prev, t_next, num_solved, ys, error)))


def search_windows(
    windows: Windows, state: LoopState, meter: PyTree[Any], max_windows: int
) -> tuple[LoopState, Record, PyTree[Any]]:
    """Chooses all windows and records them; without derivatives."""
    types, record = eqx.filter_eval_shape(_attempt, windows, state)
    known = types.residual, types.method, types.gradient
    known = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), known)
    residual, method, gradient = known
    state = dataclasses.replace(
        state, residual=residual, method=method, gradient=gradient
    )
    state = jax.tree.map(lambda x, s: jnp.asarray(x, s.dtype), state, types)
    zeros = lambda s: jnp.zeros((max_windows, *s.shape), s.dtype)
    records = jax.tree.map(zeros, record)

    # The condition and the place to write at are those of a whole batch: where each
    # sample has its own, every window costs a copy of all the records.
    def running(carry):
        index, state, *_ = carry
        return eqxi.unvmap_any(windows.running(state)) & (index < max_windows)

    def step(carry):
        index, state, records, meter = carry
        new, record = _attempt(windows, state)
        state = select(windows.running(state), new, state)
        records = jax.tree.map(lambda b, r: b.at[index].set(r), records, record)
        return index + 1, state, records, windows.advance(meter, state.t_prev)

    init = jnp.array(0, int), state, records, meter
    return lax.while_loop(running, step, init)[1:]
