"""IMTL: impartial in the losses and in the gradients."""

from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
import optax

from optax_mtl import _base, _solvers
from optax_mtl._task_state import init_learned_scalars, learn_log_scales, LearnedScalars
from optax_mtl._weighting import weighting


class IMTLState(NamedTuple):
    """State of `imtl`.

    Attributes:
      log_scales: `(T,)` and their optimiser's state.
      head_weights: `(T,)` scales of the losses in the last step, which are the heads' weights.
    """

    log_scales: LearnedScalars
    head_weights: jax.Array


def imtl_weights(gramian: jax.Array, scales: jax.Array, *, present: jax.Array | None = None) -> jax.Array:
    """Weights of the impartial direction of the gradients of scaled losses.

    They are a multiple of `imtl_g_weights`, which they are for scales of one: a gradient's scale does not turn the
    direction, but the sum that is made one is that of the weights of the scaled gradients, `weights / scales`.

    Args:
      gramian: `(T, T)`, of the gradients as they are; tasks with zero rows are left out.
      scales: `(T,)`, positive.
      present: `(T,)` of bool, the tasks that take part; all if None.

    Returns:
      `(T,)`, to be applied to the gradients as they are, such that `sum(weights / scales)` is one. All zero if there is
      no such direction.
    """
    if present is not None:
        gramian = jnp.where(jnp.outer(present, present), gramian, 0)
    return _solvers.impartial_weights(gramian, scales)


def imtl(
    num_tasks: int, *, optimizer: optax.GradientTransformation | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""IMTL: learned scales bring the losses together, then equal projections the gradients.

    IMTL-L learns a scale :math:`e^{s_i}` for each loss by descending on

    .. math:: \sum_i e^{s_i} L_i - s_i,

    whose minimum is where every scaled loss is one; IMTL-G (`imtl_g`) is then applied to the gradients of the scaled
    losses. The direction is IMTL-G's, which the scales of the losses do not turn: they set its length, and the weights
    of the heads. So use it with `shared_and_heads`, which gives each head the gradient of its scaled loss; on
    the shared leaves alone it differs from `imtl_g` in length only. Choose it where losses differ in scale and heads in
    how fast they learn. What is said of negative weights at `imtl_g` holds here too.

    Needs the Gramian and `losses`, which should be positive: a negative loss is rewarded with an ever larger scale.

    Args:
      num_tasks: number of tasks `T`.
      optimizer: of the log-scales `s`; `optax.adam(1e-2)` if None. (The paper trains them with the network's.)

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves `(T, *shape)` to `(*shape)`. Its `head_weights` are the
      scales.

    Raises:
      ValueError: if `losses` is missing.

    Example:
      >>> import jax.numpy as jnp, optax, optax_mtl as mtl
      >>> params = {"trunk": jnp.zeros(2), "heads": [jnp.zeros(1), jnp.zeros(1)]}
      >>> labels = {"trunk": "shared", "heads": [0, 1]}
      >>> tx = mtl.shared_and_heads(mtl.imtl(num_tasks=2, optimizer=optax.sgd(0.1)), labels)
      >>> task_grads = {"trunk": jnp.array([[1.0, 0.0], [0.0, 3.0]]), "heads": [jnp.ones((1, 1)), jnp.ones((1, 1))]}
      >>> state = tx.init(params)
      >>> for _ in range(2):  # the second loss is large
      ...     updates, state = tx.update(task_grads, state, params, losses=jnp.array([1.0, 5.0]))
      >>> updates["trunk"].tolist(), [head.tolist() for head in updates["heads"]]
      ([0.668, 0.668], [[1.0], [0.670]])

    References:
      Liu et al., `Towards Impartial Multi-Task Learning <https://openreview.net/forum?id=IMPnRXEWpvr>`_, ICLR 2021

    Note:
      This is the hybrid that LibMTL calls IMTL. The log-scales start at zero, and are kept in [-60, 60], so that a loss
      of zero, for which there is no optimum, does not end in infinities. See `imtl_g` for dependent and zero gradients.
    """
    inner = optax.adam(1e-2) if optimizer is None else optimizer

    def init(dtype: jnp.dtype, params: _base.Params) -> IMTLState:
        zeros = jnp.zeros(num_tasks, dtype)
        return IMTLState(init_learned_scalars(inner, zeros), jnp.ones_like(zeros))

    def rule(
        gramian: jax.Array, state: IMTLState, *, losses: jax.Array, present: jax.Array, **_: Any
    ) -> tuple[jax.Array, IMTLState]:
        scales = jnp.exp(state.log_scales.value.astype(gramian.dtype))
        learned = learn_log_scales(inner, state.log_scales, scales, losses, present)
        return imtl_weights(gramian, scales, present=present), IMTLState(learned, scales)

    return weighting("imtl", num_tasks, rule, init, needs_losses=True)
