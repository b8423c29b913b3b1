"""ExcessMTL: weights that grow with each task's distance from its optimum."""

import math
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
import optax

from optax_mtl import _base, _gramian, _shards
from optax_mtl._solvers import reciprocal
from optax_mtl._task_state import multiply_shares
from optax_mtl._weighting import weighting


class ExcessMTLState(NamedTuple):
    """State of `excess_mtl`.

    Attributes:
      squares: leaves `(T, *shape)` in float32 at least, sums of each task's squared gradients.
      log_weights: `(T,)`.
      reference: `(T,)` mean of each task's excess risk over its first steps; zero as long as all were zero.
      steps: `(T,)` int32, number of these first steps so far.
    """

    squares: Any
    log_weights: jax.Array
    reference: jax.Array
    steps: jax.Array


def excess_risks(task_grads: _base.TaskGrads, squares: Any) -> jax.Array:
    r"""Estimates of how far each task's loss is from its least value.

    Args:
      task_grads: leaves `(T, *shape)`.
      squares: leaves `(T, *shape)`, sums of each task's squared gradients, the last ones included.

    Returns:
      `(T,)`: :math:`\sum g^2 / \sqrt{S}` over all coordinates, zero where no gradient ever was.
    """

    def of_leaf(grads: jax.Array, sums: jax.Array) -> jax.Array:
        risks = jnp.square(grads.astype(sums.dtype)) * reciprocal(jnp.sqrt(sums))
        return jnp.sum(risks, axis=tuple(range(1, sums.ndim)))

    return _shards.total(jax.tree.leaves(jax.tree.map(of_leaf, task_grads, squares)))


def excess_mtl(
    num_tasks: int, *, step_size: _base.Scalar = 1.0, warmup_steps: int | jax.Array = 0
) -> optax.GradientTransformationExtraArgs:
    r"""ExcessMTL: weighs the tasks by their excess risks, so that label noise that cannot be learned earns no weight.

    .. math:: S_i \leftarrow S_i + g_i^2, \qquad E_i = \sum \frac{g_i^2}{\sqrt{S_i}}, \qquad
       w_i \leftarrow T\,\frac{w_i \exp(\eta E_i / E_i(0))}{\sum_j w_j \exp(\eta E_j / E_j(0))}

    Taylor's formula at the optimum, with the Hessian that AdaGrad takes, gives :math:`E_i` as the part of a task's loss
    that training can still take away; a task with a large loss and small gradients is close to its optimum. The weights
    change as much, relative to each other, as these excess risks do, relative to their first values. Choose it where
    some of the tasks have noisy labels, which draw weight to them under methods that look at the losses.

    Needs gradients. Weights sum to `T`.

    Args:
      num_tasks: number of tasks `T`.
      step_size: of the weights, :math:`\eta`.
      warmup_steps: number of first steps of a task, over which its reference :math:`E_i(0)` is averaged while it is
        treated as if the ratio were one. With 0, the first step alone is the reference.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves `(T, *shape)` to `(*shape)`. Its state is `T` times the
      parameters in float32.

    Raises:
      ValueError: if it is given a `Gramian`.

    Example:
      >>> import jax.numpy as jnp, optax, optax_mtl as mtl
      >>> tx = mtl.excess_mtl(num_tasks=2)
      >>> state = tx.init(jnp.zeros(1))
      >>> for task_grads in ([[1.0], [1.0]], [[1.0], [0.0]]):  # the second task has converged
      ...     _, state = tx.update(jnp.array(task_grads), state)
      >>> optax.tree.get(state, "task_weights").tolist()
      [1.33952, 0.660477]

    References:
      He et al., `Robust Multi-Task Learning with Excess Risks <https://arxiv.org/abs/2402.02009>`_, ICML 2024

    Note:
      As in the authors' code and LibMTL, the weights stay equal in the first step. (TorchJD moves them by the excess
      risks themselves there, and its weights sum to one.) The authors' example has a step size of 1, which is the
      default here and in TorchJD; the default of their code and of LibMTL is 1e-2. They add 1e-7 to the sums of
      squares; here nothing is added, and a task whose first gradients are zero takes the next ones for its reference.
      The warm-up (of three epochs in the paper, according to TorchJD) is not in the authors' code. A task that was
      absent keeps its weight relative to the whole.
    """
    _base.check_number("step_size", step_size, 0)
    warmup_steps = _base.check_int("warmup_steps", warmup_steps, 0)

    def init(dtype: jnp.dtype, params: _base.Params) -> ExcessMTLState:
        squares = _base.zeros_of(params, lead=(num_tasks,))
        log_weights, steps = jnp.full(num_tasks, -math.log(num_tasks), dtype), jnp.zeros(num_tasks, jnp.int32)
        return ExcessMTLState(squares, log_weights, jnp.zeros(num_tasks, dtype), steps)

    def add_square(sums: jax.Array, grads: jax.Array) -> jax.Array:
        return jnp.minimum(sums + jnp.square(grads.astype(sums.dtype)), jnp.finfo(sums.dtype).max)

    def rule(
        gramian: jax.Array, state: ExcessMTLState, *, present: jax.Array, task_grads: _base.TaskGrads, **_: Any
    ) -> tuple[jax.Array, ExcessMTLState]:
        def add(grads: jax.Array, sums: jax.Array) -> tuple[jax.Array, jax.Array]:
            grads = _base.where_present(present, grads, jnp.zeros_like(grads))
            added = add_square(sums, grads)
            risks = excess_risks(grads, added).astype(gramian.dtype)
            # They are always finite; but as the sums wait for them, XLA need not copy the sums before it adds to them.
            return risks, _base.where_present(jnp.isfinite(risks), added, sums)

        leaves, treedef = jax.tree.flatten(task_grads)
        pairs = zip(leaves, jax.tree.leaves(state.squares), strict=True)
        of_leaves, sums = zip(*(_gramian.by_columns(add, g.shape[1:], g, s) for g, s in pairs), strict=True)
        risks, squares = _shards.total(of_leaves), treedef.unflatten(sums)

        warms_up = present & (state.steps < jnp.maximum(jnp.asarray(warmup_steps, jnp.int32), 1))
        steps = state.steps + warms_up.astype(jnp.int32)
        mean = state.reference + (risks - state.reference) / jnp.maximum(steps, 1).astype(risks.dtype)
        later = jnp.where(state.reference == 0, risks, state.reference)  # for a task whose gradients were zero so far
        reference = jnp.where(warms_up, mean, later)
        ratios = jnp.where(warms_up, 1, risks * reciprocal(reference))

        gains = jnp.asarray(step_size, ratios.dtype) * ratios
        log_weights, weights = multiply_shares(state.log_weights, gains, present)
        number = jnp.sum(present).astype(weights.dtype)
        return number * weights, ExcessMTLState(squares, log_weights, reference, steps)

    return weighting("excess_mtl", num_tasks, rule, init, needs_gramian=False, needs_gradients=True)
