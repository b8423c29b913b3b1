"""MAO beside the optimisers it is made of."""

import chex
import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest

import optax_mtl as mtl
import problems

T = 3


@pytest.fixture(autouse=True)
def _optax_promotion():
    with problems.relaxed_promotion():
        yield


def steps(tx, matrices, params, **kwargs):
    state, updates = tx.init(params), []
    for matrix in matrices:
        update, state = tx.update(problems.tree_of(matrix), state, params, **kwargs)
        updates.append(update)
    return updates, state


MATRICES = [problems.gradients(seed=k) for k in range(4)]


@pytest.mark.parametrize(
    ("base", "inner"),
    [
        ("adam", optax.scale_by_adam(0.8, 0.99, 1e-6)),
        ("rmsprop", optax.scale_by_rms(0.99, 1e-6, eps_in_sqrt=False)),
        ("adagrad", optax.scale_by_rss(0.0, 1e-6)),
        (optax.scale_by_amsgrad(), optax.scale_by_amsgrad()),
        (optax.scale_by_lion(), optax.scale_by_lion()),
    ],
    ids=["adam", "rmsprop", "adagrad", "amsgrad", "lion"],
)
def test_it_is_the_sum_of_one_optimiser_a_task(base, inner):
    params = problems.params()
    mixed, _ = steps(mtl.scale_by_mao(T, base=base, b1=0.8, b2=0.99, eps=1e-6), MATRICES, params)
    alone = [inner.init(params) for _ in range(T)]
    for k, matrix in enumerate(MATRICES):
        total = jax.tree.map(jnp.zeros_like, params)
        for i in range(T):
            update, alone[i] = inner.update(problems.tree_of(matrix[i]), alone[i], params)
            total = jax.tree.map(jnp.add, total, update)
        chex.assert_trees_all_close(mixed[k], total, rtol=1e-5, atol=1e-6)


def test_mao_for_one_task_is_adam():
    params = problems.params()
    mixed, _ = steps(mtl.mao(1e-2, 1), [m[:1] for m in MATRICES], params)
    adam, _ = steps(optax.adam(1e-2), [m[0] for m in MATRICES], params)
    chex.assert_trees_all_close(mixed, adam, rtol=1e-5)


@pytest.mark.parametrize("grain", ["parameter", "leaf"])
def test_the_scale_of_a_loss_changes_nothing(grain):
    params = problems.params()
    scales = np.array([1e-3, 1.0, 1e3])[:, None]
    tx = mtl.scale_by_mao(T, grain=grain, eps=0.0)
    plain, plain_state = steps(tx, MATRICES, params)
    scaled, scaled_state = steps(tx, [scales * m for m in MATRICES], params)
    chex.assert_trees_all_close(scaled, plain, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(scaled_state.task_weights, plain_state.task_weights, rtol=1e-3)


@pytest.mark.parametrize("grain", ["parameter", "leaf"])
def test_a_head_that_one_task_reaches_gets_that_tasks_step(grain):
    """Zeros of the other tasks add nothing to the sum, and halve the mean."""
    params = {"head": jnp.zeros(3)}
    grads = jnp.array([1.0, -2.0, 0.5])
    task_grads = {"head": jnp.stack([grads, jnp.zeros(3)])}
    tx = mtl.scale_by_mao(2, grain=grain)
    update, state = tx.update(task_grads, tx.init(params), params)
    alone = mtl.scale_by_mao(1, grain=grain)
    expected, _ = alone.update({"head": grads[None]}, alone.init(params), params)
    chex.assert_trees_all_close(update, expected, rtol=1e-6)
    np.testing.assert_allclose(state.task_weights, [1, 0])
    halved = mtl.scale_by_mao(2, grain=grain, reduction="mean")
    update, _ = halved.update(task_grads, halved.init(params), params)
    chex.assert_trees_all_close(update, jax.tree.map(lambda u: u / 2, expected), rtol=1e-6)


def test_leaf_grain_follows_its_formula():
    """Written out in numpy, over several steps."""
    params = problems.params()
    mixed, _ = steps(mtl.scale_by_mao(T, grain="leaf", b1=0.9, b2=0.99), MATRICES, params)
    nu, momentum = np.zeros((T, 2)), np.zeros(problems.SIZE)
    for t, matrix in enumerate(MATRICES, start=1):
        leaves = np.split(matrix, [4], axis=1)
        nu = 0.99 * nu + 0.01 * np.stack([np.mean(leaf**2, axis=1) for leaf in leaves], axis=1)
        root = np.sqrt(nu / (1 - 0.99**t)) + 1e-8
        total = np.concatenate([(leaf / root[:, [j]]).sum(0) for j, leaf in enumerate(leaves)])
        momentum = 0.9 * momentum + 0.1 * total
        np.testing.assert_allclose(problems.vector_of(mixed[t - 1]), momentum / (1 - 0.9**t), rtol=1e-4, atol=1e-5)


def test_leaf_grain_keeps_little_state():
    """T scalars a leaf beside one momentum, where the paper's form keeps 2T times the parameters."""
    params = {"w": jnp.zeros((100, 100)), "b": jnp.zeros(100)}

    def size(tx):
        return sum(leaf.size for leaf in jax.tree.leaves(tx.init(params)))

    assert size(mtl.scale_by_mao(8)) > 16 * 10_100
    assert size(mtl.scale_by_mao(8, grain="leaf")) < 10_100 + 8 * 2 + 100


def test_half_precision_survives_the_zero_rows_of_heads():
    for dtype in (jnp.float16, jnp.bfloat16):
        params = {"head": jnp.zeros(3, dtype)}
        tx = mtl.scale_by_mao(2, grain="leaf")
        task_grads = {"head": jnp.array([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]], dtype)}
        update, _ = tx.update(task_grads, tx.init(params), params)
        assert update["head"].dtype == dtype
        assert np.isfinite(np.asarray(update["head"], np.float32)).all()


def test_leaf_grain_has_a_base_of_its_own():
    with pytest.raises(ValueError, match='grain="leaf" has a base of its own'):
        mtl.scale_by_mao(2, grain="leaf", base="rmsprop")
    with pytest.raises(ValueError, match="base must be one of"):
        mtl.scale_by_mao(2, base="adamw")


def test_mao_takes_a_schedule():
    params = problems.params()
    schedule = optax.piecewise_constant_schedule(1.0, {1: 0.1})
    scheduled, _ = steps(mtl.mao(schedule, T), MATRICES[:2], params)
    constant, _ = steps(mtl.mao(1.0, T), MATRICES[:2], params)
    chex.assert_trees_all_close(scheduled[0], constant[0], rtol=1e-6)
    chex.assert_trees_all_close(scheduled[1], jax.tree.map(lambda u: 0.1 * u, constant[1]), rtol=1e-5)
