"""`DEERSolver()` on a CPU: the steps of the inner solver, under any controller."""

from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrax_deer import DEERAdjoint, DEERSolver, Newton, ParallelGradient, Sequential

from .helpers import slowly
from .oracle import assert_equal

_PID = diffrax.PIDController(rtol=1e-5, atol=1e-7)
_JUMPS = diffrax.ClipStepSizeController(_PID, jump_ts=jnp.array([0.7, 1.1]))


def _field(t, y, args):
    x, v = y["x"], y["v"]
    # The jump is one that a solver has to be told of.
    force = jnp.where(t < 0.7, args, -args)
    return {"x": -x * v + force, "v": jnp.sum(x) * jnp.cos(3 * t) - v**2}


def _y0():
    return {"x": jnp.array([1.0, -0.5]), "v": jnp.array(0.3)}


def _solve(solver, args, y0, **kwargs):
    options = {"stepsize_controller": _PID, "dt0": None} | kwargs
    saveat = diffrax.SaveAt(ts=jnp.array([0.2, 0.7, 1.9]), t1=True, dense=True)
    sol = diffrax.diffeqsolve(
        diffrax.ODETerm(_field),
        solver,
        t0=0.0,
        t1=2.0,
        y0=y0,
        args=args,
        saveat=options.pop("saveat", saveat),
        max_steps=256,
        **options,
    )
    counts = {k: v for k, v in sol.stats.items() if k.endswith("_steps")}
    return sol, counts


@pytest.mark.parametrize(
    ("inner", "controller"),
    [
        (diffrax.Tsit5(), _JUMPS),
        (diffrax.Heun(), _PID),
        slowly(diffrax.Kvaerno3(), _JUMPS),
        slowly(diffrax.Dopri5(), _PID),
        slowly(diffrax.Dopri8(), _PID),
        slowly(diffrax.HalfSolver(diffrax.Bosh3()), _PID),
        slowly(diffrax.ImplicitEuler(), _PID),
    ],
    ids=lambda value: type(value).__name__,
)
def test_steps_values_and_gradients_are_those_of_the_inner_solver(inner, controller):
    if isinstance(inner, diffrax.AbstractImplicitSolver):
        root_finder = diffrax.VeryChord(rtol=1e-10, atol=1e-10)
        kind: Any = type(inner)
        inner = kind(root_finder=root_finder)

    def loss(solver, adjoint, args, y0):
        sol, counts = _solve(
            solver, args, y0, adjoint=adjoint, stepsize_controller=controller
        )
        total = sum(jnp.sum(y**2) for y in jax.tree.leaves(sol.ys))
        return total, (sol.ys, sol.evaluate(1.3), counts)

    @jax.jit
    def run(args, y0):
        default = diffrax.RecursiveCheckpointAdjoint()
        of = lambda *which: jax.value_and_grad(
            lambda *p: loss(*which, *p), (0, 1), has_aux=True
        )(args, y0)
        ours = DEERSolver(inner)
        return of(ours, default), of(ours, DEERAdjoint()), of(inner, default)

    *found, expected = run(jnp.array(0.4), _y0())
    for each in found:
        assert_equal(each, expected, 1e-9)


def test_last_stage_is_the_first_of_the_next_step():
    """One field less for each step; and one more after a jump."""

    def count(solver, controller):
        calls = []

        def field(t, y, args):
            jax.debug.callback(lambda _: calls.append(0), t)
            return jnp.cos(t) * y

        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            solver,
            0.0,
            2.0,
            0.1,
            jnp.array(1.0),
            stepsize_controller=controller,
        )
        jax.block_until_ready(sol.ys)
        jax.effects_barrier()
        return len(calls), int(sol.stats["num_steps"])

    for controller in (_PID, _JUMPS):
        calls, num_steps = count(DEERSolver(diffrax.Tsit5()), controller)
        e_calls, e_num_steps = count(diffrax.Tsit5(), controller)
        assert num_steps == e_num_steps
        assert calls <= e_calls


class _AdamsBashforth(diffrax.AbstractSolver):
    """Of second order: it keeps the last slope."""

    term_structure = diffrax.AbstractTerm
    interpolation_cls = diffrax.LocalLinearInterpolation

    def order(self, terms):
        return 2

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)

    def init(self, terms, t0, t1, y0, args):
        return terms.vf(t0, y0, args)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        slope, control = terms.vf(t0, y0, args), terms.contr(t0, t1)
        y1 = y0 + terms.prod(1.5 * slope - 0.5 * solver_state, control)
        info = {"y0": y0, "y1": y1}
        return y1, None, info, slope, diffrax.RESULTS.successful


def _decay(solver, dt0: Any = 0.1, **kwargs: Any):
    term, y0 = diffrax.ODETerm(lambda t, y, args: -y), jnp.array(1.0)
    sol = diffrax.diffeqsolve(term, solver, 0.0, 2.0, dt0, y0, **kwargs)
    return jnp.asarray(sol.ys)[-1]


@pytest.mark.parametrize(
    "inner", [_AdamsBashforth(), diffrax.LeapfrogMidpoint(), diffrax.ReversibleHeun()]
)
def test_solver_with_a_memory_keeps_it_from_step_to_step(inner):
    expected = _decay(inner)
    if isinstance(inner, _AdamsBashforth):
        np.testing.assert_allclose(expected, 0.13578, atol=5e-6)
    for adjoint in (diffrax.RecursiveCheckpointAdjoint(), DEERAdjoint()):
        found = _decay(DEERSolver(inner), adjoint=adjoint)
        np.testing.assert_allclose(found, expected, rtol=1e-14)
    # Also where the steps are static, and others would be made all at once.
    grid = diffrax.StepTo(jnp.linspace(0.0, 2.0, 21))
    kwargs: Any = dict(stepsize_controller=grid, dt0=None)
    found = _decay(DEERSolver(inner), adjoint=DEERAdjoint(), **kwargs)
    np.testing.assert_allclose(found, _decay(inner, **kwargs), rtol=1e-14)
    with pytest.raises(ValueError, match="memory"):
        _decay(DEERSolver(inner, num_steps=4))


def test_number_of_steps_follows_from_the_method():
    assert DEERSolver().window_steps == 1
    assert DEERSolver(method=Sequential()).window_steps == 1
    assert DEERSolver(method=Newton()).window_steps == 64
    assert DEERSolver(num_steps=3).window_steps == 3


def test_step_without_a_value_has_failed():
    def solve(dt0, solver: Any):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: y**2),
            solver,
            0.0,
            2.0,
            dt0,
            jnp.array(1.0),
            throw=False,
            max_steps=100,
        )

    sol = solve(0.1, DEERSolver(diffrax.Tsit5()))
    assert sol.result != diffrax.RESULTS.successful


def test_gradient_by_name_is_that_of_a_window_of_one_step():
    y0, args = _y0(), jnp.array(0.4)
    saveat = diffrax.SaveAt(t1=True)

    @jax.jit
    def run(args):
        of = lambda solver: jax.grad(
            lambda args: jnp.sum(_solve(solver, args, y0, saveat=saveat)[0].ys["x"])
        )(args)
        tsit5 = diffrax.Tsit5()
        parallel = DEERSolver(tsit5, gradient=ParallelGradient())
        return of(parallel), of(DEERSolver(tsit5)), of(tsit5)

    parallel, single, expected = run(args)
    assert_equal([parallel, single], [expected, expected], 1e-9)


def test_default_step_of_an_implicit_solver_is_the_same_in_other_units():
    def solve(unit):
        term = diffrax.ODETerm(lambda t, y, args: -5 * unit * (y / unit) ** 2)
        value = lambda y0: (
            diffrax.diffeqsolve(
                term,
                DEERSolver(diffrax.ImplicitEuler()),
                0.0,
                1.0,
                0.1,
                y0 * unit,
                max_steps=16,
            ).ys[-1]
            / unit
        )
        return jax.value_and_grad(value)(jnp.array(1.0))

    y1, slope = jax.jit(solve)(1e-8)
    y, dy = 1.0, 1.0
    for _ in range(10):
        # y + 0.5 y² is the state before.
        y = -1 + np.sqrt(1 + 2 * y)
        dy = dy / (1 + y)
    np.testing.assert_allclose((y1, slope), (y, dy), rtol=1e-11)
