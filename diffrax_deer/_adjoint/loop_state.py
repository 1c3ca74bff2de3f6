r"""All the windows of a solve: what there is to do, and what comes of it.

The answer of a solve is one recurrence, whatever windows it was found in. Where a step
size controller makes static windows, they are one grid, and solved together; others
are solved one after another.
"""

import dataclasses
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._custom_types import Args, RealScalarLike, States, Y
from .._gradient import AbstractGradient
from .._method import AbstractMethod
from .._ode.deer_solver import DEERSolver
from .._ode.grid_solve import Trajectory
from .._ode.solver_step import SolverStep
from .._ode.whole_interval import WholeInterval
from .._ode.window_state import WindowState
from .._statistics import Statistics
from .._time_axis import TimeAxis
from .events import EventSearch


class Steps(eqx.Module):
    """Inner steps in the order of time, not all of which belong to the solution.

    - `t0s`, `t1s`, `(time,)`, and `y0s`, `(time, state)`: where to evaluate the step,
        another one where there is no solution.
    - `ends`, `(time,)`: when the step ends.
    - `taken`, `(time,)`: whether it belongs to the solution.
    """

    t0s: Float[Array, " time"]
    t1s: Float[Array, " time"]
    y0s: States
    ends: Float[Array, " time"]
    taken: Bool[Array, " time"]

    def locate(
        self, ts: Float[Array, " times"], axis: TimeAxis
    ) -> tuple[Int[Array, " times"], Bool[Array, " times"]]:
        """The step that each of `ts` lies in, and whether there is one."""
        # Increasing: those that have not been taken come last.
        ends = jnp.where(self.taken, self.ends, jnp.inf)
        index = axis.searchsorted(lax.stop_gradient(ends), ts)
        found = index < jnp.sum(self.taken, dtype=index.dtype)
        # The first step stands in: the last one may be far from any time that is asked.
        return jnp.where(found, index, 0), found

    def __getitem__(self, index: Any) -> "Steps":
        return jax.tree.map(lambda x: x[index], self)


class Ends(eqx.Module):
    """The ends of windows: `SaveAt(steps=...)` saves there.

    - `ts`, `(windows,)`, increasing, and `ys`, `(windows, state)`.
    - `kept`, `(windows,)`: whether the window belongs to the solution; the others come
        last, and repeat its end.
    """

    ts: Float[Array, " windows"]
    ys: States
    kept: Bool[Array, " windows"]


class LoopState(eqx.Module):
    """What one window hands on to the next, as in diffrax's integration loop.

    - `num_iterations`, `max_iterations`: of all windows together, and of the one with
        most.
    - `residual`: the largest of all accepted windows; `None` if none was measured.
    - `method`, `gradient`: those of the `Statistics`, `None` before the first window.
    """

    t_prev: RealScalarLike
    t_next: RealScalarLike
    y: Y
    made_jump: Bool[Array, ""]
    solver_state: WindowState
    controller_state: PyTree[Any]
    result: diffrax.RESULTS
    num_steps: Int[Array, ""]
    num_accepted: Int[Array, ""]
    event_values: PyTree[Array]
    event_mask: PyTree[Bool[Array, ""]]
    num_iterations: Int[Array, ""]
    max_iterations: Int[Array, ""]
    residual: Float[Array, ""] | None = None
    method: Any = None
    gradient: Any = None

    def count(self, statistics: Statistics, keep: Bool[Array, ""]) -> "LoopState":
        """One more window, accepted or not."""
        old, new = self.residual, statistics.residual
        residual = new
        if old is not None and new is not None:
            residual = jnp.where(keep, jnp.maximum(old, new), old)
        return dataclasses.replace(
            self,
            num_steps=self.num_steps + 1,
            num_accepted=self.num_accepted + jnp.where(keep, 1, 0),
            num_iterations=self.num_iterations + statistics.num_iterations,
            max_iterations=jnp.maximum(self.max_iterations, statistics.num_iterations),
            residual=residual,
            method=statistics.method,
            gradient=statistics.gradient,
        )


class Outcome(eqx.Module):
    """The whole solve.

    - `state`: as after the last window.
    - `ys`: the solution at all save times, leaves of leading axis `times`, if `found`,
        `(times,)`.
    - `steps`: of static windows, where the solution is to be looked up.
    - `last`: of these the last one that belongs to it, of leading axis 1.
    - `ends`: of all windows, if they are to be saved.
    """

    state: LoopState
    ys: PyTree[Array]
    found: Bool[Array, " times"]
    steps: Steps | None = None
    last: Steps | None = None
    ends: Ends | None = None


def as_arrays(tree: PyTree[Any]) -> PyTree[Array]:
    """Python numbers made arrays, of types that do not depend on others' (`weak`)."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), tree)


class Windows(eqx.Module):
    """A differential equation and how it is to be cut into windows.

    The fields are the arguments of `diffrax.AbstractAdjoint.loop`; `save_ts`,
    `(times,)`, are all the times to save at, sorted, and `places` where each of them
    was, `None` if there; `save_ends` whether anything is saved at the ends of windows,
    `dense` whether everything is.
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
    places: Int[Array, " times"] | None
    max_steps: int | None
    save_ends: bool
    dense: bool

    def inner_step(self, y: Y) -> SolverStep:
        """One inner step."""
        return self.solver.inner_step(self.terms, y, self.args)

    def choices(self, y: Y) -> tuple[AbstractMethod, AbstractGradient]:
        """The method and the gradient of one window, with all choices made."""
        return self.solver.choices(self.terms, self.t0, y, self.args)

    def static_ends(self, t_next: RealScalarLike) -> Float[Array, " ends"] | None:
        """The ends of the windows, the first beginning included, if they are static.

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
        ends = jnp.concatenate([start, following])
        return ends if self.max_steps is None else ends[: self.max_steps + 1]

    def event_values(self, trajectory: Trajectory) -> Any:
        """Those of all event functions after each step, leaves of shape `(time,)`."""
        event, unravel = self.event, trajectory.inner.unravel
        assert event is not None
        values = lambda t, y: event.values(t, unravel(y))
        return jax.vmap(values)(trajectory.ends, trajectory.ys)

    def running(self, state: LoopState) -> Bool[Array, ""]:
        """Whether there is another window to solve."""
        successful = jnp.asarray(diffrax.is_successful(state.result))
        return jnp.asarray(state.t_prev < self.t1) & successful

    def advance(self, meter: PyTree[Any], t: RealScalarLike) -> PyTree[Any]:
        """Moves the progress meter; `t` comes from the solution, so it runs behind."""
        length = jnp.where(self.t1 == self.t0, 1, self.t1 - self.t0)
        return self.progress_meter.step(meter, (t - self.t0) / length)


def steps_of(trajectory: Trajectory, taken: Bool[Array, " time"]) -> Steps:
    """The steps of a trajectory; `taken`, `(time,)`, if they belong to the solution."""
    (t0s, t1s), y0s = trajectory.points()
    return Steps(t0s, t1s, y0s, trajectory.ends, taken)


def event_result(happened: Bool[Array, ""], result: diffrax.RESULTS) -> diffrax.RESULTS:
    """`result`, unless an event ended the solve before that."""
    return diffrax.RESULTS.where(
        happened,
        diffrax.RESULTS.event_occurred,  # pyright: ignore
        result,
    )
