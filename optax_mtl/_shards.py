"""Parameters in shards, inside `jax.shard_map`: what is summed over parameters is summed over their shards too.

Under plain `jax.jit` none of this is needed: arrays are whole there, however they are placed.
"""

from collections.abc import Iterator, Sequence
import contextlib
import contextvars
import functools
import math
import operator
from typing import Any, NamedTuple

import jax
from jax import lax, numpy as jnp
import optax

from optax_mtl import _base, _deferred


class _Scope(NamedTuple):
    axes: tuple[str, ...] = ()
    every_leaf: bool = False


_EVERYWHERE = _Scope()
_scope: contextvars.ContextVar[_Scope] = contextvars.ContextVar("scope", default=_EVERYWHERE)


def over_axes(
    tx: optax.GradientTransformation, axis_name: Any, *, every_leaf: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Runs a transformation of the tasks' gradients inside `jax.shard_map`, on parameters that are in shards.

    There each device sees its own shard of a leaf. Inner products, norms, and whether a task's gradient is finite, are
    summed over `axis_name` here, so that all shards get the same weights: the update is each shard's part of what it
    would be outside. Any method, and what is built of them, will do: `blockwise`, `shared_and_heads`, `monitor`, with
    an optimiser behind. Put it around the whole. (Optax's own norms, as in `optax.clip_by_global_norm`, remain those of
    a shard; and `graddrop` draws on each shard for its entries.) Under plain `jax.jit` it is not needed, nor allowed.

    Which leaves are sharded over which of the axes, their types tell. Leaves that are the same on all shards are
    counted once.

    The batch may be sharded too. The Gramian of the mean of gradients is not the mean of their Gramians, so gradients
    must be averaged *first*: let the losses be means over the whole batch, `jax.lax.pmean(losses, "data")`, before they
    are differentiated, and JAX sees to the rest. Gradients that are still local to a part of the batch are refused.

    Args:
      tx: a method, or a whole optimiser with one in it.
      axis_name: name or names of the mesh axes over which parameters are sharded; those of the batch may be among them.
      every_leaf: where types do not tell (`jax.shard_map(..., check_vma=False)`, `jax.pmap`), say so, and every leaf
        counts as sharded over all of `axis_name`. What is not must then be balanced elsewhere, the batch's axis must
        not be named, and averaging is your own: `jax.lax.pmean(task_grads, "data")`.

    Returns:
      An `optax.GradientTransformationExtraArgs`, to be updated inside `jax.shard_map`. Its state is in shards where
      parameters are, and elsewhere the same on all.

    Raises:
      ValueError: if there is no such axis; if types do not tell what is sharded, and `every_leaf` does not; if a
        gradient varies along an axis along which its parameter does not.

    Example:
      >>> import functools, jax, jax.numpy as jnp, optax_mtl as mtl
      >>> from jax.sharding import PartitionSpec as P
      >>> tx = mtl.over_axes(mtl.mgda(num_tasks=2), "model")
      >>> mesh = jax.sharding.Mesh(jax.devices()[:1], ("model",))  # one shard: more need more devices
      >>> @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P("model"), P(None, "model")), out_specs=P("model"))
      ... def balanced(params, task_grads):
      ...     return tx.update(task_grads, tx.init(params), params)[0]
      >>> balanced(jnp.zeros(2), jnp.array([[1.0, 0.0], [0.0, 2.0]])).tolist()
      [0.8, 0.4]
    """
    inner = optax.with_extra_args_support(tx)

    def update_fn(updates: Any, state: Any, params: _base.Params | None = None, **extra_args: Any) -> tuple[Any, Any]:
        with summing_over(axis_name, every_leaf):
            if every_leaf and _deferred.is_deferred(updates):
                raise ValueError(
                    "over_axes: deferred gradients must know what is sharded from the arrays' types, and with "
                    "every_leaf=True these do not tell. Use optax_mtl.value_and_task_grads, or check_vma=True."
                )
            if params is not None and not every_leaf:
                _check_averaged(updates, params)
            return inner.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)


@contextlib.contextmanager
def summing_over(axis_name: Any, every_leaf: bool = False) -> Iterator[None]:
    """Where this holds, sums over parameters are sums over their shards along these axes too."""
    axes = tuple(axis_name) if isinstance(axis_name, tuple | list) else (axis_name,)
    for axis in axes:
        try:
            index = lax.axis_index(axis)
        except NameError as error:
            raise ValueError(
                f"There is no axis {axis!r} here. axis_name is for code inside jax.shard_map, over a mesh with an axis "
                "of that name; under plain jax.jit arrays are whole, and it is to be left out."
            ) from error
        if not every_leaf and axis not in _varying(index):
            raise ValueError(
                f"The types of arrays do not tell here what is sharded over {axis!r}. Use jax.shard_map with "
                "check_vma=True; or, if every parameter is sharded over it, optax_mtl.over_axes(tx, "
                f"{axis_name!r}, every_leaf=True)."
            )
    token = _scope.set(_Scope(axes, every_leaf))
    try:
        yield
    finally:
        _scope.reset(token)


def check_none(oracle: str) -> None:
    """Raises `ValueError` in `over_axes`, for an oracle whose inner products are not of parameters."""
    if _scope.get().axes:
        raise ValueError(
            f"{oracle} in optax_mtl.over_axes: its inner products are not those of parameters, and whether features "
            "are in shards their types do not tell. Use optax_mtl.value_and_light_grads(loss_fn), or plain jax.jit."
        )


def total(parts: Sequence[jax.Array]) -> jax.Array:
    """The sum of arrays that each are of one leaf, over all shards of it."""
    by_axes: dict[tuple[str, ...], list[jax.Array]] = {}
    for part in parts:
        by_axes.setdefault(_axes(part), []).append(part)
    sums = [_psum(functools.reduce(operator.add, own), axes) for axes, own in by_axes.items()]
    return functools.reduce(operator.add, sums)


def largest(part: jax.Array) -> jax.Array:
    """The maximum of an array that is of one leaf, over all shards of it."""
    axes = _axes(part)
    return lax.pmax(part, axes) if axes else part


def number(leaf: jax.Array) -> int:
    """How many shards the leaf has of which this is one."""
    return math.prod(lax.psum(1, axis) for axis in _axes(leaf))


def is_shard(value: jax.Array) -> bool:
    """Whether `value` is one of several shards, as far as its type tells."""
    return bool(_varying(value))


def own_key(key: jax.Array, leaf: jax.Array) -> jax.Array:
    """`key`, and another one for each shard of the leaf."""
    for axis in _axes(leaf):
        key = jax.random.fold_in(key, lax.axis_index(axis))
    return key


def _psum(value: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return lax.psum(value, axes) if axes else value


def _axes(value: jax.Array) -> tuple[str, ...]:
    """The axes over which `value` is one of several shards."""
    scope = _scope.get()
    if scope.every_leaf or not scope.axes:
        return scope.axes
    varying = _varying(value)
    return tuple(axis for axis in scope.axes if axis in varying)


def _varying(value: jax.Array) -> Any:
    kind = jax.typeof(value)
    if hasattr(kind, "vma"):
        return kind.vma
    return kind.mat.varying if hasattr(kind, "mat") else ()  # its name from jax 0.10


def _check_averaged(task_grads: Any, params: _base.Params) -> None:
    leaves = zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(task_grads), strict=False)
    for (path, param), grads in leaves:
        if isinstance(grads, _deferred.Deferred):
            continue
        surplus = sorted({*_axes(grads)} - {*_axes(jnp.asarray(param))})
        if surplus:
            raise ValueError(
                f"over_axes: task_grads{jax.tree_util.keystr(path)} varies over {surplus}, and its parameter does not: "
                "it is the gradient of a part of the batch. Average the losses before they are differentiated, "
                "jax.lax.pmean(losses, axis), or the gradients before they are balanced."
            )
