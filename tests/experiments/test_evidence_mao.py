"""What is peculiar to the experiment on MAO: its tasks, its choice of learning rates, and what it makes of numbers."""

from dataclasses import replace

from jax import numpy as jnp
import numpy as np
import pytest
from sklearn import datasets

from optax_mtl.experiments.evidence import _mao_data, mao

CONFIG = mao.Config(seeds=4, steps=2, rates=(0.1, 1.0), tasks=(2,), methods=("linear_scalarization", "edm", "mao"))


def test_answers_are_those_of_the_images():
    digits = datasets.load_digits()
    train, test = _mao_data.canvases(3, 400, 200, held="test")
    for made in (train, test):
        left, right = made.sources.T
        answers = dict(zip(_mao_data.TASKS, made.targets.T, strict=True))
        np.testing.assert_array_equal(answers["left"], digits.target[left])
        np.testing.assert_array_equal(answers["right"], digits.target[right])
        np.testing.assert_array_equal(answers["larger"], digits.target[left] > digits.target[right])
        np.testing.assert_array_equal(answers["parity"], (digits.target[left] + digits.target[right]) % 2)
        np.testing.assert_array_equal(answers["loop"], np.isin(digits.target[left], [0, 6, 8, 9]))
        # Regressions are up to the training canvases' mean and deviation.
        np.testing.assert_allclose(np.corrcoef(answers["sum"], digits.target[left] + digits.target[right])[0, 1], 1)
        np.testing.assert_allclose(np.corrcoef(answers["ink"], digits.images[left].sum(axis=(1, 2)))[0, 1], 1)
    regressed = train.targets[:, [3, 5, 7]]
    np.testing.assert_allclose(regressed.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(regressed.std(axis=0), 1, rtol=1e-5)


def test_a_centre_of_gravity_is_a_column():
    images = np.zeros((2, 8, 8), np.float32)
    images[0, 3, 5] = images[1, 2, 1] = images[1, 7, 2] = 0.5
    answers = _mao_data._answers(images, np.array([0, 1]), np.array([[1, 0], [0, 1]]))
    np.testing.assert_allclose(answers[:, 7], [5, 1.5])


def test_test_images_are_never_trained_or_validated_on():
    seen, tested = set(), set()
    for seed in range(3):
        train, validation = _mao_data.canvases(seed, 3_000, 1_000, held="validation")
        again, test = _mao_data.canvases(seed, 3_000, 1_000, held="test")
        np.testing.assert_array_equal(train.sources, again.sources)
        assert not np.intersect1d(train.sources, validation.sources).size
        seen |= {*train.sources.flat, *validation.sources.flat}
        tested |= set(test.sources.flat)
    assert not seen & tested


def test_scores_are_shares_and_nothing_is_worse_than_zero():
    targets = jnp.array([[2.0, 1.0, 1.0, 0.5], [0.0, 3.0, 0.0, -0.5]])
    right = [3 * jnp.eye(10)[jnp.array([2, 0])], jnp.eye(10)[jnp.array([1, 1])], jnp.eye(2), targets[:, 3:]]
    np.testing.assert_allclose(_mao_data.scores(right, targets), [1, 0.5, 0, 1])
    for far in (-targets[:, 3:], jnp.full((2, 1), jnp.nan)):
        assert _mao_data.scores([*right[:3], far], targets)[3] == 0
    losses = _mao_data.losses(right, targets)
    assert losses.shape == (4,)
    np.testing.assert_allclose(losses[2:], [np.log(1 + np.e), 0], rtol=1e-6)


def test_scales_apart_are_six_orders_dealt_out_by_lot():
    np.testing.assert_array_equal(mao.scales("equal", 4, 0), np.ones(4))
    lots = np.array([mao.scales("apart", 4, seed) for seed in range(20)])
    np.testing.assert_allclose(np.sort(lots, axis=1), np.broadcast_to([1e-3, 1e-1, 1e1, 1e3], (20, 4)))
    assert len(np.unique(lots.argmax(axis=1))) == 4
    np.testing.assert_array_equal(lots[7], mao.scales("apart", 4, 7))


def test_effective_tasks_are_counted():
    shares = [[1, 0, 0], [0.2, 0.2, 0.2], [0.1, -0.5, 0.1], [0, 0, 0], [np.nan, np.nan, np.nan]]
    np.testing.assert_allclose(mao.effective_tasks(np.array(shares)), [1, 3, 2, 1, 1])


def test_the_pilots_choose_the_rates_and_the_seeds_are_judged():
    """A made-up program: scores are best at rate 1 where the second scale is large, and at 0.1 elsewhere."""
    called = []

    def program(runs):
        called.append(runs)
        fits = runs.rates == np.where(runs.scales[:, 1] > 1, 1, 0.1).astype(np.float32)
        scores = np.stack([fits, np.zeros(len(fits))], axis=1) + runs.held[:, :1]  # rows tell the seed
        return {"scores": scores}

    settings = [lambda seed: np.array([1, 0.5]), lambda seed: np.array([1, 2 + seed])]
    ticks = []
    found = mao._tuned(CONFIG, program, settings, np.full((2, 2), 0.5), ticks.append)
    pilots, seeds = called
    own = CONFIG.train_size + CONFIG.held_size
    assert sorted(set(pilots.held[:, 0] // own)) == [4, 5]  # behind the four seeds
    np.testing.assert_array_equal(found["rates"], [0.1, 1.0])
    np.testing.assert_array_equal(np.diff(found["validation"], axis=1), [[-0.5], [0.5]])
    np.testing.assert_array_equal(seeds.rates, np.repeat(np.float32([0.1, 1]), 4))
    np.testing.assert_array_equal(seeds.scales[4:, 1], [2, 3, 4, 5])
    np.testing.assert_array_equal(found["scores"][..., 0] - found["scores"][..., 1], np.ones((2, 4)))
    np.testing.assert_array_equal(found["scores"][0, :, 1] // own, np.arange(4))
    assert ticks == [1, 1]
    assert len(pilots.rates) == len(seeds.rates)  # so that one program does for both


def test_all_numbers_of_tasks_begin_with_the_same_trunk():
    few, many = (mao._first_params(CONFIG, n)["trunk"]["layers"][0]["kernel"] for n in (2, 3))
    np.testing.assert_array_equal(few, many)
    assert not np.array_equal(few[0], few[1])


def made_up(gains, evenness):
    """Results: `gains` and `evenness` of each method at equal scales and apart, with a little noise."""
    noise = np.array([0.01, -0.01, 0.02, -0.02])
    results = {"alone": {"scores": np.full((4, 2), 0.5)}}
    for i, method in enumerate(CONFIG.methods):
        scores = 0.5 * (1 + (np.array(gains[method])[:, None, None] + np.roll(noise, i)[:, None]) / 100)
        shares = np.array(evenness[method])[:, None, None, None, None] * np.array([0.0, 1.0]) + [1.0, 0.0]
        shares = np.broadcast_to(shares, (2, 4, CONFIG.records, CONFIG.depth, 2)) + 1e-4 * noise[:, None, None, None]
        scores = np.broadcast_to(scores, (2, 4, 2))
        results[f"2 tasks: {method}"] = {"rates": np.array([0.1, 1.0]), "scores": scores, "shares": shares}
    return results


def test_the_report_says_who_is_ahead_and_whose_steps_are_even():
    gains = {"linear_scalarization": (5, -20), "edm": (3.0, 3.0), "mao": (3.0, 3.0)}
    even = {"linear_scalarization": (1, 0), "edm": (1, 1), "mao": (1, 1)}
    report = mao.report(CONFIG, made_up(gains, even))
    text = "\n".join(report.section.findings)
    assert "Δm, 2 tasks, losses as they are: mao is behind linear_scalarization -2.0 ± 0.0 (p < 0.001); not" in text
    assert "Δm, 2 tasks, losses six orders apart: mao is ahead of linear_scalarization +23.0 ± 0.0" in text
    assert "do to Δm, 2 tasks: lose linear_scalarization -25.0" in text
    assert "with linear_scalarization 1.0 to 1.0 over the layers (first 1.0, last 1.0)" in text
    assert "with mao 2.0 to 2.0" in text
    assert report.verdict.startswith(
        "With 2 losses six orders apart, mao's steps are made for 2.0 tasks (equal weights: 1.0)"
    )
    assert "there, it is ahead of 1 of them, behind 0, level with 1" in report.verdict
    assert "with the losses as they are, it is ahead of 0 of them, behind 1, level with 1" in report.verdict
    assert len(report.rows) == 4 + 3 * 2 * 4
    row = next(r for r in report.rows if (r["method"], r["scales"], r["seed"]) == ("linear_scalarization", "apart", 0))
    assert row["delta_m"] == pytest.approx(-20 + 0.01)
    assert row["learning_rate"] == 1.0


def test_the_report_says_it_when_mao_is_worse():
    gains = {"linear_scalarization": (1, 1), "edm": (2, 2), "mao": (-5, -5)}
    even = {"linear_scalarization": (1, 1), "edm": (1, 1), "mao": (0.1, 0.1)}
    report = mao.report(CONFIG, made_up(gains, even))
    assert "more even than those of 0 of 2 per-task methods, less even than those of 2" in report.verdict
    assert "there, it is ahead of 0 of them, behind 2, level with 0" in report.verdict
    assert "mao is behind linear_scalarization -6.0" in "\n".join(report.section.findings)


def test_so_many_pilots_that_one_program_does_for_both():
    assert mao.Config().seeds == mao.Config().pilots * len(mao.Config().rates)
    assert replace(CONFIG, seeds=5).pilots == 3
