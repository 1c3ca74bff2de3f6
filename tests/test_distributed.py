"""The training over two processes: killed, and resumed with the same losses."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("orbax.checkpoint", reason="the group `distributed`")

_ROOT = Path(__file__).parents[1]


def _train(folder: Path, problem: str, **options: Any) -> tuple[list[float], str]:
    options = dict(num_steps=256, train_steps=9, every=3) | options
    words = [f"--{name.replace('_', '-')}={x}" for name, x in options.items()]
    words += [f"--problem={problem}", f"--folder={folder}"]
    command = [sys.executable, "-m", "experiments.distributed", *words]
    run = dict(cwd=_ROOT, capture_output=True, text=True, timeout=280)
    done: Any = subprocess.run(command, **run)  # pyright: ignore
    assert done.returncode == 0, done.stdout + done.stderr
    losses = json.loads((folder / "losses.json").read_text())
    assert list(losses) == [str(i) for i in range(options["train_steps"])]
    return list(losses.values()), done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("problem", ["classifier", "ode"])
def test_training_goes_on_after_a_process_was_killed(problem, tmp_path):
    expected, _ = _train(tmp_path / "whole", problem)
    assert expected[-1] < expected[0]
    losses, out = _train(tmp_path / "killed", problem, kill_at=5)
    assert "a process has died" in out and "from step 4" in out
    np.testing.assert_allclose(losses, expected, rtol=1e-10)
    # The rest in one process instead of two.
    _train(tmp_path / "fewer", problem, train_steps=5)
    losses, out = _train(tmp_path / "fewer", problem, processes=1)
    assert "from step 4" in out
    np.testing.assert_allclose(losses, expected, rtol=1e-10)
