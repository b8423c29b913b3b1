"""Bloop: the auxiliary gradient off the running mean of the primary one."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
import optax

from optax_mtl import _base, _gramian, _solvers
from optax_mtl._weighting import weighting


class BloopState(NamedTuple):
    """State of `bloop`.

    Attributes:
      mean: the running mean of the primary gradient, shaped like the parameters, in float32 at least.
      seen: () bool, whether there has been a primary gradient.
      removed: () the multiple of the mean, as it was before, that was taken out of the last update.
    """

    mean: Any
    seen: jax.Array
    removed: jax.Array


def bloop(
    num_tasks: int, *, primary: int | Sequence[int] = 0, weight: _base.Scalar = 0.1, rho: _base.Scalar = 0.1
) -> optax.GradientTransformationExtraArgs:
    r"""Bloop: auxiliary tasks move only across the direction that the primary task has lately been going.

    .. math:: d = g_p + \lambda\Bigl(g_a - \frac{\langle g_a, E\rangle}{\lVert E\rVert^2}\, E\Bigr), \qquad
       E \leftarrow (1-\rho)\,E + \rho\, g_p \;\text{ after the step}

    with the sum `g_a` of the auxiliary gradients. The auxiliary loss is minimised among the minimisers of the primary
    one: to first order it leaves the primary loss alone, for better (unlike a weighted sum) and for worse (help along
    `E` is taken out with the harm). The running mean matters: projected on the noisy gradient of one batch, the method
    comes close to the weighted sum. Choose it where the auxiliary losses are further wishes, regularisers say, rather
    than helpers.

    Needs gradients, and keeps one more copy of the parameters. Without any primary task in a batch the update is zero,
    and the mean stays as it is.

    Args:
      num_tasks: number of tasks `T`.
      primary: index of the primary task, or a tuple of several, whose gradients are summed.
      weight: :math:`\lambda`, of the auxiliary gradients.
      rho: of the new gradient in the running mean; larger than the learning rate.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves `(T, *shape)` to `(*shape)`. The update is the sum of the
      gradients by `task_weights`, less `removed` times the running mean.

    Raises:
      ValueError: if it is given a `Gramian`.

    Example:
      >>> import jax.numpy as jnp, optax_mtl as mtl
      >>> tx = mtl.bloop(num_tasks=2, weight=0.5)
      >>> tx.update(jnp.array([[1.0, 0.0], [-4.0, 2.0]]), tx.init(jnp.zeros(2)))[0].tolist()
      [1.0, 1.0]

    References:
      Hsieh et al., `Careful with that Scalpel: Improving Gradient Surgery with an EMA
      <https://arxiv.org/abs/2402.02998>`_, ICML 2024

    Note:
      The authors' code takes the new gradient into the mean before it projects, and adds 1e-7 to its squared norm;
      here, as in the paper, the projection comes first, and nothing is added. Both start from the first gradient. The
      defaults are that code's (the paper varies the weight to draw its Pareto fronts). The mean and the
      difference are taken in float32 at least, whatever the gradients' dtype.
    """
    is_primary = _base.primary_tasks(primary, num_tasks)
    _base.check_number("weight", weight, 0)
    _base.check_number("rho", rho, 0, 1)

    def init(dtype: jnp.dtype, params: _base.Params) -> BloopState:
        return BloopState(_base.zeros_of(params), jnp.zeros((), bool), jnp.zeros((), dtype))

    def rule(
        gramian: jax.Array, state: BloopState, *, present: jax.Array, task_grads: _base.TaskGrads, **_: Any
    ) -> tuple[jax.Array, BloopState]:
        here = is_primary & present
        main = _gramian.combine(here.astype(gramian.dtype), _widened(task_grads))
        mean = jax.tree.map(lambda e, g: jnp.where(state.seen, e, g.astype(e.dtype)), state.mean, main)

        strength = jnp.asarray(weight, gramian.dtype)
        products = jnp.where(present & ~is_primary, _gramian.task_products(task_grads, mean), 0)
        square = _gramian.task_squared_norms(jax.tree.map(lambda e: e[None], mean))[0]
        removed = strength * jnp.sum(products) * _solvers.reciprocal(square.astype(gramian.dtype))
        # In the first step the mean is the primary gradient itself, and what is taken out comes off its weight.
        weights = jnp.where(is_primary, 1 - jnp.where(state.seen, 0, removed), strength)

        known = jnp.any(here)

        def follow(mean: jax.Array, main: jax.Array, before: jax.Array) -> jax.Array:
            return jnp.where(known, mean + jnp.asarray(rho, mean.dtype) * (main.astype(mean.dtype) - mean), before)

        followed = jax.tree.map(follow, mean, main, state.mean)
        return jnp.where(known, weights, 0), BloopState(followed, state.seen | known, jnp.where(known, removed, 0))

    weighted = weighting("bloop", num_tasks, rule, init, needs_gramian=False, needs_gradients=True)

    def update_fn(
        updates: _base.TaskGrads, state: Any, params: _base.Params | None = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        after: Any
        rounded, after = weighted.update(updates, state, params, **extra_args)
        mixed = _gramian.combine(after.task_weights, _widened(updates))  # anew: the two parts may nearly cancel

        def take_out(update: jax.Array, mean: jax.Array, like: jax.Array) -> jax.Array:
            without = update - after.method.removed.astype(update.dtype) * mean.astype(update.dtype)
            return _gramian.narrowed(without, like.dtype)

        return jax.tree.map(take_out, mixed, state.method.mean, rounded), after

    return optax.GradientTransformationExtraArgs(weighted.init, update_fn)


def _widened(task_grads: _base.TaskGrads) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(_base.accumulator_dtype(leaf)), task_grads)
