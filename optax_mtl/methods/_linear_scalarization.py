"""Linear scalarization: fixed weights."""

from typing import Any

import jax
from jax import numpy as jnp
import optax

from optax_mtl import _base
from optax_mtl._weighting import weighting


def linear_scalarization(
    num_tasks: int, *, weights: jax.Array | None = None, reduction: str = "sum"
) -> optax.GradientTransformationExtraArgs:
    r"""Fixed weights: the gradient of a weighted sum of the losses.

    The baseline that every comparison needs: with tuned weights it keeps up with most balancing methods (Kurin et al.
    2022, Xin et al. 2022).

    .. math:: d = \sum_i c_i g_i \quad\text{or}\quad d = \frac{1}{T}\sum_i c_i g_i

    Args:
      num_tasks: number of tasks `T`.
      weights: `(T,)`, `c`; ones if None.
      reduction: `"sum"`, or `"mean"`, which divides by the number of tasks present.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves `(T, *shape)` to `(*shape)`.

    Raises:
      ValueError: if `weights` is not `(T,)`.

    Example:
      >>> import jax.numpy as jnp, optax_mtl as mtl
      >>> tx = mtl.linear_scalarization(num_tasks=2, weights=jnp.array([1.0, 10.0]))
      >>> tx.update(jnp.array([[1.0, 0.0], [2.0, 3.0]]), tx.init(jnp.zeros(2)))[0]
      Array([21., 30.], dtype=float32)

    References:
      Kurin et al., `In Defense of the Unitary Scalarization for Deep Multi-Task Learning
      <https://arxiv.org/abs/2201.04122>`_, NeurIPS 2022

      Xin et al., `Do Current Multi-Task Optimization Methods in Deep Learning Even Help?
      <https://arxiv.org/abs/2209.11379>`_, NeurIPS 2022
    """
    _base.check_choice("reduction", reduction, ("sum", "mean"))
    if weights is not None:
        _base.check_task_vector("weights", weights, _base.check_num_tasks(num_tasks))

    def rule(gramian: jax.Array, state: Any, *, present: jax.Array, **_: Any) -> tuple[jax.Array, Any]:
        share = _base.equal_weights(present, gramian.dtype) if reduction == "mean" else present.astype(gramian.dtype)
        return share if weights is None else share * jnp.asarray(weights, gramian.dtype), state

    return weighting("linear_scalarization", num_tasks, rule, needs_norms=False)
