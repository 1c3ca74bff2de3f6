"""A continuous normalizing flow: an ODE between data and a normal distribution.

Along dy/dt = f(t, y), from a sample z of the normal distribution at time 0 to a point x
of the data at time T, the density p_t(y) of y changes by

    d/dt log p_t(y) = -tr(df/dy),

so that log p(x) = log N(z; 0, I) - (the integral of the trace from 0 to T). Integrated
from T to 0 along with y, that is what the trace adds to zero.
"""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

DURATION = 0.5
_STEP = DURATION / 20  # the first of adaptive solvers

# On a CPU the gradient of a short axis of tangents is slow: XLA sums over it by a
# library whose calls take longer than all else.
_MAX_UNROLLED = 4

Point = Float[Array, " dim"]
Scalar = Float[Array, ""]
State = tuple[Point, Scalar]


class ConcatSquashLayer(eqx.Module):
    """y -> (W y + b) * sigmoid(w t + c) + v t, a layer of FFJORD."""

    linear: eqx.nn.Linear
    gate: eqx.nn.Linear
    shift: eqx.nn.Linear

    def __init__(self, in_size: int, out_size: int, key: PRNGKeyArray):
        keys, dtype = jr.split(key, 3), jnp.float32
        self.linear = eqx.nn.Linear(in_size, out_size, dtype=dtype, key=keys[0])
        self.gate = eqx.nn.Linear(1, out_size, dtype=dtype, key=keys[1])
        self.shift = eqx.nn.Linear(
            1, out_size, use_bias=False, dtype=dtype, key=keys[2]
        )

    def __call__(self, t: Float[Array, " 1"], y: Array) -> Array:
        """Applies the layer."""
        return self.linear(y) * jax.nn.sigmoid(self.gate(t)) + self.shift(t)


class ConcatSquash(eqx.Module):
    """Layers that the time scales and shifts."""

    layers: tuple[ConcatSquashLayer, ...]

    def __init__(self, dim: int, width: int, depth: int, key: PRNGKeyArray):
        sizes = (dim, *[width] * depth, dim)
        keys = jr.split(key, depth + 1)
        self.layers = tuple(map(ConcatSquashLayer, sizes[:-1], sizes[1:], keys))

    def __call__(self, t: Any, y: Point) -> Point:
        """Evaluates the vector field."""
        t = jnp.asarray(t, y.dtype)[None]
        first, *rest = self.layers
        y = first(t, y)
        for layer in rest:
            y = layer(t, jnp.tanh(y))
        return y


class TimeMLP(eqx.Module):
    """A multilayer perceptron that is given the time as one more input."""

    mlp: eqx.nn.MLP

    def __init__(self, dim: int, width: int, depth: int, key: PRNGKeyArray):
        self.mlp = eqx.nn.MLP(
            dim + 1, dim, width, depth, jnp.tanh, dtype=jnp.float32, key=key
        )

    def __call__(self, t: Any, y: Point) -> Point:
        """Evaluates the vector field."""
        return self.mlp(jnp.append(y, jnp.asarray(t, y.dtype)))


FIELDS = {"concatsquash": ConcatSquash, "mlp": TimeMLP}


class Flow(eqx.Module):
    """The density that the flow of a vector field makes of a normal distribution.

    `options` of its methods go to `diffrax.diffeqsolve`.
    """

    field: ConcatSquash | TimeMLP
    dim: int = eqx.field(static=True)

    def log_density(
        self, x: Point, probe: Point | None = None, **options: Any
    ) -> Scalar:
        """The logarithm of the density at a point, or an unbiased estimate of it.

        Args:
            x: the point.
            probe: random vector with independent components of mean zero and variance
                one to estimate the trace with (Hutchinson); `None` to compute it.
            **options: arguments of the solver.
        """
        return self.read_out(self.solve(x, probe, **options).ys)

    def solve(
        self, x: Point, probe: Point | None = None, **options: Any
    ) -> diffrax.Solution:
        """Lets a point of the data flow to the normal distribution, with its trace."""
        options = {"dt0": -_STEP} | options
        return diffrax.diffeqsolve(
            diffrax.ODETerm(self.field_and_trace),
            t0=DURATION,
            t1=0.0,
            y0=(x, jnp.zeros((), x.dtype)),
            args=probe,
            **options,
        )

    def read_out(self, states: Any) -> Scalar:
        """The log-density, from what `solve` has saved."""
        z, change = jax.tree.map(lambda leaf: leaf[-1], states)
        return jnp.sum(jax.scipy.stats.norm.logpdf(z)) + change

    def sample(
        self, key: PRNGKeyArray, number: int, **options: Any
    ) -> Float[Array, "number dim"]:
        """Draws samples of the density."""
        zs = jr.normal(key, (number, self.dim), jnp.float32)
        return jax.vmap(lambda z: self.push_forward(z, **options))(zs)

    def push_forward(self, z: Point, **options: Any) -> Point:
        """Lets a point of the normal distribution flow to the data."""
        term = diffrax.ODETerm(lambda t, y, args: self.field(t, y))
        solution = diffrax.diffeqsolve(
            term, t0=0.0, t1=DURATION, dt0=_STEP, y0=z, **options
        )
        ys: Any = solution.ys
        return ys[-1]

    def field_and_trace(self, t: Any, state: State, probe: Point | None) -> State:
        """What `solve` integrates: the vector field and its trace, or an estimate."""
        y, _ = state
        field = lambda y: self.field(t, y)
        if probe is not None:
            value, tangent = jax.jvp(field, (y,), (probe,))
            return value, tangent @ probe
        value, push = jax.linearize(field, y)
        units = jnp.eye(self.dim, dtype=y.dtype)
        if self.dim > _MAX_UNROLLED:
            return value, jnp.trace(jax.vmap(push)(units))
        diagonal = (push(unit)[i] for i, unit in enumerate(units))
        return value, sum(diagonal, start=jnp.zeros((), y.dtype))
