"""What a run can be asked: do the tasks conflict, and how much."""

import jax

from optax_mtl import _base, _gramian, _solvers


def task_cosines(task_grads: _base.TaskGrads) -> jax.Array:
    """Cosine similarities between the tasks' gradients; negative entries are conflicts.

    Args:
      task_grads: leaves `(T, *shape)`, or a `Gramian`.

    Returns:
      `(T, T)` in [-1, 1]; rows and columns of zero gradients are zero.

    Example:
      >>> import jax.numpy as jnp, optax_mtl as mtl
      >>> mtl.task_cosines(jnp.array([[1.0, 0.0], [-3.0, 4.0]]))
      Array([[ 1. , -0.6],
             [-0.6,  1. ]], dtype=float32)
    """
    return _solvers.cosines(_gramian.task_gramian(task_grads))[0]
