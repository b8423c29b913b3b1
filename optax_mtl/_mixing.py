"""From an elementwise mix of the gradients to an Optax transformation: contract, absentees, shares, state."""

from collections.abc import Callable
import operator
from typing import Any

import jax
from jax import numpy as jnp
import optax

from optax_mtl import _base, _gramian
from optax_mtl._combinators import check_gradients

# mix(task_grads, method_state, *, present, losses, params, **extra_args) -> (update, contributions, method_state)
Mix = Callable[..., tuple[Any, Any, Any]]


def mixer(
    name: str,
    num_tasks: int,
    mix: Mix,
    init: Callable[[_base.Params], Any] = lambda params: (),
) -> optax.GradientTransformationExtraArgs:
    """The transformation whose update `mix` makes of the tasks' gradients element by element.

    The counterpart of `weighting` for methods without a weight vector: the shape contract, the tasks that are absent or
    not finite, and the state stand here.

    Args:
      name: the method's public name, for messages.
      num_tasks: `T`.
      mix: `mix(task_grads, method_state, *, present, losses, params, **extra_args)` returns the update, leaves
        `(*shape)`; what each task contributes to it, leaves `(T, *shape)`; and the method's new state. `present` is
        `(T,)` of bool; whatever the gradients of absent tasks hold, the update must be what it would be without them.
        What is returned as their contribution does not matter.
      init: `init(params)` returns the method's first state.

    Returns:
      An `optax.GradientTransformationExtraArgs` with a `BalanceState`. Its `task_weights` are each task's share of the
      update: of the sum of the contributions' absolute values over all tasks and parameters.
    """
    num_tasks = _base.check_num_tasks(num_tasks)

    def init_fn(params: _base.Params) -> _base.BalanceState:
        return _base.init_balance_state(num_tasks, params, init(params))

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
        check_gradients(updates, num_tasks, params, losses, name)
        if not jax.tree.leaves(updates):
            return updates, state
        norms = _gramian.task_squared_norms(updates)
        present, nonfinite = _base.present_tasks(norms, losses, task_mask, task_finite)

        mixed, contributions, method_state = mix(
            updates, state.method, present=present, losses=losses, params=params, **extra_args
        )
        absolute = jax.tree.map(
            lambda c: jnp.sum(jnp.abs(c), axis=tuple(range(1, c.ndim)), dtype=norms.dtype), contributions
        )
        sizes = jnp.where(present, jax.tree.reduce(operator.add, absolute), 0)
        shares = sizes / jnp.maximum(jnp.sum(sizes), jnp.finfo(norms.dtype).tiny)
        return mixed, _base.next_balance_state(state, shares, present, nonfinite, method_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
