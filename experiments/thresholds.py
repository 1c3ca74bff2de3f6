"""What `diffrax_deer/_defaults.py` has to know about the platform at hand.

python -m experiments.thresholds

Value and gradient, differentiated with the Jacobians of all steps at once or one step
after another, over the entries of the Jacobians of one step of the whole batch: D²
times the batch. Then the two ways to solve an affine recurrence, and how many recorded
steps `DEERAdjoint` differentiates at once.
"""

import dataclasses
import importlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self
from unittest import mock

import jax
import jax.numpy as jnp
import jax.random as jr

from diffrax_deer import DEERAdjoint, Dense, affine_recurrence
from experiments import adaptive, rnn_speed
from experiments.benchmark import workloads
from experiments.benchmark.reading import geometric_mean
from experiments.common.affordable import (
    Prepared,
    describe_time,
    measure_methods,
    prepare,
    speed_up,
)
from experiments.common.command_line import run
from experiments.common.errors import check_positive
from experiments.common.measurement import TimedConfig, ready
from experiments.common.results import conclude, format_table
from experiments.common.solvers import METHODS, RECURRENT_BASELINE, SCANS, windows
from experiments.common.timing import quartiles
from experiments.common.workload import Comparison, Outcome, prepare_solve

Cell = dict[str, Any]
Entries = Iterator[tuple[str, Prepared | dict[str, Any]]]

_PARALLEL, _SEQUENTIAL = "deer_sequential", "deer_sequential_gradient"
_GROUPS = (1, 4, 8, 16, 64)
_TOLERANCE = 1e-5
_TITLES = {
    "mlp": "perceptron",
    "fitzhugh_nagumo": "FitzHugh-Nagumo",
    "gru": "GRU",
}
# The families that each limit is for.
_LIMITS = {
    "MAX_PARALLEL_ENTRIES": ("mlp", "fitzhugh_nagumo"),
    "MAX_PARALLEL_ENTRIES_SCAN": ("gru",),
}
_DEFAULTS: Any = importlib.import_module("diffrax_deer._defaults")


@dataclasses.dataclass(frozen=True)
class Config(TimedConfig):
    """The settings.

    Attributes:
        cell_seconds: What all timed calls of a cell may take together. At least one is
            made of each method.
    """

    repeats: int = 21
    cell_seconds: float = 2.0
    out: Path = Path("runs/thresholds/results.json")

    def reduced(self) -> Self:
        """The same measurement, small enough to take a minute."""
        return dataclasses.replace(self, repeats=2)

    def check(self) -> None:
        """Raises an error that names the first setting that makes no sense."""
        super().check()
        check_positive(self, "cell_seconds", finite=False)


def cells_of(smoke: bool) -> list[Cell]:
    """What tells the cells from each other, by `family`."""
    if smoke:
        families = {
            "mlp": ([{"dim": 2, "width": 4, "num_steps": 8}], (2,)),
            "fitzhugh_nagumo": ([{"dim": 2, "num_steps": 400}], (1,)),
            "gru": ([{"dim": 2, "num_steps": 20}], (1, 2)),
            "affine_recurrence": ([{"dim": 2, "num_steps": 20}], (1,)),
        }
    else:
        batch_sizes = (1, 4, 16, 64, 128)
        perceptrons = [
            {"dim": dim, "width": width, "num_steps": 128}
            for dim, width in ((2, 32), (4, 48), (8, 64))
        ]
        grus = [{"dim": dim, "num_steps": 2000} for dim in (2, 4, 8, 16)]
        recurrences = [{"dim": dim, "num_steps": 1000} for dim in (2, 8)]
        families = {
            "mlp": (perceptrons, batch_sizes),
            "fitzhugh_nagumo": ([{"dim": 2, "num_steps": 1000}], batch_sizes),
            "gru": (grus, (1, 16, 64)),
            "affine_recurrence": (recurrences, (1, 16)),
            "groups": ([{"dim": 2}], (1, 64)),
        }
    return [
        {"family": family, **size, "batch_size": batch_size}
        for family, (sizes, batch_sizes) in families.items()
        for size, batch_size in itertools.product(sizes, batch_sizes)
    ]


def _solves(cell: Cell) -> Entries:
    workload = workloads.make(cell | {"workload": cell["family"]})
    for name in (_SEQUENTIAL, _PARALLEL):
        yield name, prepare_solve(METHODS[name], "gradient", workload)


def _grus(cell: Cell) -> Entries:
    static, arguments = rnn_speed.make_arguments(cell)
    for name in (_SEQUENTIAL, _PARALLEL, RECURRENT_BASELINE):
        function = rnn_speed.make_function(name, "gradient", static)
        yield name, prepare(function, arguments, jnp.inf)


def _recurrences(cell: Cell) -> Entries:
    shape = cell["batch_size"], cell["num_steps"], cell["dim"]
    keys = jr.split(jr.key(0))
    b = jr.normal(keys[0], shape, jnp.float32)
    a = jr.normal(keys[1], (*shape, cell["dim"]), jnp.float32) / cell["dim"]

    def make(scan):
        solve = jax.vmap(lambda a, b: affine_recurrence(Dense(a), b, scan=scan))
        loss = lambda arguments: jnp.mean(solve(*arguments) ** 2)
        return jax.jit(lambda *arguments: Outcome(*jax.value_and_grad(loss)(arguments)))

    for name, scan in SCANS.items():
        yield name, prepare(make(scan), (a, b), jnp.inf)


def _groups(cell: Cell) -> Entries:
    workload = adaptive.make_workload("fitzhugh_nagumo", cell["batch_size"])
    method = windows(1, DEERAdjoint())
    for size in _GROUPS:
        # Nothing that was traced with another size must be found again.
        jax.clear_caches()
        with mock.patch.multiple(_DEFAULTS, CPU_GROUP=size, GROUP=size):
            solve = prepare_solve(method, "gradient", workload, tolerance=_TOLERANCE)
            yield str(size), solve


_FAMILIES = {
    "mlp": _solves,
    "fitzhugh_nagumo": _solves,
    "gru": _grus,
    "affine_recurrence": _recurrences,
    "groups": _groups,
}


def measure_cell(cell: Cell, config: Config) -> Cell:
    """All methods of one cell."""
    with jax.enable_x64(cell["family"] == "fitzhugh_nagumo"):
        methods = measure_methods(
            _FAMILIES[cell["family"]](cell),
            Comparison(),
            config.cell_seconds,
            config.repeats,
        )
    jax.clear_caches()
    print(", ".join(f"{key} {value}" for key, value in cell.items()), flush=True)
    return cell | {"methods": methods}


def entries_of(cell: Cell) -> int:
    """Those of the Jacobians of one step of the whole batch."""
    return cell["dim"] ** 2 * cell["batch_size"]


def largest_parallel(cells: Sequence[Cell]) -> int:
    """Up to how many entries the parallel gradient is the faster one everywhere."""
    found = 0
    for entries, group in itertools.groupby(sorted(cells, key=entries_of), entries_of):
        if any(_ratio(cell) < 1 for cell in group):
            break
        found = entries
    return found


def cost(cells: Sequence[Cell], limit: int) -> float:
    """How much slower than the faster gradient, in the geometric mean, a limit is."""
    factors = []
    for cell in cells:
        ratio = _ratio(cell)
        chosen = ratio if entries_of(cell) <= limit else 1 / ratio
        factors.append(max(1.0, 1 / chosen))
    return geometric_mean(factors)


def best_limit(cells: Sequence[Cell]) -> int:
    """The limit that costs the least."""
    candidates = [0, *sorted({entries_of(cell) for cell in cells})]
    return min(candidates, key=lambda limit: cost(cells, limit))


def _ratio(cell: Cell) -> float:
    """How often faster the parallel gradient is than the sequential one."""
    ratio = speed_up(cell["methods"], _PARALLEL, _SEQUENTIAL)
    assert isinstance(ratio, float)
    return ratio


def _gradient_table(cells: Sequence[Cell]) -> str:
    rows = []
    order = lambda cell: (list(_TITLES).index(cell["family"]), entries_of(cell))
    for cell in sorted(cells, key=order):
        methods = cell["methods"]
        title = f"{_TITLES[cell['family']]}, {cell['num_steps']} steps"
        row = [title, *(str(cell[key]) for key in ("dim", "batch_size"))]
        row.append(str(entries_of(cell)))
        for name in (_SEQUENTIAL, _PARALLEL, RECURRENT_BASELINE):
            row.append(describe_time(methods[name]) if name in methods else "-")
        rows.append([*row, f"{_ratio(cell):.2f}×"])
    header = ["", "D", "batch", "D² · batch", "`SequentialGradient()` (ms)"]
    header += ["`ParallelGradient()` (ms)", "lax.scan (ms)", "parallel is faster by"]
    return format_table(header, rows)


def _limit_table(cells: Sequence[Cell], limits: dict[str, int]) -> str:
    rows = []
    for name, families in _LIMITS.items():
        groups = {(family,): None for family in families} | {families: None}
        for group in groups:
            some = [cell for cell in cells if cell["family"] in group]
            row = [f"`{name}`", ", ".join(_TITLES[family] for family in group)]
            best, current = best_limit(some), limits[name]
            row += [str(largest_parallel(some)), str(best), f"{cost(some, best):.3f}"]
            rows.append([*row, str(current), f"{cost(some, current):.3f}"])
    header = ["", "measured on", "always faster up to", "best limit", "its cost"]
    return format_table([*header, "limit in the code", "its cost"], rows)


def _ways_table(cells: Sequence[Cell]) -> str:
    """One line for each way to do the same."""
    rows = []
    for cell in cells:
        title = cell["family"].replace("_", " ")
        best = min(quartiles(m["seconds"])[1] for m in cell["methods"].values())
        for name, method in cell["methods"].items():
            _, median, _ = quartiles(method["seconds"])
            row = [title, *(str(cell[key]) for key in ("dim", "batch_size")), name]
            rows.append([*row, describe_time(method), f"{median / best:.2f}×"])
    header = ["", "D", "batch", "scan, or steps at once", "value + gradient (ms)"]
    return format_table([*header, "of the fastest"], rows)


def table(results: dict[str, Any]) -> str:
    """All of it, in Markdown."""
    cells = results["cells"]
    gradients = [cell for cell in cells if cell["family"] in _TITLES]
    others = [cell for cell in cells if cell["family"] not in _TITLES]
    limits = _limit_table(gradients, results["limits"])
    return "\n\n".join([_gradient_table(gradients), limits, _ways_table(others)])


def main(config: Config) -> dict[str, Any]:
    """Measures, prints and writes the results."""
    config = ready(config)
    cells = [measure_cell(cell, config) for cell in cells_of(config.smoke)]
    limits = {name: getattr(_DEFAULTS, name) for name in _LIMITS}
    dtype = "float32 (FitzHugh-Nagumo: float64)"
    return conclude("thresholds", config, dtype, table, limits=limits, cells=cells)


if __name__ == "__main__":
    run(main, Config)
