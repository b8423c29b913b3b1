"""DTP: dynamic task prioritisation."""

from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
import optax

from optax_mtl import _base
from optax_mtl._weighting import weighting

_LEAST = 1e-6  # a KPI below counts as this


class DTPState(NamedTuple):
    """State of `dtp`.

    Attributes:
      kpis: `(T,)` moving averages of the tasks' KPIs.
      seen: `(T,)` of bool, whether there was one.
    """

    kpis: jax.Array
    seen: jax.Array


def dtp_weights(kpis: jax.Array, gamma: _base.Scalar = 1.0) -> jax.Array:
    r"""The focal loss of the KPIs.

    Args:
      kpis: `(T,)`, each in (0, 1]; those outside are clipped.
      gamma: the focusing parameter, a scalar or `(T,)`.

    Returns:
      `(T,)`: :math:`-(1 - \kappa_i)^{\gamma_i} \log \kappa_i`.
    """
    kpis = jnp.clip(kpis, _LEAST, 1)
    return (1 - kpis) ** jnp.asarray(gamma, kpis.dtype) * -jnp.log(kpis)


def dtp(
    num_tasks: int, *, gamma: _base.Scalar = 1.0, alpha: _base.Scalar = 0.1
) -> optax.GradientTransformationExtraArgs:
    r"""Dynamic task prioritisation: the worse a task performs, the larger its weight.

    Performance is told by a key performance indicator (KPI) in (0, 1) for each task, an accuracy, say: one is perfect.

    .. math:: w_i = -(1 - \bar\kappa_i)^{\gamma_i} \log \bar\kappa_i, \qquad
       \bar\kappa_i \leftarrow \alpha\,\kappa_i + (1 - \alpha)\,\bar\kappa_i

    which is the focal loss with the KPI in the place of a probability. Difficult tasks come first, and a task that is
    mastered gets no weight. Choose it when what counts is a metric of common scale, and the losses are not comparable.

    Needs `kpis`, `(T,)`, at every update: `tx.update(task_grads, opt_state, params, kpis=kpis)`. Give that of the
    batch, or repeat the last evaluation's. The weights sum to nothing in particular: all tasks' fall as they improve.

    Args:
      num_tasks: number of tasks `T`.
      gamma: how fast a task loses weight as it improves, a scalar or `(T,)`; zero for the logarithm alone.
      alpha: weight of the newest KPI in the moving average, which starts at the first; one for no average.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves `(T, *shape)` to `(*shape)`.

    Raises:
      ValueError: if `kpis` is missing, or holds one outside [0, 1].

    Example:
      >>> import jax.numpy as jnp, optax, optax_mtl as mtl
      >>> tx = mtl.dtp(num_tasks=2)
      >>> _, state = tx.update(jnp.ones((2, 3)), tx.init(jnp.zeros(3)), kpis=jnp.array([0.9, 0.5]))
      >>> optax.tree.get(state, "task_weights").tolist()
      [0.0105, 0.3466]

    References:
      Guo et al., `Dynamic Task Prioritization for Multitask Learning
      <https://doi.org/10.1007/978-3-030-01270-0_17>`_, ECCV 2018

    Note:
      The formula was checked against surveys only: we know of no code by the authors, and neither LibMTL nor TorchJD
      has the method. Both defaults are ours. The paper also weights the examples within a task, which is a matter of
      the loss function, not of this transformation. Inside jit, a KPI outside the interval is clipped to it. One below
      1e-6 counts as 1e-6 (weight 13.8). One that is not finite leaves the average as it is; before the first, it is
      0.5.
    """
    _base.check_number("alpha", alpha, 0, 1)
    if jnp.ndim(gamma):
        _base.check_task_vector("gamma", gamma, _base.check_num_tasks(num_tasks))
    _base.check_number("gamma", gamma, 0)

    def init(dtype: jnp.dtype, params: _base.Params) -> DTPState:
        return DTPState(jnp.full(num_tasks, 0.5, dtype), jnp.zeros(num_tasks, bool))

    def rule(
        gramian: jax.Array, state: DTPState, *, present: jax.Array, kpis: Any = None, **_: Any
    ) -> tuple[jax.Array, DTPState]:
        _base.check_kpis(kpis, num_tasks, "dtp", present)
        latest = jnp.asarray(kpis, gramian.dtype)
        told = present & jnp.isfinite(latest)
        latest = jnp.clip(latest, _LEAST, 1)
        rate = jnp.where(state.seen, jnp.asarray(alpha, gramian.dtype), 1)
        average = state.kpis.astype(gramian.dtype)
        average = jnp.where(told, rate * latest + (1 - rate) * average, average)
        return dtp_weights(average, gamma), DTPState(average, state.seen | told)

    return weighting("dtp", num_tasks, rule, init, needs_norms=False)
