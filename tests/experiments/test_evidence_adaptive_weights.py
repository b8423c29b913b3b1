"""Weights in proportion to the losses: data, the short cut of training, and what is said of the results."""

import dataclasses

import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats
from sklearn import datasets

from optax_mtl.experiments import _data, _registry
from optax_mtl.experiments.evidence import _text, adaptive_weights

PROPORTIONAL, SOURCES = adaptive_weights.PROPORTIONAL, adaptive_weights.SOURCES
SIZES = (400, 200, 200)
pytestmark = pytest.mark.usefixtures("promotion")


@pytest.fixture(scope="module")
def windows():
    return _text.windows(0, SIZES)


def test_no_word_of_the_text_is_in_two_splits(windows):
    covered = [np.unique(split.places[:, None] + np.arange(_text.WINDOW)) for split in windows]
    for i in range(3):
        for other in covered[i + 1 :]:
            assert not np.intersect1d(covered[i], other).size


def test_labels_of_the_text_are_those_of_its_places(windows):
    lengths = np.array([len(_text.read(name)) for name in _text.FILES])
    starts = np.cumsum(lengths) - lengths
    for split in windows:
        kind, shuffled, quarter, file = split.labels.T
        np.testing.assert_array_equal(file, np.searchsorted(starts, split.places, side="right") - 1)
        np.testing.assert_array_equal(kind == 1, np.isin(np.array(_text.FILES)[file], _text.CODE))
        np.testing.assert_array_equal(quarter, np.floor(4 * (split.places - starts[file]) / lengths[file]))
        assert 0.4 < shuffled.mean() < 0.6


def test_shuffled_windows_keep_their_words_and_lose_their_pairs(windows):
    words, _ = _text._hashed_files()
    split, in_order = windows[0], words[windows[0].places[:, None] + np.arange(_text.WINDOW)]
    counts, shuffled = _text._counts(in_order), split.labels[:, 1] == 1
    number = _text.BUCKETS[0]
    np.testing.assert_array_equal(split.counts[~shuffled], counts[~shuffled])
    np.testing.assert_array_equal(split.counts[:, :number], counts[:, :number])
    kept = np.minimum(split.counts, counts)[shuffled, number:].sum(axis=1) / (_text.WINDOW - 1)
    assert kept.mean() < 0.3


def test_pages_of_the_text_do_not_repeat_each_other():
    def runs(name):
        words = _text.read(name)
        return {tuple(words[i : i + 8]) for i in range(len(words) - 7)}

    found = [runs(name) for name in _text.PROSE]
    for i, one in enumerate(found):
        for other in found[i + 1 :]:
            assert len(one & other) < 0.05 * min(len(one), len(other))


def test_a_library_without_sources_is_refused(monkeypatch):
    monkeypatch.setattr(_text.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"'pickle'.* needs a Python whose library is installed as \.py files"):
        _text.read("pickle")


def test_images_are_split_before_they_are_combined(monkeypatch):
    sources = []

    def compose(images, digits, pairs, compose=_data.compose):
        sources.append(pairs)
        return compose(images, digits, pairs)

    monkeypatch.setattr(_data, "compose", compose)
    splits = SOURCES["images"].splits(0, SIZES)
    for i in range(3):
        for other in sources[i + 1 :]:
            assert not np.intersect1d(sources[i], other).size
    digits = datasets.load_digits().target
    for split, pairs in zip(splits, sources, strict=True):
        left, right, total, parity, larger = split.labels.T
        np.testing.assert_array_equal([left, right], digits[pairs].T)
        np.testing.assert_array_equal(total, left + right)
        np.testing.assert_array_equal(parity, total % 2)
        np.testing.assert_array_equal(larger, left > right)


@pytest.mark.parametrize("method", adaptive_weights.METHODS)
def test_the_weights_are_those_that_the_gradients_would_get(method):
    classes = [10, 2, 4]
    setting = _registry.Setting(3, 0.0, optax.identity(), jax.random.key(3), steps_per_epoch=1, form="classification")
    tx = optax.with_extra_args_support(adaptive_weights.METHODS[method](setting, classes))
    params = {"w": jnp.zeros((2, 5))}
    state, short = tx.init(params), tx.init(jnp.zeros(1))
    rng = np.random.default_rng(0)
    for _ in range(4):
        grads = {"w": jnp.array(rng.normal(size=(3, 2, 5)), jnp.float32)}
        losses = jnp.array(rng.uniform(0.1, 3, 3), jnp.float32)
        updates, state = tx.update(grads, state, params, losses=losses)
        weights, short = adaptive_weights.task_weights(tx, short, losses)
        np.testing.assert_allclose(updates["w"], jnp.tensordot(weights, grads["w"], 1), rtol=1e-5, atol=1e-6)


def test_rank_correlation_is_spearmans():
    rng = np.random.default_rng(0)
    for _ in range(20):
        x, y = rng.integers(4, size=(2, 6))
        if np.ptp(x) and np.ptp(y):
            assert adaptive_weights.rank_correlation(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert np.isnan(adaptive_weights.rank_correlation(np.ones(3), np.arange(3)))


CONFIG = dataclasses.replace(adaptive_weights.QUICK, seeds=6)


def made_up(gain, follows):
    """Results in which the method on trial scores `gain` better, and its weights follow the errors with that sign.

    At the second learning rate all is ten points better in the test, and worse in validation.
    """
    rng = np.random.default_rng(0)
    results = {}
    for name, source in SOURCES.items():
        number = len(source.tasks)
        order = np.arange(number)
        score = 0.7 - 0.05 * order + rng.normal(scale=0.002, size=(CONFIG.seeds, number))
        for method in (None, *CONFIG.methods):
            shape = (number if method is None else 2, 2, CONFIG.seeds, number)
            scores = np.broadcast_to(score + (gain if method == PROPORTIONAL else 0), shape).copy()
            scores += rng.normal(scale=0.002, size=shape)
            test = scores + np.array([0, 0.1])[:, None, None]
            validation = scores - np.array([0, 0.1])[:, None, None]
            weights = 1 + (0.1 * follows * order if method == PROPORTIONAL else 0 * order)
            weights = weights + rng.normal(scale=0.01, size=(*shape[:3], CONFIG.records, number))
            weights = weights / weights.sum(-1, keepdims=True)
            losses = np.broadcast_to(1 + order, weights.shape) + rng.normal(scale=0.01, size=weights.shape)
            results[f"{name}: {method or 'alone'}"] = {
                "losses": losses,
                "weights": weights,
                "validation": validation,
                "test": test,
            }
    return results


@pytest.mark.parametrize(
    ("gain", "follows", "says", "counts"),
    [
        (0.05, 1, "ahead of equal", (2, 0)),
        (-0.05, -1, "behind equal", (0, 2)),
        (0, 0, "not distinguishable from equal", (0, 0)),
    ],
)
def test_the_report_says_what_the_numbers_say(gain, follows, says, counts):
    made = adaptive_weights.report(CONFIG, made_up(gain, follows))
    findings = " ".join(made.section.findings)
    for name in SOURCES:
        assert f"{PROPORTIONAL}, {name}, Δm: {says}." in findings
    ahead, behind = counts
    for words in ("on Δm", "on the hardest task"):
        assert f"{words} {ahead} of 2 comparisons ahead, {behind} behind" in made.verdict
    word = {1: "positive", -1: "negative", 0: "not distinguishable from none"}[follows]
    for name in SOURCES:
        assert f"on {name} {word} with the error" in made.verdict
    assert "\n" not in made.verdict
    assert (
        "in 0 of 2 cases, more than with equal weights in 0." in made.verdict
    )  # the loss in another unit changes nothing here
    assert findings.count(f"costs {PROPORTIONAL} and equal weights amounts that are not distinguishable") == 2


def test_the_learning_rate_is_chosen_by_validation():
    rows = adaptive_weights.report(CONFIG, made_up(0.05, 1)).rows
    assert {row["rate"] for row in rows} == {f"{CONFIG.learning_rates[0]:g}", "nan"}
    easiest = [row["accuracy"] for row in rows if row["method"] == "alone" and row["task"] == "left"]
    assert np.mean(easiest) == pytest.approx(70, abs=1)


def test_a_report_without_rivals_makes_no_comparison():
    config = dataclasses.replace(CONFIG, methods=(PROPORTIONAL,))
    made = adaptive_weights.report(config, made_up(0.05, 1))
    assert "on Δm 0 of 0 comparisons ahead" in made.verdict
    assert not any("ahead of" in finding or "equal weights" in finding for finding in made.section.findings)
