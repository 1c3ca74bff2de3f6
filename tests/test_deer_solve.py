"""The general framework against loops, closed forms and sequential diffrax."""

import functools as ft
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest
from jax import lax

from diffrax_deer import (
    BlockDiagonalJacobian,
    DampedNewton,
    Dense,
    DiagonalJacobian,
    FullJacobian,
    Jacobi,
    SequentialScan,
    affine_recurrence,
    deer_solve,
)

from .helpers import random_like, relative_error, result_is, weighted_loss

_DIAGONAL = DampedNewton(DiagonalJacobian())


def _first_order(g, rhs, y0):
    """The inverse of `y_n + G_n y_{n-1}` for matrices G."""
    return affine_recurrence(Dense(-g), rhs, y0, scan=SequentialScan())


def _delayed(y, y0):
    """`y_{n-1}`, from the value before all others on."""
    return jnp.concatenate([y0[None], y[:-1]])


# ---- A recurrence of second order ----

_RNG = np.random.default_rng(0)
_WEIGHTS = {
    "w": jnp.asarray(_RNG.normal(size=(2, 3, 3)) / 2),
    "y0": jnp.asarray(_RNG.normal(size=(2, 3))),
    "xs": jnp.asarray(_RNG.normal(size=(30, 3))),
}


def _second_order(parameters, **options):
    """`y_n = tanh(w0 y_{n-1} - w1 y_{n-2} + x_n)`, with y0 = (y_{-1}, y_0)."""
    w, y0, xs = parameters["w"], parameters["y0"], parameters["xs"]

    def inverse(gs, rhs):
        first, second = gs
        eye = jnp.broadcast_to(jnp.eye(3, dtype=rhs.dtype), first.shape)
        matrices = Dense(jnp.block([[-first, -second], [eye, jnp.zeros_like(eye)]]))
        padded = jnp.concatenate([rhs, jnp.zeros_like(rhs)], axis=1)
        start = jnp.concatenate([y0[1], y0[0]])
        scan = SequentialScan()
        return affine_recurrence(matrices, padded, start, scan=scan)[:, :3]

    return deer_solve(
        lambda ys, x: jnp.tanh(w[0] @ ys[0] - w[1] @ ys[1] + x),
        inverse,
        lambda y: [
            jnp.concatenate([y0[1:], y[:-1]]),
            jnp.concatenate([y0, y[:-2]]),
        ],
        jnp.zeros_like(xs),
        xs,
        **options,
    )


def _second_order_in_a_loop(parameters):
    w, y0, xs = parameters["w"], parameters["y0"], parameters["xs"]

    def step(carry, x):
        before, last = carry
        new = jnp.tanh(w[0] @ last - w[1] @ before + x)
        return (last, new), new

    return lax.scan(step, (y0[0], y0[1]), xs)[1]


def test_recurrence_of_second_order_and_its_gradient_are_those_of_a_loop():
    def everything(trajectory):
        loss = ft.partial(weighted_loss, trajectory)
        # The tolerance of the linear solver is relative to what comes in.
        small = lambda p: 1e-30 * loss(p)
        run = lambda p: (trajectory(p), jax.grad(loss)(p), jax.grad(small)(p))
        return jax.jit(run)(_WEIGHTS)

    found = everything(_second_order)
    expected = everything(_second_order_in_a_loop)
    tolerances = 1e-12, 1e-10, 1e-10
    for got, want, tolerance in zip(found, expected, tolerances, strict=True):
        assert relative_error(got, want) < tolerance
    about = jax.jit(ft.partial(_second_order, return_statistics=True))
    _, statistics = about(_WEIGHTS)
    assert result_is(statistics.result, "successful")
    assert 1 < statistics.num_iterations <= 30


def test_forward_mode_and_second_derivatives_are_those_of_a_loop():
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
    expected = derivatives(_second_order_in_a_loop)
    assert relative_error(first, expected[0]) < 1e-11
    assert relative_error(forward_over_reverse, expected[1]) < 1e-9
    assert relative_error(reverse_over_forward, expected[1]) < 1e-9


def test_batch_in_single_precision_has_the_values_of_its_members():
    single = jax.tree.map(lambda x: x.astype(jnp.float32), _WEIGHTS)
    axes = {"w": None, "y0": 0, "xs": None}
    batch = single | {"y0": jnp.stack([single["y0"], -single["y0"]])}
    ys = jax.jit(jax.vmap(_second_order, in_axes=(axes,)))(batch)
    assert ys.dtype == jnp.float32
    for y0, got in zip(batch["y0"], ys, strict=True):
        expected = _second_order_in_a_loop(single | {"y0": y0})
        assert relative_error(got, expected) < 1e-5


# ---- A delay ----


def test_delay_that_the_inverse_ignores_only_costs_iterations():
    # Mackey and Glass, by Euler steps; the delay does not enter the linear systems.
    num_steps, delay, h = 60, 20, 0.1
    past = jnp.full((delay, 1), 0.5)

    def f(ys, x):
        del x
        now, before = ys
        return h * (2 * before / (1 + before**8) - now)

    def shifter(y):
        ys = jnp.concatenate([past, y])
        return [ys[delay - 1 : -1], ys[:-delay]]

    solve = jax.jit(
        lambda guess: deer_solve(
            f,
            # y_n - y_{n-1}, inverted together with the first G.
            lambda gs, rhs: _first_order((gs[0] - 1)[:, :, None], rhs, past[-1]),
            shifter,
            guess,
            method=_DIAGONAL,
            return_statistics=True,
        )
    )
    ys, statistics = solve(jnp.full((num_steps, 1), -20.0))
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
        method=_DIAGONAL,
        **options,
    )


def _bratu_exactly(theta):
    """Parameter and solution, see Ascher, Mattheij and Russell (1995), p. 89."""
    x = np.linspace(0, 1, _POINTS + 2)[1:-1]
    u = -2 * np.log(np.cosh((x - 0.5) * theta / 2) / np.cosh(theta / 4))
    return jnp.array(0.5 * (theta / np.cosh(theta / 4)) ** 2), u


# Two solutions for each parameter below 3.51: the lower and the upper branch.
@pytest.mark.parametrize(
    ("theta", "guess"), [(1.5, 0.0), (6.0, 2.0)], ids=["lower", "upper"]
)
def test_boundary_values_are_solved_on_the_branch_of_the_guess(theta, guess):
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


def test_derivatives_of_boundary_values_are_central_differences():
    parameter, _ = _bratu_exactly(1.5)
    loss = jax.jit(lambda p: jnp.sum(_bratu(p) ** 2))
    grad, hessian = jax.jit(jax.grad(loss)), jax.jit(jax.hessian(loss))
    step = 1e-4
    central = lambda f: (f(parameter + step) - f(parameter - step)) / (2 * step)
    assert relative_error(grad(parameter), central(loss)) < 1e-7
    assert relative_error(hessian(parameter), central(grad)) < 1e-7


def test_updates_are_damped_where_newtons_method_alone_diverges():
    # arctan(u) = 0: beyond 1.39 each full update is longer than the one before.
    solve = lambda guess: deer_solve(
        lambda us, x: us[0] - jnp.arctan(us[0]),
        lambda gs, rhs: rhs / (1 + gs[0]),
        lambda u: [u],
        guess,
        method=DampedNewton(DiagonalJacobian(), atol=1e-12),
        return_statistics=True,
    )
    u, statistics = jax.jit(jax.vmap(solve))(
        jnp.array([0.5, 3.0, -50.0])[:, None, None]
    )
    assert np.all(result_is(statistics.result, "successful"))
    assert jnp.max(jnp.abs(u)) < 1e-11
    assert jnp.max(statistics.num_iterations) < 30


# ---- A partial differential equation ----

_SIZE, _NUM_STEPS, _END = 32, 40, 2.0
_X = jnp.linspace(0, 2 * jnp.pi, _SIZE, endpoint=False)
_K = jnp.asarray(np.fft.rfftfreq(_SIZE, 1 / _SIZE))
_U0 = 0.6 * jnp.sin(_X) + 0.3 * jnp.cos(2 * _X)


def _reaction(u, strength):
    return strength * (u - u**3)


def _second_derivative(u):
    return jnp.fft.irfft((-(_K**2)).astype(complex) * jnp.fft.rfft(u), _SIZE)


def _allen_cahn(parameters, **options):
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


@pytest.mark.parametrize(
    "linearization", [DiagonalJacobian(), Jacobi()], ids=["diagonal", "jacobi"]
)
def test_partial_differential_equation_is_that_of_implicit_euler(linearization):
    solve = ft.partial(_allen_cahn, method=DampedNewton(linearization))
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


# ---- Failure ----


@pytest.mark.parametrize(
    ("method", "succeeds"),
    [
        (DampedNewton(), True),
        (DampedNewton(max_iterations=5), False),
        (DampedNewton(Jacobi()), False),
    ],
    ids=["default", "few_iterations", "jacobi"],
)
def test_success_is_what_was_measured_where_the_equations_look_ahead(method, succeeds):
    # An inverse that ignores G, and no order in which points could become final.
    xs = jnp.asarray(np.random.default_rng(0).normal(size=(64, 1)))
    f = lambda ys, x: 0.9 * jnp.cos(ys[0]) + x
    shifter = lambda y: [jnp.concatenate([y[1:], jnp.zeros_like(y[:1])])]
    solve = ft.partial(deer_solve, f, lambda gs, rhs: rhs, shifter, throw=False)
    about = ft.partial(solve, method=method, return_statistics=True)
    y, statistics = jax.jit(about)(jnp.zeros_like(xs), xs)
    successful = result_is(statistics.result, "successful")
    assert successful == succeeds
    defect = jnp.max(jnp.abs(jax.vmap(f)(shifter(y), xs) - y))
    rtol = method.rtol or float(jnp.finfo(y.dtype).eps) ** 0.75
    assert (defect < rtol * jnp.max(jnp.abs(y))) == successful
    assert jnp.all(jnp.isnan(y)) == ~successful
    assert statistics.num_solved == (64 if successful else 0)


@pytest.mark.parametrize(
    ("y0", "result"),
    [(1.5, "nonlinear_max_steps_reached"), (-1.5, "nonfinite")],
    ids=["no_solution", "no_value"],
)
def test_failing_sample_leaves_values_and_gradients_of_its_batch_alone(y0, result):
    # A logarithm that becomes negative after some steps, or at once.
    y0s, shifts = jnp.array([[5.0], [y0], [7.0]]), jnp.array([1.3, 0.1, 1.2])

    def solve(y0, shift, **options):
        return deer_solve(
            lambda ys, x: jnp.log(ys[0]) + shift,
            lambda gs, rhs: _first_order(gs[0], rhs, y0),
            lambda y: [_delayed(y, y0)],
            jnp.ones((6, 1)),
            throw=False,
            **options,
        )

    def loop(y0, shift):
        return lax.scan(lambda y, _: (jnp.log(y) + shift,) * 2, y0, None, 6)[1]

    def everything(trajectory, y0s, shifts):
        def loss(y0s, shifts, common):
            ys = jax.vmap(trajectory)(y0s, shifts + common)
            return jnp.sum(jnp.sin(jnp.where(jnp.isfinite(ys), ys, 0.0))), ys

        gradient = jax.grad(loss, (0, 1, 2), has_aux=True)
        return jax.jit(gradient)(y0s, shifts, jnp.zeros(()))

    good = np.array([0, 2])
    (*slopes, common), ys = everything(solve, y0s, shifts)
    (*expected, total), wanted = everything(loop, y0s[good], shifts[good])
    assert jnp.all(jnp.isnan(ys[1]))
    assert relative_error(ys[good], wanted) < 1e-13
    assert relative_error([x[good] for x in slopes], expected) < 1e-11
    # Also what all samples have in common.
    assert relative_error(common, total) < 1e-11
    about = jax.vmap(ft.partial(solve, return_statistics=True))
    results = about(y0s, shifts)[1].result
    np.testing.assert_array_equal(result_is(results, "successful"), [1, 0, 1])
    np.testing.assert_array_equal(result_is(results, result), [0, 1, 0])


@pytest.mark.raises
def test_failure_is_an_error_unless_it_is_asked_for():
    # Bratu's problem has no solution beyond 3.51.
    with pytest.raises(Exception, match="not converged within `max_iterations`"):
        jax.block_until_ready(jax.jit(_bratu)(jnp.array(5.0)))
    with pytest.raises(Exception, match="a value became infinite or NaN"):
        jax.block_until_ready(jax.jit(_bratu)(jnp.array(jnp.inf)))


# ---- Arguments ----


def _identity(**changes):
    arguments: dict[str, Any] = dict(
        f=lambda ys, x: jnp.cos(ys[0]),
        inverse=lambda gs, rhs: rhs / (1 + gs[0]),
        shifter=lambda y: [y],
        guess=jnp.ones((4, 2)),
        method=_DIAGONAL,
    )
    return deer_solve(**(arguments | changes))


def test_inverse_gets_the_entries_of_the_linearization():
    shapes = []

    def inverse(gs, rhs):
        shapes.append(gs[0].shape)
        axes = tuple(range(2, gs[0].ndim))
        return rhs / (1 + jnp.sum(gs[0], axis=axes))

    for linearization, shape in (
        (FullJacobian(), (4, 2, 2)),
        (BlockDiagonalJacobian(1), (4, 2, 1, 1)),
        (DiagonalJacobian(), (4, 2)),
        (Jacobi(), (4, 2)),
    ):
        u = _identity(inverse=inverse, method=DampedNewton(linearization))
        np.testing.assert_allclose(u, np.full((4, 2), 0.7390851332151607))
        assert set(shapes) == {shape}
        shapes.clear()


def test_wrong_arguments_are_refused():
    for match, changes in (
        ("`guess` must be a real array", {"guess": jnp.ones(4)}),
        ("`guess` must be a real array", {"guess": jnp.ones((4, 2), int)}),
        ("`xs` must have a leading axis", {"xs": jnp.ones((3, 2))}),
        ("`shifter` must return arrays like `guess`", {"shifter": lambda y: [y[1:]]}),
        ("`f` must return an array of shape", {"f": lambda ys, x: jnp.sum(ys[0])}),
        ("`inverse` must return an array like", {"inverse": lambda gs, rhs: rhs[1:]}),
        ("`method` got the class `DampedNewton`", {"method": DampedNewton}),
    ):
        with pytest.raises((TypeError, ValueError), match=match):
            _identity(**changes)


def test_wrong_choices_are_refused():
    wrong: Any = FullJacobian
    with pytest.raises(TypeError, match="Pass an instance"):
        DampedNewton(wrong)
    with pytest.raises(ValueError, match="`max_iterations` must be at least 1"):
        DampedNewton(max_iterations=0)
    with pytest.raises(ValueError, match="`rtol` must be finite"):
        DampedNewton(rtol=-1.0)
