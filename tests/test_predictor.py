"""What stands in for a guess: close to the solution if it can be, finite always."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrax_deer import CoarsePredictor, ConstantPredictor
from diffrax_deer._linearization import StepMap
from diffrax_deer._step_map import SolverStep, ravel

from .helpers import intervals, problems, relative_error, sequential


def _step_map(name: str, num_steps: int, dtype=jnp.float64):
    problem = problems[name].cast(dtype)
    inner = SolverStep(
        diffrax.Dopri5(scan_kind="bounded"),
        diffrax.ODETerm(problem.field),
        problem.args,
        ravel(problem.y0)[1],
    )
    times = jnp.linspace(problem.t0, problem.t1, num_steps + 1, dtype=dtype)
    return (
        StepMap(inner.step, leap=inner.leap, between=inner.between),
        problem.y0,
        intervals(times),
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
# One leap alone, several, and one that the last step has to complete.
@pytest.mark.parametrize(("num_steps", "stride"), [(64, 4), (65, 4), (64, 100)])
def test_large_steps_end_close_to_the_solution(num_steps, stride, dtype):
    step_map, y0, xs = _step_map("mlp", num_steps, dtype)
    unknown = jnp.full((num_steps, y0.size), jnp.nan, dtype)
    predict = jax.jit(
        lambda y0, k: CoarsePredictor(stride)(step_map, y0, xs, unknown, k)
    )
    predicted = predict(y0, jnp.array(0))
    expected = sequential(step_map, y0, xs)
    assert predicted.dtype == dtype
    # Held constant, as it is where leaps fail, it is far away.
    assert relative_error(jnp.broadcast_to(y0, expected.shape), expected) > 0.1
    assert relative_error(predicted, expected) < (1e-4 if stride == 4 else 1e-2)


@pytest.mark.parametrize("predictor", [CoarsePredictor(4), ConstantPredictor()])
@pytest.mark.parametrize("num_known", [0, 1, 6, 8, 20])
def test_what_is_known_is_kept_and_goes_on_from_there(predictor, num_known):
    step_map, y0, xs = _step_map("mlp", 20)
    exact = sequential(step_map, y0, xs)
    ys = exact.at[num_known:].set(jnp.nan)
    got = predictor(step_map, y0, xs, ys, jnp.array(num_known))
    np.testing.assert_array_equal(got[:num_known], exact[:num_known])
    assert jnp.all(jnp.isfinite(got))
    if isinstance(predictor, CoarsePredictor):
        assert relative_error(got, exact) < 1e-4
    else:
        last = y0 if num_known == 0 else exact[num_known - 1]
        np.testing.assert_array_equal(
            got[num_known:], jnp.broadcast_to(last, (20 - num_known, 4))
        )


def test_a_step_that_says_itself_that_it_is_useless_is_not_used():
    # Thirty times the limit of stability: the error estimate is far above the state.
    inner = SolverStep(
        diffrax.Dopri5(scan_kind="bounded"),
        diffrax.ODETerm(lambda t, y, args: -100 * y),
        None,
        ravel(jnp.ones(1))[1],
    )
    xs = intervals(jnp.linspace(0.0, 10.0, 11))
    step_map = StepMap(inner.step, leap=inner.leap, between=inner.between)
    ys = jnp.full((10, 1), jnp.nan)
    got = CoarsePredictor(5)(step_map, jnp.ones(1), xs, ys, jnp.array(0))
    np.testing.assert_array_equal(got, np.ones((10, 1)))


def test_a_recurrence_has_no_longer_steps():
    step_map, y0 = StepMap(lambda x, y: y + x), jnp.array([2.0])
    ys = jnp.full((5, 1), jnp.inf)
    got = CoarsePredictor()(step_map, y0, jnp.ones((5, 1)), ys, jnp.array(0))
    np.testing.assert_array_equal(got, np.full((5, 1), 2.0))


@pytest.mark.parametrize(("stride", "error"), [(0, ValueError), (2.0, TypeError)])
def test_a_wrong_stride_is_an_error(stride, error):
    with pytest.raises(error, match="`stride` must be"):
        CoarsePredictor(stride)
