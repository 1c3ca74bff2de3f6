"""What is done by default, and that it does not matter which."""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from diffrax_deer import (
    DEERAdjoint,
    DEERSolver,
    ParallelForward,
    SequentialForward,
    WholeInterval,
    deer_scan,
)
from diffrax_deer._batch import batch_size
from diffrax_deer._platform import by_platform

from .helpers import relative_error, slowly

_NUM_STEPS = 24


def _count(*axes: int, transform=lambda f: f):
    """The batch that a function of one number sees, under one `vmap` for each axis."""
    found = []

    def f(x):
        # A constant, for whoever looks at it from outside of the transformations.
        count = batch_size(x)
        jax.debug.callback(lambda count: found.append(int(count)), count)
        return x * x * count.astype(x.dtype)

    g = transform(f)
    for _ in axes:
        g = jax.vmap(g)
    out = g(jnp.ones(axes))
    jax.block_until_ready(out)
    jax.effects_barrier()
    return found


@pytest.mark.parametrize("axes", [(), (3,), (2, 5), (2, 1, 4)])
@pytest.mark.parametrize(
    "transform",
    [lambda f: f, jax.jit, jax.grad, jax.jacfwd, lambda f: jax.grad(jax.grad(f))],
    ids=["plain", "jit", "grad", "jvp", "grad of grad"],
)
def test_the_batch_is_the_product_of_all_vmaps(axes, transform):
    found = _count(*axes, transform=transform)
    assert found
    assert set(found) == {int(np.prod(axes, dtype=int))}


def test_only_what_is_mapped_counts():
    f = lambda x, y: batch_size((x, y))
    # One of two is enough; a third `vmap` maps neither of them.
    g = jax.vmap(lambda x: jax.vmap(lambda _: f(x, 1.0))(jnp.arange(7.0)))
    np.testing.assert_array_equal(g(jnp.zeros(5)), np.full((5, 7), 5))


def test_it_is_a_constant_of_the_compiled_program():
    def f(x):
        large = lambda: jnp.linalg.norm(jnp.full((8, 8), x))
        return lax.cond(batch_size(x) > 4, large, lambda: 2 * x)

    text = lambda n: _compiled(jax.vmap(f), jnp.ones(n))
    assert "conditional" not in text(4) + text(5)
    assert "sqrt" in text(5)
    assert "sqrt" not in text(4)


def _field(t, y, weights):
    return jnp.tanh(weights @ y + jnp.sin(t))


def _problem(size: int, dtype=jnp.float64):
    random = np.random.default_rng(size)
    weights = jnp.asarray(random.normal(size=(size, size)) / np.sqrt(size), dtype)
    y0s = jnp.asarray(random.normal(size=(64, size)), dtype)
    return weights, y0s


def _solve(y0, weights, forward=None, saveat=None, **kwargs) -> Any:
    settings: Any = (
        dict(stepsize_controller=WholeInterval(), adjoint=DEERAdjoint()) | kwargs
    )
    return diffrax.diffeqsolve(
        diffrax.ODETerm(_field),
        DEERSolver(num_steps=_NUM_STEPS, forward=forward),
        jnp.array(0.0, y0.dtype),
        jnp.array(1.5, y0.dtype),
        None,
        y0,
        weights,
        saveat=diffrax.SaveAt(t1=True) if saveat is None else saveat,
        **settings,
    )


def _loss(forward=None, saveat=None, **kwargs):
    def loss(weights, y0s):
        solve = lambda y0: _solve(y0, weights, forward, saveat, **kwargs).ys
        return jnp.mean(jnp.cos(jax.vmap(solve)(y0s)))

    return loss


# On both sides of the limit, which is a batch of 32 for two components.
@pytest.mark.parametrize(("size", "batch"), [(2, 4), (2, 40), (20, 1), (1, 64)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_value_and_derivatives_do_not_depend_on_what_is_chosen(size, batch, dtype):
    weights, y0s = _problem(size, dtype)
    tolerance = 100 * float(jnp.finfo(dtype).eps)
    arguments = weights, y0s[:batch]

    def everything(forward):
        loss = _loss(forward)
        value, gradient = jax.value_and_grad(loss, argnums=(0, 1))(*arguments)
        _, tangent = jax.jvp(loss, arguments, arguments)
        return value, gradient, tangent

    found = jax.jit(lambda: everything(None))()
    for forward in (ParallelForward(), SequentialForward()):
        expected = jax.jit(lambda forward=forward: everything(forward))()
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert a.dtype == dtype
            assert relative_error(a, b) < tolerance


@pytest.mark.slow
def test_second_derivatives_in_any_order_of_modes():
    weights, y0s = _problem(2)
    loss = lambda forward: lambda x: _loss(forward)(x * weights, y0s[:40])
    x = jnp.array(1.3)
    expected = jax.jit(jax.hessian(loss(ParallelForward())))(x)
    for second in (
        jax.jacfwd(jax.grad(loss(None))),
        jax.jacfwd(jax.jacfwd(loss(None))),
        jax.grad(jax.grad(loss(None))),
    ):
        assert relative_error(jax.jit(second)(x), expected) < 1e-11


def _compiled(f, *args) -> str:
    text = jax.jit(f).lower(*args).compile().as_text()
    assert text is not None
    return text


def _has_jacobians(text: str, size: int, batch: int, num_steps: int) -> bool:
    """Whether a program holds those of all steps, by the shapes of its arrays."""
    orders = f"{batch},{num_steps}", f"{num_steps},{batch}"
    return any(f"[{order},{size},{size}]" in text for order in orders)


@pytest.mark.parametrize(
    ("size", "batch", "parallel"),
    [(2, 32, True), (2, 33, False), (5, 5, True), (5, 6, False), (12, 1, False)],
)
def test_the_gradient_is_parallel_where_there_is_little_to_do(size, batch, parallel):
    weights, y0s = _problem(size)

    def found(forward):
        text = _compiled(jax.grad(_loss(forward)), weights, y0s[:batch])
        return _has_jacobians(text, size, batch, _NUM_STEPS)

    assert found(None) == parallel
    # The test can tell.
    assert found(SequentialForward())


def test_a_sequential_gradient_keeps_the_trajectory_and_nothing_else():
    width, num_steps = 1000, 500
    inner = jnp.ones((width, 2)) / width

    def loss(w, y0):
        field = lambda t, y, w: jnp.tanh(w.T @ jnp.tanh(w @ y))
        solver = DEERSolver(num_steps=num_steps)
        sol: Any = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            solver,
            0.0,
            1.0,
            None,
            y0,
            w,
            stepsize_controller=WholeInterval(),
            adjoint=DEERAdjoint(),
        )
        return jnp.sum(sol.ys)

    y0 = jnp.ones(2)
    batch = 64
    mapped = lambda w, y0s: jnp.sum(jax.vmap(loss, (None, 0))(w, y0s))
    gradient = jax.jit(jax.grad(mapped))
    compiled = gradient.lower(inner, jnp.tile(y0, (batch, 1))).compile()
    kept = compiled.memory_analysis().temp_size_in_bytes
    # One array of all that happens inside of the steps would be four times as much.
    assert kept < batch * num_steps * width * 8 / 4


def test_without_newton_there_are_no_iterations():
    weights, y0s = _problem(2)
    save = diffrax.SaveAt(t1=True, solver_state=True)
    solve = jax.jit(lambda y0: _solve(y0, weights, saveat=save).solver_state)
    assert int(solve(y0s[0]).num_iterations) == 0
    solve = lambda y0: _solve(y0, weights, ParallelForward(), save).solver_state
    assert int(jax.jit(solve)(y0s[0]).num_iterations) > 0


@pytest.mark.parametrize(
    ("batch", "adjoint"),
    [
        (4, DEERAdjoint()),
        slowly(40, DEERAdjoint()),
        slowly(40, diffrax.RecursiveCheckpointAdjoint()),
    ],
)
def test_windows_that_a_controller_chooses(batch, adjoint):
    weights, y0s = _problem(2)
    controller = diffrax.PIDController(rtol=1e-7, atol=1e-7)
    save = diffrax.SaveAt(ts=jnp.linspace(0.1, 1.4, 5))
    options = dict(stepsize_controller=controller, adjoint=adjoint, max_steps=64)
    losses = [_loss(how, save, **options) for how in (None, ParallelForward())]
    found, expected = (
        jax.jit(jax.value_and_grad(loss))(weights, y0s[:batch]) for loss in losses
    )
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < 1e-12


@pytest.mark.parametrize("batch", [2, 40])
def test_a_sample_that_fails_does_not_spoil_the_gradient_of_the_others(batch):
    weights, y0s = _problem(2)
    y0s = y0s[:batch]

    def field(t, y, args):
        weights, speed = args
        # Undefined below zero, where `speed` leads it.
        return jnp.tanh(weights @ y) + jnp.sqrt(1 - speed * t)

    def solve(y0, weights, speed) -> Any:
        return diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            DEERSolver(num_steps=_NUM_STEPS),
            0.0,
            1.0,
            None,
            y0,
            (weights, speed),
            stepsize_controller=WholeInterval(),
            adjoint=DEERAdjoint(),
            throw=False,
        )

    speeds = jnp.full(batch, 0.5).at[0].set(2.0)

    def loss(weights, y0s, speeds):
        sol = jax.vmap(solve, (0, None, 0))(y0s, weights, speeds)
        okay = sol.result == diffrax.RESULTS.successful
        return jnp.sum(jnp.where(okay[:, None, None], sol.ys, 0.0)), okay

    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, okay), found = gradient(weights, y0s, speeds)
    np.testing.assert_array_equal(okay, speeds < 1)
    (expected_value, _), expected = gradient(weights, y0s[1:], speeds[1:])
    assert relative_error(value, expected_value) < 1e-13
    assert relative_error(found, expected) < 1e-12


def test_quadratures_are_part_of_the_steps_where_these_are_in_sequence():
    weights, y0s = _problem(2)

    def loss(forward, weights, y0s):
        field = lambda t, y, w: (_field(t, y[0], w), jnp.sum(y[0] ** 2) + jnp.cos(t))

        def solve(y0) -> Any:
            return diffrax.diffeqsolve(
                diffrax.ODETerm(field),
                DEERSolver(num_steps=_NUM_STEPS, forward=forward),
                0.0,
                1.5,
                None,
                (y0, jnp.zeros(())),
                weights,
                stepsize_controller=WholeInterval(),
                adjoint=DEERAdjoint(),
            ).ys[1]

        return jnp.mean(jax.vmap(solve)(y0s))

    for batch in (4, 40):
        found, expected = (
            jax.jit(jax.value_and_grad(lambda *a, how=how: loss(how, *a)))(
                weights, y0s[:batch]
            )
            for how in (None, ParallelForward())
        )
        for a, b in zip(found, expected, strict=True):
            assert relative_error(a, b) < 1e-12


# ---- Recurrences ----


@pytest.mark.parametrize(("size", "batch"), [(2, 4), (2, 80), (17, 1)])
def test_recurrences_do_not_depend_on_what_is_chosen(size, batch):
    random = np.random.default_rng(0)
    weights = jnp.asarray(random.normal(size=(size, size)))
    xs = jnp.asarray(random.normal(size=(batch, 30, size)))

    def loss(scan, weights, xs):
        def step(h, x):
            h = jnp.tanh(weights @ h + x)
            return h, jnp.sin(h)

        run = lambda xs: scan(step, jnp.zeros(size), xs)
        (last, ys) = jax.vmap(run)(xs)
        return jnp.mean(ys**2) + jnp.mean(last)

    gradient = lambda scan: jax.jit(
        jax.value_and_grad(lambda *args: loss(scan, *args), argnums=(0, 1))
    )(weights, xs)
    found, expected = gradient(deer_scan), gradient(lax.scan)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert relative_error(a, b) < 1e-12


@pytest.mark.parametrize(("batch", "parallel"), [(64, True), (65, False)])
@pytest.mark.parametrize("mapped", ["inputs", "weights"])
def test_a_recurrence_knows_its_batch(batch, parallel, mapped):
    # Only the inputs, or only the weights, are mapped: the initial value never is.
    def loss(weights, xs):
        def step(h, x):
            h = jnp.tanh(weights @ h + x)
            return h, h

        return jnp.sum(deer_scan(step, jnp.zeros(2), xs)[1])

    axes = (None, 0) if mapped == "inputs" else (0, None)
    weights, xs = jnp.ones((batch, 2, 2)), jnp.ones((batch, 30, 2))
    arguments = (weights[0], xs) if mapped == "inputs" else (weights, xs[0])
    total = lambda *args: jnp.sum(jax.vmap(loss, axes)(*args))
    text = _compiled(jax.grad(total), *arguments)
    assert _has_jacobians(text, 2, batch, 30) == parallel


def test_where_there_is_nothing_but_a_cpu_nothing_else_is_traced():
    assert jax.default_backend() == "cpu"

    def fail():
        raise AssertionError

    assert by_platform(lambda: 1, fail) == 1


@pytest.fixture
def accelerated(monkeypatch):
    """As on a machine with an accelerator, where programs may run on the CPU, too."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    # What was traced before knows nothing of it, and nothing of it may be left.
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.usefixtures("accelerated")
@pytest.mark.parametrize("batch", [4, 40])
def test_a_program_for_several_platforms(batch):
    weights, y0s = _problem(2)
    gradient = jax.jit(jax.value_and_grad(_loss()))
    assert "platform_index" in str(gradient.trace(weights, y0s[:batch]).jaxpr)
    found = gradient(weights, y0s[:batch])
    expected = jax.jit(jax.value_and_grad(_loss(SequentialForward())))
    pairs = zip(found, expected(weights, y0s[:batch]), strict=True)
    for a, b in pairs:
        assert relative_error(a, b) < 1e-13

    def step(h, x):
        h = jnp.tanh(weights @ h + x)
        return h, h

    scan = lambda scan: lambda h: jnp.sum(scan(step, h, jnp.ones((9, 2)))[1])
    found, expected = (
        jax.jit(jax.grad(scan(s)))(y0s[0]) for s in (deer_scan, lax.scan)
    )
    assert relative_error(found, expected) < 1e-13


def test_under_a_filtered_transformation():
    weights, y0s = _problem(2)
    solve = lambda y0, w: jnp.sum(jnp.asarray(_solve(y0, w).ys))
    found = eqx.filter_jit(eqx.filter_vmap(eqx.filter_grad(solve), in_axes=(0, None)))
    expected = jax.vmap(
        jax.grad(
            lambda y0: jnp.sum(jnp.asarray(_solve(y0, weights, ParallelForward()).ys))
        )
    )(y0s[:3])
    assert relative_error(found(y0s[:3], weights), expected) < 1e-13
