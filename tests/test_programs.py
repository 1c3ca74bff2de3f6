"""`DEERSolver` inside of programs: loops, other adjoints, progress meters, settings."""

import os
import subprocess
import sys
from typing import Any

import diffrax
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from diffrax_deer import (
    DEERAdjoint,
    DEERSolver,
    Newton,
    ParallelGradient,
    WholeInterval,
    deer_scan,
)

from .helpers import (
    adjoints,
    each_adjoint,
    gradients,
    linearizations,
    methods,
    newton_solver,
    problems,
    scans,
    slowly,
)
from .oracle import assert_equal

_N = 8
_SOLVER = newton_solver(diffrax.Heun(), num_steps=_N)
_VDP = problems["van_der_pol"]
_PID = diffrax.PIDController(rtol=1e-3, atol=1e-3)
_DEER, _DEFAULT = DEERAdjoint(), diffrax.RecursiveCheckpointAdjoint()


def _solve(
    adjoint, t0, t1, dt0, y0, args, controller, solver: Any = _SOLVER, **kwargs: Any
):
    return diffrax.diffeqsolve(
        diffrax.ODETerm(_VDP.field),
        solver,
        t0,
        t1,
        dt0,
        y0,
        args,
        stepsize_controller=controller,
        adjoint=adjoint,
        max_steps=kwargs.pop("max_steps", 16),
        **kwargs,
    )


def _sequential(t0, t1, y0, args, num_steps=_N):
    steps = diffrax.StepTo(jnp.linspace(t0, t1, num_steps + 1))
    adjoint = diffrax.DirectAdjoint()
    sol = _solve(
        adjoint, t0, t1, None, y0, args, steps, diffrax.Heun(), max_steps=num_steps
    )
    return sol.ys[-1]  # pyright: ignore


# ---- Transformations and loops ----


@pytest.mark.parametrize("controller", ["pid", slowly("step_to")])
def test_vmap_over_everything_is_one_by_one(controller):
    def run(y0, args, t0, t1, ts):
        chosen = {"pid": _PID, "step_to": diffrax.StepTo(jnp.linspace(t0, t1, 3))}
        saveat = diffrax.SaveAt(t0=True, ts=ts, steps=True, dense=True)
        sol = _solve(_DEER, t0, t1, None, y0, args, chosen[controller], saveat=saveat)
        return sol.ts, sol.ys, sol.evaluate(ts[1]), sol.stats["num_steps"]

    y0 = jnp.array([[2.0, 0.0], [0.5, 1.0], [-1.0, 0.3]])
    args = jnp.array([0.5, 1.0, 2.0])
    t0, t1 = jnp.array([0.0, 1.0, 2.0]), jnp.array([2.0, 1.5, 0.5])
    ts = jnp.linspace(t0, t1, 4, axis=1)
    many = jax.jit(jax.vmap(run))(y0, args, t0, t1, ts)
    one = jax.jit(run)
    for i in range(3):
        member = one(y0[i], args[i], t0[i], t1[i], ts[i])
        assert_equal([x[i] for x in many], list(member), 1e-9)


def test_solves_inside_of_loops_have_the_gradients_of_sequential_ones():
    """`fori_loop` and `scan`, as training loops and recurrent models have them."""

    def scanned(y0, args, solve):
        step = lambda y, t: (solve(t, t + 0.5, y, args), jnp.sum(y))
        y, sums = jax.lax.scan(step, y0, jnp.array([0.0, 0.5, 1.0]))
        return jnp.sum(jnp.sin(y)) + jnp.sum(sums**2)

    def looped(y0, args, solve):
        body = lambda i, y: solve(0.5 * i, 0.5 * (i + 1), y, args)
        return jax.lax.fori_loop(0, 3, lambda i, y: body(i * 1.0, y), y0)

    def parallel(t0, t1, y0, args):
        return _solve(_DEER, t0, t1, None, y0, args, WholeInterval()).ys[-1]

    y0, args = jnp.array([2.0, 0.1]), jnp.array(0.7)

    @jax.jit
    def both(y0, args):
        return [
            (
                jax.value_and_grad(scanned, (0, 1))(y0, args, solve),
                looped(y0, args, solve),
            )
            for solve in (parallel, _sequential)
        ]

    found, expected = both(y0, args)
    assert_equal(found, expected, 1e-9)


# ---- Other adjoints and solvers ----


@pytest.mark.slow
def test_half_solver_makes_each_half_a_window():
    half = diffrax.HalfSolver(_SOLVER)
    y0, args = jnp.array([2.0, 0.1]), jnp.array(0.7)
    run = lambda controller: _solve(
        _DEFAULT, 0.0, 1.0, None, y0, args, controller, half
    )
    whole, adaptive = jax.jit(lambda: (run(WholeInterval()), run(_PID)))()
    assert_equal(whole.ys[-1], _sequential(0.0, 1.0, y0, args, 2 * _N), 1e-10)
    assert adaptive.result == diffrax.RESULTS.successful
    fine = _sequential(0.0, 1.0, y0, args, 512)
    np.testing.assert_allclose(adaptive.ys[-1], fine, rtol=2e-3)


@pytest.mark.slow
def test_backsolve_gives_the_continuous_gradient():
    ts = jnp.array([0.3, 0.8])

    def loss(parameters, adjoint, controller, solver):
        y0, args = parameters
        saveat = diffrax.SaveAt(ts=ts)
        kwargs = dict(saveat=saveat, max_steps=4096)
        sol = _solve(adjoint, 0.0, 1.0, None, y0, args, controller, solver, **kwargs)
        return jnp.sum(sol.ys**2)

    tight = diffrax.PIDController(rtol=1e-10, atol=1e-10)
    deer = newton_solver(num_steps=16)
    cases = {
        "itself": diffrax.BacksolveAdjoint(),
        "sequential": diffrax.BacksolveAdjoint(
            solver=diffrax.Tsit5(), stepsize_controller=tight
        ),
    }

    @jax.jit
    def all_of_them(parameters):
        gradient = jax.grad(loss)
        found = {
            name: gradient(parameters, adjoint, WholeInterval(), deer)
            for name, adjoint in cases.items()
        }
        reference = lambda p: loss(p, _DEFAULT, tight, diffrax.Dopri5())
        return found, jax.grad(reference)(parameters)

    parameters = jnp.array([2.0, 0.1]), jnp.array(0.7)
    with jax.numpy_dtype_promotion("standard"):  # of diffrax's own
        found, expected = all_of_them(parameters)
    for gradient in found.values():
        assert_equal(gradient, expected, 1e-5)


def test_implicit_adjoint_differentiates_a_steady_state():
    # Attracted by the square root of the parameter, whatever the solver.
    def steady(parameter):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, p: 3 * (p - y**2)),
            newton_solver(num_steps=64),
            0.0,
            10.0,
            None,
            jnp.array(1.0),
            parameter,
            stepsize_controller=WholeInterval(),
            adjoint=diffrax.ImplicitAdjoint(),
        )
        return sol.ys[0]

    with jax.numpy_dtype_promotion("standard"):  # of diffrax's own
        value, slope = jax.jit(jax.value_and_grad(steady))(jnp.array(2.0))
    np.testing.assert_allclose([value, slope], [2**0.5, 0.5 / 2**0.5], rtol=1e-7)


# ---- Progress meters and settings ----


def test_progress_meters_reach_the_end_also_under_differentiation(capfd):
    y0, args = jnp.array([2.0, 0.1]), jnp.array(0.7)

    def run(y0, meter):
        sol: Any = _solve(_DEER, 0.0, 1.0, None, y0, args, _PID, progress_meter=meter)
        return jnp.sum(sol.ys)

    gradients = []
    for meter in (
        diffrax.TextProgressMeter(minimum_increase=0.1),
        diffrax.TqdmProgressMeter(refresh_steps=1),
    ):
        gradients.append(jax.jit(jax.grad(run), static_argnums=1)(y0, meter))
        jax.effects_barrier()
        assert "100" in "".join(capfd.readouterr())
    np.testing.assert_array_equal(*gradients)


@pytest.mark.parametrize(
    "controller", [_PID, slowly(WholeInterval())], ids=["pid", "whole_interval"]
)
def test_debugging_nans_finds_none_but_those_of_the_user(controller):
    args = jnp.array(0.7)

    def loss(y0):
        saveat = diffrax.SaveAt(ts=jnp.array([0.2, 0.9]))
        sol: Any = _solve(_DEER, 0.0, 1.0, None, y0, args, controller, saveat=saveat)
        return jnp.sum(sol.ys**2)

    y0 = jnp.array([2.0, 0.1])
    expected = jax.jit(jax.grad(loss))(y0)
    with jax.debug_nans(True):
        assert_equal(jax.jit(jax.grad(loss))(y0 * 1.0), expected)
        with pytest.raises(FloatingPointError):
            jax.jit(jax.grad(loss))(y0 * jnp.nan)


@pytest.mark.parametrize("method", [slowly(Newton()), None], ids=["newton", "default"])
def test_debugging_nans_op_by_op_finds_none_of_the_library(method):
    step = lambda h, x: (jnp.tanh(0.7 * h + x), h)
    operands = jnp.array([0.3]), jnp.arange(3.0)
    solver = DEERSolver(diffrax.Euler(), num_steps=2, method=method)

    def both():
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: -y),
            *(solver, 0.0, 1.0, None, jnp.array([1.0])),
            stepsize_controller=WholeInterval(),
            adjoint=DEERAdjoint(),
        )
        return sol.ys, deer_scan(step, *operands, method=method)

    with jax.disable_jit(), jax.debug_nans(True):
        found = both()
    assert_equal(found, (jnp.array([[0.25]]), jax.lax.scan(step, *operands)))


@pytest.mark.slow
def test_programs_run_without_being_compiled():
    y0, args = jnp.array([2.0, 0.1]), jnp.array(0.7)
    small = newton_solver(diffrax.Heun(), num_steps=2)
    run = lambda: _solve(_DEER, 0.0, 0.1, None, y0, args, _PID, small, max_steps=4).ys
    with jax.disable_jit():
        found = run()
    assert_equal(found, jax.jit(run)())


_NAN_ON_ERROR = """
import diffrax, jax, jax.numpy as jnp
from diffrax_deer import DEERAdjoint, DEERSolver

def run(adjoint, max_steps):
    def solve(rate):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: -rate * y),
            DEERSolver(diffrax.Heun(), num_steps=4), 0.0, 1.0, 0.25, jnp.array([1.0]),
            adjoint=adjoint, max_steps=max_steps,
        ).ys[0, 0]
    return [float(x) for x in jax.value_and_grad(solve)(1.0)]

for adjoint in (diffrax.RecursiveCheckpointAdjoint(), DEERAdjoint()):
    print(*run(adjoint, 4))
    print(run(adjoint, 3)[0])
"""


@pytest.mark.slow
def test_errors_become_nan_where_equinox_is_told_so():
    # With JAX's default settings, moreover: single precision and relaxed promotion.
    out = subprocess.run(
        [sys.executable, "-c", _NAN_ON_ERROR],
        env={**os.environ, "EQX_ON_ERROR": "nan"},
        check=True,
        capture_output=True,
        text=True,
    )
    lines = [[float(x) for x in line.split()] for line in out.stdout.splitlines()]
    assert len(lines) == 4
    for good, bad in (lines[:2], lines[2:]):
        np.testing.assert_allclose(good, [np.exp(-1), -np.exp(-1)], rtol=2e-3)
        assert np.isnan(bad).all()


# ---- Lowered for a GPU ----


_GPU_SOLVERS = (
    {name: {"method": Newton(linearization=x)} for name, x in linearizations.items()}
    | {f"{name} scan": {"method": Newton(scan=x)} for name, x in scans.items()}
    | {f"{name} method": {"method": x} for name, x in methods.items()}
    | {f"{name} gradient": {"gradient": x} for name, x in gradients.items()}
)


def _lowered_for_gpu(solver: Any, adjoint: Any) -> str:
    def loss(y0):
        controller, args = WholeInterval(), _VDP.args
        ends = _VDP.t0, _VDP.t1, None
        sol = _solve(adjoint, *ends, y0, args, controller, solver, throw=False)
        return jnp.sum(jnp.asarray(sol.ys) ** 2)

    run = jax.jit(jax.value_and_grad(loss))
    exported = jax.export.export(run, platforms=["cuda"])(jnp.asarray(_VDP.y0))
    return exported.mlir_module()


@pytest.mark.parametrize("name", _GPU_SOLVERS)
def test_every_choice_is_lowered_for_a_gpu(name):
    options: Any = {"gradient": ParallelGradient()} | _GPU_SOLVERS[name]
    solver = DEERSolver(diffrax.Heun(), _N, **options)
    assert "stablehlo" in _lowered_for_gpu(solver, _DEER)


@each_adjoint
def test_every_adjoint_is_lowered_for_a_gpu(adjoint):
    assert "stablehlo" in _lowered_for_gpu(_SOLVER, adjoints[adjoint])
