"""Differential equations that are hard to solve from a bad guess."""

import dataclasses
from collections.abc import Callable
from typing import Any

import diffrax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
from jaxtyping import Array


@dataclasses.dataclass(frozen=True)
class Problem:
    """`dy/dt = field(t, y, args)` from `y0` at time 0 to `t1`.

    Attributes:
        title: What to call it in a table.
        field: The vector field; `args` are not used.
        initial: The initial value.
        t1: The end.
        num_steps: Steps of equal length; `None` means those of an adaptive solver.
        implicit: Whether to solve it with `Kvaerno5`, else with `Dopri5`.
    """

    title: str
    field: Callable[[Any, Array, Any], Array]
    initial: tuple[float, ...]
    t1: float
    num_steps: int | None
    implicit: bool = False

    @property
    def y0(self) -> Array:
        """The initial value as an array."""
        return jnp.asarray(np.array(self.initial))

    @property
    def solver(self) -> diffrax.AbstractSolver:
        """The sequential solver, whose steps are the equations to solve in parallel."""
        if self.implicit:
            # To rounding: two ways to solve the same equations are to be compared.
            return diffrax.Kvaerno5(root_finder=optx.Newton(rtol=1e-9, atol=1e-9))
        return diffrax.Dopri5()


LOTKA_VOLTERRA = (1.1, 0.4, 0.1, 0.4)
FITZHUGH_NAGUMO = (0.5, 0.7, 0.8, 0.08)


def lotka_volterra(t, y, params):
    """Prey and predators: births, the eaten, what grows from them, and deaths."""
    del t
    birth, eaten, grown, death = params
    return jnp.stack([y[0] * (birth - eaten * y[1]), y[1] * (grown * y[0] - death)])


def fitzhugh_nagumo(t, y, params):
    """A neuron: the current, two parameters of its recovery, and how fast that is."""
    del t
    current, offset, slope, rate = params
    recovery = rate * (y[0] + offset - slope * y[1])
    return jnp.stack([y[0] - y[0] ** 3 / 3 - y[1] + current, recovery])


def _lotka_volterra(t, y, args):
    del args
    return lotka_volterra(t, y, LOTKA_VOLTERRA)


def _fitzhugh_nagumo(t, y, args):
    del args
    return fitzhugh_nagumo(t, y, FITZHUGH_NAGUMO)


def _van_der_pol(mu):
    return lambda t, y, args: jnp.stack([y[1], mu * (1 - y[0] ** 2) * y[1] - y[0]])


def _lorenz(t, y, args):
    del t, args
    return jnp.stack(
        [10 * (y[1] - y[0]), y[0] * (28 - y[2]) - y[1], y[0] * y[1] - 8 / 3 * y[2]]
    )


def _roessler(t, y, args):
    del t, args
    return jnp.stack([-y[1] - y[2], y[0] + 0.2 * y[1], 0.2 + y[2] * (y[0] - 5.7)])


def _robertson(t, y, args):
    del t, args
    slow, back, fast = 0.04 * y[0], 1e4 * y[1] * y[2], 3e7 * y[1] ** 2
    return jnp.stack([back - slow, slow - back - fast, fast])


def _hires(t, y, args):
    # High irradiance responses of a plant's photomorphogenesis (Hairer and Wanner).
    del t, args
    bound = 280 * y[5] * y[7]
    return jnp.stack(
        [
            -1.71 * y[0] + 0.43 * y[1] + 8.32 * y[2] + 0.0007,
            1.71 * y[0] - 8.75 * y[1],
            -10.03 * y[2] + 0.43 * y[3] + 0.035 * y[4],
            8.32 * y[1] + 1.71 * y[2] - 1.12 * y[3],
            -1.745 * y[4] + 0.43 * y[5] + 0.43 * y[6],
            -bound + 0.69 * y[3] + 1.71 * y[4] - 0.43 * y[5] + 0.69 * y[6],
            bound - 1.81 * y[6],
            1.81 * y[6] - bound,
        ]
    )


def _two_body(t, y, args):
    del t, args
    position, velocity = y[:2], y[2:]
    distance = jnp.sqrt(jnp.sum(position**2))
    return jnp.concatenate([velocity, -position / distance**3])


def _pleiades(t, y, args):
    # Seven stars in the plane, of masses 1 to 7 (Hairer, Norsett and Wanner).
    del t, args
    position, velocity = y[:14].reshape(2, 7), y[14:]
    offsets = position[:, None, :] - position[:, :, None]
    # The diagonal is that of a star and itself: no force, but nothing to divide by.
    cubes = (jnp.sum(offsets**2, axis=0) + jnp.eye(7)) ** 1.5
    masses = jnp.arange(1, 8).astype(y.dtype)
    return jnp.concatenate([velocity, ((offsets / cubes) @ masses).reshape(14)])


def _driven_pendulum(t, y, args):
    del args
    push = 1.2 * jnp.cos(2 / 3 * t)
    return jnp.stack([y[1], push - jnp.sin(y[0]) - 0.2 * y[1]])


def _square_root(t, y, args):
    del t, args
    return -jnp.sqrt(y)


def _logarithm(t, y, args):
    del t, args
    return -5 * jnp.log(y)


def _square(t, y, args):
    del t, args
    return y**2


_HIRES = (1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0057)
_PLEIADES = (
    *(3.0, 3.0, -1.0, -3.0, 2.0, -2.0, 2.0),
    *(3.0, -3.0, 2.0, 0.0, 0.0, -4.0, 4.0),
    *(0.0, 0.0, 0.0, 0.0, 0.0, 1.75, -1.5),
    *(0.0, 0.0, 0.0, -1.25, 1.0, 0.0, 0.0),
)
PROBLEMS = {
    "lotka_volterra_10": Problem(
        "Lotka-Volterra, T = 10", _lotka_volterra, (10.0, 5.0), 10.0, 256
    ),
    "lotka_volterra_100": Problem(
        "Lotka-Volterra, T = 100", _lotka_volterra, (10.0, 5.0), 100.0, 2560
    ),
    "fitzhugh_nagumo_100": Problem(
        "FitzHugh-Nagumo, T = 100", _fitzhugh_nagumo, (-1.0, 1.0), 100.0, 1000
    ),
    "fitzhugh_nagumo_300": Problem(
        "FitzHugh-Nagumo, T = 300", _fitzhugh_nagumo, (-1.0, 1.0), 300.0, 3000
    ),
    "van_der_pol_1": Problem(
        "Van der Pol, µ = 1", _van_der_pol(1.0), (2.0, 0.0), 20.0, 512
    ),
    "van_der_pol_5": Problem(
        "Van der Pol, µ = 5", _van_der_pol(5.0), (2.0, 0.0), 20.0, 1024
    ),
    "van_der_pol_10": Problem(
        "Van der Pol, µ = 10", _van_der_pol(10.0), (2.0, 0.0), 20.0, 2048
    ),
    "van_der_pol_100": Problem(
        "Van der Pol, µ = 100, T = 200",
        _van_der_pol(100.0),
        (2.0, 0.0),
        200.0,
        None,
        True,
    ),
    "lorenz": Problem("Lorenz, T = 20 (chaotic)", _lorenz, (1.0, 1.0, 1.0), 20.0, 2048),
    "roessler": Problem(
        "Rössler, T = 50 (chaotic)", _roessler, (1.0, 1.0, 1.0), 50.0, 2048
    ),
    "robertson": Problem(
        "Robertson, T = 1e5", _robertson, (1.0, 0.0, 0.0), 1e5, None, True
    ),
    "hires": Problem("HIRES", _hires, _HIRES, 321.8122, None, True),
    "two_body": Problem("two bodies, T = 6", _two_body, (1.0, 0.0, 0.0, 1.1), 6.0, 256),
    "eccentric_orbit": Problem(
        "two bodies, eccentricity 0.8", _two_body, (0.2, 0.0, 0.0, 3.0), 20.0, 4096
    ),
    "near_collision": Problem(
        "two bodies, near collision", _two_body, (1.0, 0.0, 0.0, 0.3), 3.0, 2048
    ),
    "pleiades": Problem("Pleiades", _pleiades, _PLEIADES, 3.0, 1500),
    "driven_pendulum": Problem(
        "driven pendulum", _driven_pendulum, (0.2, 0.0), 25.0, 512
    ),
    "square_root": Problem(
        "y' = -sqrt(y), up to 0.0025", _square_root, (1.0,), 1.9, 128
    ),
    "logarithm": Problem("y' = -5 log y", _logarithm, (0.01,), 2.0, 128),
    "square": Problem("y' = y², blows up at 1, T = 0.99", _square, (1.0,), 0.99, 256),
}
