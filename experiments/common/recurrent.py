"""Recurrent cells over whole sequences: by `jax.lax.scan` and by DEER, in some ways."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from diffrax_deer import DEERRNN, deer_scan
from experiments.common.solvers import CHOICES, RECURRENT_BASELINE

Cell = eqx.nn.GRUCell | eqx.nn.LSTMCell
Inputs = Float[Array, "time input"]
Layer = Callable[[Inputs], PyTree[Array]]


def zero_state(cell: Cell) -> PyTree[Array]:
    """The state before the first step, of the type of the cell's weights."""
    zero = jnp.zeros(cell.hidden_size, cell.weight_hh.dtype)
    return (zero, zero) if isinstance(cell, eqx.nn.LSTMCell) else zero


def run_cell(
    method: str, cell: Cell, xs: Inputs, throw: bool = True
) -> tuple[PyTree[Array], Int[Array, ""] | None]:
    """The states after each step, and the number of Newton iterations.

    Args:
        method: how they are found; the result does not depend on it.
        cell: begins with a state of zero.
        xs: its inputs.
        throw: whether DEER raises an error where it fails, or returns NaN.

    Returns:
        The states with a leading axis `time`; and the iterations, zero if the steps
        were made one after another and `None` for `jax.lax.scan`.
    """

    def step(state: PyTree[Array], x: Array) -> tuple[PyTree[Array], PyTree[Array]]:
        state = cell(x, state)
        return state, state

    if method == RECURRENT_BASELINE:
        return jax.lax.scan(step, zero_state(cell), xs)[1], None
    options: dict[str, Any] = CHOICES[method]
    _, states, statistics = deer_scan(
        step, zero_state(cell), xs, throw=throw, return_statistics=True, **options
    )
    return states, statistics.num_iterations


def make_layer(method: str, cell: Cell) -> Layer:
    """The cell as a layer of a network."""
    if method == RECURRENT_BASELINE:
        return lambda xs: run_cell(method, cell, xs)[0]
    return DEERRNN(cell, **CHOICES[method])


def scaled(cell: Any, factor: float) -> Any:
    """The cell with its weights multiplied by a factor, its biases as they are."""
    weights = lambda cell: (cell.weight_ih, cell.weight_hh)
    return eqx.tree_at(weights, cell, replace_fn=lambda weight: factor * weight)
