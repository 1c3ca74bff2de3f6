r"""The affine recurrence, the only linear system that DEER solves.

$$y_n = A_n y_{n-1} + b_n, \qquad n = 1 \dots N,$$

is the block-bidiagonal system $L y = b$ (with $A_1 y_0$ added to $b_1$). Its transpose
runs backwards in time: $\lambda_n = A_{n+1}^\top \lambda_{n+1} + c_n$. One scan solves
both; which one is a matter of the device, not of the answer.

Composition of affine maps, $(A, b) \circ (A', b') = (A A', A b' + b)$, is associative:
that is all a parallel prefix scan needs.
"""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from ._custom_types import State, States
from ._defaults import CHUNK, MAX_CHUNKED, prefers_chunks, prefers_sequential_scan
from ._linalg.transitions import AbstractTransition, Dense, multiply
from ._prefix import shift
from ._time_axis import TimeAxis


class AbstractScan(eqx.Module):
    """How the affine recurrence is solved."""

    @abc.abstractmethod
    def __call__(
        self, a: AbstractTransition, b: States, *, reverse: bool = False
    ) -> States:
        """Solves `y[n] = a[n] y[n-1] + b[n]` for all n, with zero before the start.

        **Arguments:**

        - `a`: the transitions, `Dense`, `Diagonal`, `BlockDiagonal` or another
            structure, of leading axis `time`.
        - `b`: the inhomogeneity, `(time, state)`.
        - `reverse`: solve `y[n] = a[n+1] y[n+1] + b[n]`, with zero after the end: the
            form of the transposed system, in which `a[0]` is not used.

        **Returns:**

        `y`, `(time, state)`. It need not be differentiable: `affine_recurrence` is.
        """

    @property
    def time_axis(self) -> TimeAxis:
        """Where the steps lie, for what is done with them beside the scan."""
        return TimeAxis()


class SequentialScan(AbstractScan):
    """One step after the other, with `jax.lax.scan`: O(N D²) work, depth N.

    O(N D) for diagonal transitions and O(N D b) for blocks of size b.

    The best choice on a CPU, where a step costs tens of nanoseconds.
    """

    def __call__(self, a, b, *, reverse=False):
        def forwards(y, inputs):
            a, b = inputs
            y = a.matvec(y) + b
            return y, y

        def backwards(product, inputs):
            a, b = inputs
            y = product + b
            return a.matvec(y), y

        step, zero = backwards if reverse else forwards, jnp.zeros_like(b[0])
        return lax.scan(step, zero, (a, b), reverse=reverse)[1]


class AssociativeScan(AbstractScan):
    """All steps at once, with `jax.lax.associative_scan`: O(N D³) work, depth log N.

    O(N D) for diagonal transitions and O(N D b²) for blocks of size b.

    The best choice on a TPU, and on a GPU for large states: depth is what costs time.

    ??? cite "Reference"

        Blelloch, *Prefix sums and their applications*, CMU-CS-90-190 (1990); Lim et
        al., arXiv:2309.12252, section 3.4.
    """

    def __call__(self, a, b, *, reverse=False):
        if reverse:
            # Behind the last transition there is none: any finite one is as good.
            a = jax.tree.map(lambda x: jnp.roll(x, -1, axis=0), a)
        _, ys = lax.associative_scan(jax.vmap(compose), (a, b), reverse=reverse)
        return ys


class ChunkedScan(AbstractScan):
    """Chunks of 16 steps, each step by itself, then their ends in the same way.

    The depth is 16 for each factor of 16 in N. The work is O(16 N D³), up to 16 times
    that of `AssociativeScan`, in a fifth of the kernels: the best choice on a GPU by
    their count, not measured on one. For dense transitions up to 4 × 4; all others are
    left to `AssociativeScan`.
    """

    def __call__(self, a, b, *, reverse=False):
        if type(a) is not Dense or b.shape[-1] > MAX_CHUNKED:
            return AssociativeScan()(a, b, reverse=reverse)
        maps = jnp.roll(a.entries, -1, axis=0) if reverse else a.entries
        maps = jnp.concatenate([maps, b[..., None]], axis=-1)
        return _chunked(maps[::-1])[::-1] if reverse else _chunked(maps)


def _product(row, column):
    """As `apply`, of numbers: a kernel that reduces knows nothing else."""
    return sum(jnp.where(y == 0, 0.0, x * y) for x, y in zip(row, column, strict=False))


def _compose_rows(first, then):
    """As `compose`, of the rows `[A b]`."""
    *columns, b = zip(*first, strict=True)
    a = [[_product(row, column) for column in columns] for row in then]
    return [[*x, row[-1] + _product(row, b)] for x, row in zip(a, then, strict=True)]


def _chunked(maps: Float[Array, "time state state+1"]) -> States:
    """Each chunk as if it were alone, then what the ones before it add to it."""
    num_steps, size, _ = maps.shape
    length = min(CHUNK, num_steps)
    missing = (0, -num_steps % length, 0), (0, 0, 0), (0, 0, 0)
    chunks = lax.pad(maps, np.zeros((), maps.dtype), missing)
    chunks = chunks.reshape(-1, length, size, size + 1)
    split = lambda x: [[x[..., i, j] for j in range(size + 1)] for i in range(size)]
    one = split(np.eye(size, size + 1, dtype=maps.dtype))
    # In order, as StableHLO demands for any monoid.
    windows = (1, length), (1, 1), ((0, 0), (length - 1, 0))
    rows = lax.reduce_window(split(chunks), one, _compose_rows, *windows)
    ys = [row[-1] for row in rows]
    if num_steps > length:
        ends = [jnp.stack([x[:, -1] for x in row], axis=-1) for row in rows]
        starts = _chunked(jnp.stack(ends, axis=-2))
        starts = shift(jnp.zeros_like(starts[0]), starts).T[..., None]
        ys = [row[-1] + _product(row, starts) for row in rows]
    return jnp.stack(ys, axis=-1).reshape(-1, size)[:num_steps]


def apply(a: AbstractTransition, y: State) -> State:
    """The product of what may have overflowed where there is nothing to multiply."""
    return a.clear_columns(y == 0).matvec(y)


def compose(
    first: tuple[AbstractTransition, State], then: tuple[AbstractTransition, State]
) -> tuple[AbstractTransition, State]:
    """The affine map `first`, followed by `then`."""
    (a_first, b_first), (a_then, b_then) = first, then
    return a_then.matmul(a_first), apply(a_then, b_first) + b_then


def default_scan() -> AbstractScan:
    """What `scan=None` means on the platform in use."""
    if prefers_sequential_scan():
        return SequentialScan()
    return ChunkedScan() if prefers_chunks() else AssociativeScan()


def transposed_scan(scan: AbstractScan, a: AbstractTransition, c: States) -> States:
    """Solves `y[n] = a[n + 1].T y[n + 1] + c[n]` for all n, with zero after the end."""
    return scan(jax.vmap(lambda a: a.transpose())(a), c, reverse=True)


def affine_recurrence(
    a: AbstractTransition,
    b: States,
    y0: State | None = None,
    *,
    scan: AbstractScan | None = None,
) -> States:
    """Solves `y_n = a_n y_{n-1} + b_n`, differentiably.

    Linear in `b` and `y0`, with derivatives of any order and mode with respect to all
    of `a`, `b` and `y0`: one more scan for a tangent, one backwards for a cotangent,
    whatever `scan` is.

    **Arguments:**

    - `a`: the transitions, `Dense`, `Diagonal`, `BlockDiagonal` or another structure,
        of leading axis `time`.
    - `b`: `(time, state)`.
    - `y0`: `(state,)`, zero if omitted.
    - `scan`: an `AbstractScan`; `None` means `SequentialScan` on a CPU, `ChunkedScan`
        on a GPU and `AssociativeScan` on a TPU.

    **Returns:**

    `y_1` to `y_N`, `(time, state)`.
    """
    chosen = default_scan() if scan is None else scan
    if y0 is not None:
        first = jax.tree.map(lambda x: x[0], a)
        b = jnp.asarray(b).at[0].add(first.matvec(y0))
    if b.size == 0:
        return b

    def residual(y):
        return y - multiply(a, shift(jnp.zeros_like(y[0]), y))

    return lax.custom_linear_solve(
        residual,
        b,
        lambda _, b: chosen(a, b),
        lambda _, c: transposed_scan(chosen, a, c),
    )
