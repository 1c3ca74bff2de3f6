"""Every public name is in the reference; that each has a docstring, ruff checks."""

import inspect
import re
from pathlib import Path

import diffrax_deer

_PAGES = Path(__file__).parents[1] / "notebooks" / "api"


def test_reference_has_all_public_names():
    text = "".join(page.read_text() for page in _PAGES.glob("*.md"))
    documented = re.findall(r"^::: diffrax_deer\.(\w+)$", text, flags=re.MULTILINE)
    public = [
        name
        for name, value in vars(diffrax_deer).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    ]
    assert sorted(documented) == sorted(public)
