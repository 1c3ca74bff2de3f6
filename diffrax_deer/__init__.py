"""Differential equations and recurrences solved in parallel over time.

Newton's method on a whole trajectory (DEER, arXiv:2309.12252) inside diffrax.
"""

import importlib.metadata

from ._adjoint.deer_adjoint import DEERAdjoint as DEERAdjoint
from ._advise import Advice as Advice, advise as advise
from ._affine_scan import (
    AbstractScan as AbstractScan,
    AssociativeScan as AssociativeScan,
    ChunkedScan as ChunkedScan,
    SequentialScan as SequentialScan,
    affine_recurrence as affine_recurrence,
)
from ._distributed.sharded_scan import ShardedScan as ShardedScan
from ._gradient import (
    AbstractGradient as AbstractGradient,
    MatrixFreeGradient as MatrixFreeGradient,
    ParallelGradient as ParallelGradient,
    SequentialGradient as SequentialGradient,
    Solution as Solution,
)
from ._linalg.transitions import (
    AbstractTransition as AbstractTransition,
    BlockDiagonal as BlockDiagonal,
    Dense as Dense,
    Diagonal as Diagonal,
)
from ._linearization import (
    AbstractLinearization as AbstractLinearization,
    BlockDiagonalJacobian as BlockDiagonalJacobian,
    DiagonalJacobian as DiagonalJacobian,
    FullJacobian as FullJacobian,
    Jacobi as Jacobi,
    Picard as Picard,
    PiecewiseConstant as PiecewiseConstant,
)
from ._method import (
    AbstractMethod as AbstractMethod,
    Newton as Newton,
    Sequential as Sequential,
)
from ._ode.deer_solver import DEERSolver as DEERSolver
from ._ode.grids import (
    AbstractGrid as AbstractGrid,
    Equidistributed as Equidistributed,
    Uniform as Uniform,
)
from ._ode.rosenbrock_euler import (
    ExponentialRosenbrockEuler as ExponentialRosenbrockEuler,
)
from ._ode.whole_interval import WholeInterval as WholeInterval
from ._ode.window_state import WindowState as WindowState
from ._predictor import (
    AbstractPredictor as AbstractPredictor,
    CoarsePredictor as CoarsePredictor,
    ConstantPredictor as ConstantPredictor,
)
from ._recurrence.damped_newton import DampedNewton as DampedNewton
from ._recurrence.deer_scan import deer_scan as deer_scan
from ._recurrence.deer_solve import deer_solve as deer_solve
from ._recurrence.rnn import DEERRNN as DEERRNN
from ._statistics import Statistics as Statistics
from ._step_map import StepMap as StepMap

__version__ = importlib.metadata.version("diffrax_deer")
