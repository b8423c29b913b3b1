"""PiKE: more weight for tasks with large gradients and little noise."""

import math
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
import optax

from optax_mtl import _base
from optax_mtl._task_state import multiply_shares
from optax_mtl._weighting import weighting


class PiKEState(NamedTuple):
    """State of `pike`.

    Attributes:
      step: () int32, updates so far.
      log_weights: `(T,)`.
    """

    step: jax.Array
    log_weights: jax.Array


def pike_gains(
    squared_norms: jax.Array, gradient_variance: jax.Array, *, zeta1: _base.Scalar, zeta2: _base.Scalar
) -> jax.Array:
    r"""What PiKE adds to the logarithms of the weights.

    Args:
      squared_norms: `(T,)`, of the mini-batch gradients.
      gradient_variance: `(T,)`, :math:`\sigma_k^2 / b`.
      zeta1: factor of the squared norms.
      zeta2: factor of the variances.

    Returns:
      `(T,)`: :math:`\zeta_1\lVert\nabla L_k\rVert^2 - \tfrac12\zeta_2\sigma_k^2/b`, where the squared norm is that of
      the mini-batch gradient without the noise in it, :math:`\lVert g_k\rVert^2 - \sigma_k^2/b`, or zero.
    """
    dtype = squared_norms.dtype
    signal = jnp.maximum(squared_norms - gradient_variance, 0)
    return jnp.asarray(zeta1, dtype) * signal - jnp.asarray(zeta2, dtype) / 2 * gradient_variance


def pike(
    num_tasks: int,
    *,
    zeta1: _base.Scalar,
    zeta2: _base.Scalar,
    every: int | jax.Array = 1,
    tau: _base.Scalar | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""PiKE: where tasks hardly conflict, weights that make the most of a step: large gradients, little noise.

    .. math:: w_k \leftarrow \frac{w_k \exp\bigl(\zeta_1\lVert\nabla L_k\rVert^2 - \frac{\zeta_2}{2b}\sigma_k^2\bigr)}
       {\sum_j w_j \exp\bigl(\zeta_1\lVert\nabla L_j\rVert^2 - \frac{\zeta_2}{2b}\sigma_j^2\bigr)}

    every few steps, with the variance :math:`\sigma_k^2` of the gradient of one sample and the batch size `b`. The
    paper mixes data with these weights; here they weight the tasks' gradients, which gives the same update in
    expectation. Choose it for tasks of one kind, with one unit of loss (languages or domains, say). With `tau`
    (Balanced-PiKE) the loss of each task is first multiplied by :math:`y_k = \tau\,\mathrm{softmax}(\tau L)_k`, so
    that tasks with large losses come first.

    Needs gradient norms and `gradient_variance` (and `losses` for `tau`). Weights sum to one; with `tau`, the weights
    times the `y` do not.

    The extra argument `gradient_variance` `(T,)` is the variance of each task's gradient on the mini-batch, summed over
    the parameters: :math:`\sigma_k^2 / b`. From gradients on `B` parts of the mini-batch (leaves `(B, T, *shape)`, by
    `jax.vmap` of the function that `value_and_task_grads` returns, say) it can be estimated as::

        task_grads = jax.tree.map(lambda g: g.mean(0), part_grads)
        deviations = jax.tree.map(lambda g, mean: g - mean[None], part_grads, task_grads)
        squares = jax.vmap(mtl.task_norms)(deviations) ** 2
        gradient_variance = squares.sum(0) / (B - 1) / B

    In the steps between, when the weights stay, any numbers will do.

    Args:
      num_tasks: number of tasks `T`.
      zeta1: factor of the squared gradient norm. It is absolute: the weights change by the exponential of its product
        with the squared norms, so let that be small, a hundredth say.
      zeta2: factor of the variance, absolute too.
      every: the weights change in every so many steps, the first included.
      tau: how strongly Balanced-PiKE prefers tasks with large losses (the paper's values are about 1 to 3); None for
        plain PiKE.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves `(T, *shape)` to `(*shape)`.

    Raises:
      ValueError: if `gradient_variance` is missing, or `losses` for `tau`.

    Example:
      >>> import jax.numpy as jnp, optax, optax_mtl as mtl
      >>> tx = mtl.pike(num_tasks=2, zeta1=0.1, zeta2=0.1)
      >>> state = tx.init(jnp.zeros(1))
      >>> for _ in range(3):  # the second task's gradient is all noise
      ...     _, state = tx.update(jnp.ones((2, 1)), state, gradient_variance=jnp.array([0.0, 1.0]))
      >>> optax.tree.get(state, "task_weights").tolist()
      [0.610639, 0.389361]

    References:
      Li et al., `PiKE: Adaptive Data Mixing for Large-Scale Multi-Task Learning Under Low Gradient Conflicts
      <https://arxiv.org/abs/2502.06244>`_, NeurIPS 2025

    Note:
      The paper's estimators and its values of `zeta1` and `zeta2` could not be checked, so that these have no defaults;
      that the noise is taken out of the squared norm is our reading, and so is the place of `y` in the update of
      Balanced-PiKE. A variance that is not finite leaves its task's weight as it is.
    """
    for name, value in (("zeta1", zeta1), ("zeta2", zeta2), ("tau", 0 if tau is None else tau)):
        _base.check_number(name, value, 0)
    every = _base.check_int("every", every, 1)

    def rule(
        gramian: jax.Array,
        state: PiKEState,
        *,
        present: jax.Array,
        losses: jax.Array | None,
        gradient_variance: jax.Array | None = None,
        **_: Any,
    ) -> tuple[jax.Array, PiKEState]:
        if getattr(gradient_variance, "shape", None) != (num_tasks,):
            raise ValueError(
                f"pike needs the variance of each task's gradient, one array of shape ({num_tasks},), found "
                f"{gradient_variance!r}: write\n    updates, opt_state = tx.update(task_grads, opt_state, params, "
                "gradient_variance=gradient_variance)\nIts docstring says how to estimate it."
            )
        factors = present.astype(gramian.dtype)
        if tau is not None and losses is not None:
            pull = jnp.asarray(tau, gramian.dtype)
            lowest = jnp.finfo(losses.dtype).min
            behind = losses - jnp.max(losses, where=present, initial=lowest)  # first, as `pull * losses` may overflow
            factors = pull * _base.masked_softmax(pull * jnp.clip(behind, lowest, 0), present)
        variance = jnp.asarray(gradient_variance, gramian.dtype)
        known = jnp.isfinite(variance)
        scale = factors**2
        squared_norms, noise = scale * jnp.diagonal(gramian), scale * jnp.where(known, variance, 0)
        gains = pike_gains(squared_norms, noise, zeta1=zeta1, zeta2=zeta2)

        due = state.step % jnp.asarray(every, jnp.int32) == 0
        log_weights, weights = multiply_shares(state.log_weights, jnp.where(known & due, gains, 0), present)
        return factors * weights, PiKEState(state.step + 1, log_weights)

    return weighting(
        "pike",
        num_tasks,
        rule,
        lambda dtype, params: PiKEState(jnp.zeros((), jnp.int32), jnp.full(num_tasks, -math.log(num_tasks), dtype)),
        needs_gramian=False,
        needs_losses=tau is not None,
    )
