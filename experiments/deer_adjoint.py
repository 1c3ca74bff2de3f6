"""Value and gradient through many save times: `DEERAdjoint` against diffrax's default.

python -m experiments.deer_adjoint

All make the same steps of Dopri5 and save at the same times, so that values and
gradients are equal; what differs is how they are made, interpolated and differentiated.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any, Self

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments.common.affordable import measure_methods
from experiments.common.command_line import run
from experiments.common.errors import check_least
from experiments.common.measurement import TimedConfig, ready
from experiments.common.results import conclude, format_table
from experiments.common.solvers import METHODS
from experiments.common.timing import describe_seconds, quartiles
from experiments.common.workload import Comparison, Workload, prepare_solve

_DEFAULT = {"adjoint": diffrax.RecursiveCheckpointAdjoint()}
# The first is what the others are compared with.
_METHODS = {
    "deer, default adjoint": dataclasses.replace(METHODS["deer"], **_DEFAULT),
    "deer, DEERAdjoint": METHODS["deer"],
    "deer, Newton, default adjoint": dataclasses.replace(
        METHODS["deer_newton"], **_DEFAULT
    ),
    "deer, Newton, DEERAdjoint": METHODS["deer_newton"],
    "dopri5, default adjoint": METHODS["dopri5"],
}


@dataclasses.dataclass(frozen=True)
class Config(TimedConfig):
    """The settings.

    Attributes:
        num_save_times: Save times, evenly spaced.
        num_steps: Inner steps (Dopri5) of the one window.
        batch_size: Initial values, solved under `jax.vmap`.
    """

    num_save_times: int = 10_000
    num_steps: int = 64
    batch_size: int = 16
    repeats: int = 15
    out: Path = Path("runs/deer_adjoint/results.json")

    def reduced(self) -> Self:
        """The same measurement, small enough to take seconds."""
        return dataclasses.replace(self, num_save_times=20, batch_size=2, repeats=2)

    def check(self) -> None:
        """Raises an error that names the first setting that makes no sense."""
        super().check()
        check_least(self, num_save_times=1, num_steps=1, batch_size=1)


def _van_der_pol(t: Any, y: Array, mu: Array) -> Array:
    del t
    return jnp.stack([y[1], mu * (1 - y[0] ** 2) * y[1] - y[0]])


def make_workload(config: Config) -> Workload:
    """A mean square over all save times."""
    start = jnp.linspace(0.0, 1.0, config.batch_size)
    return Workload(
        field=_van_der_pol,
        params=jnp.array(1.0),
        y0s=jnp.stack([1 + start, start], axis=1),
        t0=0.0,
        t1=10.0,
        num_steps=config.num_steps,
        loss=lambda ys: jnp.mean(ys**2),
        ts=np.linspace(0.0, 10.0, config.num_save_times),
    )


def table(results: dict[str, Any]) -> str:
    """One line for each method, in Markdown."""
    rows, baseline = [], None
    for name, timing in results["methods"].items():
        _, median, _ = quartiles(timing["seconds"])
        baseline = median if baseline is None else baseline
        row = [name, f"{timing['compile_seconds']:.1f}"]
        row.append(describe_seconds(timing["seconds"], ".1f"))
        rows.append([*row, f"{baseline / median:.1f}"])
    header = ("method", "compile (s)", "value + gradient (ms) [quartiles]", "speed-up")
    return format_table(header, rows)


def main(config: Config) -> dict[str, Any]:
    """Measures, prints and writes the results."""
    config = ready(config)
    workload = make_workload(config)
    prepared = (
        (name, prepare_solve(method, "gradient", workload, argnums=(0, 1)))
        for name, method in _METHODS.items()
    )
    methods = measure_methods(prepared, Comparison(), math.inf, config.repeats)
    dtype = str(workload.y0s.dtype)
    return conclude("deer_adjoint", config, dtype, table, methods=methods)


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    run(main, Config)
