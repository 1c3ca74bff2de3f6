"""Experiments as processes: run, killed, resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from experiments.common.checkpoint import load_checkpoint

ROOT = Path(__file__).parents[1]


def _command(module: str, *arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", f"experiments.{module}", *map(str, arguments)]


def _environment(cache: Path | None) -> dict[str, str]:
    if cache is None:
        return dict(os.environ)
    at_once = {"JAX_PERSISTENT_COMPILATION_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return os.environ | at_once | {"JAX_COMPILATION_CACHE_DIR": str(cache)}


def execute(
    module: str, *arguments: str | Path, cache: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs an experiment to its end; compiled functions are kept in `cache`."""
    return subprocess.run(
        _command(module, *arguments),
        cwd=ROOT,
        env=_environment(cache),
        capture_output=True,
        text=True,
        check=False,
    )


def _num_steps(checkpoint: Path) -> int:
    if not checkpoint.exists():
        return 0
    header, _ = load_checkpoint(checkpoint, like=None)
    return min(len(record["losses"]) for record in header["records"].values())


def kill_in_training(
    module: str,
    *arguments: str | Path,
    folder: Path,
    after: int = 1,
    cache: Path | None = None,
) -> None:
    """Runs an experiment until its run in `folder` has made `after` steps.

    The folder is left with a checkpoint and no results.
    """
    process = subprocess.Popen(
        _command(module, *arguments),
        cwd=ROOT,
        env=_environment(cache),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while _num_steps(folder / "checkpoint.eqx") < after:
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


def check_resumption(
    module: str, folder: Path, *arguments: str | Path, after: int = 1
) -> None:
    """A run that is killed and resumed has to equal one that is not."""
    folders = [folder / "straight", folder / "killed"]
    straight, killed = [(*arguments, "--out", out) for out in folders]
    cache = folder / "cache"
    finished = execute(module, *straight, cache=cache)
    assert finished.returncode == 0, finished.stderr

    kill_in_training(module, *killed, folder=folders[1], after=after, cache=cache)
    resumed = execute(module, *killed, "--resume", cache=cache)
    assert resumed.returncode == 0, resumed.stderr
    assert "Resuming after step" in resumed.stdout

    first, second = [folder / "results.json" for folder in folders]
    assert outcome(first) == outcome(second)
    assert len(json.loads(second.read_text())["resumed_at"]) == 1
