r"""The iteration: all steps of a recurrence at once, and why it cannot fail.

For the equations $r_n(Y) = \Phi_n(y_{n-1}) - y_n = 0$, one iteration is

$$\delta_n = A_n \delta_{n-1} + r_n, \quad \delta_0 = 0, \ Y \leftarrow Y + \delta.$$

In general, for $r(Y) = F(Y) - Y = 0$, it is $Y \leftarrow Y + \delta$ with whatever the
equations say approximates $\delta = F'(Y) \delta + r$.

If the system is causal, every iteration can be checked from the front:

1. a step is final if it was updated, the estimate of its error and its *measured*
   residual are below tolerance, and so are those of all steps before it; it is not
   touched again;
2. the first step that is not final starts from a final state, so its new value is
   $\Phi(y)$ itself, exact, and final: N iterations suffice, from any guess;
3. from the first value on that is not finite, or whose residual has grown instead of
   shrinking, the guess is not trusted: a predictor makes a new one.

A solve can therefore be slow but not wrong. The iteration looks at a window of steps
that slides along with the first one that is not final.

If it is not causal, all steps are final together or none is, and no number of
iterations is known to suffice.
"""

import abc
import functools as ft
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import optimistix as optx
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from ._affine_scan import AbstractScan
from ._causal import hold, norm, prefix, select, shift
from ._checks import check_count, check_instance, check_tolerance
from ._custom_types import IntScalarLike, State, States
from ._linearization import AbstractLinearization, StepMap
from ._predictor import AbstractPredictor

# How much a residual may grow in one iteration before the guess is given up; and what
# part of the largest one before it does not count as growth.
_MAX_GROWTH, _FLOOR = 10, 0.1
# A residual of this part of the state does not count either.
_SMALL = 1e-2
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


def check_iteration(
    linearization: Any, rtol: Any, atol: Any, max_iterations: Any
) -> None:
    """Raises unless these are arguments that a `NewtonIteration` can be made from."""
    example = "FullJacobian()"
    check_instance("linearization", linearization, AbstractLinearization, example)
    check_tolerance("rtol", rtol)
    check_tolerance("atol", atol)
    if max_iterations is not None:
        check_count("max_iterations", max_iterations)


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


def raise_if_failed(
    tree: PyTree[Any], result: optx.RESULTS, messages: list[str]
) -> Any:
    """`tree`, which raises an error at run time unless the result is a success.

    The first message is for values that are not finite, the second for too few
    iterations.
    """
    failed = result != optx.RESULTS.successful
    which = jnp.where(result == optx.RESULTS.nonfinite, 0, 1)
    smooth, rest = eqx.partition(tree, eqx.is_inexact_array)
    if not jax.tree.leaves(smooth):
        return tree
    # Not the tree itself: it would be copied through the condition.
    failed = eqxi.branched_error_if(failed, failed, which, messages)
    smooth = jax.tree.map(lambda x: jnp.where(failed, jnp.nan, x), smooth)
    return eqx.combine(smooth, rest)


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


class AbstractEquations(eqx.Module):
    """The equations F(Y) = Y for all steps, as far as the iteration has to know them.

    `is_causal` says whether each entry of F(Y) depends on those of Y before it only.
    """

    is_causal: eqx.AbstractVar[bool]

    @abc.abstractmethod
    def images(self, ys: States) -> States:
        """F(Y)."""

    @abc.abstractmethod
    def updates(
        self, ys: States, residuals: States, num_final: Int[Array, ""]
    ) -> States:
        """Approximates the solution of the equations linearized at `ys`.

        `residuals` are zero on the `num_final` leading steps.
        """

    @abc.abstractmethod
    def magnitudes(self, ys: States) -> States:
        """How large the components are of what each equation is about."""

    @abc.abstractmethod
    def predict(self, ys: States, num_known: Int[Array, ""]) -> States:
        """New values for all but the `num_known` leading steps."""

    @abc.abstractmethod
    def hold(self, ys: States, num_known: Int[Array, ""]) -> States:
        """Constant after the `num_known` leading steps."""

    @abc.abstractmethod
    def part(self, start: IntScalarLike, size: int, ys: States) -> "AbstractEquations":
        """The equations of `size` steps, if those before `start` are as in `ys`."""

    def norms(self, x: States) -> Float[Array, " time"]:
        """How large each step of `x` is; without causality, how large all of them."""
        sizes = norm(x)
        return sizes if self.is_causal else jnp.full_like(sizes, jnp.max(sizes))

    def scales(self, ys: States) -> States:
        """What the relative tolerance of each component is relative to.

        The largest value that the component has had so far, or anywhere if there is no
        causality, but no more than the norm of the state. Not that norm itself: small
        components beside a large one would be whatever they were guessed to be.
        """
        sizes = self.magnitudes(ys)
        state = jnp.expand_dims(self.norms(sizes), -1)
        largest = lax.cummax if self.is_causal else ft.partial(jnp.max, keepdims=True)
        return jnp.minimum(largest(sizes, axis=0), state)


class Recurrence(AbstractEquations):
    """The equations `step(x_n, y_{n-1}) = y_n`."""

    step_map: StepMap
    y0: State
    xs: PyTree[Any]
    linearization: AbstractLinearization
    scan: AbstractScan
    predictor: AbstractPredictor
    is_causal: ClassVar[bool] = True

    def images(self, ys):
        return jax.vmap(self.step_map.step)(self.xs, shift(self.y0, ys))

    def updates(self, ys, residuals, num_final):
        before = shift(self.y0, ys)
        # Steps without a value have no derivative, and some solvers raise an error when
        # they are asked for one. Nothing is updated from there on.
        exists = jnp.all(jnp.isfinite(residuals), axis=-1)
        points = self.xs, before, ys
        instead = jax.tree.map(lambda x: x[jnp.argmax(exists)], points)
        points = jax.vmap(select, in_axes=(0, 0, None))(exists, points, instead)
        linearize = ft.partial(self.linearization, self.step_map)
        transitions = jax.vmap(linearize)(*points)
        axes = tuple(range(1, transitions.ndim))
        usable = jnp.all(jnp.isfinite(transitions), axis=axes)
        # Up to the first open step there is no update to carry on: with transitions of
        # zero the overflow of long products stays away from final steps.
        usable &= jnp.arange(len(ys)) > num_final
        usable = jnp.expand_dims(usable, axes)
        return self.scan(jnp.where(usable, transitions, 0.0), residuals)

    def magnitudes(self, ys):
        return jnp.maximum(jnp.abs(shift(self.y0, ys)), jnp.abs(ys))

    def predict(self, ys, num_known):
        return self.predictor(self.step_map, self.y0, self.xs, ys, num_known)

    def hold(self, ys, num_known):
        return hold(self.y0, ys, num_known)

    def part(self, start, size, ys):
        y0 = jnp.where(start == 0, self.y0, ys[jnp.maximum(start - 1, 0)])
        cut = lambda x: lax.dynamic_slice_in_dim(x, start, size)
        xs = jax.tree.map(cut, self.xs)
        return eqx.tree_at(lambda r: (r.y0, r.xs), self, (y0, xs))


class NewtonIteration(eqx.Module):
    """The iteration and its tolerances.

    `rtol` and `atol` bound the residual of each step and the estimate of its error, in
    each component relative to its scale. The estimate is the last update, or less if
    the updates have been shrinking: by ten times the rate at which they did, as is
    usual for simplified Newton methods (Hairer and Wanner, *Solving ODEs II*, section
    IV.8).

    `window` is the number of steps that are looked at at once, all of them if `None`.
    """

    linearization: AbstractLinearization
    scan: AbstractScan
    predictor: AbstractPredictor
    rtol: float
    atol: float
    max_iterations: int | None
    window: int | None

    def _measure(
        self, equations: AbstractEquations, ys: States
    ) -> Callable[[States], Float[Array, " time"]]:
        """The norm of each step in units of the tolerance at `ys`."""
        tolerance = self.atol + self.rtol * equations.scales(ys)
        return lambda x: equations.norms(jnp.where(x == 0, 0.0, x / tolerance))

    def _update(
        self,
        equations: AbstractEquations,
        window: _Window,
        images: States,
        measure: Callable[[States], Float[Array, " time"]],
    ) -> _Window:
        """One iteration, from the first step on that is not final."""
        index = jnp.arange(len(images))
        first, final = index == window.num_final, index < window.num_final
        first &= equations.is_causal
        residuals = jnp.where(final[:, None], 0.0, images - window.ys)
        updates = equations.updates(window.ys, residuals, window.num_final)
        # Not the sum on the first open step: next to a huge guess the small true value
        # would be lost to rounding.
        ys = jnp.where(first[:, None], images, window.ys + updates)

        sizes = measure(residuals)
        # Where the guess was right but began elsewhere, residuals were zero.
        old = jnp.maximum(window.residuals, 1)
        good = sizes <= _MAX_GROWTH * jnp.maximum(old, _FLOOR * lax.cummax(old))
        good |= norm(residuals) <= _SMALL * norm(equations.magnitudes(ys))
        # Without causality updates are damped, and there is nothing to predict from.
        good |= first | (not equations.is_causal)
        good &= jnp.all(jnp.isfinite(ys), axis=-1)
        num_trusted = prefix(good)
        trusted = index < num_trusted

        changes = jnp.maximum(measure(updates), sizes)
        known = (changes > 0) & jnp.isfinite(window.changes)
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
            window.num_final + int(equations.is_causal),
            num_trusted,
        )

    def _advance(
        self,
        equations: AbstractEquations,
        window: _Window,
        exhausted: Bool[Array, ""],
    ) -> tuple[_Window, Bool[Array, ""], Bool[Array, ""], Float[Array, " time"]]:
        """Predicts what is not trusted, verifies what was updated, updates the rest.

        Also returns whether it did update, whether there is no solution, and residuals.
        """
        size = len(window.ys)
        predict = lambda: equations.predict(window.ys, window.num_trusted)
        incomplete = eqxi.unvmap_any(window.num_trusted < size)
        ys = lax.cond(incomplete, predict, lambda: window.ys)
        images = equations.images(ys)
        measure = self._measure(equations, ys)
        # Without another iteration to come the estimate, which needs two, is not asked.
        solved = (window.errors <= 1) | exhausted
        solved &= measure(images - ys) <= 1
        num_final = prefix(solved | (jnp.arange(size) < window.num_final))
        complete = num_final == size
        # The values of the first open step are exact; if they are not finite, then no
        # number of iterations makes them so.
        exact = images
        if equations.is_causal:
            exact = images[jnp.minimum(num_final, size - 1)]
        lost = ~complete & ~jnp.all(jnp.isfinite(exact))
        window = _Window(
            ys,
            window.residuals,
            window.changes,
            window.errors,
            num_final,
            window.num_trusted,
        )
        idle = complete | lost | exhausted
        update = lambda: self._update(equations, window, images, measure)
        new = lax.cond(eqxi.unvmap_all(idle), lambda: window, update)
        return select(idle, window, new), ~idle, lost, equations.norms(images - ys)

    def _slide(
        self, equations: AbstractEquations, limit: int, state: _Progress
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
            equations = equations.part(start, size, steps.ys)
        window, updated, lost, residuals = self._advance(
            equations, jax.tree.map(cut, steps), state.num_iterations >= limit
        )
        new = jax.tree.map(put, steps, window)
        # Beyond the window the guess is what it was.
        beyond = jnp.maximum(steps.num_trusted, start + size)
        num_trusted = jnp.where(window.num_trusted < size, new.num_trusted, beyond)
        new = eqx.tree_at(lambda s: s.num_trusted, new, num_trusted)
        slides = ~lost & (window.num_final == size) & (start + size < num_steps)
        done = ~updated & ~slides
        num_verified = window.num_final
        if equations.is_causal:
            num_verified -= jnp.where(updated, 1, 0)
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
        recurrence = Recurrence(
            step_map, y0, xs, self.linearization, self.scan, self.predictor
        )
        return self.iterate(recurrence, guess)

    def iterate(
        self, equations: AbstractEquations, guess: States
    ) -> tuple[States, Statistics]:
        """Solves any equations, along `guess` `(time, state)`."""
        num_steps = len(guess)
        limit = num_steps if self.max_iterations is None else self.max_iterations
        zero, unknown = jnp.array(0, int), jnp.full(num_steps, jnp.inf, guess.dtype)
        num_known = prefix(jnp.all(jnp.isfinite(guess), axis=-1))
        steps = _Window(guess, unknown, unknown, unknown, zero, num_known)
        no = jnp.array(False)
        state = lax.while_loop(
            lambda state: ~state.done,
            ft.partial(self._slide, equations, limit),
            _Progress(steps, zero, jnp.zeros((), guess.dtype), no, no),
        )
        steps, lost = state.steps, state.lost
        solved = (steps.num_final == num_steps) & ~lost
        result = optx.RESULTS.where(
            lost, optx.RESULTS.nonfinite, optx.RESULTS.nonlinear_max_steps_reached
        )
        result = optx.RESULTS.where(solved, optx.RESULTS.successful, result)
        num_good = jnp.where(lost, steps.num_final, steps.num_trusted)
        ys = equations.hold(steps.ys, num_good)
        return ys, Statistics(
            state.num_iterations, state.residual, steps.num_final, result
        )
