"""How much faster than `jax.lax.scan` a recurrent network runs with DEER.

python -m experiments.rnn_speed

Figure 2 of Lim et al., arXiv:2309.12252: a GRU with random weights and as many inputs
as units, over many lengths and sizes; the forward pass alone, and the mean square of
all states with its gradient with respect to the weights. An interrupted measurement
goes on with --resume.
"""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

from experiments.common.affordable import (
    Prepared,
    describe_time,
    expected_seconds,
    prepare,
    speed_up,
    take_affordable_turns,
    too_large,
    too_slow,
)
from experiments.common.command_line import run
from experiments.common.errors import check_limits, check_lists
from experiments.common.heat_map import Entry, draw_heat_maps
from experiments.common.progress import Progress
from experiments.common.recurrent import (
    BASELINE,
    LABELS,
    MethodName,
    run_cell,
)
from experiments.common.results import format_table, head, report
from experiments.common.timing import largest_difference

MODES = {"forward": "forward", "gradient": "value and gradient"}
# The baseline first, since values are compared with its.
_METHODS: tuple[MethodName, ...] = (
    BASELINE,
    "deer",
    "deer_sequential",
    "deer_newton",
)
_COMPARED = _METHODS[1:]
_WITH_JACOBIANS = ("deer_sequential", "deer_newton")
_DIFFERENCES = ("value_difference", "gradient_difference")
# How many arrays of all Jacobians there are at once.
_COPIES = 3


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings. The whole figure takes a GPU; what is set fits two cores of a CPU.

    Attributes:
        dims: Numbers of units, which is that of the inputs, too.
        lengths: Numbers of steps.
        batch_sizes: Numbers of sequences, solved under `jax.vmap`.
        repeats: Timed calls of each method, at most; they take turns.
        cell_seconds: What all timed calls of a cell may take together. At least one is
            made of each method.
        most_seconds: What has Jacobians is left out where one call is expected to take
            longer, from the next shorter sequence.
        most_gigabytes: What needs more memory is left out.
        resume: Go on with the interrupted measurement.
        out: Where to write the results; the picture is written beside them.
        smoke: Only a quick check that everything runs.
    """

    dims: tuple[int, ...] = (1, 2, 4, 8, 16)
    lengths: tuple[int, ...] = (1_000, 10_000, 100_000)
    batch_sizes: tuple[int, ...] = (1, 16)
    repeats: int = 11
    cell_seconds: float = 15.0
    most_seconds: float = 8.0
    most_gigabytes: float = 8.0
    resume: bool = False
    out: Path = Path("runs/rnn_speed/results.json")
    smoke: bool = False

    def reduced(self) -> "Config":
        """The same measurement, small enough to take seconds."""
        return dataclasses.replace(
            self, dims=(2,), lengths=(10, 20), batch_sizes=(2,), repeats=2
        )

    def check(self) -> None:
        """Raises an error that names the first setting that makes no sense."""
        check_lists(self, "dims", "lengths", "batch_sizes")
        check_limits(self, "cell_seconds", "most_seconds", "most_gigabytes")


@dataclasses.dataclass(frozen=True)
class Place:
    """One cell of the figure."""

    mode: str
    batch_size: int
    dim: int
    num_steps: int

    def is_of(self, cell: dict[str, Any]) -> bool:
        """Whether that is where the cell was measured."""
        return dataclasses.asdict(self).items() <= cell.items()

    def is_longer_than(self, cell: dict[str, Any]) -> bool:
        """Whether the cell differs in nothing but that it has fewer steps."""
        shorter = dataclasses.replace(self, num_steps=cell["num_steps"])
        return shorter.is_of(cell) and cell["num_steps"] < self.num_steps


def places(config: Config) -> list[Place]:
    """All cells, those that may be left out after those that show it."""
    return [
        Place(mode, batch_size, dim, num_steps)
        for num_steps in sorted(config.lengths)
        for dim in sorted(config.dims)
        for batch_size in sorted(config.batch_sizes)
        for mode in MODES
    ]


def make_function(method: MethodName, mode: str, static: Any) -> Any:
    """What is compared, as a tuple, and the iterations.

    The function is one of the arrays of the cell, whose rest is `static`, and inputs.
    """

    def forward(arrays, xs):
        cell = eqx.combine(arrays, static)
        ys, iterations = jax.vmap(lambda x: run_cell(method, cell, x))(xs)
        return (ys,), iterations

    def loss(arrays, xs):
        (ys,), iterations = forward(arrays, xs)
        return jnp.mean(ys**2), iterations

    def gradient(arrays, xs):
        value_and_grad = jax.value_and_grad(loss, has_aux=True)
        (value, iterations), grads = value_and_grad(arrays, xs)
        return (value, grads), iterations

    return jax.jit(forward if mode == "forward" else gradient)


def _reason_to_skip(
    method: MethodName, place: Place, cells: list[dict[str, Any]], config: Config
) -> dict[str, Any] | None:
    """Why the method is left out before anything is compiled, if it is."""
    if method not in _WITH_JACOBIANS:
        return None
    shorter = [cell for cell in cells if place.is_longer_than(cell)]
    if shorter:
        longest = max(shorter, key=lambda cell: cell["num_steps"])
        ratio = place.num_steps / longest["num_steps"]
        expected = expected_seconds(longest["methods"][method], ratio)
        if expected is not None and expected > config.most_seconds:
            return too_slow(expected)
    # An array larger than the memory can already be too much for the compiler.
    jacobians = place.batch_size * place.num_steps * place.dim**2
    gigabytes = _COPIES * jacobians * 4 / 1e9
    if place.mode == "gradient" and gigabytes > config.most_gigabytes:
        return too_large(f"{gigabytes:.0f} GB expected")
    return None


def measure(
    place: Place, cells: list[dict[str, Any]], config: Config
) -> dict[str, Any]:
    """All methods at one place; `cells` are those measured before."""
    cell_key, input_key = jr.split(jr.key(0))
    cell = eqx.nn.GRUCell(place.dim, place.dim, key=cell_key)
    shape = place.batch_size, place.num_steps, place.dim
    xs = jr.normal(input_key, shape, jnp.float32)
    arrays, static = eqx.partition(cell, eqx.is_array)
    methods: dict[str, dict[str, Any]] = {}
    prepared: dict[str, Prepared] = {}
    reference = None
    for name in _METHODS:
        skipped = _reason_to_skip(name, place, cells, config)
        function = make_function(name, place.mode, static)
        found = skipped or prepare(function, (arrays, xs), config.most_gigabytes)
        if isinstance(found, dict):
            methods[name] = found
            continue
        prepared[name] = found
        methods[name] = {"compile_seconds": found.compiled.compile_seconds}
        values, iterations = found.value
        if name == BASELINE:
            reference = values
            continue
        methods[name]["num_iterations"] = int(jnp.max(iterations))
        if reference is not None:
            pairs = zip(values, reference, strict=True)
            differences = [largest_difference(*pair) for pair in pairs]
            methods[name] |= dict(zip(_DIFFERENCES, differences, strict=False))
    take_affordable_turns(list(prepared.values()), config.cell_seconds, config.repeats)
    for name, each in prepared.items():
        methods[name]["seconds"] = each.compiled.seconds
    return dataclasses.asdict(place) | {"methods": methods}


def _speed_up(cell: dict[str, Any], method: str) -> Entry:
    return speed_up(cell["methods"], method, BASELINE)


def draw(path: Path, results: dict[str, Any]) -> None:
    """The figure: one panel for every method, mode and batch size."""
    batch_sizes, lengths, dims = (
        sorted({cell[key] for cell in results["cells"]})
        for key in ("batch_size", "num_steps", "dim")
    )
    columns = [f"{length:g}" for length in lengths]
    nothing: dict[tuple[str, int], Entry] = {
        place: "none" for place in itertools.product(columns, dims)
    }
    panels = []
    for method in _COMPARED:
        row = []
        for mode in MODES:
            for batch_size in batch_sizes:
                entries = {
                    (f"{cell['num_steps']:g}", cell["dim"]): _speed_up(cell, method)
                    for cell in results["cells"]
                    if (cell["mode"], cell["batch_size"]) == (mode, batch_size)
                }
                title = f"{LABELS[method]}, batch {batch_size}\n{MODES[mode]}"
                row.append((title, nothing | entries))
        panels.append(row)
    labels = "steps", "units", f"times as fast as {LABELS[BASELINE]}"
    draw_heat_maps(path, panels, columns, dims, labels)


def gradients_of(results: dict[str, Any], num_steps: int) -> dict[str, Any]:
    """The results with fewer cells: value and gradient of sequences of one length."""
    wanted = {"mode": "gradient", "num_steps": num_steps}.items()
    cells = [cell for cell in results["cells"] if wanted <= cell.items()]
    return results | {"cells": cells}


def table(results: dict[str, Any]) -> str:
    """One line for each cell, in Markdown."""
    rows = []
    # They were measured in another order, from short to long.
    order = lambda c: (c["batch_size"], list(MODES).index(c["mode"]), c["dim"])
    for cell in sorted(results["cells"], key=order):
        sizes = (cell[key] for key in ("batch_size", "dim", "num_steps"))
        methods = cell["methods"]
        row = [MODES[cell["mode"]], *map(str, sizes), describe_time(methods[BASELINE])]
        for name in _COMPARED:
            ratio = _speed_up(cell, name)
            row.append(describe_time(methods[name]))
            row.append("-" if isinstance(ratio, str) else f"{ratio:.2g}×")
        row.append(str(methods["deer_newton"].get("num_iterations", "-")))
        keys = [(name, key) for name in _COMPARED for key in _DIFFERENCES]
        known = [methods[name][key] for name, key in keys if key in methods[name]]
        row.append(f"{max(known):.0e}" if known else "-")
        rows.append(row)
    header = ["", "batch", "units", "steps", f"{LABELS[BASELINE]} (ms)"]
    for name in _COMPARED:
        header += [f"{LABELS[name]} (ms)", "speed-up"]
    return format_table([*header, "iterations", "difference"], rows)


def main(config: Config) -> dict[str, Any]:
    """Measures, prints and writes the results."""
    config.check()
    config = config.reduced() if config.smoke else config
    progress = Progress(config.out, head("rnn_speed", config, "float32"))
    progress.begin(config.resume)
    for place in places(config):
        if any(place.is_of(cell) for cell in progress.cells):
            continue
        progress.add(measure(place, progress.cells, config))
        # Compiled functions of one cell are of no use to the next, but take memory.
        jax.clear_caches()
        print(
            f"{MODES[place.mode]}, batch {place.batch_size}, D = {place.dim}, "
            f"T = {place.num_steps}: done",
            flush=True,
        )
    results = progress.results()
    draw(config.out.with_suffix(".png"), results)
    report(config.out, results, table(results))
    progress.finish()
    return results


if __name__ == "__main__":
    run(main, Config)
