"""What stands in for a guess: close to the solution if it can be, finite always."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrax_deer import CoarsePredictor, ConstantPredictor, StepMap

from .helpers import (
    discretize,
    newton,
    problems,
    relative_error,
    sequential,
    solved,
    with_coarse_steps,
)


def _discretize(num_steps: int, dtype=jnp.float64, name="mlp"):
    step_map, y0, xs = discretize(problems[name].cast(dtype), num_steps)
    return with_coarse_steps(step_map), y0, xs


# Several coarse steps, one that the last step has to complete, and one alone.
@pytest.mark.parametrize(
    ("num_steps", "stride", "dtype"),
    [(64, 4, jnp.float64), (65, 4, jnp.float32), (64, 100, jnp.float64)],
)
def test_coarse_prediction_is_close_to_the_solution(num_steps, stride, dtype):
    step_map, y0, xs = _discretize(num_steps, dtype)
    unknown = jnp.full((num_steps, y0.size), jnp.nan, dtype)

    @jax.jit
    def compute(y0):
        predictor, none = CoarsePredictor(stride), jnp.array(0)
        predicted = predictor(step_map, y0, xs, unknown, none)
        return predicted, sequential(step_map, y0, xs)

    predicted, expected = compute(y0)
    assert predicted.dtype == dtype
    # Held constant, as it is where coarse steps fail, it is far away.
    assert relative_error(jnp.broadcast_to(y0, expected.shape), expected) > 0.1
    assert relative_error(predicted, expected) < (1e-4 if stride == 4 else 1e-2)
    # Nor is it the solution itself.
    assert dtype == jnp.float32 or relative_error(predicted, expected) > 1e-9


@pytest.mark.parametrize("predictor", [CoarsePredictor(4), ConstantPredictor()])
def test_known_states_are_kept_and_the_prediction_goes_on_from_there(predictor):
    step_map, y0, xs = _discretize(20)

    @jax.jit
    @jax.vmap
    def compute(num_known):
        exact = sequential(step_map, y0, xs)
        ys = jnp.where(jnp.arange(20)[:, None] < num_known, exact, jnp.nan)
        return predictor(step_map, y0, xs, ys, num_known), exact

    all_known = np.array([0, 1, 6, 8, 20])
    for num_known, got, exact in zip(all_known, *compute(all_known), strict=True):
        np.testing.assert_array_equal(got[:num_known], exact[:num_known])
        if isinstance(predictor, CoarsePredictor):
            assert relative_error(got, exact) < 1e-4
        else:
            last = y0 if num_known == 0 else exact[num_known - 1]
            rest = jnp.broadcast_to(last, (20 - num_known, 4))
            np.testing.assert_array_equal(got[num_known:], rest)


def test_coarse_step_that_is_of_no_use_is_replaced_by_the_last_state():
    # As a solver's step says so whose error estimate is too large.
    step_map, y0, xs = _discretize(12)
    good = step_map.coarse_step
    assert good is not None

    def coarse_step(first, last, y):
        return jnp.where(first[0] > 0.4, jnp.nan, good(first, last, y))

    def coarse_interpolate(first, last, x, y):
        del last
        return jnp.where(first[0] > 0.4, jnp.nan, step_map.step((first[0], x[1]), y))

    step_map = dataclasses.replace(
        step_map, coarse_step=coarse_step, coarse_interpolate=coarse_interpolate
    )
    unknown = jnp.full((12, 4), jnp.nan)
    got = CoarsePredictor(4)(step_map, y0, xs, unknown, jnp.array(0))
    # The third coarse step begins at 2 / 3, where the second, from 1 / 3, has ended.
    assert relative_error(got[:8], sequential(step_map, y0, xs)[:8]) < 1e-4
    last = jnp.broadcast_to(got[7], (4, 4))
    np.testing.assert_allclose(got[8:], last, rtol=1e-14)


def test_recurrence_without_coarse_steps_is_predicted_to_be_constant():
    step_map, y0 = StepMap(lambda x, y: y + x), jnp.array([2.0])
    ys = jnp.full((5, 1), jnp.inf)
    got = CoarsePredictor()(step_map, y0, jnp.ones((5, 1)), ys, jnp.array(0))
    np.testing.assert_array_equal(got, np.full((5, 1), 2.0))


def test_coarse_prediction_saves_iterations_and_changes_no_answer():
    step_map, y0, xs = _discretize(60, name="fitzhugh_nagumo")

    no_guess = jnp.full((60, 2), jnp.nan)

    @jax.jit
    def compute(y0, guess):
        run = lambda p: solved(
            step_map, y0, xs, guess=guess, method=newton(predictor=p)
        )
        return run(ConstantPredictor()), run(CoarsePredictor())

    (constant, slow), (coarse, fast) = compute(y0, no_guess)
    assert relative_error(coarse, constant) < 1e-9
    assert fast.num_iterations < slow.num_iterations


def test_stride_of_the_wrong_type_or_range_is_an_error():
    with pytest.raises(ValueError, match="`stride` must be"):
        CoarsePredictor(0)
    with pytest.raises(TypeError, match="`stride` must be"):
        CoarsePredictor(2.0)  # pyright: ignore
