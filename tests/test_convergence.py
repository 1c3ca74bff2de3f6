"""Hard problems end in the answer of the sequential solver, warm starts end early."""

import json

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffrax_deer import (
    ConstantPredictor,
    DEERAdjoint,
    DEERSolver,
    WholeInterval,
)
from experiments import iterates
from experiments.common.errors import ExperimentError
from experiments.common.problems import PROBLEMS
from experiments.convergence import grid, solve

from .helpers import newton_solver, relative_error, slowly

# The most iterations from the constant guess; without an entry, as many as steps. What
# a prototype of this iteration needed was 137, 40, 220 and 9.
_LIMITS = {
    "lotka_volterra_100": 100,
    "van_der_pol_10": 30,
    "lorenz": 150,
    "two_body": 9,
}
# Over eighteen Lyapunov times what is left of the tolerance grows by e**18 = 7e7.
_TOLERANCES = {"lorenz": 1e-6}


_QUICK = "lotka_volterra_100", "robertson", "near_collision", "square_root"
# Easier than others of their kind; `experiments.convergence` has all.
_EASY = "lotka_volterra_10", "fitzhugh_nagumo_100", "van_der_pol_1", "two_body"


@pytest.mark.parametrize(
    "name",
    [
        *_QUICK,
        *[slowly(name) for name in PROBLEMS if name not in (*_QUICK, *_EASY)],
    ],
)
def test_a_hard_problem_has_the_sequential_answer(name):
    problem = PROBLEMS[name]
    ts = grid(problem)
    expected = eqx.filter_jit(solve)(problem, ts, problem.solver, problem.y0, None)
    assert expected.result == diffrax.RESULTS.successful
    for predictor in (ConstantPredictor(), None):
        solver = newton_solver(problem.solver, num_steps=1, predictor=predictor)
        sol = eqx.filter_jit(solve)(problem, ts, solver, problem.y0, None)
        assert sol.result == diffrax.RESULTS.successful
        assert relative_error(sol.ys, expected.ys) < _TOLERANCES.get(name, 1e-8)
        limit = len(ts) - 1 if predictor is None else _LIMITS.get(name, len(ts) - 1)
        assert sol.stats["num_newton_iterations"] <= limit
    # With the default settings the guess is good enough for hard problems, too; but a
    # step three times as long leads nowhere where each is twice as long as the last.
    if name != "robertson":
        assert sol.stats["num_newton_iterations"] <= 20


@pytest.mark.parametrize("name", ["square_root", "fitzhugh_nagumo_100"])
def test_a_window_takes_the_same_steps_in_pieces(name):
    problem = PROBLEMS[name]
    ts = grid(problem)

    def run(window):
        solver = newton_solver(problem.solver, num_steps=1, window=window)
        return eqx.filter_jit(solve)(problem, ts, solver, problem.y0, None)

    whole, pieces = run(None), run(64)
    assert pieces.result == diffrax.RESULTS.successful
    assert relative_error(pieces.ys, whole.ys) < 1e-9
    count = "num_newton_iterations"
    assert whole.stats[count] <= pieces.stats[count] <= len(ts) - 1


# ---- Stiff ----


@pytest.mark.slow
@pytest.mark.parametrize("rtol", [1e-4, 1e-7])
def test_robertson_matches_the_sequential_solver_at_the_same_tolerance(rtol):
    problem = PROBLEMS["robertson"]

    def run(solver, rtol):
        parallel = isinstance(solver, DEERSolver)
        return diffrax.diffeqsolve(
            diffrax.ODETerm(problem.field),
            solver,
            0.0,
            problem.t1,
            1e-5,
            problem.y0,
            saveat=diffrax.SaveAt(ts=jnp.geomspace(1e-2, 1e5, 12)),
            stepsize_controller=diffrax.PIDController(rtol=rtol, atol=1e-4 * rtol),
            adjoint=DEERAdjoint() if parallel else diffrax.DirectAdjoint(),
            max_steps=2**11,
        )

    # `problem.solver` finds its roots to more than this tolerance.
    exact = np.asarray(eqx.filter_jit(run)(problem.solver, 1e-10).ys)
    error = lambda ys: np.max(np.abs(np.asarray(ys) - exact) / scale)
    scale = np.abs(exact) + 1e-4 * rtol
    expected = eqx.filter_jit(run)(diffrax.Kvaerno5(), rtol)
    got = eqx.filter_jit(run)(newton_solver(diffrax.Kvaerno5(), num_steps=16), rtol)
    assert error(got.ys) < 10 * max(error(expected.ys), rtol)
    # And with fewer windows than a tenth of the steps in sequence.
    assert 10 * int(got.stats["num_steps"]) < int(expected.stats["num_steps"])


# ---- Warm starts ----


class _Hamiltonian(eqx.Module):
    energy: eqx.nn.MLP

    def __call__(self, t, y, args):
        gradient = jax.grad(lambda y: self.energy(y))(y)
        half = y.size // 2
        return jnp.concatenate([gradient[half:], -gradient[:half]])


class _Field(eqx.Module):
    network: eqx.nn.MLP

    def __call__(self, t, y, args):
        return self.network(y)


def _neural_ode(key):
    network = eqx.nn.MLP(2, 2, 64, 2, jax.nn.softplus, jnp.tanh, key=key)
    return _Field(network), 2


def _hamiltonian(key):
    network = eqx.nn.MLP(8, "scalar", 64, 6, jax.nn.softplus, key=key)
    return _Hamiltonian(network), 8


def _cast(tree, dtype):
    is_float = eqx.is_inexact_array
    return jax.tree.map(lambda x: x.astype(dtype) if is_float(x) else x, tree)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "dtype", "most"),
    [(_neural_ode, jnp.float64, 4), (_hamiltonian, jnp.float32, 3)],
)
def test_after_a_training_step_a_warm_start_takes_few_iterations(make, dtype, most):
    # Samples drawn at random in each step; each keeps the solution it had last.
    key = jax.random.key(0)
    field, size = make(key)
    field = _cast(field, dtype)
    num_samples, batch, num_steps = 12, 4, 100
    y0s = jax.random.normal(key, (num_samples, size), dtype)
    targets = jnp.sin(jnp.arange(num_samples * size, dtype=dtype)).reshape(-1, size)
    t0, t1 = jnp.zeros((), dtype), jnp.asarray(4.0, dtype)
    solver = newton_solver(num_steps=num_steps)
    optimizer = optax.adam(1e-3)

    def solve(field, y0, state):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            solver,
            t0,
            t1,
            None,
            y0,
            saveat=diffrax.SaveAt(t1=True, solver_state=True),
            stepsize_controller=WholeInterval(),
            adjoint=DEERAdjoint(),
            solver_state=state,
        )
        return sol.ys[0], sol.solver_state

    @eqx.filter_jit
    def step(field, optimizer_state, states, index):
        @eqx.filter_grad(has_aux=True)
        def gradient(field):
            batch_states = jax.tree.map(lambda s: s[index], states)
            solve_all = jax.vmap(solve, in_axes=(None, 0, 0))
            ys, new_states = solve_all(field, y0s[index], batch_states)
            return jnp.mean((ys - targets[index]) ** 2), new_states

        gradients, new = gradient(field)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state)
        states = jax.tree.map(lambda s, n: s.at[index].set(n), states, new)
        return eqx.apply_updates(field, updates), optimizer_state, states, new

    init = lambda y0: solver.init(diffrax.ODETerm(field), t0, t1, y0, None)
    states = jax.vmap(init)(y0s)
    optimizer_state = optimizer.init(eqx.filter(field, eqx.is_inexact_array))
    rng, seen, num_checked = np.random.default_rng(0), {}, 0
    for number in range(16):
        index = rng.choice(num_samples, batch, replace=False)
        with jax.numpy_dtype_promotion("standard"):  # optax asks for it
            field, optimizer_state, states, new = step(
                field, optimizer_state, states, jnp.asarray(index)
            )
        for i, count in zip(index, new.num_iterations, strict=True):
            if i in seen and number - seen[i] <= 1:
                assert count <= most, (number, i, int(count))
                num_checked += 1
            seen[i] = number
    assert len(seen) == num_samples and num_checked > 10


def test_a_previous_solution_is_a_guess_also_beyond_its_interval():
    field = lambda t, y, args: jnp.stack([y[1], (1 - y[0] ** 2) * y[1] - y[0]])
    y0 = jnp.array([2.0, 0.0])

    def run(solver, t1):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            solver,
            0.0,
            t1,
            None,
            y0,
            saveat=diffrax.SaveAt(t1=True, dense=True, solver_state=True),
            stepsize_controller=WholeInterval(),
            adjoint=DEERAdjoint(),
        )

    constant = newton_solver(num_steps=100, predictor=ConstantPredictor())
    previous = cold = run(constant, 10.0)
    same = run(newton_solver(num_steps=100, guess=previous), 10.0)
    longer = run(newton_solver(num_steps=100, guess=previous), 12.0)
    assert same.solver_state.num_iterations < 3 < cold.solver_state.num_iterations
    assert longer.result == diffrax.RESULTS.successful
    assert relative_error(same.ys, cold.ys) < 1e-9
    assert relative_error(longer.ys, run(constant, 12.0).ys) < 1e-9


def test_iterates_are_drawn(tmp_path):
    out = tmp_path / "iterates.json"
    errors = iterates.main(iterates.Config(smoke=True, out=out))["errors"]
    # Rounding, after 8 iterations of Newton's method for 20 steps.
    assert errors["Newton"][0] > 1
    assert errors["Newton"][-1] < 1e-12
    assert errors["Picard"][-1] > 1e-3
    assert json.loads(out.read_text())["errors"] == errors
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_no_iterates_are_asked_for(tmp_path):
    config = iterates.Config(num_iterations=0, out=tmp_path / "iterates.json")
    with pytest.raises(ExperimentError, match="--num-iterations"):
        iterates.main(config)
