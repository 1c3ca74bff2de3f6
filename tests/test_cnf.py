import dataclasses
import itertools
import json
from typing import Any, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
import scipy.integrate

from experiments.cnf import Config, main, make_loss, make_runs, table
from experiments.common.densities import DataName, load
from experiments.common.errors import ExperimentError
from experiments.common.experiment import run_folder
from experiments.common.flow import FIELDS, Flow
from experiments.common.flow_evaluation import make_evaluate
from experiments.common.solvers import SOLVERS, SolverName, solve_options
from experiments.common.training import init_state

from .experiment_runs import execute, kill_in_training, outcome
from .helpers import slowly

_MODULE = "cnf"
_OPTIONS = solve_options(rtol=1e-6, atol=1e-6, num_steps=16)


def _first_batch(name: DataName, size: int = 7, seed: int = 0, step: int = 0):
    return next(load(name).batches_from(size, seed, step))


def _flow(name: str = "concatsquash", dim: int = 2) -> Flow:
    """A flow that is far from the identity."""
    field = FIELDS[name](dim, 8, 2, jr.key(3))
    weights, rest = eqx.partition(field, eqx.is_array)
    return Flow(eqx.combine(jax.tree.map(lambda w: 2 * w, weights), rest), dim)


@eqx.filter_jit
def _log_densities(flow: Flow, points: Any, solver: SolverName) -> jax.Array:
    return jax.vmap(lambda x: flow.log_density(x, **_OPTIONS[solver]))(points)


def _grid() -> np.ndarray:
    axis = np.linspace(-8, 8, 161, dtype=np.float32)
    return np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)


def _normal_log_density(z):
    return -jnp.sum(z**2) / 2 - z.size / 2 * np.log(2 * np.pi)


# Samples


@pytest.mark.parametrize("name", get_args(DataName))
def test_batches(name):
    data = load(name)
    dim = len(data.features)
    batches = list(itertools.islice(data.batches_from(7, 0, 0), 4))
    assert all(batch.shape == (7, dim) for batch in batches)
    assert data.test.dtype == batches[0].dtype == np.float32
    # Whoever resumes sees what would have come.
    np.testing.assert_array_equal(batches[3], _first_batch(name, step=3))
    np.testing.assert_array_equal(data.test, load(name).test)
    streams = [*batches, _first_batch(name, seed=1), data.test[:7]]
    for a, b in itertools.combinations(streams, 2):
        # Another order of the same measurements has some of them in common.
        equal = np.all(a[:, None] == b, axis=2)
        assert np.sum(equal) < (1 if data.num_train is None else len(a))


def _mean_radius_of_arm_and_offset() -> float:
    """Of a spiral's arm a: |a|^2 + 2 a.o + |o|^2 for o uniform on [0, 1/2]^2."""
    angle = lambda u: 3 * np.pi * np.sqrt(u)
    along = lambda u: angle(u) * (np.sin(angle(u)) - np.cos(angle(u)))
    mean, _ = scipy.integrate.quad(along, 0, 1, limit=200)
    return 9 * np.pi**2 / 2 + 2 * mean / 4 + 2 / 12


@pytest.mark.parametrize(
    ("name", "mean", "mean_square"),
    [
        ("two_moons", (0, 0.3), None),
        ("circles", (0, 0), 9 * ((1 + 0.5**2) / 2 + 2 * 0.08**2)),
        ("rings", (0, 0), 9 * (1 + 4 + 9 + 16) / 16 / 4 + 2 * 0.08**2),
        ("eight_gaussians", (0, 0), (4**2 + 2 * 0.5**2) / 2),
        ("pinwheel", (0, 0), 4 * (1 + 0.3**2 + 0.1**2)),
        ("two_spirals", (0, 0), _mean_radius_of_arm_and_offset() / 9 + 2 * 0.1**2),
        ("swiss_roll", None, ((3 * np.pi) ** 2 * (1 + 1 / 12) + 2) / 25),
        ("checkerboard", (0, 0), 2 * 8**2 / 12),
    ],
)
def test_moments(name, mean, mean_square):
    def check(values, expected):
        error = values.std(0) / np.sqrt(len(values))
        np.testing.assert_array_less(np.abs(values.mean(0) - expected), 4 * error)

    test = load(name).test.astype(np.float64)
    assert len(test) == 5000
    assert np.all(np.abs(test) < 4.5)
    if mean is not None:
        check(test, np.array(mean))
    if mean_square is not None:
        check(np.sum(test**2, 1), mean_square)


def test_support():
    x, y = load("two_moons").test.T
    to_upper, to_lower = np.hypot(x + 1, y + 0.2) - 2, np.hypot(x - 1, y - 0.8) - 2
    nearer = np.where(np.abs(to_upper) < np.abs(to_lower), to_upper, to_lower)
    assert nearer.std() == pytest.approx(0.2, rel=0.05)

    columns, rows = np.floor(load("checkerboard").test / 2).T
    assert np.all((columns + rows) % 2 == 0)


def test_measurements_are_standardized_and_split():
    data = load("breast_cancer")
    assert data.num_train is not None
    train = next(data.batches_from(data.num_train, 0, 0)).astype(np.float64)
    np.testing.assert_allclose(train.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(train.std(0), 1, atol=1e-6)
    assert len(train) + len(data.test) == 569
    assert len(np.unique(np.concatenate([train, data.test]), axis=0)) == 569


# The flow


@pytest.mark.parametrize("field", FIELDS)
def test_density_integrates_to_one(field):
    densities = _log_densities(_flow(field), _grid(), "dopri5")
    assert float(densities.max()) > -3  # not all of it near the border
    assert float(jnp.exp(densities).sum()) * 0.1**2 == pytest.approx(1, abs=1e-3)


def test_samples_have_the_density():
    """The mean log-density of samples is the negative entropy of the density."""
    flow, grid = _flow(), _grid()
    on_grid = _log_densities(flow, grid, "dopri5")
    expected = float(jnp.sum(jnp.exp(on_grid) * on_grid)) * 0.1**2
    xs = flow.sample(jr.key(1), len(grid), **_OPTIONS["dopri5"])
    values = np.asarray(_log_densities(flow, xs, "dopri5"))
    assert abs(values.mean() - expected) < 4 * values.std() / np.sqrt(len(values))


@pytest.fixture(scope="module")
def change_of_variables():
    """A flow, points and their log-densities, by the determinant of its Jacobian."""
    flow = _flow(dim=3)
    push = lambda z: flow.push_forward(z, **_OPTIONS["dopri5"])

    @jax.jit
    @jax.vmap
    def move(z):
        _, log_determinant = jnp.linalg.slogdet(jax.jacrev(push)(z))
        return push(z), _normal_log_density(z) - log_determinant, log_determinant

    points, expected, log_determinants = move(jr.normal(jr.key(0), (20, 3)))
    assert float(jnp.abs(log_determinants).max()) > 0.1
    return flow, points, expected


@pytest.mark.parametrize(
    "solver", ["deer", *[slowly(each) for each in SOLVERS if each != "deer"]]
)
def test_log_density_is_the_change_of_variables(change_of_variables, solver):
    flow, points, expected = change_of_variables
    np.testing.assert_allclose(
        _log_densities(flow, points, solver), expected, atol=2e-5
    )


# Up to four products are written out.
@pytest.mark.parametrize("dim", [1, 4, 5])
@pytest.mark.parametrize("name", FIELDS)
def test_trace_is_that_of_the_jacobian(name, dim):
    flow, y = _flow(name, dim), jnp.linspace(-1.0, 1.5, dim, dtype=jnp.float32)

    def traces(y):
        value, trace = flow.field_and_trace(0.3, (y, jnp.zeros(())), None)
        return trace, jnp.trace(jax.jacrev(lambda y: flow.field(0.3, y))(y)), value

    trace, expected, value = traces(y)
    np.testing.assert_allclose(trace, expected, rtol=1e-5)
    np.testing.assert_allclose(value, flow.field(0.3, y), rtol=1e-6)
    gradients = [jax.grad(lambda y, i=i: traces(y)[i])(y) for i in (0, 1)]
    np.testing.assert_allclose(*gradients, rtol=1e-4, atol=1e-5)


def test_estimated_trace_is_unbiased():
    """Signs of all combinations average to the trace."""
    flow, options = _flow(), _OPTIONS["deer_sequential"]
    x = jnp.array([0.5, -1.0], jnp.float32)
    signs = jnp.array(list(itertools.product([1, -1], repeat=2)), jnp.float32)
    estimates = jax.vmap(lambda probe: flow.log_density(x, probe, **options))(signs)
    exact = flow.log_density(x, **options)
    assert float(jnp.std(estimates)) > 1e-3
    np.testing.assert_allclose(estimates.mean(), exact, atol=1e-5)


def test_loss_with_estimated_traces():
    flow, options = _flow(), _OPTIONS["deer_sequential"]
    batch = _first_batch("two_moons")
    exact, _ = make_loss(options, "exact")(flow, None, batch, jr.key(0))
    expected = -float(_log_densities(flow, batch, "deer_sequential").mean())
    assert float(exact) == pytest.approx(expected, abs=1e-5)

    estimate = make_loss(options, "hutchinson")
    keys = jr.split(jr.key(1), 200)
    losses = jax.jit(jax.vmap(lambda key: estimate(flow, None, batch, key)[0]))(keys)
    error = float(losses.std()) / np.sqrt(len(keys))
    assert error > 0
    assert abs(float(losses.mean() - exact)) < 4 * error


# 300 points are one and a half parts of what is solved at once.
@pytest.mark.slow
@pytest.mark.parametrize(("solver", "number"), [("deer_newton", 20), ("dopri5", 300)])
def test_evaluation(solver, number):
    flow, options, points = _flow(), _OPTIONS[solver], load("two_moons").test[:number]
    state = init_state(flow, optax.sgd(1.0), jr.key(0))
    found: dict[str, Any] = make_evaluate(options, points)(state)
    expected = -float(_log_densities(flow, points, "dopri5").mean())
    assert found["nll"] == pytest.approx(expected, abs=1e-5)
    assert 0 < found["solve_error"] < 1e-5
    assert 0 < found["round_trip_error"] < 1e-4
    assert (found["num_iterations"] is not None) == (solver == "deer_newton")


# The experiment


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 0}, r"--width is 0\. Choose at least 1"),
        ({"depth": -1}, r"--depth is -1\. Choose at least 0"),
        ({"weight_decay": -1.0}, r"--weight-decay is -1\.0\. Choose at least 0"),
        ({"weight_decay": float("nan")}, "--weight-decay is nan. Choose at least 0"),
        ({"dataset": ()}, "--dataset needs at least one"),
        ({"dataset": ("rings", "rings")}, "none of them twice"),
        (
            {"dataset": ("rings", "breast_cancer"), "batch_size": 456},
            "breast_cancer has 455 training examples. Choose at most",
        ),
    ],
)
def test_bad_arguments(tmp_path, arguments, message):
    out = tmp_path / "run"
    with pytest.raises(ExperimentError, match=message):
        main(Config(**arguments, out=out))
    assert not out.exists()


def test_unfinished_run_is_found_before_the_first_is_trained(tmp_path):
    config = Config(dataset=("rings", "circles"), out=tmp_path)
    second = config.of("circles")
    run_folder(second).save(make_runs(second, load("circles")))
    with pytest.raises(ExperimentError, match=r"circles holds an unfinished run"):
        main(config)
    with pytest.raises(ExperimentError, match=r"other settings: seed"):
        main(dataclasses.replace(config, seed=1, resume=True))
    assert not (tmp_path / "rings").exists()


@pytest.mark.slow
def test_smoke(tmp_path):
    solvers: tuple[SolverName, ...] = ("deer", "dopri5")
    arguments = ("--dataset", "breast_cancer", "--solver", *solvers)
    finished = execute(_MODULE, "--smoke", *arguments, "--out", tmp_path)
    assert finished.returncode == 0, finished.stderr
    for word in ("test NLL", "Newton iterations", "breast_cancer", *solvers):
        assert word in finished.stdout

    folder = tmp_path / "breast_cancer"
    for picture in ("training.png", "flows.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    results = json.loads((folder / "results.json").read_text())
    assert results["dtype"] == "float32"
    assert results["config"]["dataset"] == ["breast_cancer"]
    assert tuple(results["solvers"]) == solvers
    for solver in results["solvers"].values():
        assert len(solver["losses"]) == results["config"]["steps"]
        final = solver["final"]
        assert final["nfe"] > 0
        assert final["solve_error"] < 1e-4
        assert final["round_trip_error"] < 1e-3
        # All solve the same equation from the same weights with the same data.
        expected = results["solvers"]["dopri5"]["losses"]
        np.testing.assert_allclose(solver["losses"], expected, rtol=1e-3)

    # A finished run is not trained again.
    again = Config(
        dataset=("breast_cancer",),
        solver=solvers,
        smoke=True,
        resume=True,
        out=tmp_path,
    )
    assert main(again) == {"breast_cancer": results}


@pytest.mark.slow
def test_killed_and_resumed_run_equals_an_uninterrupted_one(tmp_path):
    """Killed in the second of three: one is read back, one goes on, one begins."""
    names = ("two_moons", "circles", "rings")
    tiny = (
        *("--steps", "200", "--evaluations", "20", "--batch-size", "4"),
        *("--width", "4", "--depth", "1", "--trace", "hutchinson"),
        *("--solver", "dopri5", "--dataset", *names),
    )
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    cache = tmp_path / "cache"
    finished = execute(_MODULE, *tiny, "--out", straight, cache=cache)
    assert finished.returncode == 0, finished.stderr

    folder = killed / "circles"
    kill_in_training(_MODULE, *tiny, "--out", killed, folder=folder, cache=cache)
    resumed = execute(_MODULE, *tiny, "--out", killed, "--resume", cache=cache)
    assert resumed.returncode == 0, resumed.stderr

    all_results = {}
    for name, number in zip(names, (0, 1, 0), strict=True):
        path = killed / name / "results.json"
        assert outcome(path) == outcome(straight / name / "results.json")
        assert (killed / name / "flows.png").read_bytes().startswith(b"\x89PNG")
        all_results[name] = json.loads(path.read_text())
        assert len(all_results[name]["resumed_at"]) == number

    head, _, *lines = table(all_results).splitlines()
    assert head.startswith("| data set ")
    cells = [[cell.strip() for cell in line.split("|")[1:3]] for line in lines]
    assert cells == [[name, "dopri5"] for name in names]
