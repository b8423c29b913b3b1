"""Balancing in the geometry of the optimiser that follows: after its preconditioning, or in its metric."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
import optax

from optax_mtl import _base, _combinators, _gramian, _shards


def precondition_then_balance(
    method: optax.GradientTransformation,
    num_tasks: int,
    preconditioner: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Balances what an optimiser would make of each task alone: `chain(per_task(preconditioner), method)`.

    An adaptive optimiser behind a balancing method divides the balanced gradient by its own running scale, and part of
    the balance goes with it. Here each task has moments of its own, and the method balances the preconditioned
    gradients: its promises hold for these, and nothing is done to its result but the learning rate.

    For `sum_tasks` it is MAO. The losses' scales have no effect. What conflicts with no task is the balanced sum with
    the *preconditioned* gradients, not with the gradients. Costs the state of `preconditioner` for every task, for Adam
    `2T` times the parameters (`balance_in_metric` costs none).

    Args:
      method: a balancing method; `shared_and_heads(method, ...)` too.
      num_tasks: number of tasks `T`.
      preconditioner: an Optax transformation of ordinary gradients without a learning rate; `optax.scale_by_adam()` if
        None.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves `(T, *shape)` to `(*shape)`. Follow it with a learning
      rate, not with Adam.

    Example:
      >>> import jax.numpy as jnp, optax, optax_mtl as mtl
      >>> tx = optax.chain(mtl.precondition_then_balance(mtl.upgrad(2), 2), optax.scale_by_learning_rate(0.1))
      >>> task_grads = jnp.array([[1e3, 1e3], [-1e-3, 2e-3]])  # after Adam: (1, 1) and (-1, 1)
      >>> tx.update(task_grads, tx.init(jnp.zeros(2)))[0].round(3).tolist()
      [0., -0.1]

    References:
      Yang et al., `AdaTask: A Task-aware Adaptive Learning Rate Approach to Multi-task Learning
      <https://arxiv.org/abs/2211.15055>`_, AAAI 2023: one optimiser state a task, summed
    """
    inner = optax.scale_by_adam() if preconditioner is None else preconditioner
    both: optax.GradientTransformationExtraArgs = optax.chain(_combinators.per_task(inner, num_tasks), method)
    return both


class BalanceInMetricState(NamedTuple):
    """State of `balance_in_metric`.

    Attributes:
      balance: state of the balancing method.
      optimizer: state of the optimiser.
    """

    balance: Any
    optimizer: Any


def second_moment_metric(opt_state: Any) -> _base.Params:
    """The metric of an optimiser that divides by the root of a running second moment, from its state.

    Args:
      opt_state: the state of any chain with one of Optax's `scale_by_adam`, `scale_by_rms`, `scale_by_amsgrad`, ... in
        it: with one field `nu`. (In a few others `nu` is something else, and this metric is not theirs: `adamax`,
        centred `rmsprop`, `sm3`, `optax.contrib.sophia`. Write a function for these.)

    Returns:
      Leaves `(*shape)`: one over the root of `nu` (of `nu_max`, if there is one), in units in which the root is one in
      the mean, and at most 1e6; one if `nu` is zero everywhere.

    Raises:
      ValueError: if there is no field `nu`, or several.
    """
    found = _state_fields(opt_state, "nu")
    if len(found) != 1:
        raise ValueError(
            f"second_moment_metric found {len(found)} fields `nu` in the optimiser's state and needs one. Pass "
            "balance_in_metric(..., metric=function), a function from that state to a tree like the parameters."
        )
    second_moment = (_state_fields(opt_state, "nu_max") or found)[0]  # AMSGrad divides by the running maximum
    leaves = jax.tree.leaves(second_moment)
    if not leaves:
        return second_moment
    dtype = _base.accumulator_dtype(second_moment)
    # The mean of the roots, as that of the squares may overflow.
    total = _shards.total([jnp.sum(jnp.sqrt(leaf.astype(dtype))) for leaf in leaves])
    mean = total / sum(leaf.size * _shards.number(leaf) for leaf in leaves)

    def inverse_root(nu: jax.Array) -> jax.Array:
        root = jnp.sqrt(nu.astype(dtype)) / jnp.where(mean > 0, mean, 1)
        return jnp.where(mean > 0, 1 / (root + 1e-6), 1)

    return jax.tree.map(inverse_root, second_moment)


def _state_fields(opt_state: Any, name: str) -> list[Any]:
    """The fields of that name of the states in `opt_state`, but for parameters that are called so."""

    def is_field(path: tuple[Any, ...], _: Any) -> bool:
        return hasattr(path[-1], "tuple_name")

    return [field for _, field in optax.tree.get_all_with_path(opt_state, name, filtering=is_field)]


def balance_in_metric(
    method: optax.GradientTransformation,
    optimizer: optax.GradientTransformation,
    *,
    metric: Callable[[Any], _base.Params] = second_moment_metric,
    rounds: int = 1,
) -> optax.GradientTransformationExtraArgs:
    r"""`optax.chain(method, optimizer)`, with the method's inner products taken in the optimiser's own metric.

    Adam does not move along the gradient :math:`d` but along :math:`D d`, with :math:`D = 1/\sqrt{\hat v}`, and what
    the step does to task `i` is :math:`\langle g_i, D d\rangle`: a direction that conflicts with no task may do so
    once Adam has scaled it. With the Gramian

    .. math:: M_{ij} = \langle g_i, D\, g_j\rangle

    the method's promises are about :math:`D d`: `upgrad` and `mgda` then find weights for which it conflicts with no
    task. That is the step that is taken, but for momentum, and for what the last round still changes in `D`.

    `D` depends on the step, and the step on `D`. So the gradients are balanced without a metric first, the optimiser
    says which state that would leave it in, and they are balanced again in the metric of that state: `rounds` times.
    Each costs a Gramian, a combination and an optimiser step, but no state. `rounds=0` takes the metric of the state as
    it is, which costs nothing, and lags by one step.

    Args:
      method: any weighting; in `shared_and_heads` or `blockwise` too.
      optimizer: an Optax optimiser with one running second moment, `optax.adam(1e-3)` say.
      metric: a function from the optimiser's state to leaves `(*shape)`, positive: what each parameter counts. Its
        overall factor does not matter to most methods. (For a metric of your own that needs no state, give any
        weighting the extra argument `metric`: `tx.update(task_grads, state, params, metric=tree)`.)
      rounds: how often the optimiser is asked for the metric of the step.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves `(T, *shape)` to the optimiser's updates `(*shape)`.

    Raises:
      ValueError: if the optimiser's state has no second moment, and no `metric` is given.

    Example:
      >>> import jax.numpy as jnp, optax, optax_mtl as mtl
      >>> method, optimizer, params = mtl.upgrad(2), optax.rmsprop(0.1), jnp.zeros(2)
      >>> before = jnp.array([[30.0, 1.0], [30.0, 1.0]])  # the first axis was steep
      >>> task_grads = jnp.array([[1.0, 4.0], [1.0, -3.0]])
      >>> for tx in (optax.chain(method, optimizer), mtl.balance_in_metric(method, optimizer)):
      ...     _, state = tx.update(before, tx.init(params), params)
      ...     step, _ = tx.update(task_grads, state, params)
      ...     print((task_grads @ -step).round(3).tolist())  # by how much each loss decreases
      [0.211, -0.122]
      [0.03, 0.017]

    Note:
      The metric is diagonal, without momentum: the step also contains what earlier steps left in Adam's first moment.
      That may be most of it. With `b1=0.9`, steps from random gradients conflict with a task about as often as they do
      without the metric; it shows where momentum is short, or there is none.
    """
    rounds = _base.check_static_int("rounds", rounds, 0)
    method, optimizer = optax.with_extra_args_support(method), optax.with_extra_args_support(optimizer)

    def init_fn(params: _base.Params) -> BalanceInMetricState:
        return BalanceInMetricState(method.init(params), optimizer.init(params))

    def update_fn(
        updates: _base.TaskGrads, state: Any, params: _base.Params | None = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        _gramian.check_not_gramian(updates, "balance_in_metric", may_be_deferred=True)

        def balance(in_metric: _base.Params | None) -> tuple[Any, Any]:
            return method.update(updates, state.balance, params, metric=in_metric, **extra_args)

        balanced, balance_state = balance(metric(state.optimizer) if rounds == 0 else None)
        for _ in range(rounds):
            _, ahead = optimizer.update(balanced, state.optimizer, params, **extra_args)
            balanced, balance_state = balance(metric(ahead))
        steps, opt_state = optimizer.update(balanced, state.optimizer, params, **extra_args)
        return steps, BalanceInMetricState(balance_state, opt_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
