"""A neural ODE that classifies images, trained with DEER and with sequential solvers.

The image is encoded linearly into a small state h(0), which flows along

    dh/dt = MLP(h, t),    0 <= t <= 1,

and the first few components of h(1) are read out linearly into class probabilities.
They are too few for a linear model of the digits, so that the flow has to help: with
five out of eight, training without the ODE ends near 94 % test accuracy and with it
between 95.5 and 97.5 %, and the trained weights without their ODE between 68 and 86 %.

Every solver trains the same initial weights on the same batches. They differ in the
arguments of `diffrax.diffeqsolve` that `common.solvers` lists, and in nothing else.

    python -m experiments.neural_ode_classifier
"""

import dataclasses
import functools as ft
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Self

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from diffrax_deer import WindowState
from experiments.common import datasets
from experiments.common.command_line import run
from experiments.common.errors import ExperimentError, check_least
from experiments.common.experiment import Experiment, TrainingConfig, carry_out
from experiments.common.measurement import ready
from experiments.common.results import Metric
from experiments.common.training import LossFn, Run, TrainState, init_state
from experiments.common.work import count_work

Batch = tuple[Float[Array, "batch pixel"], Int[Array, " batch"]]

METRIC = Metric(
    "accuracy", "test accuracy", axis="test accuracy (fraction)", spec=".1%"
)
# Ten steps of order eight.
_REFERENCE = {
    "solver": diffrax.Dopri8(),
    "stepsize_controller": diffrax.ConstantStepSize(),
}


@dataclasses.dataclass(frozen=True)
class Config(TrainingConfig):
    """Trains a neural ODE classifier with several solvers and compares them.

    Attributes:
        dataset: Images to classify. MNIST is downloaded, digits needs no network.
        learning_rate: Initial learning rate of Adam, decayed to zero along a cosine.
        noise: Standard deviation of the Gaussian noise added to the pixels, which are
            between 0 and 1, during training.
        state_dim: Dimension of the ODE.
        readout_dim: How many of its components are read out.
        width: Width of the hidden layers of its vector field.
        depth: Number of them.
        time_dependent: Whether the vector field is given the time.
        out: Folder for checkpoint, results and plot.
    """

    dataset: Literal["digits", "mnist"] = "digits"
    learning_rate: float = 2e-2
    noise: float = 0.15
    state_dim: int = 8
    readout_dim: int = 5
    width: int = 32
    depth: int = 2
    time_dependent: bool = True
    out: Path = Path("runs/neural_ode_classifier")

    def reduced(self) -> Self:
        """The same experiment, small enough to take seconds."""
        sizes = {"state_dim": 2, "readout_dim": 2, "width": 4, "depth": 1}
        return self.shrunk(batch_size=8, num_steps=4, **sizes)

    def check(self) -> None:
        """Raises an error that names the first setting that makes no sense."""
        super().check()
        check_least(self, state_dim=1, readout_dim=1, width=1, depth=0)
        if self.readout_dim > self.state_dim:
            msg = (
                f"--readout-dim is {self.readout_dim}, but the state has only "
                f"{self.state_dim} components. Lower it, or raise --state-dim."
            )
            raise ExperimentError(msg)


class NeuralODEClassifier(eqx.Module):
    """Linear encoder, ODE, linear read-out."""

    encoder: eqx.nn.Linear
    field: eqx.nn.MLP
    readout: eqx.nn.Linear
    time_dependent: bool = eqx.field(static=True)

    def __init__(
        self, num_pixels: int, num_classes: int, config: Config, key: PRNGKeyArray
    ):
        encoder_key, field_key, readout_key = jr.split(key, 3)
        dim, dtype = config.state_dim, jnp.float32
        self.encoder = eqx.nn.Linear(num_pixels, dim, dtype=dtype, key=encoder_key)
        self.field = eqx.nn.MLP(
            dim + config.time_dependent,
            dim,
            config.width,
            config.depth,
            activation=jnp.tanh,
            dtype=dtype,
            key=field_key,
        )
        self.readout = eqx.nn.Linear(
            config.readout_dim, num_classes, dtype=dtype, key=readout_key
        )
        self.time_dependent = config.time_dependent

    def __call__(
        self, image: Float[Array, " pixel"], **options: Any
    ) -> Float[Array, " class"]:
        """Classifies an image; `options` go to `diffrax.diffeqsolve`."""
        return self.read_out(self.solve(image, **options).ys[-1])

    def solve(self, image: Float[Array, " pixel"], **options: Any) -> Any:
        """Lets the encoded image flow."""
        h0 = self.encoder(image)
        term = diffrax.ODETerm(self.vector_field)
        options = {"dt0": 0.1} | options
        return diffrax.diffeqsolve(term, t0=0.0, t1=1.0, y0=h0, **options)

    def read_out(self, h: Float[Array, " state"]) -> Float[Array, " class"]:
        """The logits of the classes."""
        return self.readout(h[: self.readout.in_features])

    def vector_field(self, t: Any, h: Float[Array, " state"], args: None) -> Array:
        """What moves the encoded image."""
        del args
        if self.time_dependent:
            h = jnp.append(h, jnp.asarray(t, h.dtype))
        return self.field(h)


def make_loss(options: dict[str, Any], noise: float) -> LossFn:
    """The mean cross-entropy of a batch of noisy images.

    The memory, if there is one, holds the grids of the batch before: not of the same
    images, but of the same vector field.
    """

    def loss(
        model: NeuralODEClassifier,
        memory: WindowState | None,
        batch: Batch,
        key: PRNGKeyArray,
    ) -> tuple[Float[Array, ""], WindowState | None]:
        images, labels = batch
        images = images + noise * jr.normal(key, images.shape, images.dtype)
        saveat = diffrax.SaveAt(t1=True, solver_state=memory is not None)
        solve = lambda image, state: model.solve(
            image, solver_state=state, saveat=saveat, **options
        )
        solution = jax.vmap(solve)(images, memory)
        logits = jax.vmap(model.read_out)(solution.ys[:, -1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), solution.solver_state

    return loss


def make_evaluate(
    options: dict[str, Any], images: np.ndarray, labels: np.ndarray
) -> Callable[[TrainState], dict[str, float | None]]:
    """Accuracy on the test images, with and without the ODE, and what a solve costs.

    The error of a solve is the largest of any component of h(1), averaged over the
    images. It is measured against a method of higher order with small steps, and cannot
    be told from the rounding error of float32 below about 1e-6.
    """
    saveat = diffrax.SaveAt(t1=True, solver_state=True)

    def measure_one(
        model: NeuralODEClassifier, image: Array, label: Array
    ) -> dict[str, Array | None]:
        solution = model.solve(image, saveat=saveat, **options)
        h0, h1 = model.encoder(image), solution.ys[-1]
        nfe, iterations = count_work(options["solver"], solution, h0.size)
        is_right = lambda h: jnp.argmax(model.read_out(h)) == label
        return {
            "accuracy": is_right(h1),
            "accuracy_without_ode": is_right(h0),
            "solve_error": jnp.max(
                jnp.abs(model.solve(image, **_REFERENCE).ys[-1] - h1)
            ),
            "nfe": nfe,
            "num_iterations": iterations,
        }

    @eqx.filter_jit
    def measure(model: NeuralODEClassifier, images: Array, labels: Array):
        one = lambda example: measure_one(model, *example)
        values = jax.lax.map(one, (images, labels), batch_size=512)
        return jax.tree.map(jnp.mean, values)

    examples = jax.device_put((images, labels))

    def evaluate(state: TrainState) -> dict[str, float | None]:
        values = measure(state.model, *examples)
        return {name: None if v is None else float(v) for name, v in values.items()}

    return evaluate


def load_data(config: Config) -> datasets.Dataset:
    """Loads the data, with few test images for a smoke test."""
    data = datasets.load(config.dataset, config.data_dir)
    config.check_batch_size(len(data.train_xs), data.name)
    return data.with_tests(64) if config.smoke else data


def make_runs(config: Config, data: datasets.Dataset) -> dict[str, Run]:
    """One run a solver, all from the same weights and random key."""
    model_key, train_key = jr.split(jr.key(config.seed))
    num_pixels = data.train_xs.shape[1]
    model = NeuralODEClassifier(num_pixels, data.num_classes, config, model_key)
    options, test = config.solve_options(), (data.test_xs, data.test_labels)
    h0s = jnp.zeros((config.batch_size, config.state_dim), jnp.float32)
    memory = lambda name: config.cold_memory(
        name, diffrax.ODETerm(model.vector_field), 1.0, h0s
    )
    return {
        name: Run(
            loss_fn=make_loss(options[name], config.noise),
            evaluate=make_evaluate(options[name], *test),
            state=init_state(model, config.adam(), train_key, memory(name)),
        )
        for name in config.solver
    }


def main(config: Config) -> dict[str, Any]:
    """Runs the experiment; returns the content of `results.json`."""
    config = ready(config)
    data = load_data(config)
    experiment = Experiment(
        name="neural_ode_classifier",
        make_runs=lambda: make_runs(config, data),
        optimizer=config.adam(),
        batches_from=ft.partial(data.batches_from, config.batch_size, config.seed),
        metrics=(METRIC,),
        loss_label="training loss (nats)",
    )
    return carry_out(experiment, config)


if __name__ == "__main__":
    run(main, Config)
