"""Synthetic auxiliary tasks whose relevance to the main task is known and drifts during training.

The main task is a sum of squashed projections of the input, seen through noise. An auxiliary target has no noise and
one unit of variance; a share of it, the *relevance*, comes from the projections that the main task needs, the rest from
projections of its own. The trunk is too narrow for all projections, so that an irrelevant auxiliary task takes room.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
from jax import numpy as jnp
import numpy as np

STEEPNESS = 2.0  # of the squashing


class Drift(NamedTuple):
    """Relevance of each auxiliary task in the first step and in the last; half a wave of the cosine joins the two.

    Attributes:
      start: one number in [0, 1] for each auxiliary task.
      end: likewise.
      text: what that is, in words.
    """

    start: tuple[float, float]
    end: tuple[float, float]
    text: str


SETTINGS: Mapping[str, Drift] = {
    "rotating": Drift((1, 0), (0, 1), "what the main task needs moves from the first auxiliary task to the second"),
    "fading": Drift((1, 0), (0, 0), "the first auxiliary task is relevant at first and irrelevant in the end"),
    "steady": Drift((1, 0), (1, 0), "the first auxiliary task is relevant throughout: no drift, the control"),
    "irrelevant": Drift((0, 0), (0, 0), "neither auxiliary task is ever relevant"),
}
AUXILIARIES = 2


def relevance(start: jax.Array, end: jax.Array, progress: jax.Array) -> jax.Array:
    """`(A,)` at `progress` in [0, 1] of the training."""
    return start + (end - start) * (1 - jnp.cos(jnp.pi * progress)) / 2


class Examples(NamedTuple):
    """Examples of one seed.

    Attributes:
      inputs: `(N, features)`.
      main: `(N,)`, the main task's target, one unit of variance and no noise.
      shared: `(A, N)`, what each auxiliary target is at relevance 1; of unit variance, like the next.
      own: `(A, N)`, what it is at relevance 0.
      noise: `(N,)`, to be added to `main` where labels are noisy.
    """

    inputs: np.ndarray
    main: np.ndarray
    shared: np.ndarray
    own: np.ndarray
    noise: np.ndarray


def examples(
    seed: int, sizes: Mapping[str, int], *, features: int, directions: int, noise: float
) -> dict[str, Examples]:
    """Several sets of examples of the same tasks, by name; the same for the same seed.

    Args:
      seed: of the tasks and of the examples.
      sizes: number of examples in each set.
      features: length of an input.
      directions: projections in the main task, and in what is each auxiliary task's own.
      noise: its standard deviation.

    Returns:
      The sets.
    """
    rng = np.random.default_rng([seed, 7])
    basis, _ = np.linalg.qr(rng.normal(size=(features, features)))
    groups = basis[:, : (1 + AUXILIARIES) * directions].reshape(features, 1 + AUXILIARIES, directions)
    coefficients = rng.normal(size=(1 + 2 * AUXILIARIES, directions))  # main, shared, own
    coefficients /= np.linalg.norm(coefficients, axis=1, keepdims=True)

    def made(size: int) -> Examples:
        x = rng.normal(size=(size, features))
        squashed = np.tanh(STEEPNESS * np.einsum("nf,fgd->gnd", x, groups)) / _scale()
        shared = np.einsum("nd,kd->kn", squashed[0], coefficients[: 1 + AUXILIARIES])
        own = np.einsum("knd,kd->kn", squashed[1:], coefficients[1 + AUXILIARIES :])
        arrays = (x, shared[0], shared[1:], own, noise * rng.normal(size=size))
        return Examples(*(a.astype(np.float32) for a in arrays))

    return {name: made(size) for name, size in sizes.items()}


def _scale() -> float:
    """The standard deviation of a squashed projection."""
    points, weights = np.polynomial.hermite_e.hermegauss(101)
    return float(np.sqrt(weights @ np.tanh(STEEPNESS * points) ** 2 / weights.sum()))
