"""A neural ODE that classifies images, trained with DEER and with sequential solvers.

The image is encoded linearly into a small state h(0), which flows along

    dh/dt = MLP(h, t),    0 <= t <= 1,

and the first few components of h(1) are read out linearly into class probabilities.
They are fewer than the classes need, so that it takes the flow to tell digits apart:
with four out of eight, training without the ODE ends near 91 %, and with it near 96 %.

Every solver trains the same initial weights on the same batches; they differ in the
arguments of `diffrax.diffeqsolve` that `solve_options` lists, and in nothing else. From
the root of the repository:

    python -m experiments.neural_ode_classifier
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import tyro
from jaxtyping import Array, Float, Int, PRNGKeyArray

from diffrax_deer import DEERSolver, WholeInterval
from experiments.common import datasets
from experiments.common.errors import ExperimentError
from experiments.common.plotting import plot_training
from experiments.common.results import environment, format_table, summarize
from experiments.common.run_folder import RunFolder, Start
from experiments.common.training import Run, init_state, train

Batch = tuple[Float[Array, "batch pixel"], Int[Array, " batch"]]
SolverName = Literal["deer", "dopri5", "tsit5"]

# They do not change the outcome, so that a run may be resumed with others.
_NOT_SETTINGS = ("resume", "out", "data_dir")
_FIXED_STEPS = diffrax.ConstantStepSize()
_SMOKE_TEST_EXAMPLES = 64


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains a neural ODE classifier with several solvers and compares them.

    Attributes:
        dataset: Images to classify. MNIST is downloaded, digits needs no network.
        solver: One or more solvers, each of which trains a model of its own.
        seed: Decides initial weights, order of the data and noise.
        steps: Number of training steps with each solver.
        batch_size: Number of images in a training step.
        learning_rate: Initial learning rate of Adam, decayed to zero along a cosine.
        noise: Standard deviation of the Gaussian noise added to the pixels, which are
            between 0 and 1, during training.
        state_dim: Dimension of the ODE.
        readout_dim: How many of its components are read out.
        width: Width of the hidden layers of its vector field.
        depth: Number of them.
        time_dependent: Whether the vector field is given the time.
        rtol: Relative tolerance of the adaptive solvers.
        atol: Absolute tolerance of the adaptive solvers.
        num_steps: Number of time steps that DEER solves for at once.
        evaluations: How often to evaluate, write a checkpoint and change the solver.
        smoke: Only check that everything runs: few steps, small model, few images.
        resume: Go on with the interrupted run in the folder `out`.
        out: Folder for checkpoint, results and plot.
        data_dir: Folder for the data sets.
    """

    dataset: Literal["digits", "mnist"] = "digits"
    solver: tuple[SolverName, ...] = ("deer", "dopri5", "tsit5")
    seed: int = 0
    steps: int = 1000
    batch_size: int = 64
    learning_rate: float = 2e-2
    noise: float = 0.2
    state_dim: int = 8
    readout_dim: int = 4
    width: int = 32
    depth: int = 1
    time_dependent: bool = True
    rtol: float = 1e-5
    atol: float = 1e-5
    num_steps: int = 16
    evaluations: int = 12
    smoke: bool = False
    resume: bool = False
    out: Path = Path("runs/neural_ode_classifier")
    data_dir: Path = Path("data")

    def reduced(self) -> "Config":
        """The same experiment, small enough to take seconds."""
        return dataclasses.replace(
            self,
            steps=min(self.steps, 4),
            batch_size=min(self.batch_size, 8),
            state_dim=min(self.state_dim, 2),
            readout_dim=min(self.readout_dim, 2),
            width=min(self.width, 4),
            depth=min(self.depth, 1),
            num_steps=min(self.num_steps, 4),
            evaluations=min(self.evaluations, 2),
        )

    def check(self) -> None:
        """Raises an error that names the first setting that makes no sense."""
        counts = ("steps", "batch_size", "evaluations", "num_steps")
        sizes = ("state_dim", "readout_dim", "width")
        smallest = dict.fromkeys((*counts, *sizes), 1) | {"depth": 0}
        for name, bound in smallest.items():
            if getattr(self, name) < bound:
                flag = f"--{name.replace('_', '-')}"
                msg = f"{flag} is {getattr(self, name)}. Choose at least {bound}."
                raise ExperimentError(msg)
        for name in ("learning_rate", "rtol", "atol"):
            if not 0 < getattr(self, name) < math.inf:
                flag = f"--{name.replace('_', '-')}"
                msg = f"{flag} is {getattr(self, name)}. Choose a positive number."
                raise ExperimentError(msg)
        if self.readout_dim > self.state_dim:
            msg = (
                f"--readout-dim is {self.readout_dim}, but the state has only "
                f"{self.state_dim} components. Lower it, or raise --state-dim."
            )
            raise ExperimentError(msg)
        if not self.solver or len(set(self.solver)) < len(self.solver):
            msg = "--solver needs at least one solver, and none of them twice."
            raise ExperimentError(msg)

    def settings(self) -> dict[str, Any]:
        """What decides the outcome, in a form that JSON can hold."""
        fields = dataclasses.asdict(self) | {"solver": list(self.solver)}
        return {name: fields[name] for name in fields if name not in _NOT_SETTINGS}


def solve_options(config: Config) -> dict[SolverName, dict[str, Any]]:
    """The arguments of `diffrax.diffeqsolve` in which the solvers differ."""
    adaptive = diffrax.PIDController(rtol=config.rtol, atol=config.atol)
    deer = DEERSolver(num_steps=config.num_steps)
    return {
        "deer": {"solver": deer, "stepsize_controller": WholeInterval()},
        "dopri5": {"solver": diffrax.Dopri5(), "stepsize_controller": adaptive},
        "tsit5": {"solver": diffrax.Tsit5(), "stepsize_controller": adaptive},
    }


def count_work(
    solver: diffrax.AbstractSolver, solution: diffrax.Solution, state_dim: int
) -> tuple[Array, Array | None]:
    """Counts what a solve has cost.

    An explicit Runge-Kutta step evaluates the vector field once a stage; if its first
    stage is the last of the step before (FSAL), that one is free from the second step
    on. Steps that were rejected count.

    A Newton iteration of DEER evaluates, on each of its time steps, all stages of its
    Runge-Kutta method, as well as the Jacobian of the vector field by forward-mode
    differentiation, of which each column counts as one evaluation.

    Args:
        solver: what the solution was computed with.
        solution: with the solver's state saved at the end.
        state_dim: dimension of the ODE.

    Returns:
        The number of evaluations of the vector field, and the number of Newton
        iterations, which is `None` for solvers that do not iterate.
    """
    if isinstance(solver, DEERSolver):
        iterations = solution.solver_state.num_iterations
        per_step = solver.solver.tableau.num_stages + state_dim
        return iterations * solver.num_steps * per_step, iterations
    tableau = solver.tableau
    num_steps = solution.stats["num_steps"]
    return num_steps * (tableau.num_stages - tableau.fsal) + tableau.fsal, None


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

    def solve(self, image: Float[Array, " pixel"], **options: Any) -> diffrax.Solution:
        """Lets the encoded image flow; `options` go to `diffrax.diffeqsolve`."""
        h0 = self.encoder(image)
        term = diffrax.ODETerm(self._vector_field)
        return diffrax.diffeqsolve(term, t0=0.0, t1=1.0, dt0=0.1, y0=h0, **options)

    def read_out(self, ys: Float[Array, "1 state"]) -> Float[Array, " class"]:
        """The logits of the classes."""
        return self.readout(ys[-1, : self.readout.in_features])

    def _vector_field(self, t: Any, h: Float[Array, " state"], args: None) -> Array:
        del args
        if self.time_dependent:
            h = jnp.append(h, jnp.asarray(t, h.dtype))
        return self.field(h)


def make_loss(
    options: dict[str, Any], noise: float
) -> Callable[[NeuralODEClassifier, Batch, PRNGKeyArray], Float[Array, ""]]:
    """The mean cross-entropy of a batch of noisy images."""

    def loss(
        model: NeuralODEClassifier, batch: Batch, key: PRNGKeyArray
    ) -> Float[Array, ""]:
        images, labels = batch
        images = images + noise * jr.normal(key, images.shape, images.dtype)
        logits = jax.vmap(lambda x: model.read_out(model.solve(x, **options).ys))(
            images
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return loss


def make_evaluate(
    options: dict[str, Any], images: np.ndarray, labels: np.ndarray
) -> Callable[[NeuralODEClassifier], dict[str, float | None]]:
    """Accuracy on the test images, and error and cost of a solve on the average.

    The error of a solve is the largest of any component of h(1). It is measured against
    a method of higher order and small steps, and ends at the rounding error of float32.
    """
    saveat = diffrax.SaveAt(t1=True, solver_state=True)
    reference = {"solver": diffrax.Dopri8(), "stepsize_controller": _FIXED_STEPS}

    def measure_one(model: NeuralODEClassifier, image: Array, label: Array):
        solution = model.solve(image, saveat=saveat, **options)
        nfe, iterations = count_work(options["solver"], solution, model.field.out_size)
        difference = solution.ys - model.solve(image, **reference).ys
        return {
            "accuracy": jnp.argmax(model.read_out(solution.ys)) == label,
            "accuracy_without_ode": jnp.argmax(
                model.read_out(model.encoder(image)[None])
            )
            == label,
            "solve_error": jnp.max(jnp.abs(difference)),
            "nfe": nfe,
            "num_iterations": iterations,
        }

    @eqx.filter_jit
    def measure(model: NeuralODEClassifier, images: Array, labels: Array):
        one = lambda example: measure_one(model, *example)
        values = jax.lax.map(one, (images, labels), batch_size=512)
        return jax.tree.map(jnp.mean, values)

    images, labels = jax.device_put((images, labels))

    def evaluate(model: NeuralODEClassifier) -> dict[str, float | None]:
        values = measure(model, images, labels)
        return {name: None if v is None else float(v) for name, v in values.items()}

    return evaluate


def train_all(config: Config, folder: RunFolder, resume: bool) -> dict[str, Run]:
    """Trains with every solver; `resume` says whether `folder` has a checkpoint."""
    data = datasets.load(config.dataset, config.data_dir)
    num_train, num_pixels = data.train_images.shape
    if config.batch_size > num_train:
        msg = (
            f"--batch-size is {config.batch_size}, but {config.dataset} has "
            f"{num_train} training images. Choose at most {num_train}."
        )
        raise ExperimentError(msg)
    num_test = _SMOKE_TEST_EXAMPLES if config.smoke else None
    test = data.test_images[:num_test], data.test_labels[:num_test]

    optimizer = optax.adam(
        optax.cosine_decay_schedule(config.learning_rate, config.steps)
    )
    model_key, train_key = jr.split(jr.key(config.seed))
    model = NeuralODEClassifier(num_pixels, data.num_classes, config, model_key)
    runs = {
        name: Run(
            loss_fn=make_loss(solve_options(config)[name], config.noise),
            evaluate=make_evaluate(solve_options(config)[name], *test),
            state=init_state(model, optimizer, train_key),
        )
        for name in config.solver
    }
    if resume:
        folder.restore(runs)

    def batches_from(step: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for indices in datasets.batches(
            num_train, config.batch_size, config.seed, start_step=step
        ):
            yield data.train_images[indices], data.train_labels[indices]

    train(
        runs,
        optimizer,
        batches_from,
        num_steps=config.steps,
        block_size=math.ceil(config.steps / config.evaluations),
        metric="accuracy",
        save=lambda: folder.save(runs),
    )
    return runs


def collect_results(
    config: Config, runs: dict[str, Run], resumed_at: list[int]
) -> dict[str, Any]:
    """All measurements, in a form that JSON can hold."""
    return {
        "experiment": "neural_ode_classifier",
        "config": config.settings(),
        "environment": environment(),
        "dtype": "float32",
        "resumed_at": resumed_at,
        "solvers": {
            name: {
                "final": run.record.evaluations[-1],
                "timing": summarize(run.record),
                **dataclasses.asdict(run.record),
            }
            for name, run in runs.items()
        },
    }


def results_table(results: dict[str, Any]) -> str:
    """One line for every solver."""
    header = (
        "solver",
        "test accuracy (%)",
        "compile (s)",
        "step (ms), median [quartiles]",
        "total (s)",
        "NFE per solve",
        "solve error",
        "Newton iterations",
        "step time / Dopri5",
    )
    solvers = results["solvers"]
    medians = {
        name: solver["timing"]["step_seconds_median"]
        for name, solver in solvers.items()
    }
    rows = []
    for name, solver in solvers.items():
        timing, final = solver["timing"], solver["final"]
        first, median, third = (
            1000 * timing[f"step_seconds_{part}"]
            for part in ("quartile_1", "median", "quartile_3")
        )
        iterations = final["num_iterations"]
        relative = medians[name] / medians["dopri5"] if "dopri5" in medians else None
        rows.append(
            (
                name,
                f"{100 * final['accuracy']:.1f}",
                f"{timing['compile_seconds']:.1f}",
                f"{median:.2f} [{first:.2f}, {third:.2f}]",
                f"{timing['total_seconds']:.1f}",
                f"{final['nfe']:.0f}",
                f"{final['solve_error']:.0e}",
                "-" if iterations is None else f"{iterations:.1f}",
                "-" if relative is None else f"{relative:.2f}",
            )
        )
    return format_table(header, rows)


def main(config: Config) -> dict[str, Any]:
    """Runs the experiment.

    Args:
        config: the settings.

    Returns:
        The content of `results.json`.
    """
    config.check()
    config = config.reduced() if config.smoke else config
    folder = RunFolder(config.out, config.settings())
    start = folder.begin(config.resume)
    if start is Start.FINISHED:
        print(f"The run in {config.out} is finished.")
        results = folder.read_results()
    else:
        runs = train_all(config, folder, resume=start is Start.RESUMED)
        records = {name: run.record for name, run in runs.items()}
        plot_training(
            folder.plot,
            records,
            metric="accuracy",
            metric_label="test accuracy",
            loss_label="training loss (nats)",
        )
        results = collect_results(config, runs, folder.resumed_at)
        folder.write_results(results)
    print(results_table(results))
    if results["resumed_at"]:
        steps = ", ".join(map(str, results["resumed_at"]))
        print(f"Resumed after step {steps}: every compilation counts.")
    print(f"Results: {folder.results}, plot: {folder.plot}")
    return results


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except ExperimentError as error:
        sys.exit(f"Error: {error}")
