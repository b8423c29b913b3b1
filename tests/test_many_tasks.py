"""Sixty-four tasks and more: one method of each mechanism, on the gradients themselves, against what defines it.

(`test_solvers.py` has the solvers by themselves, on hard Gramians of up to 64.)
"""

import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest
from scipy import optimize

import optax_mtl as mtl

SIZE = 300
many = pytest.mark.parametrize("num_tasks", [64, 128])


def gradients(num_tasks):
    """Of which half of the pairs conflict, at lengths over two orders of magnitude."""
    rng = np.random.default_rng(num_tasks)
    matrix = rng.standard_normal((num_tasks, SIZE)) + 0.1 * rng.standard_normal(SIZE)
    return matrix * rng.permutation(np.logspace(-1, 1, num_tasks))[:, None]


def step(tx, matrix):
    """The update, and the weights, in float64; of a tree with two leaves."""
    task_grads = {"a": jnp.asarray(matrix[:, :100], jnp.float32), "b": jnp.asarray(matrix[:, 100:], jnp.float32)}
    state = tx.init(jax.tree.map(lambda leaf: leaf[0], task_grads))
    updates, state = jax.jit(tx.update)(task_grads, state)
    return np.concatenate([updates["a"], updates["b"]]).astype(np.float64), np.asarray(state.task_weights, np.float64)


@many
def test_mgda_is_the_shortest_convex_combination(num_tasks):
    matrix = gradients(num_tasks)
    update, weights = step(mtl.mgda(num_tasks), matrix)
    assert np.all(weights >= 0)
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-5)
    np.testing.assert_allclose(update, weights @ matrix, rtol=1e-4, atol=1e-5)
    lengths = np.linalg.norm(matrix, axis=1)
    assert np.all(matrix @ update >= update @ update - 1e-5 * lengths * (weights @ lengths))


@many
def test_upgrad_is_the_mean_of_the_projections(num_tasks):
    matrix = gradients(num_tasks)
    update, _ = step(mtl.upgrad(num_tasks), matrix)
    projections = [g + matrix.T @ optimize.nnls(matrix.T, -g)[0] for g in matrix]
    expected = np.mean(projections, axis=0)
    np.testing.assert_allclose(update, expected, atol=1e-4 * np.linalg.norm(expected))


@many
def test_nash_mtl_solves_its_equation(num_tasks):
    matrix = gradients(num_tasks)
    update, weights = step(mtl.nash_mtl(num_tasks, max_norm=None), matrix)
    np.testing.assert_allclose(weights * (matrix @ update), 1, rtol=1e-3)
    np.testing.assert_allclose(update @ update, num_tasks, rtol=1e-3)


@many
def test_cagrad_is_the_best_of_its_ball_for_the_worst_task(num_tasks):
    matrix, c = gradients(num_tasks), 0.5
    update, weights = step(mtl.cagrad(num_tasks, c=c, rescale=0), matrix)
    mean = matrix.mean(axis=0)
    moved, gains = weights - 1 / num_tasks, matrix @ update
    radius = c * np.linalg.norm(mean)
    np.testing.assert_allclose(np.linalg.norm(update - mean), radius, rtol=1e-4)
    # Towards a convex combination of the tasks that gain least, of which none gains less than they.
    assert np.all(moved >= -1e-6)
    least = moved @ gains / moved.sum()
    assert np.all(gains >= least - 1e-4 * np.linalg.norm(matrix, axis=1) * np.linalg.norm(update))


@many
def test_pcgrad_projects_one_after_another(num_tasks):
    matrix = gradients(num_tasks)
    update, _ = step(mtl.pcgrad(num_tasks, order="fixed"), matrix)
    expected = np.zeros(SIZE)
    for i, g in enumerate(matrix):
        for j, other in enumerate(matrix):
            if j != i:
                g = g - min(g @ other, 0) / (other @ other) * other
        expected += g
    np.testing.assert_allclose(update, expected, atol=1e-4 * np.linalg.norm(expected))


def test_a_tenth_of_the_tasks_not_finite():
    """And the others' step is what it is without them."""
    num_tasks = 64
    matrix = gradients(num_tasks)
    bad = np.arange(num_tasks) % 10 == 3
    broken = np.where(bad[:, None], np.nan, matrix)
    update, weights = step(mtl.upgrad(num_tasks), broken)
    expected, _ = step(mtl.upgrad(int((~bad).sum())), matrix[~bad])
    np.testing.assert_array_equal(weights[bad], 0)
    np.testing.assert_allclose(update, expected, atol=1e-4 * np.linalg.norm(expected))


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])  # the square of the last is not finite
@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_sums_of_more_than_a_few_tasks_look_at_them_only_if_the_sum_is_not_finite(weight, bad):
    """And then, or where a task has no weight and the sum cannot tell, set aside who is to blame."""
    num_tasks = 6
    matrix = gradients(num_tasks)
    weights = np.ones(num_tasks, np.float32)
    weights[2] = weight
    tx = mtl.linear_scalarization(num_tasks, weights=weights)
    broken = matrix.copy()
    broken[2] = bad
    update, found = step(tx, broken)
    np.testing.assert_allclose(update, np.delete(matrix, 2, axis=0).sum(axis=0), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found, np.arange(num_tasks) != 2)
    np.testing.assert_allclose(step(tx, matrix)[0], weights @ matrix, rtol=1e-5, atol=1e-5)


def test_the_light_oracle_gives_the_same_step():
    """Deep and scanned, of many heads in one array."""
    num_tasks = 128
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32) / 4
    params = {"layers": normal(3, 16, 16), "heads": normal(16, num_tasks)}
    x, y = normal(24, 16), normal(24, num_tasks)

    def loss_fn(params):
        z, _ = jax.lax.scan(jax.checkpoint(lambda z, w: (jnp.tanh(z @ w), None)), x, params["layers"])
        return jnp.mean((z @ params["heads"] - y) ** 2, axis=0)

    tx = mtl.upgrad(num_tasks)

    def update(oracle):
        @jax.jit
        def run(params):
            return tx.update(oracle(loss_fn)(params)[1], tx.init(params), params)[0]

        return run(params)

    actual, expected = update(mtl.value_and_light_grads), update(mtl.value_and_task_grads)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3 * float(optax.tree.norm(expected))), actual, expected
    )
