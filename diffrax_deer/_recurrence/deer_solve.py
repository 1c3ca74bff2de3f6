r"""The general framework: any equation with a linear operator that can be inverted.

$$L[y](r) = f(y(r - s_1), \dots, y(r - s_P), x(r); \theta)$$

on a grid of points r, algorithm 1 of arXiv:2309.12252. With $G_p = -\partial_p f$ along
a guess, Newton's method needs $L_G = L + \sum_p G_p\, y(r - s_p)$ to be inverted:
$y \leftarrow L_G^{-1}[f + \sum_p G_p\, y(r - s_p)]$.

Here it is written for the residual $\rho = L^{-1} f(y) - y$ of the fixed-point problem,

$$y \leftarrow y + \rho - L_G^{-1} \sum_p G_p\, \rho(r - s_p),$$

the same thing if the user's $L_G^{-1}$ is exact. If it is not, because it is only cheap
for some G, then that costs iterations; the answer is decided by $L^{-1}$ alone.

Updates are damped by Deuflhard's restricted natural monotonicity test. All points are
solved together or none is, and no number of iterations is known to suffice.
"""

import functools as ft
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import optimistix as optx
from jax import lax
from jaxtyping import Array, PyTree

from .._checks import check_count, check_instance, check_tolerance
from .._custom_types import State, States
from .._defaults import MAX_DAMPED_ITERATIONS, MIN_DAMPING, RATE_SAFETY, tolerance
from .._linalg.transitions import AbstractTransition, multiply
from .._linearization import AbstractLinearization, FullJacobian
from .._statistics import Statistics, raise_if_failed
from .._step_map import StepMap, split_by_tangent

_FAILURES = [
    "`deer_solve`: a value became infinite or NaN. Try another `guess`; with "
    "`throw=False` NaN is returned instead.",
    "`deer_solve`: not converged within `max_iterations`. Try a better `guess` or more "
    "iterations. If the updates have become as small as rounding, allow for it by a "
    "larger `rtol`. If `inverse` ignores `gs`, the iteration may not converge at all.",
]


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
        self, equations: "_Framework", guess: States
    ) -> tuple[States, Statistics]:
        """Solves `equations.images(ys) == ys` from `guess`; not differentiable."""
        eps = float(jnp.finfo(guess.dtype).eps)
        rtol = tolerance(eps) if self.rtol is None else self.rtol
        atol = 0.0 if self.atol is None else self.atol

        def measure(x, ys):
            scale = atol + rtol * jnp.max(jnp.abs(ys), axis=0)
            return jnp.max(jnp.where(x == 0, 0.0, jnp.abs(x) / scale))

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
        result = optx.RESULTS.where(
            finite, optx.RESULTS.nonlinear_max_steps_reached, optx.RESULTS.nonfinite
        )
        result = optx.RESULTS.where(solved, optx.RESULTS.successful, result)
        num_solved = jnp.where(solved, len(ys), 0)
        residual = jnp.max(jnp.abs(residuals))
        return ys, Statistics(count, residual, num_solved, result, self)


class _Framework(eqx.Module):
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
        size = jnp.max(jnp.abs(full))

        def too_long(part):
            new = ys + part * full
            # Deuflhard's restricted natural monotonicity test.
            left = jnp.max(jnp.abs(newton(self.images(new) - new)))
            return ~(left <= (1 - part / 4) * size) & (part > MIN_DAMPING)

        half = jnp.array(0.5, ys.dtype)
        part = lax.while_loop(too_long, lambda part: part * half, 2 * half)
        return jnp.where(part > MIN_DAMPING, part * full, 0)


def _preconditioned(
    operator: Callable[[States], States],
    inverse: Callable[[States], States],
    b: States,
) -> States:
    """Solves `operator(v) = b` by GMRES, to a tolerance that is relative to `b`."""
    like = jax.ShapeDtypeStruct(b.shape, b.dtype)
    rtol = tolerance(float(jnp.finfo(b.dtype).eps))
    unit = jnp.max(jnp.abs(b))
    unit = jnp.where(unit > 0, unit, 1)
    solution = lx.linear_solve(
        lx.FunctionLinearOperator(operator, like),
        b / unit,
        lx.GMRES(rtol=rtol, atol=rtol),
        # A failed sample of a batch must not stop the others.
        throw=False,
        options={"preconditioner": lx.FunctionLinearOperator(inverse, like)},
    )
    return unit * solution.value


@eqx.filter_custom_jvp
def _solve(equations, *, guess, method):
    return method(equations, guess)


@_solve.def_jvp
def _(primals, tangents, **kwargs):
    ((equations,), (equations_dot,)) = primals, tangents
    ys, statistics = _solve(equations, **kwargs)
    moving, fixed = split_by_tangent(equations, equations_dot)

    def images(moving, ys):
        return eqx.combine(moving, fixed).images(ys)

    _, push = jax.linearize(images, moving, ys)
    still = jax.tree.map(jnp.zeros_like, moving)
    change = push(equations_dot, jnp.zeros_like(ys))
    newton = equations.newton(ys)
    # The solution moves by v = F'(Y) v + change, which the iteration's own update
    # solves, at once if it is exact.
    ys_dot = lax.custom_linear_solve(
        lambda v: v - push(still, v),
        change,
        lambda matvec, b: _preconditioned(matvec, newton, b),
        lambda matvec, b: _preconditioned(
            matvec, lambda v: jax.linear_transpose(newton, v)(v)[0], b
        ),
    )
    return (ys, statistics), (ys_dot, jax.tree.map(lambda _: None, statistics))


def _check_shapes(f: Callable, shifter: Callable, guess: States, xs: Any) -> None:
    """Raises unless `xs`, `shifter` and `f` go with the shape of `guess`."""
    lengths = [jnp.shape(x)[:1] for x in jax.tree.leaves(xs)]
    if any(length != guess.shape[:1] for length in lengths):
        msg = (
            f"`xs` must have a leading axis as long as that of `guess`, {len(guess)}; "
            f"got leaves of shapes {jax.tree.map(jnp.shape, xs)}."
        )
        raise ValueError(msg)
    shifted = jax.eval_shape(lambda y: list(shifter(y)), guess)
    if not shifted or any(y.shape != guess.shape for y in shifted):
        msg = (
            f"`shifter` must return arrays like `guess`, of shape {guess.shape}; got "
            f"{[y.shape for y in shifted]}."
        )
        raise ValueError(msg)
    out = jax.eval_shape(lambda y, xs: jax.vmap(f)(list(shifter(y)), xs), guess, xs)
    if jnp.shape(out) != guess.shape or out.dtype != guess.dtype:
        msg = (
            f"`f` must return an array of shape {guess.shape[1:]} and type "
            f"{guess.dtype}, as `guess` has it at each point; got "
            f"{jax.tree.map(lambda x: (x.shape[1:], str(x.dtype)), out)}."
        )
        raise ValueError(msg)


_DAMPED_NEWTON = DampedNewton()


@eqx.filter_jit
def deer_solve(
    f: Callable[[list[State], Any], State],
    inverse: Callable[[list[Array], States], States],
    shifter: Callable[[States], Sequence[States]],
    guess: States,
    xs: PyTree[Array] = None,
    *,
    method: DampedNewton = _DAMPED_NEWTON,
    throw: bool = True,
    return_statistics: bool = False,
) -> Any:
    r"""Solves $L[y](r) = f(y(r - s_1), \dots, y(r - s_P), x(r))$ at N points at once.

    For equations that are neither `deer_scan`'s nor `diffeqsolve`'s: recurrences of
    higher order, delays, boundary values, partial differential equations. The first
    axis of `y`, here called `time`, are the points r, the second one is what there is
    at each of them. All functions may close over traced values.

    **Arguments:**

    - `f`: the right-hand side at one point, `f(shifted, x)`. `shifted` is the list of
        the P values of shape `(state,)`; returns `(state,)`.
    - `inverse`: `inverse(gs, rhs)` returns the y, `(time, state)`, for which
        $L[y](r) + \sum_p G_p(r)\, y(r - s_p)$ is `rhs`, `(time, state)`. Initial and
        boundary values are its business. `gs` is the list of the P arrays $G_p$,
        `(time, state, state)`, or `(time, state)` if the linearization is diagonal. Has
        to be right for zeros; if it only approximates the rest, the solve takes more
        iterations. Affine in `rhs`, and differentiable by JAX in both modes.
    - `shifter`: `shifter(y)` returns the P arrays $y(r - s_p)$, `(time, state)` each.
        Affine.
    - `guess`: `(time, state)`, of a floating type. The answer does not depend on it if
        `causal`, and otherwise as that of any Newton method does.
    - `xs`: a pytree of arrays of leading axis `time`.
    - `method`: tolerances, iterations, and what makes the G: a `DampedNewton`.
    - `throw`: whether a failed solve raises an error, at run time. Otherwise the result
        is NaN where it is not solved.
    - `return_statistics`: whether to return `Statistics`, too.

    **Returns:** y, `(time, state)`; or y and `Statistics`. Exact derivatives of any
    order and mode with respect to all that the functions and `xs` depend on, none with
    respect to `guess`: by the implicit function theorem and GMRES, preconditioned by an
    update of the iteration, which takes a single step if `inverse` is exact.

    **Raises:** `TypeError` or `ValueError` for arguments of the wrong type or shape.

    **Cost:** of an iteration, two calls of `inverse`, all N evaluations of `f` with D
    tangents for each shift, memory O(P N D²); O(P N D) with diagonal G.

    ??? cite "Reference"

        Lim, Zhu, Selfridge and Kasim, *Parallelizing non-linear sequential models over
        the sequence length*, arXiv:2309.12252, section 3.1 and algorithm 1.
    """
    check_instance("method", method, DampedNewton, "DampedNewton()")
    guess = jnp.asarray(guess)
    if (
        guess.ndim != 2
        or guess.size == 0
        or not jnp.issubdtype(guess.dtype, jnp.floating)
    ):
        msg = (
            "`guess` must be a real array of shape `(time, state)`, not empty; "
            f"got {guess.dtype} of shape {guess.shape}. Ravel what there is at each "
            "point, and unravel it in `f` and `inverse`."
        )
        raise ValueError(msg)
    guess = lax.stop_gradient(guess)
    _check_shapes(f, shifter, guess, xs)
    # So that all they close over is an argument, which is differentiated.
    equations = _Framework(f, inverse, shifter, xs, method.linearization)
    x = jax.tree.map(lambda x: x[0], xs)
    shifted = list(shifter(guess))
    equations = _Framework(
        eqx.filter_closure_convert(f, [y[0] for y in shifted], x),
        eqx.filter_closure_convert(inverse, equations.zeros(guess), guess),
        eqx.filter_closure_convert(shifter, guess),
        xs,
        method.linearization,
    )
    image = jax.eval_shape(equations.images, guess)
    if jnp.shape(image) != guess.shape or image.dtype != guess.dtype:
        msg = (
            f"`inverse` must return an array like `guess`, {guess.dtype} of shape "
            f"{guess.shape}; got {jax.tree.map(lambda x: (x.dtype, x.shape), image)}."
        )
        raise ValueError(msg)
    ys, statistics = _solve(equations, guess=guess, method=method)
    succeeded = statistics.result == optx.RESULTS.successful
    ys = jnp.where(succeeded, ys, jnp.nan)
    if throw:
        ys = raise_if_failed(ys, statistics.result, _FAILURES)
    return (ys, statistics) if return_statistics else ys
