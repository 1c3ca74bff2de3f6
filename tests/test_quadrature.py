"""Components that feed back into nothing: found, left out, and summed up exactly."""

import dataclasses
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest
from jax import lax

from diffrax_deer import (
    BlockDiagonalJacobian,
    DEERAdjoint,
    DEERSolver,
    ExponentialRosenbrockEuler,
    Newton,
    WholeInterval,
)
from diffrax_deer._ode.quadrature import feeds_back, partition
from diffrax_deer._ode.solver_step import SolverStep, prepare
from diffrax_deer._ravel import ravel

from .helpers import adjoints, each_adjoint, newton_solver, relative_error, slowly
from .oracle import assert_equal, one_by_one

_ROOT = optx.Newton(rtol=1e-12, atol=1e-12)
_N = 12
_W = jnp.array([[0.3, -1.1, 0.4], [0.9, 0.2, -0.7]])


def _field(t, y, args):
    """A flow with the trace of its Jacobian, and a cost that depends on time."""
    z, t = y["z"], jnp.asarray(t, y["z"].dtype)
    flow = lambda z: jnp.tanh(z @ args) @ args.T + jnp.sin(t)
    cost = jnp.sum(z**2) * jnp.stack([jnp.cos(t), t])
    return {"log_p": jnp.trace(jax.jacfwd(flow)(z)), "z": flow(z), "cost": cost}


def _coupled_field(t, y, args):
    """The same, but the dataflow says that everything depends on everything."""
    none = 0 * (y["log_p"] + jnp.sum(y["cost"]))
    return jax.tree.map(lambda x: x + none, _field(t, y, args))


_Y0 = {
    "log_p": jnp.array(0.5),
    "z": jnp.array([1.0, -0.4]),
    "cost": jnp.array([0.1, 0.2]),
}
_TERM = diffrax.ODETerm(_field)


# ---- What is found ----


def test_field_feeds_back_what_its_dataflow_depends_on_and_not_its_value():
    y0 = {"z": jnp.ones(2), "q": jnp.array(0.0), "none": None}
    total = lambda y: jnp.sum(y["z"])

    def loop(body):
        def z(y):
            carry = y["z"], y["q"]
            return lax.fori_loop(0, 3, lambda _, c: (body(*c), c[1]), carry)[0]

        return z

    branch = lambda y: lax.cond(y["z"][0] > 0, lambda: y["z"], lambda: y["z"] * y["q"])
    flows = {
        "unused": lambda y: y["z"],
        "times zero": lambda y: y["z"] + 0 * y["q"],
        "in a branch": branch,
        # Of a loop every output depends on every input.
        "carried along": loop(lambda z, q: jnp.sin(z)),
        "through a loop": loop(lambda z, q: z * q),
        "unused under jit": jax.jit(lambda y: y["z"]),
    }
    fields: dict[str, Any] = {
        name: lambda y, z=z: dict(y, z=z(y), q=total(y)) for name, z in flows.items()
    }
    # A function under `jit` is looked into, also where it returns all of it.
    fields["together under jit"] = jax.jit(fields["unused"])
    fields["decays"] = lambda y: dict(y, q=-y["q"])
    fields["its shape"] = lambda y: dict(y, q=jnp.zeros_like(y["q"]))
    found = {name: feeds_back(field, y0)["q"] for name, field in fields.items()}
    assert found == {
        "unused": False,
        "times zero": True,
        "in a branch": True,
        "carried along": True,
        "through a loop": True,
        "unused under jit": False,
        "together under jit": False,
        "decays": True,
        "its shape": False,
    }
    found = feeds_back(fields["unused"], y0)
    assert found == {"z": True, "q": False, "none": None}


def test_chain_of_quadratures_loses_only_its_end():
    field = lambda y: (jnp.sin(y[0]), y[0], y[1])
    assert feeds_back(field, (1.0, 0.0, 0.0)) == (True, True, False)


def _quadratures(field, y0, solver=None, terms=None):
    solver = DEERSolver() if solver is None else solver
    terms = diffrax.ODETerm(field) if terms is None else terms
    return solver.quadratures(terms, 0.0, 1.0, y0, None)


def test_solver_names_the_leaves_that_are_quadratures():
    found = DEERSolver().quadratures(_TERM, 0.0, 1.0, _Y0, _W)
    assert found == {"log_p": True, "z": False, "cost": True}
    assert _quadratures(lambda t, y, args: -y, jnp.ones(2)) is False
    # Of quadratures alone there is nothing to be left out.
    constant = lambda t, y, args: jnp.sin(t) * jnp.ones(2)
    assert _quadratures(constant, jnp.ones(2)) is False


def test_fields_of_several_terms():
    y0 = jnp.ones(2), jnp.zeros(())
    one = diffrax.ODETerm(lambda t, y, args: y)
    splitting = DEERSolver(diffrax.SemiImplicitEuler())
    pair = jnp.ones(2), jnp.ones(2)
    assert _quadratures(None, pair, splitting, (one, one)) == (False, False)

    explicit = diffrax.ODETerm(lambda t, y, args: (-y[0], jnp.sum(y[0])))
    implicit = diffrax.ODETerm(lambda t, y, args: (jnp.sin(y[0]), jnp.zeros_like(y[1])))
    both = diffrax.MultiTerm(explicit, implicit)
    found = _quadratures(None, y0, DEERSolver(diffrax.KenCarp3()), both)
    assert found == (False, True)


def test_solvers_of_other_kinds_are_left_alone():
    class Projected(diffrax.AbstractWrappedSolver):
        solver: Any

        term_structure = diffrax.AbstractTerm
        interpolation_cls = diffrax.LocalLinearInterpolation

        def order(self, terms):
            return self.solver.order(terms)

        def init(self, terms, t0, t1, y0, args):
            return self.solver.init(terms, t0, t1, y0, args)

        def func(self, terms, t0, y0, args):
            return self.solver.func(terms, t0, y0, args)

        def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
            y1, *rest = self.solver.step(
                terms, t0, t1, y0, args, solver_state, made_jump
            )
            return jax.tree.map(lambda y: jnp.clip(y, -1, 1), y1), *rest

    solver = DEERSolver(Projected(diffrax.Euler()))
    found = solver.quadratures(_TERM, 0.0, 1.0, _Y0, _W)
    assert found == dict.fromkeys(_Y0, False)


# ---- What comes out ----

_SOLVERS: dict[str, Any] = {
    "dopri5": diffrax.Dopri5(),
    "euler": diffrax.Euler(),
    "bosh3": diffrax.Bosh3(),
    "half": diffrax.HalfSolver(diffrax.Heun()),
    "rosenbrock": ExponentialRosenbrockEuler(),
    "implicit_euler": diffrax.ImplicitEuler(root_finder=_ROOT),
    "kvaerno3": diffrax.Kvaerno3(root_finder=_ROOT),
}


@pytest.mark.parametrize("name", _SOLVERS)
def test_steps_of_a_partition_add_up_to_those_of_the_whole(name):
    solver, (flat, unravel) = prepare(_SOLVERS[name], 1e-16), ravel(_Y0)
    whole = SolverStep(solver, _TERM, _W, unravel)
    x = jnp.array(0.2), jnp.array(0.5)

    @jax.jit
    def both(flat):
        parts = partition(whole, x, flat)
        assert parts is not None
        z, q = parts.split(flat)
        step_map = parts.step_map(z)
        assert step_map.step_with_aux is not None
        # The step of z, and that of all components from q of zero.
        z1, result = step_map.step_with_aux(x, z)
        steps = [parts.split(result.y1)[1]]
        if step_map.step_by_stages is not None:
            steps.append(parts.split(step_map.step_by_stages(x, z)[1].y1)[1])
        expected = whole.full(x, flat)
        joined = [parts.join(z1, q + increment) for increment in steps]
        alone = parts.join(step_map.step(x, z), q)
        return joined, alone, result.error, (expected.y1, expected.error), (z.size)

    joined, alone, error, (y1, e_error), size = both(flat)
    assert size == 2
    for found in joined:
        assert relative_error(found, y1) < 1e-13
    # The z of the step alone.
    is_z = ravel({"log_p": 0.0, "z": jnp.ones(2), "cost": jnp.zeros(2)})[0] == 1
    assert relative_error(alone[is_z], y1[is_z]) < 1e-13
    if name != "euler":
        assert relative_error(error, e_error) < 1e-10


def _solve(term, solver, y0, args, t1: Any = 1.0, **kwargs: Any):
    kwargs = {"stepsize_controller": WholeInterval(), "adjoint": DEERAdjoint()} | kwargs
    t0 = jnp.zeros_like(t1)
    return diffrax.diffeqsolve(term, solver, t0, t1, None, y0, args, **kwargs)


def _sequential(solver, y0, args, t1=1.0):
    windows = jnp.zeros(1), jnp.asarray(t1)[None]
    return one_by_one(_TERM, solver, windows, _N, y0, args).last()


@pytest.mark.parametrize(
    "name",
    [
        "dopri5",
        slowly("rosenbrock"),
        slowly("euler"),
        slowly("half"),
        slowly("implicit_euler"),
        slowly("kvaerno3"),
    ],
)
def test_value_and_derivatives_are_those_of_the_sequential_solver(name):
    solver = _SOLVERS[name]
    is_second = name == "dopri5"

    def loss(parallel, y0, args, t1, factor):
        if parallel:
            y1 = _solve(_TERM, newton_solver(solver, num_steps=_N), y0, args, t1).ys
            y1 = jax.tree.map(lambda y: y[-1], y1)
        else:
            prepared = solver
            if isinstance(solver, diffrax.AbstractRungeKutta):
                prepared = dataclasses.replace(solver, scan_kind="bounded")
            y1 = _sequential(prepared, y0, args, t1)
        return factor * jnp.sin(y1["log_p"]) + jnp.sum(y1["z"] ** 2 * y1["cost"]), y1

    @jax.jit
    def both(*p):
        def of(parallel):
            gradient = jax.value_and_grad(lambda p: loss(parallel, *p), has_aux=True)
            if not is_second:
                return gradient(p)
            direction = jax.tree.map(lambda x: jnp.cos(x + 1), p)
            return jax.jvp(gradient, (p,), (direction,))

        return of(True), of(False)

    found, expected = both(_Y0, _W, jnp.array(1.1), jnp.array(0.7))
    assert_equal(found, expected, 1e-9)


def _cast(tree, dtype):
    return jax.tree.map(lambda x: x.astype(dtype), tree)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_by_default_it_is_that_of_the_coupled_system(dtype):
    y0, args, solver = _cast(_Y0, dtype), _cast(_W, dtype), DEERSolver(num_steps=_N)

    @jax.jit
    def both(y0, args):
        t1 = jnp.ones((), dtype)
        run = lambda field: _solve(diffrax.ODETerm(field), solver, y0, args, t1).ys
        return run(_field), run(_coupled_field)

    found, expected = both(y0, args)
    assert jax.tree.all(jax.tree.map(lambda x: x.dtype == dtype, found))
    assert relative_error(found, expected) < 16 * float(jnp.finfo(dtype).eps)


def test_block_is_one_of_the_coupled_components():
    # Two of five would be no divisor.
    method = Newton(BlockDiagonalJacobian(block_size=2))
    solver = newton_solver(num_steps=_N, method=method)
    found = jax.jit(lambda y0: _solve(_TERM, solver, y0, _W).ys)(_Y0)
    expected = _sequential(diffrax.Dopri5(), _Y0, _W)
    assert_equal(jax.tree.map(lambda y: y[-1], found), expected, 1e-12)


@each_adjoint
def test_every_way_to_save_and_a_warm_start_have_all_components(adjoint):
    ts, inner = jnp.array([0.1, 0.35, 0.8]), diffrax.Bosh3()
    saveat = diffrax.SaveAt(ts=ts, t1=True, dense=True, solver_state=True)
    kwargs: Any = dict(saveat=saveat, adjoint=adjoints[adjoint], max_steps=2)
    solver = newton_solver(inner, num_steps=_N)

    @jax.jit
    def run(y0, state):
        sol = _solve(_TERM, solver, y0, _W, solver_state=state, **kwargs)
        return sol.ys, sol.evaluate(0.35), sol.solver_state

    ys, between, state = run(_Y0, solver.init(_TERM, 0.0, 1.0, _Y0, _W))
    windows = jnp.zeros(1), jnp.ones(1)
    steps = one_by_one(_TERM, inner, windows, _N, _Y0, _W)
    expected = steps.at(jnp.append(ts, 1.0))
    assert_equal(ys, expected, 1e-12)
    assert_equal(between, jax.tree.map(lambda y: y[1], expected), 1e-12)
    assert state.ys.shape == (_N, 5)
    *_, again = run(_Y0, state)
    assert int(again.num_iterations) < int(state.num_iterations)


def test_controller_sees_the_error_of_a_quadrature():
    # Nothing happens but the quadrature of a narrow peak.
    field = lambda t, y, args: (jnp.zeros_like(y[0]), 1 / (1e-3 + (t - 0.3) ** 2))
    controller = diffrax.PIDController(rtol=1e-8, atol=1e-8)
    kwargs: Any = dict(stepsize_controller=controller, max_steps=64)
    y0, solver = (jnp.ones(1), jnp.zeros(())), newton_solver(num_steps=8)
    sol = jax.jit(lambda: _solve(diffrax.ODETerm(field), solver, y0, None, **kwargs))()
    root = 1e-3**0.5
    expected = (np.arctan(0.7 / root) + np.arctan(0.3 / root)) / root
    assert abs(sol.ys[1][-1] / expected - 1) < 1e-7
    assert sol.stats["num_accepted_steps"] > 3


def test_events_see_quadratures():
    event = diffrax.Event(lambda t, y, args, **_: y["cost"][0] - 0.4, _ROOT)
    solver = newton_solver(num_steps=_N)
    sol = jax.jit(lambda: _solve(_TERM, solver, _Y0, _W, event=event))()
    assert sol.result == diffrax.RESULTS.event_occurred
    assert abs(sol.ys["cost"][-1, 0] - 0.4) < 1e-10


@pytest.mark.parametrize(
    "solver",
    [
        diffrax.Dopri5(),
        diffrax.ImplicitEuler(),
        diffrax.Kvaerno3(),
        ExponentialRosenbrockEuler(),
    ],
    ids=lambda solver: type(solver).__name__,
)
def test_nothing_but_quadratures_is_summed_up_in_two_iterations(solver):
    term = diffrax.ODETerm(lambda t, y, a: jnp.cos(a * t) * jnp.ones(2))

    @jax.jit
    def both(rate):
        deer = newton_solver(solver, num_steps=8)
        sol = _solve(term, deer, jnp.zeros(2), rate)
        windows, prepared = (jnp.zeros(1), jnp.ones(1)), prepare(solver, 1e-16)
        steps = one_by_one(term, prepared, windows, 8, jnp.zeros(2), rate)
        return sol.ys[-1], sol.stats["num_newton_iterations"], steps.last()

    found, num_iterations, expected = both(jnp.array(2.0))
    np.testing.assert_allclose(found, expected, rtol=1e-13)
    assert num_iterations <= 2


# ---- What it costs, and what if it fails ----


def test_field_of_a_quadrature_is_evaluated_once():
    evaluations = []

    def count(x):
        evaluations.append(x.size // 2)
        return np.sum(np.sin(x), axis=-1)

    @jax.custom_jvp
    def cost(z):
        shape = jax.ShapeDtypeStruct((), z.dtype)
        return jax.pure_callback(count, shape, z, vmap_method="expand_dims")

    # A linearization differentiates the whole field, and XLA throws away this part.
    cost.defjvp(lambda z, z_dot: (cost(*z), jnp.sum(jnp.cos(z[0]) * z_dot[0])))
    term = diffrax.ODETerm(lambda t, y, args: (jnp.sin(3 * y[0]), cost(y[0])))
    y0 = jnp.array([0.2, 1.0]), jnp.zeros(())
    sol = jax.jit(lambda: _solve(term, newton_solver(num_steps=_N), y0, None))()
    jax.block_until_ready(sol)
    assert sol.stats["num_newton_iterations"] > 1
    # Not in every iteration. The last of the seven stages of Dopri5 is for the error.
    assert sum(evaluations) == 6 * _N


def test_gradient_of_many_parameters_by_backsolve_is_a_quadrature():
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(100, 100)) / 10)

    def loss(weights, adjoint):
        sol = _solve(
            diffrax.ODETerm(lambda t, y, w: jnp.tanh(w @ y)),
            DEERSolver(num_steps=_N),
            jnp.ones(100),
            weights,
            adjoint=adjoint,
        )
        return jnp.sum(sol.ys**2)

    with jax.numpy_dtype_promotion("standard"):  # of diffrax's own
        found, expected = jax.jit(
            lambda w: [
                jax.grad(loss)(w, adjoint)
                for adjoint in (diffrax.BacksolveAdjoint(), DEERAdjoint())
            ]
        )(weights)
    assert relative_error(found, expected) < 1e-6


def _fails_late(t, y, args):
    # Fine for z, but q has no value beyond z = 1.
    z, _ = y
    return args * jnp.ones_like(z), jnp.sqrt(1 - z)


def test_quadrature_without_value_is_a_failure():
    y0 = jnp.zeros(()), jnp.zeros(())
    run = lambda speed: _solve(
        diffrax.ODETerm(_fails_late),
        newton_solver(num_steps=_N),
        y0,
        speed,
        throw=False,
    )
    sol = jax.jit(jax.vmap(run))(jnp.array([2.0, 0.5]))
    results = diffrax.RESULTS
    assert (sol.result == results.promote(optx.RESULTS.nonfinite)).tolist() == [1, 0]
    assert (sol.result == results.successful).tolist() == [0, 1]
    assert all(bool(jnp.all(jnp.isfinite(y))) for y in sol.ys)
    assert float(sol.ys[0][0, -1]) <= 1


def test_rejected_window_leaves_no_nan_in_the_gradient():
    # The first window reaches beyond z = 1, where the field makes z turn back.
    def field(t, y, args):
        z, _ = y
        return args * (0.9 - z), jnp.sqrt(1 - z)

    def loss(rate):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            newton_solver(diffrax.Heun(), num_steps=2),
            0.0,
            2.0,
            1.9,
            (jnp.zeros(()), jnp.zeros(())),
            rate,
            stepsize_controller=diffrax.PIDController(rtol=1e-5, atol=1e-5),
            adjoint=DEERAdjoint(),
            max_steps=256,
        )
        return sol.ys[1][-1], sol.stats["num_rejected_steps"]

    (value, rejected), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(4.0)
    assert rejected > 0
    # z = 0.9 (1 - exp(-rate t)), and a fine trapezoidal sum.
    t = np.linspace(0, 2, 20001)
    exact = lambda rate: np.trapezoid(np.sqrt(1 - 0.9 * (1 - np.exp(-rate * t))), t)
    assert abs(value - exact(4.0)) < 1e-4
    assert abs(gradient - (exact(4.001) - exact(3.999)) / 0.002) < 1e-3
