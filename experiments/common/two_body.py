"""Two bodies under gravity, in the plane: trajectories to learn from.

Both have mass one, and so has the constant of gravity:

    dq/dt = p,    dp_1/dt = (q_2 - q_1) / |q_2 - q_1|^3 = -dp_2/dt.

A state y = (q_1, q_2, p_1, p_2) has eight components. The center of mass rests at the
origin, from which each body starts at a distance between 0.5 and 1.5, with the speed of
a circular orbit but for some 5 %: the orbits of Greydanus et al., arXiv:1906.01563.
"""

import dataclasses
import zipfile
from pathlib import Path
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64

from experiments.common.errors import ExperimentError
from experiments.common.files import write_atomically

HORIZON = 10.0
STATE_DIM = 8
_TOLERANCE = 1e-12
_SEED = 0
_CHUNK = 50  # trajectories integrated at once


@dataclasses.dataclass(frozen=True, eq=False)
class TwoBodyData:
    """Trajectories by their use; what they start from is not among their times.

    `ts` are the times, evenly spaced up to `HORIZON`.
    """

    ts: Float64[np.ndarray, " time"]
    train_y0: Float64[np.ndarray, "trajectory state"]
    train_ys: Float64[np.ndarray, "trajectory time state"]
    validation_y0: Float64[np.ndarray, "trajectory state"]
    validation_ys: Float64[np.ndarray, "trajectory time state"]
    test_y0: Float64[np.ndarray, "trajectory state"]
    test_ys: Float64[np.ndarray, "trajectory time state"]


def gravity(t: Any, y: Float[Array, " state"], args: Any) -> Float[Array, " state"]:
    """The true vector field."""
    del t, args
    q, p = y[:4], y[4:]
    separation = q[2:] - q[:2]
    force = separation / jnp.sum(separation**2) ** 1.5
    return jnp.concatenate([p, force, -force])


def energy(y: Float[Array, "*axes state"]) -> Float[Array, "*axes"]:
    """The true energy, kinetic and potential."""
    distance = jnp.sqrt(jnp.sum((y[..., 2:4] - y[..., :2]) ** 2, axis=-1))
    return jnp.sum(y[..., 4:] ** 2, axis=-1) / 2 - 1 / distance


def initial_states(
    num: int, rng: np.random.Generator
) -> Float64[np.ndarray, "trajectory state"]:
    """Draws nearly circular orbits, in a random direction from the center."""
    radius = rng.uniform(0.5, 1.5, (num, 1))
    angle = rng.uniform(0, 2 * np.pi, num)
    outwards = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    onwards = np.stack([-np.sin(angle), np.cos(angle)], axis=1)
    q = radius * outwards
    # The other body pulls from twice the radius: p^2 / radius = 1 / (2 radius)^2.
    p = onwards * rng.normal(1.0, 0.05, (num, 1)) / (2 * np.sqrt(radius))
    return np.concatenate([q, -q, p, -p], axis=1)


def integrate(
    y0: Float64[np.ndarray, "trajectory state"], ts: Float64[np.ndarray, " time"]
) -> Float64[np.ndarray, "trajectory time state"]:
    """Follows the true orbits in float64, to about nine digits."""
    with jax.enable_x64(True):
        chunks = np.split(y0, range(_CHUNK, len(y0), _CHUNK))
        return np.concatenate([np.asarray(_solve_all(chunk, ts)) for chunk in chunks])


@jax.jit
def _solve_all(y0s: Array, ts: Array) -> Array | None:
    solve = lambda y0: diffrax.diffeqsolve(
        diffrax.ODETerm(gravity),
        diffrax.Dopri8(),
        t0=0.0,
        t1=ts[-1],
        dt0=0.01,
        y0=y0,
        saveat=diffrax.SaveAt(ts=ts),
        stepsize_controller=diffrax.PIDController(rtol=_TOLERANCE, atol=_TOLERANCE),
    )
    return jax.vmap(solve)(y0s).ys


def load(
    data_dir: Path, num_times: int, num_train: int, num_validation: int, num_test: int
) -> TwoBodyData:
    """Reads the trajectories, after integrating them if this is the first time.

    Args:
        data_dir: where they are kept.
        num_times: how many times there are in each.
        num_train: number of trajectories for training.
        num_validation: number for validation.
        num_test: number for the test.

    Returns:
        The data, the same every time.
    """
    nums = {"train": num_train, "validation": num_validation, "test": num_test}
    sizes = "-".join(map(str, (num_times, *nums.values())))
    path = data_dir / "two_body" / f"{sizes}.npz"
    if not path.exists():
        _write(path, _generate(num_times, nums))
    try:
        # Opened here: numpy leaves a damaged file open.
        with path.open("rb") as file, np.load(file) as arrays:
            return TwoBodyData(**arrays)
    except (EOFError, OSError, TypeError, ValueError, zipfile.BadZipFile) as error:
        msg = f"{path} is damaged ({error}). Delete it, then run again to make it anew."
        raise ExperimentError(msg) from error


def _generate(num_times: int, nums: dict[str, int]) -> dict[str, np.ndarray]:
    ts = np.linspace(0.0, HORIZON, num_times + 1)[1:]
    arrays = {"ts": ts}
    for index, (split, num) in enumerate(nums.items()):
        # Each split from its own seed: the test stays the same if there is more to
        # train with.
        y0 = initial_states(num, np.random.default_rng((_SEED, index)))
        arrays |= {f"{split}_y0": y0, f"{split}_ys": integrate(y0, ts)}
    return arrays


def _write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    write_atomically(path, lambda file: np.savez(file, **arrays))  # pyright: ignore[reportArgumentType]
