"""MGDA: the smallest convex combination of the gradients."""

from typing import Any

import jax
from jax import numpy as jnp
import optax

from optax_mtl import _base, _solvers
from optax_mtl._weighting import weighting

_NORMALIZATIONS = ("none", "l2", "loss", "loss+")


def mgda_weights(gramian: jax.Array, *, present: jax.Array | None = None) -> jax.Array:
    """Weights of the min-norm point of the convex hull of the gradients.

    Args:
      gramian: `(T, T)`.
      present: `(T,)` of bool, the tasks that take part; all if None.

    Returns:
      `(T,)`, non-negative, summing to one.
    """
    if present is None:
        present = jnp.ones(gramian.shape[0], bool)
    return _solvers.min_norm_point(gramian, present)[0]


def mgda(num_tasks: int, *, normalization: str = "none") -> optax.GradientTransformationExtraArgs:
    r"""Multiple-gradient descent: the direction that improves every task, and is zero where none does.

    .. math:: d = G^\top \alpha, \qquad \alpha = \arg\min_{\alpha \in \Delta} \lVert G^\top \alpha \rVert^2

    so that :math:`\langle g_i, d\rangle \ge \lVert d\rVert^2` for every task: a common descent direction, or zero at a
    Pareto-stationary point. Choose it for that guarantee. It leans to the task with the smallest gradient, and a task
    whose gradient is zero stops the training. `normalization` evens out the tasks' scales, but gives the guarantee up,
    as its weights are applied to the gradients as they are (`edm` has both).

    Needs gradients (and `losses` for the `"loss"` normalizations). Weights sum to one.

    Args:
      num_tasks: number of tasks `T`.
      normalization: what the gradients are divided by in the search for the weights: `"none"`; `"l2"`, their norms;
        `"loss"`, the losses; `"loss+"`, both. The weights are applied to the gradients as they are.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves `(T, *shape)` to `(*shape)`.

    Raises:
      ValueError: if a `"loss"` normalization is not given `losses`, or a negative one.

    Example:
      >>> import jax.numpy as jnp, optax_mtl as mtl
      >>> tx = mtl.mgda(num_tasks=2)
      >>> tx.update(jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]), tx.init(jnp.zeros(3)))[0].tolist()
      [0., 1., 1.]

    References:
      Désidéri, `Multiple-gradient descent algorithm (MGDA) for multiobjective optimization
      <https://doi.org/10.1016/j.crma.2012.03.014>`_, C. R. Math. 350, 2012

      Sener and Koltun, `Multi-Task Learning as Multi-Objective Optimization <https://arxiv.org/abs/1810.04650>`_,
      NeurIPS 2018

    Note:
      The min-norm point is exact. The authors' Frank-Wolfe code never goes quite to a vertex (weights 0.999 and 0.001),
      and LibMTL applies the weights to the *normalized* gradients. A loss of zero counts as no loss: its gradient is
      left as it is.
    """
    _base.check_choice("normalization", normalization, _NORMALIZATIONS)
    uses_losses = normalization.startswith("loss")

    def rule(
        gramian: jax.Array, state: _solvers.Solved, *, present: jax.Array, losses: jax.Array | None, **_: Any
    ) -> tuple[jax.Array, _solvers.Solved]:
        unit, lengths = _solvers.cosines(gramian)
        if normalization in ("l2", "loss+"):
            lengths = (lengths > 0).astype(lengths.dtype)
        if uses_losses and losses is not None:
            lengths = lengths / jnp.where(losses > 0, losses, 1)
        lengths = lengths * _solvers.reciprocal(jnp.max(lengths))  # only their ratios matter
        weights, residual = _solvers.min_norm_point(_solvers.scaled(unit, lengths), present)
        return weights, _solvers.Solved(residual)

    return weighting(
        "mgda", num_tasks, rule, _solvers.Solved.init, needs_losses=uses_losses, positive_losses=uses_losses
    )
