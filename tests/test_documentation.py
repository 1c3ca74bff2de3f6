"""Every public name is in the reference, and every snippet of every page runs.

That each name has a docstring, ruff checks.
"""

import inspect
import re
from pathlib import Path

import numpy as np
import pytest
import scipy.integrate

import diffrax_deer

_ROOT = Path(__file__).parents[1]
_PAGES = [_ROOT / "README.md", *sorted((_ROOT / "notebooks").glob("*.md"))]
_SNIPPETS = {
    path: snippets
    for path in _PAGES
    if (snippets := re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL))
}


def _run(path: Path) -> dict[str, object]:
    namespace: dict[str, object] = {}
    for snippet in _SNIPPETS[path]:
        exec(compile(snippet, str(path), "exec"), namespace)
    return namespace


def test_reference_has_all_public_names():
    pages = (_ROOT / "notebooks" / "api").glob("*.md")
    text = "".join(page.read_text() for page in pages)
    documented = re.findall(r"^::: diffrax_deer\.(\w+)$", text, flags=re.MULTILINE)
    public = [
        name
        for name, value in vars(diffrax_deer).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    ]
    assert sorted(documented) == sorted(public)


@pytest.mark.parametrize("path", _SNIPPETS, ids=lambda path: path.stem)
def test_snippets_print_what_the_page_says(
    path: Path, capsys: pytest.CaptureFixture[str]
):
    _run(path)
    pattern = r"^ *print\(.*\)  # (.*)$"
    said = [re.findall(pattern, each, re.MULTILINE) for each in _SNIPPETS[path]]
    assert capsys.readouterr().out.splitlines() == [
        line for each in said for line in each
    ]


def test_readme_solves_its_equation():
    van_der_pol = lambda t, y: [y[1], (1 - y[0] ** 2) * y[1] - y[0]]
    expected = scipy.integrate.solve_ivp(
        van_der_pol, (0.0, 10.0), [2.0, 0.0], rtol=1e-10, atol=1e-10
    )
    found = np.asarray(_run(_ROOT / "README.md")["sol"].ys[-1])  # pyright: ignore[reportAttributeAccessIssue]
    np.testing.assert_allclose(found, expected.y[:, -1], atol=1e-6)
