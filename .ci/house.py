"""Prints the size of the house, and fails where it is larger than agreed.

python .ci/house.py

Lines of each module, parameters and lines of each function, and the longest chain of
imports below a module. `diffrax.AbstractAdjoint`, `AbstractSolver` and
`AbstractStepSizeController` prescribe the parameters of the functions in `_PRESCRIBED`.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.layering import PACKAGE, depths, modules, rank

# The goal is 6000 lines.
MAX_LINES, MAX_FILE, MAX_FUNCTION, MAX_PARAMETERS = 7570, 300, 50, 10
_PRESCRIBED = {"adapt_step_size", "init", "loop", "step"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def _functions(path: Path) -> Iterator[Function]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, Function):
            yield node


def _num_lines(function: Function) -> int:
    """Without the docstring, which is for users."""
    first, *rest = function.body
    is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    start = first.end_lineno if is_docstring and rest else function.lineno
    return (function.end_lineno or 0) - (start or 0)


def _num_parameters(function: Function) -> int:
    a = function.args
    names = [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def main() -> int:
    """The number of limits that are exceeded."""
    exceeded, total, depth = [], 0, depths()
    print(f"{'module':32} {'lines':>5} {'rank':>4} {'depth':>5} parameters, longest")
    for name, path in modules().items():
        lines = len(path.read_text().splitlines())
        total += lines
        functions = list(_functions(path))
        longest = max(map(_num_lines, functions), default=0)
        parameters = max(map(_num_parameters, functions), default=0)
        row = f"{lines:5} {rank(name):4} {depth[name]:5} {parameters:10} {longest:8}"
        print(f"{name:32} {row}")
        if lines > MAX_FILE:
            exceeded.append(f"{name} has {lines} lines; at most {MAX_FILE}.")
        for f in functions:
            where = f"{path.relative_to(PACKAGE.parent)}:{f.lineno} {f.name}"
            if _num_lines(f) > MAX_FUNCTION:
                exceeded.append(f"{where}: {_num_lines(f)} lines; {MAX_FUNCTION}.")
            if _num_parameters(f) > MAX_PARAMETERS and f.name not in _PRESCRIBED:
                exceeded.append(f"{where}: {_num_parameters(f)} parameters.")
    print(f"{total} lines, at most {MAX_LINES}.")
    if total > MAX_LINES:
        exceeded.append(f"The package has {total} lines; at most {MAX_LINES}.")
    print(*exceeded, sep="\n")
    return len(exceeded)


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
