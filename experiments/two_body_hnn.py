"""A Hamiltonian neural network learns the motion of two bodies, as in DEER's paper.

A network H(q, p) stands in for the energy, and the bodies move by Hamilton's equations,

    dq/dt = dH/dp,    dp/dt = -dH/dq,    0 <= t <= 10.

The loss is the mean squared distance from the true trajectories at many times. Training
goes over a horizon that grows in a few stages, with steps of the same length, so that
the grid of one stage begins with that of the stage before it. DEER begins every solve
with the trajectory that the sample had when it was last seen.

Every solver trains the same initial weights on the same batches. The tolerances and the
number of steps are such that all are about equally far from the exact solution.

    python -m experiments.two_body_hnn

Wherever there is a GPU the size is the paper's, but for fewer training steps and stages
and a learning rate that decays. On a CPU there are fewer trajectories, times and steps,
smaller batches, and float32: the orbits are learned roughly, equally with all solvers.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, Self

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array

from experiments.common import datasets, two_body, warm_start
from experiments.common.command_line import by_platform, run
from experiments.common.errors import ExperimentError, check_least
from experiments.common.experiment import Experiment, TrainingConfig, carry_out
from experiments.common.hamiltonian import HamiltonianNetwork, make_loss, solve
from experiments.common.measurement import ready
from experiments.common.orbits import draw_orbits
from experiments.common.results import Metric, format_table
from experiments.common.solvers import METHODS, SolverName, solve_options
from experiments.common.training import Run, TrainState, init_state
from experiments.common.work import count_work

METRICS = (
    Metric(
        "trajectory_error",
        "trajectory error",
        axis="test error of positions (length)",
        spec=".3f",
        scale="log",
    ),
    Metric("energy_drift", "energy drift", axis="energy drift (relative)", spec=".1%"),
    Metric("num_iterations_warm", "iterations, warm", axis="iterations", spec=".1f"),
)
# At equal tolerances Dopri5 is several times less accurate than Tsit5.
_TOLERANCE_FACTORS = {"dopri5": 0.4}


@dataclasses.dataclass(frozen=True)
class Config(TrainingConfig):
    """Trains a Hamiltonian neural network with several solvers and compares them.

    Defaults depend on whether there is anything but a CPU.

    Attributes:
        learning_rate: Initial learning rate of Adam, decayed to zero along a cosine.
        rtol: Relative tolerance of Tsit5; Dopri5 gets 0.4 of it.
        atol: Absolute tolerance of Tsit5; Dopri5 gets 0.4 of it.
        num_steps: Number of steps of DEER over the longest horizon.
        num_times: Number of times at which trajectories are compared.
        num_train: Number of trajectories for training.
        num_validation: Number of trajectories for validation.
        num_test: Number of trajectories for the test.
        stages: Number of horizons, the longest included; a step is compiled for each.
        warm_start: Whether Newton's method begins with the trajectory that the sample
            had when it was last seen, or with a prediction; equidistributed steps with
            its grid, or with a search.
        width: Width of the hidden layers of the energy.
        depth: Number of them.
        dtype: Precision of everything but the data, which is exact in float64.
        out: Folder for checkpoint, results and plots.
    """

    steps: int = by_platform(500, 20_000)
    batch_size: int = by_platform(8, 16)
    learning_rate: float = by_platform(3e-3, 1e-3)
    rtol: float = 5e-6
    atol: float = 5e-6
    num_steps: int = by_platform(24, 32)
    evaluations: int = by_platform(6, 40)
    num_times: int = by_platform(1000, 10_000)
    num_train: int = by_platform(128, 800)
    num_validation: int = by_platform(16, 100)
    num_test: int = by_platform(16, 100)
    stages: int = by_platform(2, 4)
    warm_start: bool = True
    width: int = 64
    depth: int = 6
    dtype: Literal["float32", "float64"] = by_platform("float32", "float64")
    out: Path = Path("runs/two_body_hnn")

    def reduced(self) -> Self:
        """The same experiment, small enough to take seconds."""
        short = dataclasses.replace(self, num_steps=8, num_times=10)
        nums = {"num_train": 4, "num_validation": 2, "num_test": 2}
        return short.shrunk(batch_size=2, width=4, depth=1, stages=2, **nums)

    def check(self) -> None:
        """Raises an error that names the first setting that makes no sense."""
        super().check()
        sizes = ("num_times", "num_train", "num_validation", "num_test")
        check_least(self, **dict.fromkeys((*sizes, "stages", "width", "depth"), 1))
        self.check_batch_size(self.num_train, "--num-train")
        for name in ("num_times", "num_steps"):
            if getattr(self, name) % self.stages != 0:
                msg = (
                    f"--{name.replace('_', '-')} is {getattr(self, name)}, which "
                    f"--stages {self.stages} does not divide. Choose a multiple."
                )
                raise ExperimentError(msg)

    def num_times_at(self, step: int) -> int:
        """How many times the training step after `step` others goes over."""
        stage = 1 + step * self.stages // self.steps
        return self.num_times // self.stages * stage

    def options_for(self, name: SolverName, num_times: int) -> dict[str, Any]:
        """The arguments of `diffrax.diffeqsolve` for the first `num_times` times."""
        factor = _TOLERANCE_FACTORS.get(name, 1.0)
        num_steps = self.num_steps * num_times // self.num_times
        return solve_options(factor * self.rtol, factor * self.atol, num_steps)[name]

    @property
    def reference(self) -> dict[str, Any]:
        """The arguments for a solution to compare with: of order eight."""
        return {
            "solver": diffrax.Dopri8(),
            "stepsize_controller": diffrax.ConstantStepSize(),
            "dt0": two_body.HORIZON / (2 * self.num_steps),
        }


def make_evaluate(
    config: Config, name: SolverName, data: two_body.TwoBodyData
) -> Callable[[TrainState], dict[str, float | None]]:
    """How far predicted trajectories are from true ones, and what a solve costs.

    All are means over the test, over the longest horizon and from a cold start:

    - `trajectory_error`: root mean square of the distance of a body from where it is;
    - `energy_drift`: mean change of the true energy along the prediction, relative;
    - `solve_error`: largest error of a component, against a method of higher order;
    - `nfe`, `num_iterations`: see `count_work`.

    `validation_loss` is that of other trajectories, and `num_iterations_warm` the mean
    of what the samples took when they were last trained with.
    """
    options = config.options_for(name, config.num_times)

    def measure_one(
        model: HamiltonianNetwork, y0: Array, truth: Array, ts: Array
    ) -> dict[str, Array | None]:
        solution = solve(model, y0, ts, **options)
        exact = solve(model, y0, ts, **config.reference).ys
        nfe, iterations = count_work(options["solver"], solution, y0.size)
        offsets = (solution.ys - truth)[:, :4]  # of two bodies, in two directions
        energy, at_first = two_body.energy(solution.ys), two_body.energy(y0)
        return {
            "trajectory_error": jnp.sqrt(2 * jnp.mean(offsets**2)),
            "energy_drift": jnp.mean(jnp.abs(energy / at_first - 1)),
            "solve_error": jnp.max(jnp.abs(solution.ys - exact)),
            "nfe": nfe,
            "num_iterations": iterations,
        }

    @eqx.filter_jit
    def measure(model, test, validation, ts):
        values = jax.vmap(lambda y0, ys: measure_one(model, y0, ys, ts))(*test)
        y0s, truth = validation
        ys = jax.vmap(lambda y0: solve(model, y0, ts, **options).ys)(y0s)
        losses = {"validation_loss": jnp.mean((ys - truth) ** 2)}
        return jax.tree.map(jnp.mean, values | losses)

    test = data.test_y0, data.test_ys
    arrays = jax.device_put((test, (data.validation_y0, data.validation_ys), data.ts))

    def evaluate(state: TrainState) -> dict[str, float | None]:
        values = measure(state.model, *arrays)
        values |= {"num_iterations_warm": warm_start.mean_iterations(state.memory)}
        return {name: None if v is None else float(v) for name, v in values.items()}

    return evaluate


def load_data(config: Config) -> two_body.TwoBodyData:
    """Loads the trajectories in the precision of the model."""
    nums = config.num_train, config.num_validation, config.num_test
    data = two_body.load(config.data_dir, config.num_times, *nums)
    arrays = {name: x.astype(config.dtype) for name, x in vars(data).items()}
    return two_body.TwoBodyData(**arrays)


def make_runs(config: Config, data: two_body.TwoBodyData) -> dict[str, Run]:
    """One run a solver, all from the same weights and random key."""
    model_key, train_key = jr.split(jr.key(config.seed))
    size = two_body.STATE_DIM, config.width, config.depth
    model = HamiltonianNetwork(*size, jnp.dtype(config.dtype), model_key)

    def make_run(name: SolverName) -> Run:
        options_for = functools.partial(config.options_for, name)
        # Only Newton's method has a use for a guess, and steps that move for a grid.
        memory = None
        is_warm = name == "deer_newton" or METHODS[name].warm
        if is_warm and config.warm_start:
            solver = options_for(config.num_times)["solver"]
            term, y0s = diffrax.ODETerm(model), jnp.asarray(data.train_y0)
            memory = warm_start.cold(solver, term, two_body.HORIZON, y0s)
        return Run(
            loss_fn=make_loss(options_for, jnp.asarray(data.ts)),
            evaluate=make_evaluate(config, name, data),
            state=init_state(model, config.adam(), train_key, memory),
        )

    return {name: make_run(name) for name in config.solver}


def table_of_losses(results: dict[str, dict[str, Any]]) -> str:
    """The training loss at the end, by solver and run, as a Markdown table."""
    names = sorted(results)
    solvers = list(results[names[0]]["solvers"])
    rows = []
    for solver in solvers:
        runs = [results[name]["solvers"].get(solver) for name in names]
        rows.append(
            [
                solver,
                *(f"{np.mean(r['losses'][-20:]):.4f}" if r else "-" for r in runs),
            ]
        )
    head = ("loss, mean of the last 20 steps", *(n.replace("_", " ") for n in names))
    return format_table(head, rows)


def main(config: Config) -> dict[str, Any]:
    """Runs the experiment; returns the content of `results.json`."""
    config = ready(config)
    # Float32 means float32, and not what a GPU makes of it for speed.
    with (
        jax.enable_x64(config.dtype == "float64"),
        jax.default_matmul_precision("highest"),
    ):
        data = load_data(config)

        def batches_from(step: int) -> Iterator[tuple[np.ndarray, ...]]:
            draws = datasets.batches(
                config.num_train, config.batch_size, config.seed, start_step=step
            )
            for number, indices in enumerate(draws, start=step):
                ys = data.train_ys[indices, : config.num_times_at(number)]
                yield indices, data.train_y0[indices], ys

        experiment = Experiment(
            name="two_body_hnn",
            make_runs=lambda: make_runs(config, data),
            optimizer=config.adam(),
            batches_from=batches_from,
            metrics=METRICS,
            loss_label="training loss",
            draw=functools.partial(draw_orbits, data, config.reference),
        )
        return carry_out(experiment, config)


if __name__ == "__main__":
    run(main, Config)
