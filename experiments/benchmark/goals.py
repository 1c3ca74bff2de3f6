"""What the library is meant to reach, and whether it does."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from experiments.benchmark.reading import geometric_mean, ratios, select
from experiments.common.progress import Cell, describe
from experiments.common.results import format_table

# What was found, and where.
Found = tuple[float, str]

_DEER, _WARM, _BY_HAND = "deer", "deer_newton_warm", "scan_rk45"
_SMALL = {"workload": "mlp", "dim": 2, "width": 32, "num_steps": 128}
_FITZHUGH_NAGUMO = {"workload": "fitzhugh_nagumo", "num_steps": 1000}
_LONG_GRU = {"workload": "gru", "dim": 4, "num_steps": 10_000, "batch_size": 1}


@dataclasses.dataclass(frozen=True)
class Goal:
    """A number that is to be at least, or at most, as large as a bound.

    Attributes:
        title: what the number is.
        measure: finds it, and where it was found, if the cells for it are there.
        bound: what it is compared with.
        at_least: whether it has to be larger, or else smaller.
    """

    title: str
    measure: Callable[[Sequence[Cell]], Found | None]
    bound: float
    at_least: bool = True

    def is_reached(self, value: float) -> bool:
        """Whether that is good enough."""
        return value >= self.bound if self.at_least else value <= self.bound


def _best(
    where: dict[str, Any], *methods: str, over: str | None = None
) -> Callable[[Sequence[Cell]], Found | None]:
    """The largest speed-up of some methods, in value and gradient of one cell."""

    def measure(cells: Sequence[Cell]) -> Found | None:
        chosen = select(cells, mode="gradient", **where)
        found = [
            (ratio, f"{place}: {method}")
            for method in methods
            for ratio, place in ratios(chosen, method, over)
        ]
        return max(found, default=None)

    return measure


def _of_diffrax(cells: Sequence[Cell]) -> list[Cell]:
    """All cells of solves with as many steps as the baseline makes."""
    return [cell for cell in cells if cell["workload"] not in ("gru", "matched")]


def _gradients(cells: Sequence[Cell]) -> list[Cell]:
    return select(_of_diffrax(cells), mode="gradient")


def _worst(cells: Sequence[Cell]) -> Found | None:
    return min(ratios(_gradients(cells), _DEER), default=None)


def _mean(cells: Sequence[Cell]) -> Found | None:
    found = list(ratios(_gradients(cells), _DEER))
    if not found:
        return None
    mean = geometric_mean([ratio for ratio, _ in found])
    return mean, f"{len(found)} cells"


def _over_paper(cells: Sequence[Cell]) -> Found | None:
    found = ratios(select(cells, workload="matched"), _DEER, "paper")
    return min(found, default=None)


def _worst_gru(cells: Sequence[Cell]) -> Found | None:
    chosen = select(cells, workload="gru", mode="gradient")
    return min(ratios(chosen, _DEER), default=None)


def _compilation(cells: Sequence[Cell]) -> Found | None:
    found = []
    for cell in _gradients(cells):
        own, other = (
            cell["methods"].get(name, {}).get("compile_seconds")
            for name in (_DEER, "dopri5")
        )
        if own is not None and other is not None:
            found.append((own / other, describe(cell)))
    return max(found, default=None)


def _mlp_by_hand(batch_size: int) -> Callable[[Sequence[Cell]], Found | None]:
    return _best(_SMALL | {"batch_size": batch_size}, _DEER, over=_BY_HAND)


_ONE = _SMALL | {"batch_size": 1}
GOALS = (
    Goal(
        "mlp, batch 1, over Dopri5: the faster of deer and warm",
        _best(_ONE, _DEER, _WARM),
        10.0,
    ),
    Goal("mlp, batch 1, over Dopri5: warm", _best(_ONE, _WARM), 10.0),
    Goal("mlp, batch 1, over Dopri5: deer, cold", _best(_ONE, _DEER), 6.0),
    Goal("mlp, batch 16, over Dopri5", _best(_SMALL | {"batch_size": 16}, _DEER), 3.0),
    Goal(
        "mlp, batch 128, over Dopri5", _best(_SMALL | {"batch_size": 128}, _DEER), 1.2
    ),
    Goal("mlp, batch 1, over lax.scan by hand", _mlp_by_hand(1), 2.0),
    Goal("mlp, batch 16, over lax.scan by hand", _mlp_by_hand(16), 1.0),
    Goal("mlp, batch 128, over lax.scan by hand", _mlp_by_hand(128), 1.0),
    Goal("FitzHugh-Nagumo, over Dopri5", _best(_FITZHUGH_NAGUMO, _DEER), 40.0),
    Goal(
        "FitzHugh-Nagumo, over lax.scan by hand",
        _best(_FITZHUGH_NAGUMO, _DEER, over=_BY_HAND),
        8.0,
    ),
    Goal("FitzHugh-Nagumo, over Dopri5: warm", _best(_FITZHUGH_NAGUMO, _WARM), 25.0),
    Goal("all cells, over Dopri5: the worst", _worst, 1.0),
    Goal("all cells, over Dopri5: geometric mean", _mean, 4.0),
    Goal("over the scheme of the paper at an equal error: the worst", _over_paper, 20),
    Goal("GRU, over lax.scan: the worst", _worst_gru, 1.0),
    Goal(
        "GRU, 4 units, 10000 steps, batch 1, over lax.scan",
        _best(_LONG_GRU, _DEER),
        4.0,
    ),
    Goal("time to compile, relative to Dopri5: the worst", _compilation, 1.0, False),
)


def table(cells: Sequence[Cell]) -> str:
    """One line for each goal, in Markdown."""
    rows = []
    for goal in GOALS:
        found = goal.measure(cells)
        bound = f"{'≥' if goal.at_least else '≤'} {goal.bound:g}"
        if found is None:
            rows.append([goal.title, bound, "-", "not measured", "-"])
            continue
        value, where = found
        reached = "yes" if goal.is_reached(value) else "no"
        rows.append([goal.title, bound, f"{value:.3g}", reached, where])
    return format_table(["goal", "bound", "measured", "reached", "where"], rows)
