"""GLS: the geometric mean of the losses."""

from typing import Any

import jax
from jax import numpy as jnp
import optax

from optax_mtl import _base
from optax_mtl._weighting import weighting


def gls_weights(losses: jax.Array, *, present: jax.Array | None = None) -> jax.Array:
    r"""Derivatives of the geometric mean of the losses.

    Args:
      losses: `(T,)`, positive; a task whose loss is not is left out.
      present: `(T,)` of bool, the tasks that take part; all if None.

    Returns:
      `(T,)`: :math:`\frac1T (\prod_j L_j)^{1/T} / L_i`, zero for the tasks left out.
    """
    present = (losses > 0) if present is None else present & (losses > 0)
    share = _base.equal_weights(present, losses.dtype)
    limits = jnp.finfo(losses.dtype)
    logs = jnp.log(jnp.where(present, jnp.maximum(losses, limits.tiny), 1))
    weights = share * jnp.exp(jnp.sum(share * logs) - logs)
    return jnp.where(present, jnp.minimum(weights, limits.max), 0)


def gls(num_tasks: int) -> optax.GradientTransformationExtraArgs:
    r"""Geometric loss strategy: descends on the geometric mean of the losses.

    .. math:: \Bigl(\prod_i L_i\Bigr)^{1/T}, \qquad w_i = \frac1T \Bigl(\prod_j L_j\Bigr)^{1/T} \frac1{L_i}

    Its direction does not depend on the units of the losses; it is that of `scale_invariant`, the sum of their
    logarithms, but the update shrinks with the losses. Choose it when the losses have different units and none comes
    near zero: there, a task gets an ever larger weight.

    Needs `losses`, positive ones. Every task contributes the same to :math:`\sum_i w_i L_i`, the geometric mean; the
    weights themselves sum to nothing in particular.

    Args:
      num_tasks: number of tasks `T`.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves `(T, *shape)` to `(*shape)`.

    Raises:
      ValueError: if `losses` is missing, or one of them is negative.

    Example:
      >>> import jax.numpy as jnp, optax, optax_mtl as mtl
      >>> tx = mtl.gls(num_tasks=2)
      >>> _, state = tx.update(jnp.ones((2, 3)), tx.init(jnp.zeros(3)), losses=jnp.array([4.0, 1.0]))
      >>> optax.tree.get(state, "task_weights").tolist()
      [0.25, 1.0]

    References:
      Chennupati et al., `MultiNet++: Multi-Stream Feature Aggregation and Geometric Loss Strategy for Multi-Task
      Learning <https://arxiv.org/abs/1904.08492>`_, CVPR Workshops 2019

    Note:
      The mean is taken of logarithms, as in TorchJD; LibMTL multiplies the losses, which over- and underflows, and the
      weights it returns are not those it applies. A task whose loss is zero has nothing to gain and is left out as if
      absent; in both libraries one such task makes the mean zero and the update NaN or infinite.
    """

    def rule(
        gramian: jax.Array, state: Any, *, losses: jax.Array, present: jax.Array, **_: Any
    ) -> tuple[jax.Array, Any]:
        return gls_weights(losses, present=present), state

    return weighting("gls", num_tasks, rule, needs_norms=False, needs_losses=True, positive_losses=True)
