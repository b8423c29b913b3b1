"""STCH: the smooth Tchebycheff scalarization."""

from typing import Any

import jax
from jax import numpy as jnp
import optax

from optax_mtl import _base
from optax_mtl._task_state import add_to_epoch, EpochMeans, init_epoch_means
from optax_mtl._weighting import weighting


def stch_weights(
    losses: jax.Array,
    *,
    mu: _base.Scalar = 1.0,
    preference: jax.Array | None = None,
    reference: jax.Array | None = None,
    present: jax.Array | None = None,
) -> jax.Array:
    r"""Derivatives of :math:`\mu \log \sum_i \exp(\lambda_i (L_i - z_i) / \mu)` with respect to the losses.

    Args:
      losses: `(T,)`.
      mu: smoothness.
      preference: `(T,)`, :math:`\lambda`; equal and summing to one if None.
      reference: `(T,)`, `z`; zeros if None.
      present: `(T,)` of bool, the tasks that take part; all if None.

    Returns:
      `(T,)`, non-negative.
    """
    present = jnp.ones(losses.shape, bool) if present is None else present
    preference = _base.preference_or(preference, _base.equal_weights(present, losses.dtype), present)
    gaps = preference * (losses if reference is None else losses - jnp.asarray(reference, losses.dtype))
    gaps = gaps - jnp.max(gaps, where=present, initial=jnp.finfo(gaps.dtype).min)  # before a small mu makes them large
    return preference * _base.masked_softmax(gaps / jnp.asarray(mu, losses.dtype), present)


def stch(
    num_tasks: int,
    *,
    mu: _base.Scalar = 1.0,
    preference: jax.Array | None = None,
    reference: jax.Array | None = None,
    form: str = "plain",
    steps_per_epoch: int = 100,
    warmup_epochs: int = 4,
) -> optax.GradientTransformationExtraArgs:
    r"""Smooth Tchebycheff scalarization: a soft maximum of the losses, which can reach the whole Pareto front.

    .. math:: \mu \log \sum_i \exp\Bigl(\frac{\lambda_i (L_i - z_i)}{\mu}\Bigr), \qquad
       w_i = \lambda_i\, \mathrm{softmax}_j\Bigl(\frac{\lambda_j (L_j - z_j)}{\mu}\Bigr)_i

    The smaller :math:`\mu`, the more it is the worst task alone; the larger, the more the weighted sum. Choose it for a
    compromise set by `preference` that no weighted sum may reach, with losses of one unit.

    The form `"log"`, for multi-task learning, removes the units. It descends on the sum of the losses' logarithms for
    `warmup_epochs`, and one epoch more in which it takes their means :math:`N_i`; from then on it descends on

    .. math:: T \mu \log \sum_i \exp\Bigl(\frac{\lambda_i}{\mu}\log\frac{L_i}{N_i}\Bigr), \qquad
       w_i = \frac{T \lambda_i}{L_i}\, \mathrm{softmax}_j\Bigl(\frac{\lambda_j}{\mu}\log\frac{L_j}{N_j}\Bigr)_i

    the task that has come down least since then having most of the say.

    Needs `losses`; for `"log"` positive ones: a task whose loss is zero has nothing left to gain and is left out of the
    step. The weights of `"plain"` sum to `1 / T` unless there is a preference, those of `"log"` have the scale of one
    over the losses.

    Args:
      num_tasks: number of tasks `T`.
      mu: smoothness.
      preference: `(T,)`, :math:`\lambda`; if None, one over the number of tasks present for `"plain"`, ones for
        `"log"`, which applies it after the warm-up only.
      reference: `(T,)`, `z`, losses that are thought ideal, for `"plain"` only; zeros if None.
      form: `"plain"` or `"log"`.
      steps_per_epoch: for `"log"`, updates an epoch.
      warmup_epochs: for `"log"`, epochs before the one whose means are taken.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves `(T, *shape)` to `(*shape)`.

    Raises:
      ValueError: if `losses` is missing, or negative for `"log"`; if `preference` or `reference` is not `(T,)`, a
        preference negative, or a reference given for `"log"`.

    Example:
      >>> import jax.numpy as jnp, optax, optax_mtl as mtl
      >>> tx = mtl.stch(num_tasks=2, mu=0.1)
      >>> _, state = tx.update(jnp.ones((2, 3)), tx.init(jnp.zeros(3)), losses=jnp.array([1.0, 1.2]))
      >>> optax.tree.get(state, "task_weights").tolist()  # half of softmax([5, 6])
      [0.134, 0.366]

    References:
      Lin et al., `Smooth Tchebycheff Scalarization for Multi-Objective Optimization
      <https://arxiv.org/abs/2402.19078>`_, ICML 2024

    Note:
      `"plain"` is the paper's objective, as in TorchJD; `"log"` is the authors' code for multi-task learning, as in
      LibMTL. These have no preference in it: ours defaults to one. They add 1e-20 to the ratio of losses. While a task
      that joins late has no mean yet, all have the weights of the warm-up.
    """
    _base.check_choice("form", form, ("plain", "log"))
    _base.check_number("mu", mu, 1e-6)
    _base.check_preference(preference, _base.check_num_tasks(num_tasks))
    if reference is not None:
        _base.check_task_vector("reference", reference, num_tasks)
    if form == "log":
        if reference is not None:
            raise ValueError('stch with form="log" has no reference point: leave out reference, or form="log".')
        steps_per_epoch = _base.check_static_int("steps_per_epoch", steps_per_epoch, 1)
        warmup_epochs = _base.check_static_int("warmup_epochs", warmup_epochs, 0)

    def plain(
        gramian: jax.Array, state: Any, *, losses: jax.Array, present: jax.Array, **_: Any
    ) -> tuple[jax.Array, Any]:
        return stch_weights(losses, mu=mu, preference=preference, reference=reference, present=present), state

    def log(
        gramian: jax.Array, state: EpochMeans, *, losses: jax.Array, present: jax.Array, **_: Any
    ) -> tuple[jax.Array, EpochMeans]:
        present = present & (losses >= jnp.finfo(losses.dtype).tiny)
        losses = jnp.where(present, losses, 1)
        has_mean = state.epochs > warmup_epochs
        descent = jnp.log(losses) - jnp.log(state.means[:, 0].astype(losses.dtype))
        ones = present.astype(losses.dtype)
        later = stch_weights(descent, mu=mu, preference=_base.preference_or(preference, ones, present), present=present)
        weights = jnp.where(jnp.all(has_mean | ~present), jnp.sum(ones) * later, ones) / losses
        new = add_to_epoch(state, losses, present, steps_per_epoch)
        return jnp.where(present, weights, 0), new._replace(means=_base.where_present(has_mean, state.means, new.means))

    return weighting(
        "stch",
        num_tasks,
        plain if form == "plain" else log,
        lambda dtype, params: () if form == "plain" else init_epoch_means(num_tasks, 1, dtype),
        needs_norms=False,
        needs_losses=True,
        positive_losses=form == "log",
    )
