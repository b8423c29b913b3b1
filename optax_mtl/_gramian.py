"""The border between trees and matrices: `task_gramian` goes in, `combine` comes out.

Both read the `T` gradients once and build nothing of their size. Two facts about XLA on a CPU shape the code. A
matrix product over two parameter axes takes several times as long as one over a single flattened axis, and that is
slower again than one over chunks that fit the cache. And `T` unrolled multiply-adds fuse into one loop at the speed of
reading, and set aside non-finite rows for nothing, where `tensordot` needs a sanitised copy first.
"""

from collections.abc import Callable
import functools
import math
import operator
from typing import Any

import jax
from jax import lax, numpy as jnp

from optax_mtl import _base, _deferred

_CHUNK = 4096  # columns; T of them stay in the first cache levels up to T = 64
UNROLL = 32  # tasks; beyond, a matrix product keeps the compiled program small


@jax.tree_util.register_pytree_node_class
class Gramian:
    """A `T x T` matrix of inner products of task gradients, accepted by every weighting in place of the gradients.

    The update that a weighting returns for a Gramian is the weights themselves, `(T,)`:

    >>> import jax.numpy as jnp, optax_mtl as mtl
    >>> tx = mtl.mgda(num_tasks=2)
    >>> weights, _ = tx.update(mtl.Gramian(jnp.array([[18.0, -22.0], [-22.0, 38.0]])), tx.init(jnp.zeros(3)))
    >>> weights.tolist()
    [0.6, 0.4]

    Attributes:
      matrix: `(T, T)`, symmetric positive semi-definite.
    """

    def __init__(self, matrix: Any):
        self.matrix = matrix

    def tree_flatten(self) -> tuple[tuple[Any], None]:
        return (self.matrix,), None

    @classmethod
    def tree_unflatten(cls, _: None, children: tuple[Any]) -> "Gramian":
        return cls(*children)

    def __repr__(self) -> str:
        return f"Gramian({self.matrix!r})"


def check_not_gramian(updates: _base.TaskGrads, method: str) -> None:
    """Raises `ValueError` if a method that acts on every entry of the gradients was given their Gramian."""
    if isinstance(updates, Gramian):
        raise ValueError(
            f"{method} acts on the gradients themselves, not on their inner products, and was given a Gramian. Pass "
            "the task gradients; or choose a weighting (optax_mtl.mgda, for one), which takes either."
        )
    _deferred.check_not_deferred(updates, method)


def check_metric_shapes(metric: _base.Params, task_grads: _base.TaskGrads) -> None:
    """Raises `ValueError` if a leaf of `metric` has not the shape of the parameter whose gradients are `task_grads`."""
    leaves = zip(jax.tree_util.tree_leaves_with_path(metric), jax.tree.leaves(task_grads), strict=True)
    for (path, leaf), grads in leaves:
        if jnp.shape(leaf) != jnp.shape(grads)[1:]:
            raise ValueError(
                f"metric{jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)}, wanted {jnp.shape(grads)[1:]}: one "
                "number a parameter, like optax.tree.ones_like(params)."
            )


def task_gramian(task_grads: _base.TaskGrads, metric: _base.Params | None = None) -> jax.Array:
    """The Gramian of the tasks' gradients, `M[i, j] = <g_i, g_j>` over all leaves.

    Args:
      task_grads: leaves `(T, *shape)`, sharded in any way except along the task axis, or deferred; or a `Gramian`.
      metric: leaves `(*shape)`, not negative: what each parameter counts, `M[i, j] = sum_k metric_k g_ik g_jk`. One
        for all if None.

    Returns:
      `(T, T)`, symmetric, in float32 (float64 if any leaf has it). Rows and columns of tasks whose gradient is not
      finite are not finite.

    Example:
      >>> import jax.numpy as jnp, optax_mtl as mtl
      >>> mtl.task_gramian(jnp.array([[3.0, 0.0], [1.0, 2.0]]), metric=jnp.array([1.0, 10.0])).tolist()
      [[9., 3.], [3., 41.]]
    """
    if isinstance(task_grads, Gramian):
        matrix = jnp.asarray(task_grads.matrix)
        return matrix.astype(_base.accumulator_dtype(matrix))
    leaves = jax.tree.leaves(task_grads)
    metrics = None if metric is None else jax.tree.leaves(metric)
    if metric is not None:
        check_metric_shapes(metric, task_grads)
    parts = []
    for source, indices, positions in _deferred.by_source(leaves):
        parts.append(source.gramian(indices, None if metrics is None else [metrics[i] for i in positions]))
    arrays = [i for i, leaf in enumerate(leaves) if not isinstance(leaf, _deferred.Deferred)]
    if arrays:
        grads = [leaves[i] for i in arrays]
        parts.append(task_cross_gramian(grads, grads, None if metrics is None else [metrics[i] for i in arrays]))
    gramian = functools.reduce(operator.add, parts)
    return (gramian + gramian.T) / 2


def task_cross_gramian(
    first: _base.TaskGrads, second: _base.TaskGrads, metric: _base.Params | None = None
) -> jax.Array:
    """Inner products of the tasks' gradients from two batches, `M[i, j] = <first_i, second_j>` over all leaves.

    If the batches are independent its expectation is the Gramian of the expected gradients; that of a Gramian is larger
    by the gradients' covariance.

    Args:
      first: leaves `(T, *shape)`, sharded in any way except along the task axis.
      second: as `first`.
      metric: as for `task_gramian`.

    Returns:
      `(T, T)`, not symmetric, in float32 (float64 if any leaf has it).

    Example:
      >>> import jax.numpy as jnp, optax_mtl as mtl
      >>> mtl.task_cross_gramian(jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.array([[1.0, 1.0], [0.0, 3.0]])).tolist()
      [[1., 0.], [2., 6.]]
    """
    dtype = _base.accumulator_dtype((first, second))
    if _deferred.is_deferred((first, second)):
        raise ValueError(
            "The inner products of one batch's gradients with another's cannot be had of deferred gradients: compute "
            "both with optax_mtl.value_and_task_grads."
        )
    if metric is None:
        products = jax.tree.map(lambda a, b: _leaf_products(a, b, None, dtype), first, second)
    else:
        check_metric_shapes(metric, first)
        products = jax.tree.map(lambda a, b, m: _leaf_products(a, b, m, dtype), first, second, metric)
    cross: jax.Array = jax.tree.reduce(operator.add, products)
    return cross


def task_squared_norms(task_grads: _base.TaskGrads, metric: _base.Params | None = None) -> jax.Array:
    """The Gramian's diagonal `(T,)`, for methods that need no inner products."""
    if isinstance(task_grads, Gramian) or _deferred.is_deferred(task_grads):
        return jnp.diagonal(task_gramian(task_grads, metric))
    dtype = _base.accumulator_dtype(task_grads)

    def leaf_squared_norms(leaf: jax.Array, factors: jax.Array | None = None) -> jax.Array:
        squares = jnp.square(leaf.astype(dtype))
        squares = squares if factors is None else squares * factors.astype(dtype)[None]
        return jnp.sum(squares, axis=tuple(range(1, leaf.ndim)))

    trees = (task_grads,) if metric is None else (task_grads, metric)
    return jax.tree.reduce(operator.add, jax.tree.map(leaf_squared_norms, *trees))


def task_products(task_grads: _base.TaskGrads, direction: _base.Params) -> jax.Array:
    """The inner product of each task's gradient with one direction.

    Args:
      task_grads: leaves `(T, *shape)`.
      direction: leaves `(*shape)`.

    Returns:
      `(T,)`, in float32 (float64 if any leaf of the gradients has it).
    """
    dtype = _base.accumulator_dtype(task_grads)

    def leaf_products(leaf: jax.Array, along: jax.Array) -> jax.Array:
        axes = (tuple(range(1, leaf.ndim)), tuple(range(along.ndim)))
        if leaf.dtype not in (dtype, along.dtype):  # a matrix product would first copy the gradients in a wider dtype
            return jnp.sum(leaf.astype(dtype) * along.astype(dtype)[None], axis=axes[0])
        return lax.dot_general(
            leaf,
            along.astype(leaf.dtype),
            (axes, ((), ())),
            precision=lax.Precision.HIGHEST,
            preferred_element_type=dtype,
        )

    return jax.tree.reduce(operator.add, jax.tree.map(leaf_products, task_grads, direction))


def _leaf_products(first: jax.Array, second: jax.Array, metric: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
    # A product over all parameter axes leaves a sharded leaf where it is, and ends in one all-reduce of (T, T);
    # flattening it first would gather it. With a single device nothing is sharded, and the CPU wants chunks.
    if first.size <= first.shape[0] * _CHUNK or jax.device_count() > 1:
        return _contract(first, second, metric, dtype)
    leaves = (first, second) if metric is None else (first, second, metric)
    return lax.platform_dependent(
        *leaves,
        cpu=lambda a, b, m=None: _contract_chunks(a, b, m, dtype),
        default=lambda a, b, m=None: _contract(a, b, m, dtype),
    )


def _contract(first: jax.Array, second: jax.Array, metric: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
    axes = tuple(range(1, first.ndim))
    if metric is not None:
        first, second = first.astype(dtype) * metric.astype(dtype)[None], second.astype(dtype)
    return lax.dot_general(
        first, second, ((axes, axes), ((), ())), precision=lax.Precision.HIGHEST, preferred_element_type=dtype
    )


def _contract_chunks(first: jax.Array, second: jax.Array, metric: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
    num_tasks, size = first.shape[0], math.prod(first.shape[1:])
    a, b = first.reshape(num_tasks, size), second.reshape(num_tasks, size)
    m = None if metric is None else metric.reshape(size)
    whole = size // _CHUNK

    def products(take: Callable[[jax.Array], jax.Array]) -> jax.Array:
        return _contract(take(a), take(b), None if m is None else take(m), dtype)

    def add_chunk(i: jax.Array, total: jax.Array) -> jax.Array:
        return total + products(lambda flat: lax.dynamic_slice_in_dim(flat, i * _CHUNK, _CHUNK, flat.ndim - 1))

    return lax.fori_loop(0, whole, add_chunk, products(lambda flat: flat[..., whole * _CHUNK :]))


def combine(weights: jax.Array, task_grads: _base.TaskGrads) -> Any:
    """The update `sum_i weights[i] * g_i`; a task of weight zero adds nothing even where it is not finite.

    Args:
      weights: `(T,)`.
      task_grads: leaves `(T, *shape)`, or deferred; or a `Gramian`.

    Returns:
      Leaves `(*shape)` in the gradients' dtypes; for a `Gramian`, the weights.
    """
    if isinstance(task_grads, Gramian):
        return weights

    leaves, treedef = jax.tree.flatten(task_grads)
    combined: dict[int, jax.Array] = {}
    for source, indices, positions in _deferred.by_source(leaves):
        combined |= zip(positions, source.combine(weights, indices), strict=True)
    return treedef.unflatten([combined[i] if i in combined else combine_leaf(weights, g) for i, g in enumerate(leaves)])


def combine_leaf(weights: jax.Array, leaf: jax.Array) -> jax.Array:
    """As `combine`, of one leaf `(T, *shape)`; with weights `(L, T)`, each of its layers `(T, L, ...)` by its own."""
    if weights.ndim == 2:
        layered: jax.Array = jax.vmap(combine_leaf, (0, 1))(weights, leaf)
        return layered
    dtype = _base.accumulator_dtype(leaf)
    w = weights.astype(dtype)
    if leaf.shape[0] <= UNROLL:
        return combine_rows(w, lambda i: leaf[i].astype(dtype)).astype(leaf.dtype)
    kept = jnp.where((w == 0).reshape((-1,) + (1,) * (leaf.ndim - 1)), 0, leaf)
    total = jnp.tensordot(w, kept.astype(dtype), axes=1, precision=lax.Precision.HIGHEST)
    return total.astype(leaf.dtype)


def combine_rows(weights: jax.Array, row: Callable[[int], jax.Array]) -> jax.Array:
    """As `combine`, of rows that are computed from slices: one loop for all, in which no row is ever stored.

    Args:
      weights: `(T,)`, of the rows' dtype.
      row: `row(i)` is what `weights[i]` multiplies.
    """
    terms = (jnp.where(weights[i] == 0, 0, weights[i] * row(i)) for i in range(weights.shape[0]))
    return functools.reduce(operator.add, terms)
