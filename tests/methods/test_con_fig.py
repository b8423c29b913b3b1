"""ConFIG against its definition, and its momentum form against Adam and against the algorithm written out."""

import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest

import optax_mtl as mtl
import problems

LENGTHS = {
    "projection": lambda n: n,
    "min": np.min,
    "max": np.max,
    "harmonic": lambda n: len(n) / np.sum(1 / n),
    "arithmetic": np.mean,
    "geometric": lambda n: np.exp(np.mean(np.log(n))),
}


def config(matrix, preference=None, length="projection"):
    """Equations 1 to 3 of the paper, on the gradients themselves."""
    norms = np.linalg.norm(matrix, axis=1)
    unit = matrix / norms[:, None]
    x = np.linalg.pinv(unit) @ (np.ones(len(matrix)) if preference is None else preference)
    x /= np.linalg.norm(x)
    return np.sum(LENGTHS[length](norms) * (unit @ x)) * x


@pytest.mark.parametrize("length", LENGTHS)
def test_con_fig_is_what_it_says_for_every_length(length):
    for kind in ("gaussian", "conflicting", "duplicate"):
        matrix = np.array([[3.0], [0.2], [1.0]]) * problems.gradients(kind)
        weights = mtl.con_fig_weights(jnp.asarray(matrix @ matrix.T, jnp.float32), length=length)
        expected = config(matrix, length=length)
        np.testing.assert_allclose(
            np.asarray(weights) @ matrix, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max(), err_msg=kind
        )


def test_mean_lengths_are_over_the_tasks_that_have_a_gradient():
    matrix = np.array([[3.0], [0.2], [1.0]]) * problems.gradients()
    gramian = jnp.asarray(matrix @ matrix.T, jnp.float32)
    for length in LENGTHS:
        weights = mtl.con_fig_weights(gramian, length=length, present=jnp.array([True, False, True]))
        expected = config(matrix[[0, 2]], length=length)
        np.testing.assert_allclose(np.asarray(weights) @ matrix, expected, rtol=1e-4, atol=1e-4, err_msg=length)


def test_cosines_are_in_the_ratio_of_the_preference():
    matrix, preference = problems.gradients("badly_scaled"), np.array([1.0, 2.0, 3.0])
    tx = mtl.con_fig(3, preference=[1.0, 2.0, 3.0])
    updates, _ = tx.update(problems.tree_of(matrix), tx.init(problems.params()))
    cosines = matrix @ problems.vector_of(updates) / np.linalg.norm(matrix, axis=1)
    np.testing.assert_allclose(cosines / cosines[0], preference, rtol=1e-3)
    with pytest.raises(ValueError, match="preference must not be negative"):
        mtl.con_fig(3, preference=[1.0, -1.0, 1.0])


def test_independent_gradients_do_not_conflict():
    for seed in range(20):
        matrix = problems.gradients("conflicting", seed=seed)
        weights = np.asarray(mtl.con_fig_weights(jnp.asarray(matrix @ matrix.T, jnp.float32)))
        assert np.all(matrix @ (weights @ matrix) > 0)


# -- Momentum --------------------------------------------------------------------------------------------------------


def momentum_steps(tx, matrices, masks=None):
    step, state, updates = jax.jit(tx.update), tx.init(problems.params()), []
    for k, matrix in enumerate(matrices):
        mask = None if masks is None else jnp.asarray(masks[k])
        update, state = step(problems.tree_of(matrix), state, task_mask=mask)
        updates.append(problems.vector_of(update))
    return np.stack(updates), state


def test_one_task_is_adam():
    matrices = [problems.gradients(num_tasks=1, seed=k) for k in range(5)]
    updates, _ = momentum_steps(mtl.con_fig_momentum(1, b1=0.8, b2=0.9), matrices)
    adam = optax.scale_by_adam(0.8, 0.9)
    state = adam.init(jnp.zeros(problems.SIZE))
    for matrix, update in zip(matrices, updates, strict=True):
        with problems.relaxed_promotion():
            expected, state = adam.update(jnp.asarray(matrix[0], jnp.float32), state)
        np.testing.assert_allclose(update, expected, rtol=1e-3, atol=1e-4)


def test_tasks_in_turn_keep_their_moments_and_take_part():
    """The paper's algorithm 2: one task's gradient a step, and all the moments known so far."""
    b1, b2, eps, steps = 0.9, 0.99, 1e-8, 8
    matrices = [problems.gradients(seed=k) for k in range(steps)]
    masks = [np.arange(3) == k % 3 for k in range(steps)]
    garbage = [np.where(mask[:, None], matrix, np.nan) for mask, matrix in zip(masks, matrices, strict=True)]
    updates, state = momentum_steps(mtl.con_fig_momentum(3, b1=b1, b2=b2, eps=eps), garbage, masks)

    moments, counts = np.zeros((3, problems.SIZE)), np.zeros(3)
    last, second = np.zeros(problems.SIZE), np.zeros(problems.SIZE)
    for k in range(steps):
        i = k % 3
        moments[i] = b1 * moments[i] + (1 - b1) * matrices[k][i]
        counts[i] += 1
        seen = counts > 0
        d = config(moments[seen] / (1 - b1 ** counts[seen, None]))
        moment = d * (1 - b1 ** (k + 1))
        second = b2 * second + (1 - b2) * ((moment - b1 * last) / (1 - b1)) ** 2
        last = moment
        np.testing.assert_allclose(updates[k], d / (np.sqrt(second / (1 - b2 ** (k + 1))) + eps), rtol=2e-3, atol=1e-4)
    np.testing.assert_array_equal(state.method.task_steps, [3, 3, 2])
    assert np.all(state.task_weights != 0)  # the absent ones' too
    np.testing.assert_array_equal(state.task_present, masks[-1])


def test_a_step_without_any_task_is_no_step():
    matrices, masks = [problems.gradients(seed=k) for k in range(3)], np.ones((3, 3), bool)
    masks[1] = False
    updates, state = momentum_steps(mtl.con_fig_momentum(3), matrices, masks)
    without, expected = momentum_steps(mtl.con_fig_momentum(3), [matrices[0], matrices[2]])
    np.testing.assert_array_equal(updates[1], 0)
    np.testing.assert_allclose(updates[2], without[1], rtol=1e-6)
    for new, old in zip(jax.tree.leaves(state.method), jax.tree.leaves(expected.method), strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-6)


def test_in_bfloat16_the_moments_get_where_the_gradients_are():
    tx = mtl.con_fig_momentum(2, b1=0.99)
    first, then = (jnp.array([[g, 0.0], [0.0, 1.0]], jnp.bfloat16) for g in (1.0, 2.0))
    step = jax.jit(tx.update)
    _, state = step(first, tx.init(jnp.zeros(2, jnp.bfloat16)))
    for _ in range(1000):
        _, state = step(then, state)
    np.testing.assert_allclose(state.method.moments, then.astype(jnp.float32), atol=1e-3)
