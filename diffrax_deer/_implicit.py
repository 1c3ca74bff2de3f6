r"""The derivative of the solution, by the implicit function theorem.

At the solution, $r_n = \Phi_n(y_{n-1}; \theta) - y_n = 0$ holds identically in the
parameters $\theta$, the initial value and the times, hence

$$\dot y_n = \frac{\partial\Phi_n}{\partial y}\,\dot y_{n-1}
           + \frac{\partial\Phi_n}{\partial\theta}\,\dot\theta, $$

one more affine recurrence, with the *exact* Jacobian whatever transitions found the
solution. Its transpose is one scan backwards in time and one vectorized VJP: the
gradient of the discrete solution, at a cost that does not grow with the iterations.

Where the iteration goes without dense transitions because the state is large, so does
the derivative: its recurrence is then solved by products with the exact Jacobian, to a
tolerance close to rounding, with the iteration's own transitions for a preconditioner.

The rule calls the solve again, so that it differentiates itself: second derivatives, in
any order of modes, follow. (Differentiating one more Newton step with a stopped
Jacobian would give the same gradient and wrong Hessians.)
"""

import contextlib
import functools as ft
from collections.abc import Callable, Generator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix as optx
from jax import lax
from jaxtyping import Array, Bool, PyTree

from ._affine_scan import affine_recurrence
from ._blocks import BlockDiagonalJacobian, Layout
from ._causal import shift
from ._checks import check_size
from ._custom_types import State, States
from ._forward import AbstractForward, SequentialForward, StepByStep
from ._linearization import StepMap, driven, step_jacobian
from ._matrix_free import matrix_free_recurrence
from ._newton import NewtonIteration, Statistics

# Up to this size the Jacobians of all steps are small enough to solve with directly.
MOST_DIRECT = 16


def linearization_points(
    y0: State, xs: PyTree[Any], ys: States, statistics: Statistics, idle: PyTree[Any]
) -> tuple[PyTree[Any], States]:
    """The `x` and the state of each step, of leading axis `time`, to linearize at.

    For the steps that were not solved these are `idle` and `y0`: a controller that
    rejects them multiplies their derivatives by zero, and zero times NaN would be NaN.
    """
    solved = jnp.arange(len(ys)) < statistics.num_solved
    if idle is not None:
        select = jax.vmap(lambda s, x, i: jnp.where(s, x, i), in_axes=(0, 0, None))
        xs = jax.tree.map(lambda x, i: select(solved, x, i), xs, idle)
    start = lax.stop_gradient(y0)[None]
    return xs, jnp.where(solved[:, None], shift(y0, ys), start)


def _constant(tree: PyTree[Any]) -> PyTree[Any]:
    """`tree` without derivatives."""
    stop = lambda x: lax.stop_gradient(x) if eqx.is_inexact_array(x) else x
    return jax.tree.map(stop, tree)


def _where(solved: Bool[Array, " time"], tree: PyTree[Array]) -> PyTree[Array]:
    """`tree`, leaves of leading axis `time`, zero where a step was not solved."""
    mask = jax.vmap(lambda s, x: jnp.where(s, x, jnp.zeros_like(x)))
    return jax.tree.map(ft.partial(mask, solved), tree)


def _linear_response(
    product: Callable[[States], States],
    step_map: StepMap,
    points: tuple[PyTree[Any], States],
    ys: States,
    inhomogeneity: States,
    iteration: NewtonIteration,
) -> States:
    """Solves `v_n = J_n v_{n-1} + b_n`, J_n the exact Jacobian of the step at `points`.

    `product` maps all `v_{n-1}` to `J_n v_{n-1}`. By the Jacobians themselves or, where
    D is large and the iteration has no such array either, by products with them.
    """
    num_steps, size = ys.shape
    if step_map.is_elementwise:
        diagonals = product(jnp.ones_like(ys))
        return affine_recurrence(diagonals, inhomogeneity, scan=iteration.scan)
    if iteration.linearization.is_dense:
        check_size(num_steps, size)
    if iteration.linearization.is_dense or size <= MOST_DIRECT:
        if step_map.full is None:
            # A cell multiplies its state by weights, and so do unit vectors: the same
            # products for all steps. `product` would make them for each.
            jacobians = jax.vmap(ft.partial(step_jacobian, step_map))(*points)
        else:
            units = jnp.eye(size, dtype=ys.dtype)[:, None]
            units = jnp.broadcast_to(units, (size, num_steps, size))
            jacobians = jnp.moveaxis(jax.vmap(product)(units), 0, -1)
        return affine_recurrence(jacobians, inhomogeneity, scan=iteration.scan)
    linearize = jax.vmap(ft.partial(iteration.linearization, _constant(step_map)))
    xs, starts = points
    transitions = linearize(*_constant((xs, starts, ys)))
    scan = iteration.scan
    return matrix_free_recurrence(product, transitions, inhomogeneity, scan=scan)


def _tangents_step_by_step(
    step_map: StepMap,
    points: tuple[PyTree[Any], States],
    solved: Bool[Array, " time"],
    tangents: tuple[Any, Any, State],
) -> tuple[States, PyTree[Any]]:
    """The recurrence of the derivative, in sequence and without any Jacobian.

    And the derivative of what else the steps yield.
    """
    step_map_dot, xs_dot, y0_dot = tangents
    step = lambda step_map, x, y: step_map.evaluate(x, y)

    # Evaluated again for the derivative: to keep what is inside of the step would cost
    # more memory, and more time to write it down and to read it.
    @ft.partial(jax.checkpoint, prevent_cse=False)
    def push(y_dot, inputs):
        solved, x, x_dot, y = inputs
        y_dot = jnp.where(solved, y_dot, jnp.zeros_like(y_dot))
        tangents = step_map_dot, x_dot, y_dot
        _, (y_dot, more_dot) = eqx.filter_jvp(step, (step_map, x, y), tangents)
        return y_dot, (y_dot, more_dot)

    xs, starts = points
    return lax.scan(push, y0_dot, (solved, xs, xs_dot, starts))[1]


@eqx.filter_custom_jvp
def _solve(step_map, y0, xs, *, guess, forward, iteration, idle):
    ys, statistics, more = forward(step_map, y0, xs, guess, iteration)
    if more is None:
        points = linearization_points(y0, xs, ys, statistics, idle)
        _, more = jax.vmap(step_map.evaluate)(*points)
    solved = jnp.arange(len(ys)) < statistics.num_solved
    return ys, statistics, _where(solved, more)


_NOT_FORWARDS = (
    "What is solved in parallel is differentiated forwards, also for a gradient, and "
    "the vector field, or the function of a recurrence, contains a `jax.custom_vjp`, "
    "which JAX cannot differentiate so: one of yours, or a loop of Equinox of "
    'kind="checkpointed". Use `jax.custom_jvp`, or kind="bounded", or diffrax\'s own '
    "solvers."
)


@contextlib.contextmanager
def _explained() -> Generator[None, None, None]:
    """Says what to do about a `jax.custom_vjp`."""
    try:
        yield
    except (NotImplementedError, TypeError) as error:
        if "custom_lin" in str(error) or "custom_vjp" in str(error):
            raise TypeError(_NOT_FORWARDS) from error
        raise


@_solve.def_jvp
@_explained()
def _(primals, tangents, **kwargs):
    step_map, y0, xs = primals
    ys, statistics, more = _solve(step_map, y0, xs, **kwargs)
    idle, iteration = kwargs["idle"], kwargs["iteration"]
    points = linearization_points(y0, xs, ys, statistics, idle)
    solved = jnp.arange(len(ys)) < statistics.num_solved
    step_map_dot, y0_dot, xs_dot = tangents
    if idle is not None:
        xs_dot = _where(solved, xs_dot)
    y0_dot = jnp.zeros_like(y0) if y0_dot is None else y0_dot
    no_tangents = jax.tree.map(lambda _: None, statistics)
    if isinstance(kwargs["forward"], StepByStep):
        tangents = step_map_dot, xs_dot, y0_dot
        ys_dot, more_dot = _tangents_step_by_step(step_map, points, solved, tangents)
        return (ys, statistics, more), (ys_dot, no_tangents, _where(solved, more_dot))
    moved = lambda y0_dot, ys_dot: _where(solved, shift(y0_dot, ys_dot))

    # The steps are evaluated and linearized once, for all that follows.
    drivers_dot = step_map_dot, xs_dot
    drivers, fixed = driven((step_map, points[0]), drivers_dot)

    def steps(drivers, starts):
        step_map, xs = eqx.combine(drivers, fixed)
        images, more = jax.vmap(step_map.evaluate)(xs, starts)
        smooth, rest = eqx.partition(more, eqx.is_inexact_array)
        return (images, smooth), rest

    (_, smooth), push, rest = jax.linearize(steps, drivers, points[1], has_aux=True)
    # `ys` is held fixed here: its own tangent is what the recurrence solves for, by
    # `product`, which as the derivative of a linear map is that of the states alone.
    (inhomogeneity, smooth_dot), product = jax.linearize(
        ft.partial(push, drivers_dot), moved(y0_dot, jnp.zeros_like(ys))
    )
    ys_dot = _linear_response(
        lambda v: product(v)[0], step_map, points, ys, inhomogeneity, iteration
    )
    _, along = product(moved(jnp.zeros_like(y0), ys_dot))
    more = _where(solved, eqx.combine(smooth, rest))
    more_dot = _where(solved, jax.tree.map(jnp.add, smooth_dot, along))
    return (ys, statistics, more), (ys_dot, no_tangents, more_dot)


def _solve_in_blocks(
    step_map: StepMap,
    y0: State,
    xs: PyTree[Any],
    guess: States,
    forward: AbstractForward,
    iteration: NewtonIteration,
    idle: PyTree[Any],
    layout: Layout,
) -> tuple[States, Statistics, PyTree[Array]]:
    """`solve` for the state in another order, in which its blocks are contiguous."""
    blocks = BlockDiagonalJacobian(block_size=layout.block_size)
    ys, statistics, more = solve(
        layout.arranged(step_map),
        layout.arrange(y0),
        xs,
        jax.vmap(layout.arrange)(guess),
        forward,
        eqx.tree_at(lambda i: i.linearization, iteration, blocks),
        idle,
    )
    return jax.vmap(layout.restore)(ys), statistics, more


def solve(
    step_map: StepMap,
    y0: State,
    xs: PyTree[Any],
    guess: States,
    forward: AbstractForward,
    iteration: NewtonIteration,
    idle: PyTree[Any] = None,
) -> tuple[States, Statistics, PyTree[Array]]:
    r"""Solves $y_n = \Phi(x_n, y_{n-1})$ for all n, differentiably.

    **Arguments:**

    - `step_map`: the step. May close over traced values, which are differentiated.
    - `y0`: the initial state, `(state,)`, real.
    - `xs`: what drives the steps, a pytree of arrays of leading axis `time`.
    - `guess`: any trajectory, `(time, state)`; the result does not depend on it.
    - `forward`: how the forward pass is done; with `StepByStep`, the derivative, too.
    - `iteration`: Newton's method, and the scan that solves its linear system.
    - `idle`: an `x` at which the step and its derivatives are finite for `y0`, used
        instead of `xs` where the solve has failed. A step of length zero, for example.

    **Returns:**

    The states `y_1` to `y_N`, `(time, state)`, finite if `y0` is; the `Statistics`; and
    what else the steps yield, of leading axis `time`, zero where they were not solved,
    or `None`. Exact derivatives of any order and mode with respect to `y0`, `xs` and
    all that `step_map` depends on; none with respect to `guess`.

    With N steps and D components a derivative holds one array of shape `(N, D, D)` if D
    is at most 16 or the transitions are dense, those of `FullJacobian` or
    `PiecewiseConstant`. Otherwise it is solved for by `matrix_free_recurrence`, to the
    tolerance stated there and in memory O(N D): by sweeps, each of one vectorized JVP
    or VJP of the step, whose number depends on the transitions, as that of the
    iterations does, but is not bounded by `max_iterations`. The step then has to be one
    that JAX can differentiate in reverse mode, even in forward mode.
    """
    if y0.size == 0:
        zero = jnp.zeros((), guess.dtype)
        count = jnp.array(0, int), jnp.array(len(guess), int)
        points = xs, jnp.zeros((len(guess), 0), guess.dtype)
        statistics = Statistics(count[0], zero, count[1], optx.RESULTS.successful)
        return guess, statistics, jax.vmap(step_map.evaluate)(*points)[1]
    if isinstance(iteration.linearization, BlockDiagonalJacobian):
        layout = iteration.linearization.layout(step_map, y0.size)
        if not layout.is_contiguous:
            return _solve_in_blocks(
                step_map, y0, xs, guess, forward, iteration, idle, layout
            )
    x = jax.tree.map(lambda x: x[0], xs)
    # So that all it closes over is an argument, which is differentiated.
    convert = lambda f, *args: f and eqx.filter_closure_convert(f, *args)
    is_iterative = not isinstance(forward, SequentialForward | StepByStep)
    step_map = StepMap(
        convert(step_map.step, x, y0),
        convert(step_map.increment, x, y0),
        convert(step_map.full, x, y0),
        convert(step_map.leap, x, x, y0) if is_iterative else None,
        convert(step_map.between, x, x, x, y0) if is_iterative else None,
        step_map.leaves,
        step_map.is_elementwise,
    )
    return _solve(
        step_map,
        y0,
        xs,
        guess=lax.stop_gradient(guess),
        forward=forward,
        iteration=iteration,
        idle=lax.stop_gradient(idle),
    )
