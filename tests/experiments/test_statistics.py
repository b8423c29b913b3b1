import numpy as np
import pytest
from scipy import stats

from optax_mtl.experiments import _statistics


def test_delta_m_is_the_mean_relative_gain():
    gains = _statistics.delta_m(np.array([[0.9, 0.4]]), np.array([[0.8, 0.5]]))
    np.testing.assert_allclose(gains, [100 * (0.125 - 0.2) / 2])


def test_estimate_is_mean_and_standard_error():
    assert _statistics.estimate([1.0, 2.0, 3.0]) == pytest.approx((2, 1 / np.sqrt(3)))
    assert _statistics.estimate([1.0, 2.0, 3.0]).text(2, sign=True) == "+2.00 ± 0.58"
    assert _statistics.estimate([1.0]).text() == "1.0"


def test_a_difference_counts_from_two_standard_errors_on():
    assert _statistics.distinguishable(_statistics.Estimate(-2.1, 1))
    assert not _statistics.distinguishable(_statistics.Estimate(1.9, 1))
    assert not _statistics.distinguishable(_statistics.estimate([5.0]))  # one seed says nothing


def test_luck_follows_students_distribution():
    # Two-sided tail beyond 2 with seven degrees of freedom: 0.0856.
    assert _statistics.expected_by_chance(10, seeds=8) == pytest.approx(0.856, abs=1e-3)


def test_a_paired_test_is_that_of_scipy():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 9))
    found = _statistics.paired(a, b)
    assert found.p == pytest.approx(stats.ttest_rel(a, b).pvalue)
    assert found.difference.mean == pytest.approx(np.mean(a - b))
    assert _statistics.paired(a, a).p == 1
    assert _statistics.paired(np.ones(3), np.zeros(3)).p == 0  # no seed differs from another
    assert _statistics.paired(np.ones(1), np.zeros(1)).p == 1  # one seed says nothing
    assert _statistics.Comparison(_statistics.Estimate(1.25, 0.1), 0.0004).text() == "+1.2 ± 0.1 (p < 0.001)"


def test_holm_raises_p_for_the_number_of_comparisons():
    def comparison(p):
        return _statistics.Comparison(_statistics.Estimate(1, 1), p)

    raised = _statistics.holm([comparison(p) for p in (0.04, 0.01, 0.03, 0.9)])
    np.testing.assert_allclose([c.p for c in raised], [0.09, 0.04, 0.09, 0.9])  # the second not under the first
    assert [_statistics.significant(c) for c in raised] == [False, True, False, False]
