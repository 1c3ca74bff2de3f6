"""`DEERSolver`: a window of steps of any diffrax solver, solved at once."""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PyTree

from ._affine_scan import AbstractScan, PlatformScan
from ._custom_types import Args, BoolScalarLike, DenseInfo, RealScalarLike, State, Y
from ._implicit import linearization_points, solve
from ._interpolation import WindowInterpolations
from ._linearization import AbstractLinearization, PiecewiseConstant, StepMap
from ._newton import AbstractForward, NewtonIteration, ParallelForward
from ._step_map import SolverStep, prepare, ravel, rounding, widest

# Their steps carry more than the state from one to the next, or need a noise.
_NOT_ONE_STEP = (diffrax.LeapfrogMidpoint, diffrax.ReversibleHeun)
_STOCHASTIC = (
    diffrax.AbstractSRK,
    diffrax.AbstractFosterLangevinSRK,
    diffrax.EulerHeun,
    diffrax.ItoMilstein,
    diffrax.StratonovichMilstein,
)


class WindowState(eqx.Module):
    """What `DEERSolver` carries from one window to the next: `sol.solver_state`.

    The converged trajectory is the guess wherever a later window covers the same times:
    pass it on with `SaveAt(solver_state=True)` and `diffeqsolve(..., solver_state=...)`
    to start the next training step warm. Beyond its end it is constant.

    - `ts`, `(time + 1,)`, and `ys`, `(time + 1, state)`: the last window's trajectory,
        in the solver's own (increasing) time and ravelled state.
    - `num_iterations`: the Newton iterations of the last window.
    - `residual`: its largest residual, in the units of y.
    """

    ts: Float[Array, " time+1"]
    ys: Float[Array, "time+1 state"]
    num_iterations: Int[Array, ""]
    residual: Float[Array, ""]


class DEERSolver(diffrax.AbstractAdaptiveSolver[WindowState]):
    r"""Solves `num_steps` steps of a diffrax solver at once, by Newton's method.

    One step of `DEERSolver`, from `t0` to `t1`, is a *window*: a uniform grid of
    `num_steps` steps of `solver`, found together by an iteration whose only sequential
    part is a parallel prefix scan. The result is the sequential result of `solver` on
    that grid, to rounding, and so is its gradient.

        sol = diffrax.diffeqsolve(
            term, DEERSolver(), t0, t1, dt0, y0, args, saveat=diffrax.SaveAt(ts=ts),
            stepsize_controller=diffrax.PIDController(rtol=1e-5, atol=1e-5),
        )

    `PIDController` chooses the windows, such that each inner step meets the tolerance.
    With a constant step size each `dt0` is a window of its own, right but sequential:
    use `WholeInterval()`, which makes the whole interval one window.

    **Arguments:**

    - `solver`: the step map, any one-step diffrax solver of ordinary differential
        equations: `Euler` to `Dopri8`, `Kvaerno3` to `Kvaerno5`, `ImplicitEuler`,
        `ExponentialRosenbrockEuler`... An implicit solver whose root finder has no
        tolerances of its own gets `optimistix.Newton`, converged to rounding.
    - `num_steps`: the steps of one window, N.
    - `linearization`: the transitions of the iteration, see `PiecewiseConstant`.
    - `scan`: how the affine recurrence is solved. `None` means `SequentialScan` on a
        CPU and `AssociativeScan` elsewhere.
    - `rtol`, `atol`: tolerances of the Newton iteration, for the update and the
        residual of each step relative to the norm of the state; not those of the
        differential equation. `None` means close to rounding, eps**0.75, and zero.
    - `max_iterations`: at most this many iterations; `None` means
        `2 * num_steps`, twice what a first attempt can take. A window that has not
        converged is a failure, which an adaptive step size controller answers with a
        smaller window.
    - `guess`: a `diffrax.AbstractPath` close to the solution: a coarse solve with
        `SaveAt(dense=True)`, an interpolation... `None` means the constant y0, or the
        trajectory in `solver_state` where there is one.
    - `forward`: `ParallelForward()` or `SequentialForward()`, how the forward pass is
        done. The answer and the parallel gradient are the same. `None` means parallel.

    **Raises:** `TypeError` or `ValueError` for arguments of the wrong type or range, at
    construction; for terms with noise and for a guess of another structure than y0, at
    trace time. A failed solve is a `diffrax.RESULTS`.

    **Cost** of a window of N steps and a state of D real components: each iteration N
    steps, their transitions and one scan; memory O(N D²). The gradient costs one more
    such iteration, whatever their number.

    ??? cite "Reference"

        Lim, Zhu, Selfridge and Kasim, *Parallelizing non-linear sequential models over
        the sequence length*, arXiv:2309.12252 (ICLR 2024).
    """

    solver: diffrax.AbstractSolver = diffrax.Dopri5()
    num_steps: int = 64
    linearization: AbstractLinearization = PiecewiseConstant()
    scan: AbstractScan | None = None
    rtol: float | None = None
    atol: float | None = None
    max_iterations: int | None = None
    guess: diffrax.AbstractPath | None = None
    forward: AbstractForward | None = None

    def __check_init__(self):
        _check_count("num_steps", self.num_steps)
        if self.max_iterations is not None:
            _check_count("max_iterations", self.max_iterations)
        _check_instance("solver", self.solver, diffrax.AbstractSolver, "Dopri5()")
        _check_instance(
            "linearization",
            self.linearization,
            AbstractLinearization,
            "PiecewiseConstant()",
        )
        if self.scan is not None:
            _check_instance("scan", self.scan, AbstractScan, "SequentialScan()")
        if self.forward is not None:
            _check_instance(
                "forward", self.forward, AbstractForward, "SequentialForward()"
            )
        if self.guess is not None:
            example = "a `Solution` saved with `SaveAt(dense=True)`"
            _check_instance("guess", self.guess, diffrax.AbstractPath, example)
        for name in ("rtol", "atol"):
            _check_tolerance(name, getattr(self, name))
        _check_step_map(self.solver)

    @property
    def term_structure(self):
        """The terms that the inner solver takes."""
        return self.solver.term_structure

    @property
    def interpolation_cls(self) -> Callable:  # pyright: ignore
        """The inner solver's interpolation, step by step."""
        return WindowInterpolations(self.solver.interpolation_cls)

    def order(self, terms: PyTree[diffrax.AbstractTerm]) -> int | None:
        """The order of the inner solver, for windows of `num_steps` steps."""
        return self.solver.order(terms)

    def error_order(self, terms: PyTree[diffrax.AbstractTerm]) -> RealScalarLike | None:
        """The order of the inner solver's error estimate."""
        return self.solver.error_order(terms)

    def func(
        self,
        terms: PyTree[diffrax.AbstractTerm],
        t0: RealScalarLike,
        y0: Y,
        args: Args,
    ) -> Y:
        """The vector field."""
        return self.solver.func(terms, t0, y0, args)

    def _grid(self, t0: RealScalarLike, t1: RealScalarLike) -> Float[Array, " time+1"]:
        return jnp.linspace(t0, t1, self.num_steps + 1)

    def init(
        self,
        terms: PyTree[diffrax.AbstractTerm],
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args,
    ) -> WindowState:
        """The guess of the first window: the constant y0."""
        del args
        is_noise = lambda x: isinstance(x, diffrax.AbstractBrownianPath)
        if any(is_noise(x) for x in jax.tree.leaves(terms, is_leaf=is_noise)):
            msg = (
                "`DEERSolver` solves ordinary and controlled differential equations; "
                "found a Brownian motion in `terms`. Use one of diffrax's SDE solvers, "
                "`diffrax.Heun()` or `diffrax.SPaRK()` for example."
            )
            raise ValueError(msg)
        flat, _ = ravel(y0)
        ts = self._grid(t0, t1)
        ys = jnp.broadcast_to(flat, (len(ts), flat.size))
        zero = jnp.zeros((), flat.dtype)
        state = WindowState(ts, ys, jnp.array(0, int), zero)
        return lax.stop_gradient(state)

    def _iteration(self, y0: Y) -> NewtonIteration:
        return NewtonIteration(
            self.linearization,
            PlatformScan() if self.scan is None else self.scan,
            rounding(y0) ** 0.75 if self.rtol is None else self.rtol,
            0.0 if self.atol is None else self.atol,
            self.max_iterations,
        )

    def _guess(
        self,
        terms: PyTree[diffrax.AbstractTerm],
        ts: Float[Array, " time+1"],
        y0: Y,
        state: WindowState,
    ) -> Float[Array, "time state"]:
        guess = self.guess
        if guess is None:
            dtype = widest(ts.dtype, state.ys.dtype)
            old, new = state.ts.astype(dtype), ts[1:].astype(dtype)
            interpolate = lambda y: jnp.interp(new, old, y.astype(dtype))
            return jax.vmap(interpolate, in_axes=1, out_axes=1)(state.ys)
        # The path is in the user's time, which runs backwards where this one does not.
        direction = getattr(terms, "direction", 1)
        times = ts[1:] * direction
        _check_guess(guess, times[0], y0)
        return jax.vmap(lambda t: ravel(guess.evaluate(t))[0])(times)

    def step(
        self,
        terms: PyTree[diffrax.AbstractTerm],
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args,
        solver_state: WindowState,
        made_jump: BoolScalarLike,
    ) -> tuple[Y, Y | None, DenseInfo, WindowState, diffrax.RESULTS]:
        """Solves one window; arguments and result as for any diffrax solver."""
        del made_jump
        iteration = self._iteration(y0)
        flat, unravel = ravel(y0)
        inner = SolverStep(prepare(self.solver, rounding(y0)), terms, args, unravel)
        ts = self._grid(t0, t1)
        xs, idle = (ts[:-1], ts[1:]), (ts[0], ts[0])
        ys, statistics = solve(
            # A solver of several terms, `SemiImplicitEuler`, has no one vector field.
            StepMap(
                inner.step,
                inner.increment if isinstance(terms, diffrax.AbstractTerm) else None,
            ),
            flat,
            xs,
            self._guess(terms, ts, y0, solver_state).astype(flat.dtype),
            ParallelForward() if self.forward is None else self.forward,
            iteration,
            idle,
        )
        # The step of the converged trajectory, once more for what is not a state: a
        # plain function of the solution, differentiated as such.
        points = linearization_points(flat, xs, ys, statistics, idle)
        _, errors, infos, inner_results = jax.vmap(inner.full)(*points)
        result = _result(statistics, inner_results)
        y_error = None if errors is None else unravel(_largest(errors, result))
        state = WindowState(
            ts,
            jnp.concatenate([flat[None], ys]),
            statistics.num_iterations,
            statistics.residual,
        )
        dense_info = {"ts": ts, "infos": infos}
        return unravel(ys[-1]), y_error, dense_info, lax.stop_gradient(state), result


def _result(statistics: Any, inner_results: diffrax.RESULTS) -> diffrax.RESULTS:
    result = diffrax.RESULTS.promote(statistics.result)
    inner_okay = jnp.all(inner_results == diffrax.RESULTS.successful)
    inner_failed = (result == diffrax.RESULTS.successful) & ~inner_okay
    return diffrax.RESULTS.where(
        inner_failed,
        diffrax.RESULTS.nonlinear_divergence,  # pyright: ignore
        result,
    )


def _largest(errors: Float[Array, "time state"], result: diffrax.RESULTS) -> State:
    """The largest error of any step, infinite if there is no solution to speak of."""
    failed = result != diffrax.RESULTS.successful
    return jnp.where(failed, jnp.inf, jnp.max(jnp.abs(errors), axis=0))


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        msg = f"`{name}` must be a Python int of at least 1; got {value!r}."
        raise TypeError(msg)
    if value < 1:
        msg = f"`{name}` must be at least 1; got {value}."
        raise ValueError(msg)


def _check_instance(name: str, value: Any, cls: type, example: str) -> None:
    if isinstance(value, cls):
        return
    hint = f"Pass an instance, {name}={example} for example"
    if isinstance(value, type) and issubclass(value, cls):
        msg = f"`{name}` got the class `{value.__name__}`. {hint}."
    else:
        msg = f"`{name}` must be a `{cls.__name__}`; got {value!r}. {hint}."
    raise TypeError(msg)


def _check_tolerance(name: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        msg = f"`{name}` must be a Python float or `None`; got {value!r}."
        raise TypeError(msg)
    if not 0 <= value < float("inf"):
        msg = f"`{name}` must be finite and not negative; got {value!r}."
        raise ValueError(msg)


def _check_step_map(solver: diffrax.AbstractSolver) -> None:
    name = type(solver).__name__
    if isinstance(solver, DEERSolver):
        msg = (
            "`solver` is a `DEERSolver` itself; pass its inner solver and `num_steps`."
        )
        raise ValueError(msg)
    if isinstance(solver, _STOCHASTIC):
        msg = (
            f"`solver` must be a solver of ordinary differential equations; got the "
            f"SDE solver `{name}`. Use `Dopri5()`, or `Kvaerno5()` if the equation is "
            "stiff."
        )
        raise ValueError(msg)
    if isinstance(solver, _NOT_ONE_STEP):
        msg = (
            f"`solver` must be a one-step method; `{name}` carries more than the state "
            "from one step to the next. Use `Midpoint()` or `Heun()`."
        )
        raise ValueError(msg)


def _check_guess(guess: diffrax.AbstractPath, t: Any, y0: Y) -> None:
    shapes = lambda x: jax.tree.map(lambda leaf: jnp.shape(leaf), x)
    value = jax.eval_shape(guess.evaluate, t)
    same = jax.tree.structure(value) == jax.tree.structure(y0)
    if not same or jax.tree.leaves(shapes(value)) != jax.tree.leaves(shapes(y0)):
        msg = (
            "`guess.evaluate(t)` must have the structure and shapes of `y0`, which are "
            f"{shapes(y0)}; got {shapes(value)}."
        )
        raise ValueError(msg)
