"""Accumulation of the tasks' gradients over several batches, before they are balanced."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax, numpy as jnp
import optax

from optax_mtl import _base, _combinators, _deferred, _gramian


class MultiStepsState(NamedTuple):
    """State of `multi_steps`.

    Attributes:
      mini_step: int32, how many batches have been taken in since the last step; zero right after one.
      step: int32, the steps made.
      asked: `(T,)` bool, the tasks that were not masked in every batch so far.
      counts: `(T,)` int32, how many of the batches each task took part in.
      nonfinite_mini_steps: `(T,)` int32, how often a task was left out of a batch because its gradient or loss was not
        finite, since the beginning. (The method's `nonfinite_count` counts whole steps that a task missed so.)
      losses: `(T,)`, means over the batches that each task took part in.
      task_grads: leaves `(T, *shape)`, in float32 at least, likewise.
      inner_state: the state of the whole chain, which makes the steps.
    """

    mini_step: jax.Array
    step: jax.Array
    asked: jax.Array
    counts: jax.Array
    nonfinite_mini_steps: jax.Array
    losses: jax.Array
    task_grads: Any
    inner_state: Any


def multi_steps(
    tx: optax.GradientTransformation, num_tasks: int, every: int | Callable[[jax.Array], Any]
) -> optax.GradientTransformationExtraArgs:
    """One balanced step for several batches: `optax.MultiSteps` for gradients with a task axis.

    It goes around the whole chain, balancing method and optimiser. Each update takes one batch's task gradients into
    their running mean and returns zeros; every `every`-th hands the means to the chain. The method then balances the
    gradients of the large batch, which is not the same as accumulating balanced gradients
    (`optax.chain(method, optax.MultiSteps(optimiser, k).gradient_transformation())`, which needs no `T` accumulators).

    The means are each task's own, over the batches in which `task_mask` had it and its gradient and loss were finite:
    one bad batch costs a task that batch. A task with none at all is absent from the step. Losses are averaged in the
    same way; other extra arguments (`value_fn`, say) are those of the last batch.

    Where one program can hold all the batches, sum in it instead, in the loss or around the oracle
    (docs/speed_and_memory.md): this also works with deferred gradients, which cannot be kept from one step to the next.

    Args:
      tx: the whole optimiser: it takes task gradients and returns updates for the parameters.
      num_tasks: number of tasks `T`.
      every: how many batches make a step; or a function from the number of steps made to that.

    Returns:
      An `optax.GradientTransformationExtraArgs`. Its state has the accumulators, leaves `(T, *shape)` in float32 at
      least.

    Raises:
      ValueError: if a leaf is not `(T, *param.shape)` (heads with a task axis of 1, of a split loss, cannot be
        accumulated), or the gradients are deferred or a `Gramian`.

    Example:
      >>> import jax.numpy as jnp, optax, optax_mtl as mtl
      >>> tx = mtl.multi_steps(optax.chain(mtl.sum_tasks(2), optax.sgd(1.0)), num_tasks=2, every=2)
      >>> state = tx.init(jnp.zeros(1))
      >>> updates, state = tx.update(jnp.array([[1.0], [5.0]]), state)
      >>> updates.tolist()
      [0.0]
      >>> updates, state = tx.update(jnp.array([[3.0], [5.0]]), state)
      >>> updates.tolist()
      [-7.0]
    """
    num_tasks = _base.check_num_tasks(num_tasks)
    if not callable(every):
        every = _base.check_int("every", every, 1)
    tx = optax.with_extra_args_support(tx)

    def init_fn(params: _base.Params) -> MultiStepsState:
        zeros = jnp.zeros(num_tasks, jnp.int32)
        return MultiStepsState(
            mini_step=jnp.zeros((), jnp.int32),
            step=jnp.zeros((), jnp.int32),
            asked=jnp.zeros(num_tasks, bool),
            counts=zeros,
            nonfinite_mini_steps=jnp.copy(zeros),
            losses=jnp.zeros(num_tasks, _base.accumulator_dtype(params)),
            task_grads=_base.zeros_of(params, lead=(num_tasks,)),
            inner_state=tx.init(params),
        )

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
        if _deferred.is_deferred(updates):
            raise ValueError(
                "multi_steps keeps the tasks' gradients from one step to the next, and these are deferred: they never "
                "exist. Sum over the batches in the loss (docs/speed_and_memory.md, Microbatches), or accumulate the "
                "method's updates: optax.chain(method, optax.MultiSteps(optimiser, k).gradient_transformation())."
            )
        if num_tasks > 1 and params is not None and _has_single_heads(updates, params):
            raise ValueError(
                "multi_steps: the gradients of a split loss have heads with a task axis of 1, which do not tell whose "
                "they are, so that it is not known in which batches they took part. Sum over the batches in the loss "
                "or around the oracle (docs/speed_and_memory.md, Microbatches), or give the loss unsplit."
            )
        _combinators.check_gradients(updates, num_tasks, params, losses, "multi_steps")
        present, nonfinite = _base.present_tasks(_gramian.task_squared_norms(updates), losses, task_mask, task_finite)
        counts = state.counts + present.astype(jnp.int32)

        def take_in(mean: jax.Array, new: jax.Array) -> jax.Array:
            rows = (-1,) + (1,) * (mean.ndim - 1)
            share = 1 / jnp.maximum(counts, 1).astype(mean.dtype).reshape(rows)
            return jnp.where(present.reshape(rows), mean + (new.astype(mean.dtype) - mean) * share, mean)

        taken = MultiStepsState(
            mini_step=state.mini_step + 1,
            step=state.step,
            asked=state.asked | present | nonfinite,
            counts=counts,
            nonfinite_mini_steps=state.nonfinite_mini_steps + nonfinite.astype(jnp.int32),
            losses=state.losses if losses is None else take_in(state.losses, losses),
            task_grads=jax.tree.map(take_in, state.task_grads, updates),
            inner_state=state.inner_state,
        )

        def step(taken: MultiStepsState) -> tuple[Any, MultiStepsState]:
            means = jax.tree.map(lambda mean, new: mean.astype(new.dtype), taken.task_grads, updates)
            given = extra_args if losses is None else {**extra_args, "losses": taken.losses.astype(losses.dtype)}
            out, inner = tx.update(
                means, taken.inner_state, params, task_mask=taken.asked, task_finite=counts > 0, **given
            )
            fresh = jax.tree.map(jnp.zeros_like, taken._replace(inner_state=()))
            return out, fresh._replace(
                step=taken.step + 1, nonfinite_mini_steps=taken.nonfinite_mini_steps, inner_state=inner
            )

        def wait(taken: MultiStepsState) -> tuple[Any, MultiStepsState]:
            return jax.tree.map(lambda out: jnp.zeros(out.shape, out.dtype), jax.eval_shape(step, taken)[0]), taken

        batches = every(state.step) if callable(every) else every
        return lax.cond(taken.mini_step >= batches, step, wait, taken)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _has_single_heads(updates: _base.TaskGrads, params: _base.Params) -> bool:
    leaves, shapes = jax.tree.leaves(updates), [jnp.shape(param) for param in jax.tree.leaves(params)]
    return len(leaves) == len(shapes) and any(
        jnp.shape(leaf) == (1, *shape) for leaf, shape in zip(leaves, shapes, strict=True)
    )
