"""The iteration finds what a plain loop finds, or it says that it has not."""

import dataclasses
import functools as ft
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrax_deer import (
    AbstractLinearization,
    AbstractMethod,
    AssociativeScan,
    BlockDiagonalJacobian,
    Diagonal,
    DiagonalJacobian,
    FullJacobian,
    Picard,
    PiecewiseConstant,
    Sequential,
    StepMap,
)

from .helpers import (
    UnguardedScan,
    constant_guess,
    discretize,
    each_linearization,
    each_scan,
    intervals,
    linearizations,
    newton,
    problems,
    relative_error,
    result_is,
    rk4,
    scans,
    sequential,
    solved,
)


def _discretize(name: str, num_steps: int, *, dtype=jnp.float64, t1=None):
    problem = problems[name].cast(dtype)
    return discretize(problem._replace(t1=problem.t1 if t1 is None else t1), num_steps)


def _solve(method: AbstractMethod, step_map, y0, xs, guesses) -> Any:
    """A solve of a batch of guesses, beside the sequential answer."""
    solve = jax.vmap(lambda guess: method(step_map, y0, xs, guess)[:2])
    return jax.jit(lambda: (solve(guesses), sequential(step_map, y0, xs)))()


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


def _successful(statistics) -> bool:
    return bool(np.all(result_is(statistics.result, "successful")))


# ---- The answer ----


@each_linearization
def test_any_guess_leads_to_the_sequential_answer_in_at_most_n_iterations(
    linearization,
):
    num_steps = 30
    step_map, y0, xs = _discretize("lotka_volterra", num_steps, t1=3.0)
    perfect = jax.jit(ft.partial(sequential, step_map))(y0, xs)[None]
    guesses = jnp.concatenate([perfect, _bad_guesses(y0, num_steps)])
    for scan in scans.values():
        method = newton(linearization, scan, tolerance=1e-12)
        (ys, statistics), expected = _solve(method, step_map, y0, xs, guesses)
        assert _successful(statistics)
        assert jnp.all(statistics.num_iterations <= num_steps)
        assert jnp.all(statistics.num_solved == num_steps)
        assert jnp.all(statistics.residual < 1e-10)
        assert relative_error(ys, jnp.broadcast_to(expected, ys.shape)) < 1e-11
        # A perfect guess has to be confirmed, and that is all; from others there is
        # more to do.
        assert statistics.num_iterations[0] == 1
        assert jnp.all(statistics.num_iterations[1:] > 1)


@pytest.mark.parametrize("name", ["full_jacobian", "jacobi"])
def test_each_iteration_makes_one_more_step_exact(name):
    num_steps, num_iterations = 12, 4
    step_map, y0, xs = _discretize("lotka_volterra", num_steps, t1=3.0)
    guesses = _bad_guesses(y0, num_steps)
    method = newton(linearizations[name], max_iterations=num_iterations)
    (ys, _), expected = _solve(method, step_map, y0, xs, guesses)
    assert jnp.all(jnp.isfinite(ys))
    final = ys[:, :num_iterations]
    expected = jnp.broadcast_to(expected[:num_iterations], final.shape)
    assert relative_error(final, expected) < 1e-14


def test_single_precision_finds_the_sequential_answer():
    step_map, y0, xs = _discretize("mlp", 37, dtype=jnp.float32)
    method = newton(PiecewiseConstant(), AssociativeScan(), tolerance=1e-6)
    guess = constant_guess(y0, 37)[None]
    (ys, statistics), expected = _solve(method, step_map, y0, xs, guess)
    assert ys.dtype == statistics.residual.dtype == jnp.float32
    assert relative_error(ys[0], expected) < 2e-5
    assert _successful(statistics)
    assert 1 < statistics.num_iterations[0] < 20


def test_single_step_takes_one_iteration():
    step_map, y0, xs = _discretize("mlp", 1)
    guess = jnp.full((1, 1, 4), jnp.nan)
    method = newton(PiecewiseConstant(), AssociativeScan())
    (ys, statistics), expected = _solve(method, step_map, y0, xs, guess)
    assert relative_error(ys[0], expected) < 1e-15
    assert statistics.num_iterations[0] == 1
    assert _successful(statistics)


@pytest.mark.parametrize("name", ["piecewise_constant", "full_jacobian"])
def test_iterations_are_few_for_a_neural_field(name):
    problem, num_steps = problems["mlp"].cast(jnp.float64), 1024
    step_map, y0 = rk4(problem.field, problem.args), problem.y0
    method = newton(linearizations[name], tolerance=1e-9)

    @jax.jit
    @jax.vmap
    def solve(t1):
        xs = intervals(t1 * jnp.linspace(0.0, 1.0, num_steps + 1))
        guess = constant_guess(y0, num_steps)
        return method(step_map, y0, xs, guess)[:2], sequential(step_map, y0, xs)

    (ys, statistics), expected = solve(jnp.array([1.0, 10.0]))
    assert jnp.all(statistics.num_iterations <= 7)
    assert _successful(statistics)
    assert jnp.max(jnp.abs(ys - expected)) < 1e-9


@pytest.mark.parametrize(
    ("problem", "linearization"),
    [
        ("lotka_volterra", FullJacobian()),
        ("van_der_pol", PiecewiseConstant()),
        ("lorenz", DiagonalJacobian()),
    ],
)
def test_cold_start_converges_where_newton_without_safeguards_diverges(
    problem, linearization
):
    # Without the safeguards each of these ends in NaN within three iterations.
    num_steps = 128
    step_map, y0, xs = _discretize(problem, num_steps)
    guess = constant_guess(y0, num_steps)[None]
    method = newton(linearization, tolerance=1e-11)
    (ys, statistics), expected = _solve(method, step_map, y0, xs, guess)
    assert _successful(statistics)
    assert statistics.num_iterations[0] <= num_steps
    assert relative_error(ys[0], expected) < 1e-8


def test_linear_recurrence_of_the_structure_of_the_transitions_takes_one_iteration():
    # Only one: whether the error is below tolerance need not be estimated.
    num_steps = 20
    full = jnp.array([[0.9, 0.3], [-0.4, 0.8]])
    xs = jnp.sin(jnp.arange(4.0 * num_steps)).reshape(num_steps, 4)
    y0 = jnp.array([1.0, -1.0, 0.5, 2.0])
    for linearization, matrix in (
        (FullJacobian(), jnp.kron(full, full)),
        (BlockDiagonalJacobian(2), jnp.kron(jnp.eye(2), full)),
        (Picard(), jnp.eye(4)),
    ):
        step_map = StepMap(lambda x, y, matrix=matrix: matrix @ y + x)
        method = newton(linearization, max_iterations=1)
        guess = jnp.ones((1, num_steps, 4))
        (ys, statistics), expected = _solve(method, step_map, y0, xs, guess)
        assert _successful(statistics)
        assert relative_error(ys[0], expected) < 1e-14


def test_relative_tolerance_does_not_depend_on_units():
    # In units larger or smaller by a power of two nothing may change, not one bit.
    step_map, y0, xs = _discretize("lotka_volterra", 50)

    @jax.jit
    @jax.vmap
    def solve(unit):
        scaled = StepMap(lambda x, y: unit * step_map.step(x, y / unit))
        method = dataclasses.replace(newton(tolerance=1e-6), atol=0.0)
        ys, statistics, _ = method(scaled, unit * y0, xs, constant_guess(unit * y0, 50))
        return ys / unit, statistics

    ys, statistics = solve(2.0 ** jnp.array([0.0, 40.0, -40.0]))
    assert _successful(statistics)
    assert len(set(map(int, statistics.num_iterations))) == 1
    assert jnp.all(ys == ys[:1])


@pytest.mark.parametrize(
    ("below_zero", "linearization"),
    [(jnp.sqrt, FullJacobian()), (lambda y: y * jnp.log(y), PiecewiseConstant())],
)
def test_field_that_exists_on_one_side_only_is_solved(below_zero, linearization):
    # The true solution decays from 1 to about 0.1; a guess of -1 is NaN throughout.
    step_map = rk4(lambda t, y, args: -0.6 * jnp.sqrt(y) + 0.05 * below_zero(y), None)
    xs, y0 = intervals(jnp.linspace(0.0, 2.0, 26)), jnp.array([1.0])
    guesses = jnp.array([1.0, -1.0, 1e-3])[:, None, None] * jnp.ones((3, 25, 1))
    method = newton(linearization, tolerance=1e-12)
    (ys, statistics), expected = _solve(method, step_map, y0, xs, guesses)
    assert jnp.all(jnp.isfinite(expected)) and expected[-1, 0] < 0.3
    assert _successful(statistics)
    assert relative_error(ys, jnp.broadcast_to(expected, ys.shape)) < 1e-10


def test_step_without_a_derivative_is_solved():
    # At zero, where this starts, the root has a value but its slope is infinite.
    step_map = StepMap(lambda x, y: jnp.sqrt(y) + x, lambda x, y: jnp.sqrt(y))
    y0, xs = jnp.array([0.0]), jnp.linspace(0.1, 0.2, 8)
    guesses = jnp.stack([jnp.zeros((8, 1)), jnp.ones((8, 1))])
    for linearization in (FullJacobian(), PiecewiseConstant()):
        method = newton(linearization, AssociativeScan(), tolerance=1e-12)
        (ys, statistics), expected = _solve(method, step_map, y0, xs, guesses)
        assert _successful(statistics)
        assert relative_error(ys, jnp.broadcast_to(expected, ys.shape)) < 1e-11


def test_step_map_may_be_driven_by_any_pytree():
    weights = jnp.array([[0.2, 0.7], [-0.5, 0.1]])
    xs = {"input": jnp.sin(jnp.arange(22.0)).reshape(11, 2), "on": jnp.arange(11) % 2}

    def step(x, y):
        return jnp.where(x["on"] == 1, jnp.tanh(weights @ y + x["input"]), y)

    step_map, y0 = StepMap(step), jnp.array([0.1, 0.2])
    guess = jnp.zeros((1, 11, 2))
    (ys, statistics), expected = _solve(newton(), step_map, y0, xs, guess)
    assert relative_error(ys[0], expected) < 1e-14
    assert _successful(statistics)


# ---- Overflow ----


@each_scan
def test_long_unstable_solve_does_not_overflow(scan):
    # Between the first and the last step the derivative grows by 2**512, beyond single
    # precision; the states stay between 0 and 1. They are chaotic: a result may differ
    # from the guess, and be just as right, but not be a failure.
    num_steps = 512
    step_map = StepMap(lambda x, y: 4 * y * (1 - y))
    y0, xs = jnp.array([0.3], jnp.float32), jnp.zeros(num_steps)
    guess = jax.jit(ft.partial(sequential, step_map))(y0, xs)[None]
    method = newton(FullJacobian(), scan, tolerance=1e-5)
    (ys, statistics), _ = _solve(method, step_map, y0, xs, guess)
    assert _successful(statistics)
    assert statistics.residual[0] < 1e-5
    assert relative_error(ys[0, :10], guess[0, :10]) < 1e-3


class _Exploding(AbstractLinearization):
    """Transitions whose products overflow after three steps."""

    def __call__(self, step_map, x, y_prev, y_next):
        return Diagonal(jnp.full_like(y_prev, -1e100))


def test_overflow_after_a_final_step_does_not_spoil_it():
    step_map, y0, xs = _discretize("lotka_volterra", 12, t1=3.0)
    method = newton(_Exploding(), UnguardedScan(), tolerance=1e-12)
    guesses = _bad_guesses(y0, 12)
    (ys, statistics), expected = _solve(method, step_map, y0, xs, guesses)
    assert _successful(statistics)
    assert jnp.all(statistics.num_iterations <= 12)
    assert relative_error(ys, jnp.broadcast_to(expected, ys.shape)) < 1e-13


# ---- What it says about itself ----


def test_guess_within_the_tolerance_is_no_divergence():
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
    for linearization in (FullJacobian(), DiagonalJacobian()):
        method = newton(linearization, tolerance=tolerance)
        (ys, statistics), expected = _solve(method, step_map, y0, xs, guesses)
        assert _successful(statistics)
        assert relative_error(ys, jnp.broadcast_to(expected, ys.shape)) < 1e-3


def test_too_few_iterations_are_reported_with_the_residual_of_the_result():
    step_map, y0, xs = _discretize("lotka_volterra", 60)
    guess = constant_guess(y0, 60)[None]
    for max_iterations, size in ((2, 1e-1), (7, 1e-8)):
        method = newton(max_iterations=max_iterations)
        (ys, statistics), expected = _solve(method, step_map, y0, xs, guess)
        assert jnp.all(jnp.isfinite(ys))
        assert relative_error(ys[0], expected) > size / 100
        assert result_is(statistics.result, "nonlinear_max_steps_reached")
        assert statistics.num_iterations[0] == max_iterations
        before = jnp.concatenate([y0[None], ys[0, :-1]])
        images = jax.vmap(step_map.step)(xs, before)
        residual = np.max(np.abs(images - ys[0]))
        assert residual >= size
        # Two ways to compile the step may differ by rounding.
        assert abs(statistics.residual[0] - residual) < 1e-13


@pytest.mark.parametrize("name", ["full_jacobian", "picard"])
def test_step_that_fails_is_reported_and_spoils_nothing_before_it(name):
    num_steps = 9
    inner, y0, times = _discretize("lotka_volterra", num_steps, t1=3.0)
    guesses = _bad_guesses(y0, num_steps)
    method = newton(linearizations[name])

    @jax.jit
    @ft.partial(jax.vmap, in_axes=(0, 0, None))
    @ft.partial(jax.vmap, in_axes=(None, None, 0))
    def solve(bad, value, guess):
        step_map = StepMap(
            lambda x, y: jnp.where(x[0] == bad, value, inner.step(x[1], y))
        )
        xs = jnp.arange(num_steps), times
        solutions = [m(step_map, y0, xs, guess) for m in (method, Sequential())]
        return [(ys, s.result, s.num_solved) for ys, s, _ in solutions]

    expected = jax.jit(ft.partial(sequential, inner))(y0, times)
    bad = jnp.array([0, 1, num_steps // 2, num_steps - 1])
    values = jnp.array([jnp.nan, jnp.inf, -jnp.inf, jnp.nan])
    for ys, result, num_solved in solve(bad, values, guesses):
        assert np.all(result_is(result, "nonfinite"))
        assert jnp.all(jnp.isfinite(ys))
        np.testing.assert_array_equal(num_solved, bad[:, None] + 0 * num_solved)
        for i, k in enumerate(bad):
            # Steps before it are right, those from it on repeat the last good state.
            good = jnp.concatenate([y0[None], expected[:k]])
            right = jnp.concatenate([good[1:], jnp.tile(good[-1], (num_steps - k, 1))])
            assert relative_error(ys[i], jnp.broadcast_to(right, ys[i].shape)) < 1e-8


def test_initial_value_that_is_not_finite_is_never_a_success():
    step_map, _, xs = _discretize("lotka_volterra", 8)
    guess = jnp.ones((8, 2))

    @jax.jit
    @jax.vmap
    def solve(y0):
        methods = newton(), newton(Picard()), Sequential()
        return [m(step_map, y0, xs, guess)[1].result for m in methods]

    for result in solve(jnp.array([[jnp.nan, jnp.nan], [1.0, jnp.inf]])):
        assert np.all(result_is(result, "nonfinite"))


def test_residual_that_is_not_a_number_is_no_success():
    # All steps are solved but the last, which has no value.
    step_map = StepMap(lambda x, y: jnp.where(x < 5, jnp.cos(y), jnp.nan))
    y0, xs = jnp.array([0.3]), jnp.arange(6.0)
    guess = jax.jit(ft.partial(sequential, step_map))(y0, xs)[None]
    method = newton(max_iterations=1)
    (ys, statistics), _ = _solve(method, step_map, y0, xs, guess)
    np.testing.assert_array_equal(ys[0, :5], guess[0, :5])
    # As large as can be, not NaN: `jnp.max` may drop that.
    assert jnp.isposinf(statistics.residual[0])
    assert result_is(statistics.result, "nonfinite")


def test_failing_sample_does_not_disturb_the_others_of_its_batch():
    # dy/dt = y**2 leaves every bound at time 1 / y0.
    num_steps = 40
    step_map = rk4(lambda t, y, args: y**2, None)
    times = jnp.linspace(0.0, 1.0, num_steps + 1)
    y0s = jnp.array([0.5, 40.0, -0.7, 0.3])[:, None]
    method = newton(PiecewiseConstant(), tolerance=1e-12)

    def solve(y0):
        guess = constant_guess(y0, num_steps)
        return method(step_map, y0, intervals(times), guess)[:2]

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


# ---- Windows ----


@pytest.mark.parametrize("window", [1, 7])
def test_window_that_slides_finds_what_no_window_finds(window):
    num_steps = 30
    step_map, y0, xs = _discretize("lotka_volterra", num_steps, t1=3.0)
    guesses = _bad_guesses(y0, num_steps)
    method = newton(None, AssociativeScan(), tolerance=1e-12, window=window)
    (ys, statistics), expected = _solve(method, step_map, y0, xs, guesses)
    assert _successful(statistics)
    assert jnp.all(statistics.num_solved == num_steps)
    assert jnp.all(statistics.num_iterations <= num_steps)
    assert jnp.all(window * statistics.num_iterations >= num_steps)
    assert relative_error(ys, jnp.broadcast_to(expected, ys.shape)) < 1e-11


def test_iterations_of_all_windows_count_and_what_failed_stays_apart():
    # The second sample leaves every bound; in windows that are ahead of or behind those
    # of the others.
    step_map = rk4(lambda t, y, args: y**2, None)
    xs = intervals(jnp.linspace(0.0, 1.0, 21))
    y0s = jnp.array([0.5, 40.0, -0.7])[:, None]

    def solve(max_iterations, window):
        method = newton(max_iterations=max_iterations, window=window)
        run = lambda y0: method(step_map, y0, xs, constant_guess(y0, 20))[:2]
        return jax.jit(jax.vmap(run))(y0s)

    whole, _ = solve(None, None)
    ys, statistics = solve(None, 6)
    expected = [True, False, True]
    np.testing.assert_array_equal(result_is(statistics.result, "successful"), expected)
    assert result_is(statistics.result, "nonfinite")[1]
    assert relative_error(ys, whole) < 1e-9
    # As many as there are steps in a window, which for one of them always suffice.
    assert statistics.num_iterations[0] > 8
    _, statistics = solve(6, 6)
    assert result_is(statistics.result, "nonlinear_max_steps_reached")[0]
    assert statistics.num_iterations[0] == 6
    assert 6 <= statistics.num_solved[0] < 20


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
    ("dtype", "sizes"), [(jnp.float32, [1e6]), (jnp.float64, [1e10, 1e-10])]
)
def test_small_components_converge_beside_large_ones(dtype, sizes):
    rtol = float(jnp.finfo(dtype).eps) ** 0.75
    method = dataclasses.replace(newton(), rtol=rtol, atol=0.0)
    ts = jnp.linspace(0.0, 10.0, 301, dtype=dtype)
    xs = intervals(ts)

    @jax.jit
    @jax.vmap
    def solve(large):
        step_map = StepMap(ft.partial(_beside_something_large, large))
        y0 = jnp.stack([large, jnp.ones((), dtype), jnp.zeros((), dtype)])
        expected = sequential(step_map, y0, xs)
        # From the constant guess, and from one whose large component is right, while
        # the small ones are not.
        warm = sequential(step_map, y0.at[1].set(1.3), xs).at[:, 0].set(expected[:, 0])
        guesses = jnp.stack([constant_guess(y0, 300), warm])
        run = jax.vmap(lambda guess: method(step_map, y0, xs, guess)[:2])
        return run(guesses), expected

    (ys, statistics), expected = solve(jnp.asarray(sizes, dtype))
    assert _successful(statistics)
    assert jnp.all(statistics.num_iterations < 60)
    for found, wanted in zip(ys, expected, strict=True):
        for i in range(3):
            reference = jnp.broadcast_to(wanted[:, i], found[..., i].shape)
            assert relative_error(found[..., i], reference) < 100 * rtol


def test_component_that_is_nothing_but_rounding_is_right_too():
    # What feeds on the difference of two that are equal, but for rounding.
    def step(x, y):
        a, b, c = y
        a, b = a + (0.3 * jnp.cos(a) + x), (b + 0.1 * jnp.cos(b)) + 0.2 * jnp.cos(b) + x
        return jnp.stack([a, b + 0.1 * c, 0.9 * c + (a / 3 - b / 3)])

    y0 = jnp.array([0.3, 0.3, 0.0], jnp.float32)
    xs = jnp.sin(jnp.arange(300, dtype=jnp.float32)) / 10
    rtol = float(jnp.finfo(jnp.float32).eps) ** 0.75
    method = dataclasses.replace(newton(), rtol=rtol, atol=0.0)
    # Apart from each other, so that both are compiled to the same rounding.
    solve = jax.jit(ft.partial(method, StepMap(step)))
    ys, statistics, _ = solve(y0, xs, constant_guess(y0, 300))
    expected = sequential(StepMap(step), y0, xs)
    assert _successful(statistics)
    assert 0 < float(jnp.max(jnp.abs(expected[:, 2]))) < 1e-5
    for found, wanted in zip(ys.T, expected.T, strict=True):
        assert relative_error(found, wanted) < 1e-4


def test_a_value_that_is_lost_in_a_large_array_is_no_success():
    # `jnp.max` drops NaN from arrays of 4096 numbers and more on a CPU.
    def step(x, y):
        return jnp.where(x == 3000, jnp.nan, 0.5 * y + jnp.sin(x.astype(y.dtype)))

    _, statistics = solved(
        StepMap(step), jnp.ones(2), jnp.arange(4200), method=newton(max_iterations=5)
    )
    assert not result_is(statistics.result, "successful")
    assert int(statistics.num_solved) <= 3000
