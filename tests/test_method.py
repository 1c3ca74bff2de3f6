"""How a trajectory is found: choices that are left open, arguments, statistics."""

import dataclasses
import functools as ft
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrax_deer import (
    AssociativeScan,
    CoarsePredictor,
    ConstantPredictor,
    DiagonalJacobian,
    FullJacobian,
    MatrixFreeGradient,
    Newton,
    ParallelGradient,
    PiecewiseConstant,
    Sequential,
    SequentialGradient,
    SequentialScan,
    StepMap,
)
from diffrax_deer._method import Given
from diffrax_deer._solve import solve

from .helpers import (
    constant_guess,
    discretize,
    newton,
    problems,
    relative_error,
    result_is,
    sequential,
    solved,
    weighted_loss,
    with_coarse_steps,
)


def _discretize(name: str, num_steps: int, dtype: Any = jnp.float64):
    step_map, y0, xs = discretize(problems[name].cast(dtype), num_steps)
    return with_coarse_steps(step_map), y0, xs


# ---- Newton ----


def test_newton_makes_the_choices_that_were_left_open():
    step_map, y0, _ = _discretize("mlp", 50)
    tolerance = 2.0 ** (-52 * 0.75)
    field = Newton(
        PiecewiseConstant(), SequentialScan(), CoarsePredictor(), tolerance, 0.0, 50, 50
    )
    assert Newton().resolve(step_map, y0, 50) == field
    # A solver whose steps are implicit, and a recurrence.
    implicit = dataclasses.replace(step_map, is_implicit=True)
    expected = dataclasses.replace(field, linearization=FullJacobian())
    assert Newton().resolve(implicit, y0, 50) == expected
    recurrence = StepMap(lambda x, y: y)
    expected = dataclasses.replace(expected, predictor=ConstantPredictor())
    assert Newton().resolve(recurrence, y0, 50) == expected
    # Many steps, and a type of the state or, in a part of it, of fewer digits.
    many = Newton().resolve(step_map, y0, 2000)
    assert (many.max_iterations, many.window) == (2000, 1024)
    single = Newton().resolve(step_map, y0.astype(jnp.float32), 50)
    coarsest = dataclasses.replace(step_map, eps=2.0**-23)
    coarsest = Newton().resolve(coarsest, y0, 50)
    assert single.rtol == coarsest.rtol == pytest.approx(2.0 ** (-23 * 0.75))


def test_newton_keeps_the_choices_that_were_made():
    step_map, y0, _ = _discretize("mlp", 50)
    made = Newton(
        DiagonalJacobian(), AssociativeScan(), ConstantPredictor(), 0.0, 1e-3, 7, 11
    )
    assert made.resolve(step_map, y0, 50) == made
    # No window is longer than all steps.
    assert made.resolve(step_map, y0, 5) == dataclasses.replace(made, window=5)


def test_newton_without_arguments_finds_the_sequential_answer_without_a_guess():
    step_map, y0, xs = _discretize("fitzhugh_nagumo", 100)
    guess = jnp.full((100, 2), jnp.nan)

    @jax.jit
    def compute(y0):
        own = Newton()(step_map, y0, xs, guess)[:2]
        return own, sequential(step_map, y0, xs)

    (ys, statistics), expected = compute(y0)
    assert result_is(statistics.result, "successful")
    assert 1 < statistics.num_iterations < 10
    assert relative_error(ys, expected) < 1e-10


def test_tolerances_are_met_and_looser_ones_take_fewer_iterations():
    step_map, y0, xs = _discretize("lotka_volterra", 60)
    guess = constant_guess(y0, 60)

    @jax.jit
    def compute(y0):
        run = lambda **tolerances: Newton(DiagonalJacobian(), **tolerances)(
            step_map, y0, xs, guess
        )[:2]
        return run(rtol=1e-3, atol=0.0), run(rtol=0.0, atol=1e-3), run()

    *loose, (_, tight) = compute(y0)
    for (ys, statistics), scale in zip(loose, (jnp.max(jnp.abs(y0)), 1.0), strict=True):
        assert result_is(statistics.result, "successful")
        assert statistics.num_iterations < tight.num_iterations
        images = jax.vmap(step_map.step)(xs, jnp.concatenate([y0[None], ys[:-1]]))
        assert 1e-9 < jnp.max(jnp.abs(images - ys)) < 1e-3 * scale


def test_arguments_of_newton_of_the_wrong_type_or_range_are_errors():
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"linearization": FullJacobian}, TypeError, "the class `FullJacobian`"),
        ({"scan": "sequential"}, TypeError, "`scan` must be an instance of"),
        ({"predictor": FullJacobian()}, TypeError, "`predictor` must be"),
        ({"rtol": "small"}, TypeError, "`rtol` must be a Python float"),
        ({"atol": -1.0}, ValueError, "`atol` must be finite and not negative"),
        ({"rtol": float("nan")}, ValueError, "`rtol` must be finite"),
        ({"max_iterations": 0}, ValueError, "`max_iterations` must be at least 1"),
        ({"window": 2.0}, TypeError, "`window` must be a Python int"),
    ]
    for arguments, error, message in cases:
        with pytest.raises(error, match=message):
            Newton(**arguments)


# ---- One step after another ----


def test_sequential_measures_nothing_and_needs_no_guess():
    step_map, y0, xs = _discretize("lotka_volterra", 50)
    guess = jnp.full((50, 2), jnp.nan)

    @jax.jit
    def compute(y0):
        run = lambda y0: Sequential()(step_map, y0, xs, guess)[:2]
        return run(y0), sequential(step_map, y0, xs)

    (ys, statistics), expected = compute(y0)
    assert relative_error(ys, expected) < 1e-15
    assert result_is(statistics.result, "successful")
    assert statistics.num_solved == 50
    assert statistics.num_iterations == 0
    assert statistics.residual is None
    assert not Sequential.uses_guess and Newton.uses_guess


def test_sequential_stops_where_a_step_has_no_value():
    step_map, guess = StepMap(lambda x, y: y / x), jnp.zeros((4, 2))
    # Afterwards there would be a value again.
    xs, y0 = jnp.array([2.0, 0.0, jnp.inf, 1.0]), jnp.ones(2)
    ys, statistics = jax.jit(lambda: Sequential()(step_map, y0, xs, guess)[:2])()
    assert result_is(statistics.result, "nonfinite")
    assert statistics.num_solved == 1
    np.testing.assert_array_equal(ys, np.full((4, 2), 0.5))


# ---- Given ----


def test_solution_that_is_given_is_differentiated_as_if_it_were_found():
    step_map, y0, xs = _discretize("van_der_pol", 20)
    ys = jax.jit(lambda: sequential(step_map, y0, xs))()
    run = lambda y0, method: solved(step_map, y0, xs, guess=ys, method=method)

    @jax.jit
    def compute(y0, num_solved):
        method = Given(num_solved)
        loss = lambda y0: weighted_loss(lambda y0: run(y0, method)[0], y0)
        return jax.value_and_grad(loss)(y0), run(y0, method)

    own, (found, statistics) = compute(y0, jnp.array(20))
    reference = lambda y0: weighted_loss(lambda y0: sequential(step_map, y0, xs), y0)
    assert relative_error(own, jax.value_and_grad(reference)(y0)) < 1e-12
    np.testing.assert_array_equal(found, ys)
    assert result_is(statistics.result, "successful")
    # Of fewer steps it says so.
    _, (_, statistics) = compute(y0, jnp.array(7))
    assert result_is(statistics.result, "nonlinear_divergence")
    assert statistics.num_solved == 7


# ---- Statistics ----


def test_statistics_name_method_and_gradient_with_every_choice_made():
    step_map, y0, xs = _discretize("van_der_pol", 6)
    resolved = Newton(
        DiagonalJacobian(),
        SequentialScan(),
        CoarsePredictor(),
        2.0 ** (-52 * 0.75),
        0.0,
        6,
        4,
    )
    given = Given(jnp.array(6))
    for method, gradient, expected in (
        (Newton(DiagonalJacobian(), window=4), SequentialGradient(), resolved),
        (Sequential(), MatrixFreeGradient(), Sequential()),
        (given, ParallelGradient(), given),
    ):
        run = ft.partial(solved, step_map, y0, xs, method=method, gradient=gradient)
        _, statistics = jax.jit(run)()
        assert statistics.method == expected
        assert statistics.gradient == gradient


def test_state_without_components_is_solved_by_any_method():
    empty = jnp.zeros((4, 0))
    step_map = StepMap(lambda x, y: y, step_with_aux=lambda x, y: (y, 2 * x))
    for method in (newton(), Sequential()):
        ys, statistics, aux = solve(
            step_map, empty[0], jnp.arange(4.0), empty, method, ParallelGradient()
        )
        assert ys.shape == (4, 0)
        assert result_is(statistics.result, "successful")
        assert (statistics.num_iterations, statistics.num_solved) == (0, 4)
        assert statistics.residual is None
        assert (statistics.method, statistics.gradient) == (method, ParallelGradient())
        np.testing.assert_array_equal(aux, 2 * np.arange(4.0))
