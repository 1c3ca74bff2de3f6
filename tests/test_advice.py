"""`advise` on problems whose numbers are known."""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrax_deer import (
    Advice,
    DEERSolver,
    DiagonalJacobian,
    Picard,
    PiecewiseConstant,
    advise,
)
from diffrax_deer._cost_model import CostModel, predict
from diffrax_deer._measurement import Problem, rates, solve_adaptively

from .helpers import problems


def _linear(t, y, args):
    del t
    return jnp.matmul(args, y, precision=jax.lax.Precision.HIGHEST)


def _solve(advice: Advice, terms: Any, problem: Any) -> Any:
    return diffrax.diffeqsolve(
        terms,
        advice.solver,
        problem.t0,
        problem.t1,
        None,
        problem.y0,
        problem.args,
        stepsize_controller=advice.stepsize_controller,
        adjoint=advice.adjoint,
        max_steps=2**14,
    ).ys


def _model(**changes: Any) -> CostModel:
    """FitzHugh-Nagumo, up to t=100."""
    kwargs: dict[str, Any] = {
        "num_steps": 139,
        "grid_steps": 347,
        "stages": 6,
        "implicit": False,
        "flops": 12.0,
        "state_size": 2,
        "batch_size": 1,
        "linearization": PiecewiseConstant(),
        "platform": "cpu",
    }
    return CostModel(**(kwargs | changes))


# ---- Rates ----


@pytest.mark.parametrize("size", [3, 100])
@pytest.mark.parametrize("direction", [1, -1])
def test_rates_of_a_linear_field(size: int, direction: int):
    # The second size is one at which the norm is found by power iteration.
    values = np.linspace(-1.0, -0.2, size)
    values[0] = -3.0
    rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(size, size)))
    matrix = jnp.asarray(rotation @ np.diag(values) @ rotation.T)
    problem = Problem(
        diffrax.ODETerm(_linear), 0.0, direction * 20.0, jnp.ones(size), matrix
    )
    solve = solve_adaptively(problem, diffrax.Dopri5(), 1e-6, 1e-9, 4096)
    assert solve.successful
    lipschitz, lyapunov = rates(problem, solve)
    np.testing.assert_allclose(lipschitz, 3.0, rtol=1e-6)
    # Backwards the fastest decay is the fastest growth; of many rates that are close
    # to each other a short interval does not single out the largest.
    expected = -0.2 if direction == 1 else 3.0
    np.testing.assert_allclose(lyapunov, expected, atol=0.15 if size == 100 else 0.05)


def test_a_quadrature_is_no_part_of_the_state():
    # Alone it would neither grow nor decay.
    def field(t, y, args):
        return -jnp.sin(t) - 3 * y[0], jnp.sum(y[0])

    y0 = jnp.ones(2), jnp.zeros(())
    advice = advise(diffrax.ODETerm(field), 0.0, 5.0, y0, None)
    assert advice.state_size == 2
    assert advice.lipschitz == pytest.approx(3, rel=1e-6)
    assert advice.lyapunov == pytest.approx(-3, rel=1e-3)


def test_lorenz_is_chaotic_and_solved_in_sequence():
    problem = problems["lorenz"].cast(jnp.float64)
    advice = advise(diffrax.ODETerm(problem.field), 0.0, 40.0, problem.y0, problem.args)
    assert 0.6 < advice.lyapunov < 1.2
    assert advice.chaotic
    assert advice.lyapunov_times == advice.lyapunov * 40.0
    assert "chaotic" in advice.recommendation
    if isinstance(advice.solver, DEERSolver):
        assert advice.solver.forward is None


# ---- Recommendations ----


def test_an_oscillator_over_a_long_time_is_solved_by_what_is_recommended():
    problem = problems["fitzhugh_nagumo"].cast(jnp.float64)._replace(t1=100.0)
    terms = diffrax.ODETerm(problem.field)

    def ask(batch_size):
        return advise(
            terms, 0.0, 100.0, problem.y0, problem.args, batch_size=batch_size
        )

    advice = ask(1)
    assert isinstance(advice.solver, DEERSolver)
    assert not advice.stiff
    assert not advice.chaotic
    assert 100 < advice.num_steps < 200
    assert advice.warm_iterations is not None and advice.cold_iterations is not None
    assert 1 < advice.warm_iterations < 10
    assert 1 < advice.cold_iterations < 30
    expected = diffrax.diffeqsolve(
        terms,
        diffrax.Dopri5(),
        0.0,
        100.0,
        None,
        problem.y0,
        problem.args,
        stepsize_controller=diffrax.PIDController(rtol=1e-5, atol=1e-8),
    ).ys
    assert expected is not None
    np.testing.assert_allclose(
        _solve(advice, terms, problem), np.asarray(expected), atol=1e-3
    )

    numbers = [advice.num_steps, advice.grid_steps, advice.cold_iterations]
    for number in [*numbers, advice.warm_iterations, f"{advice.lipschitz:.3g}"]:
        assert str(number) in str(advice)
    assert advice.recommendation.split() == str(advice).split("\n\n")[1].split()
    assert "steps in sequence" in str(advice)

    large = ask(64)
    assert isinstance(large.solver, DEERSolver)
    assert large.solver.forward is None
    # A controller's steps are then found in sequence as well.
    assert "with num_steps=1 chooses another" in large.recommendation


def test_two_steps_are_left_to_the_sequential_solver():
    # Float32, backwards, and a structured state.
    field = lambda t, y, rate: {"x": -rate["k"] * y["x"], "v": -y["v"]}
    times = jnp.float32(0.0), jnp.float32(-0.01)
    y0 = {"x": jnp.ones(2, jnp.float32), "v": jnp.float32(0.5)}
    args = {"k": jnp.float32(0.3), "name": "rate"}
    advice = advise(diffrax.ODETerm(field), *times, y0, args, atol=1e-5)
    assert advice.num_steps <= 4
    assert advice.state_size == 3
    assert type(advice.solver) is diffrax.Dopri5
    assert type(advice.stepsize_controller) is diffrax.PIDController
    assert "few" in advice.recommendation


def _robertson(t, y, args):
    del t
    a, b, c = y
    slow, medium, fast = args[0] * a, args[1] * b * c, args[2] * b**2
    return jnp.stack([medium - slow, slow - medium - fast, fast])


def test_a_stiff_problem_gets_an_implicit_solver():
    args = jnp.array([0.04, 1e4, 3e7])
    terms = diffrax.ODETerm(_robertson)
    y0 = jnp.array([1.0, 0.0, 0.0])
    advice = advise(terms, 0.0, 40.0, y0, args, max_steps=4096)
    assert advice.stiff
    assert advice.num_steps < 200
    assert advice.num_explicit_steps > 2000
    assert type(advice.sequential_solver) is diffrax.Kvaerno5
    inner = advice.solver
    if isinstance(inner, DEERSolver):
        inner = inner.solver
    assert type(inner) is diffrax.Kvaerno5
    assert "stiff" in advice.recommendation and "Kvaerno5" in advice.recommendation


class _Field(eqx.Module):
    weights: jax.Array

    def __call__(self, y):
        return -y + jnp.tanh(self.weights * jnp.roll(y, 1))


@pytest.mark.parametrize(("size", "kind"), [(20, DiagonalJacobian), (100, Picard)])
def test_a_large_state_has_no_dense_jacobians(size: int, kind: type):
    field = _Field(jnp.linspace(0.1, 0.9, size))
    terms = diffrax.ODETerm(lambda t, y, args: args(y))
    advice = advise(terms, 0.0, 5.0, jnp.linspace(-1, 1, size), field)
    assert type(advice.linearization) is kind
    assert f"{kind.__name__}()" in advice.recommendation
    assert "O(N D²)" in str(advice)
    if isinstance(advice.solver, DEERSolver):
        assert type(advice.solver.linearization) is kind


def test_a_solver_of_ones_own_is_kept():
    solver = DEERSolver(diffrax.Tsit5(), num_steps=3, linearization=Picard(), rtol=1e-6)
    problem = problems["linear"].cast(jnp.float64)
    advice = advise(
        diffrax.ODETerm(problem.field),
        0.0,
        20.0,
        problem.y0,
        problem.args,
        solver=solver,
    )
    assert type(advice.sequential_solver) is diffrax.Tsit5
    assert type(advice.linearization) is Picard
    assert isinstance(advice.solver, DEERSolver)
    assert type(advice.solver.solver) is diffrax.Tsit5
    assert advice.solver.rtol == 1e-6
    assert advice.solver.num_steps > 3


def test_many_uneven_steps_are_made_in_sequence():
    # Too many for Newton's method to be tried, which says nothing against the steps.
    field = lambda t, y, mu: jnp.stack([y[1], mu * (1 - y[0] ** 2) * y[1] - y[0]])
    terms = diffrax.ODETerm(field)
    times: dict[str, Any] = dict(t0=0.0, t1=300.0)
    y0, mu = jnp.array([2.0, 0.0]), jnp.array(8.0)
    advice = advise(terms, y0=y0, args=mu, rtol=1e-9, atol=1e-9, **times)
    assert advice.num_steps > 4096 and advice.warm_iterations is None
    assert advice.speedup_sequential_forward > 1.5
    assert isinstance(advice.solver, DEERSolver)
    most = int(advice.recommendation.split("max_steps=")[1].split()[0])
    sol = diffrax.diffeqsolve(
        terms,
        advice.solver,
        dt0=None,
        y0=y0,
        args=mu,
        stepsize_controller=advice.stepsize_controller,
        adjoint=advice.adjoint,
        max_steps=most,
        **times,
    )
    assert sol.stats["num_accepted_steps"] == advice.num_steps


def test_steps_that_are_doubled_and_states_of_integers():
    solver = DEERSolver(diffrax.HalfSolver(diffrax.Heun()))
    field = lambda t, y, args: jnp.stack([y[1], -y[0]])
    y0 = jnp.array([1, 0])
    advice = advise(diffrax.ODETerm(field), 0, 10, y0, solver=solver)
    assert advice.state_size == 2
    assert type(advice.sequential_solver) is diffrax.HalfSolver


# ---- The model ----


# Value and gradient, measured on two CPU cores: batch size, and the speed-ups of
# Newton's method (warm) and of what is done by default.
@pytest.mark.parametrize(
    ("batch_size", "newton", "in_sequence"),
    [(1, 5.2, 35.0), (64, 1.23, 2.4), (1000, 0.33, 2.1)],
)
def test_the_model_is_right_to_a_factor_of_three(batch_size, newton, in_sequence):
    got = predict(_model(batch_size=batch_size), 42, 7)
    for predicted, measured in [
        (got.speedup_gradient, newton),
        (got.speedup_sequential_forward, in_sequence),
    ]:
        assert predicted is not None
        assert measured / 3 < predicted < measured * 3


def test_what_the_model_cannot_say_is_none():
    failed = predict(_model(), None, None)
    assert failed.speedup_forward is None and failed.speedup_gradient is None
    assert failed.speedup_sequential_forward > 1
    huge = predict(_model(state_size=10_000), 5, 5)
    assert huge.speedup_forward is not None
    assert huge.speedup_gradient is None


def test_a_gradient_without_jacobians_always_fits():
    got = predict(_model(state_size=10_000, linearization=Picard()), 5, 5)
    assert got.speedup_gradient is not None


def test_on_an_accelerator_newton_is_better_than_steps_in_sequence():
    got = predict(_model(platform="gpu", batch_size=64), 42, 7)
    assert got.speedup_gradient is not None
    assert got.speedup_gradient > got.speedup_sequential_forward > 1


# ---- Bad input ----


_terms = diffrax.ODETerm(lambda t, y, args: -y)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"terms": lambda t, y, args: -y}, TypeError, "ODETerm"),
        ({"t1": 0.0}, ValueError, "two different"),
        ({"t1": float("inf")}, ValueError, "finite"),
        ({"y0": ()}, ValueError, "no number"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"batch_size": 1.5}, TypeError, "batch_size"),
        ({"rtol": 0.0}, ValueError, "rtol"),
        ({"atol": -1.0}, ValueError, "atol"),
        ({"max_steps": 0}, ValueError, "max_steps"),
        ({"solver": diffrax.Dopri5()}, TypeError, "DEERSolver"),
        ({"solver": DEERSolver(diffrax.Euler())}, ValueError, "error"),
    ],
)
def test_bad_arguments_are_explained(changes, error, match):
    kwargs = {"terms": _terms, "t0": 0.0, "t1": 1.0, "y0": jnp.ones(2)} | changes
    with pytest.raises(error, match=match):
        advise(**kwargs)


def test_noise_is_refused():
    path = diffrax.VirtualBrownianTree(0.0, 1.0, 1e-3, (), jax.random.key(0))
    noise = diffrax.ControlTerm(lambda t, y, args: y, path)
    with pytest.raises(ValueError, match="Brownian"):
        advise(diffrax.MultiTerm(_terms, noise), 0.0, 1.0, jnp.array(1.0))


def test_inside_of_jit_is_refused():
    def inside(y0):
        advise(_terms, 0.0, 1.0, y0)
        return y0

    closed_over = jax.jit(lambda y: (advise(_terms, 0.0, 1.0, jnp.ones(2)), y)[1])
    for function in (jax.jit(inside), jax.vmap(inside), closed_over):
        with pytest.raises(ValueError, match="outside of"):
            function(jnp.ones(2))


def test_a_solution_that_blows_up_is_explained():
    terms = diffrax.ODETerm(lambda t, y, args: y**2)
    with pytest.raises(RuntimeError, match="not finite"):
        advise(terms, 0.0, 2.0, jnp.array(1.0), max_steps=256)
