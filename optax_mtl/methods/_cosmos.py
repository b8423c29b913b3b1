"""COSMOS: a weighted sum of the losses, pulled to a preferred ratio."""

from typing import Any

import jax
from jax import numpy as jnp
import optax

from optax_mtl import _base
from optax_mtl._solvers import reciprocal
from optax_mtl._weighting import weighting


def cosmos_weights(
    losses: jax.Array,
    *,
    lam: _base.Scalar = 1.0,
    preference: jax.Array | None = None,
    present: jax.Array | None = None,
) -> jax.Array:
    r"""Derivatives of :math:`r^\top L - \lambda\cos(r, L)` with respect to the losses.

    Args:
      losses: `(T,)`.
      lam: :math:`\lambda`.
      preference: `(T,)`, `r`; equal and summing to one if None.
      present: `(T,)` of bool, the tasks that take part; all if None.

    Returns:
      `(T,)`, possibly negative; `r` where all losses are zero.
    """
    present = jnp.ones(losses.shape, bool) if present is None else present
    r = _base.preference_or(preference, _base.equal_weights(present, losses.dtype), present)
    losses = jnp.where(present, losses, 0)
    largest = jnp.max(jnp.abs(losses))
    unit = losses * reciprocal(largest)
    length = jnp.linalg.norm(unit)
    unit = unit * reciprocal(length)
    ray = r * reciprocal(jnp.linalg.norm(r))
    across = ray - jnp.sum(ray * unit) * unit
    across = jnp.where(
        jnp.linalg.norm(across) > 8 * jnp.finfo(losses.dtype).eps, across, 0
    )  # on the ray but for rounding
    turn = across * reciprocal(length) * reciprocal(largest)  # of the cosine
    return r - jnp.asarray(lam, losses.dtype) * jnp.where(largest > 0, turn, 0)


def cosmos(
    num_tasks: int, *, lam: _base.Scalar = 1.0, preference: jax.Array | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""COSMOS: the weighted sum of the losses, and a pull of the losses' vector to the direction of the weights.

    .. math:: \sum_i r_i L_i - \lambda \cos(r, L), \qquad
       w_i = r_i - \frac{\lambda}{\lVert L\rVert}\left(\frac{r_i}{\lVert r\rVert} -
       \cos(r, L)\,\frac{L_i}{\lVert L\rVert}\right)

    A plain weighted sum ends at an extreme point of the Pareto front where that is not convex. The cosine keeps the
    losses near the ray of `preference`: a task whose loss is below its part gets less weight, and with a large
    `lam` a negative one. Choose it for a given compromise between losses of one unit.

    Needs `losses`. For losses far from zero the weights are near `preference`.

    Args:
      num_tasks: number of tasks `T`.
      lam: :math:`\lambda`, of the pull; 0 for the weighted sum.
      preference: `(T,)`, `r`: the weights, and the wanted ratio of the losses; one over the number of tasks present for
        each of them if None.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves `(T, *shape)` to `(*shape)`.

    Raises:
      ValueError: if `losses` is missing, or `preference` not `(T,)` or negative.

    Example:
      >>> import jax.numpy as jnp, optax, optax_mtl as mtl
      >>> tx = mtl.cosmos(num_tasks=2, lam=5.0)
      >>> _, state = tx.update(jnp.ones((2, 3)), tx.init(jnp.zeros(3)), losses=jnp.array([3.0, 4.0]))
      >>> optax.tree.get(state, "task_weights").tolist()  # the second loss is the larger
      [0.387, 0.585]

    References:
      Ruchte and Grabocka, `Scalable Pareto Front Approximation for Deep Multi-Objective Learning
      <https://arxiv.org/abs/2103.13392>`_, ICDM 2021

    Note:
      The authors draw a new preference for every batch and feed it to the network, which so learns the whole front.
      Here it is fixed, as in TorchJD, whose default of :math:`\lambda = 1` is ours too. (The default of the authors'
      code is 2, meant for Multi-MNIST.) If all losses are zero there is no pull.
    """
    _base.check_number("lam", lam, 0)
    _base.check_preference(preference, _base.check_num_tasks(num_tasks))

    def rule(
        gramian: jax.Array, state: Any, *, losses: jax.Array, present: jax.Array, **_: Any
    ) -> tuple[jax.Array, Any]:
        return cosmos_weights(losses, lam=lam, preference=preference, present=present), state

    return weighting("cosmos", num_tasks, rule, needs_norms=False, needs_losses=True)
