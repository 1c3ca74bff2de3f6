"""Exponential and phi1 against a reference of 60 decimal digits."""

import decimal
import functools as ft
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from jax import lax

from diffrax_deer._linalg.expm import expm, phi1

from .helpers import relative_error

# A number, the closed form, products that are written out and those that are not.
_SIZES = (1, 2, 3, 17)
_to_decimal = np.vectorize(decimal.Decimal, otypes=[object])


# ---- References ----


def _exact_expm(a: np.ndarray) -> np.ndarray:
    """The exponential, correctly rounded up to the last digit or so.

    Scaling and squaring of a Taylor polynomial with 60 digits. SciPy's own float64
    `expm` is not good enough as a reference: its errors reach a hundred times those
    that are tested here.
    """
    with decimal.localcontext(prec=60):
        norm = np.max(np.sum(np.abs(a), axis=0))
        doublings = max(0, math.frexp(norm)[1] + 3)
        eye = _to_decimal(np.eye(len(a)))
        z = _to_decimal(a) * decimal.Decimal(2) ** -doublings
        out = eye
        for k in range(32, 0, -1):
            out = eye + (z @ out) / k
        for _ in range(doublings):
            out = out @ out
    return out.astype(np.float64)


def _block(a: np.ndarray) -> np.ndarray:
    """The matrix whose exponential has `phi1(a)` in its upper right corner."""
    zero, eye = np.zeros_like(a), np.eye(len(a))
    return np.block([[a, eye], [zero, zero]])


def _exact_phi1(a: np.ndarray) -> np.ndarray:
    return _exact_expm(_block(a))[: len(a), len(a) :]


def _exact_derivatives(exact, a: np.ndarray, e: np.ndarray) -> list[np.ndarray]:
    """The first and the second derivative of `exact(a + x e)` by x, at x = 0.

    They stand above the diagonal of a function of a block-triangular matrix.
    """
    n, zero = len(a), np.zeros_like(a)
    value = exact(np.block([[a, e, zero], [zero, a, e], [zero, zero, a]]))
    return [value[:n, n : 2 * n], 2 * value[:n, 2 * n :]]


def _norm(a: np.ndarray) -> float:
    return float(np.linalg.norm(a, 1))


def _condition(a: np.ndarray, error: float, bound: float) -> float:
    """At least 1; the true number, which is expensive, only where it matters."""
    cheap = max(1.0, float(np.linalg.norm(a)) / math.sqrt(len(a)))
    return cheap if error <= bound * cheap else max(1.0, scipy.linalg.expm_cond(a))


# ---- Matrices ----


def _damped(a: np.ndarray) -> np.ndarray:
    """`a` shifted so that its exponential neither overflows nor underflows."""
    return a - np.max(np.linalg.eigvals(a).real) * np.eye(len(a))


@ft.cache
def _matrices(n: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(n)
    out = {"zero": np.zeros((n, n)), "identity": np.eye(n)}
    for norm in (1e-8, 1e-3, 0.1, 0.5, 0.7, 3.0):
        a = rng.normal(size=(n, n))
        out[f"random {norm}"] = norm * a / _norm(a)
    for norm in (30.0, 1e3):
        a = rng.normal(size=(n, n))
        out[f"damped {norm}"] = _damped(norm * a / _norm(a))
        square = a @ a.T
        out[f"negative semidefinite {norm}"] = _damped(-norm * square / _norm(square))
    out["defective"] = -np.eye(n) + np.eye(n, k=1)
    if n > 1:
        strict = np.triu(rng.normal(size=(n, n)), 1)
        for norm in (0.3, 30.0):
            out[f"nilpotent {norm}"] = norm * strict / _norm(strict)
        skew = strict - strict.T
        for norm in (1.0, 1e3):
            out[f"skew {norm}"] = norm * skew / _norm(skew)
    if n == 2:
        out["complex"] = np.array([[-0.5, 3.0], [-2.0, -0.3]])
        out["nilpotent, full"] = 30 * np.array([[1.0, -1.0], [1.0, -1.0]])
        # The 2x2 formula changes at half the difference of eigenvalues, squared, 1e-4.
        for gap in (1e-9, 1e-5, 0.9e-2, 1.1e-2):
            out[f"gap {gap}"] = np.array([[0.3 + gap, 0.0], [0.1, 0.3 - gap]])
            out[f"imaginary gap {gap}"] = np.array([[0.3, gap], [-gap, 0.3]])
    return out


def _stack(n: int, dtype) -> tuple[list[str], jax.Array]:
    matrices = _matrices(n)
    return list(matrices), jnp.asarray(np.stack(list(matrices.values())), dtype)


# ---- Values ----


@pytest.mark.parametrize("n", _SIZES)
def test_expm_and_phi1_are_exact_to_rounding(n):
    names, a = _stack(n, jnp.float64)
    bound = 10 * float(jnp.finfo(a.dtype).eps)
    exp, phi = jax.jit(jax.vmap(lambda a: (expm(a), phi1(a))))(a)
    a, exp, phi = (np.asarray(x) for x in (a, exp, phi))
    for i, name in enumerate(names):
        for got, exact in ((exp[i], _exact_expm), (phi[i], _exact_phi1)):
            if n == 17 and exact is _exact_phi1 and i % 4:
                continue  # half a second each
            expected = exact(a[i])
            error = _norm(got - expected) / _norm(expected)
            assert error <= bound * _condition(a[i], error, bound), (name, exact)


@pytest.mark.parametrize("n", _SIZES)
def test_expm_and_phi1_and_their_gradients_are_exact_in_single_precision(n):
    names, a = _stack(n, jnp.float32)
    weights = jnp.asarray(np.random.default_rng(0).normal(size=a.shape), a.dtype)

    def both(a, weights):
        exp, pull_exp = jax.vjp(expm, a)
        phi, pull_phi = jax.vjp(phi1, a)
        return exp, phi, *pull_exp(weights), *pull_phi(weights)

    results = jax.jit(jax.vmap(both))(a, weights)
    assert all(x.dtype == jnp.float32 for x in results)
    exp, phi, exp_bar, phi_bar = (np.asarray(x, np.float64) for x in results)
    bound = 10 * float(jnp.finfo(a.dtype).eps)
    for i, name in enumerate(names):
        matrix, weight = (np.asarray(x[i], np.float64) for x in (a, weights))
        expected_phi = scipy.linalg.expm(_block(matrix))[:n, n:]
        expected = scipy.linalg.expm(matrix), expected_phi
        for got, value in zip((exp[i], phi[i]), expected, strict=True):
            error = _norm(got - value) / _norm(value)
            assert error <= bound * _condition(matrix, error, bound), name
        # The adjoint of the derivative at a matrix is the derivative at its transpose.
        zero = np.zeros_like(matrix)
        frechet = ft.partial(scipy.linalg.expm_frechet, compute_expm=False)
        expected_exp = frechet(matrix.T, weight)
        corner = np.block([[weight, zero], [zero, zero]])
        expected_phi = np.asarray(frechet(_block(matrix.T), corner))[:n, n:]
        condition = max(1.0, _norm(matrix.T))
        assert relative_error(exp_bar[i], expected_exp) < 5e-6 * condition, name
        assert relative_error(phi_bar[i], expected_phi) < 5e-6 * condition, name


def test_reference_agrees_with_scipy():
    # SciPy's error was measured, with the digits of the reference, to reach 130 times
    # rounding times the condition number. This guards against a mistake in the
    # reference; it says nothing about the library.
    for matrix in _matrices(3).values():
        expected = scipy.linalg.expm(matrix)
        error = _norm(_exact_expm(matrix) - expected) / _norm(expected)
        bound = 200 * float(np.finfo(np.float64).eps)
        assert error <= bound * _condition(matrix, error, bound)


def test_matrices_of_a_batch_do_not_depend_on_each_other():
    # The loop of a batch runs as often as its worst member needs.
    _, a = _stack(3, jnp.float64)
    both = lambda a: (expm(a), phi1(a))
    together = jax.jit(jax.vmap(both))(a)
    alone = jax.jit(lambda a: lax.map(both, a))(a)
    for x, y in zip(together, alone, strict=True):
        scale = jnp.max(jnp.abs(y), axis=(1, 2))
        # Not bit by bit: XLA fuses the two programs differently.
        conditions = jnp.maximum(1.0, jnp.max(jnp.sum(jnp.abs(a), axis=1), axis=1))
        difference = jnp.max(jnp.abs(x - y), axis=(1, 2))
        assert jnp.all(difference <= 1e-15 * conditions * scale)


@pytest.mark.parametrize("n", [2, 3])
def test_expm_and_phi1_of_what_is_not_finite_end_and_are_not_finite(n):
    exp, phi = (jax.jit(f) for f in (expm, phi1))
    for value in (jnp.nan, jnp.inf, -jnp.inf):
        a = jnp.zeros((n, n)).at[0, -1].set(value)
        assert not jnp.all(jnp.isfinite(exp(a)))
        assert not jnp.all(jnp.isfinite(phi(a)))
    # Finite, and larger than any power of two that could scale it.
    a = jnp.full((n, n), float(jnp.finfo(jnp.float64).max) / 4)
    assert not jnp.any(jnp.abs(exp(a)) < 1)


# ---- Derivatives ----


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("n", "function"), [(1, expm), (1, phi1), (2, expm), (3, phi1)]
)
def test_first_and_second_derivatives_are_exact(n, function):
    # At size 3, the smallest with a loop, `phi1` doubles both; at size 2 it has no
    # closed form.
    names, a = _stack(n, jnp.float64)
    rng = np.random.default_rng(0)
    e, w = (jnp.asarray(rng.normal(size=a.shape)) for _ in range(2))

    @jax.jit
    @jax.vmap
    def derivatives(a, e, w):
        first = lambda a: jax.jvp(function, (a,), (e,))[1]
        pulled = lambda a: jax.vjp(function, a)[1](w)[0]
        return *jax.jvp(first, (a,), (e,)), *jax.jvp(pulled, (a,), (e,))

    results = derivatives(a, e, w)
    exact = {expm: _exact_expm, phi1: _exact_phi1}[function]
    for i, name in enumerate(names):
        first, second, pulled, twice = (np.asarray(x[i]) for x in results)
        matrix, along, weight = (np.asarray(x[i]) for x in (a, e, w))
        exact_first, exact_second = _exact_derivatives(exact, matrix, along)
        # A derivative is worse conditioned than the function.
        condition = max(1.0, _norm(matrix)) ** 2
        assert relative_error(first, exact_first) < 1e-14 * condition, name
        assert relative_error(second, exact_second) < 1e-11 * condition, name
        scale = _norm(weight) * _norm(exact_first)
        reverse = np.sum(pulled * along) - np.sum(weight * first)
        assert abs(reverse) < 1e-14 * condition * scale, name
        scale = _norm(weight) * _norm(exact_second)
        reverse = np.sum(twice * along) - np.sum(weight * second)
        assert abs(reverse) < 1e-11 * condition * scale, name


def test_gradient_of_a_gradient_equals_that_of_a_tangent():
    # Through a loop, which reverse mode has to run backwards twice.
    _, a = _stack(3, jnp.float64)
    e = jnp.asarray(np.random.default_rng(0).normal(size=a.shape))
    loss = lambda a: jnp.sum(jnp.sin(phi1(a)))
    reverse = jax.grad(lambda a, e: jnp.sum(jax.grad(loss)(a) * e))
    forward = jax.grad(lambda a, e: jax.jvp(loss, (a,), (e,))[1])
    compare = lambda a, e: (reverse(a, e), forward(a, e))
    got, expected = jax.jit(jax.vmap(compare))(a, e)
    assert relative_error(got, expected) < 1e-9
