"""How the forward pass is done: in parallel, by Newton's method, or in sequence."""

import abc
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import optimistix as optx
from jax import lax
from jaxtyping import Array, PyTree

from ._causal import hold, prefix
from ._custom_types import State, States
from ._linearization import StepMap
from ._newton import NewtonIteration, Statistics


class AbstractForward(eqx.Module):
    """How the forward pass is done. Result and gradient do not depend on it."""

    @abc.abstractmethod
    def __call__(
        self,
        step_map: StepMap,
        y0: State,
        xs: PyTree[Any],
        guess: States,
        iteration: NewtonIteration,
    ) -> tuple[States, Statistics, PyTree[Array]]:
        """Solves the recurrence; the result need not be differentiable.

        **Arguments:** those of `solve`.

        **Returns:**

        The states, `(time, state)`, finite if `y0` is; the `Statistics`; and what else
        the steps have yielded, of leading axis `time`, if each was made once and is at
        hand, otherwise `None`.
        """


class ParallelForward(AbstractForward):
    """Newton's method over all steps at once."""

    def __call__(self, step_map, y0, xs, guess, iteration):
        return *iteration(step_map, y0, xs, guess), None


class SequentialForward(AbstractForward):
    """One step after the other, with `jax.lax.scan`; the gradient is still parallel.

    No guess, no iteration. The better choice on a CPU.
    """

    def __call__(self, step_map, y0, xs, guess, iteration):
        del iteration

        def step(y, x):
            y, more = step_map.evaluate(x, y)
            return y, (y, more)

        _, (ys, more) = lax.scan(step, y0, xs, length=len(guess))
        finite = jnp.all(jnp.isfinite(ys), axis=-1)
        # As after an iteration: a finite trajectory, so that no derivative is NaN.
        num_finite = prefix(finite)
        ys = hold(y0, ys, num_finite)
        result = optx.RESULTS.where(
            jnp.all(finite), optx.RESULTS.successful, optx.RESULTS.nonfinite
        )
        zero = jnp.zeros((), ys.dtype)
        return ys, Statistics(jnp.array(0, int), zero, num_finite, result), more


class StepByStep(AbstractForward):
    """As `forward`, but also the derivative goes from one step to the next.

    Each step is evaluated once more when it is differentiated, so that memory is that
    of the trajectory. The least work, and the best choice where that is what counts.
    """

    forward: AbstractForward = SequentialForward()

    def __call__(self, step_map, y0, xs, guess, iteration):
        return self.forward(step_map, y0, xs, guess, iteration)


class Strategy(eqx.Module):
    """To choose what is fastest, by platform and by how much there is to do at once.

    - `known`: how to find the solution, if it is known; then the choice is how to
        differentiate it.
    """

    known: AbstractForward | None = None
