"""`deer_scan`: `jax.lax.scan` with a nonlinear carry, solved for all steps at once.

The leaves of the carry that are real or complex are one nonlinear recurrence. Others
(counters, keys) have no derivative: their trajectory is found first, by `lax.scan`,
and drives the recurrence.
"""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.extend as jex
import jax.numpy as jnp
import optimistix as optx
from jax import lax
from jaxtyping import Array, Bool, PyTree

from .._checks import check_optional, check_throw, explained
from .._defaults import MAX_PARALLEL_ENTRIES_SCAN, prefers_sequential_recurrence
from .._gradient import AbstractGradient, default_gradient
from .._linalg.operand_order import arguments_first
from .._method import AbstractMethod, Newton, Sequential
from .._prefix import at, count_leading_true, shift
from .._ravel import ravel, rounding
from .._solve import solve
from .._statistics import Statistics, nan_unless, raise_if_failed
from .._step_map import StepMap
from .._varying import varies

_FAILURES = [
    "`deer_scan`: a carry became infinite or NaN. `throw=False` returns NaN from the "
    "first such step on; `return_statistics=True` says which one that is. Where a "
    "carry is meant to be infinite, as the logarithm of zero, `method=Sequential()` is "
    "`jax.lax.scan` itself.",
    "`deer_scan`: not converged within `max_iterations`. With `max_iterations=None` it "
    "always is; a `guess` or another `linearization` can make it faster.",
]


def _has_custom_vjp(jaxpr: Any) -> bool:
    """Whether a program cannot be differentiated in forward mode."""
    is_jaxpr = lambda x: isinstance(x, jex.core.ClosedJaxpr | jex.core.Jaxpr)
    for equation in jaxpr.eqns:
        if equation.primitive.name.startswith("custom_vjp_call"):
            return True
        parts = jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr)
        parts = [getattr(part, "jaxpr", part) for part in parts if is_jaxpr(part)]
        if any(map(_has_custom_vjp, parts)):
            return True
    return False


def _sources(jaxpr: Any, num_leaves: int) -> list[int | None]:
    """Which leaf of the carry each output is: before the step, then after it.

    `None` for what is made for the output alone. The carry is in the trajectory; as one
    more result of the step it would be differentiated once more.
    """
    carries = [*jaxpr.invars[:num_leaves], *jaxpr.outvars[:num_leaves]]
    same = lambda output: (i for i, x in enumerate(carries) if x is output)
    return [next(same(output), None) for output in jaxpr.outvars[num_leaves:]]


def _nan_unless(solved: Bool[Array, " time"], tree: PyTree[Array]) -> PyTree[Array]:
    """`tree` with NaN at the steps that were not solved, where it can be."""
    mask = jax.vmap(nan_unless)
    is_float = eqx.is_inexact_array
    return jax.tree.map(lambda x: mask(solved, x) if is_float(x) else x, tree)


def _check_guess(guess: PyTree[Any], init: PyTree[Array], num_steps: int) -> None:
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    expected = jax.tree.map(lambda x: (num_steps, *x.shape), init)
    is_shape = lambda x: isinstance(x, tuple) and all(isinstance(n, int) for n in x)
    same = jax.tree.structure(guess) == jax.tree.structure(init)
    flat = ft.partial(jax.tree.leaves, is_leaf=is_shape)
    if not same or flat(shapes(guess)) != flat(expected):
        msg = (
            "`guess` must hold the carry after each step, a pytree like `init` with "
            f"leaves of shapes {expected}; got {shapes(guess)}."
        )
        raise ValueError(msg)


class _Recurrence(eqx.Module):
    """A scan in the direction of its inputs, with all types known."""

    f: Callable
    init: PyTree[Array]
    xs: PyTree[Array]
    num_steps: int

    def trace(self) -> tuple[Any, Any]:
        """One step as a closed jaxpr, and the structure of its output."""
        x = jax.tree.map(lambda x: x[0], self.xs)
        closed, shape = jax.make_jaxpr(self.f, return_shape=True)(self.init, x)
        return closed, jax.tree.structure(shape[1])

    def _step(self, carry: PyTree[Array], x: PyTree[Array]) -> tuple[Any, Any]:
        """`f`, with the types of `init`: a Python number has none of its own."""
        new, y = self.f(carry, x)
        cast = lambda new, old: jnp.asarray(new, old.dtype)
        return jax.tree.map(cast, new, carry), y

    def scan(
        self, may_be_infinite: bool
    ) -> tuple[PyTree[Array], PyTree[Array], Statistics]:
        """`jax.lax.scan` itself, with its own gradient."""

        def step(carry, x):
            carry, y = self._step(carry, x)
            floats = jax.tree.leaves(eqx.filter(carry, eqx.is_inexact_array))
            is_value = lambda x: ~jnp.isnan(x) if may_be_infinite else jnp.isfinite(x)
            finite = [jnp.all(is_value(leaf)) for leaf in floats]
            return carry, (y, jnp.all(jnp.array(finite, bool)))

        length = self.num_steps
        carry, (ys, finite) = lax.scan(step, self.init, self.xs, length=length)
        num_solved, result = jnp.array(0, int), optx.RESULTS.successful
        if length > 0:
            num_solved = count_leading_true(finite)
            result = optx.RESULTS.where(
                num_solved == length, result, optx.RESULTS.nonfinite
            )
        count = jnp.array(0, int)
        statistics = Statistics(count, None, num_solved, result, Sequential())
        return *self._only_solved(carry, ys, statistics), statistics

    def _only_solved(
        self, carry: PyTree[Array], ys: PyTree[Array], statistics: Statistics
    ) -> tuple[PyTree[Array], PyTree[Array]]:
        """NaN in place of what was not solved."""
        solved = jnp.arange(self.num_steps) < statistics.num_solved
        succeeded = statistics.result == optx.RESULTS.successful
        carry = jax.tree.map(lambda x: x[None], carry)
        carry = _nan_unless(succeeded[None], carry)
        return jax.tree.map(lambda x: x[0], carry), _nan_unless(solved, ys)

    def _others(self) -> PyTree[Array]:
        """The leaves without derivatives before and after each step."""
        pick = lambda tree: eqx.filter(tree, eqx.is_inexact_array, inverse=True)
        if not jax.tree.leaves(pick(self.init)):
            return pick(self.init), pick(self.init)

        def step(carry, x):
            new, _ = self._step(carry, x)
            return new, (pick(carry), pick(new))

        smooth, rest = eqx.partition((self.init, self.xs), eqx.is_inexact_array)
        init, xs = eqx.combine(lax.stop_gradient(smooth), rest)
        return lax.scan(step, init, xs, length=self.num_steps)[1]

    def _outputs(
        self, after: PyTree[Array], aux: list[Array], sources: list[int | None]
    ) -> list[Array]:
        """The leaves of the outputs, of the carry `after` each step and of `aux`."""
        pairs = list(zip(*map(jax.tree.leaves, (self.init, after)), strict=True))
        before = [shift(first, x) for first, x in pairs]
        carries, others = [*before, *(x for _, x in pairs)], iter(aux)
        return [next(others) if i is None else carries[i] for i in sources]

    def solve(
        self,
        trace: tuple[Any, Any],
        method: AbstractMethod | None,
        gradient: AbstractGradient | None,
        guess: PyTree[Array],
    ) -> tuple[PyTree[Array], PyTree[Array], Statistics]:
        """All steps at once, or one after another; arguments of `deer_scan`."""
        floats = eqx.filter(self.init, eqx.is_inexact_array)
        (y0, unravel), num_steps = ravel(floats), self.num_steps
        before, after = self._others()
        closed, structure = trace
        sources = _sources(closed.jaxpr, len(jax.tree.leaves(self.init)))
        swapped = arguments_first(self._step)

        def step_with_aux(x, y):
            x, others = x
            carry, out = swapped(eqx.combine(unravel(y), others), x)
            flat, _ = ravel(eqx.filter(carry, eqx.is_inexact_array))
            outputs = zip(jax.tree.leaves(out), sources, strict=True)
            return flat.astype(y.dtype), [x for x, i in outputs if i is None]

        step = lambda x, y: step_with_aux(x, y)[0]
        step_map = StepMap(step, step_with_aux=step_with_aux, eps=rounding(floats))
        if method is None:
            sequential = prefers_sequential_recurrence(y0.size)
            method = Sequential() if sequential else Newton()
        if gradient is None:
            arguments = closed.consts, self.init, self.xs
            limit = MAX_PARALLEL_ENTRIES_SCAN
            gradient = default_gradient(
                arguments, y0.size, num_steps, limit, method.sharded_scan
            )
        flat_guess = jnp.full((num_steps, y0.size), jnp.inf, y0.dtype)
        if guess is not None:
            guess = jax.tree.map(lambda x, s: jnp.asarray(x, s.dtype), guess, self.init)
            smooth = eqx.filter(guess, jax.tree.map(eqx.is_inexact_array, self.init))
            flat_guess = jax.vmap(lambda y: ravel(y)[0])(smooth).astype(y0.dtype)
        with explained():
            states, statistics, aux = solve(
                step_map, y0, (self.xs, before), flat_guess, method, gradient
            )
        carries = eqx.combine(jax.vmap(unravel)(states), after)
        ys = jax.tree.unflatten(structure, self._outputs(carries, aux, sources))
        carry = jax.tree.map(lambda x: at(x, self.num_steps - 1), carries)
        return *self._only_solved(carry, ys, statistics), statistics


@eqx.filter_jit
def deer_scan(
    f: Callable[[PyTree[Any], PyTree[Any]], tuple[PyTree[Any], PyTree[Any]]],
    init: PyTree[Any],
    xs: PyTree[Any] = None,
    length: int | None = None,
    *,
    method: AbstractMethod | None = None,
    gradient: AbstractGradient | None = None,
    guess: PyTree[Any] = None,
    reverse: bool = False,
    throw: bool = True,
    return_statistics: bool = False,
) -> Any:
    r"""`jax.lax.scan` for a nonlinear recurrence, in parallel over time.

        carry, ys = deer_scan(f, init, xs)

    is `carry, ys = jax.lax.scan(f, init, xs)` to rounding, and so are its derivatives,
    of any order and mode, with respect to `init`, `xs` and all that `f` closes over.
    **Arguments:** `f`, `init`, `xs`, `length` and `reverse` are those of
    `jax.lax.scan`: `f(carry, x)` returns the new carry and an output. Any pytrees.
    Leaves that are integers, booleans or keys are found first, sequentially; if they
    depend on the others, that takes all of a sequential scan. Where a `jax.custom_vjp`
    in `f` rules out forward-mode derivatives, the default is `jax.lax.scan` itself.

    - `method`: how the carries are found, `Newton(...)` all at once or `Sequential()`
        one after another. `None` means the same on a CPU, elsewhere `Newton()` up to
        D = 32. With `Sequential()` and no `gradient` it is `jax.lax.scan` itself, whose
        carries may be infinite.
    - `gradient`: how they are differentiated, `ParallelGradient()`,
        `MatrixFreeGradient()` or `SequentialGradient()`. `None` means on a CPU
        `ParallelGradient()` where D² times the batch is at most 256, else
        `SequentialGradient()`; elsewhere `ParallelGradient()`, unless the Jacobians fit
        into no memory. The batch is that of the `jax.vmap`s around the call.
    - `guess`: the carry after each step, a pytree like `init` with a leading axis
        `time`, of a previous solve for example. The result does not depend on it.
    - `throw`: whether a failed solve raises an error, at run time. Otherwise carry and
        outputs are NaN from the first step on that is not solved.
    - `return_statistics`: whether to return `Statistics`, too.

    **Returns:** `(carry, ys)`, or `(carry, ys, statistics)`.

    **Raises:** what `jax.lax.scan` raises for arguments that do not fit; `TypeError` or
    `ValueError` for other arguments of the wrong type or shape. A carry that becomes
    infinite or NaN is a failure; where it is `jax.lax.scan` itself, only NaN.

    **Cost** of N steps and a carry of D real components: that of the method and of the
    gradient. A recurrence that acts on each component alone has diagonal Jacobians:
    `Newton(DiagonalJacobian(num_probes=1))` and `MatrixFreeGradient()` are exact for
    it, at a cost of O(N D). Compose the layers of a network, one scan each, rather than
    carry all of their states in one.

    Outside `jax.jit` a call is compiled once for each
    function `f`: define it once, not at every call.

    ??? cite "Reference"

        Lim, Zhu, Selfridge and Kasim, *Parallelizing non-linear sequential models over
        the sequence length*, arXiv:2309.12252, section 3 and figure 2.
    """
    check_optional("method", method, AbstractMethod, "Newton()")
    check_optional("gradient", gradient, AbstractGradient, "ParallelGradient()")
    is_sharded = method is not None and method.sharded_scan is not None
    check_throw(throw, is_sharded or varies((init, xs)))
    # It checks the arguments, and knows how the types of `init` are promoted.
    plain = ft.partial(lax.scan, f, length=length, reverse=reverse)
    carry_shape, _ = jax.eval_shape(plain, init, xs)
    leading = [x.shape[0] for x in jax.tree.leaves(xs)]
    num_steps = leading[0] if leading else int(length or 0)
    cast = lambda x, s: x if x.dtype == s.dtype else x.astype(s.dtype)
    init = jax.tree.map(lambda x, s: cast(jnp.asarray(x), s), init, carry_shape)
    if guess is not None:
        _check_guess(guess, init, num_steps)
    if reverse:
        xs, guess = jax.tree.map(lambda x: jnp.asarray(x)[::-1], (xs, guess))
    recurrence = _Recurrence(f, init, xs, num_steps)
    is_default = method is None and gradient is None
    is_scan = isinstance(method, Sequential) and gradient is None
    trace = recurrence.trace() if num_steps > 0 else None
    if trace is None or is_scan or (is_default and _has_custom_vjp(trace[0].jaxpr)):
        carry, ys, statistics = recurrence.scan(is_scan)
    else:
        carry, ys, statistics = recurrence.solve(trace, method, gradient, guess)
    if throw:
        carry, ys = raise_if_failed((carry, ys), statistics.result, _FAILURES)
    if reverse:
        ys = jax.tree.map(lambda y: y[::-1], ys)
    return (carry, ys, statistics) if return_statistics else (carry, ys)
