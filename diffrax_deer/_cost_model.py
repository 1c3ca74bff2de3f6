r"""What a solve costs in sequence and in parallel: a model, right to a factor of three.

Two things take time: what has to wait for something else, the *depth*, and all there is
to compute, the *work*. Both are in microseconds here, and their sum is the time. For N
steps of S evaluations of a field of D components, M steps of the grid solved in
parallel, B samples, which cost no depth, and e the work of one evaluation:

| | depth | work for each step and sample |
| --- | --- | --- |
| sequential | c N S | S e + some D |
| its value and gradient | 20 c N S | 6 S e + more D |
| one Newton iteration | i + scan | S e + transition + scan |
| the guess of a cold start | a third of the steps in sequence | a third of theirs |
| the steps in sequence | c M, times S if implicit | S e |
| gradient of `DEERAdjoint` | 6 i + scan | (5 + 2 D) S e + scan, 3 S e if implicit |
| the same without Jacobians, each sweep | i + scan | 3 S e + scan |
| the same from step to step | twice that of the steps | 6/5 S e + some D |

The latencies c and i are properties of the device, and so are the operations done in a
microsecond. Memory traffic counts as 60 operations for every number written. A scan of
M steps is done in sequence on a CPU and has a depth of i log2(M) elsewhere, where it
multiplies matrices.

Fitted to value and gradient, and to solves without, of a FitzHugh-Nagumo oscillator
(batch 1, 64 and 1000) and of small neural ODEs (1 to 512), and Robertson's
problem (1 and 32), on two CPU cores. Those of other devices are guesses.
"""

from typing import NamedTuple

import equinox as eqx
import numpy as np

from ._checks import MOST_ENTRIES
from ._implicit import MOST_DIRECT
from ._linearization import (
    AbstractLinearization,
    Picard,
    PiecewiseConstant,
)
from ._predictor import CoarsePredictor
from ._trajectory import MOST_ON_CPU

_TRAFFIC = 60
# Beside the field: error estimate, controller, and in a gradient the checkpoints.
_BOOKKEEPING, _BOOKKEEPING_OF_GRADIENT = 1500, 12_000
# XLA makes one loop of a step and its derivative, with less between them than diffrax.
_BOOKKEEPING_STEP_BY_STEP = 2000
_PRODUCTS_OF_EXPM = 8
# A small matrix is factorized for about as long, whatever its size.
_LINEAR_SOLVE = 12_500
_TANGENT = 0.4
# Where nobody counted them.
_MANY_SWEEPS = 30


class Device(NamedTuple):
    """Microseconds of one evaluation, of one Newton iteration, of one call of a solve.

    And the operations done in a microsecond, if there is enough to do.
    """

    evaluation: float
    iteration: float
    call: float
    throughput: float


_CPU = Device(0.2, 8, 30, 25_000)
_ACCELERATOR = Device(20, 200, 200, 2_000_000)


class Effort(eqx.Module):
    """Depth and work, in microseconds."""

    depth: float
    work: float

    def __add__(self, other: "Effort") -> "Effort":
        return Effort(self.depth + other.depth, self.work + other.work)

    @property
    def time(self) -> float:
        """Both together."""
        return self.depth + self.work


class CostModel(eqx.Module):
    """The model, for one problem on one platform.

    - `num_steps`, `grid_steps`: of the sequential and of the parallel solve, N and M.
    - `stages`: evaluations of the field in one step, S.
    - `implicit`: whether these are in loops, which cannot be unrolled.
    - `flops`: operations of one evaluation.
    - `state_size`, `batch_size`: D and B.
    - `linearization`: of the Newton iteration.
    - `platform`: as `jax.default_backend()` names it.
    """

    num_steps: int
    grid_steps: int
    stages: float
    implicit: bool
    flops: float
    state_size: int
    batch_size: int
    linearization: AbstractLinearization
    platform: str

    @property
    def _device(self) -> Device:
        return _CPU if self.platform == "cpu" else _ACCELERATOR

    @property
    def _step(self) -> float:
        """Operations of one step."""
        size = self.state_size
        evaluation = self.flops + _TRAFFIC * size
        if self.implicit:
            evaluation += _TANGENT * size * self.flops + _LINEAR_SOLVE + size**3
        return self.stages * evaluation

    def _effort(self, depth: float, num_steps: int, work: float) -> Effort:
        work = work * num_steps * self.batch_size / self._device.throughput
        return Effort(depth + self._device.call, work)

    def _scan(self, diagonal: bool) -> tuple[float, float]:
        """Depth of the affine recurrence, and operations of one of its steps."""
        size = self.state_size
        if self.platform == "cpu":
            return self.grid_steps / 100, 2 * (size if diagonal else size**2)
        depth = self._device.iteration / 10 * np.log2(self.grid_steps + 1)
        return float(depth), 4 * (size if diagonal else size**3)

    def _transition(self) -> float:
        """Operations of one transition."""
        size, kind = self.state_size, type(self.linearization)
        if kind is Picard:
            return 0.0
        if kind is PiecewiseConstant:
            product = 2 * size**3 + _TRAFFIC * size**2
            tangents = _TANGENT * size * self.flops
            return tangents + _PRODUCTS_OF_EXPM * product
        return _TANGENT * size * self._step

    def sequential(self) -> Effort:
        """The forward solve by the sequential solver."""
        depth = self._device.evaluation * self.num_steps * self.stages
        work = self._step + _BOOKKEEPING * self.state_size
        return self._effort(depth, self.num_steps, work)

    def sequential_gradient(self) -> Effort:
        """Value and gradient of the sequential solver."""
        depth = 20 * self._device.evaluation * self.num_steps * self.stages
        work = 6 * self._step + _BOOKKEEPING_OF_GRADIENT * self.state_size
        return self._effort(depth, self.num_steps, work)

    def newton(self, iterations: int) -> Effort:
        """The forward solve by Newton's method."""
        depth, work = self._scan(not self.linearization.is_dense)
        depth += self._device.iteration
        if self.implicit:
            depth += self._device.evaluation * self.stages
        work += self._step + self._transition()
        return self._effort(iterations * depth, self.grid_steps, iterations * work)

    def guess(self) -> Effort:
        """The steps in sequence of `CoarsePredictor`."""
        whole, part = self.in_sequence(), 1 / CoarsePredictor().stride
        return Effort(part * whole.depth, part * whole.work)

    def in_sequence(self) -> Effort:
        """The forward solve, one step after the other."""
        return self._effort(self._in_sequence, self.grid_steps, self._step)

    @property
    def _in_sequence(self) -> float:
        """Depth of the grid's steps, one after the other."""
        each = self._device.evaluation * (self.stages if self.implicit else 1)
        return each * self.grid_steps

    @property
    def is_matrix_free(self) -> bool:
        """Whether the gradient is found by products with Jacobians."""
        return not self.linearization.is_dense and self.state_size > MOST_DIRECT

    def gradient(self, iterations: int) -> Effort:
        """What `DEERAdjoint` adds to a forward solve of so many iterations."""
        depth, work = self._scan(self.is_matrix_free)
        if self.is_matrix_free:
            # As many sweeps as iterations, roughly: the transitions are the same.
            depth += self._device.iteration
            work += 3 * self._step + self._transition()
            return self._effort(iterations * depth, self.grid_steps, iterations * work)
        depth += 6 * self._device.iteration
        # An implicit step is differentiated at its solution, whatever led to that.
        work += self._step * (3 if self.implicit else 5 + 2 * self.state_size)
        return self._effort(depth, self.grid_steps, work)

    def step_by_step(self) -> Effort:
        """What the gradient adds that goes from step to step, as the steps did."""
        work = 1.2 * self._step + _BOOKKEEPING_STEP_BY_STEP * self.state_size
        return self._effort(2 * self._in_sequence, self.grid_steps, work)

    @property
    def is_parallel(self) -> bool:
        """Whether the gradient is parallel where the steps are made in sequence."""
        few = self.state_size**2 * self.batch_size <= MOST_ON_CPU
        return few or (self.platform != "cpu" and self.fits())

    def fits(self) -> bool:
        """Whether there is memory for the Jacobians that a parallel gradient needs."""
        entries = self.grid_steps * self.batch_size * self.state_size**2
        return self.is_matrix_free or entries <= MOST_ENTRIES


class Prediction(NamedTuple):
    """Relative to the sequential solver; the fields are those of `Advice`."""

    speedup_sequential_forward: float
    work_ratio: float | None = None
    depth_ratio: float | None = None
    speedup_forward: float | None = None
    speedup_gradient: float | None = None


def predict(model: CostModel, cold: int | None, warm: int | None) -> Prediction:
    """What the model says, given the Newton iterations; `None` where it cannot."""
    slow = model.sequential_gradient()
    sweeps = max(cold or _MANY_SWEEPS, 1)
    gradient = model.gradient(sweeps) if model.is_parallel else model.step_by_step()
    prediction = Prediction(slow.time / (model.in_sequence() + gradient).time)
    if cold is not None:
        forward = model.newton(cold) + model.guess()
        speedup = model.sequential().time / forward.time
        prediction = prediction._replace(speedup_forward=speedup)
    if warm is None or not model.fits():
        return prediction
    fast = model.newton(warm) + model.gradient(sweeps)
    return prediction._replace(
        work_ratio=fast.work / slow.work,
        depth_ratio=fast.depth / slow.depth,
        speedup_gradient=slow.time / fast.time,
    )
