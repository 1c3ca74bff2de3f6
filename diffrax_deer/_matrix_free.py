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

1. a step whose update and residual, and those of all steps before it, are below
   tolerance is final, and not touched again once it has been updated;
2. the first step that is not yet final takes its exact value, $J_n v_{n-1} + b_n$, and
   is final too: after N sweeps all are;
3. from the first value that is not finite on, v is reset to zero; unless that value is
   exact, then the solution overflows, and is NaN from there on.

What is returned has been measured: where the last update of a final step has moved a
residual above the tolerance, the sweeps go on from there, and now leave final steps as
they were measured. The number of sweeps, at most 2 N + 2, depends on A, the result does
not. The transposed system is one of
the same kind in reversed time.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ._affine_scan import AbstractScan, default_scan
from ._custom_types import States
from ._defaults import tolerance
from ._linalg.transitions import AbstractTransition, are_finite, zero_unless
from ._prefix import count_leading_true, max_norm, shift
from ._varying import uniform


def _tolerance(v: States, b: States, rtol: float) -> Float[Array, " time"]:
    """For the residual and the update of each step."""
    rounding = 64 * float(jnp.finfo(v.dtype).eps)
    before = max_norm(shift(jnp.zeros_like(v[0]), v))
    # The second: less than the rounding of a product with `before` cannot be asked for.
    return rtol * jnp.maximum(max_norm(v), max_norm(b)) + rounding * before


def sweeps(
    product: Callable[[States], States],
    transitions: AbstractTransition,
    b: States,
    scan: AbstractScan,
    rtol: float,
) -> tuple[States, Int[Array, ""]]:
    """Solves `v = product(v) + b`; `product` takes each step to the next.

    **Returns:** the solution and the number of sweeps it took. Not differentiable.
    """
    num_steps, index = len(b), jnp.arange(len(b))
    usable = are_finite(transitions)

    def sweep(carry):
        v, num_final, strict, _, num_sweeps = carry
        images = product(v) + b
        is_final = (index < num_final)[:, None]
        residuals = jnp.where(is_final, 0.0, images - v)
        # Final steps have no update to carry on, and must not be reached by overflow.
        carries = usable & (index > num_final)
        updates = scan(zero_unless(carries, transitions), residuals)
        # Not `v + updates`, where next to a huge v the exact value would be lost.
        new = jnp.where((index == num_final)[:, None], images, v + updates)

        finite = jnp.all(jnp.isfinite(new), axis=-1)
        bound = _tolerance(v, b, rtol)
        change = jnp.maximum(max_norm(updates), max_norm(residuals))
        num_finite, num_small = (
            count_leading_true(finite),
            count_leading_true(finite & (change <= bound)),
        )
        num_measured = count_leading_true(max_norm(images - v) <= bound)
        # The exact value itself is not finite: nor is what follows.
        lost = num_finite <= jnp.minimum(num_final, num_steps - 1)
        done = (num_small == num_steps) & (strict | (num_measured == num_steps))
        keep = done | (strict & (index < num_small))
        rest = jnp.where(lost, jnp.nan, 0.0).astype(v.dtype)
        new = jnp.where((index < num_finite)[:, None], new, rest)
        new = jnp.where(keep[:, None], v, new)
        # All are final, but the last update has made some worse.
        reopen = num_final == num_steps
        num_final = jnp.maximum(num_small, num_final + 1)
        num_final = jnp.where(reopen, num_measured, jnp.minimum(num_final, num_steps))
        return new, num_final, strict | reopen, done | lost, num_sweeps + 1

    zero, false = jnp.array(0, int), jnp.array(False)
    init = uniform((jnp.zeros_like(b), zero, false, false, zero), b)
    v, *_, num_sweeps = lax.while_loop(lambda carry: ~carry[3], sweep, init)
    return v, num_sweeps


def reverse(
    product: Callable[[States], States], transitions: AbstractTransition, c: States
) -> tuple[Callable[[States], States], AbstractTransition, States]:
    """The transposed system, as what `sweeps` solves, in reversed time."""
    pull = jax.linear_transpose(product, c)
    backwards = lambda v: pull(v[::-1])[0][::-1]
    # The transposed transition of step n belongs to step n + 1; the last has none.
    following = jax.tree.map(
        lambda x: jnp.concatenate([x[1:], jnp.zeros_like(x[:1])])[::-1], transitions
    )
    return backwards, jax.vmap(lambda a: a.transpose())(following), c[::-1]


def matrix_free_recurrence(
    product: Callable[[States], States],
    transitions: AbstractTransition,
    b: States,
    *,
    scan: AbstractScan | None = None,
    rtol: float | None = None,
) -> States:
    r"""Solves $v_n = J_n v_{n-1} + b_n$, differentiably.

    Residual and last update of each step are below `rtol` relative to the norms of
    $v_n$ and $b_n$, or of the order of the rounding of $v_{n-1}$.

    Linear in `b`. Derivatives of any order and mode with respect to `b` and all that
    `product` depends on, each the solution of another such system.

    **Arguments:**

    - `product`: the products $J_n u_n$ of all steps for `u`, `(time, state)`: linear,
        and one that JAX can transpose.
    - `transitions`: approximations of $J_n$. The solution does not depend on them.
    - `b`: `(time, state)`.
    - `scan`: how the affine recurrence is solved; `None` as in `affine_recurrence`.
    - `rtol`: `None` means eps**0.75 for the rounding unit of b: 2e-12 in double
        precision, 6e-6 in single.

    **Returns:**

    `v_1` to `v_N`, `(time, state)`. Memory O(N D) beside the transitions and `product`.
    """
    scan = default_scan() if scan is None else scan
    rtol = tolerance(float(jnp.finfo(b.dtype).eps)) if rtol is None else rtol

    def shifted(v):
        return product(shift(jnp.zeros_like(v[0]), v))

    def solve(_, b):
        return sweeps(shifted, transitions, b, scan, rtol)[0]

    def transpose_solve(_, c):
        return sweeps(*reverse(shifted, transitions, c), scan, rtol)[0][::-1]

    return lax.custom_linear_solve(lambda v: v - shifted(v), b, solve, transpose_solve)
