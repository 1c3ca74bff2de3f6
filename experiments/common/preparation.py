"""Data prepared once by TensorFlow Datasets (TFDS), and read back from the disk.

An interrupted preparation leaves only an `incomplete.*` folder, which is never read.
"""

import fnmatch
import json
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import requests
import tensorflow_datasets as tfds

Builder = TypeVar("Builder", bound=tfds.core.DatasetBuilder)

_CONNECTION_TIMEOUT = 3.0  # seconds


def _find_connection_error(url: str) -> Exception | None:
    outcome: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def probe() -> None:
        try:
            requests.head(url, timeout=_CONNECTION_TIMEOUT).raise_for_status()
        except requests.RequestException as error:
            outcome.put(error)
        else:
            outcome.put(None)

    # The timeout of `requests` does not cover the name look-up, which cannot be
    # interrupted either; a daemon thread holds up neither this function nor the exit.
    threading.Thread(target=probe, daemon=True).start()
    try:
        return outcome.get(timeout=_CONNECTION_TIMEOUT)
    except queue.Empty:
        return TimeoutError(f"no answer within {_CONNECTION_TIMEOUT:g} s")


def _files(folder: Path, pattern: str) -> Iterator[Path]:
    # Not `rglob`: it fails when a download in the background removes its folder.
    for parent, _, names in os.walk(folder):
        yield from (Path(parent, name) for name in fnmatch.filter(names, pattern))


def _downloaded_urls(download_dir: Path) -> set[str]:
    """Reads the `INFO` files that TFDS writes next to complete downloads."""
    infos = _files(download_dir, "*.INFO")
    complete = [info for info in infos if info.with_suffix("").exists()]
    return {url for info in complete for url in json.loads(info.read_text())["urls"]}


def check_obtainable(
    name: str, url: str, files: Sequence[str], download_dir: Path
) -> None:
    """Raises an error at once if files have to be downloaded and cannot be.

    Args:
        name: the data set.
        url: the address of the folder with the files.
        files: their names.
        download_dir: where TFDS keeps downloads.
    """
    # TFDS takes a file from this folder if there is one of the right name.
    manual_dir = download_dir / "manual"
    downloaded = _downloaded_urls(download_dir)
    missing = [
        file
        for file in files
        if url + file not in downloaded and not (manual_dir / file).exists()
    ]
    if not missing:
        return
    error = _find_connection_error(url + missing[0])
    if error is not None:
        msg = (
            f"{name} cannot be downloaded: {url} cannot be reached. Use "
            f"`--dataset digits`, which needs no network, or put "
            f"{', '.join(missing)} into {manual_dir}."
        )
        raise ConnectionError(msg) from error


def prepared(
    builder_type: Callable[..., Builder], data_dir: Path, has_checksums: bool
) -> Builder:
    """Prepares a data set if this is the first time.

    Args:
        builder_type: makes its builder.
        data_dir: where TFDS keeps downloads and prepared data.
        has_checksums: whether TFDS ships checksums of its files, and checks them.

    Returns:
        A builder of what is on the disk.
    """
    builder = builder_type(data_dir=data_dir)
    download_config = tfds.download.DownloadConfig(
        try_download_gcs=False,
        # TFDS checks what it knows; should it stop shipping the checksums, this refuses
        # the files rather than take them unchecked.
        force_checksums_validation=has_checksums,
    )
    try:
        # Not Parquet, which silently loses rows.
        builder.download_and_prepare(
            download_config=download_config, file_format="array_record"
        )
    except OSError:
        # Another process may have prepared the same data in the meantime, in which case
        # the final renaming fails.
        if not builder.data_path.exists():
            raise
    # Anew, to describe what is on disk now, whichever process wrote it.
    return builder_type(data_dir=data_dir)


def read_examples(
    builder: tfds.core.DatasetBuilder, split: str
) -> Sequence[dict[str, Any]]:
    """All examples of a split, in the same order every time."""
    # A decorator of TFDS's hides the parameters from the type checker.
    source: Any = builder.as_data_source(split)  # pyright: ignore[reportCallIssue]
    # One call for all examples takes half the time of iteration.
    return source.__getitems__(range(len(source)))
