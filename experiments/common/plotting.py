"""Figures of what was measured, drawn without a display."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments.common.files import write_figure
from experiments.common.results import Metric
from experiments.common.training import Record

_WINDOW = 20  # steps over which the loss is averaged

# The curves of methods that compute the same thing lie on top of each other: broken
# lines of decreasing width let all of them be seen.
STYLES = (
    {"color": "tab:orange", "linestyle": "-", "linewidth": 3.0},
    {"color": "tab:blue", "linestyle": "--", "linewidth": 2.0},
    {"color": "black", "linestyle": ":", "linewidth": 1.8},
    {"color": "tab:green", "linestyle": "-.", "linewidth": 1.6},
    {"color": "tab:red", "linestyle": (0, (4, 1, 1, 1, 1, 1)), "linewidth": 1.4},
)


def plot_training(
    path: Path,
    records: dict[str, Record],
    metric: Metric,
    loss_label: str,
) -> None:
    """Draws loss and a metric, against steps and against time.

    Args:
        path: where the image goes.
        records: the methods by name.
        metric: which entry of `Record.evaluations` to draw.
        loss_label: the name of the loss on its axis, with its unit.
    """
    figure = Figure(figsize=(9.0, 6.4), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    for index, (name, record) in enumerate(records.items()):
        style = STYLES[index % len(STYLES)]
        seconds = np.cumsum(record.step_seconds)
        losses = _smooth(np.asarray(record.losses))
        values = [evaluation[metric.name] for evaluation in record.evaluations]
        steps = [evaluation["step"] for evaluation in record.evaluations]
        times = [evaluation["seconds"] for evaluation in record.evaluations]
        axes[0, 0].plot(np.arange(1, 1 + len(losses)), losses, **style, label=name)
        axes[0, 1].plot(seconds, losses, **style, label=name)
        axes[1, 0].plot(steps, values, **style, label=name, marker="o", markersize=4)
        axes[1, 1].plot(times, values, **style, label=name, marker="o", markersize=4)
    axes[0, 0].set_ylabel(f"{loss_label}, mean of {_WINDOW} steps")
    losses = [loss for record in records.values() for loss in record.losses]
    # Within a decade a logarithmic axis has hardly a tick.
    if 0 < 10 * min(losses) < max(losses):
        axes[0, 0].set_yscale("log")
    axes[1, 0].set(ylabel=metric.axis, yscale=metric.scale, xlabel="training steps")
    axes[1, 1].set(xlabel="time in training steps (s), compilation excluded")
    figure.align_ylabels()
    for ax in axes.flat:
        ax.grid(alpha=0.3)
        ax.legend()
    write_figure(path, figure)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Averages over the last few values, as far as there are that many."""
    sums = np.cumsum(values)
    sums[_WINDOW:] -= sums[:-_WINDOW].copy()
    return sums / np.minimum(np.arange(1, 1 + len(values)), _WINDOW)
