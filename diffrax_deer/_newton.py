r"""Newton's method on a whole trajectory: why it always converges.

For the equations $r_n(Y) = \Phi_n(y_{n-1}) - y_n = 0$, one iteration is

$$\delta_n = A_n \delta_{n-1} + r_n, \quad \delta_0 = 0, \ Y \leftarrow Y + \delta.$$

The system is causal, so that every iteration can be checked from the front:

1. a step is final if it was updated, the estimate of its error and its *measured*
   residual are below tolerance, and so are those of all steps before it; it is not
   touched again;
2. the first step that is not final starts from a final state, so its new value is
   $\Phi(y)$ itself, exact, and final: N iterations suffice, from any guess;
3. from the first value on that is not finite, or whose residual has grown instead of
   shrinking, the guess is not trusted: a predictor makes a new one.

A solve can therefore be slow but not wrong. The iteration looks at a window of steps
that slides along with the first one that is not final.
"""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import optimistix as optx
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from ._custom_types import IntScalarLike, State, States
from ._defaults import GROWTH_FLOOR, MAX_GROWTH, RATE_SAFETY, SMALL_RESIDUAL, unless
from ._linalg.transitions import are_finite, zero_unless
from ._prefix import at, count_leading_true, hold_last, max_norm, select, shift
from ._statistics import Statistics
from ._step_map import StepMap
from ._varying import uniform


class _Window(eqx.Module):
    """Consecutive steps and where the iteration over them stands.

    - `ys`, `(time, state)`: the current guess.
    - `residuals`, `changes`, `errors`, `(time,)`: the residual of each step before its
        last update, that update, and the error it is estimated to leave, in units of
        the tolerance, of the component that is worst. Infinite if there was no update.
    - `num_final`, `num_trusted`: leading steps that are, and all before them.
    """

    ys: States
    residuals: Float[Array, " time"]
    changes: Float[Array, " time"]
    errors: Float[Array, " time"]
    num_final: Int[Array, ""]
    num_trusted: Int[Array, ""]


class _Progress(eqx.Module):
    """All steps, with the initial state apart, and what is known about the solve."""

    steps: _Window
    num_iterations: Int[Array, ""]
    residual: Float[Array, ""]
    lost: Bool[Array, ""]
    done: Bool[Array, ""]


class NewtonIteration(eqx.Module):
    """The equations `step(x_n, y_{n-1}) = y_n`, and how to iterate on them.

    - `options`: a `Newton` with all choices made. Its `rtol` and `atol` bound the
        residual of each step and the estimate of its error, in each component relative
        to its scale. The estimate is the last update, or less if the updates have been
        shrinking: by ten times the rate at which they did, as is usual for simplified
        Newton methods (Hairer and Wanner, *Solving ODEs II*, section IV.8).
    """

    step_map: StepMap
    y0: State
    xs: PyTree[Any]
    options: Any

    def _corrections(
        self, ys: States, residuals: States, num_final: Int[Array, ""]
    ) -> States:
        """The solution of the equations linearized at `ys`."""
        before = shift(self.y0, ys)
        # Steps without a value have no derivative, and some solvers raise an error when
        # they are asked for one. Nothing is updated from there on.
        exists = jnp.all(jnp.isfinite(residuals), axis=-1)
        points = self.xs, before, ys
        instead = jax.tree.map(lambda x: at(x, count_leading_true(~exists)), points)
        points = jax.vmap(select, in_axes=(0, 0, None))(exists, points, instead)
        linearize = ft.partial(self.options.linearization, self.step_map)
        transitions = jax.vmap(linearize)(*points)
        # Up to the first open step there is no update to carry on: with transitions of
        # zero the overflow of long products stays away from final steps.
        usable = are_finite(transitions) & (jnp.arange(len(ys)) > num_final)
        return self.options.scan(zero_unless(usable, transitions), residuals)

    def _cummax(self, x: Float[Array, "time ..."]) -> Float[Array, "time ..."]:
        return self.options.scan.time_axis.cummax(x)

    def _magnitudes(self, ys: States) -> States:
        return jnp.maximum(jnp.abs(shift(self.y0, ys)), jnp.abs(ys))

    def _measure(self, ys: States) -> Callable[[States], Float[Array, " time"]]:
        """The norm of each step in units of the tolerance at `ys`.

        A component is measured relative to the largest value that it has had so far,
        but to no more than the norm of the state. Not to that norm itself: small
        components beside a large one would be whatever they were guessed to be.
        """
        sizes = self._magnitudes(ys)
        state = max_norm(sizes)[:, None]
        scales = jnp.minimum(self._cummax(sizes), state)
        tolerance = self.options.atol + self.options.rtol * scales
        return lambda x: max_norm(x / jnp.where(x == 0, 1.0, tolerance))

    def _part(self, start: IntScalarLike, ys: States) -> "NewtonIteration":
        """The equations of the window from `start` on; those before are as in `ys`."""
        y0 = jnp.where(start == 0, self.y0, ys[jnp.maximum(start - 1, 0)])
        cut = lambda x: lax.dynamic_slice_in_dim(x, start, self.options.window)
        xs = jax.tree.map(cut, self.xs)
        return eqx.tree_at(lambda n: (n.y0, n.xs), self, (y0, xs))

    def _update(self, window: _Window, images: States) -> _Window:
        """One iteration, from the first step on that is not final."""
        index, measure = jnp.arange(len(images)), self._measure(window.ys)
        first, final = index == window.num_final, index < window.num_final
        residuals = jnp.where(final[:, None], 0.0, images - window.ys)
        updates = self._corrections(window.ys, residuals, window.num_final)
        # Not the sum on the first open step: next to a huge guess the small true value
        # would be lost to rounding.
        ys = jnp.where(first[:, None], images, window.ys + updates)

        sizes = measure(residuals)
        # Where the guess was right but began elsewhere, residuals were zero.
        old = jnp.maximum(window.residuals, 1)
        floor = jnp.maximum(old, GROWTH_FLOOR * self._cummax(old))
        good = sizes <= MAX_GROWTH * floor
        good |= max_norm(residuals) <= SMALL_RESIDUAL * max_norm(self._magnitudes(ys))
        good = (good | first) & jnp.all(jnp.isfinite(ys), axis=-1)
        num_trusted = count_leading_true(good)
        trusted = index < num_trusted

        changes = jnp.maximum(measure(updates), sizes)
        known = (changes > 0) & jnp.isfinite(window.changes)
        rate = jnp.where(known, changes / jnp.where(known, window.changes, 1.0), 1.0)
        # What is left of a geometric series, if that is far less than the last term.
        left = RATE_SAFETY * rate / (1 - jnp.minimum(rate, 0.5))
        errors = changes * jnp.minimum(left, 1.0)
        unless_trusted = lambda x: jnp.where(trusted, x, jnp.inf)
        return _Window(
            jnp.where(trusted[:, None], ys, window.ys),
            unless_trusted(sizes),
            unless_trusted(changes),
            unless_trusted(jnp.where(first, 0.0, errors)),
            window.num_final + 1,
            num_trusted,
        )

    def _verify(
        self, window: _Window, exhausted: Bool[Array, ""]
    ) -> tuple[_Window, States, Bool[Array, ""]]:
        """Predicts what is not trusted, and finds out which steps are final.

        Also returns the images of the guess, and whether there is no solution.
        """
        size = len(window.ys)
        predict = lambda: self.options.predictor(
            self.step_map, self.y0, self.xs, window.ys, window.num_trusted
        )
        complete = eqxi.unvmap_all(window.num_trusted == size)
        choose = unless if self.options.predictor.is_free else lax.cond
        ys = choose(complete, lambda: window.ys, predict)
        images = jax.vmap(self.step_map.step)(self.xs, shift(self.y0, ys))
        # Without another iteration to come the estimate, which needs two, is not asked.
        solved = (window.errors <= 1) | exhausted
        solved &= self._measure(ys)(images - ys) <= 1
        solved |= jnp.arange(size) < window.num_final
        num_final = count_leading_true(solved)
        # The value of the first open step is exact; if it is not finite, then no number
        # of iterations makes it so.
        exact = at(images, jnp.minimum(num_final, size - 1))
        lost = (num_final < size) & ~jnp.all(jnp.isfinite(exact))
        changes = ys, num_final
        window = eqx.tree_at(lambda w: (w.ys, w.num_final), window, changes)
        return window, images, lost

    def _slide(self, state: _Progress) -> _Progress:
        """Advances in the window that begins with the first step that is not final."""
        steps, num_steps, size = state.steps, len(state.steps.ys), self.options.window
        # A constant if the window is everything: in a batch, to cut is to gather.
        last_start = num_steps - size
        start = jnp.minimum(steps.num_final, last_start) if last_start else 0

        def cut(x):
            if x.ndim == 0:
                return x - start
            return lax.dynamic_slice_in_dim(x, start, size) if last_start else x

        def put(x, part):
            if x.ndim == 0:
                return start + part
            update = lax.dynamic_update_slice_in_dim
            return update(x, part, start, 0) if last_start else part

        equations = self._part(start, steps.ys) if last_start else self
        exhausted = state.num_iterations >= self.options.max_iterations
        window = jax.tree.map(cut, steps)
        window, images, lost = equations._verify(window, exhausted)
        residuals = max_norm(images - window.ys)
        idle = (window.num_final == size) | lost | exhausted
        update = lambda: equations._update(window, images)
        new = unless(eqxi.unvmap_all(idle), lambda: window, update)
        window = select(idle, window, new)

        steps = jax.tree.map(put, steps, window)
        # Beyond the window the guess is what it was.
        beyond = jnp.maximum(state.steps.num_trusted, start + size)
        num_trusted = jnp.where(window.num_trusted < size, steps.num_trusted, beyond)
        steps = eqx.tree_at(lambda s: s.num_trusted, steps, num_trusted)
        slides = ~lost & (window.num_final == size) & (start + size < num_steps)
        done = idle & ~slides
        num_verified = window.num_final - jnp.where(idle, 0, 1)
        measured = (jnp.arange(size) < num_verified) | done
        residual = jnp.max(jnp.where(measured, residuals, state.residual))
        return _Progress(
            steps,
            state.num_iterations + jnp.where(idle, 0, 1),
            jnp.maximum(state.residual, residual),
            lost,
            done,
        )

    def solve(self, guess: States) -> tuple[States, Statistics]:
        """Solves the equations along `guess`, `(time, state)`.

        From its first value that is not finite on there is no guess. Not
        differentiable.
        """
        num_steps = len(guess)
        zero, unknown = jnp.array(0, int), jnp.full(num_steps, jnp.inf, guess.dtype)
        num_known = count_leading_true(jnp.all(jnp.isfinite(guess), axis=-1))
        steps = _Window(guess, unknown, unknown, unknown, zero, num_known)
        no = jnp.array(False)
        state = lax.while_loop(
            lambda state: ~state.done,
            lambda state: self._slide(state),
            uniform(_Progress(steps, zero, jnp.zeros((), guess.dtype), no, no), guess),
        )
        steps, lost = state.steps, state.lost
        solved = (steps.num_final == num_steps) & ~lost
        result = optx.RESULTS.where(
            lost, optx.RESULTS.nonfinite, optx.RESULTS.nonlinear_max_steps_reached
        )
        result = optx.RESULTS.where(solved, optx.RESULTS.successful, result)
        num_good = jnp.where(lost, steps.num_final, steps.num_trusted)
        ys = hold_last(self.y0, steps.ys, num_good)
        return ys, Statistics(
            state.num_iterations, state.residual, steps.num_final, result
        )
