"""GradDrop: where the tasks' signs differ, one sign survives by chance."""

from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
import optax

from optax_mtl import _base, _gramian, _shards
from optax_mtl._mixing import absolute_sums, mixer


class GradDropState(NamedTuple):
    """State of `graddrop`.

    Attributes:
      key: the random key of the next step.
    """

    key: jax.Array


def graddrop(
    num_tasks: int, key: jax.Array | int, *, leak: float | jax.Array = 0.0
) -> optax.GradientTransformationExtraArgs:
    r"""Gradient sign dropout: in every coordinate, keeps the gradients of one sign, drawn by its purity.

    .. math:: P = \frac12\Bigl(1 + \frac{\sum_i g_i}{\sum_i \lvert g_i\rvert}\Bigr), \qquad
       d = \sum_i \bigl(\ell_i + (1 - \ell_i)\, m_i\bigr)\, g_i

    where, coordinate by coordinate, a positive sign is drawn with probability :math:`P`, and :math:`m_i` is one if
    :math:`g_i` has the sign drawn and zero otherwise. Where all tasks agree in sign the update is their sum. Choose it
    as a regulariser that keeps tasks from cancelling: it favours joint minima, in which no sign is left to draw. No
    guarantee against conflicts between whole gradients.

    Needs gradients.

    Args:
      num_tasks: number of tasks `T`.
      key: random key, or a seed.
      leak: share of each gradient that is never dropped, in [0, 1]: a number, or one a task `(T,)`. A task of leak one
        passes untouched (a main task, say), and still counts in the purity.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves `(T, *shape)` to `(*shape)`. Its `task_weights` are each
      task's share of the update: of the sum of absolute values over all tasks and parameters.

    Raises:
      ValueError: if it is given a `Gramian`.

    Example:
      >>> import jax.numpy as jnp, optax_mtl as mtl
      >>> tx = mtl.graddrop(num_tasks=2, key=0)
      >>> task_grads = jnp.array([[1.0, 2.0, 0.0], [1.0, -3.0, 4.0]])
      >>> updates, _ = tx.update(task_grads, tx.init(jnp.zeros(3)))
      >>> updates.tolist()[0], updates.tolist()[1] in (2.0, -3.0), updates.tolist()[2]
      (2., True, 4.)

    References:
      Chen et al., `Just Pick a Sign: Optimizing Deep Multitask Models with Gradient Sign Dropout
      <https://arxiv.org/abs/2010.06808>`_, NeurIPS 2020

    Note:
      The paper drops at a shared activation, on gradients multiplied by its sign and summed over the batch; here, as in
      TorchJD and the code of CAGrad's authors, it is done on the parameters' gradients. (The latter average over the
      tasks; LibMTL keeps to the activation.) The paper's function of the purity is the identity here. An absent task
      takes no part in the draw; each leaf has draws of its own.
    """
    if jnp.ndim(leak) > 0:
        _base.check_task_vector("leak", leak, _base.check_num_tasks(num_tasks))
    _base.check_number("leak", leak, 0, 1)
    first_key = _base.as_key("graddrop", key)

    def drop(leaf: jax.Array, key: jax.Array, present: jax.Array) -> jax.Array:
        grads = leaf.astype(_base.accumulator_dtype(leaf))
        counted = present.astype(grads.dtype)
        total, absolute = _gramian.combine(counted, grads), _gramian.combine(counted, jnp.abs(grads))
        purity = (1 + jnp.where(absolute > 0, total / jnp.where(absolute > 0, absolute, 1), 0)) / 2
        draw = jax.random.uniform(key, total.shape, jnp.float32).astype(grads.dtype)
        keeps = jnp.where((draw < purity)[None], grads > 0, grads < 0).astype(grads.dtype)
        leaks = jnp.broadcast_to(jnp.asarray(leak, grads.dtype), (num_tasks,)).reshape((-1,) + (1,) * total.ndim)
        return ((leaks + (1 - leaks) * keeps) * grads).astype(leaf.dtype)

    def mix(
        task_grads: _base.TaskGrads, state: GradDropState, *, present: jax.Array, **_: Any
    ) -> tuple[Any, Any, GradDropState]:
        key, now = jax.random.split(state.key)
        leaves, treedef = jax.tree.flatten(task_grads)
        keys = jax.random.split(now, len(leaves))
        kept = treedef.unflatten(
            [drop(leaf, _shards.own_key(k, leaf), present) for leaf, k in zip(leaves, keys, strict=True)]
        )
        return _gramian.combine(present.astype(jnp.float32), kept), absolute_sums(kept), GradDropState(key)

    return mixer("graddrop", num_tasks, mix, lambda params: GradDropState(first_key))
