r"""The iteration: all steps of a recurrence at once, and why it cannot fail.

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
from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import optimistix as optx
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from ._affine_scan import AbstractScan
from ._causal import hold, norm, prefix, select, shift
from ._custom_types import State, States
from ._linearization import AbstractLinearization, StepMap
from ._predictor import AbstractPredictor

# How much a residual may grow in one iteration before the guess is given up; and what
# part of the largest one before it does not count as growth.
_MAX_GROWTH, _FLOOR = 10, 0.1
# By what factor the rate of convergence is distrusted.
_CAUTION = 10
# How large a window is: a CPU is full with few steps, other devices have this many
# entries of Jacobians.
_CPU_WINDOW, _ENTRIES = 1024, 2**22


def default_window(num_entries: int) -> int:
    """How many steps to look at at once, if each has a transition of `num_entries`."""
    # Not a matter of the result: at worst slower, should it run elsewhere.
    if jax.default_backend() == "cpu":
        return _CPU_WINDOW
    return max(_ENTRIES // max(num_entries, 1), _CPU_WINDOW)


class Statistics(eqx.Module):
    r"""What a solve has to say about itself.

    - `num_iterations`: how many times the trajectory, or a window of it, was updated; 0
        if the steps were made in sequence.
    - `residual`: the largest component of $|\Phi_n(y_{n-1}) - y_n|$, in the units of y,
        measured on the result: over all steps, or over those up to the end of the
        window where the solve has stopped.
    - `num_solved`: the leading steps that are solved, N on success.
    - `result`: an `optimistix.RESULTS`.
    """

    num_iterations: Int[Array, ""]
    residual: Float[Array, ""]
    num_solved: Int[Array, ""]
    result: optx.RESULTS


class _Window(eqx.Module):
    """Consecutive steps and where the iteration over them stands.

    - `ys`, `(time, state)`: the current guess.
    - `residuals`, `changes`, `errors`, `(time,)`: the residual of each step before its
        last update, that update, and the error it is estimated to leave; the last two
        in units of the tolerance. Infinite if there was no update.
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
    """The iteration and its tolerances.

    `rtol` and `atol` bound the residual of each step and the estimate of its error,
    relative to the norm of the state. The estimate is the last update, or less if the
    updates have been shrinking: by ten times the rate at which they did, as is usual
    for simplified Newton methods (Hairer and Wanner, *Solving ODEs II*, section IV.8).

    `window` is the number of steps that are looked at at once, all of them if `None`.
    """

    linearization: AbstractLinearization
    scan: AbstractScan
    predictor: AbstractPredictor
    rtol: float
    atol: float
    max_iterations: int | None
    window: int | None

    def _tolerance(self, before: States, after: States) -> Float[Array, " time"]:
        return self.atol + self.rtol * jnp.maximum(norm(before), norm(after))

    def _updates(
        self,
        step_map: StepMap,
        xs: PyTree[Any],
        before: States,
        window: _Window,
        residuals: States,
    ) -> States:
        """Solves the linearized equations for the updates."""
        # Steps without a value have no derivative, and some solvers raise an error when
        # they are asked for one. Nothing is updated from there on.
        exists = jnp.all(jnp.isfinite(residuals), axis=-1)
        points = xs, before, window.ys
        instead = jax.tree.map(lambda x: x[jnp.argmax(exists)], points)
        points = jax.vmap(select, in_axes=(0, 0, None))(exists, points, instead)
        transitions = jax.vmap(ft.partial(self.linearization, step_map))(*points)
        axes = tuple(range(1, transitions.ndim))
        usable = jnp.all(jnp.isfinite(transitions), axis=axes)
        # Up to the first open step there is no update to carry on: with transitions of
        # zero the overflow of long products stays away from final steps.
        usable &= jnp.arange(len(before)) > window.num_final
        usable = jnp.expand_dims(usable, axes)
        return self.scan(jnp.where(usable, transitions, 0.0), residuals)

    def _update(
        self,
        step_map: StepMap,
        xs: PyTree[Any],
        before: States,
        window: _Window,
        images: States,
    ) -> _Window:
        """One iteration, from the first step on that is not final."""
        index = jnp.arange(len(before))
        first, final = index == window.num_final, index < window.num_final
        residuals = jnp.where(final[:, None], 0.0, images - window.ys)
        updates = self._updates(step_map, xs, before, window, residuals)
        # Not the sum on the first open step: next to a huge guess the small true value
        # would be lost to rounding.
        ys = jnp.where(first[:, None], images, window.ys + updates)

        tolerance, sizes = self._tolerance(before, window.ys), norm(residuals)
        # Where the guess was right but began elsewhere, residuals were zero.
        old = jnp.maximum(window.residuals, tolerance)
        good = sizes <= _MAX_GROWTH * jnp.maximum(old, _FLOOR * lax.cummax(old))
        good = jnp.all(jnp.isfinite(ys), axis=-1) & (good | first)
        num_trusted = prefix(good)
        trusted = index < num_trusted

        changes = jnp.maximum(norm(updates), sizes)
        known = (changes > 0) & jnp.isfinite(window.changes)
        changes = jnp.where(changes > 0, changes / tolerance, 0.0)
        rate = jnp.where(known, changes / window.changes, 1.0)
        # What is left of a geometric series, if that is far less than the last term.
        left = _CAUTION * rate / (1 - jnp.minimum(rate, 0.5))
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

    def _advance(
        self,
        step_map: StepMap,
        y0: State,
        xs: PyTree[Any],
        window: _Window,
        exhausted: Bool[Array, ""],
    ) -> tuple[_Window, Bool[Array, ""], Bool[Array, ""], Float[Array, " time"]]:
        """Predicts what is not trusted, verifies what was updated, updates the rest.

        Also returns whether it did update, whether there is no solution, and residuals.
        """
        size = len(window.ys)
        predict = lambda: self.predictor(
            step_map, y0, xs, window.ys, window.num_trusted
        )
        incomplete = eqxi.unvmap_any(window.num_trusted < size)
        ys = lax.cond(incomplete, predict, lambda: window.ys)
        before = shift(y0, ys)
        images = jax.vmap(step_map.step)(xs, before)
        residuals = norm(images - ys)
        # Without another iteration to come the estimate, which needs two, is not asked.
        solved = (window.errors <= 1) | exhausted
        solved &= residuals <= self._tolerance(before, ys)
        num_final = prefix(solved | (jnp.arange(size) < window.num_final))
        complete = num_final == size
        # The values of the first open step are exact; if they are not finite, then no
        # number of iterations makes them so.
        lost = ~complete & ~jnp.all(
            jnp.isfinite(images[jnp.minimum(num_final, size - 1)])
        )
        window = _Window(
            ys,
            window.residuals,
            window.changes,
            window.errors,
            num_final,
            window.num_trusted,
        )
        idle = complete | lost | exhausted
        update = lambda: self._update(step_map, xs, before, window, images)
        new = lax.cond(eqxi.unvmap_all(idle), lambda: window, update)
        return select(idle, window, new), ~idle, lost, residuals

    def _slide(
        self,
        step_map: StepMap,
        y0: State,
        xs: PyTree[Any],
        limit: int,
        state: _Progress,
    ) -> _Progress:
        """Advances in the window that begins with the first step that is not final."""
        steps, num_steps = state.steps, len(state.steps.ys)
        size = num_steps if self.window is None else min(self.window, num_steps)
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

        if last_start:
            y0 = jnp.where(start == 0, y0, steps.ys[jnp.maximum(start - 1, 0)])
        window, updated, lost, residuals = self._advance(
            step_map,
            y0,
            jax.tree.map(cut, xs),
            jax.tree.map(cut, steps),
            state.num_iterations >= limit,
        )
        new = jax.tree.map(put, steps, window)
        # Beyond the window the guess is what it was.
        beyond = jnp.maximum(steps.num_trusted, start + size)
        num_trusted = jnp.where(window.num_trusted < size, new.num_trusted, beyond)
        new = eqx.tree_at(lambda s: s.num_trusted, new, num_trusted)
        slides = ~lost & (window.num_final == size) & (start + size < num_steps)
        done = ~updated & ~slides
        num_verified = window.num_final - jnp.where(updated, 1, 0)
        measured = (jnp.arange(size) < num_verified) | done
        residual = jnp.max(jnp.where(measured, residuals, state.residual))
        return _Progress(
            new,
            state.num_iterations + jnp.where(updated, 1, 0),
            jnp.maximum(state.residual, residual),
            lost,
            done,
        )

    def __call__(
        self, step_map: StepMap, y0: State, xs: PyTree[Any], guess: States
    ) -> tuple[States, Statistics]:
        """Solves the recurrence from `y0` `(state,)` along `guess` `(time, state)`.

        From its first value that is not finite on there is no guess.
        """
        num_steps = len(guess)
        limit = num_steps if self.max_iterations is None else self.max_iterations
        zero, unknown = jnp.array(0, int), jnp.full(num_steps, jnp.inf, guess.dtype)
        num_known = prefix(jnp.all(jnp.isfinite(guess), axis=-1))
        steps = _Window(guess, unknown, unknown, unknown, zero, num_known)
        no = jnp.array(False)
        state = lax.while_loop(
            lambda state: ~state.done,
            ft.partial(self._slide, step_map, y0, xs, limit),
            _Progress(steps, zero, jnp.zeros((), guess.dtype), no, no),
        )
        steps, lost = state.steps, state.lost
        solved = (steps.num_final == num_steps) & ~lost
        result = optx.RESULTS.where(
            lost, optx.RESULTS.nonfinite, optx.RESULTS.nonlinear_max_steps_reached
        )
        result = optx.RESULTS.where(solved, optx.RESULTS.successful, result)
        num_good = jnp.where(lost, steps.num_final, steps.num_trusted)
        ys = hold(y0, steps.ys, num_good)
        return ys, Statistics(
            state.num_iterations, state.residual, steps.num_final, result
        )
