"""Image classification data, through TensorFlow Datasets (TFDS) but without TensorFlow.

Two data sets are known to `load`:

- `digits`: scikit-learn's bundled images, 8x8 pixels. Needs no network.
- `mnist`: the original MNIST files, 28x28 pixels, downloaded on first use.

TFDS prepares each once below a data directory and reads it back with random access.
"""

import dataclasses
import gzip
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Float32, Int32, Int64, UInt8

from experiments.common.errors import ExperimentError
from experiments.common.preparation import (
    check_obtainable,
    prepared,
    read_examples,
)

_NUM_CLASSES = 10


def _info(
    builder: tfds.core.DatasetBuilder, description: str, num_features: int
) -> tfds.core.DatasetInfo:
    # A plain tensor: TFDS's image feature would compress every image as PNG.
    image = tfds.features.Tensor(shape=(num_features,), dtype=np.uint8)
    label = tfds.features.ClassLabel(num_classes=_NUM_CLASSES)
    features = tfds.features.FeaturesDict({"image": image, "label": label})
    return tfds.core.DatasetInfo(
        builder=builder, description=description, features=features
    )


def _generate(
    images: UInt8[np.ndarray, "example height width"],
    labels: np.ndarray,
) -> Iterator[tuple[int, dict[str, Any]]]:
    for key, (image, label) in enumerate(zip(images, labels, strict=True)):
        yield key, {"image": image.ravel(), "label": int(label)}


def _read_idx(path: Path, num_axes: int) -> UInt8[np.ndarray, "..."]:
    """Reads a gzipped idx file of bytes.

    The header is big-endian: 0x0800 (bytes) plus the number of axes, then the length of
    each axis.
    """
    try:
        content = gzip.decompress(path.read_bytes())
        magic, *shape = struct.unpack_from(f">{1 + num_axes}I", content)
        values = np.frombuffer(content, np.uint8, offset=4 * (1 + num_axes))
        values = values.reshape(shape)
    except (EOFError, OSError, ValueError, struct.error, zlib.error) as error:
        msg = f"{path} is damaged ({error}). Delete it, then run again to download it."
        raise ValueError(msg) from error
    if magic != 0x0800 + num_axes:
        msg = (
            f"{path} is not an idx file of bytes with {num_axes} axes (it starts with "
            f"{magic:#010x}). Delete it, then run again to download it."
        )
        raise ValueError(msg)
    return values


class Digits(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """1797 images of 8x8 pixels with values from 0 to 16."""

    VERSION = tfds.core.Version("1.0.0")
    max_pixel = 16
    num_test = 360

    def _info(self) -> tfds.core.DatasetInfo:
        return _info(self, "Handwritten digits bundled with scikit-learn.", 8 * 8)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        del dl_manager
        # Slow to import, and not needed once the data is prepared.
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        images, labels = load_digits(return_X_y=True)
        images = images.astype(np.uint8).reshape(-1, 8, 8)
        train_images, test_images, train_labels, test_labels = train_test_split(
            images, labels, test_size=self.num_test, random_state=0, stratify=labels
        )
        return {
            "train": self._generate_examples(train_images, train_labels),
            "test": self._generate_examples(test_images, test_labels),
        }

    def _generate_examples(self, images, labels):
        return _generate(images, labels)


class Mnist(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """70000 images of 28x28 pixels with values from 0 to 255.

    TFDS's own builder of this name needs TensorFlow to unpack the files, and takes
    minutes to notice that there is no network. Unregistered, ours does not clash with
    it.
    """

    VERSION = tfds.core.Version("1.0.0")
    max_pixel = 255
    url = "https://storage.googleapis.com/cvdf-datasets/mnist/"
    files = (
        "train-images-idx3-ubyte.gz",
        "train-labels-idx1-ubyte.gz",
        "t10k-images-idx3-ubyte.gz",
        "t10k-labels-idx1-ubyte.gz",
    )

    def _info(self) -> tfds.core.DatasetInfo:
        return _info(self, "The MNIST database of handwritten digits.", 28 * 28)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        download_dir = Path(dl_manager.download_dir)
        check_obtainable("MNIST", self.url, self.files, download_dir)
        paths: Any = dl_manager.download([self.url + file for file in self.files])
        train_images, train_labels, test_images, test_labels = paths
        return {
            "train": self._generate_examples(train_images, train_labels),
            "test": self._generate_examples(test_images, test_labels),
        }

    def _generate_examples(self, images, labels):
        return _generate(_read_idx(images, num_axes=3), _read_idx(labels, num_axes=1))


_BUILDERS: dict[str, type[Digits] | type[Mnist]] = {"digits": Digits, "mnist": Mnist}


def _read(
    builder: Digits | Mnist, split: str
) -> tuple[Float32[np.ndarray, "example feature"], Int32[np.ndarray, " example"]]:
    examples = read_examples(builder, split)
    images = np.stack([example["image"] for example in examples])
    labels = np.array([example["label"] for example in examples], np.int32)
    return images.astype(np.float32) / np.float32(builder.max_pixel), labels


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A classification problem in memory: images, flattened and scaled to [0, 1], or
    sequences.
    """

    name: str
    num_classes: int
    train_xs: Float32[np.ndarray, "example ..."]
    train_labels: Int32[np.ndarray, " example"]
    test_xs: Float32[np.ndarray, "example ..."]
    test_labels: Int32[np.ndarray, " example"]

    def thinned(self, length: int) -> "Dataset":
        """The same with so many steps of the sequences, evenly spaced from the first.

        Raises:
            ExperimentError: there are not so many.
        """
        full = self.train_xs.shape[1]
        if not 1 <= length <= full:
            msg = (
                f"--length is {length}, but the sequences of {self.name} have {full} "
                f"steps. Choose from 1 to {full}."
            )
            raise ExperimentError(msg)
        kept = slice(0, length * (full // length), full // length)
        return dataclasses.replace(
            self, train_xs=self.train_xs[:, kept], test_xs=self.test_xs[:, kept]
        )

    def with_tests(self, number: int) -> "Dataset":
        """The same with no more than the first `number` examples to test on."""
        xs, labels = self.test_xs[:number], self.test_labels[:number]
        return dataclasses.replace(self, test_xs=xs, test_labels=labels)

    def batches_from(
        self, batch_size: int, seed: int, start_step: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Batches of training examples and labels without end; see `batches`."""
        for indices in batches(len(self.train_xs), batch_size, seed, start_step):
            yield self.train_xs[indices], self.train_labels[indices]


def load(name: str, data_dir: Path) -> Dataset:
    """Reads a data set, after preparing it if this is the first time.

    Args:
        name: `"digits"` or `"mnist"`.
        data_dir: where TFDS keeps downloads and prepared data.

    Returns:
        The data, whose order is the same every time.

    Raises:
        ConnectionError: MNIST has to be downloaded and its host cannot be reached.
        NonMatchingChecksumError: TFDS got other files than the original ones.
        ValueError: there is no data set of this name, or a downloaded file is damaged.
    """
    if name not in _BUILDERS:
        msg = f"Unknown data set {name!r}. Choose one of: {', '.join(_BUILDERS)}."
        raise ValueError(msg)
    builder = prepared(_BUILDERS[name], data_dir, has_checksums=True)
    train, test = _read(builder, "train"), _read(builder, "test")
    return Dataset(name, _NUM_CLASSES, *train, *test)


def batches(
    num_examples: int, batch_size: int, seed: int, start_step: int = 0
) -> Iterator[Int64[np.ndarray, " batch"]]:
    """Draws batches of example indices without end.

    Every epoch is a permutation of its own that depends only on the seed and the number
    of the epoch; its last, incomplete batch is dropped.

    Args:
        num_examples: how many examples there are.
        batch_size: how many of them go into a batch.
        seed: seed of the order.
        start_step: number of batches to skip, at no cost; an interrupted run resumes
            with what it would have drawn next.

    Returns:
        An infinite iterator over arrays of indices.
    """
    if not 1 <= batch_size <= num_examples:
        msg = (
            f"A batch of {batch_size} cannot be drawn from {num_examples} examples. "
            f"Choose a batch size from 1 to {num_examples}."
        )
        raise ValueError(msg)
    return _batches(num_examples, batch_size, seed, start_step)


def _batches(
    num_examples: int, batch_size: int, seed: int, start_step: int
) -> Iterator[Int64[np.ndarray, " batch"]]:
    batches_per_epoch = num_examples // batch_size
    epoch, first = divmod(start_step, batches_per_epoch)
    while True:
        order = np.random.default_rng((seed, epoch)).permutation(num_examples)
        for batch in range(first, batches_per_epoch):
            yield order[batch * batch_size : (batch + 1) * batch_size]
        epoch, first = epoch + 1, 0
