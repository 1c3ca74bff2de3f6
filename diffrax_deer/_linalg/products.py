"""Products of small matrices and vectors, in full precision.

Written for one product and meant for `jax.vmap`. Up to `MAX_UNROLLED` components a
product is a sum of elementwise products, which XLA fuses into its surroundings: batched
tiny matrix products cost 0.5 µs each on a CPU, and a library call on a GPU. All are in
full precision: TF32 products would let Newton's method stall near 1e-3.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from .._defaults import MAX_UNROLLED


@jax.custom_jvp
def matmul(
    a: Float[Array, "rows inner"], b: Float[Array, "inner columns"]
) -> Float[Array, "rows columns"]:
    """The product of two small matrices."""
    if 0 < a.shape[-1] <= MAX_UNROLLED:
        out = a[:, 0, None] * b[None, 0, :]
        for k in range(1, a.shape[-1]):
            out = out + a[:, k, None] * b[None, k, :]
        return out
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


@matmul.defjvp
def _(primals, tangents):
    # The transpose of a sum of outer products is a slow cascade of paddings.
    (a, b), (a_dot, b_dot) = primals, tangents
    product = lambda x, y: jnp.matmul(x, y, precision=lax.Precision.HIGHEST)
    return matmul(a, b), product(a_dot, b) + product(a, b_dot)


def matvec(
    a: Float[Array, "rows inner"], x: Float[Array, " inner"]
) -> Float[Array, " rows"]:
    """The product of a small matrix and a vector."""
    if x.shape[-1] <= MAX_UNROLLED:
        return jnp.sum(a * x[None, :], axis=-1)
    return jnp.matmul(a, x, precision=lax.Precision.HIGHEST)
