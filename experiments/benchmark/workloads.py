"""What is solved: a vector field with parameters, initial values, and a loss.

Parameters are arrays alone: what else a network holds is part of the field.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, PyTree

from experiments.benchmark import hand_written
from experiments.common import densities, two_body
from experiments.common.errors import ExperimentError
from experiments.common.flow import DURATION, ConcatSquash, Flow
from experiments.common.hamiltonian import HamiltonianNetwork
from experiments.common.problems import (
    FITZHUGH_NAGUMO,
    LOTKA_VOLTERRA,
    PROBLEMS,
    fitzhugh_nagumo,
    lotka_volterra,
)

_NUM_OBSERVATIONS = 100
_LEARNING_RATE = 1e-3
_REFERENCE_TOLERANCE = 1e-12
_REFERENCE_STEPS = 100_000


@dataclasses.dataclass(frozen=True)
class Workload:
    """A loss of the solution of `dy/dt = field(t, y, params)` from `t0` to `t1`.

    Attributes:
        field: the vector field.
        params: its parameters, those to differentiate with respect to.
        y0s: the initial values, with a leading axis `batch`.
        t0: where it begins.
        t1: where it ends, perhaps before `t0`.
        num_steps: steps of equal length.
        every: after how many steps each the states are saved, a divisor of
            `num_steps`; `None` to save the last alone.
        loss: of all states that are saved, whose axes are `batch time ...`.
    """

    field: hand_written.Field
    params: PyTree[Array]
    y0s: PyTree[Array]
    t0: float
    t1: float
    num_steps: int
    every: int | None
    loss: Callable[[Any], Array]

    @property
    def times(self) -> np.ndarray:
        """Where states are saved."""
        return save_times(self.t0, self.t1, self.num_steps, self.every)

    @property
    def saveat(self) -> dict[str, Any]:
        """What to save, as arguments of `diffrax.SaveAt`."""
        return {"t1": True} if self.every is None else {"ts": self.times}

    def solve_by_hand(self, y0: Any, params: Any) -> PyTree[Array]:
        """The states that are saved, by the steps written by hand."""
        arguments = self.field, self.t0, self.t1, self.num_steps, y0, params
        every = self.every
        if every is None:
            return jax.tree.map(lambda y: y[None], hand_written.final(*arguments))
        ys = hand_written.trajectory(*arguments)
        return jax.tree.map(lambda y: y[every - 1 :: every], ys)

    def after_one_step(self) -> "Workload":
        """The same after one step of Adam, as it is met in training."""
        solve = jax.vmap(self.solve_by_hand, in_axes=(0, None))
        loss = lambda params: self.loss(solve(self.y0s, params))
        gradient = jax.jit(jax.grad(loss))(self.params)
        optimizer = optax.adam(_LEARNING_RATE)
        updates, _ = optimizer.update(gradient, optimizer.init(self.params))
        moved: Any = optax.apply_updates(self.params, updates)
        if not all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(moved)):
            msg = f"{self.num_steps} steps are too few: the solution is not finite."
            raise ExperimentError(msg)
        return dataclasses.replace(self, params=moved)

    def reference(self) -> PyTree[np.ndarray]:
        """The states that are saved, in float64 and to many digits."""
        with jax.enable_x64(True):
            wide = lambda x: np.asarray(x, np.float64)
            y0s, params = jax.tree.map(wide, (self.y0s, self.params))

            def solve(y0, params):
                return diffrax.diffeqsolve(
                    diffrax.ODETerm(self.field),
                    diffrax.Dopri8(),
                    self.t0,
                    self.t1,
                    (self.t1 - self.t0) / self.num_steps,
                    y0,
                    params,
                    saveat=diffrax.SaveAt(**self.saveat),
                    stepsize_controller=diffrax.PIDController(
                        rtol=_REFERENCE_TOLERANCE, atol=_REFERENCE_TOLERANCE
                    ),
                    max_steps=_REFERENCE_STEPS,
                ).ys

            ys = jax.jit(jax.vmap(solve, in_axes=(0, None)))(y0s, params)
            return jax.tree.map(np.asarray, ys)


def save_times(t0: float, t1: float, num_steps: int, every: int | None) -> np.ndarray:
    """The times after each `every` steps, or the last."""
    counts = np.arange(every or num_steps, num_steps + 1, every or num_steps)
    # In this order the last time is `t1` to the last bit.
    return t0 + (t1 - t0) * (counts / num_steps)


def _with_arrays(model: Any, field: Callable) -> dict[str, Any]:
    """The field of a network and its parameters."""
    params, static = eqx.partition(model, eqx.is_array)
    return {
        "field": lambda t, y, params: field(t, y, eqx.combine(params, static)),
        "params": params,
    }


def _mean_square(ys: Any) -> Array:
    return jnp.mean(ys**2)


def _mlp(cell: dict[str, Any]) -> Workload:
    model_key, state_key = jr.split(jr.key(0))
    dim, width = cell["dim"], cell["width"]
    model = eqx.nn.MLP(dim, dim, width, 2, jnp.tanh, dtype=jnp.float32, key=model_key)
    return Workload(
        **_with_arrays(model, lambda t, y, model: model(y)),
        y0s=jr.normal(state_key, (cell["batch_size"], dim), jnp.float32),
        t0=0.0,
        t1=10.0,
        num_steps=cell["num_steps"],
        every=None,
        loss=_mean_square,
    )


def _fit(cell: dict[str, Any]) -> Workload:
    """Parameters of an equation, fitted to data of others that are close."""
    name, num_steps = cell["workload"], cell["num_steps"]
    field, truth = {
        "fitzhugh_nagumo": (fitzhugh_nagumo, FITZHUGH_NAGUMO),
        "lotka_volterra": (lotka_volterra, LOTKA_VOLTERRA),
    }[name]
    problem = PROBLEMS[f"{name}_100"]
    workload = Workload(
        field=field,
        params=jnp.asarray(truth, jnp.float64),
        y0s=problem.y0[None],
        t0=0.0,
        t1=problem.t1,
        num_steps=num_steps,
        every=max(1, num_steps // _NUM_OBSERVATIONS),
        loss=_mean_square,
    )
    solve = jax.jit(workload.solve_by_hand)
    data = solve(problem.y0, 1.02 * workload.params)
    loss = lambda ys: _mean_square(ys - data)
    return dataclasses.replace(workload, loss=loss)


def _hnn(cell: dict[str, Any]) -> Workload:
    size = two_body.STATE_DIM, cell["width"], cell["depth"]
    model = HamiltonianNetwork(*size, jnp.float32, jr.key(0))
    y0s = two_body.initial_states(cell["batch_size"], np.random.default_rng(0))
    horizon, num_steps = two_body.HORIZON, cell["num_steps"]
    ts = save_times(0.0, horizon, num_steps, 1)
    data = jnp.asarray(two_body.integrate(y0s, ts), jnp.float32)
    return Workload(
        **_with_arrays(model, lambda t, y, model: model(t, y, None)),
        y0s=jnp.asarray(y0s, jnp.float32),
        t0=0.0,
        t1=horizon,
        num_steps=num_steps,
        every=1,
        loss=lambda ys: _mean_square(ys - data),
    )


def _cnf(cell: dict[str, Any]) -> Workload:
    batch_size = cell["batch_size"]
    model = Flow(ConcatSquash(2, cell["width"], 3, jr.key(0)), 2)
    points = next(densities.load("two_moons").batches_from(batch_size, 0, 0))
    return Workload(
        **_with_arrays(model, lambda t, y, model: model.field_and_trace(t, y, None)),
        y0s=(jnp.asarray(points), jnp.zeros(batch_size, jnp.float32)),
        t0=DURATION,
        t1=0.0,
        num_steps=cell["num_steps"],
        every=None,
        loss=lambda ys: -jnp.mean(jax.vmap(model.read_out)(ys)),
    )


_MAKERS = {
    "mlp": _mlp,
    "fitzhugh_nagumo": _fit,
    "lotka_volterra": _fit,
    "two_body_hnn": _hnn,
    "cnf": _cnf,
}


def make(cell: dict[str, Any]) -> Workload:
    """What the cell is about: `workload`, with its sizes."""
    return _MAKERS[cell["workload"]](cell)
