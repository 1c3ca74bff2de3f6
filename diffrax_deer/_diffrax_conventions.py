"""What the library relies on, and diffrax's documentation does not promise.

`tests/test_diffrax_conventions.py` names the version of diffrax in which each of these
was last true.
"""

from typing import Any

import diffrax
import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, PyTree

# How a root finder is marked whose tolerances are to be those of the step size
# controller.
_TO_BE_FILLED_IN = diffrax.with_stepsize_controller_tols(diffrax.VeryChord)().rtol

# Their factors carry no derivative: the ends of windows depend on one another, but not
# on the solution.
_WITHOUT_DERIVATIVE = diffrax.ConstantStepSize, diffrax.PIDController


def takes_controller_tolerances(solver: Any) -> bool:
    """Whether the root finder of an implicit solver takes the controller's."""
    return solver.root_finder.rtol is _TO_BE_FILLED_IN


def has_constant_factors(controller: diffrax.AbstractStepSizeController) -> bool:
    """Whether the ends of windows have no derivative for the solution."""
    return type(controller) in _WITHOUT_DERIVATIVE


def direction(terms: PyTree[diffrax.AbstractTerm]) -> Any:
    """-1 if the solver's time, which increases, runs against the user's, else 1.

    diffrax wraps terms so that a solver always sees increasing times.
    """
    is_term = lambda x: isinstance(x, diffrax.AbstractTerm)
    first, *_ = jax.tree.leaves(terms, is_leaf=is_term)
    return getattr(first, "direction", 1)


def clip_to_end(t_prev: Array, t_next: Any, t1: Any, keep: Bool[Array, ""]) -> Array:
    """A last step of less than 100 rounding units joins the one before."""
    floor = lax.fori_loop(
        0, 100, lambda _, t: eqxi.prevbefore(t), lax.stop_gradient(jnp.asarray(t1))
    )
    clipped = jnp.where(keep, t1, t_prev + 0.5 * (t1 - t_prev))
    return jnp.where(t_next > floor, clipped, t_next)


def final_state(init_state: Any, **fields: Any) -> Any:
    """The state of diffrax's integration loop with these fields replaced."""
    names = list(fields)
    return eqx.tree_at(
        lambda state: [getattr(state, name) for name in names],
        init_state,
        [fields[name] for name in names],
        is_leaf=lambda x: x is None,
    )


def saved(save_state: Any, ts: Array, ys: PyTree[Array]) -> Any:
    """The save state of one `SubSaveAt` with filled buffers."""
    return eqx.tree_at(lambda s: (s.ts, s.ys), save_state, (ts, ys))
