"""One training experiment from its settings to its results.

Trains the same model with several solvers, resumes after an interruption, draws and
writes what was measured, and prints it.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import optax
from jaxtyping import PyTree

from diffrax_deer import WindowState
from experiments.common import warm_start
from experiments.common.errors import (
    ExperimentError,
    check_choice,
    check_least,
    check_positive,
)
from experiments.common.plotting import plot_training
from experiments.common.results import Metric, collect_results, comparison_table
from experiments.common.run_folder import RunFolder, Start
from experiments.common.solvers import METHODS, SOLVERS, SolverName, solve_options
from experiments.common.training import Run, train

# They do not change the outcome, so that a run may be resumed with others.
_NOT_SETTINGS = ("resume", "out", "data_dir")


@dataclasses.dataclass(frozen=True)
class BaseConfig:
    """The settings that all training experiments have, whatever they compare.

    Attributes:
        seed: Decides initial weights, order of the data and noise.
        steps: Number of training steps with each method.
        batch_size: Number of examples in a training step.
        learning_rate: Initial learning rate of Adam.
        evaluations: How often to evaluate, write a checkpoint and change the method.
        smoke: Only check that everything runs: few steps, small model, few data.
        resume: Go on with the interrupted run in the folder `out`.
        out: Folder for checkpoint, results and pictures.
        data_dir: Folder for the data sets.
    """

    seed: int = 0
    steps: int = 1000
    batch_size: int = 64
    learning_rate: float = 1e-2
    evaluations: int = 12
    smoke: bool = False
    resume: bool = False
    out: Path = Path("runs")
    data_dir: Path = Path("data")

    def settings(self) -> dict[str, Any]:
        """What decides the outcome, in a form that JSON can hold."""
        fields = dataclasses.asdict(self)
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in fields.items()
            if name not in _NOT_SETTINGS
        }

    def check(self) -> None:
        """Raises an error that names the first setting that makes no sense."""
        check_least(self, steps=1, batch_size=1, evaluations=1, seed=0)
        check_positive(self, "learning_rate")

    def shrunk(self, **largest: int) -> Self:
        """The same with these settings at most as large as said."""
        largest |= {"steps": 4, "evaluations": 2}
        small = {name: min(getattr(self, name), n) for name, n in largest.items()}
        return dataclasses.replace(self, **small)

    def check_batch_size(self, number: int, where: str) -> None:
        """Raises an error if there are fewer examples than that to train with."""
        if self.batch_size > number:
            msg = (
                f"--batch-size is {self.batch_size}, but {where} has {number} training "
                f"examples. Choose at most that many."
            )
            raise ExperimentError(msg)

    def adam(self) -> optax.GradientTransformation:
        """Adam with a learning rate that decays to zero along a cosine."""
        return optax.adam(self.schedule())

    def schedule(self) -> optax.Schedule:
        """The learning rate."""
        return optax.cosine_decay_schedule(self.learning_rate, self.steps)


@dataclasses.dataclass(frozen=True)
class TrainingConfig(BaseConfig):
    """The settings of experiments that compare solvers of differential equations.

    Attributes:
        solver: One or more solvers, each of which trains a model of its own.
        rtol: Relative tolerance of the adaptive solvers.
        atol: Absolute tolerance of the adaptive solvers.
        num_steps: Number of time steps that DEER solves for at once.
    """

    solver: tuple[SolverName, ...] = SOLVERS
    rtol: float = 1e-5
    atol: float = 1e-5
    num_steps: int = 4

    def check(self) -> None:
        """Raises an error that names the first setting that makes no sense."""
        super().check()
        check_least(self, num_steps=1)
        check_positive(self, "rtol", "atol")
        check_choice(self, "solver")

    def solve_options(self) -> dict[SolverName, dict[str, Any]]:
        """The arguments of `diffrax.diffeqsolve` in which the solvers differ."""
        return solve_options(self.rtol, self.atol, self.num_steps)

    def cold_memory(
        self, name: SolverName, term: Any, t1: float, y0s: Any
    ) -> WindowState | None:
        """What a solver starts from that goes on from its last solves, else `None`.

        Args:
            name: the solver.
            term: the vector field.
            t1: the end of the interval, which begins at zero.
            y0s: initial values, one for each solve that is to be remembered.
        """
        if not METHODS[name].warm:
            return None
        return warm_start.cold(self.solve_options()[name]["solver"], term, t1, y0s)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What is trained, and how it is shown.

    Attributes:
        name: the experiment's name.
        make_runs: makes one run for every solver, all from the same weights and key.
        optimizer: the same for all.
        batches_from: maps a number of steps to the batches that come after them.
        metrics: entries of evaluations that the table shows; the first is drawn, too.
        loss_label: name and unit of the training loss.
        draw: draws further pictures of the trained runs into a folder.
        table: lays out results and metrics as a Markdown table.
    """

    name: str
    make_runs: Callable[[], dict[str, Run]]
    optimizer: optax.GradientTransformation
    batches_from: Callable[[int], Iterator[PyTree]]
    metrics: tuple[Metric, ...]
    loss_label: str
    draw: Callable[[dict[str, Run], Path], None] | None = None
    table: Callable[[dict[str, Any], Sequence[Metric]], str] = comparison_table


def run_folder(config: BaseConfig) -> RunFolder:
    """Where a run with these settings is kept."""
    return RunFolder(config.out, config.settings())


def carry_out(experiment: Experiment, config: BaseConfig) -> dict[str, Any]:
    """Trains, or goes on training, draws, writes and prints.

    Args:
        experiment: what to train.
        config: the settings, checked and, for a smoke test, reduced.

    Returns:
        The content of `results.json`.
    """
    folder = run_folder(config)
    start = folder.begin(config.resume)
    metric = experiment.metrics[0]
    if start is Start.FINISHED:
        results = folder.read_results()
    else:
        runs = experiment.make_runs()
        if start is Start.RESUMED:
            folder.restore(runs)
        train(
            runs,
            experiment.optimizer,
            experiment.batches_from,
            num_steps=config.steps,
            block_size=math.ceil(config.steps / config.evaluations),
            metric=metric.name,
            save=lambda: folder.save(runs),
        )
        records = {name: run.record for name, run in runs.items()}
        plot_training(folder.plot, records, metric, experiment.loss_label)
        if experiment.draw is not None:
            experiment.draw(runs, folder.path)
        results = collect_results(
            experiment.name, config.settings(), runs, folder.resumed_at
        )
        folder.write_results(results)
    print(experiment.table(results, experiment.metrics))
    if results["resumed_at"]:
        steps = ", ".join(map(str, results["resumed_at"]))
        print(f"Resumed after step {steps}; all compilations are counted.")
    print(f"Results: {folder.results}, plot: {folder.plot}")
    return results
