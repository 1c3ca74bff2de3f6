"""An experiment run from the command line."""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import jax
import tyro

from experiments.common.errors import ExperimentError


def by_platform(cpu: Any, other: Any) -> Any:
    """The default of a setting, on a CPU and elsewhere."""
    return dataclasses.field(
        default_factory=lambda: cpu if jax.default_backend() == "cpu" else other
    )


def run(main: Callable[[Any], Any], config: type) -> None:
    """Calls `main` with the settings that the command line gives.

    What the user can mend is one line on the standard error, without a traceback.

    Args:
        main: the experiment.
        config: the dataclass of its settings.
    """
    try:
        main(tyro.cli(config))
    except (ExperimentError, ConnectionError) as error:
        sys.exit(f"Error: {error}")
