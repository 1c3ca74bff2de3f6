"""The derivatives of a solve are those of a plain loop over the same steps."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

from diffrax_deer._forward import ParallelForward
from diffrax_deer._implicit import solve
from diffrax_deer._linearization import FullJacobian, StepMap

from .helpers import (
    constant_guess,
    each_forward,
    each_linearization,
    each_scan,
    forwards,
    intervals,
    linearizations,
    newton,
    primitives,
    problems,
    random_like,
    relative_error,
    result_is,
    rk4,
    scans,
    sequential,
    slowly,
    weighted_loss,
)

_STEPS = 9


def _problem(dtype=jnp.float64):
    """A network with three states: initial value, uneven times and weights."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(3, 8)), rng.normal(size=8), rng.normal(size=(8, 3))
    times = np.cumsum(rng.uniform(0.05, 0.2, size=_STEPS + 1))
    parameters = rng.normal(size=3), times, weights
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), parameters)


def _field(t, y, weights):
    w_in, bias, w_out = weights
    return jnp.tanh(y @ w_in + bias * jnp.cos(3 * t)) @ w_out


def _unroll(parameters):
    """The reference, differentiated by JAX."""
    y0, times, weights = parameters
    return sequential(rk4(_field, weights), y0, intervals(times))


def _solve(parameters, *, linearization=None, scan=None, forward=None, guess=None):
    """The same by `solve`; the weights reach it in the closure of the step map only."""
    y0, times, weights = parameters
    guess = constant_guess(y0, _STEPS) if guess is None else guess
    forward = ParallelForward() if forward is None else forward
    tolerance = 1e-12 if y0.dtype == jnp.float64 else 1e-6
    iteration = newton(linearization, scan, tolerance=tolerance)
    step_map = rk4(_field, weights)
    return solve(step_map, y0, intervals(times), guess, forward, iteration)[0]


def _both_modes(trajectory):
    """Value, gradient and the derivative along a direction."""

    @jax.jit
    def compute(parameters):
        loss = ft.partial(weighted_loss, trajectory)
        pushed = jax.jvp(trajectory, (parameters,), (random_like(parameters),))
        return jax.value_and_grad(loss)(parameters), pushed

    return compute


@pytest.fixture(scope="module")
def expected():
    """What every solve has to give."""
    return _both_modes(_unroll)(_problem())


# ---- First derivatives ----


@each_forward
@each_scan
@each_linearization
def test_both_modes_are_those_of_the_loop(linearization, scan, forward, expected):
    choice = {"linearization": linearization, "scan": scan, "forward": forward}
    got = _both_modes(ft.partial(_solve, **choice))(_problem())
    assert relative_error(got, expected) < 1e-9


@each_forward
def test_single_precision_has_the_same_derivatives(forward, expected):
    parameters = _problem(jnp.float32)
    got = _both_modes(ft.partial(_solve, forward=forward))(parameters)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(got))
    assert relative_error(got, expected) < 1e-4


def test_the_gradient_does_not_depend_on_the_linearization(expected):
    # To rounding: the solve is converged, and then the exact Jacobian takes over.
    del expected
    parameters = _problem()

    @jax.jit
    def gradients(parameters):
        grad = lambda choice: jax.grad(ft.partial(weighted_loss, choice))(parameters)
        choices = [ft.partial(_solve, linearization=x) for x in linearizations.values()]
        return [grad(choice) for choice in choices]

    first, *others = gradients(parameters)
    for other in others:
        assert relative_error(other, first) < 1e-9


def test_whole_jacobians_agree():
    parameters = _problem()
    y0, times, weights = parameters

    @jax.jit
    def jacobians(y0):
        own = lambda y0: _solve((y0, times, weights))
        reference = lambda y0: _unroll((y0, times, weights))
        return jax.jacfwd(own)(y0), jax.jacrev(own)(y0), jax.jacfwd(reference)(y0)

    forward, reverse, reference = jacobians(y0)
    assert relative_error(forward, reference) < 1e-11
    assert relative_error(reverse, reference) < 1e-11


def test_finite_differences_agree():
    # Of the solve itself: independent of all rules of differentiation.
    parameters, direction = _problem(), random_like(_problem())

    @jax.jit
    def compare(parameters):
        step = 1e-5
        loss = ft.partial(weighted_loss, _solve)
        moved = lambda s: jax.tree.map(lambda x, d: x + s * d, parameters, direction)
        difference = (loss(moved(step)) - loss(moved(-step))) / (2 * step)
        return difference, jax.jvp(loss, (parameters,), (direction,))[1]

    difference, derivative = compare(parameters)
    assert abs(difference - derivative) < 1e-7 * abs(derivative)


def test_the_guess_changes_neither_value_nor_gradient():
    parameters = _problem()
    loss = lambda guess, x: weighted_loss(ft.partial(_solve, guess=guess), x)
    both = jax.jit(jax.vmap(jax.value_and_grad(loss, argnums=(0, 1)), (0, None)))
    constant = constant_guess(parameters[0], _STEPS)
    guesses = [constant, 0 * constant, constant.at[4].set(jnp.nan), 1e30 * constant]
    values, (by_guess, by_parameters) = both(jnp.stack(guesses), parameters)
    np.testing.assert_array_equal(by_guess, np.zeros(by_guess.shape))
    assert relative_error(values, jnp.full(values.shape, values[0])) < 1e-12
    first = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), by_parameters)
    assert relative_error(by_parameters, first) < 1e-11


def test_batches_of_gradients_agree():
    parameters = _problem()
    y0s = jnp.stack([parameters[0], -parameters[0], 0.3 * parameters[0]])

    @jax.jit
    def compare(y0s):
        def grad(trajectory, y0):
            grad = jax.grad(ft.partial(weighted_loss, trajectory))
            return grad((y0, *parameters[1:]))

        return [jax.vmap(ft.partial(grad, f))(y0s) for f in (_solve, _unroll)]

    got, reference = compare(y0s)
    assert relative_error(got, reference) < 1e-10


def test_only_what_is_differentiable_is_differentiated():
    # Integers among the inputs and in the closure, as in a recurrent network.
    weights = jnp.array([[0.2, 0.7], [-0.5, 0.1]])
    xs = {"input": jnp.sin(jnp.arange(12.0)).reshape(6, 2), "on": jnp.arange(6) % 2}
    scale = jnp.array(2)

    def loss(trajectory, weights, inputs):
        def step(x, y):
            new = jnp.tanh(weights @ y + scale.astype(y.dtype) * x["input"])
            return jnp.where(x["on"] == 1, new, y)

        y0 = jnp.array([0.1, 0.2])
        return jnp.sum(trajectory(StepMap(step), y0, {**xs, "input": inputs}) ** 2)

    def own(step_map, y0, xs):
        guess = constant_guess(y0, 6)
        return solve(step_map, y0, xs, guess, ParallelForward(), newton())[0]

    got, reference = (
        jax.jit(jax.grad(ft.partial(loss, f), argnums=(0, 1)))(weights, xs["input"])
        for f in (own, sequential)
    )
    assert relative_error(got, reference) < 1e-12


# ---- Second derivatives ----


def _oscillator(trajectory):
    """A loss of four numbers: initial value, stiffness and duration."""

    def loss(x):
        problem = problems["van_der_pol"]
        times = x[3] * jnp.linspace(0.0, 1.0, 7) ** 1.5
        step_map = rk4(problem.field, x[2])
        return jnp.sum(jnp.sin(trajectory(step_map, x[:2], intervals(times))))

    return loss


@pytest.mark.parametrize(
    ("scan", "forward"),
    [
        ("associative", "parallel"),
        slowly("sequential", "parallel"),
        slowly("platform", "sequential"),
    ],
)
def test_hessians_in_all_modes_are_those_of_the_loop(scan, forward):
    # Not every combination, as above: seconds each.
    def trajectory(step_map, y0, xs):
        iteration = newton(FullJacobian(), scans[scan], tolerance=1e-12)
        guess = constant_guess(y0, 6)
        return solve(step_map, y0, xs, guess, forwards[forward], iteration)[0]

    @jax.jit
    def hessians(x):
        loss, reference = _oscillator(trajectory), _oscillator(sequential)
        over_reverse = [outer(jax.grad(loss))(x) for outer in (jax.jacfwd, jax.jacrev)]
        over_forward = jax.jacrev(jax.jacfwd(loss))(x)
        return [*over_reverse, over_forward], jax.hessian(reference)(x)

    got, reference = hessians(jnp.array([1.2, 0.3, 0.7, 1.5]))
    assert jnp.linalg.norm(reference - jnp.diag(jnp.diag(reference))) > 0.1
    for hessian in got:
        assert relative_error(hessian, reference) < 1e-9


# ---- Cost ----


@pytest.mark.parametrize("second", [False, True])
def test_the_newton_loop_runs_once(second):
    # The derivatives need linear recurrences, but not another solve.
    def derivatives(parameters):
        loss = ft.partial(weighted_loss, _solve)
        if second:
            tangents = random_like(parameters)
            return jax.jvp(jax.value_and_grad(loss), (parameters,), (tangents,))
        return jax.value_and_grad(loss)(parameters)

    jaxpr = jax.make_jaxpr(derivatives)(_problem())
    loops = [e for e in primitives(jaxpr) if e.primitive.name == "while"]
    assert len(loops) == 1


# ---- Failure ----


@each_forward
def test_a_failed_solve_has_a_gradient_that_can_be_discarded(forward):
    # As a step size controller does: it multiplies what it rejects by zero.
    num_steps = 10
    times = jnp.linspace(0.0, 1.0, num_steps + 1)

    def loss(y0, rate):
        # The faster of the two solutions reaches zero, and there is no more field.
        step_map = rk4(lambda t, y, args: -args * jnp.sqrt(y), rate)
        guess = constant_guess(y0, num_steps)
        iteration = newton()
        ys, statistics, _ = solve(
            step_map, y0, intervals(times), guess, forward, iteration
        )
        failed = statistics.result != optx.RESULTS.successful
        return jnp.where(failed, 0.0, jnp.sum(ys)), (ys, statistics.result)

    value_and_grad = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    y0s, rates = jnp.array([[1.0], [1.0]]), jnp.array([0.5, 4.0])
    (values, (ys, result)), gradients = jax.jit(jax.vmap(value_and_grad))(y0s, rates)
    np.testing.assert_array_equal(result_is(result, "nonfinite"), [False, True])
    assert result_is(result, "successful")[0]
    assert jnp.all(jnp.isfinite(ys))
    by_y0, by_rate = gradients
    assert by_y0[0, 0] > 1 and by_rate[0] < -1
    assert by_y0[1, 0] == by_rate[1] == values[1] == 0


@each_forward
def test_a_first_step_that_fails_is_replaced_by_an_idle_one(forward):
    # Neither the step nor its derivative is finite at the initial value; at a step of
    # length zero both are.
    step_map = rk4(lambda t, y, args: jnp.exp(y), None)

    @jax.jit
    @ft.partial(jax.value_and_grad, argnums=(0, 1))
    def loss(y0, times):
        xs, idle = intervals(times), (times[0], times[0])
        guess = constant_guess(y0, 3)
        ys, statistics, _ = solve(step_map, y0, xs, guess, forward, newton(), idle)
        failed = statistics.result != optx.RESULTS.successful
        return jnp.where(failed, 0.0, jnp.sum(ys))

    _, gradients = loss(jnp.array([1.0]), 1e4 * jnp.arange(4.0))
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, np.zeros(gradient.shape))
    # Where the solve succeeds, the idle step is of no account.
    _, (by_y0, by_times) = loss(jnp.array([1.0]), 1e-3 * jnp.arange(4.0))
    assert by_y0[0] > 3
    assert by_times[0] < 0 < by_times[-1]


def test_an_unfinished_solve_has_a_gradient_that_can_be_discarded():
    problem = problems["lotka_volterra"].cast(jnp.float64)
    times = jnp.linspace(problem.t0, problem.t1, 61)

    @jax.jit
    @jax.value_and_grad
    def loss(y0):
        step_map, guess = rk4(problem.field, problem.args), constant_guess(y0, 60)
        iteration = newton(max_iterations=2)
        ys, statistics, _ = solve(
            step_map, y0, intervals(times), guess, ParallelForward(), iteration
        )
        failed = statistics.result != optx.RESULTS.successful
        return jnp.where(failed, 0.0, jnp.sum(ys))

    value, gradient = loss(problem.y0)
    assert value == 0
    np.testing.assert_array_equal(gradient, np.zeros(2))


@each_scan
def test_a_cotangent_of_zero_stays_zero(scan):
    # The derivative of the last state grows by 2**512, beyond single precision. It must
    # not get in the way of the derivative of the first, nor of none at all.
    num_steps = 512
    xs = jnp.zeros(num_steps)

    @jax.jit
    @jax.grad
    def gradient(y0):
        step_map, guess = StepMap(lambda x, y: 4 * y * (1 - y)), jnp.zeros((512, 1))
        forward = forwards["sequential"]
        iteration = newton(FullJacobian(), scan)
        ys, _, _ = solve(step_map, y0, xs, guess.astype(y0.dtype), forward, iteration)
        return ys[0, 0]

    value = gradient(jnp.array([0.3], jnp.float32))
    assert abs(value[0] - 1.6) < 1e-6


def test_a_state_without_components_is_solved():
    empty = jnp.zeros((4, 0))
    step_map = StepMap(lambda x, y: y)
    ys, statistics, _ = solve(
        step_map, empty[0], empty, empty, ParallelForward(), newton()
    )
    assert ys.shape == (4, 0)
    assert result_is(statistics.result, "successful")


def test_the_step_map_may_be_a_module():
    # Its weights are then leaves of the step map itself.
    class Cell(eqx.Module):
        weights: jax.Array

        def __call__(self, x, y):
            return jnp.tanh(self.weights @ y + x)

    xs, y0 = jnp.sin(jnp.arange(10.0)).reshape(5, 2), jnp.array([0.1, 0.2])

    def loss(trajectory, cell):
        return jnp.sum(trajectory(StepMap(cell), y0, xs) ** 2)

    def own(step_map, y0, xs):
        guess = constant_guess(y0, 5)
        return solve(step_map, y0, xs, guess, ParallelForward(), newton())[0]

    cell = Cell(jnp.array([[0.2, 0.7], [-0.5, 0.1]]))
    got, reference = (
        eqx.filter_jit(eqx.filter_grad(ft.partial(loss, f)))(cell)
        for f in (own, sequential)
    )
    assert relative_error(got.weights, reference.weights) < 1e-12


# What steps yield beside a state


def _with_more(weights):
    def full(x, y):
        start, end = x
        middle = _field((start + end) / 2, y, weights)
        more = {"slope": jnp.sum(middle**2), "sign": jnp.sign(y[0]).astype(int)}
        return y + (end - start) * middle, more

    return StepMap(lambda x, y: full(x, y)[0], full=full)


@each_forward
def test_what_the_steps_yield_and_its_derivatives(forward):
    def own(y0, times, weights):
        guess, iteration = constant_guess(y0, _STEPS), newton(tolerance=1e-13)
        xs = intervals(times)
        ys, _, more = solve(_with_more(weights), y0, xs, guess, forward, iteration)
        return ys, more

    def in_sequence(y0, times, weights):
        def step(y, x):
            y, more = _with_more(weights).evaluate(x, y)
            return y, (y, more)

        return jax.lax.scan(step, y0, intervals(times))[1]

    def compute(trajectory):
        def loss(parameters):
            ys, more = trajectory(*parameters)
            weights = jnp.arange(1.0, 1 + _STEPS)
            return jnp.sum(weights * jnp.sin(more["slope"])) + jnp.sum(ys**2)

        def all_of(parameters):
            ys, more = trajectory(*parameters)
            tangents = random_like(parameters)
            pushed = jax.jvp(loss, (parameters,), (tangents,))[1]
            return ys, more, jax.grad(loss)(parameters), pushed

        batch = jax.tree.map(lambda x: jnp.stack([x, 0.9 * x]), _problem())
        return jax.jit(jax.vmap(all_of))(batch)

    got, expected = compute(own), compute(in_sequence)
    np.testing.assert_array_equal(got[1].pop("sign"), expected[1].pop("sign"))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, 1e-10, 1e-10), got, expected
    )


@each_forward
def test_steps_that_were_not_solved_yield_zero(forward):
    # Doubled and squared, until there is no such number any more.
    full = lambda x, y: ((1 + x) * y**2, jnp.log(y))
    step_map = StepMap(lambda x, y: full(x, y)[0], full=full)
    xs, idle = jnp.ones(12), jnp.zeros(())

    @jax.jit
    def compute(y0):
        _, statistics, more = solve(
            step_map, y0, xs, jnp.ones((12, 1)), forward, newton(), idle
        )
        return jnp.sum(more), (statistics.num_solved, more)

    (_, (count, more)), gradient = jax.value_and_grad(compute, has_aux=True)(
        jnp.array([3.0])
    )
    assert 5 < count < 12
    np.testing.assert_array_equal(more[count:], 0)
    # The logarithms double, and so do their derivatives.
    powers = 2.0 ** np.arange(count)
    logarithms = powers * np.log(3.0) + (powers - 1) * np.log(2.0)
    np.testing.assert_allclose(more[:count, 0], logarithms, rtol=1e-12)
    np.testing.assert_allclose(gradient, np.sum(powers) / 3, rtol=1e-12)
