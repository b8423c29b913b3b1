"""EDM: the central direction, at equal angles to all tasks that matter."""

from typing import Any

import jax
from jax import numpy as jnp
import optax

from optax_mtl import _solvers
from optax_mtl._weighting import weighting


def edm_weights(gramian: jax.Array, *, present: jax.Array | None = None) -> jax.Array:
    """Weights of the central direction. See `edm`.

    Args:
      gramian: `(T, T)`; tasks with zero rows are left out.
      present: `(T,)` of bool, the tasks that take part; all if None.

    Returns:
      `(T,)`, non-negative, summing to one; all zero if no gradient is left.
    """
    present = jnp.ones(gramian.shape[0], bool) if present is None else present
    return _solvers.central_weights(gramian, present)[0]


def edm(num_tasks: int) -> optax.GradientTransformationExtraArgs:
    r"""Equiangular direction: the bisector of the tasks' gradients, whatever their lengths.

    .. math:: a = \arg\min_{a\in\Delta} \Bigl\lVert \sum_i a_i \frac{g_i}{\lVert g_i\rVert}\Bigr\rVert^2, \qquad
       w_i = \gamma\, \frac{a_i}{\lVert g_i\rVert}, \quad \gamma = \Bigl(\sum_j \frac{a_j}{\lVert g_j\rVert}\Bigr)^{-1}

    A common descent direction that makes the same angle with every task in its support and a smaller one with the
    others, and does not change when a loss is rescaled. Choose it where tasks conflict and their gradients differ in
    size. Equal to IMTL-G wherever the minimum is inside the simplex, and safe where IMTL-G is not.

    Needs the Gramian only. Weights sum to one.

    Args:
      num_tasks: number of tasks `T`.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves `(T, *shape)` to `(*shape)`.

    Example:
      >>> import jax.numpy as jnp, optax_mtl as mtl
      >>> tx = mtl.edm(num_tasks=2)
      >>> tx.update(jnp.array([[1.0, 0.0], [0.0, 3.0]]), tx.init(jnp.zeros(2)))[0]
      Array([0.75, 0.75], dtype=float32)

    References:
      Katrutsa et al., `Follow the bisector: a simple method for multi-objective optimization
      <https://arxiv.org/abs/2007.06937>`_, 2020

    Note:
      A task whose gradient is zero is left out (the authors' formula divides by its norm).
    """

    def rule(
        gramian: jax.Array, state: _solvers.Solved, *, present: jax.Array, **_: Any
    ) -> tuple[jax.Array, _solvers.Solved]:
        weights, residual = _solvers.central_weights(gramian, present)
        return weights, _solvers.Solved(residual)

    return weighting("edm", num_tasks, rule, _solvers.Solved.init)
