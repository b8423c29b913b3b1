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


def normalized(weights):
    return weights / weights.sum(-1, keepdims=True)


def test_learned_weights_come_to_rest_where_the_papers_say():
    """Uncertainty: 1 / 2L; its revision: sigma^4 / (1 + sigma^2) = L / 2; IMTL-L: 1 / L."""
    losses = np.array([0.1, 1.0, 5.0])
    sigma_squared = (losses / 2 + np.sqrt(losses**2 / 4 + 2 * losses)) / 2
    for tx, rest in (
        (mtl.uncertainty(3, optimizer=optax.sgd(0.2)), 1 / (2 * losses)),
        (mtl.uncertainty(3, optimizer=optax.sgd(0.2), variant="reu"), 1 / (2 * sigma_squared)),
        (mtl.imtl_l(3, optimizer=optax.sgd(0.1)), 1 / losses),
    ):
        weights = weights_over(tx, np.tile(losses, (300, 1)))
        np.testing.assert_allclose(weights[-1], rest, rtol=1e-3)


def test_imtl_l_is_twice_the_uncertainty_weighting_of_regressions():
    losses = np.random.default_rng(5).uniform(0.1, 3, (6, 2))
    imtl = weights_over(mtl.imtl_l(2, optimizer=optax.sgd(0.1)), losses)
    uncertainty = weights_over(mtl.uncertainty(2, optimizer=optax.sgd(0.2)), losses)
    np.testing.assert_allclose(imtl, 2 * uncertainty, rtol=1e-5)


def test_weights_are_the_derivatives_of_the_objective():
    losses = jnp.array([0.3, 2.0, 0.7])
    c = jnp.array([1.0, 2.0, 0.5])
    for weights, objective in (
        (mtl.gls_weights(losses), lambda x: jnp.prod(x) ** (1 / 3)),
        (mtl.scale_invariant_weights(losses, c), lambda x: jnp.sum(c * jnp.log(x))),
        (mtl.scale_invariant_weights(losses, c, mode="log1p"), lambda x: jnp.sum(c * jnp.log1p(x))),
    ):
        np.testing.assert_allclose(weights, jax.grad(objective)(losses), rtol=1e-5)


def test_the_geometric_mean_neither_overflows_nor_underflows():
    for scale in (1e-30, 1e30):
        np.testing.assert_allclose(mtl.gls_weights(jnp.full(5, scale)), 0.2, rtol=1e-4)


def test_uw_so_tempers_the_inverse_losses():
    losses = np.array([[0.5, 0.2, 2.0]])
    np.testing.assert_allclose(
        weights_over(mtl.uw_so(3, temperature=3.0), losses)[0], softmax(1 / losses[0] / 3), rtol=1e-5
    )
    np.testing.assert_allclose(weights_over(mtl.uw_so(3, temperature=1e6), losses)[0], 1 / 3, rtol=1e-4)
    np.testing.assert_allclose(weights_over(mtl.uw_so(3, temperature=1e-3), losses)[0], [0, 1, 0], atol=1e-6)


@pytest.mark.parametrize("method", [mtl.gls, mtl.scale_invariant, mtl.uw_o, mtl.uw_so, mtl.igb])
def test_a_task_whose_loss_is_zero_is_left_out(method):
    with_zero = weights_over(method(3), [[0.4, 0.0, 3.0]])
    without = weights_over(method(2), [[0.4, 3.0]])
    np.testing.assert_allclose(with_zero[0, [0, 2]], without[0], rtol=1e-5)
    assert with_zero[0, 1] == 0


def test_the_units_of_the_losses_do_not_matter():
    """Measured in other units, a loss counts as before: what it adds to the sum does, relative to the others."""
    rng = np.random.default_rng(6)
    losses, units = rng.uniform(0.1, 3, (5, 3)), np.array([1e-6, 1.0, 1e6])
    for method in (mtl.gls, mtl.scale_invariant, mtl.uw_o, mtl.slaw, lambda n: mtl.igb(n, steps_per_epoch=1)):
        before, after = weights_over(method(3), losses), weights_over(method(3), losses * units)
        np.testing.assert_allclose(normalized(after * units)[2:], normalized(before)[2:], rtol=1e-3)
    np.testing.assert_allclose(
        weights_over(mtl.cov_weighting(3), losses * units), weights_over(mtl.cov_weighting(3), losses), rtol=1e-3
    )


def test_cov_weighting_follows_the_variation_of_the_ratios_so_far():
    losses = np.random.default_rng(7).uniform(0.5, 2, (8, 3))
    weights = weights_over(mtl.cov_weighting(3), losses)
    np.testing.assert_allclose(weights[:2], 1 / 3, rtol=1e-6)
    ratios = np.stack([np.ones(3)] + [losses[t] / losses[:t].mean(0) for t in range(1, 8)])
    for t in range(2, 8):
        variation = ratios[:t].std(0) / ratios[:t].mean(0)
        np.testing.assert_allclose(weights[t], variation / variation.sum(), rtol=1e-4)


def test_cov_weighting_with_a_decay_forgets_in_the_means_only():
    losses = np.random.default_rng(8).uniform(0.5, 2, (6, 2))
    weights = weights_over(mtl.cov_weighting(2, mean_decay=0.6), losses)
    mean_loss, mean_ratio, squares = losses[0], np.ones(2), np.zeros(2)
    for t in range(1, 6):
        if t >= 2:
            variation = np.sqrt(squares / t) / mean_ratio
            np.testing.assert_allclose(weights[t], variation / variation.sum(), rtol=1e-4)
        ratio = losses[t] / mean_loss
        last, mean_ratio = mean_ratio, 0.6 * mean_ratio + 0.4 * ratio
        squares = squares + (ratio - last) * (ratio - mean_ratio)
        mean_loss = 0.6 * mean_loss + 0.4 * losses[t]


def test_slaw_divides_by_the_standard_deviation():
    """The plain one over the first 1 / (1 - beta) = 4 steps, then with moving averages of L^2 and L."""
    losses = np.random.default_rng(9).uniform(0.5, 2, (9, 3))
    weights = weights_over(mtl.slaw(3, beta=0.75), losses)
    np.testing.assert_array_equal(weights[0], 1)
    a, b = np.mean(losses[:4] ** 2, 0), np.mean(losses[:4], 0)
    for t in range(1, 9):
        if t >= 4:
            a, b = 0.75 * a + 0.25 * losses[t] ** 2, 0.75 * b + 0.25 * losses[t]
        deviation = losses[: t + 1].std(0) if t < 4 else np.sqrt(a - b**2)
        np.testing.assert_allclose(weights[t], 3 * normalized(1 / deviation), rtol=1e-4)


def test_slaw_sees_small_changes_of_large_losses():
    """In float32, a - b^2 is all rounding here."""
    losses = 1000 + np.random.default_rng(10).normal(0, [0.05, 0.2], (50, 2))
    weights = weights_over(mtl.slaw(2), losses)
    np.testing.assert_allclose(weights[-1], 2 * normalized(1 / losses.std(0)), rtol=1e-2)


def test_igb_measures_the_gap_from_the_second_epoch():
    losses = np.random.default_rng(11).uniform(0.5, 2, (10, 2))
    weights = weights_over(mtl.igb(2, steps_per_epoch=3), losses)
    np.testing.assert_allclose(weights[:6], 1 / losses[:6], rtol=1e-5)
    base = losses[3:6].mean(0)  # not of any later epoch
    for t in range(6, 10):
        np.testing.assert_allclose(weights[t], 2 * softmax(losses[t] / base) / losses[t], rtol=1e-5)


def dtp_over(tx, kpis, masks):
    step = jax.jit(tx.update)
    state, weights = tx.init(jnp.zeros(2)), []
    for kpi, mask in zip(kpis, masks, strict=True):
        _, state = step(jnp.ones((2, 2)), state, kpis=jnp.array(kpi), task_mask=jnp.array(mask))
        weights.append(np.asarray(optax.tree.get(state, "task_weights")))
    return np.stack(weights)


def test_dtp_is_the_focal_loss_of_the_averaged_kpis():
    """A KPI that nobody told, and the first after an absence, too."""
    kpis = [[0.2, 0.9], [0.4, 0.1], [0.6, np.nan], [0.5, 0.5]]
    masks = [[True, True], [True, False], [True, True], [True, True]]
    weights = dtp_over(mtl.dtp(2, gamma=jnp.array([1.0, 2.0]), alpha=0.5), kpis, masks)
    averages = np.array([[0.2, 0.9], [0.3, 1.0], [0.45, 0.9], [0.475, 0.7]])  # 1.0: no weight, it is absent
    np.testing.assert_allclose(weights, -((1 - averages) ** [1, 2]) * np.log(averages), rtol=1e-5)


def test_dtp_clips_kpis_inside_jit_and_names_them_outside():
    tx = mtl.dtp(2)
    weights = dtp_over(tx, [[0.0, 3.0]], [[True, True]])
    np.testing.assert_allclose(weights, [[-np.log(1e-6), 0]], rtol=1e-4)
    grads, state = jnp.ones((2, 2)), tx.init(jnp.zeros(2))
    with pytest.raises(ValueError, match=r"kpis\[1\] = 85"):
        tx.update(grads, state, kpis=jnp.array([0.5, 85.0]))
    with pytest.raises(ValueError, match=r"kpis must be one array of shape \(2,\), .* found a list"):
        tx.update(grads, state, kpis=[0.5, 0.5])
    tx.update(grads, state, kpis=jnp.array([0.5, 85.0]), task_mask=jnp.array([True, False]))


def test_learned_weights_survive_a_jump_from_nothing_to_a_huge_loss():
    """At the bound of the learned scalars, weight times loss overflows."""
    losses = np.array([[0.0]] * 10 + [[1e20]] * 2 + [[1.0]] * 10)
    with jax.numpy_dtype_promotion("standard"):
        for tx in (
            mtl.imtl_l(1, optimizer=optax.adam(10.0)),
            mtl.uncertainty(1, optimizer=optax.adam(10.0)),
            mtl.uncertainty(1, optimizer=optax.adam(10.0), variant="reu"),
        ):
            assert np.isfinite(weights_over(tx, losses)).all()


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
            mtl.gls(2),
            mtl.scale_invariant(2),
            mtl.uw_o(2),
            mtl.uw_so(2, temperature=1e-6),
            mtl.cov_weighting(2, mean_decay=0.0),
            mtl.slaw(2),
            mtl.igb(2, steps_per_epoch=1),
            mtl.imtl_l(2),
            mtl.uncertainty(2, variant="reu"),
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
