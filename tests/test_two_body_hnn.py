import functools
import json
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy.integrate import solve_ivp

from experiments.common import two_body, warm_start
from experiments.common.errors import ExperimentError
from experiments.common.hamiltonian import HamiltonianNetwork, make_loss, solve
from experiments.common.solvers import SolverName
from experiments.two_body_hnn import Config, main

from .experiment_runs import check_resumption, execute

_MODULE = "two_body_hnn"
_SMALL = Config(
    num_steps=80, num_times=20, stages=2, rtol=1e-11, atol=1e-11, dtype="float64"
)


def _model(seed: int = 0) -> HamiltonianNetwork:
    return HamiltonianNetwork(8, 8, 2, jnp.float64, jr.key(seed))


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


# The data


def _gravity(t, y):
    del t
    force = (y[2:4] - y[:2]) / np.linalg.norm(y[2:4] - y[:2]) ** 3
    return np.concatenate([y[4:], force, -force])


@pytest.mark.usefixtures("x64")
def test_true_orbits():
    y0 = two_body.initial_states(6, np.random.default_rng(0))
    ts = np.linspace(0, 10, 31)[1:]
    ys = two_body.integrate(y0, ts)
    assert ys.dtype == np.float64
    assert ys.shape == (6, 30, 8)
    for start, orbit in zip(y0, ys, strict=True):
        expected = solve_ivp(
            _gravity, (0, 10), start, "DOP853", ts, rtol=1e-13, atol=1e-13
        )
        np.testing.assert_allclose(orbit, expected.y.T, atol=1e-9)
    energies = np.asarray(two_body.energy(jnp.asarray(ys)))
    at_first = np.asarray(two_body.energy(jnp.asarray(y0)))
    np.testing.assert_allclose(energies, np.tile(at_first, (30, 1)).T, rtol=5e-9)
    np.testing.assert_allclose(ys[..., 4:6], -ys[..., 6:], atol=1e-9)
    torque = ys[..., 0] * ys[..., 5] - ys[..., 1] * ys[..., 4]
    np.testing.assert_allclose(torque, torque[:, :1] + np.zeros(30), atol=5e-9)


def test_initial_states_are_nearly_circular():
    y0 = two_body.initial_states(1000, np.random.default_rng(0))
    radius = np.linalg.norm(y0[:, :2], axis=1)
    assert 0.5 <= radius.min() < 0.51
    assert 1.49 < radius.max() <= 1.5
    np.testing.assert_array_equal(y0[:, :2], -y0[:, 2:4])
    np.testing.assert_array_equal(y0[:, 4:6], -y0[:, 6:])
    # The centripetal force on a circle.
    square = np.sum(y0[:, 4:6] ** 2, axis=1) * 4 * radius
    assert square.mean() == pytest.approx(1, abs=0.02)
    assert square.std() == pytest.approx(0.1, abs=0.02)


def test_data_are_made_once(tmp_path, monkeypatch):
    load = functools.partial(two_body.load, tmp_path, 5)

    def interrupted(file, **arrays):
        file.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load(3, 2, 1)
    first = load(3, 2, 1)
    (path,) = (tmp_path / "two_body").glob("*.npz")
    assert first.train_ys.shape == (3, 5, 8)
    assert first.validation_ys.shape == (2, 5, 8)
    more = load(4, 2, 1)
    np.testing.assert_array_equal(more.test_ys, first.test_ys)
    assert not np.isin(first.test_y0, first.train_y0).any()

    monkeypatch.setattr(two_body, "integrate", None)
    again = load(3, 2, 1)
    for name, array in vars(first).items():
        np.testing.assert_array_equal(array, vars(again)[name])

    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ExperimentError, match="is damaged .* Delete it"):
        load(3, 2, 1)


# The model


@pytest.mark.usefixtures("x64")
def test_vector_field_is_that_of_the_energy():
    model = _model()
    y = jr.normal(jr.key(1), (8,), jnp.float64)
    by_y = [
        (model.energy(y + 1e-6 * e) - model.energy(y - 1e-6 * e)) / 2e-6
        for e in jnp.eye(8)
    ]
    expected = jnp.stack([*by_y[4:], *(-x for x in by_y[:4])])
    np.testing.assert_allclose(model(0.0, y, None), expected, atol=1e-9)
    assert jnp.max(jnp.abs(expected)) > 0.01

    options = _SMALL.options_for("tsit5", 20)
    ys = solve(model, y, jnp.linspace(0.5, 10, 20), **options).ys
    assert jnp.max(jnp.abs(ys - y)) > 0.1
    energies = jax.vmap(model.energy)(ys)
    np.testing.assert_allclose(energies, model.energy(y), rtol=1e-9)


@pytest.mark.usefixtures("x64")
def test_orbits_turn_with_gravity():
    """The same solve, of the true field, gives the true orbits."""
    y0 = two_body.initial_states(1, np.random.default_rng(0))
    ts = np.linspace(0, 10, 21)[1:]
    field: Any = two_body.gravity
    names: tuple[SolverName, ...] = ("deer_newton", "dopri5", "tsit5")
    for name in names:
        options = _SMALL.options_for(name, 20)
        ys = solve(field, jnp.asarray(y0[0]), jnp.asarray(ts), **options).ys
        tolerance = 1e-5 if name == "deer_newton" else 1e-8
        np.testing.assert_allclose(ys, two_body.integrate(y0, ts)[0], atol=tolerance)


# Loss and memory


def _loss_fn(name: SolverName) -> Any:
    ts = jnp.linspace(0, 10, 21)[1:]
    return make_loss(functools.partial(_SMALL.options_for, name), ts)


def _problem(num_times: int = 20) -> tuple[Any, Any, Any]:
    """A memory of four samples that knows nothing, and a batch of two of them."""
    y0 = jnp.asarray(two_body.initial_states(4, np.random.default_rng(0)))
    solver = _SMALL.options_for("deer_newton", 20)["solver"]
    memory = warm_start.cold(solver, diffrax.ODETerm(_model()), 10.0, y0)
    indices = jnp.array([2, 0])
    return memory, y0, (indices, y0[indices], jnp.zeros((2, num_times, 8)))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_all_solvers_give_the_same_loss_and_gradient():
    memory, _, batch = _problem()

    def differentiate(name: SolverName, memory: Any) -> tuple[Any, Any]:
        loss = eqx.filter_value_and_grad(_loss_fn(name), has_aux=True)
        (value, memory), gradient = eqx.filter_jit(loss)(
            _model(), memory, batch, jr.key(0)
        )
        assert (memory is None) == (name != "deer_newton")
        return value, gradient

    value, gradient = differentiate("tsit5", None)
    size = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(gradient))
    assert size > 0.1
    names: tuple[SolverName, ...] = ("deer", "deer_newton", "deer_sequential", "dopri5")
    for name in names:
        other = differentiate(name, memory if name == "deer_newton" else None)
        np.testing.assert_allclose(other[0], value, rtol=1e-7)
        close = functools.partial(np.testing.assert_allclose, atol=1e-6 * size)
        jax.tree.map(close, other[1], gradient)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_trajectories_are_kept_while_the_horizon_grows():
    loss = eqx.filter_jit(_loss_fn("deer_newton"))
    memory, _, batch = _problem()
    assert warm_start.mean_iterations(memory) is None
    assert warm_start.mean_iterations(None) is None
    halfway = (*batch[:2], batch[2][:, :10])
    value, memory = loss(_model(), memory, halfway, jr.key(0))
    cold = warm_start.mean_iterations(memory)
    assert memory.ts.shape == (4, 81)
    for sample in (0, 2):
        np.testing.assert_allclose(memory.ts[sample, :41], np.linspace(0, 5, 41))
        np.testing.assert_allclose(memory.ts[sample, 41:], 5.0)
    for sample in (1, 3):
        assert not memory.ts[sample].any()

    # Of the same model, the trajectory is known but for the check that it is.
    again, memory = loss(_model(), memory, halfway, jr.key(0))
    warm = warm_start.mean_iterations(memory)
    np.testing.assert_allclose(again, value, rtol=1e-12)
    assert cold is not None
    assert warm is not None
    assert warm < cold

    # Beyond what is known the guess is predicted, and the answer does not depend on it.
    fresh, _, _ = _problem()
    expected, known = loss(_model(), fresh, batch, jr.key(0))
    longer, memory = loss(_model(), memory, batch, jr.key(0))
    np.testing.assert_allclose(longer, expected, rtol=1e-10)
    np.testing.assert_allclose(memory.ts[0], np.linspace(0, 10, 81))
    np.testing.assert_allclose(memory.ys, known.ys, atol=1e-9)
    _, memory = loss(_model(1), memory, batch, jr.key(0))
    assert jnp.isfinite(memory.ys).all()


def test_horizon_grows_in_stages():
    config = Config(steps=10, stages=4, num_times=40, num_steps=48)
    lengths = [config.num_times_at(step) for step in range(10)]
    assert lengths == [10, 10, 10, 20, 20, 30, 30, 30, 40, 40]
    assert [
        config.options_for("deer_newton", length)["solver"].num_steps
        for length in (10, 20, 40)
    ] == [12, 24, 48]


# The experiment


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, r"--steps is 0\. Choose at least 1"),
        ({"stages": 0}, "--stages is 0. Choose at least 1"),
        ({"num_test": 0}, "--num-test is 0. Choose at least 1"),
        ({"batch_size": 9, "num_train": 8}, "--num-train has 8 training examples"),
        ({"stages": 3, "num_times": 10}, "--num-times is 10, which --stages 3 does"),
        ({"stages": 3, "num_times": 9, "num_steps": 5}, "--num-steps is 5, which"),
    ],
)
def test_bad_arguments(tmp_path, arguments, message):
    out = tmp_path / "run"
    with pytest.raises(ExperimentError, match=message):
        main(Config(**arguments, out=out, data_dir=tmp_path))
    assert not out.exists()


@pytest.mark.slow
def test_smoke(tmp_path):
    out, names = tmp_path / "run", ("deer_newton", "tsit5")
    arguments = ("--smoke", "--solver", *names, "--out", out, "--data-dir", tmp_path)
    finished = execute(_MODULE, *arguments)
    assert finished.returncode == 0, finished.stderr
    for word in ("trajectory error", "energy drift", "iterations, warm", *names):
        assert word in finished.stdout
    for picture in ("training.png", "orbits.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")

    results = json.loads((out / "results.json").read_text())
    assert results["config"]["num_times"] == 10
    assert tuple(results["solvers"]) == names
    for name, solver in results["solvers"].items():
        assert len(solver["losses"]) == results["config"]["steps"]
        assert len(solver["compile_seconds"]) == results["config"]["stages"]
        final = solver["final"]
        assert (final["num_iterations"] is None) == (name == "tsit5")
        assert (final["num_iterations_warm"] is None) == (name == "tsit5")
        assert final["trajectory_error"] > 0
        assert final["energy_drift"] > 0
        assert final["validation_loss"] > 0
        assert final["solve_error"] < 1e-2
    losses = [solver["losses"] for solver in results["solvers"].values()]
    np.testing.assert_allclose(*losses, rtol=1e-3)


@pytest.mark.slow
def test_killed_and_resumed_run_equals_an_uninterrupted_one(tmp_path):
    check_resumption(
        _MODULE,
        tmp_path,
        *("--solver", "deer_newton", "--steps", "200", "--evaluations", "100"),
        *("--num-steps", "8", "--num-times", "8", "--batch-size", "2", "--width", "4"),
        *("--depth", "1", "--num-train", "4", "--num-test", "2"),
        *("--num-validation", "2", "--data-dir", tmp_path, "--stages", "2"),
        after=110,
    )
