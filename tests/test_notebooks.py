"""The notebooks run, and what they show is what is committed."""

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


@pytest.mark.slow
@each_notebook
def test_a_notebook_runs_in_a_clean_kernel(path, tmp_path):
    run = "from nbclient.cli import main; main()"
    out = tmp_path / path.name
    command = [sys.executable, "-c", run, str(path), f"--output={out}", "--timeout=240"]
    # Compiled as by users, and not as by the tests.
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    done = subprocess.run(
        command, cwd=_ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    kinds = lambda cell: [output["output_type"] for output in cell["outputs"]]
    assert list(map(kinds, _cells(out))) == list(map(kinds, _cells(path)))


@each_notebook
def test_a_notebook_has_been_run_from_beginning_to_end(path):
    cells = _cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert any(cell["outputs"] for cell in cells)
    for cell in cells:
        assert all(output["output_type"] != "error" for output in cell["outputs"])
