"""OL-AUX: weights of auxiliary tasks, learned online by how much they helped the primary one."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
import optax

from optax_mtl import _base
from optax_mtl._task_state import init_learned_scalars, learn_scalars, LearnedScalars
from optax_mtl._weighting import weighting

# Gradients of any size leave the weights and their optimiser finite: no weight goes beyond the first bound, and no sum
# of products beyond the second, whose square float32 still holds and from which any step ends at the first.
_LARGEST_WEIGHT, _LARGEST_SUM = 1e6, 1e15


class OLAuxState(NamedTuple):
    """State of `ol_aux`.

    Attributes:
      weights: `(T,)` and their optimiser's state; the primary tasks' stay at their first value and are not used.
      products: `(T,)` sum of each task's inner products with the primary gradient since its weight last changed.
      steps: `(T,)` int32, how many these are.
    """

    weights: LearnedScalars
    products: jax.Array
    steps: jax.Array


def ol_aux(
    num_tasks: int,
    *,
    primary: int | Sequence[int] = 0,
    every: int = 5,
    optimizer: optax.GradientTransformation | None = None,
    init: _base.Scalar = 1.0,
    nonnegative: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""OL-AUX: raises the weight of an auxiliary task whose gradient points along the primary's, lowers it otherwise.

    .. math:: d = g_p + \sum_{i\ne p} w_i\, g_i, \qquad
       w_i \leftarrow w_i + \beta \sum_{\tau = t-N+1}^{t} \langle g_p^\tau, g_i^\tau\rangle
       \quad\text{every } N \text{ steps}

    To first order the sum is what task `i` took from the primary loss in these `N` steps, by unit of its weight and of
    the learning rate: gradient descent on the primary loss, with respect to the weights. Choose it where the use of a
    helper shows over several batches rather than in one (`grad_cosine` judges every batch on its own).

    Needs the Gramian. The primary tasks weigh one. Without any primary task in a batch the update is zero, and nothing
    is learned; a task that is absent keeps its weight and its count.

    Args:
      num_tasks: number of tasks `T`.
      primary: index of the primary task, or a tuple of several, whose gradients are summed.
      every: `N`, steps between changes of the weights.
      optimizer: of the weights, given minus the sum above as gradient; `optax.sgd(5e-3)` if None. The steps grow with
        the square of the gradients: choose the rate for yours, or `optax.adam(1e-2)`, to which it is all one.
      init: first value of the weights.
      nonnegative: whether weights end at zero or may go below.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves `(T, *shape)` to `(*shape)`.

    Example:
      >>> import jax.numpy as jnp, optax, optax_mtl as mtl
      >>> tx = mtl.ol_aux(num_tasks=3, every=1, optimizer=optax.sgd(0.1))
      >>> task_grads = jnp.array([[1.0, 0.0], [2.0, 1.0], [-3.0, 1.0]])  # a helper and an enemy of the first task
      >>> state = tx.init(jnp.zeros(2))
      >>> for _ in range(2):
      ...     updates, state = tx.update(task_grads, state)
      >>> optax.tree.get(state, "task_weights").tolist()
      [1.0, 1.2, 0.7]

      The default rate is the authors', for gradients of the size of theirs, and fits no other scale; Adam fits any:

      >>> tx = mtl.ol_aux(num_tasks=3, every=1, optimizer=optax.adam(1e-2))
      >>> state = tx.init(jnp.zeros(2))
      >>> for _ in range(2):
      ...     updates, state = tx.update(1e-3 * task_grads, state)
      >>> optax.tree.get(state, "task_weights").tolist()
      [1.0, 1.01, 0.99]

    References:
      Lin et al., `Adaptive Auxiliary Task Weighting for Reinforcement Learning
      <https://papers.nips.cc/paper/8724-adaptive-auxiliary-task-weighting-for-reinforcement-learning>`_, NeurIPS 2019

    Note:
      The network's learning rate and the weights' appear as a product only: here it is the one rate of `optimizer`.
      Five steps, a first weight of 1, weights that are not negative, and the rate 5e-3 (a learning rate of 1e-3, times
      5) are those of the code that the authors published, a re-implementation whose hyper-parameters, they say, may
      differ from the paper's. That code takes the logarithm of the losses, and averages the gradients over 4 steps
      before it multiplies them; here both are taken as they come. No weight goes beyond 1e6 in size.
    """
    is_primary = _base.primary_tasks(primary, num_tasks)
    _base.check_int("every", every, 1)
    inner = optax.sgd(5e-3) if optimizer is None else optimizer

    def init_fn(dtype: jnp.dtype, params: _base.Params) -> OLAuxState:
        weights = jnp.full(num_tasks, init, dtype)
        return OLAuxState(
            init_learned_scalars(inner, weights), jnp.zeros_like(weights), jnp.zeros(num_tasks, jnp.int32)
        )

    def rule(gramian: jax.Array, state: OLAuxState, *, present: jax.Array, **_: Any) -> tuple[jax.Array, OLAuxState]:
        here = is_primary & present
        anyone = jnp.any(here)
        weights = jnp.where(is_primary, 1, state.weights.value.astype(gramian.dtype))

        counts = present & ~is_primary & anyone
        products = jnp.where(counts, gramian @ here.astype(gramian.dtype), 0)
        products = jnp.clip(state.products.astype(gramian.dtype) + products, -_LARGEST_SUM, _LARGEST_SUM)
        steps = state.steps + counts.astype(jnp.int32)
        due = counts & (steps >= every)
        learned = learn_scalars(inner, state.weights, -products, due)
        value = jnp.clip(learned.value, 0 if nonnegative else -_LARGEST_WEIGHT, _LARGEST_WEIGHT)
        learned = learned._replace(value=value)
        return jnp.where(anyone, weights, 0), OLAuxState(learned, jnp.where(due, 0, products), jnp.where(due, 0, steps))

    return weighting("ol_aux", num_tasks, rule, init_fn)
