"""Experiments run as processes, and killed."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from experiments.common.checkpoint import load_checkpoint

ROOT = Path(__file__).parents[1]


def execute(module: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs a module to its end."""
    return subprocess.run(
        _command(module, *arguments),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def kill_in_training(module: str, *arguments: str | Path, folder: Path) -> None:
    """Runs a module until its run in `folder` has been trained a little, and kills it.

    The folder is left with a checkpoint and no results.
    """
    process = subprocess.Popen(
        _command(module, *arguments),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not _num_steps(folder / "checkpoint.eqx"):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (folder / "results.json").exists()


def outcome(results: Path) -> dict[str, Any]:
    """What of a run's results must not depend on when they were computed."""
    return {
        name: (
            solver["losses"],
            [evaluation | {"seconds": None} for evaluation in solver["evaluations"]],
        )
        for name, solver in json.loads(results.read_text())["solvers"].items()
    }


def _command(module: str, *arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", module, *map(str, arguments)]


def _num_steps(checkpoint: Path) -> int:
    if not checkpoint.exists():
        return 0
    header, _ = load_checkpoint(checkpoint, like=None)
    return min(len(record["losses"]) for record in header["records"].values())
