"""The settings of the benchmark."""

import dataclasses
from pathlib import Path
from typing import Literal, Self, get_args

from experiments.common.command_line import by_platform
from experiments.common.errors import ExperimentError, check_choice, check_lists
from experiments.common.measurement import CellsConfig
from experiments.common.solvers import BASELINE, BENCHMARKED, MethodName

GroupName = Literal["mlp", "fits", "hnn", "cnf", "gru", "matched"]
GROUPS: tuple[GroupName, ...] = get_args(GroupName)
ModeName = Literal["forward", "gradient"]


@dataclasses.dataclass(frozen=True)
class Config(CellsConfig):
    """Measures how fast everything is, against diffrax and against what is written by
    hand.

    Attributes:
        groups: What to measure. Groups may be measured one by one, each with its own
            --out, and reported on together.
        methods: What to compare; recurrent networks have their own.
        modes: The forward pass alone, or value and gradient of the loss.
        sizes: Dimension of the state and width of the network, in pairs.
        batch_sizes: Numbers of initial values; several are solved under `jax.vmap`.
        steps: Numbers of steps of the multilayer perceptron.
        fit_steps: Numbers of steps of the fits to 100 observations.
    """

    groups: tuple[GroupName, ...] = GROUPS
    methods: tuple[MethodName, ...] = BENCHMARKED
    modes: tuple[ModeName, ...] = ("forward", "gradient")
    sizes: tuple[tuple[int, int], ...] = ((2, 32), (2, 64), (8, 64), (16, 128))
    batch_sizes: tuple[int, ...] = by_platform((1, 16, 128), (1, 16, 128, 1024))
    steps: tuple[int, ...] = (32, 128, 512, 2048)
    fit_steps: tuple[int, ...] = (400, 1000, 2000)
    repeats: int = 20
    out: Path = Path("runs/benchmark/results.json")

    def reduced(self) -> Self:
        """The same measurement, small enough to take a minute."""
        return dataclasses.replace(
            self,
            modes=self.modes[-1:],
            sizes=((2, 32),),
            batch_sizes=(1,),
            steps=(128,),
            fit_steps=(400,),
            repeats=2,
        )

    def check(self) -> None:
        """Raises an error that names the first setting that makes no sense."""
        super().check()
        check_choice(self, "groups", "methods", "modes", "sizes")
        if BASELINE not in self.methods:
            msg = f"--methods needs {BASELINE}, with which all others are compared."
            raise ExperimentError(msg)
        for dim, width in self.sizes:
            if min(dim, width) < 1:
                msg = f"--sizes has {dim} {width}. Choose numbers from 1 on."
                raise ExperimentError(msg)
        check_lists(self, "batch_sizes", "steps", "fit_steps")
        for count in self.fit_steps:
            if count % 100:
                msg = f"--fit-steps has {count}. Choose multiples of 100 observations."
                raise ExperimentError(msg)
