"""A window of one step: that of the inner solver, with what it hands on to the next.

The stages of an explicit Runge-Kutta method are unrolled: diffrax runs them in a loop,
which costs twice the time. Implicit ones are solved for in units of the state, unless
the root finder has tolerances of its own. Any other solver makes its own step.
"""

from typing import Any

import diffrax
import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import optimistix as optx
from jax import lax
from jaxtyping import PyTree

from .._custom_types import BoolScalarLike, RealScalarLike, State
from .._ravel import ravel
from .runge_kutta import Times, stage_state, tableau_of, time_of
from .solver_step import SolverStep, StepResult

# The state of the inner solver, or what `first_memory` has in its place.
Memory = PyTree[Any]


def _hands_on_last_stage(inner: SolverStep, t0: RealScalarLike, y: State) -> bool:
    """Whether the last stage of a step is the first one of the next (FSAL)."""
    # The products of an expensive field are found without the field itself.
    is_expensive = inner.terms.is_vf_expensive(t0, t0, inner.unravel(y), inner.args)
    return inner.solver.tableau.fsal and not is_expensive  # pyright: ignore


def _is_own(inner: SolverStep) -> bool:
    """Whether the step is made here: an explicit one, or one that is scaled."""
    tableau = tableau_of(inner.solver)
    if tableau is None or not inner.is_one_field:
        return False
    return tableau.is_explicit or inner.is_scaled


def first_memory(
    inner: SolverStep, t0: RealScalarLike, t1: RealScalarLike, y: State
) -> Memory:
    """Before the first step: for FSAL, whether that is so, and the field after it."""
    if not _is_own(inner):
        y0 = inner.unravel(y)
        return inner.solver.init(inner.terms, t0, t1, y0, inner.args)
    if inner.is_scaled or not _hands_on_last_stage(inner, t0, y):
        return None
    field = eqx.filter_eval_shape(inner.field, t0, y)
    return jnp.array(True), jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), field)


def single_step(
    inner: SolverStep,
    x: Times,
    y: State,
    memory: Memory,
    made_jump: BoolScalarLike,
) -> tuple[StepResult, Memory]:
    """The step of `inner.full`, and what the next one needs of it.

    Without a value it has failed, with an infinite error.
    """
    if not _is_own(inner):
        t0, t1 = x
        y1, error, info, memory, result = inner.solver.step(
            inner.terms, t0, t1, inner.unravel(y), inner.args, memory, made_jump
        )
        error = None if error is None else ravel(error)[0]
        step = StepResult(ravel(y1)[0], error, info, result)
    elif memory is None:
        step = inner.full(x, y)
    else:
        ks, memory = _stages(inner, x, y, memory, made_jump)
        step = inner.finish(y, ks, diffrax.RESULTS.successful)
    result = diffrax.RESULTS.successful if step.result is None else step.result
    finite = jnp.all(jnp.isfinite(step.y1))
    failure = diffrax.RESULTS.promote(optx.RESULTS.nonfinite)
    result = diffrax.RESULTS.where(finite, result, failure)
    error = None if step.error is None else jnp.where(finite, step.error, jnp.inf)
    return StepResult(step.y1, error, step.dense_info, result), memory


def _stages(
    inner: SolverStep, x: Times, y: State, memory: Memory, made_jump: BoolScalarLike
) -> tuple[list[State], Memory]:
    """The stages of an explicit method, of which the first may be known."""
    tableau = tableau_of(inner.solver)
    assert tableau is not None
    is_first, last = memory
    control, field = inner.terms.contr(*x), jax.jit(lambda t, y: inner.field(t, y))
    product = lambda f: ravel(inner.terms.prod(f, control))[0].astype(y.dtype)
    unknown = eqxi.unvmap_any(is_first | made_jump)
    last = lax.cond(unknown, lambda: field(x[0], y), lambda: last)
    ks = [product(last)]
    for row, c in zip(tableau.a[1:], tableau.c[1:], strict=True):
        last = field(time_of(c, x), stage_state(row, y, ks))
        ks.append(product(last))
    return ks, (jnp.array(False), last)
