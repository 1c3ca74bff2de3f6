"""What the programs become on a GPU: kernels, counted without one.

python -m experiments.kernels

Compiles value and gradient for a described H100 (the dependency group `kernels` has the
compiler), as the library chooses for a GPU, and counts the kernels that are launched,
once and in each iteration. The number of iterations is measured on this machine. With
--check-budget it fails where there are more than `.ci/kernels.json` allows.
"""

import dataclasses
import functools as ft
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

# Read when they are imported: by equinox, whose errors at run time need a device to be
# compiled, and by the plugin, which need not find one.
os.environ["EQX_ON_ERROR"] = "off"
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

from experiments import rnn_speed
from experiments.benchmark import workloads
from experiments.common.command_line import run
from experiments.common.described_gpu import chosen_for_gpu, compile_for_gpu
from experiments.common.errors import ExperimentError
from experiments.common.measurement import BaseConfig, ready
from experiments.common.results import format_table, head, report, write_json
from experiments.common.solvers import METHODS, windows
from experiments.common.workload import make_function

_BUDGETS = Path(__file__).parents[1] / ".ci" / "kernels.json"
_TOLERANCE = 1e-5
# Assumptions of the estimate, microseconds from the least to the most: to launch a
# kernel, which is all that small ones cost, and until the host has heard of a decision
# and acted on it.
_LAUNCH, _ROUND_TRIP = (2.0, 3.0), (8.0, 20.0)


@dataclasses.dataclass(frozen=True)
class Config(BaseConfig):
    """The settings.

    Attributes:
        cells: Which cells; all of them if none is named.
        check_budget: Whether more kernels than the budget allows are an error.
    """

    cells: tuple[str, ...] = ()
    check_budget: bool = False
    out: Path = Path(f"runs/kernels/{jax.__version__}.json")

    def check(self) -> None:
        """Raises an error that names the first setting that makes no sense."""
        if unknown := sorted(set(self.cells) - set(CELLS)):
            msg = f"--cells: {', '.join(unknown)} unknown; one of {', '.join(CELLS)}."
            raise ExperimentError(msg)

    def reduced(self) -> "Config":
        """The same measurement, small enough to take seconds."""
        return dataclasses.replace(self, cells=("fitzhugh_nagumo_128",))


class Task(NamedTuple):
    """A function of arrays, which returns an `Outcome`."""

    function: Callable
    arguments: tuple[Any, ...]


def _workload(method: str, **cell: Any) -> Task:
    """A cell of the benchmark; the loss of a fit is the mean square of its end."""
    workload = workloads.make(cell)
    if cell["workload"] == "fitzhugh_nagumo":
        t1 = cell["num_steps"] / 10
        square = lambda ys: jnp.mean(ys**2)
        workload = dataclasses.replace(workload, t1=t1, ts=None, loss=square)
    chosen = METHODS[method]
    function = make_function(chosen, "gradient", workload, throw=False)
    return Task(function, (workload.params, workload.y0s, workload.cold_states(chosen)))


def _controlled(method: str) -> Task:
    """Steps that a controller chooses."""
    cell = {"workload": "fitzhugh_nagumo", "num_steps": 1000, "batch_size": 1}
    workload = workloads.make(cell)
    square = lambda ys: jnp.mean(ys**2)
    workload = dataclasses.replace(workload, ts=None, loss=square, num_steps=None)
    chosen = METHODS["dopri5_pid"]
    if method == "deer":
        chosen = windows(None, METHODS["deer"].adjoint)
    function = make_function(chosen, "gradient", workload, _TOLERANCE, throw=False)
    return Task(function, (workload.params, workload.y0s, None))


def _gru(method: str, dim: int, num_steps: int, batch_size: int) -> Task:
    keys = jr.split(jr.key(0))
    cell = eqx.nn.GRUCell(dim, dim, dtype=jnp.float32, key=keys[0])
    arrays, static = eqx.partition(cell, eqx.is_array)
    xs = jr.normal(keys[1], (batch_size, num_steps, dim), jnp.float32)
    name = "scan" if method == "scan_rk45" else method
    return Task(rnn_speed.make_function(name, "gradient", static), (arrays, xs))


def _fitzhugh_nagumo(num_steps: int) -> Callable[[str], Task]:
    cell = {"workload": "fitzhugh_nagumo", "num_steps": num_steps, "batch_size": 1}
    return ft.partial(_workload, **cell)


def _mlp(
    dim: int, width: int, num_steps: int, batch_size: int
) -> Callable[[str], Task]:
    sizes = {"dim": dim, "width": width, "batch_size": batch_size}
    return ft.partial(_workload, workload="mlp", num_steps=num_steps, **sizes)


class Cell(NamedTuple):
    """What is counted.

    Attributes:
        title: what to call it in a table.
        make: the task, by the name of the method.
        num_steps: what a sequential method makes; `None` where it chooses.
        methods: which are compared.
    """

    title: str
    make: Callable[[str], Task]
    num_steps: int | None
    methods: tuple[str, ...] = ("deer", "dopri5", "scan_rk45")


CELLS: dict[str, Cell] = {
    f"fitzhugh_nagumo_{n}": Cell(f"FitzHugh-Nagumo, N = {n}", _fitzhugh_nagumo(n), n)
    for n in (128, 1000, 4096, 16384)
} | {
    "mlp": Cell("perceptron (2, 32), N = 128", _mlp(2, 32, 128, 1), 128),
    "mlp_batch": Cell(
        "perceptron (4, 48), N = 256, batch 16", _mlp(4, 48, 256, 16), 256
    ),
    "mlp_large_batch": Cell(
        "perceptron (2, 32), N = 128, batch 1024", _mlp(2, 32, 128, 1024), 128
    ),
    "gru": Cell(
        "GRU, D = 4, N = 10 000",
        ft.partial(_gru, dim=4, num_steps=10_000, batch_size=1),
        10_000,
        ("deer", "scan_rk45"),
    ),
    "cnf": Cell(
        "normalizing flow, N = 64, batch 64",
        ft.partial(_workload, workload="cnf", num_steps=64, batch_size=64, width=32),
        64,
    ),
    "hnn": Cell(
        "Hamiltonian network, D = 8, N = 128, batch 8",
        ft.partial(
            _workload,
            workload="two_body_hnn",
            num_steps=128,
            batch_size=8,
            width=64,
            depth=3,
        ),
        128,
    ),
    "controlled": Cell(
        "FitzHugh-Nagumo, `PIDController`", _controlled, None, ("deer", "dopri5")
    ),
}
_LABELS = {"deer": "deer", "dopri5": "Dopri5", "scan_rk45": "`lax.scan`"}


def _iterations(task: Task) -> int | None:
    """Of Newton's method, by running the same program here."""
    found = jax.jit(task.function)(*task.arguments).num_iterations
    return None if found is None else int(jnp.max(found))


def _estimate(found: dict[str, Any], iterations: int | None) -> list[float] | None:
    """The least and the most milliseconds, as far as the trips of all loops are known.

    A loop whose trips the compiler does not know is taken to be Newton's iteration, and
    one within it, of the matrix exponential, to find that nothing is left to do.
    """
    if found["unknown_loops"] and (found["unknown_loops"] > 1 or not iterations):
        return None
    # The last trip only finds out that all is done.
    trips = (iterations or 0) + 1
    kernels = found["once"] + found["in_loops"] + trips * found["iteration"]
    waits = trips * found["round_trips"]
    pairs = zip(_LAUNCH, _ROUND_TRIP, strict=True)
    return [(kernels * launch + waits * wait) / 1000 for launch, wait in pairs]


def _count(cell: Cell, method: str) -> dict[str, Any]:
    task = cell.make(method)
    with chosen_for_gpu():
        found = compile_for_gpu(task.function, task.arguments).counts()
    with chosen_for_gpu():
        iterations = _iterations(cell.make(method)) if method == "deer" else None
    found |= {"num_iterations": iterations}
    if method == "dopri5" and cell.num_steps is not None:
        # The larger of diffrax's loops alone, forwards or backwards: too little.
        ways = zip(_LAUNCH, _ROUND_TRIP, strict=True)
        trip = lambda launch, wait: (
            found["iteration"] * launch + found["round_trips"] * wait
        )
        found["estimate"] = [cell.num_steps * trip(*way) / 1000 for way in ways]
    else:
        known = cell.num_steps is not None
        found["estimate"] = _estimate(found, iterations) if known else None
    return found


def _describe(estimate: list[float] | None) -> str:
    return "-" if estimate is None else "{:.3g} to {:.3g}".format(*estimate)


def table(results: dict[str, Any]) -> str:
    """One line for each program, in Markdown."""
    rows = []
    for name, methods in results["cells"].items():
        for method, found in methods.items():
            row = [CELLS[name].title, _LABELS[method]]
            keys = ("once", "iteration", "in_loops", "longest_loop", "round_trips")
            keys += ("num_iterations", "library_calls")
            row += ["-" if found[key] is None else str(found[key]) for key in keys]
            row.append(f"{found['temporary_bytes'] / 1e6:.1f}")
            row.append(f"{found['compile_seconds']:.0f}")
            rows.append([*row, _describe(found["estimate"])])
    header = ["value + gradient", "", "once", "iteration", "in loops", "longest loop"]
    header += ["waits", "iterations", "library calls", "memory (MB)", "compile (s)"]
    header.append("estimate (ms)")
    return format_table(header, rows)


def exceeded(results: dict[str, Any], budgets: dict[str, Any]) -> list[str]:
    """What is more than its budget allows."""
    return [
        f"{name}: {key} is {results['cells'][name]['deer'][key]}; at most {most}."
        for name, limits in budgets.items()
        if name in results["cells"]
        for key, most in limits.items()
        if results["cells"][name]["deer"][key] > most
    ]


def main(config: Config) -> dict[str, Any]:
    """Counts, prints and writes the results."""
    config = ready(config)
    cells: dict[str, Any] = {}
    results = {**head("kernels", config, "float32 and float64"), "cells": cells}
    for name in config.cells or CELLS:
        cells[name] = {}
        for method in CELLS[name].methods:
            cells[name][method] = _count(CELLS[name], method)
            write_json(config.out, results)
            print(f"{name}, {method}: {cells[name][method]}", flush=True)
    report(config.out, results, table(results))
    found = exceeded(results, json.loads(_BUDGETS.read_text()))
    if config.check_budget and found:
        msg = "More kernels than `.ci/kernels.json` allows.\n" + "\n".join(found)
        raise ExperimentError(msg)
    return results


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    run(main, Config)
