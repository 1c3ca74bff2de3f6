"""What may import what, and what must not happen on import."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import diffrax_deer

_ROOT = Path(__file__).parents[1]
_PACKAGE = _ROOT / "diffrax_deer"

# Each module may import from those before it only.
_LAYERS = [
    "_custom_types",
    "_batch",
    "_platform",
    "_matrix_functions",
    "_causal",
    "_affine_scan",
    "_matrix_free",
    "_checks",
    "_linearization",
    "_blocks",
    "_predictor",
    "_newton",
    "_forward",
    "_implicit",
    "_deer_solve",
    "_runge_kutta",
    "_dataflow",
    "_step_map",
    "_carry",
    "_deer_scan",
    "_recurrent",
    "_exponential",
    "_quadrature",
    "_trajectory",
    "_interpolation",
    "_controller",
    "_solver",
    "_events",
    "_windows",
    "_together",
    "_successive",
    "_saving",
    "_adjoint",
    "_measurement",
    "_cost_model",
    "_advice",
    "_advise",
]

_MODULES = sorted(path.stem for path in _PACKAGE.rglob("*.py"))


def _imports(path: Path) -> list[tuple[int, str]]:
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


def test_every_module_has_a_layer():
    assert len(_MODULES) > 1
    assert set(_MODULES) <= {"__init__", *_LAYERS}


@pytest.mark.parametrize("module", [m for m in _MODULES if m in _LAYERS])
def test_a_module_imports_from_lower_layers_only(module):
    lower = _LAYERS[: _LAYERS.index(module)]
    for level, name in _imports(_PACKAGE / f"{module}.py"):
        assert level <= 1
        if level == 1:
            assert name.split(".")[0] in lower
        # Its own package goes by relative imports, so that nothing escapes this test.
        assert level > 0 or name.split(".")[0] != "diffrax_deer"


def test_private_parts_of_jax_are_left_alone():
    # As text, hence also as an attribute; in two parts, or this line would be found.
    forbidden = "jax." + "_src"
    folders = [_ROOT / name for name in ("diffrax_deer", "experiments", "tests")]
    files = [path for folder in folders for path in folder.rglob("*.py")]
    files += (_ROOT / "notebooks").rglob("*.ipynb")
    assert len(files) > len(_MODULES)
    for path in files:
        assert forbidden not in path.read_text(), path
        if path.suffix == ".py":
            names = [name for level, name in _imports(path) if level == 0]
            assert not [name for name in names if name.startswith(forbidden)], path


def test_importing_the_package_changes_no_setting_of_jax():
    # In a process of its own: here the tests have already changed settings.
    code = (
        "import jax, diffrax, optimistix, lineax\n"
        "before = dict(jax.config.values)\n"
        "import diffrax_deer\n"
        "assert before\n"
        "assert before == dict(jax.config.values)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=_ROOT, check=True)


def _public() -> list[str]:
    names = [name for name in vars(diffrax_deer) if not name.startswith("_")]
    return [n for n in names if not inspect.ismodule(getattr(diffrax_deer, n))]


@pytest.mark.parametrize("name", _public())
def test_every_public_name_is_documented(name):
    # Not `inspect.getdoc`, which would take the docstring of a parent class.
    public = getattr(diffrax_deer, name)
    own = vars(public).get("__doc__") if inspect.isclass(public) else public.__doc__
    assert (own or "").strip()
