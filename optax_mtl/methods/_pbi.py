"""PBI: penalty-based boundary intersection."""

from typing import Any

import jax
from jax import numpy as jnp
import optax

from optax_mtl import _base
from optax_mtl._solvers import reciprocal
from optax_mtl._weighting import weighting


def pbi_weights(
    losses: jax.Array,
    *,
    theta: _base.Scalar = 5.0,
    preference: jax.Array | None = None,
    reference: jax.Array | None = None,
    present: jax.Array | None = None,
) -> jax.Array:
    r"""Derivatives of :math:`d_1 + \theta d_2` with respect to the losses.

    Args:
      losses: `(T,)`.
      theta: :math:`\theta`.
      preference: `(T,)`, the ray's direction; equal parts if None.
      reference: `(T,)`, the ray's origin; zero if None.
      present: `(T,)` of bool, the tasks that take part; all if None.

    Returns:
      `(T,)`, possibly negative; the ray's unit vector where the losses are on the ray, which they are too if they are
      off it by no more than rounding.
    """
    present = jnp.ones(losses.shape, bool) if present is None else present
    ray = _base.preference_or(preference, _base.equal_weights(present, losses.dtype), present)
    ray = ray * reciprocal(jnp.max(ray))
    ray = ray * reciprocal(jnp.linalg.norm(ray))
    gaps = jnp.where(present, losses if reference is None else losses - jnp.asarray(reference, losses.dtype), 0)
    gaps = gaps * reciprocal(jnp.max(jnp.abs(gaps)))  # only their direction matters
    across = gaps - jnp.sum(ray * gaps) * ray
    distance = jnp.linalg.norm(across)
    rounding = 8 * jnp.finfo(losses.dtype).eps * jnp.linalg.norm(gaps)
    outward = jnp.where(distance > rounding, across * reciprocal(distance), 0)
    return ray + jnp.asarray(theta, losses.dtype) * outward


def pbi(
    num_tasks: int,
    *,
    theta: _base.Scalar = 5.0,
    preference: jax.Array | None = None,
    reference: jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Penalty-based boundary intersection: down a ray in the space of the losses, and back to it from the side.

    .. math:: d_1 + \theta d_2, \qquad d_1 = \langle L - z, \hat r\rangle, \qquad
       d_2 = \lVert L - z - d_1 \hat r\rVert, \qquad w = \hat r + \theta\,\frac{L - z - d_1 \hat r}{d_2}

    with :math:`\hat r` the preference at length one and the reference point `z`. The penalty holds the losses on the
    ray from `z` along `preference`, whatever the shape of the Pareto front. Choose it for a wanted ratio between losses
    of one unit. Off the ray, tasks whose losses are below their part get smaller and soon negative weights: with
    :math:`\theta = 5`, returning to the ray goes before descending.

    Needs `losses`. The weights' vector has the length :math:`\sqrt{1 + \theta^2}`, or one on the ray.

    Args:
      num_tasks: number of tasks `T`.
      theta: penalty for the distance from the ray.
      preference: `(T,)`, the wanted ratio of the losses above `reference`; all equal if None.
      reference: `(T,)`, `z`, a lower bound of the losses; zeros if None.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves `(T, *shape)` to `(*shape)`.

    Raises:
      ValueError: if `losses` is missing; if `preference` or `reference` is not `(T,)`, or a preference negative.

    Example:
      >>> import jax.numpy as jnp, optax, optax_mtl as mtl
      >>> tx = mtl.pbi(num_tasks=2, theta=0.5)
      >>> _, state = tx.update(jnp.ones((2, 3)), tx.init(jnp.zeros(3)), losses=jnp.array([2.0, 1.0]))
      >>> optax.tree.get(state, "task_weights").tolist()
      [1.061, 0.354]

    References:
      Zhang and Li, `MOEA/D: A Multiobjective Evolutionary Algorithm Based on Decomposition
      <https://doi.org/10.1109/TEVC.2007.892759>`_, IEEE Transactions on Evolutionary Computation 11(6), 2007

    Note:
      The penalty of 5 is the usual one. As in TorchJD, :math:`d_1` has its sign, where some definitions take its
      absolute value: they differ only where the losses are below the reference point. On the ray :math:`d_2` has no
      derivative; its term is left out there.
    """
    _base.check_number("theta", theta, 0)
    _base.check_preference(preference, _base.check_num_tasks(num_tasks))
    if reference is not None:
        _base.check_task_vector("reference", reference, num_tasks)

    def rule(
        gramian: jax.Array, state: Any, *, losses: jax.Array, present: jax.Array, **_: Any
    ) -> tuple[jax.Array, Any]:
        weights = pbi_weights(losses, theta=theta, preference=preference, reference=reference, present=present)
        return weights, state

    return weighting("pbi", num_tasks, rule, needs_norms=False, needs_losses=True)
