"""Controllers, saves, failures and types: as with any other solver of diffrax."""

from collections.abc import Callable
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrax_deer import WholeInterval

from .helpers import newton_solver, slowly
from .oracle import (
    Steps,
    adjoints,
    assert_equal,
    each_adjoint,
    one_by_one,
    windows_between,
)

_N = 4
_SOLVER = newton_solver(diffrax.Heun(), num_steps=_N)


# ---- A problem with a state of many parts ----

_JUMP = 0.8
_T1 = 2.0


def _field(t, y, args):
    """Nonlinear, depends on time, and jumps at `_JUMP` if `args["jump"]` says so."""
    x, v = y["pair"]
    force = jnp.cos(3 * t) + jnp.where(t < _JUMP, 0.0, args["jump"])
    return {
        "pair": (
            v[0, 0] - x * y["number"],
            jnp.stack([force - x, v[0, 0] * x])[:, None],
        ),
        "number": -args["rate"] * y["number"] + jnp.sin(x),
        "nothing": None,
        "empty": y["empty"],
    }


def _y0(scale: Any = 1.0) -> dict[str, Any]:
    return {
        "pair": (jnp.array(1.2) * scale, jnp.array([[-0.4], [0.3]]) * scale),
        "number": 2.0,
        "nothing": None,
        "empty": jnp.zeros((0, 2)),
    }


def _args(jump: float = 0.0) -> dict[str, Any]:
    return {"rate": jnp.array(0.7), "jump": jnp.array(jump)}


def _solve(adjoint: str, t0: Any, t1: Any, dt0: Any, y0: Any = None, **kwargs: Any):
    arguments: dict[str, Any] = dict(args=_args(), max_steps=32)
    return diffrax.diffeqsolve(
        diffrax.ODETerm(_field),
        _SOLVER,
        t0,
        t1,
        dt0,
        _y0() if y0 is None else y0,
        adjoint=adjoints[adjoint],
        **{**arguments, **kwargs},
    )


def _reference(t0, t1, ends, args=None, y0=None) -> Steps:
    return one_by_one(
        diffrax.ODETerm(_field),
        _SOLVER.solver,
        windows_between(t0, t1, ends),
        _N,
        _y0() if y0 is None else y0,
        _args() if args is None else args,
    )


# ---- Step size controllers and everything that can be saved ----

_PID = diffrax.PIDController(rtol=3e-3, atol=1e-4, pcoeff=0.2, icoeff=0.4)
_STEP_TS = [0.55, 1.3]

# Each a function of t0 and t1, with dt0 and the windows that are known beforehand.
_controllers: dict[str, tuple[Callable, float | None, list[float] | None]] = {
    "pid": (lambda t0, t1: _PID, None, None),
    "pid_with_dt0": (lambda t0, t1: _PID, 1.0, None),
    "clip": (
        lambda t0, t1: diffrax.ClipStepSizeController(
            _PID, step_ts=jnp.array(_STEP_TS), jump_ts=jnp.array([_JUMP])
        ),
        0.3,
        None,
    ),
    "constant": (lambda t0, t1: diffrax.ConstantStepSize(), 0.5, [0.5, 1.0, 1.5, 2.0]),
    "step_to": (
        lambda t0, t1: diffrax.StepTo(t0 + (t1 - t0) * jnp.array([0, 0.1, 0.6, 1])),
        None,
        [0.2, 1.2, 2.0],
    ),
    "whole": (lambda t0, t1: WholeInterval(), None, [2.0]),
}


_cases = [
    ("deer", "step_to"),
    ("default", "clip"),
    *[slowly("deer", name) for name in _controllers if name != "step_to"],
    slowly("default", "pid_with_dt0"),
]


@pytest.mark.parametrize(("adjoint", "name"), _cases)
def test_every_controller_both_ways_and_all_that_can_be_saved(adjoint, name):
    controller, dt0, known = _controllers[name]
    args = _args(jump=1.5 if name == "clip" else 0.0)
    size = 128

    @jax.jit
    def run(t0, t1):
        way = jnp.sign(t1 - t0)
        times = t0 + (t1 - t0) * jnp.array([0.0, 0.1, 0.43, 0.44, 0.9, 1.0])
        function = lambda t, y, args: (t, y["pair"][0] * args["rate"])
        sub = diffrax.SubSaveAt
        saveat = diffrax.SaveAt(
            subs=(
                sub(steps=True),
                {"ends": sub(t0=True, t1=True), "times": sub(ts=times, fn=function)},
                [sub(t0=True, ts=times[2:5], steps=2, t1=True)],
            ),
            dense=True,
            solver_state=True,
            controller_state=True,
            made_jump=True,
        )
        sol = _solve(
            adjoint,
            t0,
            t1,
            None if dt0 is None else dt0 * way,
            args=args,
            stepsize_controller=controller(t0, t1),
            saveat=saveat,
            max_steps=size,
        )
        starts, ends = windows_between(t0, t1, sol.ts[0])
        # The next window begins just after a jump, but the last one ends before it.
        before = jnp.nextafter(jnp.array(_JUMP), t0)
        across = (starts - _JUMP) * (ends - _JUMP) < 0
        windows = starts, jnp.where(across & (name == "clip"), before, ends)
        term = diffrax.ODETerm(_field)
        steps = one_by_one(term, _SOLVER.solver, windows, _N, _y0(), args)
        between = t0 + (t1 - t0) * jnp.array([0.03, 0.41, 0.77])
        dense = jax.vmap(lambda t: (sol.evaluate(t), sol.derivative(t)))(between)
        slopes = jax.vmap(lambda t: steps.path(t).derivative(t))(between)
        expected = steps.at(times), (steps.at(between), slopes), steps.at(ends)
        return sol, times, dense, expected

    for t0, t1 in ((0.0, _T1), (_T1, 0.0)):
        sol, times, dense, (at_times, at_between, at_ends) = run(t0, t1)
        steps_ts, named, (mixed_ts,) = sol.ts
        steps_ys, named_ys, (mixed_ys,) = sol.ys
        way = np.sign(t1 - t0)

        assert sol.result == diffrax.RESULTS.successful
        accepted, rejected = (
            int(sol.stats[f"num_{kind}_steps"]) for kind in ("accepted", "rejected")
        )
        assert sol.stats["num_steps"] == accepted + rejected
        assert sol.stats["max_steps"] == size
        assert (sol.t0, sol.t1) == (t0, t1)
        assert not sol.made_jump
        assert sol.solver_state.ts[-1] == t1 * way

        # Steps: the ends of windows, then infinity.
        assert (way * np.diff(steps_ts[:accepted]) > 0).all()
        assert steps_ts[accepted - 1] == t1
        assert np.isinf(steps_ts[accepted:]).all()
        pick = lambda tree, n=accepted: jax.tree.map(lambda x: x[:n], tree)
        assert_equal(pick(steps_ys), pick(at_ends))
        for leaf in jax.tree.leaves(steps_ys):
            np.testing.assert_array_equal(leaf[accepted:], np.inf)
        if known is not None:
            ends = np.array(known) if way > 0 else _T1 - np.array(known)
            np.testing.assert_allclose(steps_ts[:accepted], ends, atol=1e-15)
        if name == "pid_with_dt0":
            assert rejected > 0  # a first step of 1.0 is too long
        if name == "clip":
            assert np.isin(_STEP_TS, steps_ts).all()
            assert np.min(np.abs(np.asarray(steps_ts) - _JUMP)) < 1e-15

        # Ends and times.
        np.testing.assert_array_equal(named["ends"], [t0, t1])
        assert_equal(
            named_ys["ends"], jax.tree.map(lambda y: y[jnp.array([0, -1])], at_times)
        )
        np.testing.assert_allclose(named["times"], times, rtol=1e-15)
        assert_equal(named_ys["times"], (times, at_times["pair"][0] * 0.7))

        # All together: in the order of time, t1 only once.
        seconds = steps_ts[1:accepted:2]
        expected_ts = np.concatenate([[t0], times[2:5], seconds, [t1]])
        expected_ts = np.unique(expected_ts)[:: int(way)]
        np.testing.assert_allclose(mixed_ts[: len(expected_ts)], expected_ts)
        assert np.isinf(mixed_ts[len(expected_ts) :]).all()
        states = jax.vmap(sol.evaluate)(jnp.asarray(expected_ts))
        saved = mixed_ys["number"][: len(expected_ts)]
        np.testing.assert_allclose(saved, states["number"], rtol=1e-9)

        assert_equal(dense, at_between, 1e-9)


@each_adjoint
def test_an_empty_interval_saves_the_initial_value_everywhere(adjoint):
    saveat = diffrax.SaveAt(
        subs=(
            diffrax.SubSaveAt(t0=True, ts=jnp.array([1.0, 1.0]), t1=True),
            diffrax.SubSaveAt(steps=True),
        ),
        dense=True,
    )
    sol = _solve(adjoint, 1, 1, None, stepsize_controller=_PID, saveat=saveat)
    assert sol.result == diffrax.RESULTS.successful
    assert sol.stats["num_steps"] == 0
    np.testing.assert_array_equal(sol.ts[0], np.ones(4))
    assert (~np.isfinite(sol.ts[1])).all()
    repeat = lambda y: jnp.broadcast_to(jnp.asarray(y), (4, *jnp.shape(y)))
    assert_equal(sol.ys[0], jax.tree.map(repeat, _y0()))
    assert_equal(sol.evaluate(1.0), jax.tree.map(jnp.asarray, _y0()))


@each_adjoint
def test_a_solve_in_two_parts_is_the_solve_in_one(adjoint):
    save: dict[str, Any] = dict(
        solver_state=True, controller_state=True, made_jump=True
    )
    saveat = diffrax.SaveAt(steps=True, **save)

    def solve(t0, t1, dt0, y0, **states):
        kwargs = dict(stepsize_controller=_PID, saveat=saveat, **states)
        return _solve(adjoint, t0, t1, dt0, y0, **kwargs)

    solve = jax.jit(solve)
    last = lambda sol: jax.tree.map(lambda y: y[sol.stats["num_steps"] - 1], sol.ys)
    whole = solve(0.0, _T1, 0.1, _y0())
    ends = np.asarray(whole.ts)
    # Long after the first window and long before the last, no step was rejected.
    assert whole.stats["num_rejected_steps"] == 0
    first = solve(0.0, ends[4], 0.1, _y0())
    assert first.stats["num_steps"] == 5
    states = {name: getattr(first, name) for name in save}
    second = solve(ends[4], _T1, ends[5] - ends[4], last(first), **states)
    count = int(second.stats["num_steps"])
    assert count == int(whole.stats["num_steps"]) - 5
    np.testing.assert_allclose(second.ts[:count], ends[5 : 5 + count], rtol=1e-9)
    assert_equal(last(second), last(whole), 1e-9)


# ---- Failure ----


@pytest.mark.parametrize(
    ("name", "adjoint"), [("constant", "default"), slowly("step_to", "deer")]
)
def test_too_few_steps_are_reported_and_what_was_solved_is_saved(name, adjoint):
    grid = jnp.array([0.0, 0.5, 1.0, 1.5, 2.0])
    controller = diffrax.StepTo(grid) if name == "step_to" else None
    controller = diffrax.ConstantStepSize() if controller is None else controller
    dt0 = None if name == "step_to" else 0.5
    kwargs = dict(
        stepsize_controller=controller,
        saveat=diffrax.SaveAt(ts=jnp.array([0.4, 1.4, 1.6]), t1=True),
        max_steps=3,
    )
    sol: Any = _solve(adjoint, 0.0, _T1, dt0, throw=False, **kwargs)
    assert sol.result == diffrax.RESULTS.max_steps_reached
    assert sol.stats["num_steps"] == 3
    np.testing.assert_allclose(sol.ts, [0.4, 1.4, 1.5, np.inf])
    expected = _reference(0.0, _T1, grid[1:]).at(jnp.array([0.4, 1.4, 1.5]))
    assert_equal(jax.tree.map(lambda y: y[:3], sol.ys), expected)
    with pytest.raises(Exception, match="maximum number of solver steps was reached"):
        jax.block_until_ready(_solve(adjoint, 0.0, _T1, dt0, **kwargs).ys)


@each_adjoint
@pytest.mark.parametrize("name", ["constant", "step_to"])
def test_a_window_without_solution_ends_the_solve(name, adjoint):
    # y = (1 - t)**2 until it would be negative, soon after t = 1.
    term = diffrax.ODETerm(lambda t, y, args: -2 * jnp.sqrt(y) - 0.01)
    grid = jnp.array([0.0, 0.4, 0.8, 1.2, 1.6])
    y0 = jnp.array([1.0])
    sol = diffrax.diffeqsolve(
        term,
        _SOLVER,
        0.0,
        1.6,
        None if name == "step_to" else 0.4,
        y0,
        stepsize_controller=(
            diffrax.StepTo(grid) if name == "step_to" else diffrax.ConstantStepSize()
        ),
        saveat=diffrax.SaveAt(ts=jnp.array([0.3, 0.7, 1.5])),
        adjoint=adjoints[adjoint],
        max_steps=8,
        throw=False,
    )
    assert sol.result == diffrax.RESULTS.nonfinite
    assert sol.stats["num_steps"] == 3
    windows = grid[:2], grid[1:3]
    expected = one_by_one(term, _SOLVER.solver, windows, _N, y0)
    assert_equal(sol.ys[:2], expected.at(jnp.array([0.3, 0.7])))
    np.testing.assert_array_equal(sol.ts[2], np.inf)
    np.testing.assert_array_equal(sol.ys[2], np.inf)


# ---- Times and types ----

_half = lambda x: jnp.array(x, jnp.bfloat16)
_single = lambda x: jnp.array(x, jnp.float32)

# t0, t1, dt0, y0.
_kinds: dict[str, tuple[Any, Any, Any, Any]] = {
    "floats": (0.0, 1.0, 0.5, (1.0, jnp.array([2.0]))),
    "integers": (0, 2, 1, (1, jnp.array([2]))),
    "integer_times": (0, 2, None, (1.0, jnp.array([2.0]))),
    "arrays": (jnp.array(0.0), jnp.array(1.0), jnp.array(0.5), jnp.array(1.0)),
    "numpy": (np.float64(0), np.array(1), 0.5, np.array([1.0, 2.0])),
    "single": (_single(0), _single(1), _single(0.5), (_single(1), _single([2, 3]))),
    "single_state": (0.0, 1, 0.5, (_single(1), 2.0)),
    "half": (_half(0), _half(1), _half(0.5), _half([1, 2])),
    "mixed": (_single(0), 1, None, (_half([1]), 2.0, _single([[3]]))),
    "nothing": (0.0, 1.0, 0.5, (None, {})),
}


@each_adjoint
@pytest.mark.parametrize("kind", _kinds)
def test_types_are_those_that_dopri5_would_give(kind, adjoint):
    t0, t1, dt0, y0 = _kinds[kind]
    term = diffrax.ODETerm(lambda t, y, args: jax.tree.map(lambda x: -x, y))
    controller = diffrax.PIDController(rtol=1e-3, atol=1e-3)

    def run(solver, adjoint):
        sol = diffrax.diffeqsolve(
            term,
            solver,
            t0,
            t1,
            dt0,
            y0,
            stepsize_controller=controller,
            saveat=diffrax.SaveAt(t0=True, t1=True, steps=True),
            adjoint=adjoint,
            max_steps=4,
        )
        return sol.ts, sol.ys, sol.t0, sol.t1, sol.stats["num_steps"], sol.event_mask

    types = lambda *choice: jax.tree.map(
        lambda x: (x.shape, x.dtype), jax.eval_shape(lambda: run(*choice))
    )
    assert types(_SOLVER, adjoints[adjoint]) == types(
        diffrax.Dopri5(), adjoints["default"]
    )


@each_adjoint
def test_integers_and_single_precision_give_the_values_of_doubles(adjoint):
    term = diffrax.ODETerm(lambda t, y, args: jax.tree.map(lambda x: -args * x, y))

    def solve(t0, t1, dt0, y0, rate) -> Any:
        return diffrax.diffeqsolve(
            term, _SOLVER, t0, t1, dt0, y0, rate, adjoint=adjoints[adjoint], max_steps=4
        ).ys

    # Each step of Heun's method multiplies by this.
    factor = lambda h: 1 - h + h**2 / 2
    x, y = solve(0, 2, 1, (1, jnp.array([2])), 1)
    np.testing.assert_allclose(x[-1], factor(0.25) ** 8, rtol=1e-14)
    np.testing.assert_allclose(y[-1], [2 * factor(0.25) ** 8], rtol=1e-14)
    single = solve(_single(0), _single(1), _single(0.5), _single([1, 2]), _single(1))
    exact = factor(0.125) ** 8 * np.array([1, 2])
    np.testing.assert_allclose(single[-1], exact, rtol=3e-7)
