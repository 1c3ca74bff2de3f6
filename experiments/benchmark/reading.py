"""Results, of one run or of several that measured different groups, as cells."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.common.affordable import speed_up
from experiments.common.errors import ExperimentError
from experiments.common.progress import Cell, describe
from experiments.common.solvers import BASELINE, RECURRENT_BASELINE

# What tells a cell from others; not all have all.
_KEYS = ("workload", "problem", "mode", "dim", "width", "batch_size", "num_steps")


def load(path: Path) -> list[dict[str, Any]]:
    """Reads a file of results, or all in a folder."""
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files or not files[0].exists():
        msg = f"There are no results at {path}. Give a file or a folder of files."
        raise ExperimentError(msg)
    try:
        found = [json.loads(file.read_text()) for file in files]
        if all(isinstance(each["cells"], list) for each in found):
            return found
        msg = f"{path} has no list of cells."
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        msg = f"{path} does not hold results of this benchmark ({error!r})."
    raise ExperimentError(msg)


def cells_of(results: Iterable[dict[str, Any]]) -> list[Cell]:
    """All cells of some runs."""
    return [cell for each in results for cell in each["cells"]]


def identity(cell: Cell) -> tuple[Any, ...]:
    """What tells the cell from others."""
    return tuple(cell.get(key) for key in _KEYS)


def baseline_of(cell: Cell) -> str:
    """What the other methods of the cell are compared with."""
    return RECURRENT_BASELINE if cell["workload"] == "gru" else BASELINE


def select(cells: Iterable[Cell], **where: Any) -> list[Cell]:
    """The cells where everything is as given."""
    return [cell for cell in cells if where.items() <= cell.items()]


def ratio(cell: Cell, method: str, over: str) -> float | None:
    """How often faster a method is than another, if both were timed."""
    found = speed_up(cell["methods"], method, over)
    return None if isinstance(found, str) else found


def ratios(
    cells: Iterable[Cell], method: str, over: str | None = None
) -> Iterator[tuple[float, str]]:
    """How often faster a method is, over another or the baseline, and where."""
    for cell in cells:
        found = ratio(cell, method, over or baseline_of(cell))
        if found is not None:
            yield found, describe(cell)


def geometric_mean(values: Sequence[float]) -> float:
    """The mean of ratios."""
    return math.exp(np.mean(np.log(values)))
