"""`DEERAdjoint`: values, derivatives and conventions of diffrax's own adjoints."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import diffrax
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

from diffrax_deer import DEERAdjoint, DEERSolver, WholeInterval

from .helpers import newton_solver, problems

_VDP = problems["van_der_pol"]
_SOLVER = newton_solver(diffrax.Bosh3(), num_steps=8)
_FORMS = ("t1", "ts", "mixed", "fn", "steps", "dense")

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


def _saveat(forms: Sequence[str], ts: Any) -> diffrax.SaveAt:
    sub = diffrax.SubSaveAt
    subs = {
        "t1": sub(t1=True),
        "ts": sub(ts=ts),
        "mixed": sub(t0=True, ts=ts, steps=2, t1=True),
        "steps": sub(steps=1),
        "fn": [sub(t1=True), sub(ts=ts[1:4], fn=lambda t, y, a: (t * y[0], y * a))],
    }
    chosen = {form: subs[form] for form in forms if form != "dense"}
    return diffrax.SaveAt(subs=chosen, dense="dense" in forms)


def _solve(parameters, forms, controller, adjoint, **kwargs: Any):
    p = parameters
    at = lambda fraction: p["t0"] + (p["t1"] - p["t0"]) * fraction
    weight, dt0 = p["weight"], kwargs.pop("dt0", 0.7) * p["weight"]
    knots = jnp.concatenate([p["t0"][None], at(jnp.array([0.2, 0.6])), p["t1"][None]])
    controllers: dict[str, Any] = {
        "whole": WholeInterval(),
        "step_to": diffrax.StepTo(knots),
        "pid": diffrax.PIDController(rtol=1e-3, atol=1e-3),
        "constant": diffrax.ConstantStepSize(),
    }
    return diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: weight * _VDP.field(t, y, args)),
        kwargs.pop("solver", _SOLVER),
        p["t0"],
        p["t1"],
        dt0 if controller == "constant" else None,
        p["y0"],
        p["args"],
        saveat=_saveat(forms, at(p["fractions"])),
        stepsize_controller=controllers[controller],
        adjoint=adjoint,
        max_steps=kwargs.pop("max_steps", 16),
        **kwargs,
    )


def _losses(parameters, controller, adjoint, forms=_FORMS):
    return _numbers(_solve(parameters, forms, controller, adjoint), parameters, forms)


def _numbers(sol, parameters, forms):
    """A number for every form of `SaveAt` that depends on all that it saves."""
    outputs = {form: (sol.ts[form], sol.ys[form]) for form in forms if form != "dense"}
    if "dense" in forms:
        t0, t1 = parameters["t0"], parameters["t1"]
        ts = t0 + (t1 - t0) * parameters["fractions"]
        outputs["dense"] = jax.vmap(sol.evaluate)(ts), jax.vmap(sol.derivative)(ts)
    return {form: _number(output) for form, output in outputs.items()}


def _number(output):
    """A number that depends on all that has been saved."""
    # What has not been is infinite, and counts for nothing.
    leaves = [jnp.where(jnp.isfinite(x), x, 0) for x in jax.tree.leaves(output)]
    flat = jnp.concatenate([x.ravel() for x in leaves])
    return jnp.sum(flat**2 * jnp.linspace(1, 2, flat.size))


def _assert_close(a, b, rtol=1e-9):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol)


def _differences(function, parameters):
    """All derivatives by central finite differences of fourth order."""
    flat, unravel = jax.flatten_util.ravel_pytree(parameters)
    h = 3e-4
    shifts = jnp.concatenate([h * k * jnp.eye(flat.size) for k in (1, -1, 2, -2)])
    values = jax.lax.map(lambda s: function(unravel(flat + s)), shifts)

    def combine(values):
        f1, b1, f2, b2 = values.reshape(4, -1)
        return unravel((8 * (f1 - b1) - (f2 - b2)) / (12 * h))

    return {form: combine(value) for form, value in values.items()}


@pytest.mark.slow
@pytest.mark.parametrize("controller", ["step_to", "pid"])
def test_values_and_gradients_of_every_form_of_saveat(controller):
    # Adapted step sizes take no part in diffrax's derivatives, but in differences.
    has_differences = controller != "pid"

    def values_and_gradients(p, adjoint):
        def losses(p):
            value = _losses(p, controller, adjoint)
            return value, value

        gradients, values = jax.jacrev(losses, has_aux=True)(p)
        return values, gradients

    ours = DEERAdjoint(max_windows=16)

    @jax.jit
    def all_of_them(p):
        found = values_and_gradients(p, ours)
        expected = values_and_gradients(p, diffrax.RecursiveCheckpointAdjoint())
        losses = lambda p: _losses(p, controller, ours)
        return found, expected, _differences(losses, p) if has_differences else None

    found, expected, differences = all_of_them(_PARAMETERS)
    _assert_close(found, expected)
    if has_differences:
        _assert_close(found[1], differences, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("controller", ["whole", "pid"])
def test_forward_mode_and_second_derivatives_agree(controller):
    adjoint = DEERAdjoint(max_windows=6)
    loss = lambda p: _losses(p, controller, adjoint, ["mixed"])["mixed"]
    direction = jax.tree.map(lambda x: jnp.cos(x + 1), _PARAMETERS)

    def dot(a, b):
        return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, a, b)))

    @jax.jit
    def derivatives(p):
        gradient, curved = jax.jvp(jax.grad(loss), (p,), (direction,))
        _, slope = jax.jvp(loss, (p,), (direction,))
        reverse = jax.grad(lambda p: dot(jax.grad(loss)(p), direction))(p)
        return (slope, curved), (dot(gradient, direction), reverse)

    _assert_close(*derivatives(_PARAMETERS), rtol=1e-8)


def test_the_hessian_is_that_of_finite_differences():
    loss = lambda p: _losses(p, "whole", DEERAdjoint(), ["ts"])["ts"]
    direction = jax.tree.map(lambda x: jnp.cos(x + 1), _PARAMETERS)

    @jax.jit
    def both(p):
        gradient, h = jax.grad(loss), 1e-4
        at = lambda k: gradient(jax.tree.map(lambda x, d: x + k * h * d, p, direction))
        shifted = jax.lax.map(at, jnp.array([1.0, -1.0, 2.0, -2.0]))
        combine = lambda f: (8 * (f[0] - f[1]) - (f[2] - f[3])) / (12 * h)
        _, curved = jax.jvp(gradient, (p,), (direction,))
        return curved, jax.tree.map(combine, shifted)

    _assert_close(*both(_PARAMETERS), rtol=1e-7)


@pytest.mark.slow
def test_a_batch_is_its_members_one_by_one():
    adjoint = DEERAdjoint(max_windows=8)
    loss = lambda p: _losses(p, "pid", adjoint, ["mixed"])["mixed"]
    gradient = jax.grad(loss)
    batch = jax.tree.map(lambda x: jnp.stack([x, 1.03 * x, 0.7 * x]), _PARAMETERS)
    many = jax.jit(jax.vmap(gradient))(batch)
    one = jax.jit(gradient)
    for i in range(3):
        member = lambda tree, i=i: jax.tree.map(lambda x: x[i], tree)
        # The members' windows may differ by rounding, which tolerances amplify.
        _assert_close(member(many), one(member(batch)), rtol=1e-8)


def test_more_windows_than_are_kept_give_the_same_values_and_gradients():
    forms = ["mixed", "t1"]

    def both(max_windows):
        def losses(p):
            value = _losses(p, "constant", DEERAdjoint(max_windows=max_windows), forms)
            return value, value

        return jax.jit(jax.jacrev(losses, has_aux=True))(_PARAMETERS)

    _assert_close(both(2), both(16))


def test_memory_does_not_depend_on_max_steps():
    def memory(max_steps):
        gradient = jax.jit(
            jax.grad(
                lambda y0: jnp.sum(
                    _solve(
                        {**_PARAMETERS, "y0": y0},
                        ["ts"],
                        "pid",
                        DEERAdjoint(max_windows=32),
                        max_steps=max_steps,
                    ).ys["ts"]
                )
            )
        )
        compiled = gradient.lower(_PARAMETERS["y0"]).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert memory(1_000_000) < 3 * memory(33)


def test_statistics_count_iterations_windows_and_residual():
    @jax.jit
    def run():
        together = _solve(_PARAMETERS, ["t1"], "whole", DEERAdjoint())
        windows = _solve(_PARAMETERS, ["t1"], "pid", DEERAdjoint())
        default = _solve(
            _PARAMETERS, ["t1"], "pid", diffrax.RecursiveCheckpointAdjoint()
        )
        stopped = _solve(
            _PARAMETERS,
            ["t1"],
            "whole",
            DEERAdjoint(),
            solver=newton_solver(num_steps=8, max_iterations=1),
            throw=False,
        )
        return together.stats, windows.stats, default.stats, stopped.stats

    together, windows, default, stopped = run()
    assert int(together["num_newton_iterations"]) > 3
    assert int(together["num_steps"]) == 1
    assert together["num_newton_iterations"] == together["max_newton_iterations"]
    for name, value in default.items():
        assert windows[name] == value
    most, total = windows["max_newton_iterations"], windows["num_newton_iterations"]
    assert 2 < int(most) < int(total) <= int(most) * int(windows["num_steps"])
    assert max(float(together["residual"]), float(windows["residual"])) < 1e-11
    # One iteration is too few: the solution has been found at the first steps only.
    assert int(stopped["num_newton_iterations"]) == 1
    assert float(stopped["residual"]) > 1e-2


def _failing(t, y, args):
    del t
    return args * y**2


@pytest.mark.parametrize("controller", ["step_to", "constant"])
def test_a_failed_solve_reports_and_saves_as_the_default_adjoint(controller):
    # Infinite at t = 1, in the third of four windows.
    ts = jnp.array([0.0, 0.2, 0.4, 0.8])
    step_to = diffrax.StepTo(jnp.array([0.0, 0.4, 0.8, 1.2, 1.6]))

    # The last value before the end of all numbers multiplies every error.
    solver = dataclasses.replace(_SOLVER, rtol=1e-15)

    @jax.jit
    def run():
        solve = lambda adjoint: diffrax.diffeqsolve(
            diffrax.ODETerm(_failing),
            solver,
            0.0,
            1.6,
            None if controller == "step_to" else 0.4,
            jnp.array([1.0]),
            jnp.array(1.0),
            saveat=diffrax.SaveAt(subs=[diffrax.SubSaveAt(ts=ts, t1=True)]),
            stepsize_controller=(
                step_to if controller == "step_to" else diffrax.ConstantStepSize()
            ),
            adjoint=adjoint,
            max_steps=6,
            throw=False,
        )
        return [solve(DEERAdjoint()), solve(diffrax.RecursiveCheckpointAdjoint())]

    ours, default = run()
    assert ours.result == default.result
    assert ours.result != diffrax.RESULTS.successful
    for name in ("num_steps", "num_accepted_steps"):
        assert ours.stats[name] == default.stats[name] == 3
    _assert_close((ours.ts, ours.ys), (default.ts, default.ys))


def test_a_rejected_window_does_not_poison_value_or_gradient():
    # The first window is too long: the field is NaN where it leads.
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
        gradient = lambda adjoint: jax.value_and_grad(run, has_aux=True)(args, adjoint)
        return gradient(DEERAdjoint()), gradient(diffrax.RecursiveCheckpointAdjoint())

    ours, default = both(jnp.array(0.3))
    assert int(ours[0][1]) > 0
    assert np.isfinite(ours[1])
    _assert_close(ours, default)


# ---- Events ----

_ROOT = (0.3 + (0.3**2 + 2 * 8.0 * 10.0) ** 0.5) / 8.0


def _fall(event, controller, y0=10.0, t1=6.0, saveat=None, adjoint=None):
    """A ball thrown up from a height of 10: on the ground at `_ROOT`."""
    return diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, g: jnp.stack([y[1], -g])),
        newton_solver(num_steps=32),
        0.0,
        t1,
        0.1,
        jnp.stack([jnp.asarray(y0), jnp.array(0.3)]),
        jnp.array(8.0),
        saveat=diffrax.SaveAt(t1=True) if saveat is None else saveat,
        stepsize_controller=controller,
        adjoint=DEERAdjoint() if adjoint is None else adjoint,
        event=event,
    )


_CONTROLLERS_OF_EVENTS = {
    "whole": WholeInterval(),
    "pid": diffrax.PIDController(rtol=1e-6, atol=1e-6),
}


@pytest.mark.parametrize("name", _CONTROLLERS_OF_EVENTS)
def test_the_root_of_an_event_is_found_inside_its_inner_step(name):
    height = lambda t, y, args, **kwargs: y[0]
    far = lambda t, y, args, **kwargs: y[0] < -100
    event = diffrax.Event(
        {"far": far, "height": height}, optx.Newton(rtol=1e-12, atol=1e-12)
    )
    ts = jnp.linspace(0.0, 6.0, 13)
    saveat = diffrax.SaveAt(ts=ts, t1=True, dense=True)

    @jax.jit
    def run(y0):
        sol = _fall(event, _CONTROLLERS_OF_EVENTS[name], y0, saveat=saveat)
        time = lambda y0: _fall(event, _CONTROLLERS_OF_EVENTS[name], y0).ts[0]
        return sol, jax.grad(time)(y0)

    sol, gradient = run(10.0)
    assert sol.result == diffrax.RESULTS.event_occurred
    assert sol.event_mask is not None
    assert sol.event_mask["height"]
    assert not sol.event_mask["far"]
    np.testing.assert_allclose(sol.ts[:5], [0.0, 0.5, 1.0, 1.5, _ROOT], rtol=1e-12)
    exact = 10 + 0.3 * sol.ts[:5] - 4 * sol.ts[:5] ** 2
    np.testing.assert_allclose(sol.ys[:5, 0], exact, atol=1e-12)
    assert jnp.all(jnp.isinf(sol.ts[5:]))
    # Up to the end of the inner step, not of the window.
    assert 0 <= float(sol.interpolation.t1) - _ROOT < 6 / 32
    np.testing.assert_allclose(gradient, 1 / (8 * _ROOT - 0.3), rtol=1e-10)


@pytest.mark.parametrize("name", _CONTROLLERS_OF_EVENTS)
def test_without_root_finder_the_solution_ends_with_the_inner_step(name):
    event = diffrax.Event(lambda t, y, args, **kwargs: y[0] < 0)
    saveat = diffrax.SaveAt(t1=True, ts=jnp.array([1.0, 3.0]))
    sol = jax.jit(lambda: _fall(event, _CONTROLLERS_OF_EVENTS[name], saveat=saveat))()
    assert sol.result == diffrax.RESULTS.event_occurred
    assert float(sol.ts[0]) == 1
    assert 0 <= float(sol.ts[1]) - _ROOT < 6 / 32
    assert float(sol.ys[1, 0]) <= 0
    assert jnp.isinf(sol.ts[2])


def test_an_event_before_the_solution_breaks_down_is_not_a_failure():
    # y = 1 / (1 - t): the window that contains y = 5 is infinite further on.
    event = diffrax.Event(
        lambda t, y, args, **kwargs: y[0] - 5, optx.Newton(rtol=1e-10, atol=1e-10)
    )
    sol = jax.jit(
        lambda: diffrax.diffeqsolve(
            diffrax.ODETerm(_failing),
            newton_solver(num_steps=256),
            0.0,
            1.5,
            None,
            jnp.array([1.0]),
            jnp.array(1.0),
            stepsize_controller=WholeInterval(),
            adjoint=DEERAdjoint(),
            event=event,
        )
    )()
    assert sol.result == diffrax.RESULTS.event_occurred
    np.testing.assert_allclose(sol.ts[0], 0.8, rtol=1e-7)


@pytest.mark.parametrize("controller", ["constant", "whole"])
def test_a_step_that_is_not_solved_has_no_event(controller):
    # One iteration is too few for the equations of this implicit step.
    root_finder = diffrax.VeryChord(rtol=1e-10, atol=1e-10)
    inner = diffrax.ImplicitEuler(root_finder=root_finder, root_find_max_steps=1)
    controllers = {"constant": diffrax.ConstantStepSize(), "whole": WholeInterval()}
    sol = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: -10 * y**3),
        DEERSolver(inner, num_steps=16),
        0.0,
        1.0,
        1.0,
        jnp.array([1.0]),
        stepsize_controller=controllers[controller],
        adjoint=DEERAdjoint(),
        event=diffrax.Event(lambda t, y, args, **kwargs: y[0] < 0.5),
        max_steps=8,
        throw=False,
    )
    assert sol.result == diffrax.RESULTS.nonlinear_divergence


def test_an_event_with_an_infinite_end_and_one_at_the_start():
    height = diffrax.Event(
        lambda t, y, args, **kwargs: y[0], optx.Newton(rtol=1e-12, atol=1e-12)
    )
    at_once = diffrax.Event(lambda t, y, args, **kwargs: y[0] > 1)
    pid = _CONTROLLERS_OF_EVENTS["pid"]
    far, none = jax.jit(
        lambda: (_fall(height, pid, t1=jnp.inf), _fall(at_once, WholeInterval()))
    )()
    np.testing.assert_allclose(far.ts[0], _ROOT, rtol=1e-12)
    assert none.result == diffrax.RESULTS.event_occurred
    assert int(none.stats["num_steps"]) == 0
    assert float(none.ts[0]) == 0
    assert float(none.ys[0, 0]) == 10


# ---- Errors ----


@pytest.mark.parametrize(
    ("solver", "match"),
    [
        (diffrax.Dopri5(), r"is for `DEERSolver`; got `solver=Dopri5"),
        (diffrax.HalfSolver(newton_solver()), "an error estimate of its own"),
    ],
)
def test_other_solvers_are_refused(solver, match):
    with pytest.raises(ValueError, match=match):
        _solve(_PARAMETERS, ["t1"], "pid", DEERAdjoint(), solver=solver)


def test_wrong_arguments_name_the_remedy():
    with pytest.raises(TypeError, match="max_windows"):
        DEERAdjoint(max_windows=2.5)  # pyright: ignore
    with pytest.raises(ValueError, match="max_windows"):
        DEERAdjoint(max_windows=0)
    with pytest.raises(Exception, match="Pass a larger `max_windows`"):
        _solve(_PARAMETERS, ["dense"], "constant", DEERAdjoint(max_windows=2))


def test_too_few_steps_are_reported():
    sol = _solve(
        _PARAMETERS, ["t1"], "step_to", DEERAdjoint(), max_steps=2, throw=False
    )
    assert sol.result == diffrax.RESULTS.max_steps_reached
    assert int(sol.stats["num_steps"]) == 2
    np.testing.assert_allclose(sol.ts["t1"][0], 0.1 + 0.6 * 3.0)


def test_a_warm_start_survives_windows_solved_together():
    saveat = diffrax.SaveAt(t1=True, solver_state=True)

    def run(solver_state):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(_VDP.field),
            newton_solver(num_steps=1),
            0.0,
            2.0,
            None,
            jnp.asarray(_VDP.y0),
            jnp.asarray(_VDP.args),
            saveat=saveat,
            stepsize_controller=diffrax.StepTo(jnp.linspace(0.0, 2.0, 65)),
            adjoint=DEERAdjoint(),
            solver_state=solver_state,
        )

    cold = jax.jit(run)(None)
    warm = jax.jit(run)(cold.solver_state)
    assert int(warm.stats["num_newton_iterations"]) == 1
    assert int(cold.stats["num_newton_iterations"]) > 1
    _assert_close(warm.ys, cold.ys)


# Some windows are rejected, and there are more than are differentiated at once.
_SHORT = DEERSolver(diffrax.Bosh3(), num_steps=1)


@pytest.mark.parametrize(
    ("controller", "forms"), [("pid", _FORMS), ("constant", ["mixed"])]
)
def test_windows_of_one_step_are_the_steps_of_the_inner_solver(controller, forms):
    def losses(p, solver, adjoint):
        sol = _solve(
            p, forms, controller, adjoint, solver=solver, max_steps=64, dt0=0.1
        )
        values = _numbers(sol, p, forms)
        return values, (values, sol.stats["num_steps"], sol.stats["num_rejected_steps"])

    @jax.jit
    def both(p):
        of = lambda *which: jax.jacrev(losses, has_aux=True)(p, *which)
        expected = of(diffrax.Bosh3(), diffrax.RecursiveCheckpointAdjoint())
        return of(_SHORT, DEERAdjoint()), expected

    found, expected = both(_PARAMETERS)
    *_, num_steps, num_rejected = expected[1]
    assert int(num_steps) > 24
    assert (int(num_rejected) > 0) == (controller == "pid")
    _assert_close(found, expected)


def test_a_batch_in_which_some_end_early_or_fail():
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
            max_steps=50,
            throw=False,
        )
        okay = sol.result == diffrax.RESULTS.successful
        return jnp.where(okay, sol.ys[-1], 0.0), (okay, sol.stats["num_steps"])

    # The last one is infinite at t = 1.
    t1s, y0s = jnp.array([0.9, 0.01, 0.6, 2.0]), jnp.array([1.0, 0.5, -1.0, 1.0])

    def batch(args, which):
        ys, about = jax.vmap(lambda t1, y0: solve(which, t1, y0, args))(t1s, y0s)
        return jnp.sum(ys), (ys, about)

    @jax.jit
    def both(args):
        of = lambda *which: jax.value_and_grad(batch, has_aux=True)(args, which)
        expected = of(diffrax.Bosh3(), diffrax.RecursiveCheckpointAdjoint())
        few, all_ = DEERAdjoint(max_windows=10), DEERAdjoint()
        tangent = jax.jvp(lambda a: batch(a, (_SHORT, all_))[0], (args,), (1.0,))[1]
        return of(_SHORT, few), of(_SHORT, all_), expected, tangent

    few, all_, expected, tangent = both(jnp.array(1.0))
    (_, (_, (okay, num_steps))), gradient = expected
    assert okay.tolist() == [True, True, True, False]
    assert num_steps[1] < 8 < 10 < num_steps[0] < num_steps[3] == 50
    _assert_close(all_, expected)
    _assert_close(few, expected)
    _assert_close(tangent, gradient)
