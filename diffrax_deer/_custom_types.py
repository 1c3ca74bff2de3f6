"""Names for the types that appear in the public signatures.

diffrax keeps its own aliases private, so the few that are needed are declared again.
Axes: `time` is the number of steps N, `state` the number of real unknowns per step D.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Array, Float, PyTree

Args: TypeAlias = PyTree[Any]
BoolScalarLike: TypeAlias = bool | Array | np.ndarray
DenseInfo: TypeAlias = dict[str, PyTree[Array]]
IntScalarLike: TypeAlias = int | Array | np.ndarray
Matrix: TypeAlias = Float[Array, "state state"]
RealScalarLike: TypeAlias = float | int | Array | np.ndarray
# The components that depend on each other, and the quadratures.
Coupled: TypeAlias = Float[Array, " coupled"]
CoupledStates: TypeAlias = Float[Array, "time coupled"]
Rest: TypeAlias = Float[Array, " rest"]
State: TypeAlias = Float[Array, " state"]
States: TypeAlias = Float[Array, "time state"]
Transitions: TypeAlias = (
    Float[Array, "time state state"]
    | Float[Array, "time state"]
    | Float[Array, "time blocks block block"]
)
VectorField: TypeAlias = Callable[[State], State]
Y: TypeAlias = PyTree[Any]
