"""`deer_scan`: `jax.lax.scan` with a nonlinear carry, solved for all steps at once."""

import functools as ft
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix as optx
from jax import lax
from jaxtyping import Array, PyTree

from ._affine_scan import AbstractScan, PlatformScan
from ._batch import by_amount
from ._blocks import BlockDiagonalJacobian
from ._carry import CarryProgram, Circle, are_finite, summary
from ._causal import prefix
from ._checks import MOST_ENTRIES, check_count, check_instance
from ._dataflow import Program
from ._forward import (
    AbstractForward,
    ParallelForward,
    SequentialForward,
)
from ._implicit import solve
from ._linearization import AbstractLinearization, FullJacobian, StepMap
from ._newton import (
    NewtonIteration,
    check_iteration,
    default_window,
    raise_if_failed,
)
from ._platform import by_platform
from ._predictor import ConstantPredictor
from ._step_map import ravel, rounding

# Up to so many entries of a transition, in the whole batch, steps in sequence with the
# parallel derivative are faster on a CPU than `lax.scan` and its own: for a GRU of
# 2000 steps and 1 to 16 units, in batches of 1, 16 and 128, on two cores.
_MOST_ON_CPU = 256
# On other devices Newton's method is, up to this size, as far as arXiv:2309.12252,
# figure 2, finds it faster.
_MOST_ELSEWHERE = 32

_NEWTON = FullJacobian()

_FAILURES = [
    "`deer_scan`: a carry became infinite or NaN. `throw=False` returns NaN from the "
    "first such step on; `return_statistics=True` says which one that is.",
    "`deer_scan`: not converged within `max_iterations`. With `max_iterations=None` it "
    "always is; a `guess` or another `linearization` can make it faster.",
]


def _or_nan(good: Array, x: Array) -> Array:
    """`x` if `good`; otherwise NaN, if it can be."""
    return jnp.where(good, x, jnp.nan) if eqx.is_inexact_array(x) else x


def _fastest(
    in_parallel: Callable[[AbstractForward], Any],
    in_sequence: Callable[[], Any],
    found: Sequence[Circle],
    arguments: PyTree[Any],
    length: int,
) -> Any:
    """Whichever is fastest for circles of these sizes, on the device it runs on."""
    recurrent = [c for c in found if c.is_recurrent and c.is_smooth]
    num_entries = max((c.num_entries for c in recurrent), default=0)
    largest = max((c.size for c in recurrent if not c.is_elementwise), default=0)

    def on_cpu():
        few = lambda: in_parallel(SequentialForward())
        return by_amount(arguments, num_entries, _MOST_ON_CPU, few, in_sequence)

    def elsewhere():
        if largest > _MOST_ELSEWHERE or length * num_entries > MOST_ENTRIES:
            return in_sequence()
        return in_parallel(ParallelForward())

    return by_platform(on_cpu, elsewhere)


def _guesses(
    guess: PyTree[Any], init: PyTree[Array], num_steps: int, reverse: bool
) -> dict[int, Array]:
    if guess is None:
        return {}
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
    leaves = zip(jax.tree.leaves(guess), jax.tree.leaves(init), strict=True)
    cast = lambda x, like: x.astype(like.dtype) if eqx.is_inexact_array(like) else x
    leaves = [cast(jnp.asarray(x), like) for x, like in leaves]
    return {i: x[::-1] if reverse else x for i, x in enumerate(leaves)}


@eqx.filter_jit
def deer_scan(
    f: Callable[[PyTree[Any], PyTree[Any]], tuple[PyTree[Any], PyTree[Any]]],
    init: PyTree[Any],
    xs: PyTree[Any] = None,
    length: int | None = None,
    *,
    linearization: AbstractLinearization = _NEWTON,
    scan: AbstractScan | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    max_iterations: int | None = None,
    guess: PyTree[Any] = None,
    forward: AbstractForward | None = None,
    window: int | None = None,
    reverse: bool = False,
    throw: bool = True,
    return_statistics: bool = False,
) -> Any:
    r"""`jax.lax.scan` for a nonlinear recurrence, in parallel over time.

        carry, ys = deer_scan(f, init, xs)

    is `carry, ys = jax.lax.scan(f, init, xs)` to rounding, and so are its derivatives,
    of any order and mode, with respect to `init`, `xs` and all that `f` closes over.
    The gradient is found in parallel whatever the forward pass is: one Jacobian of each
    step, one scan, one vectorized product with the derivatives of `f`.

    **Arguments:** `f`, `init`, `xs`, `length` and `reverse` are those of
    `jax.lax.scan`: `f(carry, x)` returns the new carry and an output. Any pytrees;
    leaves that are integers, booleans or keys are carried along in sequence, and so is
    what a `jax.custom_vjp` in `f` keeps from being differentiated forwards.

    - `linearization`: the transitions of the iteration, `FullJacobian()`,
        `DiagonalJacobian()`, `BlockDiagonalJacobian(...)` or `Picard()`.
    - `scan`: how the affine recurrence is solved. `None` means `SequentialScan` on a
        CPU and `AssociativeScan` elsewhere.
    - `rtol`, `atol`: tolerances of the iteration, for residual and estimated error of
        each step, in each component relative to the largest value that it has had so
        far. `None` means close to rounding, eps**0.75, and zero.
    - `max_iterations`: `None` means as many as there are steps, which always suffices.
    - `guess`: the carry after each step, a pytree like `init` with a leading axis
        `time`, of a previous solve for example. The result does not depend on it.
    - `forward`: `ParallelForward()` for Newton's method, `SequentialForward()` for one
        step after the other, with the parallel gradient. `None` chooses: on a CPU the
        latter where carry and batch are small (D² times the batch at most 256),
        otherwise `jax.lax.scan` itself, with its own gradient; elsewhere Newton's
        method up to D = 32. The batch is that of the `jax.vmap`s around the call.
    - `window`: the iteration works on this many steps at once.
    - `throw`: whether a failed solve raises an error, at run time. Otherwise carry and
        outputs are NaN from the first step on that is not solved.
    - `return_statistics`: whether to return `Statistics`, too.

    **Returns:** `(carry, ys)`, or `(carry, ys, statistics)`.

    **Raises:** what `jax.lax.scan` raises for arguments that do not fit; `TypeError` or
    `ValueError` for other arguments of the wrong type or shape. A carry that becomes
    infinite or NaN is a failure.

    **Cost** of N steps and a carry of D real components that depend on each other: as
    `DEERSolver`, that is each iteration `window` steps with D tangents of `f` and one
    scan, in memory O(`window` D²); the gradient one more such iteration, with memory
    O(N D²). Components that depend on each other in one direction only are solved one
    after another, and D is the largest of them. In an elementwise recurrence D² is D.

    `f` is traced, its outputs are evaluated where they are needed: prints and other
    side effects in `f` are not. Outside `jax.jit` a call is compiled once for each
    function `f`: define it once, not at every call.

    ??? cite "Reference"

        Lim, Zhu, Selfridge and Kasim, *Parallelizing non-linear sequential models over
        the sequence length*, arXiv:2309.12252, section 3 and figure 2.
    """
    check_iteration(linearization, rtol, atol, max_iterations)
    if scan is not None:
        check_instance("scan", scan, AbstractScan, "SequentialScan()")
    if forward is not None:
        check_instance("forward", forward, AbstractForward, "SequentialForward()")
    if window is not None:
        check_count("window", window)

    # It checks the arguments, and knows how the types of `init` are promoted.
    plain = ft.partial(lax.scan, f, length=length, reverse=reverse)
    carry_shape, out_shape = jax.eval_shape(plain, init, xs)
    leading = [x.shape[0] for x in jax.tree.leaves(xs)]
    num_steps = leading[0] if leading else int(length or 0)
    init = jax.tree.map(jnp.asarray, init)
    cast = lambda x, s: x if x.dtype == s.dtype else x.astype(s.dtype)
    init = jax.tree.map(cast, init, carry_shape)
    guesses = _guesses(guess, init, num_steps, reverse)
    if num_steps == 0:
        carry, ys = plain(init, xs)
        statistics = summary([], 0)
        return (carry, ys, statistics) if return_statistics else (carry, ys)

    x0 = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), xs)
    x_leaves = [jnp.asarray(x) for x in jax.tree.leaves(xs)]
    if reverse:
        x_leaves = [x[::-1] for x in x_leaves]
    recurrence = CarryProgram(
        Program(f, carry_shape, x0), jax.tree.leaves(init), x_leaves, num_steps
    )
    num_outputs = len(jax.tree.leaves(out_shape))
    found = recurrence.circles()

    def solve_circle(how, circle, late, start, driven, along):
        y0, unravel = ravel(start)
        step = lambda x, y: ravel(late(x, unravel(y)))[0].astype(y.dtype)
        shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in start)
        step_map = StepMap(step, leaves=shapes, is_elementwise=circle.is_elementwise)
        # There are no blocks to speak of, and the diagonal is exact.
        has_blocks = isinstance(linearization, BlockDiagonalJacobian)
        iteration = NewtonIteration(
            _NEWTON if has_blocks and circle.is_elementwise else linearization,
            PlatformScan() if scan is None else scan,
            ConstantPredictor(),
            rounding(start) ** 0.75 if rtol is None else rtol,
            0.0 if atol is None else atol,
            max_iterations,
            default_window(circle.num_entries) if window is None else window,
        )
        guess = jnp.full((num_steps, y0.size), jnp.nan, y0.dtype)
        if along is not None:
            guess = jax.vmap(lambda leaves: ravel(leaves)[0])(along).astype(y0.dtype)
        ys, statistics, _ = solve(step_map, y0, driven, guess, how, iteration)
        okay = jnp.arange(num_steps) < statistics.num_solved
        okay |= statistics.result == optx.RESULTS.successful
        ys = jnp.where(okay[:, None], ys, jnp.nan)
        return jax.vmap(unravel)(ys), statistics

    def in_parallel(how):
        solve_with = ft.partial(solve_circle, how)
        return recurrence.in_parallel(num_outputs, found, solve_with, guesses)

    def in_sequence():
        # As in parallel, where leaves that are passed on have not to be finite either.
        passed_on = recurrence.program.passes_on
        solved = [c.leaves for c in found if c.is_recurrent and c.is_smooth]
        solved = [i for leaves in solved for i in leaves if not passed_on(i)]

        def step(carry, x):
            carry, y = f(carry, x)
            # As above: a Python number has no type of its own.
            carry = jax.tree.map(
                lambda c, s: jnp.asarray(c, s.dtype), carry, carry_shape
            )
            return carry, (y, are_finite(jax.tree.leaves(carry), solved))

        inputs = jax.tree.unflatten(jax.tree.structure(xs), x_leaves)
        scanned = lax.scan(step, init, inputs, length=num_steps)
        carry, (ys, finite) = scanned
        carry, ys = jax.tree.leaves(carry), jax.tree.leaves(ys)
        okay = jnp.all(finite)
        result = optx.RESULTS.where(
            okay, optx.RESULTS.successful, optx.RESULTS.nonfinite
        )
        num_solved = jnp.where(okay, num_steps, prefix(finite))
        about = summary([], num_steps)
        about = eqx.tree_at(
            lambda s: (s.num_solved, s.result), about, (num_solved, result)
        )
        if not throw:
            carry = [_or_nan(okay, x) for x in carry]
            ys = jax.vmap(lambda good, ys: [_or_nan(good, y) for y in ys])(
                jnp.arange(num_steps) < num_solved, ys
            )
        return carry, ys, about

    if forward is not None:
        carry, ys, statistics = in_parallel(forward)
    else:
        arguments = init, xs, recurrence.program.consts
        carry, ys, statistics = _fastest(
            in_parallel, in_sequence, found, arguments, num_steps
        )
    if throw:
        carry, ys = raise_if_failed((carry, ys), statistics.result, _FAILURES)
    if reverse:
        ys = [y[::-1] for y in ys]
    carry = jax.tree.unflatten(jax.tree.structure(carry_shape), carry)
    ys = jax.tree.unflatten(jax.tree.structure(out_shape), ys)
    return (carry, ys, statistics) if return_statistics else (carry, ys)
