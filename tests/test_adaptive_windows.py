"""Windows that a controller chooses: what is left of them after the search."""

import diffrax
import jax
import jax.numpy as jnp
import pytest

from diffrax_deer import DEERAdjoint, DEERSolver

from .oracle import assert_equal


@pytest.mark.parametrize("num_times", [5, 40])
def test_what_was_not_made_leaves_no_nan_in_any_derivative(num_times):
    """Also where neither the field nor what is saved has a value at zero.

    There are fewer and more times to save at than there can be steps.
    """
    inner = diffrax.Bosh3()
    ts = jnp.linspace(1.0, 2.0, num_times)
    sub = diffrax.SubSaveAt
    logarithm = lambda t, y, args: jnp.log(y) * jnp.log(t)
    subs = [sub(ts=ts), sub(steps=True, fn=logarithm)]

    def loss(solver, adjoint, y0, rate):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, rate: rate / y),
            solver,
            1.0,
            2.0,
            None,
            y0,
            rate,
            saveat=diffrax.SaveAt(subs=subs),
            stepsize_controller=diffrax.PIDController(rtol=1e-3, atol=1e-3),
            adjoint=adjoint,
            max_steps=32,
        )
        finite = [jnp.where(jnp.isfinite(x), x, 0) for x in jax.tree.leaves(sol.ys)]
        return sum(jnp.sum(x**2) for x in finite), sol.stats["num_accepted_steps"]

    @jax.jit
    def both(*p):
        of = lambda *which: jax.value_and_grad(
            lambda *p: loss(*which, *p), (0, 1), has_aux=True
        )(*p)
        ours = DEERSolver(inner, num_steps=1), DEERAdjoint()
        return of(*ours), of(inner, diffrax.RecursiveCheckpointAdjoint())

    found, expected = both(jnp.array([1.0]), jnp.array(0.5))
    # Of 32, which are differentiated eight at a time.
    assert 1 < found[0][1] < 8
    assert_equal(found, expected, 1e-9)
