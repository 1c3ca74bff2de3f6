r"""The equations of `deer_solve` at all points, and the iteration that solves them.

Newton's method for the residual $\rho = L^{-1} f(y) - y$ of the fixed-point problem is,
with $L_G = L + \sum_p G_p\, y(r - s_p)$ and $G_p = -\partial_p f$,

$$y \leftarrow y + \rho - L_G^{-1} \sum_p G_p\, \rho(r - s_p),$$

if the user's $L_G^{-1}$ is exact. If it is not, because it is only cheap for some G,
then that costs iterations; the answer is decided by $L^{-1}$ alone.

Updates are damped by Deuflhard's restricted natural monotonicity test. All points are
solved together or none is, and no number of iterations is known to suffice.
"""

import functools as ft
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix as optx
from jax import lax
from jaxtyping import Array, PyTree

from .._checks import check_count, check_instance, check_tolerance
from .._custom_types import State, States
from .._defaults import MAX_DAMPED_ITERATIONS, MIN_DAMPING, RATE_SAFETY, tolerance
from .._linalg.transitions import AbstractTransition, multiply
from .._linearization import AbstractLinearization, FullJacobian
from .._prefix import max_norm
from .._statistics import Statistics
from .._step_map import StepMap


class Equations(eqx.Module):
    """The equations y = L⁻¹ f(shifted y)."""

    f: Callable[[list[State], PyTree[Any]], State]
    inverse: Callable[[list[Array], States], States]
    shifter: Callable[[States], Sequence[States]]
    xs: PyTree[Any]
    linearization: AbstractLinearization

    def _right_hand_side(self, ys: States) -> States:
        return jax.vmap(self.f)(list(self.shifter(ys)), self.xs)

    def _negative_jacobians(self, ys: States) -> list[AbstractTransition]:
        """The G of each shift."""

        def point(shifted, x):
            def with_respect_to(p):
                step = lambda _, y: self.f([*shifted[:p], y, *shifted[p + 1 :]], x)
                y = shifted[p]
                transition = self.linearization(StepMap(step), None, y, y)
                return jax.tree.map(jnp.negative, transition)

            return [with_respect_to(p) for p in range(len(shifted))]

        return jax.vmap(point)(list(self.shifter(ys)), self.xs)

    def zeros(self, ys: States) -> list[Array]:
        """Zeros in place of the G."""
        shapes = jax.eval_shape(self._negative_jacobians, ys)
        return [jnp.zeros(g.entries.shape, g.entries.dtype) for g in shapes]

    def images(self, ys: States) -> States:
        """L⁻¹ f(shifted y)."""
        return self.inverse(self.zeros(ys), self._right_hand_side(ys))

    def newton(self, ys: States) -> Callable[[States], States]:
        """The linear map from residuals to updates, linearized at `ys`."""
        gs, zero = self._negative_jacobians(ys), jnp.zeros_like(ys)
        entries = [g.entries for g in gs]
        # Both may add what does not depend on their argument, an initial value.
        shift, inverse = (
            jax.linearize(self.shifter, zero)[1],
            jax.linearize(ft.partial(self.inverse, entries), zero)[1],
        )

        def update(residuals):
            products = map(multiply, gs, shift(residuals))
            return residuals - inverse(sum(products, start=jnp.zeros_like(residuals)))

        return update

    def damped_update(self, ys: States, residuals: States) -> States:
        """The largest part of Newton's update, a power of 1/2, that is accepted."""
        newton = self.newton(ys)
        full = newton(residuals)
        size = max_norm(full.reshape(-1))

        def too_long(part):
            new = ys + part * full
            # Deuflhard's restricted natural monotonicity test.
            left = max_norm(newton(self.images(new) - new).reshape(-1))
            return ~(left <= (1 - part / 4) * size) & (part > MIN_DAMPING)

        half = jnp.array(0.5, ys.dtype)
        part = lax.while_loop(too_long, lambda part: part * half, 2 * half)
        return jnp.where(part > MIN_DAMPING, part * full, 0)


class DampedNewton(eqx.Module):
    """How `deer_solve` finds the solution: Newton's method with damped updates.

    **Arguments:**

    - `linearization`: makes the G. `FullJacobian()`, `DiagonalJacobian()`...
    - `rtol`, `atol`: bounds for residual and estimated error, in each component
        relative to the largest value that it has at any point. `None` means eps**0.75,
        and zero.
    - `max_iterations`: at most this many.

    ??? cite "Reference"

        Deuflhard, *Newton Methods for Nonlinear Problems*, Springer 2011, section 3.3.
    """

    linearization: AbstractLinearization = FullJacobian()
    rtol: float | None = eqx.field(static=True, default=None)
    atol: float | None = eqx.field(static=True, default=None)
    max_iterations: int = eqx.field(static=True, default=MAX_DAMPED_ITERATIONS)

    def __check_init__(self):
        example = "FullJacobian()"
        check_instance(
            "linearization", self.linearization, AbstractLinearization, example
        )
        check_tolerance("rtol", self.rtol)
        check_tolerance("atol", self.atol)
        check_count("max_iterations", self.max_iterations)

    def __call__(
        self, equations: Equations, guess: States
    ) -> tuple[States, Statistics]:
        """Solves `equations.images(ys) == ys` from `guess`; not differentiable."""
        eps = float(jnp.finfo(guess.dtype).eps)
        rtol = tolerance(eps) if self.rtol is None else self.rtol
        atol = 0.0 if self.atol is None else self.atol

        def measure(x, ys):
            scale = atol + rtol * jnp.max(jnp.abs(ys), axis=0, keepdims=True)
            return max_norm(jnp.where(x == 0, 0.0, x / scale).reshape(-1))

        def iterate(state):
            ys, residuals, old, _, count = state
            update = equations.damped_update(ys, residuals)
            new = ys + update
            left = equations.images(new) - new
            change = jnp.maximum(measure(update, new), measure(residuals, new))
            known = (change > 0) & jnp.isfinite(old)
            rate = jnp.where(known, change / old, 1.0)
            # What is left of a geometric series, if far less than the last term.
            error = RATE_SAFETY * rate / (1 - jnp.minimum(rate, 0.5))
            error = change * jnp.minimum(error, 1.0)
            return new, left, change, error, count + 1

        def unsolved(state):
            ys, residuals, _, error, count = state
            solved = (error <= 1) & (measure(residuals, ys) <= 1)
            finite = jnp.all(jnp.isfinite(ys) & jnp.isfinite(residuals))
            return ~solved & finite & (count < self.max_iterations)

        zero, unknown = jnp.array(0, int), jnp.array(jnp.inf, guess.dtype)
        residuals = equations.images(guess) - guess
        state = guess, residuals, unknown, unknown, zero
        ys, residuals, _, error, count = lax.while_loop(unsolved, iterate, state)
        # Without another iteration to come the estimate, which needs two, is not asked.
        solved = measure(residuals, ys) <= 1
        solved &= (error <= 1) | (count >= self.max_iterations)
        finite = jnp.all(jnp.isfinite(ys) & jnp.isfinite(residuals))
        solved &= finite
        result = optx.RESULTS.where(
            finite, optx.RESULTS.nonlinear_max_steps_reached, optx.RESULTS.nonfinite
        )
        result = optx.RESULTS.where(solved, optx.RESULTS.successful, result)
        num_solved = jnp.where(solved, len(ys), 0)
        residual = jnp.max(jnp.abs(residuals))
        return ys, Statistics(count, residual, num_solved, result, self)
