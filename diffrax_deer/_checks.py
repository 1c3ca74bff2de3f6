"""What the arguments of the public classes have to be, and what to pass instead."""

import contextlib
from collections.abc import Generator
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from ._custom_types import Y

# They solve stochastic differential equations.
_STOCHASTIC = (
    diffrax.AbstractSRK,
    diffrax.AbstractFosterLangevinSRK,
    diffrax.EulerHeun,
    diffrax.ItoMilstein,
    diffrax.StratonovichMilstein,
)


def check_count(name: str, value: Any) -> None:
    """Raises unless `value` is a Python int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        msg = f"`{name}` must be a Python int of at least 1; got {value!r}."
        raise TypeError(msg)
    if value < 1:
        msg = f"`{name}` must be at least 1; got {value}."
        raise ValueError(msg)


def check_instance(name: str, value: Any, cls: type, example: str) -> None:
    """Raises unless `value` is an instance of `cls`."""
    if isinstance(value, cls):
        return
    hint = f"Pass an instance, {name}={example} for example"
    if isinstance(value, type) and issubclass(value, cls):
        msg = f"`{name}` got the class `{value.__name__}`. {hint}."
    else:
        # An array by its shape, and not by a page of numbers.
        got = eqx.tree_pformat(value)
        msg = f"`{name}` must be an instance of `{cls.__name__}`; got {got}. {hint}."
    raise TypeError(msg)


def check_optional(name: str, value: Any, cls: type, example: str) -> None:
    """Raises unless `value` is `None` or an instance of `cls`."""
    if value is not None:
        check_instance(name, value, cls, example)


def check_tolerance(name: str, value: Any) -> None:
    """Raises unless `value` is `None` or a finite float, not negative."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        msg = f"`{name}` must be a Python float or `None`; got {value!r}."
        raise TypeError(msg)
    if not 0 <= value < float("inf"):
        msg = f"`{name}` must be finite and not negative; got {value!r}."
        raise ValueError(msg)


def check_positive(name: str, value: Any) -> None:
    """Raises unless `value` is a positive, finite float."""
    if value is None or value == 0:
        msg = f"`{name}` must be a positive float; got {value!r}."
        raise ValueError(msg)
    check_tolerance(name, value)


def check_number_of_steps(grid: Any, num_steps: int | None) -> None:
    """Raises for a grid of steps whose number is left open."""
    if grid is not None and num_steps is None:
        msg = "`grid` needs a number of steps, `num_steps=100` for example."
        raise ValueError(msg)


def check_throw(throw: bool, several_devices: bool) -> None:
    """Raises where an error at run time would be one of several devices."""
    if throw and several_devices:
        msg = (
            "`throw=True` with a `ShardedScan`, or inside of `jax.shard_map`: a device "
            "that raises an error at run time leaves the others waiting for ever. Pass "
            "`throw=False` and `return_statistics=True`, and outside of the compiled "
            "program see if `statistics.result == optimistix.RESULTS.successful`."
        )
        raise ValueError(msg)


def check_step_map(solver: diffrax.AbstractSolver) -> None:
    """Raises for solvers that are not one-step methods of an ODE."""
    name = type(solver).__name__
    if isinstance(solver, _STOCHASTIC):
        msg = (
            f"`solver` must be a solver of ordinary differential equations; got the "
            f"SDE solver `{name}`. Use `Dopri5()`, or `Kvaerno5()` if the equation is "
            "stiff."
        )
        raise ValueError(msg)


def check_memory(solver: diffrax.AbstractSolver, has_memory: bool) -> None:
    """Raises for a solver that a window of several steps is not made for."""
    if has_memory:
        msg = (
            f"`{type(solver).__name__}` has a memory: it carries more than the state "
            "from one step to the next, and steps of a window are made from the state "
            "alone. Use it with `num_steps=1` and `method=Sequential()`, or a one-step "
            "method, `Midpoint()` or `Heun()` for example."
        )
        raise ValueError(msg)


def check_guess(guess: diffrax.AbstractPath, t: Any, y0: Y) -> None:
    """Raises unless the path `guess` has values like `y0`."""
    shapes = lambda x: jax.tree.map(lambda leaf: jnp.shape(leaf), x)
    value = jax.eval_shape(guess.evaluate, t)
    are_complex = lambda x: [jnp.iscomplexobj(leaf) for leaf in jax.tree.leaves(x)]
    same = jax.tree.structure(value) == jax.tree.structure(y0)
    same = same and are_complex(value) == are_complex(y0)
    if not same or jax.tree.leaves(shapes(value)) != jax.tree.leaves(shapes(y0)):
        msg = (
            "`guess.evaluate(t)` must have the structure and shapes of `y0`, which are "
            f"{shapes(y0)}, and be complex where it is; got {shapes(value)}."
        )
        raise ValueError(msg)


def check_noise(terms: PyTree[diffrax.AbstractTerm]) -> None:
    """Raises for stochastic differential equations."""
    is_noise = lambda x: isinstance(x, diffrax.AbstractBrownianPath)
    if any(is_noise(x) for x in jax.tree.leaves(terms, is_leaf=is_noise)):
        msg = (
            "`DEERSolver` solves ordinary and controlled differential equations; "
            "found a Brownian motion in `terms`. Use one of diffrax's SDE solvers, "
            "`diffrax.Heun()` or `diffrax.SPaRK()` for example."
        )
        raise ValueError(msg)


_NO_FORWARD_MODE = (
    "What is solved in parallel is differentiated in forward mode, also for a "
    "gradient, and the vector field, or the function of a recurrence, contains a "
    "`jax.custom_vjp`, which JAX cannot differentiate so: one of yours, or a loop of "
    'Equinox of kind="checkpointed"; or a callback. Use `jax.custom_jvp`, or '
    'kind="bounded", or diffrax\'s own solvers; for the value alone '
    "`method=Sequential()`."
)


@contextlib.contextmanager
def explained() -> Generator[None, None, None]:
    """Says what to do about a `jax.custom_vjp`, or a callback."""
    try:
        yield
    except (NotImplementedError, TypeError, ValueError) as error:
        marks = "custom_lin", "custom_vjp function", "callbacks do not support JVP"
        if any(mark in str(error) for mark in marks):
            raise TypeError(_NO_FORWARD_MODE) from error
        raise
