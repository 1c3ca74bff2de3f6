"""Equal errors: what a method needs to be as accurate as another, or as asked for."""

import math
from collections.abc import Callable, Sequence

_FACTOR = 10**0.5
_LOOSEST = 0.1


def matching_tolerance(
    error_of: Callable[[float], float],
    target: float,
    least: float,
    factor: float = _FACTOR,
) -> tuple[float, float]:
    """Finds how loose the tolerance of an adaptive solver may be.

    Args:
        error_of: the error with a tolerance; not finite where the solve failed.
        target: the error that is good enough.
        least: smaller tolerances make no sense: rounding.
        factor: from one tolerance to the next that is tried.

    Returns:
        The first tolerance whose error is at most `target`, from loose to tight, and
        its error; if there is none, the one with the smallest error.
    """
    best = _LOOSEST, math.inf
    tolerance = _LOOSEST
    while tolerance >= least:
        error = error_of(tolerance)
        if error <= target:
            return tolerance, error
        if error < best[1]:
            best = tolerance, error
        tolerance /= factor
    return best


def matching_count(
    error_of: Callable[[int], float], target: float, counts: Sequence[int]
) -> int | None:
    """The first number of steps whose error is at most `target`, if there is one."""
    return next((count for count in counts if error_of(count) <= target), None)
