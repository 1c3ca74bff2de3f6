"""Value and gradient through many save times: `DEERAdjoint` against diffrax's default.

python -m experiments.deer_adjoint

All make the same steps of Dopri5 and save at the same times, so that values and
gradients are equal; what differs is how they are made, read out and differentiated.
"""

import dataclasses
from pathlib import Path
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
from jaxtyping import Array

from diffrax_deer import DEERAdjoint, DEERSolver, ParallelForward, WholeInterval
from experiments.common.command_line import run
from experiments.common.errors import ExperimentError
from experiments.common.results import format_table, head, report
from experiments.common.timing import compile_and_time, quartiles

_NEWTON = DEERSolver(forward=ParallelForward())
_DEFAULT = diffrax.RecursiveCheckpointAdjoint()
# Solver and adjoint. The first is what the others are compared with.
_METHODS = {
    "deer, default adjoint": (DEERSolver(), _DEFAULT),
    "deer, DEERAdjoint": (DEERSolver(), DEERAdjoint()),
    "deer, Newton, default adjoint": (_NEWTON, _DEFAULT),
    "deer, Newton, DEERAdjoint": (_NEWTON, DEERAdjoint()),
    "dopri5, default adjoint": (diffrax.Dopri5(), _DEFAULT),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings.

    Attributes:
        num_save_times: Save times, evenly spaced.
        num_steps: Inner steps (Dopri5) of the one window.
        batch_size: Initial values, solved under `jax.vmap`.
        repeats: Timed calls of each method; they take turns.
        out: Where to write the results.
        smoke: Only a quick check that everything runs.
    """

    num_save_times: int = 10_000
    num_steps: int = 64
    batch_size: int = 16
    repeats: int = 15
    out: Path = Path("runs/deer_adjoint/results.json")
    smoke: bool = False


def _van_der_pol(t: Any, y: Array, mu: Array) -> Array:
    del t
    return jnp.stack([y[1], mu * (1 - y[0] ** 2) * y[1] - y[0]])


def make_value_and_grad(method: str, config: Config) -> Any:
    """A mean square over all save times, with its gradient for y0 and mu."""
    ts = jnp.linspace(0.0, 10.0, config.num_save_times)
    solver, adjoint = _METHODS[method]
    controller: Any = WholeInterval()
    if isinstance(solver, DEERSolver):
        solver = dataclasses.replace(solver, num_steps=config.num_steps)
    else:
        controller = diffrax.StepTo(jnp.linspace(0.0, 10.0, config.num_steps + 1))

    def solve(y0, mu):
        ys = diffrax.diffeqsolve(
            diffrax.ODETerm(_van_der_pol),
            solver,
            0.0,
            10.0,
            None,
            y0,
            mu,
            saveat=diffrax.SaveAt(ts=ts),
            stepsize_controller=controller,
            adjoint=adjoint,
            max_steps=config.num_steps,
        ).ys
        assert ys is not None
        return jnp.asarray(ys)

    def loss(y0, mu):
        return jnp.mean(jax.vmap(solve, in_axes=(0, None))(y0, mu) ** 2)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))


def measure(config: Config) -> dict[str, Any]:
    """Compiles and times all methods, in turns, and compares what they return."""
    if config.num_save_times < 1 or config.batch_size < 1 or config.repeats < 1:
        msg = "--num-save-times, --batch-size and --repeats must be at least 1."
        raise ExperimentError(msg)
    start = jnp.linspace(0.0, 1.0, config.batch_size)
    arguments = jnp.stack([1 + start, start], axis=1), jnp.array(1.0)
    functions = {
        name: (make_value_and_grad(name, config), arguments) for name in _METHODS
    }
    methods, values = compile_and_time(functions, config.repeats)
    (_, reference), *others = values.values()
    relative = lambda a, b: float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)))
    differences = [jax.tree.map(relative, other[1], reference) for other in others]
    return {
        **head("deer_adjoint", config, str(arguments[0].dtype)),
        "gradient_difference": max(jax.tree.leaves(differences)),
        "methods": methods,
    }


def table(results: dict[str, Any]) -> str:
    """One line for each method, in Markdown."""
    rows, baseline = [], None
    for name, timing in results["methods"].items():
        first, median, third = quartiles(timing["seconds"])
        baseline = median if baseline is None else baseline
        rows.append(
            [
                name,
                f"{timing['compile_seconds']:.1f}",
                f"{median:.1f} [{first:.1f}, {third:.1f}]",
                f"{baseline / median:.1f}",
            ]
        )
    header = ("method", "compile (s)", "value + gradient (ms) [quartiles]", "speed-up")
    return format_table(header, rows)


def main(config: Config) -> dict[str, Any]:
    """Measures, prints and writes the results."""
    if config.smoke:
        small = dict(num_save_times=20, batch_size=2, repeats=2)
        config = dataclasses.replace(config, **small)
    results = measure(config)
    report(config.out, results, table(results))
    return results


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    run(main, Config)
