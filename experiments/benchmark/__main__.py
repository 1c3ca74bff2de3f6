"""Every claim about speed, measured in one way.

python -m experiments.benchmark

Value and gradient of losses of solutions, and the forward pass alone: neural ordinary
differential equations of several sizes, fits of parameters, a Hamiltonian network, a
normalizing flow, recurrent networks; and work against precision. All methods of a cell
are compiled apart and timed in turns, in one process. An interrupted measurement goes
on with --resume.
"""

from typing import Any

from experiments.benchmark import ceilings, report
from experiments.benchmark.groups import cells_of, measure_cell
from experiments.benchmark.settings import Config
from experiments.common.command_line import run
from experiments.common.measurement import ready
from experiments.common.progress import Progress
from experiments.common.results import head, report as write_report


def main(config: Config) -> dict[str, Any]:
    """Measures, prints and writes the results."""
    config = ready(config)
    progress = Progress(config.out, head("benchmark", config, "float32 and float64"))
    progress.begin(config.resume)
    progress.head["ceilings"] = ceilings.measure(config.smoke)
    for group in config.groups:
        progress.measure(
            cells_of(group, config),
            lambda cell, known, group=group: measure_cell(group, cell, known, config),
        )
    results = progress.results()
    report.draw(config.out, [results])
    write_report(config.out, results, report.tables([results]))
    progress.finish()
    return results


if __name__ == "__main__":
    run(main, Config)
