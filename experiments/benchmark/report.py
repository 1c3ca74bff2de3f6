"""Tables and pictures of results, of one run or of a folder of several.

python -m experiments.benchmark.report experiments/results/benchmark/cpu
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro
from matplotlib.figure import Figure

from experiments import rnn_speed
from experiments.benchmark import goals
from experiments.benchmark.measure import EVERYWHERE, is_headline
from experiments.benchmark.reading import (
    cells_of,
    geometric_mean,
    load,
    ratio,
    ratios,
    select,
)
from experiments.common.affordable import describe_difference, describe_time, speed_up
from experiments.common.command_line import run
from experiments.common.files import write_figure
from experiments.common.heat_map import draw_heat_maps
from experiments.common.plotting import STYLES
from experiments.common.problems import PROBLEMS
from experiments.common.progress import MODES, Cell, describe
from experiments.common.results import format_table
from experiments.common.solvers import BASELINE, LABELS

# What is drawn: a method, and what it is compared with.
_PAIRS = (("deer", BASELINE), ("deer", "scan_rk45"), ("deer_newton_warm", BASELINE))


def _ordinary(cells: Sequence[Cell]) -> list[Cell]:
    return [cell for cell in cells if cell["workload"] not in ("gru", "matched")]


def headlines(cells: Sequence[Cell]) -> list[Cell]:
    """Value and gradient of what is measured with care."""
    return list(filter(is_headline, select(cells, mode="gradient")))


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}×"


def _time(cell: Cell, name: str) -> str:
    return describe_time(cell["methods"][name]) if name in cell["methods"] else "-"


def grid_table(cells: Sequence[Cell], names: Sequence[str] = EVERYWHERE) -> str:
    """One line for each cell: times, and speed-ups over the baseline."""
    header = ["", f"{LABELS[BASELINE]} (ms)"]
    for name in names[1:]:
        header += [f"{LABELS[name]} (ms)", "speed-up"]
    rows = []
    for cell in cells:
        row = [describe(cell), _time(cell, BASELINE)]
        for name in names[1:]:
            row += [_time(cell, name), _times(ratio(cell, name, BASELINE))]
        rows.append([*row, describe_difference(cell["methods"])])
    return format_table([*header, "difference"], rows)


def method_table(cell: Cell) -> str:
    """One line for each method of one cell."""
    rows = []
    for name, method in cell["methods"].items():
        row = [LABELS[name], describe_time(method), _times(ratio(cell, name, BASELINE))]
        for key, form in (
            ("compile_seconds", "{:.1f}"),
            ("temporary_bytes", "{:.3g}"),
            ("num_iterations", "{}"),
            ("tolerance", "{:.0e}"),
            ("error", "{:.0e}"),
            ("gradient_difference", "{:.0e}"),
        ):
            value = method.get(key)
            row.append("-" if value is None else form.format(value))
        rows.append(row)
    header = ["method", "time (ms)", "speed-up", "compile (s)", "memory (bytes)"]
    more = ["iterations", "tolerance", "error", "gradient's difference"]
    return format_table([*header, *more], rows)


def matched_table(cells: Sequence[Cell]) -> str:
    """What each method takes for the same error."""
    rows = []
    for cell in select(cells, workload="matched"):
        for name, method in cell["methods"].items():
            if "skipped" in method:
                continue
            steps, tolerance = method.get("num_steps"), method.get("tolerance")
            setting = f"{steps} steps" if steps else f"tolerance {tolerance:.0e}"
            row = [PROBLEMS[cell["problem"]].title, LABELS[name], setting]
            row += [f"{method['error']:.1e}", describe_time(method)]
            rows.append([*row, _times(ratio(cell, "deer", name))])
    header = ["problem", "method", "with", "error", "time (ms)", "deer is faster by"]
    return format_table(header, rows)


def ceiling_table(cells: Sequence[Cell], ceilings: dict[str, float]) -> str:
    """How much of what the machine can do is made use of.

    Operations are those of all steps once, which any method has to do: what more a
    method does counts for nothing.
    """
    rows = []
    for cell in _ordinary(cells):
        floor = cell["methods"].get("floor", {})
        flops, bytes_accessed = floor.get("flops"), floor.get("bytes_accessed")
        if flops is None or bytes_accessed is None:
            continue
        is_double = cell["workload"] in ("fitzhugh_nagumo", "lotka_volterra")
        peak = ceilings[f"matmul_gflops_{'float64' if is_double else 'float32'}"]
        row = [describe(cell)]
        for name in ("floor", "deer"):
            faster = ratio(cell, name, "floor")
            if faster is None:
                row += ["-", "-"]
                continue
            seconds = 1e9 * _median(floor["seconds"]) / faster
            row.append(f"{flops / seconds / peak:.1%}")
            bandwidth = ceilings["bandwidth_gigabytes"]
            row.append(f"{bytes_accessed / seconds / bandwidth:.1%}")
        rows.append(row)
    header = ["", "all steps once: operations", "bytes", "deer: operations", "bytes"]
    return format_table(header, rows)


def _median(seconds: list[float]) -> float:
    return sorted(seconds)[len(seconds) // 2]


def summary(cells: Sequence[Cell]) -> str:
    """The number of cells, the mean and the worst of the speed-ups, in Markdown."""
    lines = [f"{len(cells)} cells."]
    for mode in MODES:
        found = list(ratios(select(_ordinary(cells), mode=mode), "deer"))
        if not found:
            continue
        mean, (worst, place) = geometric_mean([r for r, _ in found]), min(found)
        lines.append(
            f"{MODES[mode].capitalize()}, {LABELS['deer']} over {LABELS[BASELINE]}: "
            f"geometric mean {mean:.2f} over {len(found)} cells, the worst {worst:.2f} "
            f"({place})."
        )
    return "\n\n".join(lines)


def tables(results: Sequence[dict[str, Any]]) -> str:
    """Everything that was measured, in Markdown."""
    cells = cells_of(results)
    ordinary = _ordinary(cells)
    parts = []
    if ordinary:
        parts.append(grid_table(ordinary))
        ceilings = [each["ceilings"] for each in results if "ceilings" in each]
        if ceilings:
            parts.append(ceiling_table(ordinary, ceilings[-1]))
    for cell in filter(is_headline, ordinary):
        parts.append(f"{describe(cell)}:\n\n{method_table(cell)}")
    recurrent = select(cells, workload="gru")
    if recurrent:
        parts.append(rnn_speed.table({"cells": recurrent}))
    if select(cells, workload="matched"):
        parts.append(matched_table(cells))
    return "\n\n".join([*parts, summary(cells), goals.table(cells)])


def draw_speed_ups(path: Path, cells: Sequence[Cell]) -> None:
    """Heat maps: one panel for each batch size and pair of methods."""
    chosen = select(cells, workload="mlp", mode="gradient")
    if not chosen:
        return
    columns, rows, batch_sizes = (
        sorted({key(cell) for cell in chosen})
        for key in (
            lambda cell: cell["num_steps"],
            lambda cell: (cell["dim"], cell["width"]),
            lambda cell: cell["batch_size"],
        )
    )
    panels = []
    for batch_size in batch_sizes:
        panels_row = []
        for method, over in _PAIRS:
            nothing = {
                (c, r): "none" for c in columns for r in map(_describe_size, rows)
            }
            found = {
                (cell["num_steps"], _describe_size((cell["dim"], cell["width"]))): (
                    speed_up(cell["methods"], method, over)
                )
                for cell in select(chosen, batch_size=batch_size)
            }
            title = f"{LABELS[method]} over {LABELS[over]},\nbatch {batch_size}"
            panels_row.append((title, nothing | found))
        panels.append(panels_row)
    labels = "steps", "state, width", "times as fast"
    draw_heat_maps(path, panels, columns, list(map(_describe_size, rows)), labels)


def _describe_size(size: tuple[int, int]) -> str:
    return f"{size[0]}, {size[1]}"


def draw_work_precision(path: Path, cells: Sequence[Cell]) -> None:
    """Error against time: one panel for each problem."""
    chosen = select(cells, workload="matched")
    if not chosen:
        return
    figure = Figure(figsize=(4.2 * len(chosen), 3.8), layout="constrained")
    axes = figure.subplots(1, len(chosen), squeeze=False)[0]
    for ax, cell in zip(axes, chosen, strict=True):
        for index, (name, method) in enumerate(cell["methods"].items()):
            points = method["points"]
            errors = [point["error"] for point in points]
            milliseconds = [1e3 * _median(point["seconds"]) for point in points]
            style = STYLES[index % len(STYLES)]
            ax.plot(milliseconds, errors, **style, marker="o", label=LABELS[name])
        ax.set(xscale="log", yscale="log", xlabel="value and gradient (ms)")
        ax.set_title(PROBLEMS[cell["problem"]].title, fontsize="medium")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("error of the final state, relative")
    axes[-1].legend(fontsize="small")
    write_figure(path, figure)


def draw(path: Path, results: Sequence[dict[str, Any]]) -> None:
    """The pictures of what was measured, beside the results at `path`."""
    cells = cells_of(results)
    draw_speed_ups(path.with_suffix(".png"), cells)
    draw_work_precision(path.with_name(f"{path.stem}_work_precision.png"), cells)
    if recurrent := select(cells, workload="gru"):
        rnn_speed.draw(path.with_name(f"{path.stem}_gru.png"), {"cells": recurrent})


@dataclasses.dataclass(frozen=True)
class Config:
    """Prints the tables of results, and draws their pictures beside them.

    Attributes:
        path: A file of results, or a folder of several.
    """

    path: tyro.conf.Positional[Path]


def main(config: Config) -> None:
    """Prints and draws."""
    results = load(config.path)
    draw(config.path, results)
    print(tables(results))


if __name__ == "__main__":
    run(main, Config)
