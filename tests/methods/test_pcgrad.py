"""PCGrad: the projections, written out, and the orders."""

import jax
from jax import numpy as jnp
import numpy as np
import pytest

import optax_mtl as mtl
import problems


def project(matrix, orders):
    """The paper's algorithm 1, on the gradients themselves."""
    projected = matrix.copy()
    for i, order in enumerate(orders):
        for j in order:
            if j != i and projected[i] @ matrix[j] < 0:
                projected[i] -= projected[i] @ matrix[j] / (matrix[j] @ matrix[j]) * matrix[j]
    return projected.sum(0)


@pytest.mark.parametrize("num_tasks", [2, 3, 6])
def test_coefficients_do_what_projections_do(num_tasks):
    for seed in range(5):
        matrix = problems.gradients("conflicting", num_tasks, seed)
        orders = np.stack([np.random.default_rng(seed + i).permutation(num_tasks) for i in range(num_tasks)])
        weights = mtl.pcgrad_weights(jnp.asarray(matrix @ matrix.T, jnp.float32), jnp.asarray(orders))
        np.testing.assert_allclose(np.asarray(weights) @ matrix, project(matrix, orders), rtol=1e-3, atol=1e-4)


def test_two_tasks_end_without_conflict():
    for seed in range(20):
        matrix = problems.gradients("opposite" if seed % 2 else "conflicting", 2, seed)
        weights = np.asarray(
            mtl.pcgrad_weights(jnp.asarray(matrix @ matrix.T, jnp.float32), jnp.array([[0, 1], [0, 1]]))
        )
        assert np.all(matrix @ (weights @ matrix) >= -1e-4)


def test_a_shared_order_is_shared_and_an_own_order_is_not():
    """The updates seen over many steps are exactly those of the orders that each option allows."""
    matrix = problems.gradients("conflicting", 3, seed=3)
    permutations = np.array([[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]])
    of_one_order = {tuple(project(matrix, [p] * 3).round(3)) for p in permutations}
    task_grads, params = problems.tree_of(matrix), problems.params()
    for order, all_of_one_order in (("shared", True), ("per_task", False)):
        tx = mtl.pcgrad(3, 0, order=order)
        state, seen = tx.init(params), set()
        step = jax.jit(tx.update)
        for _ in range(30):
            updates, state = step(task_grads, state, params)
            seen.add(tuple(problems.vector_of(updates).round(3)))
        assert (seen <= of_one_order) == all_of_one_order


def test_a_random_order_needs_a_key():
    with pytest.raises(ValueError, match="pcgrad is random: give it a key"):
        mtl.pcgrad(3)
    with pytest.raises(ValueError, match="rlw is random: give it a key"):
        mtl.rlw(2, None)
    mtl.pcgrad(2)
    mtl.pcgrad(3, order="fixed")
