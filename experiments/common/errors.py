"""What can go wrong by no fault of the program."""

from typing import Any


class ExperimentError(ValueError):
    """What the user asked for cannot be done; the message says why and what to do."""


def check_lists(config: Any, *names: str) -> None:
    """Raises unless these settings are lists of numbers from 1 on, none twice."""
    for name in names:
        values = getattr(config, name)
        if not values or min(values) < 1 or len(set(values)) < len(values):
            flag = f"--{name.replace('_', '-')}"
            msg = f"{flag} needs at least one number, from 1 on, and none twice."
            raise ExperimentError(msg)


def check_limits(config: Any, *names: str) -> None:
    """Raises unless these settings are positive, and there are `repeats`."""
    if config.repeats < 1:
        msg = f"--repeats is {config.repeats}. Choose at least 1."
        raise ExperimentError(msg)
    for name in names:
        if not getattr(config, name) > 0:
            flag, value = f"--{name.replace('_', '-')}", getattr(config, name)
            msg = f"{flag} is {value}. Choose a positive number."
            raise ExperimentError(msg)
