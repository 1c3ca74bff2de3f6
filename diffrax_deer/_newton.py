r"""The iteration: all steps of a recurrence at once, and why it cannot fail.

For the equations $r_n(Y) = \Phi_n(y_{n-1}) - y_n = 0$, one iteration is

$$\delta_n = A_n \delta_{n-1} + r_n, \quad \delta_0 = 0, \ Y \leftarrow Y + \delta.$$

The system is causal, so that every iteration can be checked from the front:

1. a step whose update and residual, and those of all steps before it, are below
   tolerance is final, and not touched again once it has been updated;
2. the first step that is not yet final starts from a final state, so its new value is
   $\Phi(y)$ itself, exact, and it is final too: N iterations end an attempt;
3. from the first value that is not finite on, the guess is reset to the last good one.

A solve can therefore be slow but not wrong. What it reports is measured: where the last
update has moved a residual above the tolerance, the iteration goes on from there, and
now leaves final steps as they were measured: at most 2 N iterations in all.
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
    - `num_solved`: the leading steps whose residual is below tolerance, N on success.
    - `result`: an `optimistix.RESULTS`.
    """

    num_iterations: Int[Array, ""]
    residual: Float[Array, ""]
    num_solved: Int[Array, ""]
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

    def _update(self, step_map: StepMap, y0: State, xs: PyTree[Any], strict, carry):
        """One iteration; if `strict`, steps become final as they are, not updated."""
        ys, num_final, num_iterations, _ = carry
        index = jnp.arange(len(ys))[:, None]
        linearize = jax.vmap(ft.partial(self.linearization, step_map))
        transitions, images = linearize(xs, shift(y0, ys), ys)

        residuals = jnp.where(index < num_final, 0.0, images - ys)
        axes = tuple(range(1, transitions.ndim))
        usable = jnp.all(jnp.isfinite(transitions), axis=axes, keepdims=True)
        # Up to the first open step there is no update to carry on: with transitions of
        # zero the overflow of long products stays away from final steps.
        open_step = (jnp.arange(len(ys)) > num_final).reshape(usable.shape)
        updates = self.scan(jnp.where(usable & open_step, transitions, 0.0), residuals)
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
        num_small = _prefix(small)
        last_good = jnp.where(num_finite == 0, y0, new[num_finite - 1])
        new = jnp.where(index < num_finite, new, last_good)
        new = jnp.where(strict & (index < num_small), ys, new)
        return new, jnp.maximum(num_small, num_final + 1), num_iterations + 1, lost

    def __call__(
        self, step_map: StepMap, y0: State, xs: PyTree[Any], guess: States
    ) -> tuple[States, Statistics]:
        """Solves the recurrence from `y0` `(state,)` along `guess` `(time, state)`."""
        num_steps = len(guess)
        # Twice: N for the first attempt, N for one that leaves final steps alone.
        limit = 2 * num_steps if self.max_iterations is None else self.max_iterations

        def unfinished(carry):
            _, num_final, num_iterations, lost = carry
            return (num_final < num_steps) & (num_iterations < limit) & ~lost

        def attempt(carry):
            strict, _, carry = carry
            update = ft.partial(self._update, step_map, y0, xs, strict)
            ys, _, num_iterations, lost = lax.while_loop(unfinished, update, carry)
            residuals = _norm(jax.vmap(step_map.step)(xs, shift(y0, ys)) - ys)
            num_solved = _prefix(residuals <= self._tolerance(y0, ys))
            carry = ys, num_solved, num_iterations, lost
            return jnp.array(True), jnp.max(residuals), carry

        zero = jnp.array(0, int)
        init = guess, zero, zero, jnp.array(False)
        _, residual, (ys, num_solved, num_iterations, lost) = lax.while_loop(
            lambda carry: ~carry[0] | unfinished(carry[2]),
            attempt,
            (jnp.array(False), jnp.zeros((), guess.dtype), init),
        )
        solved = (num_solved == num_steps) & ~lost
        exhausted = num_iterations >= limit
        result = optx.RESULTS.where(
            exhausted,
            optx.RESULTS.nonlinear_max_steps_reached,
            optx.RESULTS.nonlinear_divergence,
        )
        result = optx.RESULTS.where(lost, optx.RESULTS.nonfinite, result)
        result = optx.RESULTS.where(solved, optx.RESULTS.successful, result)
        return ys, Statistics(num_iterations, residual, num_solved, result)


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
        return ys, Statistics(jnp.array(0, int), zero, num_finite, result)
