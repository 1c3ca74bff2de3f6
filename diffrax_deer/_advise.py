"""`advise`: whether time-parallel pays for a problem, and what to use if it does."""

import dataclasses
import math
import os
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jax.core import Tracer

from ._adjoint import DEERAdjoint
from ._advice import FEW_STEPS, MANY_LYAPUNOV_TIMES, Advice
from ._checks import check_count, check_instance, check_noise
from ._controller import WholeInterval
from ._cost_model import CostModel, predict
from ._custom_types import Args, RealScalarLike, Y
from ._forward import ParallelForward, SequentialForward
from ._linearization import (
    AbstractLinearization,
    DiagonalJacobian,
    FullJacobian,
    Picard,
    PiecewiseConstant,
)
from ._measurement import (
    Adaptive,
    Problem,
    coupled,
    evaluations_of_field,
    flops_of_field,
    newton_iterations,
    rates,
    solve_adaptively,
    uniform_steps,
)
from ._solver import DEERSolver
from ._step_map import promoted

# One step of an implicit solver costs about as much as ten of an explicit one.
_STIFF = 10
_FEWEST_STIFF_STEPS = 256
# Where steps of equal length would be that many times those of the adaptive solver,
# the grid has the lengths that it chose.
_MOST_UNEVEN = 4
# `StepTo` has no limit of iterations below the number of its steps.
_MOST_UNEVEN_STEPS = 4096
_MOST_ITERATIONS = 200
_LARGEST_DENSE = 16
_LARGEST_DIAGONAL = 64
# What a model that is right to a factor of three has to promise before a change pays.
_WORTH_IT = 1.5


def advise(
    terms: diffrax.AbstractTerm,
    t0: RealScalarLike,
    t1: RealScalarLike,
    y0: Y,
    args: Args = None,
    *,
    solver: DEERSolver | None = None,
    batch_size: int = 1,
    rtol: float = 1e-5,
    atol: float = 1e-8,
    max_steps: int = 2**16,
) -> Advice:
    """A word of advice: does time-parallel pay for this problem, on this device?

        print(diffrax_deer.advise(diffrax.ODETerm(field), 0.0, 100.0, y0, args))

    Solves the problem in sequence, adaptively, and then on a grid of as short steps by
    Newton's method, from a cold and from a warm start; measures on the way how fast
    nearby solutions move apart; and predicts from all this, with a simple model of the
    cost, what is faster. Changes no setting and does not look at a clock: the same
    problem gets the same advice.

    **Arguments:**

    - `terms`, `t0`, `t1`, `y0`, `args`: as for `diffrax.diffeqsolve`. One sample: where
        you solve a batch under `jax.vmap`, pass `batch_size` and the sample that takes
        the most steps, since a batch takes as many.
    - `solver`: a `DEERSolver` whose inner solver, linearization and so on are to be
        used; its `num_steps` and `forward` are part of the advice. `None` means
        `Dopri5`, or `Kvaerno5` where the problem is stiff, and a linearization that
        suits the size of the state.
    - `batch_size`: how many samples are solved together.
    - `rtol`, `atol`: the accuracy that you want.
    - `max_steps`: of the adaptive solve.

    **Returns:**

    An `Advice`, to be printed; it has all numbers, and a solver to pass on.

    **Raises:** `TypeError` or `ValueError` for arguments of the wrong type or range,
    for terms with noise, and inside of `jax.jit`, where nothing can be measured;
    `RuntimeError` if the sequential solver does not come from `t0` to `t1`.

    **Cost:** compiles four to six solves, which takes 5 to 30 seconds; memory O(N D²)
    for N steps and D ≤ 16 real components, O(N D) for more.
    """
    problem = Problem(terms, t0, t1, y0, args)
    _check(problem, {"rtol": rtol, "atol": atol})
    check_count("batch_size", batch_size)
    check_count("max_steps", max_steps)
    inner = _check_inner(solver)
    problem = eqx.tree_at(lambda p: p.y0, problem, promoted(y0, t0, t1))
    explicit = solve_adaptively(problem, inner, rtol, atol, max_steps)
    solve = _stiff_solve(problem, explicit, rtol, atol, max_steps)
    if not solve.successful:
        raise RuntimeError(_not_solved(problem, inner, max_steps))
    lipschitz, lyapunov = rates(problem, solve)
    size = coupled(problem, DEERSolver(solve.solver), solve.ts)[1].size
    duration = abs(float(t1) - float(t0))
    chaotic = lyapunov * duration > MANY_LYAPUNOV_TIMES
    deer, grid = _on_grid(_configured(solver, solve.solver, size), solve)
    linearization = deer.linearization
    assert linearization is not None
    model = CostModel(
        num_steps=solve.num_steps,
        grid_steps=max(deer.num_steps, _num_windows(grid)),
        stages=evaluations_of_field(solve.solver),
        implicit=isinstance(solve.solver, diffrax.AbstractImplicitSolver),
        flops=flops_of_field(problem, solve),
        state_size=size,
        batch_size=batch_size,
        linearization=linearization,
        platform=jax.default_backend(),
    )
    is_tried = _num_windows(grid) == 1 or (
        not chaotic and _num_windows(grid) <= _MOST_UNEVEN_STEPS
    )
    cold = warm = None
    if is_tried:
        limited = dataclasses.replace(deer, max_iterations=_MOST_ITERATIONS)
        cold, warm = newton_iterations(problem, limited, grid, _num_windows(grid))
    prediction = predict(model, cold, warm)
    best = None
    # `StepTo` allows all iterations that there can be: if it fails, then since the
    # steps suit one solution only.
    suits_one_only = _num_windows(grid) > 1 and is_tried and warm is None
    if solve.num_steps >= FEW_STEPS and not suits_one_only:
        newton = None if chaotic else prediction.speedup_gradient
        best = _best(deer, newton, prediction.speedup_sequential_forward, model)
    pid = diffrax.PIDController(rtol=rtol, atol=atol)
    return Advice(
        solver=solve.solver if best is None else best,
        stepsize_controller=pid if best is None else grid,
        adjoint=diffrax.RecursiveCheckpointAdjoint() if best is None else DEERAdjoint(),
        sequential_solver=solve.solver,
        num_steps=solve.num_steps,
        rtol=rtol,
        atol=atol,
        stiff=solve is not explicit,
        num_explicit_steps=explicit.num_steps,
        state_size=size,
        batch_size=batch_size,
        platform=model.platform,
        num_cores=os.cpu_count() or 1,
        duration=duration,
        flops=model.flops,
        lipschitz=lipschitz,
        lyapunov=lyapunov,
        grid_steps=model.grid_steps,
        linearization=linearization,
        cold_iterations=cold,
        warm_iterations=warm,
        **prediction._asdict(),
    )


def _not_solved(problem: Problem, solver: Any, max_steps: int) -> str:
    return (
        f"`{type(solver).__name__}` did not come from t0={problem.t0} to "
        f"t1={problem.t1} in max_steps={max_steps} steps, and no implicit solver did "
        "in a tenth of them. Either the solution or the field is not finite somewhere "
        "before t1, or the tolerances are below rounding (float32?), or the problem is "
        "long: shorten the interval, or pass larger `rtol` and `atol`, or `max_steps`."
    )


def _check(problem: Problem, tolerances: dict[str, Any]) -> None:
    leaves = jax.tree.leaves(problem)
    # Where something is traced, so is a new array, unless by `grad` or `vmap` alone.
    if any(isinstance(x, Tracer) for x in [*leaves, jnp.zeros(())]):
        msg = (
            "`advise` measures, and needs concrete arguments: call it once, outside of "
            "`jax.jit`, `jax.vmap` and `jax.grad`, and use what it returns inside."
        )
        raise ValueError(msg)
    check_instance("terms", problem.terms, diffrax.AbstractTerm, "ODETerm(field)")
    check_noise(problem.terms)
    for name, value in tolerances.items():
        if not isinstance(value, float) or not 0 < value < math.inf:
            msg = f"`{name}` must be a positive, finite float; got {value!r}."
            raise ValueError(msg)
    ends = jnp.asarray(problem.t0), jnp.asarray(problem.t1)
    if any(x.shape != () or not jnp.isfinite(x) for x in ends) or ends[0] == ends[1]:
        msg = (
            "`t0` and `t1` must be two different, finite numbers; got "
            f"t0={problem.t0} and t1={problem.t1}."
        )
        raise ValueError(msg)
    if sum(jnp.size(x) for x in jax.tree.leaves(problem.y0)) == 0:
        msg = "`y0` holds no number; pass the initial value of one sample."
        raise ValueError(msg)


def _check_inner(solver: DEERSolver | None) -> diffrax.AbstractSolver:
    """The solver to be used in sequence."""
    if solver is None:
        return diffrax.Dopri5()
    check_instance("solver", solver, DEERSolver, "DEERSolver()")
    if not isinstance(solver.solver, diffrax.AbstractAdaptiveSolver):
        msg = (
            f"`solver` has the inner solver `{type(solver.solver).__name__}`, which "
            "does not estimate its error, so that no tolerance says how many steps it "
            "needs. Use `DEERSolver(Dopri5())`, or leave `solver` out."
        )
        raise ValueError(msg)
    return solver.solver


def _stiff_solve(
    problem: Problem, explicit: Adaptive, rtol: float, atol: float, max_steps: int
) -> Adaptive:
    """The solve by an implicit solver if it takes far fewer steps."""
    if isinstance(explicit.solver, diffrax.AbstractImplicitSolver):
        return explicit
    limit = max_steps // _STIFF
    if explicit.successful:
        limit = explicit.num_steps // _STIFF
        if explicit.num_steps < _FEWEST_STIFF_STEPS:
            return explicit
        lipschitz, _ = rates(problem, explicit)
        span = abs(float(explicit.ts[-1] - explicit.ts[0]))
        # A step that stability limits has at least about this product.
        if lipschitz * span < explicit.num_steps:
            return explicit
    implicit = solve_adaptively(problem, diffrax.Kvaerno5(), rtol, atol, max(limit, 1))
    return implicit if implicit.successful else explicit


def _configured(
    solver: DEERSolver | None, inner: diffrax.AbstractSolver, size: int
) -> DEERSolver:
    """The parallel solver, without its grid."""
    if solver is None:
        solver = DEERSolver(inner)
    solver = dataclasses.replace(solver, solver=inner, forward=ParallelForward())
    if solver.linearization is not None:
        return solver
    implicit = isinstance(inner, diffrax.AbstractImplicitSolver)
    linearization: AbstractLinearization
    linearization = FullJacobian() if implicit else PiecewiseConstant()
    if size > _LARGEST_DENSE:
        linearization = DiagonalJacobian()
    if size > _LARGEST_DIAGONAL:
        linearization = Picard()
    return dataclasses.replace(solver, linearization=linearization)


def _on_grid(
    deer: DEERSolver, solve: Adaptive
) -> tuple[DEERSolver, diffrax.AbstractStepSizeController]:
    """The solver and the controller that make the grid."""
    num_steps = uniform_steps(solve)
    if num_steps <= _MOST_UNEVEN * solve.num_steps:
        return dataclasses.replace(deer, num_steps=num_steps), WholeInterval()
    controller = diffrax.StepTo(jnp.asarray(solve.ts))
    return dataclasses.replace(deer, num_steps=1), controller


def _num_windows(controller: diffrax.AbstractStepSizeController) -> int:
    return len(controller.ts) - 1 if isinstance(controller, diffrax.StepTo) else 1


def _best(
    deer: DEERSolver, newton: float | None, in_sequence: float, model: CostModel
) -> DEERSolver | None:
    """The solver of the largest speed-up; `None` if none is worth it."""
    # On a CPU that is what is done by default.
    forward = None if model.platform == "cpu" else SequentialForward()
    sequential = dataclasses.replace(deer, forward=forward)
    options = [(newton, deer), (in_sequence, sequential)]
    speedup, best = max(options, key=lambda option: option[0] or 0.0)
    return best if (speedup or 0.0) >= _WORTH_IT else None
