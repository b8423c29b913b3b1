"""The small problems, against their optimality conditions."""

import hypothesis
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
import jax
from jax import numpy as jnp
import numpy as np
import pytest

from optax_mtl import _solvers

KINDS = ("gaussian", "conflicting", "badly scaled", "parallel", "low rank", "duplicate", "zero row", "stationary")
every_kind = pytest.mark.parametrize("kind", KINDS)
up_to_64 = pytest.mark.parametrize("num_tasks", [1, 2, 3, 8, 16, 64])


def gradients(kind, num_tasks, seed):
    rng = np.random.default_rng(seed)
    size = (3, 20, 200)[seed % 3]
    matrix = rng.standard_normal((num_tasks, size))
    if kind == "conflicting":
        matrix = matrix - matrix.mean(0) + 0.01 * rng.standard_normal(size)
    elif kind == "badly scaled":
        matrix *= np.logspace(-4, 4, num_tasks)[rng.permutation(num_tasks), None]
    elif kind == "parallel":
        matrix = rng.standard_normal(size) + 1e-3 * matrix
    elif kind == "low rank":
        rank = max(1, num_tasks // 2)
        matrix = rng.standard_normal((num_tasks, rank)) @ rng.standard_normal((rank, size))
    elif kind == "duplicate":
        matrix[-1] = matrix[0]
    elif kind == "zero row":
        matrix[num_tasks // 2] = 0
    elif kind == "stationary":
        matrix[-1] = -matrix[:-1].sum(0) / 2
    return matrix.astype(np.float32)


def unit(matrix):
    """The gradients in float64, of unit length (or zero), their lengths, and the cosines between them."""
    matrix = matrix.astype(np.float64)
    norms = np.linalg.norm(matrix, axis=1)
    unit = matrix / np.where(norms > 0, norms, 1)[:, None]
    return unit, norms, unit @ unit.T


def gramian(matrix):
    return jnp.asarray(matrix @ matrix.T)


min_norm_point = jax.jit(lambda gramian, allowed: _solvers.min_norm_point(gramian, allowed)[0])
worst_case_in_ball = jax.jit(lambda *arguments: _solvers.worst_case_in_ball(*arguments)[0])
solvers = {
    "min-norm point": jax.jit(_solvers.min_norm_point),
    "dual cone": jax.jit(_solvers.project_on_dual_cone),
    "log barrier": jax.jit(_solvers.log_barrier_point),
    "ball": jax.jit(_solvers.worst_case_in_ball),
}

# -- Optimality conditions, in float64 from the gradients; every solver's own residual says the same -----------------
# What is compared are inner products with unit gradients, relative to the lengths of what the direction is made of:
# nothing hides behind a task with a large gradient.

TOLERANCE = 1e-5


@up_to_64
@every_kind
def test_min_norm_point_meets_its_optimality_conditions(kind, num_tasks):
    for seed in range(9):
        matrix = gradients(kind, num_tasks, seed)
        weights, residual = solvers["min-norm point"](gramian(matrix), jnp.ones(num_tasks, bool))
        weights = np.asarray(weights, np.float64)
        _, norms, cosines = unit(matrix)
        lengths = weights * norms
        square = lengths @ cosines @ lengths
        assert np.all(weights >= 0)
        np.testing.assert_allclose(weights.sum(), 1, rtol=1e-5)
        short = square - norms * (cosines @ lengths)  # |d|^2 - <g_i, d>, not positive
        assert np.all(short <= TOLERANCE * norms * lengths.sum())
        assert residual <= TOLERANCE


@up_to_64
@every_kind
def test_projection_on_the_dual_cone_meets_its_optimality_conditions(kind, num_tasks):
    for seed in range(9):
        matrix = gradients(kind, num_tasks, seed)
        _, norms, cosines = unit(matrix)
        mean, first = np.full(num_tasks, 1 / num_tasks), np.eye(num_tasks)[seed % num_tasks]
        for point in (mean, first):
            weights, residual = solvers["dual cone"](
                gramian(matrix), jnp.asarray(point, jnp.float32), jnp.ones(num_tasks, bool)
            )
            moved = np.asarray(weights, np.float64) - np.float32(point)
            lengths = norms * np.asarray(weights, np.float64)
            products = cosines @ lengths
            assert np.all(moved >= 0)
            assert np.all(products >= -TOLERANCE * lengths.sum())
            assert np.all((moved == 0) | (products <= TOLERANCE * lengths.sum()))
            assert residual <= TOLERANCE


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
@up_to_64
@every_kind
def test_log_barrier_point_solves_its_equation(kind, num_tasks, exponent):
    solved = 0
    for seed in range(9):
        matrix = gradients(kind, num_tasks, seed)
        _, norms, cosines = unit(matrix)
        preference = 1 + np.arange(num_tasks) / num_tasks
        weights, residual = solvers["log barrier"](
            gramian(matrix), jnp.asarray(preference, jnp.float32), exponent, jnp.ones(num_tasks, bool)
        )
        assert residual <= TOLERANCE
        weights = np.asarray(weights, np.float64)
        if not weights.any():  # no solution: some combination of the unit gradients vanishes, but for rounding
            shares = np.asarray(min_norm_point(jnp.asarray(cosines, jnp.float32), jnp.asarray(norms > 0)), np.float64)
            assert np.sqrt(max(shares @ cosines @ shares, 0)) <= 3e-3
            continue
        solved += 1
        counts = norms > 0
        assert np.all((weights > 0) == counts)
        lengths = (weights * norms)[counts]
        products = cosines[np.ix_(counts, counts)] @ lengths
        gains = preference[counts] * weights[counts] ** -exponent / norms[counts]
        assert np.all(np.abs(products - gains) <= TOLERANCE * lengths.sum())
    assert solved > 0 or kind in ("stationary", "low rank") or num_tasks == 64 or (kind, num_tasks) == ("zero row", 1)


@pytest.mark.parametrize("radius", [0.4, 1.0])
@up_to_64
@every_kind
def test_worst_case_in_ball_meets_its_optimality_conditions(kind, num_tasks, radius):
    for seed in range(9):
        matrix = gradients(kind, num_tasks, seed)
        _, norms, cosines = unit(matrix)
        mean = np.full(num_tasks, 1 / num_tasks)
        step, residual = solvers["ball"](
            gramian(matrix), jnp.asarray(mean, jnp.float32), jnp.float32(radius), jnp.ones(num_tasks, bool)
        )
        assert residual <= TOLERANCE
        lengths = norms * np.asarray(step, np.float64)
        size = lengths.sum() + norms.mean()
        assert np.all(lengths >= 0)
        assert np.sqrt(lengths @ cosines @ lengths) <= radius * np.linalg.norm(matrix.mean(0)) + TOLERANCE * size
        products = cosines @ (lengths + norms * mean)  # M (mean + step), each divided by the norm
        if lengths.any():
            inverse = np.where(norms > 0, 1 / np.where(norms > 0, norms, 1), 0)
            level = (lengths @ products) / (lengths @ inverse)
            over = products - level * inverse
            assert np.all((over >= -TOLERANCE * size) | (norms == 0))
            assert np.all((over <= TOLERANCE * size) | (lengths == 0))


@pytest.mark.parametrize("exponent", [0.1, 0.2, 5.0, 10.0])
@pytest.mark.parametrize("orders", [0, 2, 4])
def test_log_barrier_point_for_extreme_fairness(orders, exponent):
    """Weights may be smaller than float32 holds: then they are zero, and the task gains all it would gain anyway."""
    for seed in range(9):
        rng = np.random.default_rng(seed)
        for matrix in (rng.standard_normal((3, 20)), np.abs(rng.standard_normal((3, 5)))):
            matrix = (matrix * np.logspace(-orders / 2, orders / 2, 3)[rng.permutation(3), None]).astype(np.float32)
            _, norms, cosines = unit(matrix)
            weights, residual = solvers["log barrier"](gramian(matrix), jnp.ones(3), exponent, jnp.ones(3, bool))
            assert residual <= TOLERANCE
            weights = np.asarray(weights, np.float64)
            positive = weights > 0
            assert positive.any()
            lengths = weights * norms
            products = cosines @ lengths
            gains = np.where(positive, np.where(positive, weights, 1) ** -exponent / norms, 0)
            over = products - gains
            slack = 1e-4 * lengths.sum()  # w ** -10 has ten times the rounding of w
            assert np.all(over >= -slack)
            assert np.all((over <= slack) | ~positive)


adversarial = hnp.arrays(
    np.float32,
    (4, 5),
    elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False) | st.sampled_from([0.0, 1.0, -1.0, 1e-6, -1e-6]),
)


@hypothesis.given(matrix=adversarial)
@hypothesis.settings(max_examples=200)
def test_whatever_the_gradients_every_solver_is_exact(matrix):
    matrix = np.where(np.abs(matrix) < 1e-12, np.float32(0), matrix)  # whose square float32 holds
    everyone, ones = jnp.ones(4, bool), jnp.ones(4)
    for name, arguments in {
        "min-norm point": (everyone,),
        "dual cone": (ones / 4, everyone),
        "log barrier": (ones, 1.0, everyone),
        "ball": (ones / 4, jnp.float32(0.5), everyone),
    }.items():
        solution, residual = solvers[name](gramian(matrix), *arguments)
        assert np.isfinite(solution).all(), name
        assert residual <= TOLERANCE, name
        if name == "log barrier" and matrix.any() and not solution.any():  # it says there is no solution
            _, norms, cosines = unit(matrix)
            shares = np.asarray(min_norm_point(jnp.asarray(cosines, jnp.float32), jnp.asarray(norms > 0)), np.float64)
            assert np.sqrt(max(shares @ cosines @ shares, 0)) <= 3e-3


def test_nonnegative_quadratic_tells_when_there_is_no_minimum():
    solve = jax.jit(_solvers.nonnegative_quadratic)
    matrix = jnp.array([[4.0, -2.0], [-2.0, 1.0]])  # x = (1, 2) costs nothing
    _, residual = solve(matrix, jnp.array([1.0, 1.0]), jnp.ones(2, bool))
    assert residual > 1e-3
    x, residual = solve(jnp.array([[4.0, -1.0], [-1.0, 1.0]]), jnp.array([-1.0, 1.0]), jnp.ones(2, bool))
    np.testing.assert_allclose(x, [0, 1], atol=1e-6)
    assert residual < 1e-6


@pytest.mark.parametrize(("num_tasks", "rank", "size"), [(8, 8, 3), (8, 4, 50), (16, 16, 8), (16, 8, 50), (32, 16, 50)])
def test_more_tasks_than_dimensions(num_tasks, rank, size):
    """Where the support is not unique an active set is easily led in circles: many cases, all solved."""
    rng = np.random.default_rng(0)
    factors = rng.standard_normal((200, num_tasks, rank)), rng.standard_normal((200, rank, size))
    gradients = np.matmul(*factors).astype(np.float32)
    gramians = jnp.asarray(gradients @ gradients.transpose(0, 2, 1))
    exact = gradients.astype(np.float64) @ gradients.transpose(0, 2, 1).astype(np.float64)
    largest = np.einsum("btt->bt", exact).max(1)
    everyone = jnp.ones(num_tasks, bool)

    weights = np.asarray(jax.vmap(min_norm_point, in_axes=(0, None))(gramians, everyone), np.float64)
    products = np.einsum("bts,bs->bt", exact, weights)
    gaps = np.einsum("bt,bt->b", weights, products) - products.min(1)
    assert np.all(gaps <= 1e-5 * largest)

    mean = np.full(num_tasks, 1 / num_tasks)
    for radius in (0.4, 1.0):
        ball = jax.vmap(worst_case_in_ball, in_axes=(0, None, None, None))
        steps = np.asarray(ball(gramians, jnp.asarray(mean, jnp.float32), radius, everyone), np.float64)
        longest = radius * np.sqrt(np.einsum("t,bts,s->b", mean, exact, mean))
        assert np.all(np.sqrt(np.einsum("bt,bts,bs->b", steps, exact, steps)) <= 1.01 * longest)
        worst = np.einsum("bts,bs->bt", exact, mean + steps).min(1)
        bounds = [  # no direction does better than either
            np.einsum("bt,bts,s->b", convex, exact, mean)
            + longest * np.sqrt(np.einsum("bt,bts,bs->b", convex, exact, convex))
            for convex in (weights, steps / np.maximum(steps.sum(1, keepdims=True), 1e-30))
        ]
        # Near a Pareto-stationary point the bound itself is only known to the root of float32's precision.
        assert np.all(np.minimum(*bounds) - worst <= 1e-3 * largest)


@hypothesis.given(angle=st.floats(0.01, 3.13), ratio=st.floats(1e-3, 1e3))
def test_min_norm_point_of_two_has_a_closed_form(angle, ratio):
    first, second = np.array([1.0, 0.0]), ratio * np.array([np.cos(angle), np.sin(angle)])
    matrix = np.stack([first, second])
    gramian = matrix @ matrix.T
    share = (gramian[1, 1] - gramian[0, 1]) / (gramian[0, 0] + gramian[1, 1] - 2 * gramian[0, 1])
    expected = np.clip(share, 0, 1)
    weights = min_norm_point(jnp.asarray(gramian, jnp.float32), jnp.ones(2, bool))
    np.testing.assert_allclose(weights, [expected, 1 - expected], atol=2e-3, rtol=1e-3)


def test_min_norm_point_does_not_depend_on_scale():
    matrix = gradients("gaussian", 8, seed=2)
    reference = min_norm_point(jnp.asarray(matrix @ matrix.T), jnp.ones(8, bool))
    for power in (-15, 15):
        scaled = (matrix * 10.0**power).astype(np.float32)
        weights = min_norm_point(jnp.asarray(scaled @ scaled.T), jnp.ones(8, bool))
        np.testing.assert_allclose(weights, reference, rtol=1e-4, atol=1e-6)


def test_a_zero_gradient_is_the_min_norm_point():
    matrix = gradients("zero row", 3, 1)
    weights = min_norm_point(jnp.asarray(matrix @ matrix.T), jnp.ones(3, bool))
    np.testing.assert_array_equal(weights, [0, 1, 0])


@pytest.mark.parametrize("radius", [0.1, 0.4, 1.0])
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("low rank", "zero row", "stationary")])
def test_worst_case_in_ball_closes_the_duality_gap(kind, num_tasks, radius):
    for seed in range(9):
        matrix = gradients(kind, num_tasks, seed)
        mean = np.full(num_tasks, 1 / num_tasks)
        gramian = jnp.asarray(matrix @ matrix.T)
        step = worst_case_in_ball(gramian, jnp.asarray(mean, jnp.float32), radius, jnp.ones(num_tasks, bool))
        step = np.asarray(step, np.float64)
        exact = matrix.astype(np.float64) @ matrix.T.astype(np.float64)
        ball = radius * np.sqrt(mean @ exact @ mean)
        length = np.sqrt(step @ exact @ step)
        assert length <= ball * (1 + 1e-3)
        worst = (exact @ (mean + step)).min()
        convex = step / step.sum()
        bound = convex @ exact @ mean + ball * np.sqrt(convex @ exact @ convex)  # no direction does better
        assert bound - worst <= 1e-5 * np.diag(exact).max()


def test_an_active_set_does_not_go_in_circles():
    """Counted: where the support is not unique, rounding used to let one variable in and out until the bound, 180."""
    rng = np.random.default_rng(0)
    matrices = np.matmul(rng.standard_normal((256, 16, 8)), rng.standard_normal((256, 8, 200))).astype(np.float32)

    def rounds(gramian, task):
        unit, _ = _solvers.cosines(gramian)
        start = _solvers._Iterate.start(unit[task] < 0, unit.dtype)._replace(x=jnp.zeros(16))
        return _solvers._active_set(unit, -unit[task], jnp.ones(16, bool), start).rounds

    gramians = jnp.asarray(matrices @ matrices.transpose(0, 2, 1))
    counted = jax.jit(jax.vmap(jax.vmap(rounds, (None, 0)), (0, None)))(gramians, jnp.arange(16))
    assert counted.max() <= 40


def test_solvers_under_vmap_tell_the_same():
    gramians = jnp.stack([jnp.asarray(m @ m.T) for m in (gradients("gaussian", 5, 2 + 3 * k) for k in range(4))])
    everyone = jnp.ones(5, bool)
    batched = jax.vmap(min_norm_point, in_axes=(0, None))(gramians, everyone)
    for k in range(4):
        np.testing.assert_allclose(batched[k], min_norm_point(gramians[k], everyone), rtol=1e-5, atol=1e-6)


@hypothesis.given(seed=st.integers(0, 10**6), scale=st.sampled_from([1e-6, 1, 1e6, 1e38]))
def test_the_projection_onto_the_simplex_is_the_nearest_point(seed, scale):
    """Its optimality conditions: one threshold for what is kept, no less than what is not."""
    rng = np.random.default_rng(seed)
    point = (scale * rng.standard_normal(5)).astype(np.float32)
    allowed = rng.random(5) < 0.7
    weights = np.asarray(_solvers.project_onto_simplex(jnp.asarray(point), jnp.asarray(allowed)))
    np.testing.assert_allclose(weights.sum(), float(allowed.any()), rtol=1e-5)
    assert np.all(weights >= 0)
    assert np.all(weights[~allowed] == 0)
    if allowed.any():
        threshold = (point.astype(float) - weights)[weights > 0]
        np.testing.assert_allclose(threshold, threshold[0], rtol=1e-5, atol=1e-5)
        assert np.all(point[allowed & (weights == 0)] <= threshold[0] + 1e-5 * np.abs(threshold[0]))


def test_the_projection_onto_the_simplex_takes_infinities_for_large():
    everyone = jnp.ones(3, bool)
    for point in ([jnp.inf, 0.0, -jnp.inf], [0.0, -jnp.inf, -jnp.inf]):
        np.testing.assert_array_equal(_solvers.project_onto_simplex(jnp.array(point), everyone), [1, 0, 0])
    np.testing.assert_allclose(_solvers.project_onto_simplex(jnp.full(3, -jnp.inf), everyone), 1 / 3, rtol=1e-6)
