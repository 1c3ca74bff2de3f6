"""Recurrences known by their products, against a loop over the matrices."""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrax_deer._affine_scan import AbstractScan
from diffrax_deer._causal import shift
from diffrax_deer._matrix_free import matrix_free_recurrence, reverse, sweeps

from .helpers import relative_error, scans

each_scan = pytest.mark.parametrize(
    "scan",
    [scans["sequential"], scans["associative"]],
    ids=["sequential", "associative"],
)

_STEPS, _STATE = 40, 4


def _problem(dtype=jnp.float64, size=1.0):
    """Matrices of about that size, and an inhomogeneity."""
    rng = np.random.default_rng(0)
    j = size * rng.normal(size=(_STEPS, _STATE, _STATE)) / np.sqrt(_STATE)
    b = rng.normal(size=(_STEPS, _STATE))
    return jnp.asarray(j, dtype), jnp.asarray(b, dtype)


def _approximations(j) -> dict[str, jax.Array]:
    """Transitions good and bad."""
    diagonal = jnp.diagonal(j, axis1=1, axis2=2)
    blocks = [j[:, :2, :2], j[:, 2:, 2:]]
    return {
        "exact": j,
        "blocks": jnp.stack(blocks, axis=1),
        "diagonal": diagonal,
        "identity": jnp.ones_like(diagonal),
        "nothing": jnp.zeros_like(diagonal),
        "exploding": -1e3 * jnp.ones_like(diagonal),
        "overflowing": 1e30 * j,
        "nonfinite": diagonal.at[3].set(jnp.nan).at[7, 1].set(jnp.inf),
    }


def _multiply(j, v):
    return jnp.einsum("nij,nj->ni", j, v, precision="highest")


def _loop(j, b) -> np.ndarray:
    """The definition."""
    j, b = np.asarray(j, np.float64), np.asarray(b, np.float64)
    v, out = np.zeros(b.shape[1:]), []
    for matrix, inhomogeneity in zip(j, b, strict=True):
        v = matrix @ v + inhomogeneity
        out.append(v)
    return np.stack(out)


def _per_step(got, expected) -> float:
    """The largest error of any step, relative to that step."""
    expected = np.asarray(expected, np.float64)
    errors = np.max(np.abs(np.asarray(got, np.float64) - expected), axis=1)
    return float(np.max(errors / np.max(np.abs(expected), axis=1)))


@each_scan
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.float64, 1e-10), (jnp.float32, 1e-4)]
)
def test_the_solution_does_not_depend_on_the_transitions(scan, dtype, tolerance):
    @jax.jit
    def compute(j, b):
        product = lambda v: _multiply(j, shift(jnp.zeros_like(v[0]), v))
        approximations = _approximations(j)
        return {k: sweeps(product, a, b, scan) for k, a in approximations.items()}

    # The solution decays, stays, and grows by 2**40 at least.
    for size in (0.1, 1.0, 4.0):
        j, b = _problem(dtype, size)
        expected = _loop(j, b)
        for name, (v, num_sweeps) in compute(j, b).items():
            assert v.dtype == dtype
            assert _per_step(v, expected) < tolerance, (name, size)
            assert 1 <= num_sweeps <= _STEPS + 1
            assert num_sweeps <= 3 or name != "exact"


class _Unguarded(AbstractScan):
    """All products of transitions, whether there is anything to multiply or not."""

    def __call__(self, a, b, *, reverse=False):
        compose = lambda left, right: (
            right[0] * left[0],
            right[0] * left[1] + right[1],
        )
        return jax.lax.associative_scan(compose, (a, b), reverse=reverse)[1]


def test_products_that_overflow_do_not_reach_final_steps():
    j, b = _problem()
    product = lambda v: _multiply(j, shift(jnp.zeros_like(v[0]), v))
    transitions = jnp.full_like(b, -1e100)
    v, _ = jax.jit(lambda: sweeps(product, transitions, b, _Unguarded()))()
    assert _per_step(v, _loop(j, b)) < 1e-10


@each_scan
def test_derivatives_are_those_of_the_loop(scan):
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
        transitions = jnp.diagonal(jax.lax.stop_gradient(j), axis1=1, axis2=2)
        return matrix_free_recurrence(
            ft.partial(_multiply, j), transitions, b, scan=scan
        )

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


def test_recurrences_of_a_batch_are_solved_one_by_one():
    j, b = _problem()
    factors = jnp.array([0.1, 1.0, 4.0])

    @jax.jit
    @jax.vmap
    def compute(factor):
        product = ft.partial(_multiply, factor * j)
        transitions = factor * jnp.diagonal(j, axis1=1, axis2=2)
        scan = scans["sequential"]
        solve = lambda b: matrix_free_recurrence(product, transitions, b, scan=scan)
        return solve(b), jax.linear_transpose(solve, b)(b)[0]

    values, transposed = compute(factors)
    for factor, value, back in zip(factors, values, transposed, strict=True):
        assert _per_step(value, _loop(factor * j, b)) < 1e-10
        # The transpose runs backwards, and the first matrix has nothing to act on.
        following = np.concatenate([factor * j[1:], np.zeros_like(j[:1])])
        reverse = np.swapaxes(following, 1, 2)[::-1]
        assert _per_step(back[::-1], _loop(reverse, b[::-1])) < 1e-10


def test_what_overflows_is_not_finite_and_ends():
    # As it would be by a loop; the steps before it are right.
    j, b = _problem()
    product = lambda v: _multiply(1e25 * j, shift(jnp.zeros_like(v[0]), v))
    transitions = jnp.zeros_like(b)
    v, num_sweeps = jax.jit(
        lambda: sweeps(product, transitions, b, scans["sequential"])
    )()
    expected = _loop(1e25 * j[:13], b[:13])
    assert np.all(np.isfinite(expected))
    assert _per_step(v[:12], expected[:12]) < 1e-10
    assert not np.any(np.all(np.isfinite(v[13:]), axis=1))
    assert num_sweeps < 20


def test_nothing_to_solve_for_takes_one_sweep():
    j, b = _problem(size=1e3)
    v, num_sweeps = sweeps(
        lambda v: _multiply(j, v), 1e3 * b, 0 * b, scans["associative"]
    )
    np.testing.assert_array_equal(v, 0 * b)
    assert num_sweeps == 1


def _oscillator(num_steps):
    """Rotations by a small angle, a step in time each, for which the identity is good.

    Many of them: errors add up.
    """
    turn = 6 / num_steps * np.array([[0.0, 1.0], [-1.0, 0.0]])
    j = jnp.broadcast_to(jnp.eye(2) + jnp.asarray(turn), (num_steps, 2, 2))
    b = jnp.zeros((num_steps, 2)).at[0].set(1.0)
    return j, b, lambda v: _multiply(j, shift(jnp.zeros(2), v))


def test_what_is_returned_has_been_measured():
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
    v, num_sweeps = sweeps(product, a, b, scans["sequential"])
    assert np.max(np.abs(product(v) + b - v)) < 3e-12
    assert abs(v[7, 0] - 1e-9) < 1e-11
    assert num_sweeps <= 2 * 10 + 2


def test_good_transitions_need_few_sweeps():
    j, b, product = _oscillator(4000)
    identity, expected = jnp.ones_like(b), _loop(j, b)
    # No others have to wait for a step that cannot be used; those that overflow hold
    # up the sweeps until they are final, and then it is over.
    unusable = identity.at[2000].set(jnp.nan)
    overflowing = identity.at[50:52].set(1e200)

    @jax.jit
    def compute(transitions):
        return sweeps(product, transitions, b, scans["sequential"])

    assert compute(j)[1] <= 3
    for transitions, most in ((identity, 40), (unusable, 45), (overflowing, 60)):
        v, num_sweeps = compute(transitions)
        assert _per_step(v, expected) < 1e-11
        assert 3 < num_sweeps < most


def test_the_transposed_system_needs_as_few_sweeps():
    j, b, _ = _oscillator(400)
    j = j * jnp.linspace(0.5, 1.5, 400)[:, None, None]
    product = lambda v: _multiply(j, shift(jnp.zeros(2), v))
    v, num_sweeps = sweeps(*reverse(product, j, b[::-1]), scans["sequential"])
    following = np.concatenate([j[1:], np.zeros_like(j[:1])])
    expected = _loop(np.swapaxes(following, 1, 2)[::-1], b)
    assert _per_step(v, expected) < 1e-10
    assert num_sweeps <= 3
