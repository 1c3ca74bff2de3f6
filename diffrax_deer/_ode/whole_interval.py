"""The step size controller that makes the whole interval one step."""

from typing import Any

import diffrax
import equinox as eqx
import jax.numpy as jnp
from jaxtyping import PyTree

from .._custom_types import Args, IntScalarLike, RealScalarLike, Y
from .deer_solver import DEERSolver


class WholeInterval(diffrax.AbstractStepSizeController):
    """One step from `t0` to `t1`, whatever `dt0` says: one window for `DEERSolver`.

    Exact where `dt0 = t1 - t0` is not, since `t0 + (t1 - t0)` can round below `t1` and
    leave a second step of one rounding unit. Differentiable in `t0` and `t1`. Nothing
    is adapted: the accuracy is that of `num_steps` steps of the inner solver.

    **Raises:** `ValueError` for a `DEERSolver` without `num_steps`; at run time if `t0`
    or `t1` is infinite.
    """

    def wrap(self, direction: IntScalarLike) -> "WholeInterval":
        """The same both ways."""
        del direction
        return self

    def init(
        self,
        terms: PyTree[diffrax.AbstractTerm],
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        dt0: RealScalarLike | None,
        args: Args,
        func: Any,
        error_order: RealScalarLike | None,
    ) -> tuple[RealScalarLike, None]:
        """The first step ends at `t1`."""
        del terms, y0, dt0, args, error_order
        # diffrax passes the method `func` of the solver.
        solver = getattr(func, "__self__", None)
        if isinstance(solver, DEERSolver) and solver.num_steps is None:
            msg = (
                "`WholeInterval` makes the whole interval one window, whose number of "
                "steps `DEERSolver` has to be told: `DEERSolver(num_steps=100)`, for "
                "example."
            )
            raise ValueError(msg)
        t1 = eqx.error_if(
            jnp.asarray(t1),
            ~jnp.isfinite(jnp.asarray(t1)) | ~jnp.isfinite(jnp.asarray(t0)),
            "`WholeInterval` makes one step of the whole interval, which therefore has "
            "to be finite. With an infinite `t0` or `t1` use `PIDController`.",
        )
        return t1, None

    def adapt_step_size(
        self,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        y1_candidate: Y,
        args: Args,
        y_error: Y | None,
        error_order: RealScalarLike | None,
        controller_state: None,
    ) -> tuple[bool, RealScalarLike, RealScalarLike, bool, None, diffrax.RESULTS]:
        """Accepts the step."""
        del t0, y0, y1_candidate, args, y_error, error_order, controller_state
        return True, t1, t1, False, None, diffrax.RESULTS.successful
