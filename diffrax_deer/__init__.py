"""Differential equations and recurrences solved in parallel over time.

Newton's method on a whole trajectory (DEER, arXiv:2309.12252) inside diffrax.
"""

import importlib.metadata

from ._adjoint import DEERAdjoint as DEERAdjoint
from ._advice import Advice as Advice
from ._advise import advise as advise
from ._affine_scan import (
    AbstractScan as AbstractScan,
    AssociativeScan as AssociativeScan,
    SequentialScan as SequentialScan,
    affine_recurrence as affine_recurrence,
)
from ._blocks import BlockDiagonalJacobian as BlockDiagonalJacobian
from ._controller import WholeInterval as WholeInterval
from ._deer_scan import deer_scan as deer_scan
from ._deer_solve import deer_solve as deer_solve
from ._exponential import ExponentialRosenbrockEuler as ExponentialRosenbrockEuler
from ._forward import (
    AbstractForward as AbstractForward,
    ParallelForward as ParallelForward,
    SequentialForward as SequentialForward,
)
from ._linearization import (
    AbstractLinearization as AbstractLinearization,
    DiagonalJacobian as DiagonalJacobian,
    FullJacobian as FullJacobian,
    Picard as Picard,
    PiecewiseConstant as PiecewiseConstant,
    StepMap as StepMap,
)
from ._predictor import (
    AbstractPredictor as AbstractPredictor,
    CoarsePredictor as CoarsePredictor,
    ConstantPredictor as ConstantPredictor,
)
from ._recurrent import DEERRNN as DEERRNN
from ._solver import (
    DEERSolver as DEERSolver,
    WindowState as WindowState,
)

__version__ = importlib.metadata.version("diffrax_deer")
