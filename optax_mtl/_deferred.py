"""Task gradients that are not computed until it is known what of them is needed."""

from collections.abc import Sequence
from typing import Any, NoReturn, Protocol

import jax
from jax import numpy as jnp

from optax_mtl import _base


class Source(Protocol):
    """Where deferred gradients come from: it can tell their inner products, and sum them with weights.

    `indices` says which leaves are meant; what else is given for each, or returned, is in their order.
    """

    def gramian(self, indices: Sequence[int], metrics: Sequence[jax.Array] | None) -> jax.Array:
        """The inner products `(T, T)` of the gradients over these leaves, in a metric if there is one."""

    def leaf_gramians(
        self, indices: Sequence[int], metrics: Sequence[jax.Array] | None, layers: Sequence[int | None]
    ) -> list[jax.Array]:
        """Those over each of the leaves, `(T, T)`; or over each of its layers, `(layers, T, T)`."""

    def combine(self, weights: jax.Array, indices: Sequence[int]) -> list[jax.Array]:
        """The sums of the gradients with weights `(T,)`: one array `(*shape)` a leaf."""

    def combine_each(self, weights: Sequence[jax.Array], indices: Sequence[int]) -> list[jax.Array]:
        """Those with weights `(T,)` for each leaf, or `(layers, T)` for each of its layers."""


class Deferred:
    """The gradients `(T, *shape)` of one leaf, as `value_and_light_grads` returns them: a promise, not an array.

    What weightings do with gradients, inner products and weighted sums, can be had of them, in the same `jax.jit` and
    by no other means: they cannot be looked at, returned from it or mapped over.
    """

    def __init__(self, source: Source, index: int, shape: tuple[int, ...], dtype: Any):
        self.source = source
        self.index = index
        self.shape = shape
        self.dtype = dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __repr__(self) -> str:
        # JAX quotes this where it refuses an argument, and says nothing else that would help.
        return (
            f"Deferred(shape={self.shape}, dtype={self.dtype}: for a weighting only, which is to stand first in "
            "optax.chain)"
        )

    def _refuse(self, *_: Any) -> NoReturn:
        raise TypeError(_MESSAGE)

    # What a transformation would do that comes before the weighting.
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __neg__ = __getitem__ = _refuse
    __rtruediv__ = __pow__ = __rpow__ = __matmul__ = __abs__ = __array__ = _refuse

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"Deferred gradients have no attribute {name!r}. {_MESSAGE}")


_MESSAGE = (
    "These task gradients are deferred, so that the T of them never exist at once: they can be given to a weighting "
    "(optax_mtl.mgda, for one), and to nothing else. Put the weighting first in optax.chain; or, for a method that "
    "acts on the gradients themselves, compute them with optax_mtl.value_and_task_grads(loss_fn)(params, batch)."
)


def is_deferred(tree: Any) -> bool:
    """Whether any leaf of `tree` is deferred."""
    return any(isinstance(leaf, Deferred) for leaf in jax.tree.leaves(tree))


def check_not_deferred(updates: Any, method: str) -> None:
    """Raises `ValueError` if a method that acts on the gradients themselves was given deferred ones."""
    if is_deferred(updates):
        raise ValueError(f"{method} acts on the gradients themselves. {_MESSAGE}")


def defer(source: Source, params: _base.Params, num_tasks: int) -> Any:
    """A tree like `params` of the gradients that `source` will know about."""
    leaves, treedef = jax.tree.flatten(params)
    shapes = [(num_tasks, *jnp.shape(leaf)) for leaf in leaves]
    return treedef.unflatten(
        [
            Deferred(source, i, shape, jnp.result_type(leaf))
            for i, (shape, leaf) in enumerate(zip(shapes, leaves, strict=True))
        ]
    )


def by_source(leaves: Sequence[Any]) -> list[tuple[Source, list[int], list[int]]]:
    """The sources of the deferred ones of `leaves`: each, the indices it knows its leaves by, and their positions."""
    positions: dict[int, list[int]] = {}
    for position, leaf in enumerate(leaves):
        if isinstance(leaf, Deferred):
            positions.setdefault(id(leaf.source), []).append(position)
    return [(leaves[found[0]].source, [leaves[i].index for i in found], found) for found in positions.values()]
