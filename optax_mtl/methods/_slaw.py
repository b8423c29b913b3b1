"""SLAW: scaled loss approximate weighting."""

from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
import optax

from optax_mtl import _base
from optax_mtl._weighting import weighting


class SLAWState(NamedTuple):
    """State of `slaw`.

    Attributes:
      steps: `(T,)` int32, steps in which the task took part.
      mean: `(T,)` running mean of its losses.
      deviation: `(T,)` running standard deviation of its losses.
    """

    steps: jax.Array
    mean: jax.Array
    deviation: jax.Array


def slaw_weights(deviations: jax.Array, *, present: jax.Array | None = None) -> jax.Array:
    """The inverses of the deviations, scaled.

    Args:
      deviations: `(T,)`, not negative; a task whose deviation is zero is left out, unless that is so for all.
      present: `(T,)` of bool, the tasks that take part; all if None.

    Returns:
      `(T,)`, non-negative, summing to the number of tasks that take part.
    """
    present = jnp.ones(deviations.shape, bool) if present is None else present
    number = jnp.sum(present).astype(deviations.dtype)
    # (1 / s_i) / sum_j (1 / s_j) is the softmax of -log s.
    logs = jnp.log(jnp.maximum(deviations, jnp.finfo(deviations.dtype).tiny))
    varying = present & (deviations > 0)
    return number * _base.masked_softmax(-logs, jnp.where(jnp.any(varying), varying, present))


def slaw(num_tasks: int, *, beta: _base.Scalar = 0.99) -> optax.GradientTransformationExtraArgs:
    r"""SLAW: brings all tasks' gradients to one norm, of which it sees only how much the losses vary.

    .. math:: w_i = T\,\frac{1/s_i}{\sum_j 1/s_j}, \qquad s_i = \sqrt{a_i - b_i^2}

    with :math:`a_i` and :math:`b_i` the running means of :math:`L_i^2` and :math:`L_i`. A loss changes from step to
    step in proportion to the norm of its gradient, for which its standard deviation :math:`s_i` stands. Choose it to
    even out gradient norms when all that is to be looked at is the losses. Their units do not matter.

    Needs `losses`, of any sign. Weights sum to `T`; they are one until each task present has been seen twice.

    Args:
      num_tasks: number of tasks `T`.
      beta: weight of the past in the running means.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves `(T, *shape)` to `(*shape)`.

    Raises:
      ValueError: if `losses` is missing.

    Example:
      >>> import jax.numpy as jnp, optax, optax_mtl as mtl
      >>> tx = mtl.slaw(num_tasks=2)
      >>> state = tx.init(jnp.zeros(3))
      >>> for losses in ([1.0, 10.0], [0.9, 9.7]):
      ...     _, state = tx.update(jnp.ones((2, 3)), state, losses=jnp.array(losses))
      >>> optax.tree.get(state, "task_weights").tolist()  # the second loss varies three times as much
      [1.5, 0.5]

    References:
      Crawshaw and Košecká, `SLAW: Scaled Loss Approximate Weighting for Efficient Multi-Task Learning
      <https://arxiv.org/abs/2109.08218>`_, 2021

    Note:
      As in the authors' code, the means count the loss of this step, all steps count the same until there are
      :math:`1/(1-\beta)` of them, and the weights are one in the first. Their code takes :math:`a - b^2`, which
      cancels, and bounds :math:`s_i` from below by 1e-5; here the deviation itself is updated, to the same value, and
      the bound is 1e-5 times the task's mean loss, so that units do not matter. Each task counts its own steps. A task
      whose loss has always been zero has nothing to gain and is left out.
    """
    _base.check_number("beta", beta, 0, 1)

    def init(dtype: jnp.dtype, params: _base.Params) -> SLAWState:
        zeros = jnp.zeros(num_tasks, dtype)
        return SLAWState(jnp.zeros(num_tasks, jnp.int32), zeros, zeros)

    def rule(
        gramian: jax.Array, state: SLAWState, *, losses: jax.Array, present: jax.Array, **_: Any
    ) -> tuple[jax.Array, SLAWState]:
        dtype = gramian.dtype
        steps = state.steps.astype(dtype)
        past = jnp.minimum(steps / (steps + 1), jnp.asarray(beta, dtype))
        change = losses - state.mean.astype(dtype)
        # a - b^2 is updated to past (a - b^2) + past (1 - past) (L - b)^2.
        deviation = jnp.hypot(jnp.sqrt(past) * state.deviation.astype(dtype), jnp.sqrt(past * (1 - past)) * change)
        mean = state.mean.astype(dtype) + (1 - past) * change
        weights = slaw_weights(jnp.maximum(deviation, 1e-5 * jnp.abs(mean)), present=present)
        known = jnp.all((state.steps >= 1) | ~present)
        weights = jnp.where(known, weights, 1)
        return weights, _base.where_present(present, SLAWState(state.steps + 1, mean, deviation), state)

    return weighting("slaw", num_tasks, rule, init, needs_norms=False, needs_losses=True)
