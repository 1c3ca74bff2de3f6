r"""Where the guess comes from when there is none, or none that can be trusted.

Newton's method converges from anywhere in the end, but quickly only from nearby. A few
large steps, one after another, are cheap beside one iteration over all the small ones,
and most often end close by.
"""

import abc
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, PyTree

from ._checks import check_count
from ._custom_types import State, States
from ._defaults import COARSE_STRIDE
from ._prefix import hold_last
from ._step_map import StepMap


class AbstractPredictor(eqx.Module):
    """What stands in for a guess. The answer and its gradient do not depend on it.

    - `is_free`: whether to predict costs less than to decide that it is not needed.
    """

    is_free: ClassVar[bool] = False

    @abc.abstractmethod
    def __call__(
        self,
        step_map: StepMap,
        y0: State,
        xs: PyTree[Any],
        ys: States,
        num_known: Int[Array, ""],
    ) -> States:
        """Predicts the states that are not known.

        **Arguments:**

        - `step_map`, `y0`, `xs`: the recurrence, as in `solve`.
        - `ys`: the states, `(time, state)`, of which the first `num_known` are known.

        **Returns:**

        All states, `(time, state)`, the known ones as they were. They need be finite
        only if the known ones are. Not differentiated.
        """


class ConstantPredictor(AbstractPredictor):
    """The last known state; from a cold start that is y0 everywhere. Costs nothing."""

    is_free: ClassVar[bool] = True

    def __call__(self, step_map, y0, xs, ys, num_known):
        del step_map, xs
        return hold_last(y0, ys, num_known)


class CoarsePredictor(AbstractPredictor):
    """Steps `stride` times as long as the others, one after another, interpolated.

    The step is the step map's own over a longer time, its dense output the prediction.
    Costs N / `stride` steps one after another. Where such a step fails, and for
    recurrences, which have no longer steps, it predicts what `ConstantPredictor` does.

    **Arguments:**

    - `stride`: the length of a step, in steps of the solve. The longer, the fewer steps
        one after another, and the more iterations afterwards.

    ??? cite "Reference"

        A coarse sequential solve as the guess of a parallel one is that of Parareal:
        Lions, Maday and Turinici, C. R. Acad. Sci. Paris 332 (2001).
    """

    stride: int = eqx.field(static=True, default=COARSE_STRIDE)

    def __check_init__(self):
        check_count("stride", self.stride)

    def __call__(self, step_map, y0, xs, ys, num_known):
        ys, num_steps = hold_last(y0, ys, num_known), len(ys)
        step, interpolate = step_map.coarse_step, step_map.coarse_interpolate
        stride = min(self.stride, num_steps)
        # A single step is exact after one iteration, whatever its guess was.
        if step is None or interpolate is None or num_steps == 1:
            return ys
        num_coarse = -(-num_steps // stride)
        # The last step stands in for those that complete the last coarse step.
        index = jnp.minimum(jnp.arange(num_coarse * stride), num_steps - 1)
        cut = lambda x: x[index].reshape(num_coarse, stride, *x.shape[1:])

        xs, known = jax.tree.map(cut, xs), cut(ys)
        first, last = (jax.tree.map(lambda x, i=i: x[:, i], xs) for i in (0, -1))
        is_known = (
            jnp.arange(num_coarse * stride).reshape(num_coarse, stride) < num_known
        )

        def best(predicted, y, is_known, known):
            predicted = jnp.where(jnp.all(jnp.isfinite(predicted)), predicted, y)
            return jnp.where(is_known, known, predicted)

        def advance(y, inputs):
            first, last, *known = inputs
            return best(step(first, last, y), y, *known), y

        # Only what has to be: all that lies between is interpolated at once.
        ends = first, last, is_known[:, -1], known[:, -1]
        _, starts = lax.scan(advance, y0, ends)
        every = jax.vmap(jax.vmap(interpolate, (None, None, 0, None)))
        predicted = every(first, last, xs, starts)
        every = jax.vmap(jax.vmap(best, (0, None, 0, 0)))
        predicted = every(predicted, starts, is_known, known)
        return predicted.reshape(num_coarse * stride, -1)[:num_steps]
