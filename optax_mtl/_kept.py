"""Deferred gradients that are kept, and not pulled back again for their weighted sum."""

from collections.abc import Sequence
import functools
from typing import Any

import jax
from jax import numpy as jnp

from optax_mtl import _base, _blocks, _gramian, _oracles, _pullbacks, _shards, _taps


class Kept(_pullbacks.Pullbacks):
    """The gradients of each leaf `(T, *shape)`; or, of a wide layer, what they are products of, which is less.

    The gradients of `w` in `x @ w` are `x.T @ D_i`. Where `x` has few rows, `x` and the cotangents `D` of the product
    are kept: they tell the inner products, and the weighted sum is one product more.
    """

    def __init__(self, function: _pullbacks.Function, inputs: Any, num_tasks: int | None):
        leaves, treedef = jax.tree.flatten(inputs)
        self.leaves = [jnp.asarray(leaf) for leaf in leaves]
        program, shapes = jax.make_jaxpr(lambda *leaves: function(*treedef.unflatten(leaves)), return_shape=True)(
            *self.leaves
        )
        self._dtype = _base.accumulator_dtype(self.leaves)
        number = shapes[0].shape[0] if num_tasks is None else num_tasks
        structure = jax.tree.structure(shapes)

        def run(leaves: dict[int, jax.Array], added: dict[int, jax.Array]) -> Any:
            taps = _KeepTaps(number, added)
            values = [_taps.Tapped(leaves.get(i, leaf), i) for i, leaf in enumerate(self.leaves)]
            out, aux = structure.unflatten(_taps.evaluate(program.jaxpr, program.consts, values, taps))
            self._products = taps.products
            return out, (aux, taps.activations, taps.results)

        _, (_, _, results) = jax.eval_shape(lambda: run({}, {}))  # to see what is to be kept
        zeros = {i: jnp.zeros(result.shape, result.dtype) for i, result in results.items()}
        others = {i: leaf for i, leaf in enumerate(self.leaves) if i not in zeros}
        self.out, self._vjp, (self.aux, self._activations, _) = jax.vjp(run, others, zeros, has_aux=True)

    def set_cotangents(self, cotangents: Any) -> None:
        """Pulls back all tasks, in the fastest way."""
        super().set_cotangents(cotangents)
        self._gradients, self._of_products = _oracles.pull_back_all(self._vjp, cotangents)

    def leaf_gramians(
        self, indices: Sequence[int], metrics: Sequence[jax.Array] | None, layers: Sequence[int | None]
    ) -> list[jax.Array]:
        """See `Source`."""
        gramians = []
        for k, index in enumerate(indices):
            metric = None if metrics is None else metrics[k]
            if index in self._products and metric is None and layers[k] is None:
                cotangents = jax.vmap(self._products[index].result_rows)(self._of_products[index])
                gramians.append(
                    _taps.product_gramian(
                        cotangents, self._products[index].x_rows(self._activations[index]), self._dtype
                    )
                )
            else:
                gramians.append(_blocks.leaf_gramian(self._gradient(index), metric, layers[k]).astype(self._dtype))
        return gramians

    def _gradient(self, index: int) -> jax.Array:
        """The gradients of a leaf `(T, *shape)`, which are computed only now if it is a wide layer's."""
        if index not in self._products:
            return self._gradients[index]
        return jax.vmap(lambda cotangent: self._towards(index, cotangent))(self._of_products[index])

    def _towards(self, index: int, cotangent: jax.Array) -> jax.Array:
        multiply = functools.partial(self._products[index].multiply, self._activations[index])
        return jax.linear_transpose(multiply, self.leaves[index])(cotangent)[0]

    def combine(self, weights: jax.Array, indices: Sequence[int]) -> list[jax.Array]:
        """See `Source`."""
        return self.combine_each([weights] * len(indices), indices)

    def combine_each(self, weights: Sequence[jax.Array], indices: Sequence[int]) -> list[jax.Array]:
        """See `Source`."""
        combined = []
        for each, index in zip(weights, indices, strict=True):
            if index in self._products and each.ndim == 1:
                combined.append(self._towards(index, _gramian.combine(each, self._of_products[index])))
            else:
                combined.append(_gramian.combine_leaf(each, self._gradient(index)))
        return combined


class _KeepTaps:
    """Taps that add to products what tells their cotangents, and note the products."""

    follow = False

    def __init__(self, num_tasks: int, added: dict[int, jax.Array]):
        self._num_tasks = num_tasks
        self._added = added
        self.products: dict[int, _taps.Product] = {}
        self.activations: dict[int, jax.Array] = {}
        self.results: dict[int, jax.Array] = {}

    def tap(self, tapped: _taps.Tapped) -> jax.Array:
        """See `Taps`."""
        return tapped.value

    def multiply(self, product: _taps.Product, x: jax.Array, tapped: _taps.Tapped) -> jax.Array | None:
        """See `Taps`."""
        is_explicit = _gramian.explicit_sharding(x, tapped.value) is not None  # it would have to be told where it ends
        if is_explicit or not _taps.less_work(self._num_tasks, product):
            return None
        index: Any = tapped.companion
        result = product.multiply(x, tapped.value)
        if _shards.is_shard(result):  # what is added would be the same on all shards, and so would its cotangent
            return result
        self.products[index], self.activations[index], self.results[index] = product, x, result
        return result + self._added[index] if index in self._added else result
