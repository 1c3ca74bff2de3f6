"""Products of small matrices, and transitions of every structure, against NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from diffrax_deer import BlockDiagonal, Dense, Diagonal
from diffrax_deer._linalg.products import matmul, matvec
from diffrax_deer._linalg.transitions import are_finite, multiply, zero_unless

from .helpers import relative_error

# ---- Products ----


def test_products_are_those_of_numpy():
    # None, one, and on both sides of the limit for sums that are written out.
    for dtype, inner in itertools.product((jnp.float32, jnp.float64), (0, 1, 16, 17)):
        rng = np.random.default_rng(inner)
        shapes = (5, inner), (inner, 3), (inner,)
        a, b, x = (jnp.asarray(rng.normal(size=s), dtype) for s in shapes)
        got = matmul(a, b), matvec(a, x)
        assert {y.dtype for y in got} == {jnp.dtype(dtype)}
        got = [np.asarray(y, np.float64) for y in got]
        a, b, x = (np.asarray(y, np.float64) for y in (a, b, x))
        bound = 2 * (inner + 1) * float(jnp.finfo(dtype).eps)
        for y, p, q in zip(got, (a, a), (b, x), strict=True):
            assert np.all(np.abs(y - p @ q) <= bound * (np.abs(p) @ np.abs(q)))


def test_products_have_the_derivatives_of_numpys():
    for inner in (3, 17):
        rng = np.random.default_rng(0)
        shapes = (5, inner), (inner, 3), (inner,), (5, 3), (5,)
        a, b, x, w, v = (jnp.asarray(rng.normal(size=s)) for s in shapes)
        pulled = jax.vjp(matmul, a, b)[1](w), jax.vjp(matvec, a, x)[1](v)
        expected = (w @ b.T, a.T @ w), (jnp.outer(v, x), a.T @ v)
        assert relative_error(pulled, expected) < 1e-14
        # The product is bilinear: its mixed second derivative is the product itself.
        tangent = lambda b, a=a: jax.jvp(lambda a: matmul(a, b), (a,), (a,))[1]
        assert relative_error(jax.jvp(tangent, (b,), (b,))[1], a @ b) < 1e-14


def test_products_and_derivatives_do_not_have_the_default_precision():
    # On a GPU that could be TF32, good for three digits; on a CPU a default that it
    # does not have is an error for whatever product is left to it.
    rng = np.random.default_rng(0)
    shapes = (5, 17), (17, 3), (17,)
    a, b, x = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)

    def loss(a, b, x):
        products = matmul(a, b), matvec(a, x)
        return sum(jnp.sum(jnp.sin(product)) for product in products)

    gradient = jax.grad(loss, argnums=(0, 1, 2))
    arguments = a, b, x
    expected = jax.jvp(gradient, arguments, arguments)
    with jax.default_matmul_precision("TF32_TF32_F32"):
        with pytest.raises(ValueError, match="not supported"):
            jnp.matmul(a, b)
        got = jax.jvp(gradient, arguments, arguments)
    assert relative_error(got, expected) < 1e-6


# ---- Transitions ----

_STRUCTURES = {
    "dense": (Dense, (4, 4), lambda a: a),
    "diagonal": (Diagonal, (4,), np.diag),
    "blocks": (BlockDiagonal, (2, 2, 2), lambda a: scipy.linalg.block_diag(*a)),
}


@pytest.mark.parametrize("structure", _STRUCTURES)
def test_transitions_multiply_as_the_matrices_they_stand_for(structure):
    make, shape, full = _STRUCTURES[structure]
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=shape) for _ in range(2))
    y, ys = rng.normal(size=4), rng.normal(size=(3, 4))
    first, then = make(jnp.asarray(a)), make(jnp.asarray(b))
    product, transposed = then.matmul(first), first.transpose()
    assert type(product) is type(transposed) is make
    assert relative_error(full(product.entries), full(b) @ full(a)) < 1e-15
    np.testing.assert_array_equal(full(transposed.entries), full(a).T)
    assert relative_error(first.matvec(jnp.asarray(y)), full(a) @ y) < 1e-15
    several = make(jnp.stack([first.entries, then.entries, 2 * first.entries]))
    expected = np.stack([full(a) @ ys[0], full(b) @ ys[1], 2 * full(a) @ ys[2]])
    assert relative_error(multiply(several, jnp.asarray(ys)), expected) < 1e-15


def test_cleared_columns_are_zero_whatever_was_there():
    mask = np.array([True, False, False, True])
    for make, shape, full in _STRUCTURES.values():
        a = np.random.default_rng(0).normal(size=shape)
        cleared = make(jnp.asarray(a)).clear_columns(jnp.asarray(mask))
        expected = np.where(mask[None], 0.0, full(a))
        np.testing.assert_array_equal(full(cleared.entries), expected)
        # Nothing of what is not finite remains in the product with zeros.
        infinite = make(jnp.full(shape, jnp.inf)).clear_columns(jnp.ones(4, bool))
        np.testing.assert_array_equal(infinite.matvec(jnp.zeros(4)), np.zeros(4))


def test_steps_with_entries_that_are_not_finite_are_found_and_replaced():
    for make, shape, _ in _STRUCTURES.values():
        entries = np.random.default_rng(0).normal(size=(4, *shape))
        entries.reshape(4, -1)[1, -1] = np.nan
        entries.reshape(4, -1)[2, 0] = np.inf
        transitions = make(jnp.asarray(entries))
        finite = are_finite(transitions)
        np.testing.assert_array_equal(finite, [True, False, False, True])
        replaced = zero_unless(finite, transitions)
        entries[1:3] = 0.0
        np.testing.assert_array_equal(replaced.entries, entries)
