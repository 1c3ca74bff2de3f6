"""Writing files so that a crash at any moment leaves either the old or the new one."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replaces a file by what `write` writes, or leaves it as it was.

    Args:
        path: the file; its folder is made if need be.
        write: called with a binary file opened for writing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, since a rename is atomic only within one file system; of a
    # fixed name, so that what a crash leaves behind is overwritten next time.
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        write(file)
        file.flush()
        # Otherwise the new name may reach the disk before the content does.
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync_folder(path.parent)


def write_figure(path: Path, figure: Any, dpi: int = 200) -> None:
    """Replaces a picture by a figure of matplotlib."""
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=dpi))


def set_aside(paths: Iterable[Path], folder: Path) -> Path:
    """Moves those files that exist into a new subfolder.

    Args:
        paths: the files.
        folder: where the subfolder `previous-1`, or the next free number, is made.

    Returns:
        The subfolder.
    """
    number = 1
    while (target := folder / f"previous-{number}").exists():
        number += 1
    target.mkdir(parents=True)
    for path in paths:
        if path.exists():
            path.rename(target / path.name)
    return target


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
