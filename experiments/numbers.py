"""The numbers in the text of the pages, by name.

Each is made from the results of one experiment. `experiments.readme` writes them.
"""

from collections.abc import Callable, Sequence
from typing import Any

from experiments import rnn_speed
from experiments.benchmark import reading, report
from experiments.common.affordable import speed_up
from experiments.common.timing import quartiles

Number = Callable[[dict[str, Any]], str]


def _between(ratios: Sequence[float]) -> str:
    """The smallest and the largest of some speed-ups."""
    low, high = (f"{ratio:.2g}×" for ratio in (min(ratios), max(ratios)))
    return low if low == high else f"{low} to {high}"


def _loops(results: dict[str, Any], method: str) -> list[Any]:
    cells = [cell["methods"] for cell in results["loops"]]
    return [speed_up(each, method, "as it is") for each in cells if method in each]


def _mean_of_loops(method: str) -> Number:
    return lambda results: f"{reading.geometric_mean(_loops(results, method)):.2f}×"


def _range_of_loops(method: str) -> Number:
    return lambda results: _between(_loops(results, method))


def _stiff_loop(results: dict[str, Any]) -> str:
    stiff = [cell for cell in results["loops"] if cell["loop"] == "kinetics"]
    return _between(_loops({"loops": stiff}, "DEERSolver, DEERAdjoint"))


def _range_of_cells(over: str, *, is_fit: bool) -> Number:
    def write(results: dict[str, Any]) -> str:
        cells = report.headlines(reading.cells_of(results.values()))
        chosen = [c for c in cells if (c["workload"] != "mlp") == is_fit]
        return _between([ratio for ratio, _ in reading.ratios(chosen, "deer", over)])

    return write


def _range_of_recurrent(batch_size: int) -> Number:
    def write(results: dict[str, Any]) -> str:
        found = rnn_speed.gradients_of(results["gru"], num_steps=10_000)["cells"]
        cells = reading.select(found, batch_size=batch_size)
        return _between([ratio for ratio, _ in reading.ratios(cells, "deer")])

    return write


def _range_of_flows(results: dict[str, Any]) -> str:
    medians = [
        {name: solver["timing"]["step_seconds_median"] for name, solver in each.items()}
        for each in (result["solvers"] for result in results.values())
    ]
    return _between([each["dopri5"] / each["deer"] for each in medians])


def _save_times(results: dict[str, Any]) -> str:
    first, second, *_ = results["methods"].values()
    return _between([quartiles(first["seconds"])[1] / quartiles(second["seconds"])[1]])


def _iterations(results: dict[str, Any]) -> str:
    counts = [
        problem["runs"]["default"]["iterations"]
        for problem in results["problems"].values()
    ]
    most = sum(count <= 12 for count in counts)
    return f"at most 12 in {most} of {len(counts)}"


# Numbers in the text: the results that they are made from.
NUMBERS: dict[str, tuple[Number, str]] = {
    "loops_adjoint": (_mean_of_loops("DEERSolver, DEERAdjoint"), "training_loops"),
    "loops_grid": (_mean_of_loops("fixed grid"), "training_loops"),
    "loops_grid_range": (_range_of_loops("fixed grid"), "training_loops"),
    "loops_stiff": (_stiff_loop, "training_loops"),
    "fits": (_range_of_cells("dopri5", is_fit=True), "benchmark"),
    "fits_by_hand": (_range_of_cells("scan_rk45", is_fit=True), "benchmark"),
    "networks": (_range_of_cells("dopri5", is_fit=False), "benchmark"),
    "networks_by_hand": (_range_of_cells("scan_rk45", is_fit=False), "benchmark"),
    "flows": (_range_of_flows, "cnf"),
    "gru_one": (_range_of_recurrent(batch_size=1), "benchmark"),
    "gru_batch": (_range_of_recurrent(batch_size=16), "benchmark"),
    "save_times": (_save_times, "deer_adjoint"),
    "iterations": (_iterations, "convergence"),
}
