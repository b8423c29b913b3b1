"""UPGrad: every gradient projected on the cone of directions that conflict with no task, then averaged."""

from typing import Any

import jax
from jax import numpy as jnp
import optax

from optax_mtl import _base, _solvers
from optax_mtl._weighting import weighting


def upgrad_weights(
    gramian: jax.Array, *, preference: jax.Array | None = None, present: jax.Array | None = None
) -> jax.Array:
    """Weights of the preferred combination of the projected gradients. See `upgrad`.

    Args:
      gramian: `(T, T)`.
      preference: `(T,)` non-negative weights of the projected gradients; one over `T` if None.
      present: `(T,)` of bool, the tasks that take part; all if None.

    Returns:
      `(T,)`, none smaller than its preference.
    """
    present = jnp.ones(gramian.shape[0], bool) if present is None else present
    return _solve(gramian, preference, present)[0]


def _solve(gramian: jax.Array, preference: Any, present: jax.Array) -> _solvers.Solution:
    wanted = _base.preference_or(preference, _base.equal_weights(present, gramian.dtype), present)
    each = jnp.eye(len(wanted), dtype=wanted.dtype)
    projected, residuals = jax.vmap(_solvers.project_on_dual_cone, (None, 0, None))(gramian, each, present)
    return jnp.sum(wanted[:, None] * projected, axis=0), jnp.max(jnp.where(present, residuals, 0))


def upgrad(num_tasks: int, *, preference: Any = None) -> optax.GradientTransformationExtraArgs:
    r"""UPGrad: projects each task's gradient so that it conflicts with no task, and averages what comes out.

    .. math:: d = \sum_i p_i\, \pi(g_i), \qquad \pi(x) = \arg\min_d \lVert d - x\rVert^2
       \quad\text{s.t.}\quad \langle g_j, d\rangle \ge 0 \text{ for all } j

    Where no two tasks conflict, it is the mean. The update conflicts with no task, every task pulls on it in proportion
    to its gradient's length, and it vanishes only at a Pareto-stationary point. Choose it as the conflict-free method
    that stays nearest to the mean.

    Needs the Gramian only: `T` small quadratic programs, solved at once. Weights sum to one where nothing conflicts,
    and to more where something does.

    Args:
      num_tasks: number of tasks `T`.
      preference: `(T,)` non-negative weights `p` of the projected gradients; one over the number of tasks present if
        None. They are taken as they are: for the scale of a sum, give ones.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves `(T, *shape)` to `(*shape)`. Its state keeps the largest
      `residual` of the projections.

    Raises:
      ValueError: if `preference` is not `(T,)`, or negative.

    Example:
      >>> import jax.numpy as jnp, optax_mtl as mtl
      >>> tx = mtl.upgrad(num_tasks=2)
      >>> tx.update(jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]), tx.init(jnp.zeros(3)))[0].tolist()
      [0.292, 1.901, 1.901]

    References:
      Quinton and Rey, `Jacobian Descent for Multi-Objective Optimization <https://arxiv.org/abs/2406.16232>`_, 2024

    Note:
      The projections are exact, and the same for gradients of any scale. TorchJD adds 1e-4 of the trace to the
      Gramian's diagonal, which takes the protection from tasks whose gradients are small beside the others', and
      returns the mean, conflicts and all, where the gradients' norms are below 1e-2. For two tasks it is half of
      `pcgrad`.
    """
    _base.check_preference(preference, _base.check_num_tasks(num_tasks))

    def rule(
        gramian: jax.Array, state: _solvers.Solved, *, present: jax.Array, **_: Any
    ) -> tuple[jax.Array, _solvers.Solved]:
        weights, residual = _solve(gramian, preference, present)
        return weights, _solvers.Solved(residual)

    return weighting("upgrad", num_tasks, rule, _solvers.Solved.init)
