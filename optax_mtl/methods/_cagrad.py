"""CAGrad: the best direction for the worst task, not far from the mean."""

from typing import Any

import jax
from jax import numpy as jnp
import optax

from optax_mtl import _base, _solvers
from optax_mtl._weighting import weighting


def cagrad_weights(
    gramian: jax.Array, *, c: _base.Scalar = 0.5, rescale: int = 1, present: jax.Array | None = None
) -> jax.Array:
    """Weights of the conflict-averse direction.

    Args:
      gramian: `(T, T)`.
      c: radius of the ball around the mean gradient, relative to its norm.
      rescale: 0, 1 or 2; see `cagrad`.
      present: `(T,)` of bool, the tasks that take part; all if None.

    Returns:
      `(T,)`, non-negative.
    """
    present = jnp.ones(gramian.shape[0], bool) if present is None else present
    return _solve(gramian, c, rescale, present)[0]


def _solve(gramian: jax.Array, c: _base.Scalar, rescale: int, present: jax.Array) -> _solvers.Solution:
    c = jnp.asarray(c, gramian.dtype)
    mean = _base.equal_weights(present, gramian.dtype)
    step, residual = _solvers.worst_case_in_ball(gramian, mean, c, present)
    return (mean + step) / jnp.stack([jnp.ones_like(c), 1 + c**2, 1 + c])[rescale], residual


def cagrad(num_tasks: int, *, c: _base.Scalar = 0.5, rescale: int = 1) -> optax.GradientTransformationExtraArgs:
    r"""CAGrad: maximises the improvement of the worst task in a ball around the mean gradient.

    .. math:: d = \arg\max_d \min_i \langle g_i, d\rangle \quad\text{s.t.}\quad
       \lVert d - \bar g\rVert \le c \lVert\bar g\rVert

    (eq. 2 of the paper). Between the mean gradient (`c = 0`) and a conflict-free direction (`c >= 1`), `c` chooses;
    below one, the mean loss still converges. A task whose gradient is zero is left out of the minimum.

    Needs the Gramian only.

    Args:
      num_tasks: number of tasks `T`.
      c: 0.2 to 0.5 is usual.
      rescale: the update is divided by 1 (`rescale=0`), :math:`1 + c^2` (1, the authors' default) or :math:`1 + c` (2).

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves `(T, *shape)` to `(*shape)`.

    Example:
      >>> import jax.numpy as jnp, optax_mtl as mtl
      >>> tx = mtl.cagrad(num_tasks=2, c=0.5, rescale=0)
      >>> tx.update(jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]), tx.init(jnp.zeros(3)))[0].tolist()
      [0.184, 1.204, 1.204]

    References:
      Liu et al., `Conflict-Averse Gradient Descent for Multi-task Learning <https://arxiv.org/abs/2110.14048>`_,
      NeurIPS 2021

    Note:
      The inner problem is solved exactly, in its primal form, on the support of the worst tasks (where the mean is less
      than about 1e-3 of the tasks' gradients, as exactly as a Gramian in float32 tells its norm). TorchJD does not
      divide (`rescale=0`) and returns zero where the least convex combination is small, which stops training once one
      task has converged; the authors' vision code multiplies by `T`.
    """
    _base.check_number("c", c, 0)
    rescale = _base.check_int("rescale", rescale, 0, 2)

    def rule(
        gramian: jax.Array, state: _solvers.Solved, *, present: jax.Array, **_: Any
    ) -> tuple[jax.Array, _solvers.Solved]:
        weights, residual = _solve(gramian, c, rescale, present)
        return weights, _solvers.Solved(residual)

    return weighting("cagrad", num_tasks, rule, _solvers.Solved.init)
