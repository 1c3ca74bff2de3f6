"""Training of one model with several methods, timed so that they can be compared.

All methods start from the same weights and see the same batches and random keys. They
take turns, a block of steps each, so that a machine that slows down for a while slows
all of them alike. After every round all of them are evaluated and a checkpoint can be
written; a block depends on nothing but the state after the block before it, therefore
an interrupted training that resumes from there ends with the same numbers.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.random as jr
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree
from tqdm import tqdm

from experiments.common.errors import ExperimentError

LossFn = Callable[[PyTree, PyTree, PyTree, PRNGKeyArray], tuple[Array, PyTree]]
Step = Callable[["TrainState", PyTree], tuple["TrainState", Float[Array, ""]]]


class TrainState(eqx.Module):
    """All that a training step changes.

    `memory` is what a loss function wants to have again at the next step, the solution
    as a guess for example.
    """

    model: PyTree
    memory: PyTree
    opt_state: optax.OptState
    key: PRNGKeyArray


@dataclasses.dataclass
class Record:
    """What a training has measured so far, in a form that JSON can hold.

    Attributes:
        compile_seconds: tracing, lowering and compiling the training step; one entry
            for every process that took part and every shape of the batches.
        step_seconds: one entry a step, until its result is there.
        losses: one entry a step.
        evaluations: `step`, `seconds` (the sum of `step_seconds` so far) and whatever
            `Run.evaluate` returns.
    """

    compile_seconds: list[float] = dataclasses.field(default_factory=list)
    step_seconds: list[float] = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)
    evaluations: list[dict[str, Any]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Run:
    """One method, how far its training has come, and what was measured.

    Attributes:
        loss_fn: maps model, memory, batch and random key to a scalar and the memory of
            the next step.
        evaluate: maps the state to what is to be recorded about it. Not timed.
        state: replaced by every step.
        record: appended to by every step.
    """

    loss_fn: LossFn
    evaluate: Callable[[TrainState], dict[str, Any]]
    state: TrainState
    record: Record = dataclasses.field(default_factory=Record)


def init_state(
    model: PyTree,
    optimizer: optax.GradientTransformation,
    key: PRNGKeyArray,
    memory: PyTree = None,
) -> TrainState:
    """The state before the first step."""
    opt_state = optimizer.init(eqx.filter(model, eqx.is_array))
    return TrainState(model, memory, opt_state, key)


def train(
    runs: dict[str, Run],
    optimizer: optax.GradientTransformation,
    batches_from: Callable[[int], Iterator[PyTree]],
    num_steps: int,
    block_size: int,
    metric: str,
    save: Callable[[], None],
) -> None:
    """Trains all runs up to `num_steps` steps, from where they are.

    Args:
        runs: the methods by name; their states and records are updated in place. All of
            them must have come equally far.
        optimizer: the same for all.
        batches_from: maps a number of steps to the batches that come after them. The
            step is compiled anew for a batch of another shape.
        num_steps: number of steps at the end, those already taken included.
        block_size: number of steps between evaluations.
        metric: which of the values that `Run.evaluate` returns the progress bar shows.
        save: called after every round, to write a checkpoint.
    """
    (done,) = {len(run.record.losses) for run in runs.values()}
    if done >= num_steps:
        return
    batches = map(jax.device_put, batches_from(done))
    steps: dict[tuple[str, Any], Step] = {}
    if not any(run.record.evaluations for run in runs.values()):
        for run in runs.values():
            _evaluate(run)
        save()
    with tqdm(total=num_steps, initial=done, unit="step") as bar:
        while done < num_steps:
            block = list(itertools.islice(batches, min(block_size, num_steps - done)))
            for name, run in runs.items():
                _train_block(name, run, optimizer, steps, block)
                _evaluate(run)
            save()
            done += len(block)
            bar.update(len(block))
            bar.set_postfix_str(_describe(runs, metric))


def _compile(run: Run, optimizer: optax.GradientTransformation, batch: PyTree) -> Step:
    def step(state: TrainState, batch: PyTree) -> tuple[TrainState, Float[Array, ""]]:
        key, loss_key = jr.split(state.key)
        value_and_grad = eqx.filter_value_and_grad(run.loss_fn, has_aux=True)
        (loss, memory), grads = value_and_grad(
            state.model, state.memory, batch, loss_key
        )
        params = eqx.filter(state.model, eqx.is_array)
        updates, opt_state = optimizer.update(grads, state.opt_state, params)
        model = eqx.apply_updates(state.model, updates)
        return TrainState(model, memory, opt_state, key), loss

    start = time.perf_counter()
    jitted: Any = eqx.filter_jit(step)
    compiled = jitted.lower(run.state, batch).compile()
    run.record.compile_seconds.append(time.perf_counter() - start)
    return compiled


def _train_block(
    name: str,
    run: Run,
    optimizer: optax.GradientTransformation,
    steps: dict[tuple[str, Any], Step],
    block: list[PyTree],
) -> None:
    for batch in block:
        key = name, *(x.shape for x in jax.tree.leaves(batch))
        if key not in steps:
            steps[key] = _compile(run, optimizer, batch)
        step = steps[key]
        start = time.perf_counter()
        run.state, loss = jax.block_until_ready(step(run.state, batch))
        run.record.step_seconds.append(time.perf_counter() - start)
        run.record.losses.append(float(loss))
        if not math.isfinite(run.record.losses[-1]):
            msg = (
                f"The loss of {name} is {run.record.losses[-1]} at step "
                f"{len(run.record.losses)}. Lower the learning rate."
            )
            raise ExperimentError(msg)


def _evaluate(run: Run) -> None:
    record = run.record
    at = {"step": len(record.losses), "seconds": math.fsum(record.step_seconds)}
    record.evaluations.append(at | run.evaluate(run.state))


def _describe(runs: dict[str, Run], metric: str) -> str:
    return ", ".join(
        f"{name}: loss {run.record.losses[-1]:.3f}, "
        f"{metric} {run.record.evaluations[-1][metric]:.3f}"
        for name, run in runs.items()
    )
