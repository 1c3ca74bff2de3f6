r"""Step maps from diffrax's solvers: $\Phi$ is one step of the solver.

The result of a solve is then the sequential result of that solver on the same grid.
Everything is done on a flat, real state.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix as optx
from jax import lax
from jaxtyping import Array, Bool, PyTree

from .._custom_types import Args, DenseInfo, RealScalarLike, State
from .._defaults import MAX_COARSE_ERROR, MAX_STAGE_STATE, SMALLEST_SCALE_POWER
from .._diffrax_conventions import takes_controller_tolerances
from .._linalg.operand_order import arguments_first
from .._ravel import Unravel, ravel, rounding
from .._step_map import StepMap
from .runge_kutta import (
    Times,
    combine,
    evaluate_stages,
    solve_stages,
    tableau_of,
)


def _norm_of_scaled(x: PyTree[Array]) -> Array:
    """Marks a root finder whose equations are scaled by the state."""
    return optx.max_norm(x)


def prepare(solver: diffrax.AbstractSolver, eps: float) -> diffrax.AbstractSolver:
    """`solver` made ready to be differentiated in both modes and to be exact.

    Its stages run in a loop that admits forward and reverse mode (diffrax's adjoints
    see to that only for the solver they are given). A root finder that would take its
    tolerances from the step size controller becomes Newton's method, converged to
    rounding `eps`: the result of a step has to be a smooth function of the state, not
    only good enough for the controller.
    """
    if type(solver) is diffrax.HalfSolver:
        return diffrax.HalfSolver(prepare(solver.solver, eps))
    if isinstance(solver, diffrax.AbstractRungeKutta) and solver.scan_kind is None:
        is_none = lambda x: x is None
        solver = eqx.tree_at(lambda s: s.scan_kind, solver, "bounded", is_leaf=is_none)
    if isinstance(solver, diffrax.AbstractImplicitSolver):
        if takes_controller_tolerances(solver):
            # Quadratic: a last update of sqrt(eps) leaves an error of order eps. Not
            # `VeryChord`, which near rounding mistakes noise for divergence.
            root_finder = optx.Newton(eps**0.5, eps**0.5, norm=_norm_of_scaled)
            solver = eqx.tree_at(lambda s: s.root_finder, solver, root_finder)
    return solver


class StepResult(NamedTuple):
    """What a step yields.

    - `y1`, `(state,)`: the state at its end.
    - `error`, `(state,)`, or `None`: the estimate of its error.
    - `dense_info`: what the solver's interpolation is made from.
    - `result`: of the solver; `None` for stages that are explicit, which cannot fail.
    """

    y1: State
    error: State | None
    dense_info: DenseInfo
    result: diffrax.RESULTS | None


def _is_useful(y: State, result: StepResult) -> Bool[Array, ""]:
    """Whether a step from `y` is better than none."""
    if result.error is None:
        return jnp.array(True)
    largest = jnp.max(jnp.maximum(jnp.abs(y), jnp.abs(result.y1)))
    return jnp.max(jnp.abs(result.error)) <= MAX_COARSE_ERROR * largest


def with_aux(
    step: Callable[[Times, State], StepResult],
    state: Callable[[State], State] = lambda y: y,
) -> Callable:
    """`step` as a `StepMap` has it; `state` takes its part of the whole state."""

    def step_with_aux(x: Times, y: State) -> tuple[State, StepResult]:
        result = step(x, y)
        return state(result.y1), result

    return step_with_aux


class SolverStep(eqx.Module):
    """One step of a diffrax solver on the flat state; `x` is the pair of its times."""

    solver: diffrax.AbstractSolver
    terms: PyTree[diffrax.AbstractTerm]
    args: Args
    unravel: Unravel

    @property
    def is_one_field(self) -> bool:
        """Whether there is one vector field, not several as for `SemiImplicitEuler`."""
        return isinstance(self.terms, diffrax.AbstractTerm)

    @property
    def is_implicit(self) -> bool:
        """Whether the step solves equations of its own."""
        # Unlike `type` this looks into a `HalfSolver`.
        return isinstance(self.solver, diffrax.AbstractImplicitSolver)

    @property
    def is_scaled(self) -> bool:
        """Whether an implicit step is solved for in units of the state."""
        if tableau_of(self.solver) is None or not self.is_one_field:
            return False
        root_finder = getattr(self.solver, "root_finder", None)
        return getattr(root_finder, "norm", None) is _norm_of_scaled

    def has_memory(self, x: Times, y: State) -> bool:
        """Whether a step depends on more than its times and its state.

        What a Runge-Kutta method keeps is known to be of no influence.
        """
        solver: Any = self.solver
        while type(solver) is diffrax.HalfSolver:
            solver = solver.solver
        if isinstance(solver, diffrax.AbstractRungeKutta):
            return False
        y0 = self.unravel(y)
        state = eqx.filter_eval_shape(solver.init, self.terms, *x, y0, self.args)
        return bool(jax.tree.leaves(state))

    def increment(self, x: Times, y: State) -> State:
        """The vector field in the middle of the step, times the length of the step."""
        t0, t1 = x
        return self.product_at(x)(t0 + (t1 - t0) / 2, y)

    def field(self, t: RealScalarLike, y: State) -> PyTree[Any]:
        """The vector field, in the form that its term gives it."""
        return self.terms.vf(t, self.unravel(y), self.args)

    def product_at(self, x: Times) -> Callable[[RealScalarLike, State], State]:
        """The vector field, times the length of the step between `x`."""
        # In terms of controls, not of `t1 - t0`: backwards in time the sign is there.
        control = self.terms.contr(*x)

        def product(t: RealScalarLike, y: State) -> State:
            out = self.terms.vf_prod(t, self.unravel(y), self.args, control)
            return ravel(out)[0].astype(y.dtype)

        return arguments_first(product)

    def step(self, x: Times, y: State) -> State:
        """The state at the end of the step."""
        return self.full(x, y).y1

    def coarse_step(self, first: Times, last: Times, y: State) -> State:
        """One step over several; infinite where it by its own estimate is of no use."""
        (t0, _), (_, t1) = first, last
        result = self.full((t0, t1), y)
        return jnp.where(_is_useful(y, result), result.y1, jnp.inf)

    def coarse_interpolate(
        self, first: Times, last: Times, x: Times, y: State
    ) -> State:
        """The dense output of such a step, at the end of one that it covers."""
        (t0, _), (_, t1) = first, last
        result = self.full((t0, t1), y)
        path = self.solver.interpolation_cls(t0=t0, t1=t1, **result.dense_info)
        predicted = ravel(path.evaluate(x[1]))[0]
        return jnp.where(_is_useful(y, result), predicted, jnp.inf)

    def full(self, x: Times, y: State) -> StepResult:
        """A step, with all that it yields."""
        return self._full(x, y, by_jacobians=False)

    def full_by_stages(self, x: Times, y: State) -> StepResult:
        """`full`, with a derivative that is found from the Jacobians of its stages."""
        return self._full(x, y, by_jacobians=True)

    def step_map(self, y: State) -> StepMap:
        """The step of states like `y`, for the iteration and for the derivative."""
        has_stages = tableau_of(self.solver) is not None and self.is_one_field
        # A large state has no array of shape `(state, state)`.
        has_stages = has_stages and y.size <= MAX_STAGE_STATE
        return StepMap(
            self.step,
            self.increment if self.is_one_field else None,
            with_aux(self.full),
            with_aux(self.full_by_stages) if has_stages else None,
            self.coarse_step,
            self.coarse_interpolate,
            is_implicit=self.is_implicit,
            eps=rounding(self.unravel(y)),
        )

    def _full(self, x: Times, y: State, by_jacobians: bool) -> StepResult:
        if tableau_of(self.solver) is None or not self.is_one_field:
            y1, error, dense_info, result = self._general(x, y)
            return StepResult(y1, error, dense_info, result)
        return self.finish(y, *self.stages(x, y, by_jacobians))

    def stages(
        self, x: Times, y: State, by_jacobians: bool
    ) -> tuple[list[State], diffrax.RESULTS]:
        """The field at each stage, times the length of the step, and the result.

        Differentiated by the Jacobians of the stages if they are implicit, or if
        `by_jacobians`.
        """
        tableau = tableau_of(self.solver)
        assert tableau is not None
        field = lambda x, t, y: self.product_at(x)(t, y)
        if tableau.is_explicit and not by_jacobians:
            return evaluate_stages(field, None, x, y, tableau=tableau)
        # So that all they close over is an argument, which is differentiated.
        field, solve = eqx.filter_closure_convert(field, x, x[0], y), None
        if not tableau.is_explicit:
            solve = eqx.filter_closure_convert(self._implicit_stages, x, y)
        return solve_stages(field, solve, x, y, tableau=tableau)

    def finish(self, y: State, ks: list[State], result: diffrax.RESULTS) -> StepResult:
        """The step from its stages."""
        tableau = tableau_of(self.solver)
        assert tableau is not None
        y1 = self._representable(y + combine(tableau.b, ks, y))
        error = combine(tableau.b_error, ks, y)
        if not tableau.is_explicit:
            succeeded = result == diffrax.RESULTS.successful
            error = jnp.where(succeeded, error, jnp.inf)
        dense_info = {"y0": self.unravel(y), "y1": self.unravel(y1)}
        if isinstance(self.solver, diffrax.AbstractRungeKutta):
            dense_info["k"] = jax.vmap(self.unravel)(jnp.stack(ks))
        return StepResult(
            y1, error, dense_info, None if tableau.is_explicit else result
        )

    def _representable(self, y: State) -> State:
        """Infinite where it is in a leaf, whose type may be narrower than that of y."""
        leaves = jax.tree.leaves(jax.eval_shape(self.unravel, y))
        largest = lambda x: float(jnp.finfo(x.dtype).max)
        if all(largest(x) >= largest(y) for x in leaves):
            return y
        as_leaves, _ = ravel(self.unravel(y))
        return jnp.where(jnp.isfinite(as_leaves), y, as_leaves)

    def _implicit_stages(
        self, x: Times, y: State
    ) -> tuple[list[State], diffrax.RESULTS]:
        product = self.product_at(x)
        k0 = product(x[0], y)
        step, scale, times = self, jnp.ones_like(y), x
        if self.is_scaled:
            # The root finder's tolerance is absolute. Without units is the same step
            # from time 0 to 1, of a state in powers of two of its size.
            size = jnp.maximum(jnp.abs(y), jnp.abs(k0))
            floor = rounding(self.unravel(y)) ** SMALLEST_SCALE_POWER * jnp.max(size)
            size = jnp.maximum(size, floor)
            size = jnp.where((size > 0) & jnp.isfinite(size), size, 1)
            scale = lax.stop_gradient(jnp.ldexp(scale, jnp.frexp(size)[1]))
            start, end = jnp.asarray(x[0]), jnp.asarray(x[1])

            def field(t, u, _):
                inside = start + t.astype(start.dtype) * (end - start)
                return product(jnp.where(t == 1, end, inside), scale * u) / scale

            times = jnp.zeros((), y.dtype), jnp.ones((), y.dtype)
            step = SolverStep(self.solver, diffrax.ODETerm(field), None, ravel(y)[1])
        u1, _, info, result = step._general(times, y / scale)
        if "k" in info:
            return list(jax.vmap(lambda k: scale * ravel(k)[0])(info["k"])), result
        return [k0, scale * u1 - y], result

    def _general(
        self, x: Times, y: State
    ) -> tuple[State, State | None, DenseInfo, diffrax.RESULTS]:
        t0, t1 = x
        y0 = self.unravel(y)
        state = self.solver.init(self.terms, t0, t1, y0, self.args)
        y1, y_error, dense_info, _, result = self.solver.step(
            self.terms, t0, t1, y0, self.args, state, made_jump=False
        )
        error = None if y_error is None else ravel(y_error)[0]
        return ravel(y1)[0], error, dense_info, result
