"""MoCo: min-norm weights for gradients that are tracked over the batches."""

from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
import optax

from optax_mtl import _base
from optax_mtl._solvers import min_norm_step, project_onto_simplex, reciprocal
from optax_mtl._tracking import tracking
from optax_mtl._weighting import weighting


class MoCoState(NamedTuple):
    """State of the weights in `moco`.

    Attributes:
      steps: () int32, updates so far.
      weights: `(T,)`.
    """

    steps: jax.Array
    weights: jax.Array


def moco_weights(
    gramian: jax.Array,
    weights: jax.Array,
    *,
    gamma: _base.Scalar = 0.1,
    rho: _base.Scalar = 0.0,
    mapping: str = "project",
    present: jax.Array | None = None,
) -> jax.Array:
    r"""One gradient step on :math:`\tfrac12 \lambda^\top (Y Y^\top + \rho I) \lambda`, mapped onto the simplex.

    Args:
      gramian: `(T, T)`, of the tracked gradients :math:`Y`.
      weights: `(T,)`, :math:`\lambda`.
      gamma: length of the step.
      rho: pull towards equal weights.
      mapping: `"project"` to the nearest point of the simplex, or `"softmax"`.
      present: `(T,)` of bool, the tasks that take part; all if None.

    Returns:
      `(T,)`, non-negative, summing to one.
    """
    _base.check_choice("mapping", mapping, ("project", "softmax"))
    present = jnp.ones(weights.shape, bool) if present is None else present
    point = min_norm_step(gramian, weights, present, gamma=gamma, rho=rho)
    if mapping == "project":
        return project_onto_simplex(point, present)
    return _base.masked_softmax(jnp.maximum(point, jnp.finfo(point.dtype).min), present)


def moco(
    num_tasks: int,
    *,
    beta: _base.Scalar = 0.5,
    beta_sigma: _base.Scalar = 0.5,
    gamma: _base.Scalar = 0.1,
    gamma_sigma: _base.Scalar = 0.5,
    rho: _base.Scalar = 0.0,
    mapping: str = "project",
    prenorm: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""MoCo: tracks each task's gradient over the batches and moves the weights towards the min-norm ones of these.

    .. math:: Y \leftarrow Y - \beta_k (Y - G), \qquad
       \lambda \leftarrow \Pi_\Delta\bigl(\lambda - \gamma_k (Y Y^\top + \rho I)\lambda\bigr), \qquad d = Y^\top \lambda

    with :math:`\beta_k = \beta / k^{\sigma_\beta}` and :math:`\gamma_k = \gamma / k^{\sigma_\gamma}`. The noise of a
    batch makes the weights of `mgda` and its kin lean to the wrong tasks; that of the tracked gradients fades. Choose
    it in place of `mgda` where batches are small, and a copy of the parameters for each task fits in memory; `modo` and
    `sdmgrad` do without, and take more batches instead.

    Needs gradients (and `losses`, positive ones, for `prenorm`). Weights sum to one; they are those of the tracked
    gradients.

    Args:
      num_tasks: number of tasks `T`.
      beta: share of a task's first gradient in its tracked one, :math:`\beta`.
      beta_sigma: how fast that share decays.
      gamma: length of the weights' first step. It is absolute, unless `prenorm`: for gradients ten times as large, a
        hundredth has the same effect.
      gamma_sigma: how fast that length decays.
      rho: pull towards equal weights; absolute too.
      mapping: `"project"` onto the simplex as in the paper, or `"softmax"` as in LibMTL.
      prenorm: whether the gradients are brought to the length of their loss, :math:`g_i L_i / \lVert g_i\rVert`, before
        they are tracked, as in LibMTL.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves `(T, *shape)` to `(*shape)`. Its state is `T` times the
      parameters in float32.

    Raises:
      ValueError: if it is given a `Gramian`, or `prenorm` and `losses` is missing or has a negative one.

    Example:
      >>> import jax.numpy as jnp, optax, optax_mtl as mtl
      >>> tx = mtl.moco(num_tasks=2, beta=1.0, gamma=1.0)
      >>> task_grads = jnp.array([[0.0, 0.5], [1.0, 0.0]])
      >>> updates, state = tx.update(task_grads, tx.init(jnp.zeros(2)))
      >>> updates.tolist(), optax.tree.get(state, "task_weights").tolist()
      ([0.3125, 0.34375], [0.6875, 0.3125])

    References:
      Fernando et al., `Mitigating Gradient Bias in Multi-objective Learning: A Provably Convergent Stochastic Approach
      <https://arxiv.org/abs/2210.12624>`_, ICLR 2023

    Note:
      Defaults are LibMTL's, which cites code shared by the authors; in the authors' later comparison code `beta`,
      `gamma` and `rho` are all 0.1 and do not decay. LibMTL takes the softmax and always normalizes beforehand (here it
      is `mapping="softmax", prenorm=True`). The softmax of a point of the simplex is close to equal weights, whatever
      went before. :math:`\beta_k` counts the gradients of the task itself. A task that was absent keeps its weight, and
      when it is back the weights are projected onto the simplex again.
    """
    for name, value in (("beta_sigma", beta_sigma), ("gamma", gamma), ("gamma_sigma", gamma_sigma), ("rho", rho)):
        _base.check_number(name, value, 0)
    _base.check_number("beta", beta, 0, 1)
    _base.check_choice("mapping", mapping, ("project", "softmax"))

    def share(k: jax.Array) -> jax.Array:
        return jnp.asarray(beta, k.dtype) * k ** -jnp.asarray(beta_sigma, k.dtype)

    def rule(gramian: jax.Array, state: MoCoState, *, present: jax.Array, **_: Any) -> tuple[jax.Array, MoCoState]:
        steps = state.steps + 1
        decay = steps.astype(gramian.dtype) ** -jnp.asarray(gamma_sigma, gramian.dtype)
        last = state.weights.astype(gramian.dtype)
        length = jnp.asarray(gamma, gramian.dtype) * decay
        weights = moco_weights(gramian, last, gamma=length, rho=rho, mapping=mapping, present=present)
        return weights, MoCoState(steps, _base.where_present(present, weights, state.weights))

    def init(dtype: jnp.dtype, params: _base.Params) -> MoCoState:
        return MoCoState(jnp.zeros((), jnp.int32), jnp.full(num_tasks, 1 / num_tasks, dtype))

    to_loss = (lambda norms, losses: losses * reciprocal(norms)) if prenorm else None
    balance = weighting("moco", num_tasks, rule, init)
    return tracking("moco", num_tasks, share, balance, to_loss, positive_losses=prenorm)
