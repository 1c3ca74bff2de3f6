"""The solved steps of a grid, and what they say beside the states."""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from ._batch import by_amount
from ._checks import MOST_ENTRIES
from ._custom_types import State, States
from ._forward import (
    AbstractForward,
    ParallelForward,
    SequentialForward,
    StepByStep,
    Strategy,
)
from ._implicit import linearization_points, solve
from ._linearization import StepMap
from ._newton import NewtonIteration, Statistics
from ._platform import by_platform
from ._quadrature import Partition
from ._step_map import SolverStep

# The entries of the transitions of one step, in the whole batch, up to which a parallel
# gradient is faster on a CPU; beyond that it fills the cores with more work than the
# sequential one has. For perceptrons of 2 to 8 components, 128 steps and batches of 1
# to 128, on two cores. Where a step costs more or less than theirs, the other way can
# be up to 1.6 times as fast (`experiments.long_horizon`, D = 8, batch 4).
MOST_ON_CPU = 128


class Trajectory(eqx.Module):
    """All steps of a diffrax solver on a grid of times.

    - `inner`: the step.
    - `ts`, `(times,)`: the grid, increasing.
    - `y0`, `(state,)`, and `ys`, `(time, state)`: the states, the initial one apart.
    - `statistics`: of the solve. Steps that it did not solve hold the last good state.
    - `errors`, `(time, state)`, or `None`: the estimates of the error of each step.
    - `dense_infos`: what the interpolation of each step is made from.
    - `is_divided`: whether there are quadratures, so that `dense_infos` are not those
        of the steps that were solved for, but take one more evaluation of each.
    - `okay`, `(time,)`: whether the inner solver succeeded.
    """

    inner: SolverStep
    ts: Float[Array, " times"]
    y0: State
    ys: States
    statistics: Statistics
    errors: Float[Array, "time state"] | None
    dense_infos: PyTree[Array]
    okay: Bool[Array, " time"]
    is_divided: bool = eqx.field(static=True)

    def points(self) -> tuple[tuple[Array, Array], States]:
        """The times and the initial state of each step, one of length zero if unsolved.

        Functions of the solution that are evaluated there have finite derivatives.
        """
        xs, idle = (self.ts[:-1], self.ts[1:]), (self.ts[0], self.ts[0])
        return linearization_points(self.y0, xs, self.ys, self.statistics, idle)

    def result(self) -> diffrax.RESULTS:
        """Successful if the recurrence and every step of the inner solver are."""
        result = diffrax.RESULTS.promote(self.statistics.result)
        return diffrax.RESULTS.where(
            (result == diffrax.RESULTS.successful) & ~jnp.all(self.okay),
            diffrax.RESULTS.nonlinear_divergence,  # pyright: ignore
            result,
        )


def solve_grid(
    parts: Partition,
    ts: Float[Array, " times"],
    y0: State,
    guess: States,
    forward: AbstractForward | Strategy,
    iteration: NewtonIteration,
    may_be_rejected: bool,
) -> Trajectory:
    """Makes all the steps of `parts` from `ts[n]` to `ts[n + 1]`, differentiably.

    The other arguments are those of `solve` and of `Partition.complete`; a `Strategy`
    chooses what is fastest. Costs what `solve` does for the coupled components, and one
    evaluation of the others.
    """
    find = lambda how: _solve_grid(
        parts, ts, y0, guess, how, iteration, may_be_rejected
    )
    found: Any
    if isinstance(forward, Strategy):
        num_entries = parts.split(y0)[0].size ** 2
        found = _fastest(forward, find, num_entries, (parts.whole, ts, y0))
    else:
        found = find(forward)
    return Trajectory(parts.whole, ts, y0, *found, is_divided=not parts.is_trivial)


def _fastest(
    strategy: Strategy,
    find: Callable[[AbstractForward], Any],
    num_entries: int,
    arguments: PyTree[Any],
) -> Any:
    """The result of `find`, which is the same, with what is fastest.

    `num_entries` is the size of a transition; `arguments` are all that it depends on.
    """
    known, num_steps = strategy.known, len(arguments[1]) - 1

    def on_cpu():
        forward = SequentialForward() if known is None else known
        few, many = lambda: find(forward), lambda: find(StepByStep(forward))
        return by_amount(arguments, num_entries, MOST_ON_CPU, few, many)

    def elsewhere():
        if num_entries * num_steps > MOST_ENTRIES:
            return on_cpu()
        return find(ParallelForward() if known is None else known)

    return by_platform(on_cpu, elsewhere)


def _solve_grid(
    parts: Partition,
    ts: Float[Array, " times"],
    y0: State,
    guess: States,
    forward: AbstractForward,
    iteration: NewtonIteration,
    may_be_rejected: bool,
) -> tuple[States, Statistics, States | None, PyTree[Array], Bool[Array, " time"]]:
    """The states and all else that there is to say about a `Trajectory`."""
    by_step = isinstance(forward, StepByStep)
    if by_step:
        # There is no system to keep small.
        parts = parts.undivided()
    xs, idle = (ts[:-1], ts[1:]), (ts[0], ts[0])
    inner, (z0, _) = parts.coupled, parts.split(y0)
    zs, _ = jax.vmap(parts.split)(guess)
    increment = inner.increment if inner.is_one_field else None
    leaves = tuple(jax.tree.leaves(jax.eval_shape(inner.unravel, z0)))

    def full(x, y):
        result = inner.full(x, y, stages_at_once=not by_step)
        return result.y1, result

    step_map = StepMap(inner.step, increment, full, inner.leap, inner.between, leaves)
    ys, statistics, steps = solve(step_map, z0, xs, zs, forward, iteration, idle)
    okay = jnp.ones(len(ys), bool)
    if steps.result is not None:
        okay = steps.result == diffrax.RESULTS.successful
    if not parts.is_trivial:
        ys, statistics = parts.complete(
            y0, xs, ys, steps.stages, statistics, idle, may_be_rejected
        )
        # Plain functions of the solution, differentiated as such.
        points = linearization_points(y0, xs, ys, statistics, idle)
        steps = jax.vmap(parts.whole.full)(*points)
    return ys, statistics, steps.error, steps.dense_info, okay


def largest_error(
    errors: Float[Array, "time state"] | None, result: diffrax.RESULTS
) -> State | None:
    """The largest error of any step, infinite if there is no solution to speak of."""
    if errors is None:
        return None
    error = jnp.max(jnp.abs(errors), axis=0)
    failed = (result != diffrax.RESULTS.successful) | jnp.isnan(error)
    return jnp.where(failed, jnp.inf, error)
