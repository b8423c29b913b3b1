"""CDTT: central direction with task tensioners."""

from typing import Any, NamedTuple

import jax
from jax import lax, numpy as jnp
import optax

from optax_mtl import _base, _solvers
from optax_mtl._weighting import weighting


class CDTTState(NamedTuple):
    """State of `cdtt`.

    Attributes:
      norms: `(T, window)` ring buffer of each task's last gradient norms.
      last_sum: `(T,)` sum of the window one step ago.
      steps: `(T,)` int32, steps in which the task took part.
      residual: () by how much the central direction fails its optimality conditions, relative.
    """

    norms: jax.Array
    last_sum: jax.Array
    steps: jax.Array
    residual: jax.Array


def cdtt_tension(norm_ratio: jax.Array, losses: jax.Array, alpha: _base.Scalar = 0.3) -> jax.Array:
    r"""How hard each task pulls.

    Args:
      norm_ratio: `(T,)`, mean gradient norm over the window, over what it was one step ago.
      losses: `(T,)`, positive.
      alpha: sensitivity; 0 gives every task tension one.

    Returns:
      `(T,)`: :math:`\max(0,\, 1 - \alpha + \alpha / (1 + e^{-e(\rho-1)}))` with :math:`\rho` the ratio plus
      :math:`\log_{10} L`.
    """
    losses = jnp.maximum(losses, jnp.finfo(losses.dtype).tiny)
    pull = jax.nn.sigmoid(jnp.e * (norm_ratio + jnp.log10(losses) - 1))
    alpha = jnp.asarray(alpha, losses.dtype)
    return jnp.maximum(1 - alpha + alpha * pull, 0)


@_solvers.full_precision
def cdtt_weights(gramian: jax.Array, central: jax.Array, tension: jax.Array, *, passes: int = 1) -> jax.Array:
    """Coefficients of the central direction, pulled towards the tasks and then corrected.

    Args:
      gramian: `(T, T)`.
      central: `(T,)` weights of the central direction, summing to one.
      tension: `(T,)`, lengths of the pulls.
      passes: how often all the tasks are gone through, in order, to undo conflicts.

    Returns:
      `(T,)`, summing to one; single weights may be negative.
    """
    num_tasks = gramian.shape[0]
    squares = jnp.diagonal(gramian)
    products = gramian @ central
    # Distances of the gradients from the central direction; within rounding there is no direction to pull in.
    distance2 = squares - 2 * products + central @ products
    far = distance2 > 4 * jnp.finfo(gramian.dtype).eps * (squares + central @ products)
    pull = jnp.where(far, tension * lax.rsqrt(jnp.where(far, distance2, 1)), 0)
    start = central * (1 - jnp.sum(pull)) + pull

    def correct(step: jax.Array, weights: jax.Array) -> jax.Array:
        """Moves to where the segment from the update to a gradient that it conflicts with meets its hyperplane."""
        task = step % num_tasks
        product = gramian[task] @ weights
        keep = jnp.where(product < 0, squares[task] / (squares[task] - jnp.minimum(product, 0)), 1)
        return (keep * weights).at[task].add(1 - keep)

    return lax.fori_loop(0, passes * num_tasks, correct, start)


def cdtt(
    num_tasks: int, *, alpha: _base.Scalar = 0.3, window: int = 10, tension: str = "absolute", passes: int = 1
) -> optax.GradientTransformationExtraArgs:
    r"""Central direction with task tensioners: the bisector, biased to tasks that have stopped improving.

    From the central direction `d` (`edm`), every task pulls towards its own gradient,

    .. math:: v = d + \sum_t \tau_t \frac{g_t - d}{\lVert g_t - d\rVert}, \qquad
       \tau_t = \max\Bigl(0,\, 1 - \alpha + \frac{\alpha}{1 + e^{-e(\rho_t - 1)}}\Bigr), \quad
       \rho_t = \frac{\bar n_t(k)}{\bar n_t(k-1)} + \log_{10} L_t

    with :math:`\bar n_t` the mean gradient norm over a window; then each task that conflicts with `v`, in order, moves
    it to where the segment from `v` to :math:`g_t` is orthogonal to :math:`g_t`. Until the window is full, it is the
    central direction. On its authors' logic gates it learns in half the epochs of `edm` where both learn, and in fewer
    of the seeds (`optax-mtl experiment cdtt`).

    Everything is computed on coefficients, from the Gramian; they sum to one, and single ones may be negative.

    Needs the Gramian and `losses`, which must be positive (a zero counts as the smallest number; a negative loss is
    refused where its value is known, outside jit, and counts as a zero inside).

    Args:
      num_tasks: number of tasks `T`.
      alpha: sensitivity of the tension, in [0, 1].
      window: steps over which gradient norms are averaged.
      tension: `"absolute"`: as published, pulls have length :math:`\tau_t` whatever the gradients' size, so that the
        update depends on the losses' units and does not vanish with the gradients; `"relative"`: they are multiplied by
        the norm of `d` (ours).
      passes: how often the tasks are gone through to undo conflicts. One pass, as published, leaves no conflict for two
        tasks, but may for three and more.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves `(T, *shape)` to `(*shape)`.

    Raises:
      ValueError: if `losses` is missing, or negative and known.

    Example:
      >>> import jax.numpy as jnp, optax_mtl as mtl
      >>> tx = mtl.cdtt(num_tasks=2, window=1)
      >>> state = tx.init(jnp.zeros(2))
      >>> for _ in range(2):  # the first task's loss is a hundred times the second's
      ...     updates, state = tx.update(jnp.array([[2.0, 0.0], [0.0, 2.0]]), state, losses=jnp.array([10.0, 0.1]))
      >>> updates.tolist()
      [1.186, 0.814]

    References:
      Nakamura et al., `Leveraging convergence behavior to balance conflicting tasks in multi-task learning
      <https://arxiv.org/abs/2204.06698>`_, Neurocomputing 511, 2022

    Note:
      Follows the authors' code step by step (which compares sums over the window, and gives `alpha` 0.3), in exact
      arithmetic: its Frank-Wolfe stops at weights of 0.999 and 0.001. A task that equals the central direction does not
      pull (their code divides zero by zero), nor does one that is nearer to it than a Gramian in float32 can tell,
      about 1e-3 of its norm; and a task whose gradient is zero is left out. The order of the tasks
      matters for three and more.
    """
    _base.check_number("alpha", alpha, 0, 1)
    window = _base.check_static_int("window", window, 1)
    passes = _base.check_int("passes", passes, 0)
    _base.check_choice("tension", tension, ("absolute", "relative"))

    def init(dtype: jnp.dtype, params: _base.Params) -> CDTTState:
        return CDTTState(
            norms=jnp.zeros((num_tasks, window), dtype),
            last_sum=jnp.zeros(num_tasks, dtype),
            steps=jnp.zeros(num_tasks, jnp.int32),
            residual=jnp.zeros((), dtype),
        )

    def rule(
        gramian: jax.Array, state: CDTTState, *, losses: jax.Array, present: jax.Array, **_: Any
    ) -> tuple[jax.Array, CDTTState]:
        norms = jnp.sqrt(jnp.diagonal(gramian))
        tasks = jnp.arange(num_tasks)
        buffer = state.norms.at[tasks, state.steps % window].set(norms.astype(state.norms.dtype))
        steps = state.steps + 1
        window_sum, last_sum = jnp.sum(buffer, axis=1), state.last_sum
        ratio = jnp.where(last_sum > 0, window_sum / jnp.where(last_sum > 0, last_sum, 1), 1).astype(gramian.dtype)

        central, residual = _solvers.central_weights(gramian, present)
        pulls = present & (norms > 0) & (steps > window)  # the window is full, and was full one step ago
        length = jnp.where(pulls, cdtt_tension(ratio, losses, alpha), 0)
        if tension == "relative":
            length = length * jnp.sqrt(jnp.maximum(central @ gramian @ central, 0))
        weights = cdtt_weights(gramian, central, length, passes=passes)
        kept = _base.where_present(present, (buffer, window_sum, steps), state[:3])
        return weights, CDTTState(*kept, residual)

    return weighting("cdtt", num_tasks, rule, init, needs_losses=True, positive_losses=True)
