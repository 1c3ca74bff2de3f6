"""Checkpoints: one file that holds a JSON header, a line break and a PyTree's arrays.

The PyTree part is what `equinox.tree_serialise_leaves` writes. A checkpoint is always
complete: a crash while it is written leaves the one before it.
"""

import json
from pathlib import Path
from typing import Any, BinaryIO

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import PyTree

from experiments.common.errors import ExperimentError
from experiments.common.files import write_atomically


def save_checkpoint(path: Path, header: dict[str, Any], tree: PyTree) -> None:
    """Replaces the checkpoint at `path`, atomically.

    Args:
        path: the file.
        header: anything that JSON can hold. Floats are restored to the last bit.
        tree: its arrays and random keys are stored, its other leaves are not.
    """

    def write(file: BinaryIO) -> None:
        file.write(json.dumps(header).encode() + b"\n")
        eqx.tree_serialise_leaves(file, tree, filter_spec=_write_leaf)

    write_atomically(path, write)


def load_checkpoint(path: Path, like: PyTree) -> tuple[dict[str, Any], PyTree]:
    """Reads what `save_checkpoint` wrote.

    Args:
        path: the file.
        like: a tree of the same structure, shapes and dtypes, or `None` to read the
            header alone.

    Returns:
        The header, and the tree with its arrays and random keys restored.
    """
    try:
        with path.open("rb") as file:
            header = json.loads(file.readline())
            tree = eqx.tree_deserialise_leaves(file, like, filter_spec=_read_leaf)
    except (EOFError, RuntimeError, ValueError) as error:
        msg = (
            f"{path} is damaged or was written by another version of this program "
            f"({error}). Move it away, then start anew without --resume."
        )
        raise ExperimentError(msg) from error
    return header, tree


def check_same_config(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Raises an error that names every setting in which two configurations differ."""
    differences = [
        f"{name} (was {saved.get(name)}, now {current.get(name)})"
        for name in sorted(saved.keys() | current.keys())
        if saved.get(name) != current.get(name)
    ]
    if differences:
        msg = (
            f"Cannot resume a run with other settings: {', '.join(differences)}. Resume"
            " with its own settings, or start a new run without --resume and with "
            "another --out."
        )
        raise ExperimentError(msg)


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(
        leaf.dtype, jax.dtypes.prng_key
    )


def _write_leaf(file: Any, leaf: Any) -> None:
    leaf = jr.key_data(leaf) if _is_key(leaf) else leaf
    eqx.default_serialise_filter_spec(file, leaf)


def _read_leaf(file: Any, like: Any) -> Any:
    if _is_key(like):
        data = eqx.default_deserialise_filter_spec(file, jr.key_data(like))
        return jr.wrap_key_data(data, impl=jr.key_impl(like))
    return eqx.default_deserialise_filter_spec(file, like)
