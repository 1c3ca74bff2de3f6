"""`DEERAdjoint`: the solve without the loop that diffrax has around it."""

import functools as ft
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import PyTree

from .._defaults import records_windows
from .._diffrax_conventions import final_state, has_constant_factors, saved
from .._gradient import SequentialGradient
from .._method import Sequential
from .._ode.deer_solver import DEERSolver
from .._ode.solver_step import SolverStep
from .._prefix import select
from .._ravel import ravel
from .._varying import uniform
from .adaptive_windows import adaptive_windows
from .events import EventSearch
from .loop_state import LoopState, Outcome, Windows, as_arrays
from .saveat import Final, SaveTimes, dense, interpolation, save
from .static_windows import static_windows


class DEERAdjoint(diffrax.AbstractAdjoint):
    r"""Solves and differentiates `DEERSolver`'s windows in parallel.

    The values are those that any other adjoint gives, found with less latency:

    - static windows, those of `WholeInterval` and `StepTo`, are solved all together,
        without any loop around them, and events are looked for at every inner step;
    - windows of `PIDController` and `ConstantStepSize` are found one after another, and
        then differentiated together, however short they are. On a CPU that is faster
        for a field of few parameters and components (at most 64 and 11), where one step
        has little to do;
    - in both cases all save times are interpolated at once, and value and gradient
        together take one solve, since the converged trajectory is kept.

    Anything else is left to `diffrax.RecursiveCheckpointAdjoint`: networks under a
    controller on a CPU, other controllers, and under any controller events,
    `SaveAt(steps=...)`, `SaveAt(dense=True)`, many save times, `max_steps=None`, and
    windows of which `max_steps` would be too many to record, more than 2^15 numbers.

    Derivatives are exact with respect to `y0`, `args`, all that the vector field closes
    over, `t0`, `t1` and save times: in forward and reverse mode and of any order, but
    where the solve is left to diffrax, whose loop has gradients only.

    `sol.stats` has, beside diffrax's numbers of steps (= windows) made, accepted and
    rejected: `method` and `gradient`, which were used; `num_newton_iterations`, all of
    them, `max_newton_iterations`, those of the window with most, and `residual`, the
    largest of all accepted windows, in the units of y; `largest_error`, that of any
    step, in units of the tolerance of the solver's `grid`. Windows that are solved
    together count as one here. `None` where nothing was counted or measured.

    **Raises:** `ValueError` for any other solver than `DEERSolver`.

    **Cost** for N steps a window, W windows, D state components: memory O(W N D), with
    W = `max_steps` where a controller chooses the windows. With `ParallelGradient`,
    O(N D²) more for the windows that are differentiated together: all of static
    windows, otherwise a few.
    """

    def loop(self, **kwargs: Any) -> Any:
        """Called by `diffrax.diffeqsolve`, with the arguments of `AbstractAdjoint`."""
        kwargs = uniform(kwargs)
        _check_solver(kwargs["solver"])
        init_state, saveat = kwargs["init_state"], kwargs["saveat"]
        windows = _windows(kwargs)
        state = _first_state(init_state, windows)
        meter, ends = init_state.progress_meter_state, None
        # What a step hands on to the next is not known for many at once.
        inner, x = windows.inner_step(state.y), (windows.t0, windows.t1)
        is_single = windows.solver.makes_single_steps
        has_memory = is_single and inner.has_memory(x, ravel(state.y)[0])
        if not kwargs["passed_controller_state"] and not has_memory:
            ends = windows.static_ends(state.t_next)
        if ends is not None and len(ends) > 1:
            outcome = static_windows(windows, state, ends)
            meter = windows.advance(meter, outcome.state.t_prev)
        elif not has_memory and _can_record(windows, state):
            outcome, meter = adaptive_windows(windows, state, meter)
        else:
            final, stats = diffrax.RecursiveCheckpointAdjoint().loop(**kwargs)
            single = Sequential(), SequentialGradient()
            chosen = single if is_single else windows.choices(state.y)
            return final, stats | _statistics(None, None, *chosen)
        return _finish(windows, outcome, meter, saveat, init_state)


def _windows(arguments: dict[str, Any]) -> Windows:
    """What there is to solve, from the arguments of `AbstractAdjoint.loop`."""
    names = "t0", "t1", "dt0", "terms", "solver", "saveat", "stepsize_controller"
    passed_on = {name: arguments[name] for name in (*names, "max_steps")}
    args, event, saveat = (arguments[name] for name in ("args", "event", "saveat"))
    call = lambda function, t, y: function(t, y, args, **passed_on)
    subs = jax.tree.leaves(saveat.subs, is_leaf=_is_sub)
    # The times of all subs, together; those of one are sorted.
    all_ts, places = [sub.ts for sub in subs if sub.ts is not None], None
    is_sorted = len(all_ts) < 2
    all_ts = jnp.concatenate([jnp.asarray(arguments["t0"])[None][:0], *all_ts])
    if not is_sorted:
        order = jnp.argsort(lax.stop_gradient(all_ts))
        all_ts, places = all_ts[order], jnp.argsort(order)
    return Windows(
        solver=arguments["solver"],
        terms=arguments["terms"],
        args=args,
        controller=arguments["stepsize_controller"],
        event=None if event is None else EventSearch(event, call),
        progress_meter=arguments["progress_meter"],
        t0=arguments["t0"],
        t1=arguments["t1"],
        save_ts=all_ts,
        places=places,
        max_steps=arguments["max_steps"],
        save_ends=any(sub.steps != 0 for sub in subs),
        dense=saveat.dense,
    )


def _is_sub(x: Any) -> bool:
    return isinstance(x, diffrax.SubSaveAt)


def _can_record(windows: Windows, state: LoopState) -> bool:
    """Whether the windows of a controller are recorded, and differentiated together."""
    if windows.event is not None or windows.max_steps is None:
        return False
    if windows.dense or windows.save_ends:
        return False
    if not has_constant_factors(windows.controller):
        return False
    if windows.solver.places.fractions(1) is None:
        return False
    inner, flat = windows.inner_step(state.y), ravel(state.y)[0]
    num_entries = windows.max_steps * windows.solver.window_steps * flat.size
    may = ft.partial(records_windows, num_entries, len(windows.save_ts), flat.size)
    # The field is traced only if that can make a difference.
    if not inner.is_one_field or not may(num_parameters=0):
        return False
    field = eqx.filter_closure_convert(inner.field, state.t_prev, flat)
    parameters = filter(eqx.is_inexact_array, jax.tree.leaves(field))
    return may(num_parameters=sum(x.size for x in parameters))


def _end(windows: Windows, outcome: Outcome, inner: SolverStep) -> Final:
    """Where the solve has ended: after the last step, or at the root of an event."""
    state, search = outcome.state, windows.event
    t, y, result = state.t_prev, state.y, state.result
    is_cut = False
    if search is not None and search.event.root_finder is not None:
        is_cut = True
        assert outcome.last is not None
        path = interpolation(inner, outcome.last)
        root_t, root_y, root = search.locate(state.event_mask, path)
        occurred = (state.num_steps > 0) & (result == diffrax.RESULTS.event_occurred)
        failed = occurred & (root != diffrax.RESULTS.successful)
        result = diffrax.RESULTS.where(failed, root, result)
        t, y = select(occurred, (root_t, root_y), (t, y))
    running = (state.t_prev < windows.t1) & diffrax.is_successful(result)
    result = diffrax.RESULTS.where(
        running,
        diffrax.RESULTS.max_steps_reached,  # pyright: ignore
        result,
    )
    return Final(t, y, result, state.num_accepted, is_cut)


def _finish(
    windows: Windows,
    outcome: Outcome,
    meter: PyTree[Any],
    saveat: diffrax.SaveAt,
    init_state: Any,
) -> tuple[Any, dict[str, Any]]:
    """What diffrax asks of a loop."""
    state, inner = outcome.state, windows.inner_step(init_state.y)
    final = _end(windows, outcome, inner)
    dense_ts = dense_infos = index = None
    if saveat.dense:
        assert outcome.steps is not None
        steps = outcome.steps
        dense_ts, infos, index = dense(inner, steps, windows.t0)
        dense_infos = windows.solver.dense_infos((steps.t0s, steps.t1s), infos)
    final_loop_state = final_state(
        init_state,
        save_state=_save_all(saveat, init_state, windows, outcome, inner, final),
        dense_ts=dense_ts,
        dense_infos=dense_infos,
        dense_save_index=index,
        solver_state=state.solver_state,
        controller_state=state.controller_state,
        made_jump=False if init_state.made_jump is False else state.made_jump,
        progress_meter_state=meter,
        num_steps=state.num_steps,
        num_accepted_steps=state.num_accepted,
        num_rejected_steps=state.num_steps - state.num_accepted,
        result=final.result,
        event_mask=None if windows.event is None else state.event_mask,
    )
    # Of windows that were found one after another, there is only the last one.
    window = state.solver_state if outcome.steps is not None else None
    return final_loop_state, _statistics(state, window, state.method, state.gradient)


def _statistics(state: Any, window: Any, method: Any, gradient: Any) -> dict[str, Any]:
    """What `sol.stats` has beside diffrax's; `None` where nothing was counted."""
    errors = getattr(window, "errors", None)
    return {
        "method": method,
        "gradient": gradient,
        "num_newton_iterations": getattr(state, "num_iterations", None),
        "max_newton_iterations": getattr(state, "max_iterations", None),
        "residual": getattr(state, "residual", None),
        "largest_error": None if errors is None else jnp.max(errors),
    }


def _check_solver(solver: Any) -> None:
    # `type`: a wrapped solver answers `isinstance` in the name of its inner one.
    if issubclass(type(solver), DEERSolver):
        return
    name = type(solver).__name__
    msg = (
        f"`DEERAdjoint` is for `DEERSolver`; got `solver={name}(...)`. Use "
        f"`DEERSolver({name}())` to make the same steps in parallel, or leave "
        "`adjoint` out."
    )
    if type(solver) is diffrax.HalfSolver and isinstance(solver.solver, DEERSolver):
        msg = (
            "`DEERAdjoint` is for `DEERSolver`; got one inside of a `HalfSolver`. "
            "`DEERSolver` has an error estimate of its own: use it as it is, or "
            "`DEERSolver(HalfSolver(...))`, or leave `adjoint` out."
        )
    raise ValueError(msg)


def _first_state(init_state: Any, windows: Windows) -> LoopState:
    zero = jnp.zeros((), int)
    event_state = None, None
    if windows.event is not None:
        event_state = init_state.event_values, init_state.event_mask
    return as_arrays(
        LoopState(
            t_prev=init_state.tprev,
            t_next=init_state.tnext,
            y=init_state.y,
            made_jump=init_state.made_jump,
            solver_state=init_state.solver_state,
            controller_state=init_state.controller_state,
            result=init_state.result,
            num_steps=zero,
            num_accepted=zero,
            event_values=event_state[0],
            event_mask=event_state[1],
            num_iterations=zero,
            max_iterations=zero,
        )
    )


def _save_all(
    saveat: diffrax.SaveAt,
    init_state: Any,
    windows: Windows,
    outcome: Outcome,
    inner: Any,
    final: Final,
) -> PyTree[Any]:
    """Diffrax's save states, filled."""
    t0, y0 = windows.t0, init_state.y
    ys, found = outcome.ys, outcome.found
    if windows.places is not None:
        ys, found = jax.tree.map(lambda x: x[windows.places], (ys, found))
    if len(found) > 0:
        empty = jnp.asarray(t0 == windows.t1)
        spread = lambda y, y0: jnp.where(empty, y0[None], y)
        ys, found = jax.tree.map(spread, ys, y0), found | empty
    ends = None
    if outcome.ends is not None:
        ends = outcome.ends, jax.vmap(inner.unravel)(outcome.ends.ys)
    start = 0

    def fill(sub, state):
        nonlocal start
        times = None
        if sub.ts is not None and len(sub.ts) > 0:
            part = slice(start, start + len(sub.ts))
            start = part.stop
            pick = lambda x: x[part]
            times = SaveTimes(sub.ts, jax.tree.map(pick, ys), found[part])
        buffers = state.ts, state.ys
        filled = save(sub, buffers, windows.args, (t0, y0), times, ends, final)
        return saved(state, *filled)

    return jax.tree.map(fill, saveat.subs, init_state.save_state, is_leaf=_is_sub)
