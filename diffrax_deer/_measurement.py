"""What decides whether a solve in parallel over time pays, measured on one solve.

Nothing here is differentiated: the numbers are for people to read.
"""

import math
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PyTree

from ._adjoint import DEERAdjoint
from ._custom_types import Args, RealScalarLike, State, VectorField, Y
from ._linearization import value_and_jacobian
from ._solver import DEERSolver
from ._step_map import SolverStep, ravel

# Above it the norm of a Jacobian is found by power iteration, not from all columns.
_LARGEST_DENSE = 64
_MOST_POINTS = 256
_POWER_ITERATIONS = 50
_MOST_TANGENTS = 8
# Part of the interval in which tangents turn into the direction that grows most.
_TRANSIENT = 0.25


class Problem(eqx.Module):
    """What `diffrax.diffeqsolve` is given, solver and controller apart."""

    terms: diffrax.AbstractTerm
    t0: RealScalarLike
    t1: RealScalarLike
    y0: Y
    args: Args


class Adaptive(eqx.Module):
    """An adaptive sequential solve.

    - `solver`: which made it.
    - `ts`, `(times,)`: the ends of the accepted steps, `t0` first.
    - `y0`: the initial value, of the type that diffrax gives it.
    - `successful`: whether it came to `t1`.
    """

    solver: diffrax.AbstractSolver
    ts: Float[np.ndarray, " times"]
    y0: Y
    successful: bool

    @property
    def num_steps(self) -> int:
        """The accepted steps."""
        return len(self.ts) - 1


@eqx.filter_jit
def _solve(
    problem: Problem, solver: Any, controller: Any, **options: Any
) -> diffrax.Solution:
    return diffrax.diffeqsolve(
        problem.terms,
        solver,
        problem.t0,
        problem.t1,
        None,
        problem.y0,
        problem.args,
        stepsize_controller=controller,
        throw=False,
        **options,
    )


def _time(t: Any, y: Any, args: Any) -> Any:
    del y, args
    return t


def solve_adaptively(
    problem: Problem,
    solver: diffrax.AbstractSolver,
    rtol: float,
    atol: float,
    max_steps: int,
) -> Adaptive:
    """Solves with a step size controller, in sequence."""
    controller = diffrax.PIDController(rtol=rtol, atol=atol)
    # The times only: `max_steps` states may be more than memory holds.
    subs = diffrax.SubSaveAt(steps=True, fn=_time), diffrax.SubSaveAt(t0=True)
    saveat = diffrax.SaveAt(subs=subs)
    sol = _solve(problem, solver, controller, saveat=saveat, max_steps=max_steps)
    assert sol.ts is not None and sol.ys is not None
    ends, start = (np.asarray(ts) for ts in sol.ts)
    ts = np.concatenate([start, ends[: int(sol.stats["num_accepted_steps"])]])
    y0 = jax.tree.map(lambda y: y[0], sol.ys[1])
    successful = bool(sol.result == diffrax.RESULTS.successful)
    if successful:
        # The last step may end a rounding unit away from it.
        ts[-1] = float(problem.t1)
    return Adaptive(solver, ts, y0, successful)


def _power(f: VectorField, y: State) -> Float[Array, ""]:
    """The spectral norm of the Jacobian, from below, without forming it."""
    _, push = jax.linearize(f, y)
    pull = jax.linear_transpose(push, y)

    def iterate(_, carry):
        v, _ = carry
        (w,) = pull(push(v))
        size = jnp.linalg.norm(w)
        return w / jnp.where(size == 0, 1, size), jnp.sqrt(size)

    v = jax.random.normal(jax.random.key(0), y.shape, y.dtype)
    init = v / jnp.linalg.norm(v), jnp.zeros((), y.dtype)
    return lax.fori_loop(0, _POWER_ITERATIONS, iterate, init)[1]


def coupled(
    problem: Problem, solver: DEERSolver, ts: Array | np.ndarray
) -> tuple[SolverStep, State]:
    """The step and the initial value of what is solved for, quadratures left out.

    If there is nothing else, of everything.
    """
    parts = solver.partition(problem.terms, ts, problem.y0, problem.args)
    y0, _ = ravel(problem.y0)
    z0, _ = parts.split(y0)
    return (parts.coupled, z0) if z0.size > 0 else (parts.whole, y0)


@eqx.filter_jit
def _along(problem: Problem, solver: DEERSolver, ts: Array, points: Array):
    """Growth of tangents in each step, and the norm of the Jacobian at `points`."""
    inner, y0 = coupled(problem, solver, ts)
    xs = ts[:-1], ts[1:]

    def step(carry, x):
        y, tangents = carry
        y_next, push = jax.linearize(lambda y: inner.step(x, y), y)
        tangents = jax.vmap(push, in_axes=1, out_axes=1)(tangents)
        size = jnp.linalg.norm(tangents)
        tangents = tangents / jnp.where(size == 0, 1, size)
        return (y_next, tangents), ((y + y_next) / 2, jnp.log(size))

    shape = y0.size, min(y0.size, _MOST_TANGENTS)
    # One alone could happen to be almost orthogonal to what grows most.
    tangents, _ = jnp.linalg.qr(jax.random.normal(jax.random.key(0), shape, y0.dtype))
    tangents = tangents / jnp.linalg.norm(tangents)
    _, (ys, growth) = lax.scan(step, (y0, tangents), xs)

    def rate(n):
        x = xs[0][n], xs[1][n]
        field = lambda y: inner.increment(x, y)
        if y0.size > _LARGEST_DENSE:
            norm = _power(field, ys[n])
        else:
            norm = jnp.linalg.norm(value_and_jacobian(field, ys[n])[1], ord=2)
        return norm / jnp.abs(x[1] - x[0]).astype(norm.dtype)

    return growth, lax.map(rate, points)


def rates(problem: Problem, solve: Adaptive) -> tuple[float, float]:
    """How fast nearby solutions can move apart, and how fast they do.

    **Returns:**

    The Lipschitz constant along the solution, which is the largest spectral norm of the
    Jacobian of the field at up to 256 of the steps, and the largest Lyapunov exponent:
    the mean rate at which tangents, renormalized after each step, have grown since the
    first quarter of the interval (Benettin's method). Both are per unit of time.
    """
    num_steps = solve.num_steps
    points = np.unique(np.linspace(0, num_steps - 1, _MOST_POINTS).astype(int))
    problem = eqx.tree_at(lambda p: p.y0, problem, solve.y0)
    growth, norms = _along(
        problem, DEERSolver(solve.solver), jnp.asarray(solve.ts), jnp.asarray(points)
    )
    elapsed = np.abs(solve.ts - solve.ts[0])
    first = int(np.searchsorted(elapsed[:-1], _TRANSIENT * elapsed[-1]))
    first = min(first, num_steps - 1)
    total = np.sum(np.asarray(growth, np.float64)[first:])
    return float(jnp.max(norms)), float(total / (elapsed[-1] - elapsed[first]))


def flops_of_field(problem: Problem, solve: Adaptive) -> float:
    """The operations of one evaluation of the field, as the compiler counts them."""
    y0, _ = ravel(solve.y0)
    inner = DEERSolver(solve.solver).inner_step(problem.terms, solve.y0, problem.args)
    x = jnp.asarray(solve.ts[0]), jnp.asarray(solve.ts[1])
    compiled = jax.jit(lambda y: inner.increment(x, y)).lower(y0).compile()
    # Not every backend counts; then a dense linear field is assumed.
    counts: Any = compiled.cost_analysis() or {}
    flops = counts.get("flops", 0.0) + 10 * counts.get("transcendentals", 0.0)
    return float(flops) if flops > 0 else 2.0 * y0.size**2


def _perturbed(tree: PyTree[Any]) -> PyTree[Any]:
    """A thousandth more of everything, about as much as one training step changes."""
    floats, rest = eqx.partition(tree, eqx.is_inexact_array_like)
    return eqx.combine(jax.tree.map(lambda x: x * (1 + 1e-3), floats), rest)


def newton_iterations(
    problem: Problem,
    solver: DEERSolver,
    controller: diffrax.AbstractStepSizeController,
    max_windows: int,
) -> tuple[int | None, int | None]:
    """The Newton iterations of a solve, cold and warm; `None` where it fails.

    Cold starts from what the solver itself predicts or guesses; warm starts from the
    cold solve's trajectory, with y0 and args changed by a thousandth.
    """
    counts: list[int | None] = []
    state = None
    y0, args = _perturbed((problem.y0, problem.args))
    changed = Problem(problem.terms, problem.t0, problem.t1, y0, args)
    for variant in (problem, changed):
        sol = _solve(
            variant,
            solver,
            controller,
            saveat=diffrax.SaveAt(t1=True, solver_state=True),
            adjoint=DEERAdjoint(),
            solver_state=state,
            max_steps=max_windows,
        )
        state = sol.solver_state
        assert state is not None
        if not bool(sol.result == diffrax.RESULTS.successful):
            return counts[0] if counts else None, None
        counts.append(int(state.num_iterations))
    return counts[0], counts[1]


def evaluations_of_field(solver: diffrax.AbstractSolver) -> int:
    """How many evaluations of the field one step of the solver makes."""
    if type(solver) is diffrax.HalfSolver:
        return 3 * evaluations_of_field(solver.solver)
    num_stages = 6
    if isinstance(solver, diffrax.AbstractRungeKutta):
        tableau = solver.tableau
        if isinstance(tableau, diffrax.ButcherTableau):
            num_stages = tableau.num_stages - int(tableau.fsal)
    if isinstance(solver, diffrax.AbstractImplicitSolver):
        # Each stage is found in about four iterations.
        return 4 * num_stages
    return num_stages


def uniform_steps(solve: Adaptive) -> int:
    """Steps of equal length that are as short as all but a tenth of those made."""
    lengths = np.abs(np.diff(solve.ts))
    total = abs(float(solve.ts[-1] - solve.ts[0]))
    return math.ceil(total / float(np.quantile(lengths, 0.1)) * (1 - 1e-6))
