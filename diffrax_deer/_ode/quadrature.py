r"""Quadratures: the components that feed back into nothing.

If the vector field does not depend on the components q, $\dot z = f(t, z)$ and
$\dot q = g(t, z)$, then the Newton system is that of z alone, and a Runge-Kutta step
adds to q what does not depend on q:

$$q_n = q_0 + \sum_{m \le n} \Phi_q\bigl(x_m, (z_{m-1}, 0)\bigr),$$

a sum over what the steps of z yield beside their state. The log-density of a continuous
normalizing flow is such a component, or a running cost: with an exact trace its
Jacobian is most of the cost of an iteration (`experiments.quadratures`). They are found
in the dataflow of the vector field, leaf by leaf.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.extend as jex
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .._custom_types import (
    Args,
    Coupled,
    CoupledStates,
    RealScalarLike,
    Rest,
    State,
    States,
    Y,
)
from .._defaults import prefers_sequential_steps
from .._prefix import shift
from .._ravel import Unravel, ravel
from .._step_map import StepMap
from .rosenbrock_euler import ExponentialRosenbrockEuler
from .runge_kutta import Times, stage_state, tableau_of, time_of
from .solver_step import SolverStep, StepResult, with_aux

# Their steps add to such a component what does not depend on it.
_ADDITIVE = (
    diffrax.AbstractRungeKutta,
    diffrax.Euler,
    diffrax.ImplicitEuler,
    ExponentialRosenbrockEuler,
)


def _depends(jaxpr: Any, moves: list[bool]) -> list[bool]:
    """Which outputs depend on the inputs that move, by dataflow.

    Functions under `jax.jit` are looked into; in all else, every output depends on
    every input.
    """
    moved = {v for v, m in zip(jaxpr.invars, moves, strict=True) if m}
    has_moved = lambda v: not isinstance(v, jex.core.Literal) and v in moved
    for equation in jaxpr.eqns:
        inputs = [has_moved(v) for v in equation.invars]
        outputs = [any(inputs)] * len(equation.outvars)
        if equation.primitive.name == "jit" and any(inputs):
            outputs = _depends(equation.params["jaxpr"].jaxpr, inputs)
        moved |= {v for v, m in zip(equation.outvars, outputs, strict=True) if m}
    return [has_moved(v) for v in jaxpr.outvars]


def feeds_back(field: Callable[[Y], Y], y: Y) -> PyTree[bool]:
    """Whether `field` depends on it, for each leaf of `y`. By dataflow."""
    leaves, treedef = jax.tree.flatten(jax.tree.map(jnp.asarray, y))
    jaxpr = jax.make_jaxpr(field)(jax.tree.unflatten(treedef, leaves)).jaxpr
    alone = [[i == j for j in range(len(leaves))] for i in range(len(leaves))]
    return jax.tree.unflatten(treedef, [any(_depends(jaxpr, m)) for m in alone])


class _CoupledTerm(diffrax.AbstractTerm):
    """A term for the components that its vector field depends on.

    `rest` are the others, of any value; `None` in the place of those.
    """

    term: diffrax.AbstractTerm
    rest: Y

    def _coupled(self, y: Y) -> Y:
        is_none = lambda x: x is None
        return eqx.filter(y, jax.tree.map(is_none, self.rest, is_leaf=is_none))

    def vf(self, t: RealScalarLike, y: Y, args: Args) -> PyTree[Array]:
        return self.term.vf(t, eqx.combine(y, self.rest), args)

    def contr(self, t0: RealScalarLike, t1: RealScalarLike, **kwargs: Any) -> Any:
        return self.term.contr(t0, t1, **kwargs)

    def prod(self, vf: PyTree[Array], control: Any) -> Y:
        return self._coupled(self.term.prod(vf, control))

    def vf_prod(self, t: RealScalarLike, y: Y, args: Args, control: Any) -> Y:
        whole = self.term.vf_prod(t, eqx.combine(y, self.rest), args, control)
        return self._coupled(whole)


class Partition(eqx.Module):
    """The step of the coupled components z, and what to do about the others, q.

    - `whole`: the step of all components.
    - `coupled`: that of those on which the vector field depends.
    - `zeros`: zero in the place of the others; a pytree with `None` in that of z.
    """

    whole: SolverStep
    coupled: SolverStep
    zeros: Y

    def split(self, y: State) -> tuple[Coupled, Rest]:
        """The parts z, `(coupled,)`, and q, `(rest,)`, of a state `(state,)`."""
        is_none = lambda x: x is None
        mask = jax.tree.map(is_none, self.zeros, is_leaf=is_none)
        z, q = eqx.partition(self.whole.unravel(y), mask)
        return ravel(z)[0].astype(y.dtype), ravel(q)[0].astype(y.dtype)

    def join(self, z: Coupled, q: Rest) -> State:
        """The inverse of `split`."""
        rest = ravel(self.zeros)[1](q)
        return ravel(eqx.combine(self.coupled.unravel(z), rest))[0].astype(z.dtype)

    def _from_zero(self, z: Coupled) -> State:
        return self.join(z, ravel(self.zeros)[0].astype(z.dtype))

    def _full(self, x: Times, z: Coupled) -> StepResult:
        """The whole step from `z` and from q of zero."""
        tableau = tableau_of(self.coupled.solver)
        if tableau is None or (tableau.is_explicit and prefers_sequential_steps()):
            return self.whole.full(x, self._from_zero(z))
        return self._full_by_stages(x, z)

    def _full_by_stages(self, x: Times, z: Coupled) -> StepResult:
        """The same; only the stages of z are differentiated by their Jacobians."""
        ks, result = self.coupled.stages(x, z, by_jacobians=True)
        tableau = tableau_of(self.coupled.solver)
        assert tableau is not None
        field = jax.jit(lambda t, z: self.whole.product_at(x)(t, self._from_zero(z)))
        nodes = [jnp.asarray(time_of(c, x)) for c in tableau.c]
        states = [stage_state(row, z, ks) for row in tableau.a]
        together = lambda f, *args: jax.vmap(f)(*map(jnp.stack, args))
        each = map if prefers_sequential_steps() else together
        ks = list(each(field, nodes, states))
        return self.whole.finish(self._from_zero(z), ks, result)

    def step_map(self, z: Coupled) -> StepMap:
        """The step of z; it also yields that of all components, from q of zero."""
        inner = self.coupled.step_map(z)
        first = lambda y: self.split(y)[0]
        by_stages = with_aux(self._full_by_stages, first)
        return dataclasses.replace(
            inner,
            step_with_aux=with_aux(self._full, first),
            step_by_stages=inner.step_by_stages and by_stages,
            is_defined=lambda step: jnp.all(jnp.isfinite(step.y1)),
        )

    def complete(
        self, y0: State, zs: CoupledStates, steps: StepResult
    ) -> tuple[States, StepResult]:
        """The whole trajectory, `(time, state)`, from that of z, `(time, coupled)`.

        `steps` are those of `step_map`, zero where they were not solved.
        """
        _, q0 = self.split(y0)
        _, increments = jax.vmap(self.split)(steps.y1)
        qs = q0[None] + jnp.cumsum(increments, axis=0)
        ys = jax.vmap(self.join)(zs, qs)
        unravel = jax.vmap(self.whole.unravel)
        info = {"y0": unravel(shift(y0, ys)), "y1": unravel(ys)}
        return ys, steps._replace(y1=ys, dense_info=steps.dense_info | info)


def partition(inner: SolverStep, x: Times, y: State) -> Partition | None:
    """Divides the components of `y`; `None` if it has no quadratures.

    `x` are the times of any one step.
    """
    solver = inner.solver
    while type(solver) is diffrax.HalfSolver:
        solver = solver.solver
    if not inner.is_one_field or not issubclass(type(solver), _ADDITIVE):
        return None
    whole, control = inner.unravel(y), inner.terms.contr(*x)
    product = lambda y: inner.terms.vf_prod(x[0], y, inner.args, control)
    z, q = eqx.partition(whole, feeds_back(product, whole))
    # A field of quadratures alone has no system to be solved.
    if not jax.tree.leaves(z) or not jax.tree.leaves(q):
        return None
    zeros = jax.tree.map(jnp.zeros_like, q)
    is_term = lambda x: isinstance(x, diffrax.AbstractTerm)
    is_one = lambda x: is_term(x) and not isinstance(x, diffrax.MultiTerm)
    terms = jax.tree.map(
        lambda term: _CoupledTerm(term, zeros), inner.terms, is_leaf=is_one
    )
    unravel: Unravel = ravel(z)[1]
    return Partition(inner, SolverStep(inner.solver, terms, inner.args, unravel), zeros)


def left_out(parts: Partition | None, y: Y) -> PyTree[bool]:
    """Which leaves of `y` are quadratures."""
    if parts is None:
        return jax.tree.map(lambda _: False, y)
    found = lambda y, zero: jax.tree.map(lambda _: zero is not None, y)
    return jax.tree.map(found, y, parts.zeros, is_leaf=lambda x: x is None)
