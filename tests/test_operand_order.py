"""Products with what depends on the arguments first: the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np

from diffrax_deer._linalg.operand_order import arguments_first

from .oracle import assert_equal

_RNG = np.random.default_rng(0)
_W = jnp.asarray(_RNG.normal(size=(5, 3)))
_STACK = jnp.asarray(_RNG.normal(size=(4, 2, 3)))


def _f(y, z):
    inner = jax.jit(lambda y: jnp.tanh(_W @ y))
    batched = jnp.einsum("bij,bj->bi", _STACK, jnp.stack([y, 2 * y, y**2, -y]))
    free = jnp.einsum("bij,jk->bik", _STACK, jnp.stack([y, z, y * z], axis=1))
    looped = jax.lax.fori_loop(0, 3, lambda _, y: y + _W.T @ (_W @ y), z)
    constant = _W.T @ _W
    return {"a": inner(y), "b": (batched, free), "c": looped, "d": constant * y[0]}


def _products(f, *args):
    """The shapes of the operands of all products outside of loops."""
    shapes = []

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                shapes.append(tuple(v.aval.shape for v in equation.invars))
            if equation.primitive.name == "jit":
                visit(equation.params["jaxpr"].jaxpr)

    visit(jax.make_jaxpr(f)(*args).jaxpr)
    return shapes


def test_values_and_derivatives_are_the_same():
    y, z = jnp.asarray(_RNG.normal(size=(2, 6, 3)))
    for f in (_f, jax.jacrev(_f), jax.jacfwd(_f, argnums=1)):
        found = jax.jit(jax.vmap(arguments_first(f)))(y, z)
        assert_equal(found, jax.jit(jax.vmap(f))(y, z), 1e-13)


def test_operands_change_places_only_where_the_second_alone_depends_on_arguments():
    y = jnp.ones(3)
    assert ((5, 3), (3,)) in _products(_f, y, y)
    found = _products(arguments_first(_f), y, y)
    assert ((3,), (5, 3)) in found
    assert ((5, 3), (3,)) not in found
    # A product of constants, and one that has the argument first already.
    assert ((3, 5), (5, 3)) in found
    first = lambda y: y @ _W.T
    assert _products(arguments_first(first), y) == _products(first, y)
