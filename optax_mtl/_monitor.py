"""See what a transformation does: each task's share of the update, task by block by step, recorded inside jit."""

from typing import Any, NamedTuple

import jax
from jax import lax, numpy as jnp
import numpy as np
import optax

from optax_mtl import _base, _blocks, _gramian, _shards, _solvers


class MonitorState(NamedTuple):
    """State of `monitor`. The records are a ring: `recorded` puts them in order.

    Attributes:
      inner: state of what is watched.
      updates_seen: () int32, updates so far.
      recorded_at: `(capacity,)` int32, the number of the update of each record, from 1; 0 where there is none yet.
      shares: `(capacity, B, T)`.
      update_cosines: `(capacity, B, T)`.
    """

    inner: Any
    updates_seen: jax.Array
    recorded_at: jax.Array
    shares: jax.Array
    update_cosines: jax.Array


class Records(NamedTuple):
    """What `monitor` has recorded, oldest first: `R` records of `B` blocks and `T` tasks.

    Attributes:
      steps: `(R,)` the number of the update, from 1.
      shares: `(R, B, T)` each task's share of the update of each block.
      cosines: `(R, B, T)` cosines between the update of each block and each task's gradient there.
    """

    steps: np.ndarray
    shares: np.ndarray
    cosines: np.ndarray


def update_shares(gramian: jax.Array, cosines: jax.Array) -> jax.Array:
    r"""How much of an update each task's gradient explains.

    The combination of the gradients nearest to the update :math:`u`, :math:`\sum_i c_i g_i`, splits its squared length:
    task `i` has the share :math:`c_i \langle g_i, u\rangle / \lVert u\rVert^2`.

    Args:
      gramian: `(T, T)`.
      cosines: `(T,)` between the update and each gradient.

    Returns:
      `(T,)`. Their sum is the part of the update that the gradients explain: one for their weighted sum, less if
      something else is in it, like momentum or the scaling of an adaptive optimiser. In float32, gradients that are
      parallel or opposite but for a thousandth cannot be told apart: their shares are as if they were, and an update in
      which they cancel is not explained.
    """
    unit, _ = _solvers.cosines(gramian)
    return cosines * _solvers.pseudo_solve(unit, cosines)


def monitor(
    tx: optax.GradientTransformation,
    num_tasks: int,
    *,
    every: int = 1,
    capacity: int = 100,
    returns: str = "step",
    blocks: Any = "leaf",
    stacked: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Watches any transformation of the tasks' gradients: what comes out is as it was, and a record is kept.

    For each block of the parameters (each leaf, say) and each task, every few steps: the task's share of the update
    (see `update_shares`), and the cosine between the update and the task's gradient. Both look at nothing but the
    gradients that go in and the update that comes out, so that any two optimisers can be compared, balanced or not,
    with momentum or preconditioned: how much of the step comes from the balance at all, and which task got it where.

    Costs a Gramian and a product with the update, in the steps that are recorded; and `2 B T` numbers a record, in the
    state. (Under `jax.vmap`, every step costs as much as one that is recorded.)

    Args:
      tx: a balancing method, or a whole optimiser with one in it.
      num_tasks: number of tasks `T`.
      every: one update in so many is recorded, the first one first.
      capacity: how many records are kept; then the oldest is overwritten.
      returns: `"step"` if `tx` is a whole optimiser, whose updates are added to the parameters: cosines are those of
        its opposite, so that a positive one means that the task's loss decreases; `"gradient"` if it returns a balanced
        gradient, to be followed by an optimiser.
      blocks: as for `blockwise`.
      stacked: as for `blockwise`.

    Returns:
      An `optax.GradientTransformationExtraArgs` with the updates of `tx`; `recorded(opt_state)` reads what was seen,
      `block_names(params, blocks, stacked=stacked)` names the blocks.

    Raises:
      ValueError: if a leaf of the gradients is not `(T, *param.shape)`.

    Example:
      >>> import jax.numpy as jnp, optax, optax_mtl as mtl
      >>> tx = mtl.monitor(optax.chain(mtl.sum_tasks(2), optax.sgd(0.1)), num_tasks=2)
      >>> params = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
      >>> task_grads = {"a": jnp.array([[3.0, 0.0], [0.0, 1.0]]), "b": jnp.array([[1.0, 0.0], [0.0, 0.0]])}
      >>> _, state = tx.update(task_grads, tx.init(params), params)
      >>> records = mtl.recorded(state)
      >>> records.steps.tolist(), records.shares[0].tolist()  # by blocks, by tasks
      ([1], [[0.9, 0.1], [1., 0.]])
      >>> records.cosines[0].tolist()
      [[0.949, 0.316], [1., 0.]]

    References:
      Hervella et al., `Multi-Adaptive Optimization for multi-task learning with deep neural networks
      <https://doi.org/10.1016/j.neunet.2023.11.038>`_, Neural Networks 170, 2024: looks at tasks, layers and steps

    Note:
      That paper's own measures could not be read; these are ours.
    """
    num_tasks = _base.check_num_tasks(num_tasks)
    every, capacity = _base.check_static_int("every", every, 1), _base.check_static_int("capacity", capacity, 1)
    _base.check_choice("returns", returns, ("step", "gradient"))
    watched = optax.with_extra_args_support(tx)

    def init_fn(params: _base.Params) -> MonitorState:
        number = len(_blocks.find_blocks(params, blocks, stacked).names)
        shape, dtype = (capacity, number, num_tasks), _base.accumulator_dtype(params)
        return MonitorState(
            inner=watched.init(params),
            updates_seen=jnp.zeros((), jnp.int32),
            recorded_at=jnp.zeros(capacity, jnp.int32),
            shares=jnp.zeros(shape, dtype),
            update_cosines=jnp.zeros(shape, dtype),
        )

    def look(
        task_grads: _base.TaskGrads, update: _base.Params, task_mask: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        found = _blocks.find_blocks(task_grads, blocks, stacked, axis=1)
        gramians = _blocks.gramians_of(task_grads, found)
        update = _at_unit_scale(update)
        products = _blocks.sum_blocks(_gramian.task_products, found, task_grads, update, axes=(1, 0))
        lengths = _blocks.sum_blocks(lambda u: _gramian.task_squared_norms(u[None]), found, update, axes=(0,))

        if task_mask is not None and task_mask.ndim == 2:  # one of every block, of a `blockwise`
            task_mask = jnp.any(task_mask, axis=0)
        # A task whose gradient is not finite in some block has no say in any.
        norms = jnp.sqrt(jnp.diagonal(gramians, axis1=1, axis2=2))
        present, _ = _base.present_tasks(jnp.max(norms, axis=0), None, task_mask)
        gramians = jnp.where(jnp.outer(present, present)[None], gramians, 0)
        norms = jnp.where(present[None], norms, 0)
        along = jnp.where(norms > 0, products / jnp.where(norms > 0, norms, 1), 0)
        lengths = jnp.sqrt(lengths)  # (B, 1)
        cosines = jnp.clip(jnp.where(lengths > 0, along / jnp.where(lengths > 0, lengths, 1), 0), -1, 1)
        cosines = -cosines if returns == "step" else cosines
        with jax.default_matmul_precision("highest"):
            return jax.vmap(update_shares)(gramians, cosines), cosines

    def update_fn(
        updates: _base.TaskGrads, state: Any, params: _base.Params | None = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        _gramian.check_not_gramian(updates, "monitor")
        _base.check_task_grads(updates, num_tasks, params)
        update, inner = watched.update(updates, state.inner, params, **extra_args)
        _check_update(update, updates)
        state = state._replace(inner=inner, updates_seen=state.updates_seen + 1)
        if not jax.tree.leaves(updates):
            return update, state

        def record(state: MonitorState) -> MonitorState:
            shares, cosines = look(updates, update, extra_args.get("task_mask"))
            place = (state.updates_seen - 1) // every % capacity
            return state._replace(
                recorded_at=state.recorded_at.at[place].set(state.updates_seen),
                shares=state.shares.at[place].set(shares.astype(state.shares.dtype)),
                update_cosines=state.update_cosines.at[place].set(cosines.astype(state.update_cosines.dtype)),
            )

        return update, lax.cond((state.updates_seen - 1) % every == 0, record, lambda state: state, state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _at_unit_scale(update: _base.Params) -> _base.Params:
    """`update` divided by its largest entry: no step is too long or too short to be squared."""
    dtype = _base.accumulator_dtype(update)
    sizes = [_shards.largest(jnp.max(jnp.abs(leaf), initial=0).astype(dtype)) for leaf in jax.tree.leaves(update)]
    largest = jnp.max(jnp.stack(sizes))
    unit = jnp.where(largest > 0, largest, 1)
    return jax.tree.map(lambda leaf: (leaf.astype(dtype) / unit).astype(leaf.dtype), update)


def _check_update(update: _base.Params, task_grads: _base.TaskGrads) -> None:
    leaves = zip(jax.tree_util.tree_leaves_with_path(update), jax.tree.leaves(task_grads), strict=True)
    for (path, leaf), grads in leaves:
        if jnp.shape(leaf) != jnp.shape(grads)[1:]:
            raise ValueError(
                f"monitor: the update{jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)}, wanted "
                f"{jnp.shape(grads)[1:]}: what is watched did not collapse the task axis. Give monitor a balancing "
                "method, or a chain with one in it."
            )


def recorded(opt_state: Any) -> Records:
    """What the `monitor` somewhere in `opt_state` has recorded.

    Args:
      opt_state: the state of a `monitor`, or of a transformation with one in it.

    Returns:
      NumPy arrays, oldest record first.

    Raises:
      ValueError: if there is no `monitor`, or more than one, or its state has another leading axis (of seeds, say).
    """

    def is_monitor(node: Any) -> bool:
        return isinstance(node, MonitorState)

    found = [leaf for leaf in jax.tree.leaves(opt_state, is_leaf=is_monitor) if is_monitor(leaf)]
    if len(found) != 1:
        raise ValueError(f"recorded wants the state of one monitor, found {len(found)}. Pass that monitor's state.")
    state = found[0]
    if jnp.ndim(state.updates_seen):
        raise ValueError(
            "recorded wants the state of one run, found a leading axis. Pick one: "
            "recorded(jax.tree.map(lambda x: x[0], opt_state))."
        )
    at = np.asarray(state.recorded_at)
    order = np.argsort(at)[np.count_nonzero(at == 0) :]
    return Records(at[order], np.asarray(state.shares)[order], np.asarray(state.update_cosines)[order])
