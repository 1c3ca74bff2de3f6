"""Pytrees as one real vector, and back."""

from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrax_deer._ravel import promoted, ravel, rounding

_TREE: dict[str, Any] = {
    "complex": np.array([1.0 + 2.0j, -3.0j], np.complex64),
    "half": np.array([[0.5, -0.25]], np.float16),
    "nothing": np.zeros((0, 3), np.float32),
    "scalar": np.array(7.0, np.float64),
}
# The real parts of a leaf, then its imaginary ones.
_FLAT = [1.0, 0.0, 2.0, -3.0, 0.5, -0.25, 7.0]


def _assert_same(got: Any, expected: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def test_leaves_of_any_type_and_shape_become_one_vector_and_come_back():
    flat, unravel = ravel(_TREE)
    assert flat.dtype == jnp.float64
    np.testing.assert_array_equal(flat, _FLAT)
    _assert_same(unravel(flat), _TREE)
    # Under transformations, too; the derivative of what is linear is the same map.
    stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), _TREE)
    flats = jax.jit(jax.vmap(lambda tree: ravel(tree)[0]))(stacked)
    np.testing.assert_array_equal(flats, np.array([_FLAT, 2 * np.array(_FLAT)]))
    _assert_same(jax.vmap(unravel)(flats), stacked)
    _, pushed = jax.jvp(unravel, (flat,), (2 * flat,))
    _assert_same(pushed, jax.tree.map(lambda x: 2 * x, jax.tree.map(np.asarray, _TREE)))


def test_vector_has_the_widest_type_of_the_leaves_but_at_least_single_precision():
    for dtypes, expected in (
        ([jnp.bfloat16], jnp.float32),
        ([jnp.float16, jnp.complex64], jnp.float32),
        ([jnp.float32, jnp.complex128], jnp.float64),
    ):
        flat, unravel = ravel([jnp.ones(2, dtype) for dtype in dtypes])
        assert flat.dtype == expected
        assert [x.dtype for x in unravel(flat)] == dtypes
    flat, unravel = ravel({"nothing": None})
    assert flat.shape == (0,)
    assert unravel(flat) == {"nothing": None}


def test_ways_back_are_equal_and_hashable_for_equal_leaves():
    # Or each call would be compiled anew.
    _, unravel = ravel(_TREE)
    _, same = ravel(jax.tree.map(lambda x: 2 * x, _TREE))
    _, other = ravel(_TREE | {"scalar": np.array(7.0, np.float32)})
    assert unravel == same and hash(unravel) == hash(same)
    assert unravel != other


@pytest.mark.filterwarnings("ignore:Complex dtype support")
def test_initial_values_have_the_type_that_diffrax_gives_them():
    cases: list[Any] = [
        (np.float32(1), 0.0, 1.0),
        (np.float64(1), np.float32(0), np.float32(1)),
        (2, np.float32(0), np.float32(1)),
        (np.complex64(1j), np.float64(0), np.float64(1)),
        ({"a": 3, "b": np.float16(2)}, 0, 1),
    ]
    for y0, t0, t1 in cases:
        solve = lambda y0=y0, t0=t0, t1=t1: (
            diffrax.diffeqsolve(
                diffrax.ODETerm(lambda t, y, args: y),
                diffrax.Euler(),
                t0,
                t1,
                0.5,
                y0,
            ).ys
        )
        with jax.numpy_dtype_promotion("standard"):
            expected = jax.eval_shape(solve)
        got = promoted(y0, t0, t1)
        dtypes = lambda tree: jax.tree.map(lambda x: x.dtype, tree)
        assert dtypes(got) == dtypes(expected)
        np.testing.assert_equal(jax.tree.map(np.asarray, got), y0)


def test_rounding_unit_is_that_of_the_coarsest_type():
    assert rounding(_TREE) == 2.0**-10
    assert rounding(jnp.ones(2)) == 2.0**-52
    assert rounding((np.complex64(1), np.float64(1))) == 2.0**-23
    assert rounding(None) == 2.0**-23
