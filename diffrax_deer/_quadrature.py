r"""Quadratures: the components that feed back into nothing.

If the vector field does not depend on the components q, $\dot z = f(t, z)$ and
$\dot q = g(t, z)$, then the Newton system is that of z alone, and a Runge-Kutta step
adds to q what does not depend on q:

$$q_n = q_0 + \sum_{m \le n} \Phi_q\bigl(x_m, (z_{m-1}, 0)\bigr),$$

a sum over the converged trajectory, by the quadrature of the step map itself. The
log-density of a continuous normalizing flow is such a component, a running cost, the
gradient of the parameters in an adjoint equation. They are found in the dataflow of the
vector field, leaf by leaf.
"""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array, PyTree

from ._causal import hold, prefix
from ._custom_types import (
    Args,
    Coupled,
    CoupledStates,
    RealScalarLike,
    Rest,
    State,
    States,
    Y,
)
from ._dataflow import influences, without_dead_code
from ._exponential import ExponentialRosenbrockEuler
from ._implicit import linearization_points
from ._newton import Statistics
from ._runge_kutta import Times, combine, tableau_of, time_of
from ._step_map import SolverStep, ravel

# Their steps add to such a component what does not depend on it.
_ADDITIVE = (
    diffrax.AbstractRungeKutta,
    diffrax.Euler,
    diffrax.ImplicitEuler,
    ExponentialRosenbrockEuler,
)


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
        whole = lambda t, y: self.term.vf_prod(
            t, eqx.combine(y, self.rest), args, control
        )
        return without_dead_code(lambda t, y: self._coupled(whole(t, y)))(t, y)


class Partition(eqx.Module):
    """The step of the coupled components, and what to do about the others.

    - `whole`: the step of all components.
    - `coupled`: that of those on which the vector field depends, z.
    - `zeros`: in the place of the others, q; a pytree with `None` in that of z.
    """

    whole: SolverStep
    coupled: SolverStep
    zeros: Y

    @property
    def is_trivial(self) -> bool:
        """Whether there are no others."""
        return not jax.tree.leaves(self.zeros)

    def undivided(self) -> "Partition":
        """The step of all components, without any others."""
        nothing = jax.tree.map(lambda _: None, self.zeros)
        return Partition(self.whole, self.whole, nothing)

    def split(self, y: State) -> tuple[Coupled, Rest]:
        """The parts z, `(coupled,)`, and q, `(rest,)`, of a state `(state,)`."""
        is_none = lambda x: x is None
        mask = jax.tree.map(is_none, self.zeros, is_leaf=is_none)
        z, q = eqx.partition(self.whole.unravel(y), mask)
        return ravel(z)[0], ravel(q)[0]

    def join(self, z: Coupled, q: Rest) -> State:
        """The inverse of `split`."""
        rest = ravel(self.zeros)[1](q)
        return ravel(eqx.combine(self.coupled.unravel(z), rest))[0]

    def increment(self, x: Times, z: Coupled, stages: list[Coupled]) -> Rest:
        """What a step from `z`, `(coupled,)`, adds to q, `(rest,)`.

        `stages` are those of the step of z, each `(coupled,)`.
        """
        zero, _ = ravel(self.zeros)
        whole = lambda t, z: self.whole.product_at(x)(t, self.join(z, zero))
        tableau = tableau_of(self.coupled.solver)
        if tableau is None:
            return self.split(self.whole.step(x, self.join(z, zero)))[1]
        # Not all nodes at once: that many times the memory, which costs more time.
        field = jax.jit(without_dead_code(lambda t, z: self.split(whole(t, z))[1]))
        values = [
            field(time_of(node, x), stage) if weight != 0 else zero
            for weight, node, stage in zip(tableau.b, tableau.c, stages, strict=True)
        ]
        return combine(tableau.b, values, zero)

    def complete(
        self,
        y0: State,
        xs: PyTree[Array],
        zs: CoupledStates,
        stages: list[CoupledStates],
        statistics: Statistics,
        idle: PyTree[Array],
        may_be_rejected: bool,
    ) -> tuple[States, Statistics]:
        """The whole trajectory, `(time, state)`, from that of z and its stages.

        `zs` and each of `stages` are `(time, coupled)`. Differentiable.

        A step counts as solved if both are finite. If it `may_be_rejected` because q is
        not, its derivative has to be finite: that costs one more evaluation.
        """
        z0, q0 = self.split(y0)

        def sums(statistics, stages):
            points = linearization_points(z0, xs, zs, statistics, idle)
            increments = jax.vmap(self.increment)(*points, stages)
            qs = jnp.cumsum(jnp.concatenate([q0[None], increments]), axis=0)[1:]
            num_finite = prefix(jnp.all(jnp.isfinite(qs), axis=-1))
            num_solved = jnp.minimum(statistics.num_solved, num_finite)
            result = optx.RESULTS.where(
                num_finite < statistics.num_solved,
                optx.RESULTS.nonfinite,
                statistics.result,
            )
            changes = num_solved, result
            return qs, eqx.tree_at(
                lambda s: (s.num_solved, s.result), statistics, changes
            )

        if may_be_rejected:
            statistics = jax.lax.stop_gradient(sums(statistics, stages)[1])
            finite = jnp.arange(len(zs))[:, None] < statistics.num_solved
            start = jax.lax.stop_gradient(z0)
            stages = [jnp.where(finite, stage, start) for stage in stages]
        qs, statistics = sums(statistics, stages)
        zs = hold(z0, zs, statistics.num_solved)
        qs = hold(q0, qs, statistics.num_solved)
        return jax.vmap(self.join)(zs, qs), statistics


def partition(
    inner: SolverStep, x: tuple[RealScalarLike, RealScalarLike], y: Y
) -> Partition:
    """Divides the components of `y`; `x` are the times of any one step."""
    y = jax.tree.map(jnp.asarray, y)
    solver = inner.solver
    while type(solver) is diffrax.HalfSolver:
        solver = solver.solver
    is_coupled = jax.tree.map(lambda _: True, y)
    if inner.is_one_field and issubclass(type(solver), _ADDITIVE):
        control = inner.terms.contr(*x)
        product = lambda y: inner.terms.vf_prod(x[0], y, inner.args, control)
        is_coupled = influences(product, y)
        tableau = tableau_of(solver)
        is_explicit = tableau is not None and tableau.is_explicit
        if not is_explicit and not any(jax.tree.leaves(is_coupled)):
            # What solves equations of its own cannot solve none.
            is_coupled = jax.tree.map(lambda _: True, y)
    z, q = eqx.partition(y, is_coupled)
    zeros = jax.tree.map(jnp.zeros_like, q)
    if not jax.tree.leaves(zeros):
        return Partition(inner, inner, zeros)
    is_term = lambda x: isinstance(x, diffrax.AbstractTerm)
    is_one = lambda x: is_term(x) and not isinstance(x, diffrax.MultiTerm)
    terms = jax.tree.map(
        lambda term: _CoupledTerm(term, zeros), inner.terms, is_leaf=is_one
    )
    coupled = SolverStep(inner.solver, terms, inner.args, ravel(z)[1])
    return Partition(inner, coupled, zeros)
