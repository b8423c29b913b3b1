"""Blocks: which leaves, or which layers of them, have their own inner products and their own weights."""

from collections.abc import Callable, Hashable
import functools
import itertools
import numbers
import operator
from typing import Any, NamedTuple

import jax
from jax import lax, numpy as jnp
import numpy as np

from optax_mtl import _base, _deferred, _gramian


class Blocks(NamedTuple):
    """How a tree falls into `B` blocks.

    Leaves of one label are a group. A group is one block; or, if its leaves are stacked, as many as they have layers.

    Attributes:
      names: of the `B` blocks.
      groups: of each leaf, which group it is in.
      layers: of each group, how many layers its leaves have, each of them a block; None for one block.
    """

    names: tuple[str, ...]
    groups: tuple[int, ...]
    layers: tuple[int | None, ...]


def find_blocks(tree: Any, blocks: Any, stacked: Any, *, axis: int = 0) -> Blocks:
    """How `tree` falls into blocks; `blockwise` says what `blocks` and `stacked` may be.

    Args:
      tree: parameters, or anything of their structure.
      blocks: see `blockwise`.
      stacked: see `blockwise`.
      axis: which axis of a leaf of `tree` is a parameter's first.

    Returns:
      The blocks, in the order in which their labels first occur.
    """
    labels = _block_labels(blocks, tree)
    is_stacked = [False] * len(labels) if stacked is None else leaf_labels(stacked, tree, "stacked")
    groups: dict[tuple[Hashable, bool], int] = {}
    layers: list[int | None] = []
    names: list[list[str]] = []
    group_of_leaf = []
    paths_and_leaves = jax.tree_util.tree_leaves_with_path(tree)
    for (path, leaf), label, layered in zip(paths_and_leaves, labels, is_stacked, strict=True):
        number = _number_of_layers(path, jnp.shape(leaf)[axis:]) if layered else None
        group = groups.setdefault((label, bool(layered)), len(groups))
        if group == len(layers):
            layers.append(number)
            names.append([str(label)] if number is None else [f"{label}[{i}]" for i in range(number)])
        elif layers[group] != number:
            raise ValueError(
                f"stacked: the leaf {jax.tree_util.keystr(path)} has {number} layers, and others of label {label!r} "
                f"have {layers[group]}. Give them labels of their own in blocks."
            )
        group_of_leaf.append(group)
    return Blocks(tuple(itertools.chain.from_iterable(names)), tuple(group_of_leaf), tuple(layers))


def _number_of_layers(path: Any, shape: tuple[int, ...]) -> int:
    if shape and shape[0] > 0:
        return shape[0]
    raise ValueError(
        f"stacked names the leaf {jax.tree_util.keystr(path)}, of shape {shape}, which has no leading axis of layers."
    )


_DEPTHS = {"leaf": None, "whole": 0}


def _block_labels(blocks: Any, tree: Any) -> list[Any]:
    if not isinstance(blocks, str | numbers.Number):
        return leaf_labels(blocks, tree, "blocks")
    if isinstance(blocks, str) and blocks not in _DEPTHS:
        raise ValueError(
            'blocks must be "leaf", "whole", a depth in the tree, a function of paths, or a tree of labels, '
            f"found {blocks!r}."
        )
    if isinstance(blocks, str):
        depth = _DEPTHS[blocks]
    else:
        depth = _base.check_static_int("blocks, the depth in the tree,", blocks, 0)
    paths = [path[:depth] for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    names = [jax.tree_util.keystr(path, simple=True, separator="/") or "all" for path in paths]
    if len(set(names)) < len(set(paths)):  # keys with a slash in them: "a/b" beside "a", "b"
        return [jax.tree_util.keystr(path) for path in paths]
    return names


def leaf_labels(labels: Any, tree: Any, name: str) -> list[Any]:
    """The label of each leaf of `tree`, in the order of the leaves.

    Args:
      labels: a function from a leaf's path (`"trunk/kernel"`) to its label; or a tree of labels like `tree`, or a
        prefix of it.
      tree: any tree.
      name: what `labels` is called, for messages.

    Returns:
      Labels as plain bools, ints or strings, whatever NumPy or JAX made of them.

    Raises:
      ValueError: if `labels` is neither.
    """
    if callable(labels):
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
        return [_plain(labels(jax.tree_util.keystr(path, simple=True, separator="/"))) for path in paths]
    if not jax.tree.leaves(tree):  # optax.tree.map_params asks for the state of a placeholder
        return []
    try:
        broadcast = jax.tree.map(lambda label, sub: jax.tree.map(lambda _: label, sub), labels, tree)
    except ValueError as error:
        raise ValueError(
            f"{name} must be a function from paths to labels, or a tree like the parameters, or a prefix of it, with a "
            f"label for every leaf: found {jax.tree.structure(labels)} for parameters {jax.tree.structure(tree)}."
        ) from error
    return [_plain(label) for label in jax.tree.leaves(broadcast)]


def _plain(label: Any) -> Any:
    return label.item() if isinstance(label, np.ndarray | np.generic | jax.Array) else label


def sum_blocks(function: Callable[..., jax.Array], blocks: Blocks, *trees: Any, axes: tuple[int, ...]) -> jax.Array:
    """The sum of `function` over the leaves of each block, or over the one layer of each that is in it.

    Args:
      function: from a leaf of each tree to an array.
      blocks: of these trees.
      *trees: leaves with a layer axis, where they are stacked.
      axes: for each tree, which axis of a stacked leaf that is.

    Returns:
      `(B, ...)`.
    """
    per_leaf = []
    for group, *leaves in zip(blocks.groups, *map(jax.tree.leaves, trees), strict=True):
        layers = blocks.layers[group]
        per_leaf.append(function(*leaves) if layers is None else map_layers(function, leaves, axes, layers))
    return _sum_groups(per_leaf, blocks)


def _sum_groups(per_leaf: list[jax.Array], blocks: Blocks) -> jax.Array:
    values: list[list[jax.Array]] = [[] for _ in blocks.layers]
    for value, group in zip(per_leaf, blocks.groups, strict=True):
        values[group].append(value[None] if blocks.layers[group] is None else value)
    return jnp.concatenate([functools.reduce(operator.add, parts) for parts in values])


def map_layers(
    function: Callable[..., jax.Array], leaves: list[jax.Array], axes: tuple[int, ...], layers: int
) -> jax.Array:
    # As in `task_gramian`: a batched product suits a mesh and an accelerator, and a CPU one layer after another.
    def at_once(*leaves: jax.Array) -> jax.Array:
        batched: jax.Array = jax.vmap(function, axes)(*leaves)
        return batched

    def in_turn(*leaves: jax.Array) -> jax.Array:
        def layer(i: jax.Array) -> jax.Array:
            slices = zip(leaves, axes, strict=True)
            return function(*(lax.dynamic_index_in_dim(leaf, i, axis, keepdims=False) for leaf, axis in slices))

        return lax.map(layer, jnp.arange(layers))

    if jax.device_count() > 1:
        return at_once(*leaves)
    mapped: jax.Array = lax.platform_dependent(*leaves, cpu=in_turn, default=at_once)
    return mapped


def leaf_gramian(leaf: jax.Array, metric: jax.Array | None, layers: int | None) -> jax.Array:
    """The inner products of gradients `(T, *shape)`, `(T, T)`; or of each of their layers, `(layers, T, T)`."""

    def products(grads: jax.Array, metric: jax.Array | None = None) -> jax.Array:
        return _gramian.task_cross_gramian(grads, grads, metric)

    leaves, axes = ([leaf], (1,)) if metric is None else ([leaf, metric], (1, 0))
    return products(*leaves) if layers is None else map_layers(products, leaves, axes, layers)


def gramians_of(task_grads: _base.TaskGrads, blocks: Blocks, metric: _base.Params | None = None) -> jax.Array:
    """The Gramian of each block, `(B, T, T)`; see `block_gramians`."""
    dtype = _base.accumulator_dtype(task_grads)

    def products(leaf: jax.Array, factors: jax.Array | None = None) -> jax.Array:
        return _gramian.task_cross_gramian(leaf, leaf, factors).astype(dtype)

    if metric is not None:
        _gramian.check_metric_shapes(metric, task_grads)  # here, where the leaves have names
    if _deferred.is_deferred(task_grads):
        gramians = _sum_groups(_deferred_gramians(task_grads, blocks, metric), blocks)
    elif metric is None:
        gramians = sum_blocks(products, blocks, task_grads, axes=(1,))
    else:
        gramians = sum_blocks(products, blocks, task_grads, metric, axes=(1, 0))
    return (gramians + jnp.swapaxes(gramians, 1, 2)) / 2  # at the end: once, and not for each leaf


def _deferred_gramians(task_grads: _base.TaskGrads, blocks: Blocks, metric: _base.Params | None) -> list[jax.Array]:
    leaves, metrics = jax.tree.leaves(task_grads), jax.tree.leaves(metric)
    per_leaf: dict[int, jax.Array] = {}
    for source, indices, positions in _deferred.by_source(leaves):
        layers = [blocks.layers[blocks.groups[i]] for i in positions]
        found = source.leaf_gramians(indices, [metrics[i] for i in positions] if metrics else None, layers)
        per_leaf |= zip(positions, found, strict=True)
    if len(per_leaf) < len(leaves):
        raise ValueError(
            "Blocks are of deferred gradients or of computed ones, but not of some of each, as optax_mtl.split gives "
            "for trunk and heads: put optax_mtl.shared_and_heads(blockwise(method), loss_fn.shared) around the trunk."
        )
    return [per_leaf[i] for i in range(len(leaves))]


def combine_blocks(weights: jax.Array, task_grads: _base.TaskGrads, blocks: Blocks) -> Any:
    """The update of which each block is `sum_i weights[b, i] * g_i`.

    Args:
      weights: `(B, T)`.
      task_grads: leaves `(T, *shape)`.
      blocks: of these.

    Returns:
      Leaves `(*shape)`.
    """
    ends = np.cumsum([1 if number is None else number for number in blocks.layers])
    rows = lax.platform_dependent(weights, cpu=_split_apart, default=list)
    own = []  # weights of each leaf, (T,), or of its layers, (L, T)
    for group in blocks.groups:
        number, end = blocks.layers[group], ends[group]
        own.append(rows[end - 1] if number is None else weights[end - number : end])

    leaves, treedef = jax.tree.flatten(task_grads)
    combined: dict[int, jax.Array] = {}
    for source, indices, positions in _deferred.by_source(leaves):
        combined |= zip(positions, source.combine_each([own[i] for i in positions], indices), strict=True)
    for i, leaf in enumerate(leaves):
        if i not in combined:
            combined[i] = _gramian.combine_leaf(own[i], leaf)
    return treedef.unflatten([combined[i] for i in range(len(leaves))])


def _split_apart(weights: jax.Array) -> list[jax.Array]:
    # XLA compiles one kernel for all leaves of one shape; but if each looks up its own row of `weights`, one for every
    # leaf, which takes several times as long. Rows that come out of a branch need no looking up.
    return lax.cond(jnp.any(weights != 0), list, lambda rows: [jnp.zeros_like(row) for row in rows], weights)


def block_gramians(
    task_grads: _base.TaskGrads, blocks: Any = "leaf", *, stacked: Any = None, metric: _base.Params | None = None
) -> jax.Array:
    """The Gramian of the tasks' gradients in each block.

    Args:
      task_grads: leaves `(T, *shape)`.
      blocks: see `blockwise`.
      stacked: see `blockwise`.
      metric: as for `task_gramian`.

    Returns:
      `(B, T, T)`, in the order of `block_names`. Their sum is `task_gramian(task_grads, metric)`. As a `Gramian`, it
      is what `blockwise` accepts in place of gradients, and its update is then the weights `(B, T)`.

    Example:
      >>> import jax.numpy as jnp, optax_mtl as mtl
      >>> task_grads = {"w": jnp.array([[1.0, 2.0], [0.0, 1.0]]), "b": jnp.array([3.0, 1.0])}
      >>> mtl.block_gramians(task_grads).tolist()
      [[[9., 3.], [3., 1.]], [[5., 2.], [2., 1.]]]
    """
    return gramians_of(task_grads, find_blocks(task_grads, blocks, stacked, axis=1), metric)


def block_names(params: _base.Params, blocks: Any = "leaf", *, stacked: Any = None) -> tuple[str, ...]:
    """The names of the blocks, in the order of `block_weights` in the state of `blockwise`.

    Args:
      params: the parameters, or anything of their structure and shapes.
      blocks: see `blockwise`.
      stacked: see `blockwise`.

    Returns:
      `B` strings.

    Example:
      >>> import jax.numpy as jnp, optax_mtl as mtl
      >>> params = {"layers": {"w": jnp.zeros((3, 2, 2)), "b": jnp.zeros((3, 2))}, "out": jnp.zeros(2)}
      >>> mtl.block_names(params)
      ('layers/b', 'layers/w', 'out')
      >>> mtl.block_names(params, 1, stacked={"layers": True, "out": False})
      ('layers[0]', 'layers[1]', 'layers[2]', 'out')
    """
    return find_blocks(params, blocks, stacked).names
