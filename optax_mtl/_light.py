"""The light oracle: an exact balanced step in which the tasks' gradients never exist."""

from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax
from jax import numpy as jnp

from optax_mtl import _base, _kept, _pullbacks, _taps, _xla


def value_and_light_grads(
    loss_fn: Callable[..., Any], argnums: int | Sequence[int] = 0, has_aux: bool = False, *, recompute: bool = True
) -> Callable[..., tuple[Any, _base.TaskGrads]]:
    """Losses and deferred gradients of all tasks: a balanced step, exact, in the memory of an ordinary one.

    What comes in the place of the gradients is given to any weighting, in the same `jax.jit`, as the gradients would
    be. The weighting asks for their Gramian, and only that is computed: on the way back through the network each layer
    adds its inner products and forgets its gradients. Then it asks for their weighted sum, and that is one ordinary
    backward pass. No more than one leaf's `T` gradients ever exist; and where `x @ w` has fewer rows in `x` than
    columns (a batch smaller than the layer is wide), not even these: their inner products are `<D_i, (x x^T) D_j>`,
    from the cotangents `D_i` of the product, and cost less than the gradients would.

    So the memory is that of an ordinary step, with the cotangents of `T` tasks in one layer at a time, and the time one
    forward pass, `T` backward passes, often without the parameters' part of them, and one backward pass more. Layers in
    a `lax.scan` over stacked parameters, and what stands in `jax.checkpoint`, are done slice by slice.

    Choose it where `T` times the parameters is too much, for deep scanned networks, for wide layers and batches that
    are smaller; and `optax_mtl.split` the loss, or each head is pulled back for every task.

    Args:
      loss_fn: as for `value_and_task_grads`; or what `split` returned.
      argnums: as for `value_and_task_grads`.
      has_aux: as for `value_and_task_grads`.
      recompute: whether the weighted sum is pulled back, in one backward pass more, as said. If not, all gradients are
        kept until then, leaves `(T, *shape)`, but of wide layers outside of loops what they are products of, which is
        less. That is the fastest where memory is no matter: at most `T` backward passes, and fewer for wide layers.

    Returns:
      A function like that of `value_and_task_grads`, with deferred gradients: leaves that know the shape `(T, *shape)`
      and can be given to weightings, alone or in `blockwise`, `shared_and_heads`, `update_every`, `optax.partition`,
      and to nothing else (methods that act on the gradients themselves say so). The heads' gradients of a split loss
      are arrays. `blockwise` pulls all tasks back a second time, for weights that differ from leaf to leaf.

    Raises:
      ValueError: as `value_and_task_grads` does; and for a split loss with `own_inputs`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_mtl as mtl
      >>> def loss_fn(params, batch):
      ...     y = jnp.tanh(batch["x"] @ params["w"]) @ params["v"]
      ...     return jnp.mean((y - batch["y"]) ** 2, axis=0)
      >>> params = {"w": jnp.ones((5, 4)), "v": jnp.ones((4, 2))}
      >>> batch = {"x": jnp.eye(3, 5), "y": jnp.zeros((3, 2))}
      >>> tx = optax.chain(mtl.upgrad(2), optax.adam(1e-3))
      >>> @jax.jit
      ... def step(params, opt_state, batch):
      ...     losses, task_grads = mtl.value_and_light_grads(loss_fn)(params, batch)
      ...     updates, opt_state = tx.update(task_grads, opt_state, params, losses=losses)
      ...     return optax.apply_updates(params, updates), opt_state, losses
      >>> params, opt_state, losses = step(params, tx.init(params), batch)

    Note:
      The taps are set by reading the program of `loss_fn` (its jaxpr). A parameter that is used in one place is
      followed to it, through `jax.jit`, `jax.checkpoint` and `lax.scan`; one that is used in several, or in what cannot
      be looked into (a `jax.custom_vjp`, `lax.cond`), is tapped before, and its `T` gradients exist for a moment.

      The weighted sum is one backward pass, which is the sum of the tasks' gradients if backward passes are linear, as
      those of all of JAX are; a `jax.custom_vjp` that clips cotangents is not. Steps cannot be differentiated through.
      Inner products that are had through `x x^T` lose digits, in float32, if `x` has a mean that is large against its
      spread and the cotangents sum to zero over the rows: 1e-6 of the norms at three times, 2e-4 at a hundred times.
      Auxiliary data must be arrays.
    """

    @functools.wraps(loss_fn)
    def value_and_light_grads_fn(*args: Any, **kwargs: Any) -> tuple[Any, _base.TaskGrads]:
        return _pullbacks.deferring(_Light if recompute else _kept.Kept, loss_fn, argnums, has_aux, args, kwargs)

    return value_and_light_grads_fn


class _Light(_pullbacks.Pullbacks):
    """Pullbacks whose Gramians are summed by taps on the way."""

    def __init__(self, function: _pullbacks.Function, inputs: Any, num_tasks: int | None):
        _xla.warn_if_batching_is_wrong("value_and_light_grads")
        leaves, treedef = jax.tree.flatten(inputs)
        self.leaves = [jnp.asarray(leaf) for leaf in leaves]
        self._program, shapes = jax.make_jaxpr(lambda *leaves: function(*treedef.unflatten(leaves)), return_shape=True)(
            *self.leaves
        )
        self._structure = jax.tree.structure(shapes)
        number = shapes[0].shape[0] if num_tasks is None else num_tasks
        self._zeros = jnp.zeros(number, _base.accumulator_dtype(self.leaves))
        # One forward pass for both: pulled back to the leaves it gives gradients, and to their companions Gramians.
        every = range(len(self.leaves))
        run = functools.partial(self._run, _taps.GRAMIAN, every, None)
        self.out, self._vjp, self.aux = jax.vjp(run, self.leaves, [self._zeros for _ in every], has_aux=True)

    def _run(
        self,
        taps: _taps.Taps,
        indices: Sequence[int],
        metrics: Sequence[jax.Array] | None,
        leaves: Sequence[jax.Array],
        companions: Sequence[jax.Array],
    ) -> Any:
        values: list[Any] = list(self.leaves)
        for k, index in enumerate(indices):
            values[index] = _taps.Tapped(leaves[k], companions[k], None if metrics is None else metrics[k])
        return self._structure.unflatten(_taps.evaluate(self._program.jaxpr, self._program.consts, values, taps))

    def leaf_gramians(
        self, indices: Sequence[int], metrics: Sequence[jax.Array] | None, layers: Sequence[int | None]
    ) -> list[jax.Array]:
        """See `Source`."""
        if metrics is None and all(number is None for number in layers):
            gramians = jax.vmap(lambda cotangent: self._vjp(cotangent)[1])(self._cotangents)
            return [gramians[i] for i in indices]
        zeros = self._zeros
        companions = [zeros if number is None else jnp.zeros((number, *zeros.shape), zeros.dtype) for number in layers]
        leaves = [self.leaves[i] for i in indices]
        run = functools.partial(self._run, _taps.GRAMIAN, indices, metrics, leaves)
        _, vjp, _ = jax.vjp(run, companions, has_aux=True)
        (gramians,) = jax.vmap(vjp)(self._cotangents)
        return [rows if rows.ndim == 2 else jnp.swapaxes(rows, 0, 1) for rows in gramians]

    def combine_each(self, weights: Sequence[jax.Array], indices: Sequence[int]) -> list[jax.Array]:
        """See `Source`. Each leaf's own sum is taken as all tasks' cotangents pass."""
        companions = [each.astype(self._zeros.dtype) for each in weights]
        run = functools.partial(self._run, _taps.COMBINATION, indices, None)
        _, vjp, _ = jax.vjp(lambda leaves: run(leaves, companions), [self.leaves[i] for i in indices], has_aux=True)
        return jax.vmap(lambda cotangent: vjp(cotangent)[0], out_axes=None)(self._cotangents)
