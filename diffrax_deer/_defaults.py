"""What `None` means: every threshold of the library, and where it comes from.

This is the only module that asks for the platform or for the size of a batch. A choice
depends on the platform at the time of tracing. None of them changes an answer: at worst
a program is slower, should it run elsewhere.

"Measured" names the command and the committed results; D is the number of real
components of the state, N the number of steps.
"""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Int, PyTree

# --- Small matrices ---------------------------------------------------------------

# Products of matrices up to this size are written out as sums. Not measured since
# version 0.1, where sums of 2 × 2 to 16 × 16 were up to 40 times as fast on a CPU.
MAX_UNROLLED = 16
# XLA's own product is the fastest on a CPU for one matrix for each step, but for these
# sizes, where it is the slowest by far. Not measured since version 0.1.
UNROLLED_STAGES = range(4, 7)
# `ChunkedScan`: steps of a chunk, of which XLA splits longer ones, and the largest D:
# compiled in 1 s for D = 2, in 3 s for 4, in 8 s for 8. Not timed.
CHUNK, MAX_CHUNKED = 16, 4
# So many tangents at once: that many times the memory of one step. Not measured.
MAX_TANGENTS = 16

# --- Newton's method --------------------------------------------------------------

# Tolerance: rounding to this power, 2e-12 in double precision and 6e-6 in single.
# Not measured; below it an iteration meets its own rounding.
TOLERANCE_POWER = 0.75
# How much a residual may grow in one iteration before the guess is given up, and what
# part of the largest one before it does not count as growth. `experiments.convergence`,
# `results/convergence/cpu.json`, has the iterations that this leads to.
MAX_GROWTH, GROWTH_FLOOR = 10, 0.1
# A residual of this part of the state does not count as growth either. As above.
SMALL_RESIDUAL = 1e-2
# By what factor the rate of convergence is distrusted. As above.
RATE_SAFETY = 10
# A coarse step is so many steps long. As above.
COARSE_STRIDE = 3
# A coarse step with a larger error, relative to the state, predicts nothing. Not
# measured.
MAX_COARSE_ERROR = 0.1
# A component of an implicit step is solved for in units of no less than this power of
# rounding, times the largest one: what cancels to zero has no digits of its own. Not
# measured.
SMALLEST_SCALE_POWER = 0.25
# Steps of one window of `DEERSolver` where they are made all at once. Not measured.
NEWTON_STEPS = 64
# Steps iterated on at once: a CPU is busy with few; others hold so many entries of
# transitions. Not measured.
CPU_WINDOW, WINDOW_ENTRIES = 1024, 2**22

# `Equidistributed`: a cold start has memory for so many steps for each of the grid, and
# takes no coarser relative tolerance than this. A state is that of the same interval if
# its ends have moved by no more than this part. Not measured.
GRID_CAPACITY, GRID_TOLERANCE, GRID_SHIFT = 4, 0.1, 0.1
# What part of the way to equal errors a grid goes in one solve, and by what factor it
# distrusts the errors at most. Steps that are as long as stability allows have errors
# that say nothing: at 1/4 of the way Van der Pol's equation (mu = 10, `Dopri5`, 305
# steps) overflowed after ten solves, at 1/10 not in forty. Measured once, by a script
# that is not committed.
GRID_RATE, MAX_GRID_WEIGHT = 0.1, 10
# A grid is placed anew where the largest error has grown by this factor since it was.
# Tried: 2 and 4, on three problems, by what is now the walk of `experiments.grids`, of
# which no results are committed.
GRID_GROWTH = 2

# `deer_solve`: iterations, and the smallest part of an update that is tried. Not
# measured.
MAX_DAMPED_ITERATIONS = 100
MIN_DAMPING = 2.0**-12

# --- How steps are made and differentiated ------------------------------------------

# On a CPU, the entries D² of a Jacobian times the batch up to which the parallel
# gradient is the faster one. `experiments.thresholds`, `results/thresholds/cpu.json`:
# perceptrons, D = 2 to 8, and FitzHugh-Nagumo, batch 1 to 128; `results/benchmark/cpu`
# agrees. For other costs of a step the other choice can be 1.6 times as fast
# (`results/long_horizon/cpu.json`).
MAX_PARALLEL_ENTRIES = 128
# The same for `deer_scan`, from the same results: GRU, D = 2 to 16, batch 1 to 64.
MAX_PARALLEL_ENTRIES_SCAN = 256
# Elsewhere `deer_scan` uses Newton's method up to this D, as far as it is faster in
# arXiv:2309.12252, figure 2, on a V100. Not measured.
MAX_NEWTON_STATE = 32
# Entries of all Jacobians, N D², up to which they are held: 4 GiB in single precision.
# Not measured.
MAX_JACOBIAN_ENTRIES = 2**30
# The Jacobian of a Runge-Kutta step is found from those of its stages up to this D.
# Not measured since version 0.1.
MAX_STAGE_STATE = 16

# --- DEERAdjoint --------------------------------------------------------------------

# `max_steps` times steps of a window times D up to which windows of a controller are
# recorded, and differentiated together. Not measured since version 0.1, where more took
# longer than the rest, to fill them with zeros in each sample of a batch.
MAX_RECORD_ENTRIES = 2**15
# On a CPU also only so many parameters and save times: of networks a step is busy with
# its products, and diffrax's loop, which holds their derivative once for each sample,
# wastes less than one that skips what was not made. FitzHugh-Nagumo, 155 steps, no save
# time: 5 times as fast as diffrax's, 100: 2.4, 1000: 0.6 times; a perceptron of 4482
# parameters, 24 steps: 0.7 times. Measured once, by a script that is not committed.
MAX_RECORD_PARAMETERS, MAX_RECORD_TIMES = 64, 128
# Recorded steps that are differentiated at once: on a CPU, see `results/thresholds/cpu.
# json`; elsewhere not measured.
CPU_GROUP, GROUP = 32, 1024
# Groups that are skipped together where nothing is left to do. Not measured.
NUM_SKIPPED_GROUPS = 16
# Save times that are interpolated at once, all in one step. Not measured.
NUM_SAVED_AT_ONCE = 16


def platform() -> str:
    """The platform that programs run on unless they are told otherwise."""
    config: Any = jax.config
    device = config.jax_default_device
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform


def prefers_sequential_scan() -> bool:
    """Whether an affine recurrence is solved one step after another."""
    return platform() == "cpu"


def prefers_chunks() -> bool:
    """Whether all steps at once means by chunks; no TPU was asked whether it can."""
    return platform() != "tpu"


def unless(needless: Any, usual: Callable[[], Any], always: Callable[[], Any]) -> Any:
    """`usual()` if it is needless to make `always()`, which is no worse.

    To hear of a decision costs the host of a GPU as much as four to eight kernels.
    """
    return lax.cond(needless, usual, always) if platform() == "cpu" else always()


def has_all_steps() -> bool:
    """Whether one accelerator has them, which can then look any of them up."""
    return platform() != "cpu" and jax.device_count() == 1


def prefers_sequential_steps() -> bool:
    """Whether steps are made, and their stages linearized, one after another."""
    return platform() == "cpu"


def predicts_by_coarse_steps() -> bool:
    """Whether a guess is made by coarse steps, one after another.

    Elsewhere each is 8 to 25 kernels: N / 3 of them cost as much as 16 iterations of a
    perceptron, N = 128, and save 2; 81 of FitzHugh-Nagumo, N = 1000, and save 33.
    Counted by `experiments.kernels`, `results/kernels`; not timed.
    """
    return platform() == "cpu"


def prefers_sequential_recurrence(state_size: int) -> bool:
    """Whether the steps of `deer_scan` are made one after another."""
    return platform() == "cpu" or state_size > MAX_NEWTON_STATE


def holds_jacobians(num_steps: int, state_size: int) -> bool:
    """Whether a gradient may hold the Jacobians of all steps."""
    return num_steps * state_size**2 <= MAX_JACOBIAN_ENTRIES


def tolerance(eps: float) -> float:
    """The relative tolerance of an iteration, given the rounding unit."""
    return eps**TOLERANCE_POWER


def window_size(num_entries: int) -> int:
    """How many steps to iterate on at once, if each transition has `num_entries`."""
    if platform() == "cpu":
        return CPU_WINDOW
    return max(WINDOW_ENTRIES // max(num_entries, 1), CPU_WINDOW)


def records_windows(
    max_entries: int, num_times: int, state_size: int, num_parameters: int
) -> bool:
    """Whether windows of a controller are recorded, and differentiated together.

    `max_entries` are those of the states of as many windows as there may be.
    """
    if not 0 < max_entries <= MAX_RECORD_ENTRIES:
        return False
    if platform() != "cpu":
        return True
    is_small = state_size**2 <= MAX_PARALLEL_ENTRIES
    few = num_parameters <= MAX_RECORD_PARAMETERS and num_times <= MAX_RECORD_TIMES
    return is_small and few


def group_size(num_entries: int) -> int:
    """How many recorded steps to differentiate at once; `num_entries` as above.

    The last group is made as a whole, also where nothing is left to do in it. That is
    work, of which a CPU has too much; other devices wait for the groups.
    """
    if platform() == "cpu":
        return CPU_GROUP
    return max(1, min(GROUP, WINDOW_ENTRIES // max(1, num_entries)))


@ft.cache
def _counter(count: int) -> Callable:
    """A function of arrays that returns `count`, times the size of any batch."""

    @custom_vmap
    def counter(arrays: list[Array]) -> Array:
        del arrays
        return jnp.array(count, jnp.int32)

    @counter.def_vmap
    def _(size: int, is_batched: Any, arrays: list[Array]) -> tuple[Array, bool]:
        (flags,) = is_batched
        pairs = zip(arrays, flags, strict=True)
        # An enclosing `vmap` that maps the same array must still be able to see it.
        one = lambda x: x[0] if size else jnp.zeros(x.shape[1:], x.dtype)
        arrays = [one(x) if batched else x for x, batched in pairs]
        return _counter(count * size)(arrays), False

    return counter


def batch_size(tree: PyTree[Any]) -> Int[Array, ""]:
    """The product of the sizes of all `jax.vmap` around that map any array of `tree`.

    A constant in the compiled program, hence also a choice made by it: both branches of
    a `lax.cond` are traced, and one is compiled.
    """
    arrays = [x for x in jax.tree.leaves(tree) if eqx.is_inexact_array(x)]
    return _counter(1)(lax.stop_gradient(arrays))
