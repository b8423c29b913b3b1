"""What several methods remember of each task: epoch means of its loss, a share, a learned scalar of its own."""

import math
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
import optax

from optax_mtl import _base


class EpochMeans(NamedTuple):
    """Means of each task's loss over the epochs that are over, and the sums of the one that runs.

    Attributes:
      step: () int32, steps of the running epoch that are over.
      total: `(T,)` sum of the losses in the running epoch.
      counts: `(T,)` int32, steps of the running epoch in which the task took part.
      means: `(T, depth)` means over the last epochs, the latest first.
      epochs: `(T,)` int32, epochs that are over and in which the task took part.
    """

    step: jax.Array
    total: jax.Array
    counts: jax.Array
    means: jax.Array
    epochs: jax.Array


def init_epoch_means(num_tasks: int, depth: int, dtype: jnp.dtype) -> EpochMeans:
    """No epoch is over."""
    return EpochMeans(
        step=jnp.zeros((), jnp.int32),
        total=jnp.zeros(num_tasks, dtype),
        counts=jnp.zeros(num_tasks, jnp.int32),
        means=jnp.ones((num_tasks, depth), dtype),
        epochs=jnp.zeros(num_tasks, jnp.int32),
    )


def add_to_epoch(state: EpochMeans, losses: jax.Array, present: jax.Array, steps_per_epoch: int) -> EpochMeans:
    """Counts one step; at an epoch's end its means become the latest. A task that was never present keeps its own."""
    losses = losses.astype(state.total.dtype)
    step = state.step + 1
    total = state.total + jnp.where(present, losses, 0)
    counts = state.counts + present.astype(jnp.int32)
    over = step >= steps_per_epoch
    shift = over & (counts > 0)
    latest = total / jnp.maximum(counts, 1).astype(total.dtype)
    return EpochMeans(
        step=jnp.where(over, 0, step),
        total=jnp.where(over, 0, total),
        counts=jnp.where(over, 0, counts),
        means=_base.where_present(shift, jnp.column_stack([latest, state.means[:, :-1]]), state.means),
        epochs=state.epochs + shift.astype(jnp.int32),
    )


_LEAST_LOG_SHARE = -1e4  # zero in any dtype, and yet a number


def init_log_shares(num_tasks: int, dtype: jnp.dtype) -> jax.Array:
    """Logarithms `(T,)` of equal shares."""
    return jnp.full(num_tasks, -math.log(num_tasks), dtype)


def multiply_shares(log_shares: jax.Array, exponents: jax.Array, present: jax.Array) -> jax.Array:
    """Multiplies each share by the exponential of `exponents` `(T,)`, and normalises.

    The tasks that are present redistribute what they hold together, so that an absent one keeps its share.
    """
    held = jax.nn.logsumexp(log_shares, where=present)
    changed = log_shares + exponents.astype(log_shares.dtype)
    changed = jax.nn.log_softmax(changed, where=present | ~jnp.any(present)) + held
    return _base.where_present(present, jnp.maximum(changed, _LEAST_LOG_SHARE), log_shares)


class LearnedScalars(NamedTuple):
    """One learned scalar a task.

    Attributes:
      value: `(T,)`.
      optimizer: state of the optimiser, one for each task: leaves `(T, ...)`.
    """

    value: jax.Array
    optimizer: Any


def init_learned_scalars(optimizer: optax.GradientTransformation, value: jax.Array) -> LearnedScalars:
    """`value` `(T,)` and fresh optimiser states."""
    return LearnedScalars(value, jax.vmap(optimizer.init)(value))


def learn_scalars(
    optimizer: optax.GradientTransformation,
    scalars: LearnedScalars,
    grads: jax.Array,
    present: jax.Array,
) -> LearnedScalars:
    """One optimiser step for each task that is present, `grads` `(T,)` being the gradient for its scalar."""
    grads = jnp.clip(grads, -1e15, 1e15)  # so that their squares, in Adam say, are finite
    updates: Any
    updates, states = jax.vmap(optimizer.update)(grads.astype(scalars.value.dtype), scalars.optimizer, scalars.value)
    return _base.where_present(present, LearnedScalars(scalars.value + updates, states), scalars)


def learn_log_variances(
    optimizer: optax.GradientTransformation,
    log_variances: LearnedScalars,
    weights: jax.Array,
    losses: jax.Array,
    present: jax.Array,
    penalty_slope: jax.Array | float = 0.5,
) -> LearnedScalars:
    """One step on `sum_i w_i L_i + s_i / 2` with respect to the log-variances `s`, where `w_i` is `a_i exp(-s_i)`.

    For another penalty than `s_i / 2`, `penalty_slope` is its derivative, `(T,)`.

    They are kept in [-60, 60], so that a loss of zero, for which there is no optimum, does not end in NaN.
    """
    learned = learn_scalars(optimizer, log_variances, penalty_slope - weights * losses, present)
    return learned._replace(value=jnp.clip(learned.value, -60, 60))


def multiply_weights(log_weights: jax.Array, gains: jax.Array, present: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Multiplies the weights of the tasks that are present by the exponentials of their gains.

    The weights that are kept sum to one over all tasks. Those of the tasks present keep their sum, as the others keep
    their weights; as they are used, they sum to one over the tasks present.

    Args:
      log_weights: `(T,)`.
      gains: `(T,)`.
      present: `(T,)` of bool.

    Returns:
      `(log_weights, weights)`: the logarithms to keep, and the weights to use, zero for absent tasks.
    """
    raised = log_weights + jnp.clip(gains.astype(log_weights.dtype), -1e12, 1e12)
    anyone = present | ~jnp.any(present)
    before, after = (jax.nn.logsumexp(x, where=anyone) for x in (log_weights, raised))
    kept = _base.where_present(present, raised - after + before, log_weights)
    return kept, jnp.where(present, _base.masked_softmax(raised, present), 0)
