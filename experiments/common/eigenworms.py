"""EigenWorms, of the UEA archive of time series, through TFDS.

How the posture of a worm changes over time, as a sum of six basic postures: 17984 steps
and 6 features. The classes are the wild type and four mutants (Brown et al., PNAS 110,
791, 2013). The archive's own division into 128 and 131 sequences is kept.
"""

import io
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Float32, Int32

from experiments.common.errors import ExperimentError
from experiments.common.preparation import (
    check_obtainable,
    prepared,
    read_examples,
)

LENGTH, NUM_FEATURES, NUM_CLASSES = 17984, 6, 5
NUM_TRAIN, NUM_TEST = 128, 131

Examples = tuple[
    Float32[np.ndarray, "example time feature"], Int32[np.ndarray, " example"]
]


def read_ts(lines: Iterable[str]) -> Examples:
    """Reads the archive's `.ts` format.

    A head of lines that begin with `@`, the last of them `@data`, then one line a
    sequence: the values of one feature after the other, each separated by commas, and
    at last the class, all separated by colons. Lines that begin with `#` are comments.

    Args:
        lines: those of the file.

    Returns:
        The sequences, all equally long, and the numbers of their classes, in the order
        in which the head names them.
    """
    lines = (line.strip() for line in lines)
    lines = (line for line in lines if line and not line.startswith("#"))
    classes = _read_head(lines)
    xs, labels = [], []
    for line in lines:
        *features, name = line.split(":")
        if name not in classes:
            msg = f"sequence {len(xs) + 1} is of class {name!r}, not one of {classes}"
            raise ValueError(msg)
        # A value that is not known is a question mark, which is no number.
        values = [np.array(x.split(","), np.float32) for x in features]
        if not values or len({len(x) for x in values}) > 1:
            msg = f"the features of sequence {len(xs) + 1} are not equally long"
            raise ValueError(msg)
        xs.append(np.stack(values, axis=1))
        labels.append(classes.index(name))
    shapes = {x.shape for x in xs}
    if len(shapes) != 1:
        msg = f"the sequences are not of one shape, but of {sorted(shapes)}"
        raise ValueError(msg)
    return np.stack(xs), np.array(labels, np.int32)


def _read_head(lines: Iterator[str]) -> list[str]:
    """Reads up to `@data`, and returns the names of the classes."""
    head: dict[str, list[str]] = {}
    for line in lines:
        word, *rest = line.split()
        if word.lower() == "@data":
            break
        head[word.lower()] = rest
    else:
        msg = "it has no line `@data`"
        raise ValueError(msg)
    if head.get("@timestamps", ["false"]) != ["false"]:
        msg = "its values have time stamps"
        raise ValueError(msg)
    is_labelled, *classes = head.get("@classlabel", ["false"])
    if is_labelled != "true":
        msg = "its head does not name the classes"
        raise ValueError(msg)
    return classes


class EigenWorms(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """259 sequences, 128 of them to train on."""

    VERSION = tfds.core.Version("1.0.0")
    url = "https://timeseriesclassification.com/aeon-toolkit/"
    file = "EigenWorms.zip"
    length = LENGTH
    sizes = {"train": NUM_TRAIN, "test": NUM_TEST}

    def _info(self) -> tfds.core.DatasetInfo:
        shape = (self.length, NUM_FEATURES)
        xs = tfds.features.Tensor(shape=shape, dtype=np.float32)
        label = tfds.features.ClassLabel(num_classes=NUM_CLASSES)
        return tfds.core.DatasetInfo(
            builder=self,
            description="The movements of worms, of the UEA archive.",
            features=tfds.features.FeaturesDict({"xs": xs, "label": label}),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        download_dir = Path(dl_manager.download_dir)
        check_obtainable("EigenWorms", self.url, [self.file], download_dir)
        # TFDS itself looks there only for files that it has the checksums of.
        path: Any = download_dir / "manual" / self.file
        if not path.exists():
            path = dl_manager.download(self.url + self.file)
        return {split: self._generate_examples(path, split) for split in self.sizes}

    def _generate_examples(self, path, split):
        xs, labels = self._read(Path(path), split)
        for key, (x, label) in enumerate(zip(xs, labels, strict=True)):
            yield key, {"xs": x, "label": int(label)}

    def _read(self, path: Path, split: str) -> Examples:
        expected = self.sizes[split], self.length, NUM_FEATURES
        try:
            with zipfile.ZipFile(path) as archive:
                # Some versions of the archive have them in a folder.
                ending = f"EigenWorms_{split.upper()}.ts"
                member, *_ = [n for n in archive.namelist() if n.endswith(ending)]
                with archive.open(member) as file:
                    lines = io.TextIOWrapper(file, encoding="utf-8", errors="replace")
                    xs, labels = read_ts(lines)
            if xs.shape != expected:
                msg = f"the {split} sequences are {xs.shape}, not {expected}"
                raise ValueError(msg)
        # There are no checksums to compare with, hence whatever can be wrong.
        except (EOFError, OSError, ValueError, zipfile.BadZipFile) as error:
            msg = (
                f"{path} is damaged or not what was expected ({error}). Delete it, "
                f"then run again to download it."
            )
            raise ExperimentError(msg) from error
        return xs, labels


def load(data_dir: Path) -> tuple[Examples, Examples]:
    """Reads the sequences to train on, and those to test on.

    Args:
        data_dir: where TFDS keeps downloads and prepared data.

    Raises:
        ConnectionError: they have to be downloaded, and the host cannot be reached.
    """
    builder = prepared(EigenWorms, data_dir, has_checksums=False)
    return _read_split(builder, "train"), _read_split(builder, "test")


def _read_split(builder: EigenWorms, split: str) -> Examples:
    examples = read_examples(builder, split)
    xs = np.stack([example["xs"] for example in examples])
    return xs, np.array([example["label"] for example in examples], np.int32)
