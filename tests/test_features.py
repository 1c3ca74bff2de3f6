"""What people combine with a solver: save times, state, guesses, batches, errors."""

import warnings
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrax_deer import (
    AssociativeScan,
    ConstantPredictor,
    DEERSolver,
    ExponentialRosenbrockEuler,
    FullJacobian,
    ParallelForward,
    PiecewiseConstant,
    SequentialForward,
    WholeInterval,
)

from .helpers import newton_solver, problems
from .oracle import adjoints, each_adjoint

_VDP = problems["van_der_pol"]


def _solve(
    solver, controller, *, t0: Any = 0.0, t1: Any = 2.0, y0: Any = None, **kwargs: Any
):
    return diffrax.diffeqsolve(
        diffrax.ODETerm(_VDP.field),
        solver,
        t0,
        t1,
        None,
        jnp.asarray(_VDP.y0) if y0 is None else y0,
        jnp.asarray(_VDP.args),
        stepsize_controller=controller,
        max_steps=kwargs.pop("max_steps", 64),
        **kwargs,
    )


def _assert_equal(a, b, rtol=1e-10):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol)


def test_steps_are_windows():
    saveat = diffrax.SaveAt(steps=True)
    windows = diffrax.StepTo(jnp.array([0.0, 0.5, 2.0]))
    sol = jax.jit(lambda: _solve(newton_solver(num_steps=8), windows, saveat=saveat))()
    assert sol.stats["num_steps"] == 2
    np.testing.assert_allclose(sol.ts[:2], [0.5, 2.0])
    grid = jnp.concatenate([jnp.linspace(0.0, 0.5, 9), jnp.linspace(0.5, 2.0, 9)[1:]])
    steps = diffrax.StepTo(grid)
    expected = jax.jit(lambda: _solve(diffrax.Dopri5(), steps, saveat=saveat))()
    _assert_equal(sol.ys[:2], expected.ys[7:16:8])


def test_the_grid_of_the_paper_is_one_step_per_window():
    times = jnp.array([0.0, 0.1, 0.15, 0.4, 0.7])
    kwargs = dict(t1=0.7, saveat=diffrax.SaveAt(ts=times))
    solver = ExponentialRosenbrockEuler()
    run = eqx.filter_jit(lambda solver: _solve(solver, diffrax.StepTo(times), **kwargs))
    _assert_equal(run(newton_solver(solver, num_steps=1)).ys, run(solver).ys)


def test_constant_steps_and_dt0_are_windows_as_for_any_solver():
    solver = newton_solver(num_steps=4)
    run = lambda dt0, controller: diffrax.diffeqsolve(
        diffrax.ODETerm(_VDP.field),
        solver,
        0,
        2,
        dt0,
        jnp.asarray(_VDP.y0),
        jnp.asarray(_VDP.args),
        stepsize_controller=controller,
    )
    constant = run(0.5, diffrax.ConstantStepSize())
    assert constant.stats["num_steps"] == 4
    windows = diffrax.StepTo(jnp.linspace(0.0, 2.0, 5))
    _assert_equal(constant.ys, run(None, windows).ys)
    assert run(0.5, WholeInterval()).stats["num_steps"] == 1


@pytest.mark.parametrize("t0", [0.1, 1.0, 1234.5])
def test_the_whole_interval_is_one_step_whatever_rounding_does(t0):
    t1s = t0 + np.random.default_rng(0).uniform(0.1, 3.0, 50)

    @jax.jit
    @jax.vmap
    def run(t1):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: -y),
            newton_solver(num_steps=2),
            t0,
            t1,
            0.1,
            jnp.array([1.0]),
            stepsize_controller=WholeInterval(),
        )
        return sol.stats["num_steps"], sol.ts[-1]

    num_steps, ends = run(jnp.asarray(t1s))
    assert (np.asarray(num_steps) == 1).all()
    np.testing.assert_array_equal(ends, t1s)


def test_an_infinite_interval_cannot_be_one_step():
    with pytest.raises(Exception, match="has to be finite"):
        jax.block_until_ready(_solve(newton_solver(), WholeInterval(), t1=jnp.inf).ys)


def test_an_empty_interval_returns_the_initial_value():
    sol = _solve(newton_solver(num_steps=4), WholeInterval(), t0=1.0, t1=1.0)
    _assert_equal(sol.ys[-1], jnp.asarray(_VDP.y0))


@each_adjoint
def test_the_state_may_be_any_pytree(adjoint):
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
        complex_y = {"complex": z, "matrix": x, "scalar": s, "empty": empty}
        out = field(t, {**complex_y, "nothing": None}, args)
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
        ).ys

    with jax.numpy_dtype_promotion("standard"), warnings.catch_warnings():
        # diffrax calls its own support of complex numbers a work in progress.
        warnings.simplefilter("ignore", UserWarning)
        deer = newton_solver(diffrax.Heun(), num_steps=16)
        ys = run(field, y0, deer, WholeInterval(), adjoint)
    z = y0["complex"]
    real_y0 = z.real, z.imag, y0["matrix"], y0["scalar"], None, y0["empty"]
    grid = jnp.linspace(0.0, 1.0, 17)
    real, imaginary, matrix, scalar, _, empty = run(
        real_field, real_y0, diffrax.Heun(), diffrax.StepTo(grid)
    )
    expected = {"matrix": matrix, "scalar": scalar, "nothing": None, "empty": empty}
    expected["complex"] = jax.lax.complex(real, imaginary)
    _assert_equal(ys, expected)


def test_a_state_without_components_is_left_alone():
    sol = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: y),
        newton_solver(num_steps=3),
        0.0,
        1.0,
        None,
        (jnp.zeros((0,)), None),
        stepsize_controller=WholeInterval(),
    )
    assert sol.ys[0].shape == (1, 0)


def test_half_precision_keeps_its_type():
    y0 = jnp.array([1.0, -0.5], jnp.bfloat16)
    sol = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: -y),
        newton_solver(diffrax.Heun(), num_steps=8),
        jnp.array(0.0, jnp.bfloat16),
        jnp.array(1.0, jnp.bfloat16),
        None,
        y0,
        stepsize_controller=WholeInterval(),
    )
    assert sol.ys.dtype == jnp.bfloat16
    exact = np.exp(-1) * np.asarray(y0, float)
    np.testing.assert_allclose(np.asarray(sol.ys[-1], float), exact, rtol=0.03)


@each_adjoint
@pytest.mark.parametrize("forward", [ParallelForward(), SequentialForward()])
def test_what_half_precision_cannot_hold_is_not_a_success(adjoint, forward):
    half = lambda x: jnp.asarray(x, jnp.float16)
    sol = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: jnp.tanh(y) * half(1e4)),
        DEERSolver(num_steps=8, forward=forward),
        half(0.0),
        half(10.0),
        None,
        half([1.0, 2.0]),
        stepsize_controller=WholeInterval(),
        adjoint=adjoints[adjoint],
        throw=False,
    )
    assert sol.result == diffrax.RESULTS.nonfinite


@each_adjoint
def test_sums_of_terms_and_controls_work_as_one_field(adjoint):
    control = diffrax.LinearInterpolation(
        jnp.linspace(0.0, 1.0, 5), jnp.array([0.0, 0.5, 0.2, 0.9, 1.0])
    )
    y0 = jnp.array([1.0, 2.0])
    damping = diffrax.ODETerm(lambda t, y, args: -0.5 * y)
    rotation = diffrax.ODETerm(lambda t, y, args: jnp.stack([y[1], -y[0]]) * t)
    driven = diffrax.ControlTerm(lambda t, y, args: jnp.sin(y), control)
    grid = jnp.linspace(0.0, 1.0, 13)
    for term in (diffrax.MultiTerm(damping, rotation), driven, driven.to_ode()):
        run = lambda solver, controller, adjoint, term=term: (
            diffrax.diffeqsolve(
                term,
                solver,
                0.0,
                1.0,
                None,
                y0,
                stepsize_controller=controller,
                adjoint=adjoints[adjoint],
            ).ys
        )
        deer = newton_solver(diffrax.Heun(), num_steps=12)
        parallel = run(deer, WholeInterval(), adjoint)
        sequential = run(diffrax.Heun(), diffrax.StepTo(grid), "default")
        _assert_equal(parallel, sequential)


def test_a_solver_of_split_terms_needs_the_full_jacobian():
    terms = (
        diffrax.ODETerm(lambda t, v, args: v),
        diffrax.ODETerm(lambda t, x, args: -jnp.sin(x)),
    )
    run = lambda solver, controller: (
        diffrax.diffeqsolve(
            terms,
            solver,
            0.0,
            2.0,
            None,
            (jnp.array([1.0]), jnp.array([0.0])),
            stepsize_controller=controller,
        ).ys
    )
    solver = diffrax.SemiImplicitEuler()
    grid = diffrax.StepTo(jnp.linspace(0.0, 2.0, 21))
    parallel = newton_solver(solver, num_steps=20)
    _assert_equal(run(parallel, WholeInterval()), run(solver, grid))
    parallel = newton_solver(solver, num_steps=20, linearization=PiecewiseConstant())
    with pytest.raises(TypeError, match=r"Use `FullJacobian\(\)`"):
        run(parallel, WholeInterval())


def test_vmap_over_everything_equals_one_by_one_with_the_associative_scan():
    solver = newton_solver(diffrax.Heun(), num_steps=12, scan=AssociativeScan())

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

    y0 = jnp.array([[2.0, 0.0], [0.5, 1.0], [-1.0, 0.3]])
    args = jnp.array([0.5, 1.0, 2.0])
    t0, t1 = jnp.array([0.0, 1.0, 2.0]), jnp.array([2.0, 1.5, 0.5])
    ts = jnp.linspace(t0, t1, 4, axis=1)
    batched = jax.jit(jax.vmap(run))(y0, args, t0, t1, ts)
    single = jax.jit(run)
    for i in range(3):
        _assert_equal(batched[i], single(y0[i], args[i], t0[i], t1[i], ts[i]), 1e-12)
    shared = jax.jit(jax.vmap(run, in_axes=(0, None, None, None, None)))
    _assert_equal(shared(y0, args[0], t0[0], t1[0], ts[0])[0], batched[0], 1e-12)


def test_a_warm_start_needs_fewer_iterations_and_gives_the_same_answer():
    save = diffrax.SaveAt(t1=True, solver_state=True)

    @jax.jit
    def run(y0, state):
        return _solve(
            newton_solver(num_steps=100, predictor=ConstantPredictor()),
            WholeInterval(),
            t1=6.0,
            y0=y0,
            saveat=save,
            solver_state=state,
        )

    y0 = jnp.asarray(_VDP.y0)
    cold = run(y0, None)
    again = run(y0, cold.solver_state)
    moved = run(y0 * (1 + 1e-4), cold.solver_state)
    reference = run(y0 * (1 + 1e-4), None)
    assert int(cold.solver_state.num_iterations) > 6
    assert int(again.solver_state.num_iterations) == 1
    assert int(moved.solver_state.num_iterations) <= 4
    _assert_equal(moved.ys, reference.ys)
    _assert_equal(again.ys, cold.ys)


@pytest.mark.parametrize("backward", [False, True])
def test_any_path_is_a_guess_in_the_users_own_time(backward):
    t0, t1 = (2.0, 0.0) if backward else (0.0, 2.0)
    save = diffrax.SaveAt(t1=True, solver_state=True)

    @jax.jit
    def run():
        coarse = _solve(
            diffrax.Heun(),
            diffrax.StepTo(jnp.linspace(t0, t1, 21)),
            t0=t0,
            t1=t1,
            saveat=diffrax.SaveAt(dense=True),
        )
        solve = lambda guess: _solve(
            newton_solver(num_steps=60, guess=guess, predictor=ConstantPredictor()),
            WholeInterval(),
            t0=t0,
            t1=t1,
            saveat=save,
        )
        return solve(None), solve(coarse)

    cold, guessed = run()
    _assert_equal(guessed.ys, cold.ys)
    cold, guessed = cold.solver_state, guessed.solver_state
    assert int(guessed.num_iterations) <= int(cold.num_iterations) - 2


def test_a_guess_for_several_terms_backwards_in_time():
    terms = (
        diffrax.ODETerm(lambda t, y, args: y),
        diffrax.ODETerm(lambda t, y, args: -jnp.sin(y)),
    )

    def run(guess, save):
        return diffrax.diffeqsolve(
            terms,
            newton_solver(
                diffrax.SemiImplicitEuler(),
                num_steps=100,
                guess=guess,
                predictor=ConstantPredictor(),
            ),
            3.0,
            0.0,
            None,
            (jnp.array([1.0]), jnp.array([0.5])),
            stepsize_controller=WholeInterval(),
            saveat=save,
        )

    solution = run(None, diffrax.SaveAt(dense=True))
    state = run(solution, diffrax.SaveAt(t1=True, solver_state=True)).solver_state
    assert int(state.num_iterations) <= 1


@pytest.mark.parametrize("y0", [(2, 0), (np.float32(2.0), np.float32(0.0))])
def test_a_state_of_the_solver_is_of_the_type_that_diffrax_makes(y0):
    term = diffrax.ODETerm(lambda t, y, args: (y[1], -y[0]))
    solver = DEERSolver(num_steps=8)
    state = solver.init(term, 0, 1, y0, None)
    run = lambda **kwargs: diffrax.diffeqsolve(
        term, solver, 0, 1, None, y0, stepsize_controller=WholeInterval(), **kwargs
    )
    _assert_equal(run(solver_state=state).ys, run().ys)
    assert solver.quadratures(term, 0, 1, y0) == (False, False)


def test_a_batch_of_no_samples():
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


@pytest.mark.parametrize("forward", [None, ParallelForward(), SequentialForward()])
def test_a_field_without_forward_derivative_is_explained(forward):
    @jax.custom_vjp
    def sine(y):
        return jnp.sin(y)

    sine.defvjp(lambda y: (sine(y), y), lambda y, c: (c * jnp.cos(y),))

    def loss(rate):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, rate: rate * sine(y)),
            DEERSolver(num_steps=4, forward=forward),
            0.0,
            1.0,
            None,
            jnp.ones(2),
            rate,
            stepsize_controller=WholeInterval(),
        )
        return jnp.sum(jnp.asarray(sol.ys))

    with pytest.raises(TypeError, match="custom_vjp"):
        jax.grad(loss)(jnp.array(1.0))


def test_the_state_of_the_solver_reports_iterations_and_residual():
    save = diffrax.SaveAt(t1=True, solver_state=True)
    state = _solve(
        newton_solver(num_steps=50), WholeInterval(), saveat=save
    ).solver_state
    assert state.ys.shape == (51, 2)
    np.testing.assert_allclose(state.ts, np.linspace(0.0, 2.0, 51))
    assert 2 < int(state.num_iterations) < 10
    assert 0 <= float(state.residual) < 1e-12
    sequential = DEERSolver(num_steps=50, forward=SequentialForward())
    other = _solve(sequential, WholeInterval(), saveat=save).solver_state
    assert int(other.num_iterations) == 0
    _assert_equal(other.ys, state.ys)


def test_dense_output_survives_jit_boundaries_and_scans():
    @jax.jit
    def run():
        return _solve(
            newton_solver(num_steps=10),
            WholeInterval(),
            saveat=diffrax.SaveAt(dense=True),
            max_steps=2,
        )

    first, second = run(), run()
    assert jax.tree.structure(first) == jax.tree.structure(second)
    np.testing.assert_array_equal(first.evaluate(0.7), second.evaluate(0.7))
    increment = first.interpolation.evaluate(0.3, 1.2)
    _assert_equal(increment, first.evaluate(1.2) - first.evaluate(0.3))


_WRONG_ARGUMENTS = [
    (dict(num_steps=0), ValueError, "`num_steps` must be at least 1; got 0"),
    (dict(num_steps=1.5), TypeError, "`num_steps` must be a Python int .* got 1.5"),
    (dict(num_steps=True), TypeError, "`num_steps` must be a Python int"),
    (dict(max_iterations=0), ValueError, "`max_iterations` must be at least 1"),
    (dict(max_iterations="3"), TypeError, "`max_iterations` must be a Python int"),
    (dict(rtol=-1.0), ValueError, "`rtol` must be finite and not negative"),
    (dict(atol=float("nan")), ValueError, "`atol` must be finite"),
    (dict(rtol="tight"), TypeError, "`rtol` must be a Python float"),
    (dict(solver=diffrax.Dopri5), TypeError, "`solver` got the class `Dopri5`"),
    (
        dict(solver="dopri5"),
        TypeError,
        "`solver` must be an instance of `AbstractSolver`",
    ),
    (dict(solver=diffrax.EulerHeun()), ValueError, "SDE solver `EulerHeun`"),
    (dict(solver=diffrax.SPaRK()), ValueError, "Use `Dopri5\\(\\)`"),
    (dict(solver=diffrax.LeapfrogMidpoint()), ValueError, "one-step method"),
    (dict(solver=newton_solver()), ValueError, "itself"),
    (
        dict(linearization=FullJacobian),
        TypeError,
        "`linearization` got the class `FullJacobian`. Pass an instance",
    ),
    (dict(scan=AssociativeScan), TypeError, "`scan` got the class"),
    (
        dict(scan=PiecewiseConstant()),
        TypeError,
        "`scan` must be an instance of `AbstractScan`",
    ),
    (dict(forward=SequentialForward), TypeError, "`forward` got the class"),
    (
        dict(guess=jnp.zeros(3)),
        TypeError,
        "`guess` must be an instance of `AbstractPath`",
    ),
]


@pytest.mark.parametrize(("kwargs", "error", "match"), _WRONG_ARGUMENTS)
def test_wrong_arguments_name_themselves_and_the_remedy(kwargs, error, match):
    with pytest.raises(error, match=match):
        newton_solver(**kwargs)


@pytest.mark.filterwarnings("ignore:`DEERSolver` is not marked as converging")
def test_a_term_with_noise_is_refused():
    noise = diffrax.VirtualBrownianTree(0.0, 1.0, 1e-3, (), jax.random.key(0))
    drift = diffrax.ODETerm(lambda t, y, args: -y)
    diffusion = diffrax.ControlTerm(lambda t, y, args: y, noise)
    with pytest.raises(ValueError, match="found a Brownian motion in `terms`"):
        diffrax.diffeqsolve(
            diffrax.MultiTerm(drift, diffusion),
            newton_solver(diffrax.Heun()),
            0.0,
            1.0,
            0.1,
            jnp.array([1.0]),
        )


def test_a_guess_of_another_structure_is_refused():
    guess = diffrax.LinearInterpolation(jnp.array([0.0, 1.0]), jnp.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"`guess.evaluate\(t\)` must have the"):
        _solve(newton_solver(guess=guess), WholeInterval())


@pytest.mark.filterwarnings("ignore:Complex dtype support")
def test_a_real_guess_of_a_complex_state_is_refused():
    guess = diffrax.LinearInterpolation(jnp.array([0.0, 1.0]), jnp.zeros((2, 2)))
    with (
        jax.numpy_dtype_promotion("standard"),
        pytest.raises(ValueError, match="be complex where it is"),
    ):
        _solve(newton_solver(guess=guess), WholeInterval(), y0=jnp.array([1j, 0j]))


def test_a_controller_without_error_estimate_is_refused_by_diffrax():
    controller = diffrax.PIDController(rtol=1e-3, atol=1e-3)
    with pytest.raises(RuntimeError, match="does not provide error estimates"):
        _solve(newton_solver(diffrax.Euler()), controller)


def test_the_piecewise_constant_linearization_of_large_steps_stays_finite():
    # Explicit steps far beyond their limit of stability: wrong, but not in parallel.
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
    parallel = run(newton_solver(diffrax.Heun(), num_steps=20), WholeInterval())
    sequential = run(diffrax.Heun(), diffrax.StepTo(jnp.linspace(0.0, 2.0, 21)))
    _assert_equal(parallel, sequential)


def test_eqx_filter_jit_takes_the_solver_as_an_argument():
    run = eqx.filter_jit(lambda solver: _solve(solver, WholeInterval()).ys)
    _assert_equal(run(newton_solver(num_steps=30)), run(newton_solver(num_steps=30)))
