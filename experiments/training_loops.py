"""Training loops as their users write them, with the solver changed and nothing else.

python -m experiments.training_loops

Neural ordinary differential equations, normalizing flows, a latent ODE, a neural
controlled differential equation, a Hamiltonian network and a stiff fit of parameters,
with the controller, the save times and the batch that belong to each. Every loop is
run with its own solver, with `DirectAdjoint`, with `DEERSolver`, with `DEERAdjoint`
too, and on a fixed grid of as few steps as give the same error: compilation, one step
of training, and the loss after some. Then the first loop alone, over numbers of save
times, batch sizes and `max_steps`.
"""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, get_args

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import PyTree

from diffrax_deer import DEERAdjoint, DEERSolver, WholeInterval
from experiments.benchmark.reading import geometric_mean
from experiments.common.affordable import (
    Prepared,
    describe_time,
    measure_methods,
    prepare,
    speed_up,
)
from experiments.common.command_line import run
from experiments.common.errors import check_choice, check_least, check_lists
from experiments.common.hamiltonian import HamiltonianNetwork
from experiments.common.measurement import TimedConfig, ready
from experiments.common.results import conclude, format_table
from experiments.common.timing import largest_difference

# The arguments of `diffrax.diffeqsolve` that say how it is solved.
Options = dict[str, Any]
_DEFAULT = diffrax.RecursiveCheckpointAdjoint()
LoopName = Literal[
    "neural_ode",
    "cnf",
    "latent_ode",
    "neural_cde",
    "kinetics",
    "ffjord",
    "hamiltonian",
]
_GRIDS = (2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048)
_BASELINE = "as it is"
_LEARNING_RATE = 1e-3


class Loop(NamedTuple):
    """What is trained.

    Attributes:
        title: for tables.
        params: what to train, a pytree of arrays and whatever else a network holds.
        data: what the loss depends on beside the parameters.
        predict: the solution, of parameters, data and the way to solve.
        loss: of the solution and the data.
        options: how it is solved by default.
    """

    title: str
    params: PyTree[Any]
    data: PyTree[Any]
    predict: Callable[[Any, Any, Options], Any]
    loss: Callable[[Any, Any], Any]
    options: Options


def _network(in_size: int, out_size: Any, width: int, depth: int, key: Any, **kwargs):
    return eqx.nn.MLP(in_size, out_size, width, depth, key=key, **kwargs)


def neural_ode(
    batch_size: int = 32, num_times: int = 100, max_steps: int = 4096
) -> Loop:
    """Spirals, from their first point: diffrax's first example, width 64."""
    key_y0, key_network = jr.split(jr.key(0))
    y0s = jr.uniform(key_y0, (batch_size, 2), minval=-1.0, maxval=1.0)
    ts = jnp.linspace(0.0, 10.0, max(num_times, 1))
    turn = jax.vmap(lambda t: jnp.exp(-0.1 * t) * _rotation(2.0 * t))
    last = ts if num_times else jnp.array([10.0])
    data = y0s, ts, jnp.einsum("tij,bj->bti", turn(last), y0s)
    # As after some training: at first there is hardly anything to solve.
    network = jax.tree.map(
        lambda x: 2.0 * x if eqx.is_array(x) else x,
        _network(2, 2, 64, 2, key_network, activation=jax.nn.softplus),
    )

    def predict(network, data, options):
        term = diffrax.ODETerm(lambda t, y, args: network(y))
        saveat = diffrax.SaveAt(ts=data[1]) if num_times else diffrax.SaveAt(t1=True)
        solve = lambda y0: diffrax.diffeqsolve(
            term, t0=0.0, t1=10.0, y0=y0, saveat=saveat, **options
        )
        return jax.vmap(lambda y0: solve(y0).ys)(data[0])

    return Loop(
        "neural ODE",
        network,
        data,
        predict,
        lambda ys, data: jnp.mean((ys - data[2]) ** 2),
        _adaptive(diffrax.Tsit5(), 1e-3, 1e-6, 0.1) | {"max_steps": max_steps},
    )


def _rotation(angle: Any) -> Any:
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.array([[cos, -sin], [sin, cos]])


def _adaptive(solver: Any, rtol: float, atol: float, dt0: float | None) -> Options:
    controller = diffrax.PIDController(rtol=rtol, atol=atol)
    return {"solver": solver, "stepsize_controller": controller, "dt0": dt0}


def _trace_field(network: Any, exact: bool) -> Callable:
    """The field of a flow and of its log-density."""

    def field(t, state, probe):
        y, _ = state
        here = lambda y: network(jnp.append(y, t))
        value, pull = jax.vjp(here, y)
        if exact:
            (jacobian,) = jax.vmap(pull)(jnp.eye(y.size))
            return value, jnp.trace(jacobian)
        return value, jnp.sum(pull(probe)[0] * probe)

    return field


def _flow(title: str, exact: bool, t1: float, options: Options, batch: int) -> Loop:
    """Data carried backwards in time to a normal distribution, in two dimensions."""
    keys = jr.split(jr.key(1), 3)
    angles = jr.uniform(keys[0], (batch,), maxval=2 * jnp.pi)
    points = jnp.stack([2 * jnp.cos(angles), 2 * jnp.sin(angles)], axis=1)
    probes = jr.rademacher(keys[2], (batch, 2), points.dtype)
    network = _network(3, 2, 64, 2, keys[1], activation=jnp.tanh)

    def predict(network, data, options):
        term = diffrax.ODETerm(_trace_field(network, exact))

        def solve(point, probe):
            state = point, jnp.zeros(())
            sol = diffrax.diffeqsolve(
                term, t0=t1, t1=0.0, y0=state, args=probe, **options
            )
            assert sol.ys is not None
            return jax.tree.map(lambda y: y[-1], sol.ys)

        return jax.vmap(solve)(*data)

    def loss(found, data):
        base, change = found
        return jnp.mean(0.5 * jnp.sum(base**2, axis=1) + change)

    return Loop(title, network, (points, probes), predict, loss, options)


def cnf(batch_size: int = 64) -> Loop:
    """A normalizing flow with an exact trace, in ten equal steps of Tsit5."""
    options = {"solver": diffrax.Tsit5(), "dt0": -0.05}
    return _flow("normalizing flow, 10 equal steps", True, 0.5, options, batch_size)


def ffjord(batch_size: int = 64) -> Loop:
    """A normalizing flow with an estimated trace, at a tolerance of 1e-5."""
    options = _adaptive(diffrax.Dopri5(), 1e-5, 1e-5, None)
    return _flow("FFJORD, tolerance 1e-5", False, 1.0, options, batch_size)


class _LatentODE(eqx.Module):
    cell: eqx.nn.GRUCell
    to_latent: eqx.nn.Linear
    network: eqx.nn.MLP
    to_data: eqx.nn.Linear


def latent_ode(batch_size: int = 32) -> Loop:
    """Irregular times: a GRU reads them backwards, a small network is solved for them.

    The step is constant, as in diffrax's example.
    """
    keys = jr.split(jr.key(2), 7)
    model = _LatentODE(
        eqx.nn.GRUCell(3, 16, key=keys[0]),
        eqx.nn.Linear(16, 4, key=keys[1]),
        _network(4, 4, 16, 2, keys[2], activation=jnp.tanh),
        eqx.nn.Linear(4, 2, key=keys[3]),
    )
    ts = jnp.sort(jr.uniform(keys[4], (batch_size, 20), maxval=3.0), axis=1)
    phases = jr.uniform(keys[5], (batch_size, 1), maxval=3.0)
    ys = jnp.stack([jnp.sin(ts + phases), jnp.cos(ts + phases)], axis=-1)

    def predict(model, data, options):
        def solve(ts, ys):
            inputs = jnp.concatenate([ts[:, None], ys], axis=1)
            read = lambda hidden, x: (model.cell(x, hidden), None)
            hidden, _ = jax.lax.scan(read, jnp.zeros(16), inputs, reverse=True)
            sol = diffrax.diffeqsolve(
                diffrax.ODETerm(lambda t, y, args: model.network(y)),
                t0=0.0,
                t1=ts[-1],
                y0=model.to_latent(hidden),
                saveat=diffrax.SaveAt(ts=ts),
                **options,
            )
            return jax.vmap(model.to_data)(sol.ys)

        return jax.vmap(solve)(*data)

    loss = lambda found, data: jnp.mean((found - data[1]) ** 2)
    options = {"solver": diffrax.Tsit5(), "dt0": 0.4}
    return Loop("latent ODE, equal steps", model, (ts, ys), predict, loss, options)


class _NeuralCDE(eqx.Module):
    first: eqx.nn.MLP
    network: eqx.nn.MLP
    last: eqx.nn.Linear


def neural_cde(batch_size: int = 32) -> Loop:
    """Spirals to the left or to the right: a controlled differential equation."""
    keys = jr.split(jr.key(3), 4)
    hidden, channels = 8, 3
    model = _NeuralCDE(
        _network(channels, hidden, 32, 1, keys[0]),
        _network(hidden, hidden * channels, 64, 1, keys[1], final_activation=jnp.tanh),
        eqx.nn.Linear(hidden, "scalar", key=keys[2]),
    )
    ts = jnp.linspace(0.0, 4 * jnp.pi, 50)
    labels = (jnp.arange(batch_size) % 2).astype(ts.dtype)
    starts = jr.uniform(keys[3], (batch_size, 1), maxval=2 * jnp.pi)
    angles = starts + (2 * labels[:, None] - 1) * ts[None]
    paths = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    paths = paths * jnp.exp(-0.1 * ts)[None, :, None]

    def predict(model, data, options):
        def solve(path):
            path = jnp.concatenate([ts[:, None], path], axis=1)
            coeffs = diffrax.backward_hermite_coefficients(ts, path)
            control = diffrax.CubicInterpolation(ts, coeffs)
            field = lambda t, y, args: model.network(y).reshape(hidden, channels)
            sol = diffrax.diffeqsolve(
                diffrax.ControlTerm(field, control).to_ode(),
                t0=ts[0],
                t1=ts[-1],
                y0=model.first(path[0]),
                **options,
            )
            assert sol.ys is not None
            return model.last(sol.ys[-1])

        return jax.vmap(solve)(data[0])

    def loss(logits, data):
        return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, data[1]))

    data = paths, labels
    options = _adaptive(diffrax.Tsit5(), 1e-3, 1e-6, None)
    return Loop("neural CDE", model, data, predict, loss, options)


def hamiltonian(batch_size: int = 8) -> Loop:
    """The energy of a pendulum in two dimensions, learned from its motion."""
    keys = jr.split(jr.key(4), 2)
    y0s = 0.5 * jr.normal(keys[0], (batch_size, 4))
    ts = jnp.linspace(0.0, 5.0, 20)
    turn = jax.vmap(lambda t: jnp.kron(_rotation(-t), jnp.eye(2)))(ts)
    network = HamiltonianNetwork(4, 64, 2, y0s.dtype, keys[1])

    def predict(network, data, options):
        solve = lambda y0: diffrax.diffeqsolve(
            diffrax.ODETerm(network),
            t0=0.0,
            t1=5.0,
            y0=y0,
            saveat=diffrax.SaveAt(ts=ts),
            **options,
        )
        return jax.vmap(lambda y0: solve(y0).ys)(data[0])

    loss = lambda ys, data: jnp.mean((ys - data[1]) ** 2)
    data = y0s, jnp.einsum("tij,bj->bti", turn, y0s)
    options = _adaptive(diffrax.Dopri5(), 1e-4, 1e-6, None)
    return Loop("Hamiltonian network", network, data, predict, loss, options)


def kinetics(batch_size: int = 1) -> Loop:
    """Three rates of Robertson's reactions from concentrations, with Kvaerno5."""
    del batch_size
    ts = jnp.logspace(-2, 2, 40)
    rates = jnp.log(jnp.array([0.04, 1e4, 3e7]))

    def field(t, y, rates):
        slow, back, fast = jnp.exp(rates)
        a, b, c = y
        made, undone, used = slow * a, back * b * c, fast * b**2
        return jnp.stack([undone - made, made - undone - used, used])

    def predict(rates, data, options):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            t0=0.0,
            t1=ts[-1],
            y0=jnp.array([1.0, 0.0, 0.0]),
            args=rates,
            saveat=diffrax.SaveAt(ts=ts),
            **options,
        )
        assert sol.ys is not None
        return sol.ys * jnp.array([1.0, 1e4, 1.0])

    options = _adaptive(diffrax.Kvaerno5(), 1e-6, 1e-8, 1e-4)
    data = predict(rates, None, options)
    loss = lambda ys, data: jnp.mean((ys - data) ** 2)
    return Loop("stiff kinetics, Kvaerno5", rates + 0.3, data, predict, loss, options)


# The loops, and those that take double precision.
LOOPS: dict[LoopName, Callable[..., Loop]] = {
    "neural_ode": neural_ode,
    "cnf": cnf,
    "latent_ode": latent_ode,
    "neural_cde": neural_cde,
    "kinetics": kinetics,
    "ffjord": ffjord,
    "hamiltonian": hamiltonian,
}
_IN_DOUBLE = ("kinetics",)


@dataclasses.dataclass(frozen=True)
class Config(TimedConfig):
    """The settings.

    Attributes:
        loops: What to train.
        steps: Steps of training, after which the losses are compared.
        sweep: Whether the first loop is also measured over `num_times`, `batch_sizes`
            and `max_steps`.
        num_times: Numbers of save times.
        batch_sizes: Numbers of initial values.
        max_steps: How many steps diffrax may make.
    """

    loops: tuple[LoopName, ...] = get_args(LoopName)
    steps: int = 50
    sweep: bool = True
    num_times: tuple[int, ...] = (0, 10, 100, 1000)
    batch_sizes: tuple[int, ...] = (1, 32, 256)
    max_steps: tuple[int, ...] = (64, 4096, 65536)
    repeats: int = 20
    out: Path = Path("runs/training_loops/results.json")

    def reduced(self) -> Self:
        """The same measurement, small enough to take a minute."""
        return dataclasses.replace(
            self, loops=("cnf",), steps=2, sweep=False, repeats=2
        )

    def check(self) -> None:
        """Raises an error that names the first setting that makes no sense."""
        super().check()
        check_least(self, steps=1)
        check_choice(self, "loops")
        check_lists(self, "batch_sizes", "max_steps")


def ways(loop: Loop, num_steps: int | None) -> dict[str, Options]:
    """All ways to solve, by name; the fixed grid has `num_steps` steps."""
    solver = loop.options["solver"]
    own = {"solver": DEERSolver(solver)}
    found = {
        _BASELINE: loop.options | {"adjoint": _DEFAULT},
        "DirectAdjoint": loop.options | {"adjoint": diffrax.DirectAdjoint()},
        "DEERSolver": loop.options | own | {"adjoint": _DEFAULT},
        "DEERSolver, DEERAdjoint": loop.options | own | {"adjoint": DEERAdjoint()},
    }
    if num_steps is not None:
        found["fixed grid"] = _fixed(solver, num_steps)
    return found


def _fixed(solver: Any, num_steps: int) -> Options:
    return {
        "solver": DEERSolver(solver, num_steps=num_steps),
        "stepsize_controller": WholeInterval(),
        "dt0": None,
        "adjoint": DEERAdjoint(),
    }


def fewest_steps(loop: Loop) -> tuple[int | None, float]:
    """The fewest of `_GRIDS` with the error of the loop itself, and that error."""

    def outputs(options):
        return jax.jit(lambda: loop.predict(loop.params, loop.data, options))()

    double = lambda tree: jax.tree.map(
        lambda x: x.astype(jnp.float64) if eqx.is_inexact_array(x) else x, tree
    )
    with jax.enable_x64(True):
        solver = loop.options["solver"]
        exact = _adaptive(solver, 1e-10, 1e-12, None) | {"max_steps": 65536}
        reference = loop.predict(double(loop.params), double(loop.data), exact)
    error = largest_difference(outputs(loop.options), reference)
    for num_steps in _GRIDS:
        options = _fixed(solver, num_steps)
        if largest_difference(outputs(options | {"throw": False}), reference) <= error:
            return num_steps, error
    return None, error


def _trainer(loop: Loop, options: Options) -> tuple[Callable, tuple[Any, ...]]:
    """A step of training, of `jax.jit`, and its arguments."""
    params, static = eqx.partition(loop.params, eqx.is_inexact_array)
    optimizer = optax.adam(_LEARNING_RATE)

    def loss(params, data):
        found = loop.predict(eqx.combine(params, static), data, options)
        return loop.loss(found, data)

    @jax.jit
    def step(params, state, data):
        value, gradient = jax.value_and_grad(loss)(params, data)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value, gradient

    return step, (params, optimizer.init(params), loop.data)


def _measure(
    loop: Loop, num_steps: int | None, names: tuple[str, ...] | None, config: Config
) -> dict[str, Any]:
    """All ways to solve a loop."""
    known: dict[str, Any] = {}

    def describe(name, prepared: Prepared):
        *_, value, gradient = prepared.value
        known.setdefault("gradient", gradient)
        compiled, arguments = prepared.compiled.function, prepared.compiled.arguments
        params, state, data = arguments
        losses = []
        for _ in range(config.steps):
            params, state, loss, _ = compiled(params, state, data)
            losses.append(float(loss))
        difference = largest_difference(gradient, known["gradient"])
        return {
            "loss": float(value),
            "last_loss": losses[-1],
            # That of another grid is another one.
            "difference" if name == "fixed grid" else "gradient_difference": difference,
        }

    chosen = ways(loop, num_steps)
    pairs = ((n, o) for n, o in chosen.items() if names is None or n in names)
    prepared = ((n, prepare(*_trainer(loop, o), jnp.inf)) for n, o in pairs)
    return measure_methods(prepared, describe, jnp.inf, config.repeats)


def measure_loop(name: LoopName, config: Config) -> dict[str, Any]:
    """One loop, in every way."""
    with jax.enable_x64(name in _IN_DOUBLE):
        loop = LOOPS[name]()
        num_steps, error = fewest_steps(loop)
        methods = _measure(loop, num_steps, None, config)
    cell = {"loop": name, "title": loop.title, "num_steps": num_steps, "error": error}
    print(f"{loop.title}: done", flush=True)
    jax.clear_caches()
    return cell | {"methods": methods}


_SWEPT = (_BASELINE, "DEERSolver", "DEERSolver, DEERAdjoint")


def measure_sweep(config: Config) -> list[dict[str, Any]]:
    """The first loop over save times, batch sizes and `max_steps`."""
    sizes = itertools.product(config.max_steps, config.num_times, config.batch_sizes)
    cells = []
    for max_steps, num_times, batch_size in sizes:
        loop = neural_ode(batch_size, num_times, max_steps)
        quick = dataclasses.replace(config, steps=1)
        cell = {
            "max_steps": max_steps,
            "num_times": num_times,
            "batch_size": batch_size,
        }
        cells.append(cell | {"methods": _measure(loop, None, _SWEPT, quick)})
        print(cell, flush=True)
        jax.clear_caches()
    return cells


def table(results: dict[str, Any]) -> str:
    """One line for each loop and way, in Markdown."""
    rows, means = [], {}
    for cell in results["loops"]:
        methods = cell["methods"]
        for name, found in methods.items():
            ratio = speed_up(methods, name, _BASELINE)
            means.setdefault(name, []).append(ratio)
            label = f"{name}, {cell['num_steps']} steps" if "fixed" in name else name
            first = found["compile_seconds"]
            compiled = f"{first / methods[_BASELINE]['compile_seconds']:.2f}×"
            row = [cell["title"], label, f"{first:.1f}", compiled, describe_time(found)]
            rows.append([*row, f"{ratio:.2f}×", f"{found['last_loss']:.4g}"])
    for name, ratios in means.items():
        mean = f"{geometric_mean(ratios):.2f}×"
        rows.append(["geometric mean", name, "", "", "", mean, ""])
    head = ("loop", "solver, adjoint", "compile (s)", "of it", "step (ms) [quartiles]")
    return format_table((*head, "speed-up", "last loss"), rows)


def summary(results: dict[str, Any]) -> str:
    """One line for each loop: speed-ups, and the first call, in Markdown."""
    names = ("DirectAdjoint", "DEERSolver", "DEERSolver, DEERAdjoint", "fixed grid")
    rows, all_ratios = [], []
    for cell in results["loops"]:
        methods = cell["methods"]
        ratios = [
            speed_up(methods, n, _BASELINE) if n in methods else None for n in names
        ]
        all_ratios.append(ratios)
        first = [methods[name]["compile_seconds"] for name in (_BASELINE, *names[1:3])]
        row = [cell["title"], describe_time(methods[_BASELINE])]
        row += ["-" if ratio is None else f"{ratio:.2f}×" for ratio in ratios]
        rows.append([*row, *(f"{each / first[0]:.2f}×" for each in first[1:])])
    known = [[r for r in ratios if r] for ratios in zip(*all_ratios, strict=True)]
    means = [f"{geometric_mean(ratios):.2f}×" for ratios in known]
    rows.append(["geometric mean", "", *means, "", ""])
    head = ("training step", "as it is (ms) [quartiles]", *(f"{n}" for n in names))
    return format_table((*head, "compile: solver", "and adjoint"), rows)


def sweep_table(results: dict[str, Any]) -> str:
    """The speed-ups of the first loop, one line for each size."""
    names = ("max_steps", "num_times", "batch_size")
    rows = [
        [
            *(str(cell[name]) for name in names),
            describe_time(cell["methods"][_BASELINE]),
            *(
                f"{speed_up(cell['methods'], name, _BASELINE):.2f}×"
                for name in _SWEPT[1:]
            ),
        ]
        for cell in results["sweep"]
    ]
    head = ("`max_steps`", "save times", "batch", "Tsit5 (ms) [quartiles]")
    return format_table((*head, *(f"`{name}`" for name in _SWEPT[1:])), rows)


def tables(results: dict[str, Any]) -> str:
    """Both tables, as far as there are any."""
    parts = [table(results)]
    return "\n\n".join(parts + [sweep_table(results)] * bool(results["sweep"]))


def main(config: Config) -> dict[str, Any]:
    """Measures, prints and writes the results."""
    config = ready(config)
    loops = [measure_loop(name, config) for name in config.loops]
    sweep = measure_sweep(config) if config.sweep else []
    dtype = "float32 (kinetics: float64)"
    return conclude("training_loops", config, dtype, tables, loops=loops, sweep=sweep)


if __name__ == "__main__":
    run(main, Config)
