"""Trains with the steps of one long trajectory over several devices and processes.

python -m experiments.distributed [--problem ode] [--processes 2] [--kill-at 12]

starts the processes, and all of them again if one has died: those that are left would
wait for it. Each goes on from the last checkpoint. By `uv run --group distributed`.
A cluster has a launcher of its own in place of `supervise`; `train` stays as it is.
"""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from jaxtyping import Array, PyTree

from diffrax_deer import (
    DEERRNN,
    DEERAdjoint,
    DEERSolver,
    Newton,
    ShardedScan,
    WholeInterval,
)

# What a process is told by its environment.
_RANK, _PORT = "DISTRIBUTED_RANK", "DISTRIBUTED_PORT"
# Who is left over gives up after the first; who raises an error waits for the second.
_HEARTBEAT, _SHUTDOWN = 20, 30


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings.

    Attributes:
        problem: A classifier of one long sequence, by a GRU, or a neural ODE.
        num_steps: Steps of the trajectory, a multiple of the number of devices.
        train_steps: Steps of the training.
        processes: Processes on this machine.
        devices: Devices of all processes together.
        every: Steps from one checkpoint to the next.
        kill_at: The last process kills itself before this step, the first time.
        restarts: How often all processes are started again.
        folder: Checkpoints, and `losses.json`.
    """

    problem: Literal["classifier", "ode"] = "classifier"
    num_steps: int = 2**15
    train_steps: int = 20
    processes: int = 2
    devices: int = 8
    every: int = 5
    kill_at: int | None = None
    restarts: int = 3
    folder: Path = Path("runs/distributed")


# A model, and the loss of it, of the guess and of the data, with the next guess.
Loss = Callable[[Any, PyTree[Array], PyTree[Array]], tuple[Array, PyTree[Array]]]


def _classifier(config: Config, mesh: Mesh) -> tuple[Any, Any, Any, Loss]:
    """Model, guess and data, with the loss: the class is in the mean of all states."""
    rng, size = np.random.default_rng(0), 8
    keys = jax.random.split(jax.random.key(0))
    cell = eqx.nn.GRUCell(2, size, key=keys[0])
    model = cell, eqx.nn.Linear(size, 2, key=keys[1])
    phase = np.linspace(0.0, 40.0, config.num_steps)[:, None]
    xs = np.sin(phase * [1.0, 2.0]) + 0.1 * rng.normal(size=(config.num_steps, 2))
    method = Newton(scan=ShardedScan(mesh, "time"))

    def loss(model, guess, xs):
        cell, readout = model
        ys = DEERRNN(cell, method=method, throw=False)(xs, guess=guess)
        logits = readout(jnp.mean(ys, axis=0))
        return optax.softmax_cross_entropy_with_integer_labels(logits, 1), ys

    return model, np.zeros((config.num_steps, size)), xs, loss


def _ode(config: Config, mesh: Mesh) -> tuple[Any, Any, Any, Loss]:
    """The same for a neural ODE that is to follow a circle."""
    model = eqx.nn.MLP(2, 2, 16, 1, jnp.tanh, key=jax.random.key(0))
    ts = np.linspace(0.0, 10.0, 5)
    data = ts, np.stack([np.cos(ts), np.sin(ts)], axis=1)
    method = Newton(scan=ShardedScan(mesh, "time"))
    solver = DEERSolver(num_steps=config.num_steps, method=method)
    term, y0 = diffrax.ODETerm(lambda t, y, model: model(y)), jnp.array([1.0, 0.0])

    def loss(model, state, data):
        ts, targets = data
        sol = diffrax.diffeqsolve(
            term,
            solver,
            0.0,
            10.0,
            None,
            y0,
            model,
            saveat=diffrax.SaveAt(ts=ts, solver_state=True),
            stepsize_controller=WholeInterval(),
            adjoint=DEERAdjoint(),
            solver_state=state,
            throw=False,
        )
        return jnp.mean((sol.ys - targets) ** 2), sol.solver_state

    state = solver.init(term, 0.0, 10.0, y0, model)
    return model, state, data, loss


def _put(mesh: Mesh, num_steps: int, tree: PyTree[Any]) -> PyTree[Array]:
    """Arrays of all processes; what has the length of the trajectory in parts."""

    def put(x):
        x = np.asarray(x)
        spec = P("time") if x.shape[:1] == (num_steps,) else P()
        sharding = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, tree)


def train(config: Config, rank: int, first: bool) -> None:
    """The training of one process."""
    import orbax.checkpoint as ocp  # pyright: ignore

    mesh = jax.make_mesh((config.devices,), ("time",), axis_types=(AxisType.Auto,))
    make = {"classifier": _classifier, "ode": _ode}[config.problem]
    model, guess, data, loss = make(config, mesh)
    arrays, static = eqx.partition(model, eqx.is_inexact_array)
    optimizer = optax.adam(1e-2)
    state = arrays, optimizer.init(arrays), guess
    state, data = (_put(mesh, config.num_steps, x) for x in (state, data))

    # Arrays of several processes are arguments; to close over them is an error.
    def step(state, data):
        arrays, moments, guess = state
        combined = lambda a: loss(eqx.combine(a, static), guess, data)
        (value, guess), grad = jax.value_and_grad(combined, has_aux=True)(arrays)
        updates, moments = optimizer.update(grad, moments)
        return (eqx.apply_updates(arrays, updates), moments, guess), value

    compiled = jax.jit(step).lower(state, data).compile()
    options = ocp.CheckpointManagerOptions(save_interval_steps=config.every)
    folder = (config.folder / "checkpoints").resolve()
    manager, start, losses = ocp.CheckpointManager(folder, options=options), 0, {}
    leaves, structure = jax.tree.flatten(state)
    if (last := manager.latest_step()) is not None:
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, leaves)
        leaves = manager.restore(last, args=ocp.args.StandardRestore(like))
        state, start = jax.tree.unflatten(structure, leaves), last + 1
    record, begin = config.folder / "losses.json", time.perf_counter()
    if start and record.exists():
        losses = json.loads(record.read_text())
    for index in range(start, config.train_steps):
        if first and index == config.kill_at and rank == config.processes - 1:
            manager.wait_until_finished()
            os.kill(os.getpid(), signal.SIGKILL)
        state, value = compiled(state, data)
        leaves = jax.tree.leaves(state)
        manager.save(index, args=ocp.args.StandardSave(leaves))
        losses[str(index)] = float(value)
        if not np.isfinite(losses[str(index)]):
            # Not an error of one process: all of them see the same loss.
            break
        if rank == 0:
            record.write_text(json.dumps(losses))
    manager.wait_until_finished()
    manager.close()
    if rank == 0:
        seconds = (time.perf_counter() - begin) / max(config.train_steps - start, 1)
        _report(config, compiled, seconds, start, losses)


def _report(config: Config, compiled: Any, seconds: float, start: int, losses) -> None:
    names = "all-reduce", "all-gather", "all-to-all", "collective-permute"
    lines = [x for x in compiled.as_text().splitlines() if "while/body" in x]
    calls = [n for x in lines for n in names if f" {n}(" in x or f" {n}-start(" in x]
    memory = compiled.memory_analysis().temp_size_in_bytes / 1e6
    print(
        f"{config.problem}: from step {start}, {config.num_steps / seconds:.3g} steps "
        f"of the trajectory a second, {len(calls)} collectives in loops, {memory:.3g} "
        f"MB a device, last loss {list(losses.values())[-1]:.12g}",
        flush=True,
    )


def worker(config: Config) -> None:
    """One process, as the supervisor has started it."""
    rank, port = int(os.environ[_RANK]), os.environ[_PORT]
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", config.devices // config.processes)
    if config.processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            f"127.0.0.1:{port}",
            config.processes,
            rank,
            heartbeat_timeout_seconds=_HEARTBEAT,
            shutdown_timeout_seconds=_SHUTDOWN,
        )
    train(config, rank, first=os.environ["DISTRIBUTED_ATTEMPT"] == "0")
    if config.processes > 1:
        jax.distributed.shutdown()


def supervise(config: Config) -> int:
    """Starts all processes, and again if one dies; the exit status of the last try."""
    config.folder.mkdir(parents=True, exist_ok=True)
    status = 1
    for attempt in range(config.restarts + 1):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        told = os.environ | {_PORT: port, "DISTRIBUTED_ATTEMPT": str(attempt)}
        command = [sys.executable, "-m", "experiments.distributed", *sys.argv[1:]]
        ranks = range(config.processes)
        logs = [(config.folder / f"{rank}.log").open("a") for rank in ranks]
        all_processes = [
            subprocess.Popen(
                command,
                env=told | {_RANK: str(rank)},
                stdout=logs[rank] if rank else None,
                stderr=logs[rank],
            )
            for rank in ranks
        ]
        while True:
            states = [process.poll() for process in all_processes]
            if None not in states or any(states):
                break
            time.sleep(0.1)
        for process in all_processes:
            # A polite signal is caught by `jax.distributed`.
            process.kill()
            process.wait()
        for log in logs:
            log.close()
        status = max(abs(state or 0) for state in states)
        if status == 0:
            return 0
        print(f"attempt {attempt}: a process has died; all are started again.")
    return status


if __name__ == "__main__":
    settings = tyro.cli(Config)
    if _RANK in os.environ:
        worker(settings)
    else:
        sys.exit(supervise(settings))
