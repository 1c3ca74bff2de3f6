"""Steps where the error is: work against precision, value and gradient.

python -m experiments.grids

As many steps as a `PIDController` accepts at a tolerance, times 1.1 and two more: of
equal length, and equidistributed, from a cold start and from the solution of before a
step of training (parameters moved by 1e-3; where there are none, the initial value by
one part in a thousand). So, too, along 20 such steps in the same direction. Equal steps
also as many as reach the error of the controller.

The error is the largest of any component at 100 times, relative to its largest value,
of one sample in float64. Timings are in float32, with `Kvaerno5` in float64.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from diffrax_deer import DEERAdjoint, DEERSolver
from experiments.benchmark import workloads
from experiments.common.affordable import (
    Prepared,
    describe_time,
    measure_methods,
    prepare,
    speed_up,
    too_slow,
)
from experiments.common.command_line import run
from experiments.common.errors import ExperimentError, check_lists, check_positive
from experiments.common.files import write_figure
from experiments.common.measurement import TimedConfig, ready
from experiments.common.plotting import STYLES
from experiments.common.problems import PROBLEMS
from experiments.common.results import conclude, format_table
from experiments.common.solvers import (
    METHODS,
    Method,
    adaptive,
    equidistributed,
)
from experiments.common.timing import largest_difference, quartiles
from experiments.common.workload import Outcome, Workload, make_function, with_arrays

_NUM_TIMES, _SPREAD, _MOVED = 100, 0.02, 1e-3
_MOST_STEPS, _NUM_WARM = 2**14, 20
_LABELS = {
    "pid": "PID",
    "pid_deer": "PID, DEERAdjoint",
    "equal": "equal steps",
    "matched": "equal steps, same error",
    "cold": "equidistributed, cold",
    "warm": "equidistributed, warm",
}


class Case(NamedTuple):
    """What is solved.

    Attributes:
        title: for tables.
        workload: with the largest batch.
        implicit: whether `Kvaerno5` makes the steps, else `Dopri5`.
    """

    title: str
    workload: Workload
    implicit: bool = False

    @property
    def solver(self) -> diffrax.AbstractSolver:
        """The solver of all methods."""
        return diffrax.Kvaerno5() if self.implicit else diffrax.Dopri5()

    def first(self, batch_size: int) -> Workload:
        """The first samples alone, at times in their precision."""
        y0s = jax.tree.map(lambda y: y[:batch_size], self.workload.y0s)
        ts = self.workload.ts
        if ts is not None:
            ts = ts.astype(jax.tree.leaves(y0s)[0].dtype)
        return dataclasses.replace(self.workload, y0s=y0s, ts=ts)


def _mean_square(ys: Any) -> Array:
    return jnp.mean(ys**2)


def _spread(y0: Array, batch_size: int) -> Array:
    """Initial values around one, which is the first."""
    factors = jr.uniform(jr.key(0), (batch_size, y0.size), y0.dtype, -1.0, 1.0)
    return y0 * (1 + _SPREAD * factors.at[0].set(0.0))


def _of_problem(name: str, batch_size: int) -> Case:
    problem = PROBLEMS[name]
    workload = Workload(
        field=lambda t, y, params: problem.field(t, y, None),
        params=(),
        y0s=_spread(problem.y0, batch_size),
        t0=0.0,
        t1=problem.t1,
        num_steps=None,
        loss=_mean_square,
        ts=np.linspace(0.0, problem.t1, _NUM_TIMES + 1)[1:],
    )
    return Case(problem.title, workload, problem.implicit)


def _fitted(workload: Workload, num_steps: int, rate: float) -> Any:
    """The parameters after so many steps of Adam."""
    optimizer = optax.adam(rate)
    gradient = make_function(METHODS["deer"], "gradient", workload)

    def step(carry, _):
        params, state = carry
        found = gradient(params, workload.y0s, None)
        updates, state = optimizer.update(found.gradient, state)
        return (optax.apply_updates(params, updates), state), None

    init = workload.params, optimizer.init(workload.params)
    (params, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=num_steps))(init)
    return params


def _neural_ode(batch_size: int) -> Case:
    """A network in place of Van der Pol's field, fitted to short pieces of orbits."""
    problem, keys = PROBLEMS["van_der_pol_1"], jr.split(jr.key(0))
    network = eqx.nn.MLP(2, 2, 32, 2, jnp.tanh, dtype=jnp.float32, key=keys[0])
    pieces = Workload(
        **with_arrays(network, lambda t, y, network: network(y)),
        y0s=jr.uniform(keys[1], (256, 2), jnp.float32, -3.0, 3.0),
        t0=0.0,
        t1=0.2,
        num_steps=2,
        loss=_mean_square,
    )
    truth = dataclasses.replace(pieces, field=problem.field)
    ends = make_function(METHODS["deer"], "forward", truth)((), pieces.y0s, None).ys
    pieces = dataclasses.replace(pieces, loss=lambda ys: _mean_square(ys - ends))
    workload = dataclasses.replace(
        _of_problem("van_der_pol_1", batch_size).workload,
        field=pieces.field,
        params=_fitted(pieces, 1000, 3e-3),
    )
    return Case("neural ODE, T = 20", workload)


def _cnf(batch_size: int) -> Case:
    """A flow of two moons to a normal distribution, with the trace of its Jacobian."""
    cell = {"workload": "cnf", "width": 32, "num_steps": 8}
    workload = workloads.make(cell | {"batch_size": max(batch_size, 64)})
    params = _fitted(workload, 300, 1e-2)
    return Case("normalizing flow", dataclasses.replace(workload, params=params))


CASES: dict[str, Callable[[int], Case]] = {
    name: lambda batch_size, name=name: _of_problem(name, batch_size)
    for name in (
        "fitzhugh_nagumo_100",
        "van_der_pol_1",
        "van_der_pol_5",
        "van_der_pol_10",
        "lotka_volterra_10",
        "pleiades",
        "eccentric_orbit",
        "driven_pendulum",
        "robertson",
        "hires",
    )
} | {"neural_ode": _neural_ode, "cnf": _cnf}


@dataclasses.dataclass(frozen=True)
class Config(TimedConfig):
    """The settings.

    Attributes:
        problems: Names of problems; none means all.
        tolerances: Of the controller, relative and absolute.
        batch_sizes: Initial values, solved under `jax.vmap`.
        every: Whether all batches are timed at all tolerances, else those after the
            first at the first tolerance alone, where there is least to be gained.
        cell_seconds: What all timed calls of a problem, tolerance and batch may take.
        max_seconds: As many equal steps as have the error of the controller are not
            timed where one call is expected to take longer.
    """

    problems: tuple[str, ...] = ()
    tolerances: tuple[float, ...] = (1e-4, 1e-6)
    batch_sizes: tuple[int, ...] = (1, 64)
    every: bool = False
    cell_seconds: float = 3.0
    max_seconds: float = 0.25
    repeats: int = 20
    out: Path = Path("runs/grids/results.json")

    def reduced(self) -> Self:
        """The same measurement, small enough to take a minute."""
        small = dict(problems=("driven_pendulum",), tolerances=(1e-4,), repeats=2)
        return dataclasses.replace(self, **small, batch_sizes=(2,))

    def check(self) -> None:
        """Raises an error that names the first setting that makes no sense."""
        super().check()
        check_lists(self, "batch_sizes")
        check_positive(self, "cell_seconds", "max_seconds")
        if unknown := sorted(set(self.problems) - set(CASES)):
            msg = f"--problems: {', '.join(unknown)} unknown; of {', '.join(CASES)}."
            raise ExperimentError(msg)
        if not self.tolerances or not all(0 < x < 1 for x in self.tolerances):
            msg = "--tolerances needs at least one number, each between 0 and 1."
            raise ExperimentError(msg)


def _moved(workload: Workload) -> Workload:
    """The same before a step of training."""
    leaves, tree = jax.tree.flatten(workload.params)
    if not leaves:
        y0s = jax.tree.map(lambda y: (1 + _MOVED) * y, workload.y0s)
        return dataclasses.replace(workload, y0s=y0s)
    keys = jr.split(jr.key(1), len(leaves))
    moved = [
        x + _MOVED * jr.rademacher(key, x.shape, x.dtype)
        for key, x in zip(keys, leaves, strict=True)
    ]
    return dataclasses.replace(workload, params=tree.unflatten(moved))


def _with_steps(workload: Workload, num_steps: int) -> Workload:
    return dataclasses.replace(workload, num_steps=num_steps)


def _num_steps(found: Outcome) -> tuple[int, int]:
    """The steps a controller accepted, of the sample with the most; and N for them."""
    assert found.num_accepted is not None
    accepted = int(jnp.max(found.num_accepted))
    return accepted, int(1.1 * accepted) + 2


# ---- Precision ----


def _quickly_compiled(function: Callable) -> Any:
    """Of `jax.jit`, for what is not timed."""
    options = {
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    }
    return jax.jit(function, compiler_options=options)


class _Accurate:
    """Errors of the first sample, in float64, of what is found by any method."""

    def __init__(self, case: Case):
        double = lambda x: jnp.asarray(np.asarray(x), jnp.float64)
        first = case.first(1)
        params, y0s = jax.tree.map(double, (first.params, first.y0s))
        changed = {"params": params, "y0s": y0s, "ts": case.workload.ts}
        self.workload = dataclasses.replace(first, **changed)
        self.solver = case.solver
        # Equal steps of an implicit solver need a tolerance that no controller has.
        self.strict = PROBLEMS["robertson"].solver if case.implicit else case.solver
        tight = diffrax.Kvaerno5() if case.implicit else diffrax.Dopri8()
        tolerance = 1e-10 if case.implicit else 1e-12
        self._adaptive_to = self._adaptive(self.solver, 4096)
        self._here = self.workload.params, self.workload.y0s
        tight_to = self._adaptive(tight, 100_000)
        self._exact_at = lambda here: tight_to(tolerance, here).ys
        self._exact = self._exact_at(self._here)
        self._equal = _quickly_compiled(self._equal_steps)

    def adaptive(self, tolerance: float) -> Outcome:
        """What the controller finds."""
        return self._adaptive_to(tolerance, self._here)

    def error(self, ys: Any, exact: Any = None) -> float:
        """The largest at any time, relative to the largest value of a component."""
        error, trees = 0.0, (ys, self._exact if exact is None else exact)
        for found, true in zip(*map(jax.tree.leaves, trees), strict=True):
            largest = jnp.max(jnp.abs(true), axis=1, keepdims=True)
            parts = jnp.abs(found - true) / jnp.where(largest == 0, 1, largest)
            error = max(error, float(jnp.max(jnp.nan_to_num(parts, nan=jnp.inf))))
        return error

    def _adaptive(self, solver: Any, max_steps: int) -> Callable[..., Outcome]:
        control = lambda interval: adaptive(interval) | {"max_steps": max_steps}
        method = Method("", solver, control)

        def solve(tolerance, here):
            options = {"tolerance": tolerance, "throw": False}
            function = make_function(method, "forward", self.workload, **options)
            return function(*here, None)

        return _quickly_compiled(solve)

    def _equal_steps(self, step: Any) -> Any:
        w = self.workload
        saved: dict[str, Any] = {"t1": True} if w.ts is None else {"ts": w.ts}
        return diffrax.diffeqsolve(
            diffrax.ODETerm(w.field),
            self.strict,
            w.t0,
            w.t1,
            step,
            jax.tree.map(lambda y: y[0], w.y0s),
            w.params,
            saveat=diffrax.SaveAt(**saved),
            max_steps=None,
            adjoint=diffrax.ForwardMode(),
            throw=False,
        ).ys

    def equal(self, num_steps: int) -> float:
        """The error of so many equal steps."""
        ys = self._equal((self.workload.t1 - self.workload.t0) / num_steps)
        return self.error(jax.tree.map(lambda y: y[None], ys))

    def equidistributed(self, num_steps: int, tolerance: float) -> dict[str, Any]:
        """Errors from a cold start with one and two passes, from a warm one, and of a
        walk: the worst and the median in units of the controller's, and cold starts.
        """
        errors, workload = {}, _with_steps(self.workload, num_steps)
        for passes in (1, 2):
            method = equidistributed(self.solver, tolerance, passes)
            solve = make_function(method, "forward", workload, throw=False)
            solve = _quickly_compiled(solve)
            cold = workload.cold_states(method)
            errors[f"cold_{passes}"] = self.error(solve(*self._here, cold).ys)
        place, moved = self._here, _moved(workload)
        state = solve(moved.params, moved.y0s, cold).state
        errors["warm"] = self.error(solve(*place, state).ys)
        state, bounds, ratios = solve(*place, cold).state, set(), []
        for _ in range(_NUM_WARM):
            moved = _moved(dataclasses.replace(workload, params=place[0], y0s=place[1]))
            place = moved.params, moved.y0s
            state = (found := solve(*place, state)).state
            bounds.add(float(state.error_bound[0]))
            exact, control = self._exact_at(place), self._adaptive_to(tolerance, place)
            ratios.append(self.error(found.ys, exact) / self.error(control.ys, exact))
        walk = {"largest": max(ratios), "median": float(np.median(ratios))}
        return errors | {"walk": walk | {"num_cold": len(bounds) - 1}}


def _precision(accurate: _Accurate, tolerance: float) -> dict[str, Any]:
    """Errors of all methods at a tolerance, and of more and more equal steps."""
    found = accurate.adaptive(tolerance)
    (accepted, count), error = _num_steps(found), accurate.error(found.ys)
    errors = {"pid": error} | accurate.equidistributed(count, tolerance)
    counts, equal = count, []
    while counts <= _MOST_STEPS and (not equal or equal[-1]["error"] > error):
        equal.append({"num_steps": counts, "error": accurate.equal(counts)})
        counts *= 2
    reached = equal[-1]["num_steps"] if equal[-1]["error"] <= error else None
    sizes = {"num_accepted": accepted, "num_steps": count, "matched_steps": reached}
    finite = lambda x: x if math.isfinite(x) else None  # JSON knows no infinity.
    return sizes | jax.tree.map(finite, {"errors": errors, "equal": equal})


# ---- Work ----


def _gradient(method: Method, workload: Workload, tolerance: Any = None) -> Any:
    argnums = 0 if jax.tree.leaves(workload.params) else 1
    options = {"throw": False, "argnums": argnums}
    return make_function(method, "gradient", workload, tolerance, **options)


def _with_arguments(prepared: Prepared, *arguments: Any) -> Prepared:
    """The same program, to be timed with other arguments."""
    compiled = dataclasses.replace(prepared.compiled, arguments=arguments, seconds=[])
    return Prepared(compiled, compiled.call(), prepared.seconds)


def _seconds(prepared: Prepared) -> float:
    """What a call takes that is not the first."""
    begin = time.perf_counter()
    prepared.compiled.call()
    return time.perf_counter() - begin


class _Controlled:
    """The controller, with either adjoint: one program for all tolerances."""

    def __init__(self, case: Case, workload: Workload):
        methods = {
            "pid": Method("", case.solver, adaptive),
            "pid_deer": Method("", DEERSolver(case.solver), adaptive, DEERAdjoint()),
        }
        self._arguments = workload.params, workload.y0s, None
        self._programs: dict[str, Prepared] = {}
        for name, method in methods.items():

            def solve(tolerance, *arguments, method=method):
                return _gradient(method, workload, tolerance)(*arguments)

            found = prepare(jax.jit(solve), (jnp.array(1e-3), *self._arguments), 8.0)
            assert isinstance(found, Prepared)
            self._programs[name] = found

    def at(self, tolerance: float) -> dict[str, Prepared]:
        """Both, at a tolerance."""
        arguments = jnp.array(tolerance), *self._arguments
        programs = self._programs.items()
        return {name: _with_arguments(x, *arguments) for name, x in programs}


def _on_grids(
    case: Case,
    workload: Workload,
    counts: tuple[int, int | None],
    tolerance: float,
    max_seconds: float,
) -> Iterator[tuple[str, Prepared | dict[str, Any]]]:
    """Equal steps, as many and with the same error, and equidistributed ones."""
    (count, matched), here = counts, (workload.params, workload.y0s)
    equal = dataclasses.replace(METHODS["deer"], solver=DEERSolver(case.solver))
    program = lambda n: _gradient(equal, _with_steps(workload, n))
    first = prepare(program(count), (*here, None), 8.0)
    assert isinstance(first, Prepared)
    yield "equal", first
    if matched is None:
        detail = f"not reached in {_MOST_STEPS} steps"
        yield "matched", {"skipped": {"why": "error", "detail": detail}}
    elif (expected := _seconds(first) * matched / count) > max_seconds:
        yield "matched", too_slow(expected)
    else:
        yield "matched", prepare(program(matched), (*here, None), 8.0)
    method, sized = (
        equidistributed(case.solver, tolerance),
        _with_steps(workload, count),
    )
    cold, moved = sized.cold_states(method), _moved(workload)
    start = (moved.params, moved.y0s, cold)
    found = prepare(_gradient(method, sized), start, 8.0)
    assert isinstance(found, Prepared)
    yield "cold", _with_arguments(found, *here, cold)
    yield "warm", _with_arguments(found, *here, found.value.state)


def _work(
    case: Case,
    workload: Workload,
    controlled: _Controlled,
    precision: dict[str, Any],
    config: Config,
) -> dict[str, Any]:
    """All methods with one batch, at the tolerance of `precision`."""
    tolerance = precision["tolerance"]
    known = controlled.at(tolerance)
    accepted, count = _num_steps(known["pid"].value)
    ratio = count / precision["num_steps"]
    matched = precision["matched_steps"]
    counts = count, None if matched is None else round(ratio * matched)
    grids = _on_grids(case, workload, counts, tolerance, config.max_seconds)
    expected = known["pid"].value.gradient

    def describe(name: str, prepared: Prepared) -> dict[str, Any]:
        found = prepared.value
        entry = {"difference": largest_difference(found.gradient, expected)}
        if found.state is not None and found.state.errors is not None:
            entry["largest_error"] = float(jnp.max(found.state.errors))
        return {k: v if np.isfinite(v) else None for k, v in entry.items()}

    prepared = itertools.chain(known.items(), grids)
    methods = measure_methods(prepared, describe, config.cell_seconds, config.repeats)
    sizes = {"num_accepted": accepted, "num_steps": count, "matched_steps": counts[1]}
    return sizes | {"methods": methods}


def measure(name: str, config: Config) -> list[dict[str, Any]]:
    """One problem, at all tolerances and batch sizes."""
    largest = max(config.batch_sizes)
    # Timed in the precision that it is made in.
    with jax.enable_x64(name in PROBLEMS and PROBLEMS[name].implicit):
        case = CASES[name](largest)
    with jax.enable_x64(True):
        accurate, cells = _Accurate(case), []
        for tolerance in config.tolerances:
            head = {"problem": name, "title": case.title, "tolerance": tolerance}
            cells.append(head | _precision(accurate, tolerance) | {"batches": []})
    with jax.enable_x64(case.implicit):
        for batch_size in config.batch_sizes:
            workload = case.first(batch_size)
            controlled = _Controlled(case, workload)
            is_timed = config.every or batch_size == config.batch_sizes[0]
            for cell in cells if is_timed else cells[:1]:
                found = _work(case, workload, controlled, cell, config)
                cell["batches"].append({"batch_size": batch_size} | found)
    print(f"{case.title}: done", flush=True)
    jax.clear_caches()
    return cells


# ---- Shown ----


def precision_table(results: dict[str, Any]) -> str:
    """One line for each problem and tolerance: errors relative to the controller's."""
    rows, names = [], ("cold_1", "cold_2", "warm")
    # Results of before there was a walk have none.
    is_walked = all("walk" in cell["errors"] for cell in results["cells"])
    for cell in results["cells"]:
        errors = cell["errors"]
        row = [cell["title"], f"{cell['tolerance']:.0e}", str(cell["num_accepted"])]
        row += [str(cell["num_steps"]), f"{errors['pid']:.0e}"]
        found = [cell["equal"][0]["error"], *(errors[name] for name in names)]
        # Steps that are too long may end in numbers without a meaning.
        ratios = [math.inf if x is None else x / errors["pid"] for x in found]
        walk = errors["walk"] if is_walked else {}
        ratios += [walk[name] or math.inf for name in ("median", "largest") if walk]
        row += [f"{x:.2g}×" if x < 1e9 else "failed" for x in ratios]
        rows.append([*row, str(walk["num_cold"])] if walk else row)
    head = ("problem", "tolerance", "steps, PID", "N", "error, PID", "equal steps")
    passes = ("cold, 1 pass", "cold, 2 passes", "warm")
    walk = ("walk, median", "walk, worst", "cold starts") if is_walked else ()
    return format_table((*head, *passes, *walk), rows)


def work_table(results: dict[str, Any]) -> str:
    """One line for each problem, tolerance and batch: how often as fast as PID."""
    rows = []
    for cell in results["cells"]:
        for batch in cell["batches"]:
            methods = batch["methods"]
            row = [cell["title"], f"{cell['tolerance']:.0e}", str(batch["batch_size"])]
            row.append(describe_time(methods["pid"]))
            for name in list(_LABELS)[1:]:
                ratio = speed_up(methods, name, "pid")
                row.append(ratio if isinstance(ratio, str) else f"{ratio:.2g}×")
            matched = batch["matched_steps"]
            rows.append([*row, "-" if matched is None else str(matched)])
    head = ("problem", "tolerance", "batch", "PID (ms) [quartiles]")
    return format_table((*head, *list(_LABELS.values())[1:], "so many"), rows)


def table(results: dict[str, Any]) -> str:
    """Errors, then times."""
    return f"{precision_table(results)}\n\n{work_table(results)}"


def _points(cell: dict[str, Any], name: str) -> tuple[Any, float | None, Any]:
    """Steps, milliseconds (of the smallest batch) and error of a method."""
    batch = cell["batches"][0]
    method = batch["methods"][name]
    median = quartiles(method["seconds"])[1] if "seconds" in method else None
    first, last = cell["equal"][0], cell["equal"][-1]
    errors = cell["errors"]
    steps, error = {
        "pid": (cell["num_accepted"], errors["pid"]),
        "pid_deer": (cell["num_accepted"], errors["pid"]),
        "equal": (first["num_steps"], first["error"]),
        "matched": (last["num_steps"], last["error"]),
        "cold": (cell["num_steps"], errors["cold_2"]),
        "warm": (cell["num_steps"], errors["warm"]),
    }[name]
    return steps, median, error


def draw(path: Path, results: dict[str, Any]) -> None:
    """Error against time, then against steps, one panel for each problem."""
    problems: dict[str, list[dict[str, Any]]] = {}
    for cell in results["cells"]:
        problems.setdefault(cell["title"], []).append(cell)
    columns = min(6, len(problems))
    rows = math.ceil(len(problems) / columns)
    figure = Figure(figsize=(2.9 * columns, 5.2 * rows), layout="constrained")
    axes = figure.subplots(2 * rows, columns, squeeze=False)
    for ax in axes.flat[len(problems) : rows * columns]:
        ax.axis("off")
    for ax in axes.flat[rows * columns + len(problems) :]:
        ax.axis("off")
    for index, (title, cells) in enumerate(problems.items()):
        panels = axes.flat[index], axes.flat[rows * columns + index]
        for ax, which in zip(panels, (1, 0), strict=True):
            for style, lines in zip(STYLES, _LINES.items(), strict=True):
                points = [_points(cell, name) for cell in cells for name in lines[1]]
                kept = [p for p in points if None not in (p[which], p[2]) and p[2] < 10]
                kept = sorted((p[which], p[2]) for p in kept)
                xs, ys = zip(*kept, strict=True) if kept else ((), ())
                ax.plot(xs, ys, **style, marker="o", markersize=4, label=lines[0])
            ax.set(xscale="log", yscale="log")
            ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            ax.xaxis.set_major_formatter("{x:g}")
            ax.xaxis.set_minor_formatter(NullFormatter())
            ax.set_title(title, fontsize="medium")
            ax.grid(alpha=0.3)
        panels[0].set_xlabel("value and gradient (ms)")
        panels[1].set_xlabel("steps")
    for ax in axes[:, 0]:
        ax.set_ylabel("error, relative")
    axes[0, 0].legend(fontsize="x-small")
    write_figure(path, figure)


_LINES = {
    "PID": ("pid",),
    "PID, DEERAdjoint": ("pid_deer",),
    "equal steps": ("equal", "matched"),
    "equidistributed, cold": ("cold",),
    "equidistributed, warm": ("warm",),
}


def main(config: Config) -> dict[str, Any]:
    """Measures, prints, draws and writes the results."""
    config = ready(config)
    cells = [
        cell for name in config.problems or CASES for cell in measure(name, config)
    ]
    dtype = "float32 (Kvaerno5 and all errors: float64)"
    results = conclude("grids", config, dtype, table, cells=cells)
    draw(config.out.with_suffix(".png"), results)
    return results


if __name__ == "__main__":
    run(main, Config)
