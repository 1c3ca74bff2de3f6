"""How a trajectory is found: all steps at once, or one after another."""

import abc
import dataclasses
from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
import optimistix as optx
from jax import lax
from jaxtyping import Array, Int, PyTree

from ._affine_scan import AbstractScan, default_scan
from ._checks import check_count, check_optional, check_tolerance
from ._custom_types import State, States
from ._defaults import predicts_by_coarse_steps, tolerance, window_size
from ._linearization import AbstractLinearization, FullJacobian, PiecewiseConstant
from ._newton import NewtonIteration
from ._predictor import AbstractPredictor, CoarsePredictor, ConstantPredictor
from ._prefix import count_leading_true, hold_last
from ._statistics import Statistics
from ._step_map import StepMap


class AbstractMethod(eqx.Module):
    """How a trajectory is found. The answer and its gradient do not depend on it.

    - `uses_guess`: whether a guess is of any use.
    """

    uses_guess: eqx.AbstractClassVar[bool]

    @property
    def sharded_scan(self) -> AbstractScan | None:
        """The scan, where it has the steps on the devices of a mesh."""
        return None

    @abc.abstractmethod
    def resolve(self, step_map: StepMap, y0: State, num_steps: int) -> "AbstractMethod":
        """The same with all choices made that were left open."""

    @abc.abstractmethod
    def __call__(
        self, step_map: StepMap, y0: State, xs: PyTree[Any], guess: States
    ) -> tuple[States, Statistics, PyTree[Array]]:
        r"""Solves $y_n = \Phi(x_n, y_{n-1})$ for all n.

        **Arguments:**

        - `step_map`: the step $\Phi$.
        - `y0`: the initial state, `(state,)`, with at least one component.
        - `xs`: what drives the steps, a pytree of arrays of leading axis `time`.
        - `guess`: a trajectory, `(time, state)`, that may be close to the solution.
            From its first value that is not finite on there is none.

        **Returns:**

        The states, `(time, state)`, finite if `y0` is; the `Statistics`; and what else
        the steps have yielded, of leading axis `time`, if each was made once and is at
        hand, otherwise `None`. Nothing of it need be differentiable.
        """


class Newton(AbstractMethod):
    """All steps at once, by Newton's method: DEER.

    Converges in at most N iterations for N steps, from any guess, and in a few from a
    good one. Each costs N steps, their transitions and one scan; memory O(`window` D²)
    with dense transitions, O(`window` D) with diagonal ones.

    **Arguments:**

    - `linearization`: the transitions. `None` means `PiecewiseConstant()` for explicit
        solvers of one vector field, `FullJacobian()` otherwise.
    - `scan`: how the affine recurrence is solved. `None` means `SequentialScan()` on a
        CPU, `ChunkedScan()` on a GPU.
    - `predictor`: where there is no guess, or none that can be trusted. `None` means
        `CoarsePredictor()` for differential equations on a CPU, `ConstantPredictor()`
        for recurrences and elsewhere, where steps one after another cost the most.
    - `rtol`, `atol`: tolerances of the iteration, for the residual and the estimated
        error of each step, in each component relative to the largest value that it has
        had so far; not those of the differential equation. `None` means close to
        rounding, eps**0.75 of the coarsest type in the state, and zero.
    - `max_iterations`: at most this many iterations in one solve; `None` means as many
        as there are steps, which always suffices. Too few are a failure, which a step
        size controller answers with a smaller window.
    - `window`: the iteration works on this many steps at once, beginning with the first
        that has not converged. `None` means 1024 on a CPU, and elsewhere as many as
        have four million Jacobian entries, but at least 1024.

    **Raises:** `TypeError` or `ValueError` for arguments of the wrong type or range.

    ??? cite "Reference"

        Lim, Zhu, Selfridge and Kasim, *Parallelizing non-linear sequential models over
        the sequence length*, arXiv:2309.12252 (ICLR 2024).
    """

    linearization: AbstractLinearization | None = None
    scan: AbstractScan | None = None
    predictor: AbstractPredictor | None = None
    rtol: float | None = eqx.field(static=True, default=None)
    atol: float | None = eqx.field(static=True, default=None)
    max_iterations: int | None = eqx.field(static=True, default=None)
    window: int | None = eqx.field(static=True, default=None)
    uses_guess: ClassVar[bool] = True

    def __check_init__(self):
        for name, cls, example in (
            ("linearization", AbstractLinearization, "FullJacobian()"),
            ("scan", AbstractScan, "SequentialScan()"),
            ("predictor", AbstractPredictor, "CoarsePredictor()"),
        ):
            check_optional(name, getattr(self, name), cls, example)
        for name in ("rtol", "atol"):
            check_tolerance(name, getattr(self, name))
        for name in ("max_iterations", "window"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))

    @property
    def sharded_scan(self):
        """The scan, where it has the steps on the devices of a mesh."""
        is_sharded = self.scan is not None and self.scan.time_axis.is_sharded
        return self.scan if is_sharded else None

    def resolve(self, step_map, y0, num_steps):
        has_field = step_map.increment is not None and not step_map.is_implicit
        coarse = step_map.coarse_step is not None and predicts_by_coarse_steps()
        eps = step_map.eps or float(jnp.finfo(y0.dtype).eps)
        window = window_size(y0.size**2) if self.window is None else self.window
        if self.sharded_scan is not None:
            # What slides over the devices, or goes from one to the next, has to move.
            window, coarse = num_steps, False
        linearization = PiecewiseConstant() if has_field else FullJacobian()
        predictor = CoarsePredictor() if coarse else ConstantPredictor()
        return Newton(
            self.linearization or linearization,
            self.scan or default_scan(),
            self.predictor or predictor,
            tolerance(eps) if self.rtol is None else self.rtol,
            0.0 if self.atol is None else self.atol,
            num_steps if self.max_iterations is None else self.max_iterations,
            min(window, num_steps),
        )

    def __call__(self, step_map, y0, xs, guess):
        chosen = self.resolve(step_map, y0, len(guess))
        if self.sharded_scan is not None:
            xs, guess = self.sharded_scan.time_axis.place((xs, guess))
        ys, statistics = NewtonIteration(step_map, y0, xs, chosen).solve(guess)
        return ys, dataclasses.replace(statistics, method=chosen), None


class Sequential(AbstractMethod):
    """One step after another, with `jax.lax.scan`. No guess, no iteration.

    The least work, N steps, and the best choice on a CPU; the gradient may be parallel
    nevertheless.
    """

    uses_guess: ClassVar[bool] = False

    def resolve(self, step_map, y0, num_steps):
        del step_map, y0, num_steps
        return self

    def __call__(self, step_map, y0, xs, guess):
        def step(y, x):
            y, aux = step_map.evaluate(x, y)
            return y, (y, aux)

        _, (ys, aux) = lax.scan(step, y0, xs, length=len(guess))
        finite = jnp.all(jnp.isfinite(ys), axis=-1)
        # As after an iteration: a finite trajectory, so that no derivative is NaN.
        num_finite = count_leading_true(finite)
        ys = hold_last(y0, ys, num_finite)
        result = optx.RESULTS.where(
            jnp.all(finite), optx.RESULTS.successful, optx.RESULTS.nonfinite
        )
        count = jnp.array(0, int)
        return ys, Statistics(count, None, num_finite, result, self), aux


class Given(AbstractMethod):
    """The guess is the solution, of so many steps: it has been found before."""

    num_solved: Int[Array, ""]
    uses_guess: ClassVar[bool] = True

    def resolve(self, step_map, y0, num_steps):
        del step_map, y0, num_steps
        return self

    def __call__(self, step_map, y0, xs, guess):
        result = optx.RESULTS.where(
            self.num_solved == len(guess),
            optx.RESULTS.successful,
            optx.RESULTS.nonlinear_divergence,
        )
        count = jnp.array(0, int)
        return guess, Statistics(count, None, self.num_solved, result, self), None
