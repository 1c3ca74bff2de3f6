"""Vector fields as programs: what they depend on, and in which order they multiply.

What a user writes is traced once, and the program is read before it is differentiated.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend as jex
import jax.numpy as jnp
from jax import lax
from jax.interpreters import partial_eval as pe
from jaxtyping import Array, PyTree

from ._custom_types import Y


def _trace(f: Callable, *args: PyTree[Array]) -> tuple[Any, list[bool], Any]:
    """`f` without dead code, which leaves of `args` it uses, and its output's shape."""
    closed, shape = jax.make_jaxpr(f, return_shape=True)(*args)
    jaxpr, used = pe.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return jex.core.ClosedJaxpr(jaxpr, closed.consts), used, shape


def without_dead_code(f: Callable) -> Callable:
    """`f`, rid of all that its result does not depend on, before it is differentiated.

    Takes and returns pytrees of arrays.
    """

    def lean(*args):
        closed, used, shape = _trace(f, *args)
        leaves = zip(jax.tree.leaves(args), used, strict=True)
        out = jex.core.jaxpr_as_fun(closed)(*(x for x, is_used in leaves if is_used))
        return jax.tree.unflatten(jax.tree.structure(shape), out)

    return lean


def influences(f: Callable[[Y], PyTree[Array]], y: Y) -> PyTree[bool]:
    """Whether `f` depends on it, for each leaf of `y`. By dataflow, not by value."""
    y = jax.tree.map(jnp.asarray, y)
    return jax.tree.unflatten(jax.tree.structure(y), _trace(f, y)[1])


def arguments_first(f: Callable) -> Callable:
    """`f`, with what depends on its arguments as the first operand of each product.

    Takes and returns pytrees of arrays; `W @ y` becomes `y @ W.T`, the same numbers.
    Under `vmap` the free axes of the first operand precede those of the second: the
    axes of the batch and of time then stay in front, as they are in memory. Otherwise
    they end up behind, for several nested `vmap`s in an order in which every
    elementwise operation that follows reads or writes its operands transposed.

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
    jaxpr = closed.jaxpr
    values = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    values |= zip(jaxpr.invars, args, strict=True)
    varying = {v for v, moves in zip(jaxpr.invars, varies, strict=True) if moves}
    is_literal = lambda v: isinstance(v, jex.core.Literal)
    depends = lambda v: not is_literal(v) and v in varying
    read = lambda v: v.val if is_literal(v) else values[v]

    for equation in jaxpr.eqns:
        operands = list(map(read, equation.invars))
        moves = list(map(depends, equation.invars))
        moved = [any(moves)] * len(equation.outvars)
        if equation.primitive.name == "jit":
            out, moved = _evaluate(equation.params["jaxpr"], operands, moves)
        elif equation.primitive.name == "dot_general" and moves == [False, True]:
            out = [_swapped_product(*operands, **equation.params)]
        else:
            used = list(dict.fromkeys(v for v in equation.invars if not is_literal(v)))
            alone = jaxpr.replace(
                constvars=[],
                invars=used,
                outvars=equation.outvars,
                eqns=[equation],
                effects=equation.effects,
            )
            alone = jex.core.jaxpr_as_fun(jex.core.ClosedJaxpr(alone, []))
            out = alone(*map(read, used))
        values |= zip(equation.outvars, out, strict=True)
        varying |= {v for v, m in zip(equation.outvars, moved, strict=True) if m}
    return list(map(read, jaxpr.outvars)), list(map(depends, jaxpr.outvars))


def _swapped_product(
    a: Array,
    b: Array,
    *,
    dimension_numbers: Any,
    precision: Any,
    preferred_element_type: Any,
    **kwargs: Any,
) -> Array:
    """`lax.dot_general(a, b)` as a product of `b` and `a`."""
    (a_summed, b_summed), (a_batch, b_batch) = dimension_numbers
    if isinstance(precision, tuple):
        precision = precision[::-1]
    out = lax.dot_general(
        b,
        a,
        ((b_summed, a_summed), (b_batch, a_batch)),
        precision=precision,
        preferred_element_type=preferred_element_type,
        **kwargs,
    )
    num_batch = len(b_batch)
    num_free = b.ndim - num_batch - len(b_summed)
    # The axes of the batch, those of `b`, those of `a`: the latter two change places.
    axes = list(range(out.ndim))
    middle = num_batch + num_free
    return lax.transpose(out, axes[:num_batch] + axes[middle:] + axes[num_batch:middle])
