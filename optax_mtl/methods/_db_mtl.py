"""DB-MTL: logarithms of the losses, and gradients of one length."""

from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
import optax

from optax_mtl import _base
from optax_mtl._tracking import tracking
from optax_mtl._weighting import weighting


class DBMTLState(NamedTuple):
    """State of the weights in `db_mtl`.

    Attributes:
      head_weights: `(T,)` what `shared_and_heads` weights the heads with: the logarithm's derivative, `1 / L`.
    """

    head_weights: jax.Array


def db_mtl_weights(norms: jax.Array, losses: jax.Array | None = None) -> jax.Array:
    r"""Weights that bring all gradients to the length of the longest one of the losses' logarithms.

    Args:
      norms: `(T,)` of the losses' gradients; zero for absent tasks.
      losses: `(T,)`; None if the gradients are those of logarithms already.

    Returns:
      `(T,)`: :math:`\max_j (n_j / L_j) / n_i`, zero for zero gradients.
    """
    longest = jnp.max(norms if losses is None else norms * _log_slopes(losses))
    weights = jnp.where(norms > 0, longest / jnp.where(norms > 0, norms, 1), 0)
    return jnp.minimum(weights, jnp.finfo(weights.dtype).max)


def _log_slopes(losses: jax.Array) -> jax.Array:
    """The derivatives of the losses' logarithms; one for a loss of zero, and inside jit for a negative one."""
    return 1 / jnp.where(losses > 0, losses, 1)


def db_mtl(
    num_tasks: int, *, beta: _base.Scalar = 0.9, beta_sigma: _base.Scalar = 0.0
) -> optax.GradientTransformationExtraArgs:
    r"""Dual balancing: the gradients of the losses' logarithms, averaged over steps, all made as long as the longest.

    .. math:: \hat g_i \leftarrow \beta_k \hat g_i + (1 - \beta_k) \nabla\log L_i, \qquad
       d = \max_j \lVert\hat g_j\rVert \sum_i \frac{\hat g_i}{\lVert\hat g_i\rVert}

    with :math:`\beta_k = \beta / k^\sigma`. Every task has the same say, whatever the scales of its loss and of its
    gradient. Choose it where these differ and the tasks matter alike. It does not look at conflicts.

    With `beta=0` nothing is averaged: it needs the Gramian only, keeps no averages, and the weights are
    :math:`\max_j(n_j / L_j) / n_i`. Otherwise it needs gradients, and its weights are those of the averaged ones.

    Needs `losses`, positive ones: a loss of zero counts as one. Under `shared_and_heads`, each head gets the gradient
    of its own loss's logarithm, as in the paper.

    Args:
      num_tasks: number of tasks `T`.
      beta: share of the past in the averages, in the first step of each task.
      beta_sigma: how fast that share decays.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves `(T, *shape)` to `(*shape)`. For another `beta` than the
      number 0, its state is `T` times the parameters in float32.

    Raises:
      ValueError: if `losses` is missing or has a negative one; if it is given a `Gramian` and `beta` is not 0.

    Example:
      >>> import jax.numpy as jnp, optax, optax_mtl as mtl
      >>> tx = mtl.db_mtl(num_tasks=2, beta=0.0)
      >>> task_grads = jnp.array([[3.0, 0.0], [0.0, 1.0]])
      >>> updates, state = tx.update(task_grads, tx.init(jnp.zeros(2)), losses=jnp.array([1.0, 0.1]))
      >>> updates.tolist(), optax.tree.get(state, "task_weights").tolist()  # the second task's logarithm is steeper
      ([10., 10.], [3.33333, 10.])

    References:
      Lin et al., `Dual-Balancing for Multi-Task Learning <https://arxiv.org/abs/2308.12029>`_, 2023

    Note:
      As in LibMTL, by the same authors, whose defaults these are: the averages start from zero and are not debiased, so
      that the first steps are short, by `1 - beta` in the first. That code adds 1e-8 to losses and norms; here nothing
      is added. :math:`\beta_k` counts the gradients of the task itself.
    """
    _base.check_number("beta", beta, 0, 1)
    _base.check_number("beta_sigma", beta_sigma, 0)
    averages = not (isinstance(beta, int | float) and beta == 0)

    def share(k: jax.Array) -> jax.Array:
        return 1 - jnp.asarray(beta, k.dtype) * k ** -jnp.asarray(beta_sigma, k.dtype)

    def rule(gramian: jax.Array, state: DBMTLState, *, losses: jax.Array, **_: Any) -> tuple[jax.Array, DBMTLState]:
        norms = jnp.sqrt(jnp.diagonal(gramian))
        weights = db_mtl_weights(norms, None if averages else losses)
        return weights, DBMTLState(_log_slopes(losses).astype(state.head_weights.dtype))

    balance = weighting(
        "db_mtl",
        num_tasks,
        rule,
        lambda dtype, params: DBMTLState(jnp.ones(num_tasks, dtype)),
        needs_gramian=False,
        needs_losses=True,
        positive_losses=True,
    )
    if not averages:
        return balance
    return tracking("db_mtl", num_tasks, share, balance, lambda _, losses: _log_slopes(losses), positive_losses=True)
