"""CoV-weighting: by the losses' coefficients of variation."""

from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
import optax

from optax_mtl import _base
from optax_mtl._weighting import weighting


class CoVState(NamedTuple):
    """State of `cov_weighting`.

    Attributes:
      steps: `(T,)` int32, steps in which the task took part.
      mean_loss: `(T,)` mean of its losses.
      mean_ratio: `(T,)` mean of its loss ratios, each the loss over the mean of those before.
      squares: `(T,)` sum of the ratios' squared deviations from their mean.
    """

    steps: jax.Array
    mean_loss: jax.Array
    mean_ratio: jax.Array
    squares: jax.Array


def cov_weighting_weights(deviations: jax.Array, means: jax.Array, *, present: jax.Array | None = None) -> jax.Array:
    """Coefficients of variation over their sum.

    Args:
      deviations: `(T,)` standard deviations, positive.
      means: `(T,)`, positive.
      present: `(T,)` of bool, the tasks that take part; all if None.

    Returns:
      `(T,)`, non-negative, summing to one.
    """
    variation = deviations / means
    variation = variation if present is None else jnp.where(present, variation, 0)
    return variation / jnp.maximum(jnp.sum(variation), jnp.finfo(means.dtype).tiny)


def cov_weighting(num_tasks: int, *, mean_decay: _base.Scalar | None = None) -> optax.GradientTransformationExtraArgs:
    r"""CoV-weighting: a task whose loss still varies has still something to learn.

    With :math:`\ell_i = L_i / \mu_{L_i}`, the loss over the mean of those so far, the weights are the coefficients of
    variation of these ratios over their sum,

    .. math:: w_i = \frac{c_i}{\sum_j c_j}, \qquad c_i = \frac{\sigma_{\ell_i}}{\mu_{\ell_i}}

    from the statistics of all steps before this one. A loss that is satisfied, or noise of small relative size, gets
    little weight; the units of the losses do not matter. It has nothing to tune, and was made for many losses of one
    network. A loss that does not change gets no weight, whatever its value.

    Needs `losses`, not negative. Weights sum to one; they are equal until each task present has been seen twice.

    Args:
      num_tasks: number of tasks `T`.
      mean_decay: weight of the past in the running means; if None, all steps count the same.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves `(T, *shape)` to `(*shape)`.

    Raises:
      ValueError: if `losses` is missing, or one of them is negative.

    Example:
      >>> import jax.numpy as jnp, optax, optax_mtl as mtl
      >>> tx = mtl.cov_weighting(num_tasks=2)
      >>> state = tx.init(jnp.zeros(3))
      >>> for losses in ([1.0, 1.0], [0.5, 0.9], [0.4, 0.8]):
      ...     _, state = tx.update(jnp.ones((2, 3)), state, losses=jnp.array(losses))
      >>> optax.tree.get(state, "task_weights").tolist()  # the first loss varied more
      [0.864, 0.136]

    References:
      Groenendijk et al., `Multi-Loss Weighting with Coefficient of Variations <https://arxiv.org/abs/2009.01717>`_,
      WACV 2021

    Note:
      Step by step the authors' code, with its quirks: the variance has 1e-8 added to it (of a ratio, which has no
      unit), and with a `mean_decay` only the means forget: the sum of squares goes on over all steps. Each task counts
      its own steps. A ratio is kept in [1e-12, 1e12], and is one where the mean loss so far is zero.
    """
    if mean_decay is not None:
        _base.check_number("mean_decay", mean_decay, 0, 1)

    def init(dtype: jnp.dtype, params: _base.Params) -> CoVState:
        zeros = jnp.zeros(num_tasks, dtype)
        return CoVState(jnp.zeros(num_tasks, jnp.int32), zeros, zeros, zeros)

    def rule(
        gramian: jax.Array, state: CoVState, *, losses: jax.Array, present: jax.Array, **_: Any
    ) -> tuple[jax.Array, CoVState]:
        dtype = gramian.dtype
        mean_loss, mean_ratio, squares = (x.astype(dtype) for x in state[1:])
        steps = state.steps.astype(dtype)
        first = steps == 0

        deviations = jnp.sqrt(squares / jnp.maximum(steps, 1) + 1e-8)
        weights = cov_weighting_weights(deviations, jnp.where(first, 1, mean_ratio), present=present)
        known = jnp.all((steps >= 2) | ~present)
        weights = jnp.where(known, weights, _base.equal_weights(present, dtype))

        losses = jnp.maximum(losses, 0)
        known_mean = ~first & (mean_loss > 0)
        ratios = jnp.where(known_mean, losses / jnp.where(known_mean, mean_loss, 1), 1)
        ratios = jnp.clip(ratios, 1e-12, 1e12)
        past = steps / (steps + 1) if mean_decay is None else jnp.where(first, 0, jnp.asarray(mean_decay, dtype))
        new_mean = past * mean_ratio + (1 - past) * ratios
        new = CoVState(
            steps=state.steps + 1,
            mean_loss=past * mean_loss + (1 - past) * losses,
            mean_ratio=new_mean,
            squares=squares + (ratios - mean_ratio) * (ratios - new_mean),  # Welford
        )
        return weights, _base.where_present(present, new, state)

    return weighting("cov_weighting", num_tasks, rule, init, needs_norms=False, needs_losses=True, positive_losses=True)
