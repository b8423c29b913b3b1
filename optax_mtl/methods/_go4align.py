"""GO4Align: tasks in groups, each group with one weight."""

from typing import Any

import jax
from jax import lax, numpy as jnp
import optax

from optax_mtl import _base
from optax_mtl._solvers import reciprocal
from optax_mtl._task_state import init_log_shares, multiply_shares
from optax_mtl._weighting import weighting


def _segment_costs(values: jax.Array, counted: jax.Array) -> jax.Array:
    """`(T + 1, T + 1)`: the squared deviations of `values[i:j]` from their mean; infinite for `j < i`."""
    edges = jnp.arange(len(values) + 1)
    before = edges[None, :-1] < edges[:, None]  # (T + 1, T): which values come before which end

    def from_start(start: jax.Array) -> jax.Array:
        inside = before & ((edges[:-1] >= start) & counted)[None]
        number = jnp.maximum(jnp.sum(inside, axis=1), 1).astype(values.dtype)
        means = jnp.sum(jnp.where(inside, values[None], 0), axis=1) / number
        costs = jnp.sum(jnp.where(inside, jnp.square(values[None] - means[:, None]), 0), axis=1)
        return jnp.where(edges < start, jnp.inf, costs)

    return lax.map(from_start, edges)


def group_means(values: jax.Array, num_groups: int, *, present: jax.Array | None = None) -> jax.Array:
    """Replaces each value by the mean of its group, for the groups of least squared deviation: exact 1-D K-means.

    Optimal groups are contiguous in sorted order. So the best way to cut the first `j` values into `k` groups ends in
    some group `i:j`, and before it is the best way to cut the first `i` into `k - 1`: a dynamic program.

    Args:
      values: `(T,)`.
      num_groups: the most groups there may be.
      present: `(T,)` of bool, the tasks that are grouped; all if None.

    Returns:
      `(T,)`, zero for the others.
    """
    num_tasks = len(values)
    present = jnp.ones(num_tasks, bool) if present is None else present
    values = jnp.where(present, values, 0)
    order = jnp.argsort(jnp.where(present, values, jnp.inf))
    relative = values * reciprocal(jnp.max(jnp.abs(values)))  # squares must not underflow
    costs = _segment_costs(relative[order], present[order])

    def add_group(least: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        totals = least[:, None] + costs
        return jnp.min(totals, axis=0), jnp.argmin(totals, axis=0)

    def take_group(end: jax.Array, starts: jax.Array) -> tuple[jax.Array, jax.Array]:
        return starts[end], starts[end]

    none = jnp.where(jnp.arange(num_tasks + 1) == 0, 0, jnp.inf).astype(costs.dtype)
    _, best_starts = lax.scan(add_group, none, length=num_groups)
    _, starts = lax.scan(take_group, jnp.array(num_tasks, best_starts.dtype), best_starts, reverse=True)

    rank = jnp.zeros_like(order).at[order].set(jnp.arange(num_tasks, dtype=order.dtype))
    group = jnp.sum(rank[:, None] >= starts[None].astype(rank.dtype), axis=1)
    together = (group[:, None] == group[None]) & jnp.outer(present, present)
    number = jnp.maximum(jnp.sum(together, axis=1), 1).astype(values.dtype)
    return jnp.sum(jnp.where(together, values[None], 0), axis=1) / number


def go4align_weights(
    losses: jax.Array, shares: jax.Array, num_groups: int, *, present: jax.Array | None = None
) -> jax.Array:
    r"""Group means of :math:`q_i\, \bar L / L_i`.

    Args:
      losses: `(T,)`, positive.
      shares: `(T,)`, `q`.
      num_groups: the most groups there may be.
      present: `(T,)` of bool, the tasks that take part; all if None.

    Returns:
      `(T,)`, positive, zero for absent tasks.
    """
    present = jnp.ones(losses.shape, bool) if present is None else present
    losses = jnp.where(present, losses, 1)
    mean = jnp.sum(_base.equal_weights(present, losses.dtype) * losses)
    scales = jnp.minimum(mean / losses, 1e12)
    return group_means(scales * shares, num_groups, present=present)


def go4align(
    num_tasks: int, *, num_groups: int = 2, beta: _base.Scalar = 1e-4
) -> optax.GradientTransformationExtraArgs:
    r"""GO4Align: brings the losses to one scale, and gives tasks of like progress one weight.

    .. math:: \gamma_i = q_i\,\frac{\bar L}{L_i}, \qquad
       q_i \leftarrow \frac{q_i \exp(-\beta L_i)}{\sum_j q_j \exp(-\beta L_j)}

    are clustered by K-means into `num_groups` groups, and the weight of a task is the mean of its group. The first
    factor evens out the losses' scales at every step; the second, which remembers all losses so far, lowers those of
    tasks that keep large ones. Choose it for many tasks of which some go together.

    Needs positive `losses`; a task whose loss is zero has nothing left to gain and is left out of the step. Equal
    losses give weights that sum to one; otherwise they sum to nothing in particular.

    Args:
      num_tasks: number of tasks `T`.
      num_groups: `K`, the most groups there may be. With one, all weights are equal; with `num_tasks`, they are
        :math:`\gamma`.
      beta: :math:`\beta`, how much a loss lowers its task's share.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves `(T, *shape)` to `(*shape)`.

    Raises:
      ValueError: if `losses` is missing or negative, or `num_groups` not a positive int.

    Example:
      >>> import jax.numpy as jnp, optax, optax_mtl as mtl
      >>> tx = mtl.go4align(num_tasks=3, num_groups=2)
      >>> _, state = tx.update(jnp.ones((3, 2)), tx.init(jnp.zeros(2)), losses=jnp.array([1.0, 1.1, 6.0]))
      >>> optax.tree.get(state, "task_weights").tolist()  # two small losses, and a large one
      [0.859, 0.859, 0.150]

    References:
      Shen et al., `GO4Align: Group Optimization for Multi-Task Alignment <https://arxiv.org/abs/2404.06486>`_,
      NeurIPS 2024

    Note:
      The scale is the paper's (eq. 5), with the mean of the losses; the authors' code has their sum, which makes the
      weights `T` times as large. K-means is exact, by a dynamic program on the sorted values, and so deterministic; for
      theirs, the published file lacks the import. The paper tunes `num_groups`: the default of 2 is ours, that of the
      authors' script is 1. The shares are kept as logarithms, and an absent task keeps its own.
    """
    num_groups = _base.check_static_int("num_groups", num_groups, 1)
    _base.check_number("beta", beta, 0)

    def rule(
        gramian: jax.Array, log_shares: jax.Array, *, losses: jax.Array, present: jax.Array, **_: Any
    ) -> tuple[jax.Array, jax.Array]:
        present = present & (losses >= jnp.finfo(losses.dtype).tiny)
        log_shares, shares = multiply_shares(log_shares, -jnp.asarray(beta, losses.dtype) * losses, present)
        return go4align_weights(losses, shares.astype(losses.dtype), num_groups, present=present), log_shares

    return weighting(
        "go4align",
        num_tasks,
        rule,
        lambda dtype, params: init_log_shares(num_tasks, dtype),
        needs_norms=False,
        needs_losses=True,
        positive_losses=True,
    )
