"""Every public name is in the reference, and says what it is."""

import inspect
import re

import diffrax_deer
from experiments.readme import README

_PAGES = (README.parent / "notebooks" / "api").glob("*.md")
_PUBLIC = [name for name in vars(diffrax_deer) if not name.startswith("_")]


def test_the_reference_has_all_public_names():
    text = "".join(page.read_text() for page in _PAGES)
    documented = re.findall(r"^::: diffrax_deer\.(\w+)$", text, flags=re.MULTILINE)
    modules = {name for name in _PUBLIC if inspect.ismodule(vars(diffrax_deer)[name])}
    assert sorted(documented) == sorted(set(_PUBLIC) - modules)


def test_public_names_have_docstrings():
    for name in _PUBLIC:
        assert inspect.getdoc(vars(diffrax_deer)[name]), name
