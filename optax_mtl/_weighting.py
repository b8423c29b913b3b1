"""From a rule for the weights to an Optax transformation: contract, Gramian, absentees, combination, state."""

from collections.abc import Callable
from typing import Any

import jax
from jax import numpy as jnp
import optax

from optax_mtl import _base, _gramian

# rule(gramian, method_state, *, present, losses, params, task_grads, **extra_args) -> (weights, method_state)
Rule = Callable[..., tuple[jax.Array, Any]]


class Weighting(optax.GradientTransformationExtraArgs):
    """A transformation whose update is the weighted sum its `task_weights` tell: what wrappers around weights take."""


def weighting(
    name: str,
    num_tasks: int,
    rule: Rule,
    init: Callable[[jnp.dtype, _base.Params], Any] = lambda dtype, params: (),
    *,
    needs_gramian: bool = True,
    needs_losses: bool = False,
    positive_losses: bool = False,
) -> Weighting:
    """The transformation whose update is `sum_i w_i g_i`, with `w` from `rule`.

    Every weighting is one call of this function. What is the same for all stands here, once: the shape contract, the
    Gramian (or only its diagonal), the tasks that are absent or not finite, the combination, and the state.

    Args:
      name: the method's public name, for messages.
      num_tasks: `T`.
      rule: `rule(gramian, method_state, *, present, losses, params, task_grads, **extra_args)` returns the weights
        `(T,)` and the method's new state. `gramian` is `(T, T)`, with zero rows and columns for absent tasks (only
        the diagonal if not `needs_gramian`); `present` is `(T,)` of bool; `losses` is `(T,)`, one where a task is
        absent, or None. The rule must give what it would give had the absent tasks never existed, and must keep
        their part of its state; their weights are set to zero here. `equal_weights`, `masked_softmax`,
        `where_present` (in `_base`) and `reciprocal` (in `_solvers`) help with that.
      init: `init(dtype, params)` returns the method's first state; `dtype` is the weights'.
      needs_gramian: whether the rule looks at more than the diagonal.
      needs_losses: whether `losses` must be given.
      positive_losses: whether the rule is for losses that are not negative (it takes their logarithm, say).

    Returns:
      An `optax.GradientTransformationExtraArgs`, marked as a `Weighting`, with a `BalanceState`.
    """
    num_tasks = _base.check_num_tasks(num_tasks)

    def init_fn(params: _base.Params) -> _base.BalanceState:
        return _base.init_balance_state(num_tasks, params, init(_base.accumulator_dtype(params), params))

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
        if isinstance(updates, _gramian.Gramian):
            _check_gramian(updates, num_tasks)
        else:
            _base.check_task_grads(updates, num_tasks, params)
        if needs_losses or losses is not None:
            _base.check_losses(losses, num_tasks, name, positive=positive_losses, task_mask=task_mask)
        if not jax.tree.leaves(updates):  # optax.partition gives every leaf to somebody else: nothing to balance
            return updates, state

        if needs_gramian:
            gramian = _gramian.task_gramian(updates)
        else:
            gramian = jnp.diag(_gramian.task_squared_norms(updates))
        present, nonfinite = _base.present_tasks(jnp.diagonal(gramian), losses, task_mask, task_finite)
        gramian = jnp.where(jnp.outer(present, present), gramian, 0)
        if losses is not None:
            losses = jnp.where(present, jnp.asarray(losses, gramian.dtype), 1)

        weights, method_state = rule(
            gramian,
            state.method,
            present=present,
            losses=losses,
            params=params,
            task_grads=updates,
            **extra_args,
        )
        weights = jnp.where(present, weights, 0)
        return (
            _gramian.combine(weights, updates),
            _base.next_balance_state(state, weights, present, nonfinite, method_state),
        )

    return Weighting(init_fn, update_fn)


def check_weighting(inner: Any, method: str) -> Weighting:
    """Returns `inner`, which `method` wraps, if it is a `Weighting`; raises `ValueError` otherwise."""
    if not isinstance(inner, Weighting):
        raise ValueError(
            f"{method} acts on the weights of its inner method, and this one has none, or is wrapped itself: found "
            f"{inner!r}. Give it a weighting as it is, {method}(num_tasks, optax_mtl.mgda(num_tasks)); put chains, "
            "per_task, shared_and_heads and optax.inject_hyperparams around the whole. (Methods that mix elementwise, "
            "like scale_by_mao, have no weights.)"
        )
    return inner


def init_inner(inner: Weighting, params: _base.Params, num_tasks: int, method: str) -> _base.BalanceState:
    """The first state of `inner`, which `method` wraps; raises `ValueError` if it is for another number of tasks."""
    state: Any = inner.init(params)
    if state.task_weights.shape != (num_tasks,):
        raise ValueError(
            f"{method} was built with num_tasks={num_tasks}, and its inner method with {state.task_weights.shape[0]}. "
            "Give both the same."
        )
    return state


def _check_gramian(gramian: _gramian.Gramian, num_tasks: int) -> None:
    if jnp.shape(gramian.matrix) != (num_tasks, num_tasks):
        raise ValueError(
            f"Gramian has shape {jnp.shape(gramian.matrix)}, wanted ({num_tasks}, {num_tasks}). Compute it with "
            "optax_mtl.Gramian(optax_mtl.task_gramian(task_grads)), with the num_tasks of the method."
        )
