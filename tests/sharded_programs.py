"""Programs over several devices, for `test_sharded_scan.py`: each a process of its own.

python -m tests.sharded_programs PROGRAM [ARGUMENT ...]

prints what it has found as JSON: relative errors, and what the compiled program does.
"""

import dataclasses
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

import diffrax_deer._affine_scan as affine_scan
import diffrax_deer._distributed.sharded_scan as sharded_scan
from diffrax_deer import (
    DEERRNN,
    BlockDiagonal,
    DEERAdjoint,
    DEERSolver,
    Dense,
    Diagonal,
    Equidistributed,
    Newton,
    ParallelGradient,
    SequentialScan,
    ShardedScan,
    WholeInterval,
    affine_recurrence,
    deer_scan,
)
from diffrax_deer._time_axis import TimeAxis

_COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)"
    r"(?:-start)?\("
)
_SHAPE = re.compile(r"\w+\[([\d,]*)\]")


def make_mesh(*shape: int, names: tuple[str, ...] = ("time",)) -> Mesh:
    devices = jax.devices()[: math.prod(shape)]
    types = (AxisType.Auto,) * len(shape)
    return jax.make_mesh(shape, names, devices=devices, axis_types=types)


def put(mesh: Mesh, x: Any, *spec: str | None) -> jax.Array:
    """`x`, the same on each process, as one array of all of them."""
    x, sharding = np.asarray(x), NamedSharding(mesh, P(*spec))
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def relative_errors(found: Any, expected: Any) -> list[float]:
    """Of each leaf, the largest one on the devices of this process."""

    def error(x, y):
        y = np.asarray(y)
        parts = jnp.asarray(x).addressable_shards
        size = np.max(np.abs(y))
        return float(
            max(np.max(np.abs(np.asarray(s.data) - y[s.index])) for s in parts) / size
        )

    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return [error(x, y) for x, y in pairs]


def collectives(compiled: Any) -> list[tuple[str, int, bool]]:
    """The kind of each, its number of elements, and whether it is inside of a loop."""
    found = []
    for line in compiled.as_text().splitlines():
        if match := _COLLECTIVE.search(line):
            shapes = _SHAPE.findall(match.group(1))
            sizes = [math.prod(int(n) for n in s.split(",") if n) for s in shapes]
            found.append((match.group(2), sum(sizes), "while/body" in line))
    return found


# ---- The affine recurrence ----


def scans() -> Any:
    """Every structure, both directions, lengths that do not fit, both local scans."""
    rng, errors = np.random.default_rng(0), {}
    for local in ("sequential", "associative"):
        sequential = local == "sequential"
        for module in (affine_scan, sharded_scan):
            vars(module)["prefers_sequential_scan"] = lambda s=sequential: s
        for num_devices, lengths in (2, [37]), (8, [1, 37]):
            scan = ShardedScan(make_mesh(num_devices), "time")
            for num_steps in lengths:
                orthogonal = np.linalg.qr(rng.normal(size=(num_steps, 4, 4)))[0]
                structures = (
                    Dense(jnp.asarray(0.9995 * orthogonal)),
                    Diagonal(jnp.asarray(rng.uniform(-1, 1, size=(num_steps, 4)))),
                    BlockDiagonal(jnp.asarray(rng.normal(size=(num_steps, 2, 2, 2)))),
                )
                b, c, b_dot = jnp.asarray(rng.normal(size=(3, num_steps, 4)))

                def all_at_once(scan, a, b=b, c=c, b_dot=b_dot):
                    solve = lambda a, b: affine_recurrence(a, b, scan=scan)
                    y, pull = jax.vjp(solve, a, b)
                    return y, pull(c), jax.jvp(solve, (a, b), (a, b_dot))[1]

                run = jax.jit(
                    lambda all_a, f=all_at_once, scan=scan: [f(scan, a) for a in all_a]
                )
                expected = jax.jit(
                    lambda all_a, f=all_at_once: [f(SequentialScan(), a) for a in all_a]
                )
                name = f"{local}, {num_devices} devices, {num_steps} steps"
                found, wanted = run(structures), expected(structures)
                floor = lambda tree: jax.tree.map(lambda x: x + 10.0, tree)
                errors[name] = max(relative_errors(floor(found), floor(wanted)))
        # Nothing comes in, so that what overflows must not be seen.
        a = Diagonal(jnp.full((16, 2), 1e300).at[8:].set(0.5))
        b = jnp.zeros((16, 2)).at[8:].set(1.0)
        scan = ShardedScan(make_mesh(2), "time")
        y = affine_recurrence(a, b, scan=scan)
        wanted = 2 - 2.0 ** -np.arange(8)[:, None] * np.ones(2)
        errors[f"{local}, overflow"] = float(np.max(np.abs(y[8:] - wanted)))
    return errors


def lookups() -> Any:
    """Few steps and many, of numbers that do not fit, and also none on some devices."""
    rng, errors = np.random.default_rng(0), {}
    for num_devices, num_steps, num_times in (2, 37, 4), (8, 37, 50), (8, 9, 9):
        axis = TimeAxis(make_mesh(num_devices), "time")
        ends, x = np.sort(rng.uniform(size=num_steps)), rng.normal(size=(num_steps, 2))
        ts = np.append(rng.uniform(-0.1, 1.1, num_times - 1), ends[num_steps // 2])
        c = rng.normal(size=(num_times, 2))

        @jax.jit
        def found(ends, ts, x, c, axis=axis):
            index = axis.searchsorted(ends, ts)
            last = jnp.minimum(index, len(ends) - 1)
            taken, pull = jax.vjp(lambda x: axis.take([x, x > 0], last)[0], x)
            return index, taken, axis.take([x > 0], last)[0], *pull(c)

        index = np.searchsorted(ends, ts)
        last, pulled = np.minimum(index, num_steps - 1), np.zeros_like(x)
        np.add.at(pulled, last, c)
        wanted = index, x[last], x[last] > 0, pulled
        pairs = zip(found(ends, ts, x, c), wanted, strict=True)
        differences = [np.max(np.abs(1.0 * np.asarray(a) - b)) for a, b in pairs]
        errors[f"{num_times} of {num_steps}"] = float(max(differences))
    return errors


# ---- A recurrence ----


def _step(w, y, x):
    # Close to orthogonal: what happens at the start is seen at the end.
    return 0.3 * jnp.tanh(w @ y + x) + 0.8 * jnp.roll(y, 1)


def _recurrence(num_steps: int, size: int) -> tuple[Any, Callable]:
    """The arguments, and the loss of the trajectories for a scan like `lax.scan`."""
    rng = np.random.default_rng(size)
    w = rng.normal(size=(size, size)) / np.sqrt(size)
    arguments = w, rng.normal(size=size), rng.normal(size=(num_steps, size))
    weights = np.cos(np.arange(num_steps))[:, None]

    def loss(scan, w, y0, xs):
        f = lambda y, x: (_step(w, y, x),) * 2
        last, ys = scan(f, y0, xs)
        return jnp.sum(weights * ys**2) + jnp.sum(last)

    return arguments, loss


def _deer(scan: Any) -> Callable:
    method, gradient = Newton(scan=scan), ParallelGradient(scan=scan)
    if scan is None:
        # What every scan meets that does not know where the steps lie.
        method = Newton(scan=SequentialScan(), window=10**9)
        gradient = ParallelGradient(SequentialScan())
    options: Any = dict(method=method, gradient=gradient, throw=False)
    return lambda f, init, xs: deer_scan(f, init, xs, **options)


def _compiled(loss: Callable, scan: Callable, arguments: Any) -> Any:
    function = jax.value_and_grad(lambda *a: loss(scan, *a), argnums=(0, 1, 2))
    return jax.jit(function).lower(*arguments).compile()


def _mesh(shape: str) -> tuple[Mesh, tuple[str, ...], Callable]:
    """Of `8` devices, or of `2x4` with a batch over the first axis.

    Also the axis of the batch, if any, and what makes the arguments those of a batch.
    """
    if "x" not in shape:
        return make_mesh(int(shape)), (), lambda x: x
    sizes = [int(n) for n in shape.split("x")]
    several = lambda x: np.stack([x, 1.5 * x, -x, 0.5 * x])
    return make_mesh(*sizes, names=("batch", "time")), ("batch",), several


def recurrence(num_steps: str, size: str, *meshes: str) -> Any:
    """Value and gradient for each mesh; in a batch all samples have one matrix."""
    (w, *rest), loss = _recurrence(int(num_steps), int(size))
    found = {}
    for shape in meshes:
        mesh, batch, several = _mesh(shape)

        def total(scan, w, *rest, batch=batch):
            each = lambda *rest: loss(scan, w, *rest)
            return jnp.sum(jax.vmap(each)(*rest)) if batch else each(*rest)

        arguments = w, *map(several, rest)
        expected = _compiled(total, lax.scan, arguments)(*arguments)
        fits = int(num_steps) % mesh.shape["time"] == 0
        specs = (), batch, (*batch, "time") if fits else batch
        placed = [put(mesh, x, *s) for x, s in zip(arguments, specs, strict=True)]
        compiled = _compiled(total, _deer(ShardedScan(mesh, "time")), placed)
        value, gradient = compiled(*placed)
        found[shape] = {
            "errors": relative_errors((value, gradient), expected),
            "collectives": collectives(compiled),
            "specs": [list(x.sharding.spec) for x in gradient],
        }
    return found


def counts(what: str) -> Any:
    """How many collectives one iteration has, of which kind, and how large at most.

    Two save times: no loop but that of Newton's method exchanges anything.
    """
    words = {"recurrence": ("4096", "8"), "ode": ("uniform", "4096", "8", "2")}[what]
    result = globals()[what](*words, "8")["8"]
    inside = [kind for kind, _, is_inside in result["collectives"] if is_inside]
    sizes = [size for _, size, is_inside in result["collectives"] if is_inside]
    return Counter(inside) | {"together": len(inside), "largest": max(sizes)}


def no_sharded_scan(num_steps: str, size: str) -> Any:
    """The collectives of the same program with another scan."""
    arguments, loss = _recurrence(int(num_steps), int(size))
    mesh, specs = make_mesh(8), ((), (), ("time",))
    placed = [put(mesh, x, *s) for x, s in zip(arguments, specs, strict=True)]
    return collectives(_compiled(loss, _deer(None), placed))


# ---- A differential equation ----


def _ode(saveat: diffrax.SaveAt, batch: bool = False) -> Callable:
    """The loss of initial values, parameters and state, with the state after it."""

    def field(t, y, args):
        del t
        return args * (1 - y**2) * jnp.roll(y, 1) - y

    def loss(options, y0, args, state):
        kwargs = dict(saveat=saveat, solver_state=state, throw=False) | options
        solver, term = kwargs.pop("solver"), diffrax.ODETerm(field)
        sol = diffrax.diffeqsolve(term, solver, 0.0, 10.0, None, y0, args, **kwargs)
        return jnp.sum(sol.ys**2), (sol.solver_state, sol.stats)

    def total(options, y0, args, state):
        each = lambda y0, state: loss(options, y0, args, state)
        values, rest = jax.vmap(each)(y0, state)
        return jnp.sum(values), rest

    return total if batch else loss


def _deer_options(num_steps: int, scan: Any) -> dict[str, Any]:
    # The gradient follows the method.
    solver = DEERSolver(num_steps=num_steps, method=Newton(scan=scan))
    controller, adjoint = WholeInterval(), DEERAdjoint()
    return dict(solver=solver, stepsize_controller=controller, adjoint=adjoint)


def _cold(options: dict[str, Any], y0: Any) -> Any:
    term = diffrax.ODETerm(lambda t, y, args: y)
    start = lambda y0: options["solver"].init(term, 0.0, 10.0, y0, None)
    return (jax.vmap(start) if jnp.ndim(y0) > 1 else start)(jnp.asarray(y0))


def _gradient(loss: Callable, options: dict[str, Any], arguments: Any) -> Any:
    function = lambda *a: loss(options, *a)
    function = jax.value_and_grad(function, argnums=(0, 1), has_aux=True)
    return jax.jit(function).lower(*arguments).compile()


def _plain(saveat: diffrax.SaveAt, num_steps: int, batch: bool) -> Callable:
    """The same by diffrax's own loop, over the times that are the first argument."""
    loss, adjoint = _ode(saveat), diffrax.RecursiveCheckpointAdjoint()
    options = dict(solver=diffrax.Dopri5(), adjoint=adjoint, max_steps=num_steps + 1)

    def plain(ts, y0, args):
        to = dict(stepsize_controller=diffrax.StepTo(ts))
        return loss(options | to, y0, args, None)[0]

    def total(ts, y0, args):
        return jnp.sum(jax.vmap(plain, (0, 0, None))(ts, y0, args))

    function = total if batch else plain
    return jax.jit(jax.value_and_grad(function, argnums=(1, 2)))


def ode(grid: str, num_steps: str, size: str, num_times: str, *meshes: str) -> Any:
    """Value and gradient of a solve, and of a second one that starts from its state."""
    count, found = int(num_steps), {}
    saveat = diffrax.SaveAt(
        ts=jnp.linspace(0.0, 10.0, int(num_times)), solver_state=True
    )
    grids = {"uniform": None, "equidistributed": Equidistributed(1e-6, 1e-6)}
    y0, args = np.linspace(0.5, 1.0, int(size)), np.linspace(2.0, 1.0, int(size))
    for shape in meshes:
        mesh, batch, several = _mesh(shape)
        y0s, options = several(y0), _deer_options(count, ShardedScan(mesh, "time"))
        options["solver"] = dataclasses.replace(options["solver"], grid=grids[grid])

        def place(x, mesh=mesh, batch=batch):
            fits = count in x.shape and count % mesh.shape["time"] == 0
            return put(mesh, x, *batch, *["time"] * fits)

        state = jax.tree.map(place, _cold(options, y0s))
        shardings = jax.tree.map(lambda x: x.sharding, state)
        everywhere = NamedSharding(mesh, P())
        nodes = jax.jit(lambda state: state.ts, out_shardings=everywhere)
        placed = put(mesh, y0s, *batch), put(mesh, args)
        compiled = _gradient(_ode(saveat, bool(batch)), options, (*placed, state))
        plain = _plain(saveat, count, bool(batch))
        found[shape] = {"collectives": collectives(compiled)}
        for name in ("cold", "warm"):
            (value, (state, stats)), grad = compiled(*placed, state)
            ts = np.asarray(nodes(state))
            expected = plain(ts, y0s, args)
            found[shape][name] = {
                "errors": relative_errors((value, grad), expected),
                "iterations": int(np.max(stats["num_newton_iterations"])),
                "specs": [list(x.sharding.spec) for x in (state.ends, state.ys)],
                "unevenness": float(np.max(np.abs(np.diff(ts, 2)))),
            }
            state = jax.device_put(state, shardings)
    return found


def memory(what: str) -> Any:
    """Temporary bytes a device, for 1 and for 8 devices; nothing is run."""
    num_steps, size = 32768, 8
    (w, y0, xs), loss = _recurrence(num_steps, size)
    shape = lambda x, mesh, *spec: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=NamedSharding(mesh, P(*spec))
    )
    found = []
    for count in (1, 8):
        mesh = make_mesh(count)
        scan = ShardedScan(mesh, "time")
        if what == "recurrence":
            arguments = shape(w, mesh), shape(y0, mesh), shape(xs, mesh, "time")
            compiled = _compiled(loss, _deer(scan), arguments)
        else:
            num_times = {"few times": 65, "all times": num_steps}[what]
            loss = _ode(diffrax.SaveAt(ts=jnp.linspace(0.0, 10.0, num_times)))
            options = _deer_options(num_steps, scan)
            place = lambda x, m=mesh: shape(x, m, *["time"] * (num_steps in x.shape))
            state = jax.tree.map(place, _cold(options, y0))
            arguments = shape(y0, mesh), shape(y0, mesh), state
            compiled = _gradient(loss, options, arguments)
        found.append(compiled.memory_analysis().temp_size_in_bytes)
    return found


# ---- A batch within `jax.shard_map` ----


def shard_map(*names: str) -> Any:
    """Value and gradient of a batch, with the types of what varies and without."""
    rng, mesh = np.random.default_rng(0), make_mesh(2, names=("batch",))
    w, y0s = 0.5 * rng.normal(size=(2, 2)), rng.normal(size=(4, 2))
    cell = eqx.nn.GRUCell(1, 2, key=jax.random.key(0))
    parallel: Any = dict(method=Newton(), gradient=ParallelGradient())
    field = lambda t, y, w: jnp.tanh(w @ y) - 0.3 * y

    def solve(w, y0, controller, **options):
        solver = DEERSolver(diffrax.Heun(), **options)
        dt0 = None if options else jnp.array(0.1)
        saveat = diffrax.SaveAt(ts=jnp.linspace(0.0, 2.0, 3))
        settings: Any = dict(
            saveat=saveat, adjoint=DEERAdjoint(), throw=False, max_steps=64
        )
        settings["stepsize_controller"] = controller
        term = diffrax.ODETerm(field)
        return diffrax.diffeqsolve(term, solver, 0.0, 2.0, dt0, y0, w, **settings).ys

    def scan(w, y0, **options):
        f, xs = lambda y, x: (jnp.tanh(w @ y) + x,) * 2, jnp.linspace(0.0, 1.0, 16)
        return deer_scan(f, y0, xs, throw=False, **options)[1]

    def rnn(w, y0):
        where = lambda c: c.weight_hh
        new = eqx.tree_at(where, cell, jnp.concatenate([w, w, w]))
        rnn = DEERRNN(new, throw=False, **parallel)
        return rnn(jnp.linspace(0.0, 1.0, 16)[:, None] * y0[None, :1], 0.0 * y0)

    pid = diffrax.PIDController(rtol=1e-4, atol=1e-4)
    programs: dict[str, Callable[..., Any]] = {
        "scan": scan,
        "parallel scan": lambda *a: scan(*a, **parallel),
        "rnn": rnn,
        "whole": lambda w, y0: solve(w, y0, WholeInterval(), num_steps=8),
        "parallel whole": lambda w, y0: solve(
            w, y0, WholeInterval(), num_steps=8, **parallel
        ),
        "controller": lambda w, y0: solve(w, y0, pid),
    }
    errors = {}
    for name in names:

        def loss(w, y0s, program=programs[name]):
            return jnp.sum(jax.vmap(lambda y0: program(w, y0))(y0s) ** 2)

        function = jax.value_and_grad(loss, argnums=(0, 1))
        expected = jax.jit(function)(w, y0s)
        for check_vma in (True, False):

            def local(w, y0s, check_vma=check_vma, function=function):
                value, (w_dot, y0s_dot) = function(w, y0s)
                # The transpose of what makes `w` vary is the sum already.
                if not check_vma:
                    w_dot = lax.psum(w_dot, "batch")
                return lax.psum(value, "batch"), (w_dot, y0s_dot)

            specs = (P(), P("batch")), (P(), (P(), P("batch")))
            kwargs: Any = dict(zip(("in_specs", "out_specs"), specs, strict=True))
            mapped = jax.shard_map(local, mesh=mesh, check_vma=check_vma, **kwargs)
            found = jax.jit(mapped)(w, y0s)
            errors[f"{name}, {check_vma}"] = max(relative_errors(found, expected))
    return errors


# ---- Two processes ----


def process(rank: str, port: str, name: str, *words: str) -> Any:
    """A program in one of two processes with four devices each."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        f"127.0.0.1:{port}", 2, int(rank), heartbeat_timeout_seconds=30
    )
    found = globals()[name](*words)
    jax.distributed.shutdown()
    return found


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    count = os.environ.get("DEVICES", "8")
    jax.config.update("jax_num_cpu_devices", int(count))
    name, *words = sys.argv[1:]
    sys.stdout.write(json.dumps(globals()[name](*words)))
