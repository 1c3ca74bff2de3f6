r"""Step maps from diffrax's solvers: $\Phi$ is one step of the solver.

The result of a solve is then the sequential result of that solver on the same grid.
Everything is done on a flat, real state: pytrees are ravelled here and nowhere else.
"""

from collections.abc import Callable
from typing import NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array, Bool, PyTree

from ._custom_types import Args, DenseInfo, RealScalarLike, State, Y
from ._dataflow import arguments_first
from ._implicit import MOST_DIRECT
from ._runge_kutta import (
    Times,
    combine,
    evaluate_stages,
    solve_stages,
    stage_state,
    tableau_of,
)

# How `diffrax` marks a root finder whose tolerances are still to be filled in.
_TO_BE_FILLED_IN = diffrax.with_stepsize_controller_tols(diffrax.VeryChord)().rtol

# An error relative to the state with which a step is still better than none.
_USEFUL = 0.1


def widest(*dtypes: jnp.dtype) -> jnp.dtype:
    """The floating type of most bits; promotion may be strict, and would refuse."""
    return max(dtypes, key=lambda dtype: jnp.finfo(dtype).bits)


def ravel(y: Y) -> tuple[State, Callable[[State], Y]]:
    """The leaves of `y` as one real vector, and the way back.

    Complex leaves become their real and imaginary parts. The vector has the widest
    floating type of the leaves, at least float32; each leaf gets its own type back.
    Unlike `jax.flatten_util.ravel_pytree` it takes mixed types under strict promotion.
    """
    leaves, treedef = jax.tree.flatten(y)
    leaves = [jnp.asarray(x) for x in leaves]
    reals = [jnp.finfo(x.dtype).dtype for x in leaves]
    dtype = widest(jnp.dtype("float32"), *reals)

    def flatten(x: Array) -> Array:
        parts = [x.real, x.imag] if jnp.iscomplexobj(x) else [x]
        return jnp.concatenate([part.reshape(-1).astype(dtype) for part in parts])

    def unravel(flat: State) -> Y:
        out, start = [], 0
        for x, real in zip(leaves, reals, strict=True):
            width = x.size * (2 if jnp.iscomplexobj(x) else 1)
            part = flat[start : start + width].astype(real)
            if jnp.iscomplexobj(x):
                part = jax.lax.complex(part[: x.size], part[x.size :])
            out.append(part.reshape(x.shape))
            start += width
        return jax.tree.unflatten(treedef, out)

    flat = jnp.concatenate([flatten(x) for x in leaves]) if leaves else jnp.zeros(0)
    return flat, unravel


def promoted(y: Y, *times: RealScalarLike) -> Y:
    """The leaves with the type that `diffrax.diffeqsolve` gives an initial value."""
    with jax.numpy_dtype_promotion("standard"):
        time = jnp.result_type(*times)
        if not jnp.issubdtype(time, jnp.floating):
            time = jnp.result_type(float)
        return jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x, time)), y)


def rounding(y: Y) -> float:
    """The rounding unit of the coarsest floating type in `y`."""
    dtypes = [jnp.result_type(x) for x in jax.tree.leaves(y)] or [jnp.dtype("float32")]
    return max(float(jnp.finfo(d).eps) for d in dtypes)


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
        if solver.root_finder.rtol is _TO_BE_FILLED_IN:
            # Quadratic: a last update of sqrt(eps) leaves an error of order eps. Not
            # `VeryChord`, which near rounding mistakes noise for divergence.
            root_finder = optx.Newton(rtol=eps**0.5, atol=eps**0.5)
            solver = eqx.tree_at(lambda s: s.root_finder, solver, root_finder)
    return solver


class StepResult(NamedTuple):
    """What a step yields.

    - `y1`, `(state,)`: the state at its end.
    - `error`, `(state,)`, or `None`: the estimate of its error.
    - `dense_info`: what the solver's interpolation is made from.
    - `result`: of the solver; `None` for stages that are explicit, which cannot fail.
    - `stages`: the state at each stage, `(state,)`; none unless it is a Runge-Kutta
        method.
    """

    y1: State
    error: State | None
    dense_info: DenseInfo
    result: diffrax.RESULTS | None
    stages: list[State]


def _is_useful(y: State, result: StepResult) -> Bool[Array, ""]:
    """Whether a step from `y` is better than none."""
    if result.error is None:
        return jnp.array(True)
    largest = jnp.max(jnp.maximum(jnp.abs(y), jnp.abs(result.y1)))
    return jnp.max(jnp.abs(result.error)) <= _USEFUL * largest


class SolverStep(eqx.Module):
    """One step of a diffrax solver on the flat state; `x` is the pair of its times."""

    solver: diffrax.AbstractSolver
    terms: PyTree[diffrax.AbstractTerm]
    args: Args
    unravel: Callable[[State], Y] = eqx.field(static=True)

    @property
    def is_one_field(self) -> bool:
        """Whether there is one vector field, not several as for `SemiImplicitEuler`."""
        return isinstance(self.terms, diffrax.AbstractTerm)

    @property
    def is_implicit(self) -> bool:
        """Whether the step solves equations of its own."""
        # Unlike `type` this looks into a `HalfSolver`.
        return isinstance(self.solver, diffrax.AbstractImplicitSolver)

    def increment(self, x: Times, y: State) -> State:
        """The vector field in the middle of the step, times the length of the step."""
        t0, t1 = x
        return self.product_at(x)(t0 + (t1 - t0) / 2, y)

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

    def leap(self, first: Times, last: Times, y: State) -> State:
        """One step over several; NaN where it is by its own estimate of no use."""
        (t0, _), (_, t1) = first, last
        result = self.full((t0, t1), y)
        return jnp.where(_is_useful(y, result), result.y1, jnp.nan)

    def between(self, first: Times, last: Times, x: Times, y: State) -> State:
        """The dense output of such a step, at the end of one that it covers."""
        (t0, _), (_, t1) = first, last
        result = self.full((t0, t1), y)
        path = self.solver.interpolation_cls(t0=t0, t1=t1, **result.dense_info)
        predicted = ravel(path.evaluate(x[1]))[0]
        return jnp.where(_is_useful(y, result), predicted, jnp.nan)

    def full(self, x: Times, y: State, stages_at_once: bool = False) -> StepResult:
        """A step, with all that it yields.

        `stages_at_once` if its derivative is to be found from the Jacobians of its
        stages: the better way to find that of the step, not to apply it once. That of
        an implicit step always is.
        """
        tableau = tableau_of(self.solver)
        if tableau is None or not self.is_one_field:
            y1, error, dense_info, result = self._general(x, y)
            return StepResult(y1, error, dense_info, result, [])
        field = lambda x, t, y: self.product_at(x)(t, y)
        solve = None if tableau.is_explicit else self._implicit_stages
        evaluate = evaluate_stages
        # A large state has no array of shape `(state, state)`.
        if solve is not None or (stages_at_once and y.size <= MOST_DIRECT):
            # So that all they close over is an argument, which is differentiated.
            field = eqx.filter_closure_convert(field, x, x[0], y)
            solve = solve and eqx.filter_closure_convert(solve, x, y)
            evaluate = solve_stages
        ks, result = evaluate(field, solve, x, y, tableau=tableau)
        y1 = self._representable(y + combine(tableau.b, ks, y))
        error = combine(tableau.b_error, ks, y)
        if tableau.is_explicit:
            result = None
        else:
            okay = result == diffrax.RESULTS.successful
            error = jnp.where(okay, error, jnp.inf)
        dense_info = {"y0": self.unravel(y), "y1": self.unravel(y1)}
        if isinstance(self.solver, diffrax.AbstractRungeKutta):
            dense_info["k"] = jax.vmap(self.unravel)(jnp.stack(ks))
        stages = [stage_state(row, y, ks) for row in tableau.a]
        return StepResult(y1, error, dense_info, result, stages)

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
        y1, _, info, result = self._general(x, y)
        if "k" in info:
            return list(jax.vmap(lambda k: ravel(k)[0])(info["k"])), result
        return [self.product_at(x)(x[0], y), y1 - y], result

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
