r"""The stages of a Runge-Kutta step, differentiated as what they are: equations.

With $k_i = h f(t_i, Y_i; \theta)$ and $Y_i = y + \sum_{j \le i} a_{ij} k_j$ solved, the
implicit function theorem gives their derivatives one after another,

$$(I - a_{ii} J_i)\, \dot k_i = J_i \Big(\dot y + \sum_{j < i} a_{ij} \dot k_j\Big)
    + \dot s_i, \qquad
J_i = h \frac{\partial f}{\partial y}(t_i, Y_i), \qquad
\dot s_i = \frac{\partial\, h f}{\partial (t, h, \theta)}(t_i, Y_i)
    (\dot t_i, \dot h, \dot\theta),$$

whatever the root finder of an implicit method was, and without an error where it has
failed. The field is differentiated at known points: all stages for the state, with D
tangents each, and all for the parameters, in one sweep. What leads from stage to stage
are products of small matrices.

??? cite "Reference"

    Hairer and Wanner, *Solving Ordinary Differential Equations II*, Springer 1996,
    section IV.8.
"""

import functools as ft
from collections.abc import Callable, Sequence
from typing import NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from .._custom_types import Matrix, RealScalarLike, State
from .._defaults import MAX_UNROLLED, UNROLLED_STAGES, prefers_sequential_steps
from .._step_map import split_by_tangent, value_and_jacobian

Times = tuple[RealScalarLike, RealScalarLike]
Weights = tuple[float, ...]


class Tableau(NamedTuple):
    """The coefficients of a method, in Python numbers: they are part of the program.

    `a`, `(stages, stages)`, lower triangular with the diagonal; `b`, `c` and `b_error`,
    `(stages,)`, the weights, the nodes and the weights of the error estimate.
    """

    a: tuple[Weights, ...]
    b: Weights
    c: Weights
    b_error: Weights

    @property
    def is_explicit(self) -> bool:
        """Whether no stage depends on itself."""
        return not any(row[i] for i, row in enumerate(self.a))


def tableau_of(solver: diffrax.AbstractSolver) -> Tableau | None:
    """The coefficients of an explicit or diagonally implicit method, if it is one."""
    # `type`: a wrapped solver answers `isinstance` in the name of its inner one.
    kind = type(solver)
    if kind is diffrax.ImplicitEuler:
        # The stage at the beginning of the step is for the error estimate.
        last = (0.0, 1.0)
        return Tableau(((0.0, 0.0), last), last, last, (-0.5, 0.5))
    if not issubclass(kind, diffrax.AbstractERK | diffrax.AbstractDIRK):
        return None
    tableau: diffrax.ButcherTableau = solver.tableau  # pyright: ignore
    size = tableau.num_stages
    a = np.zeros((size, size))
    if tableau.a_diagonal is not None:
        np.fill_diagonal(a, tableau.a_diagonal)
    for i, row in enumerate(tableau.a_lower):
        a[i + 1, : i + 1] = row
    c = np.append(0.0 if tableau.c1 is None else tableau.c1, tableau.c)
    numbers = lambda x: tuple(np.asarray(x, np.float64).tolist())
    return Tableau(
        tuple(map(numbers, a)),
        numbers(tableau.b_sol),
        numbers(c),
        numbers(tableau.b_error),
    )


def combine(weights: Sequence[float], terms: Sequence[Array], like: Array) -> Array:
    """The weighted sum of `terms`, each `like` the other; weights of 0 cost nothing."""
    pairs = zip(weights, terms, strict=True)
    products = (weight * x for weight, x in pairs if weight != 0)
    return sum(products, start=jnp.zeros_like(like))


def time_of(node: float, x: Times) -> RealScalarLike:
    """The time of a stage in the step between the two times `x`."""
    t0, t1 = x
    return t1 if node == 1 else t0 + node * (t1 - t0)


def stage_state(row: Weights, y: State, ks: Sequence[State]) -> State:
    """The state at the stage of a row of `a`, or the part of it that `ks` make."""
    row = row[: len(ks)]
    return y + combine(row, ks, y) if any(row) else y


def _product(a: Matrix, x: State) -> State:
    """The product of a small matrix and a vector, in full precision."""
    large = x.size > MAX_UNROLLED
    if x.size in UNROLLED_STAGES or not (large or prefers_sequential_steps()):
        return sum((a[:, k] * x[k] for k in range(1, x.size)), start=a[:, 0] * x[0])
    return jnp.matmul(a, x, precision=lax.Precision.HIGHEST)


def evaluate_stages(
    field: Callable[[Times, RealScalarLike, State], State],
    solve: Callable[[Times, State], tuple[list[State], diffrax.RESULTS]] | None,
    x: Times,
    y: State,
    *,
    tableau: Tableau,
) -> tuple[list[State], diffrax.RESULTS]:
    """The field at each stage, times the length of the step.

    **Arguments:**

    - `field(x, t, y)`: $h f(t, y)$, for a step between the two times `x`.
    - `solve(x, y)`: the same as this function, for implicit methods; otherwise `None`.
    - `x`, `y`: the times and the state, `(state,)`.
    - `tableau`: the method.

    **Returns:**

    One array, `(state,)`, for each stage, and the result of the solver.
    """
    if solve is not None:
        return solve(x, y)
    # Unrolled: diffrax runs the stages in a loop, which costs twice the time. Traced
    # once, and differentiated once, for all stages; XLA inlines it.
    product, ks = jax.jit(lambda *args: field(*args)), []
    for row, c in zip(tableau.a, tableau.c, strict=True):
        ks.append(product(x, time_of(c, x), stage_state(row, y, ks)))
    return ks, diffrax.RESULTS.successful


@eqx.filter_custom_jvp
def solve_stages(field, solve, x, y, *, tableau):
    """`evaluate_stages`, with the derivative above, in any mode and of any order.

    The same arguments; `field` and `solve` must be pytrees of all they depend on. Costs
    D tangents of the field for each stage and, if it is implicit, one linear system of
    size D.
    """
    return evaluate_stages(field, solve, x, y, tableau=tableau)


@solve_stages.def_jvp
def _(primals, tangents, *, tableau):
    (field, solve, x, y), (field_dot, _, x_dot, y_dot) = primals, tangents
    times_of = lambda x: [jnp.asarray(time_of(c, x)) for c in tableau.c]
    times, times_dot = eqx.filter_jvp(times_of, (x,), (x_dot,))
    fill = lambda x, x_dot: jnp.zeros_like(x) if x_dot is None else x_dot
    times_dot = list(map(fill, times, times_dot))
    drivers_dot = field_dot, x_dot
    drivers, fixed = split_by_tangent((field, x), drivers_dot)

    @jax.jit
    def linearize(drivers, t, y, drivers_dot, t_dot):
        """Value, Jacobian, and the derivative for all but the state."""

        def product(drivers, t, y):
            field, x = eqx.combine(drivers, fixed)
            return field(x, t, y)

        k, push = jax.linearize(product, drivers, t, y)
        source = push(drivers_dot, t_dot, jnp.zeros_like(y))
        # The derivative of a linear map: of the state alone, whatever the rest is.
        _, matrix = value_and_jacobian(ft.partial(push, drivers_dot, t_dot), y)
        return k, matrix, source

    ks, result, all_at_once = [], diffrax.RESULTS.successful, None
    if solve is not None or not prefers_sequential_steps():
        ks, result = solve_stages(field, solve, x, y, tableau=tableau)
    if not prefers_sequential_steps():
        states = jnp.stack([stage_state(row, y, ks) for row in tableau.a])
        points = jnp.stack(times), states, drivers_dot, jnp.stack(times_dot)
        all_at_once = jax.vmap(linearize, (None, 0, 0, None, 0))(drivers, *points)
    y_dot = fill(y, y_dot)
    ks_dot: list[Array] = []
    for i, row in enumerate(tableau.a):
        points = times[i], stage_state(row, y, ks), drivers_dot, times_dot[i]
        if all_at_once is None:
            k, matrix, source = linearize(drivers, *points)
        else:
            k, matrix, source = (x[i] for x in all_at_once)
        # With the Jacobians come the values of explicit stages.
        ks = [*ks, k] if len(ks) == i else ks
        k_dot = _product(matrix, stage_state(row, y_dot, ks_dot)) + source
        if row[i] != 0:
            left = jnp.eye(y.size, dtype=y.dtype) - row[i] * matrix
            k_dot = jnp.linalg.solve(left, k_dot)
        ks_dot.append(k_dot)
    return (ks, result), (ks_dot, jax.tree.map(lambda _: None, result))
