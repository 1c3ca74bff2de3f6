"""Continuous normalizing flows, trained with DEER and with sequential solvers.

A flow maximizes the likelihood of samples: of toys in the plane, drawn anew for every
training step, or of measurements with ten features.

Every solver trains the same initial weights on the same batches. They differ in the
arguments of `diffrax.diffeqsolve` that `common.solvers` lists, and in nothing else.

    python -m experiments.cnf --dataset two_moons breast_cancer
"""

import dataclasses
import functools as ft
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Self

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from diffrax_deer import WindowState
from experiments.common.command_line import run
from experiments.common.densities import DataName, Samples, load
from experiments.common.errors import ExperimentError, check_choice, check_least
from experiments.common.experiment import (
    Experiment,
    TrainingConfig,
    carry_out,
    run_folder,
)
from experiments.common.flow import DURATION, FIELDS, Flow
from experiments.common.flow_evaluation import make_evaluate, sample, solve_all
from experiments.common.flow_pictures import draw_pairs, draw_plane, grid
from experiments.common.measurement import ready
from experiments.common.results import Metric, comparison, format_table
from experiments.common.training import LossFn, Run, init_state

METRIC = Metric(
    "nll", "test NLL", axis="test negative log-likelihood (nats)", spec=".3f"
)
ROUND_TRIP = Metric(
    "round_trip_error", "round trip error", axis="round trip error", spec=".0e"
)
PICTURE = "flows.png"


@dataclasses.dataclass(frozen=True)
class Config(TrainingConfig):
    """Trains a continuous normalizing flow with several solvers and compares them.

    Attributes:
        dataset: One or more data sets, each of which is a run of its own.
        learning_rate: Initial learning rate of AdamW, decayed to zero along a cosine.
        weight_decay: Weight decay of AdamW.
        field: Vector field: layers that the time scales and shifts, or a perceptron
            with the time as one more input.
        width: Width of its hidden layers.
        depth: Number of them.
        trace: How the trace of the Jacobian is found in training; tests compute it.
        out: Folder with a folder for every data set: checkpoint, results, pictures.
    """

    dataset: tuple[DataName, ...] = ("two_moons",)
    steps: int = 500
    batch_size: int = 64
    learning_rate: float = 1e-2
    weight_decay: float = 1e-5
    num_steps: int = 6
    evaluations: int = 5
    field: Literal["concatsquash", "mlp"] = "concatsquash"
    width: int = 64
    depth: int = 3
    trace: Literal["exact", "hutchinson"] = "exact"
    out: Path = Path("runs/cnf")

    def reduced(self) -> Self:
        """The same experiment, small enough to take seconds."""
        return self.shrunk(batch_size=8, width=4, depth=1, num_steps=4)

    def check(self) -> None:
        """Raises an error that names the first setting that makes no sense."""
        super().check()
        check_least(self, width=1, depth=0)
        check_choice(self, "dataset")
        if not 0 <= self.weight_decay < np.inf:
            msg = f"--weight-decay is {self.weight_decay}. Choose at least 0."
            raise ExperimentError(msg)

    def of(self, name: DataName) -> "Config":
        """The settings of the run with one of the data sets."""
        return dataclasses.replace(self, dataset=(name,), out=self.out / name)


def make_loss(options: dict[str, Any], trace: str) -> LossFn:
    """The mean negative log-density of a batch, in nats.

    The memory, if there is one, holds the grids of the batch before: not of the same
    points, but of the same vector field.
    """

    def loss(
        model: Flow,
        memory: WindowState | None,
        batch: Float[Array, "batch dim"],
        key: PRNGKeyArray,
    ) -> tuple[Float[Array, ""], WindowState | None]:
        # A probe is drawn once a solve: with another one at every evaluation, the
        # solver would see noise in place of a smooth vector field.
        is_exact = trace == "exact"
        probes = None if is_exact else jr.rademacher(key, batch.shape, batch.dtype)
        saveat = diffrax.SaveAt(t1=True, solver_state=memory is not None)
        solve = lambda x, probe, state: model.solve(
            x, probe, solver_state=state, saveat=saveat, **options
        )
        solution = jax.vmap(solve)(batch, probes, memory)
        values = jax.vmap(model.read_out)(solution.ys)
        return -jnp.mean(values), solution.solver_state

    return loss


def make_draw(config: Config, data: Samples) -> Callable[[dict[str, Run], Path], None]:
    """Draws samples of the trained flows and, in the plane, their densities."""
    options = config.solve_options()
    key = jr.key(config.seed)

    def draw(runs: dict[str, Run], folder: Path) -> None:
        models = {name: runs[name].state.model for name in config.solver}
        samples = {
            name: np.asarray(sample(models[name], key, len(data.test), options[name]))
            for name in config.solver
        }
        if len(data.features) > 2:
            draw_pairs(folder / PICTURE, data, samples)
            return
        densities = {
            name: np.exp(-solve_all(models[name], grid(), options[name])[1]["nll"])
            for name in config.solver
        }
        draw_plane(folder / PICTURE, data, samples, densities)

    return draw


def load_data(config: Config, name: DataName) -> Samples:
    """Loads a data set, with few test samples for a smoke test."""
    data = load(name)
    if data.num_train is not None:
        config.check_batch_size(data.num_train, name)
    return dataclasses.replace(data, test=data.test[:200]) if config.smoke else data


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """AdamW with a decaying learning rate."""
    return optax.adamw(config.schedule(), weight_decay=config.weight_decay)


def make_runs(config: Config, data: Samples) -> dict[str, Run]:
    """One run a solver, all from the same weights and random key."""
    model_key, train_key = jr.split(jr.key(config.seed))
    dim = len(data.features)
    field = FIELDS[config.field](dim, config.width, config.depth, model_key)
    model, optimizer = Flow(field, dim), make_optimizer(config)
    options = config.solve_options()
    zeros = lambda *shape: jnp.zeros((config.batch_size, *shape), jnp.float32)
    y0s = zeros(dim), zeros()
    memory = lambda name: config.cold_memory(
        name, diffrax.ODETerm(model.field_and_trace), DURATION, y0s
    )
    return {
        name: Run(
            loss_fn=make_loss(options[name], config.trace),
            evaluate=make_evaluate(options[name], data.test),
            state=init_state(model, optimizer, train_key, memory(name)),
        )
        for name in config.solver
    }


def make_experiment(config: Config, data: Samples) -> Experiment:
    """The experiment with one data set."""
    return Experiment(
        name="cnf",
        make_runs=lambda: make_runs(config, data),
        optimizer=make_optimizer(config),
        batches_from=ft.partial(data.batches_from, config.batch_size, config.seed),
        metrics=(METRIC, ROUND_TRIP),
        loss_label="training loss (nats)",
        draw=make_draw(config, data),
    )


def table(results_by_dataset: dict[str, dict[str, Any]]) -> str:
    """Lays out one line for every data set and solver, as a Markdown table."""
    head: tuple[str, ...] = ()
    rows = []
    for name, results in results_by_dataset.items():
        head, lines = comparison(results, [METRIC])
        rows += [(name, *line) for line in lines]
    return format_table(("data set", *head), rows)


def main(config: Config) -> dict[str, dict[str, Any]]:
    """Runs the experiment with every data set, one after another.

    Returns the content of `results.json` for every data set.
    """
    config = ready(config)
    data = {name: load_data(config, name) for name in config.dataset}
    # Before the first one has been trained for nothing.
    for name in config.dataset:
        run_folder(config.of(name)).check(config.resume)
    results = {}
    for name in config.dataset:
        print(f"{name}:")
        part = config.of(name)
        results[name] = carry_out(make_experiment(part, data[name]), part)
    return results


if __name__ == "__main__":
    run(main, Config)
