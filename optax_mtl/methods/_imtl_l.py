"""IMTL-L: impartial multi-task learning, the balance of the losses."""

from typing import Any

import jax
from jax import numpy as jnp
import optax

from optax_mtl._task_state import init_learned_scalars, learn_log_scales, LearnedScalars
from optax_mtl._weighting import weighting


def imtl_l_weights(log_scales: jax.Array) -> jax.Array:
    """Weights `exp(s)` from the log-scales `s` `(T,)`."""
    return jnp.exp(log_scales)


def imtl_l(
    num_tasks: int, *, optimizer: optax.GradientTransformation | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""IMTL-L: learns a scale for each loss, such that all scaled losses are alike.

    .. math:: \sum_i e^{s_i} L_i - s_i, \qquad w_i = e^{s_i}

    At the fixed point :math:`e^{s_i} L_i = 1`: every task's scaled loss is one, whatever its unit, and the direction is
    that of `scale_invariant`, followed slowly. The objective is twice that of `uncertainty` for regression, with
    :math:`-s_i` for the log-variance, but is derived without a likelihood: choose it when the losses have different
    units and are of any kind.

    The log-scales are no parameters of the network: they live in the state, with an optimiser of their own, and so are
    safe from weight decay and clipping.

    Needs `losses`, which should not be negative: a negative loss is rewarded with an ever larger weight.

    Args:
      num_tasks: number of tasks `T`.
      optimizer: of the log-scales; `optax.adam(1e-2)` if None. (The paper trains them with the network's.)

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves `(T, *shape)` to `(*shape)`.

    Raises:
      ValueError: if `losses` is missing.

    Example:
      >>> import jax.numpy as jnp, optax, optax_mtl as mtl
      >>> tx = mtl.imtl_l(num_tasks=2, optimizer=optax.sgd(0.1))
      >>> state = tx.init(jnp.zeros(3))
      >>> for _ in range(200):
      ...     _, state = tx.update(jnp.ones((2, 3)), state, losses=jnp.array([4.0, 0.5]))
      >>> optax.tree.get(state, "task_weights").tolist()
      [0.25, 2.0]

    References:
      Liu et al., `Towards Impartial Multi-task Learning <https://openreview.net/forum?id=IMPnRXEWpvr>`_, ICLR 2021

    Note:
      The log-scales start at zero, as in TorchJD, and are kept in [-60, 60], so that a loss of zero, for which there is
      no optimum, does not end in NaN. LibMTL's `IMTL` is the combination with IMTL-G, and cannot do one without the
      other.
    """
    inner = optax.adam(1e-2) if optimizer is None else optimizer

    def rule(
        gramian: jax.Array, state: LearnedScalars, *, losses: jax.Array, present: jax.Array, **_: Any
    ) -> tuple[jax.Array, LearnedScalars]:
        weights = imtl_l_weights(state.value.astype(gramian.dtype))
        return weights, learn_log_scales(inner, state, weights, losses, present)

    return weighting(
        "imtl_l",
        num_tasks,
        rule,
        lambda dtype, params: init_learned_scalars(inner, jnp.zeros(num_tasks, dtype)),
        needs_norms=False,
        needs_losses=True,
    )
