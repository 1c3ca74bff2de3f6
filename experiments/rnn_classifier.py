"""A recurrent network that classifies long sequences, trained with and without DEER.

python -m experiments.rnn_classifier --dataset worms --length 1000

Figure 4 of Lim et al., arXiv:2309.12252. Layers of gated recurrent units, each with a
layer norm before and a residual connection around it, then the mean over time and a
linear read-out. All methods train the same initial weights on the same batches; they
differ in how the states of a layer are found, which changes nothing but the time.
"""

import dataclasses
import functools as ft
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from experiments.common.command_line import run
from experiments.common.datasets import Dataset
from experiments.common.errors import check_choice, check_least
from experiments.common.experiment import BaseConfig, Experiment, carry_out
from experiments.common.measurement import ready
from experiments.common.recurrent import Inputs, make_layer, run_cell
from experiments.common.results import Metric, describe_timing, format_table
from experiments.common.sequences import SequenceName, load
from experiments.common.solvers import (
    LABELS,
    RECURRENT,
    RECURRENT_BASELINE,
    RecurrentName,
)
from experiments.common.training import LossFn, Run, TrainState, init_state

Batch = tuple[Float[Array, "batch time feature"], Int[Array, " batch"]]

METRIC = Metric(
    "accuracy", "test accuracy", axis="test accuracy (fraction)", spec=".1%"
)
LOSS = Metric("test_loss", "test loss", axis="test loss (nats)", spec=".3f")
# Dataset evaluated at once, and those of which the iterations are counted.
_AT_ONCE, _COUNTED = 64, 4


@dataclasses.dataclass(frozen=True)
class Config(BaseConfig):
    """Trains a recurrent classifier with several methods and compares them.

    Attributes:
        dataset: What to classify: digits need no network, and neither do worms, which
            are generated. EigenWorms and MNIST are downloaded.
        length: How many steps of the sequences to keep, evenly spaced; all if omitted.
            Worms have 17984, of which two cores take minutes for a few training steps.
        method: One or more methods, each of which trains a model of its own.
        learning_rate: Initial learning rate of Adam, decayed to zero along a cosine.
        hidden_size: Units of each layer.
        num_layers: Number of them.
        out: Folder for checkpoint, results and plot.
    """

    dataset: SequenceName = "digits"
    length: int | None = None
    method: tuple[RecurrentName, ...] = RECURRENT
    steps: int = 3000
    batch_size: int = 32
    learning_rate: float = 2e-2
    evaluations: int = 10
    hidden_size: int = 8
    num_layers: int = 3
    out: Path = Path("runs/rnn_classifier")

    def reduced(self) -> Self:
        """The same experiment, small enough to take seconds."""
        short = dataclasses.replace(self, length=min(self.length or 16, 16))
        return short.shrunk(batch_size=8, hidden_size=2, num_layers=1)

    def check(self) -> None:
        """Raises an error that names the first setting that makes no sense."""
        super().check()
        check_least(self, hidden_size=1, num_layers=1)
        check_choice(self, "method")


class RNNClassifier(eqx.Module):
    """Linear encoder, recurrent layers, mean over time, linear read-out."""

    encoder: eqx.nn.Linear
    norms: list[eqx.nn.LayerNorm]
    cells: list[eqx.nn.GRUCell]
    readout: eqx.nn.Linear

    def __init__(
        self, num_features: int, num_classes: int, config: Config, key: PRNGKeyArray
    ):
        encoder_key, readout_key, *keys = jr.split(key, 2 + config.num_layers)
        size, dtype = config.hidden_size, jnp.float32
        self.encoder = eqx.nn.Linear(num_features, size, dtype=dtype, key=encoder_key)
        self.norms = [eqx.nn.LayerNorm(size, dtype=dtype) for _ in keys]
        self.cells = [eqx.nn.GRUCell(size, size, dtype=dtype, key=key) for key in keys]
        self.readout = eqx.nn.Linear(size, num_classes, dtype=dtype, key=readout_key)

    def __call__(self, xs: Inputs, method: RecurrentName) -> Float[Array, " class"]:
        """Classifies a sequence."""
        hs = jax.vmap(self.encoder)(xs)
        for norm, cell in zip(self.norms, self.cells, strict=True):
            hs += make_layer(method, cell)(jax.vmap(norm)(hs))
        return self.readout(jnp.mean(hs, axis=0))

    def count_iterations(
        self, xs: Inputs, method: RecurrentName
    ) -> Int[Array, ""] | None:
        """The Newton iterations of the layer that takes most of them."""
        hs = jax.vmap(self.encoder)(xs)
        counts = []
        for norm, cell in zip(self.norms, self.cells, strict=True):
            states, count = run_cell(method, cell, jax.vmap(norm)(hs))
            counts.append(count)
            hs += states
        return None if None in counts else ft.reduce(jnp.maximum, counts)


def make_loss(method: RecurrentName) -> LossFn:
    """The mean cross-entropy of a batch."""

    def loss(
        model: RNNClassifier, memory: None, batch: Batch, key: PRNGKeyArray
    ) -> tuple[Float[Array, ""], None]:
        del key
        xs, labels = batch
        logits = jax.vmap(lambda x: model(x, method))(xs)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), memory

    return loss


def make_evaluate(
    method: RecurrentName, xs: np.ndarray, labels: np.ndarray
) -> Callable[[TrainState], dict[str, float | None]]:
    """Accuracy and loss on the test sequences, and Newton iterations of a few."""

    def measure_one(
        model: RNNClassifier, x: Inputs, label: Array
    ) -> tuple[Array, Array]:
        logits = model(x, method)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, label)
        return jnp.argmax(logits) == label, loss

    @eqx.filter_jit
    def measure(model: RNNClassifier, xs: Array, labels: Array):
        one = lambda example: measure_one(model, *example)
        values = jax.lax.map(one, (xs, labels), batch_size=_AT_ONCE)
        count = lambda x: model.count_iterations(x, method)
        return jax.tree.map(jnp.mean, (*values, jax.vmap(count)(xs[:_COUNTED])))

    examples = jax.device_put((xs, labels))

    def evaluate(state: TrainState) -> dict[str, float | None]:
        accuracy, loss, iterations = measure(state.model, *examples)
        return {
            "accuracy": float(accuracy),
            "test_loss": float(loss),
            "num_iterations": None if iterations is None else float(iterations),
        }

    return evaluate


def load_data(config: Config) -> Dataset:
    """Loads the data, with few test sequences for a smoke test."""
    data = load(config.dataset, config.data_dir)
    if config.length is not None:
        data = data.thinned(config.length)
    config.check_batch_size(len(data.train_xs), data.name)
    return data.with_tests(16) if config.smoke else data


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Adam with a decaying learning rate, on gradients that are not too long."""
    return optax.chain(optax.clip_by_global_norm(1.0), config.adam())


def make_runs(config: Config, data: Dataset) -> dict[str, Run]:
    """One run a method, all from the same weights."""
    model_key, train_key = jr.split(jr.key(config.seed))
    num_features = data.train_xs.shape[-1]
    model = RNNClassifier(num_features, data.num_classes, config, model_key)
    state = init_state(model, make_optimizer(config), train_key)
    return {
        name: Run(
            loss_fn=make_loss(name),
            evaluate=make_evaluate(name, data.test_xs, data.test_labels),
            state=state,
        )
        for name in config.method
    }


def table(results: dict[str, Any], metrics: Sequence[Metric] = (METRIC, LOSS)) -> str:
    """One line for each method, in Markdown."""
    baseline = results["solvers"].get(RECURRENT_BASELINE)
    rows = []
    for name, method in results["solvers"].items():
        final, timing = method["final"], method["timing"]
        row = [LABELS[name], *(each.format(final[each.name]) for each in metrics)]
        row += describe_timing(timing)
        iterations, median = final["num_iterations"], "step_seconds_median"
        row.append("-" if iterations is None else f"{iterations:.0f}")
        ratio = baseline["timing"][median] / timing[median] if baseline else None
        row.append("-" if ratio is None else f"{ratio:.2f}×")
        rows.append(row)
    columns = ("compile (s)", "step (ms) [quartiles]", "total (s)")
    header = ("method", *(each.column for each in metrics), *columns)
    return format_table((*header, "Newton iterations", "speed-up"), rows)


def main(config: Config) -> dict[str, Any]:
    """Runs the experiment; returns the content of `results.json`."""
    config = ready(config)
    data = load_data(config)
    experiment = Experiment(
        name="rnn_classifier",
        make_runs=lambda: make_runs(config, data),
        optimizer=make_optimizer(config),
        batches_from=ft.partial(data.batches_from, config.batch_size, config.seed),
        metrics=(METRIC, LOSS),
        loss_label="training loss (nats)",
        table=table,
    )
    return carry_out(experiment, config)


if __name__ == "__main__":
    run(main, Config)
