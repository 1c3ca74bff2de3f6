"""How far the states of a recurrent network found by DEER are from sequential ones.

python -m experiments.rnn_accuracy

Figure 3 of Lim et al., arXiv:2309.12252: a GRU with random weights and inputs, in
single precision, by `jax.lax.scan` and by Newton's method; and an LSTM. Both again with
larger weights, where rounding errors may grow along the sequence: how much so is seen
from both of them against double precision.
"""

import dataclasses
from pathlib import Path
from typing import Any, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from experiments.common.command_line import run
from experiments.common.errors import ExperimentError, check_least
from experiments.common.files import write_figure
from experiments.common.measurement import BaseConfig, ready
from experiments.common.plotting import STYLES
from experiments.common.recurrent import Cell, run_cell, scaled
from experiments.common.results import conclude, format_table

States = Float[np.ndarray, "time unit"]

_CELLS: dict[str, type[Cell]] = {"GRU": eqx.nn.GRUCell, "LSTM": eqx.nn.LSTMCell}
_SHOWN = 200  # steps
# Trajectories further apart than this are not the same any more.
_APART = 1e-3
PAIRS = {
    "deer_scan": ("deer, float32", "lax.scan, float32"),
    "deer_exact": ("deer, float32", "lax.scan, float64"),
    "scan_exact": ("lax.scan, float32", "lax.scan, float64"),
}


@dataclasses.dataclass(frozen=True)
class Config(BaseConfig):
    """The settings.

    Attributes:
        num_units: Units of each cell, and inputs.
        num_steps: Steps.
        scales: Factors of the weights, which are uniform between plus and minus one
            over the root of the number of units. By ten the GRU becomes chaotic: no two
            roundings agree for long, and Newton's method gains hardly a step with each
            iteration, which takes minutes.
        seed: Decides weights and inputs.
    """

    num_units: int = 32
    num_steps: int = 10_000
    scales: tuple[float, ...] = (1.0, 3.0, 10.0)
    seed: int = 0
    out: Path = Path("runs/rnn_accuracy/results.json")

    def reduced(self) -> Self:
        """The same measurement, small enough to take seconds."""
        small = dict(num_units=4, num_steps=20, scales=self.scales[:2])
        return dataclasses.replace(self, **small)

    def check(self) -> None:
        """Raises an error that names the first setting that makes no sense."""
        check_least(self, num_units=1, num_steps=1, seed=0)
        if not self.scales or not all(0 < x < np.inf for x in self.scales):
            msg = "--scales needs at least one factor, all of them positive."
            raise ExperimentError(msg)


def solve(
    cell: Cell, xs: Float[np.ndarray, "time unit"]
) -> tuple[dict[str, States], int]:
    """The outputs by way of finding them, and the number of Newton iterations.

    They are NaN from where DEER fails, if it does. Weights and inputs are the same in
    double precision.
    """
    outputs: dict[str, States] = {}
    newton = lambda cell, xs: run_cell("deer_newton", cell, xs, throw=False)
    states, iterations = eqx.filter_jit(newton)(cell, jnp.asarray(xs))
    outputs["deer, float32"] = _outputs(states)
    for bits in (32, 64):
        with jax.enable_x64(bits == 64):
            arguments = _cast((cell, xs), f"float{bits}")
            scan = lambda cell, xs: run_cell("scan", cell, xs)[0]
            states = eqx.filter_jit(scan)(*arguments)
            outputs[f"lax.scan, float{bits}"] = _outputs(states)
    return outputs, int(jnp.asarray(iterations))


def _cast(tree: Any, dtype: str) -> Any:
    """The same numbers in another type."""
    arrays, rest = eqx.partition(tree, eqx.is_array_like)
    cast = lambda x: jnp.asarray(np.asarray(x), dtype)
    return eqx.combine(jax.tree.map(cast, arrays), rest)


def _outputs(states: Any) -> States:
    """The hidden states, which for an LSTM are the first of two."""
    hidden, *_ = jax.tree.leaves(states)
    return np.asarray(hidden, np.float64)


def compare(first: States, second: States) -> dict[str, Any]:
    """How far two trajectories are from each other, step by step and on the whole."""
    distances = np.max(np.abs(first - second), axis=1)
    # No value is as far as can be.
    apart = ~(distances < _APART)
    return {
        "largest": _finite(np.max(distances)),
        "median": _finite(np.median(distances)),
        "num_steps_together": int(np.argmax(apart)) if apart.any() else len(first),
    }


def _finite(value: Any) -> float | None:
    """What JSON can hold."""
    return float(value) if np.isfinite(value) else None


def measure(kind: str, scale: float, config: Config) -> tuple[dict[str, Any], Any]:
    """One cell: what is compared, and the outputs to draw."""
    cell_key, input_key = jr.split(jr.key(config.seed))
    size = config.num_units
    cell = scaled(_CELLS[kind](size, size, key=cell_key), scale)
    xs = np.asarray(jr.normal(input_key, (config.num_steps, size), jnp.float32))
    outputs, iterations = solve(cell, xs)
    differences = {
        name: compare(outputs[first], outputs[second])
        for name, (first, second) in PAIRS.items()
    }
    last = outputs["lax.scan, float64"]
    about = {
        "cell": kind,
        "scale": scale,
        "num_iterations": iterations,
        "largest_output": float(np.max(np.abs(last))),
        "differences": differences,
    }
    return about, outputs


def draw(path: Path, rows: list[tuple[dict[str, Any], dict[str, States]]]) -> None:
    """One row for every cell: outputs at the end, and differences over all steps."""
    figure = Figure(figsize=(11.0, 1.9 * len(rows) + 0.8), layout="constrained")
    axes = figure.subplots(len(rows), 2, squeeze=False, sharex="col", sharey="col")
    for (left, right), (about, outputs) in zip(axes, rows, strict=True):
        steps = np.arange(len(outputs["deer, float32"])) + 1
        for name, style in zip(PAIRS["deer_scan"][::-1], STYLES, strict=False):
            last = outputs[name][-_SHOWN:, 0]
            left.plot(steps[-_SHOWN:], last, **style, label=name)
        left.set(ylabel="first output", title=_title(about))
        for name, color in (("scan_exact", "0.6"), ("deer_scan", "tab:blue")):
            first, second = (outputs[key] for key in PAIRS[name])
            # A logarithmic axis has no zero.
            distances = np.maximum(np.max(np.abs(first - second), axis=1), 1e-9)
            label = " − ".join(PAIRS[name])
            right.plot(steps, distances, color=color, linewidth=0.6, label=label)
        right.set(ylabel="largest difference", yscale="log", title=_title(about))
    for ax in axes.flat:
        ax.grid(alpha=0.3)
    for column in (0, 1):
        axes[-1, column].set_xlabel("step")
        # Above all panels, where it hides nothing.
        handles, labels = axes[0, column].get_legend_handles_labels()
        axes[0, column].legend(
            handles,
            labels,
            ncols=2,
            loc="lower center",
            bbox_to_anchor=(0.5, 1.12),
            fontsize="small",
        )
    write_figure(path, figure, dpi=150)


def _title(about: dict[str, Any]) -> str:
    weights = "" if about["scale"] == 1 else f", weights × {about['scale']:g}"
    return f"{about['cell']}{weights} ({about['num_iterations']} iterations)"


def table(results: dict[str, Any]) -> str:
    """One line for each cell, in Markdown: differences, and after how many steps.

    In brackets is the number of steps during which two trajectories stay together.
    """
    write = lambda value: "not finite" if value is None else f"{value:.0e}"
    rows = []
    for cell in results["cells"]:
        differences = [cell["differences"][name] for name in PAIRS]
        row = [cell["cell"], f"{cell['scale']:g}", f"{cell['num_iterations']}"]
        row += [
            f"{write(each['largest'])} ({each['num_steps_together']})"
            for each in differences
        ]
        rows.append(row)
    header = ["cell", "weights ×", "iterations"]
    return format_table([*header, *map(" − ".join, PAIRS.values())], rows)


def main(config: Config) -> dict[str, Any]:
    """Measures, draws, prints and writes the results."""
    config = ready(config)
    rows = []
    for kind in _CELLS:
        for scale in config.scales:
            rows.append(measure(kind, scale, config))
            print(f"{_title(rows[-1][0])}: done", flush=True)
    draw(config.out.with_suffix(".png"), rows)
    cells = [about for about, _ in rows]
    return conclude("rnn_accuracy", config, "float32", table, cells=cells)


if __name__ == "__main__":
    run(main, Config)
