"""Parts that others write, of about ten lines each, are held to the same contracts."""

import functools as ft
from typing import Any, ClassVar

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest
from jaxtyping import Array, Float

from diffrax_deer import (
    AbstractGradient,
    AbstractLinearization,
    AbstractMethod,
    AbstractPredictor,
    AbstractScan,
    AbstractTransition,
    AssociativeScan,
    DEERAdjoint,
    DEERSolver,
    Dense,
    MatrixFreeGradient,
    Newton,
    ParallelGradient,
    Sequential,
    SequentialScan,
    Statistics,
    WholeInterval,
    affine_recurrence,
)
from diffrax_deer._solve import solve

from .helpers import (
    constant_guess,
    intervals,
    newton,
    relative_error,
    result_is,
    rk4,
    sequential,
    weighted_loss,
)
from .oracle import one_by_one

# ---- What others write ----


class InTheMiddle(AbstractLinearization):
    """The Jacobian of the step between the guess before and after it."""

    def __call__(self, step_map, x, y_prev, y_next):
        step = lambda y: step_map.step(x, y)
        return Dense(jax.jacfwd(step)((y_prev + y_next) / 2))


class Doubling(AbstractScan):
    """In each round, from twice as far away: Hillis and Steele."""

    def __call__(self, a, b, *, reverse=False):
        if reverse:
            a, b = jax.tree.map(lambda x: jnp.roll(x[::-1], 1, axis=0), a), b[::-1]
        distance = 1
        while distance < len(b):
            first, then = (
                jax.tree.map(lambda x, part=part: x[part], a)
                for part in (slice(None, -distance), slice(distance, None))
            )
            add = jax.vmap(lambda a, b: a.matvec(b))(then, b[:-distance])
            b = b.at[distance:].add(add)
            product = jax.vmap(lambda a, b: a.matmul(b))(then, first)
            put = lambda old, new, start=distance: old.at[start:].set(new)
            a, distance = jax.tree.map(put, a, product), 2 * distance
        return b[::-1] if reverse else b


class Pairs(AbstractTransition):
    """Positions, then momenta: of each pair, a matrix of two rows and two columns."""

    entries: Float[Array, "*time 2 2 pairs"]

    def matvec(self, y):
        return jnp.einsum("ijn,jn->in", self.entries, y.reshape(2, -1)).reshape(-1)

    def matmul(self, other):
        return Pairs(jnp.einsum("ijn,jkn->ikn", self.entries, other.entries))

    def transpose(self):
        return Pairs(jnp.swapaxes(self.entries, -3, -2))

    def clear_columns(self, mask):
        return Pairs(jnp.where(mask.reshape(1, 2, -1), 0.0, self.entries))


class PairsOfTheJacobian(AbstractLinearization):
    """Exact if no pair moves another: two tangents, of all pairs at once."""

    def __call__(self, step_map, x, y_prev, y_next):
        step = lambda y: step_map.step(x, y)
        units = jnp.repeat(jnp.eye(2, dtype=y_prev.dtype), y_prev.size // 2, axis=1)
        push = lambda unit: jax.jvp(step, (y_prev,), (unit,))[1]
        columns = jax.vmap(push)(units).reshape(2, 2, -1)
        return Pairs(jnp.swapaxes(columns, 0, 1))


class Sweeps(AbstractMethod):
    """All steps at once, as often as there are steps: no derivative, no test."""

    uses_guess: ClassVar[bool] = True

    def resolve(self, step_map, y0, num_steps):
        return self

    def __call__(self, step_map, y0, xs, guess):
        ys = jnp.where(jnp.isfinite(guess), guess, 0.0)
        for _ in range(len(guess)):
            ys = jax.vmap(step_map.step)(xs, jnp.concatenate([y0[None], ys[:-1]]))
        count = jnp.array(len(guess))
        finite = jnp.all(jnp.isfinite(ys), axis=1)
        num_solved = jnp.where(jnp.all(finite), count, jnp.argmin(finite))
        result = optx.RESULTS.where(
            num_solved == count, optx.RESULTS.successful, optx.RESULTS.nonfinite
        )
        ys = jnp.where(finite[:, None], ys, 0.0)
        return ys, Statistics(count, None, num_solved, result, self), None


class Unrolled(AbstractGradient):
    """The tangent of one step after another, in a loop of Python."""

    def __call__(self, solution, tangents):
        step_map_dot, xs_dot, y_dot = tangents
        evaluate, out = lambda step_map, x, y: step_map.evaluate(x, y), []
        for n, is_solved in enumerate(solution.solved):
            at = lambda tree, n=n: jax.tree.map(lambda x: x[n], tree)
            primals = solution.step_map, at(solution.xs), solution.starts[n]
            y_dot = jnp.where(is_solved, y_dot, 0.0)
            dots = step_map_dot, at(xs_dot), y_dot
            out.append(eqx.filter_jvp(evaluate, primals, dots)[1])
            y_dot, _ = out[-1]
        return jax.tree.map(lambda *x: jnp.stack(x), *out)


class Straight(AbstractPredictor):
    """On in the direction that the field has at the last state that is known."""

    def __call__(self, step_map, y0, xs, ys, num_known):
        assert step_map.increment is not None
        increment = step_map.increment
        last = jnp.where(num_known == 0, y0, ys[jnp.maximum(num_known - 1, 0)])
        unknown = (jnp.arange(len(ys)) >= num_known)[:, None]
        moves = jax.vmap(lambda x: increment(x, last))(xs)
        moved = last[None] + jnp.cumsum(jnp.where(unknown, moves, 0.0), axis=0)
        return jnp.where(unknown, moved, ys)


class TwoStages(diffrax.AbstractSolver):
    """The explicit midpoint method, of any vector field and any control."""

    term_structure = diffrax.AbstractTerm
    interpolation_cls = diffrax.LocalLinearInterpolation

    def order(self, terms):
        return 2

    def init(self, terms, t0, t1, y0, args):
        return None

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        control = terms.contr(t0, t1)
        move = lambda t, y: terms.vf_prod(t, y, args, control)
        half = jax.tree.map(lambda y, k: y + k / 2, y0, move(t0, y0))
        middle = t0 + (t1 - t0) / 2
        y1 = jax.tree.map(lambda y, k: y + k, y0, move(middle, half))
        return y1, None, {"y0": y0, "y1": y1}, None, diffrax.RESULTS.successful

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)


# ---- The contracts ----

_STEPS = 6
_PARTS: dict[str, tuple[AbstractMethod, AbstractGradient]] = {
    "linearization": (newton(InTheMiddle()), MatrixFreeGradient(InTheMiddle())),
    "scan": (newton(None, Doubling()), ParallelGradient(Doubling())),
    "transition": (
        newton(PairsOfTheJacobian(), Doubling()),
        MatrixFreeGradient(PairsOfTheJacobian(), Doubling()),
    ),
    "predictor": (newton(predictor=Straight()), ParallelGradient()),
    "method": (Sweeps(), ParallelGradient()),
    "gradient": (newton(), Unrolled()),
}


def _field(t, y, args):
    """Two pendulums, coupled, and pushed; the first two components are angles."""
    angles, speeds = y[:2], y[2:]
    coupling, push = args
    force = push * jnp.sin(3 * t) - jnp.sin(angles) - coupling @ angles
    return jnp.concatenate([speeds, force])


def _parameters() -> Any:
    y0 = jnp.array([1.0, -0.3, 0.2, 0.5])
    times = jnp.cumsum(jnp.linspace(0.2, 0.5, _STEPS + 1))
    coupling, push = jnp.array([[0.2, -0.1], [-0.1, 0.3]]), jnp.array([0.4, -0.7])
    return y0, times, (coupling, push)


@pytest.fixture(scope="module")
def expected():
    """States and gradient that every part has to lead to."""

    @jax.jit
    @ft.partial(jax.value_and_grad, has_aux=True)
    def compute(parameters):
        y0, times, args = parameters
        ys = sequential(rk4(_field, args), y0, intervals(times))
        return weighted_loss(lambda ys: ys, ys), ys

    (_, ys), gradient = compute(_parameters())
    return ys, gradient


@pytest.mark.parametrize("part", _PARTS)
def test_part_of_others_finds_the_sequential_answer_with_its_exact_gradient(
    part, expected
):
    method, gradient = _PARTS[part]
    parameters = _parameters()
    constant = constant_guess(parameters[0], _STEPS)
    guesses = constant, jnp.full_like(constant, jnp.nan), constant.at[4].set(1e30)

    @jax.jit
    @ft.partial(jax.vmap, in_axes=(None, 0))
    @ft.partial(jax.value_and_grad, has_aux=True)
    def compute(parameters, guess):
        y0, times, args = parameters
        step_map, xs = rk4(_field, args), intervals(times)
        ys, statistics, _ = solve(step_map, y0, xs, guess, method, gradient)
        return weighted_loss(lambda ys: ys, ys), (ys, statistics)

    (_, (ys, statistics)), found = compute(parameters, jnp.stack(guesses))
    assert np.all(result_is(statistics.result, "successful"))
    assert jnp.all(statistics.num_iterations <= _STEPS)
    assert jnp.all(statistics.num_solved == _STEPS)
    for_all = jax.tree.map(lambda x: jnp.stack([x] * len(guesses)), expected)
    assert relative_error((ys, found), for_all) < 1e-9


def test_scan_and_transition_of_others_solve_the_recurrence_and_its_transpose():
    rng = np.random.default_rng(0)
    a, b, c = rng.normal(size=(7, 2, 2, 3)), *rng.normal(size=(2, 7, 6))
    # In full: blocks that are diagonal.
    full = a[..., None] * np.eye(3)
    full = np.moveaxis(full, -2, 2).reshape(7, 6, 6)
    system = np.eye(42)
    for n in range(1, 7):
        system[6 * n : 6 * n + 6, 6 * n - 6 : 6 * n] = -full[n]
    expected = np.linalg.solve(system, b.reshape(-1)).reshape(7, 6)
    transposed = np.linalg.solve(system.T, c.reshape(-1)).reshape(7, 6)
    for scan in (SequentialScan(), AssociativeScan(), Doubling()):
        run = ft.partial(affine_recurrence, Pairs(jnp.asarray(a)), scan=scan)
        ys, pull = jax.vjp(run, jnp.asarray(b))
        assert relative_error(ys, expected) < 1e-13
        assert relative_error(pull(jnp.asarray(c))[0], transposed) < 1e-13
    # Nothing of what is infinite remains where there is nothing to multiply.
    infinite = Pairs(jnp.full((7, 2, 2, 3), 1e300))
    last = jnp.zeros((7, 6)).at[-1].set(1.0)
    np.testing.assert_array_equal(
        affine_recurrence(infinite, last, scan=AssociativeScan()), last
    )


@pytest.mark.parametrize("part", ["method", "gradient"])
def test_part_of_others_has_a_gradient_that_can_be_discarded_if_the_solve_fails(part):
    method, gradient = _PARTS[part]
    xs = intervals(jnp.linspace(0.0, 1.0, 9))

    @jax.jit
    @jax.vmap
    @ft.partial(jax.value_and_grad, has_aux=True)
    def loss(y0):
        # Reaches zero at twice the square root of its initial value.
        step_map = rk4(lambda t, y, args: -jnp.sqrt(y), None)
        guess = constant_guess(y0, 8)
        ys, statistics, _ = solve(step_map, y0, xs, guess, method, gradient)
        succeeded = statistics.result == optx.RESULTS.successful
        return jnp.where(succeeded, jnp.sum(ys), 0.0), succeeded

    (_, succeeded), slopes = loss(jnp.array([[1.0], [0.1]]))
    np.testing.assert_array_equal(succeeded, [True, False])
    # The solution is (sqrt(y0) - t / 2) ** 2.
    exact = np.sum(1 - np.linspace(0.0, 1.0, 9)[1:] / 2)
    np.testing.assert_allclose(slopes[0], exact, rtol=1e-3)
    assert slopes[1] == 0


@pytest.mark.parametrize(
    "method", [Newton(), Sequential()], ids=["newton", "sequential"]
)
def test_solver_of_others_is_solved_step_by_step_with_its_exact_derivatives(method):
    # Of a controlled equation, backwards in time.
    path = diffrax.CubicInterpolation(
        ts := jnp.linspace(0.0, 2.0, 5),
        diffrax.backward_hermite_coefficients(ts, jnp.sin(3 * ts)[:, None]),
    )

    def term():
        field = lambda t, y, args: jnp.stack([y[1], -jnp.sin(y[0]) * args])[:, None]
        return diffrax.ControlTerm(field, path)

    def own(parameters):
        y0, args = parameters
        solver = DEERSolver(TwoStages(), num_steps=_STEPS, method=method)
        options = {"stepsize_controller": WholeInterval(), "adjoint": DEERAdjoint()}
        sol = diffrax.diffeqsolve(term(), solver, 1.8, 0.1, None, y0, args, **options)
        return jnp.asarray(sol.ys)[-1]

    def reference(parameters):
        y0, args = parameters
        windows = jnp.array([1.8]), jnp.array([0.1])
        return one_by_one(term(), TwoStages(), windows, _STEPS, y0, args).last()

    @jax.jit
    def compute(parameters):
        loss = lambda f: lambda p: jnp.sum(jnp.sin(f(p)))
        both = lambda f: (f(parameters), jax.grad(loss(f))(parameters))
        return both(own), both(reference)

    found, expected = compute((jnp.array([1.0, 0.3]), jnp.array(1.3)))
    assert relative_error(found, expected) < 1e-9
