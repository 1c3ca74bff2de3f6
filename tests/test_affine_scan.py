"""Every scan against a NumPy loop, and its derivatives against those of `lax.scan`."""

import functools as ft
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from jax import lax

from diffrax_deer._affine_scan import SequentialScan, affine_recurrence
from diffrax_deer._causal import shift

from .helpers import relative_error, scans

each_scan = pytest.mark.parametrize("scan", scans.values(), ids=scans.keys())
_STATE = 4
_SHAPES = {"dense": (_STATE, _STATE), "diagonal": (_STATE,), "blocks": (2, 2, 2)}
each_kind = pytest.mark.parametrize("kind", _SHAPES)


def _problem(kind: str, num_steps: int, dtype=jnp.float64, batch: tuple[int, ...] = ()):
    """Transitions, inhomogeneity and initial value."""
    rng = np.random.default_rng(num_steps)
    a = rng.normal(size=(*batch, num_steps, *_SHAPES[kind])) / 1.5
    b = rng.normal(size=(*batch, num_steps, _STATE))
    y0 = rng.normal(size=(*batch, _STATE))
    return tuple(jnp.asarray(x, dtype) for x in (a, b, y0))


def _matrices(a) -> np.ndarray:
    """The transitions of any kind in full."""
    a = np.asarray(a, np.float64)
    if a.ndim == 2:
        return np.stack([np.diag(x) for x in a])
    full = lambda x: np.asarray(scipy.linalg.block_diag(*x))
    return a if a.ndim == 3 else np.stack([full(x) for x in a])


def _loop(a, b, y0=None, reverse=False) -> np.ndarray:
    """The definition."""
    a, b = _matrices(a), np.asarray(b, np.float64)
    y = np.zeros(_STATE) if y0 is None else np.asarray(y0, np.float64)
    out = np.zeros_like(b)
    for n in reversed(range(len(b))) if reverse else range(len(b)):
        y = a[n] @ y + b[n]
        out[n] = y
    return out


def _plain(a, b, y0):
    """The same as a loop that JAX differentiates by itself."""

    def step(y, ab):
        a, b = ab
        if a.ndim == 1:
            y = a * y
        else:
            blocks = y.reshape(-1, 1, a.shape[-1])
            y = jnp.sum(a.reshape(-1, *a.shape[-2:]) * blocks, axis=-1).reshape(-1)
        y = y + b
        return y, y

    return lax.scan(step, y0, (a, b))[1]


@each_scan
@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 8, 33])
def test_every_scan_does_what_the_loop_does(scan, num_steps):
    systems = [_problem(kind, num_steps)[:2] for kind in _SHAPES]
    cases = list(itertools.product(systems, (False, True)))
    got = jax.jit(lambda: [scan(*ab, reverse=reverse) for ab, reverse in cases])()
    for y, (ab, reverse) in zip(got, cases, strict=True):
        assert relative_error(y, _loop(*ab, reverse=reverse)) < 1e-14


@each_scan
@each_kind
def test_single_precision_stays_single_and_is_exact_to_rounding(scan, kind):
    a, b, y0 = _problem(kind, 33, jnp.float32)
    y = jax.jit(ft.partial(affine_recurrence, scan=scan))(a, b, y0)
    assert y.dtype == jnp.float32
    assert relative_error(y, _loop(a, b, y0)) < 2e-6


@each_scan
@each_kind
def test_the_recurrence_starts_from_its_initial_value(scan, kind):
    a, b, y0 = _problem(kind, 7)
    solve = jax.jit(ft.partial(affine_recurrence, scan=scan))
    assert relative_error(solve(a, b, y0), _loop(a, b, y0)) < 1e-14
    assert relative_error(solve(a, b), _loop(a, b)) < 1e-14
    # Steps of which none exists, and states without components.
    assert solve(a[:0], b[:0]).shape == (0, _STATE)
    empty = solve(a[(slice(None), *[slice(0)] * (a.ndim - 1))], b[:, :0], y0[:0])
    assert empty.shape == (7, 0)


def test_predecessors_are_shifted_by_one():
    ys = jnp.arange(8.0).reshape(4, 2)
    y0 = jnp.array([-2.0, -1.0])
    np.testing.assert_array_equal(shift(y0, ys), jnp.arange(-2.0, 6.0).reshape(4, 2))


@each_scan
@each_kind
def test_the_recurrence_is_linear_and_its_transpose_is_the_transpose(scan, kind):
    a, b, y0 = _problem(kind, 7)
    rng = np.random.default_rng(0)
    c, d = (jnp.asarray(rng.normal(size=b.shape)) for _ in range(2))
    dense = _matrices(a)
    blocks = np.eye(b.size)
    for n in range(1, len(b)):
        rows, columns = (slice(k * _STATE, (k + 1) * _STATE) for k in (n, n - 1))
        blocks[rows, columns] = -dense[n]
    inverse = np.linalg.inv(blocks)

    @jax.jit
    def check(a, b, c, d, y0):
        solve = lambda b: affine_recurrence(a, b, scan=scan)
        (transposed,) = jax.linear_transpose(solve, b)(c)
        (pulled,) = jax.vjp(solve, b)[1](c)
        _, pushed = jax.jvp(solve, (b,), (d,))
        combined = affine_recurrence(a, 2 * b + 3 * d, 2 * y0, scan=scan)
        parts = 2 * affine_recurrence(a, b, y0, scan=scan) + 3 * solve(d)
        return transposed, pulled, pushed, combined, parts

    transposed, pulled, pushed, combined, parts = check(a, b, c, d, y0)
    expected = (inverse.T @ np.asarray(c).reshape(-1)).reshape(b.shape)
    assert relative_error(transposed, expected) < 1e-13
    assert relative_error(pulled, expected) < 1e-13
    expected = (inverse @ np.asarray(d).reshape(-1)).reshape(b.shape)
    assert relative_error(pushed, expected) < 1e-13
    assert relative_error(combined, parts) < 1e-13


@each_scan
@each_kind
def test_derivatives_are_those_of_the_loop(scan, kind):
    arguments = _problem(kind, 7)
    rng = np.random.default_rng(0)
    random = lambda x: jnp.asarray(rng.normal(size=x.shape))
    tangents, weight = tuple(map(random, arguments)), random(arguments[1])

    def derivatives(solve, arguments, tangents, weight):
        def loss(*arguments):
            return jnp.sum(weight * jnp.sin(solve(*arguments)))

        value_and_grad = jax.value_and_grad(loss, argnums=(0, 1, 2))
        value, pushed = jax.jvp(solve, arguments, tangents)
        # Forward over reverse.
        return value, pushed, *jax.jvp(value_and_grad, arguments, tangents)

    got, expected = (
        jax.jit(ft.partial(derivatives, solve))(arguments, tangents, weight)
        for solve in (ft.partial(affine_recurrence, scan=scan), _plain)
    )
    assert relative_error(got, expected) < 1e-12


@each_scan
def test_hessians_in_every_mode_are_those_of_the_loop(scan):
    # Through a scalar, so that the matrices stay small: all three arguments depend on
    # it, and so does each pair of them.
    a, b, y0 = _problem("dense", 5)

    def loss(solve, x):
        return jnp.sum(jnp.cos(solve(a * x[0], jnp.sin(x[1] * b), y0 * x[0] * x[1])))

    @jax.jit
    def hessians(x):
        own = ft.partial(loss, ft.partial(affine_recurrence, scan=scan))
        modes = [
            outer(inner(own))(x)
            for outer in (jax.jacfwd, jax.jacrev)
            for inner in (jax.jacfwd, jax.jacrev)
        ]
        return modes, jax.hessian(ft.partial(loss, _plain))(x)

    got, expected = hessians(jnp.array([0.8, 0.5]))
    for hessian in got:
        assert relative_error(hessian, expected) < 1e-12


@each_scan
@each_kind
def test_any_argument_can_be_batched(scan, kind):
    batch = 4
    batched = _problem(kind, 5, batch=(batch,))
    single = tuple(x[0] for x in batched)
    subsets = [s for s in itertools.product((None, 0), repeat=3) if s != (None,) * 3]
    choose = lambda axes: [
        x if axis is None else xs
        for x, xs, axis in zip(single, batched, axes, strict=True)
    ]
    solve = ft.partial(affine_recurrence, scan=scan)

    @jax.jit
    def together():
        values = [jax.vmap(solve, in_axes=axes)(*choose(axes)) for axes in subsets]
        gradient = jax.grad(lambda *x: jnp.sum(jnp.sin(solve(*x))), argnums=(0, 1, 2))
        return values, jax.vmap(gradient)(*batched)

    values, gradients = together()
    for axes, value in zip(subsets, values, strict=True):
        for i in range(batch):
            a, b, y0 = (
                x if axis is None else x[i]
                for x, axis in zip(choose(axes), axes, strict=True)
            )
            assert relative_error(value[i], _loop(a, b, y0)) < 1e-14
    gradient = jax.grad(lambda *x: jnp.sum(jnp.sin(_plain(*x))), argnums=(0, 1, 2))
    assert relative_error(gradients, jax.jit(jax.vmap(gradient))(*batched)) < 1e-12


def test_long_stable_recurrences_agree():
    # A long product of contractions: what underflows must not hurt.
    a, b, y0 = _problem("dense", 1000)
    expected = _loop(a / 2, b, y0)
    for scan in scans.values():
        y = jax.jit(ft.partial(affine_recurrence, scan=scan))(a / 2, b, y0)
        assert relative_error(y, expected) < 1e-13


@each_scan
@each_kind
def test_products_that_overflow_stay_away_from_zeros(scan, kind):
    # Nothing happens before the last step, though the product of all is infinite.
    a, b, _ = _problem(kind, 33)
    a, b = 1e30 * a, b.at[:-1].set(0.0)
    y = jax.jit(ft.partial(affine_recurrence, scan=scan))(a, b)
    np.testing.assert_array_equal(y, b)


def test_the_platform_scan_is_sequential_on_a_cpu():
    if jax.default_backend() != "cpu":
        pytest.skip("the choice on a CPU")
    a, b, _ = _problem("dense", 33)
    got, expected = (jax.jit(s)(a, b) for s in (scans["platform"], SequentialScan()))
    np.testing.assert_array_equal(got, expected)
    other = jax.jit(scans["associative"])(a, b)
    assert np.any(np.asarray(got) != np.asarray(other))
