"""How it is solved: by diffrax, by hand, and by DEER, in some ways."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from diffrax_deer import (
    DEERAdjoint,
    DEERSolver,
    ExponentialRosenbrockEuler,
    ParallelForward,
    SequentialForward,
    WholeInterval,
    WindowState,
)
from experiments.benchmark import hand_written
from experiments.benchmark.workloads import Workload

MethodName = Literal[
    "dopri5",
    "tsit5",
    "dopri5_direct",
    "dopri5_backsolve",
    "dopri5_step_to",
    "dopri5_pid",
    "tsit5_pid",
    "scan_rk45",
    "deer",
    "deer_sequential",
    "deer_newton",
    "deer_newton_warm",
    "paper",
    "floor",
]
# What all others are compared with.
BASELINE: MethodName = "dopri5"
MODES = {"forward": "forward", "gradient": "value and gradient"}


class Outcome(NamedTuple):
    """What a method returns.

    Attributes:
        ys: the states that are saved, with leading axes `batch time`.
        gradient: that of the loss with respect to the parameters, if asked for.
        num_iterations: of Newton's method, by sample, if there are any.
        state: what a warm start goes on from.
    """

    ys: PyTree[Array]
    gradient: PyTree[Array] | None
    num_iterations: Array | None
    state: WindowState | None


Options = Callable[[Workload, Any], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to solve.

    Attributes:
        label: what to call it in tables.
        options: maps a workload and a tolerance to the arguments in which solves with
            `diffrax.diffeqsolve` differ; `None` where that is not used.
        everywhere: whether it is measured in every cell, or in a few only.
        warm: whether it goes on from the solution before a step of training.
        adaptive: whether it chooses its steps by a tolerance.
    """

    label: str
    options: Options | None
    everywhere: bool = False
    warm: bool = False
    adaptive: bool = False


def _equal_steps(solver: Any, **options: Any) -> Options:
    # Of all ways to make equal steps the fastest: up to several times faster than
    # `StepTo`. Rounding of the times can make one more step, of almost no length. Some
    # more are allowed for: with 401, of 400, diffrax's default adjoint of a fit of
    # FitzHugh-Nagumo is wrong in the fifth digit, that of `DirectAdjoint` is not.
    return lambda workload, tolerance: (
        {
            "solver": solver,
            "stepsize_controller": diffrax.ConstantStepSize(),
            "dt0": (workload.t1 - workload.t0) / workload.num_steps,
            "max_steps": workload.num_steps + 16,
        }
        | options
    )


def _on_grid(workload: Workload, tolerance: Any) -> dict[str, Any]:
    del tolerance
    num_steps = workload.num_steps
    grid = jnp.linspace(workload.t0, workload.t1, num_steps + 1)
    controller = diffrax.StepTo(grid)
    chosen = {"solver": diffrax.Dopri5(), "stepsize_controller": controller}
    return chosen | {"dt0": None, "max_steps": num_steps}


def _adaptive(solver: Any) -> Options:
    return lambda workload, tolerance: {
        "solver": solver,
        "stepsize_controller": diffrax.PIDController(rtol=tolerance, atol=tolerance),
        "dt0": (workload.t1 - workload.t0) / workload.num_steps,
        "max_steps": max(4096, 16 * workload.num_steps),
    }


def _deer(*args: Any, **options: Any) -> Options:
    return lambda workload, tolerance: {
        "solver": DEERSolver(*args, num_steps=workload.num_steps, **options),
        "stepsize_controller": WholeInterval(),
        "dt0": None,
        "adjoint": DEERAdjoint(),
    }


_NEWTON = _deer(forward=ParallelForward())
_PAPER = _deer(ExponentialRosenbrockEuler(), forward=ParallelForward())
_DIRECT = _equal_steps(diffrax.Dopri5(), adjoint=diffrax.DirectAdjoint())
_BACKSOLVE = _equal_steps(diffrax.Dopri5(), adjoint=diffrax.BacksolveAdjoint())

METHODS: dict[MethodName, Method] = {
    BASELINE: Method("Dopri5", _equal_steps(diffrax.Dopri5()), everywhere=True),
    "tsit5": Method("Tsit5", _equal_steps(diffrax.Tsit5())),
    "dopri5_direct": Method("Dopri5, DirectAdjoint", _DIRECT),
    "dopri5_backsolve": Method("Dopri5, BacksolveAdjoint", _BACKSOLVE),
    "dopri5_step_to": Method("Dopri5, StepTo", _on_grid),
    "dopri5_pid": Method("Dopri5, PID", _adaptive(diffrax.Dopri5()), adaptive=True),
    "tsit5_pid": Method("Tsit5, PID", _adaptive(diffrax.Tsit5()), adaptive=True),
    "scan_rk45": Method("lax.scan by hand", None, everywhere=True),
    "deer": Method("deer", _deer(), everywhere=True),
    "deer_sequential": Method(
        "deer in sequence", _deer(forward=SequentialForward()), everywhere=True
    ),
    "deer_newton": Method("deer, Newton", _NEWTON, everywhere=True),
    "deer_newton_warm": Method(
        "deer, Newton, warm", _NEWTON, everywhere=True, warm=True
    ),
    "paper": Method("scheme of the paper", _PAPER),
    "floor": Method("all steps once", None, everywhere=True),
}
LABELS = {name: method.label for name, method in METHODS.items()}


def _solve(
    name: MethodName, workload: Workload, tolerance: Any, throw: bool
) -> Callable[[Any, Any, Any], Outcome]:
    """Solves for one initial value, given parameters and perhaps a state."""
    method = METHODS[name]

    def by_hand(y0, params, state):
        del state
        return Outcome(workload.solve_by_hand(y0, params), None, None, None)

    def by_diffrax(y0, params, state):
        assert method.options is not None
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(workload.field),
            t0=workload.t0,
            t1=workload.t1,
            y0=y0,
            args=params,
            saveat=diffrax.SaveAt(**workload.saveat, solver_state=method.warm),
            solver_state=state,
            throw=throw,
            **method.options(workload, tolerance),
        )
        iterations = solution.stats.get("num_newton_iterations")
        return Outcome(solution.ys, None, iterations, solution.solver_state)

    return by_hand if name == "scan_rk45" else by_diffrax


def make_function(
    name: MethodName,
    mode: str,
    workload: Workload,
    tolerance: Any = None,
    throw: bool = True,
    argnums: int = 0,
) -> Any:
    """What is timed, an `Outcome` of parameters, initial values and states.

    Args:
        name: the method.
        mode: one of `MODES`.
        workload: what to solve.
        tolerance: of an adaptive method.
        throw: whether a solve that fails raises an error.
        argnums: what to differentiate with respect to, 0 for the parameters and 1 for
            the initial values.

    Returns:
        A function of `jax.jit`.
    """
    solve = _solve(name, workload, tolerance, throw)

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


def cold_states(name: MethodName, workload: Workload) -> WindowState | None:
    """What a warm start goes on from where nothing is known yet."""
    method = METHODS[name]
    if not method.warm:
        return None
    assert method.options is not None
    solver: DEERSolver = method.options(workload, None)["solver"]
    term = diffrax.ODETerm(workload.field)
    init = lambda y0: solver.init(term, workload.t0, workload.t1, y0, workload.params)
    return jax.vmap(init)(workload.y0s)


def make_floor(mode: str, workload: Workload) -> tuple[Any, tuple[Any, ...]]:
    """What no method in parallel can do without, and what to call it with.

    All steps once, from the states of the solution, and how parameters and states
    enter into them once.
    """
    bounds = workload.t0, workload.t1
    whole = jax.vmap(
        lambda y0, params: hand_written.trajectory(
            workload.field, *bounds, workload.num_steps, y0, params
        ),
        in_axes=(0, None),
    )
    ys = jax.jit(whole)(workload.y0s, workload.params)
    join = lambda y0, ys: jnp.concatenate([y0[:, None], ys[:, :-1]], axis=1)
    befores = jax.tree.map(join, workload.y0s, ys)

    def forward(params, befores):
        step = lambda y: hand_written.all_steps(workload.field, *bounds, y, params)
        return jax.vmap(step)(befores)

    def gradient(params, befores):
        ys, pull_back = jax.vjp(forward, params, befores)
        return ys, pull_back(ys)

    function = jax.jit(forward if mode == "forward" else gradient)
    return function, (workload.params, befores)
