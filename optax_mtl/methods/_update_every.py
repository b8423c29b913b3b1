"""Weights that are computed every few steps, and reused in between."""

from typing import Any, NamedTuple

import jax
from jax import lax, numpy as jnp
import optax

from optax_mtl import _base
from optax_mtl._gramian import Gramian, task_gramian
from optax_mtl._weighting import check_weighting, init_inner, weighting


class UpdateEveryState(NamedTuple):
    """State of `update_every`.

    Attributes:
      inner: what the inner method remembers.
      weights: `(T,)` each task's weight when it was last computed.
      due: `(T,)` int32, for how many more of its task's steps it will do.
    """

    inner: Any
    weights: jax.Array
    due: jax.Array


def update_every(
    num_tasks: int, inner: optax.GradientTransformation, *, every: int
) -> optax.GradientTransformationExtraArgs:
    r"""Computes the weights of any weighting every `every` steps, and reuses them on the new gradients in between.

    Weights change more slowly than gradients. In the steps between, the inner method is not run at all: there is no
    Gramian and no `T x T` problem, only the tasks' norms, which tell whether a task can take part, and the weighted
    sum. With deferred gradients (`value_and_light_grads`) there are not even the norms: such a step costs an ordinary
    one. (Under `jax.vmap` both ways are computed, and one is chosen.) Choose it with these; or around methods whose
    solve is felt, for small networks or many tasks. Guarantees of the inner method hold for the steps in which it runs.

    Needs what the inner method needs.

    Args:
      num_tasks: number of tasks `T`.
      inner: a weighting for as many tasks: any method of this library that weights whole gradients.
      every: how many steps a task's weight is used for; 1 for the inner method as it is.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves `(T, *shape)` to `(*shape)`.

    Raises:
      ValueError: if `inner` is not a weighting, or one for another number of tasks; if `every` is not a positive int.

    Example:
      >>> import jax.numpy as jnp, optax, optax_mtl as mtl
      >>> tx = mtl.update_every(2, mtl.mgda(2), every=2)
      >>> state = tx.init(jnp.zeros(2))
      >>> for scale in (3.0, 1.0, 1.0):
      ...     _, state = tx.update(jnp.array([[1.0, 0.0], [0.0, scale]]), state)
      ...     print(optax.tree.get(state, "task_weights").round(1).tolist())
      [0.9, 0.1]
      [0.9, 0.1]
      [0.5, 0.5]

    References:
      Navon et al., `Multi-Task Learning as a Bargaining Game <https://arxiv.org/abs/2202.01017>`_, ICML 2022: their
      `update_weights_every`

    Note:
      With deferred gradients, a task that is not finite while its weight is zero is not counted as such.

      Only steps in which a task takes part count for its weight. If the weight of any task that is present is due,
      those of all that are present are computed anew, so that tasks that are there in some batches only get theirs. A
      method that learns or averages (`uncertainty`, `cr_mogm`) sees only the steps in which it runs, and one that
      counts epochs counts those. Where tasks come and go, weights that are reused need not sum to what they did.
    """
    num_tasks = _base.check_num_tasks(num_tasks)
    weigher = check_weighting(inner, "update_every")
    every = _base.check_int("every", every, 1)

    def init(dtype: jnp.dtype, params: _base.Params) -> UpdateEveryState:
        first = init_inner(weigher, params, num_tasks, "update_every")
        return UpdateEveryState(first.method, first.task_weights, jnp.zeros(num_tasks, jnp.int32))

    def rule(
        gramian: jax.Array,
        state: UpdateEveryState,
        *,
        present: jax.Array,
        task_grads: Any,
        metric: Any,
        **arguments: Any,
    ) -> tuple[jax.Array, UpdateEveryState]:
        def compute(state: UpdateEveryState) -> UpdateEveryState:
            after: Any
            before = _base.BalanceState(state.weights, present, jnp.zeros_like(state.due), state.inner)
            if weigher.needs_gradients:
                given, in_metric = task_grads, {"metric": metric}
            else:  # for the weights their Gramian will do, and they are not summed here
                given, in_metric = Gramian(task_gramian(task_grads, metric)), {}
            _, after = weigher.update(given, before, task_mask=present, **in_metric, **arguments)
            here = present & after.task_present  # with deferred gradients only the inner method knows who is finite
            due = jnp.where(here, jnp.asarray(every, jnp.int32), state.due)
            return UpdateEveryState(after.method, _base.where_present(here, after.task_weights, state.weights), due)

        is_due = jnp.any(present & (state.due == 0))
        state = lax.cond(is_due, compute, lambda state: state, state)
        return state.weights, state._replace(due=jnp.maximum(state.due - present.astype(jnp.int32), 0))

    return weighting("update_every", num_tasks, rule, init, needs_norms=False, needs_gradients=weigher.needs_gradients)
