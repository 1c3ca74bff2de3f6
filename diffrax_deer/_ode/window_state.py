"""What a solve may take its guess from: an earlier trajectory, or a path."""

from typing import Any

import diffrax
import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PyTree

from .._checks import check_guess
from .._custom_types import RealScalarLike, State, States, Y
from .._defaults import GRID_GROWTH
from .._diffrax_conventions import direction
from .._ravel import ravel, widest
from .grid_solve import Trajectory


class WindowState(eqx.Module):
    """What `DEERSolver` carries from one window to the next: `sol.solver_state`.

    The converged trajectory is the guess wherever a later window covers the same times:
    pass it on with `SaveAt(solver_state=True)` and `diffeqsolve(..., solver_state=...)`
    to start the next training step warm. Beyond its end it is constant. (A solver whose
    windows are single steps needs no guess, and carries what its inner solver does.)

    - `t0`, `ends`, `(time,)`, `y0`, `(state,)`, and `ys`, `(time, state)`: where the
        steps of the last window ended, in the solver's own (increasing) time, and the
        ravelled states there. What it began from is apart, so that the others lie on
        several devices in equal parts; the property `ts` has all of the times.
    - `num_iterations`: the Newton iterations of the last window.
    - `errors`, `(time,)`: those of its steps, in units of the tolerance of the solver's
        `grid`; infinite if it failed. `None` for a grid that does not ask.
    - `error_bound`, `()`: errors above it say that the grid is out of date.
    """

    t0: Float[Array, ""]
    ends: Float[Array, " time"]
    y0: State
    ys: States
    num_iterations: Int[Array, ""]
    errors: Float[Array, " time"] | None = None
    error_bound: Float[Array, ""] | None = None

    @property
    def ts(self) -> Float[Array, "*batch times"]:
        """`t0` and `ends`, of each sample of a batch."""
        return jnp.concatenate([self.t0[..., None], self.ends], axis=-1)


def no_window(
    t0: RealScalarLike, y0: State, num_steps: int, measures_errors: bool
) -> WindowState:
    """Before the first window: a trajectory that stays at `t0`."""
    # Of the floating type that the times will have.
    t0 = jnp.linspace(t0, t0, 2)[0]
    ends = jnp.broadcast_to(t0, num_steps)
    ys = jnp.broadcast_to(y0, (num_steps, y0.size))
    zeros = lambda *shape: jnp.zeros(shape, y0.dtype)
    errors = (zeros(num_steps), zeros()) if measures_errors else ()
    state = WindowState(t0, ends, y0, ys, jnp.array(0, int), *errors)
    return lax.stop_gradient(state)


def check_errors(state: Any, are_needed: bool) -> None:
    """Raises unless a window's state has the errors of its steps just if needed."""
    if isinstance(state, WindowState) and are_needed != (state.errors is not None):
        msg = (
            "`solver_state` has to come from a solve with the same `grid`: the errors "
            f"of its steps are {'missing' if are_needed else 'not asked for'}."
        )
        raise ValueError(msg)


def check_window_state(state: Any, num_steps: int | None) -> None:
    """Raises unless the state of the solver is one window of `num_steps` steps.

    `None`: unless it is what a single step hands on to the next.
    """
    held = len(state.ends) if isinstance(state, WindowState) else None
    if held != num_steps:
        name = lambda count: "a single step" if count is None else f"{count} steps"
        msg = (
            f"`solver_state` is that of {name(held)}, but a window has "
            f"{name(num_steps)}. It has to come from a solve with the same "
            "`num_steps`, `method` and `gradient`; one of several windows solved "
            "together, as `DEERAdjoint` does with `StepTo`, only fits another such "
            "solve."
        )
        raise ValueError(msg)


def initial_guess(
    path: diffrax.AbstractPath | None,
    terms: PyTree[diffrax.AbstractTerm],
    new: Float[Array, " time"],
    y0: Y,
    state: WindowState,
    is_local: bool = True,
) -> States:
    """The states at the times `new`, of `path` if there is one, else of `state`.

    Infinite from the first time on at which nothing is known. Unless the states are
    `is_local`, on one device, those at other times are not looked up.
    """
    flat, _ = ravel(y0)
    if path is None:
        dtype = widest(new.dtype, state.ys.dtype)
        state = jax.tree.map(lambda x: x.astype(dtype), state)
        new, old, ys = new.astype(dtype), state.ends, state.ys
        interpolate = lambda: _interpolated(state, new)
        if not is_local:
            interpolate = lambda: jnp.full((len(new), flat.size), jnp.inf, dtype)
        if old.shape != new.shape:
            return interpolate().astype(flat.dtype)
        # The usual warm start, and nothing to look up.
        same = eqxi.unvmap_all(jnp.all(old == new) & (state.t0 < old[-1]))
        return lax.cond(same, lambda: ys, interpolate).astype(flat.dtype)
    # The path is in the user's time, which runs backwards where this one does not.
    times = new * direction(terms)
    # A path without an end has `None` there, whatever its type says.
    ends: list[Any] = [path.t0, path.t1]
    if all(t is not None for t in ends):
        first, last = (jnp.asarray(t, times.dtype) for t in ends)
        times = jnp.clip(times, jnp.minimum(first, last), jnp.maximum(first, last))
    check_guess(path, times[0], y0)
    evaluate = lambda t: ravel(path.evaluate(t))[0].astype(flat.dtype)
    return jax.vmap(evaluate)(times)


def window_state(
    trajectory: Trajectory,
    errors: Float[Array, " time"] | None,
    error_bound: Float[Array, ""] | None,
) -> WindowState:
    """What the next solve may take guess and grid from; carries no derivative.

    The `error_bound` of a new grid is infinite; it becomes a multiple of its error.
    """
    if errors is not None and error_bound is not None:
        new = GRID_GROWTH * jnp.max(errors)
        error_bound = jnp.where(jnp.isinf(error_bound), new, error_bound)
    return lax.stop_gradient(
        WindowState(
            trajectory.starts[0],
            trajectory.ends,
            trajectory.y0,
            trajectory.ys,
            trajectory.statistics.num_iterations,
            errors,
            error_bound,
        )
    )


def interpolate(
    old: Float[Array, " known"], values: Float[Array, "known ..."], new: Array
) -> Float[Array, "time ..."]:
    """`values` at the increasing places `old`, at those of `new`; constant beyond."""
    # Not `jnp.interp`, which makes a NaN and trips `jax_debug_nans`.
    right = jnp.clip(jnp.searchsorted(old, new), 1, len(old) - 1)
    length = old[right] - old[right - 1]
    part = (new - old[right - 1]) / jnp.where(length == 0, 1, length)
    part = jnp.expand_dims(jnp.clip(part, 0, 1), range(1, values.ndim))
    left = values[right - 1]
    return left + part.astype(values.dtype) * (values[right] - left)


def _interpolated(state: WindowState, new: Float[Array, " time"]) -> States:
    """The trajectory of `state` at the times `new`; infinite where nothing is known."""
    old, ys = state.ts, jnp.concatenate([state.y0[None], state.ys])
    # Half a step beyond the end is as good as at the end: `t1` may be trained.
    first, last = old[0] - (old[1] - old[0]) / 2, old[-1] + (old[-1] - old[-2]) / 2
    known = (new >= first) & (new <= last) & (old[0] < old[-1])
    return jnp.where(known[:, None], interpolate(old, ys, new), jnp.inf)
