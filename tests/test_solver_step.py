"""One step of a diffrax solver on the flat state, against diffrax's own."""

import dataclasses
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

from diffrax_deer import ExponentialRosenbrockEuler
from diffrax_deer._ode.solver_step import SolverStep, prepare
from diffrax_deer._ravel import ravel

from .helpers import problems, relative_error
from .oracle import one_by_one

_ROOT = optx.Newton(rtol=1e-12, atol=1e-12)
_EPS = float(jnp.finfo(jnp.float64).eps)
_Y0 = {"x": jnp.array([1.0, -0.5]), "v": jnp.array(0.3)}


def _field(t, y, args):
    x, v = y["x"], y["v"]
    return {"x": -x * v + args, "v": jnp.sum(x) * jnp.cos(3 * t) - v**2}


def _step(solver, term=None, y0=None, eps=_EPS):
    term = diffrax.ODETerm(_field) if term is None else term
    y0 = _Y0 if y0 is None else y0
    return SolverStep(prepare(solver, eps), term, jnp.array(0.4), ravel(y0)[1])


def _of_diffrax(solver, term, x, y0):
    args = jnp.array(0.4)
    state = solver.init(term, *x, y0, args)
    y1, error, info, _, _ = solver.step(term, *x, y0, args, state, made_jump=False)
    return y1, error, info


# ---- Solvers made ready ----


def test_root_finder_of_ones_own_is_kept_and_another_converges_to_rounding():
    ready: Any = prepare(diffrax.Kvaerno3(), 1e-16)
    root_finder = ready.root_finder
    assert isinstance(root_finder, optx.Newton)
    assert (root_finder.rtol, root_finder.atol) == (1e-8, 1e-8)
    own = diffrax.VeryChord(rtol=1e-3, atol=1e-4)
    solver = diffrax.HalfSolver(diffrax.Kvaerno3(root_finder=own))
    wrapped: Any = prepare(solver, 1e-16)
    inner = wrapped.solver
    assert type(inner.root_finder) is diffrax.VeryChord
    assert (inner.root_finder.rtol, inner.root_finder.atol) == (1e-3, 1e-4)
    assert inner.scan_kind == "bounded"
    heun: Any = prepare(diffrax.Heun(scan_kind="lax"), 1e-16)
    assert heun.scan_kind == "lax"


@pytest.mark.parametrize("solver", [diffrax.Kvaerno5(), diffrax.ImplicitEuler()])
def test_default_tolerances_of_an_implicit_solver_reach_rounding(solver):
    problem = problems["van_der_pol"]
    y0, args = jnp.asarray(problem.y0), jnp.asarray(problem.args) * 10
    windows = jnp.zeros(1), jnp.full(1, 3.0)
    run = lambda solver: one_by_one(
        diffrax.ODETerm(problem.field), solver, windows, 100, y0, args
    ).last()
    tight = dataclasses.replace(solver, root_finder=_ROOT)
    found, expected = jax.jit(lambda: (run(prepare(solver, _EPS)), run(tight)))()
    assert relative_error(found, expected) < 1e-10


@pytest.mark.parametrize("solver", [diffrax.Kvaerno3(), diffrax.ImplicitEuler()])
@pytest.mark.parametrize("unit", [1e-12, 1e12])
def test_implicit_step_is_the_same_in_other_units(solver, unit):
    def step(unit):
        field = lambda t, y, args: -5 * unit * (y / unit) ** 2
        y0 = jnp.array([1.0, 0.2])
        inner = _step(solver, diffrax.ODETerm(field), y0)
        value = lambda y: inner.step((jnp.array(0.0), jnp.array(0.1)), y * unit) / unit
        return value(y0), jax.jacfwd(value)(y0)

    found, expected = jax.jit(lambda: (step(unit), step(1.0)))()
    assert relative_error(found, expected) < 1e-13


def test_implicit_step_that_stays_at_an_equilibrium_succeeds():
    # What cancels to zero has no digits of its own.
    y0 = jnp.array([1.0, 0.0, 1 / 3])
    matrix = jnp.array([[0.1, 0.2, -0.3], [1.0, -1.0, -3.0], [0.0, 0.0, 0.0]])
    field = lambda t, y, args: matrix @ y
    for solver in (diffrax.Kvaerno3(), diffrax.ImplicitEuler()):
        inner = _step(solver, diffrax.ODETerm(field), y0)
        result = inner.full((0.0, 0.5), y0)
        assert result.result == diffrax.RESULTS.successful
        np.testing.assert_allclose(result.y1, y0, rtol=1e-14, atol=1e-15)


# ---- A step and what it yields ----


@pytest.mark.parametrize(
    "solver",
    [
        diffrax.Bosh3(),
        diffrax.Kvaerno3(root_finder=_ROOT),
        diffrax.HalfSolver(diffrax.Heun()),
        ExponentialRosenbrockEuler(),
    ],
    ids=lambda solver: type(solver).__name__,
)
def test_step_yields_state_error_and_dense_info_of_diffrax_and_predicts(solver):
    term, y0 = diffrax.ODETerm(_field), _Y0
    x = jnp.array(0.2), jnp.array(0.8)
    inner, (flat, _) = _step(solver), ravel(y0)
    middle = jnp.array(0.5), jnp.array(0.6)

    @jax.jit
    def both():
        found, step_map = inner.full(x, flat), inner.step_map(flat)
        first, last = (x[0], jnp.array(0.3)), (jnp.array(0.7), x[1])
        coarse = step_map.coarse_step(first, last, flat)  # pyright: ignore
        predicted = step_map.coarse_interpolate(first, last, middle, flat)  # pyright: ignore
        y1, error, info = _of_diffrax(solver, term, x, y0)
        path = solver.interpolation_cls(t0=x[0], t1=x[1], **info)
        expected = ravel(y1)[0], ravel(error)[0], info
        e_predicted = ravel(path.evaluate(middle[1]))[0]
        of_found = found.y1, found.error, found.dense_info
        return (*of_found, coarse, predicted), (*expected, expected[0], e_predicted)

    found, expected = both()
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def test_coarse_step_of_a_large_error_is_of_no_use():
    # The estimate of Heun's method is h**2 / 2 here, relative to 1 + h + h**2 / 2.
    term = diffrax.ODETerm(lambda t, y, args: y)
    y0 = jnp.array([1.0, 2.0])
    step_map = _step(diffrax.Heun(), term, y0).step_map(y0)
    zero, values = jnp.array(0.0), []
    for h in (0.5, 0.7):
        first, last = (zero, zero), (zero, jnp.array(h))
        relative = h**2 / 2 / (1 + h + h**2 / 2)
        values.append(step_map.coarse_step(first, last, y0))  # pyright: ignore
        assert (relative > 0.1) == bool(jnp.isinf(values[-1]).all())
        predicted = step_map.coarse_interpolate(first, last, first, y0)  # pyright: ignore
        assert (relative > 0.1) == bool(jnp.isinf(predicted).all())
    assert relative_error(values[0], y0 * 1.625) < 1e-14


class _Increment(diffrax.Euler):
    """What is under test, in the place of the state after the step."""

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        step_map = _step(diffrax.Euler(), terms, y0).step_map(y0)
        assert step_map.increment is not None
        y1 = step_map.increment((t0, t1), y0)
        return y1, None, {"y0": y0, "y1": y1}, None, diffrax.RESULTS.successful


@pytest.mark.parametrize("direction", [1, -1])
def test_increment_is_the_field_in_the_middle_times_the_step(direction):
    """Of several terms, and backwards: diffrax gives solvers a time that increases."""
    parts = lambda t, y, args: args * y * t, lambda t, y, args: jnp.sin(y)
    term = diffrax.MultiTerm(*map(diffrax.ODETerm, parts))
    y, t0, h = jnp.array([0.3, -0.7]), 1.1, direction * 0.2
    sol = diffrax.diffeqsolve(
        term, _Increment(), t0, t0 + h, h, y, jnp.array(0.4), max_steps=1
    )
    expected = h * sum(part(t0 + h / 2, y, 0.4) for part in parts)
    assert relative_error(sol.ys[-1], expected) < 1e-13


def test_step_map_of_several_fields_has_no_increment_nor_stages():
    terms = (
        diffrax.ODETerm(lambda t, v, args: v),
        diffrax.ODETerm(lambda t, x, args: -jnp.sin(x)),
    )
    y0 = (jnp.array([1.0]), jnp.array([0.5]))
    flat, _ = ravel(y0)
    step_map = _step(diffrax.SemiImplicitEuler(), terms, y0).step_map(flat)
    assert step_map.increment is None
    assert step_map.step_by_stages is None
    x = jnp.array(0.0), jnp.array(0.1)
    y1, _, _ = _of_diffrax(diffrax.SemiImplicitEuler(), terms, x, y0)
    assert relative_error(step_map.step(x, flat), ravel(y1)[0]) < 1e-15


def test_what_a_leaf_cannot_hold_is_infinite():
    half = lambda x: jnp.array(x, jnp.float16)
    y0, term = half([6e4, 1.0]), diffrax.ODETerm(lambda t, y, args: y)
    inner, (flat, _) = _step(diffrax.Heun(), term, y0), ravel(y0)
    # A step of Heun's method of length one, in single precision.
    y1 = inner.step((half(0.0), half(1.0)), flat)
    assert flat.dtype == y1.dtype == jnp.float32
    np.testing.assert_allclose(y1, [np.inf, 2.5])
