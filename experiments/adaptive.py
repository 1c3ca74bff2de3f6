"""Only the solver changed: steps that a `PIDController` chooses, value and gradient.

python -m experiments.adaptive

The same call of `diffrax.diffeqsolve` with the same tolerance, once with `Dopri5` and
then with `DEERSolver`, whose windows are of 64 steps by default, or shorter. Where few
steps suffice long windows make more than are needed, and the table says so; windows of
one step are the very steps that Dopri5 makes.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array

from diffrax_deer import DEERAdjoint, DEERSolver
from experiments.common.command_line import run
from experiments.common.errors import ExperimentError, check_lists
from experiments.common.problems import FITZHUGH_NAGUMO, fitzhugh_nagumo
from experiments.common.results import format_table, head, report
from experiments.common.timing import compile_and_time, largest_difference, quartiles

_DEFAULT = diffrax.RecursiveCheckpointAdjoint()
# Solver and adjoint. The first is what the others are compared with.
_METHODS = {
    "Dopri5()": (diffrax.Dopri5(), _DEFAULT),
    "DEERSolver()": (DEERSolver(), _DEFAULT),
    "DEERSolver(num_steps=8)": (DEERSolver(num_steps=8), _DEFAULT),
    "DEERSolver(num_steps=1)": (DEERSolver(num_steps=1), _DEFAULT),
    "DEERSolver(), DEERAdjoint()": (DEERSolver(), DEERAdjoint()),
    "DEERSolver(num_steps=8), DEERAdjoint()": (DEERSolver(num_steps=8), DEERAdjoint()),
    "DEERSolver(num_steps=1), DEERAdjoint()": (DEERSolver(num_steps=1), DEERAdjoint()),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings.

    Attributes:
        batch_sizes: Initial values, solved under `jax.vmap`.
        tolerance: Of the controller, relative and absolute.
        repeats: Timed calls of each method; they take turns.
        out: Where to write the results.
        smoke: Only a quick check that everything runs.
    """

    batch_sizes: tuple[int, ...] = (1, 64)
    tolerance: float = 1e-5
    repeats: int = 30
    out: Path = Path("runs/adaptive/results.json")
    smoke: bool = False


@dataclasses.dataclass(frozen=True)
class _Problem:
    """`dy/dt = field(t, y, params)` from around `y0` at time 0 to `t1`."""

    title: str
    field: Callable[[Any, Array, Any], Array]
    params: Any
    y0: tuple[float, float]
    t1: float


def _problems() -> dict[str, _Problem]:
    network = eqx.nn.MLP(2, 2, 32, 2, jnp.tanh, dtype=jnp.float32, key=jr.key(0))
    params, static = eqx.partition(network, eqx.is_array)
    field = lambda t, y, params: eqx.combine(params, static)(y)
    neuron = jnp.asarray(FITZHUGH_NAGUMO, jnp.float32)
    return {
        "fitzhugh_nagumo": _Problem(
            "FitzHugh-Nagumo, T = 100", fitzhugh_nagumo, neuron, (1.0, 0.0), 100.0
        ),
        "mlp": _Problem("perceptron (2, 32), T = 10", field, params, (1.0, 0.0), 10.0),
    }


def make_function(
    problem: _Problem, method: tuple[Any, Any], tolerance: float, max_steps: int = 4096
) -> Any:
    """Value and gradient for the parameters, with final states and numbers of steps."""
    solver, adjoint = method

    def solve(y0, params):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(problem.field),
            solver,
            0.0,
            problem.t1,
            None,
            y0,
            params,
            stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
            adjoint=adjoint,
            max_steps=max_steps,
        )
        assert sol.ys is not None
        return sol.ys, sol.stats["num_steps"]

    def loss(params, y0s):
        ys, num_steps = jax.vmap(solve, in_axes=(0, None))(y0s, params)
        return jnp.mean(ys**2), (ys, num_steps)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def _cell(problem: _Problem, batch_size: int, config: Config) -> dict[str, Any]:
    """All methods on one problem with one batch size."""
    start = jnp.asarray(problem.y0, jnp.float32)
    y0s = start + 0.1 * jr.normal(jr.key(1), (batch_size, 2), jnp.float32)
    arguments = problem.params, y0s
    functions = {
        name: (make_function(problem, method, config.tolerance), arguments)
        for name, method in _METHODS.items()
    }
    methods, values = compile_and_time(functions, config.repeats)
    with jax.enable_x64(True):
        exact = diffrax.Dopri8(), diffrax.DirectAdjoint()
        wide = jax.tree.map(lambda x: x.astype(jnp.float64), arguments)
        tight = make_function(problem, exact, 1e-11, max_steps=2**14)
        ((_, (reference, _)), gradient) = tight(*wide)
    for name, ((_, (ys, num_steps)), found) in values.items():
        solver = _METHODS[name][0]
        inner = solver.num_steps if isinstance(solver, DEERSolver) else 1
        with jax.enable_x64(True):
            methods[name] |= {
                "num_steps": inner * int(jnp.max(num_steps)),
                "error": largest_difference(ys, reference),
                "gradient_error": largest_difference(found, gradient),
            }
    return {"batch_size": batch_size, "methods": methods}


def measure(config: Config) -> dict[str, Any]:
    """Compiles and times all methods, in turns, and compares what they return."""
    check_lists(config, "batch_sizes")
    if config.repeats < 1 or not 0 < config.tolerance < 1:
        msg = "--repeats must be at least 1, and --tolerance between 0 and 1."
        raise ExperimentError(msg)
    cells = []
    problems = list(_problems().items())
    for name, problem in problems[:1] if config.smoke else problems:
        for batch_size in config.batch_sizes:
            cell = {"problem": name, "title": problem.title}
            cells.append(cell | _cell(problem, batch_size, config))
    return {**head("adaptive", config, "float32"), "problems": cells}


def table(results: dict[str, Any]) -> str:
    """One line for each method, in Markdown."""
    rows = []
    for cell in results["problems"]:
        baseline = None
        for name, found in cell["methods"].items():
            first, median, third = quartiles(found["seconds"])
            baseline = median if baseline is None else baseline
            rows.append(
                [
                    f"{cell['title']}, batch {cell['batch_size']}",
                    f"`{name}`",
                    str(found["num_steps"]),
                    f"{found['error']:.0e}",
                    f"{found['compile_seconds']:.1f}",
                    f"{median:.3g} [{first:.3g}, {third:.3g}]",
                    f"{baseline / median:.2g}×",
                ]
            )
    header = (
        "problem",
        "solver, adjoint",
        "steps",
        "error",
        "compile (s)",
        "value + gradient (ms) [quartiles]",
        "speed-up",
    )
    return format_table(header, rows)


def main(config: Config) -> dict[str, Any]:
    """Measures, prints and writes the results."""
    if config.smoke:
        config = dataclasses.replace(config, batch_sizes=(2,), repeats=2)
    results = measure(config)
    report(config.out, results, table(results))
    return results


if __name__ == "__main__":
    run(main, Config)
