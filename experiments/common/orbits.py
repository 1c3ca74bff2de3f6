"""The orbits of two bodies, drawn without a display."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments.common.files import write_atomically
from experiments.common.plotting import STYLES


def plot_orbits(
    path: Path, truth: np.ndarray, predictions: dict[str, np.ndarray]
) -> None:
    """Draws true and predicted orbits, one panel for each pair of bodies.

    Args:
        path: where the image goes.
        truth: positions and velocities, `(orbit, time, state)`.
        predictions: the same by the name of what predicted them.
    """
    figure = Figure(figsize=(9.0, 3.9), layout="constrained")
    axes = figure.subplots(1, len(truth), squeeze=False)[0]
    for index, ax in enumerate(axes):
        true = {"color": "lightgray", "linewidth": 7.0}
        _draw_pair(ax, truth[index], true, "true orbit")
        for number, (name, orbits) in enumerate(predictions.items()):
            _draw_pair(ax, orbits[index], STYLES[number % len(STYLES)], name)
        ax.plot(*truth[index, -1, :4].reshape(2, 2).T, "ko", label="true end")
        ax.set(xlabel="x (unit of length)", aspect="equal")
        ax.set_adjustable("datalim")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("y (unit of length)")
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=6
    )
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=200))


def _draw_pair(ax, orbit: np.ndarray, style: dict, label: str) -> None:
    """One line for each body, of which only the first is in the legend."""
    ax.plot(orbit[:, 0], orbit[:, 1], **style, label=label)
    ax.plot(orbit[:, 2], orbit[:, 3], **style)
