"""Samples to estimate densities from: toys in the plane, and measurements.

The toys are those of FFJORD (Grathwohl et al., arXiv:1810.01367), which every training
step draws anew. `breast_cancer` is the data set bundled with scikit-learn, of which the
ten features that are means over the cells of an image are kept.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32, Float64

from experiments.common.datasets import batches

DataName = Literal[
    "two_moons",
    "circles",
    "rings",
    "eight_gaussians",
    "pinwheel",
    "two_spirals",
    "swiss_roll",
    "checkerboard",
    "breast_cancer",
]
Rng = np.random.Generator
Plane = Float64[np.ndarray, "sample 2"]

_NUM_TEST = 5000
# First words of the seeds, which keep the streams apart whatever follows.
_TRAIN, _TEST = 0, 1


def _two_moons(rng: Rng, number: int) -> Plane:
    """Two half circles of radius 2 that reach into each other."""
    lower = rng.integers(2, size=number)
    x, y = _directions(rng.uniform(0, np.pi, number)).T
    moons = np.stack([np.where(lower, 1 - x, x), np.where(lower, 0.5 - y, y)], 1)
    return 2 * (moons + rng.normal(scale=0.1, size=(number, 2))) - [1, 0.2]


def _circles(rng: Rng, number: int) -> Plane:
    """Two circles around the origin, of radius 3 and 1.5."""
    radii = rng.choice([1, 0.5], number)
    points = _directions(_angles(rng, number)) * radii[:, None]
    return 3 * (points + rng.normal(scale=0.08, size=(number, 2)))


def _rings(rng: Rng, number: int) -> Plane:
    """Four circles around the origin, of radius 0.75 to 3."""
    radii = rng.choice([0.75, 1.5, 2.25, 3], number)
    points = _directions(_angles(rng, number)) * radii[:, None]
    return points + rng.normal(scale=0.08, size=(number, 2))


def _eight_gaussians(rng: Rng, number: int) -> Plane:
    """Normal distributions around eight points of a circle."""
    centers = 4 * _directions(rng.integers(8, size=number) * np.pi / 4)
    return (centers + rng.normal(scale=0.5, size=(number, 2))) / np.sqrt(2)


def _pinwheel(rng: Rng, number: int) -> Plane:
    """Five blades that turn the more, the farther out."""
    radii = rng.normal(1, 0.3, number)
    across = rng.normal(0, 0.1, number)
    turns = rng.integers(5, size=number) * 2 * np.pi / 5 + 0.25 * np.exp(radii)
    along = _directions(turns) * radii[:, None]
    return 2 * (along + _directions(turns + np.pi / 2) * across[:, None])


def _two_spirals(rng: Rng, number: int) -> Plane:
    """Two arms of one and a half turns, one of them the other's point reflection."""
    angles = 3 * np.pi * np.sqrt(rng.uniform(size=number))
    arm = _directions(np.pi - angles) * angles[:, None]
    arm = arm + rng.uniform(0, 0.5, (number, 2))
    signs = rng.choice([1, -1], (number, 1))
    return signs * arm / 3 + rng.normal(scale=0.1, size=(number, 2))


def _swiss_roll(rng: Rng, number: int) -> Plane:
    """One arm from three quarters of a turn to nine."""
    angles = rng.uniform(1.5 * np.pi, 4.5 * np.pi, number)
    roll = _directions(angles) * angles[:, None]
    return (roll + rng.normal(size=(number, 2))) / 5


def _checkerboard(rng: Rng, number: int) -> Plane:
    """The eight dark squares of four by four, each of side 2."""
    columns = rng.integers(4, size=number)
    rows = 2 * rng.integers(2, size=number) + columns % 2
    corners = np.stack([columns, rows], 1) - 2
    return 2 * (corners + rng.uniform(size=(number, 2)))


def _angles(rng: Rng, number: int) -> Float64[np.ndarray, " sample"]:
    return rng.uniform(0, 2 * np.pi, number)


def _directions(angles: Float64[np.ndarray, " sample"]) -> Plane:
    return np.stack([np.cos(angles), np.sin(angles)], 1)


_TOYS: dict[str, Callable[[Rng, int], Plane]] = {
    "two_moons": _two_moons,
    "circles": _circles,
    "rings": _rings,
    "eight_gaussians": _eight_gaussians,
    "pinwheel": _pinwheel,
    "two_spirals": _two_spirals,
    "swiss_roll": _swiss_roll,
    "checkerboard": _checkerboard,
}


@dataclass(frozen=True, eq=False)
class Samples:
    """What a density is estimated from, and what the estimate is tested on.

    Attributes:
        name: the name of the data set.
        features: the names of the components.
        pairs: which of them to draw against each other.
        num_train: how many samples there are to train on, `None` for as many as wanted.
        test: the samples to test on, the same for every seed.
        batches_from: maps batch size, seed and a number of steps to the batches of
            training samples that come after so many steps.
    """

    name: str
    features: tuple[str, ...]
    pairs: tuple[tuple[int, int], ...]
    num_train: int | None
    test: Float32[np.ndarray, "sample feature"]
    batches_from: Callable[
        [int, int, int], Iterator[Float32[np.ndarray, "batch feature"]]
    ]


def load(name: DataName) -> Samples:
    """Makes or reads the samples of that name."""
    return _breast_cancer() if name == "breast_cancer" else _toy(name)


def _toy(name: str) -> Samples:
    def draw(seed: tuple[int, ...], number: int) -> Float32[np.ndarray, "number 2"]:
        return _TOYS[name](np.random.default_rng(seed), number).astype(np.float32)

    def batches_from(batch_size: int, seed: int, start_step: int):
        for step in itertools.count(start_step):
            yield draw((_TRAIN, seed, step), batch_size)

    return Samples(
        name=name,
        features=("$x_1$", "$x_2$"),
        pairs=((0, 1),),
        num_train=None,
        test=draw((_TEST,), _NUM_TEST),
        batches_from=batches_from,
    )


def _breast_cancer() -> Samples:
    # Slow to import.
    from sklearn.datasets import load_breast_cancer
    from sklearn.model_selection import train_test_split

    table: Any = load_breast_cancer()
    features = tuple(str(name) for name in table.feature_names[:10])
    values: Any = train_test_split(table.data[:, :10], test_size=114, random_state=0)
    train, test = values
    mean, deviation = train.mean(0), train.std(0)
    train = ((train - mean) / deviation).astype(np.float32)

    def batches_from(batch_size: int, seed: int, start_step: int):
        for indices in batches(len(train), batch_size, seed, start_step):
            yield train[indices]

    return Samples(
        name="breast_cancer",
        features=features,
        pairs=((0, 1), (5, 6)),
        num_train=len(train),
        test=((test - mean) / deviation).astype(np.float32),
        batches_from=batches_from,
    )
