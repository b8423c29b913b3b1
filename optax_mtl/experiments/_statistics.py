"""The few statistics that the reports rest on."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import special


class Estimate(NamedTuple):
    """A mean over seeds and its standard error (not a number for a single seed)."""

    mean: float
    error: float

    def text(self, digits: int = 1, sign: bool = False) -> str:
        """Such as `93.1 ± 0.2`."""
        error = "" if np.isnan(self.error) else f" ± {self.error:.{digits}f}"
        return f"{self.mean:{'+' if sign else ''}.{digits}f}{error}"


def estimate(values: Sequence[float] | np.ndarray) -> Estimate:
    """Mean and standard error of one number a seed."""
    values = np.asarray(values, float)
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
    return Estimate(float(values.mean()), float(error))


def distinguishable(difference: Estimate) -> bool:
    """Whether a difference is larger than two of its standard errors."""
    return abs(difference.mean) > 2 * difference.error


def delta_m(scores: np.ndarray, single: np.ndarray, more_is_better: np.ndarray | bool = True) -> np.ndarray:
    """Relative gain over single-task networks in percent, averaged over the tasks or their metrics.

    Maninis, Radosavovic, Kokkinos, "Attentive single-tasking of multiple tasks", CVPR 2019.

    Args:
      scores: `(S, T)` of a multi-task method, one row a seed.
      single: `(S, T)` of the single-task networks.
      more_is_better: whether a higher score is the better one, of all or of each.

    Returns:
      `(S,)`; positive is better than single-task networks.
    """
    return 100 * np.mean(np.where(more_is_better, 1, -1) * (scores - single) / single, axis=1)


class Comparison(NamedTuple):
    """A mean difference, seed by seed, and how probable one as large is by luck."""

    difference: Estimate
    p: float

    def text(self, digits: int = 1) -> str:
        """Such as `+1.2 ± 0.3 (p = 0.004)`."""
        p = "p < 0.001" if self.p < 0.001 else f"p = {self.p:.2g}"
        return f"{self.difference.text(digits, sign=True)} ({p})"


def paired(values: np.ndarray, others: np.ndarray) -> Comparison:
    """The two-sided t-test of Student for pairs: each seed against itself.

    Args:
      values: `(S,)`, one number a seed.
      others: `(S,)`, of the same seeds.

    Returns:
      A `Comparison` of `values - others`.
    """
    difference = estimate(np.asarray(values, float) - others)
    if np.isnan(difference.error):  # one seed says nothing
        p = 1.0
    elif difference.error > 0:
        p = _two_sided(difference.mean / difference.error, len(values) - 1)
    else:  # all seeds differ by the same
        p = float(difference.mean == 0)
    return Comparison(difference, p)


def holm(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The same with p raised for their number, so that all claims together fail by luck with that probability only.

    Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6, 1979.
    """
    order = np.argsort([c.p for c in comparisons], kind="stable")
    raised = np.array([c.p for c in comparisons])
    raised[order] = np.maximum.accumulate(np.minimum(1, raised[order] * np.arange(len(order), 0, -1)))
    return [c._replace(p=float(p)) for c, p in zip(comparisons, raised, strict=True)]


def significant(comparison: Comparison) -> bool:
    """Whether luck is less probable than one in twenty."""
    return comparison.p < 0.05


def expected_by_chance(comparisons: int, seeds: int) -> float:
    """How many of so many comparisons without any true difference would be `distinguishable` all the same."""
    return comparisons * _two_sided(2, seeds - 1)


def _two_sided(t: float, freedom: int) -> float:
    """How probable it is that Student's t with so many degrees of freedom is beyond `t`, on either side."""
    return float(special.betainc(freedom / 2, 0.5, freedom / (freedom + t**2)))
