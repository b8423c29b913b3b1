"""DB-MTL: reference values, the averages, the heads."""

import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest

import optax_mtl as mtl
import problems

T = 3


def test_a_worked_example():
    """Gradients (-4, 1, 1) and (6, 1, 1), losses of one: both at the norm of the second."""
    weights = mtl.db_mtl_weights(jnp.sqrt(jnp.array([18.0, 38.0])), jnp.ones(2))
    np.testing.assert_allclose(weights, [1.45297, 1], rtol=1e-5)


def test_it_follows_its_formula():
    tx = mtl.db_mtl(T, beta=0.8, beta_sigma=0.5)
    params = problems.params()
    state, means = tx.init(params), np.zeros((T, problems.SIZE))
    for k in range(4):
        matrix, losses = problems.gradients(seed=k), problems.losses(T, k)
        update, state = tx.update(problems.tree_of(matrix), state, params, losses=jnp.asarray(losses, jnp.float32))
        beta = 0.8 / (k + 1) ** 0.5
        means = beta * means + (1 - beta) * matrix / losses[:, None]
        norms = np.linalg.norm(means, axis=1)
        np.testing.assert_allclose(
            problems.vector_of(update), (norms.max() / norms) @ means, rtol=1e-4, atol=1e-4 * norms.max()
        )


@pytest.mark.parametrize(
    ("dtype", "size", "losses"),
    [
        (jnp.float16, 100.0, [1e-3, 1.0, 3e-3]),
        (jnp.float32, 0.1, [1e-19, 1.0, 1e-20]),
        (jnp.float32, 1e-15, [1e-20, 1e-24, 1e-23]),
    ],
)
def test_a_loss_near_zero_makes_a_steep_logarithm_and_not_an_absentee(dtype, size, losses):
    """The first step is that without averages, but for its length."""
    params, task_grads = problems.params(dtype), problems.tree_of(size * problems.gradients(), dtype)
    losses = jnp.array(losses, jnp.float32)
    tx = mtl.db_mtl(T)
    update, state = tx.update(task_grads, tx.init(params), params, losses=losses)
    assert optax.tree.get(state, "nonfinite_count").tolist() == [0, 0, 0]
    exact = np.asarray(problems.vector_of(task_grads), np.float64) / np.asarray(losses, np.float64)[:, None]
    norms = np.linalg.norm(exact, axis=1)
    np.testing.assert_allclose(problems.vector_of(update), 0.1 * (norms.max() / norms) @ exact, rtol=2e-3)


def test_a_logarithm_too_steep_for_its_mean_is_set_aside():
    tx = mtl.db_mtl(2)
    state = tx.init(jnp.zeros(2))
    for losses in ([1e-30, 1.0], [1.0, 1.0]):
        update, state = tx.update(jnp.eye(2), state, losses=jnp.array(losses))
        assert np.isfinite(update).all()
    assert state.steps.tolist() == [1, 2]
    assert state.balance.nonfinite_count.tolist() == [1, 0]


def test_the_averages_are_all_the_memory_that_it_takes():
    """Counted in the compiled program: no copy of the task gradients beside the state."""
    tx = mtl.db_mtl(8)
    params, task_grads = jnp.zeros((300, 400)), jnp.zeros((8, 300, 400))
    step = jax.jit(lambda *args, losses: tx.update(*args, losses=losses))
    compiled = step.lower(task_grads, tx.init(params), params, losses=jnp.ones(8)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < params.nbytes


def test_the_unit_of_a_loss_does_not_matter():
    for beta in (0.0, 0.9):
        tx = mtl.db_mtl(T, beta=beta)
        params = problems.params()
        results = []
        for units in (np.ones(T), np.array([1e-6, 1.0, 1e6])):
            state = tx.init(params)
            for k in range(3):
                matrix, losses = problems.gradients(seed=k) * units[:, None], problems.losses(T, k) * units
                update, state = tx.update(
                    problems.tree_of(matrix), state, params, losses=jnp.asarray(losses, jnp.float32)
                )
            results.append(problems.vector_of(update))
        np.testing.assert_allclose(results[1], results[0], rtol=1e-3, atol=1e-4)


def test_each_head_gets_the_gradient_of_its_own_logarithm():
    params = {"trunk": jnp.zeros(2), "left": jnp.zeros(1), "right": jnp.zeros(1)}
    task_grads = {"trunk": jnp.eye(2), "left": jnp.array([[3.0], [0.0]]), "right": jnp.array([[0.0], [3.0]])}
    for beta in (0.0, 0.9):
        tx = mtl.shared_and_heads(mtl.db_mtl(2, beta=beta), shared=lambda path: path == "trunk")
        updates, _ = tx.update(task_grads, tx.init(params), params, losses=jnp.array([0.5, 2.0]))
        assert (updates["left"].tolist(), updates["right"].tolist()) == ([6.0], [1.5])


def test_losses_and_gradients_of_zero_stay_finite():
    for beta in (0.0, 0.9):
        tx = mtl.db_mtl(T, beta=beta)
        matrix = problems.gradients("zero_row")
        updates, _ = tx.update(problems.tree_of(matrix), tx.init(problems.params()), losses=jnp.zeros(T))
        assert np.isfinite(problems.vector_of(updates)).all()
