"""The one registry: all that the experiments compare.

`CHOICES` are ways to find a trajectory and to differentiate it, arguments of
`DEERSolver`, `deer_scan` and `DEERRNN` alike. `METHODS` are ways to solve a
differential equation or, where only names and labels are needed, a recurrence.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import diffrax
import jax.numpy as jnp

from diffrax_deer import (
    AbstractLinearization,
    AbstractScan,
    AssociativeScan,
    ConstantPredictor,
    DEERAdjoint,
    DEERSolver,
    DiagonalJacobian,
    Equidistributed,
    ExponentialRosenbrockEuler,
    FullJacobian,
    Newton,
    ParallelGradient,
    Picard,
    PiecewiseConstant,
    Sequential,
    SequentialGradient,
    SequentialScan,
    WholeInterval,
)

# What is trained with, what is benchmarked, and what recurrent networks run with.
SolverName = Literal[
    "deer",
    "deer_newton",
    "deer_sequential",
    "deer_equidistributed",
    "dopri5",
    "tsit5",
]
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
RecurrentName = Literal["deer", "deer_sequential", "deer_newton", "scan"]
SOLVERS: tuple[SolverName, ...] = get_args(SolverName)
BENCHMARKED: tuple[MethodName, ...] = get_args(MethodName)
RECURRENT: tuple[RecurrentName, ...] = get_args(RecurrentName)
# What all others are compared with.
BASELINE: MethodName = "dopri5"
RECURRENT_BASELINE: RecurrentName = "scan"

LINEARIZATIONS: dict[str, AbstractLinearization] = {
    "PiecewiseConstant": PiecewiseConstant(),
    "FullJacobian": FullJacobian(),
    "DiagonalJacobian": DiagonalJacobian(),
    "Picard": Picard(),
}

SCANS: dict[str, AbstractScan] = {
    "sequential": SequentialScan(),
    "associative": AssociativeScan(),
}

_PARALLEL, _CONSTANT = ParallelGradient(), ConstantPredictor()
CHOICES: dict[str, dict[str, Any]] = {
    "deer": {},
    "deer_sequential": dict(method=Sequential(), gradient=_PARALLEL),
    "deer_sequential_gradient": dict(
        method=Sequential(), gradient=SequentialGradient()
    ),
    "deer_newton": dict(method=Newton(), gradient=_PARALLEL),
    "deer_newton_constant": dict(
        method=Newton(predictor=_CONSTANT), gradient=_PARALLEL
    ),
}


class Interval(NamedTuple):
    """What is to be solved over, and how finely.

    Attributes:
        t0: where it begins.
        t1: where it ends, perhaps before `t0`.
        num_steps: steps of equal length. An adaptive solver begins with one of them, or
            chooses for itself if it is `None`.
        rtol: relative tolerance of an adaptive solver.
        atol: absolute tolerance of an adaptive solver.
    """

    t0: float
    t1: float
    num_steps: int | None
    rtol: Any = None
    atol: Any = None

    @property
    def known_steps(self) -> int:
        """The number of steps where there has to be one."""
        assert self.num_steps is not None
        return self.num_steps


# The arguments of `diffrax.diffeqsolve` that decide about steps.
Control = Callable[[Interval], dict[str, Any]]


def equal_steps(interval: Interval) -> dict[str, Any]:
    """Equal steps, which take as long as those to given times.

    Rounding of the times can make one more step, of almost no length. Some more are
    allowed for: with 401, of 400, diffrax's default adjoint of a fit of FitzHugh-Nagumo
    is wrong in the fifth digit, that of `DirectAdjoint` is not.
    """
    return {
        "stepsize_controller": diffrax.ConstantStepSize(),
        "dt0": (interval.t1 - interval.t0) / interval.known_steps,
        "max_steps": interval.known_steps + 16,
    }


def on_grid(interval: Interval) -> dict[str, Any]:
    """Equal steps to given times."""
    num_steps = interval.known_steps
    grid = jnp.linspace(interval.t0, interval.t1, num_steps + 1)
    controller = diffrax.StepTo(grid)
    return {"stepsize_controller": controller, "dt0": None, "max_steps": num_steps}


def whole_interval(interval: Interval) -> dict[str, Any]:
    """One window of equal steps."""
    del interval
    return {"stepsize_controller": WholeInterval(), "dt0": None}


def adaptive(interval: Interval) -> dict[str, Any]:
    """Steps that a controller chooses by the tolerance."""
    rtol, atol, count = interval.rtol, interval.atol, interval.num_steps
    first = None if count is None else (interval.t1 - interval.t0) / count
    return {
        "stepsize_controller": diffrax.PIDController(rtol=rtol, atol=atol),
        "dt0": first,
        "max_steps": max(4096, 16 * (count or 0)),
    }


def _tight(interval: Interval) -> dict[str, Any]:
    chosen = adaptive(interval._replace(rtol=1e-12, atol=1e-12))
    return chosen | {"max_steps": 100_000}


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to solve.

    Attributes:
        label: what to call it in tables.
        solver: a solver of diffrax; `None` if the steps are written by hand.
        control: which steps it makes.
        adjoint: how `diffrax.diffeqsolve` is differentiated.
        warm: whether it goes on from the solution before a step of training.
    """

    label: str
    solver: diffrax.AbstractSolver | None = None
    control: Control = equal_steps
    adjoint: diffrax.AbstractAdjoint = diffrax.RecursiveCheckpointAdjoint()
    warm: bool = False

    @property
    def is_adaptive(self) -> bool:
        """Whether it chooses its steps by a tolerance."""
        return self.control is adaptive

    def options(self, interval: Interval) -> dict[str, Any]:
        """The arguments in which calls of `diffrax.diffeqsolve` differ."""
        solver = self.solver
        if self.control is whole_interval:
            assert isinstance(solver, DEERSolver)
            solver = dataclasses.replace(solver, num_steps=interval.known_steps)
        return {"solver": solver, "adjoint": self.adjoint} | self.control(interval)


def _deer(label: str, choice: str, *solver: Any, warm: bool = False) -> Method:
    solves = DEERSolver(*solver, **CHOICES[choice])
    return Method(label, solves, whole_interval, DEERAdjoint(), warm)


def equidistributed(
    solver: diffrax.AbstractSolver, tolerance: float, passes: int = 2
) -> Method:
    """One window of steps where the error is, kept from one solve to the next."""
    # As many steps as the interval has, see `Method.options`.
    grid = Equidistributed(tolerance, tolerance, passes)
    solves = DEERSolver(solver, num_steps=1, grid=grid)
    label = "deer, equidistributed"
    return Method(label, solves, whole_interval, DEERAdjoint(), warm=True)


_DOPRI5, _TSIT5 = diffrax.Dopri5(), diffrax.Tsit5()
METHODS: dict[str, Method] = {
    BASELINE: Method("Dopri5", _DOPRI5),
    "tsit5": Method("Tsit5", _TSIT5),
    "dopri5_direct": Method(
        "Dopri5, DirectAdjoint", _DOPRI5, adjoint=diffrax.DirectAdjoint()
    ),
    "dopri5_backsolve": Method(
        "Dopri5, BacksolveAdjoint", _DOPRI5, adjoint=diffrax.BacksolveAdjoint()
    ),
    "dopri5_step_to": Method("Dopri5, StepTo", _DOPRI5, on_grid),
    "dopri5_pid": Method("Dopri5, PID", _DOPRI5, adaptive),
    "tsit5_pid": Method("Tsit5, PID", _TSIT5, adaptive),
    "scan_rk45": Method("lax.scan by hand"),
    "deer": _deer("deer", "deer"),
    "deer_sequential": _deer("deer, sequential steps", "deer_sequential"),
    "deer_sequential_gradient": _deer(
        "deer, sequential steps and gradient", "deer_sequential_gradient"
    ),
    # Where the steps lie depends on the ratio of the tolerances alone.
    "deer_equidistributed": equidistributed(_DOPRI5, 1e-5),
    "deer_newton": _deer("deer, Newton", "deer_newton"),
    "deer_newton_constant": _deer(
        "deer, Newton, constant guess", "deer_newton_constant"
    ),
    "deer_newton_warm": _deer("deer, Newton, warm", "deer_newton", warm=True),
    "paper": _deer("scheme of the paper", "deer_newton", ExponentialRosenbrockEuler()),
    "reference": Method("Dopri8", diffrax.Dopri8(), _tight),
    "floor": Method("all steps once"),
    RECURRENT_BASELINE: Method("lax.scan"),
}
LABELS = {name: method.label for name, method in METHODS.items()}


def windows(num_steps: int | None, adjoint: diffrax.AbstractAdjoint) -> Method:
    """Windows of so many steps each, which a controller chooses.

    As many steps in all as another adaptive solver may make.
    """
    solver = DEERSolver(num_steps=num_steps)
    count = {"max_steps": max(1, 4096 // solver.window_steps)}
    control = lambda interval: adaptive(interval) | count
    label = f"deer, windows of {solver.window_steps}"
    return Method(label, solver, control, adjoint)


def solve_options(
    rtol: float, atol: float, num_steps: int
) -> dict[SolverName, dict[str, Any]]:
    """What trainings compare: arguments of `diffrax.diffeqsolve`, without `dt0`.

    Sequential solvers choose their steps, the first of which each experiment gives.

    Args:
        rtol: relative tolerance of the sequential solvers.
        atol: absolute tolerance of the sequential solvers.
        num_steps: number of steps of Dopri5 into which DEER divides the interval.
    """
    chosen = {"dopri5": "dopri5_pid", "tsit5": "tsit5_pid"}
    found: dict[SolverName, dict[str, Any]] = {}
    for name in SOLVERS:
        method = METHODS[chosen.get(name, name)]
        found[name] = method.options(Interval(0.0, 1.0, num_steps, rtol, atol))
        del found[name]["dt0"]
    return found
