"""From an elementwise mix of the gradients to an Optax transformation: contract, absentees, shares, state."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
import optax

from optax_mtl import _base, _gramian, _shards
from optax_mtl._combinators import check_gradients

# mix(task_grads, method_state, *, present, losses, params, **extra_args) -> (update, sizes, method_state)
Mix = Callable[..., tuple[Any, jax.Array, Any]]


class MixState(NamedTuple):
    """What every mixer remembers, as the `method` of its `BalanceState`.

    Attributes:
      block_weights: `(L, T)`, each task's share of the last update of each leaf, in the order of `jax.tree.leaves`: of
        the sum of the contributions' absolute values over the leaf. A row of zeros for a leaf without an update.
      method: what the method itself remembers; `()` if it is stateless.
    """

    block_weights: jax.Array
    method: Any


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
        `(*shape)`; the size of what each task contributes to each leaf of it, `(L, T)` (`absolute_sums` makes it of
        contributions); and the method's new state. `present` is `(T,)` of bool; whatever the gradients of absent tasks
        hold, the update must be what it would be without them. Their sizes do not matter.
      init: `init(params)` returns the method's first state.

    Returns:
      An `optax.GradientTransformationExtraArgs` with a `BalanceState` of a `MixState`. Its `task_weights` are each
      task's share of the update: of the sum of the contributions' absolute values over all tasks and parameters. Its
      `block_weights` are the same, leaf by leaf.
    """
    num_tasks = _base.check_num_tasks(num_tasks)

    def init_fn(params: _base.Params) -> _base.BalanceState:
        block_weights = jnp.zeros((len(jax.tree.leaves(params)), num_tasks), _base.accumulator_dtype(params))
        return _base.init_balance_state(num_tasks, params, MixState(block_weights, init(params)))

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

        mixed, sizes, method_state = mix(
            updates, state.method.method, present=present, losses=losses, params=params, **extra_args
        )
        sizes = jnp.where(present[None], sizes.astype(norms.dtype), 0)
        method = MixState(_shares(sizes), method_state)
        return mixed, _base.next_balance_state(state, _shares(jnp.sum(sizes, axis=0)), present, nonfinite, method)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def absolute_sums(contributions: Any) -> jax.Array:
    """The sum of absolute values of each task's contribution to each leaf, `(L, T)`, of leaves `(T, *shape)`."""
    dtype = _base.accumulator_dtype(contributions)
    sums = [jnp.sum(jnp.abs(c), axis=tuple(range(1, c.ndim)), dtype=dtype) for c in jax.tree.leaves(contributions)]
    return jnp.stack([_shards.total([of_leaf]) for of_leaf in sums])


def _shares(sizes: jax.Array) -> jax.Array:
    """`sizes` divided by their sum over the tasks, the last axis; zero where that is zero."""
    return sizes / jnp.maximum(jnp.sum(sizes, axis=-1, keepdims=True), jnp.finfo(sizes.dtype).tiny)


def first_moments(params: _base.Params, num_tasks: int, mu_dtype: Any) -> Any:
    """Leaves `(T, *shape)` of zeros, in the parameters' dtype if `mu_dtype` is None."""
    return jax.tree.map(lambda p: _base.zeros_of(p, mu_dtype or jnp.result_type(p), lead=(num_tasks,)), params)


def second_moments(params: _base.Params, num_tasks: int) -> Any:
    """Leaves `(T, *shape)` of zeros, in float32 at least: in bfloat16, `0.999 * v` would round to `v`."""
    return _base.zeros_of(params, lead=(num_tasks,))


def per_leaf(factors: jax.Array, leaf: jax.Array) -> jax.Array:
    """One number a task, `(T,)`, in a shape that multiplies a leaf `(T, *shape)`."""
    return factors.reshape((-1,) + (1,) * (leaf.ndim - 1))


def optimiser(
    scaled: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: _base.Scalar,
    mask: Any,
) -> optax.GradientTransformationExtraArgs:
    """A preconditioned mix, then decoupled weight decay, then the learning rate: as `optax.adamw` is put together."""
    no_decay = isinstance(weight_decay, int | float) and weight_decay == 0  # then the parameters are not needed either
    decay = optax.identity() if no_decay else optax.add_decayed_weights(weight_decay, mask)
    return optax.chain(scaled, decay, optax.scale_by_learning_rate(learning_rate))
