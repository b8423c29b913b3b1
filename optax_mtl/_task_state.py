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


def multiply_shares(log_shares: jax.Array, exponents: jax.Array, present: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Multiplies each share by the exponential of `exponents` `(T,)`, and normalises.

    The tasks that are present redistribute what they hold together, so that an absent one keeps its share.

    Returns:
      `(log_shares, shares)`: the logarithms to keep; and the shares among the tasks present, which sum to one.
    """
    anyone = present | ~jnp.any(present)
    held = jax.nn.logsumexp(log_shares, where=anyone)
    raised = log_shares + jnp.clip(exponents.astype(log_shares.dtype), -1e12, 1e12)
    among_present = jax.nn.log_softmax(raised, where=anyone)
    kept = jnp.maximum(among_present + held, _LEAST_LOG_SHARE)
    return _base.where_present(present, kept, log_shares), jnp.where(present, jnp.exp(among_present), 0)


class LearnedScalars(NamedTuple):
    """One learned scalar a task.

    Attributes:
      value: `(T,)`.
      optimizer: state of the optimiser, one for each task: leaves `(T, ...)`.
    """

    value: jax.Array
    optimizer: Any


def init_learned_scalars(optimizer: optax.GradientTransformation, value: jax.Array) -> LearnedScalars:
    """`value` `(T,)` and fresh optimiser states; raises `ValueError` if `optimizer` is none."""
    if not callable(getattr(optimizer, "init", None)):
        raise ValueError(f"optimizer must be an Optax transformation, optax.adam(1e-2) for one, found {optimizer!r}.")
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


def _learn_logarithms(
    optimizer: optax.GradientTransformation, logarithms: LearnedScalars, grads: jax.Array, present: jax.Array
) -> LearnedScalars:
    """As `learn_scalars`, but keeps them in [-60, 60]: for a loss of zero there is no optimum, and no NaN then."""
    learned = learn_scalars(optimizer, logarithms, grads, present)
    return learned._replace(value=jnp.clip(learned.value, -60, 60))


def learn_log_scales(
    optimizer: optax.GradientTransformation,
    log_scales: LearnedScalars,
    scales: jax.Array,
    losses: jax.Array,
    present: jax.Array,
) -> LearnedScalars:
    """One step on `sum_i exp(s_i) L_i - s_i` with respect to the log-scales `s`; `scales` are `exp(s)`, `(T,)`."""
    return _learn_logarithms(optimizer, log_scales, scales * losses - 1, present)


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
    """
    return _learn_logarithms(optimizer, log_variances, penalty_slope - weights * losses, present)
