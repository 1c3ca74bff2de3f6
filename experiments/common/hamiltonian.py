"""A network that learns the energy of a system, and the motion that follows from it.

It stands in for the Hamiltonian H(q, p), where y = (q, p):

    dq/dt = dH/dp,    dp/dt = -dH/dq.

Greydanus, Dzamba and Yosinski, Hamiltonian neural networks, arXiv:1906.01563.
"""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from diffrax_deer import WindowState
from experiments.common import warm_start
from experiments.common.training import LossFn

Batch = tuple[
    Int[Array, " batch"],
    Float[Array, "batch state"],
    Float[Array, "batch time state"],
]


class HamiltonianNetwork(eqx.Module):
    """The vector field of a learned energy."""

    energy: eqx.nn.MLP

    def __init__(
        self, state_dim: int, width: int, depth: int, dtype: Any, key: PRNGKeyArray
    ):
        energy = eqx.nn.MLP(
            state_dim,
            "scalar",
            width,
            depth,
            activation=jax.nn.softplus,
            dtype=dtype,
            key=key,
        )
        # The slope of softplus is about a half: with equinox's weights, six layers of
        # it have a gradient near zero, and nothing would move for long.
        weights = lambda mlp: [layer.weight for layer in mlp.layers]
        larger = [2.5 * weight for weight in weights(energy)]
        self.energy = eqx.tree_at(weights, energy, larger)

    def __call__(self, t: Any, y: Float[Array, " state"], args: None) -> Array:
        """Hamilton's equations."""
        del t, args
        gradient = jax.grad(self.energy)(y)
        by_q, by_p = jnp.split(gradient, 2)
        return jnp.concatenate([by_p, -by_q])


def solve(
    model: HamiltonianNetwork,
    y0: Float[Array, " state"],
    ts: Float[Array, " time"],
    **options: Any,
) -> Any:
    """Follows one trajectory; `options` go to `diffrax.diffeqsolve`."""
    saveat = diffrax.SaveAt(ts=ts, solver_state=True)
    options = {"dt0": 0.1} | options
    return diffrax.diffeqsolve(
        diffrax.ODETerm(model), t0=0.0, t1=ts[-1], y0=y0, saveat=saveat, **options
    )


def make_loss(
    options_for: Callable[[int], dict[str, Any]], ts: Float[Array, " time"]
) -> LossFn:
    """The mean squared error of a batch of trajectories, as far as their data go.

    Args:
        options_for: maps a number of times to the arguments of a solve up to there.
        ts: the times of the longest trajectories.
    """

    def loss(
        model: HamiltonianNetwork,
        memory: WindowState | None,
        batch: Batch,
        key: PRNGKeyArray,
    ) -> tuple[Float[Array, ""], WindowState | None]:
        del key
        indices, y0s, targets = batch
        num_times = targets.shape[1]
        options = options_for(num_times)

        # A solve that fails ends in infinities, and so does the loss.
        def solve_one(y0: Array, guess: WindowState | None) -> Any:
            state = {"solver_state": guess, "throw": False}
            return solve(model, y0, ts[:num_times], **state, **options)

        if memory is None:
            solution = jax.vmap(lambda y0: solve_one(y0, None))(y0s)
        else:
            guesses = warm_start.recall(memory, indices, options["solver"].num_steps)
            solution = jax.vmap(solve_one)(y0s, guesses)
            memory = warm_start.remember(memory, indices, solution.solver_state)
        return jnp.mean((solution.ys - targets) ** 2), memory

    return loss
