"""Epoch means, learned scalars: what the loss weightings remember."""

import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest

import optax_mtl as mtl


def weights_over(tx, losses, masks=None, grads=None):
    """The weights of every step, `(steps, T)`."""
    losses = np.asarray(losses, np.float32)
    grads = jnp.ones((losses.shape[1], 2)) if grads is None else grads
    step = jax.jit(tx.update)
    state, weights = tx.init(jnp.zeros(2)), []
    for k, loss in enumerate(losses):
        mask = None if masks is None else jnp.asarray(masks[k])
        _, state = step(grads, state, jnp.zeros(2), losses=jnp.asarray(loss), task_mask=mask)
        weights.append(np.asarray(optax.tree.get(state, "task_weights")))
    return np.stack(weights)


def softmax(x):
    return np.exp(x) / np.exp(x).sum()


def test_dwa_follows_the_means_of_the_last_two_epochs():
    losses = np.random.default_rng(0).uniform(0.5, 2, (9, 2))
    weights = weights_over(mtl.dwa(2, steps_per_epoch=3, temperature=0.7), losses)
    means = losses.reshape(3, 3, 2).mean(1)
    np.testing.assert_array_equal(weights[:6], 1)
    np.testing.assert_allclose(weights[6:], [2 * softmax(means[1] / means[0] / 0.7)] * 3, rtol=1e-5)


def test_adaptive_weight_assignment_by_epoch_follows_the_last_one():
    losses = np.random.default_rng(1).uniform(0.5, 2, (6, 2))
    weights = weights_over(mtl.adaptive_weight_assignment(2, steps_per_epoch=2), losses)
    means = losses.reshape(3, 2, 2).mean(1)
    np.testing.assert_allclose(weights[:2], 0.5)
    for epoch in (1, 2):
        last = means[epoch - 1]
        np.testing.assert_allclose(weights[2 * epoch : 2 * epoch + 2], [last / last.sum()] * 2, rtol=1e-5)


def test_an_epoch_without_a_task_leaves_its_mean_alone():
    losses = [[1.0, 3.0], [1.0, 99.0], [1.0, 1.0]]
    masks = [[True, True], [True, False], [True, True]]
    weights = weights_over(mtl.adaptive_weight_assignment(2, steps_per_epoch=1), losses, masks)
    np.testing.assert_allclose(weights[2], [0.25, 0.75], rtol=1e-6)


def test_uncertainty_descends_on_the_negative_log_likelihood():
    """s <- s - lr (1/2 - a exp(-s) L), for each task its own a."""
    losses = np.random.default_rng(2).uniform(0.1, 3, (5, 2))
    tx = mtl.uncertainty(2, form=("regression", "classification"), optimizer=optax.sgd(0.3), init=-0.5)
    weights = weights_over(tx, losses)
    s, a = np.full(2, -0.5), np.array([0.5, 1.0])
    for k in range(5):
        np.testing.assert_allclose(weights[k], a * np.exp(-s), rtol=1e-5)
        s = s - 0.3 * (0.5 - a * np.exp(-s) * losses[k])


def test_uncertainty_survives_a_loss_of_zero():
    weights = weights_over(mtl.uncertainty(1, optimizer=optax.sgd(1.0)), np.zeros((300, 1)))
    assert np.isfinite(weights).all()


def test_gradnorm_pulls_to_one_training_rate():
    """The task that lags (its loss has not fallen) gains weight; alpha = 0 evens out the norms instead."""
    losses = [[1.0, 1.0]] + [[0.1, 1.0]] * 30
    with jax.numpy_dtype_promotion("standard"):
        lagging = weights_over(mtl.gradnorm(2, alpha=1.5), losses)
        norms = jnp.array([[1.0, 0.0], [3.0, 0.0]])
        evened = weights_over(mtl.gradnorm(2, alpha=0.0), [[1.0, 1.0]] * 200, grads=norms)
    assert lagging[-1, 1] > 1.5
    np.testing.assert_allclose(evened[-1], [1.5, 0.5], atol=0.05)


def test_gradnorm_evens_out_norms_of_tasks_that_take_turns():
    """Decades between the norms, and never all tasks in one batch: the larger norm still gets the smaller weight."""
    norms = np.array([1.0, 1e-2, 1e2])
    grads = jnp.asarray(norms[:, None] * np.ones((3, 2)) / np.sqrt(2), jnp.float32)
    masks = [[True, True, False], [True, False, True]] * 500
    with jax.numpy_dtype_promotion("standard"):
        weights = weights_over(mtl.gradnorm(3, alpha=0.0), np.ones((1000, 3)), masks, grads)
    assert weights[-1, 2] < weights[-1, 0]
    assert weights[-2, 0] < weights[-2, 1]


def test_extreme_losses_end_in_finite_weights():
    """From 1e-30 to 1e20 and back."""
    extreme = np.array([[1e-30, 1.0], [1e20, 1e-30], [1e-30, 1e20], [1.0, 1.0]])
    with jax.numpy_dtype_promotion("standard"):
        for tx in (
            mtl.dwa(2, steps_per_epoch=1),
            mtl.gradnorm(2),
            mtl.mgda(2, normalization="loss+"),
            mtl.adaptive_weight_assignment(2),
            mtl.adaptive_weight_assignment(2, mode="softmax"),
            mtl.cdtt(2, window=1),
            mtl.uncertainty(2),
        ):
            assert np.isfinite(weights_over(tx, extreme)).all()


def test_random_weights_are_those_of_the_distribution():
    """Over many draws the means are equal; the Dirichlet's variance on the simplex is (T - 1) / (T^2 (T + 1))."""
    weights = weights_over(mtl.rlw(3, 0, distribution="dirichlet"), np.ones((2000, 3)))
    np.testing.assert_allclose(weights.mean(0), 1 / 3, atol=0.03)
    np.testing.assert_allclose(weights.var(0), 2 / 36, rtol=0.15)


@pytest.mark.parametrize("bad", [0, 2.5, True])
def test_an_epoch_is_a_number_of_steps(bad):
    for method in (mtl.dwa, mtl.adaptive_weight_assignment):
        with pytest.raises(ValueError, match="steps_per_epoch must be"):
            method(2, steps_per_epoch=bad)
