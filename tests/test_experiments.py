import dataclasses
import itertools
import json
import signal
import subprocess
import sys
from pathlib import Path

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
import tyro

from experiments import adaptive, grids, iterates
from experiments.common import results as results_module
from experiments.common.checkpoint import (
    check_same_config,
    load_checkpoint,
    save_checkpoint,
)
from experiments.common.errors import ExperimentError
from experiments.common.files import write_atomically
from experiments.common.plotting import plot_training
from experiments.common.results import (
    collect_results,
    comparison_table,
    environment,
    format_table,
    summarize,
    write_json,
)
from experiments.common.run_folder import RunFolder, Start
from experiments.common.solvers import SolverName, solve_options
from experiments.common.training import Record, Run, init_state, train
from experiments.common.work import count_work
from experiments.common.workload import make_function
from experiments.neural_ode_classifier import METRIC, Config, main

from .experiment_runs import ROOT, execute

_MODULE = "neural_ode_classifier"


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


# Files and checkpoints


@pytest.mark.parametrize("first_time", [True, False])
def test_process_killed_in_the_middle_of_writing(tmp_path, first_time):
    path = tmp_path / "file"
    if not first_time:
        path.write_bytes(b"old")
    program = """
import os, pathlib, signal, sys
from experiments.common.files import write_atomically

def write(file):
    file.write(b"half of the n")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

write_atomically(pathlib.Path(sys.argv[1]), write)
"""
    killed = subprocess.run([sys.executable, "-c", program, path], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    assert not path.exists() if first_time else path.read_bytes() == b"old"

    # Nor does what it has left behind disturb the next one.
    write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_failure_while_a_checkpoint_is_written(tmp_path):
    path = tmp_path / "checkpoint.eqx"
    save_checkpoint(path, {"step": 1}, jnp.array(1.0))
    with pytest.raises(TypeError, match="JSON"):
        save_checkpoint(path, {"step": object()}, jnp.array(2.0))
    header, value = load_checkpoint(path, jnp.array(0.0))
    assert header == {"step": 1}
    assert value == 1.0


def test_checkpoint_restores_every_bit(tmp_path):
    path = tmp_path / "folder" / "checkpoint.eqx"
    header = {"losses": [0.1, 1 / 3, 1e-300], "name": "é"}
    tree = {
        "weight": jr.normal(jr.key(0), (3, 2)),
        "count": jnp.array(7, jnp.int32),
        "key": jr.key(5),
        "activation": jnp.tanh,
        "numpy": np.linspace(0, 1, 3),
    }
    save_checkpoint(path, header, tree)
    like = jax.tree.map(lambda x: x * 0 if eqx.is_inexact_array_like(x) else x, tree)
    like["key"] = jr.key(0)
    loaded_header, loaded = load_checkpoint(path, like)
    assert loaded_header == header
    assert load_checkpoint(path, None)[0] == header
    assert eqx.tree_equal(tree, loaded)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_damaged_checkpoint(tmp_path, keep):
    path = tmp_path / "checkpoint.eqx"
    tree = jnp.arange(100.0)
    save_checkpoint(path, {"a": 1}, tree)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ExperimentError, match=r"damaged .* without --resume"):
        load_checkpoint(path, tree)


def test_configs_that_differ():
    saved = {"seed": 0, "steps": 10, "solver": ["deer"], "old": 1}
    check_same_config(saved, dict(saved))
    current = {"seed": 1, "steps": 10, "solver": ["deer", "tsit5"], "new": 2}
    with pytest.raises(ExperimentError, match="other settings") as error:
        check_same_config(saved, current)
    message = str(error.value)
    assert "seed (was 0, now 1)" in message
    assert all(name in message for name in ("solver", "old", "new"))
    assert "steps" not in message


# Where runs are kept


def test_run_folder(tmp_path, capsys):
    folder = RunFolder(tmp_path / "run", {"seed": 0})
    assert folder.begin(resume=False) is Start.FRESH
    assert folder.begin(resume=True) is Start.FRESH
    assert "starting from scratch" in capsys.readouterr().out

    run = _make_run()
    folder.save({"a": run})
    with pytest.raises(ExperimentError, match=r"unfinished run.*--resume.*--out"):
        folder.begin(resume=False)
    assert folder.begin(resume=True) is Start.RESUMED
    with pytest.raises(ExperimentError, match="seed"):
        RunFolder(folder.path, {"seed": 1}).begin(resume=True)

    for number in (1, 2):
        folder.save({"a": run})
        folder.write_results({"run": number})
        assert folder.begin(resume=True) is Start.FINISHED
        assert folder.read_results() == {"run": number}
        assert folder.begin(resume=False) is Start.FRESH
        assert not folder.checkpoint.exists()
        moved = folder.path / f"previous-{number}"
        assert json.loads((moved / "results.json").read_text()) == {"run": number}
        assert (moved / "checkpoint.eqx").exists()


# Training


def _make_run(seed: int = 0) -> Run:
    model = eqx.nn.Linear(2, 1, key=jr.key(seed))

    def loss_fn(model, memory, batch, key):
        noise = jr.normal(key, batch.shape, batch.dtype)
        return jnp.mean(jax.vmap(model)(batch + noise) ** 2), memory + len(batch)

    return Run(
        loss_fn=loss_fn,
        evaluate=lambda state: {"size": float(jnp.sum(state.model.weight**2))},
        state=init_state(model, optax.adam(1e-2), jr.key(1), jnp.array(0)),
    )


def _batches_from(step: int):
    for number in itertools.count(step):
        yield np.random.default_rng(number).normal(size=(3, 2)).astype(np.float32)


def _train(runs, num_steps, save=lambda: None, batches_from=_batches_from):
    train(runs, optax.adam(1e-2), batches_from, num_steps, 2, "size", save)


@pytest.mark.parametrize("interrupted", [0, 4, 7])
def test_training_resumes_where_it_was(tmp_path, interrupted):
    straight = {"a": _make_run(), "b": _make_run(1)}
    _train(straight, 7)
    assert [len(run.record.losses) for run in straight.values()] == [7, 7]

    folder = RunFolder(tmp_path, {})
    begun = {"a": _make_run(), "b": _make_run(1)}

    def save():
        if len(begun["a"].record.losses) <= interrupted:
            folder.save(begun)

    _train(begun, 7, save)
    resumed = {"a": _make_run(), "b": _make_run(1)}
    folder.restore(resumed)
    assert folder.resumed_at == [interrupted]
    _train(resumed, 7)

    for name, run in straight.items():
        assert run.record.losses == resumed[name].record.losses
        assert eqx.tree_equal(run.state, resumed[name].state)
        # Nothing is compiled before the first step, nor after the last one.
        num_compilations = 1 if interrupted in (0, 7) else 2
        assert len(resumed[name].record.compile_seconds) == num_compilations
        steps = [entry["step"] for entry in resumed[name].record.evaluations]
        assert steps == [0, 2, 4, 6, 7]


def test_methods_take_turns():
    turns = []
    runs = {name: _make_run() for name in "ab"}
    for name, run in runs.items():
        run.evaluate = lambda state, name=name: turns.append(name) or {"size": 0.0}
    _train(runs, 5, save=lambda: turns.append("save"))
    assert turns == ["a", "b", "save"] * 4
    assert runs["a"].record.losses == runs["b"].record.losses


def test_batches_that_grow():
    def batches_from(step):
        for batch, number in zip(_batches_from(step), itertools.count(step)):
            yield batch if number < 3 else np.concatenate([batch, batch])

    run = _make_run()
    _train({"a": run}, 6, batches_from=batches_from)
    assert len(run.record.compile_seconds) == 2
    assert len(run.record.step_seconds) == 6
    assert int(run.state.memory) == 3 * 3 + 3 * 6


def test_loss_that_is_not_finite():
    def batches_from(step):
        del step
        return itertools.repeat(np.full((3, 2), np.nan, np.float32))

    with pytest.raises(ExperimentError, match="loss of a is nan at step 1. Lower"):
        _train({"a": _make_run()}, 2, batches_from=batches_from)


# Solvers


@pytest.mark.parametrize("name", ["dopri5", "tsit5"])
def test_count_of_evaluations(name):
    calls = []

    def count(y):
        calls.append(y)
        return y

    def field(t, y, args):
        del args
        return jax.pure_callback(count, y, jnp.sin(10 * t) - 3 * y)

    options = solve_options(rtol=1e-5, atol=1e-5, num_steps=2)[name]
    term = diffrax.ODETerm(field)
    y0 = jnp.ones(2)
    solution = diffrax.diffeqsolve(term, t0=0.0, t1=1.0, dt0=0.1, y0=y0, **options)
    nfe, iterations = count_work(options["solver"], solution, 2)
    jax.block_until_ready(solution)
    assert solution.stats["num_rejected_steps"] > 0
    assert nfe == len(calls)
    assert iterations is None


def test_count_of_deer():
    options = solve_options(rtol=1e-5, atol=1e-5, num_steps=10)["deer_newton"]
    term = diffrax.ODETerm(lambda t, y, args: jnp.sin(10 * t) - y**2)
    saveat = diffrax.SaveAt(t1=True, solver_state=True)
    solution = diffrax.diffeqsolve(
        term, t0=0.0, t1=1.0, dt0=0.1, y0=jnp.ones(3), saveat=saveat, **options
    )
    nfe, iterations = count_work(options["solver"], solution, 3)
    assert iterations is not None
    assert 1 <= iterations <= 10
    # Dopri5 has seven stages, and the Jacobian three columns; four steps predict.
    assert nfe == iterations * 10 * (7 + 3) + 10 * 7 + 4 * 7


# Results


def _make_record(step_seconds: float = 0.001) -> Record:
    evaluation = {"nfe": 12.0, "num_iterations": None, "solve_error": 2e-5}
    return Record(
        compile_seconds=[1.0, 2.0],
        step_seconds=[step_seconds * factor for factor in range(1, 6)],
        losses=[5.0, 4.0, 3.0, 2.0, 1.0],
        evaluations=[
            {"step": 0, "seconds": 0.0, "accuracy": 0.1, **evaluation},
            {"step": 5, "seconds": 0.015, "accuracy": 0.98765, **evaluation},
        ],
    )


def test_summary():
    summary = summarize(_make_record())
    assert summary["compile_seconds"] == 3.0
    assert summary["step_seconds_quartile_1"] == pytest.approx(0.002)
    assert summary["step_seconds_median"] == pytest.approx(0.003)
    assert summary["step_seconds_quartile_3"] == pytest.approx(0.004)
    assert summary["total_seconds"] == pytest.approx(3.015)


def test_comparison_table():
    runs = {name: _make_run() for name in ("deer", "dopri5")}
    runs["deer"].record = _make_record(0.002)
    runs["deer"].record.evaluations[-1]["num_iterations"] = 4.25
    runs["dopri5"].record = _make_record()
    results = collect_results("name", {}, runs, [])
    header, rule, deer, dopri5 = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in comparison_table(results, [METRIC]).splitlines()
    ]
    assert len(header) == len(rule) == len(deer) == len(dopri5)
    assert deer == (
        ["deer", "98.8%", "3.0", "6.00 [4.00, 8.00]", "3.0", "12", "4.2"]
        + ["2e-05", "2.00"]
    )
    assert dopri5[0] == "dopri5"
    assert dopri5[-3:] == ["-", "2e-05", "1.00"]

    del results["solvers"]["dopri5"]
    table = comparison_table(results, [METRIC])
    assert table.splitlines()[-1].endswith(" - |")


def test_table_is_aligned():
    table = format_table(("name", "x"), [("a", "1.00"), ("longer", "-")])
    assert table.splitlines() == [
        "| name   |    x |",
        "| ------ | ---: |",
        "| a      | 1.00 |",
        "| longer |    - |",
    ]


def test_json_is_strict(tmp_path):
    path = tmp_path / "results.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}


def test_environment_outside_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(results_module, "__file__", str(tmp_path / "results.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    outside = environment()
    assert outside["commit"] is None
    assert outside["uncommitted_changes"] is None
    packages = {"python", "jax", "jaxlib", "diffrax", "equinox", "optax"}
    assert packages | {"diffrax_deer"} == outside["versions"].keys()
    monkeypatch.setenv("PATH", str(tmp_path))  # where there is no git
    assert environment() == outside


@pytest.mark.parametrize("losses", [[3.0, 2.0, 1.0], [1.0, -1.0, -2.0]])
def test_plot(tmp_path, losses):
    record = _make_record()
    record.losses, record.step_seconds = losses, record.step_seconds[:3]
    path = tmp_path / "plot.png"
    plot_training(path, {"a": record, "b": record}, METRIC, "loss")
    assert path.read_bytes().startswith(b"\x89PNG")


# The classifier


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, r"--steps is 0\. Choose at least 1"),
        ({"steps": -1, "smoke": True}, r"--steps is -1\. Choose at least 1"),
        ({"batch_size": 0}, "--batch-size is 0. Choose at least 1"),
        ({"batch_size": 1438}, "has 1437 training examples. Choose at most"),
        ({"seed": -1}, "--seed is -1. Choose at least 0"),
        ({"learning_rate": float("nan")}, "--learning-rate is nan. Choose a positive"),
        ({"rtol": 0.0}, "--rtol is 0.0. Choose a positive"),
        ({"readout_dim": 9}, r"only 8 components\. Lower it"),
        ({"solver": ()}, "--solver needs at least one"),
        ({"solver": ("deer", "deer")}, "none of them twice"),
    ],
)
def test_bad_arguments(tmp_path, data_dir, arguments, message):
    out = tmp_path / "run"
    with pytest.raises(ExperimentError, match=message):
        main(Config(**arguments, out=out, data_dir=data_dir))
    assert not out.exists()


def test_unknown_solver(capsys):
    with pytest.raises(SystemExit):
        tyro.cli(Config, args=["--solver", "euler"])
    message = capsys.readouterr().err
    assert "euler" in message
    assert "dopri5" in message


def test_smoke(tmp_path, data_dir):
    solvers: tuple[SolverName, ...] = ("deer", "dopri5")
    out, arguments = tmp_path / "run", ("--smoke", "--solver", *solvers)
    finished = execute(_MODULE, *arguments, "--out", out, "--data-dir", data_dir)
    assert finished.returncode == 0, finished.stderr
    for word in ("test accuracy", "Newton iterations", *solvers):
        assert word in finished.stdout
    assert (out / "training.png").read_bytes().startswith(b"\x89PNG")

    results = json.loads((out / "results.json").read_text())
    steps = results["config"]["steps"]
    assert results["dtype"] == "float32"
    assert results["resumed_at"] == []
    assert results["config"]["seed"] == 0
    assert results["environment"]["platform"] == jax.default_backend()
    assert tuple(results["solvers"]) == solvers
    for name, solver in results["solvers"].items():
        assert len(solver["losses"]) == len(solver["step_seconds"]) == steps
        assert len(solver["compile_seconds"]) == 1
        assert solver["evaluations"][0]["step"] == 0
        final = solver["final"]
        assert final == solver["evaluations"][-1]
        assert final["step"] == steps
        assert final["nfe"] > 0
        assert (final["num_iterations"] is not None) == name.startswith("deer")
        assert final["solve_error"] < 1e-3
    # All solve the same equation from the same weights with the same data.
    for solver in results["solvers"].values():
        expected = results["solvers"]["dopri5"]["losses"]
        np.testing.assert_allclose(solver["losses"], expected, rtol=1e-3)

    # A finished run is not trained again.
    config = Config(solver=solvers, smoke=True, resume=True, out=out, data_dir=data_dir)
    assert main(config) == results


def test_only_the_solver_changed_has_the_errors_of_the_tolerance():
    workload = adaptive.make_workload("fitzhugh_nagumo", 1)
    method = adaptive.METHODS_COMPARED["DEERSolver(num_steps=8)"]
    solve = make_function(method, "forward", workload, 1e-5)
    found = solve(workload.params, workload.y0s, None)
    np.testing.assert_allclose(found.ys, workload.reference().ys, rtol=1e-3)


def test_settings_of_the_adaptive_comparison_that_make_no_sense(tmp_path):
    base = adaptive.Config(out=tmp_path / "results.json")
    for changes in ({"repeats": 0}, {"tolerance": 2.0}, {"batch_sizes": ()}):
        with pytest.raises(ExperimentError):
            adaptive.main(dataclasses.replace(base, **changes))


@pytest.mark.slow
def test_steps_where_the_error_is_are_measured_and_drawn(tmp_path):
    out = tmp_path / "grids.json"
    (cell,) = grids.main(grids.Config(smoke=True, out=out))["cells"]
    assert json.loads(out.read_text())["cells"] == [cell]
    errors = cell["errors"]
    for name in ("cold_2", "warm"):
        assert 0 < errors[name] < 2 * errors["pid"]
    # The worst depends on how lucky the controller is there.
    assert 0 < errors["walk"]["median"] < 2
    assert cell["num_steps"] == int(1.1 * cell["num_accepted"]) + 2
    assert cell["equal"][-1]["error"] <= errors["pid"]
    (batch,) = cell["batches"]
    # Of the same loss, at solutions that are as good.
    for method in batch["methods"].values():
        assert method["difference"] < 0.1
        assert len(method["seconds"]) == 2
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_settings_of_the_grids_that_make_no_sense(tmp_path):
    base = grids.Config(out=tmp_path / "results.json")
    for changes in ({"problems": ("none",)}, {"tolerances": ()}, {"batch_sizes": ()}):
        with pytest.raises(ExperimentError):
            grids.main(dataclasses.replace(base, **changes))


@pytest.mark.slow
def test_iterates_are_drawn(tmp_path):
    out = tmp_path / "iterates.json"
    errors = iterates.main(iterates.Config(smoke=True, out=out))["errors"]
    # Rounding, after 8 iterations of Newton's method for 20 steps.
    assert errors["Newton"][0] > 1
    assert errors["Newton"][-1] < 1e-12
    assert errors["Picard"][-1] > 1e-3
    assert json.loads(out.read_text())["errors"] == errors
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_iterates_refuse_to_be_none(tmp_path):
    config = iterates.Config(num_iterations=0, out=tmp_path / "iterates.json")
    with pytest.raises(ExperimentError, match="--num-iterations"):
        iterates.main(config)
