"""Training loops with the solver changed: the same values and gradients."""

from typing import Any

import diffrax
import equinox as eqx
import jax
import pytest

from diffrax_deer import DEERAdjoint, DEERSolver
from experiments.training_loops import LOOPS, Config, Loop, fewest_steps

from .helpers import slowly
from .oracle import assert_equal

_NAMES: Any = ["latent_ode", *map(slowly, ("neural_cde", "hamiltonian", "cnf"))]


@pytest.mark.parametrize("name", _NAMES)
def test_values_and_gradients_are_those_of_the_loop_as_it_is(name):
    loop: Loop = LOOPS[name](batch_size=2)
    params, static = eqx.partition(loop.params, eqx.is_inexact_array)
    solver = loop.options["solver"]

    @jax.jit
    def run(params):
        def of(**options):
            def loss(params):
                network = eqx.combine(params, static)
                found = loop.predict(network, loop.data, loop.options | options)
                return loop.loss(found, loop.data)

            return jax.value_and_grad(loss)(params)

        ours = DEERSolver(solver)
        default = diffrax.RecursiveCheckpointAdjoint()
        return of(adjoint=default), [
            of(solver=ours, adjoint=adjoint) for adjoint in (default, DEERAdjoint())
        ]

    expected, found = run(params)
    for each in found:
        assert_equal(each, expected, 1e-9)


def test_fewest_steps_have_the_error_of_the_loop():
    num_steps, error = fewest_steps(LOOPS["latent_ode"](batch_size=2))
    assert num_steps is not None
    assert 0 < error < 1e-3


def test_wrong_settings_are_named():
    Config().check()
    with pytest.raises(Exception, match="--loops"):
        Config(loops=()).check()
