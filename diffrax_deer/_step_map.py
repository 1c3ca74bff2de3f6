r"""Step maps from diffrax's solvers: $\Phi$ is one step of the solver.

The result of a solve is then the sequential result of that solver on the same grid.
Everything is done on a flat, real state: pytrees are ravelled here and nowhere else.
"""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array, PyTree

from ._custom_types import Args, DenseInfo, Matrix, RealScalarLike, State, Y
from ._dirk import Tableau, combine, dirk_jacobian, tableau_of, time_of
from ._linearization import value_and_jacobian

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

    def increment(self, x: tuple[RealScalarLike, RealScalarLike], y: State) -> State:
        """The vector field in the middle of the step, times the length of the step."""
        t0, t1 = x
        control = self.terms.contr(t0, t1)
        middle = t0 + (t1 - t0) / 2
        return self.product(middle, y, control)

    def product(self, t: RealScalarLike, y: State, control: PyTree[Any]) -> State:
        """The product of the vector field and of a `control` of the terms."""
        # In terms of controls, not of `t1 - t0`: backwards in time the sign is there.
        out = self.terms.vf_prod(t, self.unravel(y), self.args, control)
        return ravel(out)[0].astype(y.dtype)

    def step(self, x: tuple[RealScalarLike, RealScalarLike], y: State) -> State:
        """The state at the end of the step."""
        return self.full(x, y)[0]

    def jacobian(self, x: tuple[RealScalarLike, RealScalarLike], y: State) -> Matrix:
        """The derivative of the step with respect to the state, `(state, state)`."""
        tableau = tableau_of(self.solver)
        if tableau is None or not self.is_one_field:
            return value_and_jacobian(lambda y: self.step(x, y), y)[1]
        control = self.terms.contr(*x)
        product = lambda t, y: self.product(t, y, control)
        return dirk_jacobian(tableau, product, *self._solved_stages(tableau, x, y))

    def _solved_stages(
        self, tableau: Tableau, x: tuple[RealScalarLike, RealScalarLike], y: State
    ) -> tuple[list[RealScalarLike], list[State]]:
        """Times and states at which the step evaluates the field."""
        # `type`: a wrapped solver answers `isinstance` in the name of its inner one.
        if issubclass(type(self.solver), diffrax.AbstractERK):
            return self._explicit_stages(x, y)[:2]
        y1, _, info, _ = self.full(x, y)
        ks = (y1 - y)[None]
        if "k" in info:
            ks = jax.vmap(lambda k: ravel(k)[0])(info["k"])
        times = [time_of(c, x) for c in tableau.c]
        return times, [combine(row, ks, y) for row in tableau.a]

    def nodes(
        self, x: tuple[RealScalarLike, RealScalarLike], y: State
    ) -> list[tuple[float, RealScalarLike, State]] | None:
        """Weights, times and states of the quadrature that a step makes of the field.

        `None` if the step is not that of a Runge-Kutta method.
        """
        tableau = tableau_of(self.solver)
        if tableau is None:
            return None
        stages = zip(tableau.b, *self._solved_stages(tableau, x, y), strict=True)
        return [(float(weight), t, y) for weight, t, y in stages if weight != 0]

    def leap(
        self,
        first: tuple[RealScalarLike, RealScalarLike],
        last: tuple[RealScalarLike, RealScalarLike],
        x: tuple[RealScalarLike, RealScalarLike],
        y: State,
    ) -> State:
        """One step over several, and its dense output at the end of one of them.

        NaN where the step is by its own estimate of no use.
        """
        (t0, _), (_, t1) = first, last
        y1, error, dense_info, _ = self.full((t0, t1), y)
        path = self.solver.interpolation_cls(t0=t0, t1=t1, **dense_info)
        predicted = ravel(path.evaluate(x[1]))[0]
        if error is None:
            return predicted
        largest = jnp.max(jnp.maximum(jnp.abs(y), jnp.abs(y1)))
        useful = jnp.max(jnp.abs(error)) <= _USEFUL * largest
        return jnp.where(useful, predicted, jnp.nan)

    def full(
        self, x: tuple[RealScalarLike, RealScalarLike], y: State
    ) -> tuple[State, State | None, DenseInfo, diffrax.RESULTS]:
        """A step with its error estimate, dense information and result."""
        # `type`: a wrapped solver answers `isinstance` in the name of its inner one.
        if issubclass(type(self.solver), diffrax.AbstractERK):
            return self._explicit(x, y)
        return self._general(x, y)

    def _general(self, x, y):
        t0, t1 = x
        y0 = self.unravel(y)
        state = self.solver.init(self.terms, t0, t1, y0, self.args)
        y1, y_error, dense_info, _, result = self.solver.step(
            self.terms, t0, t1, y0, self.args, state, made_jump=False
        )
        error = None if y_error is None else ravel(y_error)[0]
        return ravel(y1)[0], error, dense_info, result

    def _explicit_stages(
        self, x: tuple[RealScalarLike, RealScalarLike], y: State
    ) -> tuple[list[RealScalarLike], list[State], list[State]]:
        """Times, states, and the field there times the length of the step."""
        # Unrolled: diffrax runs the stages in a loop, which costs twice the time
        # forward and about ten times in a Jacobian.
        tableau = self.solver.tableau  # pyright: ignore
        control = self.terms.contr(*x)
        # Traced once, and differentiated once, for all stages; XLA inlines it.
        product = jax.jit(lambda t, y: self.product(t, y, control))
        times, states, ks = [x[0]], [y], [product(x[0], y)]
        for a, c in zip(tableau.a_lower, tableau.c, strict=True):
            times.append(time_of(c, x))
            states.append(y + combine(a, ks, jnp.zeros_like(y)))
            ks.append(product(times[-1], states[-1]))
        return times, states, ks

    def _explicit(self, x, y):
        tableau = self.solver.tableau  # pyright: ignore
        _, states, ks = self._explicit_stages(x, y)
        weighted = lambda weights: combine(weights, ks, jnp.zeros_like(y))
        y1 = states[-1] if tableau.ssal else y + weighted(tableau.b_sol)
        stacked = jax.vmap(self.unravel)(jnp.stack(ks))
        dense_info = {"y0": self.unravel(y), "y1": self.unravel(y1), "k": stacked}
        error = weighted(tableau.b_error)
        return y1, error, dense_info, diffrax.RESULTS.successful
