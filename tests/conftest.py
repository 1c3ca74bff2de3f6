"""Settings and fixtures of all tests."""

import gc
import itertools
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# XLA shares one pool of threads between operations and the parallel parts of one
# operation; on a machine with two cores the first can wait for the second for ever.
# XLA reads the variable when its first client starts, hence before `jax` is imported.
_FLAG = "--xla_cpu_multi_thread_eigen"
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}=false".strip()

# What is tested are numbers, which optimized code shares to rounding, and up to a third
# of the time would go into optimizing. Smoke runs, notebooks and what is marked
# `optimized` are compiled as by users.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

# Programs with a check at run time contain a host callback, which JAX does not keep in
# its compilation cache. Only what is marked `raises` is checked.
os.environ["EQX_ON_ERROR"] = "off"
_CACHE = Path(__file__).parents[1] / ".cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import equinox._errors  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402
from jaxtyping import Array  # noqa: E402

# Tracing makes many objects, and one part in twenty of the time would go into looking
# through those that stay.
gc.set_threshold(50_000, 10, 10)

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The library has to work under the strictest settings; experiments run as scripts do,
# and what is ported as its users have it.
_RELAXED = (
    "test_benchmark",
    "test_cnf",
    "test_datasets",
    "test_experiments",
    "test_ported",
    "test_rnn_experiments",
    "test_two_body_hnn",
)


@pytest.fixture(scope="module", autouse=True)
def _settings(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.module.__name__.split(".")[-1] in _RELAXED:
        with (
            jax.enable_x64(False),
            jax.numpy_dtype_promotion("standard"),
            jax.numpy_rank_promotion("allow"),
        ):
            yield
    else:
        yield
    # Compiled functions of one module are of no use to the next, but take memory.
    jax.clear_caches()


@pytest.fixture(autouse=True)
def _optimized(request: pytest.FixtureRequest) -> Iterator[None]:
    name = "jax_disable_most_optimizations"
    disabled = os.environ[name.upper()] == "1"
    optimized = request.node.get_closest_marker("optimized") is not None
    jax.config.update(name, disabled and not optimized)
    yield
    jax.config.update(name, disabled)


@pytest.fixture(autouse=True)
def _raises(request: pytest.FixtureRequest, monkeypatch: Any) -> Iterator[None]:
    """Errors at run time, in tests that are about them."""
    if request.node.get_closest_marker("raises") is None:
        yield
        return
    # What was traced without the check must not be found again, nor the other way.
    jax.clear_caches()
    monkeypatch.setattr(equinox._errors, "EQX_ON_ERROR", "raise")
    yield
    jax.clear_caches()


@pytest.fixture
def getkey(request: pytest.FixtureRequest) -> Callable[[], Array]:
    """A new random key at each call: the same in every run, another in every test."""
    key = jax.random.key(zlib.crc32(request.node.name.encode()))
    counter = itertools.count()
    return lambda: jax.random.fold_in(key, next(counter))
