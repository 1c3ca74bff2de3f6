"""A measurement of many cells that goes on where it was interrupted.

What has been measured is written to a file beside the results after every cell; the
results themselves are written last.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax

from experiments.common.checkpoint import check_same_config
from experiments.common.errors import ExperimentError
from experiments.common.results import write_json

Cell = dict[str, Any]
MODES = {"forward": "forward", "gradient": "value and gradient"}

# What the cells of one measurement must have in common beside the settings: timings of
# different machines cannot be compared. The commit may differ, and is kept.
_SAME = ("versions", "platform", "device", "num_cpus", "x64")


@dataclasses.dataclass
class Progress:
    """The cells measured so far.

    Attributes:
        out: where the results will be written.
        head: what they begin with, as `results.head` makes it.
        cells: what has been measured, in a form that JSON can hold.
        resumed_at: after how many cells the measurement was taken up again.
    """

    out: Path
    head: dict[str, Any]
    cells: list[Cell] = dataclasses.field(default_factory=list)
    resumed_at: list[int] = dataclasses.field(default_factory=list)

    @property
    def path(self) -> Path:
        """Where the cells are kept until all are there."""
        return self.out.with_suffix(".unfinished.json")

    def begin(self, resume: bool) -> None:
        """Reads what an interrupted measurement has left, or makes sure of nothing.

        Args:
            resume: whether to go on with it.
        """
        if not self.path.exists():
            if resume:
                print(f"There is no {self.path}: starting from scratch.")
            return
        if not resume:
            msg = (
                f"{self.path} is an unfinished measurement. Go on with it by --resume, "
                f"choose another --out, or delete it."
            )
            raise ExperimentError(msg)
        try:
            saved = json.loads(self.path.read_text())
            check_same_config(_decisive(saved), _decisive(self.head))
            self.cells = saved["cells"]
            self.resumed_at = [*saved["resumed_at"], len(self.cells)]
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            msg = (
                f"{self.path} is damaged ({error!r}). Delete it, then start anew "
                f"without --resume."
            )
            raise ExperimentError(msg) from error
        print(f"Resuming after {len(self.cells)} cells.")

    def measure(
        self, cells: Iterable[Cell], measure: Callable[[Cell, list[Cell]], Cell]
    ) -> None:
        """Measures cells, but for those that are known.

        Args:
            cells: where: what tells each of them from others.
            measure: maps that, and the cells measured before, to the measured cell.
        """
        commit = {"commit": self.head["environment"]["commit"]}
        for cell in cells:
            if any(cell.items() <= known.items() for known in self.cells):
                continue
            begin = time.perf_counter()
            self.cells.append(measure(cell, self.cells) | commit)
            write_json(self.path, self.results())
            # Compiled functions of one cell are of no use to the next, but take memory.
            jax.clear_caches()
            seconds = time.perf_counter() - begin
            print(f"{describe(cell)}: done in {seconds:.0f} s", flush=True)

    def results(self) -> dict[str, Any]:
        """What has been measured so far."""
        return {**self.head, "resumed_at": self.resumed_at, "cells": self.cells}

    def finish(self) -> None:
        """Removes what is no longer needed once the results are written."""
        self.path.unlink(missing_ok=True)


def describe(cell: Cell) -> str:
    """The cell in words."""
    name = cell.get("problem", cell.get("workload", ""))
    words = [name.replace("_", " ")] if name else []
    for key, form in (
        ("dim", "D = {}"),
        ("width", "width {}"),
        ("num_steps", "{} steps"),
        ("batch_size", "batch {}"),
    ):
        if key in cell:
            words.append(form.format(cell[key]))
    return ", ".join([*words, MODES[cell["mode"]]])


def _decisive(head: dict[str, Any]) -> dict[str, Any]:
    """What must not differ, in the form that JSON gives back."""
    config = {k: v for k, v in head["config"].items() if k not in ("out", "resume")}
    found = config | {name: head["environment"][name] for name in _SAME}
    return json.loads(json.dumps(found))
