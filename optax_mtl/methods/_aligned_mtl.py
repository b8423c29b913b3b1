"""Aligned-MTL: gradients made orthogonal and equally long."""

from typing import Any

import jax
from jax import numpy as jnp
import optax

from optax_mtl import _base, _solvers
from optax_mtl._weighting import weighting

_SCALE_MODES = ("min", "median", "rmse")


@_solvers.full_precision
def aligned_mtl_weights(
    gramian: jax.Array,
    *,
    scale_mode: str = "min",
    preference: Any = None,
    present: jax.Array | None = None,
) -> jax.Array:
    """Weights of the sum of the aligned gradients. See `aligned_mtl`.

    Args:
      gramian: `(T, T)`.
      scale_mode: `"min"`, `"median"` or `"rmse"`.
      preference: `(T,)`; ones if None.
      present: `(T,)` of bool, the tasks that take part; all if None.

    Returns:
      `(T,)`.
    """
    present = jnp.ones(gramian.shape[0], bool) if present is None else present
    gramian = jnp.where(jnp.outer(present, present), gramian, 0)
    largest = jnp.max(jnp.diagonal(gramian))
    values, basis, kept = _solvers.spectrum(gramian / jnp.where(largest > 0, largest, 1))

    rank = jnp.sum(kept)
    first = len(values) - jnp.maximum(rank, 1)  # they are in ascending order
    if scale_mode == "min":
        scale = values[first]
    elif scale_mode == "median":
        scale = values[first + (rank - 1) // 2]
    else:
        scale = jnp.sum(values, where=kept) / jnp.maximum(rank, 1).astype(values.dtype)

    stretch = jnp.where(kept, jnp.sqrt(scale / jnp.where(kept, values, 1)), 0)
    preference = _base.preference_or(preference, jnp.ones_like(values), present)
    return basis @ (stretch * (preference @ basis))


def aligned_mtl(
    num_tasks: int, *, scale_mode: str = "min", preference: Any = None
) -> optax.GradientTransformationExtraArgs:
    r"""Aligned-MTL: the nearest orthogonal system to the gradients, equally long, and its sum.

    With the Gramian :math:`M = V \Lambda V^\top`,

    .. math:: d = G^\top B\, p, \qquad B = \sqrt{\sigma}\, V \Lambda^{-1/2} V^\top

    where the columns of :math:`G^\top B` are orthogonal and have the length :math:`\sqrt\sigma` of the shortest (by
    default) principal component of the gradients: no task conflicts with another, none dominates. Choose it when the
    training is unstable: the step never outgrows the least principal component, which also makes it small where the
    gradients are nearly dependent. It does not exclude that `d` conflicts with one of the *original* gradients.

    Needs the Gramian only.

    Args:
      num_tasks: number of tasks `T`.
      scale_mode: what :math:`\sigma` is of the eigenvalues: their `"min"`, `"median"` (of an even number, the lower one
        in the middle) or mean (`"rmse"`, a much larger step).
      preference: `p`, `(T,)`, not negative; ones if None, so that the aligned gradients are summed.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves `(T, *shape)` to `(*shape)`.

    Example:
      >>> import jax.numpy as jnp, optax_mtl as mtl
      >>> tx = mtl.aligned_mtl(num_tasks=2)
      >>> tx.update(jnp.array([[1.0, 0.0], [0.0, 3.0]]), tx.init(jnp.zeros(2)))[0].tolist()
      [1., 1.]

    References:
      Senushkin et al., `Independent Component Alignment for Multi-Task Learning <https://arxiv.org/abs/2305.19000>`_,
      CVPR 2023

    Note:
      Like the authors' code and LibMTL, the aligned gradients are summed; TorchJD's default preference is `1 / T`.
      Eigenvalues count as zero, and are left out of :math:`\sigma` and `B`, below the largest times `T` times the
      dtype's epsilon: the authors' tolerance (with the number of non-zero gradients for `T`). In float32 this leaves
      out a task whose gradient is about a thousandth of the largest, or less. With no gradient but zeros the
      weights are zero. LibMTL has `"min"` only.
    """
    _base.check_choice("scale_mode", scale_mode, _SCALE_MODES)
    _base.check_preference(preference, _base.check_num_tasks(num_tasks))

    def rule(gramian: jax.Array, state: Any, *, present: jax.Array, **_: Any) -> tuple[jax.Array, Any]:
        return aligned_mtl_weights(gramian, scale_mode=scale_mode, preference=preference, present=present), state

    return weighting("aligned_mtl", num_tasks, rule)
