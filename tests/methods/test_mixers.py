"""GradDrop and the trimmed mean, coordinate by coordinate."""

import jax
from jax import numpy as jnp
import numpy as np
import pytest

import optax_mtl as mtl
import problems


def update(tx, matrix, mask=None):
    mask = np.ones(len(matrix), bool) if mask is None else np.asarray(mask)
    state = tx.init(jnp.zeros(matrix.shape[1]))
    return tx.update(jnp.asarray(matrix, jnp.float32), state, task_mask=jnp.asarray(mask))


@pytest.mark.parametrize(("num_tasks", "k"), [(3, 1), (5, 1), (6, 2), (20, 4)])
def test_trimmed_mean_is_what_sorting_gives(num_tasks, k):
    """Without the tasks that are absent, and with ties; twenty tasks run in a loop."""
    matrix = np.random.default_rng(k).integers(-3, 4, (num_tasks, 50)).astype(float)
    for mask in (np.ones(num_tasks, bool), np.arange(num_tasks) != 1):
        there = np.sort(matrix[mask], axis=0)
        trimmed = min(k, (len(there) - 1) // 2)
        got, state = update(mtl.trimmed_mean(num_tasks, k=k), matrix, mask)
        np.testing.assert_allclose(got, there[trimmed : len(there) - trimmed].mean(0), rtol=1e-5, atol=1e-6)
        assert np.all(np.asarray(state.task_weights)[~mask] == 0)


@pytest.mark.parametrize("num_tasks", [12, 16])
def test_trimmed_mean_needs_memory_for_two_copies_of_the_gradients_at_most(num_tasks):
    """Counted in the compiled program; comparing all tasks with all at once would take sixteen copies for sixteen."""
    tx = mtl.trimmed_mean(num_tasks, k=1)
    params, task_grads = jnp.zeros((300, 400)), jnp.zeros((num_tasks, 300, 400))
    compiled = jax.jit(tx.update).lower(task_grads, tx.init(params), params).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2.1 * task_grads.nbytes


def test_too_few_tasks_for_the_trimming_leave_their_median():
    matrix = np.array([[1.0], [5.0], [100.0], [2.0], [3.0]])
    tx = mtl.trimmed_mean(5, k=2)
    for mask, median in (
        ([1, 1, 1, 1, 0], 3.5),
        ([1, 1, 1, 0, 0], 5.0),
        ([1, 1, 0, 0, 0], 3.0),
        ([0, 1, 0, 0, 0], 5.0),
    ):
        assert update(tx, matrix, np.array(mask, bool))[0].tolist() == [median]


def test_an_outlier_has_no_share_in_the_trimmed_mean():
    matrix = np.stack([np.full(4, 1e6), np.full(4, -1e6), *np.ones((3, 4)) * [[1], [2], [3]]])
    _, state = update(mtl.trimmed_mean(5, k=1), matrix)
    np.testing.assert_allclose(state.task_weights, [0, 0, 1 / 6, 2 / 6, 3 / 6], rtol=1e-6)


def test_trimming_must_leave_something():
    with pytest.raises(ValueError, match="k must be between 0 and 1, found 2"):
        mtl.trimmed_mean(4, k=2)


def test_graddrop_draws_a_sign_by_its_purity():
    """Over many coordinates with the same gradients: either sign's, as often as the formula says."""
    column, size = np.array([3.0, 1.0, -1.0]), 20_000
    got, _ = update(mtl.graddrop(3, key=0), np.repeat(column[:, None], size, axis=1))
    values, counts = np.unique(got, return_counts=True)
    assert values.tolist() == [-1.0, 4.0]
    purity = (1 + 3 / 5) / 2
    np.testing.assert_allclose(counts[1] / size, purity, atol=4 * np.sqrt(purity * (1 - purity) / size))


def test_graddrop_leaks_what_it_is_told_to():
    """Leak one lets a task through untouched, whatever sign is drawn; 0.25 lets a quarter of the other through."""
    got, state = update(mtl.graddrop(2, key=0, leak=jnp.array([1.0, 0.25])), np.repeat([[1.0], [-1.0]], 1000, axis=1))
    assert set(np.asarray(got).tolist()) == {0.75, 0.0}
    assert state.task_weights[0] > state.task_weights[1]
    agreeing = problems.gradients("parallel")
    np.testing.assert_allclose(update(mtl.graddrop(3, key=0), agreeing)[0], agreeing.sum(0), rtol=1e-5)


def test_graddrop_draws_anew_for_each_leaf_and_step():
    tx = mtl.graddrop(2, key=0)
    params = {"a": jnp.zeros(64), "b": jnp.zeros(64)}
    task_grads = jax.tree.map(lambda p: jnp.stack([p + 1, p - 1]), params)
    first, state = tx.update(task_grads, tx.init(params))
    second, _ = tx.update(task_grads, state)
    assert np.any(first["a"] != first["b"])
    assert np.any(first["a"] != second["a"])


def test_the_leak_is_checked():
    with pytest.raises(ValueError, match="leak must be between 0 and 1"):
        mtl.graddrop(2, key=0, leak=1.5)
    with pytest.raises(ValueError, match="leak must hold one number a task"):
        mtl.graddrop(2, key=0, leak=jnp.ones(3))
