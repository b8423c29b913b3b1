"""Feature-level balancing: inner products of the gradients where the heads begin, and one walk through the trunk."""

from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax

from optax_mtl import _base, _gramian, _pullbacks, _shards, _split


def value_and_feature_grads(loss_fn: _split.Split, has_aux: bool = False) -> Callable[..., tuple[Any, _base.TaskGrads]]:
    """Losses and deferred gradients of all tasks, whose inner products are taken at the features.

    The Gramian of the losses' gradients with respect to the features, over the whole batch, stands in for that of the
    trunk's parameters, as in MGDA-UB (where it bounds the objective from above if the trunk's Jacobian is well
    conditioned) and in LibMTL's `rep_grad`. Any weighting takes it. The trunk is walked back once, with the weighted
    sum: a balanced step costs an ordinary one, at any `T`. What a method promises holds for steps in the features, not
    in the parameters.

    Args:
      loss_fn: what `split` returned.
      has_aux: as for `value_and_task_grads`.

    Returns:
      A function of `(params, batch)` that returns losses `(T,)` (or `(losses, aux)`) and gradients: for the trunk
      deferred ones, as `value_and_light_grads` has them, for the heads arrays `(1, *shape)`. For the trunk as a whole
      only: at the features there are no leaves.

    Raises:
      ValueError: if `loss_fn` is not split, or with `own_inputs`.

    Example:
      >>> import jax.numpy as jnp, optax, optax_mtl as mtl
      >>> trunk = lambda w, batch: jnp.tanh(batch["x"] @ w)
      >>> head = lambda w, features, batch: jnp.mean((features @ w - batch["y"]) ** 2)
      >>> loss_fn = mtl.split(trunk, [head, head])
      >>> params = {"trunk": jnp.ones((3, 2)), "heads": [jnp.ones(2), -jnp.ones(2)]}
      >>> batch = {"x": jnp.ones((4, 3)), "y": jnp.ones(4)}
      >>> tx = mtl.shared_and_heads(mtl.mgda(2), loss_fn.shared)
      >>> losses, task_grads = mtl.value_and_feature_grads(loss_fn)(params, batch)
      >>> updates, state = tx.update(task_grads, tx.init(params), params, losses=losses)
      >>> optax.tree.get(state, "task_weights").tolist()
      [1.0, 0.0]

    References:
      Sener and Koltun, `Multi-Task Learning as Multi-Objective Optimization <https://arxiv.org/abs/1810.04650>`_,
      NeurIPS 2018: MGDA-UB, section 3.3
    """
    if not isinstance(loss_fn, _split.Split):
        raise ValueError(
            "value_and_feature_grads must know where the heads begin: give it "
            f"optax_mtl.split(trunk, heads), found {loss_fn!r}."
        )

    def value_and_feature_grads_fn(params: Any, batch: Any) -> tuple[Any, _base.TaskGrads]:
        return _pullbacks.deferring(_FeatureLevel, loss_fn, 0, has_aux, (params, batch), {})

    return functools.wraps(loss_fn.__call__)(value_and_feature_grads_fn)


class _FeatureLevel(_pullbacks.Pullbacks):
    """Pullbacks whose Gramian is that of their cotangents."""

    def gramian(self, indices: Sequence[int], metrics: Sequence[jax.Array] | None) -> jax.Array:
        """See `Source`."""
        if metrics is not None or sorted(indices) != list(range(len(self.leaves))):
            raise ValueError(_WHOLE)
        _shards.check_none("value_and_feature_grads")
        return _gramian.task_gramian(self._cotangents)

    def leaf_gramians(
        self, indices: Sequence[int], metrics: Sequence[jax.Array] | None, layers: Sequence[int | None]
    ) -> list[jax.Array]:
        """See `Source`."""
        raise ValueError(_WHOLE)

    def combine_each(self, weights: Sequence[jax.Array], indices: Sequence[int]) -> list[jax.Array]:
        """See `Source`."""
        raise ValueError(_WHOLE)


_WHOLE = (
    "Feature-level gradients have inner products for the trunk as a whole: not for some of its leaves, for blocks of "
    "them, or in a metric on the parameters. Use optax_mtl.value_and_light_grads(loss_fn) for that."
)
