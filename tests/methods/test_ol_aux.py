"""OL-AUX: when the weights change, by how much, and what they cannot become."""

import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest

import optax_mtl as mtl
import problems


def run(tx, matrices, masks=None):
    """The updates, and the state after each step."""
    params = problems.params()
    step = jax.jit(tx.update)
    state, updates, states = tx.init(params), [], []
    for k, matrix in enumerate(matrices):
        mask = np.ones(matrix.shape[0], bool) if masks is None else masks[k]
        update, state = step(problems.tree_of(matrix), state, params, task_mask=jnp.asarray(mask))
        updates.append(problems.vector_of(update))
        states.append(state)
    return np.stack(updates), states


@pytest.mark.parametrize("primary", [1, (0, 2)], ids=str)
def test_against_the_paper_over_steps(primary):
    """Weights of 1 for five steps, then the sum of the products, times the rate, and so on."""
    rate, every = 0.03, 5
    main = [primary] if isinstance(primary, int) else list(primary)
    helpers = [i for i in range(4) if i not in main]
    matrices = np.stack([problems.gradients(num_tasks=4, seed=k) for k in range(12)])
    weights, total, expected = np.ones(4), np.zeros(4), []
    for k, matrix in enumerate(matrices):
        expected.append(weights @ matrix)
        total[helpers] += matrix[helpers] @ matrix[main].sum(0)
        if (k + 1) % every == 0:
            weights, total = weights + rate * total, np.zeros(4)
    tx = mtl.ol_aux(4, primary=primary, every=every, optimizer=optax.sgd(rate), nonnegative=False)
    updates, _ = run(tx, matrices)
    np.testing.assert_allclose(updates, expected, rtol=1e-4, atol=1e-5)


def test_a_step_lowers_the_primary_loss_as_it_should():
    """The change of a weight is the gradient of the primary loss after a step, over the learning rate."""
    value_fn, params, eta = problems.value_fn(3), problems.params(), 1e-5
    _, task_grads = mtl.value_and_task_grads(value_fn)(params)

    def primary_loss_after_a_step(weights):
        step = mtl.combine(weights, task_grads)
        return value_fn(jax.tree.map(lambda p, d: p - eta * d, params, step))[0]

    by_autodiff = -jax.grad(primary_loss_after_a_step)(jnp.ones(3)) / eta
    tx = mtl.ol_aux(3, every=1, optimizer=optax.sgd(1e-3))
    _, state = tx.update(task_grads, tx.init(params))
    learned = (np.asarray(state.method.weights.value) - 1) / 1e-3
    np.testing.assert_allclose(learned[1:], by_autodiff[1:], rtol=1e-3)
    assert learned[0] == 0


def test_an_enemy_ends_at_zero_unless_told_otherwise():
    matrix = problems.gradients("opposite")
    for nonnegative, sign in ((True, 0), (False, -1)):
        tx = mtl.ol_aux(3, every=1, optimizer=optax.sgd(10.0), nonnegative=nonnegative)
        _, states = run(tx, [matrix] * 2)
        assert np.sign(optax.tree.get(states[-1], "task_weights")[2]) == sign


def test_an_absent_task_counts_its_own_steps():
    """Weights change after two steps: of the task that missed the second, in a later one; without a primary, none."""
    matrices = np.stack([problems.gradients(seed=k) for k in range(4)])
    masks = np.array([[1, 1, 1], [1, 0, 1], [0, 1, 1], [1, 1, 1]], bool)
    updates, states = run(mtl.ol_aux(3, every=2, optimizer=optax.sgd(0.1)), matrices, masks)
    np.testing.assert_array_equal(
        [state.method.steps for state in states], [[0, 1, 1], [0, 1, 0], [0, 1, 0], [0, 0, 1]]
    )
    np.testing.assert_array_equal(updates[2], 0)
    products = np.einsum("kip,kp->ki", matrices, matrices[:, 0])
    expected = [1 + 0.1 * (products[0, 1] + products[3, 1]), 1 + 0.1 * (products[0, 2] + products[1, 2])]
    np.testing.assert_allclose(states[-1].method.weights.value[1:], np.maximum(expected, 0), rtol=1e-5)


def test_huge_gradients_leave_everything_finite():
    tx = mtl.ol_aux(3, every=1, optimizer=optax.adam(1e-2))
    with problems.relaxed_promotion():
        updates, states = run(tx, 1e17 * np.stack([problems.gradients(seed=k) for k in range(3)]))
    assert np.isfinite(updates).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(states[-1]))
