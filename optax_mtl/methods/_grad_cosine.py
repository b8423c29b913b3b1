"""Gradient cosine: an auxiliary task counts as far as its gradient agrees with the primary's."""

from collections.abc import Sequence
from typing import Any

import jax
from jax import numpy as jnp
import optax

from optax_mtl import _base, _solvers
from optax_mtl._weighting import weighting

_MODES = ("unweighted", "weighted", "project")


@_solvers.full_precision
def grad_cosine_weights(
    gramian: jax.Array, primary: jax.Array, *, mode: str = "unweighted", present: jax.Array | None = None
) -> jax.Array:
    """Weights from the cosines between each auxiliary gradient and the primary one.

    Args:
      gramian: `(T, T)`.
      primary: `(T,)` of bool; the gradients of the primary tasks are summed.
      mode: `"unweighted"`, `"weighted"` or `"project"`.
      present: `(T,)` of bool, the tasks that take part; all if None.

    Returns:
      `(T,)`, all zero without a primary task.
    """
    primary = primary if present is None else primary & present
    unit, norms = _solvers.cosines(gramian)
    # The primary gradient is sum_i r_i u_i, in units of the longest in it.
    longest = jnp.max(norms, where=primary, initial=0)
    r = jnp.where(primary, norms, 0) * _solvers.reciprocal(longest)
    length = _solvers.norm_of(r, unit)
    cosine = unit @ r * _solvers.reciprocal(length)

    if mode == "project":
        conflict = jnp.where(primary, 0, jnp.minimum(cosine, 0) * norms)
        weights = jnp.where(primary, 1 - jnp.sum(conflict) * _solvers.reciprocal(longest * length), 1)
    elif mode == "weighted":
        weights = jnp.where(primary, 1, jnp.clip(cosine, 0, 1))
    else:
        weights = jnp.where(primary, 1, (cosine > 0).astype(r.dtype))
    return jnp.where(jnp.any(primary), weights, 0)


def grad_cosine(
    num_tasks: int, *, primary: int | Sequence[int] = 0, mode: str = "unweighted"
) -> optax.GradientTransformationExtraArgs:
    r"""Gradient cosine similarity: auxiliary tasks train only while they help the primary one.

    With :math:`\cos_i = \frac{\langle g_p, g_i\rangle}{\lVert g_p\rVert \lVert g_i\rVert}`,

    .. math:: d = g_p + \sum_{i \ne p} w_i\, g_i, \qquad
       w_i = [\cos_i > 0] \;\text{ (unweighted)} \quad\text{or}\quad \max(0, \cos_i) \;\text{ (weighted)}

    or each auxiliary gradient loses what it has against the primary one (project),

    .. math:: d = g_p + \sum_{i \ne p} g_i - \frac{\min(0, \langle g_p, g_i\rangle)}{\lVert g_p\rVert^2}\, g_p

    In every mode :math:`\langle g_p, d\rangle \ge \lVert g_p\rVert^2`: to first order the primary task is never worse
    off than on its own. Choose it as the plain baseline for one task that matters and helpers that may not help.

    Needs the Gramian only. The primary tasks weigh one (more under `"project"`). Without any primary task in a batch
    the update is zero.

    Args:
      num_tasks: number of tasks `T`.
      primary: index of the primary task, or a tuple of several, whose gradients are summed.
      mode: `"unweighted"`, `"weighted"` or `"project"`.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves `(T, *shape)` to `(*shape)`.

    Example:
      >>> import jax.numpy as jnp, optax_mtl as mtl
      >>> task_grads = jnp.array([[2.0, 0.0], [3.0, 4.0], [-1.0, 1.0]])  # a helper and an enemy of the first task
      >>> for mode in ("unweighted", "weighted", "project"):
      ...     tx = mtl.grad_cosine(num_tasks=3, mode=mode)
      ...     print(tx.update(task_grads, tx.init(jnp.zeros(2)))[0].tolist())
      [5.0, 4.0]
      [3.8, 2.4]
      [5.0, 5.0]

    References:
      Du et al., `Adapting Auxiliary Losses Using Gradient Similarity <https://arxiv.org/abs/1812.02224>`_, 2018

    Note:
      `"unweighted"` and `"weighted"` are the paper's; `"project"` is PCGrad from one side only. At a cosine of exactly
      zero, or with a zero gradient, an auxiliary task is left out of `"unweighted"`, as in the code of AuxiNash's
      authors. That code lets the heads keep their full gradients: wrap this in `shared_and_heads` for the same. There
      is one cosine over all the leaves it is given; `optax.partition` gives groups of leaves a cosine each.
    """
    is_primary = _base.primary_tasks(primary, num_tasks)
    _base.check_choice("mode", mode, _MODES)

    def rule(gramian: jax.Array, state: Any, *, present: jax.Array, **_: Any) -> tuple[jax.Array, Any]:
        return grad_cosine_weights(gramian, is_primary, mode=mode, present=present), state

    return weighting("grad_cosine", num_tasks, rule)
