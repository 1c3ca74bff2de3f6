"""What several test modules share: strategies, problems and obvious references."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import jax
import jax.extend as jex
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest
from jax import lax
from jaxtyping import Array, PyTree

from diffrax_deer import (
    AbstractGradient,
    AbstractLinearization,
    AbstractMethod,
    AbstractPredictor,
    AbstractScan,
    AssociativeScan,
    BlockDiagonalJacobian,
    ChunkedScan,
    ConstantPredictor,
    DEERAdjoint,
    DEERSolver,
    DiagonalJacobian,
    ExponentialRosenbrockEuler,
    FullJacobian,
    Jacobi,
    MatrixFreeGradient,
    Newton,
    ParallelGradient,
    Picard,
    PiecewiseConstant,
    Sequential,
    SequentialGradient,
    SequentialScan,
    Statistics,
    StepMap,
)
from diffrax_deer._solve import solve

# The one registry: what is added here is held to every contract.
linearizations: dict[str, AbstractLinearization] = {
    "full_jacobian": FullJacobian(),
    "piecewise_constant": PiecewiseConstant(),
    "diagonal_jacobian": DiagonalJacobian(),
    "block_diagonal_jacobian": BlockDiagonalJacobian(1),
    "picard": Picard(),
    "jacobi": Jacobi(),
}
scans: dict[str, AbstractScan] = {
    "sequential": SequentialScan(),
    "associative": AssociativeScan(),
    "chunked": ChunkedScan(),
}
methods: dict[str, AbstractMethod] = {"newton": Newton(), "sequential": Sequential()}
gradients: dict[str, AbstractGradient] = {
    "parallel": ParallelGradient(),
    "matrix_free": MatrixFreeGradient(),
    "sequential": SequentialGradient(),
}
# Step maps: the order of each, for a field that depends on time.
step_maps: dict[str, tuple[diffrax.AbstractSolver, int]] = {
    "euler": (diffrax.Euler(), 1),
    "heun": (diffrax.Heun(), 2),
    "midpoint": (diffrax.Midpoint(), 2),
    "ralston": (diffrax.Ralston(), 2),
    "bosh3": (diffrax.Bosh3(), 3),
    "tsit5": (diffrax.Tsit5(), 5),
    "dopri5": (diffrax.Dopri5(), 5),
    "dopri8": (diffrax.Dopri8(), 8),
    "half_solver": (diffrax.HalfSolver(diffrax.Bosh3()), 3),
    "implicit_euler": (diffrax.ImplicitEuler(), 1),
    "kvaerno3": (diffrax.Kvaerno3(), 3),
    "kvaerno5": (diffrax.Kvaerno5(), 5),
    "rosenbrock_euler": (ExponentialRosenbrockEuler(), 2),
}
adjoints: dict[str, diffrax.AbstractAdjoint] = {
    "default": diffrax.RecursiveCheckpointAdjoint(),
    "deer": DEERAdjoint(),
}
# These two are for derivatives in their own ways.
all_adjoints = adjoints | {
    "direct": diffrax.DirectAdjoint(),
    "forward": diffrax.ForwardMode(),
}


def slowly(*values: Any) -> Any:
    """A case of a parametrized test that is left out of a quick run."""
    return pytest.param(*values, marks=pytest.mark.slow)


def newton_solver(*args: Any, **kwargs: Any) -> DEERSolver:
    """A `DEERSolver` that uses Newton's method, unless told otherwise."""
    return DEERSolver(*args, **{"method": Newton()} | kwargs)


def each(name: str, registry: dict[str, Any]) -> Any:
    """Parametrizes the argument `name` over a registry."""
    return pytest.mark.parametrize(name, registry.values(), ids=registry.keys())


each_linearization = each("linearization", linearizations)
each_scan = each("scan", scans)
each_method = each("method", methods)
each_gradient = each("gradient", gradients)
each_adjoint = pytest.mark.parametrize("adjoint", adjoints)


# ---- Problems ----


class Problem(NamedTuple):
    """`dy/dt = field(t, y, args)`, `y(t0) = y0`, up to `t1`."""

    field: Callable[[Any, Any, Any], Array]
    y0: PyTree[Any]
    args: PyTree[Any]
    t0: float
    t1: float

    def cast(self, dtype: Any) -> "Problem":
        """The same problem with initial value and parameters of the given type."""
        to_dtype = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)
        return self._replace(y0=to_dtype(self.y0), args=to_dtype(self.args))


def _linear(t, y, args):
    del t
    return jnp.matmul(args, y, precision=lax.Precision.HIGHEST)


def _van_der_pol(t, y, args):
    del t
    position, velocity = y
    return jnp.stack([velocity, args * (1 - position**2) * velocity - position])


def _lotka_volterra(t, y, args):
    del t
    prey, predator = y
    birth, eaten, grown, death = args
    return jnp.stack(
        [prey * (birth - eaten * predator), predator * (grown * prey - death)]
    )


def _fitzhugh_nagumo(t, y, args):
    del t
    voltage, recovery = y
    current, offset, slope, rate = args
    return jnp.stack(
        [
            voltage - voltage**3 / 3 - recovery + current,
            rate * (voltage + offset - slope * recovery),
        ]
    )


def _two_body(t, y, args):
    del t
    position, velocity = y[:2], y[2:]
    distance = jnp.sqrt(jnp.sum(position**2))
    return jnp.concatenate([velocity, -args * position / distance**3])


def _lorenz(t, y, args):
    del t
    sigma, rho, beta = args
    return jnp.stack(
        [sigma * (y[1] - y[0]), y[0] * (rho - y[2]) - y[1], y[0] * y[1] - beta * y[2]]
    )


def _mlp(t, y, args):
    w_in, bias, w_time, w_out = args
    return jnp.tanh(y @ w_in + bias + t * w_time) @ w_out


def _mlp_weights(state: int, width: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    return (
        rng.normal(size=(state, width)) / np.sqrt(state),
        rng.normal(size=width) / 2,
        rng.normal(size=width) / 10,
        rng.normal(size=(width, state)) / np.sqrt(width),
    )


problems: dict[str, Problem] = {
    "linear": Problem(
        _linear,
        np.array([1.0, -0.5, 0.25]),
        np.array([[-0.1, 2.0, 0.0], [-2.0, -0.1, 0.5], [0.0, -0.5, -0.3]]),
        0.0,
        3.0,
    ),
    "van_der_pol": Problem(_van_der_pol, np.array([2.0, 0.0]), np.array(1.0), 0.0, 10),
    "lotka_volterra": Problem(
        _lotka_volterra,
        np.array([10.0, 5.0]),
        np.array([1.1, 0.4, 0.1, 0.4]),
        0.0,
        10.0,
    ),
    "fitzhugh_nagumo": Problem(
        _fitzhugh_nagumo,
        np.array([-1.0, 1.0]),
        np.array([0.5, 0.7, 0.8, 0.08]),
        0.0,
        20.0,
    ),
    "two_body": Problem(
        _two_body, np.array([1.0, 0.0, 0.0, 1.1]), np.array(1.0), 0.0, 6.0
    ),
    "lorenz": Problem(
        _lorenz, np.array([1.0, 1.0, 1.0]), np.array([10.0, 28.0, 8 / 3]), 0.0, 5.0
    ),
    "mlp": Problem(
        _mlp, np.array([1.0, -1.0, 0.5, 0.2]), _mlp_weights(4, 64), 0.0, 1.0
    ),
}


# ---- A step map that owes nothing to diffrax, and the sequential reference ----


def rk4(field: Callable[[Any, Any, Any], Array], args: PyTree[Any]) -> StepMap:
    """One step of the classic Runge-Kutta method from `x[0]` to `x[1]`."""

    def step(x, y):
        start, end = x
        h = end - start
        k1 = field(start, y, args)
        k2 = field(start + h / 2, y + h / 2 * k1, args)
        k3 = field(start + h / 2, y + h / 2 * k2, args)
        k4 = field(end, y + h * k3, args)
        return y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)

    def increment(x, y):
        return (x[1] - x[0]) * field((x[0] + x[1]) / 2, y, args)

    return StepMap(step, increment)


def with_coarse_steps(step_map: StepMap) -> StepMap:
    """The step map of `rk4` with steps over several others, and to any end between."""

    def coarse_step(first, last, y):
        return step_map.step((first[0], last[1]), y)

    def coarse_interpolate(first, last, x, y):
        del last
        return step_map.step((first[0], x[1]), y)

    coarse = {"coarse_step": coarse_step, "coarse_interpolate": coarse_interpolate}
    return dataclasses.replace(step_map, **coarse)


def intervals(times: Array) -> tuple[Array, Array]:
    """The beginnings and the ends of the steps between `times`."""
    return times[:-1], times[1:]


def discretize(problem: Problem, num_steps: int) -> tuple[StepMap, Array, Any]:
    """Step map, initial value and uniform intervals, of the type of `problem.y0`."""
    times = jnp.linspace(problem.t0, problem.t1, num_steps + 1, dtype=problem.y0.dtype)
    return rk4(problem.field, problem.args), problem.y0, intervals(times)


def sequential(step_map: StepMap, y0: Array, xs: PyTree[Any]) -> Array:
    """The states after each step, by a plain loop that JAX can differentiate."""

    def step(y, x):
        y = step_map.step(x, y)
        return y, y

    return lax.scan(step, y0, xs)[1]


def newton(
    linearization: AbstractLinearization | None = None,
    scan: AbstractScan | None = None,
    *,
    tolerance: float = 1e-9,
    max_iterations: int | None = None,
    predictor: AbstractPredictor | None = None,
    window: int | None = None,
) -> Newton:
    """Newton's method with equal tolerances, from the constant guess by default."""
    return Newton(
        FullJacobian() if linearization is None else linearization,
        SequentialScan() if scan is None else scan,
        ConstantPredictor() if predictor is None else predictor,
        tolerance,
        tolerance,
        max_iterations,
        window,
    )


def solved(
    step_map: StepMap,
    y0: Array,
    xs: PyTree[Any],
    *,
    guess: Array | None = None,
    method: AbstractMethod | None = None,
    gradient: AbstractGradient | None = None,
) -> tuple[Array, Statistics]:
    """States and statistics; by default of `newton()` and `ParallelGradient()`."""
    num_steps = len(jax.tree.leaves(xs)[0])
    ys, statistics, _ = solve(
        step_map,
        y0,
        xs,
        constant_guess(y0, num_steps) if guess is None else guess,
        newton() if method is None else method,
        ParallelGradient() if gradient is None else gradient,
    )
    return ys, statistics


class UnguardedScan(AbstractScan):
    """All products of diagonal transitions, also where there is nothing to multiply."""

    def __call__(self, a, b, *, reverse=False):
        assert not reverse
        compose = lambda left, right: (
            right[0] * left[0],
            right[0] * left[1] + right[1],
        )
        return lax.associative_scan(compose, (a.entries, b))[1]


def constant_guess(y0: Array, num_steps: int) -> Array:
    """The initial value everywhere: no knowledge at all."""
    return jnp.broadcast_to(y0, (num_steps, *y0.shape))


# ---- Judging ----


def weighted_loss(trajectory: Callable[[Any], Array], parameters: Any) -> Array:
    """A number that depends on every entry of a trajectory, nonlinearly."""
    ys = trajectory(parameters)
    weight = jnp.cos(jnp.arange(ys.size, dtype=ys.dtype)).reshape(ys.shape)
    return jnp.sum(weight * jnp.sin(2 * ys))


def random_like(parameters: Any) -> Any:
    """A direction in the space of parameters, always the same."""
    rng = np.random.default_rng(1)
    random = lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype)
    return jax.tree.map(random, parameters)


def relative_error(got: Any, expected: Any) -> float:
    """The largest error of any entry, relative to the largest entry of its array.

    Of pytrees: of their worst leaf. NaN if anything is NaN.
    """
    errors = []
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        g, e = np.asarray(g, np.float64), np.asarray(e, np.float64)
        assert g.shape == e.shape
        scale = np.max(np.abs(e), initial=0.0)
        errors.append(np.max(np.abs(g - e), initial=0.0) / (scale if scale else 1.0))
    return float(np.max(errors))


def result_is(result: optx.RESULTS, name: str) -> np.ndarray:
    """Whether `result`, possibly batched, is the member of that name."""
    return np.asarray(result == getattr(optx.RESULTS, name))


def primitives(jaxpr: Any) -> list[Any]:
    """All equations of a jaxpr, those of its inner jaxprs included."""
    if isinstance(jaxpr, jex.core.ClosedJaxpr):
        jaxpr = jaxpr.jaxpr
    equations = []
    for equation in jaxpr.eqns:
        equations.append(equation)
        for leaf in jax.tree.leaves(
            equation.params,
            is_leaf=lambda x: isinstance(x, jex.core.ClosedJaxpr | jex.core.Jaxpr),
        ):
            if isinstance(leaf, jex.core.ClosedJaxpr | jex.core.Jaxpr):
                equations.extend(primitives(leaf))
    return equations
