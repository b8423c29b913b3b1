"""FairGrad: alpha-fair resource allocation, from the mean over Nash's bargain to the worst task."""

from typing import Any

import jax
from jax import numpy as jnp
import optax

from optax_mtl import _base, _solvers
from optax_mtl._weighting import weighting


def fairgrad_weights(gramian: jax.Array, *, alpha: _base.Scalar = 2.0, present: jax.Array | None = None) -> jax.Array:
    """The positive solution `w` of `M w = w ** (-1 / alpha)`. See `fairgrad`.

    Args:
      gramian: `(T, T)`; tasks with zero rows are left out.
      alpha: kind of fairness, at least 0.1.
      present: `(T,)` of bool, the tasks that take part; all if None.

    Returns:
      `(T,)`, positive.
    """
    present = jnp.ones(gramian.shape[0], bool) if present is None else present
    return _solve(gramian, alpha, present)[0]


def _solve(gramian: jax.Array, alpha: _base.Scalar, present: jax.Array) -> _solvers.Solution:
    exponent = 1 / jnp.asarray(alpha, gramian.dtype)
    return _solvers.log_barrier_point(gramian, jnp.ones_like(gramian[0]), exponent, present)


def fairgrad(num_tasks: int, *, alpha: _base.Scalar = 2.0) -> optax.GradientTransformationExtraArgs:
    r"""FairGrad: the update whose gains for the tasks are shared out fairly.

    .. math:: d = G^\top w, \qquad (G G^\top w)_i = w_i^{-1/\alpha}, \quad w > 0

    (eq. 5 of the paper): the direction of a given length that maximises the tasks' summed :math:`\alpha`-fair utilities
    of their gains :math:`\langle g_i, d\rangle`, all of which are positive. `alpha = 1` is proportional fairness, the
    bargain of `nash_mtl`; larger values care more for the task that gains least. Choose it to set that by one number.

    Needs the Gramian only. The weights have no fixed sum: the update of gradients `s` times as large is
    :math:`s^{(1-\alpha)/(1+\alpha)}` times as large.

    Args:
      num_tasks: number of tasks `T`.
      alpha: kind of fairness, at least 0.1; near zero it is `linear_scalarization`.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves `(T, *shape)` to `(*shape)`. Its state keeps the equation's
      `residual`.

    Raises:
      ValueError: if `alpha` is below 0.1.

    Example:
      >>> import jax.numpy as jnp, optax, optax_mtl as mtl
      >>> tx = mtl.fairgrad(num_tasks=2)
      >>> _, state = tx.update(jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]), tx.init(jnp.zeros(3)))
      >>> optax.tree.get(state, "task_weights").tolist()
      [0.471, 0.319]

    References:
      Ban and Ji, `Fair Resource Allocation in Multi-Task Learning <https://arxiv.org/abs/2402.15638>`_, ICML 2024

    Note:
      The equation has one solution, which is found exactly; the authors' least squares and LibMTL's stop early where
      norms differ. `alpha` is that of the authors' scripts (their class and LibMTL: 1). The authors multiply the update
      by `T` and clip it to norm one: chain `optax.clip_by_global_norm(1.0)` for that. A task whose gradient is zero is
      left out. At a Pareto-stationary point there is no solution: the weights grow to a bound set by the precision, and
      the update vanishes in comparison.
    """
    _base.check_number("alpha", alpha, 0.1)

    def rule(
        gramian: jax.Array, state: _solvers.Solved, *, present: jax.Array, **_: Any
    ) -> tuple[jax.Array, _solvers.Solved]:
        weights, residual = _solve(gramian, alpha, present)
        return weights, _solvers.Solved(residual)

    return weighting("fairgrad", num_tasks, rule, _solvers.Solved.init)
