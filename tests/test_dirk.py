"""The Jacobian of an implicit step is that of the step, and never raises."""

import diffrax
import jax
import jax.numpy as jnp
import optimistix as optx
import pytest

from diffrax_deer._step_map import SolverStep, prepare, ravel

from .helpers import relative_error

_ROOT = optx.Newton(rtol=1e-12, atol=1e-12)
_SOLVERS = {
    "implicit_euler": diffrax.ImplicitEuler(root_finder=_ROOT),
    "kvaerno3": diffrax.Kvaerno3(root_finder=_ROOT),
    "kvaerno5": diffrax.Kvaerno5(root_finder=_ROOT),
}


def _field(t, y, args):
    # Stiff, coupled, and dependent on time.
    x, v = y["x"], y["v"]
    return {"x": v, "v": -args * (v - jnp.sin(t)) - x**3}


_Y0 = {"x": jnp.array([1.0, -0.5]), "v": jnp.array([0.3, 0.2])}


def _inner(solver, field, y0, args=None):
    solver = prepare(solver, 2e-16)
    return SolverStep(solver, diffrax.ODETerm(field), args, ravel(y0)[1])


@pytest.mark.parametrize("stiffness", [1.0, 1e4])
@pytest.mark.parametrize("name", _SOLVERS)
def test_the_jacobian_is_that_of_the_step(name, stiffness):
    inner = _inner(_SOLVERS[name], _field, _Y0, jnp.array(stiffness))
    flat, _ = ravel(_Y0)

    @jax.jit
    def run(y):
        x = (jnp.array(0.2), jnp.array(0.5))
        return inner.jacobian(x, y), jax.jacfwd(lambda y: inner.step(x, y))(y)

    got, expected = run(flat)
    assert relative_error(got, expected) < 1e-10
    assert relative_error(got, jnp.eye(4)) > 0.1


def test_a_root_finder_that_fails_is_no_error():
    # diffrax's own derivative of such a step raises.
    inner = _inner(_SOLVERS["kvaerno5"], lambda t, y, args: jnp.exp(y**3), jnp.ones(2))
    x = (jnp.array(0.0), jnp.array(10.0))
    ys = jnp.array([[30.0, 1.0], [jnp.nan, 0.0]])
    jacobians = jax.jit(jax.vmap(lambda y: inner.jacobian(x, y)))(ys)
    assert not jnp.all(jnp.isfinite(jacobians))
