"""What a vector field depends on, and in which order it multiplies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from diffrax_deer._dataflow import arguments_first, influences, without_dead_code

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
