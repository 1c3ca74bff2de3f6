r"""The affine recurrence, the only linear system that DEER solves.

$$y_n = A_n y_{n-1} + b_n, \qquad n = 1 \dots N,$$

is the block-bidiagonal system $L y = b$ (with $A_1 y_0$ added to $b_1$). Its transpose
runs backwards in time: $\lambda_n = A_{n+1}^\top \lambda_{n+1} + c_n$. A scan solves
both; which scan is a matter of the device, not of the answer.

Composition of affine maps, $(A, b) \circ (A', b') = (A A', A b' + b)$, is associative:
that is all a parallel prefix scan needs.
"""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from ._causal import shift
from ._custom_types import State, States, Transition, Transitions
from ._matrix_functions import matmul, matvec, vecmat
from ._platform import by_platform

# Traced once, not again on every level of a parallel scan.
_matmul, _matvec, _vecmat = jax.jit(matmul), jax.jit(matvec), jax.jit(vecmat)


def _apply(a: Transition, y: State) -> State:
    """A diagonal transition has the axes of the state, a dense one has one more.

    With two more axes, `(blocks, block, block)`, it is block-diagonal, and the state
    consists of the blocks one after the other.
    """
    if a.ndim == y.ndim:
        return a * y
    if a.ndim == y.ndim + 1:
        return _matvec(a, y)
    return jax.vmap(_matvec)(a, y.reshape(a.shape[:2])).reshape(-1)


def _apply_transposed(a: Transition, y: State) -> State:
    """As `_apply`, for the transposed transition."""
    if a.ndim == y.ndim:
        return a * y
    if a.ndim == y.ndim + 1:
        return _vecmat(y, a)
    return jax.vmap(_vecmat)(y.reshape(a.shape[:2]), a).reshape(-1)


def _multiply(a: Transition, b: Transition, like: State) -> Transition:
    """The product of two transitions of states `like`."""
    if a.ndim == like.ndim:
        return a * b
    return _matmul(a, b) if a.ndim == like.ndim + 1 else jax.vmap(_matmul)(a, b)


def _compose(left: tuple[Transition, State], right: tuple[Transition, State]):
    """First `left`, then `right`: the order in which a prefix scan combines."""
    (a_left, b_left), (a_right, b_right) = left, right
    a = _multiply(a_right, a_left, b_left)
    # The product of many transitions may overflow where there is nothing to multiply:
    # the columns of a matrix, the entries of a diagonal.
    columns = b_left
    if a_right.ndim == b_left.ndim + 2:
        columns = b_left.reshape(a_right.shape[0], 1, a_right.shape[2])
    a_right = jnp.where(columns == 0, 0.0, a_right)
    return a, _apply(a_right, b_left) + b_right


class AbstractScan(eqx.Module):
    """How the affine recurrence is solved."""

    @abc.abstractmethod
    def __call__(self, a: Transitions, b: States, *, reverse: bool = False) -> States:
        """Solves `y[n] = a[n] y[n-1] + b[n]` for all n, with zero before the start.

        **Arguments:**

        - `a`: the transitions, `(time, state, state)`, or diagonal `(time, state)`, or
            block-diagonal `(time, blocks, block, block)` with `blocks * block` equal
            to `state`.
        - `b`: the inhomogeneity, `(time, state)`.
        - `reverse`: run backwards, `y[n] = a[n] y[n+1] + b[n]`.

        **Returns:**

        `y`, `(time, state)`. It need not be differentiable: `affine_recurrence` is.
        """

    def transposed(self, a: Transitions, c: States) -> States:
        """Solves `y[n] = a[n + 1].T y[n + 1] + c[n]` for all n, zero after the end.

        That is the system with the transposed matrix. Arguments and result as above.
        """
        return self(transpose(a, c), c, reverse=True)


class SequentialScan(AbstractScan):
    """One step after the other, with `jax.lax.scan`: O(N D²) work, depth N.

    O(N D) for diagonal transitions and O(N D b) for blocks of size b.

    The best choice on a CPU, where a step costs tens of nanoseconds.
    """

    def __call__(self, a: Transitions, b: States, *, reverse: bool = False) -> States:
        def step(y, ab):
            y = _apply(ab[0], y) + ab[1]
            return y, y

        _, ys = lax.scan(step, jnp.zeros_like(b[0]), (a, b), reverse=reverse)
        return ys

    def transposed(self, a: Transitions, c: States) -> States:
        """As for any scan, but without a transposed copy of all transitions."""

        def step(carry, ac):
            y = carry + ac[1]
            return _apply_transposed(ac[0], y), y

        _, ys = lax.scan(step, jnp.zeros_like(c[0]), (a, c), reverse=True)
        return ys


class AssociativeScan(AbstractScan):
    """All steps at once, with `jax.lax.associative_scan`: O(N D³) work, depth log N.

    O(N D) for diagonal transitions and O(N D b²) for blocks of size b.

    The best choice on a GPU or TPU, where depth is what costs time.

    ??? cite "Reference"

        Blelloch, *Prefix sums and their applications*, CMU-CS-90-190 (1990); Lim et
        al., arXiv:2309.12252, section 3.4.
    """

    def __call__(self, a: Transitions, b: States, *, reverse: bool = False) -> States:
        compose = jax.vmap(_compose)
        _, ys = lax.associative_scan(compose, (a, b), reverse=reverse)
        return ys


class PlatformScan(AbstractScan):
    """`SequentialScan` on a CPU, `AssociativeScan` elsewhere; chosen when compiled."""

    def __call__(self, a: Transitions, b: States, *, reverse: bool = False) -> States:
        sequential, associative = SequentialScan(), AssociativeScan()
        return by_platform(
            lambda: sequential(a, b, reverse=reverse),
            lambda: associative(a, b, reverse=reverse),
        )

    def transposed(self, a: Transitions, c: States) -> States:
        """As for any scan; chosen when compiled."""
        sequential, associative = SequentialScan(), AssociativeScan()
        return by_platform(
            lambda: sequential.transposed(a, c), lambda: associative.transposed(a, c)
        )


def transpose(a: Transitions, like: States) -> Transitions:
    r"""The transitions of the transposed system, $A_{n+1}^\top$ at step n.

    Zero at the last step, which nothing follows. `like` is any inhomogeneity.
    """
    following = jnp.concatenate([a[1:], jnp.zeros_like(a[:1])])
    return following if a.ndim == like.ndim else jnp.swapaxes(following, -1, -2)


def affine_recurrence(
    a: Transitions, b: States, y0: State | None = None, *, scan: AbstractScan
) -> States:
    """Solves `y_n = a_n y_{n-1} + b_n`, differentiably.

    Linear in `b` and `y0`, with derivatives of any order and mode with respect to all
    of `a`, `b` and `y0`: one more scan for a tangent, one backwards for a cotangent,
    whatever `scan` is.

    **Arguments:**

    - `a`: `(time, state, state)`, or `(time, state)` for diagonal matrices, or
        `(time, blocks, block, block)` for block-diagonal ones.
    - `b`: `(time, state)`.
    - `y0`: `(state,)`, zero if omitted.
    - `scan`: an `AbstractScan`.

    **Returns:**

    `y_1` to `y_N`, `(time, state)`.
    """
    if y0 is not None:
        b = jnp.asarray(b).at[0].add(_apply(a[0], y0))
    if b.size == 0:
        return b

    def residual(y):
        return y - jax.vmap(_apply)(a, shift(jnp.zeros_like(y[0]), y))

    return lax.custom_linear_solve(
        residual,
        b,
        lambda _, b: scan(a, b),
        lambda _, c: scan.transposed(a, c),
    )
