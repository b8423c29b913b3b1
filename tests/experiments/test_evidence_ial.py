"""Wrong labels are wrong exactly as often as said, and the sentences say what the numbers do."""

import dataclasses
import itertools

import numpy as np
import pytest

from optax_mtl.experiments.evidence import ial

SHARES = (0, 20, 40, 60, 80, 100)


@pytest.fixture(scope="module")
def data():
    return ial.make_data(ial.Config(train_size=250, validation_size=100, test_size=100), seed=3)


def test_no_source_image_is_in_two_parts(data):
    for part, other in itertools.combinations(data, 2):
        assert not np.intersect1d(part.sources, other.sources).size


def test_exactly_the_share_of_auxiliary_labels_is_wrong_and_none_of_the_primary_task(data):
    right = data.train.labels
    before, previous = np.zeros_like(right, bool), right
    for share in SHARES:
        noisy = ial.with_wrong(right, share, seed=3)
        wrong = noisy != right
        primary_wrong, left_wrong, right_wrong = wrong.sum(axis=0)
        assert left_wrong == right_wrong == len(right) * share / 100
        assert primary_wrong == 0
        np.testing.assert_array_equal(noisy[before], previous[before])  # what is wrong stays so, in the same way
        before, previous = wrong, noisy


def test_a_wrong_label_is_any_other_class_as_likely():
    right = np.full((9_000, 3), 7, np.int32)
    noisy = ial.with_wrong(right, 100, seed=0)
    for task in (1, 2):
        count = np.bincount(noisy[:, task], minlength=10)
        assert count[7] == 0
        assert np.delete(count, 7) == pytest.approx(1_000, abs=100)
    assert not np.array_equal(noisy[:, 1], noisy[:, 2])


def test_all_shares_of_a_seed_have_the_same_start_batches_and_primary_labels():
    config = dataclasses.replace(ial.QUICK, wrong=(0, 50, 100))
    problem = ial.make_problem(config, config.wrong)
    first = problem.params["trunk"]["layers"][0]["kernel"]
    for seed in (0, 3):  # three shares each
        for of in (first, problem.batches, problem.data["images"], problem.data["answers"]):
            np.testing.assert_array_equal(of[seed], of[seed + 1])
            np.testing.assert_array_equal(of[seed], of[seed + 2])
        labels = problem.data["labels"][seed : seed + 3]
        np.testing.assert_array_equal(labels[0, :, 0], labels[2, :, 0])
        assert [(labels[0, :, 2] != of[:, 2]).sum() for of in labels] == [0, 32, 64]
    assert not np.array_equal(first[0], first[3])


def test_the_primary_task_sees_its_few_labelled_canvases_only():
    primary, auxiliary = ial.make_problem(ial.QUICK, (0,)).batches.transpose(3, 0, 1, 2, 4)
    assert primary.max() < ial.QUICK.labelled <= auxiliary.max() < ial.QUICK.train_size


def test_the_weight_is_tuned_on_validation_canvases_for_each_share():
    config = ial.Config(seeds=2, wrong=(0, 100), weights=(0.3,))

    def cell(validation, test):
        found = {"validation": np.tile(validation, (2, 1)), "test": np.tile(test, (2, 1))}
        return {k: np.float32(v) for k, v in found.items()}

    results = {
        ial.SINGLE: cell([0.7], [0.9]),
        ial.EQUAL: cell([0.9, 0.5], [0.6, 0.9]),
        "weight 0.3": cell([0.8, 0.6], [0.9, 0.9]),
    }
    assert ial.tune(config, results) == [ial.EQUAL, ial.SINGLE]


def test_the_auxiliary_weight_is_relative_to_the_primarys():
    weights = np.ones((1, 1, 2, 3)) * [4.0, 1.0, 3.0]
    np.testing.assert_allclose(ial.relative_weights(weights), [[0.5]])


def made_up(ial_accuracy):
    """Results of ten seeds and two shares, in which all others have 80 %."""
    config = ial.Config(wrong=(0, 100), weights=(), methods=(ial.SINGLE, ial.EQUAL, ial.IAL))
    luck = np.random.default_rng(0).normal(0, 1e-4, (3, 10, 2))
    accuracy = [np.full(1, 0.8), np.full(2, 0.8), np.array(ial_accuracy)]
    results = {
        name: {
            "test": mean + noise[:, : len(mean)],
            "validation": mean + noise[:, : len(mean)],
            "weights": np.ones((10, len(mean), 10, 1 if name == ial.SINGLE else 3)),
        }
        for name, mean, noise in zip(config.methods, accuracy, luck, strict=True)
    }
    return ial.report(config, results)


@pytest.mark.parametrize(
    ("accuracy", "verdict", "sentence"),
    [
        (
            (0.9, 0.8),
            "Safe as far as can be told: ial is ahead of single-task at 0 % wrong labels, behind nowhere (",
            0,
        ),
        ((0.9, 0.7), "Not safe: ial is behind single-task at 100 % wrong labels (-10.0 ± 0.0 points at worst), ", 1),
        ((0.7, 0.6), "Not safe: ial is behind single-task at 0 and 100 % wrong labels (-20.0 ± 0.0 points", 2),
        ((0.8, 0.8), "Undecided: ial is not distinguishable from single-task at any share", 3),
    ],
)
def test_the_report_says_what_the_numbers_say(accuracy, verdict, sentence):
    report = made_up(accuracy)
    assert report.verdict.startswith(verdict)
    expected = [
        r"ial against single-task: ahead at 0 % wrong labels (+10.0 ± 0.0 points); not distinguishable at 100 %",
        r"ial against single-task: ahead at 0 % wrong labels (+10.0 ± 0.0 points); behind at 100 % wrong labels (-10.0",
        r"ial against single-task: behind at 0 and 100 % wrong labels (-10.0 ± 0.0, -20.0 ± 0.0 points).",
        r"ial against single-task: not distinguishable at 0 and 100 % wrong labels (",
    ]
    assert report.section.findings[0].startswith(expected[sentence])
    assert report.section.findings[1].startswith("equal against single-task: not distinguishable at 0 and 100 %")


def test_the_rows_are_all_seeds_of_all_methods_and_the_verdict_counts_the_rivals():
    report = made_up((0.9, 0.7))
    assert len(report.rows) == 4 * 2 * 10  # single-task, equal, ial and the tuned weight
    assert report.verdict.endswith("against equal 1/1, tuned weight 1/1.")
