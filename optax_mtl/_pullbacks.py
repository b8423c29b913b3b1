"""Gradients that are pulled back when they are asked for, with the weights of the tasks already in."""

from collections.abc import Callable, Sequence
import functools
import operator
from typing import Any

import jax
from jax import numpy as jnp

from optax_mtl import _base, _deferred, _gramian, _oracles, _split

# function(*inputs) -> (out, aux)
Function = Callable[..., tuple[Any, Any]]


class Pullbacks(_deferred.Source):
    """The gradients of `T` tasks, each the pullback through `function` of a cotangent of what it returns.

    Attributes:
      leaves: of the inputs.
      out: what `function` returned: losses `(T,)`, or features.
      aux: what else.
    """

    _cotangents: Any

    def __init__(self, function: Function, inputs: Any, num_tasks: int | None):
        leaves, treedef = jax.tree.flatten(inputs)
        self.leaves = [jnp.asarray(leaf) for leaf in leaves]
        self.out, self._vjp, self.aux = jax.vjp(
            lambda leaves: function(*treedef.unflatten(leaves)), self.leaves, has_aux=True
        )

    def set_cotangents(self, cotangents: Any) -> None:
        """To be called when `out` is known, with trees like it, leaves `(T, ...)`."""
        self._cotangents = cotangents

    def pull_back(self, cotangent: Any) -> list[jax.Array]:
        """The gradients, in the order of `leaves`, for a cotangent of `out`."""
        return self._vjp(cotangent)[0]

    def gramian(self, indices: Sequence[int], metrics: Sequence[jax.Array] | None) -> jax.Array:
        """See `Source`."""
        gramians = self.leaf_gramians(indices, metrics, [None] * len(indices))
        return functools.reduce(operator.add, gramians)

    def combine(self, weights: jax.Array, indices: Sequence[int]) -> list[jax.Array]:
        """See `Source`. One backward pass."""
        total = self.pull_back(_gramian.combine(weights, self._cotangents))
        # If no task takes part, zeros have been pulled back; and where derivatives are infinite these are no zeros.
        return [jnp.where(jnp.any(weights != 0), total[i], 0) for i in indices]


def deferring(
    make_source: Callable[[Function, Any, int | None], Pullbacks],
    loss_fn: Callable[..., Any],
    argnums: int | Sequence[int],
    has_aux: bool,
    args: tuple[Any, ...],
    kwargs: Any,
) -> tuple[Any, _base.TaskGrads]:
    """What an oracle of deferred gradients returns: losses, with auxiliary data if there are any, and the gradients.

    Args:
      make_source: from a function of parameters, these, and the number of tasks (None: as many as it returns losses) to
        the gradients' source.
      loss_fn: a loss function.
      argnums: as for `value_and_task_grads`.
      has_aux: as for `value_and_task_grads`.
      args: the arguments of `loss_fn`.
      kwargs: its keyword arguments.
    """
    if isinstance(loss_fn, _split.Split):
        _oracles.check_split_arguments(argnums)
        return _defer_trunk(make_source, loss_fn, has_aux, *args, **kwargs)
    inputs, losses_of = _oracles.differentiated(loss_fn, argnums, has_aux, args, kwargs)

    def stacked_losses(*inputs: Any) -> tuple[jax.Array, Any]:
        out, aux = losses_of(*inputs)
        return _oracles.stack_losses(out), aux

    source = make_source(stacked_losses, inputs, None)
    num_tasks = source.out.shape[0]
    source.set_cotangents(jnp.eye(num_tasks, dtype=source.out.dtype))
    grads = _deferred.defer(source, inputs, num_tasks)
    value = (source.out, source.aux) if has_aux else source.out
    return value, grads if isinstance(argnums, Sequence) else grads[0]


def _defer_trunk(
    make_source: Callable[[Function, Any, int | None], Pullbacks],
    loss_fn: _split.Split,
    has_aux: bool,
    params: Any,
    batch: Any,
) -> tuple[Any, _base.TaskGrads]:
    _oracles.check_split_parameters(loss_fn, params)
    if loss_fn.own_inputs:
        raise ValueError(
            "With own_inputs=True each task goes through the trunk by itself, and nothing is saved by deferring its "
            "gradient: use optax_mtl.value_and_task_grads(loss_fn)."
        )
    source = make_source(lambda trunk: loss_fn.features(trunk, batch), (params["trunk"],), loss_fn.num_tasks)
    parts = loss_fn.through_heads(source.out, source.aux, params, batch, has_aux)
    source.set_cotangents(parts.cotangents)
    trunk_grads = _deferred.defer(source, params["trunk"], loss_fn.num_tasks)
    value = (parts.losses, parts.aux) if has_aux else parts.losses
    return value, {"trunk": trunk_grads, "heads": jax.tree.map(lambda g: g[None], parts.head_grads)}
