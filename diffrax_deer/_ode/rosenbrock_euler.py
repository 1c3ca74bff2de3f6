r"""The scheme of the DEER paper, as a diffrax solver.

Linearize on each interval, hold $G = -J$ and $z = f + G y$ constant, and solve exactly:

$$y_{i+1} = e^{-G h} y_i + G^{-1}(I - e^{-G h}) z
          = y_i + \varphi_1(hJ)\, h f, \qquad J = \frac{\partial f}{\partial y},$$

which is the exponential Rosenbrock-Euler method. $f$ and $J$ are taken at $y_i$ and in
the middle of the interval in time: order two also for fields that depend on time.
"""

from collections.abc import Callable
from typing import ClassVar

import diffrax

from .._custom_types import Args, BoolScalarLike, DenseInfo, RealScalarLike, Y
from .._linalg.expm import phi1
from .._linalg.products import matvec
from .._ravel import ravel
from .._step_map import value_and_jacobian


class ExponentialRosenbrockEuler(diffrax.AbstractAdaptiveSolver):
    r"""The exponential Rosenbrock-Euler method, the scheme of the DEER paper.

    Order 2 with an error estimate of order 3, A-stable, and exact for $y' = A y + b$
    with constant coefficients, however long the step. One step evaluates the field
    three times, differentiates it once (D tangents) and forms $\varphi_1$ of one D × D
    matrix: for small D. Any pytree of real or complex leaves.

    Use it alone, as any diffrax solver, or as the step map of `DEERSolver`.

    ??? cite "Reference"

        Lim et al., arXiv:2309.12252, equation 9. Hochbruck and Ostermann, *Exponential
        integrators*, Acta Numerica 19 (2010), section 2.4: method and error estimate.
    """

    term_structure: ClassVar = diffrax.AbstractTerm
    interpolation_cls: ClassVar[
        Callable[..., diffrax.ThirdOrderHermitePolynomialInterpolation]
    ] = diffrax.ThirdOrderHermitePolynomialInterpolation

    def order(self, terms: diffrax.AbstractTerm) -> int:
        """The order of the method, 2."""
        del terms
        return 2

    def error_order(self, terms: diffrax.AbstractTerm) -> int:
        """The order of the error estimate, 3."""
        del terms
        return 3

    def func(
        self, terms: diffrax.AbstractTerm, t0: RealScalarLike, y0: Y, args: Args
    ) -> Y:
        """The vector field."""
        return terms.vf(t0, y0, args)

    def init(self, terms, t0, t1, y0, args) -> None:
        """Nothing is carried from step to step."""
        del terms, t0, t1, y0, args

    def step(
        self,
        terms: diffrax.AbstractTerm,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args,
        solver_state: None,
        made_jump: BoolScalarLike,
    ) -> tuple[Y, Y, DenseInfo, None, diffrax.RESULTS]:
        """One step from `t0` to `t1`; arguments and result as in `AbstractSolver`."""
        del solver_state, made_jump
        control = terms.contr(t0, t1)
        flat, unravel = ravel(y0)
        middle = t0 + (t1 - t0) / 2
        increment = lambda t, y: ravel(terms.vf_prod(t, unravel(y), args, control))[0]

        k, jacobian = value_and_jacobian(lambda y: increment(middle, y), flat)
        phi = phi1(jacobian)
        change = matvec(phi, k)
        k0, k1 = increment(t0, flat), increment(t1, flat + change)
        # What the frozen linearization leaves out: of the field along the step, and of
        # its dependence on time.
        defect = k0 - 2 * k + k1 - matvec(jacobian, change)
        error = matvec(phi, defect) / 3

        y1 = unravel(flat + change)
        dense_info = {"y0": y0, "y1": y1, "k0": unravel(k0), "k1": unravel(k1)}
        return y1, unravel(error), dense_info, None, diffrax.RESULTS.successful
