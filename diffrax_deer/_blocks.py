r"""Block-diagonal transitions: for samples of a batch, particles, layers.

Blocks are sets of components of the state, of size at most b. The tangent number j is
the sum of the j-th unit vectors of all blocks, so that b tangents of the step give all
blocks $B_g$ of its Jacobian, however many there are:

$$s_g \Bigl(J \sum_{g'} s_{g'}\, e_{g',j}\Bigr)_g
  = B_g e_j + \sum_{g' \ne g} s_g s_{g'} J_{g g'} e_j.$$

The last sum is zero where blocks do not couple. Otherwise it is an error, but with
signs $s_g$ drawn at random its mean is zero: an unbiased estimate of the blocks, as
Hutchinson's is one of the diagonal.
"""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ._checks import check_count
from ._custom_types import Arranged, State
from ._linearization import (
    AbstractLinearization,
    StepMap,
    random_signs,
    value_and_tangents,
)

_NO_LEAVES_MSG = (
    "`BlockDiagonalJacobian` makes its blocks from the leaves of `y0`, but the state "
    "of this recurrence is a vector that has none. Pass `block_size=`."
)


class Layout(eqx.Module):
    """Which components of the state are in which block.

    - `index`, `(blocks, block_size)`: the components of each block. Where a block is
        smaller than the largest one, the number of components stands in for the rest.
    - `size`: the number of components.
    """

    index: np.ndarray
    size: int

    @property
    def block_size(self) -> int:
        """The size of the largest block."""
        return self.index.shape[1]

    @property
    def is_contiguous(self) -> bool:
        """Whether the state is its blocks, all of one size, one after the other."""
        return np.array_equal(self.index.reshape(-1), np.arange(self.size))

    def arrange(self, y: State) -> Arranged:
        """The blocks one after the other, filled up with zeros to the same size."""
        return y.at[self.index.reshape(-1)].get(mode="fill", fill_value=0)

    def restore(self, arranged: Arranged) -> State:
        """The inverse of `arrange`."""
        return arranged[np.argsort(self.index.reshape(-1), kind="stable")[: self.size]]

    def arranged(self, step_map: StepMap) -> StepMap:
        """The step of arranged states."""

        def convert(f):
            return f and (
                lambda *args: self.arrange(f(*args[:-1], self.restore(args[-1])))
            )

        def full(x, y):
            assert step_map.full is not None
            y1, more = step_map.full(x, self.restore(y))
            return self.arrange(y1), more

        return StepMap(
            convert(step_map.step),
            convert(step_map.increment),
            step_map.full and full,
            convert(step_map.leap),
            convert(step_map.between),
        )


def _parts(leaves: tuple[jax.ShapeDtypeStruct, ...]) -> list[np.ndarray]:
    """The components of each leaf: real ones, then imaginary ones, along axis 0."""
    out, start = [], 0
    for leaf in leaves:
        count = 2 if jnp.issubdtype(leaf.dtype, jnp.complexfloating) else 1
        stop = start + count * leaf.size
        out.append(np.arange(start, stop).reshape(count, *leaf.shape))
        start = stop
    return out


def _leaf_blocks(leaves: tuple[jax.ShapeDtypeStruct, ...], size: int) -> np.ndarray:
    rows = [part.reshape(-1) for part in _parts(leaves) if part.size > 0]
    widest = max(len(row) for row in rows)
    fill = lambda row: np.pad(row, (0, widest - len(row)), constant_values=size)
    return np.stack([fill(row) for row in rows])


def _sample_blocks(leaves: tuple[jax.ShapeDtypeStruct, ...], axis: int) -> np.ndarray:
    shapes = [leaf.shape for leaf in leaves]
    has_axis = [-len(shape) <= axis < len(shape) for shape in shapes]
    if not all(has_axis) or len({shape[axis] for shape in shapes}) != 1:
        msg = (
            f"`BlockDiagonalJacobian(batch_axis={axis})` has one block per sample, but "
            f"the leaves of `y0`, of shapes {shapes}, do not all have as many samples "
            "along that axis. Pass `block_size=`, or neither for one block per leaf."
        )
        raise ValueError(msg)
    to_front = lambda x: np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1)
    rows = [to_front(component) for part in _parts(leaves) for component in part]
    return np.concatenate(rows, axis=1)


def _equal_blocks(size: int, block_size: int) -> np.ndarray:
    if size % block_size != 0:
        msg = (
            f"`BlockDiagonalJacobian(block_size={block_size})` needs a state that is a "
            f"multiple of {block_size} in size; got {size} real components. Pass a "
            f"divisor of {size}, or use `DiagonalJacobian()`."
        )
        raise ValueError(msg)
    return np.arange(size).reshape(-1, block_size)


class BlockDiagonalJacobian(AbstractLinearization):
    r"""Between quasi-DEER and Newton: diagonal blocks of $\partial\Phi_n/\partial y$.

    Costs as many tangents of the step as the largest block has components, b, and a
    recurrence of O(N D b). Exact, which makes it Newton's method, where the blocks do
    not couple, as the samples of a batch in the state do not. Where they do, the blocks
    are estimated, without bias, by the same random signs at every step.

    **Arguments:** at most one of

    - `block_size`: blocks of as many consecutive components of the ravelled state. A
        state of shape `(batch, 3)` has `block_size=3`.
    - `batch_axis`: one block per sample, for a `y0` whose leaves all have their samples
        along this axis: 0 for `(positions, log_density)` of shapes `(batch, 3)` and
        `(batch,)`.

    With neither there is one block per leaf of `y0`: real and imaginary part together
    if it is complex. All are filled up to the size of the largest.

    **Raises:** `ValueError`, when the linearization is used, if the state cannot be
    divided in this way.
    """

    is_dense: ClassVar[bool] = False
    block_size: int | None = None
    batch_axis: int | None = None

    def __check_init__(self):
        if self.block_size is not None and self.batch_axis is not None:
            msg = (
                "`BlockDiagonalJacobian` takes `block_size` or `batch_axis`, not both; "
                f"got {self.block_size} and {self.batch_axis}."
            )
            raise ValueError(msg)
        if self.block_size is not None:
            check_count("block_size", self.block_size)

    def layout(self, step_map: StepMap, size: int) -> Layout:
        """The blocks of a state of `size` components."""
        if self.block_size is not None:
            return Layout(_equal_blocks(size, self.block_size), size)
        if step_map.leaves is None:
            raise ValueError(_NO_LEAVES_MSG)
        if self.batch_axis is not None:
            return Layout(_sample_blocks(step_map.leaves, self.batch_axis), size)
        return Layout(_leaf_blocks(step_map.leaves, size), size)

    def __call__(self, step_map, x, y_prev, y_next):
        del y_next
        layout = self.layout(step_map, y_prev.size)
        if not layout.is_contiguous:
            # `solve` sees to that.
            msg = "The state has to be arranged in blocks before it is linearized."
            raise ValueError(msg)
        num_blocks, block_size = layout.index.shape
        signs = jnp.asarray(random_signs(num_blocks, 1), y_prev.dtype)
        unit = jnp.eye(block_size, dtype=y_prev.dtype)
        directions = (unit[:, None, :] * signs[None]).reshape(block_size, -1)
        step = lambda y: step_map.step(x, y)
        _, columns = value_and_tangents(step, y_prev, directions)
        columns = columns.reshape(block_size, num_blocks, block_size) * signs[None]
        return jnp.moveaxis(columns, 0, -1)
