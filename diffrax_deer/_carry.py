"""The carry of a scan, taken apart.

The program of one step is read before anything is solved:

1. Leaves of the carry that depend on each other, directly or by way of others, form a
   *circle*, one nonlinear recurrence. Circles are solved one after another, each for
   all steps at once, and know the trajectories of those before: the layers of a stacked
   network are separate systems, and so is an accumulator. What no leaf of the carry
   depends on is evaluated once, in the end.
2. What a circle does not need its own leaves for, the products of the inputs with
   their weights, is evaluated beforehand, once, for all steps together.
3. Where a recurrence acts on each entry alone, its Jacobian is held as a diagonal.
"""

import dataclasses
from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix as optx
from jax import lax
from jaxtyping import Array

from ._dataflow import Program
from ._newton import Statistics


@dataclasses.dataclass(frozen=True)
class Circle:
    """Leaves of the carry that have to be solved for together, by their numbers.

    - `is_recurrent`: whether they depend on themselves at all.
    - `is_smooth`: whether they can be differentiated, in forward mode.
    - `is_elementwise`: whether each entry depends on its own past only.
    - `size`: the number of real components.
    """

    leaves: list[int]
    is_recurrent: bool
    is_smooth: bool
    is_elementwise: bool
    size: int

    @property
    def num_entries(self) -> int:
        """How many numbers a transition has."""
        return self.size if self.is_elementwise else self.size**2


def circles(depends: Sequence[set[int]]) -> list[list[int]]:
    """Sets of nodes that depend on each other, each after those that it depends on.

    `depends[i]` are the nodes that node i depends on. Strongly connected components, in
    topological order.
    """
    reach = [set(d) for d in depends]
    for k in range(len(reach)):
        for r in reach:
            if k in r:
                r |= reach[k]
    # Who is reached by whom decides on the order, then on the circle.
    together = lambda i, j: i == j or (j in reach[i] and i in reach[j])
    found = {
        tuple(j for j in range(len(reach)) if together(i, j)) for i in range(len(reach))
    }
    depth = lambda circle: len(set().union(*(reach[i] for i in circle)) - set(circle))
    return [list(c) for c in sorted(found, key=lambda c: (depth(c), c))]


@dataclasses.dataclass(frozen=True)
class CarryProgram:
    """A scan over `num_steps` steps, with `init` and `xs` as lists of leaves."""

    program: Program
    init: list[Array]
    xs: list[Array]
    num_steps: int

    @property
    def _by_number(self) -> dict[int, Array]:
        start = len(self.init)
        return {start + i: x for i, x in enumerate(self.xs)}

    def circles(self) -> list[Circle]:
        """The circles of the carry, in the order in which they can be solved."""
        leaves, found = range(len(self.init)), []
        depends = [d & set(leaves) for d in self.program.dependencies()[: len(leaves)]]
        done: list[int] = []
        for circle in circles(depends):
            values = [self.init[i] for i in circle]
            is_float = all(eqx.is_inexact_array(x) for x in values)
            is_smooth = is_float and self.program.has_tangents(circle, circle, done)
            per = lambda x: x.size * (2 if jnp.iscomplexobj(x) else 1)
            is_real = not any(jnp.iscomplexobj(x) for x in values)
            found.append(
                Circle(
                    circle,
                    any(depends[i] & set(circle) for i in circle),
                    is_smooth,
                    is_real and self.program.is_elementwise(circle, circle, known=done),
                    sum(map(per, values)) if is_smooth else 0,
                )
            )
            done += circle
        return found

    def _before(self, trajectories: dict[int, Array]) -> dict[int, Array]:
        """The values that the steps start from."""
        shifted = lambda i, ys: jnp.concatenate([self.init[i][None], ys[:-1]])
        return {i: shifted(i, ys) for i, ys in trajectories.items()}

    def _split(
        self, outputs: list[int], by: list[int], trajectories: dict[int, Array]
    ) -> tuple[list[Array], Callable]:
        """What of `outputs` is known, for all steps, and the `late` of `Program`."""
        early, late = self.program.split(outputs, by, list(trajectories))
        inputs = self._before(trajectories) | self._by_number
        every = jax.vmap(early, axis_size=self.num_steps)
        return every(inputs, trajectories), late

    def _known(self, outputs: list[int], trajectories: dict[int, Array]) -> list[Array]:
        """`outputs` for all steps, where the trajectories are all that they need."""
        driven, late = self._split(outputs, [], trajectories)
        every = jax.vmap(lambda x: late(x, []), axis_size=self.num_steps)
        return every(driven)

    def in_parallel(
        self,
        num_outputs: int,
        found: Sequence[Circle],
        solve_circle: Callable,
        guess: dict[int, Array],
    ) -> tuple[list[Array], list[Array], Statistics]:
        """Circle by circle: the carry in the end, the outputs, and statistics."""
        trajectories: dict[int, Array] = {}
        statistics = []
        for circle in found:
            leaves = circle.leaves
            if self.program.passes_on(leaves[0]):
                (x,) = (self.init[i] for i in leaves)
                ys = [jnp.broadcast_to(x, (self.num_steps, *x.shape))]
            elif not circle.is_recurrent:
                ys = self._known(leaves, trajectories)
            else:
                driven, late = self._split(leaves, leaves, trajectories)
                start = [self.init[i] for i in leaves]
                if circle.is_smooth:
                    along = [guess[i] for i in leaves] if guess else None
                    ys, about = solve_circle(circle, late, start, driven, along)
                    statistics.append(about)
                else:
                    step = lambda c, x, late=late: 2 * (late(x, c),)
                    _, ys = lax.scan(step, start, driven, length=self.num_steps)
            trajectories |= zip(leaves, ys, strict=True)
        num_leaves = len(self.init)
        outputs = list(range(num_leaves, num_leaves + num_outputs))
        ys = self._known(outputs, trajectories)
        carry = [trajectories[i][-1] for i in range(num_leaves)]
        return carry, ys, summary(statistics, self.num_steps)


def are_finite(values: Sequence[Array], numbers: Sequence[int]) -> Array:
    """Whether the values of these numbers are all finite."""
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(values[i])) for i in numbers], bool))


def summary(statistics: Sequence[Statistics], num_steps: int) -> Statistics:
    """Of all circles together; the result is that of the first one that fails."""
    dtype = jnp.result_type(float)
    count = lambda n: jnp.array(n, int)
    out = Statistics(
        count(0), jnp.zeros((), dtype), count(num_steps), optx.RESULTS.successful
    )
    for new in statistics:
        failed = out.result != optx.RESULTS.successful
        out = Statistics(
            jnp.maximum(out.num_iterations, new.num_iterations),
            jnp.maximum(out.residual, new.residual.astype(dtype)),
            jnp.minimum(out.num_solved, new.num_solved),
            optx.RESULTS.where(failed, out.result, new.result),
        )
    return out
