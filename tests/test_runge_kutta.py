"""Stages are differentiated as equations: that is right, and never raises."""

from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

from diffrax_deer import ExponentialRosenbrockEuler
from diffrax_deer._ode.runge_kutta import tableau_of
from diffrax_deer._ode.solver_step import SolverStep, prepare
from diffrax_deer._ravel import ravel

from .helpers import relative_error, slowly

_ROOT = optx.Newton(rtol=1e-12, atol=1e-12)
# With a stiffness that the root finder of the reference can still stand.
_SOLVERS: dict[str, tuple[Any, float]] = {
    "dopri5": (diffrax.Dopri5(scan_kind="bounded"), 1.0),
    "implicit_euler": (diffrax.ImplicitEuler(root_finder=_ROOT), 1e3),
    "kvaerno3": (diffrax.Kvaerno3(root_finder=_ROOT), 1e3),
    "kvaerno5": (diffrax.Kvaerno5(root_finder=_ROOT), 3e2),
}


def _field(t, y, args):
    # Stiff, coupled, and dependent on time.
    x, v = y["x"], y["v"]
    return {"x": v, "v": -args * (v - jnp.sin(t)) - x**3}


_Y0 = {"x": jnp.array([1.0, -0.5]), "v": jnp.array([0.3, 0.2])}


def _inner(solver, field, y0, args=None):
    solver = prepare(solver, 2e-16)
    return SolverStep(solver, diffrax.ODETerm(field), args, ravel(y0)[1])


def _of_diffrax(inner, x, y):
    """The step that diffrax makes, and differentiates."""
    state = inner.solver.init(inner.terms, *x, inner.unravel(y), inner.args)
    step = inner.solver.step(
        inner.terms, *x, inner.unravel(y), inner.args, state, False
    )
    return ravel(step[0])[0], ravel(step[1])[0], ravel(step[2])[0]


def _by_stages(inner, x, y):
    result = inner.full_by_stages(x, y)
    return result.y1, result.error, ravel(result.dense_info)[0]


@pytest.mark.optimized
@pytest.mark.parametrize(
    "name", [slowly(n) if n == "kvaerno5" else n for n in _SOLVERS]
)
def test_values_and_derivatives_by_stages_are_those_of_the_step(name):
    """For the state, both times and the parameters; also those of the derivatives."""
    solver, stiffness = _SOLVERS[name]
    flat, _ = ravel(_Y0)

    def of(step):
        def values(y, t0, t1, args):
            return step(_inner(solver, _field, _Y0, args), (t0, t1), y)

        def derivatives(*args):
            out, pullback = jax.vjp(values, *args)
            return out, pullback(jax.tree.map(jnp.cos, out))

        @jax.jit
        def all_of_them(*args):
            tangents = jax.tree.map(jnp.ones_like, args)
            first, second = jax.jvp(derivatives, args, tangents)
            jacobian = jax.jacfwd(lambda y: values(y, *args[1:])[0])(args[0])
            return (first, jacobian), second

        return all_of_them

    found, expected = of(_by_stages), of(_of_diffrax)
    for rate in {1.0, stiffness}:
        args = flat, jnp.array(0.2), jnp.array(0.5), jnp.array(rate)
        (first, second), (e_first, e_second) = found(*args), expected(*args)
        pairs = zip(jax.tree.leaves(first), jax.tree.leaves(e_first), strict=True)
        assert max(relative_error(a, b) for a, b in pairs) < 1e-8
        assert relative_error(first[1], jnp.eye(4)) > 0.1
        if rate == 1:
            pairs = jax.tree.leaves(second), jax.tree.leaves(e_second)
            errors = [relative_error(a, b) for a, b in zip(*pairs, strict=True)]
            assert max(errors) < 1e-8


def test_root_finder_that_fails_is_no_error():
    # diffrax's own derivative of such a step raises.
    kvaerno5, _ = _SOLVERS["kvaerno5"]
    inner = _inner(kvaerno5, lambda t, y, args: jnp.exp(y**3), jnp.ones(2))
    x = (jnp.array(0.0), jnp.array(10.0))
    ys = jnp.array([[30.0, 1.0], [jnp.nan, 0.0]])
    run = lambda y: (jax.jacfwd(lambda y: inner.step(x, y))(y), inner.full(x, y))
    jacobians, result = jax.jit(jax.vmap(run))(ys)
    assert not jnp.all(jnp.isfinite(jacobians))
    assert not jnp.any(result.result == diffrax.RESULTS.successful)
    # A controller makes a smaller step of it.
    assert jnp.all(jnp.isinf(result.error))


def test_tableau_is_the_method_in_plain_numbers():
    # The last stage of Heun's method is at the end of the step.
    heun = tableau_of(diffrax.Heun())
    assert heun is not None
    assert heun.is_explicit
    assert heun == (((0, 0), (1, 0)), (0.5, 0.5), (0, 1), (0.5, -0.5))
    for solver in (diffrax.Dopri8(), diffrax.Kvaerno4(), diffrax.ImplicitEuler()):
        tableau = tableau_of(solver)
        assert tableau is not None
        assert tableau.is_explicit == isinstance(solver, diffrax.Dopri8)
        # Consistent, and exact for a slope that grows with time.
        np.testing.assert_allclose(np.sum(tableau.a, axis=1), tableau.c, atol=1e-12)
        np.testing.assert_allclose(np.sum(tableau.b), 1, rtol=1e-12)
        np.testing.assert_allclose(np.sum(tableau.b_error), 0, atol=1e-12)
    others = diffrax.HalfSolver(diffrax.Heun()), ExponentialRosenbrockEuler()
    for solver in (*others, diffrax.SemiImplicitEuler(), diffrax.KenCarp3()):
        assert tableau_of(solver) is None
