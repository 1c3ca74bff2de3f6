"""How the forward pass is done: in parallel, by Newton's method, or in sequence."""

import abc
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import optimistix as optx
from jax import lax
from jaxtyping import PyTree

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
    ) -> tuple[States, Statistics]:
        """Solves the recurrence; the result need not be differentiable."""


class ParallelForward(AbstractForward):
    """Newton's method over all steps at once."""

    def __call__(self, step_map, y0, xs, guess, iteration):
        return iteration(step_map, y0, xs, guess)


class SequentialForward(AbstractForward):
    """One step after the other, with `jax.lax.scan`; the gradient is still parallel.

    No guess, no iteration. The better choice where the device is already full: a large
    batch on a CPU.
    """

    def __call__(self, step_map, y0, xs, guess, iteration):
        del iteration

        def step(y, x):
            y = step_map.step(x, y)
            return y, y

        _, ys = lax.scan(step, y0, xs, length=len(guess))
        finite = jnp.all(jnp.isfinite(ys), axis=-1)
        # As after an iteration: a finite trajectory, so that no derivative is NaN.
        num_finite = prefix(finite)
        ys = hold(y0, ys, num_finite)
        result = optx.RESULTS.where(
            jnp.all(finite), optx.RESULTS.successful, optx.RESULTS.nonfinite
        )
        zero = jnp.zeros((), ys.dtype)
        return ys, Statistics(jnp.array(0, int), zero, num_finite, result)


class PlatformForward(AbstractForward):
    """In sequence on a CPU, in parallel elsewhere; chosen when compiled."""

    def __call__(self, step_map, y0, xs, guess, iteration):
        sequential, parallel = SequentialForward(), ParallelForward()
        return lax.platform_dependent(
            y0,
            xs,
            guess,
            cpu=lambda y0, xs, guess: sequential(step_map, y0, xs, guess, iteration),
            default=lambda y0, xs, guess: parallel(step_map, y0, xs, guess, iteration),
        )
