"""`DEERSolver`: a window of steps of any diffrax solver, solved at once."""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PyTree

from ._affine_scan import AbstractScan, PlatformScan
from ._checks import (
    check_count,
    check_guess,
    check_instance,
    check_noise,
    check_size,
    check_step_map,
    check_tolerance,
    check_window_state,
)
from ._custom_types import (
    Args,
    BoolScalarLike,
    DenseInfo,
    RealScalarLike,
    State,
    States,
    Y,
)
from ._forward import AbstractForward, ParallelForward, Strategy
from ._interpolation import WindowInterpolations
from ._linearization import AbstractLinearization, FullJacobian, PiecewiseConstant
from ._newton import NewtonIteration, default_window
from ._predictor import AbstractPredictor, CoarsePredictor
from ._quadrature import Partition, partition
from ._step_map import SolverStep, prepare, promoted, ravel, rounding, widest
from ._trajectory import Trajectory, largest_error, solve_grid


class WindowState(eqx.Module):
    """What `DEERSolver` carries from one window to the next: `sol.solver_state`.

    The converged trajectory is the guess wherever a later window covers the same times:
    pass it on with `SaveAt(solver_state=True)` and `diffeqsolve(..., solver_state=...)`
    to start the next training step warm. Beyond its end it is constant.

    - `ts`, `(times,)`, and `ys`, `(time + 1, state)`: the last window's trajectory,
        in the solver's own (increasing) time and ravelled state.
    - `num_iterations`: the Newton iterations of the last window.
    - `residual`: its largest residual, in the units of y.
    """

    ts: Float[Array, " times"]
    ys: Float[Array, "times state"]
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

    `PIDController` chooses the windows, such that each inner step meets the tolerance;
    let `num_steps` be well below the number of steps that this takes. With
    `num_steps=1` they are the steps that the inner solver would make, found in
    sequence; with `DEERAdjoint` their gradient is parallel nevertheless.
    With a constant step size each `dt0` is a window of its own, right but sequential:
    use `WholeInterval()`, which makes the whole interval one window.

    **Arguments:**

    - `solver`: the step map, any one-step diffrax solver of ordinary differential
        equations: `Euler` to `Dopri8`, `Kvaerno3` to `Kvaerno5`, `ImplicitEuler`,
        `ExponentialRosenbrockEuler`... An implicit solver whose root finder has no
        tolerances of its own gets `optimistix.Newton`, converged to rounding.
    - `num_steps`: the steps of one window, N.
    - `linearization`: the transitions of the iteration. `None` means
        `PiecewiseConstant`; for implicit solvers, and those that split the field,
        `FullJacobian`.
    - `scan`: how the affine recurrence is solved. `None` means `SequentialScan` on a
        CPU and `AssociativeScan` elsewhere.
    - `rtol`, `atol`: tolerances of the Newton iteration, for the residual and the
        estimated error of each step, in each component relative to the largest value
        that it has had so far; not those of the differential equation. `None` means
        close to rounding, eps**0.75 of the coarsest type in the state, and zero.
    - `max_iterations`: at most this many iterations; `None` means `num_steps`, which
        always suffices. A window that has not converged is a failure, which an
        adaptive step size controller answers with a smaller window.
    - `guess`: a `diffrax.AbstractPath` close to the solution: a previous `Solution`
        with `SaveAt(dense=True)`, an interpolation... Before its beginning and beyond
        its end it is taken as constant. `None` means the trajectory in `solver_state`
        where there is one, else what the `predictor` predicts.
    - `predictor`: where there is no guess, or none that can be trusted.
        `CoarsePredictor()`, which `None` means, makes a few large steps in sequence;
        `ConstantPredictor()` is the constant y0.
    - `window`: the iteration works on this many steps at once, beginning with the first
        that has not converged; memory O(`window` D²). `None` means 1024 on a CPU, and
        elsewhere as many as have four million Jacobian entries, but at least 1024.
    - `forward`: `ParallelForward()` for Newton's method, `SequentialForward()` for one
        step after the other with the parallel gradient. `None` chooses: on a CPU the
        steps are made in sequence, and the gradient is parallel where state and batch
        are small (D² times the batch at most 128), otherwise sequential as well, with
        each step evaluated again; elsewhere Newton's method, unless the Jacobians fit
        into no memory. Value and gradient are the same, to rounding. What belongs to
        Newton's method (`linearization`, `guess`, `max_iterations` and so on) is not
        used where its steps are made in sequence.

    **Raises:** `TypeError` or `ValueError` for arguments of the wrong type or range, at
    construction; for terms with noise, for a guess of another structure than y0, and
    for a derivative of a field with a `jax.custom_vjp`, at trace time. A failed solve
    is a `diffrax.RESULTS`.

    **Cost** of N steps and a state of D real components, with Newton's method: a third
    of the steps in sequence for the prediction, where there is no guess; then each
    iteration `window` steps, their transitions and one scan, in memory O(`window` D²).
    The gradient costs one more such iteration, whatever their number, with memory
    O(N D²). Without dense transitions, and D above 16, memory is O(N D), and the
    gradient costs about as many products with Jacobians as there were iterations. In
    sequence: N steps, and for the gradient either that or N steps and their VJP once
    more, with memory O(N D).

    ??? cite "Reference"

        Lim, Zhu, Selfridge and Kasim, *Parallelizing non-linear sequential models over
        the sequence length*, arXiv:2309.12252 (ICLR 2024).
    """

    solver: diffrax.AbstractSolver = diffrax.Dopri5()
    num_steps: int = 64
    linearization: AbstractLinearization | None = None
    scan: AbstractScan | None = None
    rtol: float | None = None
    atol: float | None = None
    max_iterations: int | None = None
    guess: diffrax.AbstractPath | None = None
    forward: AbstractForward | None = None
    predictor: AbstractPredictor | None = None
    window: int | None = None

    def __check_init__(self):
        check_count("num_steps", self.num_steps)
        if self.max_iterations is not None:
            check_count("max_iterations", self.max_iterations)
        check_instance("solver", self.solver, diffrax.AbstractSolver, "Dopri5()")
        if self.linearization is not None:
            check_instance(
                "linearization",
                self.linearization,
                AbstractLinearization,
                "PiecewiseConstant()",
            )
        if self.scan is not None:
            check_instance("scan", self.scan, AbstractScan, "SequentialScan()")
        if self.window is not None:
            check_count("window", self.window)
        if self.predictor is not None:
            example = "CoarsePredictor()"
            check_instance("predictor", self.predictor, AbstractPredictor, example)
        if self.forward is not None:
            check_instance(
                "forward", self.forward, AbstractForward, "SequentialForward()"
            )
        if self.guess is not None:
            example = "a `Solution` saved with `SaveAt(dense=True)`"
            check_instance("guess", self.guess, diffrax.AbstractPath, example)
        for name in ("rtol", "atol"):
            check_tolerance(name, getattr(self, name))
        if isinstance(self.solver, DEERSolver):
            msg = "`solver` is a `DEERSolver` itself; pass its inner solver."
            raise ValueError(msg)
        check_step_map(self.solver)

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

    def grid(self, t0: RealScalarLike, t1: RealScalarLike) -> Float[Array, " times"]:
        """The times of the steps of the window from `t0` to `t1`."""
        return jnp.linspace(t0, t1, self.num_steps + 1)

    def init(
        self,
        terms: PyTree[diffrax.AbstractTerm],
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args,
    ) -> WindowState:
        """No guess for the first window: a trajectory that does not leave `t0`."""
        del args
        check_noise(terms)
        flat, _ = ravel(promoted(y0, t0, t1))
        ts = jnp.full_like(self.grid(t0, t1), t0)
        ys = jnp.broadcast_to(flat, (len(ts), flat.size))
        zero = jnp.zeros((), flat.dtype)
        state = WindowState(ts, ys, jnp.array(0, int), zero)
        return lax.stop_gradient(state)

    def _iteration(
        self, inner: SolverStep, y0: State, num_windows: int
    ) -> NewtonIteration:
        limit, window = self.max_iterations, self.window
        if window is None:
            window = default_window(y0.size**2)
        linearization = self.linearization
        if linearization is None:
            explicit = inner.is_one_field and not inner.is_implicit
            linearization = PiecewiseConstant() if explicit else FullJacobian()
        return NewtonIteration(
            linearization,
            PlatformScan() if self.scan is None else self.scan,
            CoarsePredictor() if self.predictor is None else self.predictor,
            rounding(inner.unravel(y0)) ** 0.75 if self.rtol is None else self.rtol,
            0.0 if self.atol is None else self.atol,
            None if limit is None else limit * num_windows,
            window,
        )

    def _guess(
        self,
        terms: PyTree[diffrax.AbstractTerm],
        ts: Float[Array, " times"],
        y0: Y,
        state: WindowState,
    ) -> Float[Array, "time state"]:
        guess = self.guess
        if guess is None:
            dtype = widest(ts.dtype, state.ys.dtype)
            old, new, ys = (x.astype(dtype) for x in (state.ts, ts[1:], state.ys))
            interpolate = lambda: _interpolated(old, ys, new)
            if old.shape != ts.shape:
                return interpolate()
            # The usual warm start, and nothing to look up.
            same = eqxi.unvmap_all(jnp.all(old[1:] == new) & (old[0] < old[-1]))
            return lax.cond(same, lambda: ys[1:], interpolate)
        # The path is in the user's time, which runs backwards where this one does not.
        is_term = lambda x: isinstance(x, diffrax.AbstractTerm)
        first, *_ = jax.tree.leaves(terms, is_leaf=is_term)
        direction = getattr(first, "direction", 1)
        times = ts[1:] * direction
        # A path without an end has `None` there, whatever its type says.
        ends: list[Any] = [guess.t0, guess.t1]
        if all(t is not None for t in ends):
            first, last = (jnp.asarray(t, times.dtype) for t in ends)
            times = jnp.clip(times, jnp.minimum(first, last), jnp.maximum(first, last))
        check_guess(guess, times[0], y0)
        return jax.vmap(lambda t: ravel(guess.evaluate(t))[0])(times)

    def inner_step(
        self, terms: PyTree[diffrax.AbstractTerm], y0: Y, args: Args
    ) -> SolverStep:
        """One step of the inner solver, on the ravelled state."""
        check_noise(terms)
        solver = prepare(self.solver, rounding(y0))
        return SolverStep(solver, terms, args, ravel(y0)[1])

    def trajectory(
        self,
        terms: PyTree[diffrax.AbstractTerm],
        ts: Float[Array, " times"],
        y0: Y,
        args: Args,
        solver_state: WindowState,
        *,
        guess: States | None = None,
        forward: AbstractForward | Strategy | None = None,
        num_windows: int = 1,
        may_be_rejected: bool = False,
    ) -> Trajectory:
        """Solves the steps of one or of several consecutive windows, all at once.

        **Arguments:**

        - `terms`, `y0`, `args`: as for any diffrax solver.
        - `ts`: the times of all the steps, increasing.
        - `solver_state`: what the guess is taken from.
        - `guess`, `(time, state)`, and `forward`: in place of the solver's own.
        - `num_windows`: how many windows `ts` consists of; `max_iterations` is for one.
        - `may_be_rejected`: whether the derivative has to be finite, though multiplied
            by zero, where the solution is not. It always is where that of `solve` is.

        **Returns:**

        A `Trajectory`, differentiable.
        """
        flat, _ = ravel(y0)
        parts = self.partition(terms, ts, y0, args)
        if forward is None:
            forward = Strategy() if self.forward is None else self.forward
        coupled, _ = parts.split(flat)
        iteration = self._iteration(parts.coupled, coupled, num_windows)
        if isinstance(forward, ParallelForward) and iteration.linearization.is_dense:
            check_size(min(len(ts) - 1, iteration.window or len(ts)), coupled.size)
        if guess is None:
            guess = self._guess(terms, ts, y0, solver_state).astype(flat.dtype)
        return solve_grid(parts, ts, flat, guess, forward, iteration, may_be_rejected)

    def partition(
        self, terms: PyTree[diffrax.AbstractTerm], ts: Any, y0: Y, args: Args
    ) -> Partition:
        """The step of the inner solver, without quadratures, and theirs.

        `ts` are at least two times, of any one step.
        """
        return partition(self.inner_step(terms, y0, args), (ts[0], ts[1]), y0)

    def quadratures(
        self,
        terms: PyTree[diffrax.AbstractTerm],
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args = None,
    ) -> PyTree[bool]:
        """Which leaves of `y0` are left out of the Newton system.

        A leaf that no component of the vector field depends on, by its dataflow, is a
        quadrature: the log-density of a continuous normalizing flow, a running cost.
        It costs no Jacobian column and is summed up once, along the converged solution
        of the others; value and gradient are the same. Found with the Runge-Kutta
        methods of diffrax, `Euler`, `ImplicitEuler` and `ExponentialRosenbrockEuler`.

        The arguments are those of `init`. **Returns:** a pytree as `y0`, of booleans.
        """
        y0 = promoted(y0, t0, t1)
        parts = self.partition(terms, (t0, t1), y0, args)
        is_none = lambda x: x is None
        found = lambda y, zero: jax.tree.map(lambda _: zero is not None, y)
        return jax.tree.map(found, y0, parts.zeros, is_leaf=is_none)

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
        check_window_state(solver_state, self.num_steps)
        ts = self.grid(t0, t1)
        trajectory = self.trajectory(
            terms, ts, y0, args, solver_state, may_be_rejected=True
        )
        result = trajectory.result()
        error = largest_error(trajectory.errors, result)
        unravel = trajectory.inner.unravel
        y_error = None if error is None else unravel(error)
        dense_info = {"ts": ts, "infos": trajectory.dense_infos}
        state = window_state(trajectory)
        return unravel(trajectory.ys[-1]), y_error, dense_info, state, result


def _interpolated(
    old: Float[Array, " known"],
    ys: Float[Array, "known state"],
    new: Float[Array, " time"],
) -> Float[Array, "time state"]:
    """`ys` at the times `old`, at the times `new`; NaN where nothing is known."""
    # Not `jnp.interp`, which makes a NaN and trips `jax_debug_nans`.
    right = jnp.clip(jnp.searchsorted(old, new), 1, len(old) - 1)
    length = old[right] - old[right - 1]
    part = (new - old[right - 1]) / jnp.where(length == 0, 1, length)
    # Half a step beyond the end is as good as at the end: `t1` may be trained.
    known = (part >= -0.5) & (part <= 1.5) & (length > 0)
    part = jnp.clip(part, 0, 1)[:, None]
    ys = ys[right - 1] + part * (ys[right] - ys[right - 1])
    return jnp.where(known[:, None], ys, jnp.nan)


def window_state(trajectory: Trajectory) -> WindowState:
    """What the next solve may take its guess from; carries no derivative."""
    state = WindowState(
        trajectory.ts,
        jnp.concatenate([trajectory.y0[None], trajectory.ys]),
        trajectory.statistics.num_iterations,
        trajectory.statistics.residual,
    )
    return lax.stop_gradient(state)
