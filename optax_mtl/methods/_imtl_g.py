"""IMTL-G: equal projections on all tasks."""

from typing import Any

import jax
from jax import numpy as jnp
import optax

from optax_mtl import _solvers
from optax_mtl._weighting import weighting


def imtl_g_weights(gramian: jax.Array, *, present: jax.Array | None = None) -> jax.Array:
    """Weights of the impartial direction: `imtl_weights` for scales of one. See `imtl_g`.

    Args:
      gramian: `(T, T)`; tasks with zero rows are left out.
      present: `(T,)` of bool, the tasks that take part; all if None.

    Returns:
      `(T,)`, summing to one; single weights may be negative. All zero if there is no such direction.
    """
    if present is not None:
        gramian = jnp.where(jnp.outer(present, present), gramian, 0)
    return _solvers.impartial_weights(gramian, jnp.ones_like(gramian[0]))


def imtl_g(num_tasks: int) -> optax.GradientTransformationExtraArgs:
    r"""IMTL-G: the combination of the gradients whose projections on all of them are equal.

    .. math:: d = \sum_i w_i g_i, \quad \sum_i w_i = 1, \qquad
       \Bigl\langle d, \frac{g_i}{\lVert g_i\rVert}\Bigr\rangle \text{ the same for every task } i

    With the matrix `C` of the gradients' cosines, :math:`w_i \propto v_i / \lVert g_i\rVert` for :math:`v = C^{-1} 1`.
    Choose it for tasks of different scales that are to advance evenly. Where all weights are positive it is `edm`, and
    non-conflicting. Where some are negative it may raise every loss at once, as its weights sum to one even if that
    turns it round; and where :math:`\sum_i v_i / \lVert g_i\rVert` is near zero they are very large. `edm` is the safe
    choice.

    Needs the Gramian only. Weights sum to one.

    Args:
      num_tasks: number of tasks `T`.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves `(T, *shape)` to `(*shape)`.

    Example:
      >>> import jax.numpy as jnp, optax_mtl as mtl
      >>> tx = mtl.imtl_g(num_tasks=2)
      >>> tx.update(jnp.array([[1.0, 0.0], [0.0, 3.0]]), tx.init(jnp.zeros(2)))[0].tolist()
      [0.75, 0.75]

    References:
      Liu et al., `Towards Impartial Multi-Task Learning <https://openreview.net/forum?id=IMPnRXEWpvr>`_, ICLR 2021

    Note:
      For linearly dependent gradients `v` is the pseudo-inverse of `C` times ones, which makes the projections as equal
      as can be in the least-squares sense. (Exactly equal they mostly are for an update of zero only, which is what
      the paper's formula gives there.) Eigenvalues of `C` below `T` times the dtype's epsilon, relative to the largest,
      count as zero. A task whose gradient is zero is left out. If the sum of :math:`v_i / \lVert g_i\rVert` is zero but
      for rounding, or all of `v` (opposite gradients, for one), so is the update. LibMTL inverts a matrix of
      differences, and fails on equal or zero gradients. TorchJD takes the pseudo-inverse of the Gramian, which loses
      the equal projections where norms are far apart.
    """

    def rule(gramian: jax.Array, state: Any, *, present: jax.Array, **_: Any) -> tuple[jax.Array, Any]:
        return imtl_g_weights(gramian, present=present), state

    return weighting("imtl_g", num_tasks, rule)
