"""Sequences to classify: digits pixel by pixel, and the movements of worms.

Known to `load` are

- `digits` and `mnist`: the images of `common.datasets`, one pixel at a step.
- `worms`: generated, with the shape of EigenWorms: 17984 steps, 6 features, 5 classes.
- `eigenworms`: EigenWorms itself, downloaded on first use.

A generated worm moves in waves of phase p and turns to one side, w > 0, or the other:

    x = a (cos p, sin p, 0, cos(2p) / 2, sin(2p) / 2, w cos p) + (0, 0, w, 0, 0, 0)

with noise. The phase advances at a speed that varies slowly, and backwards from time to
time; w is an autoregressive process; a = 1 / (1 + k w^2). What the classes differ in,
the period of the waves, how often they run backwards, how long a turn lasts and the
coupling k, shows in no single step.
"""

import dataclasses
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float

from experiments.common import datasets, eigenworms
from experiments.common.datasets import Dataset
from experiments.common.eigenworms import (
    LENGTH,
    NUM_CLASSES,
    NUM_FEATURES,
    NUM_TEST,
    NUM_TRAIN,
    Examples,
)

SequenceName = Literal["digits", "mnist", "worms", "eigenworms"]

_NOISE = 0.3
_MEMORY = 600.0  # steps over which speed and direction stay as they are


@dataclasses.dataclass(frozen=True)
class _Class:
    """A kind of worm.

    Attributes:
        period: steps of one wave.
        backwards: below which value of a standard normal process it moves backwards.
        turn: steps that a turn lasts.
        coupling: how much smaller the waves are in a turn.
    """

    period: float = 400.0
    backwards: float = -1.0
    turn: float = 600.0
    coupling: float = 0.0


_CLASSES = (
    _Class(),
    _Class(period=800.0),
    _Class(backwards=0.0),
    _Class(turn=2400.0),
    _Class(coupling=1.0),
)


def load(name: SequenceName, data_dir: Path) -> Dataset:
    """Makes or reads the sequences of that name.

    Args:
        name: which.
        data_dir: where downloads and prepared data are kept.

    Returns:
        The data, the same every time.

    Raises:
        ConnectionError: they have to be downloaded, and the host cannot be reached.
    """
    if name == "eigenworms":
        return _standardized(name, *eigenworms.load(data_dir))
    if name == "worms":
        return _standardized(name, make_worms(NUM_TRAIN, 0), make_worms(NUM_TEST, 1))
    images = datasets.load(name, data_dir)
    xs = {key: getattr(images, key)[..., None] for key in ("train_xs", "test_xs")}
    return dataclasses.replace(images, **xs)


def _standardized(name: str, train: Examples, test: Examples) -> Dataset:
    """Every feature with mean zero and deviation one, over what is trained on."""
    xs, labels = train
    mean, deviation = xs.mean((0, 1)), xs.std((0, 1))
    scale = lambda xs: (xs - mean) / deviation
    return Dataset(name, NUM_CLASSES, scale(xs), labels, scale(test[0]), test[1])


def make_worms(number: int, seed: int, length: int = LENGTH) -> Examples:
    """Generates worms, as many of each class, as far as that is possible.

    Args:
        number: how many.
        seed: those of another seed are others.
        length: number of steps.
    """
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(number) % NUM_CLASSES)
    kinds = [dataclasses.astuple(_CLASSES[label]) for label in labels]
    period, backwards, turn, coupling = np.array(kinds).T
    memory = np.full(number, _MEMORY)
    speed, direction, w = _autoregressive(rng, length, np.stack([memory, memory, turn]))
    # No two individuals are equally fast.
    pace = rng.normal(1.0, 0.1, number) * (1 + 0.2 * speed) / period
    steps = np.where(direction < backwards, -1, 1) * 2 * np.pi * pace
    p = rng.uniform(0, 2 * np.pi, number) + np.cumsum(steps, axis=0)
    a = 1 / (1 + coupling * w**2)
    waves = (np.cos(p), np.sin(p), 0 * p, np.cos(2 * p) / 2, np.sin(2 * p) / 2)
    xs = np.stack([*(a * wave for wave in waves), a * w * np.cos(p)], axis=-1)
    xs[..., 2] += w
    xs += _NOISE * rng.normal(size=(length, number, NUM_FEATURES))
    return np.swapaxes(xs, 0, 1).astype(np.float32), labels.astype(np.int32)


def _autoregressive(
    rng: np.random.Generator, length: int, memory: Float[np.ndarray, "process number"]
) -> tuple[np.ndarray, ...]:
    """Stationary processes of order one with variance one, `(time, number)` each."""
    decay = np.exp(-1 / memory)
    noise = rng.normal(size=(length, *memory.shape))
    noise[1:] *= np.sqrt(1 - decay**2)
    for n in range(1, length):
        noise[n] += decay * noise[n - 1]
    return tuple(np.moveaxis(noise, 1, 0))
