"""`DEERSolver` against the solver that it wraps, one step after another in diffrax."""

import dataclasses
import warnings
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

from diffrax_deer import (
    AssociativeScan,
    DEERAdjoint,
    DEERSolver,
    ExponentialRosenbrockEuler,
    FullJacobian,
    Newton,
    ParallelGradient,
    PiecewiseConstant,
    Sequential,
    WholeInterval,
)

from .helpers import (
    adjoints,
    all_adjoints,
    each_adjoint,
    each_method,
    newton_solver,
    problems,
    relative_error,
    slowly,
    step_maps,
)
from .oracle import assert_equal, one_by_one

_VDP = problems["van_der_pol"]
_TIGHT = optx.Newton(rtol=1e-12, atol=1e-12)


def _tight(solver):
    """An implicit solver whose equations are solved to rounding."""
    if not isinstance(solver, diffrax.AbstractImplicitSolver):
        return solver
    return dataclasses.replace(solver, root_finder=_TIGHT)


def _solve(solver, controller, *, t0: Any = 0.0, t1: Any = 2.0, **kwargs: Any):
    """The van der Pol oscillator."""
    kwargs = {"max_steps": 64} | kwargs
    return diffrax.diffeqsolve(
        diffrax.ODETerm(_VDP.field),
        solver,
        t0,
        t1,
        kwargs.pop("dt0", None),
        kwargs.pop("y0", jnp.asarray(_VDP.y0)),
        jnp.asarray(_VDP.args),
        stepsize_controller=controller,
        **kwargs,
    )


# ---- Every step map ----


def _exact(t):
    return {"x": 1 / (1 + t**2), "v": jnp.exp(jnp.arctan(t))[None]}


def _field(t, y, args):
    """Of `_exact`, but coupled, with a state that is a dictionary."""
    x, (v,) = y["x"], y["v"]
    t = t.astype(x.dtype)
    drift = jnp.sin(v - jnp.exp(jnp.arctan(t)))
    return {"x": -2 * args * t * x**2 + drift, "v": (v * x)[None]}


# Where the error is that of the order, far from rounding.
_LENGTHS = {1: 0.04, 2: 0.15, 3: 0.15, 5: 0.6, 8: 2.4}


# Explicit methods of two stages differ in their numbers.
_SIMILAR = "midpoint", "ralston"
_names = [slowly(name) if name in _SIMILAR else name for name in step_maps]


@pytest.mark.parametrize("name", _names)
def test_every_step_map_is_itself_and_of_its_order_in_both_directions(name):
    inner, order = step_maps[name]
    num_steps, term, args = 6, diffrax.ODETerm(_field), jnp.ones(())

    def as_users_call_it(t0, t1):
        kwargs: Any = dict(stepsize_controller=WholeInterval())
        solver = DEERSolver(inner, num_steps)
        return diffrax.diffeqsolve(
            term, solver, t0, t1, None, _exact(t0), args, **kwargs
        ).ys

    def by_newtons_method(t0, t1, ts):
        solver, y0 = newton_solver(inner, num_steps), _exact(t0)
        state = solver.init(term, t0, t1, y0, args)
        y1, _, info, _, _ = solver.step(term, t0, t1, y0, args, state, False)
        path = solver.interpolation_cls(t0=t0, t1=t1, **info)
        return y1, jax.vmap(lambda t: (path.evaluate(t), path.derivative(t)))(ts)

    def sequential(t0, t1, ts):
        windows = t0[None], t1[None]
        solver, y0 = _tight(inner), _exact(t0)
        steps = one_by_one(term, solver, windows, num_steps, y0, args)
        slopes = jax.vmap(lambda t: steps.path(t).derivative(t))(ts)
        return steps.last(), (steps.at(ts), slopes)

    @jax.jit
    def run(t0, t1):
        y1, ts = as_users_call_it(t0, t1), jnp.linspace(t0, t1, 14)[1:-1]
        last = jax.tree.map(lambda y: y[-1], y1)
        return last, by_newtons_method(t0, t1, ts), sequential(t0, t1, ts)

    length, errors = _LENGTHS[order], []
    for t1 in (0.3 + length, 0.3 + length / 4, -0.5):
        t1 = jnp.array(t1)
        default, newton, expected = run(jnp.array(0.3), t1)
        assert relative_error(default, expected[0]) < 1e-10
        # Backwards in time diffrax has dense output evaluated in negative time.
        compare = (newton, expected) if t1 > 0.3 else (newton[0], expected[0])
        assert relative_error(*compare) < 1e-10
        errors.append(relative_error(default, _exact(t1)))
    # Of as many steps in an interval that is a quarter as long.
    assert np.log2(errors[0] / errors[1]) / 2 - 1 > order - 0.5


@each_method
def test_single_and_mixed_precision_are_those_of_the_sequential_solver(method):
    single = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)
    t0, t1 = single((0.0, 2.0))
    mixed = {"x": jnp.float32(2.0), "v": jnp.float64(0.0)}

    def of_mixed(t, y, args):
        x, v = _VDP.field(t, jnp.stack([y["x"].astype(float), y["v"]]), args)
        return {"x": x.astype(jnp.float32), "v": v}

    def run(solver, controller, field, y0, args, **kwargs: Any):
        steps = dict(stepsize_controller=controller, max_steps=37)
        term = diffrax.ODETerm(field)
        return diffrax.diffeqsolve(
            term, solver, t0, t1, None, y0, args, **steps, **kwargs
        )

    @jax.jit
    def both():
        solver, inner = DEERSolver(diffrax.Tsit5(), 37, method=method), diffrax.Tsit5()
        grid = diffrax.StepTo(jnp.linspace(t0, t1, 38))
        saveat = diffrax.SaveAt(t1=True, solver_state=True)
        problems = (_VDP.field, *single((_VDP.y0, 1.0))), (of_mixed, mixed, 1.0)
        found = [run(solver, WholeInterval(), *p, saveat=saveat) for p in problems]
        # diffrax's own steps cannot have leaves of several types.
        return found, run(inner, grid, *problems[0]).ys

    (alone, mixed), expected = both()
    assert alone.ys.dtype == jnp.float32
    assert (mixed.ys["x"].dtype, mixed.ys["v"].dtype) == (jnp.float32, jnp.float64)
    assert relative_error(alone.ys, expected) < 1e-5
    leaves = mixed.ys["x"], mixed.ys["v"]
    assert relative_error(leaves, (expected[:, 0], expected[:, 1])) < 1e-5
    for sol in (alone, mixed):
        num_iterations = int(sol.solver_state.num_iterations)
        assert (num_iterations > 0) == method.uses_guess
        assert num_iterations < 37


def test_newton_by_name_takes_few_iterations_of_a_stiff_implicit_solver():
    inner = diffrax.ImplicitEuler()
    method = Newton(FullJacobian(), max_iterations=40)
    solver = newton_solver(inner, 50, method=method)

    @jax.jit
    def run():
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(_VDP.field),
            solver,
            0.0,
            1.0,
            None,
            jnp.asarray(_VDP.y0),
            jnp.asarray(100.0),
            stepsize_controller=WholeInterval(),
            saveat=diffrax.SaveAt(t1=True, solver_state=True),
        )
        windows = jnp.zeros(1), jnp.ones(1)
        term, tight = diffrax.ODETerm(_VDP.field), _tight(inner)
        y0, args = jnp.asarray(_VDP.y0), jnp.asarray(100.0)
        return sol, one_by_one(term, tight, windows, 50, y0, args).last()

    sol, expected = run()
    assert sol.result == diffrax.RESULTS.successful
    assert 1 < int(sol.solver_state.num_iterations) < 20
    assert relative_error(sol.ys[-1], expected) < 1e-9


# ---- Controllers ----


def test_steps_are_windows_and_so_is_dt0():
    inner, solver = diffrax.Dopri5(), newton_solver(num_steps=8)
    steps = diffrax.SaveAt(steps=True)

    @jax.jit
    def run():
        uneven = _solve(
            solver, diffrax.StepTo(jnp.array([0.0, 0.5, 2.0])), saveat=steps
        )
        grid = [jnp.linspace(0.0, 0.5, 9), jnp.linspace(0.5, 2.0, 9)[1:]]
        e_uneven = _solve(inner, diffrax.StepTo(jnp.concatenate(grid)), saveat=steps)
        constant = _solve(solver, diffrax.ConstantStepSize(), t1=2, dt0=0.5)
        e_constant = _solve(inner, diffrax.ConstantStepSize(), dt0=0.0625)
        return uneven, e_uneven, constant, e_constant

    uneven, e_uneven, constant, e_constant = run()
    assert uneven.stats["num_steps"] == 2
    np.testing.assert_allclose(uneven.ts[:2], [0.5, 2.0])
    assert_equal(uneven.ys[:2], e_uneven.ys[7:16:8])
    assert constant.stats["num_steps"] == 4
    assert_equal(constant.ys, e_constant.ys)


_HARD = problems | {
    "van_der_pol_10": _VDP._replace(args=np.array(10.0), t1=20.0),
}


@pytest.mark.parametrize(
    ("problem", "inner"),
    [
        ("van_der_pol_10", diffrax.Dopri5()),
        slowly("lotka_volterra", diffrax.Dopri5()),
        slowly("van_der_pol", diffrax.Dopri5()),
        slowly("two_body", diffrax.Dopri5()),
        slowly("van_der_pol_10", diffrax.Kvaerno5()),
    ],
)
def test_error_at_every_tolerance_is_at_most_ten_times_that_of_the_inner_solver(
    problem, inner
):
    field, y0, args, t0, t1 = _HARD[problem]

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
            windows = error(solve(newton_solver(inner), tolerance, 4096))
            return windows, error(solve(inner, tolerance, 100_000))

        return jax.lax.map(at, 10.0 ** -jnp.arange(3.0, 11.0))

    windows, sequential = errors()
    assert (windows <= 10 * sequential).all(), windows / sequential
    # Both do what the tolerance asks for.
    assert sequential[-1] < 1e-5 * sequential[0]
    assert windows[-1] < 1e-6 * np.max(np.abs(y0))


# ---- States and terms of all kinds ----


@each_adjoint
def test_state_may_be_any_pytree_with_complex_leaves_and_empty_ones(adjoint):
    y0 = {
        "complex": jnp.array([1.0 + 0.5j, -0.2j]),
        "matrix": jnp.array([[0.3], [0.1]]),
        "scalar": 2.0,
        "nothing": None,
        "empty": (jnp.zeros((0, 3)),),
    }

    def field(t, y, args):
        del args
        z, x, s = y["complex"], y["matrix"], y["scalar"]
        return {
            "complex": 1j * z * s.astype(z.dtype),
            "matrix": -x * x,
            "scalar": jnp.sin(t) - s + jnp.sum(jnp.abs(z) ** 2),
            "nothing": None,
            "empty": (y["empty"][0],),
        }

    def real_field(t, y, args):
        *parts, x, s, _, empty = y
        z = jax.lax.complex(*parts)
        leaves = {"complex": z, "matrix": x, "scalar": s, "empty": empty}
        out = field(t, leaves, args)
        z = out["complex"]
        return z.real, z.imag, out["matrix"], out["scalar"], None, out["empty"]

    def run(field, y0, solver, controller, adjoint="default") -> Any:
        return diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            solver,
            0.0,
            1.0,
            None,
            y0,
            stepsize_controller=controller,
            saveat=diffrax.SaveAt(ts=jnp.linspace(0.0, 1.0, 3)),
            adjoint=adjoints[adjoint],
            max_steps=32,
        ).ys

    @jax.jit
    def both():
        deer = newton_solver(diffrax.Heun(), num_steps=16)
        with jax.numpy_dtype_promotion("standard"):
            ys = run(field, y0, deer, WholeInterval(), adjoint)
        z = y0["complex"]
        real_y0 = z.real, z.imag, y0["matrix"], y0["scalar"], None, y0["empty"]
        grid = diffrax.StepTo(jnp.linspace(0.0, 1.0, 17))
        return ys, run(real_field, real_y0, diffrax.Heun(), grid)

    with warnings.catch_warnings():
        # diffrax calls its own support of complex numbers a work in progress.
        warnings.simplefilter("ignore", UserWarning)
        ys, (real, imaginary, matrix, scalar, _, empty) = both()
    expected = {"matrix": matrix, "scalar": scalar, "nothing": None, "empty": empty}
    expected["complex"] = jax.lax.complex(real, imaginary)
    assert_equal(ys, expected)


@each_method
def test_state_without_components_is_left_alone(method):
    sol = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: y),
        DEERSolver(num_steps=3, method=method),
        0.0,
        1.0,
        None,
        (jnp.zeros((0,)), None),
        stepsize_controller=WholeInterval(),
    )
    assert sol.result == diffrax.RESULTS.successful
    assert sol.ys[0].shape == (1, 0)


def test_half_precision_keeps_its_type():
    half = lambda x: jnp.array(x, jnp.bfloat16)

    @jax.jit
    def both():
        run = lambda solver, controller: (
            diffrax.diffeqsolve(
                diffrax.ODETerm(lambda t, y, args: -y),
                solver,
                half(0.0),
                half(1.0),
                None,
                half([1.0, -0.5]),
                stepsize_controller=controller,
                max_steps=8,
            ).ys
        )
        steps = diffrax.StepTo(jnp.linspace(0.0, 1.0, 9, dtype=jnp.bfloat16))
        solver = newton_solver(diffrax.Heun(), num_steps=8)
        return run(solver, WholeInterval()), run(diffrax.Heun(), steps)

    found, expected = both()
    assert found.dtype == expected.dtype == jnp.bfloat16
    found, expected = (np.asarray(x[-1], float) for x in (found, expected))
    np.testing.assert_allclose(found, expected, rtol=0.03)
    np.testing.assert_allclose(found, np.exp(-1) * np.array([1, -0.5]), rtol=0.03)


@each_method
def test_what_half_precision_cannot_hold_is_not_a_success(method):
    half = lambda x: jnp.asarray(x, jnp.float16)
    sol = jax.jit(
        lambda: diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: jnp.tanh(y) * half(1e4)),
            DEERSolver(num_steps=8, method=method),
            half(0.0),
            half(10.0),
            None,
            half([1.0, 2.0]),
            stepsize_controller=WholeInterval(),
            throw=False,
        )
    )()
    assert sol.result == diffrax.RESULTS.nonfinite


def test_sums_of_terms_and_controls_work_as_one_field():
    control = diffrax.LinearInterpolation(
        jnp.linspace(0.0, 1.0, 5), jnp.array([0.0, 0.5, 0.2, 0.9, 1.0])
    )
    y0, grid = jnp.array([1.0, 2.0]), jnp.linspace(0.0, 1.0, 13)
    rotation = diffrax.ODETerm(lambda t, y, args: jnp.stack([y[1], -y[0]]) * t)
    driven = diffrax.ControlTerm(lambda t, y, args: jnp.sin(y), control)

    @jax.jit
    def both():
        def run(term, solver, controller):
            steps: Any = dict(stepsize_controller=controller, max_steps=12)
            return diffrax.diffeqsolve(term, solver, 0.0, 1.0, None, y0, **steps).ys

        deer = newton_solver(diffrax.Heun(), num_steps=12)
        terms = diffrax.MultiTerm(rotation, driven), driven.to_ode()
        parallel = [run(term, deer, WholeInterval()) for term in terms]
        steps = diffrax.StepTo(grid)
        return parallel, [run(term, diffrax.Heun(), steps) for term in terms]

    assert_equal(*both())


def test_solver_of_split_terms_has_no_field_to_linearize():
    terms = (
        diffrax.ODETerm(lambda t, v, args: v),
        diffrax.ODETerm(lambda t, x, args: -jnp.sin(x)),
    )
    y0, inner = (jnp.array([1.0]), jnp.array([0.0])), diffrax.SemiImplicitEuler()
    run = lambda solver, controller: (
        diffrax.diffeqsolve(
            terms, solver, 0.0, 2.0, None, y0, stepsize_controller=controller
        ).ys
    )
    grid = diffrax.StepTo(jnp.linspace(0.0, 2.0, 21))
    found, expected = jax.jit(
        lambda: (run(newton_solver(inner, 20), WholeInterval()), run(inner, grid))
    )()
    assert_equal(found, expected)
    solver = newton_solver(inner, 20, method=Newton(PiecewiseConstant()))
    with pytest.raises(TypeError, match=r"Use `FullJacobian\(\)`"):
        run(solver, WholeInterval())


# ---- Batches and derivatives ----


def test_batch_over_everything_is_its_members_with_the_associative_scan():
    method = Newton(scan=AssociativeScan())
    solver = newton_solver(diffrax.Heun(), num_steps=12, method=method)

    def run(y0, args, t0, t1, ts):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(_VDP.field),
            solver,
            t0,
            t1,
            None,
            y0,
            args,
            stepsize_controller=WholeInterval(),
            saveat=diffrax.SaveAt(ts=ts),
        ).ys

    def sequential(y0, args, t0, t1, ts):
        windows, term = (t0[None], t1[None]), diffrax.ODETerm(_VDP.field)
        return one_by_one(term, diffrax.Heun(), windows, 12, y0, args).at(ts)

    y0 = jnp.array([[2.0, 0.0], [0.5, 1.0], [-1.0, 0.3]])
    args = jnp.array([0.5, 1.0, 2.0])
    t0, t1 = jnp.array([0.0, 1.0, 2.0]), jnp.array([2.0, 1.5, 0.5])
    ts = jnp.linspace(t0, t1, 4, axis=1)
    batch = y0, args, t0, t1, ts
    found = jax.jit(jax.vmap(run))(*batch)
    for i in range(3):
        expected = jax.jit(sequential)(*(x[i] for x in batch))
        assert_equal(found[i], expected, 1e-10)


def test_batch_of_no_samples_has_the_shape_of_the_inner_solver():
    run = lambda solver: jax.vmap(
        lambda y0: (
            diffrax.diffeqsolve(
                diffrax.ODETerm(lambda t, y, args: -y),
                solver,
                0.0,
                1.0,
                0.5,
                y0,
                throw=False,
            ).ys
        )
    )(jnp.zeros((0, 2)))
    assert run(DEERSolver(num_steps=2)).shape == run(diffrax.Dopri5()).shape


class _Push(eqx.Module):
    strength: jax.Array
    kind: str = "sine"

    def __call__(self, t):
        assert self.kind == "sine"
        return self.strength * jnp.sin(3 * t)


def test_derivatives_without_deer_adjoint_are_those_of_the_sequential_solver():
    ts, factor = jnp.array([0.4, 1.1, 1.7]), jnp.array(0.9)

    def solve(adjoint, solver, controller, max_steps, parameters):
        y0, push, factor = parameters

        def field(t, y, push):
            return {"x": y["v"], "v": (push(t) - factor * jnp.sin(y["x"]))}

        ys: Any = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            solver,
            0.0,
            2.0,
            None,
            y0,
            push,
            stepsize_controller=controller,
            saveat=diffrax.SaveAt(ts=ts),
            adjoint=adjoint,
            max_steps=max_steps,
        ).ys
        return jnp.sum(ys["x"] ** 2 * jnp.array([1.0, 2.0, 3.0]))

    inner = diffrax.Heun()
    solver = newton_solver(inner, num_steps=6, gradient=ParallelGradient())
    windows = diffrax.StepTo(jnp.linspace(0.0, 2.0, 3))
    steps = diffrax.StepTo(jnp.linspace(0.0, 2.0, 13))

    @eqx.filter_jit
    def all_of_them(p):
        of = lambda adjoint: lambda p: solve(adjoint, solver, windows, 2, p)
        gradient = lambda f: eqx.filter_value_and_grad(f)(p)
        found = gradient(of(all_adjoints["default"]))
        direction = jax.tree.map(jnp.cos, eqx.filter(p, eqx.is_array))
        slope = eqx.filter_jvp(of(all_adjoints["forward"]), (p,), (direction,))[1]
        reference = all_adjoints["default"]
        expected = gradient(lambda p: solve(reference, inner, steps, 12, p))
        products = jax.tree.map(lambda a, b: jnp.sum(a * b), expected[1], direction)
        return found, slope, expected, sum(jax.tree.leaves(products))

    y0 = {"x": jnp.array(1.0), "v": jnp.array(0.3)}
    found, slope, expected, e_slope = all_of_them((y0, _Push(jnp.array(0.4)), factor))
    assert_equal(found, expected, 1e-9)
    assert_equal(slope, e_slope, 1e-9)


def test_field_without_forward_derivative_is_explained():
    @jax.custom_vjp
    def sine(y):
        return jnp.sin(y)

    sine.defvjp(lambda y: (sine(y), y), lambda y, c: (c * jnp.cos(y),))

    def echo(y):
        like = jax.ShapeDtypeStruct(y.shape, y.dtype)
        return jax.pure_callback(lambda y: y, like, y, vmap_method="sequential")

    def loss(rate, f: Any = sine, method=None):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, rate: rate * f(y)),
            DEERSolver(num_steps=4, method=method),
            0.0,
            1.0,
            None,
            jnp.ones(2),
            rate,
            stepsize_controller=WholeInterval(),
        )
        return jnp.sum(jnp.asarray(sol.ys))

    with pytest.raises(TypeError, match=r"`jax.custom_vjp`.*Use `jax.custom_jvp`"):
        jax.grad(loss)(jnp.array(1.0))
    # Newton's method differentiates for the value, too.
    for f in (sine, echo):
        with pytest.raises(TypeError, match=r"callback.*`method=Sequential\(\)`"):
            loss(jnp.array(1.0), f, Newton())


def test_solver_may_be_an_argument_of_a_compiled_function():
    run = eqx.filter_jit(lambda solver: _solve(solver, WholeInterval()).ys)
    solver = newton_solver(diffrax.Heun(), num_steps=30)
    first, second = run(solver), run(newton_solver(diffrax.Heun(), num_steps=30))
    windows, y0 = (jnp.zeros(1), jnp.full(1, 2.0)), jnp.asarray(_VDP.y0)
    term, args = diffrax.ODETerm(_VDP.field), jnp.asarray(_VDP.args)
    expected = one_by_one(term, diffrax.Heun(), windows, 30, y0, args).last()
    assert_equal(first[-1], expected)
    assert_equal(second, first)


# ---- Failure ----


@pytest.mark.raises
def test_window_that_cannot_be_solved_is_reported_or_rejected():
    # sqrt(y) is not real below zero, where long steps of the solver lead.
    term = diffrax.ODETerm(lambda t, y, args: -20 * jnp.sqrt(y) + 1)
    solve = lambda controller, throw=True: diffrax.diffeqsolve(
        term,
        newton_solver(num_steps=4),
        0.0,
        2.0,
        0.5,
        jnp.array([1.0]),
        stepsize_controller=controller,
        throw=throw,
        max_steps=200,
    )
    failed = jax.jit(lambda: solve(WholeInterval(), throw=False))()
    assert failed.result == diffrax.RESULTS.nonfinite
    assert jnp.all(jnp.isfinite(failed.ys))
    adaptive = jax.jit(lambda: solve(diffrax.PIDController(rtol=1e-6, atol=1e-9)))()
    assert adaptive.stats["num_rejected_steps"] > 0
    np.testing.assert_allclose(adaptive.ys[-1], 1 / 400, rtol=1e-4)
    with pytest.raises(Exception, match="(?i)nonfinite"):
        jax.block_until_ready(jax.jit(lambda: solve(WholeInterval()).ys)())


def test_too_few_iterations_are_a_failure_of_the_window():
    solver = newton_solver(num_steps=64, method=Newton(max_iterations=2))
    sol = jax.jit(lambda: _solve(solver, WholeInterval(), t1=6.0, throw=False))()
    assert sol.result == diffrax.RESULTS.nonlinear_max_steps_reached
    assert jnp.all(jnp.isfinite(jnp.asarray(sol.ys)))


def test_steps_beyond_the_limit_of_stability_are_those_of_the_inner_solver():
    # Wrong, but not in parallel: exp(h J) vanishes where the step explodes.
    term = diffrax.ODETerm(lambda t, y, args: -50.0 * y)
    run = lambda solver, controller: (
        diffrax.diffeqsolve(
            term,
            solver,
            0.0,
            2.0,
            None,
            jnp.array([1.0]),
            stepsize_controller=controller,
        ).ys
    )
    heun, grid = diffrax.Heun(), diffrax.StepTo(jnp.linspace(0.0, 2.0, 21))
    found, expected = jax.jit(
        lambda: (run(newton_solver(heun, 20), WholeInterval()), run(heun, grid))
    )()
    assert expected[-1, 0] > 1e10
    assert_equal(found, expected)


# ---- What it says about itself, and arguments that are wrong ----


def test_order_and_field_are_those_of_the_inner_solver():
    inner = ExponentialRosenbrockEuler()
    solver, term = DEERSolver(inner), diffrax.ODETerm(lambda t, y, args: t * y * args)
    assert (solver.order(term), solver.error_order(term)) == (2, 3)
    assert solver.term_structure is inner.term_structure
    assert solver.func(term, 3.0, 2.0, 5.0) == 30.0


@pytest.mark.parametrize("method", [None, Newton()], ids=["none", "newton"])
def test_choices_are_those_that_the_statistics_name(method):
    y0 = jnp.asarray(_VDP.y0)
    term, args = diffrax.ODETerm(_VDP.field), jnp.asarray(_VDP.args)
    solver = DEERSolver(num_steps=5, method=method)
    kwargs: Any = dict(stepsize_controller=WholeInterval(), adjoint=DEERAdjoint())

    def run(y0):
        sol = diffrax.diffeqsolve(term, solver, 0, 1, None, y0, args, **kwargs)
        found = sol.stats["method"], sol.stats["gradient"]
        return found, solver.choices(term, 0, y0, args)

    found, expected = eqx.filter_eval_shape(run, y0)
    assert found == expected
    assert type(found[0]) is (Sequential if method is None else Newton)


_WRONG_ARGUMENTS = [
    (dict(num_steps=0), ValueError, "`num_steps` must be at least 1; got 0"),
    (dict(num_steps=1.5), TypeError, "`num_steps` must be a Python int .* got 1.5"),
    (dict(num_steps=True), TypeError, "`num_steps` must be a Python int"),
    (dict(solver=diffrax.Dopri5), TypeError, "`solver` got the class `Dopri5`"),
    (dict(solver="dopri5"), TypeError, "`solver` must be an instance of"),
    (dict(solver=diffrax.EulerHeun()), ValueError, "SDE solver `EulerHeun`"),
    (dict(solver=diffrax.SPaRK()), ValueError, "Use `Dopri5\\(\\)`"),
    (dict(solver=newton_solver()), ValueError, "itself"),
    (dict(method=Newton), TypeError, "`method` got the class `Newton`"),
    (dict(method=FullJacobian()), TypeError, "an instance of `AbstractMethod`"),
    (dict(gradient=Newton()), TypeError, "an instance of `AbstractGradient`"),
    (dict(guess=jnp.zeros(3)), TypeError, "`guess` must be an instance of"),
]


def test_wrong_arguments_name_themselves_and_the_remedy():
    for kwargs, error, match in _WRONG_ARGUMENTS:
        with pytest.raises(error, match=match):
            DEERSolver(**kwargs)


@pytest.mark.filterwarnings("ignore:`DEERSolver` is not marked as converging")
def test_term_with_noise_is_refused():
    noise = diffrax.VirtualBrownianTree(0.0, 1.0, 1e-3, (), jax.random.key(0))
    drift = diffrax.ODETerm(lambda t, y, args: -y)
    diffusion = diffrax.ControlTerm(lambda t, y, args: y, noise)
    term, y0 = diffrax.MultiTerm(drift, diffusion), jnp.array([1.0])
    with pytest.raises(ValueError, match="found a Brownian motion in `terms`"):
        diffrax.diffeqsolve(term, DEERSolver(diffrax.Heun()), 0.0, 1.0, 0.1, y0)


def test_controller_without_error_estimate_is_refused_by_diffrax():
    controller = diffrax.PIDController(rtol=1e-3, atol=1e-3)
    with pytest.raises(RuntimeError, match="does not provide error estimates"):
        _solve(DEERSolver(diffrax.Euler()), controller)
