"""The diagonal blocks of the Jacobian, and the order of the state that they need."""

import functools as ft
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from diffrax_deer._blocks import BlockDiagonalJacobian
from diffrax_deer._forward import ParallelForward
from diffrax_deer._implicit import solve
from diffrax_deer._linearization import StepMap
from diffrax_deer._step_map import ravel

from .helpers import (
    constant_guess,
    newton,
    relative_error,
    result_is,
    sequential,
)


def _pytree_step(f: Any, y0: Any) -> tuple[StepMap, jax.Array]:
    """The step `f` of pytrees like `y0` on the ravelled state, and that of `y0`."""
    flat, unravel = ravel(y0)
    leaves = tuple(jax.tree.leaves(jax.eval_shape(unravel, flat)))
    step = lambda x, y: ravel(f(x, unravel(y)))[0]
    return StepMap(step, leaves=leaves), flat


def _samples(x, y):
    """Points that rotate and contract, each by itself, and their log densities."""
    points, density = y
    turned = jnp.stack([points[:, 1], -points[:, 0]], axis=1)
    points = points + x * jnp.tanh(turned - points * jnp.exp(density / 9)[:, None])
    return points, density - x * jnp.sum(points**2, axis=1) + x * jnp.sin(density)


def _layers(x, y):
    """Leaves of several sizes, one of them complex, that do not couple."""
    matrix, phase, scalar = y["matrix"], y["phase"], y["scalar"]
    return {
        "matrix": matrix + x * jnp.tanh(matrix.T + jnp.sum(matrix)),
        "phase": phase * jnp.exp(jax.lax.complex(0 * x, 2 * x) * (1 + phase[::-1])),
        "scalar": scalar + x * jnp.cos(scalar),
    }


_SAMPLES = (
    jnp.asarray(np.random.default_rng(0).normal(size=(4, 2))),
    jnp.linspace(-1.0, 0.5, 4),
)
_LAYERS = {
    "matrix": jnp.linspace(-0.3, 0.4, 6).reshape(2, 3)[:, :2],
    "phase": jnp.array([0.2 + 0.1j, -0.3j, 0.4 - 0.2j]),
    "scalar": jnp.array(0.7),
}
# Blocks between which nothing couples: those of the Jacobian are all there is to it.
_UNCOUPLED = {
    "samples": (_samples, _SAMPLES, BlockDiagonalJacobian(batch_axis=0)),
    "leaves": (_layers, _LAYERS, BlockDiagonalJacobian()),
    "rows": (
        lambda x, y: y + x * jnp.tanh(jnp.cumsum(y, axis=1)[:, ::-1]),
        _SAMPLES[0],
        BlockDiagonalJacobian(block_size=2),
    ),
}
each_uncoupled = pytest.mark.parametrize("name", _UNCOUPLED)


def _linearize(blocks, step_map, flat, x: Any = 0.3):
    """The transition, as a matrix for the state in its own order."""
    layout = blocks.layout(step_map, flat.size)
    arranged = layout.arranged(step_map)
    linearization = BlockDiagonalJacobian(block_size=layout.block_size)
    y = layout.arrange(flat)
    transition = jax.jit(ft.partial(linearization, arranged, x))(y, y)
    matrix = scipy.linalg.block_diag(*np.asarray(transition))
    restore = jax.vmap(layout.restore)
    return transition, restore(restore(matrix).T).T


@each_uncoupled
def test_blocks_that_do_not_couple_are_the_whole_jacobian(name):
    f, y0, blocks = _UNCOUPLED[name]
    step_map, flat = _pytree_step(f, y0)
    _, matrix = _linearize(blocks, step_map, flat)
    jacobian = jax.jacrev(ft.partial(step_map.step, 0.3))(flat)
    assert relative_error(matrix, jacobian) < 1e-14


@each_uncoupled
def test_blocks_that_do_not_couple_converge_like_newton(name):
    f, y0, blocks = _UNCOUPLED[name]
    step_map, flat = _pytree_step(f, y0)
    xs = jnp.linspace(0.05, 0.15, 50)

    @jax.jit
    def compute(flat):
        guess = constant_guess(flat, 50)
        iteration = newton(blocks, tolerance=1e-12)
        run = ft.partial(solve, step_map, flat, xs, guess, ParallelForward())
        return run(iteration), run(newton(tolerance=1e-12))[1]

    (ys, statistics, _), reference = compute(flat)
    assert result_is(statistics.result, "successful")
    assert statistics.num_iterations == reference.num_iterations
    assert relative_error(ys, sequential(step_map, flat, xs)) < 1e-11


def test_smaller_blocks_are_filled_up_with_zeros():
    step_map, flat = _pytree_step(_layers, _LAYERS)
    transition, *_ = _linearize(BlockDiagonalJacobian(), step_map, flat)
    matrix, phase, scalar = np.asarray(transition)
    assert transition.shape == (3, 6, 6)
    for block, size in ((matrix, 4), (phase, 6), (scalar, 1)):
        assert np.all(np.any(block[:size, :size] != 0, axis=0))
        np.testing.assert_array_equal(block[size:], np.zeros((6 - size, 6)))
        np.testing.assert_array_equal(block[:, size:], np.zeros((6, 6 - size)))


def test_blocks_that_couple_are_estimated_without_bias():
    rng = np.random.default_rng(0)
    inside = np.asarray(scipy.linalg.block_diag(*rng.normal(size=(10, 2, 2))))
    beside = rng.normal(size=(20, 20))
    beside[scipy.linalg.block_diag(*np.ones((10, 2, 2))) == 1] = 0
    step_map = StepMap(lambda x, y: x @ y)
    y = jnp.zeros(20)
    for matrix in (inside + beside, inside + np.abs(beside)):
        _, blocks = _linearize(
            BlockDiagonalJacobian(block_size=2), step_map, y, jnp.asarray(matrix)
        )
        errors = np.asarray(blocks - inside)[inside != 0]
        # Nine other blocks contribute: without signs the mean of the second would be 7.
        assert 1.5 < np.sqrt(np.mean(errors**2)) < 4.5
        assert abs(np.mean(errors)) < 1.5


def test_the_axis_of_the_samples_may_be_any():
    # The same samples, along the last axis.
    def f(x, y):
        points, density = _samples(x, (y[0].T, y[1]))
        return points.T, density

    first, flat = _pytree_step(_samples, _SAMPLES)
    last, other = _pytree_step(f, (_SAMPLES[0].T, _SAMPLES[1]))
    expected, *_ = _linearize(BlockDiagonalJacobian(batch_axis=0), first, flat)
    got, *_ = _linearize(BlockDiagonalJacobian(batch_axis=-1), last, other)
    assert relative_error(got, expected) < 1e-14


@pytest.mark.parametrize(
    ("blocks", "leaves", "message"),
    [
        (BlockDiagonalJacobian(block_size=5), None, "Pass a divisor of 12"),
        (BlockDiagonalJacobian(), None, "Pass `block_size=`"),
        (BlockDiagonalJacobian(batch_axis=0), None, "Pass `block_size=`"),
        (BlockDiagonalJacobian(batch_axis=0), ((4, 2), (2, 2)), "as many samples"),
        (BlockDiagonalJacobian(batch_axis=1), ((4, 2), (4,)), "as many samples"),
    ],
)
def test_a_state_that_cannot_be_divided_is_an_error(blocks, leaves, message):
    if leaves is not None:
        leaves = tuple(jax.ShapeDtypeStruct(s, jnp.float64) for s in leaves)
    step_map, xs, y0 = (
        StepMap(lambda x, y: y, leaves=leaves),
        jnp.zeros(3),
        jnp.ones(12),
    )
    iteration, guess = newton(blocks), constant_guess(y0, 3)
    with pytest.raises(ValueError, match=message):
        solve(step_map, y0, xs, guess, ParallelForward(), iteration)


def test_only_one_division_can_be_asked_for():
    with pytest.raises(ValueError, match="not both"):
        BlockDiagonalJacobian(block_size=2, batch_axis=0)
    with pytest.raises(ValueError, match="at least 1"):
        BlockDiagonalJacobian(block_size=0)
