r"""The iteration: all steps of a recurrence at once, and why it cannot fail.

For the equations $r_n(Y) = \Phi_n(y_{n-1}) - y_n = 0$, one iteration is

$$\delta_n = A_n \delta_{n-1} + r_n, \quad \delta_0 = 0, \ Y \leftarrow Y + \delta.$$

The system is causal, so that every iteration can be checked from the front:

1. a step whose update and residual, and those of all steps before it, are below
   tolerance is final and not touched again;
2. the first step that is not yet final starts from a final state, so its new value is
   $\Phi(y)$ itself, exact, and it is final too: N iterations always suffice;
3. from the first value that is not finite on, the guess is reset to the last good one.

A solve can therefore be slow but not wrong, and what it reports is measured.
"""

import abc
import functools as ft
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix as optx
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from ._affine_scan import AbstractScan, shift
from ._custom_types import State, States
from ._linearization import AbstractLinearization, StepMap


class Statistics(eqx.Module):
    r"""What a solve has to say about itself.

    - `num_iterations`: how many times the trajectory was updated; 0 if the steps were
        made in sequence.
    - `residual`: the largest component of $|\Phi_n(y_{n-1}) - y_n|$ over all steps, in
        the units of y, measured on the result.
    - `result`: an `optimistix.RESULTS`.
    """

    num_iterations: Int[Array, ""]
    residual: Float[Array, ""]
    result: optx.RESULTS


def _norm(x: Float[Array, "... state"]) -> Float[Array, "..."]:
    """The norm of a state: unlike its components, it rarely passes through zero."""
    return jnp.max(jnp.abs(x), axis=-1)


def _prefix(good: Bool[Array, " time"]) -> Int[Array, ""]:
    """The number of leading `True`s."""
    return jnp.where(jnp.all(good), good.size, jnp.argmin(good))


class NewtonIteration(eqx.Module):
    """The iteration and its tolerances.

    `rtol` and `atol` bound update and residual of each step, relative to the norm of
    the state. The update is an estimate of the error *before* it is applied; with
    quadratic convergence the error after it is of the order of the tolerance squared.
    """

    linearization: AbstractLinearization
    scan: AbstractScan
    rtol: float
    atol: float
    max_iterations: int | None

    def _tolerance(self, y0: State, ys: States) -> Float[Array, " time"]:
        scale = jnp.maximum(_norm(ys), _norm(shift(y0, ys)))
        return self.atol + self.rtol * scale

    def _update(self, step_map: StepMap, y0: State, xs: PyTree[Any], carry):
        ys, num_final, num_iterations, _ = carry
        index = jnp.arange(len(ys))[:, None]
        linearize = jax.vmap(ft.partial(self.linearization, step_map))
        transitions, images = linearize(xs, shift(y0, ys), ys)

        residuals = jnp.where(index < num_final, 0.0, images - ys)
        axes = tuple(range(1, transitions.ndim))
        usable = jnp.all(jnp.isfinite(transitions), axis=axes, keepdims=True)
        updates = self.scan(jnp.where(usable, transitions, 0.0), residuals)
        # Not `ys + updates` on the first open step: next to a huge guess the small true
        # value would be lost to rounding.
        new = jnp.where(index == num_final, images, ys + updates)

        finite = jnp.all(jnp.isfinite(new), axis=-1)
        change = jnp.maximum(_norm(updates), _norm(residuals))
        small = finite & (change <= self._tolerance(y0, new))
        num_finite = _prefix(finite)
        # The values of the first open step are exact; if they are not finite, then no
        # number of iterations makes them so.
        lost = num_finite <= num_final
        num_final = jnp.maximum(_prefix(small), num_final + 1)
        num_final = jnp.minimum(num_final, num_finite)
        last_good = jnp.where(num_finite == 0, y0, new[num_finite - 1])
        new = jnp.where(index < num_finite, new, last_good)
        return new, num_final, num_iterations + 1, lost

    def __call__(
        self, step_map: StepMap, y0: State, xs: PyTree[Any], guess: States
    ) -> tuple[States, Statistics]:
        """Solves the recurrence from `y0` `(state,)` along `guess` `(time, state)`."""
        num_steps = len(guess)
        limit = num_steps if self.max_iterations is None else self.max_iterations
        zero = jnp.array(0, int)

        def unfinished(carry):
            _, num_final, num_iterations, lost = carry
            return (num_final < num_steps) & (num_iterations < limit) & ~lost

        ys, _, num_iterations, lost = lax.while_loop(
            unfinished,
            ft.partial(self._update, step_map, y0, xs),
            (guess, zero, zero, jnp.array(False)),
        )
        residuals = _norm(jax.vmap(step_map.step)(xs, shift(y0, ys)) - ys)
        solved = jnp.all(residuals <= self._tolerance(y0, ys))
        exhausted = (num_iterations >= limit) & (limit < num_steps)
        result = optx.RESULTS.where(
            exhausted,
            optx.RESULTS.nonlinear_max_steps_reached,
            optx.RESULTS.nonlinear_divergence,
        )
        result = optx.RESULTS.where(lost, optx.RESULTS.nonfinite, result)
        result = optx.RESULTS.where(solved & ~lost, optx.RESULTS.successful, result)
        return ys, Statistics(num_iterations, jnp.max(residuals), result)


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
        del guess, iteration

        def step(y, x):
            y = step_map.step(x, y)
            return y, y

        _, ys = lax.scan(step, y0, xs)
        finite = jnp.all(jnp.isfinite(ys), axis=-1)
        # As after an iteration: a finite trajectory, so that no derivative is NaN.
        num_finite = _prefix(finite)
        last_good = jnp.where(num_finite == 0, y0, ys[num_finite - 1])
        ys = jnp.where(jnp.arange(len(ys))[:, None] < num_finite, ys, last_good)
        result = optx.RESULTS.where(
            jnp.all(finite), optx.RESULTS.successful, optx.RESULTS.nonfinite
        )
        zero = jnp.zeros((), ys.dtype)
        return ys, Statistics(jnp.array(0, int), zero, result)
