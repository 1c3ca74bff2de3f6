r"""The general framework: any equation with a linear operator that can be inverted.

$$L[y](r) = f(y(r - s_1), \dots, y(r - s_P), x(r); \theta)$$

on a grid of points r, algorithm 1 of arXiv:2309.12252. With $G_p = -\partial_p f$ along
a guess, Newton's method needs $L_G = L + \sum_p G_p\, y(r - s_p)$ to be inverted:
$y \leftarrow L_G^{-1}[f + \sum_p G_p\, y(r - s_p)]$, in `damped_newton` written for the
residual. The derivative of the solution is that of the equations, by the implicit
function theorem, whatever iteration has found it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import optimistix as optx
from jax import lax
from jaxtyping import Array, PyTree

from .._checks import check_instance
from .._custom_types import State, States
from .._defaults import tolerance
from .._statistics import nan_unless, raise_if_failed
from .._step_map import split_by_tangent
from .damped_newton import DampedNewton, Equations

_FAILURES = [
    "`deer_solve`: a value became infinite or NaN. Try another `guess`; with "
    "`throw=False` NaN is returned instead.",
    "`deer_solve`: not converged within `max_iterations`. Try a better `guess` or more "
    "iterations. If the updates have become as small as rounding, allow for it by a "
    "larger `rtol`. If `inverse` ignores `gs`, the iteration may not converge at all.",
]


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
    - `guess`: `(time, state)`, of a floating type. Where there are several solutions,
        or where updates are damped, it decides which one is found, and whether any is.
    - `xs`: a pytree of arrays of leading axis `time`.
    - `method`: tolerances, iterations, and what makes the G: a `DampedNewton`.
    - `throw`: whether a failed solve raises an error, at run time. Otherwise the result
        is NaN.
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
    equations = Equations(f, inverse, shifter, xs, method.linearization)
    x = jax.tree.map(lambda x: x[0], xs)
    shifted = list(shifter(guess))
    equations = Equations(
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
    ys = nan_unless(succeeded, ys)
    if throw:
        ys = raise_if_failed(ys, statistics.result, _FAILURES)
    return (ys, statistics) if return_statistics else ys
