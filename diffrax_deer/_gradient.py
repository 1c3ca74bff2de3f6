"""How a solution is differentiated: the linear recurrence of its tangents.

Whatever transitions found the solution, the derivative is that of the exact Jacobians
(`_solve.py` has the equation). Three ways to solve for it give the same.
"""

import abc
import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, PyTree

from ._affine_scan import AbstractScan, affine_recurrence
from ._checks import check_optional, check_tolerance
from ._custom_types import State, States
from ._defaults import batch_size, holds_jacobians, prefers_sequential_steps
from ._linalg.transitions import Dense, zero_unless
from ._linearization import AbstractLinearization, DiagonalJacobian
from ._matrix_free import matrix_free_recurrence
from ._prefix import shift
from ._step_map import StepMap, split_by_tangent, step_jacobian
from ._varying import uniform


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


def mask_unsolved(solved: Bool[Array, " time"], tree: PyTree[Array]) -> PyTree[Array]:
    """`tree`, leaves of leading axis `time`, zero where a step was not solved."""
    mask = jax.vmap(lambda s, x: jnp.where(s, x, jnp.zeros_like(x)))
    return jax.tree.map(ft.partial(mask, solved), tree)


def _or_zero(x: Array, x_dot: Array | None) -> Array | None:
    """The tangent of `x`, zero where it has none but could have one."""
    x = jnp.asarray(x)
    return jnp.zeros_like(x) if x_dot is None and eqx.is_inexact_array(x) else x_dot


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
    # Nothing goes on through a step that was not solved.
    masked = ft.partial(mask_unsolved, solution.solved)
    moved = lambda y0_dot, ys_dot: masked(shift(y0_dot, ys_dot))

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
    onward = lambda v: masked(product(masked(v))[0])
    ys_dot = solve(onward, masked(inhomogeneity))
    _, along = product(moved(jnp.zeros_like(y0_dot), ys_dot))
    return ys_dot, jax.tree.map(jnp.add, aux_dot, along)


class ParallelGradient(AbstractGradient):
    """By the Jacobians of all steps and one scan, backwards in time for a gradient.

    Memory O(N D²); D tangents of the step, or of its stages, and one scan.

    **Arguments:**

    - `scan`: how the affine recurrence is solved. `None` means `SequentialScan()` on a
        CPU, `ChunkedScan()` on a GPU.
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
                jacobians = zero_unless(solution.solved, jacobians)
            else:
                units = jnp.eye(size, dtype=solution.ys.dtype)[:, None]
                units = jnp.broadcast_to(units, (size, num_steps, size))
                units = uniform(units, solution.ys)
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
            out, out_dot = eqx.filter_jvp(step, primals, tangents)
            # What is constant has no tangent, and the others have zeros in its place.
            y_dot, aux_dot = jax.tree.map(_or_zero, out, out_dot)
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
    arguments: PyTree[Any],
    state_size: int,
    num_steps: int,
    max_entries: int,
    sharded_scan: AbstractScan | None = None,
) -> AbstractGradient:
    """What `gradient=None` means for a solve that depends on `arguments`.

    `max_entries` are those of the Jacobians of one step of the whole batch up to which
    the gradient is parallel on a CPU. `sharded_scan` is that of the method.
    """
    if sharded_scan is not None:
        return ParallelGradient(sharded_scan)
    num_entries = state_size**2
    if prefers_sequential_steps():
        if num_entries > max_entries:
            return SequentialGradient()
        return GradientByBatch(batch_size(arguments) * num_entries <= max_entries)
    if holds_jacobians(num_steps, state_size):
        return ParallelGradient()
    return SequentialGradient()
