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
| $0$ | Jacobi | nothing |

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
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import PyTree

from ._checks import check_count
from ._custom_types import State, VectorField
from ._defaults import MAX_TANGENTS
from ._linalg.expm import expm
from ._linalg.transitions import (
    AbstractTransition,
    BlockDiagonal,
    Dense,
    Diagonal,
)
from ._step_map import (
    StepMap,
    step_jacobian,
    value_and_jacobian,
    value_and_tangents,
)


def _random_signs(*shape: int) -> np.ndarray:
    """Signs drawn at random once and for all: a constant, the same at every call."""
    return np.random.default_rng(0).choice([-1.0, 1.0], size=shape)


def _diagonal(f: VectorField, y: State) -> State:
    """The diagonal of the Jacobian, without the Jacobian: a few columns at a time."""

    def some(index):
        directions = jax.nn.one_hot(index, y.size, dtype=y.dtype)
        _, columns = value_and_tangents(f, y, directions)
        return jnp.sum(jnp.where(directions == 1, columns, 0.0), axis=1)

    num_chunks = -(-y.size // MAX_TANGENTS)
    # Beyond the last component the directions are zero.
    index = jnp.arange(num_chunks * MAX_TANGENTS).reshape(num_chunks, -1)
    return lax.map(some, index).reshape(-1)[: y.size]


class AbstractLinearization(eqx.Module):
    """The choice of the transition. The answer and its gradient do not depend on it."""

    @abc.abstractmethod
    def __call__(
        self, step_map: StepMap, x: PyTree[Any], y_prev: State, y_next: State
    ) -> AbstractTransition:
        """Linearizes one step along the current guess.

        **Arguments:**

        - `step_map`: the step.
        - `x`: what drives this step.
        - `y_prev`, `y_next`: the guess before and after the step, each `(state,)`.

        **Returns:**

        The transition of this step: `Dense`, `Diagonal`, `BlockDiagonal` or another.
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
        return Dense(expm(jacobian, kind="lax"))


class DiagonalJacobian(AbstractLinearization):
    r"""quasi-DEER: the diagonal of $\partial\Phi_n/\partial y$.

    The recurrence costs O(N D) instead of O(N D²) or O(N D³); the iterations are more,
    and the fewer the weaker the components are coupled. Memory is O(N D). Exact, hence
    Newton's method, for a recurrence that acts on each component alone.

    **Arguments:**

    - `num_probes`: `None` for the exact diagonal, by D tangents of the step. A number
        for Hutchinson's unbiased estimate, the mean of $v \odot (J v)$ over as many
        vectors v of random signs, one tangent each; its error comes from the entries
        beside the diagonal, so that one probe is exact where there are none. The probes
        are the same for every step, every iteration and every call. They decide on the
        number of iterations and on nothing else.
    """

    num_probes: int | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        if self.num_probes is not None:
            check_count("num_probes", self.num_probes)

    def __call__(self, step_map, x, y_prev, y_next):
        del y_next
        step = lambda y: step_map.step(x, y)
        if self.num_probes is not None:
            probes = _random_signs(self.num_probes, y_prev.size)
            probes = jnp.asarray(probes, y_prev.dtype)
            _, tangents = value_and_tangents(step, y_prev, probes)
            return Diagonal(jnp.mean(probes * tangents, axis=0))
        if y_prev.size > MAX_TANGENTS:
            return Diagonal(_diagonal(step, y_prev))
        return Diagonal(jnp.diagonal(value_and_jacobian(step, y_prev)[1]))


class BlockDiagonalJacobian(AbstractLinearization):
    r"""Between quasi-DEER and Newton: diagonal blocks of $\partial\Phi_n/\partial y$.

    Blocks $B_g$ are `block_size` consecutive components of the ravelled state; a state
    of shape `(batch, 3)` has `block_size=3`. The tangent number j is the sum of the
    j-th unit vectors of all blocks, with random signs $s_g$, the same at every step:

    $$s_g \Bigl(J \sum_{g'} s_{g'}\, e_{g',j}\Bigr)_g
      = B_g e_j + \sum_{g' \ne g} s_g s_{g'} J_{g g'} e_j.$$

    Exact, which makes it Newton's method, where the blocks do not couple, as samples in
    one state do not; otherwise an unbiased estimate of the blocks. Costs b tangents of
    the step for blocks of size b, and a recurrence of O(N D b).

    **Raises:** `ValueError`, when the linearization is used, if D is not a multiple of
    `block_size`.
    """

    block_size: int = eqx.field(static=True)

    def __check_init__(self):
        check_count("block_size", self.block_size)

    def __call__(self, step_map, x, y_prev, y_next):
        del y_next
        size, block_size = y_prev.size, self.block_size
        if size % block_size != 0:
            msg = (
                f"`BlockDiagonalJacobian(block_size={block_size})` needs a state that "
                f"is a multiple of {block_size} in size; got {size} real components. "
                f"Pass a divisor of {size}, or use `DiagonalJacobian()`."
            )
            raise ValueError(msg)
        signs = jnp.asarray(_random_signs(size // block_size, 1), y_prev.dtype)
        unit = jnp.eye(block_size, dtype=y_prev.dtype)
        directions = (unit[:, None, :] * signs[None]).reshape(block_size, size)
        step = lambda y: step_map.step(x, y)
        _, columns = value_and_tangents(step, y_prev, directions)
        columns = columns.reshape(block_size, -1, block_size) * signs[None]
        return BlockDiagonal(jnp.moveaxis(columns, 0, -1))


class Picard(AbstractLinearization):
    r"""Picard iteration: $A_n = I$, no derivative at all.

    For weak fields and short intervals: the iterations grow with the product of the
    Lipschitz constant and the length of the interval.
    """

    def __call__(self, step_map, x, y_prev, y_next):
        del step_map, x, y_next
        return Diagonal(jnp.ones_like(y_prev))


class Jacobi(AbstractLinearization):
    r"""Jacobi iteration: $A_n = 0$, each step from the last iterate of the one before.

    Makes one more step of a recurrence exact with each iteration. In `deer_solve` it
    means G = 0, for an `inverse` that cannot use a derivative; its damping may stall.
    """

    def __call__(self, step_map, x, y_prev, y_next):
        del step_map, x, y_next
        return Diagonal(jnp.zeros_like(y_prev))
