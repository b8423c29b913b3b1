"""Methods that weight by derivatives of a function of the losses; and FAMO, GO4Align, Group DRO: by their history."""

import itertools

import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest

import optax_mtl as mtl
import problems

RNG = np.random.default_rng


def weights_over(tx, losses, masks=None, **extra_args):
    """The weights of every step, `(steps, T)`, and the last state; of the extra args too there is one a step."""
    losses = np.asarray(losses, np.float32)
    num_tasks = losses.shape[1]
    step = jax.jit(tx.update)
    with problems.relaxed_promotion():
        state, weights = tx.init(jnp.zeros(2)), []
        for k, loss in enumerate(losses):
            mask = jnp.ones(num_tasks, bool) if masks is None else jnp.asarray(masks[k])
            now = {name: jnp.asarray(value[k], jnp.float32) for name, value in extra_args.items()}
            _, state = step(jnp.ones((num_tasks, 2)), state, losses=jnp.asarray(loss), task_mask=mask, **now)
            weights.append(np.asarray(optax.tree.get(state, "task_weights")))
    return np.stack(weights), state


def softmax(x):
    return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


# -- Derivatives -----------------------------------------------------------------------------------------------------


def cosmos_objective(losses, r, z):
    return r @ losses - 3 * (r @ losses) / jnp.linalg.norm(r) / jnp.linalg.norm(losses)


def pbi_objective(losses, r, z):
    ray = r / jnp.linalg.norm(r)
    along = ray @ (losses - z)
    return along + 2 * jnp.linalg.norm(losses - z - along * ray)


def stch_objective(losses, r, z):
    return 0.3 * jax.nn.logsumexp(r * (losses - z) / 0.3)


@pytest.mark.parametrize(
    ("objective", "weights"),
    [
        (cosmos_objective, lambda losses, r, z: mtl.cosmos_weights(losses, lam=3.0, preference=r)),
        (pbi_objective, lambda losses, r, z: mtl.pbi_weights(losses, theta=2.0, preference=r, reference=z)),
        (stch_objective, lambda losses, r, z: mtl.stch_weights(losses, mu=0.3, preference=r, reference=z)),
    ],
    ids=["cosmos", "pbi", "stch"],
)
def test_the_weights_are_the_derivatives_of_the_objective(objective, weights):
    for seed, scale in itertools.product(range(5), (1e-3, 1, 1e3)):
        losses, r, z = RNG(seed).uniform(0.05, 3, (3, 4)) * [[scale], [1], [scale]]
        with problems.enable_x64():
            losses, r, z = map(jnp.asarray, (losses, r, z))
            np.testing.assert_allclose(weights(losses, r, z), jax.grad(objective)(losses, r, z), rtol=1e-9, atol=1e-9)


def test_on_the_ray_pbi_goes_down_it_and_rounding_is_not_taken_for_a_side():
    ray = jnp.array([1.0, 2.0, 5.0])
    for scale in (0.0, 1e-3, 0.7, 1e4):
        np.testing.assert_allclose(mtl.pbi_weights(scale * ray, preference=ray), ray / np.sqrt(30), rtol=1e-6)


def test_cosmos_without_losses_is_the_weighted_sum():
    r = jnp.array([0.2, 0.8])
    np.testing.assert_array_equal(mtl.cosmos_weights(jnp.zeros(2), preference=r), r)
    np.testing.assert_allclose(mtl.cosmos_weights(3 * r, preference=r), r, atol=1e-7)


@pytest.mark.parametrize("mu", [1.0, 0.2])
def test_stch_log_takes_the_means_after_the_warm_up(mu):
    losses = RNG(0).uniform(0.2, 3, (12, 3))
    weights, _ = weights_over(mtl.stch(3, mu=mu, form="log", steps_per_epoch=2, warmup_epochs=2), losses)
    nadir = losses[4:6].mean(0)  # of the third epoch, for good
    expected = 3 * np.stack([softmax(np.log(loss / nadir) / mu) for loss in losses]) / losses
    np.testing.assert_allclose(weights[:6], 1 / losses[:6], rtol=1e-5)
    np.testing.assert_allclose(weights[6:], expected[6:], rtol=1e-4)
    if mu == 1:  # then it descends on T log sum_i L_i / N_i
        ratios = losses[6:] / nadir
        np.testing.assert_allclose(weights[6:], 3 / nadir / ratios.sum(1, keepdims=True), rtol=1e-4)


def test_stch_log_has_no_reference_point():
    with pytest.raises(ValueError, match="leave out reference"):
        mtl.stch(2, form="log", reference=jnp.zeros(2))


@pytest.mark.parametrize(
    "tx",
    [
        mtl.famo(3),
        mtl.go4align(3),
        mtl.stch(3, form="log", steps_per_epoch=1, warmup_epochs=0),
    ],
    ids=["famo", "go4align", "stch-log"],
)
def test_a_loss_of_zero_is_left_out_of_the_step(tx):
    losses = [[1.0, 2.0, 0.5], [0.9, 0.0, 0.4], [0.8, 1.5, 0.3]]
    mask = [[True] * 3, [True, False, True], [True] * 3]
    weights, _ = weights_over(tx, losses)
    np.testing.assert_array_equal(weights, weights_over(tx, losses, mask)[0])
    assert weights[1, 1] == 0


def objective_of_ldc(losses, logits, initial, lam=0.3):
    weighted = jax.nn.softmax(logits) * losses * jnp.min(initial) / initial
    return jnp.sum(weighted) + lam * jnp.sum(jnp.abs(jnp.diff(weighted)))


def test_ldc_mtl_descends_on_its_objective_with_weights_and_logits():
    losses = RNG(1).uniform(0.2, 3, (6, 4))
    weights, state = weights_over(mtl.ldc_mtl(4, lam=0.3, optimizer=optax.sgd(0.2)), losses)
    with problems.relaxed_promotion():
        logits, initial = jnp.zeros(4), jnp.asarray(losses[0])
        for k, loss in enumerate(jnp.asarray(losses)):
            by_loss, by_logit = jax.grad(objective_of_ldc, argnums=(0, 1))(loss, logits, initial)
            if k:  # at first all gaps are zero, up to rounding
                np.testing.assert_allclose(weights[k], by_loss, rtol=1e-4)
            else:
                np.testing.assert_allclose(weights[k], 0.25 * initial.min() / initial, rtol=1e-5)
                by_logit = jnp.zeros(4)
            logits = logits - 0.2 * by_logit
    np.testing.assert_allclose(state.method.logits.value, logits, rtol=1e-4, atol=1e-6)


def test_ldc_mtl_compares_neighbours_among_those_present():
    factors = mtl.ldc_mtl_factors(
        jnp.array([1.0, 9.0, 3.0, 2.0]), lam=0.1, present=jnp.array([True, False, True, True])
    )
    np.testing.assert_allclose(factors[np.array([0, 2, 3])], [0.9, 1.2, 0.9], rtol=1e-6)


# -- FAMO ------------------------------------------------------------------------------------------------------------


def test_famo_is_the_authors_algorithm_given_the_losses_after():
    """xi <- xi - lr (J^T delta + gamma xi), after each step but the last, with the losses of its batch."""
    losses, after = RNG(2).uniform(0.5, 3, (2, 6, 3))
    bound = np.array([0.1, 0.0, 0.2])
    tx = mtl.famo(3, gamma=0.05, reference=bound, optimizer=optax.sgd(0.7))
    weights, _ = weights_over(tx, losses, losses_after=np.roll(after, 1, axis=0))  # the first is ignored
    xi = np.zeros(3)
    for k in range(6):
        z = softmax(xi)
        expected = z / (losses[k] - bound)
        np.testing.assert_allclose(weights[k], expected / expected.sum(), rtol=1e-4)
        delta = np.log(losses[k] - bound) - np.log(after[k] - bound)
        xi = xi - 0.7 * ((np.diag(z) - np.outer(z, z)) @ delta + 0.05 * xi)


def test_famo_without_the_losses_after_takes_the_next_batch():
    losses = RNG(3).uniform(0.5, 3, (5, 3))
    exact, _ = weights_over(mtl.famo(3), losses, losses_after=losses)
    np.testing.assert_array_equal(weights_over(mtl.famo(3), losses)[0], exact)


def test_famo_keeps_a_logit_unless_its_task_is_there_in_both_steps():
    losses = RNG(4).uniform(0.5, 3, (4, 3))
    masks = np.ones((4, 3), bool)
    masks[1, 2] = False
    logits = [weights_over(mtl.famo(3), losses[:k], masks)[1].method.logits.value for k in (1, 2, 3, 4)]
    np.testing.assert_array_equal(logits[0], 0)
    assert [bool(x[2] != 0) for x in logits] == [False, False, False, True]  # away; back, but there was no last loss
    assert np.all(logits[2][:2] != logits[1][:2])
    delta = np.log(losses[0, :2] / losses[1, :2])
    grads = mtl.famo_logit_grads(jnp.zeros(3), jnp.append(jnp.asarray(delta), 99), present=jnp.array([1, 1, 0], bool))
    np.testing.assert_allclose(grads, [delta @ [0.25, -0.25], delta @ [-0.25, 0.25], 0], atol=1e-6)


def test_famo_says_what_the_losses_after_must_be():
    tx = mtl.famo(2)
    with pytest.raises(ValueError, match="losses_after must hold one number a task"):
        tx.update(jnp.ones((2, 3)), tx.init(jnp.zeros(3)), losses=jnp.ones(2), losses_after=jnp.ones(3))


# -- GO4Align --------------------------------------------------------------------------------------------------------


def best_split(values, num_groups):
    """Brute force over all contiguous splits of the sorted values."""
    order = np.argsort(values)
    best, means = np.inf, None
    for cuts in itertools.combinations(range(1, len(values)), min(num_groups, len(values)) - 1):
        groups = np.split(values[order], cuts)
        cost = sum(((group - group.mean()) ** 2).sum() for group in groups)
        if cost < best:
            best, means = cost, np.concatenate([np.full(len(group), group.mean()) for group in groups])
    out = np.empty(len(values))
    out[order] = means
    return out


@pytest.mark.parametrize("num_groups", [1, 2, 3, 5, 8])
def test_group_means_are_those_of_the_best_of_all_splits(num_groups):
    group = jax.jit(mtl.group_means, static_argnums=1)
    for seed, scale in itertools.product(range(8), (1e-30, 1, 1e20)):
        values = RNG(seed).lognormal(size=7)
        present = RNG(seed + 100).uniform(size=7) < 0.8
        got = group(jnp.asarray(scale * values, jnp.float32), num_groups, present=jnp.asarray(present)) / scale
        np.testing.assert_allclose(got[present], best_split(values[present], num_groups), rtol=1e-5)
        np.testing.assert_array_equal(got[~present], 0)


def test_go4align_groups_what_the_shares_make_of_the_scales():
    losses = RNG(5).uniform(0.2, 3, (5, 4))
    shares = np.exp(-0.5 * np.cumsum(losses, axis=0))
    gamma = shares / shares.sum(1, keepdims=True) * losses.mean(1, keepdims=True) / losses
    for num_groups in (1, 2, 4):
        weights, _ = weights_over(mtl.go4align(4, num_groups=num_groups, beta=0.5), losses)
        np.testing.assert_allclose(weights, [best_split(g, num_groups) for g in gamma], rtol=1e-4)


# -- Group DRO -------------------------------------------------------------------------------------------------------


def test_group_dro_multiplies_the_shares_of_those_present():
    losses = RNG(6).uniform(0, 3, (4, 3))
    masks = np.ones((4, 3), bool)
    masks[1, 0] = masks[2] = False
    weights, _ = weights_over(mtl.group_dro(3, step_size=0.4), losses, masks)
    q = np.full(3, 1 / 3)
    for k in (0, 1, 3):
        on = masks[k]
        new = q[on] * np.exp(0.4 * losses[k, on])
        q[on] = q[on].sum() * new / new.sum()
        np.testing.assert_allclose(weights[k], on * q / q[on].sum(), rtol=1e-5)
    np.testing.assert_array_equal(weights[2], 0)


def test_group_dro_comes_back_from_a_share_too_small_for_a_float():
    losses = np.array([[1.0, 0.0]] * 30 + [[0.0, 1.0]] * 60)
    weights, _ = weights_over(mtl.group_dro(2, step_size=10.0), losses)
    np.testing.assert_array_equal(weights[29], [1, 0])
    np.testing.assert_allclose(weights[59], 0.5, rtol=1e-3)
    np.testing.assert_array_equal(weights[-1], [0, 1])
