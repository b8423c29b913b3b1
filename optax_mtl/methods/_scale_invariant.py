"""Scale-invariant weighting: the sum of the losses' logarithms."""

from typing import Any

import jax
from jax import numpy as jnp
import optax

from optax_mtl import _base
from optax_mtl._weighting import weighting

_MODES = ("log", "log1p")


def scale_invariant_weights(losses: jax.Array, preference: jax.Array | float = 1.0, *, mode: str = "log") -> jax.Array:
    """Derivatives of the weighted sum of the losses' logarithms.

    Args:
      losses: `(T,)`, positive.
      preference: `c`, `(T,)` or a scalar.
      mode: `"log"`: `c / L`, zero for a loss that is not positive; `"log1p"`: `c / (1 + L)`, where a negative loss
        counts as zero.

    Returns:
      `(T,)`.
    """
    _base.check_choice("mode", mode, _MODES)
    if mode == "log1p":
        return preference / (1 + jnp.maximum(losses, 0))
    return jnp.where(losses > 0, preference / jnp.maximum(losses, jnp.finfo(losses.dtype).tiny), 0)


def scale_invariant(
    num_tasks: int, *, preference: Any = None, mode: str = "log"
) -> optax.GradientTransformationExtraArgs:
    r"""Scale-invariant weighting: descends on the sum of the logarithms of the losses.

    .. math:: \sum_i c_i \log L_i, \qquad w_i = \frac{c_i}{L_i}

    Multiplying a loss by a constant changes nothing at all. Choose it as the baseline when the losses have different
    units: it is what `uncertainty` and `imtl_l` learn slowly, and has nothing to tune. A task whose loss comes near
    zero gets an ever larger weight; `mode="log1p"` bounds it by :math:`c_i`, but knows the units again.

    Needs `losses`, positive ones. The weights sum to nothing in particular.

    Args:
      num_tasks: number of tasks `T`.
      preference: `c`, `(T,)`, not negative; ones if None.
      mode: `"log"`, or `"log1p"` for :math:`\sum_i c_i \log(1 + L_i)`.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves `(T, *shape)` to `(*shape)`.

    Raises:
      ValueError: if `losses` is missing, or one of them is negative.

    Example:
      >>> import jax.numpy as jnp, optax, optax_mtl as mtl
      >>> tx = mtl.scale_invariant(num_tasks=2)
      >>> _, state = tx.update(jnp.ones((2, 3)), tx.init(jnp.zeros(3)), losses=jnp.array([4.0, 0.5]))
      >>> optax.tree.get(state, "task_weights").tolist()
      [0.25, 2.0]

    References:
      Navon et al., `Multi-Task Learning as a Bargaining Game <https://arxiv.org/abs/2202.01017>`_, ICML 2022 (where it
      is the baseline SI)

    Note:
      The authors of Nash-MTL use the logarithm, as here; the code that goes with Aligned-MTL uses `log(1 + L)`. A
      task whose loss is zero has nothing to gain and gets weight zero, not an infinite one.
    """
    _base.check_choice("mode", mode, _MODES)
    _base.check_preference(preference, _base.check_num_tasks(num_tasks))

    def rule(
        gramian: jax.Array, state: Any, *, losses: jax.Array, present: jax.Array, **_: Any
    ) -> tuple[jax.Array, Any]:
        chosen = _base.preference_or(preference, jnp.ones_like(losses), present)
        return scale_invariant_weights(losses, chosen, mode=mode), state

    return weighting("scale_invariant", num_tasks, rule, needs_norms=False, needs_losses=True, positive_losses=True)
