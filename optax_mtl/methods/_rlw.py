"""RLW: random loss weighting."""

from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
import optax

from optax_mtl import _base
from optax_mtl._weighting import weighting


class RLWState(NamedTuple):
    """State of `rlw`.

    Attributes:
      key: the random key of the next step.
    """

    key: jax.Array


def rlw_weights(draws: jax.Array, *, distribution: str = "normal", present: jax.Array | None = None) -> jax.Array:
    """Random weights on the simplex.

    Args:
      draws: `(T,)` independent draws, standard normal for `"normal"`, standard exponential for `"dirichlet"`.
      distribution: `"normal"`: the softmax of the draws; `"dirichlet"`: the draws over their sum, uniform on the
        simplex.
      present: `(T,)` of bool, the tasks that take part; all if None.

    Returns:
      `(T,)`, summing to one.
    """
    _base.check_choice("distribution", distribution, ("normal", "dirichlet"))
    present = jnp.ones(draws.shape, bool) if present is None else present
    if distribution == "normal":
        return _base.masked_softmax(draws, present)
    shares = jnp.where(present, draws, 0)
    return shares / jnp.maximum(jnp.sum(shares), jnp.finfo(shares.dtype).tiny)


def rlw(
    num_tasks: int, key: jax.Array | int, *, distribution: str = "normal", total: _base.Scalar = 1.0
) -> optax.GradientTransformationExtraArgs:
    r"""Random loss weighting: fresh random weights at every step.

    A baseline that costs nothing and escapes some local minima of equal weighting: any method worth its price should
    beat it. In expectation it is equal weighting.

    .. math:: w = \text{total} \cdot \mathrm{softmax}(z), \quad z \sim \mathcal N(0, I_T)

    Args:
      num_tasks: number of tasks `T`.
      key: random key, or a seed.
      distribution: `"normal"`, or `"dirichlet"` for weights uniform on the simplex.
      total: what the weights sum to.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves `(T, *shape)` to `(*shape)`.

    Example:
      >>> import jax.numpy as jnp, optax, optax_mtl as mtl
      >>> tx = mtl.rlw(num_tasks=3, key=0)
      >>> _, state = tx.update(jnp.ones((3, 2)), tx.init(jnp.zeros(2)))
      >>> optax.tree.get(state, "task_weights").sum().tolist()
      1.

    References:
      Lin et al., `Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task Learning
      <https://arxiv.org/abs/2111.10603>`_, TMLR 2022

    Note:
      The weights sum to one, as in the paper, LibMTL and TorchJD, where a sum of losses has weights that sum to `T`:
      set `total=num_tasks` to compare at equal scale.
    """
    _base.check_choice("distribution", distribution, ("normal", "dirichlet"))
    _base.check_number("total", total, 0)
    first_key = _base.as_key("rlw", key)
    sample = jax.random.normal if distribution == "normal" else jax.random.exponential

    def rule(gramian: jax.Array, state: RLWState, *, present: jax.Array, **_: Any) -> tuple[jax.Array, RLWState]:
        key, now = jax.random.split(state.key)
        draws = sample(now, (num_tasks,), gramian.dtype)
        weights = rlw_weights(draws, distribution=distribution, present=present)
        return jnp.asarray(total, gramian.dtype) * weights, RLWState(key)

    return weighting("rlw", num_tasks, rule, lambda dtype, params: RLWState(first_key), needs_norms=False)
