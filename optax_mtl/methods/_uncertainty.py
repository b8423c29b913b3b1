"""Uncertainty weighting: homoscedastic uncertainties learned along with the network."""

from collections.abc import Sequence
from typing import Any

import jax
from jax import numpy as jnp
import optax

from optax_mtl import _base
from optax_mtl._task_state import init_learned_scalars, learn_log_variances, LearnedScalars
from optax_mtl._weighting import weighting

_FACTORS = {"regression": 0.5, "classification": 1.0}
_VARIANTS = ("kendall", "reu")


def uncertainty_weights(log_variances: jax.Array, factors: jax.Array | float = 0.5) -> jax.Array:
    """Weights `a_i exp(-s_i)` from the log-variances `s` `(T,)` and the factors `a`, `(T,)` or a scalar."""
    return factors * jnp.exp(-log_variances)


def uncertainty(
    num_tasks: int,
    *,
    form: str | Sequence[str] = "regression",
    optimizer: optax.GradientTransformation | None = None,
    init: float = 0.0,
    variant: str = "kendall",
) -> optax.GradientTransformationExtraArgs:
    r"""Uncertainty weighting: each task is weighted by a noise level of its own, learned by maximum likelihood.

    With :math:`s_i = \log\sigma_i^2` the objective is

    .. math:: \sum_i a_i e^{-s_i} L_i + \tfrac12 s_i, \qquad w_i = a_i e^{-s_i}

    with :math:`a_i = \tfrac12` for regression and 1 for classification (eq. 7 and 10 of the paper). At the fixed point
    :math:`\sigma_i^2 = 2 a_i L_i`, so that :math:`w_i = 1 / (2 L_i)`: tasks with large losses get small weights. Choose
    it when the losses have different units. The uncertainties follow the losses slowly.

    The penalty :math:`\tfrac12 s_i = \log\sigma_i` has no lower bound, and small losses make the objective negative.
    With `variant="reu"` it is :math:`\log(1 + \sigma_i^2)`, which is positive; the fixed point is then
    :math:`\sigma_i^4 / (1 + \sigma_i^2) = a_i L_i`: the weights of small losses grow with :math:`L_i^{-1/2}` only.

    The log-variances are no parameters of the network: they live in the state, with an optimiser of their own, and so
    are safe from weight decay and clipping.

    Needs `losses`, which should not be negative: a negative loss is rewarded with an ever larger weight.

    Args:
      num_tasks: number of tasks `T`.
      form: `"regression"` or `"classification"`, for all tasks or for each.
      optimizer: of the log-variances; `optax.adam(1e-2)` if None. (The paper trains them with the network's.)
      init: first value of every log-variance.
      variant: `"kendall"`, or `"reu"` for the revised penalty of Liebel and Körner.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves `(T, *shape)` to `(*shape)`.

    Raises:
      ValueError: if `losses` is missing.

    Example:
      >>> import jax.numpy as jnp, optax, optax_mtl as mtl
      >>> tx = mtl.uncertainty(num_tasks=2, form=("regression", "classification"))
      >>> _, state = tx.update(jnp.ones((2, 3)), tx.init(jnp.zeros(3)), losses=jnp.array([4.0, 0.1]))
      >>> optax.tree.get(state, "task_weights")
      Array([0.5, 1. ], dtype=float32)

    References:
      Kendall et al., `Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and Semantics
      <https://arxiv.org/abs/1705.07115>`_, CVPR 2018

      Liebel and Körner, `Auxiliary Tasks in Multi-task Learning <https://arxiv.org/abs/1805.06334>`_, 2018

    Note:
      Public implementations differ in the first value (LibMTL -0.5, TorchJD 0: a factor 1.65 in the first step) and in
      whether the factor one half is there at all; ours is the paper's. `"reu"` is commonly implemented with
      :math:`\sigma_i` itself as the learned number, from one; here it is the log-variance too, which cannot cross zero:
      first weights and fixed point are the same, the way between them is not.
    """
    _base.check_choice("variant", variant, _VARIANTS)
    forms = (form,) * _base.check_num_tasks(num_tasks) if isinstance(form, str) else tuple(form)
    if len(forms) != num_tasks:
        raise ValueError(f"form must be one string, or one for each of the {num_tasks} tasks, found {form!r}.")
    for each in forms:
        _base.check_choice("form", each, tuple(_FACTORS))
    inner = optax.adam(1e-2) if optimizer is None else optimizer

    def rule(
        gramian: jax.Array, state: LearnedScalars, *, losses: jax.Array, present: jax.Array, **_: Any
    ) -> tuple[jax.Array, LearnedScalars]:
        factors = jnp.array([_FACTORS[each] for each in forms], gramian.dtype)
        log_variances = state.value.astype(gramian.dtype)
        weights = uncertainty_weights(log_variances, factors)
        # The derivative of the penalty by s: of s / 2, or of log(1 + exp(s)).
        slope = 0.5 if variant == "kendall" else jax.nn.sigmoid(log_variances)
        return weights, learn_log_variances(inner, state, weights, losses, present, slope)

    return weighting(
        "uncertainty",
        num_tasks,
        rule,
        lambda dtype, params: init_learned_scalars(inner, jnp.full(num_tasks, init, dtype)),
        needs_norms=False,
        needs_losses=True,
    )
