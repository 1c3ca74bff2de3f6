"""The iterates of Newton's method on a whole trajectory, from the guess of no motion.

python -m experiments.iterates

Two bodies around each other, in steps of Dopri5. The iteration as it stands in the
paper, without predictor and safeguards, and how fast it converges with each
linearization.
"""

import dataclasses
from pathlib import Path
from typing import Any, Self

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from matplotlib import colormaps
from matplotlib.figure import Figure

from diffrax_deer import (
    AbstractLinearization,
    AssociativeScan,
    StepMap,
    affine_recurrence,
)
from experiments.common.command_line import run
from experiments.common.errors import check_least
from experiments.common.files import write_figure
from experiments.common.measurement import BaseConfig, ready
from experiments.common.problems import PROBLEMS
from experiments.common.results import conclude, format_table
from experiments.common.solvers import LINEARIZATIONS

_PROBLEM = PROBLEMS["two_body"]
_TERM = diffrax.ODETerm(_PROBLEM.field)
# Its stages in a loop that forward mode can differentiate.
_SOLVER = diffrax.Dopri5(scan_kind="bounded")
_LABELS = {
    "Newton": "FullJacobian",
    "piecewise constant (DEER)": "PiecewiseConstant",
    "diagonal (quasi-DEER)": "DiagonalJacobian",
    "Picard": "Picard",
}
_DRAWN = "Newton"
_SCAN = AssociativeScan()


@dataclasses.dataclass(frozen=True)
class Config(BaseConfig):
    """The settings.

    Attributes:
        t1: The end of the trajectory, which begins at time 0.
        num_steps: Steps of Dopri5, of equal length.
        num_iterations: Iterations with each linearization.
        num_drawn: Iterates that are drawn, the guess among them.
    """

    t1: float = 10.0
    num_steps: int = 300
    num_iterations: int = 30
    num_drawn: int = 6
    out: Path = Path("runs/iterates/results.json")

    def reduced(self) -> Self:
        """The same measurement, small enough to take seconds."""
        return dataclasses.replace(self, num_steps=20, num_iterations=8)

    def check(self) -> None:
        """Raises an error that names the first setting that makes no sense."""
        check_least(self, num_steps=1, num_iterations=1, num_drawn=1)


def _grid(config: Config) -> Array:
    return jnp.linspace(0.0, config.t1, config.num_steps + 1)


def iterate(linearization: AbstractLinearization, config: Config) -> Array:
    """All iterates, `(iteration, time, state)`, the guess first."""
    times = _grid(config)
    xs, y0 = (times[:-1], times[1:]), _PROBLEM.y0

    def step(x, y):
        start, end = x
        state = _SOLVER.init(_TERM, start, end, y, None)
        return _SOLVER.step(_TERM, start, end, y, None, state, made_jump=False)[0]

    def increment(x, y):
        return (x[1] - x[0]) * _PROBLEM.field(x[0], y, None)

    linearize = jax.vmap(lambda *point: linearization(StepMap(step, increment), *point))

    def improve(ys, _):
        before = jnp.concatenate([y0[None], ys[:-1]])
        residuals = jax.vmap(step)(xs, before) - ys
        transitions = linearize(xs, before, ys)
        new = ys + affine_recurrence(transitions, residuals, scan=_SCAN)
        return new, new

    guess = jnp.broadcast_to(y0, (config.num_steps, len(y0)))
    new = jax.lax.scan(improve, guess, length=config.num_iterations)[1]
    return jnp.concatenate([guess[None], new])


def sequential(config: Config) -> Array:
    """The same steps, one after another, by diffrax; `(time, state)`."""
    times = _grid(config)
    ys = diffrax.diffeqsolve(
        _TERM,
        _SOLVER,
        0.0,
        config.t1,
        None,
        _PROBLEM.y0,
        stepsize_controller=diffrax.StepTo(times),
        saveat=diffrax.SaveAt(ts=times[1:]),
        max_steps=config.num_steps,
    ).ys
    assert ys is not None
    return jnp.asarray(ys)


def draw(
    path: Path, times: Array, drawn: dict[str, Array], errors: dict[str, list[Any]]
) -> None:
    """Trajectories on the left, `(time,)` each, errors of all iterates on the right."""
    figure = Figure(figsize=(9.6, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    *iterates, (last, exact) = drawn.items()
    for index, (name, values) in enumerate(iterates):
        color = colormaps["viridis_r"](0.1 + 0.9 * index / len(iterates))
        left.plot(times, values, color=color, label=name)
    left.plot(times, exact, "k:", linewidth=2, label=last)
    low, high = float(exact.min()), float(exact.max())
    margin = 0.6 * (high - low)
    left.set(xlabel="time", ylabel="position", ylim=(low - margin, high + margin))
    for (name, values), marker in zip(errors.items(), "os^v", strict=True):
        # Nothing is drawn where an iterate is not finite.
        values = np.array(values, float)
        right.semilogy(values, marker=marker, markersize=4, linewidth=1, label=name)
    right.set(xlabel="iteration", ylabel="largest error", ylim=(1e-16, 1e4))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        # Above, where it hides nothing.
        place = dict(loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
        axes.legend(fontsize="small", ncols=4 if axes is left else 2, **place)
    write_figure(path, figure)


def table(results: dict[str, Any]) -> str:
    """The error of some iterates for each linearization, in Markdown."""
    every = max(results["config"]["num_iterations"] // 10, 1)
    write = lambda value: "not finite" if value is None else f"{value:.0e}"
    rows = [
        [name, *map(write, values[::every])]
        for name, values in results["errors"].items()
    ]
    counts = range(0, results["config"]["num_iterations"] + 1, every)
    return format_table(["error after iteration", *map(str, counts)], rows)


def main(config: Config) -> dict[str, Any]:
    """Iterates, draws, prints and writes the results."""
    config = ready(config)
    exact = sequential(config)
    iterates = {
        label: iterate(LINEARIZATIONS[name], config) for label, name in _LABELS.items()
    }
    errors = {
        name: [
            error if np.isfinite(error) else None
            for error in jnp.max(jnp.abs(each - exact[None]), axis=(1, 2)).tolist()
        ]
        for name, each in iterates.items()
    }
    drawn = {
        "guess" if index == 0 else f"iterate {index}": each[:, 0]
        for index, each in enumerate(iterates[_DRAWN][: config.num_drawn])
    }
    drawn["Dopri5, step by step"] = exact[:, 0]
    draw(config.out.with_suffix(".png"), _grid(config)[1:], drawn, errors)
    return conclude("iterates", config, str(exact.dtype), table, errors=errors)


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    run(main, Config)
