"""per_task, shared_and_heads, checked: around balancing methods."""

from typing import NamedTuple

import chex
import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest

import optax_mtl as mtl
import problems

T = 3
NAN = jnp.nan


# -- per_task --------------------------------------------------------------------------------------------------------


def test_per_task_runs_each_task_on_its_own():
    with problems.relaxed_promotion():
        inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))
        tx = mtl.per_task(inner, T)
        params = problems.params()
        state = tx.init(params)
        alone = [inner.init(params) for _ in range(T)]
        for k in range(3):
            task_grads = problems.tree_of(problems.gradients(seed=k))
            updates, state = tx.update(task_grads, state, params)
            for i in range(T):
                expected, alone[i] = inner.update(jax.tree.map(lambda g, i=i: g[i], task_grads), alone[i], params)
                chex.assert_trees_all_close(jax.tree.map(lambda u, i=i: u[i], updates), expected, rtol=1e-5)


class RawKeyState(NamedTuple):
    rng_key: jax.Array


def noise_by_raw_key():
    def update(updates, state, params=None):
        key, now = jax.random.split(state.rng_key)
        return updates + jax.random.normal(now, updates.shape), RawKeyState(key)

    return optax.GradientTransformation(lambda params: RawKeyState(jax.random.PRNGKey(0)), update)


@pytest.mark.parametrize(
    "noise", [lambda: optax.add_noise(1.0, 0.5, key=0), noise_by_raw_key], ids=["typed key", "raw key"]
)
def test_random_transformations_get_a_key_each(noise):
    with problems.relaxed_promotion():
        tx = mtl.per_task(noise(), T)
        state = tx.init(jnp.zeros(5))
        noise, state = tx.update(jnp.zeros((T, 5)), state)
        more, _ = tx.update(jnp.zeros((T, 5)), state)
    drawn = np.concatenate([noise, more])
    assert len(np.unique(drawn[:, 0])) == 2 * T


def test_a_masked_task_keeps_its_state_and_a_broken_one_is_passed_on():
    with problems.relaxed_promotion():
        tx = optax.chain(mtl.per_task(optax.scale_by_adam(), T), mtl.mgda(T))
        params = jnp.zeros(4)
        task_grads = jnp.asarray(problems.gradients()[:, :4], jnp.float32)
        before = tx.init(params)
        masked, state = tx.update(task_grads, before, params, task_mask=jnp.array([True, False, True]))
        np.testing.assert_array_equal(optax.tree.get(state, "mu")[1], 0)
        np.testing.assert_array_equal(optax.tree.get(state, "count"), [1, 0, 1])
        np.testing.assert_array_equal(optax.tree.get(state, "nonfinite_count"), 0)
        broken, state = tx.update(task_grads.at[1].set(NAN), before, params)
        np.testing.assert_array_equal(optax.tree.get(state, "mu")[1], 0)
        np.testing.assert_array_equal(optax.tree.get(state, "nonfinite_count"), [0, 1, 0])
        lost, state = tx.update(task_grads, before, params, losses=jnp.array([1.0, NAN, 1.0]))
        np.testing.assert_array_equal(optax.tree.get(state, "count"), [1, 0, 1])
    assert np.all(np.isfinite(broken))
    np.testing.assert_allclose(broken, masked, rtol=1e-6)
    np.testing.assert_allclose(lost, masked, rtol=1e-6)


def test_adam_before_balancing_is_refused_by_checked():
    params = {"w": jnp.zeros(4)}
    with problems.relaxed_promotion():
        with pytest.raises(ValueError, match=r"mu\['w'\] is \(4,\) before an update and \(3, 4\) after it") as error:
            mtl.checked(optax.chain(optax.adam(1e-3), mtl.mgda(T)), T).init(params)
        assert "optax_mtl.per_task" in str(error.value)
        right = mtl.checked(optax.chain(mtl.per_task(optax.scale_by_adam(), T), mtl.mgda(T), optax.sgd(0.1)), T)
        updates, _ = right.update({"w": jnp.ones((T, 4))}, right.init(params), params)
    chex.assert_trees_all_equal_shapes(updates, params)


def test_a_leaking_task_axis_is_refused_by_checked():
    params = {"w": jnp.zeros(4), "b": jnp.zeros(2)}
    with pytest.raises(ValueError, match=r"params\['b'\] has shape \(3, 2\), wanted \(2,\)"):
        mtl.checked(optax.masked(mtl.mgda(T), {"w": True, "b": False}), T).init(params)


def test_checked_takes_heads_of_their_own_and_what_else_an_update_needs():
    tx = mtl.checked(mtl.shared_and_heads(mtl.mgda(2), LABELS), 2)
    updates, _ = tx.update(trunk_and_heads(single=True), tx.init(PARAMS), PARAMS)
    chex.assert_trees_all_equal_shapes(updates, PARAMS)
    with problems.relaxed_promotion():
        plateau = optax.chain(mtl.mgda(2), optax.contrib.reduce_on_plateau())
        with pytest.raises(TypeError, match=r"give examples of them: optax_mtl.checked\(tx, num_tasks, value="):
            mtl.checked(plateau, 2).init(PARAMS)
        state = mtl.checked(plateau, 2, value=1.0).init(PARAMS)
        chex.assert_trees_all_equal_structs(state, plateau.init(PARAMS))


def test_checked_asks_nothing_of_the_compiled_program():
    params, task_grads = problems.params(), problems.tree_of(problems.gradients())
    plain, guarded = mtl.mgda(T), mtl.checked(mtl.mgda(T), T)
    texts = [jax.jit(tx.update).lower(task_grads, tx.init(params), params).as_text() for tx in (plain, guarded)]
    assert len(set(texts)) == 1
    with pytest.raises(ValueError, match="ordinary gradient"):
        guarded.update(params, guarded.init(params), params)


# -- shared_and_heads ------------------------------------------------------------------------------------------------

PARAMS = {"trunk": jnp.zeros(4), "heads": {"a": jnp.zeros(2), "b": jnp.zeros((1, 2))}}
MASK = {"trunk": True, "heads": False}
LABELS = {"trunk": "shared", "heads": {"a": 0, "b": 1}}


def trunk_and_heads(single=False):
    """Two tasks; task 0 reaches head a, task 1 head b."""
    matrix = jnp.asarray(problems.gradients("conflicting", num_tasks=2)[:, :4], jnp.float32)
    a, b = jnp.array([[1.0, 2.0]]), jnp.array([[[3.0, 4.0]]])
    if not single:
        a, b = jnp.concatenate([a, 0 * a]), jnp.concatenate([0 * b, b])
    return {"trunk": matrix, "heads": {"a": a, "b": b}}


@pytest.mark.parametrize("single", [False, True], ids=["full task axis", "task axis of one"])
@pytest.mark.parametrize(
    "shared",
    [
        MASK,
        LABELS,
        {"trunk": "shared", "heads": "head"},
        lambda path: path.startswith("trunk"),
        {"trunk": np.bool_(True), "heads": {"a": np.int64(0), "b": jnp.array(1)}},
    ],
    ids=["mask", "owners", "labels", "predicate", "arrays"],
)
def test_the_trunk_is_balanced_and_the_heads_are_summed(shared, single):
    task_grads = trunk_and_heads(single)
    tx = mtl.shared_and_heads(mtl.mgda(2), shared)
    state = tx.init(PARAMS)
    updates, new_state = jax.jit(tx.update)(task_grads, state, PARAMS)
    expected, _ = mtl.mgda(2).update(task_grads["trunk"], mtl.mgda(2).init(PARAMS["trunk"]))
    np.testing.assert_allclose(updates["trunk"], expected, rtol=1e-5)
    np.testing.assert_array_equal(updates["heads"]["a"], [1, 2])
    np.testing.assert_array_equal(updates["heads"]["b"], [[3, 4]])
    chex.assert_trees_all_equal_shapes_and_dtypes(state, new_state)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, PARAMS)


def test_paths_are_told_to_the_predicate():
    seen = []
    mtl.shared_and_heads(mtl.mgda(2), lambda path: seen.append(path) or True).init(PARAMS)
    assert sorted(set(seen)) == ["heads/a", "heads/b", "trunk"]


@pytest.mark.parametrize("single", [False, True], ids=["full task axis", "task axis of one"])
@pytest.mark.parametrize("where", ["trunk", "head", "mask"])
def test_an_absent_task_moves_neither_trunk_nor_head(where, single):
    task_grads = trunk_and_heads(single)
    mask = None
    if where == "trunk":
        task_grads["trunk"] = task_grads["trunk"].at[1].set(NAN)
    elif where == "head":
        task_grads["heads"]["b"] = task_grads["heads"]["b"].at[-1].set(NAN)
    else:
        mask = jnp.array([True, False])
    tx = mtl.shared_and_heads(mtl.mgda(2), LABELS)
    updates, state = tx.update(task_grads, tx.init(PARAMS), PARAMS, task_mask=mask)
    np.testing.assert_allclose(updates["trunk"], trunk_and_heads()["trunk"][0], rtol=1e-6)
    np.testing.assert_array_equal(updates["heads"]["a"], [1, 2])
    np.testing.assert_array_equal(updates["heads"]["b"], 0)
    np.testing.assert_array_equal(optax.tree.get(state, "nonfinite_count"), [0, where != "mask"])


def test_a_head_without_owner_is_refused_where_the_owner_matters():
    tx = mtl.shared_and_heads(mtl.mgda(2), MASK)
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match="index of the task that owns it"):
        tx.update(trunk_and_heads(single=True), state, PARAMS, task_mask=jnp.array([True, False]))
    broken = trunk_and_heads(single=True)
    broken["heads"]["b"] = NAN * broken["heads"]["b"]
    updates, _ = tx.update(broken, state, PARAMS)
    np.testing.assert_array_equal(updates["heads"]["b"], 0)


def test_something_must_be_shared_and_shaped():
    tx = mtl.shared_and_heads(mtl.mgda(2), {"trunk": True, "heads": 5})
    with pytest.raises(ValueError, match="names task 5 as an owner; there are 2"):
        tx.update(trunk_and_heads(), tx.init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match="with a label for every leaf: found"):
        mtl.shared_and_heads(mtl.mgda(2), {"trunk": True}).init(PARAMS)
    with pytest.raises(ValueError, match="marks no leaf as shared"):
        mtl.shared_and_heads(mtl.mgda(2), lambda path: False).init(PARAMS)
    tx = mtl.shared_and_heads(mtl.mgda(2), MASK)
    bad = trunk_and_heads() | {"heads": {"a": jnp.ones((3, 2)), "b": jnp.ones((1, 1, 2))}}
    with pytest.raises(ValueError, match=r"\['heads'\]\['a'\] has shape \(3, 2\), wanted \(2, 2\)"):
        tx.update(bad, tx.init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match=r"\['trunk'\] has shape \(2, 4\), wanted \(3, 4\)"):
        mtl.shared_and_heads(mtl.mgda(3), MASK).update(trunk_and_heads(), tx.init(PARAMS), PARAMS)


def test_a_chain_inside_and_outside():
    """Per-task Adam on the trunk only, then balancing; an ordinary optimiser after it all."""
    with problems.relaxed_promotion():
        inner = optax.chain(mtl.per_task(optax.scale_by_adam(), 2), mtl.edm(2))
        tx = mtl.checked(optax.chain(mtl.shared_and_heads(inner, LABELS), optax.sgd(1.0)), 2)
        updates, state = tx.update(trunk_and_heads(), tx.init(PARAMS), PARAMS)
        chex.assert_shape(optax.tree.get(state, "mu")["trunk"], (2, 4))
        mapped = optax.tree.map_params(tx, lambda leaf: leaf, state)
    np.testing.assert_array_equal(updates["heads"]["a"], [-1, -2])
    chex.assert_trees_all_equal_structs(mapped, state)


def test_a_gramian_passes_through():
    tx = mtl.shared_and_heads(mtl.mgda(2), MASK)
    weights, _ = tx.update(mtl.Gramian(jnp.diag(jnp.array([1.0, 3.0]))), tx.init(PARAMS))
    np.testing.assert_allclose(weights, [0.75, 0.25], rtol=1e-6)


def test_value_fn_sees_whole_parameters():
    params = {"trunk": jnp.ones(4), "heads": {"a": 2 * jnp.ones(2), "b": jnp.ones((1, 2))}}

    def value_fn(params):
        return jnp.stack([jnp.sum(params["trunk"]) * params["heads"]["a"][0], jnp.sum(params["trunk"])])

    _, task_grads = mtl.value_and_task_grads(value_fn)(params)
    tx = mtl.shared_and_heads(mtl.hydalearn(2, learning_rate=0.1), LABELS)
    _, state = tx.update(task_grads, tx.init(params), params, value_fn=value_fn)
    np.testing.assert_allclose(optax.tree.get(state, "task_weights"), [2 / 3, 1 / 3], rtol=1e-5)
