"""Trimmed mean: in every coordinate, the mean of the tasks without the extremes."""

from typing import Any

import jax
from jax import lax, numpy as jnp
import optax

from optax_mtl import _base, _gramian
from optax_mtl._mixing import absolute_sums, mixer

_UNROLL = 12  # tasks; beyond, XLA keeps the comparisons of all tasks, T times the gradients, unless in a loop


def trimmed_mean(num_tasks: int, *, k: int | jax.Array) -> optax.GradientTransformationExtraArgs:
    r"""Trimmed mean: in every coordinate, drops the `k` largest and the `k` smallest values and averages the others.

    .. math:: d = \frac{1}{T - 2k} \sum_{r=k+1}^{T-k} g_{(r)}, \qquad g_{(1)} \le \dots \le g_{(T)}

    coordinate by coordinate. Choose it where up to `k` of the tasks may be outliers (it comes from Byzantine-robust
    distributed learning). With `k = (T - 1) / 2` it is the coordinate-wise median. A task that is the only one to reach
    a parameter is an outlier there: heads do not move, unless `shared_and_heads` leaves them out.

    Needs gradients.

    Args:
      num_tasks: number of tasks `T`.
      k: how many values to drop at each end, at most `(T - 1) // 2`; 0 is the mean.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves `(T, *shape)` to `(*shape)`. Its `task_weights` are each
      task's share of the update: of the sum of the kept values' absolute values over all parameters.

    Raises:
      ValueError: if `k` leaves nothing to average, or the method is given a `Gramian`.

    Example:
      >>> import jax.numpy as jnp, optax_mtl as mtl
      >>> tx = mtl.trimmed_mean(num_tasks=4, k=1)
      >>> task_grads = jnp.array([[1e11, 3.0], [1.0, -1e11], [-1e10, 1e10], [2.0, 2.0]])
      >>> tx.update(task_grads, tx.init(jnp.zeros(2)))[0].tolist()
      [1.5, 2.5]

    References:
      Yin et al., `Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates
      <https://arxiv.org/abs/1803.01498>`_, ICML 2018

    Note:
      The paper trims a fraction of the workers at each end; here, as in TorchJD, a number of tasks. Where fewer than
      `2k + 1` tasks are present, as many are trimmed as leave one or two: the median of those present. Equal values are
      told apart by the tasks' order, which matters to `task_weights` alone.
    """
    k = _base.check_int("k", k, 0, (_base.check_num_tasks(num_tasks) - 1) // 2)

    def keep(leaf: jax.Array, present: jax.Array, trimmed: jax.Array) -> jax.Array:
        tasks = jnp.arange(num_tasks).reshape((-1,) + (1,) * (leaf.ndim - 1))
        counted, last = present.astype(jnp.float32), (jnp.sum(present) - trimmed).astype(jnp.float32)

        def keep_one(task: jax.Array, row: jax.Array) -> jax.Array:
            smaller = (leaf < row[None]) | ((leaf == row[None]) & (tasks < task))
            rank = _gramian.combine(counted, smaller.astype(jnp.float32))
            return jnp.where((rank >= trimmed.astype(jnp.float32)) & (rank < last), row, 0)

        # Ranks by comparison: on a CPU, XLA takes ten times as long to sort.
        if num_tasks <= _UNROLL:
            return jnp.stack([keep_one(jnp.asarray(task), leaf[task]) for task in range(num_tasks)])
        return lax.map(lambda xs: keep_one(*xs), (jnp.arange(num_tasks), leaf))

    def mix(task_grads: _base.TaskGrads, state: Any, *, present: jax.Array, **_: Any) -> tuple[Any, Any, Any]:
        number = jnp.sum(present)
        trimmed = jnp.minimum(jnp.asarray(k, number.dtype), jnp.maximum(number - 1, 0) // 2)
        kept = jax.tree.map(lambda leaf: keep(leaf, present, trimmed), task_grads)
        dtype = _base.accumulator_dtype(task_grads)
        weights = present.astype(dtype) / jnp.maximum(number - 2 * trimmed, 1).astype(dtype)
        return _gramian.combine(weights, kept), absolute_sums(kept), state

    return mixer("trimmed_mean", num_tasks, mix)
