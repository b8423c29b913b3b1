"""The few statistics that the reports rest on."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np


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


def delta_m(scores: np.ndarray, single: np.ndarray) -> np.ndarray:
    """Relative gain over single-task networks in percent, averaged over the tasks; higher scores are better.

    Maninis, Radosavovic, Kokkinos, "Attentive single-tasking of multiple tasks", CVPR 2019.

    Args:
      scores: `(S, T)` of a multi-task method, one row a seed.
      single: `(S, T)` of the single-task networks.

    Returns:
      `(S,)`; positive is better than single-task networks.
    """
    return 100 * np.mean((scores - single) / single, axis=1)


def expected_by_chance(comparisons: int, seeds: int) -> float:
    """How many of so many comparisons without any true difference would be `distinguishable` all the same."""
    freedom = seeds - 1
    two_sided = jax.scipy.special.betainc(freedom / 2, 0.5, freedom / (freedom + 4))  # of Student's t beyond 2
    return comparisons * float(two_sided)
