"""Components that feed back into nothing: found, left out, and summed up exactly."""

from typing import Any

import diffrax
import equinox as eqx
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
    SequentialForward,
    WholeInterval,
)
from diffrax_deer._step_map import prepare

from .helpers import linearizations, newton_solver, primitives, relative_error, slowly
from .oracle import all_adjoints, assert_equal, one_by_one

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


def _cast(tree, dtype):
    return jax.tree.map(lambda x: x.astype(dtype), tree)


# ---- What is found ----


def _found(field, y0, solver=None, terms=None):
    solver = newton_solver() if solver is None else solver
    terms = diffrax.ODETerm(field) if terms is None else terms
    return solver.quadratures(terms, 0.0, 1.0, y0, None)


def test_the_leaves_that_nothing_depends_on_are_found():
    found = newton_solver().quadratures(_TERM, 0.0, 1.0, _Y0, _W)
    assert found == {"log_p": True, "z": False, "cost": True}


def test_dataflow_decides_and_not_the_value():
    y0 = {"z": jnp.ones(2), "q": 0.0, "none": None}
    total = lambda y: jnp.sum(y["z"])

    def loop(body):
        def z(t, y):
            carry = y["z"], y["q"]
            return lax.fori_loop(0, 3, lambda _, c: (body(*c), c[1]), carry)[0]

        return z

    def branch(t, y):
        return lax.cond(t > 0.5, lambda: y["z"], lambda: y["z"] * y["q"])

    flows = {
        "unused": lambda t, y: y["z"],
        "times zero": lambda t, y: y["z"] + 0 * y["q"],
        "in a branch": branch,
        "carried along": loop(lambda z, q: jnp.sin(z)),
        "through a loop": loop(lambda z, q: z * q),
    }
    fields = {
        name: lambda t, y, args, z=z: dict(y, z=z(t, y), q=total(y))
        for name, z in flows.items()
    }
    fields |= {
        "decays": lambda t, y, args: dict(y, q=-y["q"]),
        "its shape": lambda t, y, args: dict(y, q=jnp.zeros_like(y["q"])),
    }
    found = {name: _found(field, y0)["q"] for name, field in fields.items()}
    assert found == {
        "unused": True,
        "times zero": False,
        "in a branch": False,
        "carried along": True,
        "through a loop": False,
        "decays": False,
        "its shape": True,
    }
    assert _found(fields["unused"], y0) == {"z": False, "q": True, "none": None}


def test_a_chain_of_quadratures_loses_only_its_end():
    field = lambda t, y, args: (jnp.sin(y[0]), y[0], y[1])
    assert _found(field, (1.0, 0.0, 0.0)) == (False, False, True)


def test_everything_or_nothing():
    assert _found(lambda t, y, args: jnp.sin(t) * jnp.ones(2), jnp.ones(2)) is True
    assert _found(lambda t, y, args: -y, jnp.ones(2)) is False


def test_fields_of_several_terms():
    y0 = jnp.ones(2), jnp.zeros(())
    vf = lambda t, y, args: (y[1], -y[0])
    splitting = newton_solver(diffrax.SemiImplicitEuler())
    terms = diffrax.ODETerm(lambda t, y, args: y), diffrax.ODETerm(lambda t, y, args: y)
    assert _found(vf, (jnp.ones(2), jnp.ones(2)), splitting, terms) == (False, False)

    explicit = diffrax.ODETerm(lambda t, y, args: (-y[0], jnp.sum(y[0])))
    implicit = diffrax.ODETerm(lambda t, y, args: (jnp.sin(y[0]), jnp.zeros_like(y[1])))
    both = diffrax.MultiTerm(explicit, implicit)
    assert _found(None, y0, newton_solver(diffrax.KenCarp3()), both) == (False, True)


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

    solver = newton_solver(Projected(diffrax.Euler()))
    assert solver.quadratures(_TERM, 0.0, 1.0, _Y0, _W) == dict.fromkeys(_Y0, False)


# ---- What comes out ----


def _solve(term, solver, y0, args, t1: Any = 1.0, **kwargs: Any):
    kwargs = {"stepsize_controller": WholeInterval(), "adjoint": DEERAdjoint()} | kwargs
    t0 = jnp.zeros_like(t1)
    return diffrax.diffeqsolve(term, solver, t0, t1, None, y0, args, **kwargs)


def _sequential(solver, y0, args, t1=1.0):
    windows = jnp.zeros(1), jnp.asarray(t1)[None]
    return one_by_one(_TERM, solver, windows, _N, y0, args).last()


_SOLVERS = {
    "euler": diffrax.Euler(),
    "dopri5": diffrax.Dopri5(),
    "bosh3": diffrax.Bosh3(),
    "half": diffrax.HalfSolver(diffrax.Heun()),
    "rosenbrock": ExponentialRosenbrockEuler(),
    "implicit_euler": diffrax.ImplicitEuler(root_finder=_ROOT),
    "kvaerno3": diffrax.Kvaerno3(root_finder=_ROOT),
}


@pytest.mark.parametrize(
    "name",
    [name if name in ("dopri5", "rosenbrock") else slowly(name) for name in _SOLVERS],
)
def test_value_and_gradient_are_those_of_the_sequential_solver(name):
    solver = _SOLVERS[name]

    def loss(found, y0, args, t1, factor):
        if found:
            y1 = _solve(_TERM, newton_solver(solver, num_steps=_N), y0, args, t1).ys
            y1 = jax.tree.map(lambda y: y[-1], y1)
        else:
            prepared = (
                eqx.tree_at(
                    lambda s: s.scan_kind,
                    solver,
                    "bounded",
                    is_leaf=lambda x: x is None,
                )
                if hasattr(solver, "scan_kind")
                else solver
            )
            y1 = _sequential(prepared, y0, args, t1)
        return factor * jnp.sin(y1["log_p"]) + jnp.sum(y1["z"] ** 2 * y1["cost"]), y1

    @jax.jit
    def both(*parameters):
        run = lambda found: jax.value_and_grad(lambda p: loss(found, *p), has_aux=True)(
            parameters
        )
        return run(True), run(False)

    found, expected = both(_Y0, _W, jnp.array(1.1), jnp.array(0.7))
    assert_equal(found, expected, 1e-9)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", [*linearizations, "in sequence"])
def test_it_is_that_of_the_coupled_system(name, dtype):
    eps = float(jnp.finfo(dtype).eps)
    if name == "in sequence":
        solver = DEERSolver(num_steps=_N, forward=SequentialForward())
        tolerance = 16 * eps
    else:
        solver = newton_solver(num_steps=_N, linearization=linearizations[name])
        # That of the iteration itself.
        tolerance = eps**0.75
    y0, args = _cast(_Y0, dtype), _cast(_W, dtype)

    @jax.jit
    def both(y0, args):
        t1 = jnp.ones((), dtype)
        run = lambda field: _solve(diffrax.ODETerm(field), solver, y0, args, t1).ys
        return run(_field), run(_coupled_field)

    found, expected = both(y0, args)
    assert jax.tree.all(jax.tree.map(lambda x: x.dtype == dtype, found))
    assert relative_error(found, expected) < tolerance


def test_a_block_is_one_of_the_coupled_components():
    solver = newton_solver(
        num_steps=_N, linearization=BlockDiagonalJacobian(block_size=2)
    )
    found = _solve(_TERM, solver, _Y0, _W).ys
    expected = _sequential(diffrax.Dopri5(), _Y0, _W)
    assert_equal(jax.tree.map(lambda y: y[-1], found), expected, 1e-12)


@pytest.mark.parametrize(
    "adjoint", ["deer", *[slowly(name) for name in all_adjoints if name != "deer"]]
)
def test_every_adjoint_and_every_way_to_save(adjoint):
    ts = jnp.array([0.1, 0.35, 0.8])

    @jax.jit
    def run(y0):
        saveat = diffrax.SaveAt(ts=ts, t1=True, dense=True, solver_state=True)
        solver = newton_solver(num_steps=_N)
        kwargs: Any = dict(saveat=saveat, adjoint=all_adjoints[adjoint])
        sol = _solve(_TERM, solver, y0, _W, **kwargs)
        again = _solve(_TERM, solver, y0, _W, solver_state=sol.solver_state, **kwargs)
        return sol.ys, sol.evaluate(0.35), sol.solver_state, again.solver_state

    ys, between, state, again = run(_Y0)
    steps = one_by_one(
        _TERM, diffrax.Dopri5(), (jnp.zeros(1), jnp.ones(1)), _N, _Y0, _W
    )
    expected = steps.at(jnp.append(ts, 1.0))
    assert_equal(ys, expected, 1e-12)
    assert_equal(between, jax.tree.map(lambda y: y[1], expected), 1e-12)
    assert state.ys.shape == (_N + 1, 5)
    assert int(again.num_iterations) < int(state.num_iterations)


def test_the_controller_sees_the_error_of_a_quadrature():
    # Nothing happens but the quadrature of a narrow peak.
    field = lambda t, y, args: (jnp.zeros_like(y[0]), 1 / (1e-3 + (t - 0.3) ** 2))
    controller = diffrax.PIDController(rtol=1e-8, atol=1e-8)
    y0 = jnp.ones(1), jnp.zeros(())
    solver = newton_solver(num_steps=8)
    saveat = diffrax.SaveAt(t1=True)
    for adjoint in (DEERAdjoint(), diffrax.RecursiveCheckpointAdjoint()):
        sol = _solve(
            diffrax.ODETerm(field),
            solver,
            y0,
            None,
            stepsize_controller=controller,
            adjoint=adjoint,
            saveat=saveat,
        )
        root = 1e-3**0.5
        expected = (np.arctan(0.7 / root) + np.arctan(0.3 / root)) / root
        assert abs(sol.ys[1][-1] / expected - 1) < 1e-7
        assert sol.stats["num_accepted_steps"] > 3


def test_events_see_quadratures():
    event = diffrax.Event(lambda t, y, args, **_: y["cost"][0] - 0.4, _ROOT)
    sol = _solve(_TERM, newton_solver(num_steps=_N), _Y0, _W, event=event)
    assert sol.result == diffrax.RESULTS.event_occurred
    assert abs(sol.ys["cost"][-1, 0] - 0.4) < 1e-10


def test_nothing_but_quadratures():
    sol = jax.jit(
        lambda y0, rate: _solve(
            diffrax.ODETerm(lambda t, y, a: a * t**4 * jnp.ones(3)),
            newton_solver(num_steps=_N),
            y0,
            rate,
        )
    )(jnp.zeros(3), jnp.array(5.0))
    np.testing.assert_allclose(sol.ys[-1], 1.0, rtol=1e-14)
    assert sol.stats["num_newton_iterations"] == 0


@pytest.mark.parametrize(
    "solver",
    [diffrax.ImplicitEuler(), diffrax.Kvaerno3(), ExponentialRosenbrockEuler()],
    ids=lambda solver: type(solver).__name__,
)
def test_nothing_but_quadratures_by_a_solver_that_needs_equations(solver):
    term = diffrax.ODETerm(lambda t, y, a: jnp.cos(a * t) * jnp.ones(2))
    run = lambda solver, steps: jax.jit(
        lambda rate: (
            diffrax.diffeqsolve(
                term,
                solver,
                0.0,
                1.0,
                None,
                jnp.zeros(2),
                rate,
                stepsize_controller=steps,
            ).ys
        )
    )(jnp.array(2.0))
    steps = diffrax.StepTo(jnp.linspace(0.0, 1.0, 9))
    expected = run(prepare(solver, 1e-16), steps)
    found = run(newton_solver(solver, num_steps=8), WholeInterval())
    np.testing.assert_allclose(found, expected, rtol=1e-13)


@pytest.mark.slow
def test_forward_mode_second_derivatives_and_batches():
    def loss(solve):
        def value(args):
            y1 = solve(args)
            return jnp.sin(y1["log_p"]) + jnp.sum(y1["z"] ** 2 * y1["cost"])

        return value

    def deer(args):
        ys = _solve(_TERM, newton_solver(num_steps=_N), _Y0, args).ys
        return jax.tree.map(lambda y: y[-1], ys)

    solver = eqx.tree_at(
        lambda s: s.scan_kind, diffrax.Dopri5(), "bounded", is_leaf=lambda x: x is None
    )

    @jax.jit
    def derivatives(batch, direction):
        def of(solve):
            f = loss(solve)
            second = jax.vmap(lambda w: jax.jvp(jax.grad(f), (w,), (direction,))[1])(
                batch
            )
            return second, jax.jvp(f, (batch[0],), (direction,))

        return of(deer), of(lambda args: _sequential(solver, _Y0, args))

    batch = jnp.stack([_W, 0.5 * _W])
    found, expected = derivatives(batch, jnp.cos(jnp.arange(6.0)).reshape(2, 3))
    assert_equal(found, expected, 1e-9)


# ---- What it costs ----


def _with_a_mark(t, y, args):
    # No other part of the solve contains an error function.
    z, _ = y
    return jnp.sin(args * z), jnp.sum(lax.erf(args * z))


def test_the_field_of_a_quadrature_is_evaluated_once():
    evaluations = []

    def count(x):
        evaluations.append(x.size // 2)
        return np.sum(np.sin(x), axis=-1)

    def field(t, y, args):
        z, _ = y
        shape = jax.ShapeDtypeStruct((), z.dtype)
        q = jax.pure_callback(count, shape, z, vmap_method="expand_dims")
        return jnp.sin(3 * z), q

    y0 = jnp.array([0.2, 1.0]), jnp.zeros(())
    sol = jax.jit(
        lambda: _solve(diffrax.ODETerm(field), newton_solver(num_steps=_N), y0, None)
    )()
    jax.block_until_ready(sol)
    assert sol.stats["num_newton_iterations"] > 1
    # Two of the seven stages of Dopri5 have the weight zero.
    assert sum(evaluations) == 5 * _N


def test_a_quadrature_is_not_part_of_the_iteration():
    y0 = jnp.array([0.2, 1.0]), jnp.zeros(())
    solve = lambda field, args: _solve(
        diffrax.ODETerm(field), newton_solver(num_steps=_N), y0, args
    ).ys[1]

    def loops(field):
        jaxpr = jax.make_jaxpr(lambda a: solve(field, a))(jnp.array(1.0))
        found = []
        for equation in primitives(jaxpr):
            if equation.primitive.name == "while":
                inside = primitives(equation.params["body_jaxpr"])
                found.append("erf" in {e.primitive.name for e in inside})
        return found

    coupled = lambda t, y, args: jax.tree.map(
        lambda x: x + 0 * y[1], _with_a_mark(t, y, args)
    )
    assert any(loops(coupled))
    assert not any(loops(_with_a_mark))
    # Second derivatives of it would be products of the derivative with its argument:
    # the first derivative of `erf` is an exponential, of which there is one a node.
    jaxpr = jax.make_jaxpr(jax.grad(lambda a: jnp.sum(solve(_with_a_mark, a))))
    names = [e.primitive.name for e in primitives(jaxpr(jnp.array(1.0)))]
    assert 0 < names.count("erf") <= 6


def test_backsolve_of_many_parameters():
    """The gradient that `BacksolveAdjoint` integrates is a quadrature."""
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(100, 100)) / 10)

    def loss(weights, adjoint):
        sol = _solve(
            diffrax.ODETerm(lambda t, y, w: jnp.tanh(w @ y)),
            newton_solver(num_steps=_N),
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


# ---- What if it fails ----


def _fails_late(t, y, args):
    # Fine for z, but q has no value beyond z = 1.
    z, _ = y
    return args * jnp.ones_like(z), jnp.sqrt(1 - z)


def test_a_quadrature_without_value_is_a_failure():
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


@pytest.mark.parametrize("adjoint", ["deer", "default"])
def test_a_rejected_window_leaves_no_nan_in_the_gradient(adjoint):
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
            adjoint=all_adjoints[adjoint],
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
