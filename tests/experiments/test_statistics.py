import numpy as np
import pytest

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
