"""Transformations around balancing methods: per task before them, per group of leaves around them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
import optax

from optax_mtl import _base, _blocks, _gramian, _weighting


def sum_tasks(num_tasks: int) -> optax.GradientTransformationExtraArgs:
    """Sums the tasks' gradients: the gradient of the summed losses. All weights are one.

    Args:
      num_tasks: number of tasks `T`.

    Returns:
      An `optax.GradientTransformationExtraArgs`; its state is a `BalanceState`.

    Example:
      >>> import jax.numpy as jnp, optax_mtl as mtl
      >>> tx = mtl.sum_tasks(num_tasks=2)
      >>> tx.update(jnp.array([[1.0, 0.0], [2.0, 3.0]]), tx.init(jnp.zeros(2)))[0]
      Array([3., 3.], dtype=float32)
    """

    def ones(gramian: jax.Array, state: Any, **_: Any) -> tuple[jax.Array, Any]:
        return jnp.ones_like(gramian[0]), state

    return _weighting.weighting("sum_tasks", num_tasks, ones, needs_norms=False)


def mean_tasks(num_tasks: int) -> optax.GradientTransformationExtraArgs:
    """Averages the gradients of the tasks that are present: weights one over their number.

    Args:
      num_tasks: number of tasks `T`.

    Returns:
      An `optax.GradientTransformationExtraArgs`; its state is a `BalanceState`.

    Example:
      >>> import jax.numpy as jnp, optax_mtl as mtl
      >>> tx = mtl.mean_tasks(num_tasks=2)
      >>> tx.update(jnp.array([[1.0, 0.0], [2.0, 3.0]]), tx.init(jnp.zeros(2)))[0]
      Array([1.5, 1.5], dtype=float32)
    """

    def equal(gramian: jax.Array, state: Any, *, present: jax.Array, **_: Any) -> tuple[jax.Array, Any]:
        return _base.equal_weights(present, gramian.dtype), state

    return _weighting.weighting("mean_tasks", num_tasks, equal, needs_norms=False)


def _is_accumulator(node: Any) -> bool:
    return isinstance(node, optax.MultiStepsState)


def per_task(inner: optax.GradientTransformation, num_tasks: int) -> optax.GradientTransformationExtraArgs:
    """Runs a transformation on each task's own gradient, state and all.

    `optax.chain(per_task(optax.scale_by_adam(), T), mgda(T))` balances what Adam would make of each task alone;
    `per_task(optax.clip_by_global_norm(1.0), T)` clips task by task. Placed before a balancing method, this is what
    keeps stateful transformations right: on their own they keep one state for all tasks' gradients.

    A task that is masked keeps its state and passes on zeros. A task whose gradient or loss is not finite keeps its
    state too, and passes on NaN, so that the balancing method behind sets it aside and counts it. Random keys in the
    state of `inner` (typed keys, or fields whose name has `key` or `rng` in it) are split, one for each task.

    Args:
      inner: any Optax transformation of ordinary gradients.
      num_tasks: number of tasks `T`.

    Returns:
      An `optax.GradientTransformationExtraArgs` from `(T, *shape)` to `(T, *shape)`; its state is that of `inner` with
      a leading task axis on every leaf.

    Raises:
      ValueError: if a leaf of the updates is not `(T, *param.shape)`, or if they are a `Gramian`.

    Example:
      >>> import jax.numpy as jnp, optax, optax_mtl as mtl
      >>> tx = optax.chain(mtl.per_task(optax.clip_by_global_norm(1.0), 2), mtl.sum_tasks(2))
      >>> tx.update(jnp.array([[30.0, 40.0], [0.0, 0.5]]), tx.init(jnp.zeros(2)))[0].tolist()
      [0.6, 1.3]
    """
    num_tasks = _base.check_num_tasks(num_tasks)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: _base.Params) -> Any:
        state = inner.init(params)
        if any(map(_is_accumulator, jax.tree.leaves(state, is_leaf=_is_accumulator))):
            raise ValueError(
                "per_task: optax.MultiSteps returns zeros between its steps, and these would be balanced. To "
                "accumulate the tasks' gradients, wrap the whole chain: optax_mtl.multi_steps(chain, num_tasks, every)."
            )
        return _base.copies(state, num_tasks)

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
        check_gradients(updates, num_tasks, params, losses, "per_task")
        if losses is not None:
            extra_args["losses"] = losses
        if not jax.tree.leaves(updates):
            return updates, state
        norms = _gramian.task_squared_norms(updates)
        present, nonfinite = _base.present_tasks(norms, losses, task_mask, task_finite)

        def update_one(grads: _base.Params, inner_state: Any) -> tuple[Any, Any]:
            return inner.update(grads, inner_state, params, **extra_args)

        new_updates, new_state = jax.vmap(update_one)(updates, state)
        absent = jax.tree.map(
            lambda u: jnp.broadcast_to(
                jnp.where(nonfinite, jnp.nan, 0).astype(u.dtype).reshape((-1,) + (1,) * (u.ndim - 1)),
                u.shape,
            ),
            new_updates,
        )
        return (
            _base.where_present(present, new_updates, absent),
            _base.where_present(present, new_state, state),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def check_gradients(
    updates: _base.TaskGrads, num_tasks: int, params: _base.Params | None, losses: jax.Array | None, method: str
) -> None:
    """Raises `ValueError` unless a method that acts on every entry was given what it needs, and no `Gramian`."""
    _gramian.check_not_gramian(updates, method)
    _base.check_task_grads(updates, num_tasks, params)
    if losses is not None:
        _base.check_losses(losses, num_tasks, method)


class SharedAndHeadsState(NamedTuple):
    """State of `shared_and_heads`.

    Attributes:
      shared: the state of the method that balances the shared leaves.
    """

    shared: Any


def shared_and_heads(method: optax.GradientTransformation, shared: Any) -> optax.GradientTransformationExtraArgs:
    """Balances the shared parameters and leaves each task's own head alone.

    A head sees its own task only: there is nothing to balance, and most papers apply their method to the shared
    parameters only. Here the method is given the shared leaves, so that its Gramian is theirs, and the gradients of the
    other leaves are summed over the tasks. If the method's state has `head_weights` `(T,)` (as `ial`'s has), the sum is
    weighted by them. Without this wrapper, a weighting scales head `i` by the weight of task `i` as well.

    The heads' gradients come out as they are: put the optimiser behind the wrapper, for trunk and heads alike. (So do
    not wrap what preconditions by itself: `con_fig_momentum`, `apt`, or `scale_by_mao`, which gives each head its own
    task's Adam.)

    A leaf that only one task reaches may have a task axis of length 1, and then carries no zeros for the other tasks.

    Args:
      method: a balancing method, or a chain that ends in one.
      shared: which leaves are shared: a tree of labels like `params`, or a prefix of it, or a function from a leaf's
        path (a string such as `"trunk/dense/kernel"`) to its label. The label is True or `"shared"` for a shared leaf;
        for a head, False, any other string, or the index of the task that owns it.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves `(T, *shape)` to `(*shape)`. A `value_fn` among the extra
      args is given whole parameters, with the heads as they are.

    Raises:
      ValueError: if no leaf is shared; if a leaf is not `(T, *param.shape)` or, for a head, `(1, *param.shape)`; if a
        head with a task axis of length 1 would have to be weighted or masked, and its label does not say whose it is.

    Example:
      >>> import jax.numpy as jnp, optax_mtl as mtl
      >>> params = {"trunk": jnp.zeros(2), "left": jnp.zeros(1), "right": jnp.zeros(1)}
      >>> trunk_grads = jnp.array([[1.0, 0.0], [0.0, 2.0]])
      >>> task_grads = {"trunk": trunk_grads, "left": jnp.ones((1, 1)), "right": jnp.ones((1, 1))}
      >>> tx = mtl.shared_and_heads(mtl.mgda(2), shared={"trunk": True, "left": 0, "right": 1})
      >>> updates, _ = tx.update(task_grads, tx.init(params), params)
      >>> updates["trunk"].tolist(), updates["left"].tolist()
      ([0.8, 0.4], [1.0])
    """
    method = optax.with_extra_args_support(method)

    def init_fn(params: _base.Params) -> SharedAndHeadsState:
        trunk = _keep_shared(params, _labels(shared, params))
        if jax.tree.leaves(params) and not jax.tree.leaves(trunk):
            raise ValueError(
                "shared_and_heads: `shared` marks no leaf as shared, so there is nothing to balance. Label the shared "
                'leaves True or "shared".'
            )
        return SharedAndHeadsState(method.init(trunk))

    def update_fn(
        updates: _base.TaskGrads,
        state: Any,
        params: _base.Params | None = None,
        *,
        task_mask: jax.Array | None = None,
        task_finite: jax.Array | None = None,
        value_fn: Callable[[_base.Params], Any] | None = None,
        **extra_args: Any,
    ) -> tuple[Any, SharedAndHeadsState]:
        if isinstance(updates, _gramian.Gramian):
            extra_args |= {"task_mask": task_mask, "task_finite": task_finite, "value_fn": value_fn}
            weights, inner = method.update(updates, state.shared, params, **extra_args)
            return weights, SharedAndHeadsState(inner)
        labels = _labels(shared, updates)
        leaves, treedef = jax.tree.flatten(updates)
        labelled = list(zip(leaves, labels, strict=True))
        num_tasks = max((leaf.shape[0] for leaf, label in labelled if _is_shared(label) and leaf.ndim), default=1)
        _base.check_task_grads(updates, num_tasks, params, single=True)
        for label in labels:
            if _is_owner(label) and not 0 <= label < num_tasks:
                raise ValueError(f"shared_and_heads: `shared` names task {label} as an owner; there are {num_tasks}.")

        trunk_params = None if params is None else _keep_shared(params, labels)
        if value_fn is not None:
            _base.check_params(params, "shared_and_heads with a value_fn")
            extra_args["value_fn"] = lambda trunk: value_fn(_fill_heads(trunk, params, labels))
        heads = [(leaf, label) for leaf, label in labelled if not _is_shared(label)]
        finite = _finite_heads(heads, num_tasks)
        trunk_updates, inner = method.update(
            _keep_shared(updates, labels),
            state.shared,
            trunk_params,
            task_mask=task_mask,
            task_finite=finite if task_finite is None else finite & task_finite,
            **extra_args,
        )

        # The inner method has decided who takes part. (A chain or a partition may hold several that have.)
        present = [leaf for _, leaf in optax.tree.get_all_with_path(inner, "task_present")]
        head_weights = optax.tree.get(inner, "head_weights")
        needs_owner = head_weights is not None or task_mask is not None
        if head_weights is None:
            head_weights = jnp.ones(num_tasks, jnp.float32)
        elif head_weights.ndim == 2:  # of blockwise: they come of the losses, and are the same for every block
            head_weights = head_weights[0]
        head_weights = jnp.where(jnp.all(jnp.stack([finite, *present]), axis=0), head_weights, 0)

        def sum_head(head: jax.Array, label: Any) -> jax.Array:
            if head.shape[0] == num_tasks:
                return _gramian.combine(head_weights, head)
            if _is_owner(label):
                return _gramian.combine(head_weights[label][None], head)
            if needs_owner:
                raise ValueError(
                    "shared_and_heads: a head with a task axis of length 1 cannot be masked or weighted unless its "
                    f"label in `shared` is the index of the task that owns it; found the label {label!r}."
                )
            return _gramian.combine(_rows_finite(head).astype(jnp.float32), head)

        trunk_leaves = iter(jax.tree.leaves(trunk_updates))
        merged = [next(trunk_leaves) if _is_shared(label) else sum_head(leaf, label) for leaf, label in labelled]
        return treedef.unflatten(merged), SharedAndHeadsState(inner)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _is_shared(label: Any) -> bool:
    return label is True or (isinstance(label, str) and label == "shared")


def _is_owner(label: Any) -> bool:
    return isinstance(label, int) and not isinstance(label, bool)


def _labels(shared: Any, tree: Any) -> list[Any]:
    return _blocks.leaf_labels(shared, tree, "shared_and_heads: `shared`")


def _keep_shared(tree: Any, labels: list[Any]) -> Any:
    """`tree` with its heads taken out, as `optax.masked` would."""
    leaves, treedef = jax.tree.flatten(tree)
    kept = [leaf if _is_shared(label) else optax.MaskedNode() for leaf, label in zip(leaves, labels, strict=True)]
    return treedef.unflatten(kept)


def _fill_heads(trunk: Any, params: Any, labels: list[Any]) -> _base.Params:
    """`params` with the shared leaves taken from `trunk`."""
    leaves, treedef = jax.tree.flatten(params)
    shared = iter(jax.tree.leaves(trunk))
    labelled = zip(leaves, labels, strict=True)
    return treedef.unflatten([next(shared) if _is_shared(label) else leaf for leaf, label in labelled])


def _rows_finite(leaf: jax.Array) -> jax.Array:
    return jnp.isfinite(_gramian.task_squared_norms(leaf))


def _finite_heads(heads: list[tuple[jax.Array, Any]], num_tasks: int) -> jax.Array:
    """`(T,)` of bool: the tasks whose gradients are finite on every head known to be theirs."""
    finite = jnp.ones(num_tasks, bool)
    for leaf, label in heads:
        if leaf.shape[0] == num_tasks:
            finite &= _rows_finite(leaf)
        elif _is_owner(label):
            finite = finite.at[label].set(finite[label] & _rows_finite(leaf)[0])
    return finite
