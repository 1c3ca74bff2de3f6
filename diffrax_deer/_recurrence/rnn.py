"""A layer of Equinox that runs a recurrent cell over a sequence, in parallel."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .._gradient import AbstractGradient
from .._method import AbstractMethod
from .._ravel import widest
from .deer_scan import deer_scan


def _initial_state(cell: Callable) -> PyTree[Array]:
    size = getattr(cell, "hidden_size", None)
    weights = [x for x in jax.tree.leaves(cell) if eqx.is_inexact_array(x)]
    if not isinstance(size, int) or not weights:
        msg = (
            f"`{type(cell).__name__}` does not say how it starts: it has no "
            "`hidden_size`, or no weights. Pass the initial state, "
            "`DEERRNN(cell)(xs, init)`."
        )
        raise TypeError(msg)
    zero = jnp.zeros(size, widest(*(x.dtype for x in weights)))
    return (zero, zero) if isinstance(cell, eqx.nn.LSTMCell) else zero


class DEERRNN(eqx.Module):
    """A recurrent cell over a whole sequence, solved in parallel over time.

        rnn = DEERRNN(eqx.nn.GRUCell(3, 16, key=key))
        states = rnn(xs)  # (time, 16), for xs (time, 3)

    Values and gradients are those of a loop over `state = cell(x, state)`. Layers are
    stacked by composition, `second(first(xs))`, and a layer with `reverse=True` reads
    backwards in time; a batch is `jax.vmap(rnn)(batch)`.

    **Arguments:**

    - `cell`: an `eqx.nn.GRUCell`, an `eqx.nn.LSTMCell`, or any function of one input
        and one state that returns the next state, a pytree.
    - `reverse`: whether to begin with the last input. The output keeps the order of the
        inputs: its entry n is the state after reading the inputs from the end to n.
    - `method`, `gradient`, `throw`: as for `deer_scan`.

    **Raises:** `TypeError` when called without `init`, if the cell does not say how
    large its state is; and what `deer_scan` raises.

    **Cost:** that of `deer_scan`, with D the size of the state.
    """

    cell: Callable[[Any, Any], Any]
    reverse: bool = eqx.field(default=False, static=True)
    method: AbstractMethod | None = None
    gradient: AbstractGradient | None = None
    throw: bool = eqx.field(default=True, static=True)

    @eqx.filter_jit
    def __call__(
        self,
        xs: PyTree[Array],
        init: PyTree[Array] | None = None,
        *,
        guess: PyTree[Array] | None = None,
    ) -> PyTree[Array]:
        """The states after each step, a pytree like a state with a leading axis `time`.

        For an `LSTMCell` that is the pair of hidden states and cell states.

        **Arguments:**

        - `xs`: the inputs, a pytree of arrays of leading axis `time`.
        - `init`: the state before the first step, zero if omitted.
        - `guess`: states close to the result, of a previous call for example.
        """

        def step(state, x):
            state = self.cell(x, state)
            return state, state

        return deer_scan(
            step,
            _initial_state(self.cell) if init is None else init,
            xs,
            method=self.method,
            gradient=self.gradient,
            guess=guess,
            reverse=self.reverse,
            throw=self.throw,
        )[1]
