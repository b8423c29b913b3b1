"""Two overlapping digits and up to eight questions about them, some classified, some regressed."""

from typing import NamedTuple

import jax
from jax import numpy as jnp
import numpy as np
import optax
from sklearn import datasets

from optax_mtl.experiments import _data

TASKS = {  # task: outputs of its head, one for a regression
    "left": 10,  # digit
    "right": 10,  # digit
    "larger": 2,  # is the left digit the larger one?
    "sum": 1,  # of the digits
    "parity": 2,  # of their sum
    "ink": 1,  # of the left digit's image, its mean
    "loop": 2,  # is the left digit one with a closed loop: 0, 6, 8, 9?
    "column": 1,  # of the right digit's centre of gravity, in its image
}
NAMES = tuple(TASKS)
FORMS = tuple("regression" if outputs == 1 else "classification" for outputs in TASKS.values())
_LOOPS = (0, 6, 8, 9)


class Canvases(NamedTuple):
    """Canvases, what is asked of them, and what they were made of.

    Attributes:
      images: `(N, _data.SIDE**2)` float32.
      targets: `(N, 8)` float32, in the order of `TASKS`: classes, or numbers with mean 0 and variance 1 in training.
      sources: `(N, 2)` which images are left and right.
    """

    images: np.ndarray
    targets: np.ndarray
    sources: np.ndarray


def canvases(seed: int, train_size: int, held_size: int, *, held: str) -> tuple[Canvases, Canvases]:
    """Training canvases, and others to be judged by; no image is in both.

    The images are split before any canvas is made: a third is for tests, the same third for all seeds, so that what is
    chosen by validation on some seeds has not seen the tests of others. Of the rest, every seed takes another quarter
    for validation, and trains on what remains, whichever of the two it is judged by.

    Args:
      seed: decides pairs and validation images.
      train_size: number of training canvases.
      held_size: number of the others.
      held: `"validation"` or `"test"`: what the others are made of.

    Returns:
      Training canvases and the others.
    """
    digits = datasets.load_digits()
    images = (digits.images / 16).astype(np.float32)
    rest, test = np.split(np.random.default_rng(0).permutation(len(images)), [2 * len(images) // 3])
    rng = np.random.default_rng([seed, 2])
    train, validation = np.split(rng.permutation(rest), [3 * len(rest) // 4])
    pools = {"validation": validation, "test": test}
    made = [
        _data.compose(images, digits.target, rng.choice(pool, (size, 2)))
        for pool, size in ((train, train_size), (pools[held], held_size))
    ]
    answers = [_answers(images, digits.target, split.sources) for split in made]
    regressed = np.array(FORMS) == "regression"
    mean = np.where(regressed, answers[0].mean(axis=0), 0)
    deviation = np.where(regressed, answers[0].std(axis=0), 1)
    first, second = (
        Canvases(split.images, ((table - mean) / deviation).astype(np.float32), split.sources)
        for split, table in zip(made, answers, strict=True)
    )
    return first, second


def _answers(images: np.ndarray, digits: np.ndarray, sources: np.ndarray) -> np.ndarray:
    """`(N, 8)`, before any number is standardised."""
    left, right = digits[sources.T]
    ink = images.mean(axis=(1, 2))
    column = images.sum(axis=1) @ np.arange(images.shape[2]) / images.sum(axis=(1, 2))
    answers = {
        "left": left,
        "right": right,
        "larger": left > right,
        "sum": left + right,
        "parity": (left + right) % 2,
        "ink": ink[sources[:, 0]],
        "loop": np.isin(left, _LOOPS),
        "column": column[sources[:, 1]],
    }
    return np.stack([answers[task] for task in TASKS], axis=1).astype(float)


def losses(outputs: list[jax.Array], targets: jax.Array) -> jax.Array:
    """Mean cross-entropies and mean squared errors `(T,)` of the first `T` tasks."""
    return jnp.stack([_loss(out, targets[:, task]) for task, out in enumerate(outputs)])


def _loss(out: jax.Array, target: jax.Array) -> jax.Array:
    if out.shape[1] == 1:
        return jnp.mean(jnp.square(out[:, 0] - target))
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(out, target.astype(jnp.int32)))


def scores(outputs: list[jax.Array], targets: jax.Array) -> jax.Array:
    """`(T,)`: the share of right answers, or the share of the variance that is explained (0 for less than none)."""
    return jnp.stack([_score(out, targets[:, task]) for task, out in enumerate(outputs)])


def _score(out: jax.Array, target: jax.Array) -> jax.Array:
    if out.shape[1] == 1:
        explained = 1 - jnp.mean(jnp.square(out[:, 0] - target)) / jnp.var(target)
        return jnp.where(explained > 0, explained, 0)  # of what is not a number, too
    return jnp.mean(jnp.argmax(out, axis=1) == target.astype(jnp.int32), dtype=out.dtype)
