"""Time, and a batch, over several devices: each program in a process of its own.

One device is all that this process has; `sharded_programs.py` has the programs.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optimistix as optx
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec as P

from diffrax_deer import (
    DEERRNN,
    Newton,
    ParallelGradient,
    Sequential,
    ShardedScan,
    deer_scan,
)

from .helpers import slowly

_ROOT = Path(__file__).parents[1]
_SECONDS = 280


def _start(*words: str, devices: int = 8) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.sharded_programs", *words]
    environment = os.environ | {"DEVICES": str(devices)}
    pipes: Any = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen(command, cwd=_ROOT, env=environment, text=True, **pipes)


def _result(process: subprocess.Popen[str]) -> Any:
    try:
        out, err = process.communicate(timeout=_SECONDS)
    finally:
        # `jax.distributed` answers a polite signal by going on.
        process.kill()
    assert process.returncode == 0, err[-3000:]
    return json.loads(out.splitlines()[-1])


def _run(*words: str, devices: int = 8) -> Any:
    return _result(_start(*words, devices=devices))


def _largest(collectives: list[tuple[int, bool]], in_loop: bool = False) -> int:
    return max(size for size, is_inside in collectives if is_inside or not in_loop)


# ---- Time ----


def test_scan_of_every_structure_is_sequential_with_derivatives():
    errors = _run("scans")
    assert len(errors) == 8
    for name, error in errors.items():
        assert error < 1e-13, name


# The other numbers of devices, in one process, compile for half a minute.
@pytest.mark.parametrize(
    ("num_steps", "size", "num_devices"),
    [
        (4096, 8, "1 2 8"),
        (1001, 2, "8"),
        slowly(4096, 2, "1 2 8"),
        slowly(1001, 8, "1 2 8"),
        slowly(1001, 2, "1 2"),
    ],
)
def test_recurrence_is_lax_scan_and_exchanges_nothing_of_its_length(
    num_steps, size, num_devices
):
    words = num_devices.split()
    found = _run("recurrence", str(num_steps), str(size), *words)
    assert list(found) == words
    for count, result in found.items():
        assert max(result["errors"]) < 1e-10
        if int(count) > 1:
            # Of steps that do not fit the inputs are on all devices, and so is their
            # cotangent.
            fits = num_steps % int(count) == 0
            assert _largest(result["collectives"], in_loop=not fits) < num_steps


def test_other_scans_exchange_all_steps_in_each_iteration():
    # The test of the test above, on the same program.
    assert _largest(_run("no_sharded_scan", "4096", "8"), in_loop=True) >= 4096 * 8


def test_batch_and_time_have_an_axis_of_the_mesh_each():
    found = _run("batch")
    assert max(found["errors"]) < 1e-10
    assert _largest(found["collectives"]) < 256
    assert found["specs"] == [["batch"], ["batch"], ["batch", "time"]]


@pytest.mark.parametrize(
    ("num_steps", "num_devices"), [(1024, 8), slowly(1001, 8), slowly(4096, 2)]
)
def test_differential_equation_is_sequential_diffrax(num_steps, num_devices):
    found = _run("ode", str(num_steps), str(num_devices))
    assert max(found["errors"] + found["warm errors"]) < 1e-10
    assert found["warm iterations"] <= 1 < found["iterations"]
    assert _largest(found["collectives"], in_loop=True) < num_steps
    if num_steps % num_devices == 0:
        # The times of all steps are gathered, once; the states stay where they are.
        assert found["spec"] == ["time"]
        assert _largest(found["collectives"]) < 2 * num_steps


@pytest.mark.parametrize("what", ["recurrence", slowly("ode")])
def test_eight_devices_need_less_than_a_quarter_of_the_memory_each(what):
    one, eight = _run("memory", what)
    assert eight < one / 4


@pytest.mark.slow
def test_two_processes_of_four_devices_are_one_of_eight():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # The other one first: that of rank 0 waits for it.
    processes = [_start("process", rank, port, devices=4) for rank in ("1", "0")]
    for process in processes:
        (result,) = _result(process).values()
        assert max(result["errors"]) < 1e-10
        assert _largest(result["collectives"]) < 4096


# ---- A batch ----


@pytest.mark.parametrize(
    "names",
    [
        ("parallel scan", "parallel whole"),
        slowly(("scan", "rnn", "whole", "controller")),
    ],
)
def test_batch_within_shard_map_is_that_of_one_device(names):
    errors = _run("shard_map", *names, devices=2)
    assert len(errors) == 2 * len(names)
    for name, error in errors.items():
        assert error < 1e-12, name


# ---- Arguments ----


def _scan(**kwargs: Any) -> ShardedScan:
    types = kwargs.pop("axis_types", (AxisType.Auto,))
    return ShardedScan(jax.make_mesh((1,), ("time",), axis_types=types), **kwargs)


def _add(y, x):
    return (y + x,) * 2


def test_mesh_without_such_an_axis_is_refused():
    with pytest.raises(ValueError, match=r"an axis 'space' of type `AxisType.Auto`"):
        _scan(axis="space")
    with pytest.raises(ValueError, match=r"an axis 'time' of type `AxisType.Auto`"):
        _scan(axis="time", axis_types=(AxisType.Explicit,))
    with pytest.raises(TypeError, match=r"an instance of `Mesh`"):
        ShardedScan(8, "time")  # pyright: ignore


def test_errors_at_run_time_are_refused():
    newton, xs = Newton(scan=_scan(axis="time")), jnp.ones(3)
    with pytest.raises(ValueError, match=r"Pass `throw=False`"):
        deer_scan(_add, jnp.zeros(()), xs, method=newton)
    with pytest.raises(ValueError, match=r"Pass `throw=False`"):
        DEERRNN(lambda x, y: x + y, method=newton)(xs, jnp.zeros(()))
    mesh = jax.make_mesh((1,), ("batch",), axis_types=(AxisType.Auto,))
    local = lambda xs: deer_scan(_add, xs[0], xs, method=Newton())[1]
    with pytest.raises(ValueError, match=r"inside of `jax.shard_map`"):
        jax.shard_map(local, mesh=mesh, in_specs=P("batch"), out_specs=P("batch"))(xs)


def test_what_fails_says_so():
    grow = lambda y, x: (y**2 * x,) * 2
    arguments = grow, jnp.full((), 10.0), jnp.ones(20)
    method = Newton(scan=_scan(axis="time"))
    options: Any = dict(method=method, throw=False, return_statistics=True)
    _, ys, statistics = deer_scan(*arguments, **options)
    expected = lax.scan(*arguments)[1]
    num_finite = int(jnp.sum(jnp.isfinite(expected)))
    assert statistics.result == optx.RESULTS.nonfinite
    assert int(statistics.num_solved) == num_finite
    assert jnp.array_equal(ys[:num_finite], expected[:num_finite])
    assert jnp.all(jnp.isnan(ys[num_finite:]))


def test_iteration_and_gradient_follow_the_scan():
    scan = _scan(axis="time")
    options: Any = dict(throw=False, return_statistics=True)
    arguments = _add, jnp.zeros(()), jnp.ones(2000)
    *_, statistics = deer_scan(*arguments, method=Newton(scan=scan), **options)
    assert statistics.method.window == 2000
    assert statistics.gradient == ParallelGradient(scan)
    assert Sequential().sharded_scan is None
