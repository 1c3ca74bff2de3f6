"""What `None` means on each platform; no answer depends on it."""

import itertools
import math
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import diffrax_deer._defaults as defaults
from diffrax_deer import (
    AssociativeScan,
    ChunkedScan,
    CoarsePredictor,
    ConstantPredictor,
    DEERAdjoint,
    DEERSolver,
    Dense,
    Newton,
    ParallelGradient,
    Sequential,
    SequentialGradient,
    SequentialScan,
    StepMap,
    WholeInterval,
    affine_recurrence,
    deer_scan,
)
from diffrax_deer._affine_scan import default_scan
from diffrax_deer._gradient import GradientByBatch, default_gradient
from diffrax_deer._matrix_free import matrix_free_recurrence
from diffrax_deer._ode.grid_solve import default_method

from .helpers import relative_error, sequential, solved, weighted_loss


@pytest.fixture
def accelerated(monkeypatch):
    """As if programs ran on a GPU, to the library."""
    monkeypatch.setattr(defaults, "platform", lambda: "gpu")
    # What was traced before knows nothing of it, and nothing of it may be left.
    jax.clear_caches()
    yield
    jax.clear_caches()


# ---- Platforms ----


def test_platform_is_that_of_the_default_device():
    assert defaults.platform() == jax.default_backend()
    step_map, y0 = StepMap(lambda x, y: y), jnp.ones(3)
    chosen = []
    for device, name in ((jax.devices("cpu")[0], "cpu"), ("cpu", "cpu"), ("tpu",) * 2):
        with jax.default_device(device):
            assert defaults.platform() == name
            chosen.append(Newton().resolve(step_map, y0, 2000))
    assert [c.scan for c in chosen] == [
        SequentialScan(),
        SequentialScan(),
        AssociativeScan(),
    ]
    assert [c.window for c in chosen] == [1024, 1024, 2000]


def _predictor():
    """That of Newton's method for a differential equation."""
    step = lambda x, y: y
    coarse = lambda first, last, y: y
    return Newton().resolve(StepMap(step, coarse_step=coarse), jnp.ones(2), 9).predictor


def test_choices_on_a_cpu():
    assert default_scan() == SequentialScan()
    assert default_method(10, 2) == Sequential()
    assert _predictor() == CoarsePredictor()
    assert defaults.window_size(1) == defaults.window_size(10**9) == 1024
    assert defaults.group_size(1) == defaults.group_size(10**9) == 32
    # Few entries, save times, components and parameters.
    assert defaults.records_windows(2**15, 128, 11, 64)
    too_many = [(2**15 + 1, 1, 1, 1), (1, 129, 1, 1), (1, 1, 12, 1), (1, 1, 1, 65)]
    assert not any(defaults.records_windows(*each) for each in [*too_many, (0,) * 4])
    small = default_gradient(jnp.ones(2), 2, 10, max_entries=128)
    assert isinstance(small, GradientByBatch) and small.is_parallel
    large = default_gradient(jnp.ones(12), 12, 10, max_entries=128)
    assert large == SequentialGradient()


@pytest.mark.usefixtures("accelerated")
def test_choices_elsewhere():
    assert default_scan() == ChunkedScan()
    assert _predictor() == ConstantPredictor()
    # As long as the Jacobians of all steps fit into memory: 2**30 entries.
    assert default_method(2**20, 32) == Newton()
    assert default_method(2**20, 33) == Sequential()
    choose = lambda size: default_gradient(jnp.ones(size), size, 2**20, max_entries=1)
    assert choose(32) == ParallelGradient()
    assert choose(33) == SequentialGradient()
    # Windows of four million entries of transitions, but not shorter than 1024 steps.
    sizes = [defaults.window_size(n) for n in (0, 1, 64, 10**9)]
    assert sizes == [2**22, 2**22, 2**16, 1024]
    resolved = Newton().resolve(StepMap(lambda x, y: y), jnp.ones(32), 10_000)
    assert resolved.window == 2**22 // 32**2
    assert defaults.records_windows(2**15, 10**4, 100, 10**6)
    assert DEERSolver().window_steps == 64
    groups = [defaults.group_size(n) for n in (0, 2**12, 2**16, 10**9)]
    assert groups == [1024, 1024, 64, 1]


# ---- The choices for accelerators, made on a CPU ----


@pytest.mark.usefixtures("accelerated")
def test_recurrences_are_solved_by_the_scan_of_accelerators():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(9, 3, 3)), rng.normal(size=(9, 3))
    y, expected = np.zeros(3), []
    for matrix, inhomogeneity in zip(a, b, strict=True):
        y = matrix @ y + inhomogeneity
        expected.append(y)
    transitions, b = Dense(jnp.asarray(a)), jnp.asarray(b)
    product = lambda v: jnp.einsum("nij,nj->ni", jnp.asarray(a), v)
    affine = affine_recurrence(transitions, b)
    assert relative_error(affine, np.stack(expected)) < 1e-13
    matrix_free = matrix_free_recurrence(product, transitions, b)
    assert relative_error(matrix_free, np.stack(expected)) < 1e-11


@pytest.mark.usefixtures("accelerated")
def test_newton_and_gradient_of_accelerators_have_the_sequential_answer():
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3)))
    y0, xs = jnp.array([0.3, -0.2, 1.0]), jnp.sin(jnp.arange(20.0))

    def loss(trajectory, weights):
        step_map = StepMap(lambda x, y: jnp.tanh(weights @ y + x))
        return weighted_loss(lambda y0: trajectory(step_map, y0, xs), y0)

    gradient = default_gradient(y0, 3, 20, max_entries=1)
    assert gradient == ParallelGradient()
    options: Any = {"method": Newton(), "gradient": gradient}
    own = lambda *args: solved(*args, **options)[0]
    found, expected = (
        jax.jit(jax.value_and_grad(lambda w, f=f: loss(f, w)))(weights)
        for f in (own, sequential)
    )
    assert relative_error(found, expected) < 1e-10


@pytest.mark.usefixtures("accelerated")
@pytest.mark.parametrize(("size", "method"), [(2, Newton), (33, Sequential)])
def test_recurrence_on_an_accelerator_is_solved_by_newton_if_it_is_small(size, method):
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(size, size)) / size)
    xs = jnp.sin(jnp.arange(20.0))

    def loss(scan, weights):
        def step(h, x):
            h = jnp.tanh(weights @ h + x)
            return h, jnp.sin(h)

        carry, ys, *rest = scan(step, jnp.ones(size), xs)
        return jnp.mean(ys**2) + jnp.mean(carry), rest

    own = lambda *args: deer_scan(*args, return_statistics=True)
    ((found, (statistics,)), slope), ((expected, _), expected_slope) = (
        jax.jit(jax.value_and_grad(lambda w, f=f: loss(f, w), has_aux=True))(weights)
        for f in (own, lax.scan)
    )
    assert isinstance(statistics.method, method)
    assert relative_error((found, slope), (expected, expected_slope)) < 1e-11


@pytest.mark.usefixtures("accelerated")
def test_windows_of_a_controller_on_an_accelerator_have_the_same_derivatives():
    weights = jnp.array([[0.3, -1.0], [1.2, 0.1]])

    def loss(solver: Any, adjoint: Any, weights: Any):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, w: jnp.tanh(w @ y + jnp.sin(t))),
            solver,
            0.0,
            1.5,
            None,
            jnp.array([1.0, -0.5]),
            weights,
            stepsize_controller=diffrax.PIDController(rtol=1e-6, atol=1e-6),
            adjoint=adjoint,
            max_steps=64,
        )
        return jnp.sum(jnp.cos(jnp.asarray(sol.ys))), sol.stats

    def run(solver: Any, adjoint: Any):
        of_weights = lambda weights: loss(solver, adjoint, weights)
        return jax.jit(jax.value_and_grad(of_weights, has_aux=True))(weights)

    (found, stats), slope = run(DEERSolver(num_steps=4), DEERAdjoint())
    assert isinstance(stats["method"], Newton)
    assert stats["gradient"] == ParallelGradient()
    # Windows one after another, and steps in each of them.
    named = {"method": Sequential(), "gradient": SequentialGradient()}
    one_by_one = DEERSolver(num_steps=4, **named)
    (expected, _), reference = run(one_by_one, diffrax.RecursiveCheckpointAdjoint())
    assert relative_error((found, slope), (expected, reference)) < 1e-11


@pytest.mark.usefixtures("accelerated")
def test_second_derivatives_on_an_accelerator_are_those_of_the_steps():
    y0 = jnp.array([1.0, -0.5])

    def loss(rate, **options: Any):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, r: jnp.sin(r * y[::-1] + t)),
            DEERSolver(diffrax.Heun(), num_steps=3, **options),
            0.0,
            1.0,
            None,
            y0,
            rate,
            stepsize_controller=WholeInterval(),
            adjoint=DEERAdjoint(),
        )
        return jnp.sum(jnp.asarray(sol.ys) ** 2)

    one_by_one = {"method": Sequential(), "gradient": SequentialGradient()}
    found, expected = (
        jax.jit(jax.hessian(lambda r, o=o: loss(r, **o)))(jnp.array(1.3))
        for o in ({}, one_by_one)
    )
    assert relative_error(found, expected) < 1e-10


@pytest.mark.usefixtures("accelerated")
def test_sample_that_fails_on_an_accelerator_leaves_the_others_alone():
    step_map = StepMap(lambda x, y: jnp.where(y < 2, x * y, jnp.nan))
    xs, y0s = jnp.full(9, 1.25), jnp.array([[0.1], [1.0]])
    solve = lambda y0: solved(step_map, y0, xs, method=Newton())
    ys, statistics = jax.jit(jax.vmap(solve))(y0s)
    powers = 1.25 ** np.arange(1, 10)
    np.testing.assert_allclose(ys[0, :, 0], 0.1 * powers, rtol=1e-14)
    # 1.25**4 is the first beyond 2.
    np.testing.assert_allclose(ys[1, :4, 0], powers[:4], rtol=1e-14)
    assert statistics.num_solved.tolist() == [9, 4]


# ---- Batches ----


def test_gradient_of_a_solver_is_parallel_up_to_128_entries_in_the_batch():
    term = diffrax.ODETerm(lambda t, y, args: jnp.tanh(y[::-1]))

    def is_parallel(y0):
        gradient: Any = DEERSolver(num_steps=24).choices(term, 0.0, y0)[1]
        return gradient.is_parallel

    for size, batch, expected in ((2, 32, 1), (2, 33, 0), (5, 5, 1), (5, 6, 0)):
        choose = jax.vmap(is_parallel, out_axes=None)
        assert choose(jnp.ones((batch, size))) == expected, (size, batch)
    _, gradient = DEERSolver().choices(term, 0.0, jnp.ones(12))
    assert gradient == SequentialGradient()


def test_gradient_of_a_recurrence_is_parallel_up_to_256_entries_in_the_batch():
    # Only the inputs, or only the weights, are mapped: the initial value never is.
    def is_parallel(weights, xs):
        def step(h, x):
            h = jnp.tanh(weights @ h + x)
            return h, h

        *_, statistics = deer_scan(step, jnp.zeros(2), xs, return_statistics=True)
        return statistics.gradient.is_parallel

    for batch, expected in ((64, True), (65, False)):
        weights, xs = jnp.ones((batch, 2, 2)), jnp.ones((batch, 5, 2))
        choose = lambda *axes: jax.vmap(is_parallel, axes, out_axes=None)
        assert choose(None, 0)(weights[0], xs) == expected
        assert choose(0, None)(weights, xs[0]) == expected


def _count(x):
    """A function of `x`, and the batch that it is part of."""
    return x * x, defaults.batch_size(x)


_TRANSFORMATIONS = {
    "none": _count,
    "jit": jax.jit(_count),
    "grad": jax.grad(_count, has_aux=True),
    "grad of grad": jax.grad(jax.grad(_count, has_aux=True), has_aux=True),
    "jvp": lambda x: jax.jvp(_count, (x,), (x,), has_aux=True)[1:],
    "linearize": lambda x: jax.linearize(_count, x, has_aux=True)[::2],
}


def test_batch_size_is_the_product_of_all_vmaps():
    sizes = (), (3,), (2, 5), (2, 1, 4), (0,)
    for name, axes in itertools.product(_TRANSFORMATIONS, sizes):
        f = _TRANSFORMATIONS[name]
        for _ in axes:
            # It is no array of the batch: a choice that depends on it stays one.
            f = jax.vmap(f, out_axes=(0, None))
        _, count = f(jnp.ones(axes))
        assert int(count) == math.prod(axes), (name, axes)


def test_batch_size_counts_only_vmaps_that_map_one_of_its_arrays():
    f = lambda x, y: defaults.batch_size((x, y, jnp.arange(3)))
    # One of two is enough; a `vmap` that maps neither of them does not count.
    g = jax.vmap(lambda x: jax.vmap(lambda _: f(x, 1.0))(jnp.arange(7.0)))
    np.testing.assert_array_equal(g(jnp.zeros(5)), np.full((5, 7), 5))
    h = jax.vmap(lambda number: defaults.batch_size((number, jnp.ones(2))))
    np.testing.assert_array_equal(h(jnp.arange(4)), np.ones(4))
