"""The import graph of the package, read from its source."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "diffrax_deer"

# A package may import from those of lower rank, and from itself. The core, at the root,
# lies between the small matrices below it and what hangs on it.
RANKS = {
    "_linalg": 0,
    "": 1,
    "_distributed": 2,
    "_ode": 2,
    "_recurrence": 2,
    "_adjoint": 3,
    "_advise": 4,
    "__init__": 5,
}
# Without any import from the package: all others may use them.
LEAVES = {"_custom_types", "_defaults", "_diffrax_conventions", "_checks"}


def modules() -> dict[str, Path]:
    """Dotted names within the package, `_ode.quadrature` for example."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[-1] != "__init__" or parts == ("__init__",):
            found[".".join(parts)] = path
    return found


def imports(path: Path) -> list[tuple[int, str]]:
    """Level (number of dots) and dotted name of all that a file imports."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names = [f"{module}.{alias.name}".lstrip(".") for alias in node.names]
            found += [(node.level, name) for name in names]
    return found


def dependencies(name: str) -> set[str]:
    """The modules of the package that this one imports."""
    known, found = modules(), set()
    package = name.split(".")[:-1]
    for level, target in imports(known[name]):
        if level == 0:
            continue
        start = package[: len(package) - level + 1]
        parts = [*start, *target.split(".")]
        # The last part may be what is imported from a module.
        whole, parent = ".".join(parts), ".".join(parts[:-1])
        found.add(whole if whole in known else parent)
    return found


def rank(name: str) -> int:
    """That of its package."""
    if name in LEAVES:
        return -1
    top = name.split(".")[0]
    return RANKS[top] if top in RANKS else RANKS[""]


def depths() -> dict[str, int]:
    """The length of the longest chain of imports below each module.

    Raises `ValueError` where one is a circle.
    """
    below = {name: dependencies(name) for name in modules()}
    found: dict[str, int] = {}
    while len(found) < len(below):
        ready = [n for n in below if n not in found and below[n] <= found.keys()]
        if not ready:
            msg = f"circular imports among {sorted(below.keys() - found.keys())}"
            raise ValueError(msg)
        for name in ready:
            found[name] = max((found[other] + 1 for other in below[name]), default=0)
    return found
