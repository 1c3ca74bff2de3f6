r"""The matrix exponential and $\varphi_1$ of small matrices.

$$\varphi_1(A) = \sum_{k \ge 0} \frac{A^k}{(k+1)!} = A^{-1}(e^A - I), \qquad
e^A = I + A\,\varphi_1(A).$$

Scaling and squaring: for $\|2^{-s} A\|_1 \le \theta$ a Taylor polynomial is exact to
rounding, and each of $s$ doublings is

$$e^{2Z} = e^Z e^Z, \qquad \varphi_1(2Z) = \tfrac12 (e^Z + I)\,\varphi_1(Z).$$

Written for one matrix and meant for `jax.vmap`. `jax.scipy.linalg.expm` picks one of
several Padé approximants, and under `vmap` evaluates them all; here the only choice is
the number of doublings, a loop that runs as often as the worst matrix of the batch
needs: not at all on the fine grids on which a differential equation is solved.

??? cite "Reference"

    Higham, *Functions of Matrices*, SIAM 2008, section 10.3 (scaling and squaring).
    Skaflestad and Wright, *The scaling and modified squaring method for matrix
    functions related to the exponential*, Appl. Numer. Math. 59 (2009): the doubling
    formulas. Paterson and Stockmeyer, SIAM J. Comput. 2 (1973): the polynomial.
"""

import math
from collections.abc import Callable
from typing import Any

import equinox.internal as eqxi
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, PyTree

from .._custom_types import Matrix
from .products import matmul

# Taylor polynomials up to this norm: 0.6**16 / 16! is 1e-17, 0.6**9 / 9! is 3e-8.
_RADIUS = 0.6


def _taylor(z: Matrix, offset: int) -> Matrix:
    """The sum of `z**k / (k + offset)!`, exact to rounding for norms below 0.6."""
    # Paterson-Stockmeyer: `blocks` blocks of `length` coefficients, degree 15 or 8.
    length, blocks = (4, 4) if jnp.finfo(z.dtype).eps < 1e-10 else (3, 3)
    powers = [jnp.eye(z.shape[-1], dtype=z.dtype), z]
    for _ in range(2, length + 1):
        powers.append(matmul(powers[-1], z))
    out = jnp.zeros_like(z)
    for block in reversed(range(blocks)):
        if block < blocks - 1:
            out = matmul(out, powers[length])
        for i in range(length):
            out = out + powers[i] / math.factorial(block * length + i + offset)
    return out


def _scale(a: Matrix) -> tuple[Matrix, Int[Array, ""]]:
    """`2**-s * a` with a norm below 0.6, and the number of doublings `s`."""
    norm = lax.stop_gradient(jnp.max(jnp.sum(jnp.abs(a), axis=0), initial=0.0))
    _, exponent = jnp.frexp(norm / _RADIUS)
    # A matrix that is not finite has no exponential: do not loop over it.
    doublings = jnp.where(jnp.isfinite(norm), jnp.clip(exponent, 0, 1024), 0)
    # Two factors: 2**-1024 alone would be subnormal.
    half = doublings // 2
    scale = lambda s: jnp.ldexp(jnp.ones((), a.dtype), -s)
    return a * scale(half) * scale(doublings - half), doublings


def _repeat(step: Callable, times: Int[Array, ""], init: PyTree, kind: Any) -> PyTree:
    """`step` applied `times` times, in reverse mode too if the `kind` is "bounded"."""
    _, out = eqxi.while_loop(
        lambda carry: carry[0] < times,
        lambda carry: (carry[0] + 1, step(carry[1])),
        (jnp.zeros_like(times), init),
        max_steps=1024,
        kind=kind,
        base=32,
    )
    return out


def _expm_2x2(a: Matrix) -> Matrix:
    """`exp(m + M) = exp(m) (cosh(q) I + sinh(q)/q M)` with `M` traceless, `M² = q² I`.

    Up to twice as fast on a CPU as products of 2×2 matrices.
    """
    mean = (a[0, 0] + a[1, 1]) / 2
    traceless = a - mean * jnp.eye(2, dtype=a.dtype)
    square = traceless[0, 0] * traceless[0, 0] + a[0, 1] * a[1, 0]
    # Each branch gets an argument of its own domain, so that no derivative is NaN.
    tiny = jnp.abs(square) < 1e-4
    root = jnp.sqrt(jnp.where(tiny | (square < 0), 1.0, square))
    angle = jnp.sqrt(jnp.where(tiny | (square > 0), 1.0, -square))
    grow, decay = jnp.exp(mean + root), jnp.exp(mean - root)
    real = (grow + decay) / 2, -grow * jnp.expm1(-2 * root) / (2 * root)
    scale = jnp.exp(mean)
    imaginary = scale * jnp.cos(angle), scale * jnp.sin(angle) / angle
    small = jnp.where(tiny, square, 0.0)
    series = (
        scale * (1 + small / 2 * (1 + small / 12 * (1 + small / 30))),
        scale * (1 + small / 6 * (1 + small / 20 * (1 + small / 42))),
    )
    cosh, sinhc = (
        jnp.where(tiny, s, jnp.where(square > 0, r, i))
        for s, r, i in zip(series, real, imaginary, strict=True)
    )
    return cosh * jnp.eye(2, dtype=a.dtype) + sinhc * traceless


def expm(a: Matrix, kind: Any = "bounded") -> Matrix:
    """The exponential of a real matrix of shape `(state, state)`, D = state.

    float32 and float64, differentiable in both modes. The relative error in the 1-norm
    is a small multiple of rounding times the condition number of the exponential, which
    is at least the norm of `a`. Cost: a few products of D × D matrices and one more for
    each doubling of the norm beyond 0.6, in a loop of equinox's `kind`: "lax" if there
    is nothing to differentiate, as a "bounded" one is of 1000 trips on a GPU.
    """
    if a.shape[-1] == 1:
        return jnp.exp(a)
    if a.shape[-1] == 2:
        return _expm_2x2(a)
    z, doublings = _scale(a)
    return _repeat(lambda x: matmul(x, x), doublings, _taylor(z, offset=0), kind)


def phi1(a: Matrix) -> Matrix:
    """The function `(exp(a) - I) / a` of a real matrix of shape `(state, state)`.

    Also where `a` is singular. Accuracy as that of `expm`; cost twice that of `expm`.
    """
    if a.shape[-1] == 1:
        # The quotient cancels near zero when it is differentiated.
        small = jnp.abs(a) < _RADIUS
        safe = jnp.where(small, 1.0, a)
        series = _taylor(jnp.where(small, a, 0.0), offset=1)
        return jnp.where(small, series, jnp.expm1(safe) / safe)
    z, doublings = _scale(a)
    phi = _taylor(z, offset=1)
    exp = jnp.eye(a.shape[-1], dtype=a.dtype) + matmul(z, phi)
    double = lambda x: (matmul(x[0], x[0]), (matmul(x[0], x[1]) + x[1]) / 2)
    return _repeat(double, doublings, (exp, phi), "bounded")[1]
