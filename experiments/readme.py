"""Writes the tables and numbers of all pages, from `experiments/results/`.

python -m experiments.readme

A table stands between `<!-- table: NAME -->` and `<!-- end -->`, a number in the text
between `<!-- number: NAME -->` and `<!-- end -->`.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments import (
    adaptive,
    cnf,
    convergence,
    deer_adjoint,
    grids,
    iterates,
    kernels,
    long_horizon,
    neural_ode_classifier,
    peers,
    quadratures,
    rnn_accuracy,
    rnn_classifier,
    rnn_speed,
    thresholds,
    training_loops,
    two_body_hnn,
)
from experiments.benchmark import goals, reading, report
from experiments.common.files import write_atomically
from experiments.common.results import comparison_table
from experiments.numbers import NUMBERS

_ROOT = Path(__file__).parents[1]
_RESULTS = _ROOT / "experiments" / "results"
README = _ROOT / "README.md"
PAGES = (
    README,
    _ROOT / "experiments" / "README.md",
    *sorted((_ROOT / "notebooks").glob("*.md")),
)


def _peers(results: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in results["peers"].items())
    picture = "../experiments/results/peers/cpu.png"
    alternative = "Time of loss and gradient in each library, a neural ODE and a "
    alternative += "recurrent network, at batch 1 and 32"
    return f"{peers.table(results)}\n\nWith {versions}.\n\n![{alternative}]({picture})"


# What was run once: the table, and how it was measured, by its settings.
_SINGLE: dict[str, tuple[Callable[[dict[str, Any]], str], str]] = {
    "neural_ode_classifier": (
        lambda results: comparison_table(results, [neural_ode_classifier.METRIC]),
        "seed {seed}, {steps} steps, batch {batch_size}",
    ),
    "adaptive": (adaptive.table, "tolerance {tolerance:g}, {repeats} repeats"),
    "deer_adjoint": (
        deer_adjoint.table,
        "{num_steps} steps, {num_save_times} save times, batch {batch_size}",
    ),
    "grids": (grids.table, "at most {repeats} repeats"),
    "iterates": (iterates.table, "{num_steps} steps of Dopri5"),
    "convergence": (convergence.table, "tolerance of the iteration 2e-12"),
    "quadratures": (
        quadratures.table,
        "{num_steps} steps, width {width}, {repeats} repeats",
    ),
    "long_horizon": (
        long_horizon.table,
        "{num_steps} steps, {num_observations} observations, width {width}, "
        "{repeats} repeats",
    ),
    "peers": (_peers, "{num_times} save times, {num_steps} steps, {repeats} repeats"),
    "rnn_accuracy": (rnn_accuracy.table, "Newton's method"),
    "thresholds": (thresholds.table, "at most {repeats} repeats"),
    "training_loops": (training_loops.summary, "{repeats} repeats"),
}


def _single(name: str, results: dict[str, Any]) -> str:
    table, form = _SINGLE[name]
    what = form.format(**results["config"])
    if "gradient_difference" in results:
        what += f", gradients equal to {results['gradient_difference']:.0e}"
    return _measured(table(results), what, results)


def _cnf(results: dict[str, Any]) -> str:
    groups: dict[str, list[str]] = {}
    for name, result in results.items():
        config = result["config"]
        settings = (
            f"{config['steps']} training steps, rate {config['learning_rate']}, "
            f"{config['num_steps']} steps of DEER"
        )
        groups.setdefault(settings, []).append(name)
    parts = [f"{', '.join(names)}: {settings}" for settings, names in groups.items()]
    first = results["two_moons"]
    what = f"batch {first['config']['batch_size']}, exact trace ({'; '.join(parts)})"
    return _measured(cnf.table(results), what, *results.values())


def _two_body_hnn(results: dict[str, Any]) -> str:
    first = results["seed_0"]
    what = (
        "{steps} steps, batch {batch_size}, {num_times} times, {num_steps} steps of "
        "DEER"
    ).format(**first["config"])
    tables = (
        comparison_table(first, two_body_hnn.METRICS),
        two_body_hnn.table_of_losses(results),
    )
    return _measured("\n\n".join(tables), what, *results.values())


def _kernels(results: dict[str, Any]) -> str:
    """One table for each version of JAX."""
    tables = []
    for found in results.values():
        environment = found["environment"]
        versions = environment["versions"]
        tables.append(
            f"{kernels.table(found)}\n\nCompiled for a described H100, not run, jax "
            f"{versions['jax']}, diffrax {versions['diffrax']}, commit "
            f"`{environment['commit'][:10]}`."
        )
    return "\n\n".join(tables)


def _rnn_speed(results: dict[str, Any]) -> str:
    recurrent = results["gru"]
    table = rnn_speed.table(rnn_speed.gradients_of(recurrent, num_steps=10_000))
    what = f"at most {recurrent['config']['repeats']} repeats"
    return _measured(table, what, recurrent)


def _rnn_classifier(results: dict[str, Any]) -> str:
    tables = "\n\n".join(
        f"{name}:\n\n{rnn_classifier.table(each)}" for name, each in results.items()
    )
    form = "{steps} steps, {num_layers} layers of {hidden_size} units"
    settings = [
        f"{name}: {form.format(**each['config'])}" for name, each in results.items()
    ]
    first = next(iter(results.values()))
    what = f"batch {first['config']['batch_size']}, {'; '.join(settings)}"
    return _measured(tables, what, *results.values())


def _training_loops_all(results: dict[str, Any]) -> str:
    what = "{repeats} repeats, {steps} steps of training".format(**results["config"])
    return _measured(training_loops.tables(results), what, results)


def _benchmark(results: dict[str, Any]) -> str:
    cells = reading.cells_of(results.values())
    names = ("dopri5", "dopri5_pid", "scan_rk45", "deer", "deer_newton_warm")
    tables = [
        report.grid_table(report.headlines(cells), names),
        report.matched_table(cells),
    ]
    return _of_benchmark([*tables, report.summary(cells)], results)


def _goals(results: dict[str, Any]) -> str:
    return _of_benchmark([goals.table(reading.cells_of(results.values()))], results)


def _of_benchmark(parts: list[str], results: dict[str, Any]) -> str:
    repeats = max(each["config"]["repeats"] for each in results.values())
    what = f"at most {repeats} repeats"
    return _measured("\n\n".join(parts), what, *results.values())


def _measured(table: str, what: str, *results: dict[str, Any]) -> str:
    """The table, and below it how it was measured, by one run or by several."""
    environment = results[0]["environment"]
    versions = environment["versions"]
    # In the order of the runs, each of them once. A cell may be older than its run.
    places = [
        place
        for result in results
        for place in [*result.get("cells", []), result["environment"]]
    ]
    commits = dict.fromkeys(
        f"`{place['commit'][:10]}`" for place in places if "commit" in place
    )
    return (
        f"{table}\n\n"
        f"Measured on {environment['num_cpus']} cores ({environment['platform']}), "
        f"{results[0]['dtype']}, jax {versions['jax']}, diffrax {versions['diffrax']}, "
        f"{what}, commit {', '.join(commits)}."
    )


# Tables of what was run several times: the results that they are made from.
_SEVERAL: dict[str, tuple[Callable[[dict[str, Any]], str], str]] = {
    "cnf": (_cnf, "cnf"),
    "two_body_hnn": (_two_body_hnn, "two_body_hnn"),
    "kernels": (_kernels, "kernels"),
    "rnn_speed": (_rnn_speed, "benchmark"),
    "rnn_classifier": (_rnn_classifier, "rnn_classifier"),
    "benchmark": (_benchmark, "benchmark"),
    "goals": (_goals, "benchmark"),
    "training_loops_all": (_training_loops_all, "training_loops"),
}


def _load(name: str) -> dict[str, Any] | None:
    """The results of an experiment, if any; by name where it was run several times."""
    path = _RESULTS / name
    # What was only compiled was measured on no platform.
    path = path if name == "kernels" else path / "cpu"
    if path.is_dir():
        files = sorted(path.glob("*.json"))
        return {file.stem: json.loads(file.read_text()) for file in files}
    path = path.with_suffix(".json")
    return json.loads(path.read_text()) if path.exists() else None


def table_of(name: str) -> str:
    """The table of that name, from the results that are there."""
    source = name if name in _SINGLE else _SEVERAL[name][1]
    results = _load(source)
    if results is None:
        return f"*Not measured yet:* `python -m experiments.{source}`."
    return _single(name, results) if name in _SINGLE else _SEVERAL[name][0](results)


def number_of(name: str) -> str:
    """The number of that name, from the results that are there."""
    write, source = NUMBERS[name]
    results = _load(source)
    assert results is not None
    return write(results)


def filled_in(text: str) -> str:
    """`text` with what stands between the markers replaced."""

    def replace(match: re.Match[str]) -> str:
        kind, name = match["kind"], match["name"]
        found = f"\n\n{table_of(name)}\n\n" if kind == "table" else number_of(name)
        return f"<!-- {kind}: {name} -->{found}<!-- end -->"

    pattern = r"<!-- (?P<kind>table|number): (?P<name>\w+) -->.*?<!-- end -->"
    return re.sub(pattern, replace, text, flags=re.DOTALL)


if __name__ == "__main__":
    for path in PAGES:
        text = filled_in(path.read_text()).encode()
        write_atomically(path, lambda file, text=text: file.write(text))
