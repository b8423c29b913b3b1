"""A trunk that all tasks share, and one linear head a task."""

from collections.abc import Mapping
import itertools

from flax import nnx
import jax
from jax import numpy as jnp
import optax


class TrunkAndHeads(nnx.Module):
    """A multi-layer perceptron as the trunk, one linear head a task.

    Args:
      features: length of an input.
      width: units in each hidden layer.
      classes: number of classes of each task, by name.
      depth: number of hidden layers.
      rngs: random streams for the initial weights.
    """

    def __init__(self, features: int, width: int, classes: Mapping[str, int], depth: int = 2, *, rngs: nnx.Rngs):
        sizes = [features] + [width] * depth
        layers = [nnx.Linear(i, o, rngs=rngs) for i, o in itertools.pairwise(sizes)]
        self.trunk = nnx.Sequential(*(part for layer in layers for part in (layer, nnx.relu)))
        self.heads = nnx.Module()
        for name, number in classes.items():
            setattr(self.heads, name, nnx.Linear(width, number, rngs=rngs))
        self.tasks = tuple(classes)  # the order of the tasks, which a tree of parameters does not keep

    def __call__(self, images: jax.Array) -> list[jax.Array]:
        """Logits `(B, classes)` of each task, for images `(B, features)`."""
        hidden = self.trunk(images)
        return [getattr(self.heads, task)(hidden) for task in self.tasks]


def cross_entropies(logits: list[jax.Array], labels: jax.Array) -> jax.Array:
    """Mean cross-entropy of each task, `(T,)`, for labels `(B, T)`."""
    losses = [
        optax.softmax_cross_entropy_with_integer_labels(task_logits, labels[:, task]).mean()
        for task, task_logits in enumerate(logits)
    ]
    return jnp.stack(losses)


def accuracies(logits: list[jax.Array], labels: jax.Array) -> jax.Array:
    """Share of right answers of each task, `(T,)`, for labels `(B, T)`."""
    hits = [jnp.mean(jnp.argmax(task_logits, axis=-1) == labels[:, task]) for task, task_logits in enumerate(logits)]
    return jnp.stack(hits)
