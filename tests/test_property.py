"""Random fields, grids and guesses: the sequential answer, or a reported failure."""

import dataclasses

import diffrax
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest
from hypothesis import strategies as st

from diffrax_deer import (
    AssociativeScan,
    CoarsePredictor,
    DEERAdjoint,
    DEERSolver,
    DiagonalJacobian,
    Newton,
    PiecewiseConstant,
    Sequential,
    StepMap,
    WholeInterval,
)

from .helpers import intervals, newton, result_is, rk4, sequential
from .oracle import assert_equal

_BATCH, _NUM_STEPS, _STATE = 4, 24, 3


def _field(t, y, args):
    # Saturating, linear, quadratic (which leaves all bounds) and undefined below zero.
    weights, quadratic, root = args
    edge = root * jnp.sqrt(y + 1)
    return jnp.tanh(weights @ y + jnp.sin(t)) + quadratic * y * y[::-1] - edge


def _step_map(args) -> StepMap:
    inner = rk4(_field, args)

    def coarse_step(first, last, y):
        return inner.step((first[0], last[1]), y)

    def coarse_interpolate(first, last, x, y):
        part = (x[1] - first[0]) / (last[1] - first[0])
        return y + part * (coarse_step(first, last, y) - y)

    coarse = {"coarse_step": coarse_step, "coarse_interpolate": coarse_interpolate}
    return dataclasses.replace(inner, **coarse)


def _solvers(method):
    """Solved all at once as a batch, each alone, and one step after another."""

    def solve(args, times, y0, guess):
        return method(_step_map(args), y0, intervals(times), guess)[:2]

    def reference(args, times, y0):
        return sequential(_step_map(args), y0, intervals(times))

    return jax.jit(jax.vmap(solve)), jax.jit(solve), jax.jit(jax.vmap(reference))


def _tolerance(dtype) -> float:
    return float(jnp.finfo(dtype).eps) ** 0.75


_SOLVERS = {
    jnp.float64: _solvers(
        newton(
            PiecewiseConstant(),
            AssociativeScan(),
            tolerance=_tolerance(jnp.float64),
            predictor=CoarsePredictor(5),
        )
    ),
    jnp.float32: _solvers(
        newton(DiagonalJacobian(), tolerance=_tolerance(jnp.float32), window=7)
    ),
}


def _spoil(guess: np.ndarray, rng: np.random.Generator, values: list[float]) -> None:
    """Puts each of `values` somewhere into each guess."""
    for sample in guess:
        for value in values:
            sample[rng.integers(_NUM_STEPS), rng.integers(_STATE)] = value


@st.composite
def _cases(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    size = lambda: draw(st.sampled_from([0.0, 0.3, 3.0]))
    weights = draw(st.sampled_from([0.1, 1.0, 10.0]))
    args = (
        weights * rng.normal(size=(_BATCH, _STATE, _STATE)),
        size() * rng.normal(size=(_BATCH, _STATE)),
        np.broadcast_to(size(), (_BATCH, _STATE)),
    )
    lengths = rng.uniform(size=(_BATCH, _NUM_STEPS)) ** draw(st.integers(0, 4))
    times = draw(st.sampled_from([0.5, 4.0])) * np.cumsum(lengths, axis=1)
    times = np.concatenate([np.zeros((_BATCH, 1)), times / _NUM_STEPS], axis=1)
    y0 = draw(st.sampled_from([0.0, 1e-8, 1.0])) * rng.normal(size=(_BATCH, _STATE))
    guess = rng.normal(size=(_BATCH, _NUM_STEPS, _STATE))
    guess *= draw(st.sampled_from([0.0, 1.0, 1e30]))
    spoiled = st.sampled_from([np.nan, np.inf, -np.inf, 1e30, -1e30])
    _spoil(guess, rng, draw(st.lists(spoiled, max_size=3)))
    return args, times, y0, guess


_SETTINGS = hypothesis.settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=(hypothesis.HealthCheck.too_slow,),
)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
@hypothesis.given(case=_cases())
@_SETTINGS
def test_answer_is_the_sequential_one_or_a_failure_that_is_reported(dtype, case):
    batched, alone, reference = _SOLVERS[dtype]
    args, times, y0, guess = jax.tree.map(lambda x: jnp.asarray(x, dtype), case)
    ys, statistics = batched(args, times, y0, guess)
    expected = np.asarray(reference(args, times, y0), np.float64)
    successful = np.asarray(result_is(statistics.result, "successful"))
    finite = np.all(np.isfinite(expected), axis=(1, 2))

    # No iteration too many, and never a value that is not a number.
    assert np.all(statistics.num_iterations <= _NUM_STEPS)
    assert np.all(np.isfinite(ys))
    # What a loop solves is solved, and what it does not solve is not: neighbours apart.
    np.testing.assert_array_equal(successful, finite)
    assert np.all(result_is(statistics.result, "nonfinite") == ~successful)

    # How much a perturbation grows decides how well two solutions can agree.
    eps = float(jnp.finfo(dtype).eps)
    nearby = y0 * (1 + 16 * eps) + 16 * eps
    moved = np.asarray(reference(args, times, nearby), np.float64)
    norm = lambda y: np.max(np.abs(y), axis=(1, 2))
    with np.errstate(all="ignore"):
        scale = norm(expected) + 1
        growth = norm(moved - expected) / (16 * eps) / scale + 1
        error = norm(np.asarray(ys, np.float64) - expected) / scale
        bound = 100 * eps**0.75 * growth
    close = np.isfinite(bound) & (bound < 1e-2) & successful
    assert np.all(error[close] <= bound[close])

    # A sample alone has the same iterations, whatever its neighbours do.
    first = lambda tree: jax.tree.map(lambda x: x[0], tree)
    ys_alone, statistics_alone = alone(*first((args, times, y0, guess)))
    assert statistics_alone.num_solved == statistics.num_solved[0]
    if close[0]:
        error = np.max(np.abs(np.asarray(ys_alone - ys[0], np.float64))) / scale[0]
        assert error <= bound[0]


# ---- The same program in other units ----

# Name: the solver, the inner one as diffrax has it, and both controllers.
_GRID = lambda t1: diffrax.StepTo(jnp.linspace(0.0, t1, 9))
_EVERY = lambda t1: diffrax.ConstantStepSize()
_WHOLE = lambda t1: WholeInterval()
_ROOTS = optx.Newton(rtol=1e-9, atol=1e-9)
_IN_UNITS = {
    "explicit": (
        DEERSolver(diffrax.Heun(), 8, Newton()),
        diffrax.Heun(),
        _WHOLE,
        _GRID,
    ),
    "implicit": (
        DEERSolver(diffrax.ImplicitEuler(), 8, Sequential()),
        diffrax.ImplicitEuler(root_finder=_ROOTS),
        _WHOLE,
        _GRID,
    ),
    "stateful": (
        DEERSolver(diffrax.LeapfrogMidpoint()),
        diffrax.LeapfrogMidpoint(),
        _EVERY,
        _EVERY,
    ),
}


def _in_units(name):
    """For a batch, in units of `scale`: saved states and gradient, beside diffrax's."""
    deer, inner, windows, steps = _IN_UNITS[name]

    def field(t, y, args):
        rate, scale = args
        return scale * (rate * jnp.cos(y / scale) + jnp.sin(t)) - 0.3 * y

    def run(parameters, scale, t1, parts, solver, controller, adjoint):
        (y0, rate), chosen, is_here = parameters, controller(t1), ~jnp.isnan(parts)
        # diffrax's own loop has a gradient of NaN for a padding of NaN.
        ts = t1 * (parts if controller is _WHOLE else jnp.where(is_here, parts, 1))
        dt0 = t1 / 8 if controller is _EVERY else None
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            *(solver, 0.0, t1, dt0, scale * y0, (rate, scale)),
            saveat=diffrax.SaveAt(ts=ts),
            stepsize_controller=chosen,
            adjoint=adjoint,
            max_steps=16,
        )
        ys = jnp.where(is_here[:, None], sol.ys / scale, 0)
        return jnp.sum(jnp.sin(ys)), ys

    both = jax.value_and_grad(run, has_aux=True)
    found = lambda *args: both(*args, deer, windows, DEERAdjoint())
    direct = diffrax.DirectAdjoint()
    expected = lambda p, s, *args: both(p, 0 * s + 1, *args, inner, steps, direct)
    return jax.jit(jax.vmap(lambda *args: (found(*args), expected(*args))))


@st.composite
def _units(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    y0, rate = rng.normal(size=(_BATCH, 2)), rng.uniform(-1, 1, _BATCH)
    scale = 10.0 ** rng.uniform(-12, 12, _BATCH)
    parts = np.sort(rng.uniform(size=(_BATCH, 3)), axis=1)
    # Samples have different numbers of save times, and are padded.
    parts[np.arange(3) >= rng.integers(1, 4, (_BATCH, 1))] = np.nan
    return (y0, rate), scale, rng.uniform(0.1, 2.0, _BATCH), parts


@pytest.mark.parametrize("name", _IN_UNITS)
def test_same_program_in_other_units_gives_the_same_digits(name):
    run = _in_units(name)

    @hypothesis.given(case=_units())
    @hypothesis.settings(_SETTINGS, max_examples=20)
    def check(case):
        found, expected = run(*jax.tree.map(jnp.asarray, case))
        assert_equal(found, expected, 1e-9)

    check()
