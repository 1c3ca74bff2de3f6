"""Where an experiment leaves its checkpoint and results, and finds them again."""

import dataclasses
import enum
import json
from pathlib import Path
from typing import Any

from experiments.common.checkpoint import (
    check_same_config,
    load_checkpoint,
    save_checkpoint,
)
from experiments.common.errors import ExperimentError
from experiments.common.files import set_aside
from experiments.common.results import write_json
from experiments.common.training import Record, Run


class Start(enum.Enum):
    """What `RunFolder.begin` found."""

    FRESH = "nothing to go on from"
    RESUMED = "a checkpoint to go on from"
    FINISHED = "all results"


@dataclasses.dataclass
class RunFolder:
    """The files of one run of an experiment.

    `results.json` is written last: a folder that has it holds a finished run, a folder
    with nothing but a checkpoint an unfinished one.

    Attributes:
        path: the folder; made when first written to.
        config: settings that decide the outcome, in a form that JSON can hold. A run is
            resumed only with the same ones.
        resumed_at: after how many steps the run was taken up again, for each time.
    """

    path: Path
    config: dict[str, Any]
    resumed_at: list[int] = dataclasses.field(default_factory=list)

    @property
    def checkpoint(self) -> Path:
        """Model, optimizer state, random key and measurements of every method."""
        return self.path / "checkpoint.eqx"

    @property
    def plot(self) -> Path:
        """The training curves."""
        return self.path / "training.png"

    @property
    def results(self) -> Path:
        """All measurements."""
        return self.path / "results.json"

    def check(self, resume: bool) -> None:
        """Raises an error if `begin` would. Changes nothing."""
        if not self.checkpoint.exists():
            return
        if resume:
            header, _ = load_checkpoint(self.checkpoint, like=None)
            check_same_config(header["config"], self.config)
        elif not self.results.exists():
            msg = (
                f"{self.path} holds an unfinished run. Go on with it by --resume, "
                f"choose another folder with --out, or delete {self.checkpoint}."
            )
            raise ExperimentError(msg)

    def begin(self, resume: bool) -> Start:
        """Finds out where to start, and makes sure that nothing gets overwritten.

        Args:
            resume: whether to go on with the run that is in the folder.

        Returns:
            `FRESH` also if there is nothing to resume, or after a finished run has been
            moved into a subfolder.
        """
        self.check(resume)
        if resume and self.checkpoint.exists():
            return Start.FINISHED if self.results.exists() else Start.RESUMED
        if resume:
            print(f"There is no checkpoint in {self.path}: starting from scratch.")
        if self.results.exists():
            # The results first: cut short after that, this leaves a run that counts as
            # unfinished, which is asked about, and not one that is overwritten.
            files = (self.results, *self.path.glob("*.png"), self.checkpoint)
            moved = set_aside(files, self.path)
            print(f"The finished run in {self.path} was moved to {moved}.")
        return Start.FRESH

    def save(self, runs: dict[str, Run]) -> None:
        """Writes the checkpoint."""
        header = {
            "config": self.config,
            "resumed_at": self.resumed_at,
            "records": {
                name: dataclasses.asdict(run.record) for name, run in runs.items()
            },
        }
        states = {name: run.state for name, run in runs.items()}
        save_checkpoint(self.checkpoint, header, states)

    def restore(self, runs: dict[str, Run]) -> None:
        """Puts the runs where the checkpoint left them."""
        states = {name: run.state for name, run in runs.items()}
        header, states = load_checkpoint(self.checkpoint, like=states)
        for name, run in runs.items():
            run.state = states[name]
            run.record = Record(**header["records"][name])
        step = len(next(iter(runs.values())).record.losses)
        self.resumed_at = [*header["resumed_at"], step]
        print(f"Resuming after step {step}.")

    def write_results(self, results: dict[str, Any]) -> None:
        """Writes the results, which marks the run as finished."""
        write_json(self.results, results)

    def read_results(self) -> dict[str, Any]:
        """Reads them back."""
        return json.loads(self.results.read_text())
