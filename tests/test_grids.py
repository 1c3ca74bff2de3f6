"""Where the steps of a window lie."""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array
from scipy.interpolate import interp1d

from diffrax_deer import (
    AbstractGrid,
    DEERAdjoint,
    DEERSolver,
    Equidistributed,
    Newton,
    Uniform,
    WholeInterval,
)
from diffrax_deer._ode.grids import between, spread

from .helpers import adjoints, each_adjoint, intervals, slowly
from .oracle import assert_equal, one_by_one

# As many steps as a `PIDController` with this tolerance accepts, and a tenth more.
_TOLERANCE, _NUM_STEPS, _T1 = 1e-4, 98, 100.0
_DOPRI5 = diffrax.Dopri5()
_PARAMS = jnp.array([0.5, 0.7, 0.8, 0.08])
_Y0, _TS = jnp.array([-1.0, 1.0]), jnp.linspace(0.0, _T1, 51)


def _neuron(t, y, params):
    # FitzHugh and Nagumo: long rests, and spikes in between.
    current, offset, slope, rate = params
    recovery = rate * (y[0] + offset - slope * y[1])
    return jnp.stack([y[0] - y[0] ** 3 / 3 - y[1] + current, recovery])


def _solver(
    num_steps: int | None = _NUM_STEPS,
    solver: diffrax.AbstractSolver = _DOPRI5,
    **kwargs: Any,
):
    grid = Equidistributed(_TOLERANCE, _TOLERANCE)
    return DEERSolver(solver, num_steps, grid=grid, **kwargs)


def _solve(
    solver: diffrax.AbstractSolver,
    y0: Array = _Y0,
    params: Array | None = _PARAMS,
    t0: Any = 0.0,
    t1: Any = _T1,
    **kwargs: Any,
) -> Any:
    options = {
        "saveat": diffrax.SaveAt(ts=_TS, solver_state=True),
        "stepsize_controller": WholeInterval(),
        "adjoint": DEERAdjoint(),
        "throw": False,
    }
    term = diffrax.ODETerm(kwargs.pop("field", _neuron))
    return diffrax.diffeqsolve(
        term, solver, t0, t1, None, y0, params, **options | kwargs
    )


_compiled = eqx.filter_jit(_solve)


def _parts(sol):
    ts = sol.solver_state.ts
    return (ts - ts[0]) / (ts[-1] - ts[0])


def _exact(y0=_Y0, **kwargs):
    pid = diffrax.PIDController(rtol=1e-11, atol=1e-11)
    loop = diffrax.RecursiveCheckpointAdjoint()
    more = {"adjoint": loop, "stepsize_controller": pid, "max_steps": 2**14}
    more |= {"saveat": diffrax.SaveAt(ts=_TS)}
    return _solve(diffrax.Dopri8(), y0, **more | kwargs).ys


@pytest.fixture(scope="module")
def cold():
    return _compiled(_solver())


# ---- Nodes ----


def test_uniform_is_what_none_means():
    ends = jnp.array([0.3, 1.7, 2.0])
    parts = jnp.broadcast_to(Uniform().fractions(7), (2, 8))
    expected = [np.linspace(0.3, 1.7, 8)[1:], np.linspace(1.7, 2.0, 8)[1:]]
    t0, ts = between(ends, parts)
    np.testing.assert_allclose(ts, np.concatenate(expected), rtol=1e-15)
    assert t0 == ends[0] and ts[6] == ends[1] and ts[-1] == ends[2]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_nodes_divide_the_weight_of_each_window_into_equal_parts(dtype):
    rng = np.random.default_rng(0)
    ts = np.concatenate([[2.0], 2 + np.cumsum(rng.uniform(0.1, 1, 40))])
    weights, ends = rng.uniform(0.1, 1, 40), np.array([ts[0], 7.3, ts[-1]])
    ys = np.stack([ts**2, -ts], axis=1)
    arrays = [jnp.asarray(x, dtype) for x in (ts, ys, weights, ends)]
    ts_, ys_, weights_, ends_ = arrays
    parts, guess = spread(ts_, ys_, weights_, ends_, 9)
    nodes = np.append(*between(ends_, parts))
    before = interp1d(ts, np.concatenate([[0.0], np.cumsum(weights)]))
    tolerance = 1e-12 if dtype == jnp.float64 else 2e-5
    # Away from the ends, which rounding may put outside.
    between_nodes = np.diff(before(np.clip(nodes, ts[0], ts[-1]))).reshape(2, 9)
    equal = np.broadcast_to(between_nodes.mean(axis=1, keepdims=True), (2, 9))
    np.testing.assert_allclose(between_nodes, equal, rtol=tolerance)
    expected = interp1d(ts, ys, axis=0)(np.clip(nodes, ts[0], ts[-1]))
    np.testing.assert_allclose(guess, expected, rtol=tolerance, atol=tolerance)


# ---- A cold start ----


def test_cold_grid_is_as_good_as_a_controller_and_better_than_equal_steps(cold):
    exact = _exact()
    pid = diffrax.PIDController(rtol=_TOLERANCE, atol=_TOLERANCE)
    loop = diffrax.RecursiveCheckpointAdjoint()
    more = {"adjoint": loop, "saveat": diffrax.SaveAt(ts=_TS)}
    sol = _solve(_DOPRI5, stepsize_controller=pid, **more)
    assert int(1.1 * sol.stats["num_accepted_steps"]) + 2 == _NUM_STEPS
    error = lambda ys: np.max(np.abs(ys - exact))
    assert error(cold.ys) < error(sol.ys)
    assert cold.stats["largest_error"] == np.max(cold.solver_state.errors) < 1
    equal = _solve(DEERSolver(_DOPRI5, _NUM_STEPS))
    assert not error(equal.ys) < 10 * error(sol.ys)


def test_too_few_steps_are_told_by_the_largest_error():
    sol = _solve(_solver(num_steps=60))
    assert sol.stats["largest_error"] > 1


def test_failed_solve_has_infinite_errors():
    sol = _solve(_solver(num_steps=8))
    assert sol.result == diffrax.RESULTS.nonfinite
    assert np.all(sol.solver_state.errors == np.inf)


def test_error_falls_with_the_order_of_the_solver():
    ts = jnp.linspace(0.0, 10.0, 51)
    field = lambda t, y, args: jnp.stack([y[1], -jnp.sin(y[0]) + jnp.cos(t)])
    options = {"t1": 10.0, "saveat": diffrax.SaveAt(ts=ts), "field": field}
    exact = _exact(**options)
    error = lambda n: np.max(np.abs(_solve(_solver(n), **options).ys - exact))
    assert 2**4.5 < error(64) / error(128) < 2**6


def test_each_sample_of_a_batch_has_its_own_grid(cold):
    y0s = jnp.stack([_Y0, jnp.array([1.0, 0.5]), jnp.array([0.1, -0.3])])
    t1s = jnp.array([_T1, _T1 - 7, _T1 - 20])
    solve = eqx.filter_vmap(lambda y0, t1: _solve(_solver(), y0, t1=t1))
    sols = eqx.filter_jit(solve)(y0s, t1s)
    assert np.ptp(sols.solver_state.ts[:, 50]) > 1
    assert np.all(sols.stats["largest_error"] < 1)
    np.testing.assert_allclose(sols.solver_state.ts[0], cold.solver_state.ts, 1e-9)
    np.testing.assert_allclose(sols.ys[0], cold.ys, 1e-7, 1e-7)


# ---- A warm start ----


def test_warm_grids_go_towards_equal_errors(cold):
    sol, y0 = cold, _Y0
    for _ in range(25):
        sol = _compiled(_solver(), y0, solver_state=sol.solver_state)
    first, last = cold.solver_state.errors, sol.solver_state.errors
    assert np.max(last) < 0.5 * np.max(first)
    assert np.max(last) / np.mean(last) < 0.5 * np.max(first) / np.mean(first)


def test_warm_nodes_move_with_the_ends_unless_the_grid_is_out_of_date(cold):
    state = cold.solver_state
    warm = _compiled(_solver(), solver_state=state)
    later = _compiled(_solver(), t1=jnp.array(1.02 * _T1), solver_state=state)
    assert later.solver_state.ts[-1] == 1.02 * _T1
    np.testing.assert_allclose(_parts(later), _parts(warm), rtol=1e-12)
    assert np.max(np.abs(_parts(warm) - _parts(cold))) > 1e-4
    assert state.error_bound == 2 * np.max(state.errors)
    # A failed solve, and one whose largest error has more than doubled.
    for error in (jnp.inf, 2.1 * np.max(state.errors)):
        stale = eqx.tree_at(lambda s: s.errors, state, state.errors.at[3].set(error))
        again = _compiled(_solver(), solver_state=stale)
        np.testing.assert_array_equal(again.solver_state.ts, state.ts)
    t1 = jnp.array(0.7 * _T1)
    far = _compiled(_solver(), t1=t1, solver_state=state)
    np.testing.assert_array_equal(far.ys, _compiled(_solver(), t1=t1).ys)


# ---- Derivatives ----


@pytest.mark.parametrize(
    ("adjoint", "method"),
    [
        (DEERAdjoint(), None),
        slowly(DEERAdjoint(), Newton()),
        slowly(diffrax.RecursiveCheckpointAdjoint(), None),
    ],
)
def test_gradient_is_that_of_a_plain_loop_over_the_same_nodes(cold, adjoint, method):
    ts, weights = jnp.linspace(1.0, 99.0, 21), jnp.linspace(-1.0, 1.0, 42)
    solver, state = _solver(method=method), cold.solver_state

    def loss(t1, t0, y0, params):
        more = {"solver_state": state, "adjoint": adjoint}
        more |= {"saveat": diffrax.SaveAt(ts=ts, solver_state=True)}
        # The parameters are closed over, as those of a network in training.
        field = lambda t, y, args: _neuron(t, y, params)
        sol = _solve(solver, y0, None, t0, t1, field=field, **more)
        return sol.ys.reshape(-1) @ weights, _parts(sol)

    def plain(t1, t0, y0, params, parts):
        nodes = t0 * (1 - parts) + t1 * parts
        term = diffrax.ODETerm(_neuron)
        steps = one_by_one(term, _DOPRI5, intervals(nodes), 1, y0, params)
        return steps.at(ts).reshape(-1) @ weights

    arguments = jnp.array(_T1), jnp.array(0.0), _Y0, _PARAMS
    both = jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True)
    (value, parts), found = eqx.filter_jit(both)(*arguments)
    both = jax.value_and_grad(plain, argnums=(0, 1, 2, 3))
    expected = eqx.filter_jit(both)(*arguments, parts)
    assert_equal((value, found), expected, rtol=1e-9)
    assert all(np.all(x != 0) for x in found)


# ---- Windows ----


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_window_reports_the_largest_error_on_its_final_grid(dtype):
    term, solver = diffrax.ODETerm(_neuron), _solver(num_steps=12)
    t0, t1, y0, params = (jnp.asarray(x, dtype) for x in (3.0, 9.0, _Y0, _PARAMS))
    state = solver.init(term, t0, t1, y0, params)
    step = eqx.filter_jit(solver.step)
    found: Any = step(term, t0, t1, y0, params, state, False)
    y1, error, _, state, result = found
    assert result == diffrax.RESULTS.successful
    assert y1.dtype == error.dtype == state.ts.dtype == state.errors.dtype == dtype
    y, errors, dopri5 = y0, [], _DOPRI5
    for start, end in zip(*intervals(state.ts), strict=True):
        first = dopri5.init(term, start, end, y, params)
        y, e, *_ = dopri5.step(term, start, end, y, params, first, False)
        errors.append(np.abs(e))
    tolerance = 1e-12 if dtype == jnp.float64 else 1e-4
    np.testing.assert_allclose(y1, y, rtol=tolerance)
    small = 1e-15 if dtype == jnp.float64 else 1e-7
    np.testing.assert_allclose(error, np.max(errors, axis=0), 1e-6, small)


def test_controller_chooses_windows_backwards_in_time_too():
    # Predators and prey.
    field = lambda t, y, args: jnp.stack([y[0] * (1 - y[1]), y[1] * (y[0] - 1)])
    options = {"t0": 10.0, "t1": 0.0, "saveat": diffrax.SaveAt(ts=_TS[5::-1] / 2)}
    pid = diffrax.PIDController(rtol=1e-6, atol=1e-6)
    more = {"stepsize_controller": pid, "field": field}
    sol = _solve(_solver(num_steps=12), jnp.array([2.0, 1.0]), **options | more)
    exact = _exact(jnp.array([2.0, 1.0]), field=field, **options)
    np.testing.assert_allclose(sol.ys, exact, atol=2e-5)
    assert sol.stats["num_accepted_steps"] > 1


def test_windows_that_are_known_have_a_grid_each(cold):
    ends = jnp.array([0.0, 20.0, 55.0, _T1])
    known = diffrax.StepTo(ts=ends)
    sol = _solve(_solver(num_steps=48), stepsize_controller=known)
    np.testing.assert_array_equal(sol.solver_state.ts[::48], ends)
    assert sol.stats["largest_error"] < 1
    np.testing.assert_allclose(sol.ys, _exact(), atol=0.1)


class Chebyshev(AbstractGrid):
    """Steps that are shorter towards the ends of a window."""

    def fractions(self, num_steps):
        return (1 - jnp.cos(jnp.linspace(0, jnp.pi, num_steps + 1))) / 2


@each_adjoint
def test_fixed_grid_of_a_third_party(adjoint):
    field, y0 = lambda t, y, args: jnp.sin(t * y), jnp.ones(1)
    solver = DEERSolver(diffrax.Heun(), 9, grid=Chebyshev())
    ts = jnp.array([0.2, 1.1, 1.9])
    pid = diffrax.PIDController(rtol=1e-5, atol=1e-5)
    more = {"stepsize_controller": pid, "adjoint": adjoints[adjoint], "field": field}
    saveat = diffrax.SaveAt(ts=ts, solver_state=True)
    sol = _solve(solver, y0, t1=2.0, saveat=saveat, **more)
    last = np.asarray(sol.solver_state.ts)
    parts = (last - last[0]) / (last[-1] - last[0])
    np.testing.assert_allclose(parts, Chebyshev().fractions(9), atol=1e-12)
    np.testing.assert_allclose(
        sol.ys, _exact(y0, field=field, t1=2.0, saveat=saveat), atol=1e-4
    )


# ---- Bad input ----


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Equidistributed(0.0, 1e-6), "`rtol` must be a positive"),
        (lambda: Equidistributed(1e-3, -1.0), "`atol` must be finite"),
        (lambda: Equidistributed(1e-3, 1e-6, passes=0), "`passes` must be at least 1"),
        (lambda: _solver(num_steps=None), "`num_steps=100`"),
        (lambda: _solve(_solver(solver=diffrax.Euler())), r"`HalfSolver\(Euler"),
    ],
)
def test_bad_input_is_refused_with_a_remedy(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_state_of_another_grid_is_refused(cold):
    uniform = DEERSolver(_DOPRI5, _NUM_STEPS)
    with pytest.raises(ValueError, match="same `grid`"):
        _solve(uniform, solver_state=cold.solver_state)
