"""Inner products from sketches: the tasks pulled back one after another, and no gradient kept."""

from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax
from jax import lax, numpy as jnp

from optax_mtl import _base, _gramian, _pullbacks


def value_and_sketched_grads(
    loss_fn: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    size: int = 4095,
    key: jax.Array | None = None,
) -> Callable[..., tuple[Any, _base.TaskGrads]]:
    r"""Losses and deferred gradients of all tasks, whose inner products are estimated from random projections.

    Tasks are pulled back one after another. Of each gradient a count sketch is kept, `size` numbers a leaf, and the
    gradient is forgotten: the memory is that of an ordinary step, whatever `T`, also for the activations' cotangents,
    of which `value_and_light_grads` holds those of all tasks in one layer. The time is `T + 1` backward passes. Choose
    it where even that does not fit.

    The estimate of each inner product is unbiased over `key`, with a standard error of at most

    .. math:: \sqrt{2 / \text{size}} \; \|g_i\| \|g_j\|,

    2.2 % of the norms for the default; the weighted sum of the gradients is exact. What a method promises then holds as
    far as its weights bear such an error. Leaves of no more than `size` entries are not sketched.

    Args:
      loss_fn: as for `value_and_light_grads`.
      argnums: as for `value_and_task_grads`.
      has_aux: as for `value_and_task_grads`.
      size: numbers that are kept of each leaf's gradient, odd.
      key: random key of the projections; `jax.random.key(0)` if None. The same one may serve for every step.

    Returns:
      As `value_and_light_grads`.

    Raises:
      ValueError: as `value_and_light_grads` does; and if `size` is no odd number.

    Example:
      >>> import jax, jax.numpy as jnp, optax_mtl as mtl
      >>> loss_fn = lambda w: jnp.stack([jnp.sum(w**2) / 2, jnp.sum(w) + jnp.sum(w[:5000])])
      >>> losses, task_grads = mtl.value_and_sketched_grads(loss_fn)(jnp.ones(10_000))
      >>> mtl.task_gramian(task_grads).round(-3).tolist()  # exact: 10,000, 15,000 and 25,000
      [[10000.0, 15000.0], [15000.0, 25000.0]]

    References:
      Charikar et al., `Finding Frequent Items in Data Streams <https://doi.org/10.1016/S0304-3975(03)00400-6>`_,
      Theoretical Computer Science 312, 2004: the count sketch

    Note:
      An entry's bucket is its column, shifted by a random number for each row of `size` entries, so that two entries
      meet with probability `1 / size` at most. Its sign is the product of its row's, its column's, and one of a second
      list of columns, shifted by another random number for each row: a few random numbers a row, and signs that are
      independent for whatever meets, but with probability `1 / size`.
    """
    size = _base.check_static_int("size", size, 1)
    if size % 2 == 0:
        raise ValueError(f"size must be odd (the signs of what meets are not independent otherwise), found {size}.")

    @functools.wraps(loss_fn)
    def value_and_sketched_grads_fn(*args: Any, **kwargs: Any) -> tuple[Any, _base.TaskGrads]:
        make_source = functools.partial(_Sketched, size, jax.random.key(0) if key is None else key)
        return _pullbacks.deferring(make_source, loss_fn, argnums, has_aux, args, kwargs)

    return value_and_sketched_grads_fn


class _Sketched(_pullbacks.Pullbacks):
    """Pullbacks that are run in turn, and whose gradients are sketched or summed at once."""

    def __init__(self, size: int, key: jax.Array, function: _pullbacks.Function, inputs: Any, num_tasks: int | None):
        super().__init__(function, inputs, num_tasks)
        self._size, self._key = size, key

    def leaf_gramians(
        self, indices: Sequence[int], metrics: Sequence[jax.Array] | None, layers: Sequence[int | None]
    ) -> list[jax.Array]:
        """See `Source`."""

        def sketches(cotangent: Any) -> list[jax.Array]:
            grads = self.pull_back(cotangent)
            found = []
            for k, index in enumerate(indices):
                grad = grads[index].astype(_base.accumulator_dtype(grads[index]))
                grad = grad if metrics is None else grad * jnp.sqrt(metrics[k]).astype(grad.dtype)
                rows = grad.reshape(1 if layers[k] is None else layers[k], -1)
                leaf_key = jax.random.fold_in(self._key, index)
                found.append(jax.vmap(lambda row, leaf_key=leaf_key: count_sketch(row, self._size, leaf_key))(rows))
            return found

        stacks = lax.map(sketches, self._cotangents)  # (T, layers or 1, size)
        gramians = [jax.vmap(_gramian.task_gramian, 1)(stack) for stack in stacks]
        return [g[0] if number is None else g for g, number in zip(gramians, layers, strict=True)]

    def combine_each(self, weights: Sequence[jax.Array], indices: Sequence[int]) -> list[jax.Array]:
        """See `Source`. One task after another."""

        def add_task(total: list[jax.Array], task: Any) -> tuple[list[jax.Array], None]:
            cotangent, of_task = task
            grads = self.pull_back(cotangent)
            stacks = [grads[i][None].astype(t.dtype) for t, i in zip(total, indices, strict=True)]
            terms = [_gramian.combine_leaf(w[..., None], stack) for w, stack in zip(of_task, stacks, strict=True)]
            return [t + term for t, term in zip(total, terms, strict=True)], None

        leaves = [self.leaves[i] for i in indices]
        zeros = [jnp.zeros(leaf.shape, _base.accumulator_dtype(leaf)) for leaf in leaves]
        by_task = [jnp.moveaxis(w, -1, 0) for w in weights]
        total, _ = lax.scan(add_task, zeros, (self._cotangents, by_task))
        return [t.astype(leaf.dtype) for t, leaf in zip(total, leaves, strict=True)]


def count_sketch(vector: jax.Array, size: int, key: jax.Array) -> jax.Array:
    """A random projection of `vector` `(n,)` to `(size,)`, which keeps inner products in expectation."""
    if vector.size <= size:
        return vector
    rows = -(-vector.size // size)
    row_key, column_key, second_key, shift_key = jax.random.split(key, 4)
    row_signs = jax.random.rademacher(row_key, (rows,), vector.dtype)
    column_signs = jax.random.rademacher(column_key, (size,), vector.dtype)
    second_signs = jax.random.rademacher(second_key, (size,), vector.dtype)
    shifts = jax.random.randint(shift_key, (rows, 2), 0, size)
    padded = jnp.pad(vector, (0, rows * size - vector.size)).reshape(rows, size)

    def add_row(total: jax.Array, row: Any) -> tuple[jax.Array, None]:
        entries, sign, shift = row
        signs = sign * column_signs * jnp.roll(second_signs, shift[1])
        return total + jnp.roll(signs * entries, shift[0]), None

    return lax.scan(add_row, jnp.zeros(size, vector.dtype), (padded, row_signs, shifts))[0]
