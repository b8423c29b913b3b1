"""The small problems, against their optimality conditions."""

import hypothesis
from hypothesis import strategies as st
import jax
from jax import numpy as jnp
import numpy as np
import pytest

from optax_mtl import _solvers

KINDS = ("gaussian", "conflicting", "badly scaled", "parallel", "low rank", "duplicate", "zero row")


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
    return matrix.astype(np.float32)


min_norm_point = jax.jit(_solvers.min_norm_point)
worst_case_in_ball = jax.jit(_solvers.worst_case_in_ball)


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_min_norm_point_meets_its_optimality_conditions(kind, num_tasks):
    for seed in range(9):
        matrix = gradients(kind, num_tasks, seed)
        gramian = jnp.asarray(matrix @ matrix.T)
        weights = np.asarray(min_norm_point(gramian, jnp.ones(num_tasks, bool)), np.float64)
        exact = matrix.astype(np.float64) @ matrix.T.astype(np.float64)
        gap = weights @ exact @ weights - (exact @ weights).min()  # of Frank and Wolfe: 0 at the optimum
        assert np.all(weights >= 0)
        np.testing.assert_allclose(weights.sum(), 1, rtol=1e-5)
        assert gap <= 1e-5 * np.diag(exact).max()


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
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("low rank", "zero row")])
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
