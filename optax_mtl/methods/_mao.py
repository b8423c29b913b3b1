"""MAO: the mix of tasks adapts for every parameter, or for every leaf."""

from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
import optax

from optax_mtl import _base, _gramian
from optax_mtl._combinators import per_task
from optax_mtl._mixing import mixer


class ScaleByLeafRMSState(NamedTuple):
    """State of the leaf-grained base of `scale_by_mao`.

    Attributes:
      steps: () int32, updates so far.
      nu: `(L,)`, for each leaf the running mean of the squared entries of its gradient.
    """

    steps: jax.Array
    nu: jax.Array


class MAOState(NamedTuple):
    """State of `scale_by_mao`.

    Attributes:
      tasks: state of the base for each task: leaves `(T, ...)`.
      momentum: for `grain="leaf"`, the first moment of the mixed update; `()` otherwise.
    """

    tasks: Any
    momentum: Any


def _scale_by_leaf_rms(b2: _base.Scalar, eps: _base.Scalar) -> optax.GradientTransformation:
    """Divides each leaf by the running root mean square of its entries."""

    def init_fn(params: _base.Params) -> ScaleByLeafRMSState:
        num_leaves = len(jax.tree.leaves(params))
        return ScaleByLeafRMSState(jnp.zeros((), jnp.int32), jnp.zeros(num_leaves, _base.accumulator_dtype(params)))

    def update_fn(updates: Any, state: Any, params: _base.Params | None = None) -> tuple[Any, ScaleByLeafRMSState]:
        steps = state.steps + 1
        leaves, treedef = jax.tree.flatten(updates)
        wide = [leaf.astype(state.nu.dtype) for leaf in leaves]
        decay, small = jnp.asarray(b2, state.nu.dtype), jnp.asarray(eps, state.nu.dtype)
        nu = decay * state.nu + (1 - decay) * jnp.stack([jnp.mean(jnp.square(leaf)) for leaf in wide])
        root = jnp.sqrt(nu / (1 - decay ** steps.astype(nu.dtype))) + small
        scaled = [(w / root[i]).astype(leaf.dtype) for i, (w, leaf) in enumerate(zip(wide, leaves, strict=True))]
        return treedef.unflatten(scaled), ScaleByLeafRMSState(steps, nu)

    return optax.GradientTransformation(init_fn, update_fn)


def scale_by_mao(
    num_tasks: int,
    *,
    base: str | optax.GradientTransformation = "adam",
    reduction: str = "sum",
    grain: str = "parameter",
    b1: _base.Scalar = 0.9,
    b2: _base.Scalar = 0.999,
    eps: _base.Scalar = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    r"""Multi-Adaptive Optimization: one adaptive optimiser a task, and the sum of what they would do.

    .. math:: \Delta = \sum_n \frac{\hat m_n}{\sqrt{\hat v_n} + \epsilon}

    with the first and second moments `m` and `v` of each task's own gradient. Every task has the same say in every
    parameter, whatever the scale of its loss and of its gradients there: the mix adapts per parameter, layer and step.
    Choose it where losses differ in scale or tasks matter in different layers. Multiplying a loss by a constant changes
    nothing, as long as its gradients stay well above `eps`.

    The result is already preconditioned: follow it with a learning rate (as `mao` does), not with Adam. For one task it
    is Adam. A head that one task reaches gets plain Adam under `"sum"`. No guarantee against conflicts: opposite tasks
    cancel.

    With `grain="leaf"` (ours, not the paper's) each task has one second moment a *leaf*,

    .. math:: \nu_n \leftarrow \beta_2\nu_n + (1-\beta_2)\,\mathrm{mean}(g_n^2), \qquad
       \Delta = \mathrm{momentum}\Bigl(\sum_n \frac{g_n}{\sqrt{\hat\nu_n} + \epsilon}\Bigr)

    so that the mix adapts per leaf, and the state is one momentum and `T` scalars a leaf instead of `2T` times the
    parameters.

    Needs gradients. An absent task keeps its moments; an update without any task is zero.

    Args:
      num_tasks: number of tasks `T`.
      base: `"adam"`, `"rmsprop"` (second moment without bias correction, no first), `"adagrad"`, or any Optax
        transformation of ordinary gradients (`optax.scale_by_amsgrad()`, say), run on each task by `per_task`.
      reduction: `"sum"` over the tasks, or `"mean"` over those present (which divides heads by their number too).
      grain: `"parameter"` as in the paper, or `"leaf"`; the latter has a base of its own and takes no other.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment (for `"adagrad"`, as in Optax, to the moment under the root).

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves `(T, *shape)` to `(*shape)`. Its `task_weights` are each
      task's share of the update: of the sum of absolute values over all tasks and parameters.

    Raises:
      ValueError: if it is given a `Gramian`, or `grain="leaf"` and another base.

    Example:
      >>> import jax.numpy as jnp, optax_mtl as mtl
      >>> tx = mtl.scale_by_mao(num_tasks=2)
      >>> task_grads = jnp.array([[1e-3, 0.0], [0.0, 1e3]])  # a million between the losses
      >>> updates, state = tx.update(task_grads, tx.init(jnp.zeros(2)))
      >>> updates.tolist(), state.task_weights.tolist()
      ([1., 1.], [0.5, 0.5])

    References:
      Hervella et al., `Multi-Adaptive Optimization for multi-task learning with deep neural networks
      <https://doi.org/10.1016/j.neunet.2023.11.038>`_, Neural Networks 170, 2024

      Yang et al., `AdaTask: A Task-aware Adaptive Learning Rate Approach to Multi-task Learning
      <https://arxiv.org/abs/2211.15055>`_, AAAI 2023: the same update for shared parameters

    Note:
      The paper's abstract establishes a contribution of each task that is adapted for each parameter at every step; the
      sum of per-task Adam updates is what a public re-implementation and AdaTask do. Whether the paper sums or averages
      is not established. Moments are kept in the parameters' dtype, as Optax keeps them.
    """
    num_tasks = _base.check_num_tasks(num_tasks)
    _base.check_choice("reduction", reduction, ("sum", "mean"))
    _base.check_choice("grain", grain, ("parameter", "leaf"))
    if grain == "leaf":
        if base != "adam":
            raise ValueError(f'grain="leaf" has a base of its own: leave out base, found {base!r}.')
        tasks_tx = per_task(_scale_by_leaf_rms(b2, eps), num_tasks)
        momentum_tx = optax.ema(b1, debias=True)
    else:
        tasks_tx = per_task(_base_transformation(base, b1, b2, eps), num_tasks)
        momentum_tx = optax.identity()

    def init(params: _base.Params) -> MAOState:
        return MAOState(tasks_tx.init(params), momentum_tx.init(params))

    def mix(
        task_grads: _base.TaskGrads, state: MAOState, *, present: jax.Array, params: _base.Params | None, **kwargs: Any
    ) -> tuple[Any, Any, MAOState]:
        adapted, tasks = tasks_tx.update(task_grads, state.tasks, params, task_mask=present, **kwargs)
        dtype = _base.accumulator_dtype(task_grads)
        weights = present.astype(dtype) if reduction == "sum" else _base.equal_weights(present, dtype)
        mixed, momentum = momentum_tx.update(_gramian.combine(weights, adapted), state.momentum)
        if grain == "leaf":
            anyone = jnp.any(present)
            mixed = jax.tree.map(lambda u: jnp.where(anyone, u, 0), mixed)
            momentum = jax.tree.map(lambda new, old: jnp.where(anyone, new, old), momentum, state.momentum)
        return mixed, adapted, MAOState(tasks, momentum)

    return mixer("scale_by_mao", num_tasks, mix, init)


def _base_transformation(
    base: str | optax.GradientTransformation, b1: _base.Scalar, b2: _base.Scalar, eps: _base.Scalar
) -> optax.GradientTransformation:
    if not isinstance(base, str):
        return base
    _base.check_choice("base", base, ("adam", "rmsprop", "adagrad"))
    if base == "adam":
        return optax.scale_by_adam(b1, b2, eps)
    if base == "rmsprop":
        return optax.scale_by_rms(b2, eps, eps_in_sqrt=False)
    return optax.scale_by_rss(initial_accumulator_value=0.0, eps=eps)


def mao(
    learning_rate: optax.ScalarOrSchedule,
    num_tasks: int,
    *,
    base: str | optax.GradientTransformation = "adam",
    reduction: str = "sum",
    grain: str = "parameter",
    b1: _base.Scalar = 0.9,
    b2: _base.Scalar = 0.999,
    eps: _base.Scalar = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    """The MAO optimiser: `scale_by_mao`, then the learning rate.

    Args:
      learning_rate: a number or a schedule.
      num_tasks: number of tasks `T`.
      base: see `scale_by_mao`, as for the arguments that follow.
      reduction: see `scale_by_mao`.
      grain: see `scale_by_mao`.
      b1: see `scale_by_mao`.
      b2: see `scale_by_mao`.
      eps: see `scale_by_mao`.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves `(T, *shape)` to updates `(*shape)` that are ready for
      `optax.apply_updates`.

    Example:
      >>> import jax.numpy as jnp, optax_mtl as mtl
      >>> tx = mtl.mao(1e-2, num_tasks=2)
      >>> tx.update(jnp.array([[5.0], [0.1]]), tx.init(jnp.zeros(1)))[0].tolist()
      [-0.02]

    References:
      Hervella et al., `Multi-Adaptive Optimization for multi-task learning with deep neural networks
      <https://doi.org/10.1016/j.neunet.2023.11.038>`_, Neural Networks 170, 2024
    """
    return optax.chain(
        scale_by_mao(num_tasks, base=base, reduction=reduction, grain=grain, b1=b1, b2=b2, eps=eps),
        optax.scale_by_learning_rate(learning_rate),
    )
