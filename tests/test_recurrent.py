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
    ParallelForward,
    SequentialForward,
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
    "newton": {"forward": ParallelForward()},
    "diagonal": {
        "forward": ParallelForward(),
        "linearization": DiagonalJacobian(),
        "scan": AssociativeScan(),
        "rtol": 1e-13,
    },
}
each_cell = pytest.mark.parametrize("name", _CELLS)
each_way = pytest.mark.parametrize("how", _HOW.values(), ids=_HOW.keys())


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


@each_cell
@each_way
def test_the_states_are_those_of_a_loop_over_the_cell(name, how):
    cell = _CELLS[name]
    found = eqx.filter_jit(DEERRNN(cell, **how))(_XS)
    expected = _loop(cell, _XS, _start(cell))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert relative_error(found, expected) < 1e-12


@each_cell
def test_it_starts_where_it_is_told_to(name):
    cell = _CELLS[name]
    init = jax.tree.map(lambda x: x + 0.5, _start(cell))
    found = eqx.filter_jit(DEERRNN(cell))(_XS, init)
    assert relative_error(found, _loop(cell, _XS, init)) < 1e-14


@each_cell
@pytest.mark.parametrize("how", ["default", "newton"])
def test_its_gradient_is_that_of_lax_scan(name, how):
    @eqx.filter_jit
    @ft.partial(eqx.filter_grad, has_aux=True)
    def gradient(model, xs, run):
        layer, init = model
        states = run(layer, xs, init)
        return _loss(states), states

    cell = _CELLS[name]
    layer = DEERRNN(cell, **_HOW[how])
    found, states = gradient(
        (layer, _start(cell)), _XS, lambda layer, xs, init: layer(xs, init)
    )
    expected, wanted = gradient((cell, _start(cell)), _XS, _scan)
    # The weights of the cell are the only parameters of the layer.
    found, expected = jax.tree.leaves(found), jax.tree.leaves(expected)
    assert relative_error(states, wanted) < 1e-12
    assert relative_error(found, expected) < 1e-11


@pytest.mark.parametrize("how", ["default", "newton"])
def test_layers_are_stacked_by_composition_and_read_in_both_directions(how):
    first, second, third = (
        eqx.nn.GRUCell(size, 4, key=jax.random.key(i))
        for i, size in enumerate((3, 4, 8))
    )

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
        (first, second, third),
        lambda cell, xs: DEERRNN(cell, **_HOW[how])(xs),
        lambda cell, xs: DEERRNN(cell, reverse=True, **_HOW[how])(xs),
    )
    expected = network(
        (first, second, third), lambda cell, xs: _scan(cell, xs, jnp.zeros(4)), turned
    )
    assert relative_error(found, expected) < 1e-11
    sides = found[0][1]
    assert relative_error(sides[0], sides[1]) > 0.1


@each_cell
def test_a_batch_is_vmap(name):
    cell = _CELLS[name]
    batch = jnp.stack([_XS, -_XS, 3 * _XS])
    layer = DEERRNN(cell, forward=ParallelForward())
    found = jax.jit(lambda batch: jax.vmap(layer)(batch))(batch)
    expected = jax.vmap(lambda xs: _scan(cell, xs, _start(cell)))(batch)
    assert relative_error(found, expected) < 1e-12


def test_an_ensemble_of_cells_is_vmap_as_well():
    make = lambda key: DEERRNN(eqx.nn.GRUCell(3, 4, key=key), forward=ParallelForward())
    layers = eqx.filter_vmap(make)(jax.random.split(_KEY, 3))
    found = eqx.filter_jit(eqx.filter_vmap(lambda layer: layer(_XS)))(layers)
    one = lambda layer: _scan(layer.cell, _XS, jnp.zeros(4))
    assert relative_error(found, eqx.filter_vmap(one)(layers)) < 1e-12


class _Custom(eqx.Module):
    """A cell of two coupled leaves, driven by two inputs."""

    weight: Array

    def __call__(self, x, state):
        fast, slow = state["fast"], state["slow"]
        fast = jnp.tanh(self.weight @ fast + slow + x["up"])
        return {"fast": fast, "slow": 0.9 * slow + 0.1 * jnp.mean(fast) - x["down"]}


def test_any_cell_will_do_if_it_is_told_where_to_start():
    cell = _Custom(jax.random.normal(_KEY, (3, 3)))
    xs = {"up": _XS, "down": 0.1 * _XS[:, 0]}
    init = {"fast": jnp.ones(3), "slow": jnp.array(0.5)}
    layer = DEERRNN(cell, forward=ParallelForward())
    found = eqx.filter_jit(layer)(xs, init)
    assert relative_error(found, _loop(cell, xs, init)) < 1e-12
    function = DEERRNN(lambda x, h: jnp.sin(h + x[0]))
    expected = _loop(function.cell, _XS, jnp.array(1.0))
    assert relative_error(function(_XS, jnp.array(1.0)), expected) < 1e-14


def test_a_cell_that_does_not_say_where_it_starts_is_refused():
    match = "`_Custom` does not say how it starts.*Pass the initial state"
    with pytest.raises(TypeError, match=match):
        DEERRNN(_Custom(jnp.ones((3, 3))))(_XS)
    with pytest.raises(TypeError, match="`function` does not say how it starts"):
        DEERRNN(lambda x, h: h)(_XS)


def test_wrong_arguments_are_refused_as_by_deer_scan():
    cell: Any = _CELLS["gru"]
    forward: Any = SequentialForward
    with pytest.raises(TypeError, match="class `SequentialForward`"):
        DEERRNN(cell, forward=forward)(_XS)
    with pytest.raises(ValueError, match="`max_iterations` must be at least 1"):
        DEERRNN(cell, max_iterations=0)(_XS)
    with pytest.raises(ValueError, match=r"leaves of shapes \(20, 4\)"):
        DEERRNN(cell)(_XS, guess=jnp.ones((_T, 3)))


@pytest.mark.parametrize("reverse", [False, True])
@each_cell
def test_with_the_states_for_a_guess_a_single_iteration_suffices(name, reverse):
    cell = _CELLS[name]
    xs = _XS[::-1] if reverse else _XS
    expected = _scan(cell, xs, _start(cell))
    if reverse:
        expected = jax.tree.map(lambda x: x[::-1], expected)
    layer = DEERRNN(
        cell, reverse=reverse, forward=ParallelForward(), max_iterations=1, throw=False
    )
    run = eqx.filter_jit(lambda guess: layer(_XS, guess=guess))
    assert relative_error(run(expected), expected) < 1e-13
    assert not np.all(np.isfinite(jax.tree.leaves(run(None))[0]))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@each_cell
def test_the_states_have_the_type_of_the_weights(name, dtype):
    cell = jax.tree.map(lambda x: x.astype(dtype), _CELLS[name])
    xs = _XS.astype(dtype)
    found = eqx.filter_jit(DEERRNN(cell, forward=ParallelForward()))(xs)
    assert all(x.dtype == dtype for x in jax.tree.leaves(found))
    tolerance = 20 * float(jnp.finfo(dtype).eps)
    assert relative_error(found, _scan(cell, xs, _start(cell))) < tolerance


def test_a_state_that_overflows_is_an_error_unless_it_is_asked_for():
    cell = lambda x, h: jnp.roll(h, 1) ** 2 + x
    layer = DEERRNN(cell)
    with pytest.raises(Exception, match="a carry became infinite or NaN"):
        jax.block_until_ready(eqx.filter_jit(layer)(_XS, jnp.ones(3)))
    states = DEERRNN(cell, throw=False)(_XS, 9 * jnp.ones(3))
    finite = np.all(np.isfinite(_loop(cell, _XS, 9 * jnp.ones(3))), axis=1)
    assert 0 < np.argmin(finite) < _T
    np.testing.assert_array_equal(np.all(np.isfinite(states), axis=1), finite)
