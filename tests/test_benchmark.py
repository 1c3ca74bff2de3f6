import copy
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import readme, thresholds
from experiments.benchmark import (
    gate,
    goals,
    groups,
    matched,
    measure,
    reading,
    report,
    settings,
    workloads,
)
from experiments.benchmark.__main__ import main
from experiments.benchmark.matching import matching_count, matching_tolerance
from experiments.common import hand_written
from experiments.common.affordable import reason_to_skip, too_large, too_slow
from experiments.common.errors import ExperimentError
from experiments.common.problems import PROBLEMS
from experiments.common.solvers import METHODS
from experiments.common.workload import make_function

from .experiment_runs import ROOT, execute

_MLP = {
    "workload": "mlp",
    "mode": "gradient",
    "dim": 2,
    "width": 32,
    "batch_size": 1,
    "num_steps": 128,
}


def _is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


# What is compared


def test_steps_by_hand_are_those_of_diffrax():
    with jax.enable_x64(True):
        cell = {"workload": "fitzhugh_nagumo", "batch_size": 1, "num_steps": 400}
        workload = workloads.make(cell).after_one_step()
        arguments = workload.params, workload.y0s, None
        expected, found = (
            make_function(METHODS[name], "gradient", workload)(*arguments)
            for name in ("dopri5_step_to", "scan_rk45")
        )
        assert found.ys.shape == (1, 100, 2)
        np.testing.assert_allclose(found.ys, expected.ys, rtol=1e-11)
        np.testing.assert_allclose(found.gradient, expected.gradient, rtol=1e-9)


def test_all_steps_at_once():
    field = lambda t, y, rate: (-rate * y[0], jnp.cos(t) * y[0])
    y0 = jnp.float32(1.0), jnp.float32(0.0)
    ys = hand_written.trajectory(field, 1.0, 0.0, 8, y0, 0.5)
    last = hand_written.final(field, 1.0, 0.0, 8, y0, 0.5)
    befores = jax.tree.map(lambda y, ys: jnp.append(y, ys[:-1]), y0, ys)
    found = hand_written.all_steps(field, 1.0, 0.0, befores, 0.5)
    for one, each, end in zip(found, ys, last, strict=True):
        np.testing.assert_allclose(one, each, rtol=1e-6)
        np.testing.assert_allclose(end, each[-1], rtol=1e-6)
    np.testing.assert_allclose(last[0], math.exp(0.5), rtol=1e-6)


@pytest.mark.parametrize("workload", ["two_body_hnn", "cnf"])
def test_workloads_of_networks(workload):
    sizes = {"width": 4, "depth": 1, "batch_size": 2, "num_steps": 4}
    made = workloads.make({"workload": workload} | sizes)
    ys = jax.vmap(made.solve_by_hand, in_axes=(0, None))(made.y0s, made.params)
    assert jnp.isfinite(made.loss(ys))
    assert made.ts is None or made.ts[-1] == made.t1


def test_steps_that_are_too_few():
    with jax.enable_x64(True):
        workload = workloads.make(
            {"workload": "fitzhugh_nagumo", "batch_size": 1, "num_steps": 20}
        )
        with pytest.raises(ExperimentError, match="20 steps are too few"):
            workload.after_one_step()


def test_tolerance_that_matches():
    error_of = lambda tolerance: 10 * tolerance
    tolerance, error = matching_tolerance(error_of, 1.1e-5, 1e-12)
    assert (tolerance, error) == pytest.approx((1e-6, 1e-5))
    # What fails with a loose tolerance, and never gets there.
    error_of = lambda tolerance: math.inf if tolerance > 1e-4 else 1e-3 + tolerance
    tolerance, error = matching_tolerance(error_of, 1e-5, 1e-7)
    assert error == pytest.approx(1e-3, rel=1e-3)
    assert matching_count(lambda count: 1 / count, 0.1, (8, 11, 16)) == 11
    assert matching_count(lambda count: math.nan, 0.1, (8, 11)) is None


# Measurements


@pytest.mark.slow
def test_measured_cell():
    names = ("dopri5", "dopri5_pid", "scan_rk45", "deer_newton_warm", "floor")
    config = settings.Config(methods=names, repeats=2)
    cell = measure.measure(_MLP, [], config)
    entries = cell["methods"]
    assert tuple(entries) == names
    for name, entry in entries.items():
        assert len(entry["seconds"]) == 2
        assert entry["compile_seconds"] > 0
        assert entry["flops"] > 0
        if name not in ("dopri5", "floor"):
            assert entry["gradient_difference"] < 1e-4
            assert entry["error"] < 1e-4
    assert entries["dopri5_pid"]["tolerance"] < 1e-3
    assert 1 <= entries["deer_newton_warm"]["num_iterations"] <= 20
    json.dumps(cell, allow_nan=False)


def test_what_would_take_too_long():
    slow = {"methods": {"deer": {"seconds": [2.0]}, "dopri5": {"seconds": [9.0]}}}
    known = [_MLP | slow, _MLP | {"mode": "forward", "methods": {}}]
    longer = _MLP | {"num_steps": 512}
    found = reason_to_skip("deer", longer, known, 5.0)
    assert found is not None
    assert found["skipped"]["expected_seconds"] == pytest.approx(8.0)
    # Fast enough, never measured, measured elsewhere alone.
    assert reason_to_skip("deer", longer, known, 9.0) is None
    assert reason_to_skip("floor", longer, known, 5.0) is None
    assert reason_to_skip("deer", longer | {"batch_size": 16}, known, 5.0) is None
    # What was left out says what to expect of longer ones, if anything is known.
    left_out = [longer | {"methods": {"deer": found, "paper": too_large("1 GB")}}]
    longest = _MLP | {"num_steps": 1024}
    found = reason_to_skip("deer", longest, left_out, 5.0)
    assert found is not None
    assert found["skipped"]["expected_seconds"] == pytest.approx(16.0)
    assert reason_to_skip("paper", longest, left_out, 5.0) is None


@pytest.mark.slow
def test_work_and_precision():
    names = ("dopri5", "tsit5_pid")
    config = settings.Config(methods=names, repeats=1, smoke=True)
    (cell,) = groups.cells_of("matched", config)
    found = groups.measure_cell("matched", cell, [], config)
    for name in names:
        method = found["methods"][name]
        assert 1e-6 < method["error"] <= found["target"]
        assert len(method["points"]) == 1
        assert len(method["seconds"]) == 1
    assert found["methods"]["dopri5"]["num_steps"] < 100


@pytest.mark.slow
def test_killed_and_resumed(tmp_path):
    out = tmp_path / "run" / "results.json"
    arguments = "--smoke", "--groups", "gru", "--out", out
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.benchmark", *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    unfinished = out.with_suffix(".unfinished.json")
    while not unfinished.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not out.exists()
    resumed = execute("benchmark", *arguments, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    results = json.loads(out.read_text())
    assert results["resumed_at"][0] >= 1
    assert len({reading.identity(cell) for cell in results["cells"]}) == 4
    assert results["ceilings"]["matmul_gflops_float64"] > 0
    assert "GRU, over lax.scan: the worst" in resumed.stdout
    assert not unfinished.exists()
    same = execute("benchmark.gate", out, out.parent)
    assert same.returncode == 0, same.stderr
    assert "0 of 12 speed-ups became worse" in same.stdout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": ()}, "--groups needs at least one value"),
        ({"methods": ("deer",)}, "--methods needs dopri5"),
        ({"sizes": ((2, 0),)}, "--sizes has 2 0. Choose numbers from 1 on"),
        ({"batch_sizes": (1, 1)}, "--batch-sizes .* none twice"),
        ({"steps": (0,)}, "--steps needs at least one number, from 1 on"),
        ({"fit_steps": (250,)}, "--fit-steps has 250. Choose multiples"),
        ({"repeats": 0}, "--repeats is 0. Choose at least 1"),
        ({"cell_seconds": math.nan}, "--cell-seconds is nan. Choose a positive"),
    ],
)
def test_bad_settings(tmp_path, changes, message):
    out = tmp_path / "run" / "results.json"
    with pytest.raises(ExperimentError, match=message):
        main(settings.Config(**changes, out=out))
    assert not out.parent.exists()


# Reports


def _method(milliseconds: float, **more: Any) -> dict[str, Any]:
    seconds = [1e-3 * milliseconds * (1 + 0.01 * k) for k in range(-2, 3)]
    return {"seconds": seconds, "compile_seconds": 2.0} | more


def _results() -> dict[str, Any]:
    known = {"flops": 1e6, "bytes_accessed": 1e6, "gradient_difference": 1e-7}
    timed = {
        "dopri5": _method(30.0),
        "scan_rk45": _method(6.0),
        "deer": _method(5.0, compile_seconds=3.0, **known),
        "deer_newton_warm": _method(2.0, num_iterations=2),
        "floor": _method(1.0, **known),
    }
    cells = [
        _MLP | {"num_steps": num_steps, "methods": copy.deepcopy(timed)}
        for num_steps in (32, 128)
    ]
    cells[0]["methods"]["deer"]["seconds"] = _method(60.0)["seconds"]
    cells[0]["methods"]["deer_newton_warm"] = too_slow(9.0)
    points = [{"error": 10.0**-k, "seconds": [1e-3 * k]} for k in (1, 2)]
    entry = {"num_steps": 64, "error": 1e-7, "points": points}
    compared = {
        "deer": _method(1.0, **entry),
        "paper": _method(30.0, **entry),
        "tsit5_pid": _method(2.0, tolerance=1e-8, error=1e-7, points=points),
    }
    matching = {"workload": "matched", "mode": "gradient", "problem": "two_body"}
    cells.append(matching | {"methods": compared})
    recurrent = {"scan": _method(8.0)} | {
        name: _method(2.0, num_iterations=0, value_difference=0.0)
        for name in ("deer", "deer_sequential", "deer_newton")
    }
    gru = {"workload": "gru", "mode": "gradient", "batch_size": 1, "dim": 4}
    cells.append(gru | {"num_steps": 10_000, "methods": recurrent})
    ceilings = dict.fromkeys(("matmul_gflops_float32", "bandwidth_gigabytes"), 10.0)
    return {
        "cells": cells,
        "ceilings": ceilings,
        "config": {"repeats": 5},
        "dtype": "float32",
        "environment": {
            "versions": {"jax": "1", "diffrax": "2"},
            "num_cpus": 2,
            "platform": "cpu",
            "commit": "abc",
        },
    }


def test_goals():
    cells = _results()["cells"]
    found = {goal.title: (goal, goal.measure(cells)) for goal in goals.GOALS}
    expected = {
        "mlp, batch 1, over Dopri5: the faster of deer and warm": (15.0, True),
        "mlp, batch 1, over Dopri5: deer, cold": (6.0, True),
        "mlp, batch 1, over lax.scan by hand": (1.2, False),
        "all cells, over Dopri5: the worst": (0.5, False),
        "all cells, over Dopri5: geometric mean": (math.sqrt(3.0), False),
        "over the scheme of the paper at an equal error: the worst": (30.0, True),
        "GRU, over lax.scan: the worst": (4.0, True),
        "GRU, 4 units, 10000 steps, batch 1, over lax.scan": (4.0, True),
        "time to compile, relative to Dopri5: the worst": (1.5, False),
    }
    for title, (value, reached) in expected.items():
        goal, measured = found[title]
        assert measured is not None
        assert measured[0] == pytest.approx(value)
        # At the bound itself, rounding decides.
        if value != goal.bound:
            assert goal.is_reached(measured[0]) == reached
    assert found["mlp, batch 16, over Dopri5"][1] is None
    assert goals.table([]).count("not measured") == len(goals.GOALS)


def test_tables():
    results = _results()
    text = report.tables([results])
    assert "128 steps, batch 1, value and gradient" in text
    assert "left out: 9 s expected" in text
    assert "geometric mean 1.73 over 2 cells, the worst 0.50" in text
    assert "deer is faster by" in text
    shown = readme._benchmark({"all": results})
    assert "Measured on 2 cores (cpu)" in shown
    assert "32 steps" in shown


def test_pictures(tmp_path):
    report.draw(tmp_path / "cpu.json", [_results()])
    names = ["cpu.png", "cpu_gru.png", "cpu_work_precision.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert all(_is_png(tmp_path / name) for name in names)
    report.draw(tmp_path / "none.json", [{"cells": []}])
    assert len(list(tmp_path.iterdir())) == 3


# Thresholds


def _gradients(batch_size: int, sequential: float, parallel: float) -> dict[str, Any]:
    methods = {
        "deer_sequential_gradient": _method(sequential),
        "deer_sequential": _method(parallel),
    }
    cell = {"family": "mlp", "dim": 2, "num_steps": 128, "batch_size": batch_size}
    return cell | {"methods": methods}


def test_limits_of_the_parallel_gradient():
    cells = [_gradients(1, 2, 1), _gradients(16, 4, 1), _gradients(64, 1, 8)]
    assert thresholds.largest_parallel(cells) == 4 * 16
    assert thresholds.best_limit(cells) == 4 * 16
    costs = [thresholds.cost(cells, limit) for limit in (0, 4, 64, 256)]
    assert costs == pytest.approx([2, 4 ** (1 / 3), 1, 2])
    # Not the faster one everywhere, but on the whole.
    cells.append(_gradients(16, 1, 1.1))
    assert thresholds.largest_parallel(cells) == 4
    assert thresholds.best_limit(cells) == 4 * 16
    # Never.
    assert thresholds.best_limit([_gradients(1, 1, 2)]) == 0


@pytest.mark.slow
def test_thresholds_smoke(tmp_path, capsys):
    out = tmp_path / "thresholds.json"
    results = thresholds.main(thresholds.Config(smoke=True, out=out))
    assert json.loads(out.read_text()) == results
    assert results["gradient_difference"] < 1e-4
    printed = capsys.readouterr().out
    for word in ("perceptron, 8 steps", "`MAX_PARALLEL_ENTRIES_SCAN`", "associative"):
        assert word in printed


# The gate


def _write(path: Path, results: dict[str, Any]) -> Path:
    path.write_text(json.dumps(results))
    return path


def _changed(name: str, factor: float) -> dict[str, Any]:
    """The results, where a method or all (`""`) take so many times as long."""
    results = _results()
    for cell in results["cells"]:
        for each, method in cell["methods"].items():
            if "seconds" in method and name in ("", each):
                method["seconds"] = [factor * s for s in method["seconds"]]
    return results


def test_gate(tmp_path, capsys):
    old = _write(tmp_path / "old.json", _results())
    compare = lambda new: gate.main(gate.Config(old, _write(tmp_path / "new", new)))
    # The paper's cell has no baseline.
    assert compare(_changed("deer", 1.5)) == 3
    assert "slower: mlp, D = 2" in capsys.readouterr().out
    assert compare(_changed("deer", 1.15)) == 0
    assert compare(_changed("deer", 0.5)) == 0
    assert compare(_changed("", 3.0)) == 0
    # Slower, but no more than one measurement differs from the next.
    noisy, factors = _results(), (0.9, 0.9, 1.5, 1.5, 1.5)
    for cell in noisy["cells"]:
        if "deer" in cell["methods"]:
            seconds = cell["methods"]["deer"]["seconds"]
            cell["methods"]["deer"]["seconds"] = [
                factor * s for factor, s in zip(factors, seconds, strict=True)
            ]
    assert compare(noisy) == 0
    fewer = _results()
    del fewer["cells"][0]
    capsys.readouterr()
    assert compare(fewer) == 0
    assert "only in the old measurement: mlp" in capsys.readouterr().out


def test_gate_without_results(tmp_path):
    with pytest.raises(ExperimentError, match="no results"):
        gate.main(gate.Config(tmp_path, tmp_path))
    with pytest.raises(ExperimentError, match="does not hold results"):
        gate.main(gate.Config(_write(tmp_path / "a.json", {}), tmp_path))
    with pytest.raises(ExperimentError, match="--tolerance is 2"):
        gate.main(gate.Config(tmp_path, tmp_path, 2.0))


def test_all_that_is_compared_is_in_the_registry():
    names = {*matched.COMPARED, *measure.EVERYWHERE, *settings.Config().methods}
    assert names <= METHODS.keys()
    assert set(matched.CHOSEN) <= PROBLEMS.keys()
