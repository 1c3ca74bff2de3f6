"""What any solver of diffrax has to do, asked of `DEERSolver` for several solvers.

The reference is the inner solver itself, one step after another.
"""

from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

from diffrax_deer import (
    DEERAdjoint,
    ExponentialRosenbrockEuler,
    WholeInterval,
)

from .helpers import newton_solver, problems, slowly
from .oracle import adjoints, all_adjoints, assert_equal

_N = 12
_root_finder = optx.Newton(rtol=1e-12, atol=1e-12)

# A solver added here, with its order, is held to everything.
solvers: dict[str, tuple[diffrax.AbstractSolver, int]] = {
    "dopri5": (diffrax.Dopri5(), 5),
    "kvaerno5": (diffrax.Kvaerno5(root_finder=_root_finder), 5),
    "exponential": (ExponentialRosenbrockEuler(), 2),
}
each_solver = pytest.mark.parametrize("name", solvers)
# Every solver and every adjoint; not every pair, seconds each.
each_pair = pytest.mark.parametrize(
    ("name", "adjoint"),
    [
        ("dopri5", "deer"),
        slowly("dopri5", "default"),
        *[slowly(name, "deer") for name in solvers if name != "dopri5"],
    ],
)


def _field(t, y, args):
    """A pendulum that is pushed; the state is a pytree."""
    angle, (speed,) = y["angle"], y["speed"]
    return {"angle": speed, "speed": (args * jnp.sin(3 * t) - jnp.sin(angle),)}


def _y0(angle: Any = 1.0) -> dict[str, Any]:
    return {"angle": jnp.asarray(angle), "speed": (jnp.array(0.3),)}


def _solve(solver, controller, t0, t1, y0, push, saveat, adjoint=None, **kwargs: Any):
    return diffrax.diffeqsolve(
        diffrax.ODETerm(_field),
        solver,
        t0,
        t1,
        None,
        y0,
        push,
        saveat=saveat,
        stepsize_controller=controller,
        adjoint=diffrax.RecursiveCheckpointAdjoint() if adjoint is None else adjoint,
        max_steps=kwargs.pop("max_steps", _N),
        **kwargs,
    )


def _parallel(name, adjoint, t0, t1, y0, push, saveat, num_windows=1, **kwargs: Any):
    """Windows of several steps each, those of `_sequential` all together."""
    solver = newton_solver(solvers[name][0], num_steps=_N // num_windows)
    windows = diffrax.StepTo(jnp.linspace(t0, t1, num_windows + 1))
    controller = WholeInterval() if num_windows == 1 else windows
    return _solve(
        solver, controller, t0, t1, y0, push, saveat, all_adjoints[adjoint], **kwargs
    )


def _sequential(name, t0, t1, y0, push, saveat, **kwargs: Any):
    controller = diffrax.StepTo(jnp.linspace(t0, t1, _N + 1))
    return _solve(solvers[name][0], controller, t0, t1, y0, push, saveat, **kwargs)


@each_pair
def test_saved_values_and_dense_output_forwards_and_backwards(name, adjoint):
    @jax.jit
    def both(t0, t1):
        at = lambda fractions: t0 + (t1 - t0) * jnp.array(fractions)
        sub = diffrax.SubSaveAt(t0=True, ts=at([0.0, 0.13, 0.5, 0.96, 1.0]), t1=True)
        times_only = diffrax.SubSaveAt(ts=at([0.3, 0.6]), fn=lambda t, y, args: (t, y))
        saveat = diffrax.SaveAt(subs=(sub, [times_only]), dense=True)

        def outputs(sol):
            between = at([0.02, 0.49, 0.51, 0.9])
            dense = jax.vmap(lambda t: (sol.evaluate(t), sol.derivative(t)))(between)
            return sol.ts, sol.ys, dense, sol.t0, sol.t1, sol.result

        arguments = t0, t1, _y0(), jnp.array(0.4), saveat
        parallel = _parallel(name, adjoint, *arguments, num_windows=3)
        return outputs(parallel), outputs(_sequential(name, *arguments))

    for t0, t1 in ((0.0, 2.0), (2.0, 0.5)):
        (*parallel, result), (*sequential, _) = both(jnp.array(t0), jnp.array(t1))
        assert result == diffrax.RESULTS.successful
        assert_equal(parallel, sequential, 1e-9)


@each_solver
def test_the_solution_converges_with_the_order_of_the_solver(name):
    solver, order = solvers[name]
    sizes = [8, 16, 32] if order < 4 else [4, 8, 16]

    def error(num_steps):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: -2 * t * y**2),
            newton_solver(solver, num_steps=num_steps),
            0.0,
            1.5,
            None,
            jnp.array(1.0),
            stepsize_controller=WholeInterval(),
            adjoint=DEERAdjoint(),
        )
        return jnp.abs(sol.ys[-1] - 1 / (1 + 1.5**2))

    errors = np.array(jax.jit(lambda: [error(size) for size in sizes])())
    observed = np.log2(errors[:-1] / errors[1:])
    assert observed[-1] > order - 0.5, observed


@each_pair
def test_a_batch_is_its_members(name, adjoint):
    saveat = lambda ts: diffrax.SaveAt(ts=ts)

    def parallel(y0, push, t0, t1, ts):
        return _parallel(name, adjoint, t0, t1, y0, push, saveat(ts)).ys

    def sequential(y0, push, t0, t1, ts):
        return _sequential(name, t0, t1, y0, push, saveat(ts)).ys

    y0 = jax.vmap(_y0)(jnp.array([1.0, 0.2, -2.0]))
    y0["speed"] = (jnp.array([0.3, -0.1, 0.0]),)
    push, t0 = jnp.array([0.4, 0.0, 1.0]), jnp.array([0.0, 1.0, 2.0])
    t1 = jnp.array([2.0, 1.5, 0.5])  # the last one backwards
    ts = jnp.linspace(t0, t1, 4, axis=1)
    batch = y0, push, t0, t1, ts
    found = jax.jit(jax.vmap(parallel))(*batch)
    one = jax.jit(sequential)
    for i in range(3):
        member = lambda tree, i=i: jax.tree.map(lambda x: x[i], tree)
        assert_equal(member(found), one(*member(batch)), 1e-9)


@pytest.mark.slow
@each_solver
def test_derivatives_are_those_of_the_sequential_solver_for_every_adjoint(name):
    ts = jnp.array([0.4, 1.1, 1.7])

    def loss(adjoint, y0, push):
        arguments = jnp.array(0.0), jnp.array(2.0), y0, push, diffrax.SaveAt(ts=ts)
        if adjoint is None:
            direct = diffrax.DirectAdjoint()
            ys: Any = _sequential(name, *arguments, adjoint=direct).ys
        else:
            ys = _parallel(name, adjoint, *arguments, max_steps=1).ys
        return jnp.sum(ys["angle"] ** 2 * jnp.array([1.0, 2.0, 3.0]))

    @jax.jit
    def all_of_them(y0, push):
        reverse = lambda adjoint: jax.grad(
            lambda *primals: loss(adjoint, *primals), (0, 1)
        )(y0, push)
        forward = lambda adjoint: jax.jvp(
            lambda push: loss(adjoint, y0, push), (push,), (jnp.ones(()),)
        )[1]
        # One solver suffices to show that the other adjoints of diffrax work.
        others = name == "dopri5"
        reversed_by = (*adjoints, "direct") if others else adjoints
        pushed_by = ("deer", "forward") if others else ("deer",)
        found = {adjoint: reverse(adjoint) for adjoint in reversed_by}
        pushed = {adjoint: forward(adjoint) for adjoint in pushed_by}
        return found, pushed, reverse(None)

    found, pushed, expected = all_of_them(_y0(), jnp.array(0.4))
    for adjoint in found:
        assert_equal(found[adjoint], expected, 1e-8)
    for adjoint in pushed:
        assert_equal(pushed[adjoint], expected[1], 1e-8)


@each_pair
def test_an_event_ends_the_solution_at_its_root(name, adjoint):
    # Without a push the pendulum crosses the vertical once, here also for the solver.
    event = diffrax.Event(
        lambda t, y, args, **kwargs: y["angle"] - 0.2,
        optx.Newton(rtol=1e-11, atol=1e-11),
    )
    saveat = diffrax.SaveAt(ts=jnp.array([0.5, 1.5, 2.5]), t1=True)

    @jax.jit
    def both():
        arguments = jnp.array(0.0), jnp.array(3.0), _y0(), jnp.array(0.0), saveat
        parallel = _parallel(name, adjoint, *arguments, event=event)
        return parallel, _sequential(name, *arguments, event=event)

    parallel, sequential = both()
    assert parallel.result == diffrax.RESULTS.event_occurred
    assert np.isfinite(parallel.ts).sum() == 3
    assert 1.5 < float(parallel.ts[2]) < 2.5
    assert_equal((parallel.ts, parallel.ys), (sequential.ts, sequential.ys), 1e-9)
    assert bool(parallel.event_mask) and bool(sequential.event_mask)


@each_pair
def test_an_adaptive_solve_meets_the_tolerance(name, adjoint):
    solver, order = solvers[name]
    tolerance = 1e-4 if order < 4 else 1e-7
    controller = diffrax.PIDController(rtol=tolerance, atol=tolerance)
    saveat = diffrax.SaveAt(t1=True)

    @jax.jit
    def both():
        arguments = 0.0, 2.0, _y0(), jnp.array(0.4), saveat
        kwargs = dict(adjoint=adjoints[adjoint], max_steps=64)
        found = _solve(
            newton_solver(solver, num_steps=16), controller, *arguments, **kwargs
        )
        tight = diffrax.PIDController(rtol=1e-11, atol=1e-11)
        exact = _solve(diffrax.Dopri8(), tight, *arguments, max_steps=4096)
        return found, exact.ys

    found, exact = both()
    assert found.result == diffrax.RESULTS.successful
    assert_equal(found.ys, exact, 20 * tolerance)


_hard = problems | {
    "van_der_pol_10": problems["van_der_pol"]._replace(args=np.array(10.0), t1=20.0)
}


@pytest.mark.parametrize(
    "problem", ["lotka_volterra", "van_der_pol", "van_der_pol_10", "two_body"]
)
def test_at_every_tolerance_the_error_is_at_most_ten_times_that_of_dopri5(problem):
    field, y0, args, t0, t1 = _hard[problem]

    def solve(solver, tolerance, max_steps):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            solver,
            t0,
            t1,
            None,
            jnp.asarray(y0),
            jnp.asarray(args),
            stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
            saveat=diffrax.SaveAt(ts=jnp.linspace(t0, t1, 33)[1:]),
            max_steps=max_steps,
        ).ys

    @jax.jit
    def errors():
        exact = solve(diffrax.Dopri8(), 1e-13, 100_000)

        def at(tolerance):
            error = lambda ys: jnp.max(jnp.abs(ys - exact))
            windows = error(solve(newton_solver(), tolerance, 4096))
            return windows, error(solve(diffrax.Dopri5(), tolerance, 100_000))

        return jax.lax.map(at, 10.0 ** -jnp.arange(3.0, 11.0))

    windows, sequential = errors()
    assert (windows <= 10 * sequential).all(), windows / sequential
    # Both do what the tolerance asks for.
    assert sequential[-1] < 1e-5 * sequential[0]
    assert windows[-1] < 1e-6 * np.max(np.abs(y0))
