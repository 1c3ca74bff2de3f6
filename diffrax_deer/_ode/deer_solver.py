"""`DEERSolver`: a window of steps of any diffrax solver, solved at once."""

from collections.abc import Callable
from typing import Any

import diffrax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .._checks import (
    check_count,
    check_instance,
    check_noise,
    check_number_of_steps,
    check_optional,
    check_step_map,
)
from .._custom_types import (
    Args,
    BoolScalarLike,
    DenseInfo,
    RealScalarLike,
    States,
    Y,
)
from .._defaults import NEWTON_STEPS, prefers_sequential_steps
from .._gradient import AbstractGradient, SequentialGradient
from .._method import AbstractMethod, Sequential
from .._ravel import promoted, ravel, rounding
from .._statistics import Statistics
from .dense_output import WindowInterpolations, windows_of_one_step
from .grid_solve import Trajectory, default_method, plan, solve_grid
from .grids import AbstractGrid, Uniform
from .quadrature import left_out, partition
from .single_step import Memory, first_memory, single_step
from .solver_step import SolverStep, prepare
from .window_state import (
    WindowState,
    check_errors,
    check_window_state,
    initial_guess,
    no_window,
    window_state,
)


class DEERSolver(diffrax.AbstractAdaptiveSolver[WindowState]):
    r"""Solves `num_steps` steps of a diffrax solver at once, by Newton's method.

    One step of `DEERSolver`, from `t0` to `t1`, is a *window*: a grid of
    `num_steps` steps of `solver`, found together by an iteration whose only sequential
    part is a parallel prefix scan. The result is the sequential result of `solver` on
    that grid, to rounding, and so is its gradient.

        sol = diffrax.diffeqsolve(
            term, DEERSolver(), t0, t1, dt0, y0, args, saveat=diffrax.SaveAt(ts=ts),
            stepsize_controller=diffrax.PIDController(rtol=1e-5, atol=1e-5),
        )

    On a CPU a window is one step unless `num_steps` says otherwise: under any
    controller the steps are those of the inner solver. With more than one, the largest
    error of a window's steps is what `PIDController` scales by the state at its ends.
    Where the number of steps is known, `WholeInterval()` makes all of them one window.

    **Arguments:**

    - `solver`: the step map, any one-step diffrax solver of ordinary differential
        equations: `Euler` to `Dopri8`, `Kvaerno3` to `Kvaerno5`, `ImplicitEuler`,
        `ExponentialRosenbrockEuler`... An implicit solver whose root finder has no
        tolerances of its own gets `optimistix.Newton`, converged to rounding.
    - `num_steps`: the steps of one window, N. `None` means 1 where the steps are made
        one after another, as on a CPU, and 64 where they are made all at once.
    - `method`: how the steps are found, `Newton(...)` all at once or `Sequential()` one
        after another. `None` means `Sequential()` on a CPU, and elsewhere `Newton()`,
        unless the Jacobians fit into no memory.
    - `gradient`: how they are differentiated, `ParallelGradient()`,
        `MatrixFreeGradient()` or `SequentialGradient()`. `None` means on a CPU
        `ParallelGradient()` where D² times the batch is at most 128, else
        `SequentialGradient()`; elsewhere `ParallelGradient()`, unless the Jacobians fit
        into no memory. Value and gradient are the same, to rounding, for all of these.
    - `grid`: where the steps of a window lie, `Uniform()`, which is what `None` means,
        or `Equidistributed(rtol, atol)`: where the error is. It needs `num_steps`.
    - `guess`: a `diffrax.AbstractPath` close to the solution, a previous `Solution`
        with `SaveAt(dense=True)` for example. Before its beginning and beyond its end
        it is taken as constant. `None` means the trajectory in `solver_state` where
        there is one, else what the method's predictor says. `Sequential()` needs none.

    **Raises:** `TypeError` or `ValueError` for arguments of the wrong type or range, at
    construction; for terms of an SDE, for a guess of another structure than y0, and
    for a derivative of a field with a `jax.custom_vjp`, at trace time. A failed solve
    is a `diffrax.RESULTS`.

    **Cost** of N steps and a state of D real components: `Sequential()` makes N steps;
    `Newton()` on a CPU a third of them one after another for the prediction, where
    there is no guess, then in each iteration all steps, transitions and one scan.
    Memory is O(N D), and O(N D²) where Jacobians are held.

    ??? cite "Reference"

        Lim, Zhu, Selfridge and Kasim, *Parallelizing non-linear sequential models over
        the sequence length*, arXiv:2309.12252 (ICLR 2024).
    """

    solver: diffrax.AbstractSolver = diffrax.Dopri5()
    num_steps: int | None = None
    method: AbstractMethod | None = None
    gradient: AbstractGradient | None = None
    guess: diffrax.AbstractPath | None = None
    grid: AbstractGrid | None = None

    def __check_init__(self):
        if self.num_steps is not None:
            check_count("num_steps", self.num_steps)
        check_instance("solver", self.solver, diffrax.AbstractSolver, "Dopri5()")
        check_optional("method", self.method, AbstractMethod, "Newton()")
        check_optional(
            "gradient", self.gradient, AbstractGradient, "ParallelGradient()"
        )
        example = "a `Solution` saved with `SaveAt(dense=True)`"
        check_optional("guess", self.guess, diffrax.AbstractPath, example)
        check_optional("grid", self.grid, AbstractGrid, "Uniform()")
        check_number_of_steps(self.grid, self.num_steps)
        if isinstance(self.solver, DEERSolver):
            msg = "`solver` is a `DEERSolver` itself; pass its inner solver."
            raise ValueError(msg)
        check_step_map(self.solver)

    @property
    def term_structure(self):
        """The terms that the inner solver takes."""
        return self.solver.term_structure

    @property
    def window_steps(self) -> int:
        """The steps of one window, where `num_steps` may leave that open."""
        if self.num_steps is not None:
            return self.num_steps
        return 1 if self._is_sequential else NEWTON_STEPS

    @property
    def _is_sequential(self) -> bool:
        if self.method is None:
            return prefers_sequential_steps()
        return not self.method.uses_guess

    @property
    def makes_single_steps(self) -> bool:
        """Whether a window is nothing but a step of the inner solver."""
        return self._is_sequential and self.window_steps == 1 and self.gradient is None

    @property
    def interpolation_cls(self) -> Callable:  # pyright: ignore
        """The inner solver's interpolation, step by step."""
        inner = self.solver.interpolation_cls
        return inner if self.makes_single_steps else WindowInterpolations(inner)

    def order(self, terms: PyTree[diffrax.AbstractTerm]) -> int | None:
        """The order of the inner solver."""
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

    @property
    def places(self) -> AbstractGrid:
        """Where the steps of a window lie."""
        return Uniform() if self.grid is None or self.num_steps == 1 else self.grid

    def init(
        self,
        terms: PyTree[diffrax.AbstractTerm],
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args,
    ) -> WindowState | Memory:
        """No guess for the first window: a trajectory that stays at `t0`."""
        check_noise(terms)
        y0 = promoted(y0, t0, t1)
        flat, _ = ravel(y0)
        if self.makes_single_steps:
            return first_memory(self.inner_step(terms, y0, args), t0, t1, flat)
        return no_window(t0, flat, self.window_steps, self.places.measures_errors)

    def inner_step(
        self, terms: PyTree[diffrax.AbstractTerm], y0: Y, args: Args
    ) -> SolverStep:
        """One step of the inner solver, on the ravelled state."""
        check_noise(terms)
        solver = prepare(self.solver, rounding(y0))
        return SolverStep(solver, terms, args, ravel(y0)[1])

    def choices(
        self,
        terms: PyTree[diffrax.AbstractTerm],
        t0: RealScalarLike,
        y0: Y,
        args: Args = None,
    ) -> tuple[AbstractMethod, AbstractGradient]:
        """What `method` and `gradient` of one window are, where they are `None`.

        For this problem, platform and, within `jax.vmap`, batch. Arguments of `init`.
        """
        y0 = promoted(y0, t0)
        (flat, _), inner = ravel(y0), self.inner_step(terms, y0, args)
        ts = jnp.linspace(t0, t0, self.window_steps)
        found = plan(inner, (ts[0], ts), flat, self.method, self.gradient)
        method = found.method.resolve(found.step_map, found.state, len(ts))
        return method, found.gradient

    def quadratures(
        self,
        terms: PyTree[diffrax.AbstractTerm],
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args = None,
    ) -> PyTree[bool]:
        """Which leaves of `y0` are left out of the Newton system.

        Those that no component of the vector field depends on, by its dataflow, as a
        running cost. They are summed up once, along the solution of the others. Found
        with Runge-Kutta methods, `ImplicitEuler` and `ExponentialRosenbrockEuler`.

        Arguments of `init`. **Returns:** a pytree as `y0`, of booleans.
        """
        y0 = promoted(y0, t0, t1)
        inner, x = self.inner_step(terms, y0, args), (t0, t1)
        return left_out(partition(inner, x, ravel(y0)[0]), y0)

    def states(self, solver_state: WindowState | Memory, y1: Y) -> States:
        """The states of the window that has led to these, `(time, state)`."""
        if self.makes_single_steps:
            return ravel(y1)[0][None]
        return solver_state.ys

    def dense_infos(self, ends: tuple[Array, Array], infos: DenseInfo) -> DenseInfo:
        """The dense information of windows of one step, between `ends`."""
        return infos if self.makes_single_steps else windows_of_one_step(ends, infos)

    def step(
        self,
        terms: PyTree[diffrax.AbstractTerm],
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args,
        solver_state: WindowState | Memory,
        made_jump: BoolScalarLike,
    ) -> tuple[Y, Y | None, DenseInfo, WindowState | Memory, diffrax.RESULTS]:
        """Solves one window; arguments and result as for any diffrax solver."""
        return self.solve_window(terms, t0, t1, y0, args, solver_state, made_jump)[:-1]

    def solve_window(self, terms, t0, t1, y0, args, solver_state, made_jump) -> Any:
        """The same as `step`, and the `Statistics`."""
        inner, (flat, unravel) = self.inner_step(terms, y0, args), ravel(y0)
        optional = lambda error: None if error is None else unravel(error)
        num_steps = None if self.makes_single_steps else self.window_steps
        check_window_state(solver_state, num_steps)
        if num_steps is None:
            step, memory = single_step(inner, (t0, t1), flat, solver_state, made_jump)
            y1, error = unravel(step.y1), optional(step.error)
            assert step.result is not None
            count, chosen = jnp.array(0, int), (Sequential(), SequentialGradient())
            statistics = Statistics(count, None, count, step.result, *chosen)
            return y1, error, step.dense_info, memory, step.result, statistics
        ends = jnp.stack([jnp.asarray(t0), jnp.asarray(t1)])
        trajectory, state = self.solve_windows(inner, ends, y0, solver_state)
        y1, error = unravel(trajectory.ys[-1]), optional(trajectory.largest_error())
        ts = jnp.concatenate([trajectory.starts[:1], trajectory.ends])
        dense_info = {"ts": ts, "infos": trajectory.dense_infos}
        result = trajectory.result()
        return y1, error, dense_info, state, result, trajectory.statistics

    def solve_windows(
        self, inner: SolverStep, ends: Float[Array, " ends"], y0: Y, state: WindowState
    ) -> tuple[Trajectory, WindowState]:
        """Solves the windows between `ends` together; `state` is that of the solver."""
        grid, flat = self.places, ravel(y0)[0]
        check_errors(state, grid.measures_errors)
        nodes, state = grid.place(inner, ends, self.window_steps, flat, state)
        method = self.method or default_method(len(nodes[1]), flat.size)
        guess = jnp.zeros((len(nodes[1]), flat.size), flat.dtype)
        if method.uses_guess:
            local = method.sharded_scan is None
            guess = initial_guess(self.guess, inner.terms, nodes[1], y0, state, local)
        trajectory = solve_grid(inner, nodes, flat, guess, self.method, self.gradient)
        errors = grid.scaled_errors(trajectory) if grid.measures_errors else None
        return trajectory, window_state(trajectory, errors, state.error_bound)
