"""What a run can be asked: how large is each task's gradient, and do the tasks conflict."""

import jax
from jax import numpy as jnp

from optax_mtl import _base, _gramian, _solvers


def task_norms(task_grads: _base.TaskGrads) -> jax.Array:
    """Norms of the tasks' gradients.

    Args:
      task_grads: leaves `(T, *shape)`, or a `Gramian`.

    Returns:
      `(T,)`.

    Example:
      >>> import jax.numpy as jnp, optax_mtl as mtl
      >>> mtl.task_norms(jnp.array([[1.0, 0.0], [-3.0, 4.0]]))
      Array([1., 5.], dtype=float32)
    """
    return jnp.sqrt(_gramian.task_squared_norms(task_grads))


def task_cosines(task_grads: _base.TaskGrads) -> jax.Array:
    """Cosine similarities between the tasks' gradients; negative entries are conflicts.

    Args:
      task_grads: leaves `(T, *shape)`, or a `Gramian`. Pass the shared leaves only, `task_grads["trunk"]`, say: heads,
        which one task reaches each, pull all cosines to zero.

    Returns:
      `(T, T)` in [-1, 1]; rows and columns of zero gradients are zero.

    Example:
      >>> import jax.numpy as jnp, optax_mtl as mtl
      >>> mtl.task_cosines(jnp.array([[1.0, 0.0], [-3.0, 4.0]]))
      Array([[ 1. , -0.6],
             [-0.6,  1. ]], dtype=float32)
    """
    return _solvers.cosines(_gramian.task_gramian(task_grads))[0]
