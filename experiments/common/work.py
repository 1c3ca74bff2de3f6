"""What a solve costs, counted in evaluations of the vector field."""

from typing import Any

import diffrax
import jax.numpy as jnp
from jaxtyping import Array

from diffrax_deer import CoarsePredictor, DEERSolver


def count_work(
    solver: Any, solution: diffrax.Solution, state_dim: int
) -> tuple[Array, Array | None]:
    """Counts evaluations of the vector field in one solve, derivatives left out.

    An explicit Runge-Kutta step evaluates the field once a stage; where the first stage
    is the last of the step before (FSAL), it is free from the second step on. Rejected
    steps count.

    A Newton iteration of DEER evaluates, on each of its steps, every stage, and the
    Jacobian of the field by forward-mode differentiation, of which each column counts
    as one evaluation. Every stage of every step is evaluated once more to verify the
    result, and those of one step in `stride` to predict it from a cold start:

        iterations * num_steps * (stages + columns)
            + (num_steps + ceil(num_steps / stride)) * stages

    A solve without iterations has made the steps one after another.

    Args:
        solver: what the solution was computed with.
        solution: the solution, with the state of the solver saved at the end.
        state_dim: dimension of the ODE.

    Returns:
        The number of evaluations, and the number of Newton iterations or `None` for a
        solver that does not iterate.
    """
    if isinstance(solver, DEERSolver):
        state: Any = solution.solver_state
        iterations = state.num_iterations
        stages = _num_stages(solver.solver)
        num_steps = solver.window_steps
        num_coarse = -(-num_steps // CoarsePredictor().stride)
        iterating = num_steps * iterations * (stages + state_dim)
        iterating += (num_steps + num_coarse) * stages
        sequential = num_steps * stages
        return jnp.where(iterations == 0, sequential, iterating), iterations
    num_steps = jnp.asarray(solution.stats["num_steps"])
    is_fsal = bool(solver.tableau.fsal)
    return num_steps * (_num_stages(solver) - is_fsal) + is_fsal, None


def _num_stages(solver: Any) -> int:
    return int(solver.tableau.num_stages)
