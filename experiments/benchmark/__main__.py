"""Every claim about speed, measured in one way.

python -m experiments.benchmark

Value and gradient of losses of solutions, and the forward pass alone: neural ordinary
differential equations of several sizes, fits of parameters, a Hamiltonian network, a
normalizing flow, recurrent networks; and work against precision. All methods of a cell
are compiled apart and timed in turns, in one process. An interrupted measurement goes
on with --resume.
"""

import time
from typing import Any

import jax

from experiments.benchmark import ceilings, report
from experiments.benchmark.groups import cells_of, measure_cell
from experiments.benchmark.reading import describe
from experiments.benchmark.settings import Config
from experiments.common.command_line import run
from experiments.common.progress import Progress
from experiments.common.results import head, report as write_report


def main(config: Config) -> dict[str, Any]:
    """Measures, prints and writes the results."""
    config.check()
    config = config.reduced() if config.smoke else config
    progress = Progress(config.out, head("benchmark", config, "float32 and float64"))
    progress.begin(config.resume)
    progress.head["ceilings"] = ceilings.measure(config.smoke)
    for group in config.groups:
        for cell in cells_of(group, config):
            if any(cell.items() <= known.items() for known in progress.cells):
                continue
            begin = time.perf_counter()
            progress.add(measure_cell(group, cell, progress.cells, config))
            # Compiled functions of one cell are of no use to the next, but take memory.
            jax.clear_caches()
            seconds = time.perf_counter() - begin
            print(f"{describe(cell)}: done in {seconds:.0f} s", flush=True)
    results = progress.results()
    report.draw(config.out, [results])
    write_report(config.out, results, report.tables([results]))
    progress.finish()
    return results


if __name__ == "__main__":
    run(main, Config)
