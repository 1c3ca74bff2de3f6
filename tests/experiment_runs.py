"""Experiments as processes: run, killed, resumed."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from experiments.common.checkpoint import load_checkpoint

ROOT = Path(__file__).parents[1]


def command(module: str, *arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", f"experiments.{module}", *map(str, arguments)]


def execute(module: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(module, *arguments),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def outcome(results: dict[str, Any]) -> dict[str, Any]:
    """What must not depend on when it was computed."""
    return {
        name: (
            solver["losses"],
            [evaluation | {"seconds": None} for evaluation in solver["evaluations"]],
        )
        for name, solver in results["solvers"].items()
    }


def _num_steps(checkpoint: Path) -> int:
    header, _ = load_checkpoint(checkpoint, like=None)
    return min(len(record["losses"]) for record in header["records"].values())


def check_resumption(
    module: str, folder: Path, *arguments: str | Path, after: int = 0
) -> None:
    """A run that is killed and resumed has to equal one that is not."""
    folders = [folder / "straight", folder / "killed"]
    straight, killed = [(*arguments, "--out", out) for out in folders]
    finished = execute(module, *straight)
    assert finished.returncode == 0, finished.stderr

    process = subprocess.Popen(
        command(module, *killed),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    checkpoint = folders[1] / "checkpoint.eqx"
    while not checkpoint.exists() or _num_steps(checkpoint) < after:
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(random.random() * 0.3)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (folders[1] / "results.json").exists()

    resumed = execute(module, *killed, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "Resuming after step" in resumed.stdout

    results = [json.loads((f / "results.json").read_text()) for f in folders]
    assert outcome(results[0]) == outcome(results[1])
    assert len(results[1]["resumed_at"]) == 1
