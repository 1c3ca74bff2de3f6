"""What the README shows is what the code does and what was measured."""

import re

import pytest

from experiments.readme import README, filled_in


def test_every_table_is_written_from_results():
    text = README.read_text()
    assert "<!-- table: neural_ode_classifier -->" in text
    assert filled_in(text) == text


def test_the_example_runs(capsys: pytest.CaptureFixture[str]):
    examples = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert examples
    namespace: dict[str, object] = {}
    for example in examples:
        exec(compile(example, str(README), "exec"), namespace)
    iterations, residual = capsys.readouterr().out.split()
    assert 1 < int(iterations) < 40
    assert float(residual) < 1e-11
