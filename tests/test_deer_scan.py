"""`deer_scan` is `jax.lax.scan`: in its values, its derivatives and what it takes."""

import functools as ft
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jaxtyping import Array, PyTree

from diffrax_deer import (
    AbstractLinearization,
    AssociativeScan,
    BlockDiagonalJacobian,
    DiagonalJacobian,
    FullJacobian,
    Jacobi,
    MatrixFreeGradient,
    Newton,
    ParallelGradient,
    Picard,
    PiecewiseConstant,
    Sequential,
    SequentialGradient,
    deer_scan,
)

from .helpers import (
    each_gradient,
    each_method,
    random_like,
    relative_error,
    result_is,
    weighted_loss,
)

_RNG = np.random.default_rng(0)
_T, _D = 24, 4

_newton = ft.partial(deer_scan, method=Newton(), gradient=ParallelGradient())
_SCANS: dict[str, Callable] = {"default": deer_scan, "newton": _newton}
each_way = pytest.mark.parametrize("scan", _SCANS.values(), ids=_SCANS.keys())

# What remains of an error when the iteration stops; Newton's last one leaves far less.
_LEFT = float(jnp.finfo(jnp.float64).eps) ** 0.75


class _Case(NamedTuple):
    """A recurrence `step(weights)`, from `init` along `xs`."""

    step: Callable[[Any], Callable]
    weights: PyTree[Array]
    init: PyTree[Array]
    xs: PyTree[Array]

    def cast(self, dtype: Any) -> "_Case":
        to_dtype = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)
        return _Case(self.step, *map(to_dtype, self[1:]))


def _random(*shape: int, scale: float = 1.0) -> Array:
    return jnp.asarray(scale * _RNG.normal(size=shape))


def _tanh(size: int = _D, num_steps: int = _T) -> _Case:
    def step(weights):
        w, v, b = weights

        def f(h, x):
            h = jnp.tanh(w @ h + v @ x + b)
            return h, jnp.sin(h[:2]) * x[0]

        return f

    weights = (
        _random(size, size, scale=1 / np.sqrt(size)),
        _random(size, 3),
        _random(size),
    )
    return _Case(step, weights, _random(size), _random(num_steps, 3))


def _of_equinox(cell: Any, init: PyTree[Array], num_steps: int = _T) -> _Case:
    def step(cell):
        def f(state, x):
            state = cell(x, state)
            return state, state

        return f

    return _Case(step, cell, init, _random(num_steps, 3))


_CASES = {
    "tanh": _tanh(),
    "gru": _of_equinox(eqx.nn.GRUCell(3, _D, key=jax.random.key(0)), _random(_D)),
    "lstm": _of_equinox(
        eqx.nn.LSTMCell(3, _D, key=jax.random.key(1)), (_random(_D), _random(_D))
    ),
}


def _loss(tree: PyTree[Array]) -> Array:
    """A number that depends on every entry of all smooth leaves, nonlinearly."""
    dtype = jnp.result_type(float)
    total = jnp.zeros((), dtype)
    for x in jax.tree.leaves(tree):
        for part in (x.real, x.imag) if jnp.iscomplexobj(x) else (x,):
            if jnp.issubdtype(part.dtype, jnp.floating):
                total += weighted_loss(lambda x: x.astype(dtype), part)
    return total


def _everything(scan: Callable, case: _Case) -> Any:
    """Carry, outputs, and the gradient with respect to weights, `init` and `xs`."""

    @jax.jit
    def both(*parameters):
        def loss(weights, init, xs):
            out = scan(case.step(weights), init, xs)
            return _loss(out), out

        return jax.grad(loss, (0, 1, 2), has_aux=True)(*parameters)

    gradient, out = both(*case[1:])
    return out, gradient


@ft.cache
def _reference(case: str) -> Any:
    return _everything(lax.scan, _CASES[case])


def _assert_equal(found: Any, expected: Any, values: float, gradients: float):
    types = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert types(found) == types(expected)
    assert relative_error(found[0], expected[0]) < values
    assert relative_error(found[1], expected[1]) < gradients


# ---- Values and derivatives ----


@pytest.mark.parametrize("case", ["gru", "lstm"])
def test_values_and_gradients_are_those_of_lax_scan(case):
    found = _everything(deer_scan, _CASES[case])
    _assert_equal(found, _reference(case), 1e-14, 1e-13)


@each_gradient
@each_method
def test_values_and_gradients_do_not_depend_on_method_and_gradient(method, gradient):
    scan = ft.partial(deer_scan, method=method, gradient=gradient)
    is_exact = not isinstance(gradient, MatrixFreeGradient)
    error = 1e-13 if is_exact else 100 * _LEFT
    _assert_equal(_everything(scan, _CASES["tanh"]), _reference("tanh"), 1e-14, error)


@pytest.mark.parametrize(
    "linearization",
    [DiagonalJacobian(), BlockDiagonalJacobian(2), Picard(), Jacobi()],
    ids=lambda x: type(x).__name__,
)
def test_values_and_gradients_do_not_depend_on_the_linearization(linearization):
    scan = ft.partial(_newton, method=Newton(linearization))
    found = _everything(scan, _CASES["gru"])
    _assert_equal(found, _reference("gru"), 10 * _LEFT, 100 * _LEFT)


def test_values_and_gradients_do_not_depend_on_the_scans():
    scan = AssociativeScan()
    scan = ft.partial(
        deer_scan, method=Newton(scan=scan), gradient=ParallelGradient(scan)
    )
    found = _everything(scan, _CASES["gru"])
    _assert_equal(found, _reference("gru"), 1e-14, 1e-13)


@each_way
def test_values_and_gradients_in_single_precision_are_those_of_lax_scan(scan):
    eps = float(jnp.finfo(jnp.float32).eps)
    with jax.enable_x64(False):
        single = _CASES["gru"].cast(jnp.float32)
        found, expected = (_everything(s, single) for s in (scan, lax.scan))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(found))
    _assert_equal(found, expected, 10 * eps, 100 * eps)


def test_large_carry_is_differentiated_sequentially_and_exactly():
    case = _tanh(40)
    found, expected = (_everything(scan, case) for scan in (deer_scan, lax.scan))
    _assert_equal(found, expected, 1e-14, 1e-13)
    about = ft.partial(deer_scan, case.step(case.weights), return_statistics=True)
    statistics = about(case.init, case.xs)[2]
    assert isinstance(statistics.gradient, SequentialGradient)


def test_elementwise_recurrence_is_solved_exactly_with_diagonals():
    # Newton's method with one tangent for each step, and no Jacobian held anywhere.
    def step(a):
        def f(h, x):
            h = jax.nn.sigmoid(h) * jnp.tanh(a * h + x[0]) + x[1]
            return h, h

        return f

    case = _Case(step, _random(20), _random(20), _random(_T, 2))
    diagonal = Newton(DiagonalJacobian(num_probes=1))
    scan = ft.partial(deer_scan, method=diagonal, gradient=MatrixFreeGradient())
    found, expected = (_everything(s, case) for s in (scan, lax.scan))
    _assert_equal(found, expected, 1e-14, 1e-13)
    counts = [
        deer_scan(step(case.weights), *case[2:], method=method, return_statistics=True)[
            2
        ].num_iterations
        for method in (diagonal, Newton(FullJacobian()))
    ]
    assert counts[0] == counts[1] < _T


def test_forward_mode_and_second_derivatives_are_those_of_lax_scan():
    case = _CASES["tanh"]
    primals = tuple(case[1:])
    direction = random_like(primals)

    @ft.partial(jax.jit, static_argnums=0)
    def derivatives(scan, primals):
        run = lambda p: scan(case.step(p[0]), p[1], p[2])
        loss = lambda p: _loss(run(p))
        slope = lambda p: jax.jvp(loss, (p,), (direction,))[1]
        along = lambda g: sum(map(jnp.vdot, *map(jax.tree.leaves, (g, direction))))
        return jax.jvp(run, (primals,), (direction,)), [
            jax.jvp(jax.grad(loss), (primals,), (direction,))[1],
            jax.grad(slope)(primals),
            jax.grad(lambda p: along(jax.grad(loss)(p)))(primals),
        ]

    found, products = derivatives(deer_scan, primals)
    expected, (hessian, *_) = derivatives(lax.scan, primals)
    _assert_equal(found, expected, 10 * _LEFT, 100 * _LEFT)
    for product in products:
        assert relative_error(product, hessian) < 1000 * _LEFT


# ---- Batches ----


def _several(tree: PyTree[Array], axis: int | None) -> PyTree[Array]:
    several = lambda x: jnp.stack([x, -x, 0.3 * x], axis=axis or 0)
    return tree if axis is None else jax.tree.map(several, tree)


@pytest.mark.parametrize(
    ("scan", "axes"),
    [
        (deer_scan, [(0, 0, 1)]),
        (_newton, [(None, None, 1)]),
        (deer_scan, [(None, 1, 0), (0, None, 1)]),
    ],
    ids=["all", "newton_inputs", "nested"],
)
def test_batch_has_values_and_gradients_of_its_members(scan, axes):
    case = _CASES["tanh"]
    batch = tuple(case[1:])
    for inner in axes:
        batch = tuple(map(_several, batch, inner))

    @ft.partial(jax.jit, static_argnums=0)
    def run(scan, batch):
        one = lambda *p: _loss(scan(case.step(p[0]), p[1], p[2]))
        run = jax.value_and_grad(one, (0, 1, 2))
        for inner in axes:
            run = jax.vmap(run, inner)
        return run(*batch)

    _assert_equal(run(scan, batch), run(lax.scan, batch), 1e-13, 1e-12)


def test_default_gradient_follows_the_size_of_the_batch():
    # 4² entries of a Jacobian: parallel in a batch of up to 16.
    case = _CASES["tanh"]

    def is_parallel(mapped, size):
        def one(factor):
            scaled = lambda name: jax.tree.map(
                lambda x: x * factor if name == mapped else x, getattr(case, name)
            )
            f = case.step(scaled("weights"))
            run = ft.partial(deer_scan, f, return_statistics=True)
            return run(scaled("init"), scaled("xs"))[2].gradient.is_parallel

        return bool(jax.jit(jax.vmap(one))(jnp.ones(size))[0])

    for mapped in ("init", "xs", "weights"):
        assert is_parallel(mapped, 16)
        assert not is_parallel(mapped, 17)


# ---- Any pytree ----

_W, _V = _random(3, 3), _random(3, 3)
_X, _H = _random(20, 3), _random(3)
_KEYS = jax.random.split(jax.random.key(0), 20)


def _cell(h, x):
    return jnp.tanh(_W @ h + x)


def _mixed(c, x):
    a, (b, s) = c["a"], c["rest"]
    a = jnp.tanh(_V @ a + b[0] + x)
    b = jnp.sin(b + s * jnp.outer(x[:2], a))
    return {"a": a, "rest": (b, jnp.cos(s + a[0]))}, {"b": b, "both": (a, s)}


def _types(c, x):
    single, double = c
    wide = single.astype(jnp.float64)
    single = jnp.tanh(single * 0.5 + (double + x).astype(jnp.float32))
    return (single, jnp.sin(double + wide)), (single, double)


def _half(c, x):
    c = jnp.tanh(c * 0.5 + x.astype(jnp.bfloat16))
    return c, c


def _complex(c, x):
    phase = jnp.exp(lax.complex(-0.1 * jnp.ones(()), jnp.real(c[0])))
    c = phase * jnp.roll(c, 1) + lax.complex(x, 0.1 * x**2)
    return c, jnp.abs(c)


def _driven(c, x):
    # Leaves that know nothing of the others, but drive them.
    h, n, key, flag = c
    key, used = jax.random.split(key)
    moved = _cell(h, x + jax.random.normal(used, (3,)))
    h = jnp.where(flag, moved, h) * jnp.where(n % 3 == 0, 0.5, 1.0)
    return (h, n + 1, key, ~flag), (n, used, h)


def _driving(c, x):
    # Leaves that depend on the others: neither can be solved without the other.
    h, sign, flag, key = c
    h = _cell(h, x) + sign.astype(jnp.float64)
    key = jnp.where(h[1] > 0, jax.random.fold_in(key, 1), key)
    h = jnp.where(flag, h, h + 0.1 * jax.random.normal(key, (3,)))
    return (h, jnp.where(h[0] > 0, -sign, sign), h[2] > 0, key), (sign, flag, key)


def _softmax(c, x):
    largest, total = c
    new = jnp.maximum(largest, x)
    return (new, total * jnp.exp(largest - new) + jnp.exp(x - new)), None


def _keyed(h, x):
    key, n, x = x
    noise = jax.random.normal(key, (3,)) + n.astype(jnp.float64)
    return _cell(h, x + noise), (key, n)


def _stack(c, x):
    a, b, count = c
    a = _cell(a, x)
    b = jnp.tanh(_V @ b + a)
    return (a, b, count + jnp.sum(b**2)), b


@jax.checkpoint
def _controlled(c, x):
    body = lambda c, _: ((_cell(c[0], x), jnp.sin(_V @ c[1])), c[0])
    c, seen = lax.scan(body, c, None, 2)
    yes = lambda c: (_cell(c[0], x), 0.5 * c[1])
    no = lambda c: (c[0], jnp.sin(_V @ c[1]))
    return lax.cond(x[0] > 0, yes, no, c), seen


def _outputs(c, x):
    # Leaves of the carry, before and after the step, and others, some of them twice.
    a, b, n, one = c
    new = _cell(b, x)
    apart = jnp.sin(x), jnp.arange(2), 1.0, jnp.cos(new)
    return (b, new, n + 1, 1.0), ((a, new, one), [b, x, new, n, n + 1], apart)


class _Tree(NamedTuple):
    """A recurrence of any pytree, and what rounding does to it."""

    f: Callable
    init: Any
    xs: Any
    kwargs: dict[str, Any] = {}
    tolerance: float = 1e-14


_TREES = {
    "dictionary": _Tree(_mixed, {"a": _H, "rest": (_random(2, 3), 0.1)}, _X),
    "two_types": _Tree(_types, (_H.astype(jnp.float32), _H), _X, tolerance=1e-6),
    "half": _Tree(_half, _H.astype(jnp.bfloat16), _X, tolerance=0.01),
    "complex": _Tree(_complex, _H.astype(jnp.complex128), _X, tolerance=1e-13),
    "driven": _Tree(_driven, (_H, 0, jax.random.key(1), True), _X),
    "driving": _Tree(
        _driving, (_H, jnp.array(1), jnp.array(True), jax.random.key(2)), _X
    ),
    "from_infinity": _Tree(_softmax, (jnp.full(3, -jnp.inf), jnp.zeros(3)), _X),
    "no_carry": _Tree(lambda c, x: (None, (jnp.sin(x), 1.0)), None, _X),
    "only_integers": _Tree(lambda n, x: (n + 1, n * x), 0, jnp.arange(20)),
    "no_entries": _Tree(
        lambda c, x: ((_cell(c[0], x), jnp.sin(c[1])), c[1]),
        (_H, jnp.zeros((0, 2))),
        _X,
    ),
    "no_inputs": _Tree(
        lambda c, x: (jnp.sin(_W @ c), c), _H, None, kwargs={"length": 11}
    ),
    "no_steps": _Tree(_stack, (_H, _H, 0.0), _X[:0]),
    "one_step": _Tree(_stack, (_H, _H, 0.0), _X[:1]),
    "reverse": _Tree(_stack, (_H, 2 * _H, 0.0), _X, kwargs={"reverse": True}),
    "keys_and_integers": _Tree(_keyed, np.asarray(_H), (_KEYS, jnp.arange(20) % 3, _X)),
    "outputs": _Tree(_outputs, (_H, 2 * _H, 0, 2.0), np.asarray(_X)),
    "controlled": _Tree(_controlled, (_H, _H), _X),
    # Of a carry that depends on nothing there are no tangents.
    "constant": _Tree(lambda c, x: (jnp.ones(3), c * x), _H, _X),
}


def _assert_leaves_equal(found: Any, expected: Any, tolerance: float):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for got, want in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert got.shape == want.shape
        assert got.dtype == want.dtype
        if jnp.issubdtype(want.dtype, jax.dtypes.prng_key):
            got, want = jax.random.key_data(got), jax.random.key_data(want)
        if jnp.issubdtype(want.dtype, jnp.inexact):
            got, want = (np.asarray(x, np.complex128) for x in (got, want))
            scale = np.max(np.abs(want), initial=0.0, where=np.isfinite(want))
            np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * scale)
        else:
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("tree", _TREES.values(), ids=_TREES.keys())
def test_any_pytree_is_carried_as_by_lax_scan(tree):
    f, init, xs, kwargs, tolerance = tree
    arrays = jax.tree.map(jnp.asarray, (init, xs))
    smooth, rest = eqx.partition(arrays, eqx.is_inexact_array)

    @ft.partial(jax.jit, static_argnums=0)
    def everything(scan, smooth):
        def loss(smooth):
            init, xs = eqx.combine(smooth, rest)
            out = scan(f, init, xs, **kwargs)
            return _loss(out), out

        gradient, out = jax.grad(loss, has_aux=True)(smooth)
        return out, gradient

    (out, gradient), expected = (everything(s, smooth) for s in (deer_scan, lax.scan))
    _assert_leaves_equal(out, expected[0], tolerance)
    _assert_leaves_equal(gradient, expected[1], 10 * tolerance)
    # With what the user passed, of whatever type. The default tolerance of the
    # iteration is a hundred times that of the comparison.
    exact = ft.partial(deer_scan, method=Newton(rtol=1e-14))
    run = lambda scan: jax.jit(lambda: scan(f, init, xs, **kwargs))()
    _assert_leaves_equal(run(exact), run(lax.scan), 10 * tolerance)


# ---- Convergence, and failure ----


def test_saturated_and_chaotic_cells_are_solved_to_a_trajectory():
    dtype = jnp.float32
    case = _CASES["gru"].cast(dtype)
    xs = jnp.asarray(np.random.default_rng(2).normal(size=(1000, 3)), dtype)

    @jax.jit
    @jax.vmap
    def solve(factor):
        weights = jax.tree.map(lambda w: factor * w, case.weights)
        f = lambda h, x: (case.step(weights)(h, x)[0],) * 2
        _, ys, statistics = _newton(f, case.init, xs, return_statistics=True)
        before = jnp.concatenate([case.init[None], ys[:-1]])
        images = jax.vmap(lambda y, x: f(y, x)[0])(before, xs)
        return ys, images, statistics, lax.scan(f, case.init, xs)[1]

    ys, images, statistics, expected = solve(jnp.array([3.0, 10.0], dtype))
    tolerance = float(jnp.finfo(dtype).eps) ** 0.75
    assert np.all(result_is(statistics.result, "successful"))
    # Each state is the next one of the state before it, near rounding.
    defects, norms = (jnp.max(jnp.abs(x), axis=2) for x in (images - ys, ys))
    assert jnp.max(defects / norms) < 2 * tolerance
    # Before trajectories have had the time to separate it is that of `lax.scan`.
    assert relative_error(ys[:, :8], expected[:, :8]) < 100 * tolerance


@jax.custom_vjp
def _tanh_backwards(x):
    return jnp.tanh(x)


_tanh_backwards.defvjp(
    lambda x: (jnp.tanh(x), x), lambda x, ct: (ct * (1 - jnp.tanh(x) ** 2),)
)


def _explode(h, x):
    """Squares, each entry that of the next one; overflows after a dozen of steps."""
    h = jnp.roll(h, 1) ** 2 + x
    return h, h


def _recover(h, x):
    h = jnp.roll(jnp.where(jnp.isfinite(h), h, 0.0), 1) / (1 - x)
    return h, h


def _explode_backwards(h, x):
    h = jnp.roll(h, 1) ** 2 + x + 0 * _tanh_backwards(x)
    return h, h


_FAILURES = {
    "default": (deer_scan, _explode),
    "newton": (_newton, _explode),
    "lax_scan": (deer_scan, _explode_backwards),
    "recovers": (deer_scan, _recover),
}


@pytest.mark.parametrize(("scan", "f"), _FAILURES.values(), ids=_FAILURES.keys())
def test_carry_that_overflows_is_nan_from_there_on(scan, f):
    init = jnp.linspace(0.5, 0.9, 3)
    xs = jnp.ones((20, 3)) if f is not _recover else jnp.zeros((20, 3)).at[9].set(1.0)
    expected = lax.scan(f, init, xs)[1]
    num_finite = int(np.argmin(np.all(np.isfinite(expected), axis=1)))
    assert 5 < num_finite < 15
    about = ft.partial(scan, f, throw=False, return_statistics=True)
    carry, ys, statistics = jax.jit(about)(init, xs)
    assert result_is(statistics.result, "nonfinite")
    assert statistics.num_solved == num_finite
    assert relative_error(ys[:num_finite], expected[:num_finite]) < 1e-12
    assert np.all(np.isnan(ys[num_finite:]))
    assert np.all(np.isnan(carry))


def test_too_few_iterations_leave_nan_after_what_is_solved():
    case = _CASES["tanh"]
    f = case.step(case.weights)
    few = ft.partial(_newton, method=Newton(max_iterations=2))
    about = ft.partial(few, f, throw=False, return_statistics=True)
    carry, ys, statistics = jax.jit(about)(case.init, case.xs)
    assert result_is(statistics.result, "nonlinear_max_steps_reached")
    assert statistics.num_iterations == 2
    num_solved = int(statistics.num_solved)
    assert 2 <= num_solved < _T
    expected = lax.scan(f, case.init, case.xs)[1]
    assert relative_error(ys[:num_solved], expected[:num_solved]) < 1e-13
    assert np.all(np.isnan(ys[num_solved:])) and np.all(np.isnan(carry))


@pytest.mark.raises
@pytest.mark.parametrize(
    ("scan", "f", "match"),
    [
        (deer_scan, _explode, "a carry became infinite or NaN"),
        (
            ft.partial(_newton, method=Newton(max_iterations=2)),
            _outputs,
            "not converged within `max_iterations`",
        ),
    ],
    ids=["overflow", "max_iterations"],
)
def test_failure_is_an_error_unless_it_is_asked_for(scan, f, match):
    init = (_H, 2 * _H, 0, 2.0) if f is _outputs else _H
    run = lambda init: scan(f, init, jnp.ones((20, 3)))
    with pytest.raises(Exception, match=match):
        jax.block_until_ready(jax.jit(run)(init))


@pytest.mark.parametrize(
    "scan",
    [ft.partial(deer_scan, gradient=SequentialGradient()), _newton],
    ids=["sequential", "newton"],
)
def test_failure_does_not_disturb_the_others_of_a_batch(scan):
    f = lambda h, x: (jnp.roll(h, 1) ** 2 + x, h)
    inits = jnp.array([[0.1, 0.2], [3.0, 2.0], [-0.3, 0.4]])
    xs = jnp.full((20, 2), 0.1)

    @ft.partial(jax.jit, static_argnums=0)
    def run(scan, inits):
        def loss(init):
            out = scan(f, init, xs)
            return jnp.sum(out[0] ** 2), out

        return jax.vmap(jax.value_and_grad(loss, has_aux=True))(inits)

    scan = ft.partial(scan, throw=False, return_statistics=True)
    (_, (carry, ys, statistics)), slopes = run(scan, inits)
    (_, expected), expected_slopes = run(lax.scan, inits)
    good = np.array([0, 2])
    np.testing.assert_array_equal(
        result_is(statistics.result, "successful"), [True, False, True]
    )
    assert np.all(np.isnan(carry[1]))
    found = carry[good], ys[good], slopes[good]
    wanted = expected[0][good], expected[1][good], expected_slopes[good]
    assert relative_error(found, wanted) < 1e-12


# ---- Arguments ----


def test_arguments_that_lax_scan_refuses_are_refused_with_the_same_error():
    for f, xs, length in (
        (lambda c, x: (c.astype(jnp.int32), None), jnp.ones(4), None),
        (lambda c, x: c, jnp.ones(4), None),
        (lambda c, x: (c, x), jnp.ones(4), 5),
        (lambda c, x: (c, x), None, None),
    ):
        errors = []
        for scan in (lax.scan, deer_scan):
            with pytest.raises((TypeError, ValueError)) as info:
                scan(f, jnp.ones(3), xs, length)
            errors.append((type(info.value), str(info.value)))
        assert errors[0] == errors[1]


def test_wrong_arguments_are_refused_with_a_remedy():
    newton = Newton(PiecewiseConstant())
    arguments: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"method": Newton}, TypeError, "class `Newton`.*instance"),
        ({"gradient": "parallel"}, TypeError, "an instance of `AbstractGradient`"),
        ({"guess": jnp.ones((19, 3))}, ValueError, r"leaves of shapes \(20, 3\)"),
        ({"guess": (jnp.ones((20, 3)),)}, ValueError, "a pytree like `init`"),
        ({"method": newton}, TypeError, r"a recurrence.*has none. Use `FullJacobian"),
    ]
    for kwargs, error, match in arguments:
        with pytest.raises(error, match=match):
            deer_scan(lambda c, x: (_cell(c, x), c), _H, _X, **kwargs)


def test_guess_of_the_answer_takes_one_iteration():
    init = _H, 2 * _H, jnp.array(0.0)

    def f(c, x):
        c, _ = _stack(c, x)
        return c, c

    scan = ft.partial(_newton, f, init, _X, return_statistics=True)

    @ft.partial(jax.jit, static_argnums=0)
    def solve(reverse):
        expected = lax.scan(f, init, _X, reverse=reverse)[1]
        # The other way round it is a bad one, and the answer still the same.
        guesses = None, expected, jax.tree.map(lambda x: x[::-1], expected)
        return expected, [scan(reverse=reverse, guess=guess) for guess in guesses]

    for reverse in (False, True):
        expected, (cold, warm, bad) = solve(reverse)
        assert cold[2].num_iterations > 4
        assert warm[2].num_iterations == 1
        assert relative_error(warm[1], expected) < 1e-13
        assert relative_error(bad[1], expected) < 1e-13


def test_guess_may_be_bad_and_has_no_derivative():
    case = _CASES["gru"]
    expected = lax.scan(case.step(case.weights), case.init, case.xs)[1]

    @jax.jit
    @jax.vmap
    def solve(value):
        def loss(value):
            guess = expected.at[5].set(value)
            out = _newton(case.step(case.weights), case.init, case.xs, guess=guess)
            return jnp.sum(out[1]), out[1]

        return jax.grad(loss, has_aux=True)(value)

    slopes, ys = solve(jnp.array([0.0, 1e30, jnp.inf, jnp.nan]))
    assert relative_error(ys, jnp.broadcast_to(expected, ys.shape)) < 1e-13
    np.testing.assert_array_equal(slopes, jnp.zeros(4))


def test_guess_may_have_other_types_and_leaves_that_are_none():
    # What is no number is found without a guess, whatever the guess for it is.
    init = _H, jnp.array(3), jax.random.key(1), jnp.array(True)
    f = lambda c, x: _driven((c[0], c[1], c[2], c[3]), x)
    guess = jnp.ones((20, 3), int), jnp.zeros(20), _KEYS, jnp.ones(20)
    found = _newton(f, init, _X, guess=guess)
    _assert_leaves_equal(found, lax.scan(f, init, _X), 1e-13)


def test_statistics_say_what_has_been_done():
    case = _CASES["tanh"]
    step = case.step(case.weights)
    f = lambda h, x: (step(h, x)[0],) * 2
    solve = ft.partial(deer_scan, f, case.init, case.xs, return_statistics=True)
    for method in (None, Sequential()):
        _, _, statistics = solve(method=method)
        assert statistics.num_iterations == 0
        assert statistics.residual is None
        assert statistics.num_solved == _T
        assert result_is(statistics.result, "successful")
        assert statistics.method == Sequential()
    gradient = SequentialGradient()
    _, ys, statistics = solve(method=Newton(rtol=1e-4), gradient=gradient)
    before = jnp.concatenate([case.init[None], ys[:-1]])
    defects = jax.vmap(lambda y, x: f(y, x)[0])(before, case.xs) - ys
    assert statistics.residual > 1e-14
    np.testing.assert_allclose(
        statistics.residual, jnp.max(jnp.abs(defects)), rtol=1e-6, atol=1e-15
    )
    assert 1 < statistics.num_iterations < _T
    assert statistics.num_solved == _T
    assert statistics.gradient == gradient
    # With the choices that were left open.
    assert isinstance(statistics.method, Newton)
    assert isinstance(statistics.method.linearization, AbstractLinearization)
    assert (statistics.method.rtol, statistics.method.max_iterations) == (1e-4, _T)


# ---- What JAX cannot differentiate in forward mode ----


def _directly(w, h, x):
    return _tanh_backwards(w @ h + x)


def _in_a_branch_of_a_loop(w, h, x):
    body = lambda h, _: (lax.cond(x[0] > 0, _directly, _directly, w, h, x), None)
    return lax.scan(body, h, None, 2)[0]


@pytest.mark.parametrize("cell", [_directly, _in_a_branch_of_a_loop])
def test_custom_vjp_is_left_to_lax_scan(cell):
    def everything(scan):
        step = lambda w: lambda h, x: (cell(w, h, x), h)
        return _everything(scan, _Case(step, _W, _H, _X))

    found, expected = everything(deer_scan), everything(lax.scan)
    _assert_equal(found, expected, 1e-14, 1e-13)


@pytest.mark.parametrize("method", [Newton(), Newton(Picard())], ids=["solve", "slope"])
def test_custom_vjp_is_an_error_where_newton_is_asked_for(method):
    # Without a Jacobian there is a solution, but no parallel gradient of it.
    scan = ft.partial(_newton, method=method)
    loss = lambda h: _loss(scan(lambda h, x: (_directly(_W, h, x), h), h, _X))
    with pytest.raises(TypeError, match=r"contains a `jax.custom_vjp`.*cannot"):
        jax.grad(loss)(_H)


def test_infinite_carries_are_those_of_lax_scan_one_after_another():
    # The forward algorithm, with states that cannot be reached at first.
    def loss(scan, weights):
        def step(alpha, _):
            a = alpha[:, None] + jnp.where(
                weights > 0, jnp.log(weights + 1e-9), -jnp.inf
            )
            largest = lax.stop_gradient(jnp.max(a, axis=0))
            largest = jnp.where(jnp.isfinite(largest), largest, 0.0)
            total = jnp.sum(jnp.exp(a - largest[None]), axis=0)
            some = total > 0
            alpha = largest + jnp.log(jnp.where(some, total, 1.0))
            return jnp.where(some, alpha, -jnp.inf), None

        alpha, _ = scan(step, jnp.array([0.0, -jnp.inf, -jnp.inf]), None, 6)
        return alpha[2]

    weights = jnp.array([[0.8, 0.2, 0.0], [0.0, 0.7, 0.3], [0.0, 0.0, 1.0]])
    one_by_one = ft.partial(deer_scan, method=Sequential())
    found = jax.value_and_grad(ft.partial(loss, one_by_one))(weights)
    expected = jax.value_and_grad(ft.partial(loss, lax.scan))(weights)
    assert np.isfinite(expected[0])
    _assert_equal(found, expected, 1e-14, 1e-13)


@pytest.mark.raises
def test_infinite_carry_of_newton_names_the_remedy():
    run = lambda init: _newton(lambda h, x: (h + x, h), init, jnp.ones((4, 1)))
    with pytest.raises(Exception, match=r"method=Sequential\(\)` is"):
        jax.block_until_ready(jax.jit(run)(jnp.full(1, -jnp.inf)))
