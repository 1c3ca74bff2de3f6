"""A canary for everything that the library relies on, and diffrax does not promise.

If one of these fails, `_diffrax_conventions.py` has to change with diffrax.
"""

import dataclasses
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

from diffrax_deer._diffrax_conventions import (
    clip_to_end,
    direction,
    final_state,
    has_constant_factors,
    saved,
    takes_controller_tolerances,
)

_LAST_TRUE = f"Last true in diffrax 0.7.2; this is {diffrax.__version__}."


def _solve(solver, t0, t1, dt0, **kwargs: Any):
    return diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: -y),
        solver,
        t0,
        t1,
        dt0,
        jnp.array(2.0),
        **kwargs,
    )


def test_root_finders_that_take_the_tolerances_of_the_controller_are_marked():
    marked = diffrax.Kvaerno3(), diffrax.Kvaerno5(), diffrax.ImplicitEuler()
    own = diffrax.VeryChord(rtol=1e-3, atol=1e-3), optx.Newton(rtol=1e-6, atol=1e-6)
    filled_in = diffrax.with_stepsize_controller_tols(optx.Chord)()
    for solver in (*marked, diffrax.Kvaerno4(root_finder=filled_in)):
        assert takes_controller_tolerances(solver), _LAST_TRUE
    for root_finder in own:
        solver = diffrax.Kvaerno3(root_finder=root_finder)
        assert not takes_controller_tolerances(solver), _LAST_TRUE


_PID = diffrax.PIDController(rtol=1e-3, atol=1e-3, pcoeff=0.2, icoeff=0.4)


@pytest.mark.parametrize(
    "controller", [_PID, diffrax.ConstantStepSize()], ids=["pid", "constant"]
)
def test_factors_of_these_controllers_have_no_derivative(controller):
    """The ends of steps have one with respect to t0, but not to the solution."""
    assert has_constant_factors(controller)

    def second_step(y0, y1, error, t0):
        term = diffrax.ODETerm(lambda t, y, args: -y)
        func = lambda terms, t, y, args: -y
        t1, state = controller.init(term, t0, 9.0, y0, 0.1, None, func, 3)
        keep, t0, t1, _, _, _ = controller.adapt_step_size(
            t0, t1, y0, y1, None, error, 3, state
        )
        return t1, (keep, t1 - t0)

    arguments = jnp.array(2.0), jnp.array(1.8), jnp.array(1e-4), jnp.array(0.3)
    (*solution, time), (keep, length) = jax.grad(
        second_step, (0, 1, 2, 3), has_aux=True
    )(*arguments)
    np.testing.assert_array_equal(solution, 0.0, _LAST_TRUE)
    assert time > 0.9
    assert keep
    # The error has made the step longer, so that there would be a derivative.
    assert (float(length) > 0.15) == (controller is _PID)


def test_factors_of_other_controllers_may_have_one():
    clipped = diffrax.ClipStepSizeController(_PID, step_ts=jnp.array([1.0]))
    assert not has_constant_factors(clipped)
    assert not has_constant_factors(diffrax.StepTo(jnp.array([0.0, 1.0])))


class _Direction(diffrax.Euler):
    """Its states are the directions of the times in which it was called."""

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        y1 = jnp.asarray(direction(terms), y0.dtype) + 0 * y0
        increases = jnp.where(t1 > t0, 1.0, jnp.nan)
        info = {"y0": y0, "y1": y1}
        return y1 * increases, None, info, None, diffrax.RESULTS.successful


@pytest.mark.parametrize("way", [1, -1])
def test_solvers_are_called_in_a_time_that_increases_and_know_the_direction(way):
    y1 = _solve(_Direction(), 0.5, 0.5 + way, 0.25 * way).ys[-1]
    assert y1 == way, _LAST_TRUE
    # Also of several terms, and as one of its own.
    terms = diffrax.ODETerm(lambda t, y, args: y), diffrax.ODETerm(lambda *args: 0.0)
    assert direction(terms) == direction(terms[0]) == 1


class _RejectOnce(diffrax.AbstractStepSizeController):
    """Proposes what it is given, after the first step was rejected."""

    dt: float = 0.25
    reject: bool = False

    def wrap(self, direction):
        return self

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        return t0 + dt0, jnp.array(self.reject)

    def adapt_step_size(
        self, t0, t1, y0, y1_candidate, args, y_error, error_order, controller_state
    ):
        keep = ~controller_state
        t_prev = jnp.where(keep, t1, t0)
        following = t_prev + self.dt
        return (
            keep,
            t_prev,
            following,
            False,
            jnp.array(False),
            diffrax.RESULTS.successful,
        )


@pytest.mark.parametrize("reject", [False, True])
def test_steps_are_clipped_to_the_end_as_diffrax_clips_them(reject):
    # The last step would be up to 200 rounding units long, or end as near to the end.
    units = np.arange(-200, 200, 7)
    ends = 1.0 + units * np.finfo(np.float64).eps
    dt = 1.0 if reject else 0.25
    controller: Any = _RejectOnce(dt=dt, reject=reject)

    @jax.jit
    @jax.vmap
    def of_diffrax(t1):
        saveat = diffrax.SaveAt(steps=True)
        kwargs = dict(stepsize_controller=controller, saveat=saveat, max_steps=8)
        sol = _solve(diffrax.Euler(), 0.0, t1, 0.25, **kwargs)
        return sol.ts, sol.stats["num_accepted_steps"]

    @jax.jit
    @jax.vmap
    def of_the_library(t1):
        t_prev, t_next = jnp.array(0.0), jnp.minimum(0.25, t1)
        ts, state = [], jnp.array(reject)
        for _ in range(8):
            running = t_prev < t1
            keep, t_prev_new, t_next_new, _, state_new, _ = controller.adapt_step_size(
                t_prev, t_next, None, None, None, None, None, state
            )
            t_prev_new = jnp.minimum(t_prev_new, t1)
            t_next_new = clip_to_end(t_prev_new, t_next_new, t1, keep)
            ts.append(jnp.where(running & keep, t_prev_new, jnp.inf))
            t_prev = jnp.where(running, t_prev_new, t_prev)
            t_next = jnp.where(running, t_next_new, t_next)
            state = state & ~running | state_new & running
        return jnp.sort(jnp.stack(ts)), jnp.sum(jnp.isfinite(jnp.stack(ts)))

    (ts, counts), (found, found_counts) = of_diffrax(ends), of_the_library(ends)
    np.testing.assert_array_equal(found_counts, counts, _LAST_TRUE)
    np.testing.assert_array_equal(found, ts, _LAST_TRUE)
    # Both are seen: a last step that joins the one before, and one of its own.
    kinds = {
        (int(n), round(float(t), 6)) for n, t in zip(counts, ts[:, 0], strict=True)
    }
    assert len(kinds) == 2


class _Copy(diffrax.RecursiveCheckpointAdjoint):
    """Diffrax's own loop, of which every field is handed over by the library."""

    def loop(self, *, init_state, saveat, event, **kwargs):
        done, stats = super().loop(
            init_state=init_state, saveat=saveat, event=event, **kwargs
        )
        # What `DEERAdjoint` reads.
        read = init_state.y, init_state.tprev, init_state.tnext
        assert len(jax.tree.leaves(read)) == 3, _LAST_TRUE
        if event is not None:
            assert init_state.event_values is not None, _LAST_TRUE
        is_sub = lambda x: isinstance(x, diffrax.SubSaveAt)
        copy = lambda _, init, state: saved(init, state.ts, state.ys)
        state = final_state(
            init_state,
            save_state=jax.tree.map(
                copy,
                saveat.subs,
                init_state.save_state,
                done.save_state,
                is_leaf=is_sub,
            ),
            **{name: getattr(done, name) for name in self.written},
        )
        return state, stats | {"copied": True}

    @property
    def written(self):
        names = "dense_ts", "dense_infos", "dense_save_index", "solver_state"
        names += "controller_state", "made_jump", "progress_meter_state"
        names += "num_steps", "num_accepted_steps", "num_rejected_steps"
        return *names, "result", "event_mask"


@pytest.mark.parametrize("has_event", [False, True])
def test_loop_state_has_the_fields_that_are_read_and_written(has_event):
    """With no other field of its state replaced the solution is that of diffrax."""
    sub, ts = diffrax.SubSaveAt, jnp.array([0.2, 0.7])
    saveat = diffrax.SaveAt(
        subs=[
            sub(t0=True, ts=ts, steps=2),
            {"end": sub(t1=True, fn=lambda t, y, a: 2 * y)},
        ],
        dense=True,
        solver_state=True,
        controller_state=True,
        made_jump=True,
    )
    event = diffrax.Event(lambda t, y, args, **_: y < 0.6) if has_event else None

    def run(adjoint):
        kwargs = dict(saveat=saveat, stepsize_controller=_PID, max_steps=32)
        return _solve(
            diffrax.Bosh3(), 0.0, 2.0, 0.1, adjoint=adjoint, event=event, **kwargs
        )

    found, expected = jax.jit(
        lambda: (run(_Copy()), run(diffrax.RecursiveCheckpointAdjoint()))
    )()
    assert found.stats.pop("copied"), _LAST_TRUE
    fields = [field.name for field in dataclasses.fields(found)]
    for name in fields:
        a, b = (jax.tree.leaves(getattr(sol, name)) for sol in (found, expected))
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y, f"{name}: {_LAST_TRUE}")
    occurred = found.result == diffrax.RESULTS.event_occurred
    assert bool(occurred) == has_event
