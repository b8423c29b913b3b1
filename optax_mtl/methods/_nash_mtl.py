"""Nash-MTL: the update on which the tasks would agree as bargainers."""

from typing import Any

import jax
from jax import numpy as jnp
import optax

from optax_mtl import _base, _solvers
from optax_mtl._weighting import weighting


def nash_mtl_weights(
    gramian: jax.Array, *, preference: jax.Array | None = None, present: jax.Array | None = None
) -> jax.Array:
    """The positive solution of `M w = p / w`. See `nash_mtl`.

    Args:
      gramian: `(T, T)`; tasks with zero rows are left out.
      preference: `(T,)` bargaining powers `p`; ones if None.
      present: `(T,)` of bool, the tasks that take part; all if None.

    Returns:
      `(T,)`, positive.
    """
    present = jnp.ones(gramian.shape[0], bool) if present is None else present
    return _solve(gramian, preference, present)[0]


def _solve(gramian: jax.Array, preference: Any, present: jax.Array) -> _solvers.Solution:
    powers = _base.preference_or(preference, jnp.ones_like(gramian[0]), present)
    return _solvers.log_barrier_point(gramian, powers, jnp.ones_like(gramian[0, 0]), present)


def nash_mtl(
    num_tasks: int, *, max_norm: _base.Scalar | None = 1.0, preference: Any = None
) -> optax.GradientTransformationExtraArgs:
    r"""Nash-MTL: the tasks' Nash bargaining solution, proportionally fair and blind to each task's scale.

    .. math:: d = G^\top w, \qquad (G G^\top w)_i = \frac{p_i}{w_i}, \quad w > 0

    (eq. 4 of the paper, where `p` is one): among all directions of one length, the one with the largest product of the
    tasks' gains :math:`\langle g_i, d\rangle`. All gains are positive, and :math:`\lVert d\rVert^2 = \sum_i p_i`
    whatever the gradients, so that with the usual `max_norm` every update has norm `max_norm`: its length tells
    nothing, and the learning rate must be chosen, and decayed, accordingly. Choose it where the tasks' scales cannot be
    compared.

    Needs the Gramian only. To solve at every few steps only, wrap it in `update_every`.

    Args:
      num_tasks: number of tasks `T`.
      max_norm: the update is scaled down to this norm if it is longer; None: never.
      preference: `(T,)` bargaining powers `p`; ones if None. A task of power zero is left out.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves `(T, *shape)` to `(*shape)`. Its state keeps the equation's
      `residual`.

    Raises:
      ValueError: if `preference` is not `(T,)`, or negative; if `max_norm` is negative.

    Example:
      >>> import jax.numpy as jnp, optax_mtl as mtl
      >>> tx = mtl.nash_mtl(num_tasks=2)
      >>> tx.update(jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]), tx.init(jnp.zeros(3)))[0].tolist()
      [0.054, 0.706, 0.706]

    References:
      Navon et al., `Multi-Task Learning as a Bargaining Game <https://arxiv.org/abs/2202.01017>`_, ICML 2022

    Note:
      The equation has one solution, which is found exactly. The authors' sequence of convex programs stops early, or
      fails and keeps the last weights, for zero or badly scaled gradients, as do LibMTL's and TorchJD's. A task whose
      gradient is zero is left out. At a Pareto-stationary point there is no solution: the weights grow to a bound set
      by the precision, and the update vanishes in comparison. Unequal powers are `auxi_nash`'s generalisation. The
      authors, like LibMTL, multiply the losses by the weights, so that heads are scaled too.
    """
    _base.check_preference(preference, _base.check_num_tasks(num_tasks))
    _base.check_number("max_norm", max_norm, 0)

    def rule(
        gramian: jax.Array, state: _solvers.Solved, *, present: jax.Array, **_: Any
    ) -> tuple[jax.Array, _solvers.Solved]:
        weights, residual = _solve(gramian, preference, present)
        if max_norm is not None:
            # The exact solution's |d|^2 is the sum of the powers; a rounded one's, near a stationary point, is not.
            weights = _solvers.shortened(weights, gramian, max_norm)
        return weights, _solvers.Solved(residual)

    return weighting("nash_mtl", num_tasks, rule, _solvers.Solved.init)
