"""`advise` on problems whose numbers are known."""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffrax_deer
from diffrax_deer import (
    Advice,
    DEERSolver,
    Equidistributed,
    Newton,
    WholeInterval,
    advise,
)
from diffrax_deer._advise import _lyapunov

from .helpers import problems, relative_error

_decay = diffrax.ODETerm(lambda t, y, args: -y)


def _ask(**changes: Any) -> Advice:
    good: dict[str, Any] = {"terms": _decay, "t0": 0.0, "t1": 1.0, "y0": jnp.ones(2)}
    return advise(**good | changes)


def _written(label: str) -> tuple[Any, ...]:
    """What a label says, where it is pasted."""
    return eval(label, vars(diffrax) | vars(diffrax_deer))


def _check_choice(advice: Advice) -> None:
    """The fastest candidate, unless the sequential one is about as fast."""
    recommended = advice.solver, advice.stepsize_controller, advice.adjoint
    candidates = {label: _written(label) for label in advice.seconds}
    (chosen,) = [x for x, y in candidates.items() if eqx.tree_equal(y, recommended)]
    first = advice.sequential_solver
    (sequential,) = [x for x, y in candidates.items() if eqx.tree_equal(y[0], first)]
    fastest = min(advice.seconds.values())
    if advice.seconds[sequential] < 1.15 * fastest:
        assert chosen == sequential
    else:
        assert advice.seconds[chosen] == fastest


def _grids(advice: Advice) -> list[DEERSolver]:
    """The solvers of the candidates that have one window."""
    found = [_written(label) for label in advice.seconds]
    return [x for x, controller, _ in found if type(controller) is WholeInterval]


def _moving(advice: Advice) -> list[DEERSolver]:
    """Those of them whose steps are not equal."""
    return [x for x in _grids(advice) if type(x.grid) is Equidistributed]


def _adaptive(terms: Any, solver: Any, problem: Any, tolerance: float) -> Any:
    return diffrax.diffeqsolve(
        terms,
        solver,
        problem.t0,
        problem.t1,
        None,
        problem.y0,
        problem.args,
        stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance / 1e3),
        max_steps=2**14,
    )


# ---- Measured ----


@pytest.mark.parametrize("direction", [1, -1])
def test_the_lyapunov_exponent_of_a_linear_field_is_an_eigenvalue(direction: int):
    values = np.array([-3.0, -0.6, -0.2])
    rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))
    matrix = jnp.asarray(rotation @ np.diag(values) @ rotation.T)
    terms = diffrax.ODETerm(lambda t, y, args: args @ y)
    ts = direction * np.linspace(0, 20, 201)
    problem = terms, jnp.ones(3), matrix
    lyapunov, size = _lyapunov(DEERSolver(), problem, ts, np.abs(np.diff(ts)))
    # Backwards the fastest decay is the fastest growth.
    assert lyapunov == pytest.approx(-0.2 if direction == 1 else 3.0, abs=5e-3)
    assert size == 3


def test_an_oscillator_is_solved_to_the_tolerance_by_what_is_recommended():
    problem = problems["fitzhugh_nagumo"].cast(jnp.float64)._replace(t1=100.0)
    terms = diffrax.ODETerm(problem.field)
    advice = advise(terms, 0.0, 100.0, problem.y0, problem.args)
    _check_choice(advice)
    sequential = _adaptive(terms, diffrax.Dopri5(), problem, 1e-5)
    assert advice.num_steps == sequential.stats["num_accepted_steps"]
    assert advice.num_steps <= advice.grid_steps <= 4 * advice.num_steps
    assert not advice.stiff
    # It comes to a limit cycle, along which nothing grows or decays.
    assert abs(advice.lyapunov) < 0.05
    cold, warm = advice.cold_iterations, advice.warm_iterations
    assert cold is not None and warm is not None and 1 <= warm <= cold <= 30
    # The sequential solver, its steps, where the error is, and equal ones made by both
    # methods.
    assert len(advice.seconds) == 5
    steps = [x.num_steps for x in _moving(advice)]
    assert steps == [advice.equidistributed_steps]
    assert steps[0] == int(1.1 * advice.num_steps) + 2
    assert sum("Newton()" in label for label in advice.seconds) == 1

    solved = diffrax.diffeqsolve(
        terms,
        advice.solver,
        0.0,
        100.0,
        None,
        problem.y0,
        problem.args,
        stepsize_controller=advice.stepsize_controller,
        adjoint=advice.adjoint,
        max_steps=advice.max_steps,
    )
    expected = _adaptive(terms, diffrax.Dopri8(), problem, 1e-12)
    assert relative_error(solved.ys, expected.ys) < 1e-3

    lines = str(advice).splitlines()
    assert 10 < len(lines) < 20
    for shown in [*advice.seconds, "num_steps", f"max_steps={advice.max_steps}"]:
        assert any(shown in line for line in lines)


def test_lorenz_is_chaotic_and_not_offered_newtons_method():
    problem = problems["lorenz"].cast(jnp.float64)
    advice = advise(diffrax.ODETerm(problem.field), 0.0, 40.0, problem.y0, problem.args)
    _check_choice(advice)
    # 0.906 in the long run.
    assert 0.6 < advice.lyapunov < 1.2
    assert advice.duration == 40
    assert not any("Newton" in label for label in advice.seconds)
    assert advice.cold_iterations is None and advice.warm_iterations is None


def _robertson(t, y, args):
    del t
    a, b, c = y
    slow, medium, fast = args[0] * a, args[1] * b * c, args[2] * b**2
    return jnp.stack([medium - slow, slow - medium - fast, fast])


def test_robertson_is_stiff_and_gets_an_implicit_solver():
    terms, args = diffrax.ODETerm(_robertson), jnp.array([0.04, 1e4, 3e7])
    y0 = jnp.array([1.0, 0.0, 0.0])
    advice = advise(terms, 0.0, 40.0, y0, args, max_steps=4096)
    _check_choice(advice)
    assert advice.stiff
    assert type(advice.sequential_solver) is diffrax.Kvaerno5
    problem = problems["linear"]._replace(y0=y0, args=args, t1=40.0)
    sequential = _adaptive(terms, diffrax.Kvaerno5(), problem, 1e-5)
    assert advice.num_steps == sequential.stats["num_accepted_steps"]
    # Its steps grow by orders of magnitude: none of one window are equal.
    assert _grids(advice) == _moving(advice)
    assert all("Kvaerno5" in label for label in advice.seconds)


def test_a_solver_of_ones_own_is_kept_and_a_quadrature_is_no_part_of_the_state():
    # Integers, a structured state, a batch, and what is no array among the arguments.
    def field(t, y, args):
        return -jnp.sin(t) - args["rate"] * y[0], jnp.sum(y[0])

    solver = DEERSolver(diffrax.HalfSolver(diffrax.Euler()), 3, Newton(rtol=1e-9))
    y0, args = (jnp.array([1, 2]), 0), {"rate": jnp.array(1.0), "name": "rate"}
    advice = advise(
        diffrax.ODETerm(field), 0, 5, y0, args, solver=solver, batch_size=3, rtol=1e-2
    )
    _check_choice(advice)
    assert advice.state_size == 2 and advice.batch_size == 3
    assert advice.lyapunov == pytest.approx(-1, abs=0.1)
    assert advice.warm_iterations is not None
    first, *others = [_written(label)[0] for label in advice.seconds]
    assert type(first) is diffrax.HalfSolver
    steps = [1, advice.equidistributed_steps, advice.grid_steps]
    assert [x.num_steps for x in others] == steps
    assert all(x.method == solver.method for x in others)


def test_equal_steps_that_miss_something_are_left_out():
    # A kick in the beginning, seen by a few short steps.
    field = lambda t, y, args: jnp.cos(t) - 0.1 * y + 100 * jnp.exp(-((t / 0.01) ** 2))
    advice = advise(diffrax.ODETerm(field), 0.0, 100.0, jnp.array(0.0))
    _check_choice(advice)
    assert advice.grid_steps <= 4 * advice.num_steps
    assert _grids(advice) == _moving(advice) != []


# ---- Refused ----


def test_bad_arguments_are_explained():
    path = diffrax.VirtualBrownianTree(0.0, 1.0, 1e-3, (), jax.random.key(0))
    noise = diffrax.ControlTerm(lambda t, y, args: y, path)
    for changes, error, match in [
        ({"terms": lambda t, y, args: -y}, TypeError, "ODETerm"),
        ({"terms": diffrax.MultiTerm(_decay, noise)}, ValueError, "Brownian"),
        ({"t1": 0.0}, ValueError, "two different"),
        ({"t1": float("inf")}, ValueError, "finite"),
        ({"y0": ()}, ValueError, "no number"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"rtol": 0.0}, ValueError, "rtol"),
        ({"atol": -1.0}, ValueError, "atol"),
        ({"max_steps": 0}, ValueError, "max_steps"),
        ({"solver": diffrax.Dopri5()}, TypeError, "DEERSolver"),
        ({"solver": DEERSolver(diffrax.Euler())}, ValueError, "error"),
    ]:
        with pytest.raises(error, match=match):
            _ask(**changes)


def test_inside_of_jit_is_refused():
    inside = lambda y0: _ask(y0=y0).num_steps
    closed_over = jax.jit(lambda y: (_ask(), y)[1])
    for function in (jax.jit(inside), jax.vmap(inside), closed_over):
        with pytest.raises(ValueError, match="outside of"):
            function(jnp.ones(2))


def test_a_custom_vjp_is_explained():
    @jax.custom_vjp
    def field(y):
        return -y

    field.defvjp(lambda y: (-y, None), lambda _, g: (-g,))
    with pytest.raises(TypeError, match=r"jax\.custom_jvp"):
        _ask(terms=diffrax.ODETerm(lambda t, y, args: field(y)))


def test_a_solution_that_blows_up_names_what_was_tried():
    terms = diffrax.ODETerm(lambda t, y, args: y**2)
    match = r"Dopri5\(\).* in 256 steps, nor `Kvaerno5\(\)` in 25"
    with pytest.raises(RuntimeError, match=match):
        advise(terms, 0.0, 2.0, jnp.array(1.0), max_steps=256)
