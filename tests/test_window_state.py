"""Guesses: an earlier trajectory in the state of the solver, or a path."""

from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrax_deer import (
    ConstantPredictor,
    DEERAdjoint,
    DEERSolver,
    Newton,
    Sequential,
    WholeInterval,
    WindowState,
)
from diffrax_deer._ode.window_state import initial_guess

from .helpers import newton_solver, problems
from .oracle import assert_equal, one_by_one

_VDP = problems["van_der_pol"]
_TERM = diffrax.ODETerm(_VDP.field)
# What is guessed decides on the number of iterations.
_COLD = Newton(predictor=ConstantPredictor())
_SAVE = diffrax.SaveAt(t1=True, solver_state=True)


def _solve(solver, *, t0: Any = 0.0, t1: Any = 2.0, y0: Any = None, **kwargs: Any):
    kwargs = dict(stepsize_controller=WholeInterval(), saveat=_SAVE) | kwargs
    y0 = jnp.asarray(_VDP.y0) if y0 is None else y0
    args = jnp.asarray(_VDP.args)
    return diffrax.diffeqsolve(_TERM, solver, t0, t1, None, y0, args, **kwargs)


def _iterations(sol):
    return int(sol.solver_state.num_iterations)


# ---- Where a guess comes from ----

_TS = jnp.array([0.0, 1.0, 1.5, 3.0])
_YS = jnp.array([[0.0, 1.0], [2.0, 3.0], [1.0, -1.0], [4.0, 0.0]])
_STATE = WindowState(_TS[0], _TS[1:], _YS[0], _YS[1:], jnp.array(3))
_Y0 = jnp.array([0.0, 1.0])


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_earlier_trajectory_is_interpolated_and_ends_half_a_step_after_its_end(dtype):
    ts = jnp.array([-0.6, -0.4, 0.0, 0.25, 1.0, 1.2, 2.9, 3.0, 3.7, 3.8, 9.0], dtype)
    state = jax.tree.map(lambda x: x.astype(dtype), _STATE)
    ys = initial_guess(None, _TERM, ts, _Y0.astype(dtype), state)
    expected = np.stack([np.interp(ts, _TS, _YS[:, i]) for i in range(2)], axis=1)
    expected[[0, -2, -1]] = np.inf
    assert ys.dtype == dtype
    np.testing.assert_allclose(
        ys, expected, rtol=1e-6 if dtype == jnp.float32 else 1e-14
    )


def test_trajectory_on_the_same_times_is_the_guess_as_it_is():
    # Not even rounded.
    ys = initial_guess(None, _TERM, _TS[1:], _Y0, _STATE)
    np.testing.assert_array_equal(ys, _YS[1:])


def test_first_window_has_no_guess():
    solver = DEERSolver(num_steps=3)
    state = solver.init(_TERM, 0.0, 1.0, jnp.asarray(_VDP.y0), None)
    ys = initial_guess(None, _TERM, state.ends, _Y0, state)
    assert ys.shape == (3, 2)
    assert np.isinf(ys).all()


class _Endless(diffrax.AbstractPath):
    t0 = None  # pyright: ignore
    t1 = None  # pyright: ignore

    def evaluate(self, t0, t1=None, left=True):
        return {"a": jnp.stack([t0, t0**2]), "b": jax.lax.complex(0 * t0, t0)}


@pytest.mark.filterwarnings("ignore:Complex dtype support")
def test_path_is_constant_before_its_beginning_and_beyond_its_end():
    t = jnp.array([-0.5, 0.5, 2.0, 9.0])
    path = diffrax.LinearInterpolation(_TS, _YS)
    ys = initial_guess(path, _TERM, t, _Y0, _STATE)
    expected = [np.interp(t, _TS, _YS[:, i]) for i in range(2)]
    np.testing.assert_allclose(ys, np.stack(expected, axis=1), rtol=1e-14)
    y0 = {"a": jnp.ones(2), "b": jnp.array(1j)}
    expected = np.stack([t, t**2, np.zeros(4), t], axis=1)
    ys = initial_guess(_Endless(), _TERM, t, y0, _STATE)
    np.testing.assert_allclose(ys, expected, rtol=1e-14)


@pytest.mark.parametrize(
    ("y0", "match"),
    [
        (jnp.zeros(3), r"`guess.evaluate\(t\)` must have the"),
        ({"a": jnp.zeros(2)}, "structure and shapes of `y0`"),
        (jnp.zeros(2, complex), "be complex where it is"),
    ],
)
def test_path_of_another_structure_is_refused(y0, match):
    path = diffrax.LinearInterpolation(_TS, _YS)
    with pytest.raises(ValueError, match=match):
        initial_guess(path, _TERM, _TS, y0, _STATE)


# ---- What it is good for ----


def test_warm_start_needs_fewer_iterations_and_gives_the_same_answer():
    solver = newton_solver(num_steps=100, method=_COLD)

    @jax.jit
    def run(y0, state):
        return _solve(solver, t1=6.0, y0=y0, solver_state=state)

    y0 = jnp.asarray(_VDP.y0)
    cold = run(y0, solver.init(_TERM, 0.0, 6.0, y0, None))
    again = run(y0, cold.solver_state)
    moved = run(y0 * (1 + 1e-4), cold.solver_state)
    assert _iterations(cold) > 6
    assert _iterations(again) == 1
    assert _iterations(moved) <= 4
    windows, args = (jnp.zeros(1), jnp.full(1, 6.0)), jnp.asarray(_VDP.args)
    for sol, start in ((again, y0), (moved, y0 * (1 + 1e-4))):
        steps = one_by_one(_TERM, diffrax.Dopri5(), windows, 100, start, args)
        assert_equal(sol.ys[-1], steps.last())


def test_warm_start_survives_windows_that_are_solved_together():
    solver = newton_solver(num_steps=1, method=_COLD)

    def run(state):
        steps = diffrax.StepTo(jnp.linspace(0.0, 2.0, 65))
        kwargs = dict(stepsize_controller=steps, adjoint=DEERAdjoint())
        return _solve(solver, solver_state=state, **kwargs)

    cold = jax.jit(run)(None)
    warm = jax.jit(run)(cold.solver_state)
    assert warm.stats["num_newton_iterations"] == 1
    assert cold.stats["num_newton_iterations"] > 1
    assert_equal(warm.ys, cold.ys)


@pytest.mark.parametrize("direction", [1, -1])
def test_any_path_is_a_guess_in_the_time_of_the_user(direction):
    t0, t1 = (0.0, 2.0) if direction == 1 else (2.0, 0.0)

    @jax.jit
    def run():
        coarse = _solve(
            diffrax.Heun(),
            t0=t0,
            t1=t1,
            stepsize_controller=diffrax.StepTo(jnp.linspace(t0, t1, 21)),
            saveat=diffrax.SaveAt(dense=True),
            max_steps=20,
        )
        solver = newton_solver(num_steps=60, method=_COLD)
        guided = newton_solver(num_steps=60, method=_COLD, guess=coarse)
        return [_solve(solver, t0=t0, t1=t1) for solver in (solver, guided)]

    cold, guided = run()
    assert_equal(guided.ys, cold.ys)
    assert _iterations(guided) <= _iterations(cold) - 2


def test_solution_of_several_terms_is_its_own_guess_backwards_in_time():
    terms = (
        diffrax.ODETerm(lambda t, y, args: y),
        diffrax.ODETerm(lambda t, y, args: -jnp.sin(y)),
    )
    y0, inner = (jnp.array([1.0]), jnp.array([0.5])), diffrax.SemiImplicitEuler()

    def run(solver, saveat):
        kwargs: Any = dict(stepsize_controller=WholeInterval(), max_steps=1)
        steps = kwargs | {"saveat": saveat}
        return diffrax.diffeqsolve(terms, solver, 3.0, 0.0, None, y0, **steps)

    @jax.jit
    def both():
        first = run(DEERSolver(inner, 100), diffrax.SaveAt(dense=True))
        guided = newton_solver(inner, 100, method=_COLD, guess=first)
        return run(guided, _SAVE), run(newton_solver(inner, 100, method=_COLD), _SAVE)

    guided, cold = both()
    assert _iterations(guided) <= 1 < _iterations(cold)
    assert_equal(guided.ys, cold.ys)


# ---- The state ----


def test_state_is_the_trajectory_and_carries_no_derivative():
    methods = Newton(), Sequential()

    def run(y0, method):
        return _solve(DEERSolver(num_steps=50, method=method), y0=y0).solver_state

    @jax.jit
    def states(y0):
        found = [run(y0, method) for method in methods]
        tangent = jax.jvp(lambda y0: run(y0, Newton()).ys, (y0,), (y0,))[1]
        return found, tangent

    y0 = jnp.asarray(_VDP.y0)
    (newton, sequential), tangent = states(y0)
    windows, args = (jnp.zeros(1), jnp.full(1, 2.0)), jnp.asarray(_VDP.args)
    steps = one_by_one(_TERM, diffrax.Dopri5(), windows, 50, y0, args)
    for state in (newton, sequential):
        np.testing.assert_allclose(state.ts, np.linspace(0.0, 2.0, 51))
        assert_equal(state.y0, y0)
        assert_equal(state.ys, steps.ys)
    assert 2 < int(newton.num_iterations) < 10
    assert int(sequential.num_iterations) == 0
    np.testing.assert_array_equal(tangent, 0.0)


@pytest.mark.parametrize(
    "y0", [(2, 0), (np.float32(2.0), np.float32(0.0))], ids=["integers", "single"]
)
def test_state_is_of_the_type_that_diffrax_makes(y0):
    term = diffrax.ODETerm(lambda t, y, args: (y[1], -y[0]))
    solver = DEERSolver(num_steps=8)
    state = solver.init(term, 0, 1, y0, None)
    run = lambda **kwargs: diffrax.diffeqsolve(
        term, solver, 0, 1, None, y0, stepsize_controller=WholeInterval(), **kwargs
    )
    given, made = jax.jit(lambda: (run(solver_state=state), run()))()
    assert_equal(given.ys, made.ys)
    steps = one_by_one(term, solver.solver, (jnp.zeros(1), jnp.ones(1)), 8, (2.0, 0.0))
    assert_equal(jax.tree.map(lambda y: y[-1], given.ys), steps.last())


@pytest.mark.parametrize("adjoint", [None, DEERAdjoint()], ids=["default", "deer"])
def test_state_of_another_number_of_steps_is_refused_where_it_does_not_fit(adjoint):
    adjoint = diffrax.RecursiveCheckpointAdjoint() if adjoint is None else adjoint
    state = DEERSolver(num_steps=6).init(_TERM, 0.0, 1.0, jnp.asarray(_VDP.y0), None)
    controller = diffrax.PIDController(rtol=1e-3, atol=1e-3)
    kwargs = dict(stepsize_controller=controller, solver_state=state, max_steps=16)
    with pytest.raises(ValueError, match="is that of 6 steps, but .* has 5 steps"):
        _solve(DEERSolver(num_steps=5), adjoint=adjoint, **kwargs)
    with pytest.raises(ValueError, match="of 6 steps, but .* has a single step"):
        _solve(DEERSolver(), adjoint=adjoint, **kwargs)
    y0, args = jnp.asarray(_VDP.y0), jnp.ones(())
    kwargs["solver_state"] = DEERSolver().init(_TERM, 0.0, 1.0, y0, args)
    with pytest.raises(ValueError, match="of a single step, but .* has 5 steps"):
        _solve(DEERSolver(num_steps=5), adjoint=adjoint, **kwargs)
