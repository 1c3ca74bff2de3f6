r"""The solution and its derivative, by the implicit function theorem.

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

import dataclasses
from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import optimistix as optx
from jax import lax
from jaxtyping import Array, Int, PyTree

from ._checks import explained
from ._custom_types import State, States
from ._defaults import unless
from ._gradient import AbstractGradient, Solution, mask_unsolved
from ._method import AbstractMethod
from ._prefix import at, count_leading_true, hold_last, select, shift
from ._statistics import Statistics
from ._step_map import StepMap
from ._varying import uniform


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
    points = xs, shift(y0, ys)

    def filled():
        solved, last = jnp.arange(len(ys)) < num_solved, jnp.maximum(num_solved - 1, 0)
        stand_in = lax.stop_gradient(jax.tree.map(lambda x: at(x, last), points))
        if placeholder_x is not None:
            none = placeholder_x, lax.stop_gradient(y0)
            stand_in = select(num_solved == 0, none, stand_in)
        return jax.vmap(select, in_axes=(0, 0, None))(solved, points, stand_in)

    # To look for what is hardly ever needed costs as much as a step of the solver.
    complete = eqxi.unvmap_all(num_solved == len(ys))
    return unless(complete, lambda: points, filled)


@eqx.filter_custom_jvp
def _solve(step_map, y0, xs, *, guess, method, gradient, placeholder_x):
    with explained():
        ys, statistics, aux = method(step_map, y0, xs, guess)
    num_solved = statistics.num_solved
    if aux is None:
        points = evaluation_points(y0, xs, ys, num_solved, placeholder_x)
        _, aux = jax.vmap(step_map.evaluate)(*points)
    if step_map.is_defined is not None:
        num_defined = count_leading_true(jax.vmap(step_map.is_defined)(aux))
        result = optx.RESULTS.where(
            num_defined < num_solved, optx.RESULTS.nonfinite, statistics.result
        )
        num_solved = jnp.minimum(num_solved, num_defined)
        ys = hold_last(y0, ys, num_solved)
        statistics = dataclasses.replace(
            statistics, num_solved=num_solved, result=result
        )
    solved = jnp.arange(len(ys)) < num_solved
    statistics = dataclasses.replace(statistics, gradient=gradient)
    return ys, statistics, mask_unsolved(solved, aux)


@_solve.def_jvp
def _(primals, tangents, **kwargs):
    step_map, y0, xs = primals
    ys, statistics, aux = _solve(step_map, y0, xs, **kwargs)
    num_solved = statistics.num_solved
    points = evaluation_points(y0, xs, ys, num_solved, kwargs["placeholder_x"])
    solved = jnp.arange(len(ys)) < num_solved
    step_map_dot, y0_dot, xs_dot = tangents
    xs_dot = mask_unsolved(solved, xs_dot)
    y0_dot = jnp.zeros_like(y0) if y0_dot is None else y0_dot
    solution = Solution(step_map, *points, ys, solved)
    with explained():
        ys_dot, aux_dot = kwargs["gradient"](solution, (step_map_dot, xs_dot, y0_dot))
    no_tangents = jax.tree.map(lambda _: None, statistics)
    return (ys, statistics, aux), (ys_dot, no_tangents, mask_unsolved(solved, aux_dot))


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
    - `placeholder_x`: an `x` at which the step and its derivatives, but for the one by
        `y0`, are finite, used where no step was solved at all. A very short step.

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
    y0, xs, guess, placeholder_x = uniform((y0, xs, guess, placeholder_x))
    return _solve(
        step_map.closed(jax.tree.map(lambda x: x[0], xs), y0),
        y0,
        xs,
        guess=lax.stop_gradient(guess),
        method=method,
        gradient=gradient,
        placeholder_x=lax.stop_gradient(placeholder_x),
    )
