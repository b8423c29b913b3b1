import dataclasses

import jax
import numpy as np
import pytest

from optax_mtl.experiments import _statistics
from optax_mtl.experiments.evidence import _drift_data, hydalearn

pytestmark = pytest.mark.usefixtures("promotion")

CONFIG = dataclasses.replace(hydalearn.QUICK, records=2, steps_per_record=4)
SETTINGS = list(hydalearn.SETTINGS)


def examples(seed=0, directions=3, size=4_000):
    sets = _drift_data.examples(seed, {"train": size, "test": size}, features=12, directions=directions, noise=1.5)
    return sets["train"], sets["test"]


def test_targets_have_unit_variance_and_what_is_an_auxiliarys_own_has_nothing_to_do_with_the_main_task():
    train, _ = examples(size=20_000)
    targets = np.stack([train.main, *train.shared, *train.own])
    np.testing.assert_allclose(targets.var(axis=1), 1, atol=0.03)
    np.testing.assert_allclose(np.corrcoef(targets)[3:, :3], 0, atol=0.03)
    np.testing.assert_allclose(train.noise.std(), 1.5, atol=0.03)


def test_a_relevant_auxiliary_and_the_main_task_are_made_of_the_same_projections():
    # With one projection, and coefficients of length one, nothing but a sign can differ.
    for made in examples(directions=1):
        np.testing.assert_allclose(np.abs(made.shared), np.abs(np.stack([made.main] * 2)), rtol=1e-4, atol=1e-5)
        assert not np.allclose(np.abs(made.own[0]), np.abs(made.main), atol=0.1)


def test_seeds_differ_and_sets_do_not_share_examples():
    train, test = examples()
    again, _ = examples()
    other, _ = examples(seed=1)
    np.testing.assert_array_equal(train.inputs, again.inputs)
    for inputs in (test.inputs, other.inputs):
        assert len(np.unique(np.concatenate([inputs, train.inputs]), axis=0)) == 2 * len(inputs)


def test_relevance_goes_from_start_to_end():
    start, end = np.float32([1, 0]), np.float32([0, 1])
    for progress, wanted in ((0, (1, 0)), (0.5, (0.5, 0.5)), (1, (0, 1))):
        np.testing.assert_allclose(_drift_data.relevance(start, end, np.float32(progress)), wanted, atol=1e-6)


def losses_with_outputs_of_zero(weights, step):
    """`(W, settings, S, T)`, and each run's rows: with parameters of zero a loss is the mean square of the target."""
    problem = hydalearn.make_problem(CONFIG, weights)
    params = jax.tree.map(np.zeros_like, problem.params)
    batches = problem.batches.reshape(len(problem.batches), CONFIG.steps, -1)[:, step]
    losses = np.asarray(jax.vmap(problem.losses)(params, problem.data, batches))
    shape = (len(weights), len(SETTINGS), CONFIG.seeds)
    return losses.reshape(*shape, -1), batches[:, 1:].reshape(*shape, -1)


def test_the_auxiliary_labels_drift_as_said_and_the_known_relevance_is_the_weight():
    weights = np.float32([(1, 1, 1), (1, 0.3, 3), (np.nan,) * 3])
    train = _drift_data.examples(
        CONFIG.first_seed + 1,
        {"train": CONFIG.train_size},
        features=CONFIG.features,
        directions=CONFIG.directions,
        noise=CONFIG.noise,
    )["train"]
    for step, (setting, relevance) in ((0, ("fading", (1, 0))), (-1, ("rotating", (0, 1)))):
        losses, rows = losses_with_outputs_of_zero(weights, step)
        place = SETTINGS.index(setting)
        rows = rows[0, place, 1]
        main = (train.main + train.noise)[rows]
        targets = [main] + [(train.shared if r else train.own)[k][rows] for k, r in enumerate(relevance)]
        wanted = np.mean(np.square(targets), axis=1)
        for of_weights, factors in zip(losses[:, place, 1], (weights[0], weights[1], (1, *relevance)), strict=True):
            np.testing.assert_allclose(of_weights, wanted * factors, rtol=1e-4, atol=1e-6)


def test_a_seed_is_the_same_in_every_setting_and_for_all_weights():
    problem = hydalearn.make_problem(CONFIG, np.ones((3, 3), np.float32))
    shape = (3 * len(SETTINGS), CONFIG.seeds)
    for leaf in (*jax.tree.leaves(problem.params), problem.batches, problem.data["seed"]):
        runs = np.asarray(leaf).reshape(*shape, -1)
        np.testing.assert_array_equal(runs, np.broadcast_to(runs[:1], runs.shape))
    kernel = np.asarray(problem.params["trunk"]["kernel"])
    assert not np.allclose(kernel[0], kernel[1])
    steps = problem.batches[..., 0].reshape(len(problem.batches), -1)
    np.testing.assert_array_equal(steps, np.broadcast_to(np.arange(CONFIG.steps), steps.shape))


def test_fixed_weights_are_chosen_on_the_validation_examples():
    errors = np.zeros((3, 1, 2, 2))
    errors[..., 0] = [[[3, 1]], [[2, 2]], [[1, 3]]]  # test
    errors[..., 1] = [[[2, 2]], [[1, 5]], [[3, 1]]]  # validation
    chosen_errors, chosen = hydalearn.tuned(errors)
    np.testing.assert_array_equal(chosen, [[1, 2]])
    np.testing.assert_array_equal(chosen_errors, [[2, 3]])


def test_errors_are_measured_at_the_end_and_on_average_after_the_first_quarter():
    curves = np.arange(8.0)[None, :, None]
    np.testing.assert_array_equal(hydalearn.measured(curves), [[[7], [4.5]]])


def test_following_is_a_correlation_of_shares_whatever_the_sum_of_the_weights():
    relevance = np.stack([np.linspace(1, 0, 9), np.linspace(0, 1, 9)], axis=1)
    with_main = np.concatenate([np.ones((9, 1)), relevance], axis=1)
    against = np.concatenate([np.ones((9, 1)), 1 - relevance], axis=1)
    scales = np.linspace(1, 5, 9)[:, None]
    follows = hydalearn.following(np.stack([with_main, scales * with_main, against, np.ones((9, 3))]), relevance)
    np.testing.assert_allclose(follows, [1, 1, -1, np.nan], atol=1e-6)
    assert np.isnan(hydalearn.following(with_main[None], 0 * relevance)).all()


def test_the_best_weights_of_a_batch_gain_most():
    problem = hydalearn.make_problem(CONFIG)
    params = jax.tree.map(lambda leaf: np.stack([leaf] * CONFIG.records, axis=1), problem.params)
    found = hydalearn._best_weights(CONFIG, problem, params)
    weights, gains = found["batch_weights"], found["batch_gains"]
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-5)
    assert weights.shape == (len(SETTINGS) * CONFIG.seeds, len(CONFIG.moments), CONFIG.batches, 2, 3)
    best, constant, _, equal, alone = np.moveaxis(gains, -1, 0)
    for other in (constant, equal, alone):
        assert (best >= other).all()
    for other in (equal, alone):
        assert (constant.mean(axis=-1) >= other.mean(axis=-1)).all()
    assert (best <= 1 + 1e-2).all()  # the steepest step's, but for curvature
    assert best.std() > 0


@pytest.mark.parametrize(
    ("difference", "words"),
    [(-5.0, "better than"), (5.0, "worse than"), (0.0, "not distinguishable from")],
)
def test_what_is_said_of_a_rival_follows_from_the_numbers(difference, words):
    rng = np.random.default_rng(0)
    rival = 20 + rng.normal(size=(len(SETTINGS), 10))
    errors = {"hydalearn": rival + difference + 0.5 * rng.normal(size=rival.shape), "equal weights": rival}
    compared = hydalearn._comparisons(dict.fromkeys(hydalearn._MEASURES, errors))
    for finding in hydalearn._against_rivals(compared):
        assert words in finding
        assert sum(w in finding for w in ("better than", "worse than", "not distinguishable")) == 1
    assert _statistics.significant(compared["at the end"]["rotating"]["equal weights"]) == bool(difference)
