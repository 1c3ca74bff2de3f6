"""Results: where they were measured, how they are summed up, stored and printed."""

import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np

from experiments.common.files import write_atomically
from experiments.common.training import Record, Run


@dataclasses.dataclass(frozen=True)
class Metric:
    """An entry of `Record.evaluations`, and how it is shown.

    Attributes:
        name: its key.
        column: the head of its column in tables.
        axis: its name on an axis, with the unit.
        spec: how to write a value, `".1%"` for example. A value may be `None`, too.
        scale: `"linear"` or `"log"`, of the axis.
    """

    name: str
    column: str
    axis: str
    spec: str
    scale: str = "linear"

    def format(self, value: float | None) -> str:
        """Writes a value as it stands in a table."""
        return "-" if value is None else format(value, self.spec)


_PACKAGES = ("jax", "jaxlib", "diffrax", "equinox", "optax", "diffrax_deer")

# Where changes would matter to what is measured.
_CODE = (":(top)diffrax_deer", ":(top)experiments/*.py", ":(top)uv.lock")


def environment() -> dict[str, Any]:
    """Describes what a measurement depends on beside the experiment's own settings."""
    device = jax.devices()[0]
    changes = _git("status", "--porcelain", "--", *_CODE)
    return {
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": None if changes is None else changes != "",
        "versions": {"python": platform.python_version()}
        | {package: _version(package) for package in _PACKAGES},
        "platform": device.platform,
        "device": device.device_kind,
        "num_cpus": os.cpu_count(),
        "system": platform.platform(),
        "x64": jax.config.jax_enable_x64,  # pyright: ignore[reportAttributeAccessIssue]
        # A compilation that was looked up says nothing about compile time.
        "compilation_cache": jax.config.jax_compilation_cache_dir,  # pyright: ignore[reportAttributeAccessIssue]
    }


def summarize(record: Record) -> dict[str, float]:
    """Sums up the timings of a training."""
    first, median, third = np.percentile(record.step_seconds, (25, 50, 75)).tolist()
    return {
        "compile_seconds": sum(record.compile_seconds),
        "step_seconds_quartile_1": first,
        "step_seconds_median": median,
        "step_seconds_quartile_3": third,
        "total_seconds": sum(record.compile_seconds) + sum(record.step_seconds),
    }


def collect_results(
    experiment: str, config: dict[str, Any], runs: dict[str, Run], resumed_at: list[int]
) -> dict[str, Any]:
    """All that was measured, in a form that JSON can hold."""
    return {
        "experiment": experiment,
        "config": config,
        "environment": environment(),
        "dtype": _dtype(runs),
        "resumed_at": resumed_at,
        "solvers": {
            name: {
                "final": run.record.evaluations[-1],
                "timing": summarize(run.record),
                **dataclasses.asdict(run.record),
            }
            for name, run in runs.items()
        },
    }


def comparison_table(results: dict[str, Any], metrics: Sequence[Metric]) -> str:
    """Lays out what `comparison` returns as a Markdown table."""
    return format_table(*comparison(results, metrics))


def comparison(
    results: dict[str, Any], metrics: Sequence[Metric]
) -> tuple[tuple[str, ...], list[list[str]]]:
    """The head of a table that compares the solvers, and one line for each of them.

    Args:
        results: what `collect_results` returns, where an evaluation has the metrics and
            `nfe`, `num_iterations` and `solve_error`.
        metrics: which values of the last evaluation go into the first columns.
    """
    columns = ("compile (s)", "step (ms) [quartiles]", "total (s)", "NFE/solve")
    more = ("Newton iterations", "solve error", "step time / Dopri5")
    baseline = results["solvers"].get("dopri5")
    rows = []
    for name, solver in results["solvers"].items():
        final, timing = solver["final"], solver["timing"]
        row = [name, *(metric.format(final[metric.name]) for metric in metrics)]
        row += [*describe_timing(timing), f"{final['nfe']:.0f}"]
        iterations, median = final["num_iterations"], "step_seconds_median"
        row.append("-" if iterations is None else f"{iterations:.1f}")
        row.append(f"{final['solve_error']:.0e}")
        ratio = timing[median] / baseline["timing"][median] if baseline else None
        row.append("-" if ratio is None else f"{ratio:.2f}")
        rows.append(row)
    head = ("solver", *(metric.column for metric in metrics), *columns, *more)
    return head, rows


def describe_timing(timing: dict[str, float]) -> tuple[str, str, str]:
    """What `summarize` returns, as it stands in a table: compile, step, total."""
    first, median, third = (
        1000 * timing[f"step_seconds_{part}"]
        for part in ("quartile_1", "median", "quartile_3")
    )
    return (
        f"{timing['compile_seconds']:.1f}",
        f"{median:.2f} [{first:.2f}, {third:.2f}]",
        f"{timing['total_seconds']:.1f}",
    )


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes strict JSON, atomically."""
    # Before the file is touched: a value that JSON cannot hold must not cost the old.
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def head(experiment: str, config: Any, dtype: str) -> dict[str, Any]:
    """What results begin with: of which experiment, with which settings, and where."""
    return {
        "experiment": experiment,
        "config": dataclasses.asdict(config) | {"out": None},
        "environment": environment(),
        "dtype": dtype,
    }


def conclude(
    experiment: str,
    config: Any,
    dtype: str,
    table: Callable[[dict[str, Any]], str],
    **found: Any,
) -> dict[str, Any]:
    """Writes and prints the results of a measurement, and returns them.

    Args:
        experiment: its name.
        config: its settings.
        dtype: in what precision.
        table: makes a table of the results.
        **found: what was measured. The largest `gradient_difference` anywhere in it is
            one of the results, too.
    """
    results = head(experiment, config, dtype)
    if differences := list(_values("gradient_difference", found)):
        results["gradient_difference"] = max(differences)
    results |= found
    report(config.out, results, table(results))
    return results


def _values(key: str, tree: Any) -> Iterator[Any]:
    """All values of that name, anywhere in lists and dictionaries."""
    if isinstance(tree, dict):
        if key in tree:
            yield tree[key]
        tree = list(tree.values())
    if isinstance(tree, list):
        for part in tree:
            yield from _values(key, part)


def report(path: Path, results: dict[str, Any], table: str) -> None:
    """Writes and prints the results of measurements."""
    write_json(path, results)
    print(table)
    if "gradient_difference" in results:
        difference = results["gradient_difference"]
        print(f"Largest difference of gradients: {difference:.1e}")
    print(f"Results: {path}")


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lays out a Markdown table, first column to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    # A rule to the right is a dash and a colon.
    widths[1:] = [max(width, 2) for width in widths[1:]]

    def line(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        padded = [f"{first[0]:<{first[1]}}"]
        padded += [f"{cell:>{width}}" for cell, width in rest]
        return f"| {' | '.join(padded)} |"

    dashes = [("-" * width) for width in widths]
    rule = [dashes[0], *(f"{dash[1:]}:" for dash in dashes[1:])]
    return "\n".join([line(header), line(rule), *map(line, rows)])


def _dtype(runs: dict[str, Run]) -> str:
    models = [run.state.model for run in runs.values()]
    weights = jax.tree.leaves(eqx.filter(models, eqx.is_inexact_array))
    return " and ".join(sorted({str(weight.dtype) for weight in weights}))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    command = ("git", *arguments)
    try:
        result = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True
        )
    except FileNotFoundError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None
