"""What the README shows is what the code does and what was measured."""

import re

import numpy as np
import pytest
import scipy.integrate

from experiments.readme import README, READMES, filled_in


@pytest.mark.parametrize("path", READMES, ids=["main", "experiments"])
def test_every_table_is_written_from_results(path):
    text = path.read_text()
    assert "<!-- table: " in text
    assert filled_in(text) == text


@pytest.mark.parametrize("path", READMES, ids=["main", "experiments"])
def test_links_lead_somewhere(path):
    prose = re.sub(r"`[^`]*`", "", path.read_text())
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", prose):
        name, _, section = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        if section:
            heads = re.findall(r"^#+ (.*)$", target.read_text(), flags=re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", head.lower()) for head in heads]
            assert section in [slug.replace(" ", "-") for slug in slugs], link


def test_example_runs(capsys: pytest.CaptureFixture[str]):
    examples = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert examples
    namespace: dict[str, object] = {}
    for example in examples:
        exec(compile(example, str(README), "exec"), namespace)
    printed = [float(x) for x in capsys.readouterr().out.strip("[] \n").split()]
    van_der_pol = lambda t, y: [y[1], (1 - y[0] ** 2) * y[1] - y[0]]
    solution = scipy.integrate.solve_ivp(
        van_der_pol, (0.0, 10.0), [2.0, 0.0], rtol=1e-10, atol=1e-10
    )
    np.testing.assert_allclose(printed, solution.y[:, -1], atol=1e-6)
