"""A way for extra arguments through code that hands an optimiser nothing but gradients."""

from typing import Any

import optax

from optax_mtl import _base


def bundle(task_grads: _base.TaskGrads, **extra_args: Any) -> _base.Bundle:
    """Task gradients together with the other arguments of `update`, for what passes on gradients only.

    The `apply_gradients` of a `flax.training.train_state.TrainState` and `optax.lookahead` know of no `losses`,
    `task_mask` or `value_fn`. Give these in one piece with the gradients, and wrap the optimiser in `unbundle`, which
    takes them apart again.

    Args:
      task_grads: leaves `(T, *shape)`, deferred perhaps; or a `Gramian`.
      **extra_args: what `update` is to be given by name.

    Returns:
      A pytree to stand where gradients are wanted.

    Example:
      >>> import jax.numpy as jnp, optax, optax_mtl as mtl
      >>> tx = mtl.unbundle(optax.chain(mtl.uw_so(num_tasks=2), optax.sgd(1.0)))
      >>> grads = mtl.bundle(jnp.array([[1.0, 0.0], [0.0, 1.0]]), losses=jnp.array([1.0, 1.0]))
      >>> tx.update(grads, tx.init(jnp.zeros(2)))[0].tolist()
      [-0.5, -0.5]
    """
    return _base.Bundle(task_grads, extra_args)


def unbundle(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Gives an optimiser the arguments that came with its gradients: see `bundle`.

    It goes around the whole optimiser, `checked` and `multi_steps` included: `TrainState.create(...,
    tx=unbundle(tx))`; but inside of what does not pass arguments on: `optax.lookahead(unbundle(tx), ...)`.

    Args:
      tx: the optimiser.

    Returns:
      `tx`, whose `update` also takes what `bundle` returns in the place of gradients. Its state is that of `tx`.
    """
    tx = optax.with_extra_args_support(tx)

    def update_fn(updates: Any, state: Any, params: _base.Params | None = None, **extra_args: Any) -> tuple[Any, Any]:
        if isinstance(updates, _base.Bundle):
            updates, extra_args = updates.task_grads, updates.extra_args | extra_args
        return tx.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(tx.init, update_fn)
