r"""`deer_scan`: `jax.lax.scan` with a nonlinear carry, solved for all steps at once.

The program of one step is read before anything is solved:

1. Leaves of the carry that depend on each other, directly or by way of others, form a
   *circle*, one nonlinear recurrence. Circles are solved one after another, each for
   all steps at once, and know the trajectories of those before: the layers of a stacked
   network are separate systems, and so is an accumulator, which is solved in a single
   iteration. What no leaf of the carry depends on is evaluated once, in the end.
2. What a circle does not need its own leaves for, the products of the inputs with
   their weights, is evaluated beforehand, once, for all steps together.
3. Where a recurrence acts on each entry alone, its Jacobian is held as a diagonal.
"""

import dataclasses
import functools as ft
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import optimistix as optx
from jax import lax
from jaxtyping import Array, PyTree

from ._affine_scan import AbstractScan, PlatformScan
from ._checks import MOST_ENTRIES, check_count, check_instance, check_tolerance
from ._dataflow import Program
from ._forward import AbstractForward, PlatformForward
from ._implicit import solve
from ._linearization import AbstractLinearization, FullJacobian, StepMap
from ._newton import NewtonIteration, Statistics, default_window
from ._predictor import ConstantPredictor
from ._step_map import ravel, rounding

# Up to this size of a circle steps in sequence with the parallel adjoint are faster on
# a CPU than `lax.scan` and its own adjoint; and on other devices Newton's method up to
# the second, as far as arXiv:2309.12252, figure 2, finds it faster.
_MOST_ON_CPU, _MOST_ELSEWHERE = 8, 32

_NEWTON = FullJacobian()

_FAILURES = [
    "`deer_scan`: a carry became infinite or NaN. `throw=False` returns NaN from the "
    "first such step on; `return_statistics=True` says which one that is.",
    "`deer_scan`: not converged within `max_iterations`. With `max_iterations=None` it "
    "always is; a `guess` or another `linearization` can make it faster.",
]


@dataclasses.dataclass(frozen=True)
class _Circle:
    """Leaves of the carry that have to be solved for together, by their numbers.

    - `is_recurrent`: whether they depend on themselves at all.
    - `is_float`: whether all can be differentiated.
    - `is_elementwise`: whether each entry depends on its own past only.
    - `size`: the number of real components.
    """

    leaves: list[int]
    is_recurrent: bool
    is_float: bool
    is_elementwise: bool
    size: int

    @property
    def num_entries(self) -> int:
        """How many numbers a transition has."""
        return self.size if self.is_elementwise else self.size**2


def circles(depends: Sequence[set[int]]) -> list[list[int]]:
    """Sets of nodes that depend on each other, each after those that it depends on.

    `depends[i]` are the nodes that node i depends on. Strongly connected components, in
    topological order.
    """
    reach = [set(d) for d in depends]
    for k in range(len(reach)):
        for r in reach:
            if k in r:
                r |= reach[k]
    # Who is reached by whom decides on the order, then on the circle.
    together = lambda i, j: i == j or (j in reach[i] and i in reach[j])
    found = {
        tuple(j for j in range(len(reach)) if together(i, j)) for i in range(len(reach))
    }
    depth = lambda circle: len(set().union(*(reach[i] for i in circle)) - set(circle))
    return [list(c) for c in sorted(found, key=lambda c: (depth(c), c))]


@dataclasses.dataclass(frozen=True)
class _Recurrence:
    """A scan over `num_steps` steps, with `init` and `xs` as lists of leaves."""

    program: Program
    init: list[Array]
    xs: list[Array]
    num_steps: int

    @property
    def _by_number(self) -> dict[int, Array]:
        start = len(self.init)
        return {start + i: x for i, x in enumerate(self.xs)}

    def circles(self) -> list[_Circle]:
        """The circles of the carry, in the order in which they can be solved."""
        leaves, found = range(len(self.init)), []
        depends = [d & set(leaves) for d in self.program.dependencies()[: len(leaves)]]
        done: list[int] = []
        for circle in circles(depends):
            values = [self.init[i] for i in circle]
            is_float = all(eqx.is_inexact_array(x) for x in values)
            per = lambda x: x.size * (2 if jnp.iscomplexobj(x) else 1)
            is_real = not any(jnp.iscomplexobj(x) for x in values)
            found.append(
                _Circle(
                    circle,
                    any(depends[i] & set(circle) for i in circle),
                    is_float,
                    is_real and self.program.is_elementwise(circle, circle, known=done),
                    sum(map(per, values)) if is_float else 0,
                )
            )
            done += circle
        return found

    def _before(self, trajectories: dict[int, Array]) -> dict[int, Array]:
        """The values that the steps start from."""
        shifted = lambda i, ys: jnp.concatenate([self.init[i][None], ys[:-1]])
        return {i: shifted(i, ys) for i, ys in trajectories.items()}

    def _split(
        self, outputs: list[int], by: list[int], trajectories: dict[int, Array]
    ) -> tuple[list[Array], Callable]:
        """What of `outputs` is known, for all steps, and the `late` of `Program`."""
        early, late = self.program.split(outputs, by, list(trajectories))
        inputs = self._before(trajectories) | self._by_number
        every = jax.vmap(early, axis_size=self.num_steps)
        return every(inputs, trajectories), late

    def _known(self, outputs: list[int], trajectories: dict[int, Array]) -> list[Array]:
        """`outputs` for all steps, where the trajectories are all that they need."""
        driven, late = self._split(outputs, [], trajectories)
        every = jax.vmap(lambda x: late(x, []), axis_size=self.num_steps)
        return every(driven)

    def in_sequence(self, num_outputs: int) -> tuple[list[Array], list[Array]]:
        """By `lax.scan`: the carry in the end, and the outputs."""
        num_leaves = len(self.init)
        by, every = range(num_leaves), range(num_leaves + num_outputs)
        driven, late = self._split(list(every), list(by), {})

        def step(carry, x):
            out = late(x, carry)
            return out[:num_leaves], out[num_leaves:]

        return lax.scan(step, self.init, driven, length=self.num_steps)

    def in_parallel(
        self,
        num_outputs: int,
        found: Sequence[_Circle],
        solve_circle: Callable,
        guess: dict[int, Array],
    ) -> tuple[list[Array], list[Array], Statistics]:
        """Circle by circle: the carry in the end, the outputs, and statistics."""
        trajectories: dict[int, Array] = {}
        statistics = []
        for circle in found:
            leaves = circle.leaves
            if self.program.passes_on(leaves[0]):
                (x,) = (self.init[i] for i in leaves)
                ys = [jnp.broadcast_to(x, (self.num_steps, *x.shape))]
            elif not circle.is_recurrent:
                ys = self._known(leaves, trajectories)
            else:
                driven, late = self._split(leaves, leaves, trajectories)
                start = [self.init[i] for i in leaves]
                if circle.is_float:
                    along = [guess[i] for i in leaves] if guess else None
                    ys, about = solve_circle(circle, late, start, driven, along)
                    statistics.append(about)
                else:
                    step = lambda c, x, late=late: 2 * (late(x, c),)
                    _, ys = lax.scan(step, start, driven, length=self.num_steps)
            trajectories |= zip(leaves, ys, strict=True)
        num_leaves = len(self.init)
        outputs = list(range(num_leaves, num_leaves + num_outputs))
        ys = self._known(outputs, trajectories)
        carry = [trajectories[i][-1] for i in range(num_leaves)]
        return carry, ys, _summary(statistics, self.num_steps)


def _by_strategy(
    in_parallel: Callable, in_sequence: Callable, found: Sequence[_Circle], length: int
) -> Any:
    """Whichever is faster for circles of these sizes, on the device it runs on."""
    dense = [c.size for c in found if c.is_recurrent and not c.is_elementwise]
    largest = max(dense, default=0)
    if largest <= _MOST_ON_CPU:
        return in_parallel()
    if largest > _MOST_ELSEWHERE or length * largest**2 > MOST_ENTRIES:
        return in_sequence()
    return lax.platform_dependent(cpu=in_sequence, default=in_parallel)


def _summary(statistics: Sequence[Statistics], num_steps: int) -> Statistics:
    """Of all circles together; the result is that of the first one that fails."""
    dtype = jnp.result_type(float)
    count = lambda n: jnp.array(n, int)
    out = Statistics(
        count(0), jnp.zeros((), dtype), count(num_steps), optx.RESULTS.successful
    )
    for new in statistics:
        failed = out.result != optx.RESULTS.successful
        out = Statistics(
            jnp.maximum(out.num_iterations, new.num_iterations),
            jnp.maximum(out.residual, new.residual.astype(dtype)),
            jnp.minimum(out.num_solved, new.num_solved),
            optx.RESULTS.where(failed, out.result, new.result),
        )
    return out


def _checked(tree: PyTree[Any], result: optx.RESULTS) -> PyTree[Any]:
    """`tree`, raising an error at run time unless the result is a success."""
    failed = result != optx.RESULTS.successful
    which = jnp.where(result == optx.RESULTS.nonfinite, 0, 1)
    smooth, rest = eqx.partition(tree, eqx.is_inexact_array)
    if not jax.tree.leaves(smooth):
        return tree
    smooth = eqxi.branched_error_if(smooth, failed, which, _FAILURES)
    return eqx.combine(smooth, rest)


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
    leaves = enumerate(jax.tree.leaves(guess))
    return {i: x[::-1] if reverse else x for i, x in leaves}


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
    leaves that are integers, booleans or keys are carried along in sequence.

    - `linearization`: the transitions of the iteration, `FullJacobian()`,
        `DiagonalJacobian()`, `BlockDiagonalJacobian(...)` or `Picard()`.
    - `scan`: how the affine recurrence is solved. `None` means `SequentialScan` on a
        CPU and `AssociativeScan` elsewhere.
    - `rtol`, `atol`: tolerances of the iteration, for residual and estimated error of
        each step relative to the norm of the carry. `None` means close to rounding,
        eps**0.75, and zero.
    - `max_iterations`: `None` means as many as there are steps, which always suffices.
    - `guess`: the carry after each step, a pytree like `init` with a leading axis
        `time`, of a previous solve for example. The result does not depend on it.
    - `forward`: `ParallelForward()` for Newton's method, `SequentialForward()` for one
        step after the other. `None` chooses by platform and by the size of the carry;
        where neither pays it means `jax.lax.scan` itself, with its own gradient.
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
    side effects in `f` are not.

    ??? cite "Reference"

        Lim, Zhu, Selfridge and Kasim, *Parallelizing non-linear sequential models over
        the sequence length*, arXiv:2309.12252, section 3 and figure 2.
    """
    check_instance(
        "linearization", linearization, AbstractLinearization, "FullJacobian()"
    )
    if scan is not None:
        check_instance("scan", scan, AbstractScan, "SequentialScan()")
    if forward is not None:
        check_instance("forward", forward, AbstractForward, "SequentialForward()")
    for name, count in (("max_iterations", max_iterations), ("window", window)):
        if count is not None:
            check_count(name, count)
    check_tolerance("rtol", rtol)
    check_tolerance("atol", atol)

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
        statistics = _summary([], 0)
        return (carry, ys, statistics) if return_statistics else (carry, ys)

    x0 = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), xs)
    x_leaves = [jnp.asarray(x) for x in jax.tree.leaves(xs)]
    if reverse:
        x_leaves = [x[::-1] for x in x_leaves]
    recurrence = _Recurrence(
        Program(f, carry_shape, x0), jax.tree.leaves(init), x_leaves, num_steps
    )
    num_outputs = len(jax.tree.leaves(out_shape))
    found = recurrence.circles()

    def solve_circle(circle, late, start, driven, along):
        y0, unravel = ravel(start)
        step = lambda x, y: ravel(late(x, unravel(y)))[0].astype(y.dtype)
        shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in start)
        step_map = StepMap(step, leaves=shapes, is_elementwise=circle.is_elementwise)
        iteration = NewtonIteration(
            linearization,
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
        how = PlatformForward() if forward is None else forward
        ys, statistics, _ = solve(step_map, y0, driven, guess, how, iteration)
        okay = jnp.arange(num_steps) < statistics.num_solved
        okay |= statistics.result == optx.RESULTS.successful
        ys = jnp.where(okay[:, None], ys, jnp.nan)
        return jax.vmap(unravel)(ys), statistics

    def in_parallel():
        return recurrence.in_parallel(num_outputs, found, solve_circle, guesses)

    def in_sequence():
        carry, ys = recurrence.in_sequence(num_outputs)
        smooth = [x for x in carry if eqx.is_inexact_array(x)]
        nan = [jnp.any(jnp.isnan(x)) for x in smooth]
        result = optx.RESULTS.where(
            jnp.any(jnp.array(nan)) if nan else jnp.array(False),
            optx.RESULTS.nonfinite,
            optx.RESULTS.successful,
        )
        about = _summary([], num_steps)
        return carry, ys, eqx.tree_at(lambda s: s.result, about, result)

    if forward is not None:
        carry, ys, statistics = in_parallel()
    else:
        carry, ys, statistics = _by_strategy(in_parallel, in_sequence, found, num_steps)
    if throw:
        carry, ys = _checked((carry, ys), statistics.result)
    if reverse:
        ys = [y[::-1] for y in ys]
    carry = jax.tree.unflatten(jax.tree.structure(carry_shape), carry)
    ys = jax.tree.unflatten(jax.tree.structure(out_shape), ys)
    return (carry, ys, statistics) if return_statistics else (carry, ys)
