"""PCGrad: project conflicting gradients, carried out on coefficients."""

from typing import Any, NamedTuple

import jax
from jax import lax, numpy as jnp
import optax

from optax_mtl import _base
from optax_mtl._solvers import reciprocal
from optax_mtl._weighting import weighting


class PCGradState(NamedTuple):
    """State of `pcgrad`.

    Attributes:
      key: the random key of the next step; None if the order is fixed.
    """

    key: jax.Array | None


def pcgrad_weights(gramian: jax.Array, orders: jax.Array) -> jax.Array:
    """Sum of the coefficients of all projected gradients.

    Row `i` of `coefficients` holds task `i`'s gradient, as it is projected, in terms of the original ones; its inner
    products with these are row `i` of `coefficients @ gramian`, so that no gradient is ever touched.

    Args:
      gramian: `(T, T)`; tasks with zero rows are passed over.
      orders: `(T, T)` of int; row `i` is the order in which task `i` visits the tasks (itself it skips).

    Returns:
      `(T,)`.
    """
    num_tasks = gramian.shape[0]
    tasks = jnp.arange(num_tasks, dtype=orders.dtype)
    inverse = reciprocal(jnp.diagonal(gramian))

    def visit(carry: tuple[jax.Array, jax.Array], others: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        coefficients, products = carry
        product = products[tasks, others]
        share = jnp.where((others != tasks) & (product < 0), -product * inverse[others], 0)
        return (
            coefficients.at[tasks, others].add(share),
            products + share[:, None] * gramian[others],
        ), None

    start = jnp.eye(num_tasks, dtype=gramian.dtype), gramian
    (coefficients, _), _ = lax.scan(visit, start, orders.T, unroll=min(num_tasks, 8))
    return jnp.sum(coefficients, axis=0)


def pcgrad(
    num_tasks: int, key: jax.Array | int | None = None, *, reduction: str = "sum", order: str = "per_task"
) -> optax.GradientTransformationExtraArgs:
    r"""PCGrad: each task's gradient loses what conflicts with the others, one after another in random order.

    .. math:: g_i \leftarrow g_i - \frac{\min(0, \langle g_i, g_j\rangle)}{\lVert g_j\rVert^2}\, g_j
       \quad\text{for } j \ne i \text{ in random order;} \qquad d = \sum_i g_i

    Where no two tasks conflict it is the sum of the gradients. Choose it as a mild and popular correction: for two
    tasks the update conflicts with neither; for three and more there is no such guarantee.

    Needs the Gramian only: `T` rounds on `(T, T)` coefficients, and no projected gradient in memory.

    Args:
      num_tasks: number of tasks `T`.
      key: random key, or a seed; not needed for two tasks or a fixed order.
      reduction: `"sum"`, or `"mean"` over the tasks present.
      order: `"per_task"`: an independent random order for each task; `"shared"`: one for all; `"fixed"`: `0, 1, ...`.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves `(T, *shape)` to `(*shape)`.

    Raises:
      ValueError: if a random order is asked for without a key.

    Example:
      >>> import jax.numpy as jnp, optax_mtl as mtl
      >>> tx = mtl.pcgrad(num_tasks=2)
      >>> tx.update(jnp.array([[1.0, 0.0], [-1.0, 1.0]]), tx.init(jnp.zeros(2)))[0]
      Array([0.5, 1.5], dtype=float32)

    References:
      Yu et al., `Gradient Surgery for Multi-Task Learning <https://arxiv.org/abs/2001.06782>`_, NeurIPS 2020

    Note:
      As in the paper, a task is not projected against itself; the authors' TensorFlow code, LibMTL and others let it
      happen after earlier projections. Some implementations draw one shared
      order, or take the mean: see `order` and `reduction`. No epsilon is added to the squared norms.
    """
    _base.check_choice("reduction", reduction, ("sum", "mean"))
    _base.check_choice("order", order, ("per_task", "shared", "fixed"))
    is_random = order != "fixed" and _base.check_num_tasks(num_tasks) > 2
    first_key = _base.as_key("pcgrad", key) if is_random else None

    def rule(gramian: jax.Array, state: PCGradState, *, present: jax.Array, **_: Any) -> tuple[jax.Array, PCGradState]:
        orders, next_key = _base.draw_orders(order, state.key, num_tasks)
        weights = pcgrad_weights(gramian, orders)
        if reduction == "mean":
            weights = weights * _base.equal_weights(present, weights.dtype)
        return weights, PCGradState(next_key)

    return weighting("pcgrad", num_tasks, rule, lambda dtype, params: PCGradState(first_key))
