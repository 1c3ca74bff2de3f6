"""The exponential Rosenbrock-Euler method, the scheme of the DEER paper."""

from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from diffrax_deer import (
    ConstantPredictor,
    ExponentialRosenbrockEuler,
    Newton,
    WholeInterval,
)

from .helpers import newton_solver, relative_error


def _one_step(term, h, y0, args=None, t0: Any = 0.0):
    solver = ExponentialRosenbrockEuler()
    t0, t1 = jnp.asarray(t0), t0 + h
    y1, error, *_ = solver.step(term, t0, t1, y0, args, None, made_jump=False)
    return y1, error


@pytest.mark.parametrize("stretch", [1.0, 100.0])
def test_linear_equations_are_exact_after_one_iteration(stretch):
    matrix = jnp.array([[-0.5, 2.0], [-2.0, -0.1]]) * stretch
    offset = jnp.array([1.0, -0.3])
    y0 = jnp.array([1.0, 2.0])
    method = Newton(max_iterations=1, predictor=ConstantPredictor())
    solver = newton_solver(ExponentialRosenbrockEuler(), num_steps=7, method=method)
    sol = jax.jit(
        lambda: diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: args[0] @ y + args[1]),
            solver,
            0.0,
            2.0,
            None,
            y0,
            (matrix, offset),
            stepsize_controller=WholeInterval(),
            saveat=diffrax.SaveAt(ts=jnp.linspace(0.0, 2.0, 8), solver_state=True),
        )
    )()
    rest = np.linalg.solve(matrix, offset)
    exact = [
        scipy.linalg.expm(matrix * t) @ (y0 + rest) - rest for t in np.asarray(sol.ts)
    ]
    np.testing.assert_allclose(np.asarray(sol.ys), exact, rtol=1e-11, atol=1e-13)
    assert int(sol.solver_state.num_iterations) == 1


def test_rotation_of_complex_numbers_is_exact_in_both_precisions():
    for dtype, bound in ((jnp.complex128, 1e-14), (jnp.complex64, 1e-6)):
        y0 = {"z": jnp.array([1.0 + 0.5j, -2j], dtype), "x": jnp.ones((), dtype).real}
        rate = jnp.asarray(3j, dtype)
        term = diffrax.ODETerm(
            lambda t, y, args, rate=rate: {"z": rate * y["z"], "x": -y["x"]}
        )
        h = jnp.ones((), dtype).real
        y1, error = _one_step(term, h, y0, t0=jnp.zeros((), dtype).real)
        exact = np.exp(3j) * np.array([1 + 0.5j, -2j])
        assert jax.tree.map(lambda x: x.dtype, y1) == {"z": dtype, "x": h.dtype}
        np.testing.assert_allclose(y1["z"], exact, rtol=bound, atol=bound)
        np.testing.assert_allclose(y1["x"], np.exp(-1), rtol=bound)
        assert jnp.max(jnp.abs(error["z"])) < bound


def _errors(field, exact, t0):
    """Of single steps that become shorter: the error, and the estimate of it."""

    @jax.jit
    @jax.vmap
    def run(h):
        y1, error = _one_step(diffrax.ODETerm(field), h, exact(t0), t0=t0)
        return exact(t0 + h) - y1, error

    found, estimated = map(np.asarray, run(jnp.array([0.08, 0.04, 0.02, 0.01])))
    orders = np.log2(found[:-1] / found[1:])
    np.testing.assert_allclose(orders[-1], 3, atol=0.1)
    return estimated / found


def test_error_of_a_step_is_of_third_order_and_known_where_time_plays_no_part():
    # The two components of a circle that is run through faster and faster.
    field = lambda t, y, args: y[2] * jnp.stack([-y[1], y[0], y[2]])
    angle = lambda t: -jnp.log(1 - t)
    exact = lambda t: jnp.stack([jnp.cos(angle(t)), jnp.sin(angle(t)), 1 / (1 - t)])
    ratios = np.abs(_errors(field, exact, jnp.array(0.1)) - 1)
    # The better, the shorter the step.
    assert (ratios[1:] < ratios[:-1]).all()
    assert (ratios[-1] < 0.05).all()


def test_error_of_a_field_that_depends_on_time_is_not_underestimated():
    field = lambda t, y, args: jnp.stack([-2 * t * y[0] ** 2, y[1] * y[0]])
    exact = lambda t: jnp.stack([1 / (1 + t**2), jnp.exp(jnp.arctan(t))])
    ratios = np.abs(_errors(field, exact, jnp.array(0.5)))
    assert (ratios > 1).all()
    assert (ratios < 4).all()


def test_alone_it_is_a_diffrax_solver_under_a_controller():
    y0 = (jnp.array([1.0, 0.5]), jnp.array(2.0), None)

    def field(t, y, args):
        z, x, _ = y
        return jnp.stack([z[1], -z[0] * x]), -x + jnp.sin(t), None

    solve = lambda solver, tolerance: (
        diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            solver,
            0.0,
            3.0,
            None,
            y0,
            stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
            max_steps=100_000,
        ).ys
    )
    found, exact = jax.jit(
        lambda: (
            solve(ExponentialRosenbrockEuler(), 1e-6),
            solve(diffrax.Dopri8(), 1e-11),
        )
    )()
    assert relative_error(found, exact) < 1e-3


def test_its_derivatives_are_those_of_finite_differences():
    term = diffrax.ODETerm(
        lambda t, y, a: jnp.stack([a * jnp.sin(y[1] + t), -y[0] * y[1]])
    )
    h, parameters = 1e-4, (jnp.array([0.4, 1.2]), jnp.array(0.9), jnp.array(0.3))
    loss = lambda y, a, step: jnp.sum(jnp.sin(_one_step(term, step, y, a)[0]))

    @jax.jit
    def both(*p):
        direction = jnp.array([0.7, -0.2]), jnp.array(0.5), jnp.array(-0.4)
        at = lambda k: jax.tree.map(lambda x, d: x + k * h * d, p, direction)
        shifted = [loss(*at(k)) for k in (1, -1, 2, -2)]
        differences = 8 * (shifted[0] - shifted[1]) - (shifted[2] - shifted[3])
        gradient = jax.grad(loss, (0, 1, 2))(*p)
        products = jax.tree.map(lambda g, d: jnp.sum(g * d), gradient, direction)
        return jax.jvp(loss, p, direction)[1], sum(products), differences / (12 * h)

    forward, reverse, expected = both(*parameters)
    np.testing.assert_allclose([forward, reverse], expected, rtol=1e-9)
