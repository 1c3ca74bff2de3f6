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

from diffrax_deer._matrix_functions import expm, matmul, matvec, phi1

from .helpers import primitives, relative_error

_SIZES = (1, 2, 3, 4, 8, 20)
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
def test_both_functions_are_exact_to_rounding(n):
    names, a = _stack(n, jnp.float64)
    bound = 10 * float(jnp.finfo(a.dtype).eps)
    exp, phi = jax.jit(jax.vmap(lambda a: (expm(a), phi1(a))))(a)
    a, exp, phi = (np.asarray(x, np.float64) for x in (a, exp, phi))
    for i, name in enumerate(names):
        matrix = a[i]
        for got, exact in ((exp[i], _exact_expm), (phi[i], _exact_phi1)):
            if n == 20 and exact is _exact_phi1 and i % 3:
                continue  # a second each
            expected = exact(matrix)
            error = _norm(got - expected) / _norm(expected)
            assert error <= bound * _condition(matrix, error, bound), (name, exact)


@pytest.mark.parametrize("n", _SIZES)
def test_both_functions_are_exact_to_rounding_in_single_precision(n):
    names, a = _stack(n, jnp.float32)
    bound = 10 * float(jnp.finfo(a.dtype).eps)
    exp, phi = jax.jit(jax.vmap(lambda a: (expm(a), phi1(a))))(a)
    assert exp.dtype == phi.dtype == jnp.float32
    a, exp, phi = (np.asarray(x, np.float64) for x in (a, exp, phi))
    for i, name in enumerate(names):
        matrix = a[i]
        expected_phi = scipy.linalg.expm(_block(matrix))[:n, n:]
        for got, expected in (
            (exp[i], scipy.linalg.expm(matrix)),
            (phi[i], expected_phi),
        ):
            error = _norm(got - expected) / _norm(expected)
            assert error <= bound * _condition(matrix, error, bound), name


def test_the_reference_agrees_with_scipy():
    # SciPy's error was measured, with the digits of the reference, to reach 130 times
    # rounding times the condition number. This guards against a mistake in the
    # reference; it says nothing about the library.
    for matrix in _matrices(4).values():
        expected = scipy.linalg.expm(matrix)
        error = _norm(_exact_expm(matrix) - expected) / _norm(expected)
        bound = 200 * float(np.finfo(np.float64).eps)
        assert error <= bound * _condition(matrix, error, bound)


@pytest.mark.parametrize("n", [2, 3])
def test_a_matrix_does_not_feel_the_others_of_its_batch(n):
    # The loop of a batch runs as often as its worst member needs.
    _, a = _stack(n, jnp.float64)
    both = lambda a: (expm(a), phi1(a))
    together = jax.jit(jax.vmap(both))(a)
    alone = jax.jit(lambda a: lax.map(both, a))(a)
    for x, y in zip(together, alone, strict=True):
        scale = jnp.max(jnp.abs(y), axis=(1, 2))
        # Not bit by bit: XLA fuses the two programs differently.
        conditions = jnp.maximum(1.0, jnp.max(jnp.sum(jnp.abs(a), axis=1), axis=1))
        difference = jnp.max(jnp.abs(x - y), axis=(1, 2))
        assert jnp.all(difference <= 1e-15 * conditions * scale)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("n", [2, 3])
def test_what_is_not_finite_stays_so_and_ends(n, value):
    a = jnp.zeros((n, n)).at[0, -1].set(value)
    for f in (expm, phi1):
        assert not jnp.all(jnp.isfinite(jax.jit(f)(a)))


@pytest.mark.parametrize("n", [2, 3])
def test_the_largest_numbers_end_too(n):
    huge = float(jnp.finfo(jnp.float64).max) / 4
    a = jnp.full((n, n), huge)
    assert not jnp.any(jnp.abs(jax.jit(expm)(a)) < 1)


# ---- Derivatives ----


def _derivatives(f, a, e, w):
    """First and second derivatives along `e`, forward and against `w` in reverse."""
    first = lambda a: jax.jvp(f, (a,), (e,))[1]
    pulled = lambda a: jax.vjp(f, a)[1](w)[0]
    return *jax.jvp(first, (a,), (e,)), *jax.jvp(pulled, (a,), (e,))


@pytest.mark.optimized
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("function", [expm, phi1])
def test_derivatives_are_exact(n, function):
    exact = {expm: _exact_expm, phi1: _exact_phi1}[function]
    names, a = _stack(n, jnp.float64)
    rng = np.random.default_rng(0)
    e, w = (jnp.asarray(rng.normal(size=a.shape)) for _ in range(2))
    derivatives = jax.jit(jax.vmap(ft.partial(_derivatives, function)))(a, e, w)
    for i, name in enumerate(names):
        first, second, pulled, twice = (np.asarray(x[i]) for x in derivatives)
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


def test_reverse_mode_can_be_differentiated_in_reverse_mode():
    # At size 3, the smallest with a loop.
    _, a = _stack(3, jnp.float64)
    e = jnp.asarray(np.random.default_rng(0).normal(size=a.shape))
    loss = lambda a: jnp.sum(jnp.sin(expm(a))) + jnp.sum(jnp.sin(phi1(a)))
    reverse = jax.grad(lambda a, e: jnp.sum(jax.grad(loss)(a) * e))
    forward = lambda a, e: jax.jvp(jax.grad(loss), (a,), (e,))[1]
    compare = lambda a, e: (reverse(a, e), forward(a, e))
    for got, expected in zip(*jax.jit(jax.vmap(compare))(a, e), strict=True):
        assert relative_error(got, expected) < 1e-9


@pytest.mark.parametrize("n", [1, 2, 3, 17])
def test_gradients_are_exact_in_single_precision(n):
    names, a = _stack(n, jnp.float32)
    w = jnp.asarray(np.random.default_rng(0).normal(size=a.shape), a.dtype)
    pull = lambda a, w: [jax.vjp(f, a)[1](w)[0] for f in (expm, phi1)]
    pulled = jax.jit(jax.vmap(pull))(a, w)
    for i, name in enumerate(names):
        # The adjoint of the derivative at a matrix is the derivative at its transpose.
        matrix, weight = (np.asarray(x[i], np.float64).T for x in (a, w))
        zero = np.zeros_like(matrix)
        frechet = ft.partial(scipy.linalg.expm_frechet, compute_expm=False)
        exp = frechet(matrix, weight.T)
        phi = frechet(_block(matrix), np.block([[weight.T, zero], [zero, zero]]))
        condition = max(1.0, _norm(matrix))
        for got, expected in zip(pulled, (exp, np.asarray(phi)[:n, n:]), strict=True):
            assert relative_error(got[i], expected) < 5e-6 * condition, name


# ---- Products ----


@pytest.mark.parametrize("inner", [0, 1, 16, 17])
def test_products_are_those_of_numpy(inner):
    rng = np.random.default_rng(inner)
    a, b, x = (
        rng.normal(size=(5, inner)),
        rng.normal(size=(inner, 3)),
        rng.normal(size=inner),
    )
    for dtype in (jnp.float32, jnp.float64):
        to = lambda x, dtype=dtype: jnp.asarray(x, dtype)
        bound = (inner + 1) * float(jnp.finfo(dtype).eps)
        product, vector = jax.jit(matmul)(to(a), to(b)), jax.jit(matvec)(to(a), to(x))
        assert product.dtype == vector.dtype == dtype
        product, vector = np.asarray(product), np.asarray(vector)
        assert np.all(np.abs(product - a @ b) <= 2 * bound * (np.abs(a) @ np.abs(b)))
        assert np.all(np.abs(vector - a @ x) <= 2 * bound * (np.abs(a) @ np.abs(x)))


@pytest.mark.parametrize("inner", [3, 17])
def test_products_have_the_derivatives_of_numpys(inner, getkey):
    normal = lambda *shape: jax.random.normal(getkey(), shape, jnp.float64)
    a, b, x, w, v = (
        normal(5, inner),
        normal(inner, 3),
        normal(inner),
        normal(5, 3),
        normal(5),
    )
    pull = jax.jit(lambda a, b: jax.vjp(matmul, a, b)[1](w))
    for got, expected in zip(pull(a, b), (w @ b.T, a.T @ w), strict=True):
        assert relative_error(got, expected) < 1e-14
    pull = jax.jit(lambda a, x: jax.vjp(matvec, a, x)[1](v))
    for got, expected in zip(pull(a, x), (jnp.outer(v, x), a.T @ v), strict=True):
        assert relative_error(got, expected) < 1e-14
    # The product is bilinear: its mixed second derivative is the product itself.
    push = lambda f, x, d: lambda *rest: jax.jvp(lambda x: f(x, *rest), (x,), (d,))[1]
    _, mixed = jax.jvp(push(matmul, a, a), (b,), (b,))
    assert relative_error(mixed, a @ b) < 1e-14


@pytest.mark.parametrize("inner", [3, 17])
def test_no_product_is_left_to_the_default_precision(inner):
    # On a GPU that would be TF32, good for three digits; on a CPU nobody would notice.
    a, b, x = jnp.ones((5, inner)), jnp.ones((inner, 3)), jnp.ones(inner)

    def everything(a, b, x):
        loss = lambda a, b, x: jnp.sum(matmul(a, b)) + jnp.sum(matvec(a, x))
        return jax.jvp(jax.grad(loss, argnums=(0, 1, 2)), (a, b, x), (a, b, x))

    equations = primitives(jax.make_jaxpr(everything)(a, b, x))
    products = [e for e in equations if e.primitive.name == "dot_general"]
    assert products
    highest = (lax.Precision.HIGHEST, lax.Precision.HIGHEST)
    assert all(e.params["precision"] == highest for e in products)
