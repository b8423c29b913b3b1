"""PCD: the primary gradient, bent as little as gives every other task its share."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
import optax

from optax_mtl import _base, _solvers
from optax_mtl._weighting import weighting

# Of its share. Where the constraints cannot all be met, every vector leaves some task without any of it (Farkas); where
# they can, what is missing is the solver's error, a few times the precision over the square of the angle between what
# is nearly opposite.
_MISSED = 0.5


class PCDState(NamedTuple):
    """State of `pcd`.

    Attributes:
      squares: `(T,)` running means of the squared gradient norms; for primary tasks, of the sum of their gradients.
      masses: `(T,)` how many steps these means amount to.
      residual: () the part of its share that the worst-off secondary task would not have got in the last step, beyond
        rounding; above 1/2, the constraints could not all be met and were dropped.
    """

    squares: jax.Array
    masses: jax.Array
    residual: jax.Array


def pcd_weights(
    gramian: jax.Array,
    sizes: jax.Array,
    primary: jax.Array,
    *,
    tau: jax.typing.ArrayLike = 0.02,
    present: jax.Array | None = None,
) -> jax.Array:
    """Weights of the vector nearest to the primary gradient that gives every other task its share. See `pcd`.

    Args:
      gramian: `(T, T)`.
      sizes: `(T,)` what the gradients are divided by first; for the primary tasks, all the same.
      primary: `(T,)` of bool; the gradients of the primary tasks are summed.
      tau: the share, a scalar or `(T,)`.
      present: `(T,)` of bool, the tasks that take part; all if None.

    Returns:
      `(T,)`, non-negative; all zero without a primary gradient.
    """
    present = jnp.ones(gramian.shape[0], bool) if present is None else present
    return _solve(gramian, sizes, primary & present, tau, present & ~primary)[0]


@_solvers.full_precision
def _solve(
    gramian: jax.Array, sizes: jax.Array, primary: jax.Array, tau: jax.typing.ArrayLike, secondary: jax.Array
) -> _solvers.Solution:
    # In terms of unit gradients u: the primary one is sum_i main_i u_i, and the constraints are <u_j, d> >= share_j.
    unit, norms = _solvers.cosines(gramian)
    lengths = norms * _solvers.reciprocal(sizes)
    main = jnp.where(primary, lengths, 0)
    share = jnp.where(secondary, jnp.asarray(tau, unit.dtype) * lengths, 0)
    multipliers, _ = _solvers.nonnegative_quadratic(unit, share - unit @ main, secondary)
    direction = main + multipliers

    missing = jnp.where(secondary, share - unit @ direction, 0)
    rounding = 16 * jnp.finfo(unit.dtype).eps * jnp.sum(main + share)
    residual = jnp.max(jnp.maximum(missing - rounding, 0) * _solvers.reciprocal(share + rounding))
    # Zero is the answer where no share is asked for; where one is, it is what multipliers without a solution cancel to.
    failed = (residual > _MISSED) | (_solvers.norm_of(direction, unit) == 0)
    direction = jnp.where(failed & jnp.any(share > 0), main, direction)

    size = jnp.max(sizes, where=primary, initial=0)
    stretch = size * _solvers.norm_of(main, unit) * _solvers.reciprocal(_solvers.norm_of(direction, unit))
    return stretch * direction * _solvers.reciprocal(norms), residual


def pcd(
    num_tasks: int,
    *,
    primary: int | Sequence[int] = 0,
    tau: jax.typing.ArrayLike = 0.02,
    beta: _base.Scalar = 0.999,
) -> optax.GradientTransformationExtraArgs:
    r"""Priority-constrained descent: follows the primary task, and makes some progress on each of the others.

    .. math:: \tilde d = \arg\min_d \tfrac12\lVert d - \tilde g_p\rVert^2 \quad\text{s.t.}\quad
       \langle\tilde g_j, d\rangle \ge \tau\,\lVert\tilde g_j\rVert^2 \;\text{ for all } j \ne p, \qquad
       d = \frac{\lVert g_p\rVert}{\lVert\tilde d\rVert}\,\tilde d

    where :math:`\tilde g_i` is the gradient over the running root mean square of its norm. Each secondary task gets at
    least the share :math:`\tau` of the first-order progress that a step along its own gradient would bring. The
    solution is :math:`\tilde g_p + \sum_j \mu_j \tilde g_j` with multipliers :math:`\mu \ge 0`, a quadratic programme
    of size `T - 1`. Choose it where one loss is the point and the others (sparsity, say) are wishes without a natural
    weight: losses need none, as multiplying one by a constant changes nothing. For the sake of a secondary task that
    opposes it, the primary one may lose.

    Needs the Gramian only. The update has the primary gradient's norm. Without any primary task in a batch, or with a
    primary gradient of zero, the update is zero; without any, nothing is remembered either. Constraints that cannot be
    met together (opposite secondary gradients, say) are dropped for the step: it follows the primary gradient alone.

    Args:
      num_tasks: number of tasks `T`.
      primary: index of the primary task, or a tuple of several, whose gradients are summed.
      tau: the share, from 0 to 1, for all secondary tasks or `(T,)` (a primary task's is not used).
      beta: decay of the running means.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves `(T, *shape)` to `(*shape)`. Its state keeps as `residual`
      the part of its share that the worst-off secondary task misses.

    Example:
      >>> import jax.numpy as jnp, optax_mtl as mtl
      >>> tx = mtl.pcd(num_tasks=2, tau=0.6)
      >>> tx.update(jnp.array([[10.0, 0.0], [0.0, 0.1]]), tx.init(jnp.zeros(2)))[0].tolist()
      [8.575, 5.145]

    References:
      Varam and AlHajri, `Not All Objectives Are Born Equal: Priority-Constrained Descent for Hierarchical
      Multi-Objective Optimization <https://arxiv.org/abs/2606.29521>`_, TMLR 2026

    Note:
      The paper and TorchJD add 1e-8 to the running means; here nothing is, so that gradients of any size give the same.
      The authors enumerate all sets of active constraints, TorchJD uses a dual active-set method on the host: all find
      the one solution. Constraints count as incompatible where the multipliers leave a task without half of its own
      share, beyond rounding, or cancel the primary gradient, which in float32 includes nearly opposite gradients. A
      share that rounding cannot tell from zero (6e-6 of the primary gradient) is met where the task does not lose.
    """
    is_primary = _base.primary_tasks(primary, num_tasks)
    if jnp.ndim(tau) > 0:
        _base.check_task_vector("tau", tau, num_tasks)
    _base.check_number("tau", tau, 0, 1)
    _base.check_number("beta", beta, 0, 1)

    def init(dtype: jnp.dtype, params: _base.Params) -> PCDState:
        zeros = jnp.zeros(num_tasks, dtype)
        return PCDState(zeros, zeros, jnp.zeros((), dtype))

    def rule(gramian: jax.Array, state: PCDState, *, present: jax.Array, **_: Any) -> tuple[jax.Array, PCDState]:
        here = is_primary & present
        main = here.astype(gramian.dtype)
        squares = jnp.where(is_primary, jnp.maximum(main @ gramian @ main, 0), jnp.diagonal(gramian))

        # The bias-corrected running mean, as a mean over `masses` steps.
        masses = jnp.asarray(beta, gramian.dtype) * state.masses.astype(gramian.dtype) + 1
        before = state.squares.astype(gramian.dtype)
        means = before + (squares - before) / masses
        learns = present & jnp.any(here)
        means, masses = _base.where_present(learns, (means, masses), (state.squares, state.masses))

        of_primary = jnp.sum(means * _base.equal_weights(here, means.dtype))
        sizes = jnp.sqrt(jnp.where(is_primary, of_primary, means))
        weights, residual = _solve(gramian, sizes, here, tau, present & ~is_primary)
        return weights, PCDState(means, masses, residual)

    return weighting("pcd", num_tasks, rule, init)
