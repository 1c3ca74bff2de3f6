r"""The Jacobian of a diagonally implicit Runge-Kutta step, from its solution.

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
from jaxtyping import Array, Float

from ._custom_types import Matrix, RealScalarLike, State
from ._linearization import value_and_jacobian
from ._matrix_functions import matmul


class Tableau(NamedTuple):
    """The coefficients: `a`, lower triangular with the diagonal, weights and nodes."""

    a: np.ndarray
    b: np.ndarray
    c: np.ndarray


IMPLICIT_EULER = Tableau(np.ones((1, 1)), np.ones(1), np.ones(1))


def dirk_tableau(tableau: diffrax.ButcherTableau) -> Tableau:
    """The coefficients of an implicit method in diffrax's notation."""
    assert tableau.a_diagonal is not None
    a = np.diag(np.asarray(tableau.a_diagonal, np.float64))
    for i, row in enumerate(tableau.a_lower):
        a[i + 1, : i + 1] = row
    return Tableau(a, np.asarray(tableau.b_sol), np.append(tableau.c1, tableau.c))


def combine(weights: np.ndarray, terms: Sequence[Array] | Array, start: Array) -> Array:
    """The weighted sum of `terms`, added to `start`; weights of zero cost nothing."""
    pairs = zip(weights, terms, strict=True)
    return sum((float(w) * x for w, x in pairs if w != 0), start=start)


def dirk_jacobian(
    tableau: Tableau,
    product: Callable[[RealScalarLike, State], State],
    x: tuple[RealScalarLike, RealScalarLike],
    y: State,
    ks: Float[Array, "stages state"],
) -> Matrix:
    r"""$\partial\Phi/\partial y$ of one step, `(state, state)`.

    **Arguments:**

    - `tableau`: the method.
    - `product(t, y)`: $h f(t, y)$.
    - `x`: the times at the beginning and at the end of the step.
    - `y`: the state at its beginning, `(state,)`.
    - `ks`: the solved stages.

    Costs D tangents of the field and, if it is implicit, a linear system with D
    right-hand sides for each stage.
    """
    t0, t1 = x
    stages = jnp.stack([combine(row, ks, y) for row in tableau.a])
    times = jnp.stack([t0 + float(c) * (t1 - t0) for c in tableau.c])
    jacobian = lambda t, y: value_and_jacobian(lambda y: product(t, y), y)[1]
    jacobians = jax.vmap(jacobian)(times, stages)
    identity = jnp.eye(y.size, dtype=y.dtype)
    derivatives: list[Array] = []
    for i, row in enumerate(tableau.a):
        right = matmul(jacobians[i], combine(row[:i], derivatives, identity))
        if row[i] != 0:
            left = identity - float(row[i]) * jacobians[i]
            right = jnp.linalg.solve(left, right)
        derivatives.append(right)
    return combine(tableau.b, derivatives, identity)
