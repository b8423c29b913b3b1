import numpy as np
import pytest

from optax_mtl.experiments import _statistics
from optax_mtl.experiments.evidence import cdtt

pytestmark = pytest.mark.usefixtures("promotion")


def test_no_photograph_is_in_two_parts():
    parts = [set(rows // 4) for rows in cdtt.split(0)]
    assert [len(part) for part in parts] == [1_000, 297, 500]
    assert sum(len(part) for part in parts) == len(set.union(*parts)) == 1_797
    assert (cdtt.split(0)[0] != cdtt.split(1)[0]).any()


def test_digits_are_turned_by_what_the_labels_say():
    turned = cdtt.turned_digits()
    assert len(turned.images) == 4 * 1_797
    assert np.abs(turned.turns).max() * 52 <= 90
    assert np.std(turned.turns) == pytest.approx(1, abs=0.01)
    assert (turned.digits.reshape(-1, 4) == turned.digits[::4, None]).all()
    # A zero is about as wide turned by any angle, a one is not.
    ones = turned.images[turned.digits == 1].reshape(-1, 8, 8)
    lying = np.abs(turned.turns[turned.digits == 1]) * 52 > 70
    tall = ones.sum(axis=2).std(axis=1) < ones.sum(axis=1).std(axis=1)  # more even from top to bottom than sideways
    assert tall[~lying].mean() > tall[lying].mean() + 0.5


def test_units_and_rates_share_seeds():
    config = cdtt.Config(seeds=2, steps=20)
    problem = cdtt.make_problem(config, times=3)
    assert problem.batches.shape == (12, 20, 1, 64)
    np.testing.assert_array_equal(problem.batches[:2], problem.batches[-2:])
    np.testing.assert_array_equal(problem.data["unit"], [52.0**2] * 6 + [1.0] * 6)
    kernel = problem.params["trunk"][0]["kernel"]
    np.testing.assert_array_equal(kernel[0], kernel[2])
    assert (kernel[0] != kernel[1]).any()


def test_the_central_direction_is_blind_to_units_and_the_tensioner_is_not():
    config = cdtt.Config(seeds=2, steps=40, learning_rates=(3e-3,), methods=("edm", "cdtt"))
    cells = {cell.name: cell for cell in cdtt.cells(config)}
    scores = {m: cells[f"digit and turn: {m}"].run(lambda ticks: None)["scores"] for m in ("edm", "cdtt")}
    assert scores["edm"].shape == (2, 1, 1, 2, 2, 2)
    assert scores["cdtt"].shape == (2, 2, 1, 2, 2, 2)
    np.testing.assert_allclose(scores["edm"][0], scores["edm"][1], atol=0.02)
    assert np.abs(scores["cdtt"][0] - scores["cdtt"][1]).max() > 0.03


def test_without_tension_two_tasks_are_at_the_central_direction(monkeypatch):
    monkeypatch.setattr(cdtt, "_alphas", lambda num_tasks: (0.0, 1.0))
    config = cdtt.Config(gate_seeds=20, epochs=300, methods=("edm", "cdtt"))
    cells = {cell.name: cell for cell in cdtt.cells(config)}
    edm, tensed = (cells[f"two gates: {m}"].run(lambda ticks: None)["epochs"] for m in config.methods)
    assert edm.shape == (1, 20)
    assert tensed.shape == (2, 20)
    assert np.isfinite(edm).sum() > 2
    same = edm[0] == tensed[0]
    assert same.mean() >= 0.8  # rounding may move an epoch
    assert (tensed[1] != tensed[0]).any()


def outcomes(**epochs):
    """Epochs of two sets of gates, the same for both, with a method's name for `cdtt` and `a`."""
    values = {m.replace("cdtt", "cdtt "): np.asarray(e, float) for m, e in epochs.items()}
    return {setting: {m.replace("cdtt 03", "cdtt 0.3"): e for m, e in values.items()} for setting in cdtt.GATES}


def scored(**gains):
    values = {"cdtt 0.3" if m == "cdtt" else m: np.asarray(g, float) for m, g in gains.items()}
    return {unit: {m: cdtt.Scores(np.full((len(g), 2), 0.9), g, 0) for m, g in values.items()} for unit in cdtt.UNITS}


def test_sentences_for_better_worse_and_not_distinguishable():
    rng = np.random.default_rng(0)
    fast = rng.uniform(90, 110, 100)
    slow = 2 * fast
    half = np.where(np.arange(100) < 50, slow, np.inf)
    gains = rng.normal(size=12)
    epochs = outcomes(cdtt03=fast, edm=slow, equal=half)
    scores = scored(cdtt=gains, edm=gains + rng.normal(size=12), equal=gains + 3 + 0.1 * rng.normal(size=12))
    compared = cdtt.compare(epochs, scores)
    said = "\n".join(cdtt.findings(epochs, scores, compared))
    assert "0.50 times the epochs of edm (better, p < 0.001)" in said
    assert "+0.0 ± 0.0 points of seeds that learn against edm (not distinguishable, p = 1)" in said
    assert "+50.0 ± 5.0 points of seeds that learn against equal (better, p < 0.001)" in said
    assert "points of Δm against equal (worse, p < 0.001)" in said
    verdict = cdtt.verdict(compared)
    assert verdict.startswith(
        "Against edm, cdtt is better in the number of epochs (two gates, three gates), worse in nothing. "
    )
    assert "Better and worse in all: 2 and 0 of 6 against edm, 4 and 2 of 6 against equal." in verdict
    assert compared[cdtt.Pair("two gates", "learnt", "cdtt 0.3", "edm")].p == 1


def test_no_verdict_where_nothing_can_be_told():
    same = np.array([100.0, 120.0, np.inf, np.inf])
    compared = cdtt.compare(outcomes(cdtt03=same, edm=same[::-1]), scored(cdtt=[1.0, 2.0, 4.0], edm=[2.0, 1.0, 4.0]))
    assert cdtt.verdict(compared).startswith("Against edm, cdtt is better in nothing, worse in nothing. ")
    assert not [pair for pair in compared if pair.quantity == "epochs"]  # no seed learns with both
    assert not any(_statistics.significant(c) for c in compared.values())


def test_learning_rates_are_chosen_on_validation_data():
    config = cdtt.Config(seeds=3, learning_rates=(1e-3, 1e-2), methods=("edm",))
    scores = np.full((2, 1, 2, 3, 2, 2), 0.5)
    scores[:, :, 1, :, 0] = 0.6  # the second rate is better on validation data
    scores[:, :, 0, :, 1] = 0.9  # the first on test data
    alone = np.full((2, 2, 2, 3, 2, 2), 0.8)
    _, found = cdtt._scores(
        config, {"digit and turn: edm": {"scores": scores}, "digit and turn: alone": {"scores": alone}}
    )
    for of_methods in found.values():
        assert of_methods["edm"].rate == 1
        np.testing.assert_allclose(of_methods["edm"].gain, 100 * (0.5 - 0.8) / 0.8)
