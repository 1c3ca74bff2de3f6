"""Work against precision: how long each method takes for what error.

Value and gradient, with respect to the initial value, of the mean square of the final
state. The error is that of the final state.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from diffrax_deer import DEERSolver
from experiments.benchmark.matching import matching_count, matching_tolerance
from experiments.benchmark.measure import analyze, error
from experiments.benchmark.settings import Config
from experiments.common.affordable import (
    Prepared,
    prepare,
    take_affordable_turns,
    too_large,
)
from experiments.common.problems import PROBLEMS, Problem
from experiments.common.solvers import METHODS, Method, MethodName
from experiments.common.workload import Workload, make_function

CHOSEN = ("lotka_volterra_10", "van_der_pol_1", "two_body")
COMPARED: tuple[MethodName, ...] = (
    "dopri5",
    "dopri5_pid",
    "tsit5_pid",
    "deer",
    "paper",
)
TARGET = 1e-6
_ROUGH_TARGET = 1e-2  # for a quick check
# Steps, times that number which meets the target; and tolerances, likewise.
_LADDER = (1 / 8, 1 / 4, 1 / 2, 1, 2)
_TOLERANCES = (1e3, 1e2, 1e1, 1.0, 1e-1)
# From one number of steps to the next, half an order of magnitude of five in the error
# would be too coarse: factors of the square root of two.
_COUNTS = tuple(round(8 * 2 ** (k / 2)) for k in range(30))
_FINE = 10**0.25
_FIRST_STEPS = 256  # of an adaptive solver: how long its first step is

# A setting, how many times that which meets the target it is, and what it gives.
_Found = Iterator[tuple[dict[str, Any], float, Prepared]]


@dataclasses.dataclass
class _Point:
    """One number of steps or tolerance of one method."""

    setting: dict[str, Any]
    prepared: Prepared
    is_matched: bool
    error: float

    def entry(self) -> dict[str, Any]:
        """What to keep of it."""
        found = self.prepared.value
        entry = self.setting | {"error": self.error}
        if found.num_iterations is not None:
            entry["num_iterations"] = int(jnp.max(found.num_iterations))
        return entry | {"seconds": self.prepared.compiled.seconds}


def _workload(problem: Problem, num_steps: int) -> Workload:
    return Workload(
        field=lambda t, y, params: problem.field(t, y, None),
        params=(),
        y0s=problem.y0[None],
        t0=0.0,
        t1=problem.t1,
        num_steps=num_steps,
        loss=lambda ys: jnp.mean(ys**2),
    )


def smallest_count(
    problem: Problem, solver: Any, reference: Array, target: float
) -> int:
    """The smallest number of equal steps that meets the target."""

    @jax.jit
    def solve(step):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(problem.field),
            solver,
            0.0,
            problem.t1,
            step,
            problem.y0,
            max_steps=None,
            throw=False,
        ).ys

    # Steps that are too large end in infinities.
    error_of = lambda count: error(
        np.nan_to_num(solve(problem.t1 / count), nan=np.inf)[None], reference
    )
    count = matching_count(error_of, target, _COUNTS)
    assert count is not None
    return count


@dataclasses.dataclass
class _Search:
    """What the methods have to solve, and how well."""

    problem: Problem
    reference: Array
    target: float
    config: Config

    def points(self, method: Method) -> list[_Point]:
        """What a method takes for the target, and for errors around it."""
        find = self._by_tolerance if method.is_adaptive else self._by_count
        points = [
            _Point(setting, found, factor == 1, error(found.value.ys, self.reference))
            for setting, factor, found in find(method)
        ]
        # With too few steps there is nothing but infinities.
        return [point for point in points if point.error < 1]

    def _by_count(self, method: Method) -> _Found:
        solver: Any = method.solver
        solver = solver.solver if isinstance(solver, DEERSolver) else solver
        matched = smallest_count(self.problem, solver, self.reference, self.target)
        for factor in (1.0,) if self.config.smoke else _LADDER:
            count = max(1, round(matched * factor))
            workload = _workload(self.problem, count)
            function = make_function(
                method, "gradient", workload, throw=False, argnums=1
            )
            arguments = (), workload.y0s, None
            found = prepare(function, arguments, self.config.max_gigabytes)
            if isinstance(found, Prepared):
                yield {"num_steps": count}, factor, found

    def _by_tolerance(self, method: Method) -> _Found:
        workload = _workload(self.problem, _FIRST_STEPS)

        def solve(tolerance, y0s):
            function = make_function(
                method, "gradient", workload, tolerance, throw=False, argnums=1
            )
            return function((), y0s, None)

        # One function for all tolerances.
        argument = lambda tolerance: (jnp.asarray(tolerance), workload.y0s)
        first = prepare(jax.jit(solve), argument(1e-3), np.inf)
        assert isinstance(first, Prepared)
        call = first.compiled.function
        error_of = lambda tolerance: error(
            call(*argument(tolerance)).ys, self.reference
        )
        tolerance, _ = matching_tolerance(error_of, self.target, 1e-14, _FINE)
        for factor in (1.0,) if self.config.smoke else _TOLERANCES:
            chosen = argument(tolerance * factor)
            compiled = dataclasses.replace(first.compiled, arguments=chosen, seconds=[])
            found = Prepared(compiled, compiled.call(), first.seconds)
            yield {"tolerance": tolerance * factor}, factor, found


def measure(cell: dict[str, Any], config: Config) -> dict[str, Any]:
    """All methods on one problem.

    Args:
        cell: which one, `problem`.
        config: the settings.

    Returns:
        The cell, with its methods: what each takes for the target, and for `points`
        around it.
    """
    problem = PROBLEMS[cell["problem"]]
    target = _ROUGH_TARGET if config.smoke else TARGET
    reference = _workload(problem, _FIRST_STEPS).reference().ys
    search = _Search(problem, reference, target, config)
    points = {
        name: search.points(METHODS[name])
        for name in COMPARED
        if name in config.methods
    }
    # What takes seconds where others take milliseconds would leave few turns to these.
    others = [each for name, each in points.items() if name != "paper"]
    for group in (sum(others, []), points.get("paper", [])):
        prepared = [point.prepared for point in group]
        take_affordable_turns(prepared, config.cell_seconds, config.repeats)
    entries = {}
    for name, each in points.items():
        chosen = next((point for point in each if point.is_matched), None)
        if chosen is None:
            entries[name] = too_large("too little memory") | {"points": []}
            continue
        compiled = chosen.prepared.compiled
        entry = {"compile_seconds": compiled.compile_seconds} | analyze(compiled)
        entry |= chosen.entry()
        entries[name] = entry | {"points": [point.entry() for point in each]}
    return cell | {"target": target, "methods": entries}
