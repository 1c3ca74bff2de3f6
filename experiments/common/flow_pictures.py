"""Pictures of densities beside those of the data, drawn without a display."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from experiments.common.densities import Samples
from experiments.common.files import write_figure

Points = Float[np.ndarray, "sample dim"]
Values = Float[np.ndarray, "row column"]

_NUM_CELLS = 80
_LIMIT = 4.0  # the toys lie within
_SQUARE = (-_LIMIT, _LIMIT)
_TICKS = (-3, 0, 3)
_COLUMN = 1.9  # inches


def grid() -> Points:
    """Points of the plane to evaluate densities at, row by row."""
    centers = (np.arange(_NUM_CELLS) + 0.5) / _NUM_CELLS * 2 * _LIMIT - _LIMIT
    x1, x2 = np.meshgrid(centers.astype(np.float32), centers.astype(np.float32))
    return np.stack([x1.ravel(), x2.ravel()], 1)


def draw_plane(
    path: Path, data: Samples, samples: dict[str, Points], densities: dict[str, Values]
) -> None:
    """Draws samples and, below them, densities: of the data and of every flow.

    Args:
        path: where the image goes.
        data: samples in the plane.
        samples: those of the flows, by name.
        densities: theirs at the points of `grid`.
    """
    counts, *_ = np.histogram2d(
        *data.test.T, bins=_NUM_CELLS // 2, range=(_SQUARE, _SQUARE), density=True
    )
    figure, axes = _figure(("data", *samples), num_rows=2)
    _scatter(axes[0], data, samples.values(), (0, 1))
    shapes = [density.reshape(_NUM_CELLS, _NUM_CELLS) for density in densities.values()]
    # One scale for all, that of the flows: a histogram is rough.
    colors = ScalarMappable(Normalize(0, max(values.max() for values in shapes)))
    for ax, values in zip(axes[1], [counts.T, *shapes], strict=True):
        ax.imshow(values, norm=colors.norm, origin="lower", extent=(*_SQUARE, *_SQUARE))
        ax.set_xlabel(data.features[0])
    axes[1, 0].set_ylabel(data.features[1])
    for ax in axes.flat:
        ax.set(xlim=_SQUARE, ylim=_SQUARE, aspect="equal", xticks=_TICKS, yticks=_TICKS)
    figure.colorbar(colors, ax=axes[1], label="density")
    _write(figure, path)


def draw_pairs(path: Path, data: Samples, samples: dict[str, Points]) -> None:
    """Draws pairs of features against each other: of the data and of every flow."""
    figure, axes = _figure(("data", *samples), num_rows=len(data.pairs))
    for row, pair in zip(axes, data.pairs, strict=True):
        _scatter(row, data, samples.values(), pair)
        for ax in row:
            ax.set_xlabel(data.features[pair[0]])
    _write(figure, path)


def _figure(names: tuple[str, ...], num_rows: int) -> tuple[Figure, Any]:
    size = (_COLUMN * len(names) + 0.5, 2.1 * num_rows + 0.3)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(
        num_rows, len(names), sharex="row", sharey="row", squeeze=False
    )
    for ax, name in zip(axes[0], names, strict=True):
        ax.set_title(name, fontsize="medium")
    return figure, axes


def _scatter(
    axes: Iterable[Axes],
    data: Samples,
    samples: Iterable[Points],
    pair: tuple[int, int],
) -> None:
    first, *others = axes
    first.set_ylabel(data.features[pair[1]])
    for ax, points in zip([first, *others], [data.test, *samples], strict=True):
        size = min(8, 5000 / len(points))
        ax.scatter(*points[:, pair].T, s=size, alpha=0.5, linewidths=0, color="black")


def _write(figure: Figure, path: Path) -> None:
    write_figure(path, figure)
