"""How many iterations hard problems take, and the original algorithm on them.

python -m experiments.convergence

Every problem is solved on one grid by a sequential diffrax solver and by `DEERSolver`
with the same solver inside: from the constant guess with each linearization, with the
default settings (a coarse prediction), and warm, from the solution for an initial value
that differs by a thousandth. Beside it stands the original algorithm, Newton's method
without safeguards, whose success is that it stops.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from diffrax_deer import (
    ConstantPredictor,
    DEERAdjoint,
    DEERSolver,
    Newton,
    ParallelGradient,
)
from experiments.common.command_line import run
from experiments.common.errors import ExperimentError
from experiments.common.measurement import BaseConfig
from experiments.common.problems import PROBLEMS, Problem
from experiments.common.results import format_table, head, report, write_json
from experiments.common.solvers import LINEARIZATIONS

_NAMES = (*LINEARIZATIONS, "default", "warm")
# As in the original code.
_MAX_ITERATIONS = 100
_PERTURBATION = 1e-3


@dataclasses.dataclass(frozen=True)
class Config(BaseConfig):
    """The settings.

    Attributes:
        problems: Which problems; all of them if none is named.
    """

    problems: tuple[str, ...] = ()
    out: Path = Path("runs/convergence/results.json")


def adaptive_grid(problem: Problem) -> Array:
    """The times at which a sequential adaptive solver steps, for stiff problems."""
    sol = diffrax.diffeqsolve(
        diffrax.ODETerm(problem.field),
        problem.solver,
        0.0,
        problem.t1,
        None,
        problem.y0,
        saveat=diffrax.SaveAt(t0=True, steps=True),
        stepsize_controller=diffrax.PIDController(rtol=1e-6, atol=1e-9),
        max_steps=20_000,
    )
    ts = np.asarray(sol.ts)
    return jnp.asarray(ts[np.isfinite(ts)])


def grid(problem: Problem) -> Array:
    """The times of the steps."""
    if problem.num_steps is None:
        return adaptive_grid(problem)
    return jnp.linspace(0.0, problem.t1, problem.num_steps + 1)


def solve(problem: Problem, ts: Array, solver: Any, y0: Array, state: Any) -> Any:
    """The solution at all steps, by any solver."""
    parallel = isinstance(solver, DEERSolver)
    adjoint = DEERAdjoint() if parallel else diffrax.RecursiveCheckpointAdjoint()
    return diffrax.diffeqsolve(
        diffrax.ODETerm(problem.field),
        solver,
        ts[0],
        ts[-1],
        None,
        y0,
        saveat=diffrax.SaveAt(steps=True, solver_state=parallel),
        stepsize_controller=diffrax.StepTo(ts),
        adjoint=adjoint,
        solver_state=state,
        max_steps=len(ts) - 1,
        throw=False,
    )


def original(problem: Problem, ts: Array) -> tuple[Array, Array, Array]:
    """Newton's method as published: no safeguard, success is to stop in time.

    Returns the iterations, whether it calls that a success, and the trajectory.
    """
    term, solver, y0 = diffrax.ODETerm(problem.field), problem.solver, problem.y0

    def step(t0, t1, y):
        state = solver.init(term, t0, t1, y, None)
        return solver.step(term, t0, t1, y, None, state, made_jump=False)[0]

    def transition(t0, t1, y):
        jacobian = jax.jacfwd(lambda y: problem.field(t0 + (t1 - t0) / 2, y, None))(y)
        return jax.scipy.linalg.expm((t1 - t0) * jacobian)

    def update(carry):
        ys, num_iterations, _ = carry
        before = jnp.concatenate([y0[None], ys[:-1]])
        images = jax.vmap(step)(ts[:-1], ts[1:], before)
        transitions = jax.vmap(transition)(ts[:-1], ts[1:], (before + ys) / 2)
        affine = lambda y, ab: (ab[0] @ y + ab[1],) * 2
        start = jnp.zeros_like(y0)
        _, updates = lax.scan(affine, start, (transitions, images - ys))
        return ys + updates, num_iterations + 1, jnp.max(jnp.abs(updates))

    guess = jnp.broadcast_to(y0, (len(ts) - 1, y0.size))
    ys, num_iterations, _ = lax.while_loop(
        # With NaN the comparison is false, and the loop has "converged".
        lambda carry: (carry[2] > 1e-7) & (carry[1] < _MAX_ITERATIONS),
        update,
        (guess, jnp.array(0), jnp.array(jnp.inf)),
    )
    return num_iterations, num_iterations < _MAX_ITERATIONS, ys


def deviation(ys: Any, expected: Any) -> float | None:
    """The largest difference, relative to the largest component; `None` if NaN."""
    largest = float(np.max(np.abs(ys - expected)) / np.max(np.abs(expected)))
    return largest if np.isfinite(largest) else None


def measure(problem: Problem) -> dict[str, Any]:
    """All there is to know about one problem."""
    ts = grid(problem)

    def run(solver, y0, state=None):
        compiled = jax.jit(lambda y0, state: solve(problem, ts, solver, y0, state))
        compiled = compiled.lower(y0, state).compile()
        begin = time.perf_counter()
        sol = jax.block_until_ready(compiled(y0, state))
        return sol, time.perf_counter() - begin

    sequential, seconds = run(problem.solver, problem.y0)
    if sequential.result != diffrax.RESULTS.successful:
        msg = f"The sequential solver fails: {problem.title}."
        raise ExperimentError(msg)

    def compare(sol, seconds):
        return {
            "iterations": int(sol.stats["num_newton_iterations"]),
            "successful": bool(sol.result == diffrax.RESULTS.successful),
            "deviation": deviation(sol.ys, sequential.ys),
            "residual": float(sol.stats["residual"]),
            "seconds": seconds,
        }

    make = lambda newton: DEERSolver(problem.solver, 1, newton, ParallelGradient())
    runs = {}
    for name, linearization in LINEARIZATIONS.items():
        solver = make(Newton(linearization, predictor=ConstantPredictor()))
        runs[name] = compare(*run(solver, problem.y0))
    solver = make(Newton())
    near, _ = run(solver, problem.y0 * (1 + _PERTURBATION))
    runs["default"] = compare(*run(solver, problem.y0))
    runs["warm"] = compare(*run(solver, problem.y0, near.solver_state))

    num_iterations, stopped, ys = jax.jit(lambda: original(problem, ts))()
    return {
        "title": problem.title,
        "solver": type(problem.solver).__name__,
        "num_steps": len(ts) - 1,
        "sequential_seconds": seconds,
        "runs": runs,
        "original": {
            "iterations": int(num_iterations),
            "calls_it_success": bool(stopped),
            "finite": bool(jnp.all(jnp.isfinite(ys))),
            "deviation": deviation(ys, sequential.ys),
        },
    }


def _outcome(original: dict[str, Any]) -> str:
    count = original["iterations"]
    if not original["finite"]:
        return f"NaN, “success” after {count}"
    if not original["calls_it_success"]:
        return f"not after {count}"
    right = original["deviation"] < 1e-6
    return f"{count}" if right else f"wrong, “success” after {count}"


def table(results: dict[str, Any]) -> str:
    """One line for each problem, in Markdown."""
    rows = []
    for problem in results["problems"].values():
        runs = [problem["runs"][name] for name in _NAMES]
        row = [problem["title"], problem["solver"], f"{problem['num_steps']}"]
        for each in runs:
            row.append(f"{each['iterations']}" if each["successful"] else "fails")
        row.append(f"{problem['runs']['default']['deviation']:.0e}")
        row.append(f"{max(each['deviation'] for each in runs):.0e}")
        rows.append([*row, _outcome(problem["original"])])
    header = ["problem", "solver", "steps", "Piecewise", "Full", "Diagonal", "Picard"]
    header += ["default", "warm", "deviation", "largest", "original"]
    return format_table(header, rows)


def main(config: Config) -> dict[str, Any]:
    """Measures, prints and writes the results."""
    names = config.problems or tuple(PROBLEMS)
    unknown = sorted(set(names) - set(PROBLEMS))
    if unknown:
        msg = f"--problems: {', '.join(unknown)} unknown; one of {', '.join(PROBLEMS)}."
        raise ExperimentError(msg)
    if config.smoke:
        names = ("square_root", "lotka_volterra_10")
    problems: dict[str, Any] = {}
    results = {
        **head("convergence", config, "float64"),
        "problems": problems,
    }
    for name in names:
        problems[name] = measure(PROBLEMS[name])
        write_json(config.out, results)
        print(f"{name}: {problems[name]['runs']['default']['iterations']} iterations")
    report(config.out, results, table(results))
    return results


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    run(main, Config)
