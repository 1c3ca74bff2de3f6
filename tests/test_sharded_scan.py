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
    if words[0] not in ("scans", "lookups", "shard_map"):
        # As for users: what is exchanged, and kept, is decided by optimizations.
        environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "0"
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


def _largest(collectives: list[Any], in_loop: bool = False, kind: str = "") -> int:
    """The size of the largest one; a `kind` that is left out is any."""
    found = (c for c in collectives if c[0].startswith(kind) and (c[2] or not in_loop))
    return max((size for _, size, _ in found), default=0)


def _process(*words: str) -> list[Any]:
    """What both of two processes of four devices have found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # The other one first: that of rank 0 waits for it.
    ranks = "1", "0"
    started = [_start("process", rank, port, *words, devices=4) for rank in ranks]
    return [_result(process) for process in started]


# ---- Time ----


def test_scan_of_every_structure_is_sequential_with_derivatives():
    errors = _run("scans")
    assert len(errors) == 8
    for name, error in errors.items():
        assert error < 1e-13, name


def _check_recurrence(found: Any, num_steps: int) -> None:
    for shape, result in found.items():
        assert max(result["errors"]) < 1e-10
        # Of steps that do not fit the inputs are on all devices, and so is their
        # cotangent.
        fits = num_steps % int(shape[-1]) == 0
        if shape != "1":
            assert ("time" in result["specs"][-1]) == fits
            assert _largest(result["collectives"], in_loop=not fits) < num_steps


def test_steps_are_looked_up_as_by_numpy_with_derivatives():
    errors = _run("lookups")
    assert len(errors) == 3
    assert max(errors.values()) < 1e-14


# The other meshes, in one process, compile for half a minute.
@pytest.mark.parametrize(
    ("num_steps", "size", "meshes"),
    [
        (4096, 8, "1 2 8 2x4"),
        (1001, 2, "8"),
        slowly(4096, 2, "1 2 8 2x4"),
        slowly(1001, 8, "1 2 8 2x4"),
        slowly(1001, 2, "1 2 2x4"),
    ],
)
def test_recurrence_is_lax_scan_and_exchanges_nothing_of_its_length(
    num_steps, size, meshes
):
    found = _run("recurrence", str(num_steps), str(size), *meshes.split())
    assert list(found) == meshes.split()
    _check_recurrence(found, num_steps)


def test_other_scans_exchange_all_steps_in_each_iteration():
    # The test of the test above, on the same program.
    assert _largest(_run("no_sharded_scan", "4096", "8"), in_loop=True) >= 4096 * 8


def _check_ode(found: Any, num_steps: int, num_times: int) -> None:
    for shape, result in found.items():
        cold, warm = result["cold"], result["warm"]
        assert max(cold["errors"] + warm["errors"]) < 1e-10
        fits = num_steps % int(shape[-1]) == 0
        steps = [*["batch"] * ("x" in shape), *["time"] * fits]
        if shape != "1":
            # The guess is taken as it is given, and given on, in parts.
            # (Its times are the same for all samples of a batch.)
            for ends, ys in (cold["specs"], warm["specs"]):
                assert ys == steps
                assert ("time" in ends) == fits
            # Of steps that do not fit the state is on all devices.
            exchanged = result["collectives"]
            assert _largest(exchanged, not fits, "all-gather") < num_steps
        if num_times < num_steps / 8 and fits:
            assert _largest(result["collectives"]) < num_steps


@pytest.mark.parametrize(
    ("num_steps", "size", "meshes"),
    [
        (4096, 2, "8"),
        slowly(4096, 2, "1 2"),
        slowly(4096, 2, "2x4"),
        *(
            slowly(num_steps, size, meshes)
            for num_steps, size in ((4096, 8), (1001, 2), (1001, 8))
            for meshes in ("1 2", "8 2x4")
        ),
    ],
)
def test_differential_equation_is_sequential_diffrax_and_its_state_a_guess(
    num_steps, size, meshes
):
    found = _run("ode", "uniform", str(num_steps), str(size), "9", *meshes.split())
    assert list(found) == meshes.split()
    _check_ode(found, num_steps, 9)
    for result in found.values():
        assert result["warm"]["iterations"] <= 1 < result["cold"]["iterations"]
        assert result["warm"]["unevenness"] < 1e-13


# One save time a step, and more than a device has steps.
@pytest.mark.parametrize("num_times", [slowly(4096), slowly(1000)])
def test_many_save_times_are_found_in_parts(num_times):
    (result,) = _run("ode", "uniform", "4096", "2", str(num_times), "8").values()
    _check_ode({"8": result}, 4096, num_times)
    # What a device has: of each of its steps seven stages, or what is made of them.
    parts = _largest(result["collectives"], kind="collective-permute")
    assert parts <= 4096 // 8 * 7 * 2
    assert _largest(result["collectives"], kind="all-reduce") < 512


@pytest.mark.parametrize("meshes", [slowly("8"), slowly("2 2x4")])
def test_steps_are_where_the_error_is(meshes):
    found = _run("ode", "equidistributed", "512", "2", "9", *meshes.split())
    for result in found.values():
        cold, warm = result["cold"], result["warm"]
        assert max(cold["errors"] + warm["errors"]) < 1e-10
        assert cold["unevenness"] > 1e-2
        assert warm["unevenness"] not in (0, cold["unevenness"])
        assert cold["specs"][0][-1] == warm["specs"][1][-1] == "time"


@pytest.mark.parametrize(
    "what", ["recurrence", slowly("few times"), slowly("all times")]
)
def test_eight_devices_need_less_than_a_quarter_of_the_memory_each(what):
    one, eight = _run("memory", what)
    assert eight < one / 4


@pytest.mark.slow
@pytest.mark.parametrize("num_steps", [4096, 1001])
@pytest.mark.parametrize("size", [2, 8])
def test_two_processes_of_four_devices_are_one_of_eight(num_steps, size):
    for found in _process("recurrence", str(num_steps), str(size), "8"):
        _check_recurrence(found, num_steps)


@pytest.mark.slow
@pytest.mark.parametrize("num_steps", [4096, 1001])
def test_differential_equation_in_two_processes(num_steps):
    for found in _process("ode", "uniform", str(num_steps), "2", "9", "8"):
        _check_ode(found, num_steps, 9)


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
