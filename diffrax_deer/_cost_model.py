r"""What a solve costs in sequence and in parallel: a model, right to a factor of two.

Two things take time: what has to wait for something else, the *depth*, and all there is
to compute, the *work*. One device does both at once, so that

    time = depth + work / flops_per_call,

in units of one call: the overhead of one evaluation of the field in a loop, about 1 µs
on a CPU and 10 µs on a GPU. Per sample and N steps of S evaluations of a field of F
operations and D components (its B samples are calculated together, but for the depth):

| | depth | work |
| --- | --- | --- |
| sequential | N S | N S F |
| its value and gradient | 5 times that | 5 times that |
| one Newton iteration | 50 + S + scan | N (S F + transitions + scan) |
| `SequentialForward` | N on a CPU, else N S | N S F |
| gradient of `DEERAdjoint` | 50 + 3 S + scan | N (S F (3 + 0.4 D) + scan) |

A dense scan has a depth of N / 50 on a CPU, done in sequence, and 2 log2(N) elsewhere,
where it multiplies matrices. A tangent costs 0.4 evaluations, having no nonlinearity of
its own. The numbers are fitted to timings of a FitzHugh-Nagumo oscillator and of small
neural ODEs, batch 1 to 128, on two CPU cores; those of a GPU are not measured.
"""

from typing import NamedTuple

import equinox as eqx
import numpy as np

from ._linearization import (
    AbstractLinearization,
    DiagonalJacobian,
    Picard,
    PiecewiseConstant,
)

_FLOPS_PER_CALL = {"cpu": 3e4}
_FLOPS_PER_CALL_OF_ACCELERATORS = 2e7
_OVERHEAD = 50
# 4 GiB in single precision.
_MOST_ENTRIES = 2**30
_TANGENT = 0.4
_SEQUENTIAL_GRADIENT = 5
_MATRIX_PRODUCTS_OF_EXPM = 8


class Effort(eqx.Module):
    """Depth, in calls, and work, in floating point operations."""

    depth: float
    work: float

    def __add__(self, other: "Effort") -> "Effort":
        return Effort(self.depth + other.depth, self.work + other.work)

    def times(self, factor: float) -> "Effort":
        """The same again and again."""
        return Effort(factor * self.depth, factor * self.work)


class CostModel(eqx.Module):
    """The model, for one problem on one platform.

    - `num_steps`: of the sequential solve.
    - `grid_steps`: of the grid that is solved in parallel.
    - `stages`: evaluations of the field in one step.
    - `flops`: of one evaluation.
    - `state_size`, `batch_size`: D and B.
    - `linearization`: of the Newton iteration.
    - `platform`: as `jax.default_backend()` names it.
    """

    num_steps: int
    grid_steps: int
    stages: float
    flops: float
    state_size: int
    batch_size: int
    linearization: AbstractLinearization
    platform: str

    def _scan(self, diagonal: bool) -> Effort:
        """Of the affine recurrence; the work is that of one step."""
        size = self.state_size
        if self.platform == "cpu":
            return Effort(self.grid_steps / 50, 2 * size if diagonal else 2 * size**2)
        depth = 2 * np.log2(self.grid_steps + 1)
        return Effort(depth, 4 * size if diagonal else 4 * size**3)

    def _transition(self) -> float:
        """The work of one transition."""
        size, kind = self.state_size, type(self.linearization)
        tangents = _TANGENT * size * self.flops
        if kind is Picard:
            return 0.0
        if kind is PiecewiseConstant:
            return tangents + _MATRIX_PRODUCTS_OF_EXPM * 2 * size**3
        return self.stages * tangents

    def _on_grid(self, depth: float, work: float) -> Effort:
        return Effort(depth, work * self.grid_steps * self.batch_size)

    def sequential(self) -> Effort:
        """The forward solve by the sequential solver."""
        evaluations = self.num_steps * self.stages
        return Effort(evaluations, evaluations * self.flops * self.batch_size)

    def sequential_gradient(self) -> Effort:
        """Value and gradient of the sequential solver: checkpoints are made again."""
        return self.sequential().times(_SEQUENTIAL_GRADIENT)

    def newton(self, iterations: int) -> Effort:
        """The forward solve by Newton's method."""
        diagonal = type(self.linearization) in (DiagonalJacobian, Picard)
        scan = self._scan(diagonal)
        work = self.stages * self.flops + self._transition() + scan.work
        depth = _OVERHEAD + self.stages + scan.depth
        return self._on_grid(depth, work).times(iterations)

    def in_sequence(self) -> Effort:
        """The forward solve by `SequentialForward`."""
        # On a CPU the unrolled stages of a step are compiled into one call.
        calls = 1 if self.platform == "cpu" else self.stages
        return self._on_grid(self.grid_steps * calls, self.stages * self.flops)

    def gradient(self) -> Effort:
        """What `DEERAdjoint` adds to a forward solve."""
        scan = self._scan(False)
        tangents = 3 + _TANGENT * self.state_size
        work = self.stages * self.flops * tangents + scan.work
        return self._on_grid(_OVERHEAD + 3 * self.stages + scan.depth, work)

    def fits(self) -> bool:
        """Whether there is memory for the Jacobians that a gradient needs."""
        entries = self.grid_steps * self.batch_size * self.state_size**2
        return entries <= _MOST_ENTRIES

    def speedup(self, slow: Effort, fast: Effort) -> float:
        """How many times as long `slow` takes as `fast`."""
        per_call = _FLOPS_PER_CALL.get(self.platform, _FLOPS_PER_CALL_OF_ACCELERATORS)
        time = lambda effort: effort.depth + effort.work / per_call
        return float(time(slow) / time(fast))


class Prediction(NamedTuple):
    """Relative to the sequential solver; the fields are those of `Advice`."""

    work_ratio: float | None = None
    depth_ratio: float | None = None
    speedup_forward: float | None = None
    speedup_gradient: float | None = None
    speedup_sequential_forward: float | None = None


def predict(model: CostModel, cold: int | None, warm: int | None) -> Prediction:
    """What the model says, given the Newton iterations; `None` where it cannot."""
    prediction = Prediction()
    if cold is not None:
        forward = model.speedup(model.sequential(), model.newton(cold))
        prediction = prediction._replace(speedup_forward=forward)
    if not model.fits():
        return prediction
    slow = model.sequential_gradient()
    fast = model.in_sequence() + model.gradient()
    prediction = prediction._replace(
        speedup_sequential_forward=model.speedup(slow, fast)
    )
    if warm is None:
        return prediction
    fast = model.newton(warm) + model.gradient()
    return prediction._replace(
        work_ratio=fast.work / slow.work,
        depth_ratio=fast.depth / slow.depth,
        speedup_gradient=model.speedup(slow, fast),
    )
