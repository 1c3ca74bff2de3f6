"""The oracle of the conformance tests.

It is one step of a diffrax solver after another, in a plain `lax.scan`.
"""

from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, PyTree


class Steps(NamedTuple):
    """The steps of a solver in the order in which they are made."""

    solver: diffrax.AbstractSolver
    starts: Array
    ends: Array
    ys: PyTree[Array]
    infos: PyTree[Array]

    def path(self, t: Array) -> diffrax.AbstractLocalInterpolation:
        """The solver's own interpolation of the step that `t` lies in."""
        way = jnp.sign(self.ends[-1] - self.starts[0])
        index = jnp.sum(self.ends * way < t * way)
        # A float at a jump is skipped, `t1` may be beyond the end by rounding.
        index = jnp.minimum(index, len(self.ends) - 1)
        start, end, info = jax.tree.map(
            lambda x: x[index], (self.starts, self.ends, self.infos)
        )
        return self.solver.interpolation_cls(t0=start, t1=end, **info)

    def at(self, ts: Array) -> PyTree[Array]:
        """The states at several times."""
        return jax.vmap(lambda t: self.path(t).evaluate(t))(ts)

    def last(self) -> PyTree[Array]:
        """The final state."""
        return jax.tree.map(lambda y: y[-1], self.ys)


def one_by_one(
    term: diffrax.AbstractTerm,
    solver: diffrax.AbstractSolver,
    windows: tuple[Array, Array],
    num_steps: int,
    y0: PyTree[Any],
    args: PyTree[Any] = None,
) -> Steps:
    """All steps of all windows, from `windows[0]` to `windows[1]`."""
    grid = jax.vmap(lambda a, b: jnp.linspace(a, b, num_steps + 1))(*windows)
    starts, ends = grid[:, :-1].reshape(-1), grid[:, 1:].reshape(-1)

    def step(y, x):
        t0, t1 = x
        state = solver.init(term, t0, t1, y, args)
        y, _, info, _, _ = solver.step(term, t0, t1, y, args, state, made_jump=False)
        return y, (y, info)

    y0 = jax.tree.map(jnp.asarray, y0)
    _, (ys, infos) = lax.scan(step, y0, (starts, ends))
    return Steps(solver, starts, ends, ys, infos)


def windows_between(t0: Any, t1: Any, ends: Array) -> tuple[Array, Array]:
    """Beginnings and ends from saved ends, whose padding becomes empty windows."""
    ends = jnp.where(jnp.isfinite(ends), ends, t1)
    return jnp.concatenate([jnp.asarray(t0)[None], ends[:-1]]), ends


def assert_equal(a: Any, b: Any, rtol: float = 1e-10) -> None:
    """Of the same structure and, to `rtol`, of the same values."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol)
