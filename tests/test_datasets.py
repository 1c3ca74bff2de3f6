import functools
import gzip
import hashlib
import http.server
import itertools
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits
from tensorflow_datasets.core.download.checksums import UrlInfo, get_all_url_infos
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError
from tensorflow_datasets.core.utils import Size

from experiments.common import datasets
from experiments.common.datasets import Dataset, Digits, Mnist, batches, load

_ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def _temporary_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    # TFDS leaves an empty folder there for every data set not yet prepared.
    with pytest.MonkeyPatch.context() as monkeypatch:
        folder = tmp_path_factory.mktemp("temporary")
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        yield


@pytest.fixture(scope="module")
def digits_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data_dir = tmp_path_factory.mktemp("digits")
    load("digits", data_dir)
    return data_dir


def _sorted_rows(dataset: Dataset, max_pixel: int) -> np.ndarray:
    images = np.concatenate([dataset.train_xs, dataset.test_xs])
    labels = np.concatenate([dataset.train_labels, dataset.test_labels])
    return _sort_rows(np.rint(images * max_pixel), labels)


def _sort_rows(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    rows = np.column_stack([images, labels])
    return rows[np.lexsort(rows.T)]


def test_digits_are_all_there(digits_dir: Path):
    dataset = load("digits", digits_dir)
    assert dataset.train_xs.shape == (1437, 64)
    assert dataset.train_labels.shape == (1437,)
    assert dataset.test_xs.shape == (360, 64)
    assert dataset.test_labels.shape == (360,)
    expected = _sort_rows(*load_digits(return_X_y=True))
    np.testing.assert_array_equal(_sorted_rows(dataset, max_pixel=16), expected)


def test_digits_are_scaled(digits_dir: Path):
    dataset = load("digits", digits_dir)
    assert (dataset.name, dataset.num_classes) == ("digits", 10)
    for images in (dataset.train_xs, dataset.test_xs):
        assert images.dtype == np.float32
        assert (images.min(), images.max()) == (0, 1)
    for labels in (dataset.train_labels, dataset.test_labels):
        assert labels.dtype == np.int32
        assert set(labels) == set(range(10))


def test_digits_are_stratified(digits_dir: Path):
    dataset = load("digits", digits_dir)
    test_counts = np.bincount(dataset.test_labels)
    counts = np.bincount(dataset.train_labels) + test_counts
    np.testing.assert_allclose(test_counts, counts * 360 / 1797, atol=1)


def test_prepared_data_is_read_again(
    digits_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    first = load("digits", tmp_path)
    np.testing.assert_array_equal(first.train_xs, load("digits", digits_dir).train_xs)
    monkeypatch.delattr(Digits, "_generate_examples")
    second = load("digits", tmp_path)
    np.testing.assert_array_equal(first.train_xs, second.train_xs)
    np.testing.assert_array_equal(first.test_labels, second.test_labels)


def test_digits_need_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def refuse(*args, **kwargs):
        pytest.fail("The network was used.")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert len(load("digits", tmp_path).train_labels) == 1437


def test_killed_preparation_is_started_again(tmp_path: Path):
    script = f"""
import os, pathlib, signal
import numpy as np
from experiments.common import datasets

def die():
    os.kill(os.getpid(), signal.SIGKILL)
    yield

def split_generators(self, dl_manager):
    images, labels = np.zeros((5, 8, 8), np.uint8), np.zeros(5, int)
    return {{"train": self._generate_examples(images, labels), "test": die()}}

datasets.Digits._split_generators = split_generators
datasets.load("digits", pathlib.Path({str(tmp_path)!r}))
"""
    killed = subprocess.run(
        [sys.executable, "-c", script], cwd=_ROOT, capture_output=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert list(tmp_path.rglob("*train.array_record*"))
    assert len(load("digits", tmp_path).train_labels) == 1437


def test_simultaneous_preparation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    split_generators = Digits._split_generators

    def overtaken(self, dl_manager):
        monkeypatch.setattr(Digits, "_split_generators", split_generators)
        load("digits", tmp_path)
        return split_generators(self, dl_manager)

    monkeypatch.setattr(Digits, "_split_generators", overtaken)
    assert len(load("digits", tmp_path).train_labels) == 1437


def test_unknown_name(tmp_path: Path):
    with pytest.raises(ValueError, match="'cifar'.*: digits, mnist"):
        load("cifar", tmp_path)
    assert not list(tmp_path.iterdir())


class _Host:
    """Serves tiny MNIST files, and registers their checksums."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        rng = np.random.default_rng(0)
        self.folder = folder
        self.images = rng.integers(0, 256, (8, 28, 28), np.uint8)
        self.labels = rng.integers(0, 10, 8, np.uint8)
        parts = [self.images[:5], self.labels[:5], self.images[5:], self.labels[5:]]
        for name, values in zip(Mnist.files, parts, strict=True):
            (folder / name).write_bytes(_idx(values))
        handler = functools.partial(_QuietHandler, directory=str(folder))
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()
        url = f"http://127.0.0.1:{self.server.server_port}/"
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        monkeypatch.setattr(Mnist, "url", url)
        url_infos = {url + name: _url_info(folder / name) for name in Mnist.files}
        monkeypatch.setattr(Mnist, "url_infos", url_infos)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def assert_equals(self, dataset: Dataset) -> None:
        assert dataset.train_xs.shape == (5, 784)
        assert dataset.test_xs.shape == (3, 784)
        expected = _sort_rows(self.images.reshape(-1, 784), self.labels)
        np.testing.assert_array_equal(_sorted_rows(dataset, max_pixel=255), expected)


class _QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format, *args):
        pass


def _idx(values: np.ndarray) -> bytes:
    header = struct.pack(f">{1 + values.ndim}I", 0x0800 + values.ndim, *values.shape)
    return gzip.compress(header + values.tobytes())


def _url_info(path: Path) -> UrlInfo:
    content = path.read_bytes()
    checksum = hashlib.sha256(content).hexdigest()
    return UrlInfo(size=Size(len(content)), checksum=checksum, filename=path.name)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Host]:
    folder = tmp_path / "host"
    folder.mkdir()
    host = _Host(folder, monkeypatch)
    yield host
    host.close()


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"


def test_mnist_is_downloaded_and_read(host: _Host, data_dir: Path):
    dataset = load("mnist", data_dir)
    assert dataset.name == "mnist"
    host.assert_equals(dataset)


def test_mnist_downloads_are_kept(host: _Host, data_dir: Path):
    load("mnist", data_dir)
    shutil.rmtree(data_dir / "mnist")
    host.close()
    host.assert_equals(load("mnist", data_dir))


def test_mnist_takes_files_put_there_by_hand(host: _Host, data_dir: Path):
    host.close()
    shutil.copytree(host.folder, data_dir / "downloads" / "manual")
    host.assert_equals(load("mnist", data_dir))


def test_mnist_refuses_a_changed_download(host: _Host, data_dir: Path):
    path = host.folder / Mnist.files[0]
    original = path.read_bytes()
    path.write_bytes(_idx(host.images[5:]))
    with pytest.raises(NonMatchingChecksumError):
        load("mnist", data_dir)
    path.write_bytes(original)
    host.assert_equals(load("mnist", data_dir))


@pytest.mark.usefixtures("host")
def test_mnist_refuses_unregistered_files(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    # The same host, under a name for which no checksums are registered.
    monkeypatch.setattr(Mnist, "url", Mnist.url.replace("127.0.0.1", "localhost"))
    with pytest.raises(ValueError, match="Missing checksums"):
        load("mnist", data_dir)


@pytest.mark.usefixtures("host")
def test_mnist_refuses_a_download_damaged_later(data_dir: Path):
    load("mnist", data_dir)
    shutil.rmtree(data_dir / "mnist")
    (path,) = (data_dir / "downloads").rglob("*train-images*.gz")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is damaged.*Delete it"):
        load("mnist", data_dir)


def test_mnist_checksums_are_registered():
    assert {Mnist.url + name for name in Mnist.files} <= get_all_url_infos().keys()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>", "damaged"),
        (gzip.compress(b"\0\0\x08"), "damaged"),
        (_idx(np.zeros((2, 3, 3), np.uint8))[:-9], "damaged"),
        (gzip.compress(struct.pack(">4I", 0x0803, 2, 1, 1) + b"\0"), "damaged"),
        (gzip.compress(struct.pack(">4I", 0x0903, 1, 1, 1) + b"\0"), "0x00000903"),
    ],
    ids=["not-gzip", "short-header", "truncated", "too-few-values", "other-type"],
)
def test_damaged_idx_file(content: bytes, message: str, tmp_path: Path):
    path = tmp_path / "images.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"images.gz .*{message}.*Delete it"):
        datasets._read_idx(path, num_axes=3)


def test_mnist_without_network(host: _Host, data_dir: Path):
    host.close()  # and so its port is closed
    start = time.perf_counter()
    with pytest.raises(ConnectionError, match="cannot be reached.*--dataset digits"):
        load("mnist", data_dir)
    assert time.perf_counter() - start < 5


@pytest.mark.usefixtures("host")
def test_mnist_with_a_hanging_name_look_up(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    given_up = threading.Event()

    def hang(*args, **kwargs):
        given_up.wait(60)
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    start = time.perf_counter()
    with pytest.raises(ConnectionError, match="cannot be reached.*--dataset digits"):
        load("mnist", data_dir)
    given_up.set()
    assert time.perf_counter() - start < 5


def test_batches_cover_an_epoch():
    drawn = list(itertools.islice(batches(10, 3, seed=0), 6))
    for epoch in (drawn[:3], drawn[3:]):
        assert [len(batch) for batch in epoch] == [3, 3, 3]
        indices = np.concatenate(epoch)
        assert len(set(indices)) == 9
        assert set(indices) <= set(range(10))


def test_batches_are_reshuffled():
    first, second = itertools.islice(batches(100, 100, seed=0), 2)
    other = next(batches(100, 100, seed=1))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("start_step", [0, 1, 3, 8])
def test_batches_resume(start_step: int):
    uninterrupted = itertools.islice(batches(10, 3, seed=5), start_step, 12)
    resumed = itertools.islice(batches(10, 3, 5, start_step), 12 - start_step)
    for expected, batch in zip(uninterrupted, resumed, strict=True):
        np.testing.assert_array_equal(batch, expected)


def test_batches_resume_without_drawing_what_came_before():
    start = time.perf_counter()
    next(batches(1000, 10, seed=0, start_step=10**12))
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("batch_size", [0, 11])
def test_impossible_batch_size(batch_size: int):
    with pytest.raises(ValueError, match="from 1 to 10"):
        batches(10, batch_size, seed=0)
