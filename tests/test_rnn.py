"""`DEERRNN` is a loop over its cell."""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jaxtyping import Array, PyTree

from diffrax_deer import (
    DEERRNN,
    AssociativeScan,
    DiagonalJacobian,
    MatrixFreeGradient,
    Newton,
    ParallelGradient,
    Sequential,
)

from .helpers import relative_error, weighted_loss

_T = 20
_XS = jnp.asarray(np.random.default_rng(0).normal(size=(_T, 3)))
_KEY = jax.random.key(0)
_CELLS = {
    "gru": eqx.nn.GRUCell(3, 4, key=_KEY),
    "lstm": eqx.nn.LSTMCell(3, 4, key=_KEY),
}
_HOW: dict[str, dict[str, Any]] = {
    "default": {},
    "newton": {"method": Newton(), "gradient": ParallelGradient()},
    "diagonal": {
        "method": Newton(DiagonalJacobian(), AssociativeScan(), rtol=1e-13),
        "gradient": MatrixFreeGradient(rtol=1e-13),
    },
}
each_cell = pytest.mark.parametrize("name", _CELLS)


def _start(cell: Any) -> PyTree[Array]:
    zero = jnp.zeros(4, cell.weight_hh.dtype)
    return (zero, zero) if isinstance(cell, eqx.nn.LSTMCell) else zero


def _loop(cell: Callable, xs: PyTree[Array], init: PyTree[Array]) -> PyTree[Array]:
    """The states after each step, by a loop of Python."""
    states, state = [], init
    for i in range(_T):
        state = cell(jax.tree.map(lambda x, i=i: x[i], xs), state)
        states.append(state)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def _scan(cell: Callable, xs: PyTree[Array], init: PyTree[Array]) -> PyTree[Array]:
    """The same as `_loop`, faster to compile."""
    return lax.scan(lambda state, x: (cell(x, state),) * 2, init, xs)[1]


def _loss(states: PyTree[Array]) -> Array:
    losses = [weighted_loss(lambda x: x, x) for x in jax.tree.leaves(states)]
    return jnp.sum(jnp.stack(losses))


@pytest.mark.parametrize(
    ("name", "how"),
    [(name, how) for name in _CELLS for how in ("default", "newton")]
    + [("lstm", "diagonal")],
)
def test_states_and_gradient_are_those_of_lax_scan_over_the_cell(name, how):
    @eqx.filter_jit
    @ft.partial(eqx.filter_grad, has_aux=True)
    def gradient(model, xs, run):
        layer, init = model
        states = run(layer, xs, init)
        return _loss(states), states

    cell = _CELLS[name]
    # Without an initial state it starts with zeros.
    found, states = gradient(
        (DEERRNN(cell, **_HOW[how]), None), _XS, lambda layer, xs, init: layer(xs, init)
    )
    expected, wanted = gradient((cell, _start(cell)), _XS, _scan)
    assert jax.tree.structure(states) == jax.tree.structure(wanted)
    assert relative_error(states, wanted) < 1e-12
    # The weights of the cell are the only parameters of the layer.
    found, expected = jax.tree.leaves(found), jax.tree.leaves(expected[0])
    assert relative_error(found, expected) < 1e-11


@each_cell
def test_initial_state_is_where_a_loop_over_the_cell_starts(name):
    cell = _CELLS[name]
    init = jax.tree.map(lambda x: x + 0.5, _start(cell))
    found = eqx.filter_jit(DEERRNN(cell))(_XS, init)
    assert relative_error(found, _loop(cell, _XS, init)) < 1e-14


def test_layers_are_stacked_by_composition_and_read_in_both_directions():
    cells = [
        eqx.nn.GRUCell(size, 4, key=jax.random.key(i))
        for i, size in enumerate((3, 4, 8))
    ]

    @eqx.filter_jit
    @ft.partial(eqx.filter_value_and_grad, has_aux=True)
    def network(cells, forwards, backwards):
        below = forwards(cells[0], _XS)
        sides = forwards(cells[1], below), backwards(cells[1], below)
        states = forwards(cells[2], jnp.concatenate(sides, axis=1))
        return _loss(states), (*sides, states)

    def turned(cell, xs):
        return _scan(cell, xs[::-1], jnp.zeros(4))[::-1]

    found = network(
        cells,
        lambda cell, xs: DEERRNN(cell, **_HOW["default"])(xs),
        lambda cell, xs: DEERRNN(cell, reverse=True, **_HOW["newton"])(xs),
    )
    expected = network(cells, lambda cell, xs: _scan(cell, xs, jnp.zeros(4)), turned)
    assert relative_error(found, expected) < 1e-11
    sides = found[0][1]
    assert relative_error(sides[0], sides[1]) > 0.1


def test_batches_and_ensembles_are_vmap():
    make = lambda key: DEERRNN(eqx.nn.GRUCell(3, 4, key=key), **_HOW["newton"])
    layers = eqx.filter_vmap(make)(jax.random.split(_KEY, 3))
    batch = jnp.stack([_XS, -_XS])

    @eqx.filter_jit
    def both(layers):
        one = lambda layer: jax.vmap(layer)(batch)
        loop = lambda layer: _scan(layer.cell, _XS, jnp.zeros(4))
        return eqx.filter_vmap(one)(layers), eqx.filter_vmap(loop)(layers)

    found, expected = both(layers)
    assert found.shape == (3, 2, _T, 4)
    assert relative_error(found[:, 0], expected) < 1e-12


class _Custom(eqx.Module):
    """A cell of two coupled leaves, driven by two inputs."""

    weight: Array

    def __call__(self, x, state):
        fast, slow = state["fast"], state["slow"]
        fast = jnp.tanh(self.weight @ fast + slow + x["up"])
        return {"fast": fast, "slow": 0.9 * slow + 0.1 * jnp.mean(fast) - x["down"]}


def test_cell_may_be_any_function_if_it_is_told_where_to_start():
    cell = _Custom(jax.random.normal(_KEY, (3, 3)))
    xs = {"up": _XS, "down": 0.1 * _XS[:, 0]}
    init = {"fast": jnp.ones(3), "slow": jnp.array(0.5)}
    layer = DEERRNN(cell, method=Newton())
    found = eqx.filter_jit(layer)(xs, init)
    assert relative_error(found, _loop(cell, xs, init)) < 1e-12
    function = DEERRNN(lambda x, h: jnp.sin(h + x[0]))
    expected = _loop(function.cell, _XS, jnp.array(1.0))
    assert relative_error(function(_XS, jnp.array(1.0)), expected) < 1e-14


def test_cell_that_does_not_say_where_it_starts_is_refused():
    match = "`_Custom` does not say how it starts.*Pass the initial state"
    with pytest.raises(TypeError, match=match):
        DEERRNN(_Custom(jnp.ones((3, 3))))(_XS)
    with pytest.raises(TypeError, match="`function` does not say how it starts"):
        DEERRNN(lambda x, h: h)(_XS)


def test_wrong_arguments_are_refused_as_by_deer_scan():
    cell: Any = _CELLS["gru"]
    method: Any = Sequential
    with pytest.raises(TypeError, match="class `Sequential`"):
        DEERRNN(cell, method=method)(_XS)
    with pytest.raises(ValueError, match=r"leaves of shapes \(20, 4\)"):
        DEERRNN(cell)(_XS, guess=jnp.ones((_T, 3)))


def test_guess_of_the_states_is_confirmed_by_a_single_iteration():
    cell = _CELLS["lstm"]
    expected = _scan(cell, _XS[::-1], _start(cell))
    expected = jax.tree.map(lambda x: x[::-1], expected)
    method = Newton(max_iterations=1)
    layer = DEERRNN(cell, reverse=True, method=method, throw=False)
    run = eqx.filter_jit(lambda guess: layer(_XS, guess=guess))
    assert relative_error(run(expected), expected) < 1e-13
    assert not np.all(np.isfinite(jax.tree.leaves(run(None))[0]))


def test_states_in_single_precision_have_the_type_of_the_weights():
    cell = jax.tree.map(lambda x: x.astype(jnp.float32), _CELLS["lstm"])
    xs = _XS.astype(jnp.float32)
    found = eqx.filter_jit(DEERRNN(cell, method=Newton()))(xs)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(found))
    tolerance = 20 * float(jnp.finfo(jnp.float32).eps)
    assert relative_error(found, _scan(cell, xs, _start(cell))) < tolerance


def _explode(x, h):
    return jnp.roll(h, 1) ** 2 + x


@pytest.mark.raises
def test_overflow_is_an_error():
    run = eqx.filter_jit(DEERRNN(_explode))
    with pytest.raises(Exception, match="a carry became infinite or NaN"):
        jax.block_until_ready(run(_XS, 9 * jnp.ones(3)))


def test_overflow_is_nan_from_there_on_if_it_is_asked_for():
    states = DEERRNN(_explode, throw=False)(_XS, 9 * jnp.ones(3))
    finite = np.all(np.isfinite(_loop(_explode, _XS, 9 * jnp.ones(3))), axis=1)
    assert 0 < np.argmin(finite) < _T
    np.testing.assert_array_equal(np.all(np.isfinite(states), axis=1), finite)
