"""GradNorm: weights learned so that all tasks train at the same rate."""

from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
import optax

from optax_mtl import _base
from optax_mtl._task_state import init_learned_scalars, learn_scalars, LearnedScalars
from optax_mtl._weighting import weighting

_LEAST = 1e-3  # no weight falls below


class GradNormState(NamedTuple):
    """State of `gradnorm`.

    Attributes:
      weights: `(T,)` and their optimiser's state.
      initial_losses: `(T,)` loss of each task when it was first seen.
      norms: `(T,)` gradient norm of each task when it was last seen.
      seen: `(T,)` of bool, whether it has been.
    """

    weights: LearnedScalars
    initial_losses: jax.Array
    norms: jax.Array
    seen: jax.Array


def gradnorm_weight_grads(
    norms: jax.Array,
    weights: jax.Array,
    loss_ratios: jax.Array,
    *,
    alpha: _base.Scalar = 1.5,
    present: jax.Array | None = None,
) -> jax.Array:
    r"""Gradient of GradNorm's own loss with respect to the weights.

    Args:
      norms: `(T,)` gradient norms, unweighted.
      weights: `(T,)`.
      loss_ratios: `(T,)`, each loss over its initial value.
      alpha: strength of the pull to a common training rate.
      present: `(T,)` of bool, the tasks that take part; all if None.

    Returns:
      `(T,)`: :math:`n_i \,\mathrm{sign}(w_i n_i - \bar n\, r_i^\alpha)`, zero for absent tasks.
    """
    share = _base.equal_weights(jnp.ones(norms.shape, bool) if present is None else present, norms.dtype)
    weighted = weights * norms
    mean_ratio = jnp.sum(share * loss_ratios)
    rates = jnp.where(mean_ratio > 0, loss_ratios / jnp.where(mean_ratio > 0, mean_ratio, 1), 1)
    target = jnp.sum(share * weighted) * rates ** jnp.asarray(alpha, norms.dtype)
    return jnp.where(share > 0, norms * jnp.sign(weighted - target), 0)


def gradnorm(
    num_tasks: int, *, alpha: _base.Scalar = 1.5, optimizer: optax.GradientTransformation | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""GradNorm: learns weights that give each task the gradient norm its training rate calls for.

    With :math:`r_i = \frac{L_i/L_i(0)}{\mathrm{mean}_j L_j/L_j(0)}`, the inverse training rate, the weights descend on

    .. math:: \sum_i \bigl|\, w_i \lVert g_i\rVert - \bar n\, r_i^\alpha \bigr|, \qquad
       \bar n = \mathrm{mean}_j\, w_j \lVert g_j\rVert \text{ held fixed,}

    and are then renormalised to sum to `T`. The closed form of their gradient needs no second backward pass. Choose it
    when losses and gradients differ in scale and the tasks should finish together.

    Needs gradient norms and `losses` (a negative one counts as zero).

    Args:
      num_tasks: number of tasks `T`.
      alpha: 0 equalises the gradient norms; larger values push the tasks that lag.
      optimizer: of the weights; `optax.adam(0.025)` if None.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves `(T, *shape)` to `(*shape)`.

    Raises:
      ValueError: if `losses` is missing.

    Example:
      >>> import jax.numpy as jnp, optax, optax_mtl as mtl
      >>> tx = mtl.gradnorm(num_tasks=2)
      >>> state = tx.init(jnp.zeros(1))
      >>> for _ in range(2):
      ...     _, state = tx.update(jnp.array([[1.0], [9.0]]), state, losses=jnp.ones(2))
      >>> optax.tree.get(state, "task_weights").tolist()  # the second task's gradient is too large
      [1.025, 0.975]

    References:
      Chen et al., `GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep Multitask Networks
      <https://arxiv.org/abs/1711.02257>`_, ICML 2018

    Note:
      Norms are taken over all the leaves it is given (the paper: the last shared layer; use `shared_and_heads` or
      `optax.partition` to restrict it). The weights' gradient is divided by the mean of the tasks' last norms, which
      makes the steps the same for gradients of any scale. A weight never falls below 1e-3, where the mean one is 1. The
      initial loss is that of the first step in which the task takes part.
    """
    _base.check_number("alpha", alpha, 0)
    inner = optax.adam(0.025) if optimizer is None else optimizer

    def init(dtype: jnp.dtype, params: _base.Params) -> GradNormState:
        ones = jnp.ones(num_tasks, dtype)
        return GradNormState(init_learned_scalars(inner, ones), ones, 0 * ones, jnp.zeros(num_tasks, bool))

    def rule(
        gramian: jax.Array, state: GradNormState, *, losses: jax.Array, present: jax.Array, **_: Any
    ) -> tuple[jax.Array, GradNormState]:
        # The stored weights sum to T; those of the tasks present, as they are used, to the number of these.
        stored = state.weights.value.astype(gramian.dtype)
        number = jnp.sum(present).astype(gramian.dtype)
        weights = stored * number / jnp.maximum(jnp.sum(stored, where=present), _LEAST)
        first = present & ~state.seen
        initial = jnp.where(first, losses, state.initial_losses.astype(gramian.dtype))
        ratios = jnp.where(initial > 0, jnp.maximum(losses, 0) / jnp.where(initial > 0, initial, 1), 1)
        ratios = jnp.minimum(ratios, 1e12)

        norms = jnp.sqrt(jnp.diagonal(gramian))
        last_norms = jnp.where(present, norms, state.norms.astype(norms.dtype))
        seen = state.seen | present
        mean_norm = jnp.sum(_base.equal_weights(seen, norms.dtype) * last_norms)
        norms = norms / jnp.where(mean_norm > 0, mean_norm, 1)
        grads = gradnorm_weight_grads(norms, weights, ratios, alpha=alpha, present=present)
        learned = learn_scalars(inner, state.weights, grads, present)

        value = jnp.maximum(learned.value, _LEAST)
        share = num_tasks - jnp.sum(value, where=~present)
        value = jnp.maximum(value * share / jnp.maximum(jnp.sum(value, where=present), _LEAST), _LEAST)
        learned = learned._replace(value=jnp.where(present, value, state.weights.value))
        return weights, GradNormState(learned, initial, last_norms, seen)

    return weighting("gradnorm", num_tasks, rule, init, needs_gramian=False, needs_losses=True)
