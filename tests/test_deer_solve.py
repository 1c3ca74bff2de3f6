"""The general framework against loops, closed forms and sequential diffrax."""

import functools as ft
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from diffrax_deer import (
    BlockDiagonalJacobian,
    DiagonalJacobian,
    FullJacobian,
    Picard,
    SequentialScan,
    affine_recurrence,
    deer_scan,
    deer_solve,
)

from .helpers import random_like, relative_error, result_is, weighted_loss

_LINEARIZATIONS = {
    "full": FullJacobian(),
    "diagonal": DiagonalJacobian(),
    "blocks": BlockDiagonalJacobian(block_size=1),
    "picard": Picard(),
}
each_linearization = pytest.mark.parametrize(
    "linearization", _LINEARIZATIONS.values(), ids=_LINEARIZATIONS.keys()
)


def _dense(g):
    """Any G of three components as matrices."""
    if g.ndim == 4:
        g = g.reshape(len(g), -1)
    return g if g.ndim == 3 else jax.vmap(jnp.diag)(g)


# ---- A recurrence of second order ----

_RNG = np.random.default_rng(0)
_WEIGHTS = {
    "w": jnp.asarray(_RNG.normal(size=(2, 3, 3)) / 2),
    "y0": jnp.asarray(_RNG.normal(size=(2, 3))),
    "xs": jnp.asarray(_RNG.normal(size=(30, 3))),
}


def _second_order(parameters, linearization=FullJacobian(), **options):  # noqa: B008
    """`y_n = tanh(w0 y_{n-1} - w1 y_{n-2} + x_n)`, with y0 = (y_{-1}, y_0)."""
    w, y0, xs = parameters["w"], parameters["y0"], parameters["xs"]

    def inverse(gs, rhs):
        first, second = map(_dense, gs)
        eye = jnp.broadcast_to(jnp.eye(3, dtype=rhs.dtype), first.shape)
        matrices = jnp.block([[-first, -second], [eye, jnp.zeros_like(eye)]])
        padded = jnp.concatenate([rhs, jnp.zeros_like(rhs)], axis=1)
        start = jnp.concatenate([y0[1], y0[0]])
        return affine_recurrence(matrices, padded, start, scan=SequentialScan())[:, :3]

    return deer_solve(
        lambda ys, x: jnp.tanh(w[0] @ ys[0] - w[1] @ ys[1] + x),
        inverse,
        lambda y: [
            jnp.concatenate([y0[1:], y[:-1]]),
            jnp.concatenate([y0, y[:-2]]),
        ],
        jnp.zeros_like(xs),
        xs,
        causal=True,
        linearization=linearization,
        **options,
    )


def _second_order_in_sequence(parameters):
    w, y0, xs = parameters["w"], parameters["y0"], parameters["xs"]

    def step(carry, x):
        before, last = carry
        new = jnp.tanh(w[0] @ last - w[1] @ before + x)
        return (last, new), new

    return lax.scan(step, (y0[0], y0[1]), xs)[1]


@each_linearization
def test_a_recurrence_of_second_order(linearization):
    solve = ft.partial(_second_order, linearization=linearization)
    expected = _second_order_in_sequence(_WEIGHTS)
    ys, statistics = jax.jit(ft.partial(solve, return_statistics=True))(_WEIGHTS)
    assert relative_error(ys, expected) < 1e-12
    assert result_is(statistics.result, "successful")
    assert 1 < statistics.num_iterations <= 30
    got, expected = (
        jax.jit(jax.grad(ft.partial(weighted_loss, trajectory)))(_WEIGHTS)
        for trajectory in (solve, _second_order_in_sequence)
    )
    assert relative_error(got, expected) < 1e-10


def test_newtons_method_needs_fewer_iterations_than_the_others():
    counts = {
        name: _second_order(_WEIGHTS, linearization, return_statistics=True)[1]
        for name, linearization in _LINEARIZATIONS.items()
    }
    counts = {name: int(s.num_iterations) for name, s in counts.items()}
    assert counts["full"] < min(counts["diagonal"], counts["picard"])


def test_forward_mode_and_second_derivatives():
    direction = random_like(_WEIGHTS)

    def derivatives(trajectory):
        loss = ft.partial(weighted_loss, trajectory)
        along = lambda f: lambda p: jax.jvp(f, (p,), (direction,))[1]
        return jax.jit(
            lambda p: (
                along(loss)(p),
                along(jax.grad(loss))(p),
                jax.grad(along(loss))(p),
            )
        )(_WEIGHTS)

    first, forward_over_reverse, reverse_over_forward = derivatives(_second_order)
    expected = derivatives(_second_order_in_sequence)
    assert relative_error(first, expected[0]) < 1e-11
    assert relative_error(forward_over_reverse, expected[1]) < 1e-9
    assert relative_error(reverse_over_forward, expected[1]) < 1e-9


def test_gradients_are_as_exact_in_any_unit():
    # The tolerance of the linear solver has to be relative to what comes in.
    loss = lambda p: 1e-12 * weighted_loss(_second_order, p)
    plain = lambda p: 1e-12 * weighted_loss(_second_order_in_sequence, p)
    assert relative_error(jax.grad(loss)(_WEIGHTS), jax.grad(plain)(_WEIGHTS)) < 1e-10


def test_single_precision_and_a_batch():
    single = jax.tree.map(lambda x: x.astype(jnp.float32), _WEIGHTS)
    axes = {"w": None, "y0": 0, "xs": None}
    batch = single | {"y0": jnp.stack([single["y0"], -single["y0"]])}
    solve = jax.jit(jax.vmap(_second_order, in_axes=(axes,)))
    ys = solve(batch)
    assert ys.dtype == jnp.float32
    for y0, got in zip(batch["y0"], ys, strict=True):
        expected = _second_order_in_sequence(single | {"y0": y0})
        assert relative_error(got, expected) < 1e-5


def test_it_contains_deer_scan():
    w, xs = _WEIGHTS["w"][0], _WEIGHTS["xs"]
    y0 = _WEIGHTS["y0"][0]
    f = lambda ys, x: jnp.tanh(w @ ys[0] + x)
    ys = deer_solve(
        f,
        lambda gs, rhs: affine_recurrence(-gs[0], rhs, y0, scan=SequentialScan()),
        lambda y: [jnp.concatenate([y0[None], y[:-1]])],
        jnp.zeros_like(xs),
        xs,
        causal=True,
    )
    _, expected = deer_scan(lambda y, x: (f([y], x), f([y], x)), y0, xs)
    assert relative_error(ys, expected) < 1e-13


# ---- A delay ----


@pytest.mark.parametrize("guess", [0.5, -20.0])
def test_a_delay_with_an_inverse_that_ignores_it(guess):
    # Mackey and Glass, by Euler steps; the delay does not enter the linear systems.
    num_steps, delay, h = 60, 20, 0.1
    past = jnp.full((delay, 1), 0.5)

    def f(ys, x):
        del x
        now, before = ys
        return h * (2 * before / (1 + before**8) - now)

    def inverse(gs, rhs):
        # y_n - y_{n-1}, inverted together with the first G.
        return affine_recurrence(1 - gs[0], rhs, past[-1], scan=SequentialScan())

    def shifter(y):
        ys = jnp.concatenate([past, y])
        return [ys[delay - 1 : -1], ys[:-delay]]

    solve = jax.jit(
        lambda guess: deer_solve(
            f,
            inverse,
            shifter,
            guess,
            causal=True,
            linearization=DiagonalJacobian(),
            return_statistics=True,
        )
    )
    ys, statistics = solve(jnp.full((num_steps, 1), guess))
    expected = list(past)
    for _ in range(num_steps):
        expected.append(expected[-1] + f([expected[-1], expected[-delay]], None))
    assert relative_error(ys, jnp.stack(expected[delay:])) < 1e-12
    assert statistics.num_iterations <= num_steps


# ---- Boundary values ----

_POINTS = 63


def _bratu(parameter, guess=0.0, **options):
    """`u'' + parameter exp(u) = 0`, zero at both ends, by second differences."""

    def inverse(gs, rhs):
        second = jnp.full(_POINTS, (_POINTS + 1.0) ** 2, rhs.dtype)
        diagonal = gs[0][:, 0] - 2 * second
        lower, upper = second.at[0].set(0), second.at[-1].set(0)
        return lax.linalg.tridiagonal_solve(lower, diagonal, upper, rhs)

    return deer_solve(
        lambda us, x: -parameter * jnp.exp(us[0]),
        inverse,
        lambda u: [u],
        jnp.full((_POINTS, 1), guess, jnp.result_type(parameter)),
        linearization=DiagonalJacobian(),
        **options,
    )


def _bratu_exactly(theta):
    """Parameter and solution, see Ascher, Mattheij and Russell (1995), p. 89."""
    x = np.linspace(0, 1, _POINTS + 2)[1:-1]
    u = -2 * np.log(np.cosh((x - 0.5) * theta / 2) / np.cosh(theta / 4))
    return jnp.array(0.5 * (theta / np.cosh(theta / 4)) ** 2), u


# Two solutions for each parameter below 3.51: the lower and the upper branch.
@pytest.mark.parametrize(("theta", "guess"), [(1.5, 0.0), (6.0, 2.0)])
def test_boundary_values(theta, guess):
    parameter, exact = _bratu_exactly(theta)
    u, statistics = jax.jit(ft.partial(_bratu, guess=guess, return_statistics=True))(
        parameter
    )
    assert result_is(statistics.result, "successful")
    assert statistics.num_iterations <= 10
    # The differences are of second order.
    assert relative_error(u[:, 0], exact) < 1e-3
    second = np.diff(np.pad(np.asarray(u[:, 0], float), 1), 2) * float(_POINTS + 1) ** 2
    assert np.max(np.abs(second + parameter * np.exp(u[:, 0]))) < 1e-9


def test_derivatives_of_boundary_values():
    parameter, _ = _bratu_exactly(1.5)
    loss = jax.jit(lambda p: jnp.sum(_bratu(p) ** 2))
    grad, hessian = jax.jit(jax.grad(loss)), jax.jit(jax.hessian(loss))
    step = 1e-4
    central = lambda f: (f(parameter + step) - f(parameter - step)) / (2 * step)
    assert relative_error(grad(parameter), central(loss)) < 1e-7
    assert relative_error(hessian(parameter), central(grad)) < 1e-7
    _, tangent = jax.jvp(loss, (parameter,), (jnp.ones_like(parameter),))
    assert relative_error(tangent, grad(parameter)) < 1e-12


def test_updates_are_damped_where_newtons_method_alone_diverges():
    # arctan(u) = 0: beyond 1.39 each full update is longer than the one before.
    solve = lambda guess: deer_solve(
        lambda us, x: us[0] - jnp.arctan(us[0]),
        lambda gs, rhs: rhs / (1 + gs[0]),
        lambda u: [u],
        guess,
        linearization=DiagonalJacobian(),
        atol=1e-12,
        return_statistics=True,
    )
    u, statistics = jax.jit(jax.vmap(solve))(
        jnp.array([0.5, 3.0, -50.0])[:, None, None]
    )
    assert np.all(result_is(statistics.result, "successful"))
    assert jnp.max(jnp.abs(u)) < 1e-11
    assert jnp.max(statistics.num_iterations) < 30


def test_what_has_no_solution_is_a_failure():
    # Bratu's problem has none beyond 3.51.
    u, statistics = jax.jit(ft.partial(_bratu, throw=False, return_statistics=True))(
        jnp.array(5.0)
    )
    assert jnp.all(jnp.isnan(u))
    assert result_is(statistics.result, "nonlinear_max_steps_reached")
    with pytest.raises(Exception, match="not converged within `max_iterations`"):
        jax.block_until_ready(jax.jit(_bratu)(jnp.array(5.0)))


# ---- A partial differential equation ----

_SIZE, _NUM_STEPS, _END = 32, 40, 2.0
_X = jnp.linspace(0, 2 * jnp.pi, _SIZE, endpoint=False)
_K = jnp.asarray(np.fft.rfftfreq(_SIZE, 1 / _SIZE))
_U0 = 0.6 * jnp.sin(_X) + 0.3 * jnp.cos(2 * _X)


def _reaction(u, strength):
    return strength * (u - u**3)


def _second_derivative(u):
    return jnp.fft.irfft((-(_K**2)).astype(complex) * jnp.fft.rfft(u), _SIZE)


def _allen_cahn(parameters, linearization=DiagonalJacobian(), **options):  # noqa: B008
    """Implicit Euler for u_t = nu u_xx + f(u), periodic.

    `u_n - u_{n-1} - h nu u_n,xx = h f(u_n)`. The left-hand side, and the mean of G over
    space, are diagonal in Fourier space.
    """
    nu, strength = parameters["nu"], parameters["strength"]
    h = _END / _NUM_STEPS

    def inverse(gs, rhs):
        mean = jnp.mean(gs[0], axis=1, keepdims=True)
        factor = (1 + h * nu * (_K**2)[None] + mean).astype(complex)
        modes = jnp.fft.rfft(rhs, axis=1).at[0].add(jnp.fft.rfft(parameters["u0"]))
        step = lambda u, ab: 2 * ((u + ab[1]) / ab[0],)
        init = step(jnp.zeros_like(modes[0]), (factor[0], modes[0]))[0]
        _, rest = lax.scan(step, init, (factor[1:], modes[1:]))
        return jnp.fft.irfft(jnp.concatenate([init[None], rest]), _SIZE, axis=1)

    return deer_solve(
        lambda us, x: h * _reaction(us[0], strength),
        inverse,
        lambda u: [u],
        jnp.broadcast_to(parameters["u0"], (_NUM_STEPS, _SIZE)),
        linearization=linearization,
        **options,
    )


def _method_of_lines(parameters, solver, num_steps=_NUM_STEPS) -> Any:
    def field(t, u, args):
        del t
        return args["nu"] * _second_derivative(u) + _reaction(u, args["strength"])

    return diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        solver,
        0.0,
        _END,
        None,
        parameters["u0"],
        parameters,
        saveat=diffrax.SaveAt(ts=jnp.linspace(0, _END, _NUM_STEPS + 1)[1:]),
        stepsize_controller=diffrax.StepTo(jnp.linspace(0, _END, num_steps + 1)),
        max_steps=num_steps,
        adjoint=diffrax.DirectAdjoint(),
    ).ys


_PDE = {"nu": jnp.array(0.1), "strength": jnp.array(1.5), "u0": _U0}


@pytest.mark.parametrize("name", ["diagonal", "picard"])
def test_a_partial_differential_equation(name):
    import optimistix as optx

    solve = ft.partial(_allen_cahn, linearization=_LINEARIZATIONS[name])
    u, statistics = jax.jit(ft.partial(solve, return_statistics=True))(_PDE)
    assert result_is(statistics.result, "successful")
    assert statistics.num_iterations < 60
    # The same steps, one after the other.
    solver = diffrax.ImplicitEuler(root_finder=optx.Newton(rtol=1e-13, atol=1e-13))
    reference = jax.jit(ft.partial(_method_of_lines, solver=solver))
    assert relative_error(u, reference(_PDE)) < 1e-11
    got, expected = (
        jax.jit(jax.grad(ft.partial(weighted_loss, trajectory)))(_PDE)
        for trajectory in (solve, ft.partial(_method_of_lines, solver=solver))
    )
    assert relative_error(got, expected) < 1e-9
    # And the equation itself, as well as an implicit Euler step of that length can.
    exact = jax.jit(
        ft.partial(_method_of_lines, solver=diffrax.Dopri5(), num_steps=800)
    )(_PDE)
    assert 1e-4 < relative_error(u, exact) < 0.03


# ---- Errors ----


def _identity(**changes):
    arguments: dict[str, Any] = dict(
        f=lambda ys, x: jnp.cos(ys[0]),
        inverse=lambda gs, rhs: rhs / (1 + gs[0]),
        shifter=lambda y: [y],
        guess=jnp.ones((4, 2)),
        linearization=DiagonalJacobian(),
    )
    return deer_solve(**(arguments | changes))


def test_arguments_are_checked():
    np.testing.assert_allclose(_identity(), np.full((4, 2), 0.7390851332151607))
    with pytest.raises(ValueError, match="`guess` must be a real array"):
        _identity(guess=jnp.ones(4))
    with pytest.raises(ValueError, match="`guess` must be a real array"):
        _identity(guess=jnp.ones((4, 2), int))
    with pytest.raises(ValueError, match="`xs` must have a leading axis"):
        _identity(xs=jnp.ones((3, 2)))
    with pytest.raises(ValueError, match="`shifter` must return arrays like `guess`"):
        _identity(shifter=lambda y: [y[1:]])
    with pytest.raises(ValueError, match="`f` must return an array of shape"):
        _identity(f=lambda ys, x: jnp.sum(ys[0]))
    with pytest.raises(ValueError, match="`inverse` must return an array like"):
        _identity(inverse=lambda gs, rhs: rhs[1:])
    with pytest.raises(TypeError, match="Pass an instance"):
        _identity(linearization=FullJacobian)
    with pytest.raises(ValueError, match="`max_iterations` must be at least 1"):
        _identity(max_iterations=0)
    with pytest.raises(ValueError, match="`rtol` must be finite"):
        _identity(rtol=-1.0)


def test_a_step_without_a_value_is_a_failure_from_there_on():
    # The third value is the logarithm of a negative number.
    y0 = jnp.array([1.5])
    solve = lambda **options: deer_solve(
        lambda ys, x: jnp.log(ys[0]) + 0.1,
        lambda gs, rhs: affine_recurrence(-gs[0], rhs, y0, scan=SequentialScan()),
        lambda y: [jnp.concatenate([y0[None], y[:-1]])],
        jnp.ones((6, 1)),
        causal=True,
        **options,
    )
    y, statistics = jax.jit(lambda: solve(throw=False, return_statistics=True))()
    first = np.log(1.5) + 0.1
    np.testing.assert_allclose(y[:2, 0], [first, np.log(first) + 0.1], rtol=1e-12)
    assert jnp.all(jnp.isnan(y[2:]))
    assert result_is(statistics.result, "nonfinite")
    with pytest.raises(Exception, match="a value became infinite or NaN"):
        jax.block_until_ready(jax.jit(solve)())
