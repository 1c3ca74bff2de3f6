"""What a vector field depends on, and in which order it multiplies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from diffrax_deer._dataflow import (
    Program,
    arguments_first,
    influences,
    without_dead_code,
)

from .helpers import primitives, random_like, relative_error


def test_dead_code_is_not_even_traced_again():
    def f(x, y):
        return jnp.sin(x["a"]), lax.erf(y)

    x = {"a": jnp.ones(2), "b": jnp.zeros(3)}
    lean = without_dead_code(lambda x, y: f(x, y)[0])
    jaxpr = jax.make_jaxpr(jax.grad(lambda x, y: jnp.sum(lean(x, y))))(x, jnp.ones(1))
    names = {equation.primitive.name for equation in primitives(jaxpr)}
    assert "cos" in names
    assert "erf" not in names
    np.testing.assert_array_equal(lean(x, jnp.ones(1)), jnp.sin(x["a"]))
    assert influences(lambda x: f(x, jnp.ones(1)), x) == {"a": True, "b": False}


_RNG = np.random.default_rng(0)
_W = jnp.asarray(_RNG.normal(size=(4, 3)))
_CUBE = jnp.asarray(_RNG.normal(size=(2, 4, 3)))
_Y = jnp.asarray(_RNG.normal(size=12))


def _layers(y):
    out = jax.nn.softplus(_W @ y[:3])
    return jnp.tanh(_W.T @ out + 1)


def _loop(y):
    body = lambda y, _: (jnp.tanh(_CUBE[0].T @ (_W @ y)), None)
    return lax.scan(body, y[:3], None, 2)[0]


_FIELDS = {
    "layers": _layers,
    "jitted": jax.jit(_layers),
    "recomputed": jax.checkpoint(_layers),
    "loop": _loop,
    "branch": lambda y: lax.cond(y[0] > 0, _layers, lambda y: y[:3], y),
    "matrix": lambda y: _W @ y.reshape(3, 4),
    "batch of products": lambda y: _CUBE @ y.reshape(3, 4),
    "einsum": lambda y: jnp.einsum("bij,bkj->bik", _CUBE, y.reshape(2, 2, 3)),
    "two axes": lambda y: jnp.tensordot(_CUBE, y.reshape(3, 4, 1), ((2, 1), (0, 1))),
    "precise": lambda y: jnp.matmul(_W, y[:3], precision=("highest", "default")),
    "state on the left": lambda y: y[:4] @ _W,
    "state on both sides": lambda y: y.reshape(4, 3) @ (_W @ y[:3])[:3],
    "jacobian": lambda y: jax.jacfwd(_layers)(y[:3]) @ y[:3],
    "constant": lambda y: {"a": jnp.ones(2), "b": (y, 2 * _W @ jnp.ones(3))},
}


@pytest.mark.parametrize("field", _FIELDS.values(), ids=_FIELDS.keys())
def test_swapped_products_are_the_same_numbers(field):
    swapped = arguments_first(field)
    expected = field(_Y)
    assert jax.eval_shape(swapped, _Y) == jax.eval_shape(field, _Y)
    assert relative_error(swapped(_Y), expected) < 1e-14
    ys = jnp.stack([_Y, -_Y, 0.5 * _Y]).reshape(3, 1, 12)
    nested = lambda f: jax.jit(jax.vmap(jax.vmap(f)))(ys)
    assert relative_error(nested(swapped), nested(field)) < 1e-14

    def derivatives(f):
        total = lambda y: sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(f(y)))
        _, tangent = jax.jvp(f, (_Y,), (random_like(_Y),))
        return tangent, jax.grad(total)(_Y), jax.hessian(total)(_Y)

    assert relative_error(derivatives(swapped), derivatives(field)) < 1e-13


def _products(f, *args):
    """The operands of all products of `f`, by their numbers of axes."""
    equations = primitives(jax.make_jaxpr(f)(*args))
    products = [e for e in equations if e.primitive.name == "dot_general"]
    return [tuple(v.aval.ndim for v in e.invars) for e in products]


@pytest.mark.parametrize("field", [_layers, jax.jit(_layers)], ids=["plain", "jitted"])
def test_the_axes_of_batch_and_time_stay_in_front(field):
    assert _products(field, _Y) == [(2, 1)] * 2
    assert _products(arguments_first(field), _Y) == [(1, 2)] * 2
    nested = jax.vmap(jax.vmap(arguments_first(field)))
    equations = primitives(jax.make_jaxpr(nested)(jnp.ones((5, 7, 12))))
    batched = [e for e in equations if e.outvars[0].aval.ndim == 3]
    assert len(batched) > 5
    assert all(e.primitive.name != "transpose" for e in batched)
    assert all(e.outvars[0].aval.shape[:2] == (5, 7) for e in batched)


def test_without_the_swap_they_do_not():
    jaxpr = jax.make_jaxpr(jax.vmap(jax.vmap(_layers)))(jnp.ones((5, 7, 12)))
    products = [e for e in primitives(jaxpr) if e.primitive.name == "dot_general"]
    assert all(e.outvars[0].aval.shape[:2] != (5, 7) for e in products)


def test_products_of_weights_alone_are_left_as_they_are():
    def field(y, weights):
        return (_W.T @ weights) @ y[:3]

    # Here the weights are an argument, and there they are not.
    assert _products(arguments_first(field), _Y, _W) == [(2, 2), (2, 1)]
    closed = lambda y: arguments_first(lambda y: field(y, _W))(y)
    assert _products(closed, _Y) == [(2, 2), (1, 2)]


def _program(c, x):
    # Of each other: a; then b, which knows a; a sum of b; a constant; a counter.
    a, b, total, constant, count = c
    a = jnp.tanh(_W.T @ (_W @ a) + constant + _CUBE[0].T @ x)
    b = jax.checkpoint(lambda a, b: jnp.sin(a * b))(a, b)
    new = a, b, total + jnp.sum(b), constant, count + 1
    return new, (2.0, jnp.exp(x), total * a)


_CARRY = _Y[:3], _Y[3:6], jnp.array(0.5), _Y[6:9], jnp.array(2)
_X = _Y[:4]
_INPUTS = [*_CARRY, _X]


def _named(numbers: str) -> list[set[int]]:
    """One word per output, of the letters of the inputs: a b s k n x, or a dash."""
    return [{"absknx".index(i) for i in word if i != "-"} for word in numbers.split()]


def test_dependencies_are_those_of_dataflow():
    program = Program(_program, _CARRY, _X)
    expected = _named("akx abkx abskx k n - x askx")
    assert program.dependencies() == expected
    passes = [program.passes_on(i) for i in range(5)]
    assert passes == [False, False, False, True, False]


def test_dependencies_are_found_within_loops_and_branches():
    def f(c, x):
        loop = lambda c, _: ((jnp.sin(c[0]), c[1] * c[0], c[2]), None)
        a, b, k = lax.scan(loop, c, None, 2)[0]
        swap = lambda a, b, k: (a, k, b)
        _, b, k = lax.cond(x > 0, swap, lambda a, b, k: (a, b, k), a, b, k)
        return a, b, k, k

    c = jnp.array(1.0), jnp.array(2.0), jnp.array(3.0)
    program = Program(f, c, jnp.array(1.0))
    expected = [{0}, {0, 1, 2, 3}, {0, 1, 2, 3}, {0, 1, 2, 3}]
    assert program.dependencies() == expected


def test_an_exchange_passes_nothing_on():
    program = Program(lambda c, x: (c[1], c[0], c[2] + x), (_Y,) * 3, 1.0)
    assert not any(program.passes_on(i) for i in range(3))
    assert program.dependencies() == [{1}, {0}, {2, 3}]


_SPLITS = {
    "a layer": ([0], [0], []),
    "the next one": ([1], [1], [0]),
    "the next one, first unknown": ([1], [0, 1], []),
    "sum": ([2], [2], [0, 1]),
    "constant": ([3], [3], []),
    "counter": ([4], [4], []),
    "together": ([0, 1], [0, 1], []),
    "outputs": ([5, 6, 7], [], [0, 1, 2, 3, 4]),
    "outputs twice": ([6, 6, 5], [], [0]),
    "everything": (list(range(8)), list(range(5)), []),
    "at once": (list(range(8)), list(range(6)), []),
    "in advance": (list(range(8)), [], []),
}


@pytest.mark.parametrize(("outputs", "by", "known"), _SPLITS.values(), ids=_SPLITS)
def test_early_and_late_together_are_the_program(outputs, by, known):
    program = Program(_program, _CARRY, _X)
    expected = jax.tree.leaves(_program(_CARRY, _X))
    early, late = program.split(outputs, by, known)
    # Only what is needed has to be there.
    needed = set().union(*(program.dependencies()[i] for i in outputs)) - set(by)
    inputs = {i: _INPUTS[i] for i in needed}
    first = early(inputs, {i: jnp.asarray(expected[i]) for i in known})
    found = late(first, [_INPUTS[i] for i in by])
    assert len(found) == len(outputs)
    for i, value in zip(outputs, found, strict=True):
        assert value is expected[i] or relative_error(value, expected[i]) < 1e-14


def _names(f, *args):
    return [e.primitive.name for e in primitives(jax.make_jaxpr(f)(*args))]


def test_early_is_all_that_does_not_depend_on_what_comes_late():
    program = Program(_program, _CARRY, _X)
    early, late = program.split([0], [0])
    inputs = {3: _CARRY[3], 5: _X}
    assert _names(early, inputs, {}).count("dot_general") == 1
    assert "tanh" not in _names(early, inputs, {})
    first = early(inputs, {})
    names = _names(late, first, [_CARRY[0]])
    assert names.count("dot_general") == 2
    assert names.count("tanh") == 1


def test_what_is_known_is_not_evaluated_again():
    program = Program(_program, _CARRY, _X)
    early, late = program.split([1], [1], [0])
    marked = jnp.full(3, 7.0)
    first = early({}, {0: marked})
    assert _names(early, {}, {0: marked}) == []
    assert "dot_general" not in _names(late, first, [_CARRY[1]])
    expected = jnp.sin(marked * _CARRY[1])
    assert relative_error(late(first, [_CARRY[1]]), [expected]) < 1e-15


_WITH_OTHERS = jnp.arange(3.0)
_ELEMENTWISE = {
    "tanh": lambda h, x: jnp.tanh(x * h + x),
    "silu": lambda h, x: jax.nn.silu(h) + x,
    "gelu": lambda h, x: jax.nn.gelu(h * x),
    "softplus": lambda h, x: jax.nn.softplus(h) - x,
    "choice": lambda h, x: jnp.where(h > x[0], h, x),
    "clipped": lambda h, x: jnp.clip(h, -1.0, x[0]),
    "coupled inputs": lambda h, x: h * jnp.sum(x) + jnp.sort(x) + x[::-1],
    "no past": lambda h, x: jnp.cumsum(x),
    "integers": lambda h, x: h * (h > 0).astype(jnp.int32).astype(h.dtype),
    "powers": lambda h, x: h**2 + h**2.5 + _WITH_OTHERS,
}
_NOT_ELEMENTWISE = {
    "roll": lambda h, x: jnp.roll(h, 1),
    "reverse": lambda h, x: h[::-1] + x,
    "cumsum": lambda h, x: jnp.cumsum(h),
    "product": lambda h, x: _W.T @ (_W @ h),
    "sum": lambda h, x: h + jnp.sum(h),
    "largest": lambda h, x: h / jnp.max(jnp.abs(h)),
    "sort": lambda h, x: jnp.sort(h),
    "one entry": lambda h, x: h[0] * x,
    "softmax": lambda h, x: jax.nn.softmax(h),
    "gather": lambda h, x: h[jnp.array([2, 0, 1])],
    "choice by one": lambda h, x: jnp.where(h[0] > 0, h, x),
    "loop": lambda h, x: lax.fori_loop(0, 3, lambda _, h: h[::-1], h),
    "there and back": lambda h, x: jnp.concatenate([h[1:], h[:1]]),
    "convolution": lambda h, x: jnp.convolve(h, x, mode="same"),
}


@pytest.mark.parametrize("name", [*_ELEMENTWISE, *_NOT_ELEMENTWISE])
def test_elementwise_is_what_has_a_diagonal_jacobian(name):
    f = (_ELEMENTWISE | _NOT_ELEMENTWISE)[name]
    h, x = jnp.array([0.3, 1.2, -0.4]), jnp.array([1.1, 0.2, 0.7])
    for traced in (f, jax.jit(f)):
        found = Program(traced, h, x).is_elementwise([0], [0])
        assert found == (name in _ELEMENTWISE)
    jacobian = jax.jacfwd(f)(jnp.abs(h), x)
    off_diagonal = jacobian - jnp.diag(jnp.diagonal(jacobian))
    if name in _ELEMENTWISE:
        assert jnp.all(off_diagonal == 0)


def test_a_transpose_has_the_right_shape_and_the_wrong_entries():
    h = jnp.ones((3, 3))
    assert not Program(lambda h: jnp.sin(h.T), h).is_elementwise([0], [0])
    assert not Program(lambda h: h.reshape(9).reshape(3, 3), h).is_elementwise([0], [0])
    assert Program(jnp.sin, h).is_elementwise([0], [0])


def test_elementwise_in_itself_may_be_driven_by_anything_that_is_known():
    f = lambda c: (_W.T @ (_W @ c[0]), jnp.tanh(c[1] + jnp.cumsum(_W.T @ (_W @ c[0]))))
    program = Program(f, (_Y[:3], _Y[3:6]))
    assert program.is_elementwise([1], [1], known=[0])
    assert program.is_elementwise([1], [1])
    assert not program.is_elementwise([0], [0])
    # Of several leaves that know each other no one is alone.
    assert not program.is_elementwise([0, 1], [0, 1])
    # The second reaches itself by way of the first, unless that is known.
    g = lambda c: (lambda a: (a, jnp.sin(c[1] + a)))(jnp.cumsum(c[0] + c[1]))
    program = Program(g, (_Y[:3], _Y[3:6]))
    assert not program.is_elementwise([1], [1])
    assert program.is_elementwise([1], [1], known=[0])
