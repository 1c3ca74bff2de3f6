"""What a flow is worth, and what solving it costs and how it errs.

The compiled functions are shared by evaluations and pictures, and by all models that
differ in nothing but their weights.
"""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from experiments.common.flow import Flow
from experiments.common.training import TrainState
from experiments.common.work import count_work

# Twenty steps of order eight.
_REFERENCE = {
    "solver": diffrax.Dopri8(),
    "stepsize_controller": diffrax.ConstantStepSize(),
}
_NUM_AT_ONCE = 200  # the toys' test samples are a multiple of that, and so is the grid


@eqx.filter_jit
def solve(model: Flow, points: Any, options: dict[str, Any]) -> tuple[Any, Any]:
    """Where the points flow to with the exact trace, and what was measured there."""
    saveat = diffrax.SaveAt(t1=True, solver_state=True)

    def one(x: Array) -> tuple[Any, dict[str, Array | None]]:
        solution = model.solve(x, saveat=saveat, **options)
        nfe, iterations = count_work(options["solver"], solution, x.size)
        nll = -model.read_out(solution.ys)
        return solution.ys, {"nll": nll, "nfe": nfe, "num_iterations": iterations}

    return jax.vmap(one)(points)


@eqx.filter_jit
def solve_tightly(model: Flow, points: Any) -> Any:
    """Where the points flow to, up to rounding."""
    return jax.vmap(lambda x: model.solve(x, **_REFERENCE).ys)(points)


@eqx.filter_jit
def sample(model: Flow, key: PRNGKeyArray, number: int, options: dict) -> Array:
    """Draws samples of the flow."""
    return model.sample(key, number, **options)


@eqx.filter_jit
def push_forward(model: Flow, zs: Array, options: dict[str, Any]) -> Array:
    """Lets points of the normal distribution flow to the data."""
    return jax.vmap(lambda z: model.push_forward(z, **options))(zs)


def solve_all(
    model: Flow, points: Float[np.ndarray, "point dim"], options: dict[str, Any]
) -> tuple[Any, Any]:
    """The same as `solve`, for more points than fit into memory at once."""
    numbers = range(0, len(points), _NUM_AT_ONCE)
    parts = [solve(model, points[n : n + _NUM_AT_ONCE], options) for n in numbers]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def make_evaluate(
    options: dict[str, Any], points: Float[np.ndarray, "point dim"]
) -> Callable[[TrainState], dict[str, float | None]]:
    """Negative log-likelihood of the points, and what a solve costs and how it errs.

    The errors are measured at the first few points. That of a solve is the largest of
    any component at its end, the log-density among them, averaged over the points; it
    is measured against a method of higher order with small steps. That of a round trip,
    from the data to the normal distribution and back, is the largest of all. Neither
    can be told from the rounding error of float32 below about 1e-6.
    """
    first = points[:_NUM_AT_ONCE]

    def evaluate(state: TrainState) -> dict[str, float | None]:
        states, values = solve_all(state.model, points, options)
        states = jax.tree.map(lambda leaf: leaf[: len(first)], states)
        exact = solve_tightly(state.model, first)
        deviations = jax.tree.map(lambda a, b: np.abs(a - b), exact, states)
        largest = [leaf.reshape(len(first), -1).max(1) for leaf in deviations]
        back = push_forward(state.model, states[0][:, -1], options)
        return {
            name: None if value is None else float(np.mean(value))
            for name, value in values.items()
        } | {
            "solve_error": float(np.mean(np.maximum(*largest))),
            "round_trip_error": float(np.abs(back - first).max()),
        }

    return evaluate
