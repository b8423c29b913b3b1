"""MoDo: the min-norm weights, followed by stochastic gradient steps from independent batches."""

from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
import optax

from optax_mtl import _base
from optax_mtl._solvers import min_norm_step, project_onto_simplex
from optax_mtl._weighting import stochastic_weighting


class MoDoState(NamedTuple):
    """State of `modo`.

    Attributes:
      weights: `(T,)`.
    """

    weights: jax.Array


def modo_weights(
    gramian: jax.Array,
    weights: jax.Array,
    *,
    gamma: _base.Scalar = 0.1,
    rho: _base.Scalar = 0.1,
    present: jax.Array | None = None,
) -> jax.Array:
    r"""One projected gradient step on :math:`\tfrac12 \lambda^\top (M + \rho I) \lambda`.

    Args:
      gramian: `(T, T)`, `M`; the cross-Gramian of two batches, of which it need not be the mean.
      weights: `(T,)`, :math:`\lambda`.
      gamma: length of the step.
      rho: pull towards equal weights.
      present: `(T,)` of bool, the tasks that take part; all if None.

    Returns:
      `(T,)`, non-negative, summing to one.
    """
    present = jnp.ones(weights.shape, bool) if present is None else present
    return project_onto_simplex(min_norm_step(gramian, weights, present, gamma=gamma, rho=rho), present)


def modo(
    num_tasks: int, *, gamma: _base.Scalar = 0.1, rho: _base.Scalar = 0.1
) -> optax.GradientTransformationExtraArgs:
    r"""MoDo: moves the weights of the last step towards the min-norm ones, without the bias of a single batch.

    .. math:: \lambda \leftarrow \Pi_\Delta\bigl(\lambda - \gamma\,(G_1 G_2^\top \lambda + \rho\lambda)\bigr), \qquad
       d = G^\top \lambda

    with the tasks' gradients :math:`G_1, G_2` on two independent batches: the Gramian of one batch is too large by the
    gradients' covariance, so that methods that solve for weights with it lean to the tasks with little noise. Choose it
    in place of `mgda` where batches are small; the step :math:`\gamma` trades the avoidance of conflicts (large) for
    generalisation (small).

    The paper's form has `tx.update(task_grads, opt_state, params, independent_grads=(grads_1, grads_2))`, the gradients
    on two batches, while the weights are applied to `task_grads`: of a third batch, or the mean of both. Without
    `independent_grads` the Gramian of `task_grads` takes their place: MGDA, one step at a time.

    Needs the Gramian only, or the cross-Gramian, which can also be given as `Gramian(task_cross_gramian(grads_1,
    grads_2))`. Weights sum to one.

    Args:
      num_tasks: number of tasks `T`.
      gamma: length of the weights' step. It is absolute: for gradients ten times as large, a hundredth has the same
        effect.
      rho: pull towards equal weights; absolute too.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves `(T, *shape)` to `(*shape)`.

    Raises:
      ValueError: if `independent_grads` is not a pair of trees like `task_grads`, or a `Gramian`.

    Example:
      >>> import jax.numpy as jnp, optax, optax_mtl as mtl
      >>> tx = mtl.modo(num_tasks=2, rho=0.0)
      >>> grads_1, grads_2 = jnp.array([[2.0, 0.0], [0.0, 1.0]]), jnp.array([[1.0, 0.0], [0.0, 2.0]])
      >>> grads = jnp.array([[1.0, 0.0], [0.0, 4.0]])
      >>> updates, state = tx.update(grads, tx.init(jnp.zeros(2)), independent_grads=(grads_1, grads_2))
      >>> updates.tolist(), optax.tree.get(state, "task_weights").tolist()
      ([0.5, 2.], [0.5, 0.5])

    References:
      Chen et al., `Three-Way Trade-Off in Multi-Objective Learning: Optimization, Generalization and Conflict-Avoidance
      <https://arxiv.org/abs/2305.20057>`_, NeurIPS 2023; JMLR 25, 2024

    Note:
      Defaults are those of the authors' code (LibMTL: `gamma=1e-3`). That code applies the weights to the *sum* of the
      gradients on both batches, LibMTL to those of a third. A task that was absent keeps its weight, and when it is
      back the weights are projected onto the simplex again.
    """
    _base.check_number("gamma", gamma, 0)
    _base.check_number("rho", rho, 0)

    def rule(gramian: jax.Array, state: MoDoState, *, present: jax.Array, **_: Any) -> tuple[jax.Array, MoDoState]:
        last = state.weights.astype(gramian.dtype)
        weights = modo_weights(gramian, last, gamma=gamma, rho=rho, present=present)
        return weights, MoDoState(_base.where_present(present, weights, state.weights))

    return stochastic_weighting(
        "modo", num_tasks, rule, lambda dtype, params: MoDoState(jnp.full(num_tasks, 1 / num_tasks, dtype))
    )
