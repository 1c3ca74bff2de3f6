"""Heat maps of speed-ups over the length of a sequence and the size of a state."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from experiments.common.files import write_figure

# A ratio, or in a word why there is none.
Entry = float | str

_COLUMN, _ROW = 0.78, 0.42  # inches a cell
_LEAST = 10.0  # a color scale over less would make noise look like a difference


def draw_heat_maps(
    path: Path,
    panels: Sequence[Sequence[tuple[str, dict[tuple[Any, Any], Entry]]]],
    columns: Sequence[Any],
    rows: Sequence[Any],
    labels: tuple[str, str, str],
) -> None:
    """Draws ratios as colors around one: gains in blue, losses in red.

    Args:
        path: where the image goes.
        panels: rows of panels, each with a title and its entries by column and row.
        columns: what stands below the columns.
        rows: what stands beside the rows, the first at the bottom.
        labels: what columns, rows and colors stand for.
    """
    across, down = len(panels[0]), len(panels)
    width = across * (_COLUMN * len(columns) + 0.25) + 1.6
    height = down * (_ROW * len(rows) + 0.45) + 0.5
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    every = [e for row in panels for _, entries in row for e in entries.values()]
    ratios = [e for e in every if not isinstance(e, str)]
    # Symmetric, so that white is one.
    limit = max([_LEAST, *(max(ratio, 1 / ratio) for ratio in ratios)])
    colors = ScalarMappable(LogNorm(1 / limit, limit), "RdBu")
    for axes_row, panels_row in zip(axes, panels, strict=True):
        for ax, (title, entries) in zip(axes_row, panels_row, strict=True):
            ax.set_title(title, fontsize="medium")
            _fill(ax, entries, columns, rows, colors)
    for ax in axes[-1]:
        ax.set_xlabel(labels[0])
    for ax in axes[:, 0]:
        ax.set_ylabel(labels[1])
    figure.colorbar(colors, ax=axes, label=labels[2], aspect=40, pad=0.01)
    write_figure(path, figure)


def _fill(
    ax: Axes,
    entries: dict[tuple[Any, Any], Entry],
    columns: Sequence[Any],
    rows: Sequence[Any],
    colors: ScalarMappable,
) -> None:
    ax.set(xlim=(0, len(columns)), ylim=(0, len(rows)))
    ax.set_xticks(np.arange(len(columns)) + 0.5, [f"{c}" for c in columns])
    ax.set_yticks(np.arange(len(rows)) + 0.5, [f"{r}" for r in rows])
    ax.tick_params(length=0)
    for x, column in enumerate(columns):
        for y, row in enumerate(rows):
            entry = entries[column, row]
            skipped = isinstance(entry, str)
            color = "0.9" if skipped else colors.to_rgba(np.array([entry]))[0]
            ax.add_patch(
                Rectangle(
                    (x, y),
                    1,
                    1,
                    facecolor=color,
                    edgecolor="0.7" if skipped else "white",
                    hatch="///" if skipped else None,
                    linewidth=0.5,
                )
            )
            ax.text(
                x + 0.5,
                y + 0.5,
                entry if skipped else _describe(entry),
                ha="center",
                va="center",
                fontsize="small",
                color=_readable(color),
                # Hatching must not run through the words.
                bbox={"facecolor": "0.9", "edgecolor": "none", "pad": 1}
                if skipped
                else None,
            )


def _describe(ratio: float) -> str:
    """Two digits, without an exponent."""
    return f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.2g}"


def _readable(color: Any) -> str:
    """Black or white, whichever stands out."""
    if isinstance(color, str):
        return "0.3"
    return "white" if float(np.dot(color[:3], (0.299, 0.587, 0.114))) < 0.5 else "black"
