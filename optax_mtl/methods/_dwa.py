"""DWA: dynamic weight average."""

from typing import Any

import jax
from jax import numpy as jnp
import optax

from optax_mtl import _base
from optax_mtl._task_state import add_to_epoch, EpochMeans, init_epoch_means
from optax_mtl._weighting import weighting


def dwa_weights(
    last: jax.Array, before: jax.Array, *, temperature: _base.Scalar = 2.0, present: jax.Array | None = None
) -> jax.Array:
    """Softmax of the losses' rates of descent, times the number of tasks.

    Args:
      last: `(T,)` mean losses of the last epoch.
      before: `(T,)` mean losses of the epoch before.
      temperature: of the softmax; large for equal weights.
      present: `(T,)` of bool, the tasks that take part; all if None.

    Returns:
      `(T,)`, summing to the number of tasks that take part.
    """
    present = jnp.ones(last.shape, bool) if present is None else present
    rates = jnp.where(before == 0, 1, last / jnp.where(before == 0, 1, before))
    rates = jnp.minimum(rates, jnp.finfo(rates.dtype).max)
    number = jnp.sum(present).astype(last.dtype)
    return number * _base.masked_softmax(rates / jnp.asarray(temperature, last.dtype), present)


def dwa(
    num_tasks: int, *, steps_per_epoch: int = 100, temperature: _base.Scalar = 2.0
) -> optax.GradientTransformationExtraArgs:
    r"""Dynamic weight average: tasks whose loss falls more slowly get more weight.

    .. math:: w_i = T\,\frac{\exp(r_i/\tau)}{\sum_j \exp(r_j/\tau)}, \qquad r_i = \frac{\bar L_i(e-1)}{\bar L_i(e-2)}

    with the mean losses of the last two epochs; all weights are one in the first two. It costs nothing and needs no
    gradients' geometry; the rates are near one in long trainings, and the weights then near equal.

    Needs `losses`. Weights sum to `T`.

    Args:
      num_tasks: number of tasks `T`.
      steps_per_epoch: updates over which a mean is taken: your batches an epoch.
      temperature: of the softmax.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves `(T, *shape)` to `(*shape)`.

    Raises:
      ValueError: if `losses` is missing, or `steps_per_epoch` not a positive int.

    Example:
      >>> import jax.numpy as jnp, optax, optax_mtl as mtl
      >>> tx = mtl.dwa(num_tasks=2, steps_per_epoch=1)
      >>> state = tx.init(jnp.zeros(3))
      >>> for losses in ([1.0, 1.0], [1.0, 0.5], [1.0, 0.2]):
      ...     _, state = tx.update(jnp.ones((2, 3)), state, losses=jnp.array(losses))
      >>> optax.tree.get(state, "task_weights").tolist()  # the first task did not improve
      [1.124, 0.876]

    References:
      Liu et al., `End-to-End Multi-Task Learning with Attention <https://arxiv.org/abs/1803.10704>`_, CVPR 2019
    """
    steps_per_epoch = _base.check_static_int("steps_per_epoch", steps_per_epoch, 1)
    _base.check_number("temperature", temperature, 1e-6)

    def rule(
        gramian: jax.Array, state: EpochMeans, *, losses: jax.Array, present: jax.Array, **_: Any
    ) -> tuple[jax.Array, EpochMeans]:
        last, before = state.means.astype(gramian.dtype).T
        known = state.epochs >= 2
        last, before = jnp.where(known, last, 1), jnp.where(known, before, 1)
        weights = dwa_weights(last, before, temperature=temperature, present=present)
        return weights, add_to_epoch(state, losses, present, steps_per_epoch)

    return weighting(
        "dwa",
        num_tasks,
        rule,
        lambda dtype, params: init_epoch_means(num_tasks, 2, dtype),
        needs_norms=False,
        needs_losses=True,
    )
