"""How much faster than `jax.lax.scan` a recurrent network runs with DEER.

python -m experiments.rnn_speed

Figure 2 of Lim et al., arXiv:2309.12252: a GRU with random weights and as many inputs
as units, over many lengths and sizes; the forward pass alone, and the mean square of
all states with its gradient with respect to the weights. An interrupted measurement
goes on with --resume.
"""

import dataclasses
import itertools
from pathlib import Path
from typing import Any, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

from experiments.common.affordable import (
    describe_difference,
    describe_time,
    measure_methods,
    prepare,
    reason_to_skip,
    speed_up,
    too_large,
)
from experiments.common.command_line import run
from experiments.common.errors import check_lists
from experiments.common.heat_map import Entry, draw_heat_maps
from experiments.common.measurement import CellsConfig, ready
from experiments.common.progress import MODES, Cell, Progress
from experiments.common.recurrent import run_cell
from experiments.common.results import format_table, head, report
from experiments.common.solvers import (
    LABELS,
    RECURRENT,
    RECURRENT_BASELINE as BASELINE,
)
from experiments.common.workload import Comparison, Outcome

_COMPARED = [name for name in RECURRENT if name != BASELINE]
# How many arrays of all Jacobians there are at once.
_COPIES = 3


@dataclasses.dataclass(frozen=True)
class Config(CellsConfig):
    """The settings. The whole figure takes a GPU; what is set fits two cores of a CPU.

    Attributes:
        dims: Numbers of units, which is that of the inputs, too.
        lengths: Numbers of steps.
        batch_sizes: Numbers of sequences, solved under `jax.vmap`.
    """

    dims: tuple[int, ...] = (1, 2, 4, 8, 16)
    lengths: tuple[int, ...] = (1_000, 10_000, 100_000)
    batch_sizes: tuple[int, ...] = (1, 16)
    repeats: int = 11
    cell_seconds: float = 15.0
    out: Path = Path("runs/rnn_speed/results.json")

    def reduced(self) -> Self:
        """The same measurement, small enough to take seconds."""
        return dataclasses.replace(
            self, dims=(2,), lengths=(10, 20), batch_sizes=(2,), repeats=2
        )

    def check(self) -> None:
        """Raises an error that names the first setting that makes no sense."""
        super().check()
        check_lists(self, "dims", "lengths", "batch_sizes")


def cells_of(config: Config) -> list[Cell]:
    """All cells, those that may be left out after those that show it."""
    return [
        {"mode": mode, "batch_size": batch_size, "dim": dim, "num_steps": num_steps}
        for num_steps in sorted(config.lengths)
        for dim in sorted(config.dims)
        for batch_size in sorted(config.batch_sizes)
        for mode in MODES
    ]


def make_function(method: str, mode: str, static: Any) -> Any:
    """What is compared, an `Outcome`.

    The function is one of the arrays of the cell, whose rest is `static`, and inputs.
    """

    def forward(arrays, xs):
        cell = eqx.combine(arrays, static)
        ys, iterations = jax.vmap(lambda x: run_cell(method, cell, x))(xs)
        return Outcome(ys, num_iterations=iterations)

    def loss(arrays, xs):
        outcome = forward(arrays, xs)
        return jnp.mean(outcome.ys**2), outcome.num_iterations

    def gradient(arrays, xs):
        value_and_grad = jax.value_and_grad(loss, has_aux=True)
        (value, iterations), grads = value_and_grad(arrays, xs)
        return Outcome(value, grads, iterations)

    return jax.jit(forward if mode == "forward" else gradient)


def make_arguments(cell: Cell) -> tuple[Any, tuple[Any, ...]]:
    """The rest of a GRU that `make_function` takes, and what to call that with."""
    cell_key, input_key = jr.split(jr.key(0))
    gru = eqx.nn.GRUCell(cell["dim"], cell["dim"], dtype=jnp.float32, key=cell_key)
    shape = cell["batch_size"], cell["num_steps"], cell["dim"]
    arrays, static = eqx.partition(gru, eqx.is_array)
    return static, (arrays, jr.normal(input_key, shape, jnp.float32))


def _too_many_jacobians(name: str, cell: Cell, config: Config) -> dict[str, Any] | None:
    """An array larger than the memory can already be too much for the compiler."""
    jacobians = cell["batch_size"] * cell["num_steps"] * cell["dim"] ** 2
    gigabytes = _COPIES * jacobians * 4 / 1e9
    fits = name in (BASELINE, "deer") or cell["mode"] == "forward"
    if fits or gigabytes <= config.max_gigabytes:
        return None
    return too_large(f"{gigabytes:.0f} GB expected")


def measure(cell: Cell, cells: list[Cell], config: Config) -> Cell:
    """All methods at one place; `cells` are those measured before."""
    static, arguments = make_arguments(cell)

    def prepared():
        # The baseline first, since values are compared with its.
        for name in (BASELINE, *_COMPARED):
            skipped = None
            if name != BASELINE:
                skipped = reason_to_skip(name, cell, cells, config.max_seconds)
                skipped = skipped or _too_many_jacobians(name, cell, config)
            function = make_function(name, cell["mode"], static)
            limit = config.max_gigabytes
            yield name, skipped or prepare(function, arguments, limit)

    seconds, repeats = config.cell_seconds, config.repeats
    return cell | {
        "methods": measure_methods(prepared(), Comparison(), seconds, repeats)
    }


def draw(path: Path, results: dict[str, Any]) -> None:
    """The figure: one panel for every method, mode and batch size."""
    batch_sizes, lengths, dims = (
        sorted({cell[key] for cell in results["cells"]})
        for key in ("batch_size", "num_steps", "dim")
    )
    columns = [f"{length:g}" for length in lengths]
    nothing: dict[tuple[str, int], Entry] = {
        place: "none" for place in itertools.product(columns, dims)
    }
    panels = []
    for method in _COMPARED:
        row = []
        for mode, batch_size in itertools.product(MODES, batch_sizes):
            entries = {
                (f"{cell['num_steps']:g}", cell["dim"]): (
                    speed_up(cell["methods"], method, BASELINE)
                )
                for cell in results["cells"]
                if (cell["mode"], cell["batch_size"]) == (mode, batch_size)
            }
            title = f"{LABELS[method]}, batch {batch_size}\n{MODES[mode]}"
            row.append((title, nothing | entries))
        panels.append(row)
    labels = "steps", "units", f"times as fast as {LABELS[BASELINE]}"
    draw_heat_maps(path, panels, columns, dims, labels)


def gradients_of(results: dict[str, Any], num_steps: int) -> dict[str, Any]:
    """The results with fewer cells: value and gradient of sequences of one length."""
    wanted = {"mode": "gradient", "num_steps": num_steps}.items()
    cells = [cell for cell in results["cells"] if wanted <= cell.items()]
    return results | {"cells": cells}


def table(results: dict[str, Any]) -> str:
    """One line for each cell, in Markdown."""
    rows = []
    # They were measured in another order, from short to long.
    order = lambda c: (c["batch_size"], list(MODES).index(c["mode"]), c["dim"])
    for cell in sorted(results["cells"], key=order):
        sizes = (cell[key] for key in ("batch_size", "dim", "num_steps"))
        methods = cell["methods"]
        row = [MODES[cell["mode"]], *map(str, sizes), describe_time(methods[BASELINE])]
        for name in _COMPARED:
            ratio = speed_up(methods, name, BASELINE)
            row.append(describe_time(methods[name]))
            row.append("-" if isinstance(ratio, str) else f"{ratio:.2g}×")
        row.append(str(methods["deer_newton"].get("num_iterations", "-")))
        rows.append([*row, describe_difference(methods)])
    header = ["", "batch", "units", "steps", f"{LABELS[BASELINE]} (ms)"]
    for name in _COMPARED:
        header += [f"{LABELS[name]} (ms)", "speed-up"]
    return format_table([*header, "iterations", "difference"], rows)


def main(config: Config) -> dict[str, Any]:
    """Measures, prints and writes the results."""
    config = ready(config)
    progress = Progress(config.out, head("rnn_speed", config, "float32"))
    progress.begin(config.resume)
    progress.measure(cells_of(config), lambda cell, known: measure(cell, known, config))
    results = progress.results()
    draw(config.out.with_suffix(".png"), results)
    report(config.out, results, table(results))
    progress.finish()
    return results


if __name__ == "__main__":
    run(main, Config)
