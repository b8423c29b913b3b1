"""UW-SO: soft optimal uncertainty weighting."""

from typing import Any

import jax
from jax import numpy as jnp
import optax

from optax_mtl import _base
from optax_mtl._weighting import weighting


def uw_so_weights(losses: jax.Array, *, temperature: _base.Scalar = 1.0, present: jax.Array | None = None) -> jax.Array:
    """The softmax of the losses' inverses.

    Args:
      losses: `(T,)`, positive; a task whose loss is not is left out, unless that is so for all.
      temperature: of the softmax; large for equal weights.
      present: `(T,)` of bool, the tasks that take part; all if None.

    Returns:
      `(T,)`, non-negative, summing to one.
    """
    present = (losses > 0) if present is None else present & (losses > 0)
    limits = jnp.finfo(losses.dtype)
    scores = 1 / jnp.maximum(losses, limits.tiny) / jnp.asarray(temperature, losses.dtype)
    return _base.masked_softmax(jnp.minimum(scores, limits.max), present)


def uw_so(num_tasks: int, *, temperature: _base.Scalar = 1.0) -> optax.GradientTransformationExtraArgs:
    r"""Soft optimal uncertainty weighting: the softmax of the inverse losses.

    .. math:: w_i = \frac{\exp(\frac{1}{\tau L_i})}{\sum_j \exp(\frac{1}{\tau L_j})}

    The inverse losses are the analytic optimum of uncertainty weighting (`uw_o`); the softmax tempers them. Choose it
    for weights that favour the small losses without the lag of `uncertainty`, if you can afford to tune one number: for
    a large temperature the weights are equal, for a small one the task with the smallest loss takes all.

    Needs `losses`, positive ones. Weights sum to one.

    Args:
      num_tasks: number of tasks `T`.
      temperature: :math:`\tau`. It has the unit of an inverse loss: tune it.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves `(T, *shape)` to `(*shape)`.

    Raises:
      ValueError: if `losses` is missing, or one of them is negative.

    Example:
      >>> import jax.numpy as jnp, optax, optax_mtl as mtl
      >>> tx = mtl.uw_so(num_tasks=2, temperature=2.0)
      >>> _, state = tx.update(jnp.ones((2, 3)), tx.init(jnp.zeros(3)), losses=jnp.array([1.0, 0.5]))
      >>> optax.tree.get(state, "task_weights").tolist()
      [0.3775, 0.6225]

    References:
      Kirchdorfer et al., `Analytical Uncertainty-Based Loss Weighting in Multi-Task Learning
      <https://arxiv.org/abs/2408.07985>`_, GCPR 2024

    Note:
      The formula is that of summaries of the paper and of a public re-implementation; the paper tunes the temperature
      for every problem, and the default of one is ours. A task whose loss is zero has nothing to gain and is left out,
      where the limit of the formula would give it all the weight.
    """
    _base.check_number("temperature", temperature, 1e-6)

    def rule(
        gramian: jax.Array, state: Any, *, losses: jax.Array, present: jax.Array, **_: Any
    ) -> tuple[jax.Array, Any]:
        return uw_so_weights(losses, temperature=temperature, present=present), state

    return weighting("uw_so", num_tasks, rule, needs_norms=False, needs_losses=True, positive_losses=True)
