"""The notebooks run, and what they show is what is committed."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[1]
_NOTEBOOKS = sorted((_ROOT / "notebooks").glob("*.ipynb"))

each_notebook = pytest.mark.parametrize(
    "path", _NOTEBOOKS, ids=[path.stem for path in _NOTEBOOKS]
)


def _cells(path: Path) -> list[dict]:
    cells = json.loads(path.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def _kinds(cell: dict) -> list[str]:
    """The types of the outputs. What is printed may come in several parts."""
    kinds = (output["output_type"] for output in cell["outputs"])
    return [kind for kind, _ in itertools.groupby(kinds)]


@pytest.mark.slow
@each_notebook
def test_notebook_runs_in_a_clean_kernel(path, tmp_path):
    run = "from nbclient.cli import main; main()"
    out = tmp_path / path.name
    command = [sys.executable, "-c", run, str(path), f"--output={out}", "--timeout=240"]
    # As by users, and not as by the tests, which compile faster and raise less.
    environment = os.environ | {
        "EQX_ON_ERROR": "raise",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
    }
    done = subprocess.run(
        command, cwd=_ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert list(map(_kinds, _cells(out))) == list(map(_kinds, _cells(path)))


@each_notebook
def test_notebook_has_been_run_from_beginning_to_end(path):
    cells = _cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert any(cell["outputs"] for cell in cells)
    for cell in cells:
        assert all(output["output_type"] != "error" for output in cell["outputs"])
