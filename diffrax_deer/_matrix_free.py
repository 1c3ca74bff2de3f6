r"""The affine recurrence of matrices that are only known by their products.

$$v_n = J_n v_{n-1} + b_n, \qquad n = 1 \dots N, \quad v_0 = 0,$$

for a state so large that N matrices of size D × D are too much to hold, when all that
is cheap is $J v$ for all steps at once. Transitions $A_n \approx J_n$ that a scan can
handle (diagonal, block-diagonal) give the sweep

$$\delta_n = A_n \delta_{n-1} + r_n, \quad r_n = J_n v_{n-1} + b_n - v_n, \qquad
v \leftarrow v + \delta.$$

Its error operator is nilpotent, whatever A is: each sweep makes one more step exact.
That alone would not survive rounding and overflow, so that it is enforced, as in the
iteration for the nonlinear recurrence:

1. the leading steps whose residual and update are below tolerance are final: they are
   left as they were measured;
2. the first step that is not takes its exact value, $J_n v_{n-1} + b_n$, and is final
   from then on: N sweeps suffice;
3. from the first value that is not finite on, v is reset to zero; unless that value is
   exact, then the solution overflows, and is NaN from there on.

The number of sweeps depends on A, the result does not. The transposed system is one of
the same kind in reversed time.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ._affine_scan import AbstractScan, shift, transpose
from ._custom_types import States, Transitions


def _norm(x: Float[Array, "... state"]) -> Float[Array, "..."]:
    return jnp.max(jnp.abs(x), axis=-1)


def _prefix(good: Bool[Array, " time"]) -> Int[Array, ""]:
    """The number of leading `True`s."""
    return jnp.where(jnp.all(good), good.size, jnp.argmin(good))


def _tolerance(v: States, b: States) -> Float[Array, " time"]:
    """For the residual and the update of each step."""
    eps = float(jnp.finfo(v.dtype).eps)
    before = _norm(shift(jnp.zeros_like(v[0]), v))
    # The second: less than the rounding of a product with `before` cannot be asked for.
    return eps**0.75 * jnp.maximum(_norm(v), _norm(b)) + 64 * eps * before


def sweeps(
    product: Callable[[States], States],
    transitions: Transitions,
    b: States,
    scan: AbstractScan,
) -> tuple[States, Int[Array, ""]]:
    """Solves `v = product(v) + b`; `product` takes each step to the next.

    **Returns:** the solution and the number of sweeps it took. Not differentiable.
    """
    num_steps, zero = len(b), jnp.zeros_like(b[0])
    index = jnp.arange(num_steps)
    axes = tuple(range(1, transitions.ndim))
    usable = jnp.all(jnp.isfinite(transitions), axis=axes)

    def sweep(carry):
        v, num_final, num_sweeps = carry
        images = product(v) + b
        residuals = jnp.where((index < num_final)[:, None], zero, images - v)
        # Final steps have no update to carry on, and must not be reached by overflow.
        carries = jnp.expand_dims(usable & (index > num_final), axes)
        updates = scan(jnp.where(carries, transitions, 0.0), residuals)
        # Not `v + updates`, where next to a huge v the exact value would be lost.
        new = jnp.where((index == num_final)[:, None], images, v + updates)

        finite = jnp.all(jnp.isfinite(new), axis=-1)
        change = jnp.maximum(_norm(updates), _norm(residuals))
        num_small = _prefix(finite & (change <= _tolerance(v, b)))
        new = jnp.where((index < num_small)[:, None], v, new)
        num_finite = _prefix(finite)
        # The exact value itself is not finite: nor is what follows.
        lost = num_finite <= num_final
        rest = jnp.where(lost, jnp.nan, 0.0).astype(v.dtype)
        new = jnp.where((index < num_finite)[:, None], new, rest)
        num_final = jnp.where(lost, num_steps, jnp.maximum(num_small, num_final + 1))
        return new, num_final, num_sweeps + 1

    init = jnp.zeros_like(b), jnp.array(0, int), jnp.array(0, int)
    v, _, num_sweeps = lax.while_loop(lambda carry: carry[1] < num_steps, sweep, init)
    return v, num_sweeps


def matrix_free_recurrence(
    product: Callable[[States], States],
    transitions: Transitions,
    b: States,
    *,
    scan: AbstractScan,
) -> States:
    r"""Solves $v_n = J_n v_{n-1} + b_n$, differentiably.

    Residual and last update of each step are below `eps**0.75` relative to the norms of
    $v_n$ and $b_n$, or of the order of the rounding of $v_{n-1}$, with the rounding
    unit `eps` of b. In double precision that is 2e-12, in single 6e-6.

    Linear in `b`. Derivatives of any order and mode with respect to `b` and all that
    `product` depends on, each the solution of another such system.

    **Arguments:**

    - `product`: the products $J_n u_n$ of all steps for `u`, `(time, state)`: linear,
        and one that JAX can transpose.
    - `transitions`: approximations of $J_n$. The solution does not depend on them.
    - `b`: `(time, state)`.
    - `scan`: an `AbstractScan`.

    **Returns:**

    `v_1` to `v_N`, `(time, state)`. Memory O(N D) beside the transitions and `product`.
    """

    def shifted(v):
        return product(shift(jnp.zeros_like(v[0]), v))

    def solve(_, b):
        return sweeps(shifted, transitions, b, scan)[0]

    def transpose_solve(_, c):
        pull = jax.linear_transpose(shifted, c)
        backwards = lambda v: pull(v[::-1])[0][::-1]
        v, _ = sweeps(backwards, transpose(transitions, c)[::-1], c[::-1], scan)
        return v[::-1]

    return lax.custom_linear_solve(lambda v: v - shifted(v), b, solve, transpose_solve)
