r"""One step of a recurrence, and its Jacobian: what defines the answer of a solve."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from ._custom_types import Matrix, State, VectorField
from ._linalg.transitions import AbstractTransition, Dense
from ._varying import uniform


class StepMap(eqx.Module):
    r"""One step of a recurrence, $y_n = \Phi(x_n, y_{n-1})$, for states `(state,)`.

    `x` is what drives the step: its two times, or the input of a recurrent network.

    - `step(x, y)`: the step map $\Phi$.
    - `increment(x, y)`: where the step belongs to a differential equation, the product
        $h f(t, y)$ at the middle of the step; otherwise `None`.
    - `step_with_aux(x, y)`: where a step yields more than a state, the pair of it and
        of that, a pytree of arrays; otherwise `None`.
    - `step_by_stages(x, y)`: the same as `step_with_aux`, with a derivative that is
        found from the Jacobians of its stages: the better way to a Jacobian of the
        step, not to a single product with it. `None` where there is no such way.
    - `coarse_step(first, last, y)`: where there are longer steps, one from the
        beginning of the step `first` to the end of `last`; otherwise `None`.
    - `coarse_interpolate(first, last, x, y)`: what that one predicts for the state
        after the step `x` between them.
    - `is_defined(aux)`: where a step without it counts as not solved, whether what it
        yields has a value; otherwise `None`.
    - `is_implicit`: whether a step solves equations of its own.
    - `eps`: the rounding unit of the state, `None` for that of its type.
    """

    step: Callable[[PyTree[Any], State], State]
    increment: Callable[[PyTree[Any], State], State] | None = None
    step_with_aux: (
        Callable[[PyTree[Any], State], tuple[State, PyTree[Array]]] | None
    ) = None
    step_by_stages: (
        Callable[[PyTree[Any], State], tuple[State, PyTree[Array]]] | None
    ) = None
    coarse_step: Callable[[PyTree[Any], PyTree[Any], State], State] | None = None
    coarse_interpolate: (
        Callable[[PyTree[Any], PyTree[Any], PyTree[Any], State], State] | None
    ) = None
    is_defined: Callable[[PyTree[Array]], Bool[Array, ""]] | None = None
    is_implicit: bool = eqx.field(static=True, default=False)
    eps: float | None = eqx.field(static=True, default=None)

    def evaluate(self, x: PyTree[Any], y: State) -> tuple[State, PyTree[Array]]:
        """The state after the step, and what else it yields, or `None`."""
        if self.step_with_aux is None:
            return self.step(x, y), None
        return self.step_with_aux(x, y)

    def closed(self, x: PyTree[Any], y: State) -> "StepMap":
        """The same, with all that its functions close over as leaves of the pytree.

        So that it is an argument, which is differentiated. `x` and `y` are examples.
        """
        convert = lambda f, *args: f and eqx.filter_closure_convert(f, *args)
        return StepMap(
            convert(self.step, x, y),
            convert(self.increment, x, y),
            convert(self.step_with_aux, x, y),
            convert(self.step_by_stages, x, y),
            convert(self.coarse_step, x, x, y),
            convert(self.coarse_interpolate, x, x, x, y),
            self.is_defined,
            self.is_implicit,
            self.eps,
        )


def value_and_tangents(
    f: VectorField, y: State, directions: Float[Array, "directions state"]
) -> tuple[State, Float[Array, "directions state"]]:
    """The value `f(y)` and its derivative along each direction, of which there is one.

    All directions at once, and `f` itself evaluated once.
    """
    directions = uniform(directions, y)
    push = lambda direction: jax.jvp(f, (y,), (direction,))
    values, tangents = jax.vmap(push)(directions)
    return values[0], tangents


def value_and_jacobian(f: VectorField, y: State) -> tuple[State, Matrix]:
    """The value `f(y)` and the matrix of shape `(D, D)` of its derivatives, D ≥ 1."""
    value, columns = value_and_tangents(f, y, jnp.eye(y.size, dtype=y.dtype))
    return value, columns.T


def step_jacobian(step_map: StepMap, x: PyTree[Any], y: State) -> AbstractTransition:
    """The exact derivatives of a step, D ≥ 1, by D tangents."""
    return Dense(value_and_jacobian(lambda y: step_map.step(x, y), y)[1])


def split_by_tangent(tree: PyTree[Any], tree_dot: PyTree[Any]) -> tuple[PyTree, PyTree]:
    """`tree` in two: the leaves that have a tangent in `tree_dot`, and the others."""
    return eqx.partition(tree, jax.tree.map(lambda _, x: x is not None, tree, tree_dot))
