"""UW-O: optimal uncertainty weighting."""

from typing import Any

import jax
from jax import numpy as jnp
import optax

from optax_mtl import _base
from optax_mtl._weighting import weighting


def uw_o_weights(losses: jax.Array, *, present: jax.Array | None = None) -> jax.Array:
    """The inverses of the losses over their sum.

    Args:
      losses: `(T,)`, positive; a task whose loss is not is left out, unless that is so for all.
      present: `(T,)` of bool, the tasks that take part; all if None.

    Returns:
      `(T,)`, non-negative, summing to one.
    """
    present = (losses > 0) if present is None else present & (losses > 0)
    # (1 / L_i) / sum_j (1 / L_j) is the softmax of -log L.
    return _base.masked_softmax(-jnp.log(jnp.maximum(losses, jnp.finfo(losses.dtype).tiny)), present)


def uw_o(num_tasks: int) -> optax.GradientTransformationExtraArgs:
    r"""Optimal uncertainty weighting: the uncertainties that `uncertainty` learns, in closed form.

    .. math:: w_i = \frac{1/L_i}{\sum_j 1/L_j}

    The likelihood of a task under a Laplace distribution is largest at :math:`\sigma_i = L_i`; put in at every step,
    there is nothing left to learn, and no lag. The direction is that of `scale_invariant`, with weights of a bounded
    sum. It follows the noise of small losses closely: `uw_so` tempers it.

    Needs `losses`, positive ones. Weights sum to one.

    Args:
      num_tasks: number of tasks `T`.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves `(T, *shape)` to `(*shape)`.

    Raises:
      ValueError: if `losses` is missing, or one of them is negative.

    Example:
      >>> import jax.numpy as jnp, optax, optax_mtl as mtl
      >>> tx = mtl.uw_o(num_tasks=2)
      >>> _, state = tx.update(jnp.ones((2, 3)), tx.init(jnp.zeros(3)), losses=jnp.array([3.0, 1.0]))
      >>> optax.tree.get(state, "task_weights").tolist()
      [0.25, 0.75]

    References:
      Kirchdorfer et al., `Analytical Uncertainty-Based Loss Weighting in Multi-Task Learning
      <https://arxiv.org/abs/2408.07985>`_, GCPR 2024

    Note:
      That the weights are inverse to the losses is established; that they are divided by their sum is our reading of
      summaries of the paper. (Undivided they are those of `scale_invariant`, and so they are in a public
      re-implementation.) For squared errors and cross-entropies the optimum has other constant factors, which are the
      same for all tasks of one kind and are left out. A task whose loss is zero has nothing to gain and is left out.
    """

    def rule(
        gramian: jax.Array, state: Any, *, losses: jax.Array, present: jax.Array, **_: Any
    ) -> tuple[jax.Array, Any]:
        return uw_o_weights(losses, present=present), state

    return weighting("uw_o", num_tasks, rule, needs_norms=False, needs_losses=True, positive_losses=True)
