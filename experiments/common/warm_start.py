"""The trajectory of every sample, kept between training steps as guess and grid.

The memory is the `WindowState` of all samples, stacked, over the longest horizon. While
training goes over a shorter one, a prefix of the same grid, the rest of the entries
repeat the last time: nothing is known there, which the solver fills by prediction.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from diffrax_deer import DEERSolver, WindowState


def cold(
    solver: DEERSolver, term: Any, t1: float, y0s: Float[Array, "sample state"]
) -> WindowState:
    """The memory of samples of which nothing is known yet.

    Args:
        solver: solves over the longest horizon.
        term: the vector field.
        t1: the end of the longest horizon, which begins at zero.
        y0s: what the samples start from.
    """
    return jax.vmap(lambda y0: solver.init(term, 0.0, t1, y0, None))(y0s)


def recall(
    memory: WindowState, indices: Int[Array, " batch"], num_steps: int
) -> WindowState:
    """What is known of some samples, as far as the first `num_steps` steps."""
    state = jax.tree.map(lambda x: x[indices], memory)
    known = state.ends, state.ys, state.errors
    known = jax.tree.map(lambda x: x[:, :num_steps], known)
    return _with(state, known)


def remember(
    memory: WindowState, indices: Int[Array, " batch"], state: WindowState
) -> WindowState:
    """The memory with the states of some samples, of a horizon as long or shorter."""
    missing = memory.ends.shape[1] - state.ends.shape[1]
    ends = jnp.pad(state.ends, ((0, 0), (0, missing)), mode="edge")
    ys = jnp.pad(state.ys, ((0, 0), (0, missing), (0, 0)), mode="edge")
    errors = state.errors
    if errors is not None:
        errors = jnp.pad(errors, ((0, 0), (0, missing)))
    state = _with(state, (ends, ys, errors))
    return jax.tree.map(lambda old, new: old.at[indices].set(new), memory, state)


def _with(state: WindowState, steps: tuple[Any, Any, Any]) -> WindowState:
    ends, ys, errors = steps
    return WindowState(state.t0, ends, state.y0, ys, state.num_iterations, errors)


def mean_iterations(memory: WindowState | None) -> float | None:
    """Newton iterations of the last solve of each sample; `None` before the first."""
    if memory is None:
        return None
    used = memory.ends[:, -1] > memory.t0
    if not used.any():
        return None
    return float(memory.num_iterations[used].mean())
