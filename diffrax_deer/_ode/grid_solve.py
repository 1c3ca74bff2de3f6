"""The solved steps of a grid, and what they say beside the states."""

from typing import NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix as optx
from jax import lax
from jaxtyping import Array, Bool, Float, PyTree

from .._checks import check_memory
from .._custom_types import State, States
from .._defaults import MAX_PARALLEL_ENTRIES, holds_jacobians, prefers_sequential_steps
from .._diffrax_conventions import direction
from .._gradient import AbstractGradient, default_gradient
from .._method import AbstractMethod, Newton, Sequential
from .._prefix import max_norm, shift
from .._solve import evaluation_points, solve
from .._statistics import Statistics
from .._step_map import StepMap
from .quadrature import Partition, partition
from .solver_step import SolverStep

# Where the first of all steps begins, and where they end.
Nodes = tuple[Float[Array, ""], Float[Array, " time"]]


class Trajectory(eqx.Module):
    """All steps of a diffrax solver on a grid of times.

    - `inner`: the step.
    - `starts`, `ends`, `(time,)`: those of each step, increasing.
    - `y0`, `(state,)`, and `ys`, `(time, state)`: the states, the initial one apart.
    - `statistics`: of the solve. Steps that it did not solve hold the last good state.
    - `errors`, `(time, state)`, or `None`: the estimates of the error of each step.
    - `dense_infos`: what the interpolation of each step is made from.
    - `succeeded`, `(time,)`: whether the inner solver did.
    """

    inner: SolverStep
    starts: Float[Array, " time"]
    ends: Float[Array, " time"]
    y0: State
    ys: States
    statistics: Statistics
    errors: Float[Array, "time state"] | None
    dense_infos: PyTree[Array]
    succeeded: Bool[Array, " time"]

    def points(self) -> tuple[tuple[Array, Array], States]:
        """The times and the initial state of each step, or of one that was solved.

        Functions of the solution that are evaluated there have finite derivatives.
        """
        xs = self.starts, self.ends
        instead = short_step(self.inner, self.starts[0], self.ends[-1])
        num_solved = self.statistics.num_solved
        return evaluation_points(self.y0, xs, self.ys, num_solved, instead)

    def result(self) -> diffrax.RESULTS:
        """Successful if the recurrence and every step of the inner solver are."""
        # Not by `promote`, which within `jax.shard_map` cannot look its table up.
        result, found = diffrax.RESULTS.successful, self.statistics.result
        for name in (
            "nonfinite",
            "nonlinear_max_steps_reached",
            "nonlinear_divergence",
        ):
            this = found == getattr(optx.RESULTS, name)
            result = diffrax.RESULTS.where(this, getattr(diffrax.RESULTS, name), result)
        return diffrax.RESULTS.where(
            (result == diffrax.RESULTS.successful) & ~jnp.all(self.succeeded),
            diffrax.RESULTS.nonlinear_divergence,  # pyright: ignore
            result,
        )

    def largest_error(self) -> State | None:
        """That of any step, `(state,)`; infinite if there is no solution."""
        if self.errors is None:
            return None
        error = max_norm(self.errors.T)
        failed = self.result() != diffrax.RESULTS.successful
        return jnp.where(failed, jnp.inf, error)


def short_step(inner: SolverStep, t0: Array, t1: Array) -> tuple[Array, Array]:
    """The times of what is evaluated, but does not count, where there is no step.

    Not a step of length zero: all its stages would be at the initial state, where the
    field may have no derivative. On an empty grid it leads on in the user's time, which
    in that of the solver runs backwards.
    """
    t0, is_empty = lax.stop_gradient(t0), t0 >= t1
    length = float(jnp.finfo(t0.dtype).eps) ** 0.5 * jnp.maximum(1, jnp.abs(t0))
    return t0, t0 + jnp.where(is_empty, direction(inner.terms), 1) * length


def default_method(num_steps: int, state_size: int) -> AbstractMethod:
    """What `method=None` means for `num_steps` steps of a solver."""
    fits = holds_jacobians(num_steps, state_size)
    return Sequential() if prefers_sequential_steps() or not fits else Newton()


class Plan(NamedTuple):
    """What is solved, and how, with the choice of method and gradient made.

    - `parts`: the step of what is solved for, and that of its quadratures, if any.
    - `step_map`, `state`: the step and the initial value of what is solved for.
    """

    parts: Partition | None
    step_map: StepMap
    state: State
    method: AbstractMethod
    gradient: AbstractGradient


def plan(
    inner: SolverStep,
    nodes: Nodes,
    y0: State,
    method: AbstractMethod | None,
    gradient: AbstractGradient | None,
) -> Plan:
    """Arguments as for `solve_grid`."""
    parts = partition(inner, (nodes[0], nodes[1][0]), y0)
    state, step_map = y0, inner.step_map(y0)
    if parts is not None:
        state, _ = parts.split(y0)
        step_map = parts.step_map(state)
    num_steps, arguments = len(nodes[1]), (inner, nodes, y0)
    if method is None:
        method = default_method(num_steps, state.size)
    if gradient is None:
        gradient = default_gradient(
            arguments,
            state.size,
            num_steps,
            MAX_PARALLEL_ENTRIES,
            method.sharded_scan,
        )
    return Plan(parts, step_map, state, method, gradient)


def solve_grid(
    inner: SolverStep,
    nodes: Nodes,
    y0: State,
    guess: States,
    method: AbstractMethod | None,
    gradient: AbstractGradient | None,
) -> Trajectory:
    """Makes all the steps of `inner` from node to node, differentiably.

    The other arguments are those of `solve`; `None` for what is fastest.
    """
    t0, ends = nodes
    check_memory(inner.solver, inner.has_memory((t0, ends[0]), y0))
    parts, step_map, state, method, gradient = plan(inner, nodes, y0, method, gradient)
    if method.sharded_scan is not None:
        ends = method.sharded_scan.time_axis.place(ends)
    xs = shift(t0, ends), ends
    if parts is not None:
        guess, _ = jax.vmap(parts.split)(guess)
    instead = short_step(inner, t0, ends[-1])
    ys, statistics, steps = solve(step_map, state, xs, guess, method, gradient, instead)
    if parts is not None:
        ys, steps = parts.complete(y0, ys, steps)
    succeeded = jnp.ones(len(ys), bool)
    if steps.result is not None:
        succeeded = steps.result == diffrax.RESULTS.successful
    return Trajectory(
        inner, *xs, y0, ys, statistics, steps.error, steps.dense_info, succeeded
    )
