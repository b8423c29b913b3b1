"""The light oracle: an exact balanced step in which the tasks' gradients never exist at once."""

from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax
from jax import lax, numpy as jnp

from optax_mtl import _base, _deferred, _oracles, _taps


def value_and_light_grads(
    loss_fn: Callable[..., Any], argnums: int | Sequence[int] = 0, has_aux: bool = False
) -> Callable[..., tuple[Any, _base.TaskGrads]]:
    """As `value_and_task_grads`."""

    @functools.wraps(loss_fn)
    def value_and_light_grads_fn(*args: Any, **kwargs: Any) -> tuple[Any, _base.TaskGrads]:
        inputs, losses_of = _oracles.differentiated(loss_fn, argnums, has_aux, args, kwargs)

        def stacked_losses(*inputs: Any) -> tuple[jax.Array, Any]:
            out, aux = losses_of(*inputs)
            return _oracles.stack_losses(out), aux

        source = _Light(stacked_losses, inputs)
        grads = _deferred.defer(source, inputs, source.losses.shape[0])
        value = (source.losses, source.aux) if has_aux else source.losses
        return value, grads if isinstance(argnums, Sequence) else grads[0]

    return value_and_light_grads_fn


class _Light(_deferred.Source):
    """The gradients of `function(*inputs)`, which returns losses `(T,)` and auxiliary data."""

    def __init__(self, function: Callable[..., tuple[jax.Array, Any]], inputs: Any):
        self._leaves, treedef = jax.tree.flatten(inputs)
        self._program, (losses, aux) = jax.make_jaxpr(
            lambda *leaves: function(*treedef.unflatten(leaves)), return_shape=True
        )(*self._leaves)
        self._aux_structure = jax.tree.structure(aux)
        self._companions = jnp.zeros(losses.shape, _base.accumulator_dtype(self._leaves))
        every = range(len(self._leaves))
        run = functools.partial(self._run, _taps.GRAMIAN, every, None)
        # One forward pass for both: the backward pass of the leaves is the ordinary one, and that of their companions,
        # under `jax.vmap` over the tasks, tells the Gramians.
        companions = [self._companions for _ in every]
        self.losses, self._pullback, self.aux = jax.vjp(run, self._leaves, companions, has_aux=True)

    def _run(
        self,
        contraction: _taps.Contraction,
        indices: Sequence[int],
        metrics: Sequence[jax.Array] | None,
        leaves: Sequence[jax.Array],
        companions: Sequence[jax.Array],
    ) -> tuple[jax.Array, Any]:
        values: list[Any] = list(self._leaves)
        for k, index in enumerate(indices):
            values[index] = _taps.Tapped(leaves[k], companions[k], None if metrics is None else metrics[k])
        losses, *aux = _taps.evaluate(self._program.jaxpr, self._program.consts, values, contraction)
        return losses, self._aux_structure.unflatten(aux)

    def _one_hots(self) -> jax.Array:
        return jnp.eye(self.losses.shape[0], dtype=self.losses.dtype)

    def gramian(self, indices: Sequence[int], metrics: Sequence[jax.Array] | None) -> jax.Array:
        """See `Source`."""
        return sum(self.leaf_gramians(indices, metrics, [None] * len(indices)))

    def leaf_gramians(
        self, indices: Sequence[int], metrics: Sequence[jax.Array] | None, layers: Sequence[int | None]
    ) -> list[jax.Array]:
        """See `Source`."""
        if metrics is None and all(number is None for number in layers):
            gramians = jax.vmap(lambda one: self._pullback(one)[1])(self._one_hots())
            return [gramians[i] for i in indices]
        zeros = self._companions
        companions = [zeros if number is None else jnp.zeros((number, *zeros.shape), zeros.dtype) for number in layers]
        leaves = [self._leaves[i] for i in indices]
        _, pullback, _ = jax.vjp(
            lambda companions: self._run(_taps.GRAMIAN, indices, metrics, leaves, companions), companions, has_aux=True
        )
        (gramians,) = jax.vmap(pullback)(self._one_hots())
        return [rows if rows.ndim == 2 else jnp.swapaxes(rows, 0, 1) for rows in gramians]

    def combine(self, weights: jax.Array, indices: Sequence[int]) -> list[jax.Array]:
        """See `Source`."""

        def pull_back(cotangent: jax.Array) -> list[jax.Array]:
            grads = self._pullback(cotangent)[0]
            return [grads[i] for i in indices]

        return combine_once(pull_back, weights.astype(self.losses.dtype))

    def combine_each(self, weights: Sequence[jax.Array], indices: Sequence[int]) -> list[jax.Array]:
        """See `Source`."""
        weights = [each.astype(self._companions.dtype) for each in weights]
        _, pullback, _ = jax.vjp(
            lambda leaves: self._run(_taps.COMBINATION, indices, None, leaves, weights),
            [self._leaves[i] for i in indices],
            has_aux=True,
        )
        return jax.vmap(lambda one: pullback(one)[0], out_axes=None)(self._one_hots())


def combine_once(pull_back: Callable[[jax.Array], list[jax.Array]], weights: jax.Array) -> list[jax.Array]:
    """`pull_back(weights)`, which is linear; but a task of weight zero adds nothing even where it is not finite.

    Zero times the infinite derivative of such a task is not a number. If that has happened, the tasks are pulled back
    one after another and summed without it, in a loop that goes around once otherwise: so the backward pass is in the
    program a single time, and under `jax.vmap` done a second time only if there is need.
    """
    num_tasks = weights.shape[0]

    def go_on(state: tuple[jax.Array, jax.Array, list[jax.Array]]) -> jax.Array:
        task, finite, _ = state
        return (task < 0) | (~finite & (task < num_tasks))

    def step(state: tuple[jax.Array, jax.Array, list[jax.Array]]) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
        task, finite, total = state
        together = task < 0
        chosen = together | (jnp.arange(num_tasks) == task)
        grads = pull_back(jnp.where(chosen, weights, 0))
        taken = together | jnp.any(chosen & (weights != 0))
        total = [jnp.where(task > 0, t, 0) + jnp.where(taken, g, 0) for t, g in zip(total, grads, strict=True)]
        finite = jnp.where(together, jnp.all(jnp.stack([jnp.all(jnp.isfinite(t)) for t in total])), finite)
        return task + 1, finite, total

    zeros = [jnp.zeros(g.shape, g.dtype) for g in jax.eval_shape(pull_back, weights)]
    return lax.while_loop(go_on, step, (jnp.array(-1), jnp.array(True), zeros))[2]
