"""Planted faults, each of which the tests have to find.

python -m tests.mutants

Each fault is put into a copy of the repository, where the tests that are named with it
have to fail; without a fault they have to pass there. Prints what happens, and returns
the number of faults that survive and of modules that fail without.
"""

import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

_ROOT = Path(__file__).parents[1]


class Mutant(NamedTuple):
    """`old` in a module of the package is replaced by `new`; `tests` have to fail."""

    module: str
    old: str
    new: str
    tests: str


MUTANTS = [
    Mutant("_prefix", "first, y0[None]", "first, ys[:1]", "test_newton"),
    Mutant("_prefix", "jnp.isnan(x), jnp.inf", "jnp.isnan(x), 0.0", "test_newton"),
    Mutant(
        "_affine_scan", "y = a.matvec(y) + b", "y = a.matvec(y) - b", "test_affine_scan"
    ),
    Mutant(
        "_affine_scan",
        "a_then.matmul(a_first), apply",
        "a_first.matmul(a_then), apply",
        "test_affine_scan",
    ),
    Mutant(
        "_linalg/transitions",
        "Dense(self.entries.T)",
        "Dense(self.entries)",
        "test_affine_scan",
    ),
    Mutant(
        "_linalg/operand_order",
        "axes[middle:] + axes[start:middle]",
        "axes[start:middle] + axes[middle:]",
        "test_operand_order",
    ),
    Mutant("_newton", "window.num_final + 1,", "window.num_final + 2,", "test_newton"),
    Mutant("_method", "jnp.all(finite), optx", "jnp.any(finite), optx", "test_method"),
    Mutant(
        "_gradient",
        "product(masked(v))[0]",
        "product(v)[0]",
        "test_gradient",
    ),
    Mutant(
        "_gradient",
        "moved(jnp.zeros_like(y0_dot), ys_dot)",
        "moved(y0_dot, ys_dot)",
        "test_gradient",
    ),
    Mutant(
        "_solve",
        "jnp.arange(len(ys)) < num_solved, ",
        "jnp.arange(len(ys)) < 0, ",
        "test_gradient",
    ),
    Mutant("_ode/runge_kutta", "row[i] * matrix", "matrix", "test_runge_kutta"),
    Mutant(
        "_ode/single_step",
        "(jnp.array(False), last)",
        "(jnp.array(True), last)",
        "test_single_step",
    ),
    Mutant("_ode/single_step", "is_first | made_jump", "is_first", "test_single_step"),
    Mutant(
        "_ode/solver_step",
        "return bool(jax.tree.leaves(state))",
        "return False",
        "test_single_step",
    ),
    Mutant(
        "_adjoint/window_search",
        "(saved.count <= index)",
        "(saved.count < index)",
        "test_deer_adjoint",
    ),
    Mutant(
        "_adjoint/adaptive_windows",
        "jnp.where(kept, jnp.arange(size), -1)",
        "jnp.arange(size)",
        "test_deer_adjoint",
    ),
    Mutant(
        "_adjoint/adaptive_windows",
        "(t > after) & jnp.any",
        "jnp.any",
        "test_deer_adjoint",
    ),
    Mutant(
        "_ode/grids", "errors ** (1 / order)", "errors ** (-1 / order)", "test_grids"
    ),
    Mutant(
        "_ode/grids", "succeeded, scaled, jnp.inf", "succeeded, scaled, 0", "test_grids"
    ),
    Mutant(
        "_adjoint/events",
        "(old <= 0) & (new > 0)",
        "(old < 0) & (new < 0)",
        "test_events",
    ),
    Mutant(
        "_recurrence/deer_scan",
        "num_solved == length, result",
        "num_solved <= length, result",
        "test_deer_scan",
    ),
]


def passes(mutant: Mutant) -> bool:
    """Whether the tests of a mutant pass."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "repository"
        ignored = shutil.ignore_patterns(".git", ".venv", ".cache", "results", "runs")
        shutil.copytree(_ROOT, copy, ignore=ignored)
        path = copy / "diffrax_deer" / f"{mutant.module}.py"
        text = path.read_text()
        if text.count(mutant.old) != 1:
            msg = f"{mutant.old!r} has to be in {mutant.module} once."
            raise ValueError(msg)
        path.write_text(text.replace(mutant.old, mutant.new))
        tests = [f"tests/{mutant.tests}.py", "-x", "-q", "-n", "0"]
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *tests]
        # In the copy, also where the package is installed from the original.
        environment = {"PYTHONPATH": str(copy), "PATH": "/usr/bin:/bin", "HOME": folder}
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True)
    return done.returncode == 0


def main() -> int:
    """The number of what is not as it should be."""
    one_of_each = {mutant.tests: mutant for mutant in MUTANTS}.values()
    healthy = [mutant._replace(new=mutant.old) for mutant in one_of_each]
    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(passes, healthy + MUTANTS))
    wrong = 0
    for mutant, passed in zip(healthy + MUTANTS, outcomes, strict=True):
        is_right = passed == (mutant.new == mutant.old)
        wrong += not is_right
        word = "passes" if passed else "fails"
        about = f"{word} {mutant.tests}, {mutant.module}: {mutant.new}"
        sys.stdout.write(f"{'' if is_right else 'WRONG: '}{about}\n")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
