"""PCD: closed form, optimality conditions, and what is dropped when nothing fits."""

import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest

import optax_mtl as mtl
import problems


def run(tx, matrices, masks=None):
    params = problems.params()
    step = jax.jit(tx.update)
    state, updates = tx.init(params), []
    for k, matrix in enumerate(matrices):
        mask = np.ones(matrix.shape[0], bool) if masks is None else masks[k]
        update, state = step(problems.tree_of(matrix), state, params, task_mask=jnp.asarray(mask))
        updates.append(problems.vector_of(update))
    return np.stack(updates), state


def of_two(first, second, sizes, tau):
    """The paper's closed form for one secondary task."""
    main, other = first / sizes[0], second / sizes[1]
    direction = main + max(tau - main @ other / (other @ other), 0) * other
    return np.linalg.norm(first) / np.linalg.norm(direction) * direction


@pytest.mark.parametrize("tau", [0.0, 0.02, 0.5, 1.0])
def test_two_tasks_have_a_closed_form_over_steps(tau):
    beta = 0.8
    matrices = np.stack([(1 + 3 * k) * problems.gradients(num_tasks=2, seed=k) for k in range(5)])
    total, expected = np.zeros(2), []
    for k, matrix in enumerate(matrices):
        total = beta * total + (1 - beta) * (matrix**2).sum(1)
        expected.append(of_two(*matrix, np.sqrt(total / (1 - beta ** (k + 1))), tau))
    updates, _ = run(mtl.pcd(2, tau=tau, beta=beta), matrices)
    np.testing.assert_allclose(updates, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("num_tasks", [3, 5, 8])
@pytest.mark.parametrize("primary", [0, (0, 2)], ids=str)
def test_it_is_the_nearest_vector_that_meets_the_constraints(num_tasks, primary):
    """KKT: constraints met, multipliers not negative, none where a constraint is slack; and the primary's norm."""
    main = [primary] if isinstance(primary, int) else list(primary)
    others = [i for i in range(num_tasks) if i not in main]
    tau = np.linspace(0.01, 0.3, num_tasks)
    tx = mtl.pcd(num_tasks, primary=primary, tau=jnp.asarray(tau, jnp.float32))
    step = jax.jit(tx.update)
    active = 0
    for seed in range(10):
        matrix = problems.gradients(num_tasks=num_tasks, seed=seed)
        matrix[others] -= np.random.default_rng(seed).uniform(0, 1, (len(others), 1)) * matrix[0]
        update, state = step(problems.tree_of(matrix), tx.init(problems.params()))
        update = problems.vector_of(update)
        goal = matrix[main].sum(0)
        np.testing.assert_allclose(np.linalg.norm(update), np.linalg.norm(goal), rtol=1e-4)
        weights = np.asarray(optax.tree.get(state, "task_weights"), np.float64)
        np.testing.assert_allclose(weights[main], weights[main[0]], rtol=1e-5)
        nearest = update / (weights[main[0]] * np.linalg.norm(goal))  # where the primary gradient has norm one
        unit = matrix[others] / np.linalg.norm(matrix[others], axis=1, keepdims=True)
        slack = unit @ nearest - tau[others]
        assert np.all(slack >= -1e-4)
        assert np.all(weights >= 0)
        assert np.all(slack[weights[others] > 0] < 1e-3)
        assert float(state.method.residual) == 0
        active += np.sum(weights[others] > 0)
    assert active >= 10


def test_where_the_primary_gradient_will_do_it_is_left_alone():
    matrix = np.zeros((3, problems.SIZE))
    matrix[:, 0], matrix[1, 1], matrix[2, 2] = 1, 1, 1
    (update,), _ = run(mtl.pcd(3, tau=0.5), [matrix])
    np.testing.assert_allclose(update, matrix[0], atol=1e-6)


def test_constraints_that_cannot_be_met_together_are_dropped():
    matrix = problems.gradients("opposite")[[1, 0, 2]]
    matrix[2] *= 2
    (update,), state = run(mtl.pcd(3), [matrix])
    np.testing.assert_allclose(update, matrix[0], rtol=1e-5)
    assert float(state.method.residual) > 0.5


@pytest.mark.parametrize("tau", [0.02, 5e-3, 1e-4])
def test_a_longer_primary_gradient_does_not_hide_that_constraints_are_incompatible(tau):
    """Two opposite tasks, and a third that the primary gradient would have to make room for."""
    matrix = np.zeros((4, problems.SIZE))
    matrix[0, 0], matrix[1, 1], matrix[2, 1], matrix[3, 0], matrix[3, 2] = 1, 1, -1, -1, 1
    spike = matrix * np.array([[10.0], [1], [1], [1]])
    updates, state = run(mtl.pcd(4, tau=tau), np.stack([matrix] * 50 + [spike]))
    np.testing.assert_allclose(updates[0], matrix[0], atol=1e-6)
    np.testing.assert_allclose(updates[-1], spike[0], atol=1e-5)
    assert float(state.method.residual) > 0.5


@pytest.mark.parametrize("tau", [1e-6, 1e-5, 1e-3])
def test_small_shares_that_can_be_had_are_given(tau):
    """Both secondary tasks conflict with the primary one, and both constraints are active."""
    matrix = np.zeros((3, problems.SIZE))
    matrix[0, 0], matrix[1, :2], matrix[2, :3] = 1, [-1, 1], [-1, -0.5, 1]
    (update,), state = run(mtl.pcd(3, tau=tau), [matrix])
    unit = matrix[1:] / np.linalg.norm(matrix[1:], axis=1, keepdims=True)
    nearest = matrix[0] + np.linalg.solve(unit @ unit.T, tau - unit @ matrix[0]) @ unit
    np.testing.assert_allclose(update, nearest / np.linalg.norm(nearest), atol=1e-6)
    assert float(state.method.residual) == 0


def test_the_primary_gradient_stands_where_all_would_cancel():
    """What is left of it beside a share that float32 cannot see is zero; with no share asked for, so is the answer."""
    gradient = problems.gradients(num_tasks=1)[0]
    matrices = np.stack([[gradient, -gradient]])
    np.testing.assert_allclose(run(mtl.pcd(2, tau=1e-7), matrices)[0][0], gradient, rtol=1e-5)
    np.testing.assert_array_equal(run(mtl.pcd(2, tau=0.0), matrices)[0], 0)


def test_a_secondary_task_straight_against_the_primary_has_its_way():
    """The one constraint can be met only by moving against the primary gradient."""
    gradient = problems.gradients(num_tasks=1)[0]
    (update,), _ = run(mtl.pcd(2), [np.stack([gradient, -3 * gradient])])
    np.testing.assert_allclose(update, -gradient, rtol=1e-4)


def test_without_a_primary_gradient_nothing_moves():
    matrices = np.stack([problems.gradients(seed=k) for k in range(3)])
    masks = np.array([[1, 1, 1], [0, 1, 0], [1, 1, 1]], bool)
    updates, state = run(mtl.pcd(3, primary=(0, 2), beta=0.5), matrices, masks)
    np.testing.assert_array_equal(updates[1], 0)
    without, state_without = run(mtl.pcd(3, primary=(0, 2), beta=0.5), matrices[[0, 2]])
    np.testing.assert_allclose(updates[[0, 2]], without, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(state.method.squares, state_without.method.squares)
    zero = matrices[0].copy()
    zero[0] = 0
    np.testing.assert_array_equal(run(mtl.pcd(3), [zero])[0], 0)
