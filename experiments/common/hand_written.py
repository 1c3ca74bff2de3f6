"""Dopri5 as one writes it by hand: equal steps in one `jax.lax.scan`, and no more.

No loop of diffrax's, no error estimate, no interpolation; differentiated by JAX. What
the steps cost at the least, given all states, is `all_steps`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

Field = Callable[[Any, Any, Any], Any]

_TABLEAU = diffrax.Dopri5.tableau


def _stage(y: Any, h: float, coefficients: Any, slopes: Sequence[Any]) -> Any:
    known = [(float(c), k) for c, k in zip(coefficients, slopes, strict=True) if c != 0]
    factors = [factor for factor, _ in known]

    def combine(y, *slopes):
        terms = (c * k for c, k in zip(factors, slopes, strict=True))
        return y + h * sum(terms)

    return jax.tree.map(combine, y, *(slope for _, slope in known))


def step(
    field: Field, t: Any, h: float, y: Any, slope: Any, params: Any
) -> tuple[Any, Any]:
    """One step of length `h` from `t`.

    Args:
        field: the vector field, of time, state and parameters.
        t: the time before the step.
        h: the length of the step.
        y: the state before the step.
        slope: the field there, since the last stage of the step before has found it.
        params: the parameters.

    Returns:
        The state after the step, and the field there.
    """
    stage, slopes = y, [slope]
    for coefficients, c in zip(_TABLEAU.a_lower, _TABLEAU.c, strict=True):
        stage = _stage(y, h, coefficients, slopes)
        slopes.append(field(t + float(c) * h, stage, params))
    # The last stage is the result: first same as last.
    return stage, slopes[-1]


def _beginnings(t0: float, h: float, num_steps: int) -> Array:
    return t0 + h * jnp.arange(num_steps)


def trajectory(
    field: Field, t0: float, t1: float, num_steps: int, y0: Any, params: Any
) -> PyTree[Array]:
    """The states after each step, with a leading axis `time`."""
    h = (t1 - t0) / num_steps

    def advance(carry, t):
        y, slope = carry
        y, slope = step(field, t, h, y, slope, params)
        return (y, slope), y

    start = y0, field(t0, y0, params)
    return jax.lax.scan(advance, start, _beginnings(t0, h, num_steps))[1]


def final(
    field: Field, t0: float, t1: float, num_steps: int, y0: Any, params: Any
) -> PyTree[Array]:
    """The state after the last step alone."""
    h = (t1 - t0) / num_steps
    advance = lambda carry, t: (step(field, t, h, carry[0], carry[1], params), None)
    start = y0, field(t0, y0, params)
    (y, _), _ = jax.lax.scan(advance, start, _beginnings(t0, h, num_steps))
    return y


def all_steps(
    field: Field, t0: float, t1: float, befores: PyTree[Array], params: Any
) -> PyTree[Array]:
    """Every step at once, each from a state that is given.

    Args:
        field: the vector field, of time, state and parameters.
        t0: the time before the first step.
        t1: the time after the last.
        befores: the states before each step, with a leading axis `time`.
        params: the parameters.

    Returns:
        The states after each step.
    """
    num_steps = len(jax.tree.leaves(befores)[0])
    h = (t1 - t0) / num_steps
    one = lambda t, y: step(field, t, h, y, field(t, y, params), params)[0]
    return jax.vmap(one)(_beginnings(t0, h, num_steps), befores)
