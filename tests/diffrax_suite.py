"""diffrax's own test suite, with the solver swapped.

python -m tests.diffrax_suite PATH_OF_CHECKOUT [--swap solver|adjoint|newton] [MODULES]

Runs the tests of a checkout of diffrax's repository, of the tag of the version that is
installed, with the packages installed here. In each call of `diffrax.diffeqsolve` with
a solver `S()` of deterministic equations it is, for

- `solver`: `DEERSolver(S())`;
- `adjoint`: that, with `DEERAdjoint()` in place of the default adjoint;
- `newton`: `DEERSolver(S(), num_steps=1, method=Newton())`, and that adjoint; solvers
    with a memory stay as they are in `adjoint`.

What fails is run again without the swap. Prints how many tests have passed, and how
many of them did swap a solver; what fails upstream, too; and what fails only here, with
the reason where it is known. Returns the number of failures without one.

`MODULES` are names such as `test_event`; without, all that call `diffeqsolve`.
"""

import collections
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

import diffrax
import tyro

import diffrax_deer as deer
from diffrax_deer._checks import check_noise, check_step_map

Swap = Literal["none", "solver", "adjoint", "newton"]

# The beginning of a test's name, and why it cannot pass. `notebooks/failures.md` has to
# say so, too.
EXPLAINED: dict[str, str] = {}

# A test that takes longer counts as failed.
_SECONDS = 240


class _Plugin:
    """Swaps, and writes down how each test ends and whether it has used the swap."""

    def __init__(self, swap: Swap, path: Path):
        self.swap, self.path, self.num_swaps = swap, path, 0
        self.diffeqsolve = diffrax.diffeqsolve
        diffrax.diffeqsolve = self.swapped

    def swapped(self, terms: Any, solver: Any, *args: Any, **kwargs: Any) -> Any:
        """`diffrax.diffeqsolve`."""
        inner, solver = solver, self.solver(terms, solver)
        if solver is not inner:
            self.num_swaps += 1
            default = diffrax.RecursiveCheckpointAdjoint
            is_default = type(kwargs.get("adjoint", default())) is default
            if self.swap != "solver" and is_default:
                kwargs["adjoint"] = deer.DEERAdjoint()
        return self.diffeqsolve(terms, solver, *args, **kwargs)

    def solver(self, terms: Any, solver: Any) -> Any:
        """`solver` swapped, if it can be."""
        if self.swap == "none" or isinstance(solver, deer.DEERSolver):
            return solver
        try:
            check_noise(terms)
            check_step_map(solver)
        except ValueError:
            return solver
        has_memory = isinstance(
            solver, diffrax.LeapfrogMidpoint | diffrax.ReversibleHeun
        )
        if self.swap == "newton" and not has_memory:
            return deer.DEERSolver(solver, num_steps=1, method=deer.Newton())
        return deer.DEERSolver(solver)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """One part of a test."""
        if report.when == "call" or report.outcome != "passed":
            name = report.nodeid.split("/")[-1]
            end = name, report.outcome, self.num_swaps > 0
            with self.path.open("a") as file:
                print(json.dumps(end), file=file)
        if report.when == "teardown":
            self.num_swaps = 0


def pytest_configure(config: Any) -> None:
    """Called by pytest, which `_run` tells to load this module."""
    swap: Any = os.environ["DIFFRAX_SUITE_SWAP"]
    path = Path(os.environ["DIFFRAX_SUITE_RESULTS"])
    config.pluginmanager.register(_Plugin(swap, path))


def _run(checkout: Path, swap: Swap, tests: list[str]) -> dict[str, tuple[str, bool]]:
    """How each of `tests` has ended, and whether it has used the swap."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "results")
        path.touch()
        variables = {"SWAP": swap, "RESULTS": str(path)}
        variables = {f"DIFFRAX_SUITE_{name}": x for name, x in variables.items()}
        options = "-q", "--tb=short", "-o", "addopts=", f"--timeout={_SECONDS}"
        plugins = "-p", "tests.diffrax_suite", "-p", "no:cacheprovider"
        command = [sys.executable, "-m", "pytest", *options, *plugins, "-c", os.devnull]
        root = f"--rootdir={checkout}"
        where = [str(checkout / "test" / test) for test in tests]
        # By the parent process, so that a program that crashes does not stop the rest.
        subprocess.run(
            [*command, root, *where], env=os.environ | variables, check=False
        )
        lines = map(json.loads, path.read_text().splitlines())
        return {name: (outcome, used) for name, outcome, used in lines}


def main(
    checkout: tyro.conf.Positional[Path],
    modules: tyro.conf.Positional[tuple[str, ...]] = (),
    /,
    swap: Annotated[Swap, tyro.conf.arg(help="what is swapped")] = "solver",
) -> int:
    """Runs the tests and prints the table."""
    paths = sorted((checkout / "test").glob("test_*.py"))
    names = [path.stem for path in paths if "diffeqsolve(" in path.read_text()]
    results = {}
    for name in modules or names:
        results |= _run(checkout, swap, [f"{name}.py"])
    failed = [name for name, (outcome, _) in results.items() if outcome == "failed"]
    upstream = _run(checkout, "none", failed) if failed else {}
    here = [name for name in failed if upstream.get(name, ("",))[0] != "failed"]
    ends = collections.Counter(results.values())
    print(f"\nSwapped: {swap}.")
    print(f"passed              {ends['passed', True] + ends['passed', False]}")
    print(f"  with the swap     {ends['passed', True]}")
    print(f"failed upstream too {len(failed) - len(here)}")
    print(f"failed here only    {len(here)}")
    unexplained = 0
    for name in here:
        reasons = [why for start, why in EXPLAINED.items() if name.startswith(start)]
        unexplained += not reasons
        print(f"  {name}: {reasons[0] if reasons else 'not explained'}")
    return unexplained


if __name__ == "__main__":
    sys.exit(1 if tyro.cli(main) else 0)
