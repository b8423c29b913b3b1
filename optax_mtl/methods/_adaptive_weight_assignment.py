"""Adaptive weight assignment (Huq & Pervin): the harder the task, the larger its weight."""

from typing import Any

import jax
from jax import numpy as jnp
import optax

from optax_mtl import _base
from optax_mtl._task_state import add_to_epoch, EpochMeans, init_epoch_means
from optax_mtl._weighting import weighting


def adaptive_weight_assignment_weights(
    losses: jax.Array, *, mode: str = "proportional", present: jax.Array | None = None
) -> jax.Array:
    """Weights that grow with the losses.

    Args:
      losses: `(T,)`; for `"proportional"`, a negative loss counts as zero.
      mode: `"proportional"`: the losses over their sum, equal weights if they are all zero; `"softmax"`: their softmax.
      present: `(T,)` of bool, the tasks that take part; all if None.

    Returns:
      `(T,)`, non-negative, summing to one.
    """
    _base.check_choice("mode", mode, ("proportional", "softmax"))
    present = jnp.ones(losses.shape, bool) if present is None else present
    if mode == "softmax":
        return _base.masked_softmax(losses, present)
    shares = jnp.where(present, jnp.maximum(losses, 0), 0)
    largest = jnp.max(shares)
    shares = jnp.where(largest > 0, shares / jnp.where(largest > 0, largest, 1), present.astype(losses.dtype))
    return shares / jnp.maximum(jnp.sum(shares), 1)


def adaptive_weight_assignment(
    num_tasks: int, *, mode: str = "proportional", total: _base.Scalar = 1.0, steps_per_epoch: int | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Adaptive weight assignment: each task is weighted by its share of the total loss.

    .. math:: w_i = \text{total} \cdot \frac{L_i}{\sum_j L_j} \qquad\text{or}\qquad
       w = \text{total} \cdot \mathrm{softmax}(L)

    Harder tasks get larger weights, the opposite of uncertainty weighting. Since :math:`\sum_i L_i g_i` is the gradient
    of :math:`\tfrac12\lVert L\rVert^2`, the proportional form descends on the norm of the losses. Choose it when the
    losses have the same units (cross-entropies, say): it depends on them.

    Needs `losses`. Weights sum to `total`.

    Args:
      num_tasks: number of tasks `T`.
      mode: `"proportional"` or `"softmax"`.
      total: what the weights sum to; `num_tasks` for the scale of a sum of losses.
      steps_per_epoch: if None, the weights follow the losses of each step; else the mean losses of the last epoch of
        that many steps, with equal weights in the first.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves `(T, *shape)` to `(*shape)`.

    Raises:
      ValueError: if `losses` is missing, or `steps_per_epoch` not a positive int.

    Example:
      >>> import jax.numpy as jnp, optax, optax_mtl as mtl
      >>> tx = mtl.adaptive_weight_assignment(num_tasks=2)
      >>> _, state = tx.update(jnp.ones((2, 3)), tx.init(jnp.zeros(3)), losses=jnp.array([3.0, 1.0]))
      >>> optax.tree.get(state, "task_weights")
      Array([0.75, 0.25], dtype=float32)

    References:
      Huq and Pervin, `Adaptive weight assignment scheme for multi-task learning <https://arxiv.org/abs/2303.07278>`_,
      IAES International Journal of Artificial Intelligence 11(1), 2022

    Note:
      The paper's abstract establishes that the weights are adaptive and larger for more difficult tasks. Its exact
      formula could not be checked: `"proportional"`, at every step, is our reading; `"softmax"` follows the name of a
      class (`LossSoftmax`) that the first author's library mentions and never published. Neither is to be quoted as the
      paper's formula.
    """
    _base.check_choice("mode", mode, ("proportional", "softmax"))
    _base.check_number("total", total, 0)
    steps = 1 if steps_per_epoch is None else _base.check_static_int("steps_per_epoch", steps_per_epoch, 1)

    def by_step(gramian: jax.Array, state: Any, *, losses: jax.Array, present: jax.Array, **_: Any) -> Any:
        weights = adaptive_weight_assignment_weights(losses, mode=mode, present=present)
        return jnp.asarray(total, gramian.dtype) * weights, state

    def by_epoch(gramian: jax.Array, state: EpochMeans, *, losses: jax.Array, present: jax.Array, **_: Any) -> Any:
        known = jnp.all((state.epochs > 0) | ~present)
        means = jnp.where(known, state.means[:, 0], 1).astype(gramian.dtype)
        weights, _ = by_step(gramian, (), losses=means, present=present)
        return weights, add_to_epoch(state, losses, present, steps)

    return weighting(
        "adaptive_weight_assignment",
        num_tasks,
        by_step if steps_per_epoch is None else by_epoch,
        lambda dtype, params: () if steps_per_epoch is None else init_epoch_means(num_tasks, 1, dtype),
        needs_norms=False,
        needs_losses=True,
    )
