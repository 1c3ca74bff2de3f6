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

import functools as ft
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix as optx
from jax import lax
from jaxtyping import PyTree

from ._affine_scan import affine_recurrence
from ._blocks import BlockDiagonalJacobian, Layout
from ._causal import shift
from ._checks import check_size
from ._custom_types import State, States
from ._forward import AbstractForward
from ._linearization import StepMap, step_jacobian
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


def _linear_response(
    step_map: StepMap,
    points: tuple[PyTree[Any], States],
    ys: States,
    inhomogeneity: States,
    iteration: NewtonIteration,
) -> States:
    """Solves `v_n = J_n v_{n-1} + b_n`, J_n the exact Jacobian of the step at `points`.

    By the Jacobians themselves or, where D is large and the iteration has no such array
    either, by products with them.
    """
    xs, starts = points
    if iteration.linearization.is_dense:
        check_size(*ys.shape)
    if iteration.linearization.is_dense or ys.shape[1] <= MOST_DIRECT:
        jacobians = jax.vmap(ft.partial(step_jacobian, step_map))(xs, starts)
        return affine_recurrence(jacobians, inhomogeneity, scan=iteration.scan)
    steps = lambda starts: jax.vmap(step_map.step)(xs, starts)
    _, product = jax.linearize(steps, starts)
    linearize = jax.vmap(ft.partial(iteration.linearization, _constant(step_map)))
    transitions = linearize(*_constant((xs, starts, ys)))
    scan = iteration.scan
    return matrix_free_recurrence(product, transitions, inhomogeneity, scan=scan)


@eqx.filter_custom_jvp
def _solve(step_map, y0, xs, *, guess, forward, iteration, idle):
    del idle
    return forward(step_map, y0, xs, guess, iteration)


@_solve.def_jvp
def _(primals, tangents, **kwargs):
    step_map, y0, xs = primals
    solution = _solve(step_map, y0, xs, **kwargs)
    ys, statistics = solution
    points = lambda y0, xs: linearization_points(y0, xs, ys, statistics, kwargs["idle"])

    def images(step_map, y0, xs):
        # `ys` is held fixed here; its own tangent is what the recurrence solves for.
        return jax.vmap(step_map.step)(*points(y0, xs))

    _, inhomogeneity = eqx.filter_jvp(images, primals, tangents)
    iteration = kwargs["iteration"]
    ys_dot = _linear_response(step_map, points(y0, xs), ys, inhomogeneity, iteration)
    return solution, (ys_dot, jax.tree.map(lambda _: None, statistics))


def _solve_in_blocks(
    step_map: StepMap,
    y0: State,
    xs: PyTree[Any],
    guess: States,
    forward: AbstractForward,
    iteration: NewtonIteration,
    idle: PyTree[Any],
    layout: Layout,
) -> tuple[States, Statistics]:
    """`solve` for the state in another order, in which its blocks are contiguous."""
    blocks = BlockDiagonalJacobian(block_size=layout.block_size)
    ys, statistics = solve(
        layout.arranged(step_map),
        layout.arrange(y0),
        xs,
        jax.vmap(layout.arrange)(guess),
        forward,
        eqx.tree_at(lambda i: i.linearization, iteration, blocks),
        idle,
    )
    return jax.vmap(layout.restore)(ys), statistics


def solve(
    step_map: StepMap,
    y0: State,
    xs: PyTree[Any],
    guess: States,
    forward: AbstractForward,
    iteration: NewtonIteration,
    idle: PyTree[Any] = None,
) -> tuple[States, Statistics]:
    r"""Solves $y_n = \Phi(x_n, y_{n-1})$ for all n, differentiably.

    **Arguments:**

    - `step_map`: the step. May close over traced values, which are differentiated.
    - `y0`: the initial state, `(state,)`, real.
    - `xs`: what drives the steps, a pytree of arrays of leading axis `time`.
    - `guess`: any trajectory, `(time, state)`; the result does not depend on it.
    - `forward`: how the forward pass is done.
    - `iteration`: Newton's method, and the scan that solves its linear system.
    - `idle`: an `x` at which the step and its derivatives are finite for `y0`, used
        instead of `xs` where the solve has failed. A step of length zero, for example.

    **Returns:**

    The states `y_1` to `y_N`, `(time, state)`, and the `Statistics`. Always finite if
    `y0` is. Exact derivatives of any order and mode with respect to `y0`, `xs` and all
    that `step_map` depends on; none with respect to `guess`.

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
        return guess, Statistics(count[0], zero, count[1], optx.RESULTS.successful)
    if isinstance(iteration.linearization, BlockDiagonalJacobian):
        layout = iteration.linearization.layout(step_map, y0.size)
        if not layout.is_contiguous:
            return _solve_in_blocks(
                step_map, y0, xs, guess, forward, iteration, idle, layout
            )
    x = jax.tree.map(lambda x: x[0], xs)
    # So that all it closes over is an argument, which is differentiated.
    convert = lambda f, *args: f and eqx.filter_closure_convert(f, *args)
    step_map = StepMap(
        convert(step_map.step, x, y0),
        convert(step_map.increment, x, y0),
        convert(step_map.jacobian, x, y0),
        convert(step_map.leap, x, x, x, y0),
        step_map.leaves,
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
