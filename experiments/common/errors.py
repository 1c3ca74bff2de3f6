"""What can go wrong by no fault of the program."""

import math
from typing import Any


class ExperimentError(ValueError):
    """What the user asked for cannot be done; the message says why and what to do."""


def check_lists(config: Any, *names: str) -> None:
    """Raises unless these settings are lists of numbers from 1 on, none twice."""
    for name in names:
        values = getattr(config, name)
        if not values or min(values) < 1 or len(set(values)) < len(values):
            msg = f"{_flag(name)} needs at least one number, from 1 on, and none twice."
            raise ExperimentError(msg)


def check_least(config: Any, **bounds: int) -> None:
    """Raises unless these settings are at least as large as said."""
    for name, bound in bounds.items():
        if getattr(config, name) < bound:
            msg = f"{_flag(name)} is {getattr(config, name)}. Choose at least {bound}."
            raise ExperimentError(msg)


def check_positive(config: Any, *names: str, finite: bool = True) -> None:
    """Raises unless these settings are positive."""
    for name in names:
        value = getattr(config, name)
        if not value > 0 or (finite and value == math.inf):
            msg = f"{_flag(name)} is {value}. Choose a positive number."
            raise ExperimentError(msg)


def check_choice(config: Any, *names: str) -> None:
    """Raises if nothing is chosen, or something twice."""
    for name in names:
        chosen = getattr(config, name)
        if not chosen or len(set(chosen)) < len(chosen):
            msg = f"{_flag(name)} needs at least one value, and none of them twice."
            raise ExperimentError(msg)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
