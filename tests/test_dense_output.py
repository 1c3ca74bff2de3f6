"""Dense output of a window: the interpolation of each of its steps."""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from diffrax_deer import WholeInterval
from diffrax_deer._ode.dense_output import WindowInterpolation, WindowInterpolations

from .helpers import newton_solver
from .oracle import assert_equal

_TS = jnp.array([0.0, 0.5, 0.7, 1.5])
# Another line on each step: values jump where steps meet.
_BEGINS = {"a": jnp.array([0.0, 2.0, -1.0]), "b": jnp.arange(6.0).reshape(3, 2)}
_ENDS = {"a": jnp.array([1.0, 3.0, 4.0]), "b": jnp.arange(6.0).reshape(3, 2) ** 2}


def _interpolation():
    cls = WindowInterpolations(diffrax.LocalLinearInterpolation)
    return cls(t0=_TS[0], t1=_TS[-1], ts=_TS, infos={"y0": _BEGINS, "y1": _ENDS})


def _line(name, step, t):
    start, end = _TS[step], _TS[step + 1]
    part = (t - start) / (end - start)
    y0, y1 = _BEGINS[name][step], _ENDS[name][step]
    return y0 + part * (y1 - y0)


def test_each_time_is_interpolated_in_its_step_to_either_side_where_two_meet():
    path = _interpolation()
    # The step of each time, and that of its right limit.
    times = {0.0: (0, 0), 0.2: (0, 0), 0.5: (0, 1), 0.6: (1, 1), 0.7: (1, 2)}
    # Beyond the ends the outer steps go on.
    times |= {1.1: (2, 2), 1.5: (2, 2), -0.1: (0, 0), 1.6: (2, 2)}
    for t, steps in times.items():
        for left, step in zip((True, False), steps, strict=True):
            expected = {name: _line(name, step, t) for name in _BEGINS}
            assert_equal(path.evaluate(t, left=left), expected, 1e-14)
    slope = path.derivative(0.65)
    assert_equal(slope, {"a": jnp.array(5.0), "b": jnp.array([10.0, 30.0])}, 1e-13)


def test_increment_is_the_difference_of_two_values():
    path = _interpolation()
    expected = {name: _line(name, 2, 1.2) - _line(name, 0, 0.3) for name in _BEGINS}
    assert_equal(path.evaluate(0.3, 1.2), expected, 1e-14)


def test_class_is_the_same_for_the_same_solver():
    # diffrax keeps it as a static field, and JAX compares those.
    cls = lambda inner: WindowInterpolations(inner)
    linear, hermite = (
        diffrax.LocalLinearInterpolation,
        diffrax.ThirdOrderHermitePolynomialInterpolation,
    )
    assert cls(linear) == cls(linear)
    assert hash(cls(linear)) == hash(cls(linear))
    assert cls(linear) != cls(hermite)
    assert isinstance(_interpolation(), WindowInterpolation)


def test_solution_of_several_windows_is_that_of_all_steps_in_both_directions():
    term = diffrax.ODETerm(lambda t, y, args: jnp.stack([y[1], jnp.cos(t) - y[0]]))
    inner, y0 = diffrax.Bosh3(), jnp.array([1.0, 0.3])

    def solve(solver, num_windows, t0, t1):
        return diffrax.diffeqsolve(
            term,
            solver,
            t0,
            t1,
            None,
            y0,
            saveat=diffrax.SaveAt(dense=True),
            stepsize_controller=diffrax.StepTo(jnp.linspace(t0, t1, num_windows + 1)),
            max_steps=num_windows,
        )

    # It leaves and enters compiled functions.
    found = eqx.filter_jit(lambda t0, t1: solve(newton_solver(inner, 4), 3, t0, t1))
    expected = eqx.filter_jit(lambda t0, t1: solve(inner, 12, t0, t1))

    @eqx.filter_jit
    def values(sol, ts):
        at = lambda t: (sol.evaluate(t), sol.derivative(t))
        return jax.vmap(at)(ts), sol.evaluate(ts[1], ts[-2])

    for t0, t1 in ((0.0, 2.0), (2.0, 0.5)):
        ends, ts = (jnp.array(t0), jnp.array(t1)), jnp.linspace(t0, t1, 18)[1:-1]
        first: Any = found(*ends)
        assert jax.tree.structure(first) == jax.tree.structure(found(*ends))
        assert_equal(values(first, ts), values(expected(*ends), ts), 1e-10)


def test_derivative_with_respect_to_time_and_state_is_exact():
    # One step of Euler's method in each half: y0 (1 - h)**2 in the end.
    def value(y0, t1, t):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: -y),
            newton_solver(diffrax.Euler(), num_steps=2),
            0.0,
            t1,
            None,
            y0,
            stepsize_controller=WholeInterval(),
            saveat=diffrax.SaveAt(dense=True),
            max_steps=1,
        )
        return sol.evaluate(t)

    y0, t1, t = jnp.array(3.0), jnp.array(0.8), jnp.array(0.6)
    found = jax.jit(jax.value_and_grad(value, (0, 1, 2)))(y0, t1, t)
    # In the second half y = y0 (1 - h) (1 - (t - h)) with h = t1 / 2.
    h, y = 0.4, 3.0 * 0.6 * 0.8
    gradient = [y / 3.0, 3.0 * ((1 - h) - (1 - 0.6 + h)) / 2, -3.0 * (1 - h)]
    np.testing.assert_allclose(found[0], y, rtol=1e-14)
    np.testing.assert_allclose(found[1], gradient, rtol=1e-13)
