"""`WholeInterval`: one step from t0 to t1, of any solver."""

from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrax_deer import DEERAdjoint, DEERSolver, WholeInterval

from .helpers import adjoints, each_adjoint, gradients, newton_solver
from .oracle import assert_equal


def _solve(t0, t1, dt0: Any = 0.1, solver=None, **kwargs: Any):
    return diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: -y),
        diffrax.Euler() if solver is None else solver,
        t0,
        t1,
        dt0,
        jnp.array([2.0]),
        stepsize_controller=WholeInterval(),
        **kwargs,
    )


def test_whole_interval_is_one_step_whatever_rounding_does():
    t0s = np.repeat([0.1, 1.0, 1234.5], 50)
    lengths = np.random.default_rng(0).uniform(0.1, 3.0, 150)
    # Backwards, too.
    t1s = t0s + lengths * np.where(np.arange(150) % 3 == 0, -1, 1)

    @jax.jit
    @jax.vmap
    def run(t0, t1):
        sol = _solve(t0, t1)
        return sol.stats["num_steps"], sol.ts[-1], sol.ys[-1]

    num_steps, ends, ys = run(jnp.asarray(t0s), jnp.asarray(t1s))
    assert (np.asarray(num_steps) == 1).all()
    np.testing.assert_array_equal(ends, t1s)
    # One step of Euler's method.
    np.testing.assert_allclose(ys[:, 0], 2 * (1 - (t1s - t0s)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dt0", [None, 0.25, -7.0])
def test_first_step_size_plays_no_part_and_both_ends_have_a_derivative(dt0):
    last = lambda t0, t1: _solve(t0, t1, dt0).ys[-1, 0]
    value, gradient = jax.value_and_grad(last, (0, 1))(jnp.array(0.5), jnp.array(1.2))
    np.testing.assert_allclose(value, 2 * (1 - 0.7), rtol=1e-14)
    np.testing.assert_allclose(gradient, [2.0, -2.0], rtol=1e-14)


@pytest.mark.raises
@pytest.mark.parametrize(("t0", "t1"), [(0.0, jnp.inf), (-jnp.inf, 0.0)])
def test_infinite_interval_cannot_be_one_step(t0, t1):
    with pytest.raises(Exception, match="has to be finite"):
        jax.block_until_ready(_solve(t0, t1).ys)


@each_adjoint
def test_empty_interval_has_the_initial_value_everywhere(adjoint):
    subs = (
        diffrax.SubSaveAt(t0=True, ts=jnp.array([1.0, 1.0]), t1=True),
        diffrax.SubSaveAt(steps=True),
    )
    saveat = diffrax.SaveAt(subs=subs, dense=True)
    kwargs: Any = dict(saveat=saveat, adjoint=adjoints[adjoint], max_steps=4)
    solver = newton_solver(num_steps=4)
    sol = jax.jit(lambda: _solve(1, 1, None, solver, **kwargs))()
    assert sol.result == diffrax.RESULTS.successful
    assert sol.stats["num_steps"] == 0
    np.testing.assert_array_equal(sol.ts[0], np.ones(4))
    assert_equal(sol.ys[0], jnp.full((4, 1), 2.0))
    np.testing.assert_array_equal(sol.ts[1], np.inf)
    np.testing.assert_array_equal(sol.ys[1], np.inf)
    assert_equal(sol.evaluate(1.0), jnp.array([2.0]))


@pytest.mark.parametrize("gradient", gradients)
def test_nothing_is_differentiated_where_there_are_no_steps(gradient):
    """Beside a sample that has steps; the field has no derivative at `y0`."""
    solver = newton_solver(diffrax.Heun(), num_steps=4, gradient=gradients[gradient])

    def end(y0, p, t1, solver, controller):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, p: p + jnp.sqrt(y)),
            *(solver, 0.0, t1, None, y0, p),
            stepsize_controller=controller,
            adjoint=DEERAdjoint() if solver is deer else diffrax.DirectAdjoint(),
            max_steps=4,
        ).ys[0]

    deer = solver
    found = lambda y0, p, t1: end(y0, p, t1, deer, WholeInterval())
    steps = diffrax.StepTo(0.1 * jnp.arange(5.0))
    expected = lambda p: end(jnp.array(0.0), p, 0.4, diffrax.Heun(), steps)

    @jax.jit
    def run(y0, p, t1):
        each = lambda derivative: jax.vmap(derivative, (None, None, 0))(y0, p, t1)
        reverse, forward = jax.grad(found, (0, 1)), jax.jacfwd(found, 1)
        return *each(reverse), each(forward), jax.grad(expected)(p)

    y0s, ps, forward, slope = run(jnp.array(0.0), jnp.array(0.3), jnp.array([0, 0.4]))
    assert y0s[0] == 1
    assert forward[0] == 0
    np.testing.assert_allclose(ps, [0, slope], rtol=1e-12)


def test_solver_has_to_be_told_how_many_steps_to_make():
    with pytest.raises(ValueError, match=r"DEERSolver\(num_steps=100\)"):
        _solve(0.0, 1.0, solver=DEERSolver())
