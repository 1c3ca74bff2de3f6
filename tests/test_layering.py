"""What may import what, and what must not happen on import."""

import inspect
import subprocess
import sys
from pathlib import Path

import diffrax_deer

from .layering import LEAVES, dependencies, depths, imports, modules, rank

_ROOT = Path(__file__).parents[1]


def test_modules_import_from_no_package_of_higher_rank():
    known = modules()
    for module in known:
        for other in dependencies(module):
            where = f"{module} imports {other}"
            assert other in known, where
            assert rank(other) <= rank(module), where
            # Packages of the same rank know nothing of each other.
            same = other.split(".")[0] == module.split(".")[0]
            assert same or rank(other) < rank(module) or rank(module) <= 1, where


def test_imports_are_not_circular():
    assert max(depths().values()) > 0


def test_leaves_import_only_other_leaves():
    for module in LEAVES:
        assert dependencies(module) <= LEAVES


def test_package_imports_itself_by_relative_names_only():
    for path in modules().values():
        names = [name for level, name in imports(path) if level == 0]
        assert not [name for name in names if name.split(".")[0] == "diffrax_deer"]


def test_only_the_defaults_ask_for_platform_or_batch():
    for name, path in modules().items():
        text = path.read_text()
        asks = "default_backend" in text or "custom_vmap" in text
        assert not asks or name == "_defaults"


def test_private_parts_of_jax_are_left_alone():
    # As text, hence also as an attribute; in two parts, or this line would be found.
    forbidden = "jax." + "_src"
    folders = [_ROOT / name for name in ("diffrax_deer", "experiments", "tests")]
    files = [path for folder in folders for path in folder.rglob("*.py")]
    files += (_ROOT / "notebooks").rglob("*.ipynb")
    assert len(files) > len(modules())
    for path in files:
        assert forbidden not in path.read_text(), path
        if path.suffix == ".py":
            names = [name for level, name in imports(path) if level == 0]
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


def test_every_public_name_is_documented():
    for name in _public():
        # Not `inspect.getdoc`, which would take the docstring of a parent class.
        public = getattr(diffrax_deer, name)
        own = vars(public).get("__doc__") if inspect.isclass(public) else public.__doc__
        assert (own or "").strip(), name
