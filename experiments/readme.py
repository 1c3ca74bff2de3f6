"""Writes the tables of the READMEs from the results in `experiments/results/`.

python -m experiments.readme
"""

import json
import re
from pathlib import Path
from typing import Any

from experiments import (
    adaptive,
    cnf,
    convergence,
    deer_adjoint,
    iterates,
    long_horizon,
    neural_ode_classifier,
    quadratures,
    rnn_accuracy,
    rnn_classifier,
    rnn_speed,
    two_body_hnn,
)
from experiments.benchmark import goals, reading, report
from experiments.common.files import write_atomically
from experiments.common.results import comparison_table

_ROOT = Path(__file__).parents[1]
README = _ROOT / "README.md"
READMES = (README, _ROOT / "experiments" / "README.md")


def _neural_ode_classifier(results: dict[str, Any]) -> str:
    config = results["config"]
    table = comparison_table(results, [neural_ode_classifier.METRIC])
    what = (
        f"seed {config['seed']}, {config['steps']} steps, batch {config['batch_size']}"
    )
    return _measured(table, what, results)


def _adaptive(results: dict[str, Any]) -> str:
    config = results["config"]
    what = f"tolerance {config['tolerance']:g}, {config['repeats']} repeats"
    return _measured(adaptive.table(results), what, results)


def _deer_adjoint(results: dict[str, Any]) -> str:
    config = results["config"]
    what = (
        f"{config['num_steps']} steps, {config['num_save_times']} save times, "
        f"batch {config['batch_size']}, gradients equal to "
        f"{results['gradient_difference']:.0e}"
    )
    return _measured(deer_adjoint.table(results), what, results)


def _iterates(results: dict[str, Any]) -> str:
    config = results["config"]
    what = f"{config['num_steps']} steps of Dopri5"
    return _measured(iterates.table(results), what, results)


def _convergence(results: dict[str, Any]) -> str:
    what = "tolerance of the iteration 2e-12"
    return _measured(convergence.table(results), what, results)


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
    config = first["config"]
    what = (
        f"{config['steps']} steps, batch {config['batch_size']}, {config['num_times']} "
        f"times, {config['num_steps']} steps of DEER"
    )
    tables = (
        comparison_table(first, two_body_hnn.METRICS),
        two_body_hnn.table_of_losses(results),
    )
    return _measured("\n\n".join(tables), what, *results.values())


def _long_horizon(results: dict[str, Any]) -> str:
    config = results["config"]
    what = (
        f"{config['num_steps']} steps, {config['num_observations']} observations, "
        f"width {config['width']}, {config['repeats']} repeats, gradients equal to "
        f"{results['gradient_difference']:.0e}"
    )
    return _measured(long_horizon.table(results), what, results)


def _quadratures(results: dict[str, Any]) -> str:
    config = results["config"]
    what = (
        f"{config['num_steps']} steps, width {config['width']}, {config['repeats']} "
        f"repeats, gradients equal to {results['gradient_difference']:.0e}"
    )
    return _measured(quadratures.table(results), what, results)


def _rnn_speed(results: dict[str, Any]) -> str:
    recurrent = results["gru"]
    table = rnn_speed.table(rnn_speed.gradients_of(recurrent, num_steps=10_000))
    return _measured(
        table, f"at most {recurrent['config']['repeats']} repeats", recurrent
    )


def _rnn_accuracy(results: dict[str, Any]) -> str:
    return _measured(rnn_accuracy.table(results), "Newton's method", results)


def _rnn_classifier(results: dict[str, Any]) -> str:
    tables = "\n\n".join(
        f"{name}:\n\n{rnn_classifier.table(each)}" for name, each in results.items()
    )
    settings = [
        f"{name}: {each['config']['steps']} steps, {each['config']['num_layers']} "
        f"layers of {each['config']['hidden_size']} units"
        for name, each in results.items()
    ]
    first = next(iter(results.values()))
    what = f"batch {first['config']['batch_size']}, {'; '.join(settings)}"
    return _measured(tables, what, *results.values())


def _benchmark(results: dict[str, Any]) -> str:
    cells = reading.cells_of(results.values())
    headline = [
        cell
        for cell in cells
        if cell["mode"] == "gradient" and report.is_headline(cell)
    ]
    names = ("dopri5", "dopri5_pid", "scan_rk45", "deer", "deer_newton_warm")
    tables = [report.grid_table(headline, names), report.matched_table(cells)]
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


# Tables of results that have another name.
_SOURCES = {"rnn_speed": "benchmark", "goals": "benchmark"}
_TABLES = {
    "neural_ode_classifier": _neural_ode_classifier,
    "adaptive": _adaptive,
    "deer_adjoint": _deer_adjoint,
    "iterates": _iterates,
    "convergence": _convergence,
    "quadratures": _quadratures,
    "cnf": _cnf,
    "two_body_hnn": _two_body_hnn,
    "long_horizon": _long_horizon,
    "rnn_speed": _rnn_speed,
    "rnn_accuracy": _rnn_accuracy,
    "rnn_classifier": _rnn_classifier,
    "benchmark": _benchmark,
    "goals": _goals,
}


def _load(name: str) -> dict[str, Any]:
    """The results of an experiment; by name where it was run several times."""
    path = _ROOT / "experiments" / "results" / name / "cpu"
    if path.is_dir():
        files = sorted(path.glob("*.json"))
        return {file.stem: json.loads(file.read_text()) for file in files}
    return json.loads(path.with_suffix(".json").read_text())


def filled_in(text: str) -> str:
    """`text` with what stands between the markers of each table replaced."""

    def replace(match: re.Match[str]) -> str:
        name = match["name"]
        table = _TABLES[name](_load(_SOURCES.get(name, name)))
        return f"<!-- table: {name} -->\n\n{table}\n\n<!-- end -->"

    pattern = r"<!-- table: (?P<name>\w+) -->.*?<!-- end -->"
    return re.sub(pattern, replace, text, flags=re.DOTALL)


if __name__ == "__main__":
    for path in READMES:
        text = filled_in(path.read_text()).encode()
        write_atomically(path, lambda file, text=text: file.write(text))
