"""madam: recomputed in NumPy, its limits, what it is for, and what it remembers of tasks that come and go."""

import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest

import optax_mtl as mtl
from optax_mtl._weighting import weighting
import problems

T, B2, EPS = 3, 0.9, 1e-8


def told(num_tasks=T):
    """A weighting whose weights are told in each step, as a preference is that a user turns."""

    def rule(gramian, state, *, weights, **_):
        return weights, state

    return weighting("told", num_tasks, rule, needs_gramian=False)


def run(tx, matrices, weights, masks=None):
    """The updates of every step, and the last state."""
    update = jax.jit(tx.update, donate_argnums=1)
    state, updates = tx.init(jnp.zeros(problems.SIZE)), []
    for k, matrix in enumerate(matrices):
        mask = jnp.ones(len(matrix), bool) if masks is None else jnp.asarray(masks[k])
        now = jnp.asarray(weights[k], jnp.float32)
        step, state = update(jnp.asarray(matrix, jnp.float32), state, task_mask=mask, weights=now)
        updates.append(np.asarray(step))
    return np.stack(updates), state


def gradients(number):
    return np.stack([problems.gradients(seed=k) for k in range(number)])


def weights_of(number, seed=7):
    return np.random.default_rng(seed).dirichlet(np.ones(T), number)


def recomputed(matrices, weights, masks, *, cross=True, ramp_steps=0):
    """The formulas, pair by pair."""
    second = np.zeros((T, T, problems.SIZE))
    seen = np.zeros((T, T), int)
    updates = []
    for g, w, mask in zip(matrices, weights, masks, strict=True):
        w = np.where(mask, w, 0)
        w = w / max(np.abs(w).sum(), 1e-30)
        curvature = np.zeros(problems.SIZE)
        for i in range(T):
            for j in range(T):
                if mask[i] and mask[j]:
                    second[i, j] = B2 * second[i, j] + (1 - B2) * g[i] * g[j]
                    seen[i, j] += 1
                    if cross or i == j:
                        curvature += w[i] * w[j] * second[i, j] / (1 - B2 ** seen[i, j])
        d = w @ g
        curvature = np.maximum(curvature, (1 - B2) * d**2 if cross else 0)
        ramp = min(1, seen.max() / max(ramp_steps, 1))
        updates.append((1 - ramp) * d + ramp * d / (np.sqrt(curvature) + EPS))
    return np.stack(updates)


@pytest.mark.parametrize(("cross", "ramp_steps"), [(True, 0), (True, 3), (False, 0)])
def test_the_formulas_with_tasks_that_come_and_go(cross, ramp_steps):
    matrices, weights = gradients(7), weights_of(7) * [1, -1, 1]
    masks = np.ones((7, T), bool)
    masks[2, 1] = masks[5, 0] = masks[5, 2] = False
    masks[3] = False
    tx = mtl.madam(T, told(), b2=B2, eps=EPS, cross=cross, ramp_steps=ramp_steps)
    updates, state = run(tx, matrices, weights, masks)
    expected = recomputed(matrices, weights, masks, cross=cross, ramp_steps=ramp_steps)
    np.testing.assert_allclose(updates, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(updates[3], 0)
    number = T * (T + 1) // 2 if cross else T
    assert state.method.products.shape == (number, problems.SIZE)
    np.testing.assert_array_equal(state.method.pair_steps, [5, 4, 5, 5, 4, 5] if cross else [5, 5, 5])


def test_a_pair_with_an_absent_task_keeps_what_it_has():
    matrices, weights = gradients(3), weights_of(3)
    tx = mtl.madam(T, told())
    _, before = run(tx, matrices[:2], weights[:2])
    matrices[2, 1] = np.nan
    _, after = run(tx, matrices, weights)
    with_task_1 = [1, 3, 4]  # of (0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)
    without = [0, 2, 5]
    for old, new in zip(before.method[1:], after.method[1:], strict=True):
        np.testing.assert_array_equal(new[with_task_1,], old[with_task_1,])
        assert np.all(new[without,] != old[without,])


def test_it_is_adam_that_had_the_present_weights_from_the_start():
    """The point of the pairs: whatever the weights were, the second moment is that of the present ones."""
    matrices, weights = gradients(6), weights_of(6)
    updates, _ = run(mtl.madam(T, told(), b2=B2), matrices, weights)
    hindsight = optax.chain(told(), optax.scale_by_adam(b1=0, b2=B2))
    with problems.relaxed_promotion():
        for k in range(6):
            expected, _ = run(hindsight, matrices[: k + 1], [weights[k]] * (k + 1))
            np.testing.assert_allclose(updates[k], expected[-1], rtol=1e-4, atol=1e-5)


def test_one_task_that_has_all_the_weight_gets_its_own_rmsprop():
    matrices = gradients(5)
    updates, _ = run(mtl.madam(T, told(), b2=B2), matrices, [[0, 1, 0]] * 5)
    rmsprop = optax.scale_by_rms(B2, EPS, eps_in_sqrt=False, bias_correction=True)
    state = rmsprop.init(jnp.zeros(problems.SIZE))
    with problems.relaxed_promotion():
        for k in range(5):
            expected, state = rmsprop.update(jnp.asarray(matrices[k, 1], jnp.float32), state)
            np.testing.assert_allclose(updates[k], expected, rtol=1e-5)


def test_a_change_of_weights_is_lost_on_adam_and_not_on_madam():
    """Task 0's gradients are a hundred times as large; after twenty steps all the weight goes to task 1.

    Adam still divides by what task 0 was, and hardly moves. Under madam the step is at once that of task 1 alone.
    """
    matrices = np.stack([problems.gradients(seed=k) for k in range(21)]) * np.array([100.0, 1.0, 1.0])[:, None]
    weights = np.array([[1, 0, 0]] * 20 + [[0, 1, 0]])
    alone = np.array([[0, 1, 0]] * 21)
    adam = optax.chain(told(), optax.scale_by_adam(b1=0))
    with problems.relaxed_promotion():
        (*_, wanted), _ = run(adam, matrices, alone)
        (*_, of_adam), _ = run(adam, matrices, weights)
    (*_, of_madam), _ = run(mtl.madam(T, told()), matrices, weights)
    np.testing.assert_allclose(of_madam, wanted, rtol=1e-4)
    assert np.linalg.norm(of_adam) < 0.03 * np.linalg.norm(wanted)


@pytest.mark.parametrize("cross", [True, False])
def test_a_common_factor_of_the_weights_changes_nothing(cross):
    """Not even for gradients as small as `eps`, and with weights of both signs."""
    matrices, weights = 1e-8 * gradients(4), weights_of(4) * [1, -1, 1]
    tx = mtl.madam(T, told(), cross=cross)
    expected, _ = run(tx, matrices, weights)
    updates, state = run(tx, matrices, 1e6 * weights)
    np.testing.assert_allclose(updates, expected, rtol=1e-4)
    np.testing.assert_allclose(optax.tree.get(state, "task_weights"), 1e6 * weights[-1], rtol=1e-6)


def test_steps_stay_bounded_where_pairs_have_seen_different_steps():
    """The products say that both tasks oppose each other; their own squares, of other steps, are next to nothing."""
    opposed = np.array([[1.0], [-1.0], [0.0]]) * np.ones(problems.SIZE)
    aligned = np.array([[0.1], [0.1], [0.0]]) * np.ones(problems.SIZE)
    matrices = np.stack([opposed] * 3 + [1e-3 * opposed] * 60 + [aligned])
    masks = np.array([[True, True, False]] * 3 + [[True, False, False], [False, True, False]] * 30 + [[True] * 3])
    updates, _ = run(mtl.madam(T, told(), b2=B2), matrices, [[0.5, 0.5, 0]] * len(matrices), masks)
    assert np.all(np.abs(updates) <= 1.001 / np.sqrt(1 - B2))
    np.testing.assert_allclose(updates[-1], 1 / np.sqrt(1 - B2), rtol=1e-3)  # the bound was needed


def test_without_eps_zeros_make_nothing():
    for tx in (mtl.madam(2, mtl.mgda(2), eps=0.0), mtl.apt(2, mtl.mgda(2), eps=0.0)):
        update, _ = tx.update(jnp.array([[1.0, 0.0], [3.0, 0.0]]), tx.init(jnp.zeros(2)))
        np.testing.assert_allclose(update, [1, 0], rtol=1e-5)


def test_the_pairs_are_all_the_memory_that_it_takes():
    params = jnp.zeros(50_000)
    tx = mtl.madam(8, mtl.mgda(8))
    state = tx.init(params)
    assert state.method.products.nbytes == 36 * params.nbytes
    assert tx.init(jnp.zeros(2, jnp.bfloat16)).method.products.dtype == jnp.float32
    step = jax.jit(tx.update, donate_argnums=1).lower(jnp.ones((8, params.size)), state)
    assert step.compile().memory_analysis().temp_size_in_bytes < 3 * params.nbytes  # some columns of the gradients


def test_a_thing_without_weights_is_refused():
    for inner in (mtl.scale_by_mao(T), optax.chain(mtl.mgda(T)), mtl.madam(T, mtl.mgda(T)), optax.adam(1e-3)):
        with pytest.raises(ValueError, match="Give it a weighting as it is"):
            mtl.madam(T, inner)
    with pytest.raises(ValueError, match="built with num_tasks=3, and its inner method with 2"):
        mtl.madam(T, mtl.mgda(2)).init(jnp.zeros(2))


def test_inside_shared_and_heads_a_head_keeps_its_own_gradient():
    params = {"trunk": jnp.zeros(problems.SIZE), "head": jnp.zeros(1)}
    task_grads = {"trunk": jnp.asarray(problems.gradients(), jnp.float32), "head": jnp.eye(T, 1)}
    tx = mtl.shared_and_heads(mtl.madam(T, mtl.mgda(T)), shared=lambda path: path == "trunk")
    updates, state = tx.update(task_grads, tx.init(params), params)
    weights = optax.tree.get(state, "task_weights")
    np.testing.assert_allclose(updates["trunk"], np.sign(weights @ problems.gradients()), rtol=1e-4)
    np.testing.assert_array_equal(updates["head"], 1)
