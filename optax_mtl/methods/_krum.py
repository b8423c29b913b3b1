"""Krum: the gradients that are nearest to their neighbours."""

from typing import Any

import jax
from jax import numpy as jnp
import optax

from optax_mtl import _base
from optax_mtl._weighting import weighting


def krum_weights(
    gramian: jax.Array,
    *,
    n_byzantine: int | jax.Array = 0,
    n_selected: int | jax.Array = 1,
    present: jax.Array | None = None,
) -> jax.Array:
    """Equal weights for the tasks that are nearest to their neighbours. See `krum`.

    Args:
      gramian: `(T, T)`.
      n_byzantine: number of tasks that may be anything.
      n_selected: number of tasks that are averaged.
      present: `(T,)` of bool, the tasks that take part; all if None.

    Returns:
      `(T,)`, non-negative, summing to one.
    """
    num_tasks = gramian.shape[0]
    present = jnp.ones(num_tasks, bool) if present is None else present
    largest = jnp.max(jnp.diagonal(gramian), where=present, initial=0)
    gramian = gramian / jnp.where(largest > 0, largest, 1)
    squares = jnp.diagonal(gramian)
    distances = jnp.maximum(squares[:, None] + squares[None, :] - 2 * gramian, 0)
    others = jnp.outer(present, present) & ~jnp.eye(num_tasks, dtype=bool)

    # There are n - f - 2 neighbours. With fewer tasks than f + 3 there is none, no score, and every task is selected.
    neighbours = jnp.sum(present) - n_byzantine - 2
    nearest = jnp.sort(jnp.where(others, distances, jnp.inf), axis=1)
    scores = jnp.sum(jnp.where(jnp.arange(num_tasks)[None, :] < neighbours, nearest, 0), axis=1)
    ranks = jnp.argsort(jnp.argsort(jnp.where(present, scores, jnp.inf)))
    selected = present & ((ranks < n_selected) | (neighbours < 1))
    return _base.equal_weights(selected, gramian.dtype)


def krum(
    num_tasks: int, *, n_byzantine: int | jax.Array = 0, n_selected: int | jax.Array = 1
) -> optax.GradientTransformationExtraArgs:
    r"""Krum: selects the gradients that lie among the others, and leaves out those that do not.

    Of `n` tasks, of which `f` may send anything at all, each is scored by its squared distances to its `n - f - 2`
    nearest neighbours,

    .. math:: s_i = \sum_{j \to i} \lVert g_i - g_j\rVert^2,

    and the gradients of the `n_selected` lowest scores are averaged (more than one: Multi-Krum). Choose it where
    sources of gradients may be broken or hostile: workers, labellers, scrapes. The tasks should be alike: for tasks
    that differ by nature, it drops the odd one out in every step.

    Needs the Gramian only. Weights sum to one.

    Args:
      num_tasks: number of tasks `T`.
      n_byzantine: `f`, at most `T - 3`. (The paper's theorem asks for less than half of the tasks, `2 f + 2 < T`.)
      n_selected: number of gradients that are averaged.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves `(T, *shape)` to `(*shape)`.

    Raises:
      ValueError: if `n_byzantine` is more than `T - 3`, or `n_selected` more than `T`.

    Example:
      >>> import jax.numpy as jnp, optax_mtl as mtl
      >>> tx = mtl.krum(num_tasks=4, n_byzantine=1, n_selected=2)
      >>> task_grads = jnp.array([[1.0, 1.0], [1e6, -1e6], [1.0, 2.0], [5.0, 0.0]])
      >>> tx.update(task_grads, tx.init(jnp.zeros(2)))[0].tolist()
      [1., 1.5]

    References:
      Blanchard et al., `Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent
      <https://papers.nips.cc/paper/2017/hash/f4b9ec30ad9f68f89b29639786cb62ef-Abstract.html>`_, NeurIPS 2017

    Note:
      Scores are of squared distances, as in the paper; TorchJD adds up the distances themselves. Equal scores: the
      first task. In a step with fewer than `n_byzantine + 3` tasks there is no neighbour to tell the good from the bad:
      the tasks present are averaged, which protects from nothing. Two gradients that differ by less than about 1e-3
      of their own length cannot be told apart by a Gramian in float32.
    """
    num_tasks = _base.check_num_tasks(num_tasks)
    n_byzantine = _base.check_int("n_byzantine", n_byzantine, 0, max(num_tasks - 3, 0))
    n_selected = _base.check_int("n_selected", n_selected, 1, num_tasks)

    def rule(gramian: jax.Array, state: Any, *, present: jax.Array, **_: Any) -> tuple[jax.Array, Any]:
        weights = krum_weights(gramian, n_byzantine=n_byzantine, n_selected=n_selected, present=present)
        return weights, state

    return weighting("krum", num_tasks, rule)
