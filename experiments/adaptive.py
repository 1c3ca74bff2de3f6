"""Only the solver changed: steps that a `PIDController` chooses, value and gradient.

python -m experiments.adaptive

The same call of `diffrax.diffeqsolve` with the same tolerance, once with `Dopri5` and
then with `DEERSolver`, which on a CPU makes the very steps that Dopri5 makes, or
windows of several. Where few steps suffice long windows make more than are needed, and
the table says so. All may make as many steps in the end: `max_steps` is 4096, divided
by the steps of a window.
"""

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any, Self

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

from diffrax_deer import DEERAdjoint, DEERSolver
from experiments.common.affordable import (
    Prepared,
    describe_time,
    measure_methods,
    speed_up,
)
from experiments.common.command_line import run
from experiments.common.errors import ExperimentError, check_lists
from experiments.common.measurement import TimedConfig, ready
from experiments.common.problems import FITZHUGH_NAGUMO, fitzhugh_nagumo
from experiments.common.results import conclude, format_table
from experiments.common.solvers import METHODS, Method, windows
from experiments.common.timing import largest_difference
from experiments.common.workload import Workload, prepare_solve, with_arrays

_BASELINE = "Dopri5()"
_DEFAULT, _DEER = diffrax.RecursiveCheckpointAdjoint(), DEERAdjoint()
METHODS_COMPARED: dict[str, Method] = {
    _BASELINE: METHODS["dopri5_pid"],
    "DEERSolver()": windows(None, _DEFAULT),
    "DEERSolver(num_steps=8)": windows(8, _DEFAULT),
    "DEERSolver(num_steps=64)": windows(64, _DEFAULT),
    "DEERSolver(), DEERAdjoint()": windows(None, _DEER),
    "DEERSolver(num_steps=8), DEERAdjoint()": windows(8, _DEER),
    "DEERSolver(num_steps=64), DEERAdjoint()": windows(64, _DEER),
}


@dataclasses.dataclass(frozen=True)
class Config(TimedConfig):
    """The settings.

    Attributes:
        batch_sizes: Initial values, solved under `jax.vmap`.
        tolerance: Of the controller, relative and absolute.
    """

    batch_sizes: tuple[int, ...] = (1, 64)
    tolerance: float = 1e-5
    out: Path = Path("runs/adaptive/results.json")

    def reduced(self) -> Self:
        """The same measurement, small enough to take seconds."""
        return dataclasses.replace(self, batch_sizes=(2,), repeats=2)

    def check(self) -> None:
        """Raises an error that names the first setting that makes no sense."""
        super().check()
        check_lists(self, "batch_sizes")
        if not 0 < self.tolerance < 1:
            msg = f"--tolerance is {self.tolerance}. Choose a number between 0 and 1."
            raise ExperimentError(msg)


def make_workload(name: str, batch_size: int) -> Workload:
    """The mean square of the final states, from around a point."""
    params = jnp.asarray(FITZHUGH_NAGUMO, jnp.float32)
    parts, t1 = {"field": fitzhugh_nagumo, "params": params}, 100.0
    if name == "mlp":
        key, dtype = jr.key(0), jnp.float32
        network = eqx.nn.MLP(2, 2, 32, 2, jnp.tanh, dtype=dtype, key=key)
        parts, t1 = with_arrays(network, lambda t, y, network: network(y)), 10.0
    offsets = 0.1 * jr.normal(jr.key(1), (batch_size, 2), jnp.float32)
    return Workload(
        **parts,
        y0s=jnp.array([1.0, 0.0], jnp.float32) + offsets,
        t0=0.0,
        t1=t1,
        num_steps=None,
        loss=lambda ys: jnp.mean(ys**2),
    )


_TITLES = {
    "fitzhugh_nagumo": "FitzHugh-Nagumo, T = 100",
    "mlp": "perceptron (2, 32), T = 10",
}


def measure_cell(name: str, batch_size: int, config: Config) -> dict[str, Any]:
    """All methods on one problem with one batch size."""
    workload = make_workload(name, batch_size)
    exact = workload.reference("gradient")
    prepared = (
        (
            key,
            prepare_solve(method, "gradient", workload, tolerance=config.tolerance),
        )
        for key, method in METHODS_COMPARED.items()
    )

    def describe(key: str, prepared: Prepared) -> dict[str, Any]:
        solver, found = METHODS_COMPARED[key].solver, prepared.value
        inner = solver.window_steps if isinstance(solver, DEERSolver) else 1
        with jax.enable_x64(True):
            return {
                "num_steps": inner * int(jnp.max(found.num_steps)),
                "error": largest_difference(found.ys, exact.ys),
                "gradient_error": largest_difference(found.gradient, exact.gradient),
            }

    methods = measure_methods(prepared, describe, math.inf, config.repeats)
    cell = {"problem": name, "title": _TITLES[name], "batch_size": batch_size}
    return cell | {"methods": methods}


def table(results: dict[str, Any]) -> str:
    """One line for each method, in Markdown."""
    rows = []
    for cell in results["problems"]:
        methods = cell["methods"]
        for name, found in methods.items():
            row = [f"{cell['title']}, batch {cell['batch_size']}", f"`{name}`"]
            row += [str(found["num_steps"]), f"{found['error']:.0e}"]
            row += [f"{found['compile_seconds']:.1f}", describe_time(found)]
            rows.append([*row, f"{speed_up(methods, name, _BASELINE):.2g}×"])
    header = ("problem", "solver, adjoint", "steps", "error", "compile (s)")
    time = "value + gradient (ms) [quartiles]"
    return format_table((*header, time, "speed-up"), rows)


def main(config: Config) -> dict[str, Any]:
    """Measures, prints and writes the results."""
    config = ready(config)
    names = list(_TITLES)[:1] if config.smoke else list(_TITLES)
    cells = [
        measure_cell(name, batch_size, config)
        for name, batch_size in itertools.product(names, config.batch_sizes)
    ]
    return conclude("adaptive", config, "float32", table, problems=cells)


if __name__ == "__main__":
    run(main, Config)
