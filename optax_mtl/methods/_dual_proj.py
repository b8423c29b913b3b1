"""DualProj: the mean gradient, projected on the cone of directions that conflict with no task."""

from typing import Any

import jax
from jax import numpy as jnp
import optax

from optax_mtl import _base, _solvers
from optax_mtl._weighting import weighting


def dual_proj_weights(
    gramian: jax.Array, *, preference: jax.Array | None = None, present: jax.Array | None = None
) -> jax.Array:
    """Weights of the projection of the preferred direction on the dual cone. See `dual_proj`.

    Args:
      gramian: `(T, T)`.
      preference: `(T,)` non-negative weights of the direction to project; one over `T` if None.
      present: `(T,)` of bool, the tasks that take part; all if None.

    Returns:
      `(T,)`, none smaller than its preference.
    """
    present = jnp.ones(gramian.shape[0], bool) if present is None else present
    return _solve(gramian, preference, present)[0]


def _solve(gramian: jax.Array, preference: Any, present: jax.Array) -> _solvers.Solution:
    wanted = _base.preference_or(preference, _base.equal_weights(present, gramian.dtype), present)
    return _solvers.project_on_dual_cone(gramian, wanted, present)


def dual_proj(num_tasks: int, *, preference: Any = None) -> optax.GradientTransformationExtraArgs:
    r"""DualProj: the direction nearest to the mean gradient that conflicts with no task.

    .. math:: d = \arg\min_d \lVert d - G^\top p\rVert^2 \quad\text{s.t.}\quad \langle g_i, d\rangle \ge 0
       \text{ for all } i

    which is :math:`G^\top w` with :math:`w = \arg\min_{w \ge p} \lVert G^\top w\rVert^2`. Where no task conflicts with
    the mean, it is the mean. Choose it as the smallest correction that leaves no conflict. Known from continual
    learning as GEM; `upgrad` projects each gradient by itself.

    Needs the Gramian only. Weights sum to one where nothing conflicts, and to more where something does.

    Args:
      num_tasks: number of tasks `T`.
      preference: `(T,)` non-negative weights `p` of the direction that is projected; one over the number of tasks
        present if None. It is taken as it is: for the sum of the gradients, give ones.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves `(T, *shape)` to `(*shape)`. Its state keeps the
      projection's `residual`.

    Raises:
      ValueError: if `preference` is not `(T,)`, or negative.

    Example:
      >>> import jax.numpy as jnp, optax_mtl as mtl
      >>> tx = mtl.dual_proj(num_tasks=2)
      >>> tx.update(jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]), tx.init(jnp.zeros(3)))[0].tolist()
      [0.556, 1.111, 1.111]

    References:
      Lopez-Paz and Ranzato, `Gradient Episodic Memory for Continual Learning <https://arxiv.org/abs/1706.08840>`_,
      NeurIPS 2017, eq. 11

    Note:
      The projection is exact, and the same for gradients of any scale. TorchJD adds 1e-4 of the trace to the Gramian's
      diagonal, which takes the protection from tasks whose gradients are small beside the others', and returns the
      mean, conflicts and all, where the gradients' norms are below 1e-2.
    """
    _base.check_preference(preference, _base.check_num_tasks(num_tasks))

    def rule(
        gramian: jax.Array, state: _solvers.Solved, *, present: jax.Array, **_: Any
    ) -> tuple[jax.Array, _solvers.Solved]:
        weights, residual = _solve(gramian, preference, present)
        return weights, _solvers.Solved(residual)

    return weighting("dual_proj", num_tasks, rule, _solvers.Solved.init)
