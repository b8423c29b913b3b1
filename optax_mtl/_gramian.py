"""The border between trees and matrices: `task_gramian` goes in, `combine` comes out.

Both read the `T` gradients once and build nothing of their size. Three facts about XLA on a CPU shape the code. A
matrix product over two parameter axes takes several times as long as one over a single flattened axis, and that is
slower again than one over chunks that fit the cache. For few tasks one loop that sums all `T (T + 1) / 2` products side
by side is faster than either: nothing is copied, and blocks of it run on all cores. And `T` unrolled multiply-adds fuse
into one loop at the speed of reading, and set aside non-finite rows for nothing, where `tensordot` needs a sanitised
copy first.
"""

from collections.abc import Callable
import functools
import math
import operator
from typing import Any

import jax
from jax import lax, numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from optax_mtl import _base, _deferred, _shards

_SMALL = 4096  # parameters; up to here how it is done makes no difference
_CHUNK = 65536  # numbers in the columns that a product takes at a time: in the second cache, and enough for two threads
_BLOCK = 2048  # columns in a loop that sums products of rows side by side;
_SIDE_BY_SIDE = 21  # up to so many: they take time for each, where a matrix product is of one piece
_FEW_SUMS = 8
UNROLL = 32  # tasks; beyond, a loop keeps the compiled program small


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


def check_not_gramian(updates: _base.TaskGrads, method: str, *, may_be_deferred: bool = False) -> None:
    """Raises `ValueError` if a method that acts on every entry of the gradients was given their Gramian."""
    if isinstance(updates, Gramian):
        raise ValueError(
            f"{method} acts on the gradients themselves, not on their inner products, and was given a Gramian. Pass "
            "the task gradients; or choose a weighting (optax_mtl.mgda, for one), which takes either."
        )
    if not may_be_deferred:
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


def task_gramian(
    task_grads: _base.TaskGrads, metric: _base.Params | None = None, *, axis_name: Any = None
) -> jax.Array:
    """The Gramian of the tasks' gradients, `M[i, j] = <g_i, g_j>` over all leaves.

    Args:
      task_grads: leaves `(T, *shape)`, sharded in any way except along the task axis, or deferred; or a `Gramian`.
      metric: leaves `(*shape)`, not negative: what each parameter counts, `M[i, j] = sum_k metric_k g_ik g_jk`. One
        for all if None.
      axis_name: inside `jax.shard_map`, the axes over which the leaves are sharded, as for `over_axes`.

    Returns:
      `(T, T)`, symmetric, in float32 (float64 if any leaf has it). Rows and columns of tasks whose gradient is not
      finite are not finite.

    Example:
      >>> import jax.numpy as jnp, optax_mtl as mtl
      >>> mtl.task_gramian(jnp.array([[3.0, 0.0], [1.0, 2.0]]), metric=jnp.array([1.0, 10.0])).tolist()
      [[9., 3.], [3., 41.]]
    """
    if axis_name is not None:
        with _shards.summing_over(axis_name):
            return task_gramian(task_grads, metric)
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
    return _shards.total(jax.tree.leaves(products))


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
    return _shards.total(jax.tree.leaves(jax.tree.map(leaf_squared_norms, *trees)))


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
        return _inner_products(leaf, along.astype(leaf.dtype), axes, dtype)

    return _shards.total(jax.tree.leaves(jax.tree.map(leaf_products, task_grads, direction)))


def _leaf_products(first: jax.Array, second: jax.Array, metric: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
    # A product over all parameter axes leaves a sharded leaf where it is, and ends in one all-reduce of (T, T);
    # flattening it first would gather it. With a single device nothing is sharded, and the CPU wants chunks.
    num_tasks = first.shape[0]
    if first.size <= num_tasks * _SMALL or jax.device_count() > 1:
        return _contract(first, second, metric, dtype)
    symmetric = first is second
    number = num_tasks * (num_tasks + 1) // 2 if symmetric else num_tasks**2
    # What is computed from the gradients first, a wider dtype say, XLA would store if many sums share it.
    as_they_are = metric is None and first.dtype == second.dtype == dtype
    on_cpu = _sum_side_by_side if as_they_are and number <= _SIDE_BY_SIDE else _contract_chunks

    def on(contract: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        def run(a: jax.Array, b: jax.Array | None, m: jax.Array | None) -> jax.Array:
            return contract(a, a if b is None else b, m, dtype)

        return run

    leaves = first, None if symmetric else second, metric
    products: jax.Array = lax.platform_dependent(*leaves, cpu=on(on_cpu), default=on(_contract))
    return products


def _contract(first: jax.Array, second: jax.Array, metric: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
    axes = tuple(range(1, first.ndim))
    if metric is not None:
        first, second = first.astype(dtype) * metric.astype(dtype)[None], second.astype(dtype)
    return _inner_products(first, second, (axes, axes), dtype)


def _inner_products(
    first: jax.Array, second: jax.Array, axes: tuple[tuple[int, ...], tuple[int, ...]], dtype: jnp.dtype
) -> jax.Array:
    return lax.dot_general(
        first,
        second,
        (axes, ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=dtype,
        out_sharding=explicit_sharding(first, second),
    )


def explicit_sharding(*arrays: jax.Array) -> NamedSharding | None:
    """The sharding of what is on all devices, which sums must be given where axes are explicit; None elsewhere."""
    for array in arrays:
        sharding = jax.typeof(array).sharding
        if any(axis is not None for axis in getattr(sharding, "spec", ())):
            return NamedSharding(sharding.mesh, PartitionSpec())
    return None


_OfColumns = Callable[[Any, Any], tuple[jax.Array, Any]]


def _contract_chunks(first: jax.Array, second: jax.Array, metric: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
    def products(leaves: Any, _: Any) -> tuple[jax.Array, Any]:
        return _contract(leaves[0], leaves[1], leaves[2], dtype), ()

    leaves = _flat(first), _flat(second), None if metric is None else metric.reshape(-1)
    return _by_columns(products, leaves, ())[0]


def by_columns(function: _OfColumns, shape: tuple[int, ...], read: Any, write: Any) -> tuple[jax.Array, Any]:
    """What an elementwise function sums up and writes, of which nothing of the gradients' size is stored on the way.

    On a CPU it is given a few columns at a time, as many as stay in the cache; elsewhere whole arrays.

    Args:
      function: from the same parameters of `read` and of `write` to a sum over them, `(T,)`, and what comes in place of
        the latter.
      shape: of the parameter.
      read: a tree of arrays `(..., *shape)`, the first of them `(T, *shape)`.
      write: a tree of arrays `(..., *shape)`.

    Returns:
      The sum, and `write` as written.
    """

    def flat(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.reshape(*x.shape[: x.ndim - len(shape)], math.prod(shape)), tree)

    def in_turn(read: Any, write: Any) -> tuple[jax.Array, Any]:
        total, written = _by_columns(function, flat(read), flat(write))
        return total, jax.tree.map(lambda new, old: new.reshape(old.shape), written, write)

    if math.prod(shape) <= _SMALL or jax.device_count() > 1:
        return function(read, write)
    done: tuple[jax.Array, Any] = lax.platform_dependent(read, write, cpu=in_turn, default=function)
    return done


def _by_columns(function: _OfColumns, read: Any, write: Any) -> tuple[jax.Array, Any]:
    *rows, size = jax.tree.leaves(read)[0].shape
    number = min(max(_CHUNK // math.prod(rows), 1), size)
    whole = size // number

    def some(start: jax.Array, number: int, read: Any, write: Any) -> tuple[jax.Array, Any]:
        def take(x: jax.Array) -> jax.Array:
            return lax.dynamic_slice_in_dim(x, start, number, x.ndim - 1)

        total, new = function(jax.tree.map(take, read), jax.tree.map(take, write))
        return total, jax.tree.map(lambda x, n: lax.dynamic_update_slice_in_dim(x, n, start, x.ndim - 1), write, new)

    def add(carry: Any) -> Any:
        start, total, read, write = carry
        of_some, write = some(start, number, read, write)
        # They could stand outside the loop, where XLA would then widen half precision: a copy of all gradients.
        return start + number, total + of_some, lax.optimization_barrier(read), write

    sums, _ = jax.eval_shape(lambda: some(jnp.array(0), number, read, write))
    first = jnp.array(0), jnp.zeros(sums.shape, sums.dtype), read, write
    start, total, read, write = lax.while_loop(lambda carry: carry[0] < whole * number, add, first)
    of_rest, write = some(start, size - whole * number, read, write)  # not from a constant, for the same reason
    return total + of_rest, write


def _sum_side_by_side(first: jax.Array, second: jax.Array, metric: None, dtype: jnp.dtype) -> jax.Array:
    a, b = _flat(first), _flat(second)
    pairs = [(i, j) for i in range(len(a)) for j in range(i if first is second else 0, len(a))]
    # Each sum is a chain of additions that wait for one another: it takes several to keep a core busy.
    streams = 2 if len(pairs) < _FEW_SUMS else 1
    blocks = a.shape[1] // (streams * _BLOCK)
    part = blocks * _BLOCK

    def row(matrix: jax.Array, task: int, stream: int) -> jax.Array:
        return lax.slice_in_dim(matrix[task], stream * part, (stream + 1) * part).reshape(blocks, _BLOCK)

    def add(xs: Any, ys: Any) -> Any:
        return [x + y for x, y in zip(xs, ys, strict=True)]

    terms = [row(a, i, stream) * row(b, j, stream) for stream in range(streams) for i, j in pairs]
    sums = jnp.stack(lax.reduce(terms, [jnp.zeros((), dtype)] * len(terms), add, (1,)))
    of_pairs = jnp.sum(sums.reshape(streams, len(pairs), blocks), axis=(0, 2))
    number = {(j, i): k for k, (i, j) in enumerate(pairs)} | {pair: k for k, pair in enumerate(pairs)}
    matrix = np.array([[number[i, j] for j in range(len(a))] for i in range(len(a))])
    rest = slice(streams * part, None)
    return of_pairs[matrix] + _contract(a[:, rest], b[:, rest], None, dtype)


def _flat(leaf: jax.Array) -> jax.Array:
    return leaf.reshape(leaf.shape[0], math.prod(leaf.shape[1:]))


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
    dtype, num_tasks = _base.accumulator_dtype(leaf), leaf.shape[0]
    w = weights.astype(dtype)
    # Of more rows in half precision, XLA on a CPU would make a wider copy first.
    rows = UNROLL if leaf.dtype == dtype else UNROLL // 4

    first = num_tasks - (num_tasks - 1) // rows * rows
    total = combine_rows(w[:first], lambda i: leaf[i].astype(dtype))

    def add(k: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        total, leaf = carry
        leaf = lax.optimization_barrier(leaf)
        of_some, some = (lax.dynamic_slice_in_dim(x, first + k * rows, rows) for x in (w, leaf))
        return total + combine_rows(of_some, lambda i: some[i].astype(dtype)), leaf

    if first < num_tasks:
        total, _ = lax.fori_loop(0, (num_tasks - first) // rows, add, (total, leaf))
    return narrowed(total, leaf.dtype)


def narrowed(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`x` in another dtype: what is too large for float16 becomes its largest number, and not infinity."""
    largest = float(jnp.finfo(dtype).max)
    return (jnp.clip(x, -largest, largest) if jnp.finfo(dtype).maxexp < jnp.finfo(x.dtype).maxexp else x).astype(dtype)


def combine_rows(weights: jax.Array, row: Callable[[int], jax.Array]) -> jax.Array:
    """As `combine`, of rows that are computed from slices: one loop for all, in which no row is ever stored.

    Args:
      weights: `(T,)`, of the rows' dtype.
      row: `row(i)` is what `weights[i]` multiplies.
    """
    terms = (jnp.where(weights[i] == 0, 0, weights[i] * row(i)) for i in range(weights.shape[0]))
    return functools.reduce(operator.add, terms)
