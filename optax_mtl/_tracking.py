"""Running means of the tasks' gradients, for the methods that weight these in place of the last batch's."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
import optax

from optax_mtl import _base, _gramian


class TrackingState(NamedTuple):
    """State of a weighting of running means.

    Attributes:
      steps: `(T,)` int32, each task's gradients so far.
      mean: leaves `(T, *shape)`, in float32 at least.
      balance: the state of the weighting.
    """

    steps: jax.Array
    mean: Any
    balance: Any


def tracking(
    name: str,
    num_tasks: int,
    share: Callable[[jax.Array], jax.Array],
    balance: optax.GradientTransformationExtraArgs,
    factors: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    *,
    positive_losses: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Takes each task's gradient into its running mean, `y <- y + share(k) * (factor * g - y)`, and weights these.

    A task that is absent, or whose gradient or loss is not finite, keeps its mean and is set aside by the weighting.

    Args:
      name: the method's public name, for messages.
      num_tasks: `T`.
      share: `share(k)` is the weight of the task's `k`-th gradient, `k = 1, 2, ...`; the mean starts from zero.
      balance: the weighting, which sees the means as they are kept: in float32 at least.
      factors: `factors(norms, losses)`, all `(T,)`, are what the gradients are multiplied by; None for nothing, and
        `losses` are then not needed.
      positive_losses: whether the losses must not be negative.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves `(T, *shape)` to `(*shape)`, with a `TrackingState`.
    """
    num_tasks = _base.check_num_tasks(num_tasks)

    def init_fn(params: _base.Params) -> TrackingState:
        mean = _base.zeros_of(params, lead=(num_tasks,))
        return TrackingState(jnp.zeros(num_tasks, jnp.int32), mean, balance.init(params))

    def update_fn(
        updates: _base.TaskGrads,
        state: Any,
        params: _base.Params | None = None,
        *,
        losses: jax.Array | None = None,
        task_mask: jax.Array | None = None,
        task_finite: jax.Array | None = None,
        **extra_args: Any,
    ) -> tuple[Any, Any]:
        _gramian.check_not_gramian(updates, name)
        _base.check_task_grads(updates, num_tasks, params)
        if factors is not None or losses is not None:
            _base.check_losses(losses, num_tasks, name, positive=positive_losses, task_mask=task_mask)
        if not jax.tree.leaves(updates):
            return updates, state
        squared = _gramian.task_squared_norms(updates)
        steps = state.steps + 1
        norms, rates, scales = jnp.sqrt(squared), share(steps.astype(squared.dtype)), jnp.ones_like(squared)
        if factors is not None and losses is not None:
            scales = factors(norms, jnp.asarray(losses, squared.dtype))
        # What the mean would not get rid of again must not enter it.
        bounded = jnp.isfinite((rates * scales * norms) ** 2)
        bounded = bounded if task_finite is None else bounded & task_finite
        present, _ = _base.present_tasks(squared, losses, task_mask, bounded)

        def move(mean: jax.Array, grads: jax.Array) -> jax.Array:
            rate, scale = (x.astype(mean.dtype).reshape((-1,) + (1,) * (mean.ndim - 1)) for x in (rates, scales))
            return mean + rate * (scale * grads.astype(mean.dtype) - mean)

        mean = jax.tree.map(move, state.mean, updates)
        steps, mean = _base.where_present(present, (steps, mean), (state.steps, state.mean))
        balanced, balance_state = balance.update(
            mean, state.balance, params, losses=losses, task_mask=task_mask, task_finite=bounded, **extra_args
        )
        update = jax.tree.map(lambda u, grads: _gramian.narrowed(u, grads.dtype), balanced, updates)
        return update, TrackingState(steps, mean, balance_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
