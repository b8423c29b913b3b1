"""LDC-MTL: a learned router weights the losses, and evens out what it has weighted."""

from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
import optax

from optax_mtl import _base
from optax_mtl._task_state import init_learned_scalars, learn_scalars, LearnedScalars
from optax_mtl._weighting import weighting


class LDCMTLState(NamedTuple):
    """State of `ldc_mtl`.

    Attributes:
      logits: `(T,)` of the router, and their optimiser's state.
      initial_losses: `(T,)` first positive loss of each task.
      seen: `(T,)` of bool, whether there has been one.
    """

    logits: LearnedScalars
    initial_losses: jax.Array
    seen: jax.Array


def ldc_mtl_factors(weighted: jax.Array, *, lam: _base.Scalar = 0.05, present: jax.Array | None = None) -> jax.Array:
    r"""Derivatives of :math:`\sum_i y_i + \lambda\sum_i |y_i - y_{i+1}|` with respect to `y`.

    Args:
      weighted: `(T,)`, `y`, the losses as the router weights them.
      lam: :math:`\lambda`.
      present: `(T,)` of bool, the tasks that take part, each next to the following one of these; all if None.

    Returns:
      `(T,)`, in :math:`[1 - 2\lambda, 1 + 2\lambda]`. Differences at the level of rounding count as none.
    """
    present = jnp.ones(weighted.shape, bool) if present is None else present
    order = jnp.argsort(~present)  # stable: those present first, in their order
    y, exists = weighted[order], present[order]
    gaps = y[:-1] - y[1:]
    rounding = 8 * jnp.finfo(y.dtype).eps * jnp.maximum(jnp.abs(y[:-1]), jnp.abs(y[1:]))
    signs = jnp.where(exists[1:] & (jnp.abs(gaps) > rounding), jnp.sign(gaps), 0)
    none = jnp.zeros(1, y.dtype)
    slopes = jnp.concatenate([signs, none]) - jnp.concatenate([none, signs])
    return 1 + jnp.asarray(lam, y.dtype) * jnp.zeros_like(y).at[order].set(slopes)


def ldc_mtl(
    num_tasks: int, *, lam: _base.Scalar = 0.05, optimizer: optax.GradientTransformation | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Loss discrepancy control: network and router descend together on the losses and the gaps between them.

    .. math:: \sum_i \sigma_i \tilde L_i + \lambda \sum_{i<T} |\sigma_i \tilde L_i - \sigma_{i+1} \tilde L_{i+1}|,
       \qquad \tilde L_i = L_i \frac{\min_j L_j(0)}{L_i(0)}, \qquad \sigma = \mathrm{softmax}(a)

    The weights are the derivatives with respect to the losses, :math:`w_i = \sigma_i \tfrac{\min_j L_j(0)}{L_i(0)} (1 +
    \lambda(s_i - s_{i-1}))` with the gaps' signs `s`; the router's logits `a` live in the state, with an optimiser of
    their own. Choose it for losses of different units that should fall together, at no more cost than a weighted sum.

    Only neighbours are compared: the order of the tasks matters.

    Needs positive `losses`. In the first step the weights have the scale of `1 / T` for the task with the smallest
    loss, and less for the others.

    Args:
      num_tasks: number of tasks `T`.
      lam: :math:`\lambda`, of the gaps.
      optimizer: of the logits; `optax.adam(1e-3)` if None.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves `(T, *shape)` to `(*shape)`.

    Raises:
      ValueError: if `losses` is missing or negative.

    Example:
      >>> import jax.numpy as jnp, optax, optax_mtl as mtl
      >>> tx = mtl.ldc_mtl(num_tasks=2, lam=0.1)
      >>> _, state = tx.update(jnp.ones((2, 3)), tx.init(jnp.zeros(3)), losses=jnp.array([1.0, 10.0]))
      >>> optax.tree.get(state, "task_weights").tolist()  # brought to one scale, there is no gap
      [0.5, 0.05]
      >>> _, state = tx.update(jnp.ones((2, 3)), state, losses=jnp.array([1.0, 5.0]))
      >>> optax.tree.get(state, "task_weights").tolist()  # the first task lags
      [0.55, 0.045]

    References:
      Xiao et al., `LDC-MTL: Balancing Multi-Task Learning through Scalable Loss Discrepancy Control
      <https://arxiv.org/abs/2502.08585>`_, 2025

    Note:
      The objective follows the authors' code for NYUv2, with its :math:`\lambda`; their other scripts have sigmoids in
      place of the softmax (0.01), unweighted gaps (0.1), or logarithms of the losses (0.05). Their router is a layer on
      the network's features, except in the CelebA script, where, as here, it is one number a task; the default rate is
      that script's. In an optimiser there are no features. The initial loss is that of the first step in which the task
      takes part with a positive one; until then it counts as on the scale of the smallest. A task
      that joins late with a small loss thus takes weight from all the others.
    """
    _base.check_number("lam", lam, 0)
    inner = optax.adam(1e-3) if optimizer is None else optimizer

    def init(dtype: jnp.dtype, params: _base.Params) -> LDCMTLState:
        zeros = jnp.zeros(num_tasks, dtype)
        return LDCMTLState(init_learned_scalars(inner, zeros), zeros + 1, jnp.zeros(num_tasks, bool))

    def rule(
        gramian: jax.Array, state: LDCMTLState, *, losses: jax.Array, present: jax.Array, **_: Any
    ) -> tuple[jax.Array, LDCMTLState]:
        first = present & ~state.seen & (losses >= jnp.finfo(losses.dtype).tiny)
        initial = jnp.where(first, losses, state.initial_losses.astype(losses.dtype))
        seen = state.seen | first
        scales = jnp.where(seen, jnp.min(initial, where=seen, initial=jnp.inf) / initial, 1)

        router = jnp.where(present, _base.masked_softmax(state.logits.value.astype(losses.dtype), present), 0)
        scaled = scales * losses
        factors = ldc_mtl_factors(router * scaled, lam=lam, present=present)
        slopes = scaled * factors  # the derivative with respect to the router's weight
        grads = router * (slopes - jnp.sum(router * slopes))
        learned = learn_scalars(inner, state.logits, grads, present)
        return router * scales * factors, LDCMTLState(learned, initial, seen)

    return weighting("ldc_mtl", num_tasks, rule, init, needs_norms=False, needs_losses=True, positive_losses=True)
