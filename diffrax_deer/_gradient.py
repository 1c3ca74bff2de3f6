r"""The derivative of the solution, by the implicit function theorem.

At the solution, $r_n = \Phi_n(y_{n-1}; \theta) - y_n = 0$ holds identically in the
parameters $\theta$, the initial value and the times, hence

$$\dot y_n = \frac{\partial\Phi_n}{\partial y}\,\dot y_{n-1}
           + \frac{\partial\Phi_n}{\partial\theta}\,\dot\theta, $$

one more affine recurrence, with the *exact* Jacobian whatever transitions found the
solution. Its transpose is one scan backwards in time and one vectorized VJP: the
gradient of the discrete solution, at a cost that does not grow with the iterations.

The rule calls the solve again, so that it differentiates itself: second derivatives, in
any order of modes, follow. (Differentiating one more Newton step with a stopped
Jacobian would give the same gradient and wrong Hessians.)
"""

import abc
import dataclasses
import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix as optx
from jax import lax
from jaxtyping import Array, Bool, Int, PyTree

from ._affine_scan import AbstractScan, affine_recurrence
from ._checks import check_optional, check_tolerance, explained
from ._custom_types import State, States
from ._defaults import batch_size, holds_jacobians, prefers_sequential_steps
from ._linalg.transitions import Dense
from ._linearization import AbstractLinearization, DiagonalJacobian
from ._matrix_free import matrix_free_recurrence
from ._method import AbstractMethod
from ._prefix import select, shift
from ._statistics import Statistics
from ._step_map import StepMap, split_by_tangent, step_jacobian


class Solution(eqx.Module):
    """A solved recurrence, where its derivative is taken.

    - `step_map`: the step.
    - `xs`, `starts`: what drives each step and the state before it, of leading axis
        `time`; where a step was not solved, those of one that was.
    - `ys`, `(time, state)`: the states after each step.
    - `solved`, `(time,)`: whether the step was.
    """

    step_map: StepMap
    xs: PyTree[Any]
    starts: States
    ys: States
    solved: Bool[Array, " time"]


# Those of `step_map`, `xs` and `y0`; `None` in the place of a leaf that has none.
Tangents = tuple[Any, Any, State]


class AbstractGradient(eqx.Module):
    """How the solution is differentiated. The derivative does not depend on it."""

    @abc.abstractmethod
    def __call__(
        self, solution: Solution, tangents: Tangents
    ) -> tuple[States, PyTree[Any]]:
        r"""Solves $\dot y_n = J_n \dot y_{n-1} + \dot s_n$ for all n.

        **Arguments:**

        - `solution`: where $J_n$ and the derivative $\dot s_n$ of the step for all but
            the state are taken.
        - `tangents`: those of the step map, of `xs` and of the initial state.

        **Returns:**

        The tangents of the states, `(time, state)`, and of what else the steps yield.
        Linear in `tangents`, and differentiable by JAX in both modes.
        """


def _mask(solved: Bool[Array, " time"], tree: PyTree[Array]) -> PyTree[Array]:
    """`tree`, leaves of leading axis `time`, zero where a step was not solved."""
    mask = jax.vmap(lambda s, x: jnp.where(s, x, jnp.zeros_like(x)))
    return jax.tree.map(ft.partial(mask, solved), tree)


def _all_at_once(
    evaluate: Callable[[StepMap, Any, State], tuple[State, PyTree[Array]]],
    solve: Callable[[Callable[[States], States], States], States],
    solution: Solution,
    tangents: Tangents,
) -> tuple[States, PyTree[Any]]:
    """The recurrence of the derivative, with all steps linearized together.

    `evaluate(step_map, x, y)` is the step and what else it yields; `solve(product, b)`
    solves `v_n = J_n v_{n-1} + b_n`, where `product` maps all `v_{n-1}` to
    `J_n v_{n-1}`.
    """
    step_map_dot, xs_dot, y0_dot = tangents
    moved = lambda y0_dot, ys_dot: _mask(solution.solved, shift(y0_dot, ys_dot))

    # The steps are evaluated and linearized once, for all that follows.
    drivers_dot = step_map_dot, xs_dot
    drivers = solution.step_map, solution.xs
    drivers, fixed = split_by_tangent(drivers, drivers_dot)

    def steps(drivers, starts):
        step_map, xs = eqx.combine(drivers, fixed)
        images, aux = jax.vmap(ft.partial(evaluate, step_map))(xs, starts)
        return images, eqx.filter(aux, eqx.is_inexact_array)

    _, push = jax.linearize(steps, drivers, solution.starts)
    # `ys` is held fixed here: its own tangent is what the recurrence solves for, by
    # `product`, which as the derivative of a linear map is that of the states alone.
    (inhomogeneity, aux_dot), product = jax.linearize(
        ft.partial(push, drivers_dot), moved(y0_dot, jnp.zeros_like(solution.ys))
    )
    ys_dot = solve(lambda v: product(v)[0], inhomogeneity)
    _, along = product(moved(jnp.zeros_like(y0_dot), ys_dot))
    return ys_dot, jax.tree.map(jnp.add, aux_dot, along)


class ParallelGradient(AbstractGradient):
    """By the Jacobians of all steps and one scan, backwards in time for a gradient.

    Memory O(N D²); D tangents of the step, or of its stages, and one scan.

    **Arguments:**

    - `scan`: how the affine recurrence is solved. `None` means `SequentialScan()` on a
        CPU and `AssociativeScan()` elsewhere.
    """

    scan: AbstractScan | None = None

    def __check_init__(self):
        check_optional("scan", self.scan, AbstractScan, "AssociativeScan()")

    def __call__(self, solution, tangents):
        num_steps, size = solution.ys.shape

        def evaluate(step_map, x, y):
            by_stages = step_map.step_by_stages
            return step_map.evaluate(x, y) if by_stages is None else by_stages(x, y)

        def solve(product, inhomogeneity):
            if solution.step_map.step_by_stages is None:
                # A cell multiplies its state by weights, and so do unit vectors: the
                # same products for all steps. `product` would make them for each.
                jacobian = ft.partial(step_jacobian, solution.step_map)
                jacobians = jax.vmap(jacobian)(solution.xs, solution.starts)
            else:
                units = jnp.eye(size, dtype=solution.ys.dtype)[:, None]
                units = jnp.broadcast_to(units, (size, num_steps, size))
                jacobians = Dense(jnp.moveaxis(jax.vmap(product)(units), 0, -1))
            return affine_recurrence(jacobians, inhomogeneity, scan=self.scan)

        return _all_at_once(evaluate, solve, solution, tangents)


class MatrixFreeGradient(AbstractGradient):
    """By products with the Jacobians of all steps, none of which is held.

    For a large state: memory O(N D). Each sweep costs one vectorized JVP or VJP of the
    step; their number depends on the transitions, which only precondition.

    **Arguments:**

    - `linearization`: the transitions. `None` means the diagonal, estimated with one
        probe, `DiagonalJacobian(num_probes=1)`.
    - `scan`: as for `ParallelGradient`.
    - `rtol`: of residual and last update of each step. `None` means eps**0.75.

    The step has to be one that JAX can differentiate in reverse mode, even in forward
    mode.
    """

    linearization: AbstractLinearization | None = None
    scan: AbstractScan | None = None
    rtol: float | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        check_optional("scan", self.scan, AbstractScan, "AssociativeScan()")
        example = "DiagonalJacobian()"
        check_optional(
            "linearization", self.linearization, AbstractLinearization, example
        )
        check_tolerance("rtol", self.rtol)

    def __call__(self, solution, tangents):
        linearization = self.linearization or DiagonalJacobian(num_probes=1)

        def solve(product, inhomogeneity):
            stop = lambda x: lax.stop_gradient(x) if eqx.is_inexact_array(x) else x
            fixed = jax.tree.map(stop, solution)
            linearize = jax.vmap(ft.partial(linearization, fixed.step_map))
            transitions = linearize(fixed.xs, fixed.starts, fixed.ys)
            return matrix_free_recurrence(
                product, transitions, inhomogeneity, scan=self.scan, rtol=self.rtol
            )

        return _all_at_once(StepMap.evaluate, solve, solution, tangents)


class SequentialGradient(AbstractGradient):
    """One step after another: one JVP, or for a gradient one VJP, for each step.

    The least work, and the best choice where that is what counts. Each step is
    evaluated once more when it is differentiated: memory is that of the trajectory.
    """

    def __call__(self, solution, tangents):
        step_map_dot, xs_dot, y0_dot = tangents
        step = lambda step_map, x, y: step_map.evaluate(x, y)

        # To keep what is inside of the step would cost more memory, and more time to
        # write it down and to read it.
        @ft.partial(jax.checkpoint, prevent_cse=False)
        def push(y_dot, inputs):
            solved, x, x_dot, y = inputs
            y_dot = jnp.where(solved, y_dot, jnp.zeros_like(y_dot))
            tangents = step_map_dot, x_dot, y_dot
            primals = solution.step_map, x, y
            _, (y_dot, aux_dot) = eqx.filter_jvp(step, primals, tangents)
            return y_dot, (y_dot, aux_dot)

        inputs = solution.solved, solution.xs, xs_dot, solution.starts
        return lax.scan(push, y0_dot, inputs)[1]


class GradientByBatch(AbstractGradient):
    """`ParallelGradient` for a small batch, `SequentialGradient` for a large one.

    The batch is that of all `jax.vmap` around the solve. In a large one the parallel
    gradient only adds work to a device that is busy. What `gradient=None` means on a
    CPU, where the state is small.

    - `is_parallel`: which of both it is; a constant in the compiled program.
    """

    is_parallel: Bool[Array, ""]

    def __call__(self, solution, tangents):
        operands = solution, tangents
        arrays, static = eqx.partition(operands, eqx.is_array)
        branch = lambda how: lambda arrays: how(*eqx.combine(arrays, static))
        few, many = branch(ParallelGradient()), branch(SequentialGradient())
        return lax.cond(self.is_parallel, few, many, arrays)


def default_gradient(
    arguments: PyTree[Any], state_size: int, num_steps: int, max_entries: int
) -> AbstractGradient:
    """What `gradient=None` means for a solve that depends on `arguments`.

    `max_entries` are those of the Jacobians of one step of the whole batch up to which
    the gradient is parallel on a CPU.
    """
    num_entries = state_size**2
    if prefers_sequential_steps():
        if num_entries > max_entries:
            return SequentialGradient()
        return GradientByBatch(batch_size(arguments) * num_entries <= max_entries)
    if holds_jacobians(num_steps, state_size):
        return ParallelGradient()
    return SequentialGradient()


def evaluation_points(
    y0: State,
    xs: PyTree[Any],
    ys: States,
    num_solved: Int[Array, ""],
    placeholder_x: PyTree[Any],
) -> tuple[PyTree[Any], States]:
    """The `x` and the state before each step, of leading axis `time`.

    A controller that rejects a window multiplies its derivative by zero, and zero times
    NaN would be NaN: the last step that was solved stands in for those that were not,
    and if there is none a step from `y0` driven by `placeholder_x`.
    """
    solved, last = jnp.arange(len(ys)) < num_solved, jnp.maximum(num_solved - 1, 0)
    starts = shift(y0, ys)
    stand_in = lax.stop_gradient((jax.tree.map(lambda x: x[last], xs), starts[last]))
    if placeholder_x is not None:
        none = num_solved == 0
        stand_in = select(none, (placeholder_x, lax.stop_gradient(y0)), stand_in)
    fill = jax.vmap(select, in_axes=(0, 0, None))
    return fill(solved, (xs, starts), stand_in)


@eqx.filter_custom_jvp
def _solve(step_map, y0, xs, *, guess, method, gradient, placeholder_x):
    ys, statistics, aux = method(step_map, y0, xs, guess)
    num_solved = statistics.num_solved
    if aux is None:
        points = evaluation_points(y0, xs, ys, num_solved, placeholder_x)
        _, aux = jax.vmap(step_map.evaluate)(*points)
    solved = jnp.arange(len(ys)) < num_solved
    statistics = dataclasses.replace(statistics, gradient=gradient)
    return ys, statistics, _mask(solved, aux)


@_solve.def_jvp
def _(primals, tangents, **kwargs):
    step_map, y0, xs = primals
    ys, statistics, aux = _solve(step_map, y0, xs, **kwargs)
    num_solved = statistics.num_solved
    points = evaluation_points(y0, xs, ys, num_solved, kwargs["placeholder_x"])
    solved = jnp.arange(len(ys)) < num_solved
    step_map_dot, y0_dot, xs_dot = tangents
    xs_dot = _mask(solved, xs_dot)
    y0_dot = jnp.zeros_like(y0) if y0_dot is None else y0_dot
    solution = Solution(step_map, *points, ys, solved)
    with explained():
        ys_dot, aux_dot = kwargs["gradient"](solution, (step_map_dot, xs_dot, y0_dot))
    no_tangents = jax.tree.map(lambda _: None, statistics)
    return (ys, statistics, aux), (ys_dot, no_tangents, _mask(solved, aux_dot))


def solve(
    step_map: StepMap,
    y0: State,
    xs: PyTree[Any],
    guess: States,
    method: AbstractMethod,
    gradient: AbstractGradient,
    placeholder_x: PyTree[Any] = None,
) -> tuple[States, Statistics, PyTree[Array]]:
    r"""Solves $y_n = \Phi(x_n, y_{n-1})$ for all n, differentiably.

    **Arguments:**

    - `step_map`: the step. May close over traced values, which are differentiated.
    - `y0`: the initial state, `(state,)`, real.
    - `xs`: what drives the steps, a pytree of arrays of leading axis `time`.
    - `guess`: any trajectory, `(time, state)`; the result does not depend on it.
    - `method`: how the solution is found.
    - `gradient`: how it is differentiated.
    - `placeholder_x`: an `x` at which the step and its derivatives are finite for `y0`,
        used where no step was solved at all. A step of length zero, for example.

    **Returns:** the states `y_1` to `y_N`, `(time, state)`, finite if `y0` is; the
    `Statistics`; and what else the steps yield, of leading axis `time`, zero where they
    were not solved, or `None`. Exact derivatives of any order and mode with respect to
    `y0`, `xs` and all that `step_map` depends on; none with respect to `guess`.
    """
    if y0.size == 0:
        points = xs, jnp.zeros((len(guess), 0), guess.dtype)
        num_solved, zero = jnp.array(len(guess), int), jnp.array(0, int)
        successful = optx.RESULTS.successful
        statistics = Statistics(zero, None, num_solved, successful, method, gradient)
        return guess, statistics, jax.vmap(step_map.evaluate)(*points)[1]
    return _solve(
        step_map.closed(jax.tree.map(lambda x: x[0], xs), y0),
        y0,
        xs,
        guess=lax.stop_gradient(guess),
        method=method,
        gradient=gradient,
        placeholder_x=lax.stop_gradient(placeholder_x),
    )
