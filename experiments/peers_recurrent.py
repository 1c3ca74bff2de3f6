"""A recurrent network in PyTorch and in JAX, for `experiments.peers`.

The cell is the `ParaGRU` of pararnn-torch, a gated recurrent unit whose recurrent
weights are diagonal (Danieli et al., *ParaRNN*, ICLR 2026): each unit is a recurrence
of its own, so that Newton's method needs only the diagonal of the Jacobian.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from diffrax_deer import DiagonalJacobian, MatrixFreeGradient, Newton, deer_scan

_NUM_INPUTS, _NUM_UNITS = 8, 16


class Problem(NamedTuple):
    """Weights, inputs and what the states are to be.

    The weights are those of the inputs, their bias, and the recurrent ones of the
    update gate, of the reset gate and of the candidate.
    """

    weights: list[Float[Array, "..."]]
    xs: Float[Array, "batch time inputs"]
    target: Float[Array, "batch time units"]


def problem(batch_size: int, num_steps: int) -> Problem:
    """Random inputs and targets, in float32."""
    keys = jr.split(jr.key(0), 6)
    recurrent = [jr.uniform(key, (_NUM_UNITS,), minval=-0.5) for key in keys[:3]]
    inputs = jr.normal(keys[3], (3 * _NUM_UNITS, _NUM_INPUTS)) / _NUM_INPUTS**0.5
    xs = jr.normal(keys[4], (batch_size, num_steps, _NUM_INPUTS))
    target = jr.normal(keys[5], (batch_size, num_steps, _NUM_UNITS))
    return Problem([inputs, jnp.zeros(3 * _NUM_UNITS), *recurrent], xs, target)


def _with_jax(scan: Callable, problem: Problem) -> Callable[[], list[np.ndarray]]:
    @jax.jit
    @jax.value_and_grad
    def value_and_gradient(weights):
        inputs, bias, update, reset, candidate = weights

        def step(h, x):
            z_x, r_x, n_x = jnp.split(x, 3)
            z = jax.nn.sigmoid(update * h + z_x)
            r = jax.nn.sigmoid(reset * h + r_x)
            h = (1 - z) * h + z * jnp.tanh(candidate * r * h + n_x)
            return h, h

        run = lambda xs: scan(step, jnp.zeros(_NUM_UNITS), xs)[1]
        states = jax.vmap(run)(problem.xs @ inputs.T + bias)
        return jnp.mean((states - problem.target) ** 2)

    def call():
        value, gradient = value_and_gradient(problem.weights)
        return [np.asarray(x) for x in (value, *gradient)]

    return call


def _with_pararnn(problem: Problem, solver: str) -> Callable[[], list[np.ndarray]]:
    torch: Any = importlib.import_module("torch")
    pararnn: Any = importlib.import_module("pararnn")
    torch.set_num_threads(1)
    weights, xs, target = jax.tree.map(
        lambda x: torch.from_numpy(np.array(x)), tuple(problem)
    )
    cell = pararnn.ParaGRU(_NUM_INPUTS, _NUM_UNITS, max_recurrent_norm=None)
    parameters = [cell.W_x.weight, cell.W_x.bias, cell.a_z, cell.a_r, cell.a_n]
    for parameter, weight in zip(parameters, weights, strict=True):
        parameter.data = weight
    layer = pararnn.ParaRNN(cell, solver=solver)

    def call():
        layer.zero_grad()
        value = torch.mean((layer(xs) - target) ** 2)
        value.backward()
        found = (value.detach(), *(x.grad for x in parameters))
        return [x.numpy().copy() for x in found]

    return call


_newton = functools.partial(
    deer_scan,
    method=Newton(DiagonalJacobian(num_probes=1)),
    gradient=MatrixFreeGradient(),
)
REFERENCE, OURS = "lax.scan", "deer_scan"
METHODS: dict[str, Callable[[Problem], Callable[[], list[np.ndarray]]]] = {
    "pararnn-torch, step by step": functools.partial(
        _with_pararnn, solver="sequential"
    ),
    "pararnn-torch, Newton": functools.partial(_with_pararnn, solver="newton"),
    REFERENCE: functools.partial(_with_jax, lax.scan),
    OURS: functools.partial(_with_jax, deer_scan),
    "deer_scan, Newton": functools.partial(_with_jax, _newton),
}
