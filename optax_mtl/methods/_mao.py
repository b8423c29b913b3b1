"""MAO: the mix of tasks adapts for every parameter, or for every leaf."""

from collections.abc import Callable
import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import jax
from jax import lax, numpy as jnp
import optax

from optax_mtl import _base, _gramian, _shards, _solvers
from optax_mtl._combinators import per_task
from optax_mtl._mixing import absolute_sums, first_moments, Mix, mixer, optimiser, per_leaf, second_moments

Moments = tuple[jax.Array, ...]


class MAOState(NamedTuple):
    """State of `scale_by_mao`.

    Attributes:
      task_steps: `(T,)` int32, steps in which the task took part.
      moments: what the base remembers of each task's gradients, the first moment first: trees of leaves `(T, *shape)`.
    """

    task_steps: jax.Array
    moments: tuple[Any, ...]


class LeafMAOState(NamedTuple):
    """State of `scale_by_mao` with `grain="leaf"`.

    Attributes:
      task_steps: `(T,)` int32, steps in which the task took part.
      squares: `(T, L)`, running means of the squared entries of each task's gradient on each leaf.
      steps: () int32, steps in which any task took part.
      momentum: leaves `(*shape)`, the first moment of the mixed update.
    """

    task_steps: jax.Array
    squares: jax.Array
    steps: jax.Array
    momentum: Any


# -- Bases: what Optax's scale_by_adam and its like do to a gradient, entry by entry ---------------------------------


@dataclasses.dataclass(frozen=True)
class _Rule:
    """`new = moments(t, g, old)`, and `step(t, g, old, new)`, for a gradient `g` of any shape in step `t`."""

    b1: jax.Array
    b2: jax.Array
    eps: jax.Array
    names: ClassVar[tuple[str, ...]]  # of the moments: "m" for the first moment


class _Adam(_Rule):
    names: ClassVar[tuple[str, ...]] = ("m", "v")

    def moments(self, t: jax.Array, g: jax.Array, old: Moments) -> Moments:
        m, v = old
        return self.b1 * m + (1 - self.b1) * g, self.b2 * v + (1 - self.b2) * g**2

    def step(self, t: jax.Array, g: jax.Array, old: Moments, new: Moments) -> jax.Array:
        m, v = new
        return _solvers.ratio(m / (1 - self.b1**t), jnp.sqrt(v / (1 - self.b2**t)) + self.eps)


class _AMSGrad(_Adam):
    names = ("m", "v", "largest v")

    def moments(self, t: jax.Array, g: jax.Array, old: Moments) -> Moments:
        m, v = super().moments(t, g, old[:2])
        return m, v, jnp.maximum(old[2], v / (1 - self.b2**t))

    def step(self, t: jax.Array, g: jax.Array, old: Moments, new: Moments) -> jax.Array:
        m, _, largest = new
        return _solvers.ratio(m / (1 - self.b1**t), jnp.sqrt(largest) + self.eps)


class _RMSProp(_Rule):
    names = ("v",)

    def moments(self, t: jax.Array, g: jax.Array, old: Moments) -> Moments:
        return (self.b2 * old[0] + (1 - self.b2) * g**2,)

    def step(self, t: jax.Array, g: jax.Array, old: Moments, new: Moments) -> jax.Array:
        return _solvers.ratio(g, jnp.sqrt(new[0]) + self.eps)


class _AdaGrad(_Rule):
    names = ("v",)

    def moments(self, t: jax.Array, g: jax.Array, old: Moments) -> Moments:
        return (old[0] + g**2,)

    def step(self, t: jax.Array, g: jax.Array, old: Moments, new: Moments) -> jax.Array:
        return g * lax.rsqrt(jnp.maximum(new[0] + self.eps, jnp.finfo(g.dtype).tiny))  # 0 * inf for eps=0 otherwise


class _Lion(_Rule):
    names = ("m",)

    def moments(self, t: jax.Array, g: jax.Array, old: Moments) -> Moments:
        return (self.b2 * old[0] + (1 - self.b2) * g,)

    def step(self, t: jax.Array, g: jax.Array, old: Moments, new: Moments) -> jax.Array:
        blend = self.b1 * old[0] + (1 - self.b1) * g
        return _solvers.ratio(blend, jnp.abs(blend))  # its sign; jnp.sign is slow in sums


_BASES: dict[str, type[Any]] = {
    "adam": _Adam,
    "amsgrad": _AMSGrad,
    "rmsprop": _RMSProp,
    "adagrad": _AdaGrad,
    "lion": _Lion,
}


# -- Mixes, one for each grain and kind of base ----------------------------------------------------------------------

Mixing = tuple[Callable[[_base.Params], Any], Mix]  # the first state, and the mix
Priorities = Callable[[jax.Array, jnp.dtype], jax.Array]  # what multiplies the contributions of those present, (T,)


def _elementwise(
    num_tasks: int, base: str, settings: tuple[_base.Scalar, ...], mu_dtype: Any, priorities: Priorities
) -> Mixing:
    def init(params: _base.Params) -> MAOState:
        moments = tuple(
            first_moments(params, num_tasks, mu_dtype) if name == "m" else second_moments(params, num_tasks)
            for name in _BASES[base].names
        )
        return MAOState(jnp.zeros(num_tasks, jnp.int32), moments)

    def mix(task_grads: _base.TaskGrads, state: MAOState, *, present: jax.Array, **_: Any) -> tuple[Any, Any, MAOState]:
        dtype = _base.accumulator_dtype(task_grads)
        method = _BASES[base](*(jnp.asarray(setting, dtype) for setting in settings))
        weights = priorities(present, dtype)
        task_steps = state.task_steps + present.astype(jnp.int32)
        steps = jnp.maximum(task_steps, 1).astype(dtype)

        def mix_leaf(leaf: jax.Array, *stored: jax.Array) -> tuple[jax.Array, jax.Array, Moments]:
            t, g, old = per_leaf(steps, leaf), leaf.astype(dtype), tuple(s.astype(dtype) for s in stored)
            # Squares of the gradients as they come are also in the tasks' norms: XLA would store them to share them.
            finite = jnp.where(per_leaf(present, g), g, 0)
            new = _base.where_present(present, method.moments(t, finite, old), old)
            contribution = method.step(t, g, old, new)
            if num_tasks > _gramian.UNROLL:
                mixed = _gramian.combine(weights, contribution)
            else:  # task by task from the new moments, which XLA makes one loop: all contributions are never stored
                mixed = _gramian.combine_rows(
                    weights, lambda i: method.step(*jax.tree.map(lambda x: x[i], (t, g, old, new)))
                )
            new = tuple(n.astype(s.dtype) for n, s in zip(new, stored, strict=True))
            return mixed.astype(leaf.dtype), weights * absolute_sums(contribution)[0], new

        leaves, treedef = jax.tree.flatten(task_grads)
        stored = (jax.tree.leaves(tree) for tree in state.moments)
        mixed, sizes, new = zip(*map(mix_leaf, leaves, *stored), strict=True)
        moments = tuple(treedef.unflatten(leaves) for leaves in zip(*new, strict=True))
        return treedef.unflatten(mixed), jnp.stack(sizes), MAOState(task_steps, moments)

    return init, mix


def _any_optax(num_tasks: int, base: optax.GradientTransformation, priorities: Priorities) -> Mixing:
    tasks_tx = per_task(base, num_tasks)

    def mix(
        task_grads: _base.TaskGrads, state: Any, *, present: jax.Array, params: _base.Params | None, **extra_args: Any
    ) -> tuple[Any, Any, Any]:
        adapted, state = tasks_tx.update(task_grads, state, params, task_mask=present, **extra_args)
        weights = priorities(present, _base.accumulator_dtype(task_grads))
        return _gramian.combine(weights, adapted), weights[None] * absolute_sums(adapted), state

    return tasks_tx.init, mix


def _leaf_grain(num_tasks: int, settings: tuple[_base.Scalar, ...], mu_dtype: Any, priorities: Priorities) -> Mixing:
    def init(params: _base.Params) -> LeafMAOState:
        return LeafMAOState(
            task_steps=jnp.zeros(num_tasks, jnp.int32),
            squares=jnp.zeros((num_tasks, len(jax.tree.leaves(params))), _base.accumulator_dtype(params)),
            steps=jnp.zeros((), jnp.int32),
            momentum=optax.tree.zeros_like(params, dtype=mu_dtype),
        )

    def mix(
        task_grads: _base.TaskGrads, state: LeafMAOState, *, present: jax.Array, **_: Any
    ) -> tuple[Any, Any, LeafMAOState]:
        dtype = state.squares.dtype
        b1, b2, eps = (jnp.asarray(setting, dtype) for setting in settings)
        task_steps = state.task_steps + present.astype(jnp.int32)
        leaves, treedef = jax.tree.flatten(task_grads)
        sizes = [max(math.prod(leaf.shape[1:]) * _shards.number(leaf), 1) for leaf in leaves]
        means = [_gramian.task_squared_norms(leaf).astype(dtype) / n for leaf, n in zip(leaves, sizes, strict=True)]
        squares = b2 * state.squares + (1 - b2) * jnp.stack(means, axis=1)
        squares = _base.where_present(present, squares, state.squares)
        root = jnp.sqrt(squares / (1 - b2 ** jnp.maximum(task_steps, 1).astype(dtype))[:, None]) + eps
        weights = priorities(present, dtype)[:, None] * _solvers.reciprocal(root)  # (T, L)
        mixed = treedef.unflatten([_gramian.combine(w, leaf) for w, leaf in zip(weights.T, leaves, strict=True)])

        anyone = jnp.any(present)
        steps = state.steps + anyone.astype(jnp.int32)

        def follow(last: jax.Array, new: jax.Array) -> jax.Array:
            return jnp.where(anyone, b1 * last.astype(dtype) + (1 - b1) * new.astype(dtype), last.astype(dtype))

        momentum = jax.tree.map(follow, state.momentum, mixed)
        debias = jnp.where(anyone, 1 / (1 - b1 ** jnp.maximum(steps, 1).astype(dtype)), 0)
        update = jax.tree.map(lambda m, like: (debias * m).astype(like.dtype), momentum, task_grads)
        momentum = jax.tree.map(lambda m, old: m.astype(old.dtype), momentum, state.momentum)
        return update, weights.T * absolute_sums(task_grads), LeafMAOState(task_steps, squares, steps, momentum)

    return init, mix


def scale_by_mao(
    num_tasks: int,
    *,
    base: str | optax.GradientTransformation = "adam",
    reduction: str = "sum",
    grain: str = "parameter",
    preference: Any = None,
    b1: _base.Scalar = 0.9,
    b2: _base.Scalar = 0.999,
    eps: _base.Scalar = 1e-8,
    mu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Multi-Adaptive Optimization: one adaptive optimiser a task, and the sum of what they would do.

    .. math:: \Delta = \sum_n \omega_n \frac{\hat m_n}{\sqrt{\hat v_n} + \epsilon}

    with the first and second moments `m` and `v` of each task's own gradient. Every task has the same say in every
    parameter, whatever the scale of its loss and of its gradients there: the mix adapts per parameter, layer and step.
    Choose it where losses differ in scale or tasks matter in different layers. Multiplying a loss by a constant changes
    nothing, as long as its gradients stay well above `eps`; to give a task more say, multiply what has been adapted:
    that is `preference`, :math:`\omega`.

    The result is already preconditioned: follow it with a learning rate (as `mao` does), not with Adam. For one task it
    is the base itself. No guarantee against conflicts: opposite tasks cancel.

    What a head that only task `n` reaches is given, by what the base makes of zeros:

    ====================================  ======================================  =====================================
    base                                  with `"sum"`                            with `"mean"`
    ====================================  ======================================  =====================================
    `"adam"`, `"amsgrad"`, `"rmsprop"`,   the base alone, times :math:`\omega_n`  that over :math:`\sum\omega`, over
    `"adagrad"`, `"lion"`, leaf grain                                             `T` without a preference
    one that turns zeros into something   that, and `T - 1` times what it makes   that over `T`
    (noise, weight decay)                 of zeros
    ====================================  ======================================  =====================================

    With `grain="leaf"` (ours, not the paper's) each task has one second moment a *leaf*,

    .. math:: \nu_n \leftarrow \beta_2\nu_n + (1-\beta_2)\,\mathrm{mean}(g_n^2), \qquad
       \Delta = \mathrm{momentum}\Bigl(\sum_n \omega_n \frac{g_n}{\sqrt{\hat\nu_n} + \epsilon}\Bigr)

    so that the mix adapts per leaf, and the state is one momentum and `T` scalars a leaf instead of `2T` times the
    parameters.

    Needs gradients. An absent task keeps its moments and its place in their bias correction; an update without any task
    is zero.

    Args:
      num_tasks: number of tasks `T`.
      base: `"adam"`; `"amsgrad"`; `"rmsprop"` (second moment without bias correction, no first); `"adagrad"`
        (whose sum of squares starts at zero); `"lion"` (the sign of a blend of momentum and gradient, whose usual `b2`
        is 0.99); or any Optax transformation of ordinary gradients (`optax.scale_by_yogi()`, say), run on each task by
        `per_task`. Those named are fused: up to 32 tasks, their contributions are never stored.
      reduction: `"sum"` over the tasks, or `"mean"` over those present (which divides heads by their number too).
      grain: `"parameter"` as in the paper, or `"leaf"`; the latter has a base of its own and takes no other.
      preference: `(T,)`, the tasks' priorities, which multiply what the base made of each; ones if None. The mean is
        theirs too, over the sum of those present.
      b1: decay of the first moment.
      b2: decay of the second moment; for `"lion"`, of the only one.
      eps: added to the root of the second moment (for `"adagrad"`, as in Optax, to the moment under the root).
      mu_dtype: dtype in which the first moment is kept (`jnp.bfloat16` saves half of it); the parameters' if None.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves `(T, *shape)` to `(*shape)`. Its `task_weights` are each
      task's share of the update: of the sum of absolute values over all tasks and parameters. Its `block_weights`
      `(L, T)` are the same leaf by leaf: `optax.tree.get(opt_state, "block_weights")`. (With `grain="leaf"`: of what
      goes into the momentum in this step.)

    Raises:
      ValueError: if it is given a `Gramian`; an unknown base; `grain="leaf"` and another base; a `mu_dtype` without a
        first moment.

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
      <https://arxiv.org/abs/2211.15055>`_, AAAI 2023: the same update for shared parameters; see `adatask`

    Note:
      The paper's abstract establishes a contribution of each task that is adapted for each parameter at every step; the
      sum of per-task Adam updates is what a public re-implementation and AdaTask do. Whether the paper sums or averages
      is not established; `"amsgrad"`, `"lion"` and `preference` are ours. First moments are kept in the parameters'
      dtype, as Optax keeps them; second moments, unlike there, in float32 at least: in bfloat16 they would not fall
      again, as 0.999 times one rounds to itself. All arithmetic is in float32 at least.
    """
    num_tasks = _base.check_num_tasks(num_tasks)
    _base.check_choice("reduction", reduction, ("sum", "mean"))
    _base.check_choice("grain", grain, ("parameter", "leaf"))
    _base.check_preference(preference, num_tasks)
    _base.check_number("b1", b1, 0, 1)
    _base.check_number("b2", b2, 0, 1)
    _base.check_number("eps", eps, 0)
    if isinstance(base, str):
        _base.check_choice("base", base, tuple(_BASES))
    elif not isinstance(base, optax.GradientTransformation):
        raise ValueError(
            f"base must be one of {', '.join(map(repr, _BASES))}, or an Optax transformation as it is, "
            f"optax.scale_by_yogi() say; found {base!r}."
        )
    if grain == "leaf" and base != "adam":
        raise ValueError(f'grain="leaf" has a base of its own: leave out base, found {base!r}.')
    if mu_dtype is not None and not (isinstance(base, str) and "m" in _BASES[base].names):
        raise ValueError(
            f"mu_dtype is that of a base's first moment, and base={base!r} has none here. Leave it out; give an Optax "
            "transformation its own."
        )

    def priorities(present: jax.Array, dtype: jnp.dtype) -> jax.Array:
        weights = _base.preference_or(preference, jnp.ones(num_tasks, dtype), present)
        return weights if reduction == "sum" else weights * _solvers.reciprocal(jnp.sum(weights))

    if grain == "leaf":
        init, mix = _leaf_grain(num_tasks, (b1, b2, eps), mu_dtype, priorities)
    elif isinstance(base, str):
        init, mix = _elementwise(num_tasks, base, (b1, b2, eps), mu_dtype, priorities)
    else:
        init, mix = _any_optax(num_tasks, base, priorities)
    return mixer("scale_by_mao", num_tasks, mix, init)


def mao(
    learning_rate: optax.ScalarOrSchedule,
    num_tasks: int,
    *,
    base: str | optax.GradientTransformation = "adam",
    reduction: str = "sum",
    grain: str = "parameter",
    preference: Any = None,
    b1: _base.Scalar = 0.9,
    b2: _base.Scalar = 0.999,
    eps: _base.Scalar = 1e-8,
    mu_dtype: Any = None,
    weight_decay: _base.Scalar = 0.0,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """The MAO optimiser: `scale_by_mao`, weight decay if any, then the learning rate. For one task it is AdamW.

    Args:
      learning_rate: a number or a schedule.
      num_tasks: number of tasks `T`.
      base: see `scale_by_mao`, as for the arguments that follow.
      reduction: see `scale_by_mao`.
      grain: see `scale_by_mao`.
      preference: see `scale_by_mao`.
      b1: see `scale_by_mao`.
      b2: see `scale_by_mao`.
      eps: see `scale_by_mao`.
      mu_dtype: see `scale_by_mao`.
      weight_decay: how much of the parameters is taken from them, times the learning rate: once a step, however many
        tasks there are, and in a step without any task too. With it, `update` needs the parameters. For a schedule,
        `optax.inject_hyperparams(mao, static_args="num_tasks")`.
      mask: which parameters decay: a tree of bool like them, or a function that makes it of them; all if None.

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

      Loshchilov and Hutter, `Decoupled Weight Decay Regularization <https://arxiv.org/abs/1711.05101>`_, ICLR 2019

    Note:
      Whether the paper decays weights is not established; this is what `optax.adamw` does.
    """
    scaled = scale_by_mao(
        num_tasks,
        base=base,
        reduction=reduction,
        grain=grain,
        preference=preference,
        b1=b1,
        b2=b2,
        eps=eps,
        mu_dtype=mu_dtype,
    )
    return optimiser(scaled, learning_rate, weight_decay, mask)


def adatask(
    learning_rate: optax.ScalarOrSchedule,
    num_tasks: int,
    *,
    base: str = "adam",
    b1: _base.Scalar = 0.9,
    b2: _base.Scalar = 0.999,
    eps: _base.Scalar = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    """AdaTask: own moments of each task on the shared parameters, one ordinary optimiser on the heads.

    That is `mao` under another name, and heads need no telling apart: a base named here makes nothing of the zeros that
    the other tasks' gradients are, so that the sum over the tasks is one ordinary optimiser on every parameter that
    a single task reaches.

    Needs gradients. The state holds the moments `T` times, for heads too.

    Args:
      learning_rate: a number or a schedule.
      num_tasks: number of tasks `T`.
      base: `"adam"`, `"adagrad"` or `"rmsprop"`, as in the paper; or another one named in `scale_by_mao`.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: see `scale_by_mao`.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves `(T, *shape)` to updates `(*shape)` that are ready for
      `optax.apply_updates`.

    Raises:
      ValueError: if it is given a `Gramian`.

    Example:
      >>> import jax.numpy as jnp, optax_mtl as mtl
      >>> tx = mtl.adatask(1e-2, num_tasks=2)
      >>> task_grads = {"trunk": jnp.array([[5.0], [0.1]]), "head": jnp.array([[0.0], [3.0]])}
      >>> tx.update(task_grads, tx.init({"trunk": jnp.zeros(1), "head": jnp.zeros(1)}))[0]["trunk"].tolist()
      [-0.02]

    References:
      Yang et al., `AdaTask: A Task-aware Adaptive Learning Rate Approach to Multi-task Learning
      <https://arxiv.org/abs/2211.15055>`_, AAAI 2023

    Note:
      The authors' code differs where a parameter is neither shared by all tasks nor one task's own: whatever is not
      marked as shared gets one optimiser for the sum of the gradients, and here one for each task that reaches it. It
      knows no absent tasks; here a head stands still while its task is away, instead of going on with its momentum. Its
      weights of the losses, which multiply gradients before they are adapted, are left out: they change nothing but
      what `eps` does. (`mao` has a `preference`, which multiplies what has been adapted.)
    """
    if not isinstance(base, str):
        raise ValueError(f"adatask: base must be the name of one, found {base!r}. `mao` takes Optax transformations.")
    return mao(learning_rate, num_tasks, base=base, b1=b1, b2=b2, eps=eps)
