"""The orbits of two bodies, drawn without a display."""

from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array
from matplotlib.figure import Figure

from experiments.common.files import write_figure
from experiments.common.hamiltonian import HamiltonianNetwork, solve
from experiments.common.plotting import STYLES
from experiments.common.training import Run
from experiments.common.two_body import TwoBodyData

_NUM_DRAWN = 3


def draw_orbits(
    data: TwoBodyData, options: dict[str, Any], runs: dict[str, Run], folder: Path
) -> None:
    """Draws the first orbits of the test, true and as the trained models have them.

    Args:
        data: where the true ones are.
        options: arguments of `diffrax.diffeqsolve`; the same for all models, since it
            is them that are to be seen, and not the errors of a solver.
        runs: the models by name.
        folder: where `orbits.png` goes.
    """

    @eqx.filter_jit
    def predict(model: HamiltonianNetwork, y0s: Array, ts: Array) -> Array:
        return jax.vmap(lambda y0: solve(model, y0, ts, **options).ys)(y0s)

    start = jax.device_put((data.test_y0[:_NUM_DRAWN], data.ts))
    orbits = {
        name: np.asarray(predict(run.state.model, *start)) for name, run in runs.items()
    }
    plot_orbits(folder / "orbits.png", data.test_ys[:_NUM_DRAWN], orbits)


def plot_orbits(
    path: Path, truth: np.ndarray, predictions: dict[str, np.ndarray]
) -> None:
    """Draws true and predicted orbits of the first body, in one panel each.

    Args:
        path: where the image goes.
        truth: positions and velocities, `(orbit, time, state)`.
        predictions: the same by the name of what predicted them.
    """
    figure = Figure(figsize=(9.0, 3.9), layout="constrained")
    axes = figure.subplots(1, len(truth), squeeze=False)[0]
    for index, ax in enumerate(axes):
        x, y = truth[index, :, :2].T
        true = {"color": "silver", "linewidth": 7.0, "solid_capstyle": "butt"}
        ax.plot(x, y, **true, label="truth")
        for number, (name, orbits) in enumerate(predictions.items()):
            style = STYLES[number % len(STYLES)] | {"marker": "o", "markevery": [-1]}
            ax.plot(*orbits[index, :, :2].T, **style, label=name)
        ax.plot(x[-1], y[-1], "kx", markersize=9, markeredgewidth=2, label="true end")
        ax.set(xlabel="x (units of length)", aspect="equal")
        ax.set_adjustable("datalim")
        ax.margins(0.1)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("y (units of length)")
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=2 + len(predictions))
    write_figure(path, figure)
