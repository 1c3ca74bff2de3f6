"""Settings that measurements have in common, whatever they measure."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from experiments.common.errors import check_least, check_positive


@dataclasses.dataclass(frozen=True)
class BaseConfig:
    """The settings of any measurement.

    Attributes:
        out: Where to write the results; pictures are written beside them.
        smoke: Only a quick check that everything runs.
    """

    out: Path = Path("runs/results.json")
    smoke: bool = False

    def check(self) -> None:
        """Raises an error that names the first setting that makes no sense."""

    def reduced(self) -> Self:
        """The same measurement, small enough to take seconds."""
        return self


@dataclasses.dataclass(frozen=True)
class TimedConfig(BaseConfig):
    """The settings of measurements of time.

    Attributes:
        repeats: Timed calls of each method, at most; they take turns.
    """

    repeats: int = 30

    def check(self) -> None:
        """Raises an error that names the first setting that makes no sense."""
        check_least(self, repeats=1)


@dataclasses.dataclass(frozen=True)
class CellsConfig(TimedConfig):
    """The settings of measurements of many cells, not all of which can be afforded.

    Attributes:
        cell_seconds: What all timed calls of a cell may take together, headlines apart.
            At least one is made of each method.
        max_seconds: All but the baseline is left out where one call is expected to
            take longer, from the next smaller number of steps.
        max_gigabytes: What needs more memory is left out.
        resume: Go on with the interrupted measurement.
    """

    cell_seconds: float = 20.0
    max_seconds: float = 8.0
    max_gigabytes: float = 8.0
    resume: bool = False

    def check(self) -> None:
        """Raises an error that names the first setting that makes no sense."""
        super().check()
        limits = ("cell_seconds", "max_seconds", "max_gigabytes")
        check_positive(self, *limits, finite=False)


def for_all_sizes(
    config: Any, measure: Callable[[int, int, Any], dict[str, Any]]
) -> list[dict[str, Any]]:
    """What `measure` returns for each of the `dims` and `batch_sizes` of a setting."""
    sizes = itertools.product(config.dims, config.batch_sizes)
    return [measure(dim, batch_size, config) for dim, batch_size in sizes]


def ready(config: Any) -> Any:
    """The settings, once they are checked, and reduced for a quick check."""
    config.check()
    return config.reduced() if config.smoke else config
