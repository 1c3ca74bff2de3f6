"""One training experiment from its settings to its results.

Trains the same model with several solvers, resumes after an interruption, draws and
writes what was measured, and prints it.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import optax
from jaxtyping import PyTree

from experiments.common.errors import ExperimentError
from experiments.common.plotting import plot_training
from experiments.common.results import Metric, collect_results, comparison_table
from experiments.common.run_folder import RunFolder, Start
from experiments.common.solvers import SOLVERS, SolverName
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


def check_settings(config: TrainingConfig, smallest: dict[str, int]) -> None:
    """Raises an error that names the first setting that makes no sense.

    Args:
        config: the settings; those of `TrainingConfig` are checked in any case.
        smallest: the least values of further settings by name.
    """
    check_numbers(config, {"num_steps": 1} | smallest, ("rtol", "atol"))
    check_choice("solver", config.solver)


def check_numbers(
    config: BaseConfig, smallest: dict[str, int], positive: Sequence[str] = ()
) -> None:
    """Raises an error that names the first number that makes no sense.

    Args:
        config: the settings; those of `BaseConfig` are checked in any case.
        smallest: the least values of further settings by name.
        positive: further settings that have to be positive and finite.
    """
    counts = dict.fromkeys(("steps", "batch_size", "evaluations"), 1)
    for name, bound in (counts | {"seed": 0} | smallest).items():
        if getattr(config, name) < bound:
            msg = f"{_flag(name)} is {getattr(config, name)}. Choose at least {bound}."
            raise ExperimentError(msg)
    for name in ("learning_rate", *positive):
        if not 0 < getattr(config, name) < math.inf:
            value = getattr(config, name)
            msg = f"{_flag(name)} is {value}. Choose a positive number."
            raise ExperimentError(msg)


def check_choice(name: str, chosen: Sequence[str]) -> None:
    """Raises an error if nothing is chosen, or something twice."""
    if not chosen or len(set(chosen)) < len(chosen):
        msg = f"{_flag(name)} needs at least one {name}, and none of them twice."
        raise ExperimentError(msg)


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


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
