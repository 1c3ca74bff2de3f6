"""`Advice`: what was measured and predicted, and what follows from it."""

import textwrap

import diffrax
import equinox as eqx

from ._forward import ParallelForward
from ._linearization import AbstractLinearization, FullJacobian, PiecewiseConstant
from ._solver import DEERSolver

# From here on small errors grow so much that Newton's method goes step by step.
MANY_LYAPUNOV_TIMES = 10
# Below it what can be gained is lost again to compiling, whatever the model says.
FEW_STEPS = 32
# What `diffrax.diffeqsolve` allows if it is not told otherwise.
_MAX_STEPS = 4096
_WIDTH = 80


class Advice(eqx.Module):
    """What `advise` found: print it, or pass on what it recommends.

        advice = diffrax_deer.advise(term, t0, t1, y0, args)
        print(advice)
        sol = diffrax.diffeqsolve(
            term, advice.solver, t0, t1, None, y0, args,
            stepsize_controller=advice.stepsize_controller, adjoint=advice.adjoint,
        )

    Recommended, for training (`recommendation` says so in words, and what is better for
    a solve without gradient):

    - `solver`, `stepsize_controller`, `adjoint`: for `diffrax.diffeqsolve`, with
        `dt0=None`.

    Measured:

    - `sequential_solver`, `num_steps`: the sequential solver and the steps that it
        takes at `rtol` and `atol`.
    - `stiff`: whether an explicit solver needs at least ten times the steps of
        `Kvaerno5`, which is then the sequential solver.
    - `num_explicit_steps`: the steps of the explicit solver, as far as it came.
    - `state_size`, `batch_size`: real components D; samples.
    - `platform`, `num_cores`: of JAX; of the CPU.
    - `duration`: the length of the interval.
    - `flops`: operations of one evaluation of the vector field.
    - `lipschitz`: largest spectral norm of the Jacobian of the field on the solution.
    - `lyapunov`: the largest Lyapunov exponent, per unit of time, from the growth of a
        tangent. It is a limit for long times, and says little about intervals of about
        `1 / lyapunov` or shorter.
    - `grid_steps`, `linearization`: with what Newton's method was tried.
    - `cold_iterations`, `warm_iterations`: its iterations without a guess, and
        from the solution for y0 and args that differ by a thousandth. `None` where it
        failed, took more than 200, or was not tried.

    Predicted by a model that is right to a factor of three, relative to the
    sequential solver; `None` where there are no iterations to count:

    - `work_ratio`, `depth_ratio`: of value and gradient from a warm start, all that is
        computed and what has to wait for something else.
    - `speedup_forward`: of a solve from a cold start, without gradient.
    - `speedup_gradient`: of value and gradient from a warm start, as in training;
        `None`, too, where the Jacobians of all steps are more than memory holds.
    - `speedup_sequential_forward`: of value and gradient with the steps in sequence,
        as `DEERSolver` makes them on a CPU by default.
    """

    solver: diffrax.AbstractSolver
    stepsize_controller: diffrax.AbstractStepSizeController
    adjoint: diffrax.AbstractAdjoint
    sequential_solver: diffrax.AbstractSolver
    num_steps: int
    rtol: float
    atol: float
    stiff: bool
    num_explicit_steps: int
    state_size: int
    batch_size: int
    platform: str
    num_cores: int
    duration: float
    flops: float
    lipschitz: float
    lyapunov: float
    grid_steps: int
    linearization: AbstractLinearization
    cold_iterations: int | None
    warm_iterations: int | None
    work_ratio: float | None
    depth_ratio: float | None
    speedup_forward: float | None
    speedup_gradient: float | None
    speedup_sequential_forward: float

    @property
    def lyapunov_times(self) -> float:
        """By how many powers of e nearby solutions separate over the interval."""
        return self.lyapunov * self.duration

    @property
    def chaotic(self) -> bool:
        """Whether there are more Lyapunov times than Newton's method is good for."""
        return self.lyapunov_times > MANY_LYAPUNOV_TIMES

    @property
    def recommendation(self) -> str:
        """What to do, and why."""
        return " ".join([_what(self), *_why(self)])

    def __str__(self) -> str:
        rows = _rows(self)
        width = max(len(name) for name, _ in rows) + 2
        wrap = lambda text, indent: textwrap.fill(
            text, _WIDTH, initial_indent=indent, subsequent_indent=" " * width
        )
        lines = [wrap(text, name.ljust(width)) for name, text in rows]
        return "\n".join([*lines, "", textwrap.fill(self.recommendation, _WIDTH)])


def _name(solver: diffrax.AbstractSolver) -> str:
    return f"{type(solver).__name__}()"


def _digit(x: float) -> str:
    """One digit: the model is not better than that."""
    return f"{float(f'{x:.1g}'):g}"


def _factor(speedup: float) -> str:
    return f"{_digit(speedup)} times as fast"


def _call(solver: DEERSolver) -> str:
    """The solver as one would write it."""
    arguments = []
    if type(solver.solver) is not diffrax.Dopri5:
        arguments.append(_name(solver.solver))
    arguments.append(f"num_steps={solver.num_steps}")
    implicit = isinstance(solver.solver, diffrax.AbstractImplicitSolver)
    default = FullJacobian if implicit else PiecewiseConstant
    if type(solver.linearization) is not default:
        arguments.append(f"linearization={type(solver.linearization).__name__}()")
    if solver.forward is not None:
        arguments.append(f"forward={type(solver.forward).__name__}()")
    return f"DEERSolver({', '.join(arguments)})"


def _what(advice: Advice) -> str:
    solver, most = advice.solver, ""
    if advice.num_steps > _MAX_STEPS:
        # Rejected ones count, too.
        most = f" and max_steps={2 * advice.num_steps}"
    if not isinstance(solver, DEERSolver):
        return (
            f"Stay with the sequential solver, {_name(solver)} with "
            f"PIDController(rtol={advice.rtol:g}, atol={advice.atol:g}){most}."
        )
    grid, windows = "WholeInterval()", ""
    if isinstance(advice.stepsize_controller, diffrax.StepTo):
        grid = f"StepTo(ts), whose ts are the steps found here{most}"
        windows = " with num_steps=64"
    if advice.platform == "cpu" and solver.forward is None:
        # The steps are made in sequence anyway, and differentiated together.
        windows = " with num_steps=1"
    text = (
        f"To train, use {_call(solver)} with the stepsize controller {grid} and "
        "adjoint=DEERAdjoint()"
    )
    if isinstance(solver.forward, ParallelForward):
        text += (
            ", and pass on sol.solver_state, saved with SaveAt(solver_state=True), as "
            "the guess of the next training step"
        )
    return (
        f"{text}. This grid suits this y0 and these args: where others differ much, "
        f"PIDController(rtol={advice.rtol:g}, atol={advice.atol:g}){windows} chooses "
        "another."
    )


def _why(advice: Advice) -> list[str]:
    """The reasons, and what is different without a gradient."""
    reasons = []
    parallel = isinstance(advice.solver, DEERSolver)
    if advice.stiff:
        reasons.append(
            "The problem is stiff: an explicit solver made "
            f"{advice.num_explicit_steps} steps"
            f", {_name(advice.sequential_solver)} needs {advice.num_steps}."
        )
    if advice.chaotic:
        reasons.append(
            f"The problem is chaotic over {advice.lyapunov_times:.0f} Lyapunov times: "
            "Newton's method is right but slow, steps in sequence are better, and the "
            f"gradient grows by a factor of e**{advice.lyapunov_times:.0f}."
        )
    elif advice.cold_iterations is None or advice.warm_iterations is None:
        reasons.append(
            "Newton's method failed, took more than 200 iterations, or was not tried; "
            "where only the warm start failed, the steps do not suit other solutions."
        )
    if not parallel and advice.num_steps < FEW_STEPS:
        reasons.append(
            f"{advice.num_steps} steps are few: time-parallel pays where there are a "
            "hundred or more."
        )
    elif not parallel and (advice.work_ratio or 0.0) > 1:
        reasons.append(
            f"With batch {advice.batch_size} and {advice.state_size} components the "
            "work counts, not the waiting, and time-parallel does more of it."
        )
    return [*reasons, *_limits(advice)]


def _limits(advice: Advice) -> list[str]:
    """What is different without a gradient or for large states."""
    reasons = []
    if advice.speedup_forward is not None:
        reasons.append(
            "Without gradient, Newton's method from a cold start should be about "
            f"{_factor(advice.speedup_forward)} as "
            f"{_name(advice.sequential_solver)}."
        )
    if not advice.linearization.is_dense:
        reasons.append(
            f"With {advice.state_size} components dense Jacobians cost O(N D²) memory "
            "and O(N D³) time: Newton's method was tried with "
            f"linearization={type(advice.linearization).__name__}()."
        )
    return reasons


def _iterations(count: int | None) -> str:
    return "failed" if count is None else str(count)


def _predicted(advice: Advice) -> str:
    text = ""
    if advice.work_ratio is not None and advice.depth_ratio is not None:
        assert advice.speedup_gradient is not None
        text = (
            f"Newton (warm) {_factor(advice.speedup_gradient)} with "
            f"{_digit(advice.work_ratio)}x the work and "
            f"{_digit(advice.depth_ratio)}x the depth; "
        )
    text += f"steps in sequence {_factor(advice.speedup_sequential_forward)}"
    if advice.platform != "cpu":
        text += " (the latencies of this platform were guessed, not measured)"
    return text


def _rows(advice: Advice) -> list[tuple[str, str]]:
    """What `str` shows above the recommendation."""
    device = f"{advice.platform}, {advice.num_cores} cores"
    steps = f"{_name(advice.sequential_solver)} makes {advice.num_steps} steps"
    caveat = (
        ""
        if abs(advice.lyapunov_times) > 1
        else " (below 1: no chaos, or too short to tell)"
    )
    return [
        (
            "problem",
            f"{advice.state_size} components, batch {advice.batch_size}, field of "
            f"{advice.flops:.0f} operations, {device}",
        ),
        (
            "sequential",
            f"{steps} at rtol={advice.rtol:g}, atol={advice.atol:g}; "
            f"{'stiff' if advice.stiff else 'not stiff'}",
        ),
        (
            "Lipschitz",
            f"{advice.lipschitz:.3g} per unit of time, "
            f"{advice.lipschitz * advice.duration:.3g} over the interval",
        ),
        (
            "Lyapunov",
            f"{advice.lyapunov:.2g} per unit of time, "
            f"{advice.lyapunov_times:.2g} over the interval{caveat}",
        ),
        (
            "Newton",
            f"{advice.grid_steps} steps at once; iterations from a cold start: "
            f"{_iterations(advice.cold_iterations)}, from a warm one: "
            f"{_iterations(advice.warm_iterations)}",
        ),
        (
            "value + gradient",
            f"predicted, to a factor of three: {_predicted(advice)}",
        ),
    ]
