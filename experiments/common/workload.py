"""A loss of the solution of a differential equation, by every method the same way.

Parameters are arrays alone: what else a network holds is part of the field.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from diffrax_deer import DEERSolver, WindowState
from experiments.common import hand_written
from experiments.common.affordable import Prepared, prepare
from experiments.common.errors import ExperimentError
from experiments.common.solvers import METHODS, Interval, Method
from experiments.common.timing import largest_difference

_LEARNING_RATE = 1e-3


class Outcome(NamedTuple):
    """What a method returns.

    Attributes:
        ys: the states that are saved, with leading axes `batch time`.
        gradient: that of the loss, if asked for.
        num_iterations: of Newton's method, by sample, if there are any.
        num_steps: of diffrax, by sample, if it was used.
        num_accepted: those of them that it accepted.
        state: what a warm start goes on from.
    """

    ys: PyTree[Array]
    gradient: PyTree[Array] | None = None
    num_iterations: Array | None = None
    num_steps: Array | None = None
    num_accepted: Array | None = None
    state: WindowState | None = None


@dataclasses.dataclass
class Comparison:
    """Compares what methods return with what the first of them has returned.

    Attributes:
        baseline: what that was.
    """

    baseline: Outcome | None = None

    def __call__(self, name: str, prepared: Prepared) -> dict[str, Any]:
        """Iterations and relative differences, as far as there are any."""
        del name
        found: Outcome = prepared.value
        entry: dict[str, Any] = {}
        if found.num_iterations is not None:
            entry["num_iterations"] = int(jnp.max(found.num_iterations))
        if self.baseline is None:
            self.baseline = found
            return entry
        pairs = {"value": (found.ys, self.baseline.ys)}
        if found.gradient is not None:
            pairs["gradient"] = found.gradient, self.baseline.gradient
        return entry | {
            f"{what}_difference": largest_difference(*pair)
            for what, pair in pairs.items()
        }


@dataclasses.dataclass(frozen=True)
class Workload:
    """A loss of the solution of `dy/dt = field(t, y, params)` from `t0` to `t1`.

    Attributes:
        field: the vector field.
        params: its parameters, those to differentiate with respect to.
        y0s: the initial values, with a leading axis `batch`.
        t0: where it begins.
        t1: where it ends, perhaps before `t0`.
        num_steps: steps of equal length; `None` if only adaptive solvers are compared.
        loss: of all states that are saved, whose axes are `batch time ...`.
        ts: where states are saved, for steps by hand the end of every n-th step; `None`
            to save the last alone.
    """

    field: hand_written.Field
    params: PyTree[Array]
    y0s: PyTree[Array]
    t0: float
    t1: float
    num_steps: int | None
    loss: Callable[[Any], Array]
    ts: np.ndarray | None = None

    def interval(self, tolerance: Any = None) -> Interval:
        """What is solved over; adaptive solvers with this tolerance."""
        return Interval(self.t0, self.t1, self.num_steps, tolerance, tolerance)

    def solve(
        self, method: Method, tolerance: Any = None, throw: bool = True
    ) -> Callable[[Any, Any, Any], Outcome]:
        """Solves for one initial value, given parameters and perhaps a state."""
        if method.solver is None:
            return lambda y0, params, state: Outcome(self.solve_by_hand(y0, params))
        saved: dict[str, Any] = {"t1": True} if self.ts is None else {"ts": self.ts}

        def solve(y0, params, state):
            solution = diffrax.diffeqsolve(
                diffrax.ODETerm(self.field),
                t0=self.t0,
                t1=self.t1,
                y0=y0,
                args=params,
                saveat=diffrax.SaveAt(**saved, solver_state=method.warm),
                solver_state=state,
                throw=throw,
                **method.options(self.interval(tolerance)),
            )
            stats = solution.stats
            return Outcome(
                ys=solution.ys,
                num_iterations=stats.get("num_newton_iterations"),
                num_steps=stats["num_steps"],
                num_accepted=stats["num_accepted_steps"],
                state=solution.solver_state,
            )

        return solve

    def solve_by_hand(self, y0: Any, params: Any) -> PyTree[Array]:
        """The states that are saved, by the steps written by hand."""
        num_steps = self.interval().known_steps
        arguments = self.field, self.t0, self.t1, num_steps, y0, params
        if self.ts is None:
            return jax.tree.map(lambda y: y[None], hand_written.final(*arguments))
        every = num_steps // len(self.ts)
        ys = hand_written.trajectory(*arguments)
        return jax.tree.map(lambda y: y[every - 1 :: every], ys)

    def after_one_step(self) -> "Workload":
        """The same after one step of Adam, as it is met in training."""
        solve = jax.vmap(self.solve_by_hand, in_axes=(0, None))
        loss = lambda params: self.loss(solve(self.y0s, params))
        gradient = jax.jit(jax.grad(loss))(self.params)
        optimizer = optax.adam(_LEARNING_RATE)
        updates, _ = optimizer.update(gradient, optimizer.init(self.params))
        moved: Any = optax.apply_updates(self.params, updates)
        if not all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(moved)):
            msg = f"{self.num_steps} steps are too few: the solution is not finite."
            raise ExperimentError(msg)
        return dataclasses.replace(self, params=moved)

    def reference(self, mode: str = "forward") -> Outcome:
        """The states that are saved, in float64 and to many digits."""
        method = METHODS["reference"]
        if mode == "gradient":
            # The default adjoint of diffrax is not exact where steps are rejected.
            method = dataclasses.replace(method, adjoint=diffrax.DirectAdjoint())
        with jax.enable_x64(True):
            wide = lambda x: np.asarray(x, np.float64)
            params, y0s = jax.tree.map(wide, (self.params, self.y0s))
            outcome = make_function(method, mode, self)(params, y0s, None)
            return jax.tree.map(np.asarray, outcome)

    def cold_states(self, method: Method) -> WindowState | None:
        """What a warm start goes on from where nothing is known yet."""
        if not method.warm:
            return None
        solver = method.options(self.interval())["solver"]
        assert isinstance(solver, DEERSolver)
        term = diffrax.ODETerm(self.field)
        init = lambda y0: solver.init(term, self.t0, self.t1, y0, self.params)
        return jax.vmap(init)(self.y0s)


def save_times(t0: float, t1: float, num_steps: int, every: int) -> np.ndarray:
    """The times after each `every` steps."""
    counts = np.arange(every, num_steps + 1, every)
    # In this order the last time is `t1` to the last bit.
    return t0 + (t1 - t0) * (counts / num_steps)


def with_arrays(model: Any, field: Callable) -> dict[str, Any]:
    """The field of a network and its parameters."""
    params, static = eqx.partition(model, eqx.is_array)
    return {
        "field": lambda t, y, params: field(t, y, eqx.combine(params, static)),
        "params": params,
    }


def make_function(
    method: Method,
    mode: str,
    workload: Workload,
    tolerance: Any = None,
    throw: bool = True,
    argnums: int | tuple[int, ...] = 0,
) -> Any:
    """What is timed, an `Outcome` of parameters, initial values and states.

    Args:
        method: how it is solved.
        mode: `"forward"` or `"gradient"`.
        workload: what to solve.
        tolerance: of an adaptive method.
        throw: whether a solve that fails raises an error.
        argnums: what to differentiate with respect to, 0 for the parameters and 1 for
            the initial values.

    Returns:
        A function of `jax.jit`.
    """
    solve = workload.solve(method, tolerance, throw)

    def forward(params, y0s, states):
        # A batch of one is solved as one does without a batch: faster for all.
        if len(jax.tree.leaves(y0s)[0]) > 1:
            return jax.vmap(solve, in_axes=(0, None, 0))(y0s, params, states)
        y0, state = jax.tree.map(lambda x: x[0], (y0s, states))
        return jax.tree.map(lambda x: x[None], solve(y0, params, state))

    def loss(params, y0s, states):
        outcome = forward(params, y0s, states)
        return workload.loss(outcome.ys), outcome

    def gradient(params, y0s, states):
        value_and_grad = jax.value_and_grad(loss, argnums, has_aux=True)
        (_, outcome), gradient = value_and_grad(params, y0s, states)
        return outcome._replace(gradient=gradient)

    return jax.jit(forward if mode == "forward" else gradient)


def prepare_solve(
    method: Method,
    mode: str,
    workload: Workload,
    before: Workload | None = None,
    tolerance: Any = None,
    max_gigabytes: float = np.inf,
    argnums: int | tuple[int, ...] = 0,
) -> Prepared | dict[str, Any]:
    """Compiles a method and calls it for the first time; see `prepare`.

    Args:
        method: how it is solved.
        mode: `"forward"` or `"gradient"`.
        workload: what to solve.
        before: the same before a step of training, where a warm start begins.
        tolerance: of an adaptive method.
        max_gigabytes: how much memory it may need beside its arguments.
        argnums: what to differentiate with respect to, as for `make_function`.
    """
    function = make_function(method, mode, workload, tolerance, argnums=argnums)
    params, y0s = workload.params, workload.y0s
    first = before.params if method.warm and before is not None else params
    states = workload.cold_states(method)
    found = prepare(function, (first, y0s, states), max_gigabytes)
    if isinstance(found, Prepared) and method.warm:
        found.compiled.arguments = params, y0s, found.value.state
        found.value = found.compiled.call()
    return found
