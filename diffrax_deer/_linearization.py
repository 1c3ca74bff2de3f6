r"""From a step map to the transitions $A_n$ of the affine recurrence.

The answer of a solve depends on the step map $\Phi_n$ alone; the transition
$A_n \approx \partial\Phi_n/\partial y$ only decides in how many iterations it is found:

| transition | method | cost, beside one step |
| --- | --- | --- |
| $\partial\Phi_n/\partial y$ | Newton | D tangents of the step |
| $\exp(h_n J_n)$ | DEER, for fields | D tangents of the field, one exponential |
| its diagonal | quasi-DEER | D tangents of the step, or a few probes |
| its diagonal blocks | block quasi-DEER | as many tangents as a block is large |
| $I$ | Picard | nothing |

??? cite "Reference"

    Lim, Zhu, Selfridge and Kasim, *Parallelizing non-linear sequential models over the
    sequence length*, arXiv:2309.12252, equations 6 and 9 (Newton, DEER). Gonzalez et
    al., *Towards scalable and stable parallelization of nonlinear RNNs*,
    arXiv:2407.19115 (quasi-DEER). Hutchinson, *A stochastic estimator of the trace of
    the influence matrix*, Commun. Stat. Simul. 19 (1990), and Bekas, Kokiopoulou and
    Saad, *An estimator for the diagonal of a matrix*, Appl. Numer. Math. 57 (2007)
    (probes).
"""

import abc
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PyTree

from ._checks import check_count
from ._custom_types import Matrix, State, Transition, VectorField
from ._matrix_functions import expm

# As many tangents at once: that many times the memory of one evaluation of the step.
_MOST_TANGENTS = 16


class StepMap(eqx.Module):
    r"""One step of a recurrence, $y_n = \Phi(x_n, y_{n-1})$, for states `(state,)`.

    - `step(x, y)`: the step map $\Phi$.
    - `increment(x, y)`: where the step belongs to a differential equation, the product
        $h f(t, y)$ at the middle of the step; otherwise `None`.
    - `full(x, y)`: where a step yields more than a state, the pair of it and of that, a
        pytree of arrays; otherwise `None`.
    - `leap(first, last, y)`: where there are longer steps, one from the beginning of
        the step `first` to the end of `last`; otherwise `None`.
    - `between(first, last, x, y)`: what that one predicts for the state after the step
        `x` between them.
    - `leaves`: where the state is a ravelled pytree, shapes and types of its leaves;
        otherwise `None`.
    - `is_elementwise`: whether each component of the step depends on the same component
        of the state only. Its Jacobian is then diagonal, and held as a diagonal.

    `x` is what drives the step: its two times, or the input of a recurrent network.
    """

    step: Callable[[PyTree[Any], State], State]
    increment: Callable[[PyTree[Any], State], State] | None = None
    full: Callable[[PyTree[Any], State], tuple[State, PyTree[Array]]] | None = None
    leap: Callable[[PyTree[Any], PyTree[Any], State], State] | None = None
    between: Callable[[PyTree[Any], PyTree[Any], PyTree[Any], State], State] | None = (
        None
    )
    leaves: tuple[jax.ShapeDtypeStruct, ...] | None = eqx.field(
        static=True, default=None
    )
    is_elementwise: bool = eqx.field(static=True, default=False)

    def evaluate(self, x: PyTree[Any], y: State) -> tuple[State, PyTree[Array]]:
        """The state after the step, and what else it yields, or `None`."""
        return (self.step(x, y), None) if self.full is None else self.full(x, y)


def value_and_tangents(
    f: VectorField, y: State, directions: Float[Array, "directions state"]
) -> tuple[State, Float[Array, "directions state"]]:
    """The value `f(y)` and its derivative along each direction, of which there is one.

    All directions at once, and `f` itself evaluated once.
    """
    push = lambda direction: jax.jvp(f, (y,), (direction,))
    values, tangents = jax.vmap(push)(directions)
    return values[0], tangents


def value_and_jacobian(f: VectorField, y: State) -> tuple[State, Matrix]:
    """The value `f(y)` and the matrix of shape `(D, D)` of its derivatives, D ≥ 1."""
    value, columns = value_and_tangents(f, y, jnp.eye(y.size, dtype=y.dtype))
    return value, columns.T


def driven(tree: PyTree[Any], tree_dot: PyTree[Any]) -> tuple[PyTree, PyTree]:
    """`tree` in two: the leaves that have a tangent in `tree_dot`, and the others."""
    return eqx.partition(tree, jax.tree.map(lambda _, x: x is not None, tree, tree_dot))


def random_signs(*shape: int) -> np.ndarray:
    """Signs drawn at random once and for all: a constant, the same at every call."""
    return np.random.default_rng(0).choice([-1.0, 1.0], size=shape)


def _diagonal(f: VectorField, y: State) -> State:
    """The diagonal of the Jacobian, without the Jacobian: a few columns at a time."""

    def some(index):
        directions = jax.nn.one_hot(index, y.size, dtype=y.dtype)
        _, columns = value_and_tangents(f, y, directions)
        return jnp.sum(jnp.where(directions == 1, columns, 0.0), axis=1)

    num_chunks = -(-y.size // _MOST_TANGENTS)
    # Beyond the last component the directions are zero.
    index = jnp.arange(num_chunks * _MOST_TANGENTS).reshape(num_chunks, -1)
    return lax.map(some, index).reshape(-1)[: y.size]


def step_jacobian(step_map: StepMap, x: PyTree[Any], y: State) -> Matrix | State:
    """The derivatives of a step, D ≥ 1: `(D, D)`, or `(D,)` if it is elementwise."""
    step = lambda y: step_map.step(x, y)
    if step_map.is_elementwise:
        return value_and_tangents(step, y, jnp.ones((1, y.size), y.dtype))[1][0]
    return value_and_jacobian(step, y)[1]


class AbstractLinearization(eqx.Module):
    """The choice of the transition. The answer and its gradient do not depend on it.

    `is_dense` says whether transitions are matrices of shape `(state, state)`. Where
    they are not, the gradient of a large state is found without such matrices, too.
    """

    is_dense: eqx.AbstractClassVar[bool]

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

        The transition, `(state, state)` if dense, `(state,)` if diagonal, `(blocks,
        block, block)` if block-diagonal.
        """


class FullJacobian(AbstractLinearization):
    r"""Newton's method: $A_n = \partial\Phi_n/\partial y$ at the guess, dense.

    Converges quadratically. For any step map; the choice for recurrent networks. Where
    `deer_scan` finds that a recurrence is elementwise, only its diagonal is held.
    """

    is_dense: ClassVar[bool] = True

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

    is_dense: ClassVar[bool] = True

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
    and the fewer the weaker the components are coupled. Memory is O(N D).

    **Arguments:**

    - `num_probes`: `None` for the exact diagonal, by D tangents of the step. A number
        for Hutchinson's unbiased estimate, the mean of $v \odot (J v)$ over as many
        vectors v of random signs, one tangent each; its error comes from the entries
        beside the diagonal, so that one probe is exact where there are none. The probes
        are the same for every step, every iteration and every call. They decide on the
        number of iterations and on nothing else.
    """

    is_dense: ClassVar[bool] = False
    num_probes: int | None = None

    def __check_init__(self):
        if self.num_probes is not None:
            check_count("num_probes", self.num_probes)

    def __call__(self, step_map, x, y_prev, y_next):
        del y_next
        if step_map.is_elementwise:
            return step_jacobian(step_map, x, y_prev)
        step = lambda y: step_map.step(x, y)
        if self.num_probes is not None:
            probes = random_signs(self.num_probes, y_prev.size)
            probes = jnp.asarray(probes, y_prev.dtype)
            _, tangents = value_and_tangents(step, y_prev, probes)
            return jnp.mean(probes * tangents, axis=0)
        if y_prev.size > _MOST_TANGENTS:
            return _diagonal(step, y_prev)
        return jnp.diagonal(value_and_jacobian(step, y_prev)[1])


class Picard(AbstractLinearization):
    r"""Picard iteration: $A_n = I$, no derivative at all.

    For weak fields and short intervals: the iterations grow with the product of the
    Lipschitz constant and the length of the interval.
    """

    is_dense: ClassVar[bool] = False

    def __call__(self, step_map, x, y_prev, y_next):
        del step_map, x, y_next
        return jnp.ones_like(y_prev)
