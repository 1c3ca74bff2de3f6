r"""From a step map to the transitions $A_n$ of the affine recurrence.

The answer of a solve depends on the step map $\Phi_n$ alone; the transition
$A_n \approx \partial\Phi_n/\partial y$ only decides in how many iterations it is found:

| transition | method | cost, beside one step |
| --- | --- | --- |
| $\partial\Phi_n/\partial y$ | Newton | D tangents of the step |
| $\exp(h_n J_n)$ | DEER, for fields | D tangents of the field, one exponential |
| its diagonal | quasi-DEER | D tangents of the step |
| $I$ | Picard | nothing |

??? cite "Reference"

    Lim, Zhu, Selfridge and Kasim, *Parallelizing non-linear sequential models over the
    sequence length*, arXiv:2309.12252, equations 6 and 9 (Newton, DEER). Gonzalez et
    al., *Towards scalable and stable parallelization of nonlinear RNNs*,
    arXiv:2407.19115 (quasi-DEER).
"""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from ._custom_types import Matrix, State, Transition, VectorField
from ._matrix_functions import expm


class StepMap(eqx.Module):
    r"""One step of a recurrence, $y_n = \Phi(x_n, y_{n-1})$, for states `(state,)`.

    - `step(x, y)`: the step map $\Phi$.
    - `increment(x, y)`: where the step belongs to a differential equation, the product
        $h f(t, y)$ at the middle of the step; otherwise `None`.
    - `jacobian(x, y)`: the matrix of derivatives of `step` for y, `(state, state)`,
        where there is a better way to it than differentiating `step`, or `None`.
    - `leap(first, last, x, y)`: where there are longer steps, one from the beginning of
        the step `first` to the end of `last`, and what it predicts for the state after
        the step `x` between them; otherwise `None`.

    `x` is what drives the step: its two times, or the input of a recurrent network.
    """

    step: Callable[[PyTree[Any], State], State]
    increment: Callable[[PyTree[Any], State], State] | None = None
    jacobian: Callable[[PyTree[Any], State], Matrix] | None = None
    leap: Callable[[PyTree[Any], PyTree[Any], PyTree[Any], State], State] | None = None


def value_and_jacobian(f: VectorField, y: State) -> tuple[State, Matrix]:
    """The value `f(y)` and the matrix of shape `(D, D)` of its derivatives, D ≥ 1."""
    push = lambda direction: jax.jvp(f, (y,), (direction,))
    values, jacobian = jax.vmap(push, out_axes=(0, -1))(jnp.eye(y.size, dtype=y.dtype))
    return values[0], jacobian


def step_jacobian(step_map: StepMap, x: PyTree[Any], y: State) -> Matrix:
    """The matrix of shape `(D, D)` of the derivatives of a step, D ≥ 1."""
    if step_map.jacobian is not None:
        return step_map.jacobian(x, y)
    return value_and_jacobian(lambda y: step_map.step(x, y), y)[1]


class AbstractLinearization(eqx.Module):
    """The choice of the transition. The answer and its gradient do not depend on it."""

    @abc.abstractmethod
    def __call__(
        self, step_map: StepMap, x: PyTree[Any], y_prev: State, y_next: State
    ) -> Transition:
        """Linearizes one step along the current guess.

        **Arguments:**

        - `step_map`: the step.
        - `x`: what drives this step.
        - `y_prev`, `y_next`: the guess before and after the step, each `(state,)`.

        **Returns:**

        The transition, `(state, state)` if dense or `(state,)` if diagonal.
        """


class FullJacobian(AbstractLinearization):
    r"""Newton's method: $A_n = \partial\Phi_n/\partial y$ at the guess, dense.

    Converges quadratically. For any step map; the choice for recurrent networks.
    """

    def __call__(self, step_map, x, y_prev, y_next):
        del y_next
        return step_jacobian(step_map, x, y_prev)


class PiecewiseConstant(AbstractLinearization):
    r"""DEER for differential equations: $A_n = \exp(h_n J_n)$, dense.

    $J_n$ is the Jacobian of the vector field in the middle of the step, held constant
    over it. Agrees with the Jacobian of any consistent step map up to $O(h^3)$, and
    differentiates one evaluation of the field instead of all stages of the step: the
    cheapest choice for differential equations, with hardly more iterations than Newton.
    """

    def __call__(self, step_map, x, y_prev, y_next):
        increment = step_map.increment
        if increment is None:
            msg = (
                "`PiecewiseConstant` linearizes the vector field of a differential "
                "equation; a recurrence, or a solver that splits the field into "
                "several terms, has none. Use `FullJacobian()`, `DiagonalJacobian()` "
                "or `Picard()`."
            )
            raise TypeError(msg)
        middle = (y_prev + y_next) / 2
        _, jacobian = value_and_jacobian(lambda y: increment(x, y), middle)
        return expm(jacobian)


class DiagonalJacobian(AbstractLinearization):
    r"""quasi-DEER: the diagonal of $\partial\Phi_n/\partial y$.

    The recurrence costs O(N D) instead of O(N D²) or O(N D³); the iterations are more,
    and the fewer the weaker the components are coupled.
    """

    def __call__(self, step_map, x, y_prev, y_next):
        del y_next
        return jnp.diagonal(step_jacobian(step_map, x, y_prev))


class Picard(AbstractLinearization):
    r"""Picard iteration: $A_n = I$, no derivative at all.

    For weak fields and short intervals: the iterations grow with the product of the
    Lipschitz constant and the length of the interval.
    """

    def __call__(self, step_map, x, y_prev, y_next):
        del step_map, x, y_next
        return jnp.ones_like(y_prev)
