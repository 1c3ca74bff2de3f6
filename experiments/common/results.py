"""Results: where they were measured, how they are summed up, stored and printed."""

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.common.files import write_atomically
from experiments.common.training import Record

_PACKAGES = ("jax", "jaxlib", "diffrax", "equinox", "optax", "diffrax_deer")


def environment() -> dict[str, Any]:
    """Describes what a measurement depends on beside the experiment's own settings."""
    device = jax.devices()[0]
    changes = _git("status", "--porcelain")
    return {
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": None if changes is None else changes != "",
        "versions": {"python": platform.python_version()}
        | {package: _version(package) for package in _PACKAGES},
        "platform": device.platform,
        "device": device.device_kind,
        "num_cpus": os.cpu_count(),
        "system": platform.platform(),
        "x64": jax.config.jax_enable_x64,
        # A compilation that was looked up says nothing about compile time.
        "compilation_cache": jax.config.jax_compilation_cache_dir,
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


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes strict JSON, atomically."""
    # Before the file is touched: a value that JSON cannot hold must not cost the old.
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lays out a Markdown table, first column to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        padded = [f"{first[0]:<{first[1]}}"]
        padded += [f"{cell:>{width}}" for cell, width in rest]
        return f"| {' | '.join(padded)} |"

    dashes = [("-" * width) for width in widths]
    rule = [dashes[0], *(f"{dash[1:]}:" for dash in dashes[1:])]
    return "\n".join([line(header), line(rule), *map(line, rows)])


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
