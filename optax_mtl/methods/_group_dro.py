"""Group DRO: the worst task, found by multiplicative weights."""

from typing import Any

import jax
from jax import numpy as jnp
import optax

from optax_mtl import _base
from optax_mtl._task_state import init_log_shares, multiply_shares
from optax_mtl._weighting import weighting


def group_dro(num_tasks: int, *, step_size: _base.Scalar = 0.01) -> optax.GradientTransformationExtraArgs:
    r"""Group DRO: weights grow exponentially with the losses, towards the worst task.

    .. math:: q_i \leftarrow \frac{q_i \exp(\eta L_i)}{\sum_j q_j \exp(\eta L_j)}, \qquad w = q

    With the descent of the network this is a game whose value is :math:`\min_\theta \max_i L_i`: the weights remember
    all losses so far, so that a task that stays behind keeps gaining. Choose it when the worst task counts and the
    losses have one unit: whatever loss stays the largest ends up with all the weight.

    Needs `losses`. Weights sum to one. An absent task keeps its share; the others redistribute theirs.

    Args:
      num_tasks: number of tasks `T`.
      step_size: :math:`\eta`.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves `(T, *shape)` to `(*shape)`.

    Raises:
      ValueError: if `losses` is missing.

    Example:
      >>> import jax.numpy as jnp, optax, optax_mtl as mtl
      >>> tx = mtl.group_dro(num_tasks=2, step_size=1.0)
      >>> _, state = tx.update(jnp.ones((2, 3)), tx.init(jnp.zeros(3)), losses=jnp.array([1.0, 0.0]))
      >>> optax.tree.get(state, "task_weights").tolist()  # e to 1
      [0.731, 0.269]

    References:
      Sagawa et al., `Distributionally Robust Neural Networks for Group Shifts
      <https://arxiv.org/abs/1911.08731>`_, ICLR 2020

    Note:
      The paper's groups are parts of the data; here they are the tasks. Step size and order (the shares first, then the
      step with the new ones) are those of the authors' code, whose adjustment for the groups' sizes is left out: add it
      to the losses. There, a group without data in the batch counts as one of loss zero. The code of ExcessMTL has it
      as a baseline whose weights sum to `T`. Shares are kept as logarithms: one that underflows can come back.
    """
    _base.check_number("step_size", step_size, 0)

    def rule(
        gramian: jax.Array, log_shares: jax.Array, *, losses: jax.Array, present: jax.Array, **_: Any
    ) -> tuple[jax.Array, jax.Array]:
        log_shares, shares = multiply_shares(log_shares, jnp.asarray(step_size, losses.dtype) * losses, present)
        return shares, log_shares

    return weighting(
        "group_dro",
        num_tasks,
        rule,
        lambda dtype, params: init_log_shares(num_tasks, dtype),
        needs_norms=False,
        needs_losses=True,
    )
