"""The solved steps of a grid, and what they say beside the states."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from ._custom_types import State, States
from ._forward import AbstractForward
from ._implicit import linearization_points, solve
from ._linearization import StepMap
from ._newton import NewtonIteration, Statistics
from ._quadrature import Partition
from ._step_map import SolverStep, StepResult


class Trajectory(eqx.Module):
    """All steps of a diffrax solver on a grid of times.

    - `parts`: the step of the coupled components, and what to do about the others.
    - `ts`, `(time + 1,)`: the grid, increasing.
    - `y0`, `(state,)`, and `ys`, `(time, state)`: the states, the initial one apart.
    - `statistics`: of the solve. Steps that it did not solve hold the last good state.
    - `coupled`: what the steps of the coupled components yield, leading axis `time`.
    """

    parts: Partition
    ts: Float[Array, " time+1"]
    y0: State
    ys: States
    statistics: Statistics
    coupled: StepResult

    @property
    def inner(self) -> SolverStep:
        """One step."""
        return self.parts.whole

    def points(self) -> tuple[tuple[Array, Array], States]:
        """The times and the initial state of each step, one of length zero if unsolved.

        Functions of the solution that are evaluated there have finite derivatives.
        """
        xs, idle = (self.ts[:-1], self.ts[1:]), (self.ts[0], self.ts[0])
        return linearization_points(self.y0, xs, self.ys, self.statistics, idle)

    def details(
        self,
    ) -> tuple[Float[Array, "time state"] | None, PyTree[Array], Bool[Array, " time"]]:
        """Error estimate, dense information, and whether the inner solver succeeded."""
        steps = self.coupled
        if not self.parts.is_trivial:
            steps = jax.vmap(self.inner.full)(*self.points())
        okay = self.coupled.result == diffrax.RESULTS.successful
        return steps.error, steps.dense_info, okay

    def result(self, inner_okay: Bool[Array, " time"]) -> diffrax.RESULTS:
        """Successful if the recurrence and every step of the inner solver are."""
        result = diffrax.RESULTS.promote(self.statistics.result)
        return diffrax.RESULTS.where(
            (result == diffrax.RESULTS.successful) & ~jnp.all(inner_okay),
            diffrax.RESULTS.nonlinear_divergence,  # pyright: ignore
            result,
        )


def solve_grid(
    parts: Partition,
    ts: Float[Array, " time+1"],
    y0: State,
    guess: States,
    forward: AbstractForward,
    iteration: NewtonIteration,
    may_be_rejected: bool,
) -> Trajectory:
    """Makes all the steps of `parts` from `ts[n]` to `ts[n + 1]`, differentiably.

    The other arguments are those of `solve` and of `Partition.complete`. Costs what
    `solve` does for the coupled components, and one evaluation of the others.
    """
    xs, idle = (ts[:-1], ts[1:]), (ts[0], ts[0])
    inner, (z0, _) = parts.coupled, parts.split(y0)
    zs, _ = jax.vmap(parts.split)(guess)
    increment = inner.increment if inner.is_one_field else None
    leaves = tuple(jax.tree.leaves(jax.eval_shape(inner.unravel, z0)))

    def full(x, y):
        result = inner.full(x, y)
        return result.y1, result

    step_map = StepMap(inner.step, increment, full, inner.leap, leaves)
    ys, statistics, steps = solve(step_map, z0, xs, zs, forward, iteration, idle)
    if not parts.is_trivial:
        ys, statistics = parts.complete(
            y0, xs, ys, steps.stages, statistics, idle, may_be_rejected
        )
    return Trajectory(parts, ts, y0, ys, statistics, steps)


def largest_error(
    errors: Float[Array, "time state"] | None, result: diffrax.RESULTS
) -> State | None:
    """The largest error of any step, infinite if there is no solution to speak of."""
    if errors is None:
        return None
    error = jnp.max(jnp.abs(errors), axis=0)
    failed = (result != diffrax.RESULTS.successful) | jnp.isnan(error)
    return jnp.where(failed, jnp.inf, error)
