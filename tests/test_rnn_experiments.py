import dataclasses
import json
import math
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from experiments import rnn_accuracy, rnn_classifier, rnn_speed
from experiments.common.affordable import Prepared, prepare, too_large, too_slow
from experiments.common.eigenworms import EigenWorms, load as load_eigenworms, read_ts
from experiments.common.errors import ExperimentError
from experiments.common.recurrent import make_layer, run_cell, scaled
from experiments.common.sequences import load, make_worms
from experiments.common.solvers import RECURRENT as METHODS, RecurrentName

from .experiment_runs import check_resumption


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    # TFDS leaves an empty folder there for every data set not yet prepared.
    with pytest.MonkeyPatch.context() as monkeypatch:
        folder = tmp_path_factory.mktemp("temporary")
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        yield tmp_path_factory.mktemp("data")


def _is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


# Cells over whole sequences


@pytest.mark.parametrize("cell_type", [eqx.nn.GRUCell, eqx.nn.LSTMCell])
def test_all_methods_find_the_same_states(cell_type):
    cell = scaled(cell_type(3, 2, key=jr.key(0)), 2.0)
    xs = jr.normal(jr.key(1), (20, 3))
    expected, none = run_cell("scan", cell, xs)
    assert none is None
    for method in METHODS:
        states, iterations = run_cell(method, cell, xs)
        for found in (states, make_layer(method, cell)(xs)):
            close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6)
            jax.tree.map(close, found, expected)
        assert (method == "deer_newton") == (iterations is not None and iterations > 0)


def test_scaled_cell():
    cell = eqx.nn.GRUCell(3, 2, key=jr.key(0))
    large = scaled(cell, 3.0)
    np.testing.assert_allclose(large.weight_hh, 3 * cell.weight_hh)
    np.testing.assert_allclose(large.weight_ih, 3 * cell.weight_ih)
    np.testing.assert_array_equal(large.bias, cell.bias)


# Speed


@pytest.mark.slow
def test_speed_smoke(tmp_path, capsys):
    out = tmp_path / "speed.json"
    rnn_speed.main(rnn_speed.Config(smoke=True, out=out))
    assert "lax.scan (ms)" in capsys.readouterr().out
    assert _is_png(out.with_suffix(".png"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["speed.json", "speed.png"]
    results = json.loads(out.read_text())
    config = results["config"]
    num_cells = len(config["lengths"]) * len(config["dims"]) * 2
    assert len(results["cells"]) == num_cells
    for cell in results["cells"]:
        assert tuple(cell["methods"]) == ("scan", *METHODS[:-1])
        for name, method in cell["methods"].items():
            assert len(method["seconds"]) == config["repeats"]
            if name == "scan":
                continue
            assert method["value_difference"] < 1e-5
            has_gradient = cell["mode"] == "gradient"
            assert ("gradient_difference" in method) == has_gradient
            assert method.get("gradient_difference", 0.0) < 1e-5
        assert 1 <= cell["methods"]["deer_newton"]["num_iterations"] <= 20


def _fake_measure(place, cells, config):
    del config
    seconds = {"scan": [2e-3, 3e-3], "deer": [1e-3, 1e-3]}
    methods: dict[str, Any] = {
        name: {"seconds": s, "compile_seconds": 1.0} for name, s in seconds.items()
    }
    methods["deer"] |= {"num_iterations": 0, "value_difference": 1e-7}
    methods["deer_sequential"] = methods["deer"]
    methods["deer_newton"] = too_slow(float(1 + len(cells)))
    return place | {"methods": methods}


def test_interrupted_measurement_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rnn_speed, "measure", _fake_measure)
    config = rnn_speed.Config(smoke=True, out=tmp_path / "straight.json")
    straight = rnn_speed.main(config)

    measured = []

    def interrupted(place, cells, config):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(place)
        return _fake_measure(place, cells, config)

    config = dataclasses.replace(config, out=tmp_path / "run.json")
    monkeypatch.setattr(rnn_speed, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rnn_speed.main(config)
    assert not config.out.exists()
    unfinished = tmp_path / "run.unfinished.json"
    assert len(json.loads(unfinished.read_text())["cells"]) == 2

    with pytest.raises(ExperimentError, match=r"unfinished.*--resume.*--out"):
        rnn_speed.main(config)
    other = dataclasses.replace(config, max_seconds=1.0, resume=True)
    with pytest.raises(ExperimentError, match="max_seconds"):
        rnn_speed.main(other)

    monkeypatch.setattr(rnn_speed, "measure", _fake_measure)
    resumed = rnn_speed.main(dataclasses.replace(config, resume=True))
    assert "Resuming after 2 cells" in capsys.readouterr().out
    assert resumed["cells"] == straight["cells"]
    assert resumed["resumed_at"] == [2]
    assert not unfinished.exists()

    unfinished.write_text("{")
    with pytest.raises(ExperimentError, match=r"damaged.*Delete it"):
        rnn_speed.main(dataclasses.replace(config, resume=True))


def test_table_and_picture_of_what_was_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(rnn_speed, "measure", _fake_measure)
    config = rnn_speed.Config(dims=(1, 2), lengths=(10, 100), out=tmp_path / "a.json")
    results = rnn_speed.main(config)
    results["cells"][0]["methods"]["scan"] = too_large("9 GB needed")
    header, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in rnn_speed.table(results).splitlines()
    ]
    assert len(rows) == 16
    assert rows[0] == (
        ["forward", "1", "1", "10", "left out: 9 GB needed"]
        + 2 * ["1 [1, 1]", "-"]
        + ["left out: 1 s expected", "-", "-", "1e-07"]
    )
    assert rows[1][6] == "2.5×"
    assert len(header) == len(rows[0])
    rnn_speed.draw(tmp_path / "b.png", results)
    assert _is_png(tmp_path / "b.png")


def test_what_does_not_fit_into_the_memory():
    function = jax.jit(lambda x: x + jnp.ones(1000, x.dtype))
    x = jnp.float32(1.0)
    fits = prepare(function, (x,), 4e-6)
    assert isinstance(fits, Prepared)
    assert fits.value.shape == (1000,)
    too_much = prepare(function, (x,), 3.9e-6)
    assert isinstance(too_much, dict)
    assert too_much["skipped"]["why"] == "memory"

    config = rnn_speed.Config(max_gigabytes=1.0)
    cell = {"mode": "gradient", "dim": 16, "batch_size": 16, "num_steps": 100_000}
    skip = lambda name, mode: rnn_speed._too_many_jacobians(
        name, cell | {"mode": mode}, config
    )
    assert skip("deer_newton", "forward") is None
    assert skip("scan", "gradient") is None
    assert skip("deer_newton", "gradient") == too_large("5 GB expected")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dims": ()}, "--dims needs at least one number"),
        ({"lengths": (0, 10)}, "--lengths needs at least one number, from 1 on"),
        ({"batch_sizes": (1, 1)}, "--batch-sizes .* none twice"),
        ({"repeats": 0}, "--repeats is 0. Choose at least 1"),
        ({"max_seconds": -1.0}, "--max-seconds is -1.0. Choose a positive"),
        ({"max_gigabytes": math.nan}, "--max-gigabytes is nan. Choose a positive"),
    ],
)
def test_bad_arguments_of_speed(tmp_path, changes, message):
    out = tmp_path / "run" / "results.json"
    with pytest.raises(ExperimentError, match=message):
        rnn_speed.main(rnn_speed.Config(**changes, out=out))
    assert not out.parent.exists()


# Accuracy


@pytest.mark.slow
def test_accuracy_smoke(tmp_path, capsys):
    out = tmp_path / "accuracy.json"
    rnn_accuracy.main(rnn_accuracy.Config(smoke=True, out=out))
    assert "| LSTM" in capsys.readouterr().out
    assert _is_png(out.with_suffix(".png"))
    results = json.loads(out.read_text())
    assert [(cell["cell"], cell["scale"]) for cell in results["cells"]] == (
        [("GRU", 1.0), ("GRU", 3.0), ("LSTM", 1.0), ("LSTM", 3.0)]
    )
    for cell in results["cells"]:
        assert cell["num_iterations"] >= 1
        for difference in cell["differences"].values():
            # Single precision, and something to compare: not the same numbers.
            assert 0 < difference["largest"] < 1e-5
            assert difference["num_steps_together"] == 20


def test_comparison_of_trajectories():
    first = np.zeros((4, 2))
    second = np.array([[0, 0], [1e-4, 0], [0, 0.1], [0, 0]])
    found = rnn_accuracy.compare(first, second)
    assert found["largest"] == pytest.approx(0.1)
    assert found["median"] == pytest.approx(5e-5)
    assert found["num_steps_together"] == 2
    second[1] = np.nan
    found = rnn_accuracy.compare(first, second)
    assert (found["largest"], found["num_steps_together"]) == (None, 1)
    results = {
        "cells": [
            {
                "cell": "GRU",
                "scale": 1.0,
                "num_iterations": 3,
                "differences": dict.fromkeys(rnn_accuracy.PAIRS, found),
            }
        ]
    }
    assert "not finite (1)" in rnn_accuracy.table(results)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_units": 0}, "--num-units is 0. Choose at least 1"),
        ({"seed": -1}, "--seed is -1. Choose at least 0"),
        ({"scales": ()}, "--scales needs at least one"),
        ({"scales": (1.0, math.inf)}, "all of them positive"),
    ],
)
def test_bad_arguments_of_accuracy(tmp_path, changes, message):
    out = tmp_path / "run" / "results.json"
    with pytest.raises(ExperimentError, match=message):
        rnn_accuracy.main(rnn_accuracy.Config(**changes, out=out))
    assert not out.parent.exists()


# Sequences


def test_digits_pixel_by_pixel(data_dir):
    data = load("digits", data_dir)
    assert data.train_xs.shape == (1437, 64, 1)
    assert data.test_xs.shape == (360, 64, 1)
    thin = data.thinned(20)
    np.testing.assert_array_equal(thin.train_xs, data.train_xs[:, :60:3])
    assert thin.test_xs.shape == (360, 20, 1)
    with pytest.raises(ExperimentError, match="--length is 65, .* 64 steps"):
        data.thinned(65)


def test_generated_worms():
    xs, labels = make_worms(11, 0, length=500)
    assert (xs.shape, xs.dtype) == ((11, 500, 6), np.float32)
    assert sorted(np.bincount(labels)) == [2, 2, 2, 2, 3]
    assert np.isfinite(xs).all()
    again, _ = make_worms(11, 0, length=500)
    np.testing.assert_array_equal(xs, again)
    others, _ = make_worms(11, 1, length=500)
    assert not np.allclose(xs, others)


_HEAD = """\
#A comment: 1,2

@problemName EigenWorms
@timeStamps false
@dimensions 2
@classLabel true a b
@data
"""


def test_ts_file():
    lines = f"{_HEAD}1,2.5,3:4,5,-6e-1:b\n0,0,0:1,1,1:a\n".splitlines()
    xs, labels = read_ts(lines)
    expected = [[[1, 4], [2.5, 5], [3, -0.6]], [[0, 1], [0, 1], [0, 1]]]
    np.testing.assert_allclose(xs, expected, rtol=1e-6)
    np.testing.assert_array_equal(labels, [1, 0])
    assert (xs.dtype, labels.dtype) == (np.float32, np.int32)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no line `@data`"),
        ("<html>", "no line `@data`"),
        (_HEAD, "not of one shape"),
        (_HEAD.replace("true a b", "false"), "does not name the classes"),
        (_HEAD.replace("Stamps false", "Stamps true"), "time stamps"),
        (f"{_HEAD}1,2:3,4:c", "sequence 1 is of class 'c'"),
        (f"{_HEAD}1,2:3:a", "sequence 1 are not equally long"),
        (f"{_HEAD}1:2:a\n1,2:3,4:a", "not of one shape"),
        (f"{_HEAD}1,?:3,4:a", "could not convert"),
    ],
)
def test_damaged_ts_file(text, message):
    with pytest.raises(ValueError, match=message):
        read_ts(text.splitlines())


@pytest.fixture
def tiny_worms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EigenWorms, "length", 2)
    monkeypatch.setattr(EigenWorms, "sizes", {"train": 2, "test": 1})
    # A port that nobody listens to.
    monkeypatch.setattr(EigenWorms, "url", "http://127.0.0.1:9/")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def _put_by_hand(data_dir: Path, num_train: int) -> Path:
    path = data_dir / "downloads" / "manual" / EigenWorms.file
    path.parent.mkdir(parents=True)
    row = lambda n, name: ":".join([f"{n},{n + 1}"] * 6 + [name])
    head = "@classLabel true 1 2 3 4 5\n@data\n"
    train = "\n".join([row(10 * n, "3") for n in range(num_train)])
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("EigenWorms/EigenWorms_TRAIN.ts", head + train)
        archive.writestr("EigenWorms_TEST.ts", head + row(50, "1"))
    return path


@pytest.mark.usefixtures("tiny_worms", "data_dir")
def test_eigenworms_put_there_by_hand(tmp_path):
    _put_by_hand(tmp_path, 2)
    (xs, labels), (test_xs, test_labels) = load_eigenworms(tmp_path)
    order = np.argsort(xs[:, 0, 0])
    expected = np.array([[0, 1], [10, 11]], np.float32)[:, :, None].repeat(6, 2)
    np.testing.assert_array_equal(xs[order], expected)
    np.testing.assert_array_equal(labels, [2, 2])
    np.testing.assert_array_equal(test_xs[0, :, 3], [50, 51])
    np.testing.assert_array_equal(test_labels, [0])


@pytest.mark.usefixtures("tiny_worms", "data_dir")
def test_damaged_eigenworms(tmp_path):
    path = _put_by_hand(tmp_path, 3)
    with pytest.raises(ExperimentError, match=r"train sequences are \(3, 2, 6\), not"):
        load_eigenworms(tmp_path)
    path.write_bytes(b"<html>")
    with pytest.raises(ExperimentError, match=r"EigenWorms.zip is damaged.*Delete it"):
        load_eigenworms(tmp_path)


@pytest.mark.usefixtures("tiny_worms", "data_dir")
def test_eigenworms_without_network(tmp_path):
    start = time.perf_counter()
    message = "EigenWorms cannot be downloaded.*--dataset digits.*EigenWorms.zip"
    with pytest.raises(ConnectionError, match=message):
        load_eigenworms(tmp_path)
    assert time.perf_counter() - start < 5


# The classifier


@pytest.mark.slow
def test_classifier_smoke(tmp_path, data_dir, capsys):
    out = tmp_path / "run"
    config = rnn_classifier.Config(smoke=True, out=out, data_dir=data_dir)
    results = rnn_classifier.main(config)
    printed = capsys.readouterr().out
    for word in ("test accuracy", "test loss", "deer, Newton", "lax.scan"):
        assert word in printed
    assert _is_png(out / "training.png")
    assert json.loads((out / "results.json").read_text()) == results
    assert tuple(results["solvers"]) == METHODS
    for name, method in results["solvers"].items():
        # All find the same states, from the same weights with the same data.
        expected = results["solvers"]["scan"]["losses"]
        np.testing.assert_allclose(method["losses"], expected, rtol=1e-4)
        final = method["final"]
        assert final["step"] == results["config"]["steps"] == 4
        assert (final["num_iterations"] is None) == (name == "scan")

    # A finished run is not trained again.
    again = dataclasses.replace(config, resume=True)
    assert rnn_classifier.main(again) == results

    del results["solvers"]["scan"]
    assert rnn_classifier.table(results).splitlines()[-1].endswith(" - |")


@pytest.mark.parametrize("method", METHODS)
def test_layers_of_classifier_count_iterations(method: RecurrentName):
    config = rnn_classifier.Config(hidden_size=2, num_layers=2)
    model = rnn_classifier.RNNClassifier(3, 4, config, jr.key(0))
    xs = jr.normal(jr.key(1), (10, 3))
    expected = model(xs, "scan")
    np.testing.assert_allclose(model(xs, method), expected, atol=1e-5)
    count = model.count_iterations(xs, method)
    assert (count is None) == (method == "scan")
    if count is not None:
        assert (count > 0) == (method == "deer_newton")


# The shortest of all trainings; those of other experiments are marked slow.
def test_killed_and_resumed_training_equals_an_uninterrupted_one(tmp_path, data_dir):
    arguments = (
        *("--steps", "200", "--evaluations", "20", "--batch-size", "4"),
        *("--hidden-size", "2", "--num-layers", "1", "--length", "8"),
        *("--method", "scan", "--data-dir", data_dir),
    )
    check_resumption("rnn_classifier", tmp_path, *arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, r"--steps is 0\. Choose at least 1"),
        ({"hidden_size": 0}, r"--hidden-size is 0\. Choose at least 1"),
        ({"learning_rate": 0.0}, "--learning-rate is 0.0. Choose a positive"),
        ({"method": ()}, "--method needs at least one value"),
        ({"method": ("scan", "scan")}, "none of them twice"),
        ({"length": 65}, "--length is 65"),
        ({"length": 0}, "--length is 0"),
        ({"batch_size": 1438}, "1437 training examples. Choose at most"),
    ],
)
def test_bad_arguments_of_classifier(tmp_path, data_dir, changes, message):
    out = tmp_path / "run"
    with pytest.raises(ExperimentError, match=message):
        rnn_classifier.main(
            rnn_classifier.Config(**changes, out=out, data_dir=data_dir)
        )
    assert not out.exists()
