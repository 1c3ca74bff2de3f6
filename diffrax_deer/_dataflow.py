"""Vector fields as programs: what they depend on, and in which order they multiply.

What a user writes is traced once, and the program is read before it is differentiated.
"""

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.extend as jex
import jax.numpy as jnp
import numpy as np
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


class Program:
    """`f` as a list of equations, from the leaves of its arguments to its own.

    Traced once, at `args`; products are swapped as by `arguments_first`, and functions
    under `jax.jit` are taken apart. What `f` closes over, `consts`, may be traced.
    """

    def __init__(self, f: Callable, *args: PyTree[Array]):
        closed = jax.make_jaxpr(arguments_first(f))(*args)
        self._jaxpr, self.consts = closed.jaxpr, list(closed.consts)

    def _variables(self, numbers: Iterable[int]) -> dict[int, Any]:
        """The outputs of these numbers, unless they are literals."""
        outvars = self._jaxpr.outvars
        return {i: outvars[i] for i in numbers if not _is_literal(outvars[i])}

    def dependencies(self) -> list[set[int]]:
        """The numbers of the inputs that each output depends on. By dataflow."""
        wanted = np.eye(len(self._jaxpr.outvars), dtype=bool).tolist()
        used = [pe.dce_jaxpr(self._jaxpr, only)[1] for only in wanted]
        return [set(np.flatnonzero(u).tolist()) for u in used]

    def passes_on(self, number: int) -> bool:
        """Whether the output of this number is the input of this number."""
        return self._jaxpr.outvars[number] is self._jaxpr.invars[number]

    def split(
        self, outputs: Sequence[int], by: Sequence[int], known: Sequence[int] = ()
    ) -> tuple[Callable, Callable]:
        """What of `outputs` is known before the inputs `by` are, and the rest of it.

        **Arguments:** all of them numbers.

        - `outputs`: what is wanted.
        - `by`: inputs.
        - `known`: outputs that are not evaluated but used, where others need them.

        **Returns:** two functions, `early` and `late`, whose composition
        `late(early(inputs, known), values)` gives the outputs:

        - `early` of the values of all other inputs that are needed, and of what is
            known, both as mappings from number to array;
        - `late` of a list of arrays, which is the result of the former, and of the
            values of the inputs `by`. It evaluates only what depends on these.
        """
        # Without dead code in loops and branches either, as `dependencies` has it.
        only = [i in outputs for i in range(len(self._jaxpr.outvars))]
        jaxpr, _ = pe.dce_jaxpr(self._jaxpr, only, instantiate=True)
        constants = dict(zip(jaxpr.constvars, self.consts, strict=True))
        wanted = [self._jaxpr.outvars[i] for i in outputs]
        last = {jaxpr.invars[i] for i in by}
        variables = self._variables(known)
        boundary = set(variables.values()) - last
        moves = _dependents(jaxpr, last, boundary)
        varies = _dependents(jaxpr, boundary | set(jaxpr.invars), ())
        ready = lambda v: not _is_literal(v) and v in varies and v not in moves
        late_ones = [
            equation
            for equation in _needed(jaxpr, boundary, wanted)
            if moves.intersection(equation.outvars)
        ]
        used = wanted + [v for equation in late_ones for v in equation.invars]
        early_ones = list(dict.fromkeys(filter(ready, used)))

        def early(
            inputs: Mapping[int, Array], outputs: Mapping[int, Array]
        ) -> list[Array]:
            values = constants | {jaxpr.invars[i]: x for i, x in inputs.items()}
            values |= {variables[i]: x for i, x in outputs.items() if i in variables}
            return _values_of(jaxpr, values, early_ones)

        def late(first: Sequence[Array], values: Sequence[Array]) -> list[Array]:
            known = constants | dict(zip(early_ones, first, strict=True))
            known |= zip((jaxpr.invars[i] for i in by), values, strict=True)
            return _values_of(jaxpr, known, wanted)

        return early, late

    def is_elementwise(
        self, outputs: Sequence[int], by: Sequence[int], known: Sequence[int] = ()
    ) -> bool:
        """Whether each entry of `outputs` depends on one entry of the inputs `by` only.

        By dataflow: between them there are only operations that act on each entry, and
        everything on the way has the shape of the one input. Arguments as for `split`.
        """
        tracked = {self._jaxpr.invars[i] for i in by}
        wanted = [self._jaxpr.outvars[i] for i in outputs]
        boundary = set(self._variables(known).values()) - tracked
        shape = self._jaxpr.invars[by[0]].aval.shape
        alone = len(by) == 1
        return alone and _is_elementwise(self._jaxpr, tracked, wanted, shape, boundary)

    def has_tangents(
        self, outputs: Sequence[int], by: Sequence[int], known: Sequence[int] = ()
    ) -> bool:
        """Whether `outputs` can be differentiated in forward mode, for the inputs `by`.

        What contains a `jax.custom_vjp` cannot. Arguments as for `split`.
        """
        jaxpr, tracked = self._jaxpr, {self._jaxpr.invars[i] for i in by}
        boundary = set(self._variables(known).values()) - tracked
        # What only inputs other than `by` decide on is no part of a step.
        moves = _dependents(jaxpr, tracked, boundary)
        early = _dependents(jaxpr, boundary | set(jaxpr.invars), ()) - moves
        return not any(
            _has_custom_vjp(equation)
            for equation in _needed(
                jaxpr, boundary, [jaxpr.outvars[i] for i in outputs]
            )
            if not early.intersection(equation.outvars)
        )


# They act on each entry, and on several operands entry by entry.
_ELEMENTWISE = frozenset(
    """
    abs acos acosh add and asin asinh atan atan2 atanh cbrt ceil clamp complex conj
    convert_element_type copy copy_p cos cosh digamma div eq erf erf_inv erfc exp exp2
    expm1 floor ge gt imag integer_pow is_finite le lgamma log log1p logistic lt max min
    mul ne neg nextafter not or pow real reduce_precision rem round rsqrt select_n sign
    sin sinh sqrt square stop_gradient sub tan tanh xor
    """.split()
)
# Functions within a program, and where their equations are.
_CALLS = {"custom_jvp_call": "call_jaxpr", "jit": "jaxpr"}


def _is_elementwise(
    jaxpr: Any,
    tracked: set[Any],
    wanted: Sequence[Any],
    shape: tuple[int, ...],
    known: Container[Any] = (),
) -> bool:
    """Whether `wanted` depends on `tracked`, of that shape, entry by entry."""
    tracked = set(tracked)
    for equation in _needed(jaxpr, known, wanted):
        moved = [not _is_literal(v) and v in tracked for v in equation.invars]
        if not any(moved):
            continue
        name, params = equation.primitive.name, equation.params
        if name in _CALLS:
            inner = params[_CALLS[name]].jaxpr
            within = {v for v, m in zip(inner.invars, moved, strict=True) if m}
            okay = _is_elementwise(inner, within, inner.outvars, shape)
        else:
            okay = name in _ELEMENTWISE
        if not okay or any(v.aval.shape != shape for v in equation.outvars):
            return False
        tracked |= set(equation.outvars)
    return True


def _has_custom_vjp(equation: Any) -> bool:
    """Whether there is one, or one in the functions that it calls."""
    is_jaxpr = lambda x: isinstance(x, jex.core.ClosedJaxpr | jex.core.Jaxpr)
    inner = jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr)
    inner = [getattr(x, "jaxpr", x) for x in inner if is_jaxpr(x)]
    return equation.primitive.name.startswith("custom_vjp_call") or any(
        _has_custom_vjp(each) for jaxpr in inner for each in jaxpr.eqns
    )


def _is_literal(v: Any) -> bool:
    return isinstance(v, jex.core.Literal)


def _dependents(jaxpr: Any, on: set[Any], but: Container[Any]) -> set[Any]:
    """The variables that depend on those in `on`, which are included; none in `but`."""
    found = set(on)
    for equation in jaxpr.eqns:
        if any(not _is_literal(v) and v in found for v in equation.invars):
            found |= {v for v in equation.outvars if v not in but}
    return found


def _needed(jaxpr: Any, known: Container[Any], wanted: Sequence[Any]) -> list[Any]:
    """The equations that lead from what is `known` to what is `wanted`."""
    open_ones = {v for v in wanted if not _is_literal(v) and v not in known}
    equations = []
    for equation in reversed(jaxpr.eqns):
        if open_ones.intersection(equation.outvars):
            equations.append(equation)
            open_ones |= {
                v for v in equation.invars if not _is_literal(v) and v not in known
            }
    return equations[::-1]


def _values_of(
    jaxpr: Any, values: dict[Any, Array], wanted: Sequence[Any]
) -> list[Array]:
    """The values of the variables `wanted`, from those in `values`."""
    read = lambda v: v.val if _is_literal(v) else values[v]
    for equation in _needed(jaxpr, values, wanted):
        out = _evaluate_one(jaxpr, equation, read)
        values = dict(zip(equation.outvars, out, strict=True)) | values
    return list(map(read, wanted))


def _evaluate_one(jaxpr: Any, equation: Any, read: Callable[[Any], Any]) -> list[Array]:
    """The outputs of one equation of `jaxpr`."""
    used = list(dict.fromkeys(v for v in equation.invars if not _is_literal(v)))
    alone = jaxpr.replace(
        constvars=[],
        invars=used,
        outvars=equation.outvars,
        eqns=[equation],
        effects=equation.effects,
    )
    alone = jex.core.jaxpr_as_fun(jex.core.ClosedJaxpr(alone, []))
    return alone(*map(read, used))


def _evaluate(
    closed: Any, args: Sequence[Array], varies: Sequence[bool]
) -> tuple[list[Array], list[bool]]:
    """The outputs of a jaxpr, products swapped, and which depend on what varies."""
    jaxpr = closed.jaxpr
    values = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    values |= zip(jaxpr.invars, args, strict=True)
    varying = {v for v, moves in zip(jaxpr.invars, varies, strict=True) if moves}
    depends = lambda v: not _is_literal(v) and v in varying
    read = lambda v: v.val if _is_literal(v) else values[v]

    for equation in jaxpr.eqns:
        operands = list(map(read, equation.invars))
        moves = list(map(depends, equation.invars))
        moved = [any(moves)] * len(equation.outvars)
        if equation.primitive.name == "jit":
            out, moved = _evaluate(equation.params["jaxpr"], operands, moves)
        elif equation.primitive.name == "dot_general" and moves == [False, True]:
            out = [_swapped_product(*operands, **equation.params)]
        else:
            out = _evaluate_one(jaxpr, equation, read)
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
