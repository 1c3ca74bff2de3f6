r"""The stages of a Runge-Kutta step, and from them the Jacobian of an implicit one.

With $k_i = h f(t_i, Y_i)$ and $Y_i = y + \sum_{j \le i} a_{ij} k_j$ solved, the
implicit function theorem gives their derivatives one after another,

$$(I - a_{ii} J_i)\, K_i = J_i \Big(I + \sum_{j < i} a_{ij} K_j\Big), \qquad
J_i = h \frac{\partial f}{\partial y}(t_i, Y_i), \qquad
\frac{\partial\Phi}{\partial y} = I + \sum_i b_i K_i,$$

whatever the root finder was, and without an error where it has failed.

??? cite "Reference"

    Hairer and Wanner, *Solving Ordinary Differential Equations II*, Springer 1996,
    section IV.8.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ._custom_types import Matrix, RealScalarLike, State
from ._linearization import value_and_jacobian
from ._matrix_functions import matmul


class Tableau(NamedTuple):
    """The coefficients: `a`, lower triangular with the diagonal, weights and nodes."""

    a: np.ndarray
    b: np.ndarray
    c: np.ndarray


def tableau_of(solver: diffrax.AbstractSolver) -> Tableau | None:
    """The coefficients of an explicit or diagonally implicit method, if it is one."""
    # `type`: a wrapped solver answers `isinstance` in the name of its inner one.
    kind = type(solver)
    if kind is diffrax.ImplicitEuler:
        return Tableau(np.ones((1, 1)), np.ones(1), np.ones(1))
    if not issubclass(kind, diffrax.AbstractERK | diffrax.AbstractDIRK):
        return None
    tableau: diffrax.ButcherTableau = solver.tableau  # pyright: ignore
    size = tableau.num_stages
    diagonal = np.zeros(size) if tableau.a_diagonal is None else tableau.a_diagonal
    a = np.diag(np.asarray(diagonal, np.float64))
    for i, row in enumerate(tableau.a_lower):
        a[i + 1, : i + 1] = row
    c1 = 0.0 if tableau.c1 is None else tableau.c1
    return Tableau(a, np.asarray(tableau.b_sol), np.append(c1, tableau.c))


def combine(
    weights: Sequence[float] | np.ndarray, terms: Sequence[Array] | Array, start: Array
) -> Array:
    """The weighted sum of `terms`, added to `start`; weights of zero cost nothing."""
    pairs = zip(weights, terms, strict=True)
    return sum((float(w) * x for w, x in pairs if w != 0), start=start)


def time_of(node: float, x: tuple[RealScalarLike, RealScalarLike]) -> RealScalarLike:
    """The time of a stage in the step between the two times `x`."""
    t0, t1 = x
    return t1 if node == 1 else t0 + float(node) * (t1 - t0)


def dirk_jacobian(
    tableau: Tableau,
    product: Callable[[RealScalarLike, State], State],
    times: Sequence[RealScalarLike],
    states: Sequence[State],
) -> Matrix:
    r"""$\partial\Phi/\partial y$ of one step, `(state, state)`.

    **Arguments:**

    - `tableau`: the method.
    - `product(t, y)`: $h f(t, y)$.
    - `times`, `states`: where the solved step evaluates the field; each of the latter
        `(state,)`.

    Costs D tangents of the field and, if it is implicit, a linear system with D
    right-hand sides for each stage.
    """
    jacobian = lambda t, y: value_and_jacobian(lambda y: product(t, y), y)[1]
    jacobians = jax.vmap(jacobian)(jnp.stack(times), jnp.stack(states))
    identity = jnp.eye(states[0].size, dtype=states[0].dtype)
    derivatives: list[Array] = []
    for i, row in enumerate(tableau.a):
        right = matmul(jacobians[i], combine(row[:i], derivatives, identity))
        if row[i] != 0:
            left = identity - float(row[i]) * jacobians[i]
            right = jnp.linalg.solve(left, right)
        derivatives.append(right)
    return combine(tableau.b, derivatives, identity)
