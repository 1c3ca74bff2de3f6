"""The iteration finds what a plain loop finds, or it says that it has not."""

import dataclasses
import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrax_deer._affine_scan import AssociativeScan
from diffrax_deer._forward import SequentialForward
from diffrax_deer._linearization import (
    DiagonalJacobian,
    FullJacobian,
    Picard,
    StepMap,
)

from .helpers import (
    constant_guess,
    discretize,
    each_linearization,
    each_scan,
    forwards,
    linearizations,
    newton,
    problems,
    relative_error,
    result_is,
    rk4,
    scans,
    sequential,
)


def _discretize(name: str, num_steps: int, *, dtype=jnp.float64, t1=None):
    problem = problems[name].cast(dtype)
    return discretize(problem._replace(t1=problem.t1 if t1 is None else t1), num_steps)


def _solve(iteration, step_map, y0, xs, guess):
    """A solve of a batch of guesses, beside the sequential answer."""
    solve = jax.vmap(ft.partial(iteration, step_map, y0, xs))
    return jax.jit(lambda: (solve(guess), sequential(step_map, y0, xs)))()


def _bad_guesses(y0, num_steps: int):
    """Guesses that are wrong in one place or in all, by a little or without bounds."""
    constant = constant_guess(y0, num_steps)
    signs = jnp.where(jnp.arange(num_steps) % 2 == 0, 1.0, -1.0)[:, None]
    guesses = [
        constant,
        jnp.zeros_like(constant),
        1e30 * signs * jnp.ones_like(constant),
    ]
    for value in (jnp.nan, jnp.inf, -jnp.inf, 1e30, 1e300):
        guesses.append(jnp.full_like(constant, value))
        for place in (0, num_steps // 2, num_steps - 1):
            guesses.append(constant.at[place].set(value))
    return jnp.stack(guesses)


# ---- The answer ----


@each_scan
@each_linearization
def test_every_choice_finds_the_sequential_answer(linearization, scan):
    step_map, y0, xs = _discretize("fitzhugh_nagumo", 100)
    iteration = newton(linearization, scan, tolerance=1e-12)
    guess = constant_guess(y0, 100)[None]
    (ys, statistics), expected = _solve(iteration, step_map, y0, xs, guess)
    assert relative_error(ys[0], expected) < 1e-10
    assert result_is(statistics.result, "successful")
    assert 1 < statistics.num_iterations[0] < 100
    assert statistics.residual[0] < 1e-11


@each_linearization
def test_single_precision_finds_the_sequential_answer(linearization):
    step_map, y0, xs = _discretize("mlp", 37, dtype=jnp.float32)
    iteration = newton(linearization, AssociativeScan(), tolerance=1e-6)
    guess = constant_guess(y0, 37)[None]
    (ys, statistics), expected = _solve(iteration, step_map, y0, xs, guess)
    assert ys.dtype == statistics.residual.dtype == jnp.float32
    assert relative_error(ys[0], expected) < 2e-5
    assert result_is(statistics.result, "successful")
    assert 1 < statistics.num_iterations[0] < 20


@each_linearization
def test_a_single_step_is_one_evaluation(linearization):
    step_map, y0, xs = _discretize("mlp", 1)
    guess = jnp.full((1, 1, 4), jnp.nan)
    (ys, statistics), expected = _solve(newton(linearization), step_map, y0, xs, guess)
    assert relative_error(ys[0], expected) < 1e-15
    assert statistics.num_iterations[0] == 1
    assert result_is(statistics.result, "successful")


@pytest.mark.parametrize("num_steps", [64, 256, 1024])
@pytest.mark.parametrize("name", ["piecewise_constant", "full_jacobian"])
def test_the_iterations_are_few_for_a_neural_field(name, num_steps):
    @jax.jit
    @jax.vmap
    def solve(t1):
        problem = problems["mlp"].cast(jnp.float64)
        step_map = rk4(problem.field, problem.args)
        times = t1 * jnp.linspace(0.0, 1.0, num_steps + 1)
        xs, y0 = (times[:-1], times[1:]), problem.y0
        iteration = newton(linearizations[name], tolerance=1e-9)
        guess = constant_guess(y0, num_steps)
        return iteration(step_map, y0, xs, guess), sequential(step_map, y0, xs)

    (ys, statistics), expected = solve(jnp.array([1.0, 10.0]))
    assert jnp.all(statistics.num_iterations <= 7)
    assert jnp.all(result_is(statistics.result, "successful"))
    assert jnp.max(jnp.abs(ys - expected)) < 1e-9


@each_linearization
@pytest.mark.parametrize("name", ["lotka_volterra", "van_der_pol", "lorenz"])
def test_a_cold_start_always_converges(name, linearization):
    # Without the safeguards each of these ends in NaN within three iterations.
    num_steps = 128
    step_map, y0, xs = _discretize(name, num_steps)
    guess = constant_guess(y0, num_steps)[None]
    iteration = newton(linearization, tolerance=1e-11)
    (ys, statistics), expected = _solve(iteration, step_map, y0, xs, guess)
    assert result_is(statistics.result, "successful")
    assert statistics.num_iterations[0] <= num_steps
    assert relative_error(ys[0], expected) < 1e-8


@pytest.mark.parametrize("scan", ["sequential", "associative"])
@each_linearization
def test_no_guess_is_too_bad(linearization, scan):
    num_steps = 30
    step_map, y0, xs = _discretize("lotka_volterra", num_steps, t1=3.0)
    guesses = _bad_guesses(y0, num_steps)
    iteration = newton(linearization, scans[scan], tolerance=1e-12)
    (ys, statistics), expected = _solve(iteration, step_map, y0, xs, guesses)
    assert np.all(result_is(statistics.result, "successful"))
    assert jnp.all(statistics.num_iterations <= num_steps)
    assert relative_error(ys, jnp.broadcast_to(expected, ys.shape)) < 1e-11


@each_linearization
def test_a_perfect_guess_takes_one_iteration(linearization):
    step_map, y0, xs = _discretize("van_der_pol", 50)
    guess = jax.jit(ft.partial(sequential, step_map))(y0, xs)[None]
    (ys, statistics), expected = _solve(newton(linearization), step_map, y0, xs, guess)
    assert statistics.num_iterations[0] == 1
    assert relative_error(ys[0], expected) < 1e-13


@each_linearization
def test_every_iteration_makes_one_more_step_exact(linearization):
    num_steps, num_iterations = 12, 4
    step_map, y0, xs = _discretize("lotka_volterra", num_steps, t1=3.0)
    guesses = _bad_guesses(y0, num_steps)
    iteration = newton(linearization, max_iterations=num_iterations)
    (ys, _), expected = _solve(iteration, step_map, y0, xs, guesses)
    assert jnp.all(jnp.isfinite(ys))
    final = ys[:, :num_iterations]
    expected = jnp.broadcast_to(expected[:num_iterations], final.shape)
    assert relative_error(final, expected) < 1e-14


def test_newtons_method_solves_a_linear_recurrence_in_one_iteration():
    # So does the diagonal if the matrix is diagonal, and Picard if it is the identity.
    num_steps = 20
    full = jnp.array([[0.9, 0.3], [-0.4, 0.8]])
    diagonal = jnp.diag(jnp.array([0.9, -1.1]))
    cases = (FullJacobian(), full), (DiagonalJacobian(), diagonal)
    for linearization, matrix in (*cases, (Picard(), jnp.eye(2))):
        step_map = StepMap(lambda x, y, matrix=matrix: matrix @ y + x)
        xs = jnp.sin(jnp.arange(2.0 * num_steps)).reshape(num_steps, 2)
        y0 = jnp.array([1.0, -1.0])
        (ys, statistics), expected = _solve(
            newton(linearization, max_iterations=1),
            step_map,
            y0,
            xs,
            jnp.ones((1, num_steps, 2)),
        )
        assert result_is(statistics.result, "successful")
        assert relative_error(ys[0], expected) < 1e-14


def test_the_relative_tolerance_knows_no_units():
    # In units larger or smaller by a power of two nothing may change, not one bit.
    step_map, y0, xs = _discretize("lotka_volterra", 50)

    @jax.jit
    @jax.vmap
    def solve(unit):
        scaled = StepMap(lambda x, y: unit * step_map.step(x, y / unit))
        iteration = dataclasses.replace(newton(tolerance=1e-6), atol=0.0)
        guess = constant_guess(unit * y0, 50)
        ys, statistics = iteration(scaled, unit * y0, xs, guess)
        return ys / unit, statistics

    ys, statistics = solve(2.0 ** jnp.array([0.0, 40.0, -40.0]))
    assert np.all(result_is(statistics.result, "successful"))
    assert len(set(map(int, statistics.num_iterations))) == 1
    assert jnp.all(ys == ys[:1])


@pytest.mark.parametrize("below_zero", [jnp.sqrt, lambda y: y * jnp.log(y)])
@each_linearization
def test_a_field_that_exists_on_one_side_only_is_solved(linearization, below_zero):
    # The true solution decays from 1 to about 0.1; a guess of -1 is NaN throughout.
    step_map = rk4(lambda t, y, args: -0.6 * jnp.sqrt(y) + 0.05 * below_zero(y), None)
    times = jnp.linspace(0.0, 2.0, 26)
    xs, y0 = (times[:-1], times[1:]), jnp.array([1.0])
    guesses = jnp.array([1.0, -1.0, 1e-3])[:, None, None] * jnp.ones((3, 25, 1))
    iteration = newton(linearization, tolerance=1e-12)
    (ys, statistics), expected = _solve(iteration, step_map, y0, xs, guesses)
    assert jnp.all(jnp.isfinite(expected)) and expected[-1, 0] < 0.3
    assert np.all(result_is(statistics.result, "successful"))
    assert relative_error(ys, jnp.broadcast_to(expected, ys.shape)) < 1e-10


@each_linearization
def test_a_step_without_a_derivative_is_solved(linearization):
    # At zero, where this starts, the root has a value but its slope is infinite.
    step_map = StepMap(lambda x, y: jnp.sqrt(y) + x, lambda x, y: jnp.sqrt(y))
    y0, xs = jnp.array([0.0]), jnp.linspace(0.1, 0.2, 8)
    guesses = jnp.stack([jnp.zeros((8, 1)), jnp.ones((8, 1))])
    iteration = newton(linearization, tolerance=1e-12)
    (ys, statistics), expected = _solve(iteration, step_map, y0, xs, guesses)
    assert np.all(result_is(statistics.result, "successful"))
    assert relative_error(ys, jnp.broadcast_to(expected, ys.shape)) < 1e-11


def test_a_long_unstable_solve_does_not_overflow():
    # Between the first and the last step the derivative grows by 2**512, beyond single
    # precision; the states stay between 0 and 1. They are chaotic: a result may differ
    # from the guess, and be just as right, but not be a failure.
    num_steps = 512
    step_map = StepMap(lambda x, y: 4 * y * (1 - y))
    y0, xs = jnp.array([0.3], jnp.float32), jnp.zeros(num_steps)
    guess = jax.jit(ft.partial(sequential, step_map))(y0, xs)[None]
    for scan in scans.values():
        iteration = newton(FullJacobian(), scan, tolerance=1e-5)
        (ys, statistics), _ = _solve(iteration, step_map, y0, xs, guess)
        assert result_is(statistics.result, "successful"), scan
        assert statistics.residual[0] < 1e-5
        assert relative_error(ys[0, :10], guess[0, :10]) < 1e-3


@each_linearization
def test_a_guess_within_the_tolerance_is_no_divergence(linearization):
    # An error below tolerance in the first step makes one above it in the second, as
    # soon as the first is put right.
    tolerance = 1e-6
    step_map = StepMap(lambda x, y: -10 * jnp.sin(y[::-1]), lambda x, y: -y)
    y0, xs = jnp.array([0.01, -0.01]), jnp.zeros(4)

    @jax.vmap
    def guess(error):
        first = step_map.step(xs[0], y0) + error
        return jnp.concatenate([first[None], sequential(step_map, first, xs[1:])])

    guesses = guess(jnp.array([0.9, -0.9, 0.5]) * tolerance)
    iteration = newton(linearization, tolerance=tolerance)
    (ys, statistics), expected = _solve(iteration, step_map, y0, xs, guesses)
    assert np.all(result_is(statistics.result, "successful"))
    assert relative_error(ys, jnp.broadcast_to(expected, ys.shape)) < 1e-3


# ---- What it says about itself ----


@each_linearization
def test_too_few_iterations_are_reported(linearization):
    step_map, y0, xs = _discretize("lotka_volterra", 60)
    iteration = newton(linearization, max_iterations=3)
    guess = constant_guess(y0, 60)[None]
    (ys, statistics), expected = _solve(iteration, step_map, y0, xs, guess)
    assert relative_error(ys[0], expected) > 1e-3
    assert jnp.all(jnp.isfinite(ys))
    assert result_is(statistics.result, "nonlinear_max_steps_reached")
    assert statistics.num_iterations[0] == 3


def test_the_residual_is_measured_on_the_result():
    step_map, y0, xs = _discretize("lotka_volterra", 60)
    guess = constant_guess(y0, 60)[None]
    for max_iterations, size in ((2, 1e-1), (7, 1e-8)):
        iteration = newton(max_iterations=max_iterations)
        (ys, statistics), _ = _solve(iteration, step_map, y0, xs, guess)
        before = jnp.concatenate([y0[None], ys[0, :-1]])
        images = jax.vmap(step_map.step)(xs, before)
        expected = np.max(np.abs(images - ys[0]))
        assert expected >= size
        # Two ways to compile the step may differ by rounding.
        assert abs(statistics.residual[0] - expected) < 1e-13


@each_linearization
def test_a_step_that_fails_is_reported_and_spoils_nothing_before_it(linearization):
    num_steps = 9
    inner, y0, times = _discretize("lotka_volterra", num_steps, t1=3.0)
    index = jnp.arange(num_steps)
    guesses = _bad_guesses(y0, num_steps)

    @jax.jit
    @ft.partial(jax.vmap, in_axes=(0, 0, None))
    @ft.partial(jax.vmap, in_axes=(None, None, 0))
    def solve(bad, value, guess):
        def step(x, y):
            return jnp.where(x[0] == bad, value, inner.step(x[1], y))

        assert inner.increment is not None
        increment = lambda x, y, whole=inner.increment: whole(x[1], y)
        step_map, xs = StepMap(step, increment), (index, times)
        ys, statistics = newton(linearization)(step_map, y0, xs, guess)
        ys_forward, forward, _ = SequentialForward()(step_map, y0, xs, guess, newton())
        return ys, statistics.result, ys_forward, forward.result

    expected = jax.jit(ft.partial(sequential, inner))(y0, times)
    bad = jnp.array([0, 1, num_steps // 2, num_steps - 1])
    values = jnp.array([jnp.nan, jnp.inf, -jnp.inf, jnp.nan])
    ys, result, ys_forward, result_forward = solve(bad, values, guesses)
    assert np.all(result_is(result, "nonfinite"))
    assert np.all(result_is(result_forward, "nonfinite"))
    assert jnp.all(jnp.isfinite(ys)) and jnp.all(jnp.isfinite(ys_forward))
    for i, k in enumerate(bad):
        # The steps before it are right, those from it on repeat the last good state.
        good = jnp.concatenate([y0[None], expected[:k]])
        right = jnp.concatenate([good[1:], jnp.tile(good[-1], (num_steps - k, 1))])
        for got in (ys[i], ys_forward[i]):
            assert relative_error(got, jnp.broadcast_to(right, got.shape)) < 1e-8


@each_linearization
def test_nan_is_never_success(linearization):
    step_map, _, xs = _discretize("lotka_volterra", 8)
    guess, iteration = jnp.ones((8, 2)), newton(linearization)

    @jax.jit
    @jax.vmap
    def solve(y0):
        solutions = [f(step_map, y0, xs, guess, iteration) for f in forwards.values()]
        return [statistics.result for _, statistics, _ in solutions]

    for result in solve(jnp.array([[jnp.nan, jnp.nan], [1.0, jnp.inf]])):
        assert np.all(result_is(result, "nonfinite"))


def test_a_residual_that_is_not_a_number_is_no_success():
    # All steps are solved but the last, which has no value.
    step_map = StepMap(lambda x, y: jnp.where(x < 5, jnp.cos(y), jnp.nan))
    y0, xs = jnp.array([0.3]), jnp.arange(6.0)
    guess = jax.jit(ft.partial(sequential, step_map))(y0, xs)[None]
    iteration = newton(max_iterations=1)
    (ys, statistics), _ = _solve(iteration, step_map, y0, xs, guess)
    np.testing.assert_array_equal(ys[0, :5], guess[0, :5])
    assert jnp.isnan(statistics.residual[0])
    assert result_is(statistics.result, "nonfinite")


@each_linearization
def test_a_failure_does_not_disturb_its_neighbours(linearization):
    # dy/dt = y**2 leaves every bound at time 1 / y0.
    num_steps = 40
    step_map = rk4(lambda t, y, args: y**2, None)
    times = jnp.linspace(0.0, 1.0, num_steps + 1)
    xs = times[:-1], times[1:]
    y0s = jnp.array([0.5, 40.0, -0.7, 0.3])[:, None]
    iteration = newton(linearization, tolerance=1e-12)
    solve = lambda y0: iteration(step_map, y0, xs, constant_guess(y0, num_steps))
    ys, statistics = jax.jit(jax.vmap(solve))(y0s)
    alone = jax.jit(solve)
    for i, y0 in enumerate(y0s):
        name = "nonfinite" if i == 1 else "successful"
        assert result_is(statistics.result, name)[i]
        ys_alone, statistics_alone = alone(y0)
        assert relative_error(ys[i], ys_alone) < 1e-12
        assert statistics.num_iterations[i] == statistics_alone.num_iterations
        if i != 1:
            expected = y0 / (1 - y0 * times[1:])
            assert relative_error(ys[i, :, 0], expected) < 1e-6


def test_the_forward_pass_in_sequence_finds_the_same_without_iterations():
    step_map, y0, xs = _discretize("lotka_volterra", 100)
    guess = jnp.full((100, 2), jnp.nan)

    @jax.jit
    def solve(y0):
        iteration = newton(tolerance=1e-12)
        results = [f(step_map, y0, xs, guess, iteration) for f in forwards.values()]
        return results, sequential(step_map, y0, xs)

    results, expected = solve(y0)
    for ys, statistics, _ in results:
        assert relative_error(ys, expected) < 1e-13
        assert result_is(statistics.result, "successful")
    statistics = dict(zip(forwards, (s for _, s, _ in results), strict=True))[
        "sequential"
    ]
    assert statistics.num_iterations == 0
    assert statistics.residual == 0


def test_what_drives_the_steps_may_be_any_pytree():
    weights = jnp.array([[0.2, 0.7], [-0.5, 0.1]])
    xs = {"input": jnp.sin(jnp.arange(22.0)).reshape(11, 2), "on": jnp.arange(11) % 2}

    def step(x, y):
        return jnp.where(x["on"] == 1, jnp.tanh(weights @ y + x["input"]), y)

    step_map, y0 = StepMap(step), jnp.array([0.1, 0.2])
    guess = jnp.zeros((1, 11, 2))
    (ys, statistics), expected = _solve(newton(), step_map, y0, xs, guess)
    assert relative_error(ys[0], expected) < 1e-14
    assert result_is(statistics.result, "successful")


# ---- Scales ----


def _beside_something_large(large, x, y):
    """A pendulum beside a component that is larger by many orders of magnitude."""
    step = x[1] - x[0]

    def field(y):
        p, q, v = y
        return jnp.stack([-0.1 * p, v, -10.5 * jnp.sin(q) * (p / large)])

    half = y + step / 2 * field(y)
    return y + step * field(half)


@pytest.mark.parametrize(
    ("dtype", "large"), [(jnp.float32, 1e6), (jnp.float64, 1e10), (jnp.float64, 1e-10)]
)
@pytest.mark.parametrize("start", ["constant", "warm"])
def test_small_components_converge_beside_large_ones(dtype, large, start):
    large = jnp.asarray(large, dtype)
    step_map = StepMap(ft.partial(_beside_something_large, large))
    ts = jnp.linspace(0.0, 10.0, 301, dtype=dtype)
    y0 = jnp.stack([large, jnp.ones((), dtype), jnp.zeros((), dtype)])
    xs = ts[:-1], ts[1:]
    guess = constant_guess(y0, 300)
    if start == "warm":
        # The large component is right, and the small ones are not.
        other = sequential(step_map, y0.at[1].set(1.3), xs)
        guess = other.at[:, 0].set(sequential(step_map, y0, xs)[:, 0])
    rtol = float(jnp.finfo(dtype).eps) ** 0.75
    iteration = dataclasses.replace(newton(), rtol=rtol, atol=0.0)
    ys, statistics = jax.jit(ft.partial(iteration, step_map))(y0, xs, guess)
    assert bool(result_is(statistics.result, "successful"))
    expected = sequential(step_map, y0, xs)
    for found, wanted in zip(ys.T, expected.T, strict=True):
        assert relative_error(found, wanted) < 100 * rtol
    assert int(statistics.num_iterations) < 60


def test_a_component_that_is_nothing_but_rounding_is_right_too():
    # What feeds on the difference of two that are equal, but for rounding.
    def step(x, y):
        a, b, c = y
        a, b = a + (0.3 * jnp.cos(a) + x), (b + 0.1 * jnp.cos(b)) + 0.2 * jnp.cos(b) + x
        return jnp.stack([a, b + 0.1 * c, 0.9 * c + (a / 3 - b / 3)])

    y0 = jnp.array([0.3, 0.3, 0.0], jnp.float32)
    xs = jnp.sin(jnp.arange(300, dtype=jnp.float32)) / 10
    rtol = float(jnp.finfo(jnp.float32).eps) ** 0.75
    iteration = dataclasses.replace(newton(), rtol=rtol, atol=0.0)
    solve = jax.jit(ft.partial(iteration, StepMap(step)))
    ys, statistics = solve(y0, xs, constant_guess(y0, 300))
    assert bool(result_is(statistics.result, "successful"))
    expected = sequential(StepMap(step), y0, xs)
    assert 0 < float(jnp.max(jnp.abs(expected[:, 2]))) < 1e-5
    for found, wanted in zip(ys.T, expected.T, strict=True):
        assert relative_error(found, wanted) < 1e-4
