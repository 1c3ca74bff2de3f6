"""The order of operands in the products of a user's function.

Under `jax.vmap` the free axes of the first operand of a product precede those of the
second: of `W @ y` the axes of the batch and of time end up behind, and every
elementwise operation that follows reads or writes its operands transposed. With
Jacobians, which nest several `vmap`s, that costs a CPU up to 1.8 times the whole solve.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend as jex
from jax import lax
from jaxtyping import Array


def arguments_first(f: Callable) -> Callable:
    """`f`, with what depends on its arguments as the first operand of each product.

    Takes and returns pytrees of arrays; `W @ y` becomes `y @ W.T`, the same numbers.
    Functions under `jax.jit` are looked into; loops, branches and functions with
    derivatives of their own are left as they are.
    """

    def swapped(*args):
        closed, shape = jax.make_jaxpr(f, return_shape=True)(*args)
        leaves = jax.tree.leaves(args)
        out, _ = _evaluate(closed, leaves, [True] * len(leaves))
        return jax.tree.unflatten(jax.tree.structure(shape), out)

    return swapped


def _evaluate(
    closed: Any, args: Sequence[Array], varies: Sequence[bool]
) -> tuple[list[Array], list[bool]]:
    """The outputs of a jaxpr, products swapped, and which depend on what varies."""
    jaxpr, is_literal = closed.jaxpr, lambda v: isinstance(v, jex.core.Literal)
    values = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    values |= zip(jaxpr.invars, args, strict=True)
    varying = {v for v, moves in zip(jaxpr.invars, varies, strict=True) if moves}
    depends = lambda v: not is_literal(v) and v in varying
    read = lambda v: v.val if is_literal(v) else values[v]

    for equation in jaxpr.eqns:
        operands, moves = map(read, equation.invars), map(depends, equation.invars)
        operands, moves = list(operands), list(moves)
        moved = [any(moves)] * len(equation.outvars)
        if equation.primitive.name == "jit":
            out, moved = _evaluate(equation.params["jaxpr"], operands, moves)
        elif equation.primitive.name == "dot_general" and moves == [False, True]:
            out = [_swapped_product(*operands, **equation.params)]
        else:
            out = _evaluate_one(jaxpr, equation, operands)
        values |= zip(equation.outvars, out, strict=True)
        varying |= {v for v, m in zip(equation.outvars, moved, strict=True) if m}
    return list(map(read, jaxpr.outvars)), list(map(depends, jaxpr.outvars))


def _evaluate_one(jaxpr: Any, equation: Any, operands: list[Array]) -> list[Array]:
    """The outputs of one equation of `jaxpr`."""
    pairs = zip(equation.invars, operands, strict=True)
    used = {v: x for v, x in pairs if not isinstance(v, jex.core.Literal)}
    alone = jaxpr.replace(
        constvars=[],
        invars=list(used),
        outvars=equation.outvars,
        eqns=[equation],
        effects=equation.effects,
    )
    closed = jex.core.ClosedJaxpr(alone, [])
    return jex.core.jaxpr_as_fun(closed)(*used.values())


def _swapped_product(
    a: Array, b: Array, *, dimension_numbers: Any, precision: Any, **kwargs: Any
) -> Array:
    """`lax.dot_general(a, b)` as a product of `b` and `a`."""
    (a_summed, b_summed), (a_batch, b_batch) = dimension_numbers
    if isinstance(precision, tuple):
        precision = precision[::-1]
    numbers = (b_summed, a_summed), (b_batch, a_batch)
    out = lax.dot_general(b, a, numbers, precision=precision, **kwargs)
    # The axes of the batch, those of `b`, those of `a`: the latter two change places.
    start, axes = len(b_batch), list(range(out.ndim))
    middle = start + b.ndim - len(b_batch) - len(b_summed)
    return lax.transpose(out, axes[:start] + axes[middle:] + axes[start:middle])
