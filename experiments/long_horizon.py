"""Fits of a neural ODE to long trajectories: value and gradient, at equal steps.

python -m experiments.long_horizon

A multilayer perceptron in D dimensions is fitted to observations along a trajectory of
many steps, in batches of several sizes. All methods make the same steps of Dopri5, so
that values and gradients are equal. Newton's method starts without a guess, and warm,
as in training: from the solution for the parameters before the last step of Adam. In
single precision, as neural ODEs are trained.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any, Self

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array

from experiments.common.affordable import describe_time, measure_methods, speed_up
from experiments.common.command_line import run
from experiments.common.errors import ExperimentError, check_least, check_lists
from experiments.common.measurement import TimedConfig, for_all_sizes, ready
from experiments.common.results import conclude, format_table
from experiments.common.solvers import BASELINE, LABELS, METHODS
from experiments.common.workload import (
    Comparison,
    Workload,
    prepare_solve,
    save_times,
    with_arrays,
)

_WARM = "deer_newton_warm"
_COMPARED = ("deer", _WARM, "deer_newton", "deer_sequential")
_LENGTH = 20.0


@dataclasses.dataclass(frozen=True)
class Config(TimedConfig):
    """The settings.

    Attributes:
        dims: Dimensions of the state.
        batch_sizes: Numbers of trajectories, solved under `jax.vmap`.
        width: Width of the two hidden layers.
        num_steps: Steps of Dopri5 on [0, 20].
        num_observations: Times at which the loss compares with data, a divisor of the
            number of steps.
    """

    dims: tuple[int, ...] = (2, 8)
    batch_sizes: tuple[int, ...] = (1, 4, 16, 64)
    width: int = 32
    num_steps: int = 512
    num_observations: int = 64
    repeats: int = 20
    out: Path = Path("runs/long_horizon/results.json")

    def reduced(self) -> Self:
        """The same measurement, small enough to take seconds."""
        small = dict(dims=(2,), batch_sizes=(1, 2), num_steps=16, num_observations=8)
        return dataclasses.replace(self, **small, repeats=2)

    def check(self) -> None:
        """Raises an error that names the first setting that makes no sense."""
        super().check()
        check_least(self, width=1, num_steps=1, num_observations=1)
        check_lists(self, "dims", "batch_sizes")
        if self.num_steps % self.num_observations:
            msg = (
                f"--num-steps is {self.num_steps}, which --num-observations "
                f"{self.num_observations} does not divide. Choose a multiple."
            )
            raise ExperimentError(msg)


def _vector_field(t: Any, y: Array, model: eqx.nn.MLP) -> Array:
    del t
    # Bounded and recurrent: trajectories neither leave nor settle.
    half = (y.size + 1) // 2
    rotated = jnp.concatenate([y[half:], -y[: y.size - half], jnp.zeros(y.size % 2)])
    return rotated[: y.size] + model(y) - 0.1 * y


def make_workload(dim: int, batch_size: int, config: Config) -> Workload:
    """The mean square over all observations."""
    model_key, state_key = jr.split(jr.key(0))
    model = eqx.nn.MLP(
        dim, dim, config.width, 2, jnp.tanh, dtype=jnp.float32, key=model_key
    )
    every = config.num_steps // config.num_observations
    ts = save_times(0.0, _LENGTH, config.num_steps, every)
    data = jnp.cos(jnp.asarray(ts, jnp.float32))[:, None]
    return Workload(
        **with_arrays(model, _vector_field),
        y0s=jr.normal(state_key, (batch_size, dim), jnp.float32),
        t0=0.0,
        t1=_LENGTH,
        num_steps=config.num_steps,
        loss=lambda ys: jnp.mean((ys - data) ** 2),
        ts=ts,
    )


def measure_cell(dim: int, batch_size: int, config: Config) -> dict[str, Any]:
    """All methods for one dimension and batch size."""
    before = make_workload(dim, batch_size, config)
    workload = before.after_one_step()
    prepared = (
        (name, prepare_solve(METHODS[name], "gradient", workload, before))
        for name in (BASELINE, *_COMPARED)
    )
    methods = measure_methods(prepared, Comparison(), math.inf, config.repeats)
    print(f"D = {dim}, batch {batch_size}: done", flush=True)
    return {"dim": dim, "batch_size": batch_size, "methods": methods}


def table(results: dict[str, Any]) -> str:
    """One line for each dimension and batch size, in Markdown."""
    rows = []
    for cell in results["cells"]:
        methods = cell["methods"]
        row = [f"{cell['dim']}", f"{cell['batch_size']}"]
        row.append(describe_time(methods[BASELINE], ".1f"))
        for name in _COMPARED:
            row.append(describe_time(methods[name], ".1f"))
            row.append(f"{speed_up(methods, name, BASELINE):.1f}×")
        rows.append([*row, f"{methods[_WARM]['num_iterations']:.1f}"])
    head = ["D", "batch", f"{LABELS[BASELINE]} (ms)"]
    for name in _COMPARED:
        head += [f"{LABELS[name]} (ms)", "speed-up"]
    return format_table((*head, "iterations, warm"), rows)


def main(config: Config) -> dict[str, Any]:
    """Measures, prints and writes the results."""
    config = ready(config)
    cells = for_all_sizes(config, measure_cell)
    return conclude("long_horizon", config, "float32", table, cells=cells)


if __name__ == "__main__":
    run(main, Config)
