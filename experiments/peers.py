"""The same neural ODE and the same recurrent network in other libraries, side by side.

uv run --group peers python -m experiments.peers

Loss, and its gradient with respect to the weights. Network, data, tolerance and save
times of the neural ODE are those of the first loop of `experiments.training_loops`; the
recurrent network is that of `experiments.peers_recurrent`. Every method lives in a
process of its own; the processes take turns, and sleep in between.
"""

import dataclasses
import functools
import importlib
import importlib.metadata
import itertools
import multiprocessing
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Self

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from diffrax_deer import DEERAdjoint, DEERSolver, WholeInterval
from experiments import peers_recurrent, training_loops
from experiments.common import hand_written
from experiments.common.affordable import describe_time
from experiments.common.command_line import run
from experiments.common.errors import ExperimentError, check_least, check_lists
from experiments.common.files import write_figure
from experiments.common.measurement import TimedConfig, ready
from experiments.common.results import conclude, format_table
from experiments.common.timing import quartiles

# Loss and gradient, as NumPy arrays: the weights and biases of all layers, in order.
Outcome = list[np.ndarray]
Call = Callable[[], Outcome]
_T1, _RTOL, _ATOL, _GRID = 10.0, 1e-3, 1e-6, 8


@dataclasses.dataclass(frozen=True)
class Config(TimedConfig):
    """The settings.

    Attributes:
        batch_sizes: Numbers of trajectories, or of sequences.
        num_times: Save times of the neural ODE, evenly spaced.
        num_steps: Steps of the recurrent network.
    """

    batch_sizes: tuple[int, ...] = (1, 32)
    num_times: int = 100
    num_steps: int = 1000
    out: Path = Path("runs/peers/cpu.json")

    def reduced(self) -> Self:
        """The same measurement, small enough to take seconds."""
        small = {"batch_sizes": (2,), "num_times": 5, "num_steps": 20, "repeats": 2}
        return dataclasses.replace(self, **small)

    def check(self) -> None:
        """Raises an error that names the first setting that makes no sense."""
        super().check()
        check_lists(self, "batch_sizes")
        check_least(self, num_times=2, num_steps=1)


# ---- In JAX ----


def _with_jax(predict: Callable, loop: training_loops.Loop) -> Call:
    arrays, others = eqx.partition(loop.params, eqx.is_inexact_array)

    @jax.jit
    @jax.value_and_grad
    def step(arrays):
        ys = predict(eqx.combine(arrays, others), loop.data)
        return loop.loss(ys, loop.data)

    def call() -> Outcome:
        value, gradient = step(arrays)
        return [np.asarray(x) for x in (value, *_weights(gradient))]

    return call


def _weights(network: Any) -> list[Any]:
    return [x for layer in network.layers for x in (layer.weight, layer.bias)]


def _diffrax(loop: training_loops.Loop, **changed: Any) -> Call:
    options = loop.options | changed
    return _with_jax(lambda network, data: loop.predict(network, data, options), loop)


def _scan(loop: training_loops.Loop) -> Call:
    """Equal steps of Dopri5, one between two save times."""

    def predict(network, data):
        y0s, ts, _ = data
        field = lambda t, y, network: network(y)
        solve = lambda y0: hand_written.trajectory(
            field, 0.0, _T1, len(ts) - 1, y0, network
        )
        return jnp.concatenate([y0s[:, None], jax.vmap(solve)(y0s)], axis=1)

    return _with_jax(predict, loop)


# ---- In PyTorch ----


def _with_torch(solve: Callable, loop: training_loops.Loop) -> Call:
    torch: Any = importlib.import_module("torch")
    # Products this small gain nothing from a second thread, and wait for it.
    torch.set_num_threads(1)
    weights, (y0s, ts, target) = jax.tree.map(
        lambda x: torch.from_numpy(np.array(x)), (_weights(loop.params), loop.data)
    )
    network = _network(torch, weights)

    def call() -> Outcome:
        network.zero_grad()
        value = torch.mean((solve(network, y0s, ts) - target) ** 2)
        value.backward()
        found = (value.detach(), *(x.grad for x in network.parameters()))
        return [x.numpy().copy() for x in found]

    return call


def _network(torch: Any, weights: list[Any]) -> Any:
    layers = []
    for weight, bias in zip(weights[::2], weights[1::2], strict=True):
        layer = torch.nn.Linear(*weight.shape[::-1])
        layer.weight.data, layer.bias.data = weight, bias
        layers += [layer, torch.nn.Softplus()]

    class Field(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.Sequential(*layers[:-1])

        def forward(self, t, y):
            del t
            return self.layers(y)

    return Field()


def _torchdiffeq(loop: training_loops.Loop, name: str) -> Call:
    odeint = getattr(importlib.import_module("torchdiffeq"), name)
    solve = lambda field, y0s, ts: odeint(
        field, y0s, ts, rtol=_RTOL, atol=_ATOL, method="dopri5"
    ).swapaxes(0, 1)
    return _with_torch(solve, loop)


class _AnyTensor:
    """A stand-in for the annotations of torchtyping.

    torchode needs them to be imported, and that fails with PyTorch 2.7.
    """

    def __class_getitem__(cls, item: Any) -> Any:
        del item
        return cls


def _torchode(loop: training_loops.Loop) -> Call:
    names: Any = {"TensorType": _AnyTensor, "is_float": None}
    sys.modules["torchtyping"] = types.SimpleNamespace(**names)  # pyright: ignore[reportArgumentType]
    to: Any = importlib.import_module("torchode")

    def solve(field, y0s, ts):
        term = to.ODETerm(field)
        controller = to.IntegralController(atol=_ATOL, rtol=_RTOL, term=term)
        adjoint = to.AutoDiffAdjoint(to.Dopri5(term=term), controller)
        times = ts.expand(len(y0s), -1)
        return adjoint.solve(to.InitialValueProblem(y0=y0s, t_eval=times)).ys

    return _with_torch(solve, loop)


_REFERENCE = "Dopri8, tolerance 1e-6"
_TIGHT = diffrax.PIDController(rtol=1e-6, atol=1e-6)
_DEER = {"adjoint": DEERAdjoint()}
_FIXED = _DEER | {"stepsize_controller": WholeInterval(), "dt0": None}
_OURS = f"DEERSolver, {_GRID} equal steps"
_METHODS: dict[str, Callable[[training_loops.Loop], Call]] = {
    "torchdiffeq, odeint": functools.partial(_torchdiffeq, name="odeint"),
    "torchdiffeq, odeint_adjoint": functools.partial(
        _torchdiffeq, name="odeint_adjoint"
    ),
    "torchode": _torchode,
    "diffrax, Dopri5": functools.partial(_diffrax, solver=diffrax.Dopri5()),
    "lax.scan by hand": _scan,
    "DEERSolver, DEERAdjoint": functools.partial(
        _diffrax, solver=DEERSolver(), **_DEER
    ),
    _OURS: functools.partial(_diffrax, solver=DEERSolver(num_steps=_GRID), **_FIXED),
    _REFERENCE: functools.partial(
        _diffrax, solver=diffrax.Dopri8(), stepsize_controller=_TIGHT
    ),
}
_PACKAGES = ("torch", "torchdiffeq", "torchode", "pararnn-torch")


class _Task(NamedTuple):
    """A problem by batch size and length, and what solves it.

    The errors are those to the method `reference`, the ratios those to `ours`; `length`
    names the setting.
    """

    problem: Callable[[int, int], Any]
    methods: dict[str, Callable[[Any], Call]]
    reference: str
    ours: str
    length: str


_TASKS = {
    "neural ODE": _Task(
        training_loops.neural_ode, _METHODS, _REFERENCE, _OURS, "num_times"
    ),
    "recurrent network": _Task(
        peers_recurrent.problem,
        peers_recurrent.METHODS,
        peers_recurrent.REFERENCE,
        peers_recurrent.OURS,
        "num_steps",
    ),
}


# ---- Processes ----


def _serve(pipe: Any, task: str, name: str, batch_size: int, length: int) -> None:
    """Sends what the method finds, then a time whenever it is asked to."""
    call = _TASKS[task].methods[name](_TASKS[task].problem(batch_size, length))
    begin = time.perf_counter()
    found = call()
    pipe.send((time.perf_counter() - begin, found))
    while pipe.recv():
        call()
        begin = time.perf_counter()
        call()
        pipe.send(time.perf_counter() - begin)


def _measure(task: str, batch_size: int, config: Config) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    length = getattr(config, _TASKS[task].length)
    methods: dict[str, Any] = {}
    found, pipes, processes = {}, {}, []
    for name in _TASKS[task].methods:
        pipe, there = context.Pipe()
        arguments = there, task, name, batch_size, length
        process = context.Process(target=_serve, args=arguments, daemon=True)
        process.start()
        there.close()
        seconds, found[name] = pipe.recv()
        methods[name] = {"first_call_seconds": seconds, "seconds": []}
        pipes[name] = pipe
        processes.append(process)
    for _ in range(config.repeats):
        for name, pipe in pipes.items():
            pipe.send(True)
            methods[name]["seconds"].append(pipe.recv())
    for pipe, process in zip(pipes.values(), processes, strict=True):
        pipe.send(False)
        process.join()
    for name, (value, *gradient) in found.items():
        true_value, *true_gradient = found[_TASKS[task].reference]
        methods[name]["value_error"] = float(abs(value - true_value) / true_value)
        methods[name]["gradient_error"] = _distance(gradient, true_gradient)
    return {"task": task, "batch_size": batch_size, "methods": methods}


def _distance(found: Outcome, true: Outcome) -> float:
    """The largest difference, relative to the largest entry."""
    differences = [np.max(np.abs(x - y)) for x, y in zip(found, true, strict=True)]
    return float(max(differences) / max(np.max(np.abs(x)) for x in true))


# ---- Tables and pictures ----


def table(results: dict[str, Any]) -> str:
    """A table for each task: one line for each method and batch size, in Markdown."""
    return "\n\n".join(_table(results, name, task) for name, task in _TASKS.items())


def _table(results: dict[str, Any], name: str, task: _Task) -> str:
    rows = []
    for cell in results["cells"]:
        methods = cell["methods"] if cell["task"] == name else {}
        for method, found in methods.items():
            row = [method, str(cell["batch_size"])]
            row += [f"{found['first_call_seconds']:.1f}", describe_time(found)]
            row.append(_ratio(_milliseconds(found) / _milliseconds(methods[task.ours])))
            errors = (found["value_error"], found["gradient_error"])
            rows.append([*row, *(f"{error:.0e}" for error in errors)])
    head = (name, "batch", "first call (s)", "step (ms) [quartiles]")
    ratio = f"{task.ours}, is faster by"
    return format_table((*head, ratio, "error of loss", "of gradient"), rows)


def _ratio(x: float) -> str:
    return f"{x:.0f}×" if x >= 10 else f"{x:.2g}×"


def _milliseconds(method: dict[str, Any]) -> float:
    return quartiles(method["seconds"])[1]


def draw(path: Path, results: dict[str, Any]) -> None:
    """Medians, a row of panels for each task, a column for each batch size."""
    columns = max(len(results["config"]["batch_sizes"]), 1)
    figure = Figure(figsize=(5.2 * columns, 5.4), layout="constrained")
    axes = figure.subplots(
        2, columns, sharey="row", squeeze=False, height_ratios=(7, 5)
    )
    for row, (task, (_, methods, *_)) in zip(axes, _TASKS.items(), strict=True):
        cells = [cell for cell in results["cells"] if cell["task"] == task]
        names = [name for name in methods if name != _REFERENCE][::-1]
        for ax, cell in zip(row, cells, strict=True):
            times = [_milliseconds(cell["methods"][name]) for name in names]
            ours = [
                "tab:blue" if name[:4].lower() == "deer" else "0.7" for name in names
            ]
            bars = ax.barh(names, times, color=ours)
            ax.bar_label(bars, [f"{x:.3g}" for x in times], padding=3, fontsize="small")
            ax.set(xscale="log", xlabel="loss and gradient (ms)")
            ax.set_title(f"{task}, batch {cell['batch_size']}", fontsize="medium")
            ax.margins(x=0.15)
    write_figure(path, figure)


def main(config: Config) -> dict[str, Any]:
    """Measures, prints, draws and writes the results."""
    config = ready(config)
    try:
        versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    except importlib.metadata.PackageNotFoundError as error:
        msg = f"{error.name} is missing; `uv run --group peers` installs it."
        raise ExperimentError(msg) from error
    cases = itertools.product(_TASKS, config.batch_sizes)
    cells = [_measure(task, batch_size, config) for task, batch_size in cases]
    results = conclude("peers", config, "float32", table, cells=cells, peers=versions)
    draw(config.out.with_suffix(".png"), results)
    return results


if __name__ == "__main__":
    run(main, Config)
