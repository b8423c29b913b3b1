"""Bloop against the paper's lines, step by step in NumPy."""

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
    state, updates, states = tx.init(params), [], []
    for k, matrix in enumerate(matrices):
        mask = np.ones(matrix.shape[0], bool) if masks is None else masks[k]
        update, state = step(problems.tree_of(matrix), state, params, task_mask=jnp.asarray(mask))
        updates.append(problems.vector_of(update))
        states.append(state)
    return np.stack(updates), states


@pytest.mark.parametrize("primary", [(1,), (0, 3)], ids=str)
def test_against_the_paper_over_steps(primary):
    """With tasks missing here and there, and no primary task at all in the third step."""
    weight, rho = 0.7, 0.25
    masks = np.ones((6, 4), bool)
    masks[1, 2] = False
    masks[2, list(primary)] = False
    masks[4, primary[-1]] = len(primary) == 1
    matrices = np.stack([problems.gradients(num_tasks=4, seed=k) for k in range(6)])
    mean, expected = None, []
    for matrix, mask in zip(matrices, masks, strict=True):
        here = [i for i in primary if mask[i]]
        if not here:
            expected.append(np.zeros(problems.SIZE))
            continue
        main = matrix[here].sum(0)
        helpers = matrix[[i for i in range(4) if mask[i] and i not in primary]].sum(0)
        mean = main if mean is None else mean
        across = helpers - (helpers @ mean) / (mean @ mean) * mean
        np.testing.assert_allclose(across @ mean, 0, atol=1e-12)
        expected.append(main + weight * across)
        mean = (1 - rho) * mean + rho * main
    updates, states = run(mtl.bloop(4, primary=primary, weight=weight, rho=rho), matrices, masks)
    np.testing.assert_allclose(updates, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(problems.vector_of(states[-1].method.mean), mean, rtol=1e-4, atol=1e-5)


def test_the_state_tells_what_was_taken_out():
    matrices = np.stack([problems.gradients(seed=k) for k in range(4)])
    updates, states = run(mtl.bloop(3, weight=0.5), matrices)
    weights = np.asarray(optax.tree.get(states[-1], "task_weights"))
    mean_before = problems.vector_of(states[-2].method.mean)
    removed = float(states[-1].method.removed)
    np.testing.assert_array_equal(weights, [1, 0.5, 0.5])
    assert removed != 0
    np.testing.assert_allclose(updates[-1], weights @ matrices[-1] - removed * mean_before, rtol=1e-4, atol=1e-5)


def test_without_noise_the_primary_loss_falls_as_on_its_own():
    """With the same primary gradient at every step, the update's part along it is the gradient itself."""
    main = problems.gradients(num_tasks=1)[0]
    matrices = np.stack([np.vstack([main, problems.gradients(num_tasks=2, seed=k)]) for k in range(3)])
    updates, _ = run(mtl.bloop(3, weight=2.0), matrices)
    np.testing.assert_allclose(updates @ main, main @ main, rtol=1e-5)


def test_it_reaches_the_best_of_the_primary_minimisers():
    """The primary loss fixes one coordinate; among its minimisers the auxiliary one is smallest at (1, 3)."""

    def loss_fn(params):
        return jnp.stack([(params[0] - 1) ** 2, jnp.sum((params - jnp.array([-2.0, 3.0])) ** 2)])

    tx = optax.chain(mtl.bloop(2, weight=0.5, rho=0.2), optax.sgd(0.05))
    params = jnp.zeros(2)
    state = tx.init(params)
    step = jax.jit(lambda p, s: tx.update(mtl.value_and_task_grads(loss_fn)(p)[1], s, p))
    for _ in range(200):
        updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params, [1, 3], atol=1e-2)


def test_in_bfloat16_the_mean_gets_where_the_gradients_are():
    """A bfloat16 mean would stop where a hundredth of what is missing rounds to nothing."""
    tx = mtl.bloop(2, rho=0.01)
    first, then = (jnp.array([[g, 0.0], [0.0, 1.0]], jnp.bfloat16) for g in (1.0, 2.0))
    step = jax.jit(tx.update)
    _, state = step(first, tx.init(jnp.zeros(2, jnp.bfloat16)))
    for _ in range(600):
        _, state = step(then, state)
    np.testing.assert_allclose(state.method.mean, [2, 0], atol=5e-3)


def test_in_bfloat16_little_is_left_of_much_that_is_taken_out():
    """The auxiliary gradient is a hundred times the primary one, and some noise, which is what counts."""
    rng = np.random.default_rng(0)
    main = rng.standard_normal((3, problems.SIZE))
    noise = rng.standard_normal((3, problems.SIZE))
    matrices = [problems.tree_of([g, 100 * g + n], jnp.bfloat16) for g, n in zip(main, noise, strict=True)]
    tx, mean = mtl.bloop(2, weight=1.0, rho=0.0), None
    step, state = jax.jit(tx.update), tx.init(problems.params(jnp.bfloat16))
    for matrix in matrices:
        update, state = step(matrix, state)
        main, helper = problems.vector_of(matrix)
        mean = main if mean is None else mean
        expected = main + helper - helper @ mean / (mean @ mean) * mean
        assert update["a"].dtype == jnp.bfloat16
        np.testing.assert_allclose(problems.vector_of(update), expected, rtol=2**-8, atol=1e-4)
