"""Events: at every inner step of static windows, else as in diffrax's own loop."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

from diffrax_deer import DEERAdjoint, DEERSolver, WholeInterval
from diffrax_deer._adjoint.events import EventSearch

from .helpers import newton_solver
from .oracle import assert_equal

_ROOT_FINDER = optx.Newton(rtol=1e-12, atol=1e-12)
_SEQUENTIAL = diffrax.RecursiveCheckpointAdjoint()


# ---- The search ----


def _search(conditions, directions=None, root_finder=None):
    event = diffrax.Event(conditions, root_finder, directions)
    return EventSearch(event, lambda function, t, y: function(t, y))


def _crosses(old, new, direction):
    """As diffrax documents it."""
    if direction is None:
        return np.sign(old) != np.sign(new)
    return (old <= 0 < new) if direction else (old > 0 >= new)


def test_first_event_is_the_first_crossing_in_its_direction_of_the_first_condition():
    rng, num_steps = np.random.default_rng(0), 4
    # The last one is Boolean.
    directions = None, False, True, None
    conditions = tuple(lambda t, y, i=i: y[i] for i in range(4))
    first = jax.jit(_search(conditions, directions).first)
    seen = set()
    for _ in range(200):
        # Zeros, too, which belong to one side or the other.
        real = rng.integers(-1, 2, size=(3, num_steps + 1)).astype(float)
        # At first nothing happens.
        calm = np.arange(num_steps + 1) < rng.integers(0, num_steps + 2, (3, 1))
        real = np.where(calm, real[:, :1], real)
        paths = [*real, rng.uniform(size=num_steps + 1) < 0.1]
        num_valid = rng.integers(0, num_steps + 1)
        before = tuple(jnp.asarray(path[0]) for path in paths)
        values = tuple(jnp.asarray(path[1:]) for path in paths)
        index, mask = first(before, values, jnp.arange(num_steps) < num_valid)

        expected, which = num_steps, []
        for i in reversed(range(num_valid)):
            crossed = [
                _crosses(path[i], path[i + 1], direction)
                for path, direction in zip(real, directions[:3], strict=True)
            ]
            occurred = np.flatnonzero([*crossed, paths[3][i + 1]])
            if len(occurred) > 0:
                # Of several the first leaf counts.
                expected, which = i, [int(occurred[0])]
        assert index == expected
        assert np.flatnonzero(mask).tolist() == which
        seen.add(tuple(which))
    assert seen == {(), (0,), (1,), (2,), (3,)}


def test_root_is_that_of_the_condition_that_has_occurred_and_has_a_derivative():
    conditions = [lambda t, y: y > 5, lambda t, y: y - 2, lambda t, y: t - 0.9]
    search = _search(conditions, root_finder=_ROOT_FINDER)

    def locate(y1, which):
        path = diffrax.LocalLinearInterpolation(
            t0=jnp.array(0.5), t1=jnp.array(1.5), y0=jnp.array(1.0), y1=y1
        )
        mask = [jnp.array(i == which) for i in range(3)]
        t, y, result = search.locate(mask, path)
        return t, (y, result)

    # y = 1 + 3 (t - 0.5); the root of the second at t = 0.5 + 1 / (y1 - 1).
    y1 = jnp.array(4.0)
    expected = {0: (1.5, 4.0, 0.0), 1: (0.5 + 1 / 3, 2.0, -1 / 9), 2: (0.9, 2.2, 0.0)}
    for which, (t, y, slope) in expected.items():
        value = jax.value_and_grad(lambda y1, i=which: locate(y1, i), has_aux=True)
        (found_t, (found_y, result)), gradient = value(y1)
        assert result == diffrax.RESULTS.successful
        np.testing.assert_allclose([found_t, found_y, gradient], [t, y, slope], 1e-10)


# ---- Static windows ----


def _pendulum(t, y, push):
    angle, speed = y["angle"], y["speed"]
    return {"angle": speed, "speed": push * jnp.sin(3 * t) - jnp.sin(angle)}


_ANGLE = lambda t, y, args, **_: y["angle"] - 0.2
_SPEED = lambda t, y, args, **_: y["speed"] + 0.9
_SLOW = lambda t, y, args, **_: y["speed"] < -0.9
_NEVER = lambda t, y, args, **_: y["angle"] > 9

_EVENTS = {
    # The first of several, some of which are also of another kind or never occur.
    "real": diffrax.Event({"never": _NEVER, "angle": _ANGLE}, _ROOT_FINDER),
    # The speed falls below -0.9, and only then rises above it.
    "upwards": diffrax.Event(_SPEED, _ROOT_FINDER, direction=True),
    "boolean": diffrax.Event([_NEVER, _SLOW], _ROOT_FINDER),
    "end_of_step": diffrax.Event(_ANGLE, direction=False),
}


def _saveat(steps):
    sub, ts = diffrax.SubSaveAt, jnp.array([0.0, 0.5, 1.5, 3.5, 3.9])
    root = lambda t, y, args: jnp.sqrt(2 + y["angle"])
    subs = {
        "mixed": sub(t0=True, ts=ts, steps=steps, t1=True),
        "function": sub(ts=ts, fn=root),
    }
    return diffrax.SaveAt(subs=subs)


@pytest.mark.parametrize("name", _EVENTS)
def test_event_in_static_windows_is_that_of_the_inner_solver(name):
    inner, num_steps = diffrax.Bosh3(), 6
    # A Boolean event is at the end of a step, which diffrax would save twice.
    has_steps = 0 if name == "boolean" else 1

    def solve(solver, steps, adjoint, saved, p):
        y0, push = p
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(_pendulum),
            solver,
            0.0,
            4.0,
            None,
            y0,
            push,
            saveat=_saveat(saved * has_steps),
            stepsize_controller=diffrax.StepTo(jnp.linspace(0.0, 4.0, steps + 1)),
            adjoint=adjoint,
            event=_EVENTS[name],
            max_steps=steps,
        )
        # At the end of the window in which it ends the inner solver saves nothing.
        mixed = jax.tree.map(lambda x: x[:9], (sol.ts["mixed"], sol.ys["mixed"]))
        saved = mixed, sol.ts["function"], sol.ys["function"]
        finite = jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, 0), saved)
        leaves = [x.ravel() for x in jax.tree.leaves(finite)]
        flat = jnp.concatenate(leaves)
        loss = jnp.sum(flat**2 * jnp.cos(jnp.arange(len(flat)) / 20))
        return loss, (saved, sol.result, sol.event_mask)

    ours = newton_solver(inner, num_steps), 4, DEERAdjoint(), 1

    @jax.jit
    def values(p):
        return solve(*ours, p), solve(inner, 4 * num_steps, _SEQUENTIAL, num_steps, p)

    @jax.jit
    def derivatives(p):
        of = lambda *which: jax.value_and_grad(
            lambda p: solve(*which, p=p), has_aux=True
        )(p)
        direction = jax.tree.map(jnp.cos, p)
        slope = jax.jvp(lambda p: solve(*ours, p)[0], (p,), (direction,))[1]
        expected = of(inner, 4 * num_steps, _SEQUENTIAL, num_steps)
        products = jax.tree.map(lambda a, b: jnp.sum(a * b), expected[1], direction)
        return of(*ours), slope, expected, sum(jax.tree.leaves(products))

    y0 = {"angle": jnp.array(1.0), "speed": jnp.array(0.3)}
    p = y0, jnp.array(0.1)
    if name in ("upwards", "boolean"):
        found, expected = values(p)
        result = expected[1][1]
    else:
        found, slope, expected, e_slope = derivatives(p)
        assert_equal(slope, e_slope, 1e-9)
        result = expected[0][1][1]
    assert result == diffrax.RESULTS.event_occurred
    assert_equal(found, expected, 1e-9)


def test_batch_in_which_events_occur_at_once_later_or_never_is_its_members():
    rates, inner = jnp.array([3.0, 1.0, 0.2, 0.7]), diffrax.Heun()
    thresholds = jnp.array([0.2, 0.7, 0.1, 1.5])
    grid = jnp.linspace(0.0, 2.0, 9)

    def solve(solver, controller, adjoint, rate, threshold):
        event = diffrax.Event(lambda t, y, args, **_: y[0] < threshold)
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: -args * y),
            solver,
            0.0,
            2.0,
            None,
            jnp.array([1.0]),
            rate,
            saveat=diffrax.SaveAt(ts=grid[1::3] - 0.1, t1=True),
            stepsize_controller=controller,
            adjoint=adjoint,
            event=event,
            max_steps=8,
        )
        return sol.ts, sol.ys, sol.result, sol.event_mask

    @jax.jit
    def both(*batch):
        ours = newton_solver(inner, 8), WholeInterval(), DEERAdjoint()
        reference = inner, diffrax.StepTo(grid), _SEQUENTIAL
        of = lambda which: jax.vmap(lambda *one: solve(*which, *one))(*batch)
        return of(ours), of(reference)

    found, expected = both(rates, thresholds)
    occurred = found[2] == diffrax.RESULTS.event_occurred
    assert occurred.tolist() == [True, True, False, True]
    assert found[0][3].tolist()[:1] == [0.0]
    assert_equal(found, expected)


_ROOT = (0.3 + (0.3**2 + 2 * 8.0 * 10.0) ** 0.5) / 8.0


def test_ball_hits_the_ground_when_it_does_and_dense_output_ends_with_the_step():
    """Thrown up from a height of 10; every method is exact."""
    event = diffrax.Event(lambda t, y, args, **_: y[0], _ROOT_FINDER)
    ts = jnp.linspace(0.0, 6.0, 13)

    def solve(height):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, g: jnp.stack([y[1], -g])),
            newton_solver(num_steps=32),
            0.0,
            6.0,
            None,
            jnp.stack([height, jnp.array(0.3)]),
            jnp.array(8.0),
            saveat=diffrax.SaveAt(ts=ts, t1=True, dense=True),
            stepsize_controller=WholeInterval(),
            adjoint=DEERAdjoint(),
            event=event,
            max_steps=4,
        )
        return sol.ts[4], sol

    (_, sol), gradient = jax.jit(jax.value_and_grad(solve, has_aux=True))(10.0)
    assert sol.result == diffrax.RESULTS.event_occurred
    np.testing.assert_allclose(sol.ts[:5], [0.0, 0.5, 1.0, 1.5, _ROOT], rtol=1e-12)
    exact = 10 + 0.3 * sol.ts[:5] - 4 * sol.ts[:5] ** 2
    np.testing.assert_allclose(sol.ys[:5, 0], exact, atol=1e-12)
    assert jnp.all(jnp.isinf(sol.ts[5:]))
    np.testing.assert_allclose(gradient, 1 / (8 * _ROOT - 0.3), rtol=1e-10)
    # Up to the end of the inner step, not of the window.
    assert 0 <= float(sol.interpolation.t1) - _ROOT < 6 / 32
    np.testing.assert_allclose(sol.evaluate(1.2)[0], 10 + 0.36 - 5.76, rtol=1e-12)


def test_event_before_the_solution_breaks_down_is_not_a_failure():
    # y = 1 / (1 - t): the window that contains y = 5 is infinite further on.
    root_finder = optx.Newton(rtol=1e-10, atol=1e-10)
    sol = jax.jit(
        lambda: diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: y**2),
            newton_solver(num_steps=256),
            0.0,
            1.5,
            None,
            jnp.array([1.0]),
            stepsize_controller=WholeInterval(),
            adjoint=DEERAdjoint(),
            event=diffrax.Event(lambda t, y, args, **_: y[0] - 5, root_finder),
        )
    )()
    assert sol.result == diffrax.RESULTS.event_occurred
    np.testing.assert_allclose(sol.ts[0], 0.8, rtol=1e-7)


def test_step_that_is_not_solved_has_no_event():
    # One iteration is too few for the equations of this implicit step.
    root_finder = diffrax.VeryChord(rtol=1e-10, atol=1e-10)
    inner = diffrax.ImplicitEuler(root_finder=root_finder, root_find_max_steps=1)

    @jax.jit
    def run(threshold):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: -10 * y**3),
            DEERSolver(inner, num_steps=16),
            0.0,
            1.0,
            None,
            jnp.array([1.0]),
            stepsize_controller=WholeInterval(),
            adjoint=DEERAdjoint(),
            event=diffrax.Event(lambda t, y, args, **_: y[0] < threshold),
            max_steps=8,
            throw=False,
        )

    # The same with an event before the first step.
    assert run(0.5).result == diffrax.RESULTS.nonlinear_divergence
    at_once = run(1.5)
    assert at_once.result == diffrax.RESULTS.event_occurred
    assert at_once.stats["num_steps"] == 0
    assert (float(at_once.ts[0]), float(at_once.ys[0, 0])) == (0.0, 1.0)


# ---- Windows that a controller chooses ----


def test_event_under_a_controller_is_that_of_diffrax_itself():
    inner, event = diffrax.Bosh3(), diffrax.Event(_ANGLE, _ROOT_FINDER)

    def solve(solver, adjoint, y0):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(_pendulum),
            solver,
            0.0,
            jnp.inf,
            0.1,
            y0,
            jnp.array(0.1),
            saveat=diffrax.SaveAt(ts=jnp.array([0.5, 1.0]), steps=True, t1=True),
            stepsize_controller=diffrax.PIDController(rtol=1e-3, atol=1e-3),
            adjoint=adjoint,
            event=event,
            max_steps=32,
        )
        saved = sol.ts, sol.ys
        finite = [jnp.where(jnp.isfinite(x), x, 0) for x in jax.tree.leaves(saved)]
        return sum(jnp.sum(x**2) for x in finite), (saved, sol.result, sol.event_mask)

    @jax.jit
    def both(y0):
        of = lambda *which: jax.value_and_grad(
            lambda y0: solve(*which, y0=y0), has_aux=True
        )(y0)
        ours = DEERSolver(inner, num_steps=1), DEERAdjoint()
        return of(*ours), of(inner, _SEQUENTIAL)

    y0 = {"angle": jnp.array(1.0), "speed": jnp.array(0.3)}
    found, expected = both(y0)
    (_, (_, result, mask)), _ = found
    assert result == diffrax.RESULTS.event_occurred
    assert bool(mask)
    assert_equal(found, expected, 1e-9)
