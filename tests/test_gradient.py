"""The derivatives of a solve are those of a plain loop over the same steps."""

import dataclasses
import functools as ft
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

from diffrax_deer import (
    AssociativeScan,
    BlockDiagonalJacobian,
    DEERSolver,
    DiagonalJacobian,
    Jacobi,
    MatrixFreeGradient,
    ParallelGradient,
    Picard,
    PiecewiseConstant,
    Sequential,
    SequentialGradient,
    SequentialScan,
    StepMap,
)
from diffrax_deer._defaults import batch_size
from diffrax_deer._gradient import GradientByBatch, default_gradient
from diffrax_deer._method import Given
from diffrax_deer._ode.grid_solve import solve_grid
from diffrax_deer._solve import solve

from .helpers import (
    constant_guess,
    each_gradient,
    intervals,
    newton,
    primitives,
    problems,
    random_like,
    relative_error,
    result_is,
    rk4,
    scans,
    sequential,
    solved,
    weighted_loss,
)

_STEPS = 9


def _problem(dtype: Any = jnp.float64, size: int = 3):
    """A network: initial value, uneven times and weights."""
    rng = np.random.default_rng(0)
    scale = np.sqrt(3 / size)
    weights = (
        scale * rng.normal(size=(size, 8)),
        rng.normal(size=8),
        rng.normal(size=(8, size)),
    )
    times = np.cumsum(rng.uniform(0.05, 0.2, size=_STEPS + 1))
    parameters = rng.normal(size=size), times, weights
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), parameters)


def _field(t, y, weights):
    w_in, bias, w_out = weights
    return jnp.tanh(y @ w_in + bias * jnp.cos(3 * t)) @ w_out


def _unroll(parameters):
    """The reference, differentiated by JAX."""
    y0, times, weights = parameters
    return sequential(rk4(_field, weights), y0, intervals(times))


def _solve(parameters, *, method=None, gradient=None, guess=None):
    """The same by `solve`; the weights reach it in the closure of the step map only."""
    y0, times, weights = parameters
    method = Sequential() if method is None else method
    options = {"method": method, "gradient": gradient, "guess": guess}
    return solved(rk4(_field, weights), y0, intervals(times), **options)[0]


def _both_modes(trajectory):
    """The states, and a batch of tangents and of cotangents, at once."""

    @jax.jit
    def compute(parameters):
        direction = random_like(parameters)
        directions = jax.tree.map(lambda d, x: jnp.stack([d, x]), direction, parameters)
        push = lambda d: jax.jvp(trajectory, (parameters,), (d,))[1]
        ys, pull = jax.vjp(trajectory, parameters)
        weights = jnp.stack([jnp.cos(7 * ys), 1 + ys])
        return ys, jax.vmap(push)(directions), jax.vmap(pull)(weights)

    return compute


@pytest.fixture(scope="module")
def expected():
    """What every solve has to give."""
    return _both_modes(_unroll)(_problem())


# ---- First derivatives ----

# Both scans; without Jacobians every kind of transition, and both scans.
_GRADIENTS = {
    "parallel-sequential_scan": ParallelGradient(SequentialScan()),
    "parallel-associative_scan": ParallelGradient(AssociativeScan()),
    "sequential": SequentialGradient(),
    "matrix_free": MatrixFreeGradient(),
    "matrix_free-probes": MatrixFreeGradient(
        DiagonalJacobian(num_probes=2), AssociativeScan()
    ),
    "matrix_free-blocks": MatrixFreeGradient(
        BlockDiagonalJacobian(3), AssociativeScan()
    ),
    "matrix_free-field": MatrixFreeGradient(PiecewiseConstant(), SequentialScan()),
    "matrix_free-picard": MatrixFreeGradient(Picard(), AssociativeScan()),
    "matrix_free-jacobi": MatrixFreeGradient(Jacobi(), SequentialScan()),
}


@pytest.mark.parametrize("name", _GRADIENTS)
def test_both_modes_are_those_of_the_loop(name, expected):
    got = _both_modes(ft.partial(_solve, gradient=_GRADIENTS[name]))(_problem())
    assert relative_error(got, expected) < 1e-9


@each_gradient
def test_single_precision_has_the_same_derivatives(gradient, expected):
    parameters = _problem(jnp.float32)
    got = _both_modes(ft.partial(_solve, gradient=gradient))(parameters)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(got))
    assert relative_error(got, expected) < 1e-4


def test_derivative_is_that_of_finite_differences():
    # Of the solve itself: independent of all rules of differentiation.
    parameters, direction = _problem(), random_like(_problem())
    trajectory = ft.partial(_solve, method=newton(tolerance=1e-12))

    @jax.jit
    def compare(parameters):
        step = 1e-5
        loss = ft.partial(weighted_loss, trajectory)
        moved = lambda s: jax.tree.map(lambda x, d: x + s * d, parameters, direction)
        losses = jax.lax.map(lambda s: loss(moved(s)), jnp.array([step, -step]))
        derivative = jax.jvp(loss, (parameters,), (direction,))[1]
        return (losses[0] - losses[1]) / (2 * step), derivative

    difference, derivative = compare(parameters)
    assert abs(difference - derivative) < 1e-7 * abs(derivative)


def test_guess_changes_neither_value_nor_gradient():
    parameters, method = _problem(), newton(tolerance=1e-12)
    loss = lambda guess, x: weighted_loss(
        ft.partial(_solve, method=method, guess=guess), x
    )
    both = jax.jit(jax.vmap(jax.value_and_grad(loss, argnums=(0, 1)), (0, None)))
    constant = constant_guess(parameters[0], _STEPS)
    guesses = [constant, 0 * constant, constant.at[4].set(jnp.nan), 1e30 * constant]
    values, (by_guess, by_parameters) = both(jnp.stack(guesses), parameters)
    np.testing.assert_array_equal(by_guess, np.zeros(by_guess.shape))
    assert relative_error(values, jnp.full(values.shape, values[0])) < 1e-12
    first = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), by_parameters)
    assert relative_error(by_parameters, first) < 1e-11


# ---- What steps yield beside a state ----


class _Euler(eqx.Module):
    """A step whose weights are leaves; integers among them and in what drives it."""

    weights: Any
    count: jax.Array

    def __call__(self, x, y):
        (start, end), number = x
        scale = (number + self.count).astype(y.dtype) / 10
        slope = scale * _field((start + end) / 2, y, self.weights)
        aux = {"slope": jnp.sum(slope**2), "sign": jnp.sign(y[0]).astype(int)}
        return y + (end - start) * slope, aux


def _with_aux(weights, by_stages: bool = False):
    evaluate = _Euler(weights, jnp.array(5))
    step_map = StepMap(lambda x, y: evaluate(x, y)[0], step_with_aux=evaluate)
    return dataclasses.replace(step_map, step_by_stages=evaluate if by_stages else None)


def _numbered(times):
    return intervals(times), jnp.arange(_STEPS)


def _aux_in_both_modes(trajectory):
    """States, what else the steps yield, and derivatives of it, of a batch."""

    def loss(parameters):
        ys, aux = trajectory(*parameters)
        weights = jnp.arange(1.0, 1 + _STEPS)
        value = jnp.sum(weights * jnp.sin(aux["slope"])) + jnp.sum(ys**2)
        return value, (ys, aux)

    def compute(parameters):
        tangents = random_like(parameters)
        pushed = jax.jvp(lambda p: loss(p)[0], (parameters,), (tangents,))
        gradient, results = jax.grad(loss, has_aux=True)(parameters)
        return *results, gradient, pushed

    batch = jax.tree.map(lambda x: jnp.stack([x, 0.9 * x]), _problem())
    return jax.jit(jax.vmap(compute))(batch)


@pytest.fixture(scope="module")
def expected_aux():
    """What every solve has to give."""

    def trajectory(y0, times, weights):
        def step(y, x):
            y, aux = _with_aux(weights).evaluate(x, y)
            return y, (y, aux)

        return jax.lax.scan(step, y0, _numbered(times))[1]

    return _aux_in_both_modes(trajectory)


def _assert_same_aux(got, expected):
    np.testing.assert_array_equal(got[1]["sign"], expected[1]["sign"])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, 1e-10, 1e-10), got, expected
    )


def _aux_solve(method, gradient, by_stages, y0, times, weights):
    step_map, guess = _with_aux(weights, by_stages), constant_guess(y0, _STEPS)
    ys, _, aux = solve(step_map, y0, _numbered(times), guess, method, gradient)
    return ys, aux


@each_gradient
@pytest.mark.parametrize(
    "method",
    [newton(DiagonalJacobian(), tolerance=1e-13), Sequential()],
    ids=["newton", "sequential"],
)
def test_batch_of_states_and_what_steps_yield_has_the_derivatives_of_the_loop(
    method, gradient, expected_aux
):
    # Transitions that are not the Jacobian: the derivative is the exact one anyway.
    got = _aux_in_both_modes(ft.partial(_aux_solve, method, gradient, False))
    _assert_same_aux(got, expected_aux)


def test_derivative_by_stages_is_the_same(expected_aux):
    gradient = ParallelGradient()
    got = _aux_in_both_modes(ft.partial(_aux_solve, Sequential(), gradient, True))
    _assert_same_aux(got, expected_aux)


# ---- Second derivatives ----


def _oscillator(trajectory):
    """A loss of four numbers: initial value, stiffness and duration."""

    def loss(x):
        problem = problems["van_der_pol"]
        times = x[3] * jnp.linspace(0.0, 1.0, 7) ** 1.5
        step_map = rk4(problem.field, x[2])
        return jnp.sum(jnp.sin(trajectory(step_map, x[:2], intervals(times))))

    return loss


@each_gradient
def test_second_derivatives_in_every_order_of_modes_are_those_of_the_loop(gradient):
    # Products of the Hessian and a direction.
    method = newton(tolerance=1e-12) if gradient == ParallelGradient() else Sequential()
    loss, reference = (
        _oscillator(f)
        for f in (
            lambda *args: solved(*args, method=method, gradient=gradient)[0],
            sequential,
        )
    )

    @jax.jit
    def products(x, direction):
        tangent = lambda f: lambda x: jax.jvp(f, (x,), (direction,))[1]
        slope = lambda x: jnp.vdot(jax.grad(loss)(x), direction)
        orders = [tangent(jax.grad(loss)), jax.grad(slope), jax.grad(tangent(loss))]
        return [order(x) for order in orders], tangent(jax.grad(reference))(x)

    x, direction = jnp.array([1.2, 0.3, 0.7, 1.5]), jnp.array([0.3, -1.1, 0.8, 0.5])
    got, expected = products(x, direction)
    assert jnp.min(jnp.abs(expected)) > 0.1
    for product in got:
        assert relative_error(product, expected) < 1e-9


def test_iteration_runs_once_for_first_and_for_second_derivatives():
    # The derivatives need linear recurrences, but not another solve.
    parameters = _problem()
    loss = ft.partial(weighted_loss, ft.partial(_solve, method=newton()))
    first = jax.value_and_grad(loss)
    second = lambda x: jax.jvp(first, (x,), (random_like(x),))
    for derivatives in (first, second):
        equations = primitives(jax.make_jaxpr(derivatives)(parameters))
        assert sum(e.primitive.name == "while" for e in equations) == 1


# ---- Failure ----


@each_gradient
def test_failed_sample_has_a_gradient_that_can_be_discarded(gradient):
    # As a step size controller does: it multiplies what it rejects by zero.
    num_steps = 10
    times = jnp.linspace(0.0, 1.0, num_steps + 1)

    def loss(y0, rate, method):
        # The faster of the two solutions reaches zero, and there is no more field.
        step_map = rk4(lambda t, y, args: -args * jnp.sqrt(y), rate)
        options = {"method": method, "gradient": gradient}
        ys, statistics = solved(step_map, y0, intervals(times), **options)
        failed = statistics.result != optx.RESULTS.successful
        return jnp.where(failed, 0.0, jnp.sum(ys)), (ys, statistics.result)

    value_and_grad = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    y0s, rates = jnp.array([[1.0], [1.0]]), jnp.array([0.5, 4.0])
    method = newton() if gradient == MatrixFreeGradient() else Sequential()
    run = jax.jit(jax.vmap(lambda *args: value_and_grad(*args, method)))
    (values, (ys, result)), (by_y0, by_rate) = run(y0s, rates)
    np.testing.assert_array_equal(result_is(result, "nonfinite"), [False, True])
    assert result_is(result, "successful")[0]
    assert jnp.all(jnp.isfinite(ys))
    assert by_y0[0, 0] > 1 and by_rate[0] < -1
    assert by_y0[1, 0] == by_rate[1] == values[1] == 0


@each_gradient
def test_first_step_that_fails_is_replaced_by_one_of_the_placeholder(gradient):
    # Neither the step nor its derivative is finite at the initial value; at a step of
    # length zero both are.
    @jax.jit
    @ft.partial(jax.value_and_grad, argnums=(0, 1, 2))
    def loss(y0, times, rate):
        step_map = rk4(lambda t, y, args: args * jnp.exp(y), rate)
        placeholder, guess = (times[0], times[0]), constant_guess(y0, 3)
        ys, statistics, _ = solve(
            step_map, y0, intervals(times), guess, Sequential(), gradient, placeholder
        )
        failed = statistics.result != optx.RESULTS.successful
        return jnp.where(failed, 0.0, jnp.sum(ys))

    y0, rate = jnp.array([1.0]), jnp.array(1.0)
    _, gradients = loss(y0, 1e4 * jnp.arange(4.0), rate)
    for derivative in gradients:
        np.testing.assert_array_equal(derivative, np.zeros(derivative.shape))
    # Where the solve succeeds, the placeholder is of no account.
    _, (by_y0, by_times, by_rate) = loss(y0, 1e-3 * jnp.arange(4.0), rate)
    assert by_y0[0] > 3 and by_rate > 0
    assert by_times[0] < 0 < by_times[-1]


@each_gradient
def test_no_solved_step_of_a_grid_has_no_derivative_even_at_a_singular_state(gradient):
    # As the windows of a sample that has none, beside others. A step of length zero
    # would have all its stages at the initial state, where the root has no derivative.
    @jax.jit
    def loss(y0, rate):
        term = diffrax.ODETerm(lambda t, y, rate: rate + jnp.sqrt(y))
        inner = DEERSolver(diffrax.Heun()).inner_step(term, y0, rate)
        method, guess = Given(jnp.array(0)), constant_guess(y0, 3)
        nodes = jnp.zeros(()), jnp.zeros(3)
        solution = solve_grid(inner, nodes, y0, guess, method, gradient)
        return jnp.where(solution.statistics.num_solved == 0, 0, solution.ys[-1, 0])

    for derivative in (jax.grad, jax.jacfwd):
        slopes = derivative(loss, (0, 1))(jnp.array([0.0]), jnp.array(0.3))
        np.testing.assert_array_equal(jnp.append(*slopes), [0, 0])


def test_unfinished_solve_has_a_gradient_that_can_be_discarded():
    problem = problems["lotka_volterra"].cast(jnp.float64)
    times = jnp.linspace(problem.t0, problem.t1, 61)

    @jax.jit
    @jax.value_and_grad
    def loss(y0):
        step_map, method = rk4(problem.field, problem.args), newton(max_iterations=2)
        ys, statistics = solved(step_map, y0, intervals(times), method=method)
        failed = statistics.result != optx.RESULTS.successful
        return jnp.where(failed, 0.0, jnp.sum(ys))

    value, gradient = loss(problem.y0)
    assert value == 0
    np.testing.assert_array_equal(gradient, np.zeros(2))


@each_gradient
def test_steps_that_were_not_solved_yield_zero_and_have_finite_derivatives(gradient):
    # Doubled and squared, until there is no such number any more.
    evaluate = lambda x, y: ((1 + x) * y**2, jnp.log(y))
    step_map = StepMap(lambda x, y: evaluate(x, y)[0], step_with_aux=evaluate)
    method = newton() if gradient == ParallelGradient() else Sequential()

    @jax.jit
    def compute(y0, xs, xs_dot):
        def run(y0, xs):
            guess, placeholder = jnp.ones((12, 1)), jnp.zeros(())
            arguments = step_map, y0, xs, guess, method, gradient, placeholder
            ys, statistics, aux = solve(*arguments)
            return jnp.sum(aux), (statistics.num_solved, ys, aux)

        found = jax.value_and_grad(run, has_aux=True)(y0, xs)
        push = lambda *primals: run(*primals)[1][1:]
        return found, jax.jvp(push, (y0, xs), (jnp.ones(1), xs_dot))[1]

    # Nor does it matter what moves them.
    xs_dot = jnp.where(jnp.arange(12) < 8, 1.0, jnp.nan)
    found, (ys_dot, aux_dot) = compute(jnp.array([3.0]), jnp.ones(12), xs_dot)
    (_, (count, ys, aux)), slope = found
    assert count == 8
    assert jnp.all(jnp.isfinite(ys))
    # The stand-in of steps that were not solved has a derivative for all but the state,
    # and nothing of it goes on, where products of Jacobians would overflow.
    assert jnp.all(jnp.isfinite(ys_dot))
    np.testing.assert_array_equal(ys_dot[count:], 0)
    np.testing.assert_array_equal(aux[count:], 0)
    np.testing.assert_array_equal(aux_dot[count:], 0)
    # The logarithms double, and so do their derivatives.
    powers = 2.0 ** np.arange(count)
    logarithms = powers * np.log(3.0) + (powers - 1) * np.log(2.0)
    np.testing.assert_allclose(aux[:count, 0], logarithms, rtol=1e-12)
    np.testing.assert_allclose(slope, np.sum(powers) / 3, rtol=1e-12)


def test_cotangent_of_zero_stays_zero_where_products_overflow():
    # The derivative of the last state grows by 2**512, beyond single precision. It must
    # not get in the way of the derivative of the first, nor of none at all.
    for scan in scans.values():

        @jax.jit
        @jax.grad
        def first(y0, scan=scan):
            step_map = StepMap(lambda x, y: 4 * y * (1 - y))
            options = {"method": Sequential(), "gradient": ParallelGradient(scan)}
            return solved(step_map, y0, jnp.zeros(512), **options)[0][0, 0]

        assert abs(first(jnp.array([0.3], jnp.float32))[0] - 1.6) < 1e-6


# ---- Large states ----


def test_matrix_free_gradient_of_an_unstable_recurrence_is_exact():
    # The derivative grows by 1.5 a step; of errors made by the diagonal, a sweep makes
    # larger ones, whose products overflow where nothing holds them.
    num_steps, size = 400, 20
    turn = np.kron(np.eye(size // 2), [[0.0, 1.0], [-1.0, 0.0]])
    xs = jnp.sin(jnp.arange(num_steps * size, dtype=float)).reshape(num_steps, size)

    def loss(trajectory, matrix, y0, xs):
        step_map = StepMap(lambda x, y: jnp.matmul(matrix, y) + x)
        return jnp.sum(trajectory(step_map, y0, xs)[-1])

    gradient = MatrixFreeGradient(DiagonalJacobian())
    options = {"method": Sequential(), "gradient": gradient}
    own, reference = (
        jax.jit(jax.value_and_grad(ft.partial(loss, f), argnums=(0, 1, 2)))
        for f in (lambda *args: solved(*args, **options)[0], sequential)
    )
    for rotation in (0.1, 2.0):
        matrix = jnp.asarray(1.5 * (np.cos(rotation) * np.eye(size) + turn))
        arguments = matrix, jnp.ones(size), xs
        expected = reference(*arguments)
        assert np.all(np.isfinite(expected[0]))
        assert relative_error(own(*arguments), expected) < 1e-9


def test_only_the_parallel_gradient_holds_the_jacobians_of_all_steps():
    size = 256
    parameters = _problem(size=size)

    def largest(gradient) -> int:
        """The most elements of any array in value and gradient."""
        trajectory = ft.partial(_solve, gradient=gradient)
        grad = jax.value_and_grad(ft.partial(weighted_loss, trajectory))
        equations = primitives(jax.make_jaxpr(grad)(parameters))
        return max(out.aval.size for e in equations for out in e.outvars)

    of_all = _STEPS * size**2
    assert largest(ParallelGradient()) >= of_all
    blocks = MatrixFreeGradient(BlockDiagonalJacobian(4))
    for gradient in (MatrixFreeGradient(), blocks, SequentialGradient()):
        assert largest(gradient) < of_all


def test_sequential_gradient_keeps_nothing_from_inside_of_the_steps():
    width, num_steps, batch = 1000, 200, 16
    weights, xs = jnp.ones((width, 2)) / width, jnp.ones(num_steps)

    def kept(gradient) -> int:
        """The bytes of all that a batch of gradients holds at once."""

        def loss(weights, y0):
            step_map = StepMap(lambda x, y: jnp.tanh(weights @ y) @ weights + x)
            options = {"method": Sequential(), "gradient": gradient}
            return jnp.sum(solved(step_map, y0, xs, **options)[0])

        total = lambda w, y0s: jnp.sum(jax.vmap(loss, (None, 0))(w, y0s))
        compiled = jax.jit(jax.grad(total)).lower(weights, jnp.ones((batch, 2)))
        memory: Any = compiled.compile().memory_analysis()
        return memory.temp_size_in_bytes

    inside = batch * num_steps * width * weights.itemsize
    assert kept(SequentialGradient()) < inside / 4
    assert kept(ParallelGradient()) > inside


# ---- By batch ----


@pytest.mark.parametrize("batch", [4, 5])
def test_gradient_by_batch_is_parallel_for_a_small_batch_and_always_exact(batch):
    # On both sides of a limit of 40 entries: nine for each sample.
    parameters = _problem()
    y0s = jnp.stack([(1 + 0.1 * i) * parameters[0] for i in range(batch)])

    def grad(trajectory, y0):
        loss = ft.partial(weighted_loss, trajectory)
        return jax.value_and_grad(lambda y0: loss((y0, *parameters[1:])))(y0)

    @jax.jit
    def compute(y0s):
        def own(y0):
            gradient = default_gradient((y0, parameters), 3, _STEPS, max_entries=40)
            assert isinstance(gradient, GradientByBatch)
            trajectory = ft.partial(_solve, gradient=gradient)
            return grad(trajectory, y0), gradient.is_parallel

        results, is_parallel = jax.vmap(own, out_axes=(0, None))(y0s)
        return results, is_parallel, jax.vmap(ft.partial(grad, _unroll))(y0s)

    results, is_parallel, expected = compute(y0s)
    assert relative_error(results, expected) < 1e-11
    assert is_parallel == (batch * 9 <= 40)


def test_gradient_by_batch_runs_the_one_that_it_has_chosen():
    # A step whose derivative is the number of all that are mapped together: the samples
    # of the batch, and for the parallel gradient the steps as well.
    @jax.custom_jvp
    def step(y):
        return y

    @step.defjvp
    def _(primals, tangents):
        (y,), (y_dot,) = primals, tangents
        return y, y_dot * batch_size(y).astype(y.dtype)

    def last(y0):
        gradient = default_gradient(y0, 1, 3, max_entries=4)
        options: Any = {"method": Sequential(), "gradient": gradient}
        step_map = StepMap(lambda x, y: step(y))
        return solved(step_map, y0, jnp.zeros(3), **options)[0][-1, 0]

    for batch, is_parallel in ((4, True), (5, False)):
        slopes = jax.jit(jax.vmap(jax.grad(last)))(jnp.ones((batch, 1)))
        assert jnp.all((slopes > batch**3) == is_parallel)
        assert jnp.all((slopes == batch**3) != is_parallel)


# ---- Errors ----


def test_arguments_of_gradients_of_the_wrong_type_or_range_are_errors():
    with pytest.raises(TypeError, match="`scan` got the class `AssociativeScan`"):
        ParallelGradient(AssociativeScan)  # pyright: ignore
    with pytest.raises(TypeError, match="`scan` must be"):
        MatrixFreeGradient(scan="parallel")  # pyright: ignore
    with pytest.raises(TypeError, match="`linearization` must be"):
        MatrixFreeGradient(AssociativeScan())  # pyright: ignore
    with pytest.raises(ValueError, match="`rtol` must be finite"):
        MatrixFreeGradient(rtol=-1.0)


def test_custom_vjp_in_the_step_is_an_error_that_names_another_rule():
    @jax.custom_vjp
    def sin(y):
        return jnp.sin(y)

    # Half of the derivative, to tell whose it is.
    sin.defvjp(lambda y: (sin(y), y), lambda y, g: (g * jnp.cos(y) / 2,))
    y0, xs, step_map = jnp.ones(2), jnp.zeros(3), StepMap(lambda x, y: sin(y))

    def slope(mode, gradient):
        options = {"method": Sequential(), "gradient": gradient}
        return mode(lambda y0: jnp.sum(solved(step_map, y0, xs, **options)[0][0]))(y0)

    for gradient in (ParallelGradient(), MatrixFreeGradient(), SequentialGradient()):
        with pytest.raises(TypeError, match="Use `jax.custom_jvp`"):
            slope(jax.jacfwd, gradient)
    for gradient in (ParallelGradient(), MatrixFreeGradient()):
        with pytest.raises(TypeError, match="Use `jax.custom_jvp`"):
            slope(jax.grad, gradient)
    # One VJP for each step is what it asks for.
    by_rule = slope(jax.grad, SequentialGradient())
    assert relative_error(by_rule, jnp.cos(y0) / 2) < 1e-14
