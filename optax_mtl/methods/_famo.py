"""FAMO: all tasks' losses fall at the same rate, learned from the losses alone."""

from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
import optax

from optax_mtl import _base
from optax_mtl._task_state import init_learned_scalars, learn_scalars, LearnedScalars
from optax_mtl._weighting import weighting


class FAMOState(NamedTuple):
    """State of `famo`.

    Attributes:
      logits: `(T,)` and their optimiser's state.
      log_losses: `(T,)` logarithm of each task's loss above its reference, when it last took part.
      step: () int32, steps so far.
      last_step: `(T,)` int32, how many steps there were when the task last took part, that one included.
    """

    logits: LearnedScalars
    log_losses: jax.Array
    step: jax.Array
    last_step: jax.Array


def famo_weights(logits: jax.Array, log_losses: jax.Array, *, present: jax.Array | None = None) -> jax.Array:
    r"""Weights :math:`c\,z_i / L_i` with :math:`z = \mathrm{softmax}(\xi)`, and `c` such that they sum to one.

    Args:
      logits: `(T,)`, :math:`\xi`.
      log_losses: `(T,)`, logarithms of the losses above their references.
      present: `(T,)` of bool, the tasks that take part; all if None.

    Returns:
      `(T,)`, non-negative, summing to one.
    """
    present = jnp.ones(logits.shape, bool) if present is None else present
    return _base.masked_softmax(logits - log_losses, present)


def famo_logit_grads(logits: jax.Array, progress: jax.Array, *, present: jax.Array | None = None) -> jax.Array:
    r"""Gradient for the logits: :math:`z_i (\delta_i - z^\top \delta)` with :math:`z = \mathrm{softmax}(\xi)`.

    Args:
      logits: `(T,)`, :math:`\xi`.
      progress: `(T,)`, :math:`\delta`, by how much the logarithm of each loss has fallen in a step.
      present: `(T,)` of bool, the tasks whose progress is known; all if None.

    Returns:
      `(T,)`, positive for the tasks that progressed most: their logits descend. Zero for the others.
    """
    present = jnp.ones(logits.shape, bool) if present is None else present
    z = jnp.where(present, _base.masked_softmax(logits, present), 0)
    progress = jnp.where(present, progress, 0)
    return z * (progress - jnp.sum(z * progress))


def famo(
    num_tasks: int,
    *,
    gamma: _base.Scalar = 1e-3,
    reference: jax.Array | None = None,
    optimizer: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""FAMO: weights learned so that the worst relative improvement of a loss in one step is the best possible.

    .. math:: w_i = c\,\frac{z_i}{L_i}, \qquad z = \mathrm{softmax}(\xi), \qquad c = \Bigl(\sum_j z_j / L_j\Bigr)^{-1}

    is, for the optimal :math:`\xi`, the min-norm direction of the logarithms of the losses. Instead of the gradients it
    looks at what a step has done: the logits of the tasks whose losses fell most, relatively, go down,

    .. math:: \delta_i = \log L_i(\theta_{t-1}) - \log L_i(\theta_t), \qquad
       \xi \leftarrow \mathrm{Adam}\bigl(z \odot (\delta - z^\top\delta) + \gamma\xi\bigr)

    Choose it for many tasks of different units: it costs no gradients' geometry, and multiplying a loss by a constant
    changes nothing.

    Needs `losses`. Both losses of :math:`\delta_i` belong to the batch of the *last* step; so there is another extra
    argument, `losses_after` `(T,)`: the last batch's losses at the present parameters (one forward pass). It is for the
    logits, and the last batch's tasks; in the first step, which changes no logits, it is ignored. Without it the new
    batch's `losses` stand in. This costs nothing, but is an approximation: :math:`\delta_i` then holds the difference
    between two batches as well, which may be many times as large as what one step does.

    Weights sum to one.

    Args:
      num_tasks: number of tasks `T`.
      gamma: decay of the logits, added to their gradient.
      reference: `(T,)`, lower bounds that are subtracted from the losses; zeros if None.
      optimizer: of the logits; `optax.adam(0.025)` if None.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves `(T, *shape)` to `(*shape)`.

    Raises:
      ValueError: if `losses` is missing, or negative without a `reference`; if `losses_after` or `reference` is not
        `(T,)`.

    Example:
      >>> import jax.numpy as jnp, optax, optax_mtl as mtl
      >>> tx = mtl.famo(num_tasks=2)
      >>> task_grads, params = jnp.ones((2, 3)), jnp.zeros(3)
      >>> _, state = tx.update(task_grads, tx.init(params), losses=jnp.array([3.0, 1.0]))
      >>> optax.tree.get(state, "task_weights").tolist()
      [0.25, 0.75]
      >>> losses, losses_after = jnp.array([3.0, 1.0]), jnp.array([2.0, 1.0])  # a new batch; the last one, now
      >>> _, state = tx.update(task_grads, state, losses=losses, losses_after=losses_after)
      >>> optax.tree.get(state, "task_weights").tolist()  # the first task has progressed
      [0.241, 0.759]

    References:
      Liu et al., `FAMO: Fast Adaptive Multitask Optimization <https://arxiv.org/abs/2306.03792>`_, NeurIPS 2023

    Note:
      The authors' code steps the logits between two updates, in a second call; given `losses_after`, this is the same.
      If that call is left out, the logits never move there, and the weights go by one over the losses. They clip the
      shared gradient to norm one, which here is up to the chain: `optax.clip_by_global_norm(1.0)`. The decay is 1e-3 in
      the paper's algorithm, LibMTL and TorchJD; the authors' classes have 1e-2 and 1e-5, and their scripts 1e-3 or
      1e-2. Instead of adding 1e-8 to the losses, a task whose loss is not above its reference is left out of the step:
      it has nothing left to gain. Without `losses_after`, the logit of a task moves only if it took part in this step
      and the last: those of tasks that take turns never do.
    """
    _base.check_number("gamma", gamma, 0)
    if reference is not None:
        _base.check_task_vector("reference", reference, _base.check_num_tasks(num_tasks))
    inner = optax.adam(0.025) if optimizer is None else optimizer

    def init(dtype: jnp.dtype, params: _base.Params) -> FAMOState:
        zeros = jnp.zeros(num_tasks, dtype)
        never = jnp.full(num_tasks, -1, jnp.int32)
        return FAMOState(init_learned_scalars(inner, zeros), zeros, jnp.zeros((), jnp.int32), never)

    def log_gaps(losses: jax.Array, present: jax.Array) -> tuple[jax.Array, jax.Array]:
        gaps = losses if reference is None else losses - jnp.asarray(reference, losses.dtype)
        present = present & jnp.isfinite(gaps) & (gaps >= jnp.finfo(gaps.dtype).tiny)
        return jnp.log(jnp.where(present, gaps, 1)), present

    def rule(
        gramian: jax.Array,
        state: FAMOState,
        *,
        losses: jax.Array,
        present: jax.Array,
        losses_after: jax.Array | None = None,
        **_: Any,
    ) -> tuple[jax.Array, FAMOState]:
        if losses_after is not None:
            _base.check_task_vector("losses_after", losses_after, num_tasks)
        log_losses, present = log_gaps(losses, present)
        # The last batch's losses tell of the tasks in that batch, whether or not they are in this one.
        told = present if losses_after is None else jnp.ones_like(present)
        after = losses if losses_after is None else jnp.asarray(losses_after, losses.dtype)
        log_after, known = log_gaps(after, told & (state.last_step == state.step))

        logits = state.logits.value.astype(losses.dtype)
        progress = state.log_losses.astype(losses.dtype) - log_after
        grads = famo_logit_grads(logits, progress, present=known) + jnp.asarray(gamma, losses.dtype) * logits
        learned = learn_scalars(inner, state.logits, grads, known)

        weights = famo_weights(learned.value.astype(losses.dtype), log_losses, present=present)
        step = state.step + 1
        log_losses = jnp.where(present, log_losses, state.log_losses.astype(losses.dtype))
        last_step = jnp.where(present, step, state.last_step)
        return jnp.where(present, weights, 0), FAMOState(learned, log_losses, step, last_step)

    return weighting(
        "famo", num_tasks, rule, init, needs_norms=False, needs_losses=True, positive_losses=reference is None
    )
