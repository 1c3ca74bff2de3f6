"""`DEERAdjoint`: values, derivatives and conventions of diffrax's own adjoints.

The reference is the inner solver alone, one step after another: in diffrax's own loop,
or in that of the oracle.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrax_deer import (
    DEERAdjoint,
    DEERSolver,
    Newton,
    Sequential,
    SequentialGradient,
    WholeInterval,
)

from .helpers import newton_solver, problems
from .oracle import assert_equal, one_by_one, windows_between

_VDP = problems["van_der_pol"]
_INNER = diffrax.Bosh3()
_SEQUENTIAL = diffrax.RecursiveCheckpointAdjoint()

# What can be differentiated: y0, args, t0, t1, a closed-over weight, save times (as
# fractions of the interval, so that they stay inside when t0 and t1 move).
_PARAMETERS = {
    "y0": jnp.array([2.0, 0.1]),
    "args": jnp.array(1.3),
    "t0": jnp.array(0.1),
    "t1": jnp.array(3.1),
    "weight": jnp.array(1.1),
    "fractions": jnp.array([0.04, 0.21, 0.41, 0.63, 0.77, 0.96]),
}


def _at(p, fractions):
    return p["t0"] + (p["t1"] - p["t0"]) * fractions


def _term(p):
    weight, jump = p["weight"], _at(p, 0.7)

    def field(t, y, args):
        force = jnp.where(t < jump, 0.0, jnp.cos(2 * t))
        return weight * _VDP.field(t, y, args) + jnp.stack([0 * t, force])

    return diffrax.ODETerm(field)


def _solve(p, solver, controller, adjoint, saveat, **kwargs: Any):
    return diffrax.diffeqsolve(
        _term(p),
        solver,
        p["t0"],
        p["t1"],
        kwargs.pop("dt0", None),
        p["y0"],
        p["args"],
        saveat=saveat,
        stepsize_controller=controller,
        adjoint=adjoint,
        max_steps=kwargs.pop("max_steps", 48),
        **kwargs,
    )


# ---- Every form of `SaveAt` ----


def _window_ends(p):
    return _at(p, jnp.array([0.0, 0.2, 0.6, 1.0]))


def _grid(p):
    """Four steps in each window."""
    ends = _window_ends(p)
    grids = jnp.linspace(ends[:-1], ends[1:], 5, axis=1)
    return jnp.concatenate([grids[:, :-1].reshape(-1), ends[-1:]])


_PID = diffrax.PIDController(rtol=1e-3, atol=1e-3)


def _clipped(p):
    """Something that is left to diffrax."""
    at = lambda fraction: _at(p, jnp.array([fraction]))
    return diffrax.ClipStepSizeController(_PID, step_ts=at(0.3), jump_ts=at(0.7))


class _Path(NamedTuple):
    """One way of `DEERAdjoint` to a solution, and how the inner solver gets there.

    `windows` and `steps` are the controllers of both, given the parameters.
    """

    solver: DEERSolver
    windows: Callable
    steps: Callable


_PATHS = {
    "static": _Path(
        newton_solver(_INNER, num_steps=4),
        lambda p: diffrax.StepTo(_window_ends(p)),
        lambda p: diffrax.StepTo(_grid(p)),
    ),
    "adaptive": _Path(DEERSolver(_INNER, num_steps=1), lambda _: _PID, lambda _: _PID),
    "delegated": _Path(DEERSolver(_INNER, num_steps=1), _clipped, _clipped),
}


def _saveat(ts, num_steps, forms):
    """Forms of `SaveAt`, each windows of `num_steps` steps; `dense` is one of them."""
    sub = diffrax.SubSaveAt
    subs = {
        "ends": sub(t0=True, t1=True),
        "times": sub(t0=True, ts=ts, t1=True),
        "steps": sub(steps=num_steps),
        "mixed": sub(t0=True, ts=ts, steps=3 * num_steps, t1=True),
        "function": [
            sub(t1=True),
            sub(ts=ts[1:4], fn=lambda t, y, a: (t * y[0], y * a)),
        ],
    }
    chosen = {form: sub for form, sub in subs.items() if form in forms}
    return diffrax.SaveAt(subs=chosen, dense="dense" in forms)


def _number(output):
    """A number that depends on all that has been saved."""
    # What has not been is infinite, and counts for nothing.
    leaves = [x.ravel() for x in jax.tree.leaves(output)]
    finite = [jnp.isfinite(x) for x in leaves]
    parts = [jnp.where(f, x, 0) for x, f in zip(leaves, finite, strict=True)]
    weights = [1 + jnp.cumsum(f) / 50 for f in finite]
    return sum(jnp.sum(w * x**2) for w, x in zip(weights, parts, strict=True))


def _losses(p, solver, controller, adjoint, num_steps, forms):
    """A number for every form of `SaveAt`; and what else there is to compare."""
    saveat = _saveat(_at(p, p["fractions"]), num_steps, forms)
    sol = _solve(p, solver, controller(p), adjoint, saveat)
    outputs = {form: (sol.ts[form], sol.ys[form]) for form in sol.ts}
    if "dense" in forms:
        # Up to where the solution goes.
        ts = p["t0"] + (sol.ts["ends"][1] - p["t0"]) * p["fractions"]
        outputs["dense"] = jax.vmap(sol.evaluate)(ts)
    losses = {form: _number(output) for form, output in outputs.items()}
    counts = {k: v for k, v in sol.stats.items() if k.startswith("num_")}
    return losses, (losses, (sol.ts, sol.ys), sol.result, counts)


def _dot(a, b):
    return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, a, b)))


def _direction(p):
    return jax.tree.map(lambda x: jnp.cos(x + 1), p)


def _saved(buffers):
    """What has been saved; the rest of each buffer is infinite."""

    def cut(ts, ys):
        size = int(np.isfinite(ts).sum())
        for leaf in (ts, *jax.tree.leaves(ys)):
            np.testing.assert_array_equal(leaf[size:], np.inf)
        return jax.tree.map(lambda x: x[:size], (ts, ys))

    ts, ys = buffers
    return jax.tree.map(cut, ts, ys, is_leaf=lambda x: isinstance(x, jax.Array))


def _without_times(gradients):
    names = "y0", "args", "weight"
    return {form: {name: g[name] for name in names} for form, g in gradients.items()}


@pytest.mark.parametrize("path", _PATHS)
def test_every_form_of_saveat_has_the_values_and_derivatives_of_the_inner_solver(path):
    solver, windows, steps = _PATHS[path]
    # What is left to diffrax is saved by diffrax, steps under a controller among it.
    forms = {
        "static": ("ends", "steps", "mixed", "function", "dense"),
        "adaptive": ("ends", "times", "function"),
        "delegated": ("ends", "mixed", "dense"),
    }[path]

    @jax.jit
    def found(p):
        loss = lambda p: _losses(p, solver, windows, DEERAdjoint(), 1, forms)
        gradients, rest = jax.jacrev(loss, has_aux=True)(p)
        if path == "delegated":
            # diffrax's own loop has no derivative in forward mode.
            return gradients, rest, None
        _, slopes, _ = jax.jvp(loss, (p,), (_direction(p),), has_aux=True)
        return gradients, rest, slopes

    @jax.jit
    def expected(p):
        num_steps = solver.num_steps
        loss = lambda p: _losses(p, _INNER, steps, _SEQUENTIAL, num_steps, forms)
        return jax.jacrev(loss, has_aux=True)(p)

    intervals = {"forwards": (0.1, 3.1), "backwards": (3.1, 2.2)}
    if path != "static":
        # More than 48 steps away, and no step away.
        intervals |= {"far": (0.1, 19.0), "empty": (1.0, 1.0)}
    for name, (t0, t1) in intervals.items():
        p = _PARAMETERS | {"t0": jnp.array(t0), "t1": jnp.array(t1)}
        gradients, (losses, buffers, result, counts), slopes = found(p)
        e_gradients, (e_losses, e_buffers, e_result, e_counts) = expected(p)
        assert result == e_result
        assert (result == diffrax.RESULTS.max_steps_reached) == (name == "far")
        assert_equal(_saved(buffers), _saved(e_buffers), 1e-9)
        assert_equal(losses, e_losses, 1e-9)
        if name == "empty":
            # There diffrax repeats t0 in the place of save times, and its dense output
            # divides zero by zero: no derivative with respect to times.
            gradients, e_gradients = map(_without_times, (gradients, e_gradients))
            slopes = None
        assert_equal(gradients, e_gradients, 1e-9)
        for key, value in e_counts.items():
            assert counts[key] * solver.num_steps == value
        if slopes is not None:
            direction = _direction(p)
            e_slopes = {form: _dot(g, direction) for form, g in e_gradients.items()}
            assert_equal(slopes, e_slopes, 1e-9)


# ---- Windows of several steps, against the oracle ----


def _times_and_ends(p, solver, controller, max_steps, **ends):
    sub, ts = diffrax.SubSaveAt, _at(p, p["fractions"])
    saveat = diffrax.SaveAt(subs={"times": sub(ts=ts), "ends": sub(**ends)})
    sol = _solve(p, solver, controller, DEERAdjoint(), saveat, max_steps=max_steps)
    return (sol.ts, sol.ys), sol.stats["num_rejected_steps"]


def _by_oracle(p, ends, num_steps):
    """The same from the ends of windows."""
    inner = dataclasses.replace(_INNER, scan_kind="bounded")
    windows = windows_between(p["t0"], p["t1"], ends)
    steps = one_by_one(_term(p), inner, windows, num_steps, p["y0"], p["args"])
    ts = _at(p, p["fractions"])
    at_ends = {"times": steps.at(ts), "ends": steps.ys[num_steps - 1 :: num_steps]}
    return {"times": ts, "ends": ends}, at_ends


@pytest.mark.parametrize("path", ["static", "adaptive"])
def test_first_and_second_derivatives_are_those_of_the_oracle(path):
    is_static, num_steps = path == "static", 4
    solver = newton_solver(_INNER, num_steps=num_steps)
    t0, t1 = _PARAMETERS["t0"], _PARAMETERS["t1"]

    def run(p):
        if is_static:
            controller = diffrax.StepTo(_window_ends(p))
            output, rejected = _times_and_ends(p, solver, controller, 3, steps=True)
        else:
            output, rejected = _times_and_ends(p, solver, _PID, 40, t1=True)
        return _number(output), (output, rejected)

    def derivatives(function):
        def of(p):
            value = jax.value_and_grad(function, has_aux=True)
            (_, output), gradient = value(p)
            curvature = lambda p: value(p)[1]
            return output, gradient, jax.jvp(curvature, (p,), (_direction(p),))[1]

        return jax.jit(of)(_PARAMETERS)

    (output, num_rejected), *found = derivatives(run)
    assert (num_rejected > 0) != is_static
    chosen = jnp.zeros(0)
    if not is_static:
        saveat = diffrax.SaveAt(steps=True)
        sol = _solve(_PARAMETERS, solver, _PID, _SEQUENTIAL, saveat, max_steps=40)
        chosen = jnp.asarray(sol.ts)[jnp.isfinite(jnp.asarray(sol.ts))]

    def oracle(p):
        if is_static:
            output = _by_oracle(p, _window_ends(p)[1:], num_steps)
        else:
            # They move with t0, until they meet t1.
            ends = jnp.where(chosen < t1, p["t0"] + (chosen - t0), p["t1"])
            ts, ys = _by_oracle(p, ends, num_steps)
            last = lambda of: of | {"ends": of["ends"][-1:]}
            output = last(ts), last(ys)
        return _number(output), output

    expected_output, *expected = derivatives(oracle)
    assert_equal(output, expected_output, 1e-9)
    assert_equal(found, expected, 1e-8)


# ---- Windows without solution, batches ----


def test_batch_of_samples_that_take_one_step_or_many_or_fail():
    # More than are differentiated, or skipped, together; the last is infinite at t = 1.
    t1s, y0s = jnp.array([0.9, 0.005, 0.6, 2.0]), jnp.array([1.0, 0.5, -1.0, 1.0])
    max_steps = 150

    def solve(which, t1, y0, args):
        solver, adjoint = which
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: args * y**2),
            solver,
            0.0,
            t1,
            None,
            y0,
            args,
            stepsize_controller=diffrax.PIDController(rtol=1e-4, atol=1e-4),
            adjoint=adjoint,
            max_steps=max_steps,
            throw=False,
        )
        succeeded = sol.result == diffrax.RESULTS.successful
        return jnp.where(succeeded, sol.ys[-1], 0.0), (
            succeeded,
            sol.stats["num_steps"],
        )

    def batch(args, which):
        ys, about = jax.vmap(lambda t1, y0: solve(which, t1, y0, args))(t1s, y0s)
        return jnp.sum(ys), (ys, about)

    @jax.jit
    def both(args):
        of = lambda *which: jax.value_and_grad(batch, has_aux=True)(args, which)
        ours = _PATHS["adaptive"].solver, DEERAdjoint()
        slope = jax.jvp(lambda a: batch(a, ours)[0], (args,), (1.0,))[1]
        return of(*ours), slope, of(_INNER, _SEQUENTIAL)

    found, slope, expected = both(jnp.array(1.0))
    (_, (_, (succeeded, num_steps))), gradient = expected
    assert succeeded.tolist() == [True, True, True, False]
    assert num_steps[1] == 1 < 8 < num_steps[0] < num_steps[3] == max_steps
    assert_equal(found, expected, 1e-9)
    assert_equal(slope, gradient, 1e-9)


@pytest.mark.parametrize("path", ["static", "adaptive"])
def test_window_without_solution_is_the_last(path):
    # y = (1 - rate t)**2 until it would be negative; in the first window, or the third.
    term = diffrax.ODETerm(lambda t, y, rate: -2 * rate * jnp.sqrt(y) - 0.01)
    rates, num_solved = jnp.array([4.0, 1.0, 0.3]), jnp.array([0, 2, 4])
    grid, ts = jnp.linspace(0.0, 1.6, 5), jnp.array([0.0, 0.5, 0.7, 1.5])
    steps: Any = diffrax.StepTo(grid), None
    if path == "adaptive":
        steps = diffrax.ConstantStepSize(), 0.4

    def solve(rate, adjoint):
        return diffrax.diffeqsolve(
            term,
            newton_solver(diffrax.Heun(), num_steps=4),
            0.0,
            1.6,
            steps[1],
            jnp.array([1.0]),
            rate,
            stepsize_controller=steps[0],
            saveat=diffrax.SaveAt(ts=ts, t1=True),
            adjoint=adjoint,
            max_steps=8,
            throw=False,
        )

    def found(rate):
        sol = solve(rate, DEERAdjoint())
        other = solve(rate, _SEQUENTIAL)
        about = sol.result, sol.stats["num_steps"], sol.stats["num_accepted_steps"]
        return sol.ys[:4], (sol.ts, sol.ys, other.ts, other.ys, about)

    def expected(rate, count):
        ends = jnp.where(jnp.arange(4) < count, grid[1:], jnp.inf)
        windows = windows_between(0.0, grid[count], ends)
        inner = diffrax.Heun(scan_kind="bounded")
        return one_by_one(term, inner, windows, 4, jnp.array([1.0]), rate).at(ts)

    @jax.jit
    def both(rates):
        gradient = jax.vmap(jax.jacrev(found, has_aux=True))(rates)
        e_gradient = jax.vmap(jax.jacrev(expected))(rates, num_solved)
        return *gradient, jax.vmap(expected)(rates, num_solved), e_gradient

    gradient, rest, e_ys, e_gradient = both(rates)
    found_ts, found_ys, other_ts, other_ys, (result, num_steps, num_accepted) = rest
    assert (result == diffrax.RESULTS.nonfinite).tolist() == [True, True, False]
    assert (result == diffrax.RESULTS.successful).tolist() == [False, False, True]
    # The one that fails counts.
    assert num_steps.tolist() == num_accepted.tolist() == [1, 3, 4]
    assert_equal((found_ts, found_ys), (other_ts, other_ys), 1e-9)
    for i, count in enumerate([1, 3, 4]):
        assert_equal(found_ys[i, :count], e_ys[i, :count], 1e-10)
        assert_equal(gradient[i, :count], e_gradient[i, :count], 1e-10)


def test_rejected_windows_are_not_differentiated_where_the_field_has_no_derivative():
    # The first ones begin where the square root has none: y = 0.
    def run(p, adjoint):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, p: p - jnp.sqrt(y)),
            DEERSolver(diffrax.Heun(), num_steps=1),
            0.0,
            1.0,
            None,
            jnp.zeros(1),
            p,
            stepsize_controller=diffrax.PIDController(rtol=1e-4, atol=1e-5),
            adjoint=adjoint,
            max_steps=512,
        )
        return sol.ys[-1, 0], sol.stats["num_rejected_steps"]

    gradient = jax.value_and_grad(run, has_aux=True)
    (value, num_rejected), found = gradient(0.3, DEERAdjoint())
    assert num_rejected > 0
    difference = run(0.3 + 1e-5, _SEQUENTIAL)[0] - run(0.3 - 1e-5, _SEQUENTIAL)[0]
    assert_equal(value, run(0.3, _SEQUENTIAL)[0], 1e-12)
    assert_equal(found, difference / 2e-5, 1e-3)


def test_interval_of_length_zero_has_no_derivative_for_its_end():
    # As with diffrax's own adjoints. The controller divides by the number of steps.
    def run(t1):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: -y),
            DEERSolver(diffrax.Heun(), num_steps=1),
            0.0,
            t1,
            0.1,
            jnp.ones(1),
            stepsize_controller=diffrax.ConstantStepSize(),
            adjoint=DEERAdjoint(),
            saveat=diffrax.SaveAt(t1=True, made_jump=True),
            max_steps=16,
        )
        # Known while tracing.
        assert sol.made_jump is False
        assert sol.ys is not None
        return sol.ys[-1, 0]

    assert jax.value_and_grad(run)(0.0) == (1.0, 0.0)


def test_window_that_is_rejected_leaves_no_nan():
    # The first one is too long: the field is NaN where it leads.
    field = lambda t, y, args: -args * jnp.sqrt(y) * (1 + 40 * jnp.sin(9 * t) ** 2)

    def run(args, adjoint):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            newton_solver(num_steps=4),
            0.0,
            1.0,
            1.0,
            jnp.array([40.0]),
            args,
            stepsize_controller=diffrax.PIDController(rtol=1e-5, atol=1e-5),
            adjoint=adjoint,
            max_steps=128,
        )
        return sol.ys[-1, 0], sol.stats["num_rejected_steps"]

    @jax.jit
    def both(args):
        of = lambda adjoint: jax.value_and_grad(run, has_aux=True)(args, adjoint)
        return of(DEERAdjoint()), of(_SEQUENTIAL)

    found, default = both(jnp.array(0.3))
    (value, num_rejected), gradient = found
    assert num_rejected > 0
    assert_equal(found, default, 1e-9)
    # The square root of y is linear.
    integral = 21 - 20 * np.sin(18) / 18
    root = 40**0.5 - 0.3 / 2 * integral
    np.testing.assert_allclose(value, root**2, rtol=1e-4)
    np.testing.assert_allclose(gradient, -integral * root, rtol=1e-4)


def test_static_windows_that_are_too_many_are_reported_and_the_others_saved():
    ends = jnp.array([0.0, 0.5, 1.0, 1.5, 2.0])
    p = _PARAMETERS | {"t0": ends[0], "t1": ends[-1]}
    states: dict[str, Any] = dict(controller_state=True, made_jump=True)
    saveat = diffrax.SaveAt(ts=jnp.array([0.4, 1.4, 1.6]), t1=True, **states)
    solver = newton_solver(_INNER, num_steps=4)

    def solve(p, adjoint):
        kwargs = dict(max_steps=3, throw=False)
        return _solve(p, solver, diffrax.StepTo(ends), adjoint, saveat, **kwargs)

    run = lambda p: (solve(p, DEERAdjoint()), solve(p, _SEQUENTIAL))
    sol, default = jax.jit(run)(p)
    assert sol.result == diffrax.RESULTS.max_steps_reached
    assert sol.stats["num_steps"] == 3
    np.testing.assert_allclose(sol.ts, [0.4, 1.4, 1.5, np.inf])
    windows = ends[:3], ends[1:4]
    steps = one_by_one(_term(p), _INNER, windows, 4, p["y0"], p["args"])
    assert_equal(sol.ys[:3], steps.at(jnp.array([0.4, 1.4, 1.5])))
    # From there diffrax could go on.
    for name in states:
        assert_equal(getattr(sol, name), getattr(default, name))


def test_solve_in_two_parts_is_the_solve_in_one():
    save: dict[str, Any] = dict(
        solver_state=True, controller_state=True, made_jump=True
    )
    push = lambda t, y, args: jnp.stack([y[1], jnp.cos(3 * t) - jnp.sin(y[0])])
    controller = diffrax.PIDController(rtol=1e-4, atol=1e-4, pcoeff=0.2, icoeff=0.4)

    @jax.jit
    def solve(t0, t1, dt0, y0, **states):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(push),
            newton_solver(_INNER, num_steps=4),
            t0,
            t1,
            dt0,
            y0,
            stepsize_controller=controller,
            saveat=diffrax.SaveAt(steps=True, **save),
            adjoint=DEERAdjoint(),
            max_steps=32,
            **states,
        )

    y0 = jnp.array([1.0, 0.2])
    whole = solve(0.0, 3.0, 0.1, y0)
    ends, size = np.asarray(whole.ts), int(whole.stats["num_steps"])
    assert whole.stats["num_rejected_steps"] == 0
    assert size > 10
    first = solve(0.0, ends[4], 0.1, y0)
    assert first.stats["num_steps"] == 5
    states = {name: getattr(first, name) for name in save}
    second = solve(ends[4], 3.0, ends[5] - ends[4], first.ys[4], **states)
    assert second.stats["num_steps"] == size - 5
    assert_equal(second.ts[: size - 5], whole.ts[5:size], 1e-9)
    assert_equal(second.ys[: size - 5], whole.ys[5:size], 1e-9)


# ---- What a solve says about itself ----


def test_statistics_are_of_the_method_the_gradient_iterations_and_residual():
    saveat = diffrax.SaveAt(t1=True)
    newton = newton_solver(_INNER, num_steps=8, gradient=SequentialGradient())
    stopped = newton_solver(_INNER, num_steps=8, method=Newton(max_iterations=1))
    steps = DEERSolver(_INNER, num_steps=8, method=Sequential())

    @jax.jit
    def run(p):
        of = lambda *which: _solve(p, *which, saveat=saveat, throw=False).stats
        return {
            "together": of(newton, WholeInterval(), DEERAdjoint()),
            "windows": of(newton, _PID, DEERAdjoint()),
            "default": of(newton, _PID, _SEQUENTIAL),
            "stopped": of(stopped, WholeInterval(), DEERAdjoint()),
            "steps": of(steps, WholeInterval(), DEERAdjoint()),
        }

    stats = run(_PARAMETERS)
    together, windows = stats["together"], stats["windows"]
    iterations, most = "num_newton_iterations", "max_newton_iterations"
    assert together["num_steps"] == 1
    assert together[iterations] == together[most] > 3
    for name, value in stats["default"].items():
        assert windows[name] == value
    num_steps = int(windows["num_steps"])
    assert 2 < windows[most] < windows[iterations] <= windows[most] * num_steps
    assert 0 <= max(together["residual"], windows["residual"]) < 1e-11
    # One iteration is too few: the solution has been found at the first steps only.
    assert stats["stopped"][iterations] == 1
    assert stats["stopped"]["residual"] > 1e-2
    # One step after another there is nothing to measure.
    assert stats["steps"][iterations] == stats["steps"][most] == 0
    assert stats["steps"]["residual"] is None
    assert stats["steps"]["method"] == Sequential()
    for chosen in (together, windows):
        assert type(chosen["method"]) is Newton
        # As many as there are steps.
        assert chosen["method"].max_iterations == 8
        assert chosen["gradient"] == SequentialGradient()


# A state of two components; 2**15 numbers are recorded.
_IS_DELEGATED = [
    (_PID, 64, 256, False),
    (_PID, 64, 257, True),
    (_PID, 1, None, True),
    (diffrax.ConstantStepSize(), 1, 16, False),
    (diffrax.ConstantStepSize(), 1, None, True),
    (diffrax.ClipStepSizeController(_PID), 1, 16, True),
    (WholeInterval(), 2**16, None, False),
]


def test_what_cannot_be_recorded_is_left_to_diffrax():
    saveat = diffrax.SaveAt(t1=True)
    for controller, num_steps, max_steps, is_delegated in _IS_DELEGATED:
        which = newton_solver(_INNER, num_steps), controller, DEERAdjoint(), saveat
        steps = dict(dt0=0.1, max_steps=max_steps)
        run = lambda p, which=which, steps=steps: _solve(p, *which, **steps).stats
        stats = jax.eval_shape(run, _PARAMETERS)
        assert type(stats["method"]) is Newton
        for name in ("num_newton_iterations", "max_newton_iterations", "residual"):
            assert (stats[name] is None) == is_delegated


def test_progress_meter_shows_what_it_shows_without_the_adjoint(capsys):
    meter = diffrax.TextProgressMeter(minimum_increase=0.1)
    solver = newton_solver(_INNER, num_steps=4)

    def printed(adjoint, controller):
        saveat = diffrax.SaveAt(t1=True)
        kwargs = dict(progress_meter=meter)
        run = jax.jit(
            lambda p: _solve(p, solver, controller, adjoint, saveat, **kwargs)
        )
        jax.block_until_ready(run(_PARAMETERS).ys)
        jax.effects_barrier()
        return capsys.readouterr().out.split()

    found = printed(DEERAdjoint(), _PID)
    assert len(found) > 3
    assert found == printed(_SEQUENTIAL, _PID)
    assert printed(DEERAdjoint(), WholeInterval()) == ["0.00%", "100.00%"]


# ---- Types ----

_half = lambda x: jnp.array(x, jnp.bfloat16)
_single = lambda x: jnp.array(x, jnp.float32)

# t0, t1, dt0, y0.
_KINDS: dict[str, tuple[Any, Any, Any, Any]] = {
    "integers": (0, 2, 1, (1, jnp.array([2]))),
    "arrays": (jnp.array(0.0), jnp.array(1.0), jnp.array(0.5), jnp.array(1.0)),
    "numpy": (np.float64(0), np.array(1), 0.5, np.array([1.0, 2.0])),
    "single_state": (0.0, 1, 0.5, (_single(1), 2.0)),
    "half": (_half(0), _half(1), _half(0.5), _half([1, 2])),
    "mixed": (_single(0), 1, None, (_half([1]), 2.0, _single([[3]]))),
    "nothing": (0.0, 1.0, 0.5, (None, {})),
}


def _types(solver, adjoint, kind):
    t0, t1, dt0, y0 = _KINDS[kind]

    def run():
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: jax.tree.map(lambda x: -x, y)),
            solver,
            t0,
            t1,
            dt0,
            y0,
            stepsize_controller=_PID,
            saveat=diffrax.SaveAt(t0=True, t1=True, steps=True),
            adjoint=adjoint,
            max_steps=4,
        )
        return sol.ts, sol.ys, sol.t0, sol.t1, sol.stats["num_steps"], sol.event_mask

    return jax.tree.map(lambda x: (x.shape, x.dtype), jax.eval_shape(run))


def test_types_are_those_that_dopri5_would_give():
    solver = newton_solver(diffrax.Heun(), num_steps=4)
    for kind in _KINDS:
        expected = _types(diffrax.Dopri5(), _SEQUENTIAL, kind)
        assert _types(solver, DEERAdjoint(), kind) == expected, kind


def test_integers_and_single_precision_give_the_values_of_doubles():
    term = diffrax.ODETerm(lambda t, y, args: jax.tree.map(lambda x: -args * x, y))
    solver = newton_solver(diffrax.Heun(), num_steps=4)

    def solve(*args) -> Any:
        kwargs = dict(adjoint=DEERAdjoint(), max_steps=4)
        return diffrax.diffeqsolve(term, solver, *args, **kwargs).ys

    # Each step of Heun's method multiplies by this.
    factor = lambda h: 1 - h + h**2 / 2
    x, y = jax.jit(lambda: solve(0, 2, 1, (1, jnp.array([2])), 1))()
    np.testing.assert_allclose(x[-1], factor(0.25) ** 8, rtol=1e-14)
    np.testing.assert_allclose(y[-1], [2 * factor(0.25) ** 8], rtol=1e-14)

    last = lambda y0: solve(_single(0), _single(1), _single(0.5), y0, _single(1))[-1]
    single, gradient = jax.jit(lambda y0: (last(y0), jax.jacrev(last)(y0)))(
        _single([1, 2])
    )
    exact = factor(0.125) ** 8
    assert single.dtype == gradient.dtype == jnp.float32
    np.testing.assert_allclose(single, exact * np.array([1, 2]), rtol=3e-7)
    np.testing.assert_allclose(gradient, exact * np.eye(2), rtol=1e-6)


# ---- Errors ----


@pytest.mark.parametrize(
    ("solver", "match"),
    [
        (diffrax.Dopri5(), r"is for `DEERSolver`; got `solver=Dopri5"),
        (diffrax.HalfSolver(newton_solver()), "an error estimate of its own"),
    ],
)
def test_other_solvers_are_refused(solver, match):
    saveat = diffrax.SaveAt(t1=True)
    with pytest.raises(ValueError, match=match):
        _solve(_PARAMETERS, solver, _PID, DEERAdjoint(), saveat)
