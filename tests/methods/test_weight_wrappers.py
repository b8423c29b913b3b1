"""cr_mogm and update_every: what they make of the weights of other methods."""

from typing import NamedTuple

import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest

import optax_mtl as mtl
from optax_mtl._weighting import weighting
import problems

T = 3
wrappers = pytest.mark.parametrize(
    "wrap", [mtl.cr_mogm, lambda *args: mtl.update_every(*args, every=2)], ids=["cr_mogm", "update_every"]
)


class Runs(NamedTuple):
    runs: jax.Array


def counting(num_tasks):
    """A weighting that counts how often it ran: its weights are that number times the norms' squares."""

    def rule(gramian, state, **_):
        runs = state.runs + 1
        return runs.astype(gramian.dtype) * jnp.diagonal(gramian), Runs(runs)

    return weighting("counting", num_tasks, rule, lambda dtype, params: Runs(jnp.zeros((), jnp.int32)))


def steps(tx, matrices, masks=None, losses=None):
    """The updates and weights of every step, and the last state."""
    update = jax.jit(tx.update)
    state, updates, weights = tx.init(jnp.zeros(problems.SIZE)), [], []
    for k, matrix in enumerate(matrices):
        mask = jnp.ones(len(matrix), bool) if masks is None else jnp.asarray(masks[k])
        loss = None if losses is None else jnp.asarray(losses[k], jnp.float32)
        balanced, state = update(jnp.asarray(matrix, jnp.float32), state, losses=loss, task_mask=mask)
        updates.append(np.asarray(balanced))
        weights.append(np.asarray(optax.tree.get(state, "task_weights")))
    return np.stack(updates), np.stack(weights), state


def gradients(number):
    return np.stack([problems.gradients(seed=k) for k in range(number)])


# -- cr_mogm ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [None, [0.2, 0.3, 0.5]])
def test_cr_mogm_is_a_moving_average_of_the_weights(start):
    matrices = gradients(5)
    _, inner, _ = steps(mtl.mgda(T), matrices)
    init = None if start is None else jnp.array(start)
    updates, weights, _ = steps(mtl.cr_mogm(T, mtl.mgda(T), alpha=0.7, init=init), matrices)
    average = inner[0] if start is None else np.array(start)
    for k in range(5):
        average = 0.7 * average + 0.3 * inner[k]
        np.testing.assert_allclose(weights[k], average, rtol=1e-5)
        np.testing.assert_allclose(updates[k], average @ matrices[k], rtol=1e-4, atol=1e-5)


def test_cr_mogm_without_memory_is_the_inner_method_state_and_all():
    matrices, losses = gradients(4), np.stack([problems.losses(T, k) for k in range(4)])
    with problems.relaxed_promotion():
        expected, _, last = steps(mtl.gradnorm(T), matrices, losses=losses)
        updates, _, state = steps(mtl.cr_mogm(T, mtl.gradnorm(T), alpha=0.0), matrices, losses=losses)
    np.testing.assert_allclose(updates, expected, rtol=1e-6)
    np.testing.assert_allclose(state.method.inner.weights.value, last.method.weights.value, rtol=1e-6)


def test_cr_mogm_starts_a_task_that_joins_late_with_its_own_first_weight():
    matrices = gradients(3)
    masks = [[True, True, False], [True, True, False], [True, True, True]]
    _, inner, _ = steps(mtl.mgda(T), matrices, masks)
    _, weights, _ = steps(mtl.cr_mogm(T, mtl.mgda(T)), matrices, masks)
    assert weights[1, 2] == 0
    np.testing.assert_allclose(weights[2, 2], inner[2, 2], rtol=1e-6)


# -- update_every ----------------------------------------------------------------------------------------------------


def test_update_every_runs_the_inner_method_every_so_often_and_reuses_its_weights():
    matrices = gradients(7)
    updates, weights, state = steps(mtl.update_every(T, counting(T), every=3), matrices)
    assert state.method.inner.runs == 3
    for k in range(7):
        expected = (1 + k // 3) * (matrices[k - k % 3] ** 2).sum(1)
        np.testing.assert_allclose(weights[k], expected, rtol=1e-5)
        np.testing.assert_allclose(updates[k], expected @ matrices[k], rtol=1e-4, atol=1e-4)


def test_update_every_looks_at_every_step_for_tasks_that_are_not_finite():
    matrices = gradients(6)
    matrices[1, 0, 2] = np.nan  # between
    matrices[3, 1] = np.inf  # in a step in which weights are computed
    updates, weights, state = steps(mtl.update_every(T, counting(T), every=3), matrices)
    assert np.isfinite(updates).all()
    np.testing.assert_array_equal(optax.tree.get(state, "nonfinite_count"), [1, 1, 0])
    assert weights[1, 0] == 0
    assert weights[2, 0] == weights[0, 0]
    assert weights[3, 1] == 0
    assert weights[4, 1] > 0


def test_update_every_gives_weights_to_tasks_that_take_turns():
    """The second task is there in odd steps only, never in one in which steps alone would have weights computed."""
    matrices = gradients(8)
    masks = [[True, k % 2 == 1, True] for k in range(8)]
    _, weights, state = steps(mtl.update_every(T, counting(T), every=2), matrices, masks)
    assert np.all(weights[1::2, 1] > 0)
    assert np.all(np.diff(weights[1::4, 1]) != 0)  # every second time it is there, a new one
    assert state.method.inner.runs < 8


# -- Both ------------------------------------------------------------------------------------------------------------


@wrappers
def test_an_inner_method_that_is_no_weighting_is_refused(wrap):
    not_weightings = [
        mtl.scale_by_mao(T),
        optax.chain(optax.identity(), mtl.mgda(T)),
        mtl.shared_and_heads(mtl.mgda(T), shared=True),
        optax.adam(1e-3),
        mtl.mgda,
    ]
    for inner in not_weightings:
        with pytest.raises(ValueError, match="Give it a weighting as it is"):
            wrap(T, inner)
    with pytest.raises(ValueError, match="built with num_tasks=3, and its inner method with 2"):
        wrap(T, mtl.mgda(2)).init(jnp.zeros(2))


@wrappers
def test_what_the_inner_method_needs_is_asked_for(wrap):
    tx = wrap(T, mtl.gradnorm(T))
    with pytest.raises(ValueError, match="gradnorm needs the tasks' losses: write"):
        tx.update(jnp.ones((T, 2)), tx.init(jnp.zeros(2)))


@wrappers
def test_wrappers_hold_one_another_and_random_methods(wrap):
    for inner in (mtl.update_every(T, mtl.mgda(T), every=2), mtl.cr_mogm(T, mtl.mgda(T)), mtl.pcgrad(T, key=0)):
        updates, weights, _ = steps(wrap(T, inner), gradients(3))
        assert np.isfinite(updates).all()
        assert np.all(weights > 0)


@wrappers
def test_wrappers_work_inside_shared_and_heads(wrap):
    params = {"trunk": jnp.zeros(problems.SIZE), "head": jnp.zeros(1)}
    task_grads = {"trunk": jnp.asarray(problems.gradients(), jnp.float32), "head": jnp.eye(T, 1)}
    tx = mtl.shared_and_heads(wrap(T, mtl.edm(T)), shared=lambda path: path == "trunk")
    updates, state = tx.update(task_grads, tx.init(params), params)
    expected = mtl.edm_weights(mtl.task_gramian(task_grads["trunk"]))
    np.testing.assert_allclose(optax.tree.get(state, "task_weights"), expected, rtol=1e-5)
    np.testing.assert_array_equal(updates["head"], 1)
