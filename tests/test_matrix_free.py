"""Recurrences known by their products, against a loop over the matrices."""

import functools as ft
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrax_deer import (
    AssociativeScan,
    BlockDiagonal,
    Dense,
    Diagonal,
    SequentialScan,
)
from diffrax_deer._matrix_free import matrix_free_recurrence, reverse, sweeps
from diffrax_deer._prefix import shift

from .helpers import UnguardedScan, relative_error

_STEPS, _STATE = 40, 4
_RTOL = {jnp.float64: 2e-12, jnp.float32: 6e-6}


def _problem(dtype=jnp.float64, size=1.0):
    """Matrices of about that size, and an inhomogeneity."""
    rng = np.random.default_rng(0)
    j = size * rng.normal(size=(_STEPS, _STATE, _STATE)) / np.sqrt(_STATE)
    b = rng.normal(size=(_STEPS, _STATE))
    return jnp.asarray(j, dtype), jnp.asarray(b, dtype)


def _diagonal(j) -> Diagonal:
    return Diagonal(jnp.diagonal(j, axis1=1, axis2=2))


def _approximations(j) -> dict[str, Any]:
    """Transitions good and bad."""
    diagonal = _diagonal(j).entries
    blocks = [j[:, :2, :2], j[:, 2:, 2:]]
    return {
        "exact": Dense(j),
        "blocks": BlockDiagonal(jnp.stack(blocks, axis=1)),
        "nothing": Diagonal(jnp.zeros_like(diagonal)),
        "exploding": Diagonal(-1e3 * jnp.ones_like(diagonal)),
        "overflowing": Dense(1e30 * j),
        "not finite": Diagonal(diagonal.at[3].set(jnp.nan).at[7, 1].set(jnp.inf)),
    }


def _multiply(j, v):
    return jnp.einsum("nij,nj->ni", j, v, precision="highest")


def _shifted(j):
    """What takes all states to all products with those before them."""
    return lambda v: _multiply(j, shift(jnp.zeros_like(v[0]), v))


def _loop(j, b) -> np.ndarray:
    """The definition."""
    j, b = np.asarray(j, np.float64), np.asarray(b, np.float64)
    v, out = np.zeros(b.shape[1:]), []
    for matrix, inhomogeneity in zip(j, b, strict=True):
        v = matrix @ v + inhomogeneity
        out.append(v)
    return np.stack(out)


def _transposed_loop(j, c) -> np.ndarray:
    """That of the transposed system: the first matrix has nothing to act on."""
    following = np.concatenate([j[1:], np.zeros_like(j[:1])])
    return _loop(np.swapaxes(following, 1, 2)[::-1], c[::-1])[::-1]


def _per_step(got, expected) -> float:
    """The largest error of any step, relative to that step."""
    expected = np.asarray(expected, np.float64)
    errors = np.max(np.abs(np.asarray(got, np.float64) - expected), axis=1)
    return float(np.max(errors / np.max(np.abs(expected), axis=1)))


@pytest.mark.parametrize(
    ("scan", "dtype", "tolerance"),
    [
        (SequentialScan(), jnp.float32, 1e-4),
        (AssociativeScan(), jnp.float64, 1e-10),
    ],
    ids=["sequential-float32", "associative-float64"],
)
def test_solution_does_not_depend_on_the_transitions(scan, dtype, tolerance):
    @jax.jit
    def compute(j, b):
        approximations = _approximations(j)
        solve = ft.partial(sweeps, _shifted(j), b=b, scan=scan, rtol=_RTOL[dtype])
        return {k: solve(a) for k, a in approximations.items()}

    # The solution decays, stays, and grows by 2**40 at least.
    for size in (0.1, 1.0, 4.0):
        j, b = _problem(dtype, size)
        expected = _loop(j, b)
        for name, (v, num_sweeps) in compute(j, b).items():
            assert v.dtype == dtype
            assert _per_step(v, expected) < tolerance, (name, size)
            assert 1 <= num_sweeps <= _STEPS + 1
            assert num_sweeps <= 3 or name != "exact"


def test_residual_and_last_update_are_below_the_tolerance_that_was_asked_for():
    j, b = _problem()

    @ft.partial(jax.jit, static_argnums=0)
    def compute(rtol):
        transitions = Dense(0.9 * j)
        v, num_sweeps = sweeps(_shifted(j), transitions, b, SequentialScan(), rtol)
        residual = jnp.max(jnp.abs(_shifted(j)(v) + b - v), axis=1)
        scale = jnp.maximum(jnp.max(jnp.abs(v), axis=1), jnp.max(jnp.abs(b), axis=1))
        return v, num_sweeps, jnp.max(residual / scale)

    expected, counts = _loop(j, b), []
    for rtol in (1e-2, 1e-5, 1e-11):
        v, num_sweeps, residual = compute(rtol)
        counts.append(int(num_sweeps))
        assert residual < rtol
        assert _per_step(v, expected) < 100 * rtol
    assert counts == sorted(set(counts))


def test_products_that_overflow_do_not_reach_final_steps():
    j, b = _problem()
    transitions = Diagonal(jnp.full_like(b, -1e100))
    run = lambda: sweeps(_shifted(j), transitions, b, UnguardedScan(), 2e-12)
    assert _per_step(jax.jit(run)()[0], _loop(j, b)) < 1e-10


def test_derivatives_are_those_of_the_loop():
    j, b = _problem()
    rng = np.random.default_rng(1)
    j_dot, b_dot, weight = (jnp.asarray(rng.normal(size=x.shape)) for x in (j, b, b))

    def plain(j, b):
        def step(v, jb):
            v = jnp.sum(jb[0] * v[None], axis=1) + jb[1]
            return v, v

        return jax.lax.scan(step, jnp.zeros(_STATE), (j, b))[1]

    def own(j, b):
        # Transitions that follow j, but not in its derivative.
        transitions = _diagonal(jax.lax.stop_gradient(j))
        return matrix_free_recurrence(ft.partial(_multiply, j), transitions, b)

    def derivatives(solve):
        loss = lambda *args: jnp.sum(weight * jnp.sin(solve(*args)))
        grad = jax.grad(loss, argnums=(0, 1))
        dot = lambda *args: sum(
            jnp.vdot(x, y) for x, y in zip(grad(*args), (j_dot, b_dot), strict=True)
        )

        @jax.jit
        def compute(j, b):
            pushed = jax.jvp(solve, (j, b), (j_dot, b_dot))
            forward_over_reverse = jax.jvp(grad, (j, b), (j_dot, b_dot))
            return pushed, forward_over_reverse, jax.grad(dot, argnums=(0, 1))(j, b)

        return compute(0.7 * j, b)

    assert relative_error(derivatives(own), derivatives(plain)) < 1e-9


def test_batch_and_transposed_system_are_solved_one_by_one():
    j, b = _problem()
    factors = jnp.array([0.1, 1.0, 4.0])

    @jax.jit
    @jax.vmap
    def compute(factor):
        product, transitions = ft.partial(_multiply, factor * j), _diagonal(factor * j)
        solve = lambda b: matrix_free_recurrence(product, transitions, b)
        return solve(b), jax.linear_transpose(solve, b)(b)[0]

    values, transposed = compute(factors)
    for factor, value, back in zip(factors, values, transposed, strict=True):
        scaled = np.asarray(factor * j)
        assert _per_step(value, _loop(scaled, b)) < 1e-10
        assert _per_step(back, _transposed_loop(scaled, b)) < 1e-10


def test_solution_that_overflows_is_not_finite_from_there_on_and_ends():
    j, b = _problem()
    transitions = Diagonal(jnp.zeros_like(b))
    run = lambda: sweeps(_shifted(1e25 * j), transitions, b, SequentialScan(), 2e-12)
    v, num_sweeps = jax.jit(run)()
    expected = _loop(1e25 * j[:13], b[:13])
    assert np.all(np.isfinite(expected))
    assert _per_step(v[:12], expected[:12]) < 1e-10
    assert not np.any(np.all(np.isfinite(v[13:]), axis=1))
    assert num_sweeps < 20


def test_inhomogeneity_of_zero_takes_one_sweep():
    j, b = _problem(size=1e3)
    transitions = Diagonal(1e3 * b)
    v, num_sweeps = sweeps(_shifted(j), transitions, 0 * b, AssociativeScan(), 2e-12)
    np.testing.assert_array_equal(v, 0 * b)
    assert num_sweeps == 1


def test_result_has_been_measured():
    # Second sweep: all but the last step are final, since they hardly change. But the
    # changes of steps 1 and 6, unforeseen by the transitions, move steps 2 and 7 by a
    # thousand times as much; once they have followed, so do steps 3 and 4, and 8.
    j = [0.0, 1 + 1e-12, 1e3, 1e-3, 1e3, 0.0, 1 + 1e-12, 1e3, 1.0, 1.0]
    a = [0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    b = [1.0, -1.0, 0.0, 0.0, 0.0, 1.0, -1.0, 0.0, 1.0, 1.0]
    # The second component is one everywhere: the unit of what is small.
    j, a = (jnp.stack([jnp.array(x), jnp.zeros(10)], axis=1) for x in (j, a))
    b = jnp.stack([jnp.array(b), jnp.ones(10)], axis=1)
    product = lambda v: j * shift(jnp.zeros(2), v)
    rtol = float(jnp.finfo(b.dtype).eps) ** 0.75
    v, num_sweeps = sweeps(product, Diagonal(a), b, SequentialScan(), rtol)
    assert np.max(np.abs(product(v) + b - v)) < 3e-12
    assert abs(v[7, 0] - 1e-9) < 1e-11
    assert num_sweeps <= 2 * 10 + 2


def test_good_transitions_need_few_sweeps():
    # Rotations by a small angle, for which the identity is good. Many of them: errors
    # add up.
    turn = 6 / 4000 * np.array([[0.0, 1.0], [-1.0, 0.0]])
    j = jnp.broadcast_to(jnp.eye(2) + jnp.asarray(turn), (4000, 2, 2))
    b = jnp.zeros((4000, 2)).at[0].set(1.0)
    identity, expected = jnp.ones_like(b), _loop(j, b)
    # No others have to wait for a step that cannot be used; those that overflow hold
    # up the sweeps until they are final, and then it is over.
    unusable = identity.at[2000].set(jnp.nan)
    overflowing = identity.at[50:52].set(1e200)
    run = jax.jit(lambda a: sweeps(_shifted(j), a, b, SequentialScan(), 2e-12))
    assert run(Dense(j))[1] <= 3
    for transitions, most in ((identity, 40), (unusable, 45), (overflowing, 60)):
        v, num_sweeps = run(Diagonal(transitions))
        assert _per_step(v, expected) < 1e-11
        assert 3 < num_sweeps < most


def test_transposed_system_needs_as_few_sweeps():
    j, c = _problem(size=0.5)

    @jax.jit
    def compute():
        system = reverse(_shifted(j), Dense(j), c)
        return sweeps(*system, SequentialScan(), 2e-12)

    v, num_sweeps = compute()
    assert _per_step(v[::-1], _transposed_loop(np.asarray(j), np.asarray(c))) < 1e-10
    assert num_sweeps <= 3
