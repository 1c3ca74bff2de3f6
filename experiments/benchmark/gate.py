"""What became slower from one measurement to another.

python -m experiments.benchmark.gate OLD NEW

Speed-ups over the baseline are compared, which was timed in the same process, in turns;
never times, since the machine may have been another, or busy.
"""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

import tyro

from experiments.benchmark.reading import baseline_of, cells_of, identity, load
from experiments.common.command_line import run
from experiments.common.errors import ExperimentError
from experiments.common.progress import Cell, describe
from experiments.common.timing import quartiles

# A speed-up: the least it may be, its median, and the most.
Range = tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class Config:
    """Compares the speed-ups of two measurements; fails if any has become worse.

    Attributes:
        old: A file of results, or a folder of several.
        new: What to compare with it.
        tolerance: How much smaller a speed-up may be, relatively.
    """

    old: tyro.conf.Positional[Path]
    new: tyro.conf.Positional[Path]
    tolerance: float = 0.2


def _speed_ups(cell: Cell) -> Iterator[tuple[str, Range]]:
    """Those of all methods of the library, by name."""
    timed = {
        name: quartiles(method["seconds"])
        for name, method in cell["methods"].items()
        if "seconds" in method
    }
    baseline = timed.get(baseline_of(cell))
    if baseline is None:
        return
    for name, own in timed.items():
        if name.startswith("deer"):
            # Opposite quartiles: the machine may have favored either.
            pairs = zip(baseline, reversed(own), strict=True)
            first, median, third = (other / mine for other, mine in pairs)
            yield name, (first, median, third)


def _found(path: Path) -> dict[str, Range]:
    cells = {identity(cell): cell for cell in cells_of(load(path))}
    return {
        f"{describe(cell)}: {name}": found
        for cell in cells.values()
        for name, found in _speed_ups(cell)
    }


def is_slower(old: Range, new: Range, tolerance: float) -> bool:
    """Whether the median has become smaller by more than tolerance and noise."""
    return new[1] < (1 - tolerance) * old[1] and new[2] < old[0]


def main(config: Config) -> int:
    """Prints what became slower, and what only one of both has; returns the number."""
    if not 0 < config.tolerance < 1:
        msg = f"--tolerance is {config.tolerance}. Choose a number between 0 and 1."
        raise ExperimentError(msg)
    old, new = _found(config.old), _found(config.new)
    slower = [
        name
        for name in old.keys() & new.keys()
        if is_slower(old[name], new[name], config.tolerance)
    ]
    for name in sorted(slower):
        spreads = [
            f"{r[1]:.2f} [{r[0]:.2f}, {r[2]:.2f}]" for r in (old[name], new[name])
        ]
        print(f"slower: {name}: {' -> '.join(spreads)}")
    for title, only in (("old", old.keys() - new), ("new", new.keys() - old)):
        for name in sorted(only):
            print(f"only in the {title} measurement: {name}")
    compared = len(old.keys() & new.keys())
    print(f"{len(slower)} of {compared} speed-ups became worse.")
    return len(slower)


def _main(config: Config) -> None:
    if main(config):
        sys.exit(1)


if __name__ == "__main__":
    run(_main, Config)
