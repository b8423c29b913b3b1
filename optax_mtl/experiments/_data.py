"""MultiDigits: two overlapping handwritten digits on one canvas.

The MultiMNIST construction (Sabour, Frosst, Hinton, "Dynamic routing between capsules", NeurIPS 2017) as Sener and
Koltun ("Multi-task learning as multi-objective optimization", NeurIPS 2018) use it: one digit in the upper left
corner, another shifted right and down, the brighter of the two at every pixel. The digits are the 1,797 images of 8 x 8
pixels that come with scikit-learn, so that nothing has to be downloaded.
"""

from typing import NamedTuple

import numpy as np
from sklearn import datasets

TASKS = {"left": 10, "right": 10, "parity": 2}  # task: number of classes
SHIFT = 2  # pixels of 8, about the 6 of 28 in MultiMNIST
SIDE = 8 + SHIFT  # of the canvas


class Split(NamedTuple):
    """Canvases made from one set of source images.

    Attributes:
      images: `(N, SIDE**2)` float32 in [0, 1].
      labels: `(N, 3)` int32: left digit, right digit, parity of their sum.
      sources: `(N, 2)` int32, which source images were left and right.
    """

    images: np.ndarray
    labels: np.ndarray
    sources: np.ndarray


class MultiDigits(NamedTuple):
    """Train and test canvases; no source image is in both."""

    train: Split
    test: Split


def multi_digits(seed: int, train_size: int = 10_000, test_size: int = 2_000) -> MultiDigits:
    """Builds MultiDigits, the same for the same seed.

    A third of the source images is set aside for the test canvases *before* any canvas is made, so that a test digit
    was never seen in training, in whatever company.

    Args:
      seed: decides the split of the source images and the pairs.
      train_size: number of training canvases.
      test_size: number of test canvases.

    Returns:
      A `MultiDigits`.
    """
    digits = datasets.load_digits()
    images = (digits.images / 16).astype(np.float32)  # (1797, 8, 8)
    rng = np.random.default_rng(seed)
    train, test = np.split(rng.permutation(len(images)), [2 * len(images) // 3])
    return MultiDigits(
        train=compose(images, digits.target, rng.choice(train, (train_size, 2))),
        test=compose(images, digits.target, rng.choice(test, (test_size, 2))),
    )


def compose(images: np.ndarray, digits: np.ndarray, sources: np.ndarray) -> Split:
    """Canvases of the pairs `sources` `(N, 2)` of `images`, and their labels."""
    left, right = sources.T
    canvas = np.zeros((len(sources), SIDE, SIDE), np.float32)
    canvas[:, :-SHIFT, :-SHIFT] = images[left]
    canvas[:, SHIFT:, SHIFT:] = np.maximum(canvas[:, SHIFT:, SHIFT:], images[right])
    labels = np.stack([digits[left], digits[right], (digits[left] + digits[right]) % 2], axis=1)
    return Split(canvas.reshape(-1, SIDE**2), labels.astype(np.int32), sources.astype(np.int32))


def epochs(seed: int, size: int, batch_size: int, steps: int) -> np.ndarray:
    """Order of the training examples: every epoch a new permutation, an incomplete last batch is left out.

    Returns:
      `(steps, batch_size)` int32, indices into the training set.
    """
    rng = np.random.default_rng([seed, 1])  # apart from the stream that makes the data
    per_epoch = size // batch_size
    orders = [rng.permutation(size)[: per_epoch * batch_size] for _ in range(-(-steps // per_epoch))]
    return np.concatenate(orders).reshape(-1, batch_size)[:steps].astype(np.int32)
