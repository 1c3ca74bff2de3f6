"""`advise`: what solves and differentiates a problem fastest, by the clock."""

import contextlib
import functools as ft
import timeit
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ._adjoint.deer_adjoint import DEERAdjoint
from ._checks import check_count, check_instance, check_noise, explained
from ._custom_types import Args, RealScalarLike, Y
from ._method import Newton
from ._ode.deer_solver import DEERSolver
from ._ode.grid_solve import plan
from ._ode.grids import Equidistributed
from ._ode.whole_interval import WholeInterval
from ._ravel import promoted, ravel

# Newton's method is tried up to so many e-foldings, and Jacobian entries of a batch.
_MAX_GROWTH, _MAX_SIZE, _MAX_UNEVEN, _MAX_ERROR = 10, 4096, 4, 10
_STIFF, _MIN_STIFF_STEPS, _MIN_SPEED_UP = 10, 256, 1.15
_label = lambda *parts: ", ".join(eqx.tree_pformat(x, width=10**4) for x in parts)
_reached = lambda sol: sol.result == diffrax.RESULTS.successful
_final = lambda sol: jnp.where(_reached(sol), ravel(sol.ys)[0], jnp.nan)


class Advice(eqx.Module):
    """What `advise` recommends, and what it has measured. `print` shows it.

    - `solver`, `stepsize_controller`, `adjoint`, `max_steps`: for `diffeqsolve`, with
        `dt0=None`. The sequential solver unless another is 1.15 times as fast.
    - `sequential_solver`, `num_steps`: the adaptive solver, and its accepted steps.
    - `stiff`: whether that is `Kvaerno5`, since it takes a tenth of at least 256 steps.
    - `lyapunov`, `duration`: the largest Lyapunov exponent; length of the interval.
    - `equidistributed_steps`: so many are enough for `Equidistributed(rtol, atol)`.
    - `grid_steps`: so many equal steps are as short as all but a tenth of the adaptive
        ones. They are not tried if they are more than 4 times as many.
    - `cold_iterations`, `warm_iterations`: Newton's on this grid, and from its solution
        for `y0` and `args` times 1.001. `None` where it failed or was not tried.
    - `seconds`: of value and gradient, the median by candidate, a Python expression.
    - `state_size`, `batch_size`: real components D, without quadratures; samples.
    """

    solver: diffrax.AbstractSolver
    stepsize_controller: diffrax.AbstractStepSizeController
    adjoint: diffrax.AbstractAdjoint
    max_steps: int
    sequential_solver: diffrax.AbstractSolver
    num_steps: int
    stiff: bool
    lyapunov: float
    duration: float
    equidistributed_steps: int
    grid_steps: int
    cold_iterations: int | None
    warm_iterations: int | None
    seconds: dict[str, float]
    state_size: int
    batch_size: int

    def __str__(self) -> str:
        show = lambda x: f"{x:.3g}" if isinstance(x, float) else _label(x)
        rows = {name: show(x) for name, x in vars(self).items() if name != "seconds"}
        best = [rows.pop(x) for x in ("solver", "stepsize_controller", "adjoint")]
        rows["recommended"] = f"{', '.join(best)}, max_steps={rows.pop('max_steps')}"
        seconds = sorted((x, key) for key, x in self.seconds.items())
        first = next((x for x, key in seconds if key[:4] != "DEER"), np.nan)
        lines = [f"{1e3 * x:8.3g} ms {first / x:5.2f}x {key}" for x, key in seconds]
        return "\n".join([f"{name:<22}{x}" for name, x in rows.items()] + lines)


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
    """Times the ways to solve and differentiate a problem on this device.

    These are the sequential solver, `DEERSolver` with its steps, equidistributed from a
    cold start (a warm one is faster), and equal, unless chaotic or large also by
    Newton's method; less those that fail, or have ten times the error of the first. The
    gradient is that of the sum of squares of the final state, by `y0` and `args`.

    **Arguments:**

    - `terms`, `t0`, `t1`, `y0`, `args`, `rtol`, `atol`, `max_steps`: as for diffrax's
        solvers under a `PIDController`. Of a batch, the sample with the most steps.
    - `solver`: used but for `num_steps`; in a stiff problem with `Kvaerno5` inside.
    - `batch_size`: so many copies of `y0`, under `jax.vmap` if more than one.

    **Raises:** `TypeError` or `ValueError` for arguments of the wrong type or range,
    an SDE, a `jax.custom_vjp`, and in `jax.jit`; `RuntimeError` if `t1` is not reached.

    **Cost:** compiles about nine solves, 20 to 70 seconds; times them for 1 to 10.
    """
    deer = DEERSolver() if solver is None else solver
    check_count("batch_size", batch_size)
    check_count("max_steps", max_steps)
    _check((terms, t0, t1, y0, args), deer, (rtol, atol))
    y0, pid = promoted(y0, t0, t1), diffrax.PIDController(rtol=rtol, atol=atol)

    def solve(solver, controller, adjoint, y0=y0, args=args, **more):
        more |= {"stepsize_controller": controller, "adjoint": adjoint, "throw": False}
        return diffrax.diffeqsolve(terms, solver, t0, t1, None, y0, args, **more)

    inner, sol = _sequential(solve, deer.solver, pid, max_steps)
    stiff, num_steps = inner is not deer.solver, int(sol.stats["num_accepted_steps"])
    make = ft.partial(DEERSolver, inner, gradient=deer.gradient, guess=deer.guess)
    fixed = lambda *how, **more: (make(*how, **more), WholeInterval(), DEERAdjoint())
    ts = np.asarray(sol.ts)[: num_steps + 1]
    lengths, duration = np.abs(np.diff(ts)), abs(float(t1 - t0))
    lyapunov, size = _lyapunov(make(1, None), (terms, y0, args), ts, lengths)
    grid_steps = int(np.ceil(duration / np.quantile(lengths, 0.1)))
    few, own = int(1.1 * num_steps) + 2, (make(1, deer.method), pid, DEERAdjoint())
    first, iterations = (inner, pid, diffrax.RecursiveCheckpointAdjoint()), (None, None)
    candidates = [first, own, fixed(few, deer.method, grid=Equidistributed(rtol, atol))]
    if grid_steps <= _MAX_UNEVEN * num_steps:
        candidates.append(fixed(grid_steps, deer.method))
        if lyapunov * duration <= _MAX_GROWTH and batch_size * size**2 <= _MAX_SIZE:
            found, _ = candidates[-1][0].choices(terms, t0, y0, args)
            candidates += [fixed(grid_steps, Newton())] * (type(found) is not Newton)
            iterations = _iterations(solve, candidates[-1], y0, args)
    # Few more than it took: `DEERAdjoint` keeps a record of so many.
    max_steps = max(16, 2 ** (int(sol.stats["num_steps"]) * 5 // 4).bit_length())
    seconds = _seconds(solve, (y0, args), candidates, batch_size, max_steps)
    weight = lambda x: 1.0 if x is first else _MIN_SPEED_UP
    best = min(candidates, key=lambda x: weight(x) * seconds.get(_label(*x), np.inf))
    rest = lyapunov, duration, few, grid_steps, *iterations, seconds, size, batch_size
    return Advice(*best, max_steps, inner, num_steps, stiff, *rest)  # pyright: ignore


def _check(problem: Any, deer: Any, tolerances: Any) -> None:
    terms, t0, t1, y0, _ = problem
    check_instance("terms", terms, diffrax.AbstractTerm, "ODETerm(field)")
    check_noise(terms)
    check_instance("solver", deer, DEERSolver, "DEERSolver()")
    inner, msg = type(deer.solver), None
    # Within `jax.jit` a new array is traced, too.
    if any(isinstance(x, Tracer) for x in jax.tree.leaves((problem, jnp.zeros(())))):
        msg = "`advise` times what it runs; call it outside of `jax.jit`, `jax.vmap`."
    elif not issubclass(inner, diffrax.AbstractAdaptiveSolver):
        msg = f"`{inner.__name__}` estimates no error; use `DEERSolver(Dopri5())`."
    elif not all(isinstance(x, float) and 0 < x < np.inf for x in tolerances):
        msg = f"`rtol`, `atol` must be positive, finite floats; got {tolerances}."
    elif np.shape((t0, t1)) != (2,) or not 0 < abs(t1 - t0) < np.inf:
        msg = f"`t0`, `t1` must be two different, finite numbers; got {t0}, {t1}."
    elif sum(np.size(x) for x in jax.tree.leaves(y0)) == 0:
        msg = "`y0` holds no number; pass the initial value of one sample."
    if msg is not None:
        raise ValueError(msg)


def _sequential(solve: Any, solver: Any, pid: Any, max_steps: int) -> tuple[Any, Any]:
    """The times of a solution (all states would be many), `Kvaerno5`'s if stiff."""
    saveat = diffrax.SaveAt(t0=True, steps=True, fn=lambda t, y, args: t)
    adjoint, implicit = diffrax.RecursiveCheckpointAdjoint(), diffrax.Kvaerno5()
    sol = solve(solver, pid, adjoint, saveat=saveat, max_steps=max_steps)
    limit = int(sol.stats["num_accepted_steps"]) if _reached(sol) else max_steps
    if _reached(sol) and limit < _MIN_STIFF_STEPS:
        return solver, sol
    limit = max(1, limit // _STIFF)
    stiff = solve(implicit, pid, adjoint, saveat=saveat, max_steps=limit)
    if _reached(stiff) or _reached(sol):
        return (implicit, stiff) if _reached(stiff) else (solver, sol)
    msg = (
        f"`{_label(solver)}` did not reach t1 in {max_steps} steps, nor `Kvaerno5()` "
        f"in {limit}: is all finite? Pass larger `max_steps`, or `rtol` and `atol`."
    )
    raise RuntimeError(msg)


@explained()
def _lyapunov(deer: Any, problem: Any, ts: Any, lengths: Any) -> tuple[float, int]:
    """The exponent, by Benettin's method (Meccanica 15, 1980), and D."""
    nodes = ts[0], ts[1:]
    found = plan(deer.inner_step(*problem), nodes, ravel(problem[1])[0], None, None)

    def step(carry, x):
        y, push = jax.linearize(ft.partial(found.step_map.step, x), carry[0])
        tangents = jax.vmap(push)(carry[1])
        size = jnp.linalg.norm(tangents)
        return (y, tangents / size), jnp.log(size)

    y0 = found.state
    tangents = jax.random.normal(jax.random.key(0), (8, y0.size), y0.dtype)
    init = y0, tangents / jnp.linalg.norm(tangents)
    _, growth = jax.lax.scan(step, init, (ts[:-1], ts[1:]))
    # In the first quarter they turn to what grows most; one alone may take longer.
    late = np.cumsum(lengths) > np.sum(lengths) / 4
    return float(np.sum(growth[late]) / np.sum(lengths[late])), y0.size


def _iterations(solve: Any, how: Any, y0: Y, args: Args) -> tuple[Any, Any]:
    """Of Newton's method, from a cold start and from a warm one."""
    run = ft.partial(solve, *how, saveat=diffrax.SaveAt(t1=True, solver_state=True))
    scale = lambda x: x * 1.001 if eqx.is_inexact_array_like(x) else x
    cold = run()
    warm = run(*jax.tree.map(scale, (y0, args)), solver_state=cold.solver_state)
    count = lambda x: int(x.stats["num_newton_iterations"]) if _reached(x) else None
    return count(cold), count(warm)


def _program(solve: Any, inputs: Any, how: Any, batch_size: int, max_steps: int) -> Any:
    """Compiled: the loss, the final state, NaN if it is not reached, the gradient."""
    copies = lambda y: jnp.stack([y] * batch_size) if batch_size > 1 else y
    inputs = jax.tree.map(copies, inputs[0]), inputs[1]
    inexact, rest = eqx.partition(inputs, eqx.is_inexact_array)

    def loss(inexact):
        y0, args = eqx.combine(inexact, rest)
        final = lambda y0: _final(solve(*how, y0, args, max_steps=max_steps))
        y1 = (final if batch_size == 1 else jax.vmap(final))(y0)
        return jnp.sum(y1**2), y1

    program = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(inexact).compile()
    return lambda: jax.block_until_ready(program(inexact))


def _seconds(solve: Any, inputs: Any, candidates: Any, *sizes: int) -> dict[str, float]:
    """The median for each candidate that is as good as the first."""
    programs, (solver, pid, adjoint) = {}, candidates[0]
    tight = diffrax.PIDController(rtol=pid.rtol / 10, atol=pid.atol / 10)
    exact, _ = ravel(solve(solver, tight, adjoint, max_steps=2**16).ys)
    largest = pid.atol + pid.rtol * np.linalg.norm(exact)
    for candidate in candidates:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # Out of memory.
            program = _program(solve, inputs, candidate, *sizes)
            (_, y1), _ = program()
            error = np.max(np.linalg.norm(np.subtract(y1, exact), axis=-1))
            largest = largest if programs else _MAX_ERROR * max(largest, error)
            if error <= largest:
                programs[_label(*candidate)] = program
    turn = lambda: [timeit.timeit(run, number=1) for run in programs.values()]
    once = sum(turn())
    # Five of each, or what one second allows, but no more than ten do.
    turns = [turn() for _ in range(int(np.ceil(np.clip(5 * once, 1, 10) / once)))]
    return dict(zip(programs, np.median(turns, axis=0).tolist(), strict=True))
