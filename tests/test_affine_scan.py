"""Every scan against a NumPy loop, and its derivatives against those of `lax.scan`."""

import functools as ft
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from jax import lax

from diffrax_deer import (
    BlockDiagonal,
    Dense,
    Diagonal,
    SequentialScan,
    affine_recurrence,
)
from diffrax_deer._affine_scan import transposed_scan

from .helpers import each_scan, relative_error, scans

_STATE = 4
_STRUCTURES = {
    "dense": (Dense, (_STATE, _STATE)),
    "diagonal": (Diagonal, (_STATE,)),
    "blocks": (BlockDiagonal, (2, 2, 2)),
}


def _problem(structure: str, num_steps: int, dtype=jnp.float64, batch=()) -> Any:
    """Transitions, inhomogeneity and initial value."""
    make, shape = _STRUCTURES[structure]
    rng = np.random.default_rng(num_steps)
    a = rng.normal(size=(*batch, num_steps, *shape)) / 1.5
    b = rng.normal(size=(*batch, num_steps, _STATE))
    y0 = rng.normal(size=(*batch, _STATE))
    return make(jnp.asarray(a, dtype)), jnp.asarray(b, dtype), jnp.asarray(y0, dtype)


def _problems(num_steps: int, **kwargs: Any) -> list[Any]:
    return [_problem(structure, num_steps, **kwargs) for structure in _STRUCTURES]


def _matrices(a: Any) -> np.ndarray:
    """Transitions of any structure in full."""
    a = np.asarray(a.entries, np.float64)
    if a.ndim == 2:
        return np.stack([np.diag(x) for x in a])
    full = lambda x: np.asarray(scipy.linalg.block_diag(*x))
    return a if a.ndim == 3 else np.stack([full(x) for x in a])


def _loop(a, b, y0=None) -> np.ndarray:
    """The definition."""
    a, b = _matrices(a), np.asarray(b, np.float64)
    y = np.zeros(_STATE) if y0 is None else np.asarray(y0, np.float64)
    out = np.zeros_like(b)
    for n in range(len(b)):
        y = a[n] @ y + b[n]
        out[n] = y
    return out


def _backwards(a, b) -> np.ndarray:
    """That of a reversed scan, which does not use the first transition."""
    a, out = _matrices(a), np.array(b, np.float64)
    for n in reversed(range(len(b) - 1)):
        out[n] += a[n + 1] @ out[n + 1]
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

    return lax.scan(step, y0, (a.entries, b))[1]


def _inverse(a: Any, size: int) -> np.ndarray:
    """The matrix that takes all inhomogeneities to all solutions."""
    system = np.eye(size)
    for n, matrix in enumerate(_matrices(a)[1:], start=1):
        rows, columns = (slice(k * _STATE, (k + 1) * _STATE) for k in (n, n - 1))
        system[rows, columns] = -matrix
    return np.linalg.inv(system)


def _at(tree: Any, i: Any) -> Any:
    return jax.tree.map(lambda x: x[i], tree)


@each_scan
def test_scans_do_what_the_loop_does_in_both_directions(scan):
    # Of one step, and of lengths that halve to odd and to even ones.
    systems = [p[:2] for n in (1, 2, 7, 33) for p in _problems(n)]
    both = lambda a, b: (scan(a, b), scan(a, b, reverse=True))
    got = jax.jit(lambda: [both(*system) for system in systems])()
    for (forwards, backwards), system in zip(got, systems, strict=True):
        assert relative_error(forwards, _loop(*system)) < 1e-14
        assert relative_error(backwards, _backwards(*system)) < 1e-14


def test_recurrences_in_single_precision_are_exact_to_rounding():
    systems = _problems(33, dtype=jnp.float32)
    solve = lambda system: [affine_recurrence(*system, scan=s) for s in scans.values()]
    results = jax.jit(lambda: [solve(system) for system in systems])()
    for ys, system in zip(results, systems, strict=True):
        for y in ys:
            assert y.dtype == jnp.float32
            assert relative_error(y, _loop(*system)) < 2e-6


def test_recurrences_start_from_their_initial_value_or_from_zero():
    for a, b, y0 in _problems(7):
        assert relative_error(affine_recurrence(a, b, y0), _loop(a, b, y0)) < 1e-14
        assert relative_error(affine_recurrence(a, b), _loop(a, b)) < 1e-14


def test_recurrences_without_steps_or_components_are_empty():
    for a, b, y0 in _problems(7):
        assert affine_recurrence(_at(a, slice(0)), b[:0]).shape == (0, _STATE)
        cut = (slice(None), *[slice(0)] * (a.entries.ndim - 1))
        assert affine_recurrence(_at(a, cut), b[:, :0], y0[:0]).shape == (7, 0)


@each_scan
def test_transposed_recurrences_are_dense_transposed_solves(scan):
    rng = np.random.default_rng(0)

    @jax.jit
    def check(a, b, c):
        solve = lambda b: affine_recurrence(a, b, scan=scan)
        (transposed,) = jax.linear_transpose(solve, b)(c)
        (pulled,) = jax.vjp(solve, b)[1](c)
        _, pushed = jax.jvp(solve, (b,), (c,))
        return (transposed_scan(scan, a, c), transposed, pulled), pushed

    for a, b, _ in _problems(7):
        c = jnp.asarray(rng.normal(size=b.shape))
        transposed, pushed = check(a, b, c)
        inverse, flat = _inverse(a, b.size), np.asarray(c).reshape(-1)
        for got in transposed:
            assert relative_error(got, (inverse.T @ flat).reshape(b.shape)) < 1e-13
        assert relative_error(pushed, (inverse @ flat).reshape(b.shape)) < 1e-13


@each_scan
def test_derivatives_are_those_of_the_loop(scan):
    arguments = _problems(7)
    rng = np.random.default_rng(0)
    random = lambda x: jnp.asarray(rng.normal(size=x.shape))
    tangents = jax.tree.map(random, arguments)
    weight = random(arguments[0][1])

    def derivatives(solve, arguments, tangents):
        def loss(*arguments):
            return jnp.sum(weight * jnp.sin(solve(*arguments)))

        value_and_grad = jax.value_and_grad(loss, argnums=(0, 1, 2))
        value, pushed = jax.jvp(solve, arguments, tangents)
        # Forward over reverse.
        return value, pushed, *jax.jvp(value_and_grad, arguments, tangents)

    def of_all(solve):
        run = lambda pair: derivatives(solve, *pair)
        return list(map(run, zip(arguments, tangents, strict=True)))

    own = ft.partial(affine_recurrence, scan=scan)
    got, expected = jax.jit(lambda: (of_all(own), of_all(_plain)))()
    assert relative_error(got, expected) < 1e-12


def test_hessians_in_every_order_of_modes_are_those_of_the_loop():
    # Through two scalars, so that the matrices stay small: all three arguments depend
    # on them, and so does each pair of them.
    a, b, y0 = _problem("dense", 5)

    def loss(solve, x):
        a_x = jax.tree.map(lambda a: a * x[0], a)
        return jnp.sum(jnp.cos(solve(a_x, jnp.sin(x[1] * b), y0 * x[0] * x[1])))

    @jax.jit
    def hessians(x):
        own = ft.partial(loss, ft.partial(affine_recurrence, scan=SequentialScan()))
        modes = [
            outer(inner(own))(x)
            for outer in (jax.jacfwd, jax.jacrev)
            for inner in (jax.jacfwd, jax.jacrev)
        ]
        return modes, jax.hessian(ft.partial(loss, _plain))(x)

    got, expected = hessians(jnp.array([0.8, 0.5]))
    for hessian in got:
        assert relative_error(hessian, expected) < 1e-12


@pytest.mark.parametrize(
    ("scan", "structure"),
    [("sequential", "dense"), ("associative", "blocks"), ("chunked", "dense")],
)
def test_any_argument_can_be_batched(scan, structure):
    batched = _problem(structure, 5, batch=(3,))
    single = _at(batched, 0)
    subsets = [s for s in itertools.product((None, 0), repeat=3) if s != (None,) * 3]
    choose = lambda axes: [
        x if axis is None else xs
        for x, xs, axis in zip(single, batched, axes, strict=True)
    ]
    solve = ft.partial(affine_recurrence, scan=scans[scan])

    @jax.jit
    def together():
        values = [jax.vmap(solve, in_axes=axes)(*choose(axes)) for axes in subsets]
        both = []
        for f in (solve, _plain):
            loss = lambda *x, f=f: jnp.sum(jnp.sin(f(*x)))
            both.append(jax.vmap(jax.grad(loss, argnums=(0, 1, 2)))(*batched))
        return values, *both

    values, gradients, expected = together()
    for axes, value in zip(subsets, values, strict=True):
        for i in range(3):
            arguments = zip(choose(axes), axes, strict=True)
            picked = [x if axis is None else _at(x, i) for x, axis in arguments]
            assert relative_error(value[i], _loop(*picked)) < 1e-14
    assert relative_error(gradients, expected) < 1e-12


def test_long_stable_recurrences_do_not_suffer_from_underflow():
    a, b, y0 = _problem("dense", 1000)
    a = Dense(a.entries / 2)
    for scan in scans.values():
        y = jax.jit(ft.partial(affine_recurrence, scan=scan))(a, b, y0)
        assert relative_error(y, _loop(a, b, y0)) < 1e-13


def test_products_that_overflow_leave_zeros_alone():
    # Nothing happens before the last step, though the product of all is infinite.
    for a, b, _ in _problems(33):
        a = jax.tree.map(lambda x: 1e30 * x, a)
        b = b.at[:-1].set(0.0)
        for scan in scans.values():
            y = jax.jit(ft.partial(affine_recurrence, scan=scan))(a, b)
            np.testing.assert_array_equal(y, b)
