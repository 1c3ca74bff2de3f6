"""`deer_scan` is `jax.lax.scan`: in its values, its derivatives and what it takes."""

import functools as ft
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jaxtyping import Array, PyTree

from diffrax_deer import (
    AssociativeScan,
    BlockDiagonalJacobian,
    DiagonalJacobian,
    FullJacobian,
    ParallelForward,
    Picard,
    PiecewiseConstant,
    SequentialForward,
    deer_scan,
)

from .helpers import (
    primitives,
    random_like,
    relative_error,
    result_is,
    weighted_loss,
)

_RNG = np.random.default_rng(0)
_T, _D = 24, 4

_parallel = ft.partial(deer_scan, forward=ParallelForward())


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


def _tanh(size: int = _D, num_steps: int = _T, scale: float = 1.0) -> _Case:
    def step(weights):
        w, v, b = weights

        def f(h, x):
            h = jnp.tanh(w @ h + v @ x + b)
            return h, jnp.sin(h[:2]) * x[0]

        return f

    weights = (
        _random(size, size, scale=scale / np.sqrt(size)),
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
each_case = pytest.mark.parametrize("case", _CASES)

_HOW: dict[str, dict[str, Any]] = {
    "default": {},
    "sequential": {"forward": SequentialForward()},
    "newton": {"forward": ParallelForward()},
    "diagonal": {"linearization": DiagonalJacobian(), "forward": ParallelForward()},
    "blocks": {
        "linearization": BlockDiagonalJacobian(block_size=2),
        "forward": ParallelForward(),
    },
    "picard": {"linearization": Picard(), "forward": ParallelForward()},
}
each_way = pytest.mark.parametrize("how", _HOW)

# What remains of an error when the iteration stops; Newton's last one leaves far less.
_LEFT = float(jnp.finfo(jnp.float64).eps) ** 0.75


def _loss(tree: PyTree[Array]) -> Array:
    """A number that depends on every entry of all smooth leaves, nonlinearly."""
    total = jnp.zeros((), jnp.float64)
    for x in jax.tree.leaves(tree):
        for part in (x.real, x.imag) if jnp.iscomplexobj(x) else (x,):
            if jnp.issubdtype(part.dtype, jnp.floating):
                part = jnp.where(jnp.isfinite(part), part, 0.0)
                total += weighted_loss(lambda x: x.astype(jnp.float64), part)
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


@each_way
@each_case
def test_values_and_gradients_are_those_of_lax_scan(case, how):
    found = _everything(ft.partial(deer_scan, **_HOW[how]), _CASES[case])
    is_exact = how in ("default", "sequential", "newton")
    values = 1e-14 if is_exact else 10 * _LEFT
    _assert_equal(found, _reference(case), values, 10 * values)


@pytest.mark.parametrize("how", ["newton", "blocks"])
def test_so_they_are_with_an_associative_scan(how):
    scan = ft.partial(deer_scan, scan=AssociativeScan(), **_HOW[how])
    values = 1e-14 if how == "newton" else 10 * _LEFT
    found = _everything(scan, _CASES["gru"])
    _assert_equal(found, _reference("gru"), values, 10 * values)


@pytest.mark.parametrize(
    ("case", "how"),
    [("tanh", "default"), ("gru", "newton"), ("tanh", "diagonal")],
)
def test_so_they_are_in_single_precision(case, how):
    eps = float(jnp.finfo(jnp.float32).eps)
    values = 10 * (eps**0.75 if how == "diagonal" else eps)
    single = _CASES[case].cast(jnp.float32)
    found = _everything(ft.partial(deer_scan, **_HOW[how]), single)
    _assert_equal(found, _everything(lax.scan, single), values, 10 * values)


@pytest.mark.parametrize("how", ["diagonal", "blocks", "picard"])
def test_the_gradient_of_a_large_state_needs_no_dense_jacobians(how):
    # More than `MOST_DIRECT`: solved by sweeps, and still close to rounding.
    case = _tanh(20, scale=0.4)
    found = _everything(ft.partial(deer_scan, **_HOW[how]), case)
    _assert_equal(found, _everything(lax.scan, case), 10 * _LEFT, 1e-9)


@pytest.mark.parametrize("size", [12, 40])
def test_the_default_is_right_where_the_state_is_larger(size):
    case = _tanh(size)
    _assert_equal(
        _everything(deer_scan, case), _everything(lax.scan, case), 1e-14, 1e-13
    )


@pytest.mark.parametrize("how", ["default", "newton", "diagonal"])
def test_forward_mode_is_that_of_lax_scan(how):
    case = _CASES["tanh"]

    @ft.partial(jax.jit, static_argnums=0)
    def push(scan, primals, tangents):
        run = lambda weights, init, xs: scan(case.step(weights), init, xs)
        return jax.jvp(run, primals, tangents)

    primals = tuple(case[1:])
    scan = ft.partial(deer_scan, **_HOW[how])
    found, expected = (push(s, primals, random_like(primals)) for s in (scan, lax.scan))
    _assert_equal(found, expected, 10 * _LEFT, 100 * _LEFT)


@pytest.mark.parametrize("how", ["default", "newton"])
def test_second_derivatives_are_right_in_every_order_of_modes(how):
    case = _CASES["tanh"]
    primals = tuple(case[1:])
    direction = random_like(primals)

    @ft.partial(jax.jit, static_argnums=0)
    def products(scan, primals):
        loss = lambda p: _loss(scan(case.step(p[0]), p[1], p[2]))
        slope = lambda p: jax.jvp(loss, (p,), (direction,))[1]
        along = lambda g: sum(map(jnp.vdot, *map(jax.tree.leaves, (g, direction))))
        return (
            jax.jvp(jax.grad(loss), (primals,), (direction,))[1],
            jax.grad(slope)(primals),
            jax.grad(lambda p: along(jax.grad(loss)(p)))(primals),
        )

    forward_reverse, *others = products(ft.partial(deer_scan, **_HOW[how]), primals)
    expected = products(lax.scan, primals)[0]
    assert relative_error(forward_reverse, expected) < 1000 * _LEFT
    for product in others:
        assert relative_error(product, expected) < 1000 * _LEFT


@pytest.mark.parametrize(
    ("how", "axes"),
    [
        ("default", (0, 0, 1)),
        ("newton", (0, 0, 1)),
        ("newton", (None, 0, None)),
        ("newton", (None, None, 1)),
    ],
    ids=str,
)
def test_a_batch_is_its_members(how, axes):
    case = _CASES["tanh"]
    weights, init, xs = case[1:]
    several = lambda x, axis: jnp.stack([x, -x, 0.3 * x], axis=axis or 0)
    widen = lambda tree, axis: (
        tree if axis is None else jax.tree.map(lambda x: several(x, axis), tree)
    )
    batch = tuple(map(widen, (weights, init, xs), axes))

    @ft.partial(jax.jit, static_argnums=0)
    def run(scan, batch):
        one = lambda *p: _loss(scan(case.step(p[0]), p[1], p[2]))
        return jax.vmap(jax.value_and_grad(one, (0, 1, 2)), axes)(*batch)

    found = run(ft.partial(deer_scan, **_HOW[how]), batch)
    _assert_equal(found, run(lax.scan, batch), 1e-13, 1e-12)


# ---- Any pytree ----

_W, _V = _random(3, 3), _random(3, 3)
_X, _H = _random(20, 3), _random(3)


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


def _counted(c, x):
    h, n = c
    h = _cell(h, x) * jnp.where(n % 3 == 0, 0.5, 1.0)
    return (h, n + 1), (n, h)


def _driving_integers(c, x):
    # Neither can be solved without the other: in sequence, and still differentiable.
    h, sign = c
    h = _cell(h, x) + sign.astype(jnp.float64)
    return (h, jnp.where(h[0] > 0, -sign, sign)), sign


def _noisy(c, x):
    h, key = c
    key, used = jax.random.split(key)
    return (_cell(h, x + jax.random.normal(used, (3,))), key), (used, h)


def _flagged(c, x):
    h, flag = c
    return (jnp.where(flag, _cell(h, x), h), ~flag), flag


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


def _in_a_loop(c, x):
    # The first two leaves share a loop, in which neither depends on the other.
    body = lambda c, _: ((_cell(c[0], x), jnp.sin(_V @ c[1])), c[0])
    c, seen = lax.scan(body, c, None, 2)
    return c, seen


def _in_branches(c, x):
    yes = lambda c: (_cell(c[0], x), 0.5 * c[1])
    no = lambda c: (c[0], jnp.sin(_V @ c[1]))
    c = lax.cond(x[0] > 0, yes, no, c)
    return c, c[0]


class _Tree(NamedTuple):
    """A recurrence of any pytree, and what rounding does to it."""

    f: Callable
    init: Any
    xs: Any
    kwargs: dict[str, Any] = {}
    tolerance: float = 1e-14


_KEYS = jax.random.split(jax.random.key(0), 20)
_TREES = {
    "dictionary": _Tree(_mixed, {"a": _H, "rest": (_random(2, 3), 0.1)}, _X),
    "two types": _Tree(_types, (_H.astype(jnp.float32), _H), _X, tolerance=1e-6),
    "half": _Tree(_half, _H.astype(jnp.bfloat16), _X, tolerance=0.01),
    "complex": _Tree(_complex, _H.astype(jnp.complex128), _X, tolerance=1e-13),
    "counter": _Tree(_counted, (_H, 0), _X),
    "integer in the circle": _Tree(_driving_integers, (_H, jnp.array(1)), _X),
    "key": _Tree(_noisy, (_H, jax.random.key(1)), _X),
    "flag": _Tree(_flagged, (_H, True), _X),
    "running sum": _Tree(lambda c, x: (c + x, c), _H, _X),
    "constant": _Tree(lambda c, x: ((_cell(c[0], x), c[1]), c), (_H, -jnp.inf), _X),
    "maximum": _Tree(lambda c, x: (jnp.maximum(c, x), c), -jnp.inf, _X[:, 0]),
    "softmax": _Tree(_softmax, (jnp.full(3, -jnp.inf), jnp.zeros(3)), _X),
    "weak type": _Tree(
        lambda c, x: ((0.5 * c[0] + 0.1, _cell(c[1], x)), c[0]), (1.0, _H), _X
    ),
    "weak type, promoted": _Tree(lambda c, x: (jnp.tanh(c + x), x), 1.0, _X[:, 0]),
    "nothing": _Tree(lambda c, x: ((), jnp.sin(x)), (), _X),
    "none": _Tree(lambda c, x: (None, 1.0), None, _X),
    "no entries": _Tree(
        lambda c, x: ((_cell(c[0], x), jnp.sin(c[1])), c[1]),
        (_H, jnp.zeros((0, 2))),
        _X,
    ),
    "no inputs": _Tree(
        lambda c, x: (jnp.sin(_W @ c), c), _H, None, kwargs={"length": 11}
    ),
    "no steps": _Tree(_stack, (_H, _H, 0.0), _X[:0]),
    "one step": _Tree(_stack, (_H, _H, 0.0), _X[:1]),
    "backwards": _Tree(_stack, (_H, 2 * _H, 0.0), _X, kwargs={"reverse": True}),
    "keys and integers": _Tree(_keyed, _H, (_KEYS, jnp.arange(20) % 3, _X)),
    "arrays of numpy": _Tree(
        lambda h, x: (_cell(h, x), h), np.asarray(_H), np.asarray(_X)
    ),
    "outputs apart": _Tree(
        lambda h, x: (_cell(h, x), (jnp.sin(x), jnp.arange(2), 1.0)), _H, _X
    ),
    "outputs twice": _Tree(
        lambda h, x: (lambda h: (h, (h, [h, x, x])))(_cell(h, x)), _H, _X
    ),
    "leaves twice": _Tree(
        lambda c, x: (lambda h: ((h, h), None))(_cell(c[0], x)), (_H, 2 * _H), _X
    ),
    "reset": _Tree(
        lambda c, x: ((_cell(c[0], x + c[1]), 0.0, jnp.ones(2)), c[2]),
        (_H, 1.0, jnp.zeros(2)),
        _X,
    ),
    "delay": _Tree(
        lambda c, x: ((_cell(c[0], x), c[0], c[1]), c[2]), (_H, 2 * _H, 3 * _H), _X
    ),
    "exchange": _Tree(lambda c, x: ((c[1], c[0]), c[0]), (_H, 2 * _H), _X),
    "recomputed": _Tree(jax.checkpoint(_stack), (_H, _H, 0.0), _X),
    "loop": _Tree(_in_a_loop, (_H, _H), _X),
    "branches": _Tree(_in_branches, (_H, _H), _X),
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


@pytest.mark.optimized
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

    # The default tolerance of the iteration is a hundred times that of the comparison.
    exact = ft.partial(_parallel, rtol=1e-14)
    found, expected = (everything(scan, smooth) for scan in (exact, lax.scan))
    _assert_leaves_equal(found, expected, 10 * tolerance)
    # With what the user passed, of whatever type.
    run = lambda scan: jax.jit(lambda: scan(f, init, xs, **kwargs))()
    _assert_leaves_equal(run(deer_scan), run(lax.scan), tolerance)


# ---- What is solved together, and what is evaluated when ----


def _shapes(f: Callable, *args: Any) -> set[tuple[int, ...]]:
    """The shapes of all arrays that are made in evaluating `f`."""
    equations = primitives(jax.make_jaxpr(f)(*args))
    avals = [v.aval for e in equations for v in e.outvars]
    return {aval.shape for aval in avals if hasattr(aval, "shape")}


def _with_gradient(scan: Callable, f: Callable) -> Callable:
    def loss(init, xs):
        out = scan(f, init, xs)
        return _loss(out), out

    return jax.grad(loss, (0, 1), has_aux=True)


def _many(c, x):
    # Two layers of three, which know one direction only; their average; a sum, a
    # maximum, and a counter.
    a, b, mean, total, largest, count = c
    a = _cell(a, x)
    b = jnp.tanh(_V @ b + a)
    mean = 0.9 * mean + 0.1 * b
    total, largest = total + jnp.sum(a * mean), jnp.maximum(largest, b)
    return (a, b, mean, total, largest, count + 1), count.astype(jnp.float64) * total


_MANY = _H, _H, _H, jnp.array(0.0), _H, jnp.array(0)


def test_what_depends_in_one_direction_only_is_not_solved_together():
    smooth, count = _MANY[:-1], _MANY[-1]
    scan = lambda f, init, xs: _parallel(f, (*init, count), xs)
    together = lambda f, init, xs: _parallel(
        # The same, with a dependence that dataflow cannot see through.
        lambda c, x: f((c[0] + 0 * c[1], *c[1:]), x),
        (*init, count),
        xs,
    )
    matrices = lambda scan: {
        shape[1:]
        for shape in _shapes(_with_gradient(scan, _many), smooth, _X)
        if len(shape) == 3 and shape[0] == len(_X)
    }
    assert max(matrices(scan)) == (3, 3)
    assert max(matrices(together)) == (6, 6)


def test_layers_and_accumulators_take_as_many_iterations_as_the_slowest_layer():
    solve = jax.jit(ft.partial(_parallel, return_statistics=True), static_argnums=0)
    carry, ys, statistics = solve(_many, _MANY, _X)
    expected = lax.scan(_many, _MANY, _X)[1]
    assert relative_error(ys, expected) < 1e-13
    first = solve(lambda a, x: (_cell(a, x),) * 2, _H, _X)
    second = solve(lambda b, a: (jnp.tanh(_V @ b + a), None), _H, first[1])
    assert relative_error(carry[:2], (first[0], second[0])) < 1e-13
    slowest = max(first[2].num_iterations, second[2].num_iterations)
    assert statistics.num_iterations == slowest > 4


@pytest.mark.parametrize(
    "f",
    [
        lambda c, x: (c + x, c),
        lambda c, x: (0.9 * c + 0.1 * x, c),
        lambda c, x: (jax.nn.sigmoid(x) * c + x, c),
        lambda c, x: (_W @ c + x, c),
    ],
    ids=["sum", "average", "gate", "matrix"],
)
def test_a_linear_recurrence_is_solved_by_one_iteration(f):
    out = _parallel(f, _H, _X, max_iterations=1)
    assert relative_error(out, lax.scan(f, _H, _X)) < 1e-13


@jax.custom_jvp
def _soft(x):
    return jnp.logaddexp(x, 0.0)


_soft.defjvp(lambda p, t: (_soft(*p), jax.nn.sigmoid(*p) * t[0]))

_A = _random(3)
_ALONE: dict[str, Callable] = {
    "tanh": lambda h, x: jnp.tanh(_A * h + x),
    "silu": lambda h, x: jax.nn.silu(_A * h + x),
    "gelu": lambda h, x: 0.5 * jax.nn.gelu(_A * h + _W @ x),
    "choice": lambda h, x: jnp.where(h > x[0], 0.5 * h, jnp.sin(h) + x),
    "custom_jvp": lambda h, x: 0.5 * _soft(h - x),
    "jitted": jax.jit(lambda h, x: jax.jit(jnp.cos)(h) / (1 + h**2) + x),
}
_COUPLED: dict[str, Callable] = {
    "roll": lambda h, x: jnp.tanh(jnp.roll(h, 1) + x),
    "reverse": lambda h, x: jnp.tanh(h[::-1] + x),
    "cumsum": lambda h, x: jnp.tanh(jnp.cumsum(h) + x),
    "matrix": lambda h, x: jnp.tanh(_W @ h + x),
    "sum": lambda h, x: jnp.tanh(h + jnp.sum(h) + x),
    "sort": lambda h, x: 0.5 * jnp.sort(h) + x,
    "one for all": lambda h, x: jnp.tanh(h[1] + x),
    "softmax": lambda h, x: jax.nn.softmax(h + x),
    "loop": lambda h, x: lax.fori_loop(0, 2, lambda _, h: jnp.sin(h[::-1]) + x, h),
}


@pytest.mark.parametrize(
    ("step", "is_coupled"),
    [*((f, False) for f in _ALONE.values()), *((f, True) for f in _COUPLED.values())],
    ids=[*_ALONE, *_COUPLED],
)
def test_only_entries_that_know_each_other_need_a_matrix(step, is_coupled):
    f = lambda h, x: (step(h, x), h)
    both = _with_gradient(_parallel, f)
    assert ((20, 3, 3) in _shapes(both, _H, _X)) == is_coupled
    found = jax.jit(both)(_H, _X)
    expected = jax.jit(_with_gradient(lax.scan, f))(_H, _X)
    assert relative_error(found, expected) < 1e-12


def test_a_square_state_and_its_transpose_are_not_the_same_entries():
    h = _random(3, 3)
    f = lambda h, x: (jnp.tanh(h.T + jnp.outer(x, x)), h)
    found = jax.jit(_with_gradient(_parallel, f))(h, _X)
    expected = jax.jit(_with_gradient(lax.scan, f))(h, _X)
    assert relative_error(found, expected) < 1e-12


def _products_in_loops(f: Callable, *args: Any) -> list[list[tuple[int, ...]]]:
    """The shapes of the operands of each product inside a loop."""
    loops = [
        e
        for e in primitives(jax.make_jaxpr(f)(*args))
        if e.primitive.name in ("scan", "while")
    ]
    within = [
        e
        for loop in loops
        for name in ("jaxpr", "body_jaxpr")
        if name in loop.params
        for e in primitives(loop.params[name])
    ]
    products = [e for e in within if e.primitive.name == "dot_general"]
    return [[v.aval.shape for v in e.invars] for e in products]


@pytest.mark.parametrize("size", [4, 12, 40])
def test_products_of_the_inputs_are_not_in_the_loop(size):
    # Seven is the size of the inputs, and of nothing else.
    cell = eqx.nn.GRUCell(7, size, key=jax.random.key(0))
    f = lambda h, x: (cell(x, h), None)
    operands = lambda scan: [
        shape
        for product in _products_in_loops(ft.partial(scan, f), jnp.ones(size), xs)
        for shape in product
    ]
    xs = jnp.ones((20, 7))
    assert any(7 in shape for shape in operands(lax.scan))
    in_sequence = ft.partial(deer_scan, forward=SequentialForward())
    for scan in (in_sequence, _parallel):
        assert any(size in shape for shape in operands(scan))
        assert not any(7 in shape for shape in operands(scan))


# ---- Convergence ----


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ["tanh", "gru"])
def test_saturated_and_chaotic_cells_are_solved_to_a_trajectory(name, dtype):
    case = _CASES[name].cast(dtype)
    xs = jnp.asarray(np.random.default_rng(2).normal(size=(1000, 3)), dtype)

    @jax.jit
    @jax.vmap
    def solve(factor):
        weights = jax.tree.map(lambda w: factor * w, case.weights)
        f = lambda h, x: (case.step(weights)(h, x)[0],) * 2
        _, ys, statistics = _parallel(f, case.init, xs, return_statistics=True)
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


def test_a_trained_network_converges_within_eight_iterations_from_the_last_states():
    # To recall, at each time, the input of three steps ago.
    xs = jax.random.normal(jax.random.key(0), (4, 200, 1))
    targets = jnp.roll(xs, 3, axis=1).at[:, :3].set(0.0)
    keys = jax.random.split(jax.random.key(1))
    model: Any = (
        eqx.nn.GRUCell(1, 16, key=keys[0]),
        0.1 * jax.random.normal(keys[1], (1, 16)),
    )
    optimizer = optax.adam(1e-2)

    def states(scan, model, xs, **kwargs):
        f = lambda h, x: (model[0](x, h),) * 2
        return scan(f, jnp.zeros(16), xs, **kwargs)

    def loss(model):
        ys = jax.vmap(lambda xs: states(deer_scan, model, xs)[1])(xs)
        return jnp.mean((ys @ model[1].T - targets) ** 2)

    def train(_, state):
        model, moments = state
        updates, moments = optimizer.update(jax.grad(loss)(model), moments)
        return optax.apply_updates(model, updates), moments

    @jax.jit
    def experiment():
        start = model, optimizer.init(model)
        trained, moments = lax.fori_loop(0, 1000, train, start)
        moved, _ = train(0, (trained, moments))
        guesses = jax.vmap(lambda xs: states(lax.scan, trained, xs)[1])(xs)

        def solve(xs, guess):
            kwargs = dict(return_statistics=True, guess=guess)
            return states(_parallel, moved, xs, **kwargs)[1:]

        ys, statistics = jax.vmap(solve)(xs, guesses)
        expected = jax.vmap(lambda xs: states(lax.scan, moved, xs)[1])(xs)
        return loss(model), loss(trained), ys, expected, statistics, guesses

    with jax.numpy_dtype_promotion("standard"):  # for `optax`
        before, after, ys, expected, statistics, guesses = experiment()
    assert after < 0.1 * before
    assert jnp.max(jnp.abs(guesses - expected)) > 1e-6
    assert jnp.max(statistics.num_iterations) <= 8
    assert relative_error(ys, expected) < 10 * _LEFT


def _explode(size: int) -> tuple[Callable, Array, Array]:
    """Squares, each entry that of the next one; overflows after a dozen of steps."""
    turn = jnp.roll if size > 1 else lambda h, _: h
    return (
        lambda h, x: (turn(h, 1) ** 2 + x,) * 2,
        jnp.linspace(0.5, 0.9, size),
        jnp.ones((20, size)),
    )


_EXPLODING = [
    *[(size, how) for size in (1, 3) for how in ("default", "newton")],
    *[(12, "default"), (40, "default")],
]


@pytest.mark.parametrize(("size", "how"), _EXPLODING)
def test_a_carry_that_overflows_is_an_error_or_nan_from_there_on(size, how):
    f, init, xs = _explode(size)
    expected = lax.scan(f, init, xs)[1]
    num_finite = int(np.argmin(np.all(np.isfinite(expected), axis=1)))
    assert 5 < num_finite < 15
    run = jax.jit(ft.partial(deer_scan, f, **_HOW[how]), static_argnames="throw")
    with pytest.raises(Exception, match="a carry became infinite or NaN"):
        jax.block_until_ready(run(init, xs))
    about = ft.partial(deer_scan, f, throw=False, return_statistics=True, **_HOW[how])
    carry, ys, statistics = jax.jit(about)(init, xs)
    assert result_is(statistics.result, "nonfinite")
    assert statistics.num_solved == num_finite
    assert relative_error(ys[:num_finite], expected[:num_finite]) < 1e-12
    assert np.all(np.isnan(ys[num_finite:]))
    assert np.all(np.isnan(carry))


@pytest.mark.parametrize("how", ["default", "newton"])
def test_a_carry_that_stays_infinite_is_an_error_as_well(how):
    # Not NaN: the overflow of a linear recurrence.
    f = lambda h, x: (1e200 * (h + jnp.roll(h, 1)), h)
    for size in (3, 12):
        run = jax.jit(ft.partial(deer_scan, f, **_HOW[how]))
        with pytest.raises(Exception, match="a carry became infinite or NaN"):
            jax.block_until_ready(run(jnp.ones(size), jnp.ones(5)))


@pytest.mark.parametrize("size", [3, 12])
def test_a_leaf_that_is_passed_on_may_be_anything(size):
    f = lambda c, x: ((jnp.tanh(jnp.roll(c[0], 1) + x), c[1]), c[0])
    init = jnp.ones(size), jnp.array([jnp.nan, -jnp.inf])
    carry, ys = jax.jit(ft.partial(deer_scan, f))(init, jnp.ones(5))
    expected = lax.scan(f, init, jnp.ones(5))
    np.testing.assert_array_equal(carry[1], expected[0][1])
    assert relative_error((carry[0], ys), (expected[0][0], expected[1])) < 1e-14


def test_too_few_iterations_are_an_error_or_nan_after_what_is_solved():
    case = _CASES["tanh"]
    f = case.step(case.weights)
    few = ft.partial(_parallel, f, max_iterations=2)
    with pytest.raises(Exception, match="not converged within `max_iterations`"):
        jax.block_until_ready(jax.jit(few)(case.init, case.xs))
    about = ft.partial(few, throw=False, return_statistics=True)
    carry, ys, statistics = jax.jit(about)(case.init, case.xs)
    assert result_is(statistics.result, "nonlinear_max_steps_reached")
    assert statistics.num_iterations == 2
    num_solved = int(statistics.num_solved)
    assert 2 <= num_solved < _T
    expected = lax.scan(f, case.init, case.xs)[1]
    assert relative_error(ys[:num_solved], expected[:num_solved]) < 1e-13
    assert np.all(np.isnan(ys[num_solved:])) and np.all(np.isnan(carry))


@pytest.mark.parametrize("how", ["default", "newton"])
def test_one_failure_does_not_disturb_the_others_of_a_batch(how):
    f = lambda h, x: (jnp.roll(h, 1) ** 2 + x, h)
    inits = jnp.array([[0.1, 0.2], [3.0, 2.0], [-0.3, 0.4]])
    xs = jnp.full((20, 2), 0.1)

    @ft.partial(jax.jit, static_argnums=0)
    def run(scan, inits):
        def loss(init):
            out = scan(f, init, xs)
            return jnp.sum(out[0] ** 2), out

        return jax.vmap(jax.value_and_grad(loss, has_aux=True))(inits)

    scan = ft.partial(deer_scan, throw=False, return_statistics=True, **_HOW[how])
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


@pytest.mark.parametrize(
    ("f", "init", "xs", "length"),
    [
        (lambda c, x: (c[:2], None), jnp.ones(3), jnp.ones(4), None),
        (lambda c, x: ((c, c), None), jnp.ones(3), jnp.ones(4), None),
        (lambda c, x: (c.astype(jnp.int32), None), jnp.ones(3), jnp.ones(4), None),
        (lambda c, x: c, jnp.ones(3), jnp.ones(4), None),
        (lambda c, x: (c, x), jnp.ones(3), (jnp.ones(4), jnp.ones(5)), None),
        (lambda c, x: (c, x), jnp.ones(3), jnp.ones(4), 5),
        (lambda c, x: (c, x), jnp.ones(3), None, None),
    ],
    ids="shape structure type output lengths length none".split(),
)
def test_what_lax_scan_refuses_is_refused_with_the_same_error(f, init, xs, length):
    errors = []
    for scan in (lax.scan, deer_scan):
        with pytest.raises((TypeError, ValueError)) as info:
            scan(f, init, xs, length)
        errors.append((type(info.value), str(info.value)))
    assert errors[0] == errors[1]


_F, _ONES = (lambda c, x: (jnp.sin(_W @ c + x), c)), jnp.ones((20, 3))


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"linearization": FullJacobian}, TypeError, "class `FullJacobian`.*instance"),
        (
            {"linearization": "newton"},
            TypeError,
            "must be an instance of `AbstractLinearization`",
        ),
        (
            {"linearization": None},
            TypeError,
            "must be an instance of `AbstractLinearization`",
        ),
        ({"scan": AssociativeScan}, TypeError, "class `AssociativeScan`"),
        ({"scan": True}, TypeError, "must be an instance of `AbstractScan`"),
        ({"forward": ParallelForward}, TypeError, "class `ParallelForward`"),
        (
            {"forward": "parallel"},
            TypeError,
            "must be an instance of `AbstractForward`",
        ),
        ({"max_iterations": 0}, ValueError, "`max_iterations` must be at least 1"),
        ({"max_iterations": 2.0}, TypeError, "`max_iterations` must be a Python int"),
        ({"window": 0}, ValueError, "`window` must be at least 1"),
        ({"rtol": -1e-3}, ValueError, "`rtol` must be finite and not negative"),
        ({"atol": np.nan}, ValueError, "`atol` must be finite and not negative"),
        ({"rtol": "small"}, TypeError, "`rtol` must be a Python float"),
        ({"guess": jnp.ones((19, 3))}, ValueError, r"leaves of shapes \(20, 3\)"),
        ({"guess": jnp.ones(3)}, ValueError, r"leaves of shapes \(20, 3\)"),
        ({"guess": (_ONES,)}, ValueError, r"a pytree like `init`"),
        (
            {"linearization": PiecewiseConstant(), "forward": ParallelForward()},
            TypeError,
            r"a recurrence.*has none. Use `FullJacobian\(\)`",
        ),
        (
            {
                "linearization": BlockDiagonalJacobian(block_size=2),
                "forward": ParallelForward(),
            },
            ValueError,
            "Pass a divisor of 3",
        ),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused_with_a_remedy(kwargs, error, match):
    with pytest.raises(error, match=match):
        deer_scan(_F, jnp.ones(3), _X, **kwargs)


def test_a_guess_of_the_answer_takes_one_iteration():
    init = _H, 2 * _H, jnp.array(0.0)

    def f(c, x):
        c, _ = _stack(c, x)
        return c, c

    scan = ft.partial(_parallel, f, init, _X, return_statistics=True)

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


def test_no_guess_is_too_bad_and_none_has_a_derivative():
    case = _CASES["gru"]
    expected = lax.scan(case.step(case.weights), case.init, case.xs)[1]

    @jax.jit
    @jax.vmap
    def solve(value):
        def loss(value):
            guess = expected.at[5].set(value)
            out = _parallel(case.step(case.weights), case.init, case.xs, guess=guess)
            return jnp.sum(out[1]), out[1]

        return jax.grad(loss, has_aux=True)(value)

    slopes, ys = solve(jnp.array([0.0, 1e30, jnp.inf, jnp.nan]))
    assert relative_error(ys, jnp.broadcast_to(expected, ys.shape)) < 1e-13
    np.testing.assert_array_equal(slopes, jnp.zeros(4))


@pytest.mark.parametrize("window", [1, 5])
def test_the_answer_does_not_depend_on_the_window(window):
    scan = ft.partial(_parallel, window=window)
    found = _everything(scan, _CASES["gru"])
    _assert_equal(found, _reference("gru"), 1e-13, 1e-12)


def test_looser_tolerances_take_fewer_iterations_and_keep_their_promise():
    case = _CASES["gru"]
    f = case.step(case.weights)
    solve = ft.partial(_parallel, f, case.init, case.xs, return_statistics=True)
    expected = lax.scan(f, case.init, case.xs)[1]
    loose: Any = {"rtol": 1e-3}, {"rtol": 0.0, "atol": 1e-3}
    _, tight, about = jax.jit(solve)()
    for _, ys, about_loose in jax.jit(lambda: [solve(**how) for how in loose])():
        assert about_loose.num_iterations < about.num_iterations
        assert about_loose.residual < 1e-3
        assert relative_error(tight, expected) < relative_error(ys, expected) < 1e-2


def test_statistics_say_what_has_been_done():
    case = _CASES["tanh"]
    step = case.step(case.weights)
    f = lambda h, x: (step(h, x)[0],) * 2
    solve = ft.partial(deer_scan, f, case.init, case.xs, return_statistics=True)
    for how in ("default", "sequential"):
        _, _, statistics = solve(**_HOW[how])
        assert statistics.num_iterations == 0
        assert statistics.residual == 0
        assert statistics.num_solved == _T
        assert result_is(statistics.result, "successful")
    _, ys, statistics = solve(rtol=1e-4, **_HOW["newton"])
    before = jnp.concatenate([case.init[None], ys[:-1]])
    defects = jax.vmap(lambda y, x: f(y, x)[0])(before, case.xs) - ys
    assert statistics.residual > 1e-14
    np.testing.assert_allclose(
        statistics.residual, jnp.max(jnp.abs(defects)), rtol=1e-6, atol=1e-15
    )
    assert 1 < statistics.num_iterations < _T
    assert statistics.num_solved == _T
    _, _, picard = solve(**_HOW["picard"])
    assert statistics.num_iterations < picard.num_iterations <= _T


def test_it_works_in_single_precision_throughout():
    with jax.enable_x64(False):
        case = _CASES["gru"].cast(jnp.float32)
        f = case.step(case.weights)
        for scan in (deer_scan, _parallel):
            carry, ys, statistics = scan(f, case.init, case.xs, return_statistics=True)
            assert ys.dtype == carry.dtype == statistics.residual.dtype == jnp.float32
            expected = lax.scan(f, case.init, case.xs)
            assert relative_error((carry, ys), expected) < 2e-6


# ---- What is left to `lax.scan`, or needs care ----


@jax.custom_vjp
def _tanh_backwards(x):
    return jnp.tanh(x)


_tanh_backwards.defvjp(
    lambda x: (jnp.tanh(x), x), lambda x, ct: (ct * (1 - jnp.tanh(x) ** 2),)
)


@pytest.mark.parametrize(
    "forward", [None, ParallelForward()], ids=["default", "newton"]
)
@pytest.mark.parametrize("where", ["recurrence", "inputs", "weights"])
def test_what_has_no_tangents_still_has_gradients(where, forward):
    # A `jax.custom_vjp` cannot be linearized.
    parameters = {
        "w": jnp.array([[0.4, -0.8], [0.5, 0.3]]),
        "xs": jnp.cos(jnp.arange(24.0)).reshape(12, 2),
    }
    of = {"recurrence": jnp.tanh, "inputs": jnp.tanh, "weights": jnp.tanh}
    of |= {where: _tanh_backwards}

    def run(scan, parameters):
        def step(carry, x):
            state, total = carry
            product = of["weights"](parameters["w"]) @ state
            state = of["recurrence"](product + of["inputs"](x))
            return (state, total + jnp.sum(state)), state

        (_, total), states = scan(step, (jnp.zeros(2), 0.0), parameters["xs"])
        return states + total

    solve = ft.partial(run, ft.partial(deer_scan, forward=forward))
    plain = ft.partial(run, lax.scan)
    assert relative_error(jax.jit(solve)(parameters), plain(parameters)) < 1e-13
    got, expected = (
        jax.jit(jax.grad(ft.partial(weighted_loss, f)))(parameters)
        for f in (solve, plain)
    )
    assert relative_error(got, expected) < 1e-12


def test_blocks_leave_an_accumulator_alone():
    xs = jnp.cos(jnp.arange(24.0)).reshape(8, 3)

    def step(carry, x):
        state, total = carry
        state = jnp.tanh(jnp.roll(state, 1) + x[:2])
        return (state, total + x[2]), state

    init = jnp.zeros(2), jnp.array(0.0)
    blocks = BlockDiagonalJacobian(block_size=2)
    got = deer_scan(step, init, xs, linearization=blocks, forward=ParallelForward())
    assert relative_error(got, lax.scan(step, init, xs)) < 1e-13


def test_a_guess_of_another_type_is_converted():
    step = lambda state, x: (jnp.tanh(state + x), None)
    xs, guess = jnp.arange(5.0), jnp.ones(5, int)
    got = deer_scan(step, jnp.array(0.1), xs, guess=guess, forward=ParallelForward())
    assert relative_error(got, lax.scan(step, jnp.array(0.1), xs)) < 1e-14


@pytest.mark.parametrize("size", [4, 40])
def test_a_carry_that_recovers_from_infinity_is_a_failure(size):
    # Small enough for the parallel gradient, and large enough for `lax.scan` itself.
    def step(carry, x):
        carry = jnp.where(jnp.isfinite(carry), carry, 0.0)
        carry = jnp.tanh(carry @ jnp.ones((size, size)) / size) + x
        return carry, carry

    xs = jnp.zeros((10, size)).at[3].set(jnp.inf)
    run = jax.jit(ft.partial(deer_scan, step), static_argnames="throw")
    with pytest.raises(Exception, match="infinite or NaN"):
        jax.block_until_ready(run(jnp.zeros(size), xs, throw=True))
    _, ys = run(jnp.zeros(size), xs, throw=False)
    np.testing.assert_array_equal(jnp.isfinite(ys[:, 0]), jnp.arange(10) < 3)
