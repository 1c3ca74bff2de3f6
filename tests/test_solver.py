"""`DEERSolver` against the sequential solver that it wraps, on the same grid."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest
import scipy.linalg

from diffrax_deer import (
    ConstantPredictor,
    DEERSolver,
    ExponentialRosenbrockEuler,
    FullJacobian,
    WholeInterval,
)

from .helpers import forwards, linearizations, newton_solver, problems, scans

_TIGHT = optx.Newton(rtol=1e-12, atol=1e-12)

# A step map added here is held to every contract.
step_maps = {
    "euler": diffrax.Euler(),
    "heun": diffrax.Heun(),
    "bosh3": diffrax.Bosh3(),
    "tsit5": diffrax.Tsit5(),
    "dopri5": diffrax.Dopri5(),
    "dopri8": diffrax.Dopri8(),
    "half_heun": diffrax.HalfSolver(diffrax.Heun()),
    "implicit_euler": diffrax.ImplicitEuler(root_finder=_TIGHT),
    "kvaerno3": diffrax.Kvaerno3(root_finder=_TIGHT),
    "kvaerno4": diffrax.Kvaerno4(root_finder=_TIGHT),
    "kvaerno5": diffrax.Kvaerno5(root_finder=_TIGHT),
    "exponential": ExponentialRosenbrockEuler(),
}


def _field(t, y, args):
    """Depends on time, on a parameter, and on a state that is a dictionary."""
    x, v = y["x"], y["v"]
    force = jnp.sin(2 * t).astype(x.dtype)
    return {"x": v[0], "v": (args * (1 - x**2)) * v - jnp.stack([x - force])}


def _solve(solver, controller, t0, t1, dtype, saveat, throw=True):
    y0 = {"x": jnp.array(2.0, dtype), "v": jnp.array([0.5], dtype)}
    return diffrax.diffeqsolve(
        diffrax.ODETerm(_field),
        solver,
        jnp.asarray(t0, dtype),  # Python floats would make the state float64
        jnp.asarray(t1, dtype),
        None,
        y0,
        jnp.array(1.0, dtype),
        saveat=saveat,
        stepsize_controller=controller,
        max_steps=64,
        throw=throw,
    )


def _max_error(a, b):
    """The largest error of any leaf relative to its largest value."""
    errors = jax.tree.map(
        lambda x, y: jnp.max(jnp.abs(x - y)) / jnp.max(jnp.abs(y)), a, b
    )
    return max(float(x) for x in jax.tree.leaves(errors))


_in_test_generic = ("dopri5", "tsit5", "kvaerno5", "exponential")


@pytest.mark.parametrize(
    "name", [name for name in step_maps if name not in _in_test_generic]
)
def test_equals_the_sequential_solver_both_ways_dense_output_included(name):
    solver = step_maps[name]

    @jax.jit
    def run(t0, t1):
        between = jnp.linspace(t0, t1, 31)[1:-1]

        def values(solver, controller):
            sol = _solve(
                solver, controller, t0, t1, jnp.float64, diffrax.SaveAt(dense=True)
            )
            return jax.vmap(lambda t: (sol.evaluate(t), sol.derivative(t)))(between)

        parallel = values(newton_solver(solver, num_steps=20), WholeInterval())
        return parallel, values(solver, diffrax.StepTo(jnp.linspace(t0, t1, 21)))

    for t0, t1 in ((0.0, 2.0), (1.0, 0.2)):
        parallel, sequential = run(jnp.array(t0), jnp.array(t1))
        assert _max_error(parallel, sequential) < 1e-10


@pytest.mark.parametrize("forward", forwards)
@pytest.mark.parametrize("scan", [None, "associative"])
@pytest.mark.parametrize("linearization", linearizations)
@pytest.mark.parametrize(
    ("dtype", "bound"), [(jnp.float64, 1e-10), (jnp.float32, 1e-5)]
)
def test_no_strategy_changes_the_answer(linearization, scan, forward, dtype, bound):
    iterates = forward == "parallel"
    if not iterates and (linearization, scan) != ("full_jacobian", None):
        pytest.skip("nothing of the iteration is used")
    if scan == "associative" and dtype == jnp.float32:
        pytest.skip("the scans are compared in both types in `test_affine_scan`")
    solver = DEERSolver(
        diffrax.Tsit5(),
        num_steps=37,
        linearization=linearizations[linearization],
        scan=None if scan is None else scans[scan],
        forward=forwards[forward],
    )
    saveat = diffrax.SaveAt(t1=True, solver_state=True)

    @jax.jit
    def run():
        parallel = _solve(solver, WholeInterval(), 0.0, 2.0, dtype, saveat)
        steps = diffrax.StepTo(jnp.linspace(0.0, 2.0, 38, dtype=dtype))
        sequential = _solve(
            diffrax.Tsit5(), steps, 0.0, 2.0, dtype, diffrax.SaveAt(t1=True)
        )
        return parallel, sequential

    parallel, sequential = run()
    assert _max_error(parallel.ys, sequential.ys) < bound
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(parallel.ys))
    state = parallel.solver_state
    assert float(state.residual) < bound
    assert (int(state.num_iterations) > 0) == iterates
    assert int(state.num_iterations) < 37


@pytest.mark.parametrize("stretch", [1.0, 100.0])
def test_the_scheme_of_the_paper_is_exact_on_linear_equations_in_one_iteration(stretch):
    matrix = jnp.array([[-0.5, 2.0], [-2.0, -0.1]]) * stretch
    offset = jnp.array([1.0, -0.3])
    y0 = jnp.array([1.0, 2.0])
    sol = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: args[0] @ y + args[1]),
        newton_solver(
            ExponentialRosenbrockEuler(),
            num_steps=7,
            max_iterations=1,
            predictor=ConstantPredictor(),
        ),
        0.0,
        2.0,
        None,
        y0,
        (matrix, offset),
        stepsize_controller=WholeInterval(),
        saveat=diffrax.SaveAt(ts=jnp.linspace(0.0, 2.0, 8), solver_state=True),
    )
    rest = np.linalg.solve(matrix, offset)
    exact = [
        scipy.linalg.expm(matrix * t) @ (y0 + rest) - rest for t in np.asarray(sol.ts)
    ]
    np.testing.assert_allclose(np.asarray(sol.ys), exact, rtol=1e-11, atol=1e-13)
    assert int(sol.solver_state.num_iterations) == 1


@pytest.mark.parametrize(
    ("linearization", "num_steps", "t1"),
    [
        ("piecewise_constant", 64, 10.0),
        ("piecewise_constant", 1024, 1.0),
        ("full_jacobian", 64, 1.0),
        ("full_jacobian", 1024, 10.0),
    ],
)
def test_an_mlp_field_of_width_64_needs_at_most_seven_iterations(
    linearization, num_steps, t1
):
    problem = problems["mlp"]
    sol = jax.jit(
        lambda: diffrax.diffeqsolve(
            diffrax.ODETerm(problem.field),
            newton_solver(
                num_steps=num_steps,
                linearization=linearizations[linearization],
                rtol=1e-9,
                atol=1e-9,
            ),
            0.0,
            t1,
            None,
            jnp.asarray(problem.y0),
            jax.tree.map(jnp.asarray, problem.args),
            stepsize_controller=WholeInterval(),
            saveat=diffrax.SaveAt(t1=True, solver_state=True),
        )
    )()
    assert int(sol.solver_state.num_iterations) <= 7
    sequential = jax.jit(
        lambda: diffrax.diffeqsolve(
            diffrax.ODETerm(problem.field),
            diffrax.Dopri5(),
            0.0,
            t1,
            None,
            jnp.asarray(problem.y0),
            jax.tree.map(jnp.asarray, problem.args),
            stepsize_controller=diffrax.StepTo(jnp.linspace(0.0, t1, num_steps + 1)),
        )
    )()
    assert _max_error(sol.ys, sequential.ys) < 1e-9


def test_a_window_that_cannot_be_solved_is_rejected_or_reported():
    # sqrt(y) is not real below zero, where long steps of the solver lead.
    term = diffrax.ODETerm(lambda t, y, args: -20 * jnp.sqrt(y) + 1)
    y0 = jnp.array([1.0])
    solve = lambda controller, throw=True: diffrax.diffeqsolve(
        term,
        newton_solver(num_steps=4),
        0.0,
        2.0,
        0.5,
        y0,
        stepsize_controller=controller,
        throw=throw,
        max_steps=200,
    )
    failed = jax.jit(lambda: solve(WholeInterval(), throw=False))()
    assert failed.result == diffrax.RESULTS.nonfinite
    adaptive = jax.jit(lambda: solve(diffrax.PIDController(1e-6, 1e-9)))()
    assert adaptive.stats["num_rejected_steps"] > 0
    np.testing.assert_allclose(adaptive.ys[-1], 1 / 400, rtol=1e-4)
    with pytest.raises(Exception, match="(?i)nonfinite"):
        jax.block_until_ready(solve(WholeInterval()).ys)


def test_too_few_iterations_are_reported():
    problem = problems["van_der_pol"]
    sol = diffrax.diffeqsolve(
        diffrax.ODETerm(problem.field),
        newton_solver(max_iterations=2),
        0.0,
        6.0,
        None,
        jnp.asarray(problem.y0),
        jnp.asarray(problem.args),
        stepsize_controller=WholeInterval(),
        throw=False,
    )
    assert sol.result == diffrax.RESULTS.nonlinear_max_steps_reached
    assert jnp.all(jnp.isfinite(jnp.asarray(sol.ys)))


def test_default_tolerances_of_an_implicit_solver_reach_rounding():
    problem = problems["van_der_pol"]
    solve = lambda solver, controller: (
        diffrax.diffeqsolve(
            diffrax.ODETerm(problem.field),
            solver,
            0.0,
            3.0,
            None,
            jnp.asarray(problem.y0),
            jnp.asarray(problem.args) * 10,
            stepsize_controller=controller,
        ).ys
    )
    parallel = solve(newton_solver(diffrax.Kvaerno5(), num_steps=100), WholeInterval())
    tight = step_maps["kvaerno5"]
    sequential = solve(tight, diffrax.StepTo(jnp.linspace(0.0, 3.0, 101)))
    assert _max_error(parallel, sequential) < 1e-10


def test_the_exponential_solver_is_a_diffrax_solver_of_its_own():
    y0 = (jnp.array([1.0, 0.5]), jnp.array(2.0), None)

    def field(t, y, args):
        z, x, _ = y
        return jnp.stack([z[1], -z[0] * x]), -x + jnp.sin(t), None

    solve = lambda solver, tolerance: (
        diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            solver,
            0.0,
            3.0,
            None,
            y0,
            stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
            max_steps=100_000,
        ).ys
    )
    exact = solve(diffrax.Dopri8(), 1e-11)
    values = solve(ExponentialRosenbrockEuler(), 1e-6)
    assert _max_error(values, exact) < 1e-3


def test_full_jacobian_of_a_stiff_step_map_converges():
    problem = problems["van_der_pol"]
    sol = diffrax.diffeqsolve(
        diffrax.ODETerm(problem.field),
        newton_solver(diffrax.Kvaerno3(), num_steps=50, linearization=FullJacobian()),
        0.0,
        1.0,
        None,
        jnp.asarray(problem.y0),
        jnp.asarray(100.0),
        stepsize_controller=WholeInterval(),
        saveat=diffrax.SaveAt(t1=True, solver_state=True),
    )
    assert int(sol.solver_state.num_iterations) < 50
