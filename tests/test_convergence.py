"""Hard problems end in the answer of the loop, warm starts end early."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jaxtyping import Array

from diffrax_deer import (
    CoarsePredictor,
    ConstantPredictor,
    FullJacobian,
    PiecewiseConstant,
    StepMap,
)

from .helpers import (
    intervals,
    newton,
    problems,
    relative_error,
    result_is,
    rk4,
    sequential,
    with_coarse_steps,
)


class _Hard(NamedTuple):
    """`dy/dt = field(t, y, args)` up to `t1`, in `num_steps` steps.

    `limit`: the most iterations from the constant guess. What a prototype of this
    iteration needed was 137 for Lotka-Volterra and 40 for Van der Pol.
    """

    field: Callable[[Any, Any, Any], Array]
    y0: list[float]
    t1: float
    num_steps: int
    limit: int
    args: Any = None


def _of(name: str, **changes: Any) -> dict[str, Any]:
    problem = problems[name]._replace(**changes)
    return {"field": problem.field, "y0": problem.y0.tolist(), "args": problem.args}


_PROBLEMS = {
    "lotka_volterra": _Hard(
        t1=100.0, num_steps=2560, limit=100, **_of("lotka_volterra")
    ),
    "van_der_pol": _Hard(
        t1=20.0, num_steps=2048, limit=30, **_of("van_der_pol", args=np.array(10.0))
    ),
    "near_collision": _Hard(
        t1=3.0,
        num_steps=2048,
        limit=2048,
        **_of("two_body", y0=np.array([1.0, 0.0, 0.0, 0.3])),
    ),
    # Up to 0.0025, where the field is about to end.
    "square_root": _Hard(lambda t, y, args: -jnp.sqrt(y), [1.0], 1.9, 128, 128),
}


@pytest.mark.parametrize("name", _PROBLEMS)
def test_hard_problem_has_the_sequential_answer(name):
    field, start, t1, num_steps, limit, args = _PROBLEMS[name]
    step_map, y0 = with_coarse_steps(rk4(field, args)), jnp.array(start)
    xs = intervals(jnp.linspace(0.0, t1, num_steps + 1))
    no_guess = jnp.full((num_steps, y0.size), jnp.nan)

    @jax.jit
    def compute(y0):
        # In windows of 1024 steps that slide.
        methods = [
            newton(PiecewiseConstant(), tolerance=1e-12, predictor=predictor)
            for predictor in (ConstantPredictor(), CoarsePredictor())
        ]
        solutions = [m(step_map, y0, xs, no_guess)[:2] for m in methods]
        return solutions, sequential(step_map, y0, xs)

    ((constant, slow), (coarse, fast)), expected = compute(y0)
    for ys, statistics in ((constant, slow), (coarse, fast)):
        assert result_is(statistics.result, "successful")
        assert relative_error(ys, expected) < 1e-8
    assert slow.num_iterations <= limit
    # With a coarse prediction the guess is good enough for hard problems, too.
    assert fast.num_iterations <= 20


def test_stiff_problem_on_steps_of_very_different_length_has_the_sequential_answer():
    # Robertson's reactions from 1e-6 to 1e5 seconds, by the implicit Euler method.
    def field(y):
        slow, back, fast = 0.04 * y[0], 1e4 * y[1] * y[2], 3e7 * y[1] ** 2
        return jnp.stack([back - slow, slow - back - fast, fast])

    def step(h, y):
        def improve(z, _):
            matrix = jnp.eye(3) - h * jax.jacfwd(field)(z)
            return z - jnp.linalg.solve(matrix, z - y - h * field(z)), None

        return lax.scan(improve, y, length=8)[0]

    y0, hs = jnp.array([1.0, 0.0, 0.0]), jnp.geomspace(1e-6, 1e4, 200)
    step_map = StepMap(step, is_implicit=True)
    method = newton(FullJacobian(), tolerance=1e-12)

    @jax.jit
    def compute(y0):
        own = method(step_map, y0, hs, jnp.broadcast_to(y0, (200, 3)))[:2]
        return own, sequential(step_map, y0, hs)

    (ys, statistics), expected = compute(y0)
    assert result_is(statistics.result, "successful")
    # The second component stays below 4e-5.
    for found, wanted in zip(ys.T, expected.T, strict=True):
        assert relative_error(found, wanted) < 1e-8
    # No mass is lost.
    np.testing.assert_allclose(jnp.sum(ys, axis=1), 1.0, rtol=1e-9)
    assert statistics.num_iterations <= 60


def test_warm_start_after_a_small_change_of_the_weights_takes_few_iterations():
    problem = problems["mlp"].cast(jnp.float64)._replace(t1=4.0)
    rng = np.random.default_rng(0)
    moved = jax.tree.map(
        lambda x: x + 1e-3 * jnp.asarray(rng.normal(size=x.shape)), problem.args
    )
    xs = intervals(jnp.linspace(0.0, problem.t1, 101))
    method = newton(PiecewiseConstant(), tolerance=1e-12)

    @jax.jit
    def compute(args, guess):
        step_map = rk4(problem.field, args)
        own = method(step_map, problem.y0, xs, guess)[:2]
        return own, sequential(step_map, problem.y0, xs)

    (ys, cold), _ = compute(problem.args, jnp.full((100, 4), jnp.nan))
    (ys, warm), expected = compute(moved, ys)
    assert relative_error(ys, expected) < 1e-11
    assert warm.num_iterations <= 4 < cold.num_iterations
