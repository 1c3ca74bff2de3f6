r"""Where the steps of a window lie.

With N steps and the estimate $e_n$ of the error of each, a grid is *equidistributed* if
all of these are equal (de Boor 1973). A step of order p has $e_n \approx C_n h_n^p$: as
a density, $e_n^{1/p}$ for each step of the old grid, divided into N equal parts, gives
the new one. N stays, so that shapes are static, and in a batch each sample has a grid
of its own and waits for nobody.
"""

from typing import Any, ClassVar

import diffrax
import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from .._checks import check_count, check_positive, check_tolerance
from .._custom_types import State, States
from .._defaults import (
    GRID_CAPACITY,
    GRID_RATE,
    GRID_SHIFT,
    GRID_TOLERANCE,
    MAX_GRID_WEIGHT,
)
from .._prefix import hold_last, shift
from .._ravel import ravel
from .grid_solve import Nodes, Trajectory
from .solver_step import SolverStep
from .window_state import WindowState, interpolate

Times = Float[Array, " times"]
Parts = Float[Array, "windows times"]


def _unit(x: Array) -> Array:
    """`x`, or 1 where it is zero: to divide by."""
    return jnp.where(x == 0, 1, x)


def _parts(ts: Times) -> Float[Array, " times"]:
    """Which part of the whole lies before each of `ts`."""
    return (ts - ts[0]) / _unit(ts[-1] - ts[0])


def _sides(ends: Float[Array, " ends"]) -> tuple[Array, Array]:
    """Where each window begins and ends, `(windows, 1)`."""
    return ends[:-1, None], ends[1:, None]


def between(ends: Float[Array, " ends"], parts: Parts) -> Nodes:
    """The nodes at these parts of each window, constants for a derivative."""
    parts = lax.stop_gradient(parts[:, 1:]).astype(ends.dtype)
    first, last = _sides(ends)
    return ends[0], (first * (1 - parts) + last * parts).reshape(-1)


class AbstractGrid(eqx.Module):
    """Where the steps of a window lie.

    One that is the same for all windows overrides `fractions`; others override `place`.
    Where it `measures_errors`, the `WindowState` carries its `scaled_errors`.
    """

    measures_errors: ClassVar[bool] = False

    def fractions(self, num_steps: int) -> Float[Array, " times"] | None:
        """The nodes of a window that begins at 0 and ends at 1, `(num_steps + 1,)`.

        `None` if they depend on the solution.
        """
        del num_steps
        return None

    def scaled_errors(self, trajectory: Trajectory) -> Float[Array, " time"]:
        """The error of each step, in units of a tolerance of the grid."""
        raise NotImplementedError

    def place(
        self,
        inner: SolverStep,
        ends: Float[Array, " ends"],
        num_steps: int,
        y0: State,
        state: WindowState,
    ) -> tuple[Nodes, WindowState]:
        """The nodes of all windows, and a state to take a guess from.

        **Arguments:**

        - `inner`: the step.
        - `ends`: those of the windows, increasing, the first beginning included.
        - `num_steps`: the steps of each window, N.
        - `y0`: the initial state, `(state,)`.
        - `state`: of the solve before.

        Returns the first node and the others, `(windows * N,)`, functions of `ends`.
        """
        del inner, y0
        parts = self.fractions(num_steps)
        assert parts is not None
        parts = jnp.broadcast_to(parts, (len(ends) - 1, len(parts)))
        return between(ends, parts), state


class Uniform(AbstractGrid):
    """Steps of equal length: what `grid=None` means."""

    def fractions(self, num_steps):
        # Not by `linspace`, which joins the last one to the others.
        index = jnp.arange(num_steps + 1)
        return jnp.where(index == num_steps, 1.0, index / num_steps)


class Equidistributed(AbstractGrid):
    r"""Steps where the error is: all of them have about the same.

    A window keeps its number of steps N; they are short where the solution is difficult
    and long elsewhere. A cold start makes `passes` solves by `diffrax.PIDController`,
    one step after another and without derivatives, with `rtol` and `atol` times a
    factor that is chosen such that N steps are needed, and takes over where these lie.
    A warm start, with the `solver_state` of a solve of the same interval, makes none:
    the grid is that of the solve before, moved towards equal errors by what that solve
    has measured. So a grid costs nothing in training, and settles along with it; once
    the largest error has doubled since the last cold start, the next solve starts cold.

    - `rtol`, `atol`: as for `diffrax.PIDController`. Where the steps lie depends on the
        ratio of both alone. The errors of all steps are in `solver_state.errors`, in
        units of this tolerance, and the largest, with `DEERAdjoint`, in
        `sol.stats["largest_error"]`: above 1 there are too few steps for it.
    - `passes`: solves of a cold start. Two, if N is about what the tolerance needs.

    The nodes are constants for a derivative, but move with the ends of the interval.

    **Raises:** `ValueError` for a tolerance that is not positive and for a solver that
    does not estimate its error.

    **Cost** of a cold start: about `passes` times N steps, one after another, and those
    that the controller rejects; of a warm start O(N).

    ??? cite "Reference"

        De Boor, *Good approximation by splines with variable knots II*, Springer
        Lecture Notes in Mathematics 363 (1973). Used for boundary value problems by
        Ascher, Mattheij and Russell (COLSYS) and by `scipy.integrate.solve_bvp`.
    """

    rtol: float = eqx.field(static=True)
    atol: float = eqx.field(static=True)
    passes: int = eqx.field(static=True, default=2)
    measures_errors: ClassVar[bool] = True

    def __check_init__(self):
        check_positive("rtol", self.rtol)
        check_tolerance("atol", self.atol)
        check_count("passes", self.passes)

    def scaled_errors(self, trajectory):
        errors, before = trajectory.errors, shift(trajectory.y0, trajectory.ys)
        assert errors is not None
        sizes = jnp.maximum(jnp.abs(before), jnp.abs(trajectory.ys))
        scales = self.atol + self.rtol * sizes
        parts = jnp.where(errors == 0, 0, jnp.abs(errors) / scales)
        scaled = jnp.sqrt(jnp.mean(parts**2, axis=1))
        succeeded = trajectory.result() == diffrax.RESULTS.successful
        return jnp.where(succeeded, scaled, jnp.inf)

    def place(self, inner, ends, num_steps, y0, state):
        _check_error(inner, ends, y0)
        order = inner.solver.error_order(inner.terms)
        total = (len(ends) - 1) * num_steps

        def place(ends, y0, state):
            def warm():
                ys = jnp.concatenate([state.y0[None], state.ys])
                found = state.ts, ys, _weights(state.errors, order)
                return *spread(*found, ends, num_steps), state.error_bound

            def cold():
                found = self._search(inner, ends, y0, total, order)
                infinite = jnp.full_like(state.error_bound, jnp.inf)
                return *spread(*found, ends, num_steps), infinite

            fits = eqxi.unvmap_all(_fits(state, ends))
            return lax.cond(fits, warm, cold)

        # All it closes over is made an argument, to have no derivative.
        place = eqx.filter_closure_convert(place, ends, y0, state)
        arrays, rest = eqx.partition((place, ends, y0, state), eqx.is_array)
        place, ends_, y0, state = eqx.combine(lax.stop_gradient(arrays), rest)
        parts, ys, bound = place(ends_, y0, state)
        nodes = between(ends, parts)
        guess = *lax.stop_gradient(nodes), y0, ys[1:], bound
        where = lambda s: (s.t0, s.ends, s.y0, s.ys, s.error_bound)
        return nodes, eqx.tree_at(where, state, guess)

    def _search(
        self,
        inner: SolverStep,
        ends: Float[Array, " ends"],
        y0: State,
        num_steps: int,
        order: Any,
    ) -> tuple[Times, States, Float[Array, " time"]]:
        """The steps of an adaptive solve that needs about `num_steps` of them.

        Returns their ends, `(times,)`, the states there and the weights of the steps.
        """
        t0, t1, size = ends[0], ends[-1], GRID_CAPACITY * num_steps
        index = jnp.arange(size + 1)

        def solve(factor) -> Any:
            controller = diffrax.PIDController(self.rtol * factor, self.atol * factor)
            with jax.numpy_dtype_promotion("standard"):
                return diffrax.diffeqsolve(
                    inner.terms,
                    inner.solver,
                    t0,
                    t1,
                    None,
                    inner.unravel(y0),
                    inner.args,
                    saveat=diffrax.SaveAt(steps=True),
                    stepsize_controller=controller,
                    adjoint=diffrax.ForwardMode(),
                    max_steps=size,
                    throw=False,
                )

        def once(_, carry):
            sol, factor = solve(carry[-1]), carry[-1]
            count = sol.stats["num_accepted_steps"]
            ts = jnp.where(index[:-1] < count, sol.ts, t1).astype(t0.dtype)
            ts = jnp.concatenate([t0[None], ts, t1[None]])
            # Where it did not get to the end, the rest is like what has been done.
            left = (t1 - ts[count]) / _unit(ts[count] - t0)
            weights = jnp.where(index == count, jnp.maximum(count, 1) * left, 0)
            weights = jnp.where(index < count, 1, weights).astype(t0.dtype)
            ys = jax.vmap(lambda y: ravel(y)[0].astype(y0.dtype))(sol.ys)
            ys = hold_last(y0, ys, count)
            ys = jnp.concatenate([y0[None], ys, ys[-1:]])
            factor *= (jnp.sum(weights) / num_steps) ** order
            lowest = 10 * float(jnp.finfo(y0.dtype).eps) / self.rtol
            return ts, ys, weights, jnp.clip(factor, lowest, GRID_TOLERANCE / self.rtol)

        ts, ys = jnp.zeros(size + 2, t0.dtype), jnp.zeros((size + 2, y0.size), y0.dtype)
        init = ts, ys, jnp.zeros(size + 1, t0.dtype), jnp.ones((), t0.dtype)
        return lax.fori_loop(0, self.passes, once, init)[:3]


def _check_error(inner: SolverStep, ends: Float[Array, " ends"], y0: State) -> None:
    if eqx.filter_eval_shape(inner.full, (ends[0], ends[1]), y0).error is None:
        name = type(inner.solver).__name__
        msg = (
            f"`Equidistributed` needs a solver that estimates its error; `{name}` does "
            f"not. Use `Dopri5()`, or `HalfSolver({name}())`."
        )
        raise ValueError(msg)


def _fits(state: WindowState, ends: Float[Array, " ends"]) -> Bool[Array, ""]:
    """Whether the grid of the state is up to date, and of about the same interval."""
    moved = jnp.abs(state.t0 - ends[0]) + jnp.abs(state.ends[-1] - ends[-1])
    assert state.errors is not None and state.error_bound is not None
    largest = jnp.max(state.errors)
    fits = jnp.isfinite(largest) & (largest <= state.error_bound)
    return fits & (moved <= GRID_SHIFT * (ends[-1] - ends[0]))


def _weights(errors: Float[Array, " time"], order: Any) -> Float[Array, " time"]:
    """How many new steps each old one is worth, up to a factor."""
    weights = errors ** (1 / order)
    weights = weights / _unit(jnp.mean(weights))
    return jnp.clip(weights, 1 / MAX_GRID_WEIGHT, MAX_GRID_WEIGHT) ** GRID_RATE


def spread(
    ts: Times,
    ys: States,
    weights: Float[Array, " time"],
    ends: Float[Array, " ends"],
    num_steps: int,
) -> tuple[Parts, States]:
    """Divides the weight of each window into equal parts; and `ys` at these nodes.

    Returns which part of its window lies before each of the `num_steps + 1` nodes.
    """
    before = jnp.pad(jnp.cumsum(weights), (1, 0))
    before = before / before[-1]
    first, last = _sides(interpolate(_parts(ts), before, _parts(ends)))
    levels = jnp.linspace(0.0, 1.0, num_steps + 1, dtype=ts.dtype)[None]
    levels = first * (1 - levels) + last * levels
    nodes = interpolate(before, _parts(ts), levels.reshape(-1)).reshape(levels.shape)
    flat = jnp.concatenate([nodes[:, :-1].reshape(-1), nodes[-1:, -1]])
    first, last = nodes[:, :1], nodes[:, -1:]
    parts = (nodes - first) / _unit(last - first)
    return parts, interpolate(_parts(ts), ys, flat)
