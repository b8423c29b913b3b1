"""ExcessMTL and PiKE: weights that are multiplied by exponentials."""

import jax
from jax import numpy as jnp
import numpy as np
import pytest

import optax_mtl as mtl
import problems

T = 3


@pytest.mark.parametrize("warmup", [0, 3])
def test_excess_mtl_follows_its_formula(warmup):
    tx = mtl.excess_mtl(T, step_size=0.7, warmup_steps=warmup)
    params = problems.params()
    state, squares, weights, risks = tx.init(params), np.zeros((T, problems.SIZE)), np.ones(T), []
    for k in range(6):
        matrix = problems.gradients(seed=k)
        _, state = tx.update(problems.tree_of(matrix), state, params)
        squares += matrix**2
        risks.append((matrix**2 / np.sqrt(squares)).sum(1))
        if k >= max(warmup, 1):
            weights = weights * np.exp(0.7 * risks[-1] / np.mean(risks[: max(warmup, 1)], axis=0))
            weights *= T / weights.sum()
        np.testing.assert_allclose(state.task_weights, weights, rtol=1e-4)


def test_a_task_with_noise_that_cannot_be_learned_earns_no_weight():
    """Two tasks with large losses: one descends, the other's gradient vanished with its loss still there."""
    tx = mtl.excess_mtl(2)
    state = tx.init(jnp.zeros(2))
    for scale in (1.0, 1.0, 1e-3, 1e-3):
        task_grads = jnp.array([[1.0, 1.0], [1.0, -1.0]]) * jnp.array([[1.0], [scale]])
        _, state = tx.update(task_grads, state, losses=jnp.array([1.0, 5.0]))
    assert state.task_weights[0] > state.task_weights[1]


def test_a_task_that_starts_at_zero_takes_a_later_gradient_for_its_reference():
    tx = mtl.excess_mtl(2)
    state = tx.init(jnp.zeros(2))
    for scale in (0.0, 0.0, 3.0):
        _, state = tx.update(jnp.array([[1.0, 0.0], [0.0, scale]]), state)
    np.testing.assert_allclose(state.method.reference, [1, 3])


def test_weights_move_without_bound_and_stay_finite():
    """A gradient 1e14 times the first: the exponential is one of 1e14."""
    tx = mtl.excess_mtl(2)
    state = tx.init(jnp.zeros(1))
    for scale in (1e-10, 1e4, 1e4, 1e-10):
        _, state = tx.update(jnp.array([[scale], [1.0]]), state)
        assert np.isfinite(state.task_weights).all()
        np.testing.assert_allclose(state.task_weights.sum(), 2, rtol=1e-6)


def test_squares_that_overflow_do_not_end_a_task():
    """The sum stays at the largest number, so that the first task's risk falls less than the second's, not to zero."""
    tx = mtl.excess_mtl(2)
    state = tx.init(jnp.zeros(1))
    for _ in range(6):
        _, state = tx.update(jnp.array([[8e18], [1.0]]), state)
    assert np.isfinite(jax.tree.leaves(state.method.squares)[0]).all()
    assert 1 < state.task_weights[0] < 1.5


@pytest.mark.parametrize("losses", [[1e19, 1.0], [1e19, -1e19], [1e19, jnp.nan]])
def test_a_loss_at_the_end_of_the_numbers_leaves_pike_finite(losses):
    tx = mtl.pike(2, zeta1=0.1, zeta2=0.1, tau=2.0)
    given = {"losses": jnp.array(losses), "gradient_variance": jnp.zeros(2)}
    _, state = tx.update(jnp.ones((2, 1)), tx.init(jnp.zeros(1)), **given)
    assert np.isfinite(state.method.log_weights).all()
    assert (state.task_weights[0] > 1, state.task_weights[1]) == (True, 0)


@pytest.mark.parametrize("tau", [None, 1.5])
def test_pike_follows_its_formula(tau):
    tx = mtl.pike(T, zeta1=0.05, zeta2=0.3, every=2, tau=tau)
    params = problems.params()
    state, weights = tx.init(params), np.full(T, 1 / T)
    for k in range(5):
        matrix, losses = problems.gradients(seed=k), problems.losses(T, k)
        variance = np.random.default_rng(k).uniform(0, 12, T)  # above the squared norm for some
        given = {"losses": jnp.asarray(losses, jnp.float32), "gradient_variance": jnp.asarray(variance, jnp.float32)}
        update, state = tx.update(problems.tree_of(matrix), state, params, **given)
        y = np.ones(T) if tau is None else tau * np.exp(tau * losses) / np.exp(tau * losses).sum()
        if k % 2 == 0:
            signal = np.maximum((matrix**2).sum(1) - variance, 0)
            weights = weights * np.exp(y**2 * (0.05 * signal - 0.15 * variance))
            weights /= weights.sum()
        np.testing.assert_allclose(problems.vector_of(update), (weights * y) @ matrix, rtol=1e-4, atol=1e-5)


def test_the_variance_can_be_estimated_from_parts_of_a_batch():
    """As the docstring has it; over many batches its mean is the variance of the batch's gradient."""
    rng = np.random.default_rng(0)
    parts, batches, deviation = 4, 3000, np.array([0.5, 2.0])
    noise = rng.standard_normal((batches, parts, 2, 3)) * deviation[:, None]

    @jax.vmap
    def estimate(part_grads):
        task_grads = jax.tree.map(lambda g: g.mean(0), part_grads)
        deviations = jax.tree.map(lambda g, mean: g - mean[None], part_grads, task_grads)
        squares = jax.vmap(mtl.task_norms)(deviations) ** 2
        return squares.sum(0) / (parts - 1) / parts

    estimated = estimate({"w": jnp.asarray(1 + noise, jnp.float32)}).mean(0)
    np.testing.assert_allclose(estimated, 3 * deviation**2 / parts, rtol=0.05)


def test_a_variance_that_is_not_finite_leaves_the_weight_as_it_is():
    tx = mtl.pike(2, zeta1=0.1, zeta2=0.1)
    state = tx.init(jnp.zeros(1))
    _, state = tx.update(jnp.ones((2, 1)), state, gradient_variance=jnp.array([0.0, jnp.nan]))
    np.testing.assert_allclose(state.task_weights[0] / state.task_weights[1], np.exp(0.1), rtol=1e-5)
