"""Names for the types that appear in the public signatures.

diffrax keeps its own aliases private, so the few that are needed are declared again.
Axes: `time` is the number of steps N, `state` the number of real unknowns per step D.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

from jaxtyping import Array, Bool, Float, Int, PyTree

Args: TypeAlias = PyTree[Any]
BoolScalarLike: TypeAlias = bool | Bool[Array, ""]
DenseInfo: TypeAlias = dict[str, PyTree[Array]]
IntScalarLike: TypeAlias = int | Int[Array, ""]
Matrix: TypeAlias = Float[Array, "state state"]
RealScalarLike: TypeAlias = float | int | Float[Array, ""] | Int[Array, ""]
State: TypeAlias = Float[Array, " state"]
States: TypeAlias = Float[Array, "time state"]
Transition: TypeAlias = Float[Array, "state state"] | Float[Array, " state"]
Transitions: TypeAlias = Float[Array, "time state state"] | Float[Array, "time state"]
VectorField: TypeAlias = Callable[[State], State]
Y: TypeAlias = PyTree[Any]
