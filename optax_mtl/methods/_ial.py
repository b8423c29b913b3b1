"""IAL: impartial auxiliary learning, one primary task and helpers that may not overrule it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
import optax

from optax_mtl import _base, _solvers
from optax_mtl._combinators import shared_and_heads
from optax_mtl._task_state import init_learned_scalars, learn_log_variances, LearnedScalars
from optax_mtl._weighting import weighting

UncertaintyFn = Callable[[jax.Array, jax.Array], jax.Array]

# Each from the variances (T,) and the primary task's variance () to factors (T,) in (0, 1].
_UNCERTAINTY_FNS: dict[str, UncertaintyFn] = {
    "exp": lambda variances, primary: jnp.exp(-variances),
    "ratio": lambda variances, primary: jnp.minimum(1, primary / variances),
    "none": lambda variances, primary: jnp.ones_like(variances),
}


class IALState(NamedTuple):
    """State of `ial`.

    Attributes:
      log_variances: `(T,)` and their optimiser's state.
      head_weights: `(T,)` weights of the decoders in the last step.
    """

    log_variances: LearnedScalars
    head_weights: jax.Array


def ial_weights(norms: jax.Array, factors: jax.Array, primary: int) -> jax.Array:
    """Weights that give every auxiliary gradient the primary's norm, times a factor.

    Args:
      norms: `(T,)` gradient norms on the encoder.
      factors: `(T,)`; the primary's is not used.
      primary: index of the primary task.

    Returns:
      `(T,)`, one for the primary.
    """
    weights = factors * norms[primary] * _solvers.reciprocal(norms)
    return weights.at[primary].set(1)


def ial(
    num_tasks: int,
    *,
    primary: int = 0,
    shared: Any = None,
    uncertainty_fn: str | UncertaintyFn = "exp",
    optimizer: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Impartial auxiliary learning: auxiliary tasks help the primary, at its scale, as far as they are certain.

    Two stages in each update. The decoders are weighted by their own uncertainty,

    .. math:: \sum_t \frac{L_t}{2\sigma_t^2} + \log\sigma_t

    and the encoder's gradients are brought to the primary's norm and multiplied by a function of the uncertainty,

    .. math:: d = g_p + \sum_{t\ne p} f(\sigma_t, \sigma_p) \frac{\lVert g_p\rVert}{\lVert g_t\rVert}\, g_t

    Choose it when one task matters and the others' labels may be poor. The log-variances live in the state, with an
    optimiser of their own.

    Needs gradient norms and `losses` (not negative: they are treated as likelihoods), and to know which leaves are the
    encoder's. If the primary is absent, or its gradient zero, the encoder is not moved.

    Args:
      num_tasks: number of tasks `T`.
      primary: index of the primary task.
      shared: which leaves are the encoder's, as for `optax_mtl.shared_and_heads`; the others are decoders. If None, all
        leaves are taken for the encoder's.
      uncertainty_fn: `f`: `"exp"`, :math:`e^{-\sigma_t^2}`; `"ratio"`, :math:`\min(1, \sigma_p^2/\sigma_t^2)`;
        `"none"`,         one; or a function from the variances `(T,)` and the primary's `()` to factors `(T,)`. (Under
        `optax.inject_hyperparams`, name a function, here and for `shared`, in `static_args`.)
      optimizer: of the log-variances; `optax.adam(1e-2)` if None.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves `(T, *shape)` to `(*shape)`. Its `task_weights` are the
      encoder's, its `head_weights` the decoders'.

    Raises:
      ValueError: if `losses` is missing.

    Example:
      >>> import jax.numpy as jnp, optax_mtl as mtl
      >>> params = {"encoder": jnp.zeros(2), "heads": {"a": jnp.zeros(1), "b": jnp.zeros(1)}}
      >>> labels = {"encoder": "shared", "heads": {"a": 0, "b": 1}}
      >>> tx = mtl.ial(num_tasks=2, shared=labels, uncertainty_fn="none")
      >>> heads = {"a": jnp.ones((1, 1)), "b": jnp.ones((1, 1))}
      >>> task_grads = {"encoder": jnp.array([[1.0, 0.0], [0.0, 50.0]]), "heads": heads}
      >>> updates, _ = tx.update(task_grads, tx.init(params), params, losses=jnp.ones(2))
      >>> updates["encoder"], updates["heads"]["b"]
      (Array([1., 1.], dtype=float32), Array([0.5], dtype=float32))

    References:
      Li et al., `Unprejudiced Training Auxiliary Tasks Makes Primary Better: A Multi-Task Learning Perspective
      <https://arxiv.org/abs/2412.19547>`_, 2024

    Note:
      Unverified: the function `f` of the uncertainties in the encoder stage, and whether the paper takes norms over the
      whole encoder (as here) or by layer. The two stages, the decoders' loss and the rescaling to the primary's norm
      are established; `"exp"` is our reading of `f` and `"none"` is the established part alone. Say which you used.
    """
    primary = _base.check_task_index("primary", primary, _base.check_num_tasks(num_tasks))
    if isinstance(uncertainty_fn, str):
        _base.check_choice("uncertainty_fn", uncertainty_fn, tuple(_UNCERTAINTY_FNS))
    factor_fn = _UNCERTAINTY_FNS[uncertainty_fn] if isinstance(uncertainty_fn, str) else uncertainty_fn
    inner = optax.adam(1e-2) if optimizer is None else optimizer

    def init(dtype: jnp.dtype, params: _base.Params) -> IALState:
        return IALState(init_learned_scalars(inner, jnp.zeros(num_tasks, dtype)), jnp.full(num_tasks, 0.5, dtype))

    def rule(
        gramian: jax.Array, state: IALState, *, losses: jax.Array, present: jax.Array, **_: Any
    ) -> tuple[jax.Array, IALState]:
        variances = jnp.exp(state.log_variances.value.astype(gramian.dtype))
        norms = jnp.sqrt(jnp.diagonal(gramian))
        weights = ial_weights(norms, factor_fn(variances, variances[primary]), primary)
        head_weights = 0.5 / variances
        learned = learn_log_variances(inner, state.log_variances, head_weights, losses, present)
        return weights, IALState(learned, head_weights)

    encoder = weighting("ial", num_tasks, rule, init, needs_gramian=False, needs_losses=True)
    return encoder if shared is None else shared_and_heads(encoder, shared)
