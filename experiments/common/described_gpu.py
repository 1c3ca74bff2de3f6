"""Programs compiled for a GPU that is not there: its description is enough.

JAX compiles ahead of time for a device that is only described. The compiled program
says which kernels are launched in which loop.
"""

import contextlib
import dataclasses
import re
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
from jax.experimental import topologies

import diffrax_deer._defaults as defaults
from experiments.common.errors import ExperimentError

_DESCRIPTION = Path(__file__).parent / "h100.textproto"
# Instructions that launch nothing.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "opt-barrier",
    "partition-id",
    "replica-id",
}
_LIBRARIES = re.compile(r'custom_call_target="(__cublas|__cudnn|cusolver|cublas)')
_INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%?([\w.\-]+) = (?:\([^=]*?\)|[\w\[\],{}:()* ]+?) ([\w\-]+)\((.*)$"
)


class Block(NamedTuple):
    """The instructions of a program, of a loop or of a branch.

    Attributes:
        kind: `"program"`, `"loop"`, `"branches"` or `"branch"`.
        trips: how often a loop runs, if the compiler knows.
        kernels: launched directly, library calls included.
        library_calls: those among them.
        inside: loops and branches in it.
    """

    kind: str
    trips: int | None
    kernels: int
    library_calls: int
    inside: "list[Block]"

    def walk(self) -> "Iterator[Block]":
        """This block and all in it."""
        yield self
        for block in self.inside:
            yield from block.walk()

    def launched(self, loops: bool = True) -> int:
        """Kernels until the end of it, those of all branches added up.

        Args:
            loops: whether those of loops with a known count are among them. Those of
                other loops never are.
        """
        total = self.kernels
        for block in self.inside:
            trips = (block.trips or 0) * loops if block.kind == "loop" else 1
            total += trips * block.launched(loops)
        return total

    def unknown_loops(self) -> int:
        """Loops whose length the compiler does not know, outside of another such."""
        if self.kind == "loop" and self.trips is None:
            return 1
        return sum(block.unknown_loops() for block in self.inside)

    def round_trips(self) -> int:
        """Decisions of the device that the host waits for, each way of it once."""
        return sum(
            block.kind == "branches" or (block.kind == "loop" and block.trips is None)
            for block in self.walk()
        )


@dataclasses.dataclass(frozen=True)
class Program:
    """A program compiled for the described GPU.

    Attributes:
        block: its structure.
        compile_seconds: to trace, lower and compile it.
        temporary_bytes: memory beside arguments and results.
    """

    block: Block
    compile_seconds: float
    temporary_bytes: int

    def counts(self) -> dict[str, Any]:
        """What there is to say about it, in a form that JSON can hold."""
        blocks = list(self.block.walk())
        loops = [block for block in blocks if block.kind == "loop"]
        unknown = [block for block in loops if block.trips is None]
        known = [block.trips for block in loops if block.trips is not None]
        largest = lambda count: max(map(count, unknown), default=0)
        return {
            "once": self.block.launched(),
            "iteration": largest(lambda loop: loop.launched(loops=False)),
            "in_loops": largest(lambda loop: loop.launched() - loop.launched(False)),
            "round_trips": largest(lambda loop: loop.round_trips()),
            "unknown_loops": self.block.unknown_loops(),
            "longest_loop": max(known, default=0),
            "library_calls": sum(block.library_calls for block in blocks),
            "temporary_bytes": self.temporary_bytes,
            "compile_seconds": self.compile_seconds,
        }


@contextlib.contextmanager
def chosen_for_gpu() -> Generator[None]:
    """Within it the library chooses what it chooses for a GPU, also on a CPU."""
    jax.clear_caches()
    with mock.patch.object(defaults, "platform", return_value="gpu"):
        yield
    jax.clear_caches()


def _described_device() -> Any:
    try:
        description = topologies.get_topology_desc(
            platform="cuda",
            target_config=_DESCRIPTION.read_text(),
            topology="1x1x1",
        )
    except Exception as error:
        msg = (
            f"JAX cannot compile for a GPU here ({error}). Install the plugin: "
            "`uv sync --group kernels`."
        )
        raise ExperimentError(msg) from error
    return description.devices[0]


def compile_for_gpu(function: Callable, arguments: tuple[Any, ...]) -> Program:
    """Compiles a function for the described GPU.

    Which kernel multiplies matrices is for autotuning, which needs a device. The
    flag --xla_gpu_enable_triton_gemm=false in XLA_FLAGS makes library calls of them.
    """
    sharding = jax.sharding.SingleDeviceSharding(_described_device())

    def specify(x):
        x = jnp.asarray(x)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    begin = time.perf_counter()
    jitted: Any = jax.jit(function)
    compiled = jitted.lower(*jax.tree.map(specify, arguments)).compile()
    seconds = time.perf_counter() - begin
    return Program(
        parse(compiled.as_text()),
        seconds,
        compiled.memory_analysis().temp_size_in_bytes,
    )


def parse(text: str) -> Block:
    """The structure of a compiled program, from its text."""
    computations: dict[str, list[tuple[str, str]]] = {}
    entry = current = None
    for line in text.splitlines():
        line = re.sub(r"/\*.*?\*/", "", line)
        if head := re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{", line):
            current = head[2]
            computations[current] = []
            entry = current if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif current and (found := _INSTRUCTION.match(line)):
            computations[current].append((found[2], found[3]))

    def build(name: str, kind: str, trips: int | None = None) -> Block:
        kernels, library_calls, inside = 0, 0, []
        for operation, rest in computations[name]:
            if operation in _FREE or operation.endswith("-done"):
                continue
            if operation == "while":
                body = re.search(r"body=%?([\w.\-]+)", rest)
                count = re.search(r'known_trip_count":\{"n":"(\d+)"', rest)
                assert body
                loop = build(body[1], "loop", int(count[1]) if count else None)
                inside.append(loop)
            elif operation == "conditional":
                names = _branches(rest)
                branches = [build(name, "branch") for name in names]
                inside.append(Block("branches", None, 0, 0, branches))
            elif operation == "call":
                called = re.search(r"to_apply=%?([\w.\-]+)", rest)
                assert called
                inside.append(build(called[1], "call"))
            else:
                kernels += 1
                library_calls += bool(_LIBRARIES.search(rest))
        return Block(kind, trips, kernels, library_calls, inside)

    assert entry
    return build(entry, "program")


def _branches(rest: str) -> list[str]:
    if found := re.search(r"branch_computations=\{([^}]*)\}", rest):
        return [name.strip().lstrip("%") for name in found[1].split(",")]
    return re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", rest)
