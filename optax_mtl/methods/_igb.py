"""IGB: improvable gap balancing."""

from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
import optax

from optax_mtl import _base
from optax_mtl._task_state import add_to_epoch, EpochMeans, init_epoch_means
from optax_mtl._weighting import weighting


class IGBState(NamedTuple):
    """State of `igb`.

    Attributes:
      epochs: means of the losses over epochs.
      base_losses: `(T,)` the base epoch's, once it is over.
    """

    epochs: EpochMeans
    base_losses: jax.Array


def igb_weights(losses: jax.Array, base_losses: jax.Array, *, present: jax.Array | None = None) -> jax.Array:
    """Softmax of the losses over their base values, times the number of tasks, over the losses.

    Args:
      losses: `(T,)`, positive; a task whose loss is not is left out.
      base_losses: `(T,)`.
      present: `(T,)` of bool, the tasks that take part; all if None.

    Returns:
      `(T,)`, zero for the tasks left out.
    """
    present = (losses > 0) if present is None else present & (losses > 0)
    gaps = jnp.where(base_losses > 0, losses / jnp.where(base_losses > 0, base_losses, 1), 1)
    gaps = jnp.minimum(gaps, jnp.finfo(gaps.dtype).max)
    number = jnp.sum(present).astype(losses.dtype)
    weights = number * _base.masked_softmax(gaps, present) / jnp.maximum(losses, jnp.finfo(losses.dtype).tiny)
    return jnp.where(present, weights, 0)


def igb(num_tasks: int, *, steps_per_epoch: int = 100, base_epoch: int = 1) -> optax.GradientTransformationExtraArgs:
    r"""Improvable gap balancing (IGB-v1): more weight where a task's loss is still far from its best.

    .. math:: \sum_i \lambda_i \log L_i, \qquad
       \lambda = T\,\mathrm{softmax}\bigl(L / L^{\mathrm{base}}\bigr), \qquad w_i = \frac{\lambda_i}{L_i}

    The logarithm takes the units out, as in `scale_invariant`; the ratio of the loss to its mean over an early epoch,
    :math:`L^{\mathrm{base}}`, says how much of the gap to zero is left. All :math:`\lambda_i` are one until that epoch
    is over. Choose it when the losses have different units and some tasks lag. A task whose loss comes near zero gets
    an ever larger weight.

    Needs `losses`, positive ones. The :math:`\lambda_i` sum to `T`, the weights to nothing in particular.

    Args:
      num_tasks: number of tasks `T`.
      steps_per_epoch: updates in an epoch: your batches an epoch.
      base_epoch: the epoch whose mean losses are the base; 0 is the first.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves `(T, *shape)` to `(*shape)`.

    Raises:
      ValueError: if `losses` is missing, or one of them is negative, or `steps_per_epoch` not a positive int.

    Example:
      >>> import jax.numpy as jnp, optax, optax_mtl as mtl
      >>> tx = mtl.igb(num_tasks=2, steps_per_epoch=1)
      >>> state = tx.init(jnp.zeros(3))
      >>> for losses in ([3.0, 3.0], [2.0, 2.0], [1.0, 2.0]):
      ...     _, state = tx.update(jnp.ones((2, 3)), state, losses=jnp.array(losses))
      >>> optax.tree.get(state, "task_weights").tolist()  # lambda is 0.755, 1.245
      [0.7551, 0.6225]

    References:
      Dai et al., `Improvable Gap Balancing for Multi-Task Learning <https://arxiv.org/abs/2307.15429>`_, UAI 2023

    Note:
      As the authors' code (`igbv1`), whose base is the mean over the second epoch. Their second algorithm, which learns
      the weights by reinforcement, is not here. The base epoch is each task's own: of the epochs in which it took part;
      while that of any task present is not over, all :math:`\lambda_i` are one.
      A task whose loss is zero has nothing to gain and is left out.
    """
    steps_per_epoch = _base.check_static_int("steps_per_epoch", steps_per_epoch, 1)
    base_epoch = _base.check_int("base_epoch", base_epoch, 0)

    def init(dtype: jnp.dtype, params: _base.Params) -> IGBState:
        return IGBState(init_epoch_means(num_tasks, 1, dtype), jnp.ones(num_tasks, dtype))

    def rule(
        gramian: jax.Array, state: IGBState, *, losses: jax.Array, present: jax.Array, **_: Any
    ) -> tuple[jax.Array, IGBState]:
        known = jnp.all((state.epochs.epochs > base_epoch) | ~present)
        base = jnp.where(known, state.base_losses.astype(gramian.dtype), losses)
        epochs = add_to_epoch(state.epochs, losses, present, steps_per_epoch)
        base_losses = jnp.where(state.epochs.epochs > base_epoch, state.base_losses, epochs.means[:, 0])
        return igb_weights(losses, base, present=present), IGBState(epochs, base_losses)

    return weighting("igb", num_tasks, rule, init, needs_norms=False, needs_losses=True, positive_losses=True)
