"""Running means of the tasks' gradients, for the methods that weight these in place of the last batch's."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
import optax

from optax_mtl import _base, _gramian
from optax_mtl._combinators import check_not_gramian, per_task


class RunningMeanState(NamedTuple):
    """State of a running mean.

    Attributes:
      steps: () int32, gradients so far.
      mean: like the parameters, in float32 at least.
    """

    steps: jax.Array
    mean: Any


def tracking(
    name: str,
    num_tasks: int,
    share: Callable[[jax.Array], jax.Array],
    factors: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    *,
    positive_losses: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Takes each task's gradient into its running mean, `y <- y + share(k) * (factor * g - y)`, and passes that on.

    A task that is absent keeps its mean. The weighting that follows sets it aside as `per_task` says.

    Args:
      name: the method's public name, for messages.
      num_tasks: `T`.
      share: `share(k)` is the weight of the task's `k`-th gradient, `k = 1, 2, ...`; the mean starts from zero.
      factors: `factors(norms, losses)`, all `(T,)`, are what the gradients are multiplied by; None for nothing, and
        `losses` are then not needed.
      positive_losses: whether the losses must not be negative.

    Returns:
      An `optax.GradientTransformationExtraArgs` from `(T, *shape)` to `(T, *shape)`.
    """
    num_tasks = _base.check_num_tasks(num_tasks)
    tasks = per_task(_running_mean(share), num_tasks)

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
        check_not_gramian(updates, name)
        _base.check_task_grads(updates, num_tasks, params)
        if factors is not None:
            _base.check_losses(losses, num_tasks, name, positive=positive_losses, task_mask=task_mask)
        if factors is not None and losses is not None and jax.tree.leaves(updates):
            squared = _gramian.task_squared_norms(updates)
            finite = jnp.isfinite(squared)
            task_finite = finite if task_finite is None else finite & task_finite
            updates = _scaled(updates, factors(jnp.sqrt(squared), jnp.asarray(losses, squared.dtype)))
        return tasks.update(
            updates, state, params, losses=losses, task_mask=task_mask, task_finite=task_finite, **extra_args
        )

    return optax.GradientTransformationExtraArgs(tasks.init, update_fn)


def _scaled(task_grads: _base.TaskGrads, factors: jax.Array) -> _base.TaskGrads:
    def scale(leaf: jax.Array) -> jax.Array:
        dtype = _base.accumulator_dtype(leaf)
        columns = factors.astype(dtype).reshape((-1,) + (1,) * (leaf.ndim - 1))
        return (columns * leaf.astype(dtype)).astype(leaf.dtype)

    return jax.tree.map(scale, task_grads)


def _running_mean(share: Callable[[jax.Array], jax.Array]) -> optax.GradientTransformation:
    def init_fn(params: _base.Params) -> RunningMeanState:
        mean = jax.tree.map(lambda p: jnp.zeros(jnp.shape(p), _base.accumulator_dtype(p)), params)
        return RunningMeanState(jnp.zeros((), jnp.int32), mean)

    def update_fn(updates: Any, state: Any, params: _base.Params | None = None) -> tuple[Any, RunningMeanState]:
        steps = state.steps + 1

        def move(mean: jax.Array, grads: jax.Array) -> jax.Array:
            return mean + share(steps.astype(mean.dtype)) * (grads.astype(mean.dtype) - mean)

        mean = jax.tree.map(move, state.mean, updates)
        passed_on = jax.tree.map(lambda m, grads: m.astype(grads.dtype), mean, updates)
        return passed_on, RunningMeanState(steps, mean)

    return optax.GradientTransformation(init_fn, update_fn)
