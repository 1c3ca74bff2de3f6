r"""The general framework: any equation with a linear operator that can be inverted.

$$L[y](r) = f(y(r - s_1), \dots, y(r - s_P), x(r); \theta)$$

on a grid of points r, algorithm 1 of arXiv:2309.12252. With $G_p = -\partial_p f$ along
a guess, Newton's method needs $L_G = L + \sum_p G_p\, y(r - s_p)$ to be inverted:
$y \leftarrow L_G^{-1}[f + \sum_p G_p\, y(r - s_p)]$.

Here it is written for the residual $\rho = L^{-1} f(y) - y$ of the fixed-point problem,

$$y \leftarrow y + \rho - L_G^{-1} \sum_p G_p\, \rho(r - s_p),$$

the same thing if the user's $L_G^{-1}$ is exact. If it is not, because it is only cheap
for some G, then that costs iterations; the answer is decided by $L^{-1}$ alone.

A recurrence is the case where L is the identity and the shift is one step; there the
iteration is that of `_newton`, and so is the loop that runs it here.
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

from ._affine_scan import SequentialScan
from ._causal import hold
from ._custom_types import State, States, Transitions
from ._linearization import (
    AbstractLinearization,
    FullJacobian,
    Picard,
    StepMap,
    driven,
)
from ._newton import (
    AbstractEquations,
    NewtonIteration,
    check_iteration,
    raise_if_failed,
)
from ._predictor import ConstantPredictor

_NEWTON = FullJacobian()

# Without causality no number of iterations is enough, so that some has to do; and the
# smallest part of an update that is tried.
_MAX_ITERATIONS, _LEAST = 100, 2.0**-12

_FAILURES = [
    "`deer_solve`: a value became infinite or NaN. Try another `guess`; with "
    "`throw=False` NaN is returned instead.",
    "`deer_solve`: not converged within `max_iterations`. Try a better `guess` or more "
    "iterations. If the updates have become as small as rounding, allow for it by a "
    "larger `rtol`. If `inverse` ignores `gs`, the iteration may not converge at all.",
]


class _Framework(AbstractEquations):
    """The equations y = L⁻¹ f(shifted y)."""

    is_causal: bool
    f: Callable[[list[State], PyTree[Any]], State]
    inverse: Callable[[list[Transitions], States], States]
    shifter: Callable[[States], Sequence[States]]
    xs: PyTree[Any]
    linearization: AbstractLinearization

    def _right_hand_side(self, ys: States) -> States:
        return jax.vmap(self.f)(list(self.shifter(ys)), self.xs)

    def _negative_jacobians(self, ys: States) -> list[Transitions]:
        """The G of each shift."""

        def point(shifted, x):
            def with_respect_to(p):
                step = lambda _, y: self.f([*shifted[:p], y, *shifted[p + 1 :]], x)
                y = shifted[p]
                return -self.linearization(StepMap(step), None, y, y)

            return [with_respect_to(p) for p in range(len(shifted))]

        return jax.vmap(point)(list(self.shifter(ys)), self.xs)

    def without(self, ys: States) -> list[Transitions]:
        """Zeros in place of the G."""
        if isinstance(self.linearization, Picard):
            return [jnp.zeros_like(y) for y in self.shifter(ys)]
        shapes = jax.eval_shape(self._negative_jacobians, ys)
        return jax.tree.map(lambda g: jnp.zeros(g.shape, g.dtype), shapes)

    def images(self, ys):
        return self.inverse(self.without(ys), self._right_hand_side(ys))

    def newton(self, ys: States) -> Callable[[States], States]:
        """The linear map from residuals to updates, linearized at `ys`."""
        if isinstance(self.linearization, Picard):
            return lambda residuals: residuals
        gs, zero = self._negative_jacobians(ys), jnp.zeros_like(ys)
        # Both may add what does not depend on their argument, an initial value.
        shift, inverse = (
            jax.linearize(self.shifter, zero)[1],
            jax.linearize(ft.partial(self.inverse, gs), zero)[1],
        )

        def update(residuals):
            products = map(_products, gs, shift(residuals))
            return residuals - inverse(sum(products, start=jnp.zeros_like(residuals)))

        return update

    def updates(self, ys, residuals, num_final):
        del num_final
        newton = self.newton(ys)
        full = newton(residuals)
        if self.is_causal:
            # No damping: what an update spoils is predicted anew by the iteration.
            return full
        size = jnp.max(jnp.abs(full))

        def too_long(part):
            new = ys + part * full
            # Deuflhard's restricted natural monotonicity test.
            left = jnp.max(jnp.abs(newton(self.images(new) - new)))
            return ~(left <= (1 - part / 4) * size) & (part > _LEAST)

        half = jnp.array(0.5, ys.dtype)
        part = lax.while_loop(too_long, lambda part: part * half, 2 * half)
        return jnp.where(part > _LEAST, part * full, 0)

    def magnitudes(self, ys):
        return jnp.abs(ys)

    def predict(self, ys, num_known):
        return self.hold(ys, num_known)

    def hold(self, ys, num_known):
        start = jnp.where(jnp.isfinite(ys[0]), ys[0], 0)
        return hold(start, ys, num_known)

    def part(self, start, size, ys):
        raise NotImplementedError  # There are no windows.


def _products(g: Transitions, y: States) -> States:
    if g.ndim == y.ndim:
        return g * y
    if g.ndim == y.ndim + 1:
        return jnp.einsum("nij,nj->ni", g, y, precision=lax.Precision.HIGHEST)
    blocks = y.reshape(g.shape[:3])
    out = jnp.einsum("ngij,ngj->ngi", g, blocks, precision=lax.Precision.HIGHEST)
    return out.reshape(y.shape)


def _preconditioned(
    operator: Callable[[States], States],
    inverse: Callable[[States], States],
    b: States,
) -> States:
    """Solves `operator(v) = b` by GMRES, to a tolerance that is relative to `b`."""
    like = jax.ShapeDtypeStruct(b.shape, b.dtype)
    tolerance = float(jnp.finfo(b.dtype).eps) ** 0.75
    unit = jnp.max(jnp.abs(b))
    unit = jnp.where(unit > 0, unit, 1)
    solution = lx.linear_solve(
        lx.FunctionLinearOperator(operator, like),
        b / unit,
        lx.GMRES(rtol=tolerance, atol=tolerance),
        options={"preconditioner": lx.FunctionLinearOperator(inverse, like)},
    )
    return unit * solution.value


@eqx.filter_custom_jvp
def _solve(equations, *, guess, iteration):
    ys, statistics = iteration.iterate(equations, guess)
    return ys, statistics


@_solve.def_jvp
def _(primals, tangents, **kwargs):
    ((equations,), (equations_dot,)) = primals, tangents
    ys, statistics = _solve(equations, **kwargs)
    moving, fixed = driven(equations, equations_dot)

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


@eqx.filter_jit
def deer_solve(
    f: Callable[[list[State], Any], State],
    inverse: Callable[[list[Transitions], States], States],
    shifter: Callable[[States], Sequence[States]],
    guess: States,
    xs: PyTree[Array] = None,
    *,
    causal: bool = False,
    linearization: AbstractLinearization = _NEWTON,
    rtol: float | None = None,
    atol: float | None = None,
    max_iterations: int | None = None,
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
    - `causal`: whether `inverse` with `gs` of zero of the right-hand side of y depends,
        at each point, on y at points *before* it only, as in a recurrence. Then
        the solve cannot fail: it takes N iterations at the very most. Without, updates
        are damped (Deuflhard, *Newton methods for nonlinear problems*, 2011, section
        3.3), and the solve may fail.
    - `linearization`: makes the G. With `Picard()` they are zero.
    - `rtol`, `atol`: bounds for residual and estimated error, in each component
        relative to the largest value that it has had so far, or has anywhere if not
        causal. `None` means eps**0.75, and zero.
    - `max_iterations`: `None` means N if `causal`, otherwise 100.
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
    check_iteration(linearization, rtol, atol, max_iterations)
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
    equations = _Framework(causal, f, inverse, shifter, xs, linearization)
    x = jax.tree.map(lambda x: x[0], xs)
    shifted = list(shifter(guess))
    equations = _Framework(
        causal,
        eqx.filter_closure_convert(f, [y[0] for y in shifted], x),
        eqx.filter_closure_convert(inverse, equations.without(guess), guess),
        eqx.filter_closure_convert(shifter, guess),
        xs,
        linearization,
    )
    image = jax.eval_shape(equations.images, guess)
    if jnp.shape(image) != guess.shape or image.dtype != guess.dtype:
        msg = (
            f"`inverse` must return an array like `guess`, {guess.dtype} of shape "
            f"{guess.shape}; got {jax.tree.map(lambda x: (x.dtype, x.shape), image)}."
        )
        raise ValueError(msg)
    tolerance = float(jnp.finfo(guess.dtype).eps) ** 0.75
    iteration = NewtonIteration(
        linearization,
        SequentialScan(),
        ConstantPredictor(),
        tolerance if rtol is None else rtol,
        0.0 if atol is None else atol,
        _MAX_ITERATIONS if max_iterations is None and not causal else max_iterations,
        None,
    )
    ys, statistics = _solve(equations, guess=guess, iteration=iteration)
    failed = statistics.result != optx.RESULTS.successful
    solved = ~failed | (jnp.arange(len(ys)) < statistics.num_solved)
    ys = jnp.where(solved[:, None], ys, jnp.nan)
    if throw:
        ys = raise_if_failed(ys, statistics.result, _FAILURES)
    return (ys, statistics) if return_statistics else ys
