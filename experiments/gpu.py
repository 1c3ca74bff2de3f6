"""What to run on the day a GPU is there: exactness first, then times.

python -m experiments.gpu

Needs jax, equinox, diffrax and numpy, and nothing else. Cells come in the order of what
they tell; each is written when it is done, and an interrupted run goes on where it
stopped. No cell is begun after --seconds.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from diffrax_deer import (
    CoarsePredictor,
    ConstantPredictor,
    DEERAdjoint,
    DEERSolver,
    Newton,
    ParallelGradient,
    WholeInterval,
    deer_scan,
)

_REPEATS = 11
Functions = dict[str, tuple[Callable, tuple[Any, ...]]]


def _deer(num_steps: int, predictor: Any) -> dict[str, Any]:
    method = Newton(predictor=predictor)
    return {
        "solver": DEERSolver(diffrax.Dopri5(), num_steps, method, ParallelGradient()),
        "stepsize_controller": WholeInterval(),
        "adjoint": DEERAdjoint(),
        "dt0": None,
    }


def _solves(field: Any, params: Any, y0s: Any, t1: float, num_steps: int) -> Functions:
    """Value and gradient of the mean square of the end, by each way."""
    ways: dict[str, dict[str, Any]] = {
        "dopri5": {"solver": diffrax.Dopri5(), "dt0": t1 / num_steps},
        "deer_constant": _deer(num_steps, ConstantPredictor()),
        "deer_coarse": _deer(num_steps, CoarsePredictor()),
    }

    def loss(params, y0s, options):
        def solve(y0):
            sol = diffrax.diffeqsolve(
                diffrax.ODETerm(field),
                t0=0.0,
                t1=t1,
                y0=y0,
                args=params,
                max_steps=num_steps + 16,
                throw=False,
                **options,
            )
            return jnp.asarray(sol.ys), sol.stats.get("num_newton_iterations", 0)

        ys, iterations = jax.vmap(solve)(y0s)
        return jnp.mean(ys**2), jnp.max(iterations)

    def make(options):
        by = lambda params, y0s: loss(params, y0s, options)
        return jax.value_and_grad(by, has_aux=True), (params, y0s)

    return {name: make(options) for name, options in ways.items()}


def _fitzhugh_nagumo(num_steps: int, batch_size: int, dtype: Any) -> Functions:
    def field(t, y, p):
        del t
        slow = p[3] * (y[0] + p[1] - p[2] * y[1])
        return jnp.stack([y[0] - y[0] ** 3 / 3 - y[1] + p[0], slow])

    params = jnp.array([0.5, 0.7, 0.8, 0.08], dtype)
    factors = 1 + 0.1 * jnp.arange(batch_size, dtype=dtype)[:, None] / batch_size
    y0s = factors * jnp.array([-1.0, 1.0], dtype)
    return _solves(field, params, y0s, num_steps / 10, num_steps)


def _perceptron(num_steps: int, batch_size: int, dtype: Any) -> Functions:
    keys = jr.split(jr.key(0))
    network = eqx.nn.MLP(2, 2, 32, 2, jnp.tanh, dtype=dtype, key=keys[0])
    params, static = eqx.partition(network, eqx.is_array)
    field = lambda t, y, params: eqx.combine(params, static)(y)
    y0s = jr.normal(keys[1], (batch_size, 2), dtype)
    return _solves(field, params, y0s, 10.0, num_steps)


def _gru(num_steps: int, batch_size: int, dtype: Any) -> Functions:
    """The figure of the paper, with 4 units."""
    keys = jr.split(jr.key(0))
    cell = eqx.nn.GRUCell(4, 4, dtype=dtype, key=keys[0])
    params, static = eqx.partition(cell, eqx.is_array)
    inputs = jr.normal(keys[1], (batch_size, num_steps, 4), dtype)

    def loss(params, inputs, scan):
        step = lambda h, x: (eqx.combine(params, static)(x, h),) * 2
        run = lambda xs: scan(step, jnp.zeros(4, dtype), xs)
        _, states, *statistics = jax.vmap(run)(inputs)
        count = statistics[0].num_iterations if statistics else 0
        return jnp.mean(states**2), jnp.max(count)

    def deer(step, state, xs):
        options: dict[str, Any] = {"throw": False, "return_statistics": True}
        method, gradient = Newton(), ParallelGradient()
        return deer_scan(step, state, xs, method=method, gradient=gradient, **options)

    def make(scan):
        by = lambda params, inputs: loss(params, inputs, scan)
        return jax.value_and_grad(by, has_aux=True), (params, inputs)

    return {"scan": make(jax.lax.scan), "deer": make(deer)}


# Name, steps, batch, precision: what tells most comes first.
_FAMILIES = {
    "gru": _gru,
    "perceptron": _perceptron,
    "fitzhugh_nagumo": _fitzhugh_nagumo,
}
_CELLS = (
    ("gru", 10_000, 1, "float32"),
    ("perceptron", 128, 1, "float32"),
    ("fitzhugh_nagumo", 1000, 1, "float32"),
    ("perceptron", 256, 64, "float32"),
    ("gru", 1000, 1, "float64"),
    ("fitzhugh_nagumo", 256, 1, "float64"),
    ("perceptron", 128, 1024, "float32"),
    ("gru", 100_000, 1, "float32"),
    ("gru", 10_000, 16, "float32"),
    ("fitzhugh_nagumo", 4096, 1, "float32"),
    ("fitzhugh_nagumo", 1000, 1024, "float32"),
)
_SMOKE = tuple((family, 12, 2, "float64") for family in _FAMILIES)


def _difference(found: Any, expected: Any) -> float | None:
    """The largest, relative to the largest of all entries; `None` if NaN."""
    leaves = lambda tree: [np.asarray(x, float) for x in jax.tree.leaves(tree)]
    pairs = list(zip(leaves(found), leaves(expected), strict=True))
    scale = max(np.max(np.abs(y)) for _, y in pairs)
    largest = float(max(np.max(np.abs(x - y)) for x, y in pairs) / scale)
    return largest if np.isfinite(largest) else None


def measure(
    family: str, num_steps: int, batch_size: int, dtype: str, repeats: int
) -> dict[str, Any]:
    """All ways to solve one cell; the first, step by step, is the reference."""
    functions = _FAMILIES[family](num_steps, batch_size, jnp.dtype(dtype))
    found: dict[str, Any] = {}
    expected = None
    for name, (function, arguments) in functions.items():
        begin = time.perf_counter()
        compiled = jax.jit(function).lower(*arguments).compile()
        compile_seconds = time.perf_counter() - begin
        (value, iterations), gradient = jax.block_until_ready(compiled(*arguments))
        expected = (value, gradient) if expected is None else expected
        seconds: list[float] = []
        for _ in range(repeats):
            begin = time.perf_counter()
            jax.block_until_ready(compiled(*arguments))
            seconds.append(time.perf_counter() - begin)
        found[name] = {
            "compile_seconds": compile_seconds,
            "seconds": seconds,
            "num_iterations": int(iterations),
            "value_difference": _difference(value, expected[0]),
            "gradient_difference": _difference(gradient, expected[1]),
        }
    return found


def main(out: Path, seconds: float, smoke: bool) -> dict[str, Any]:
    """Measures what is not in `out` yet, and returns all that is."""
    begin, device = time.perf_counter(), jax.devices()[0]
    where = {"device": device.device_kind, "jax": jax.__version__}
    results: dict[str, Any] = {"environment": where, "cells": {}}
    if out.exists():
        results = json.loads(out.read_text())
        if results["environment"] != where:
            msg = f"{out} is of {results['environment']}. Choose another --out."
            raise SystemExit(msg)
    for cell in _SMOKE if smoke else _CELLS:
        name = " ".join(map(str, cell))
        if name in results["cells"] or time.perf_counter() - begin > seconds:
            continue
        measured = measure(*cell, repeats=2 if smoke else _REPEATS)
        results["cells"][name] = measured
        for way, each in measured.items():
            median = 1000 * float(np.median(each["seconds"]))
            print(f"{name}, {way}: {median:.3g} ms, {each}", flush=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_suffix(".part")
        partial.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
        partial.replace(out)
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu/results.json"))
    parser.add_argument("--seconds", type=float, default=400.0)
    parser.add_argument("--smoke", action="store_true", help="only that it runs")
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    main(arguments.out, arguments.seconds, arguments.smoke)
