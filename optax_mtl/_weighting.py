"""From a rule for the weights to an Optax transformation: contract, Gramian, absentees, combination, state."""

from collections.abc import Callable
import functools
import math
from typing import Any

import jax
from jax import lax, numpy as jnp
import numpy as np
import optax

from optax_mtl import _base, _deferred, _gramian

# rule(gramian, method_state, *, present, losses, params, task_grads, metric, **extra_args) -> (weights, method_state)
Rule = Callable[..., tuple[jax.Array, Any]]
_FEW = 4  # tasks, whose gradients are sooner read twice than their sum is copied once


class Weighting(optax.GradientTransformationExtraArgs):
    """A transformation whose update is the weighted sum its `task_weights` tell: what wrappers around weights take.

    Attributes:
      needs_gradients: whether it looks at more of the gradients than their Gramian, and refuses a `Gramian`.
    """

    needs_gradients: bool = False


def as_weighting(init: Callable[..., Any], update: Callable[..., Any], *, needs_gradients: bool) -> Weighting:
    """The two functions as a `Weighting`."""
    marked = Weighting(init, update)
    marked.needs_gradients = needs_gradients
    return marked


def weighting(
    name: str,
    num_tasks: int,
    rule: Rule,
    init: Callable[[jnp.dtype, _base.Params], Any] = lambda dtype, params: (),
    *,
    needs_gramian: bool = True,
    needs_norms: bool = True,
    needs_gradients: bool = False,
    needs_losses: bool = False,
    positive_losses: bool = False,
) -> Weighting:
    """The transformation whose update is `sum_i w_i g_i`, with `w` from `rule`.

    Every weighting of this library is one call of this function. What is the same for all stands here, once: the shape
    contract, the Gramian (or only its diagonal), the tasks that are absent or not finite, the combination, and the
    state. A weighting of your own works wherever the library's do: in `blockwise`, `shared_and_heads` or
    `update_every`, with deferred gradients, on meshes.

    Args:
      name: the method's name, for messages.
      num_tasks: `T`.
      rule: `rule(gramian, method_state, *, present, losses, params, task_grads, metric, **extra_args)` returns the
        weights `(T,)` and the method's new state. `gramian` is `(T, T)`, with zero rows and columns for absent tasks
        (only the diagonal if not `needs_gramian`); `present` is `(T,)` of bool; `losses` is `(T,)`, one where a task is
        absent, or None; `metric` has been taken into account. The rule must give what it would give had the absent
        tasks never existed, and must keep their part of its state; their weights are set to zero here.
        (In the library, `equal_weights`, `masked_softmax`, `where_present` of `_base` and `reciprocal` of `_solvers`
        help with that.)
      init: `init(dtype, params)` returns the method's first state; `dtype` is the weights'.
      needs_gramian: whether the rule looks at more than the diagonal.
      needs_norms: whether it looks at that, or at more. If not, the gradients of more than a few tasks are read once,
        to be summed, and only if the sum is not finite are the norms asked which tasks were to blame.
      needs_gradients: whether the rule looks at `task_grads`, so that a `Gramian` will not do.
      needs_losses: whether `losses` must be given.
      positive_losses: whether the rule is for losses that are not negative (it takes their logarithm, say).

    Returns:
      An `optax.GradientTransformationExtraArgs`, marked as a `Weighting`, with a `BalanceState`. Beside what methods
      are given, `update` takes an extra argument `metric`, leaves `(*shape)` and none negative: the Gramian is then
      that of the inner product in which each parameter counts so much. (Where the method sees some of the leaves only,
      under `shared_and_heads` say, the metric of them all will do.)

    Example:
      >>> import optax_mtl as mtl
      >>> def softmax_of_losses(num_tasks, temperature):
      ...     def rule(gramian, state, *, losses, present, **_):
      ...         logits = jnp.where(present, losses / temperature, -jnp.inf)
      ...         return jax.nn.softmax(logits), state
      ...
      ...     return mtl.weighting("softmax_of_losses", num_tasks, rule, needs_norms=False, needs_losses=True)
      >>> tx = softmax_of_losses(num_tasks=2, temperature=1.0)
      >>> state = tx.init(jnp.zeros(3))
      >>> _, state = tx.update(jnp.ones((2, 3)), state, losses=jnp.array([1.0, 2.0]))
      >>> state.task_weights.tolist()
      [0.269, 0.731]
    """
    num_tasks = _base.check_num_tasks(num_tasks)

    def init_fn(params: _base.Params) -> _base.BalanceState:
        return _base.init_balance_state(num_tasks, params, init(_base.accumulator_dtype(params), params))

    def update_fn(
        updates: _base.TaskGrads,
        state: Any,
        params: _base.Params | None = None,
        *,
        losses: jax.Array | None = None,
        task_mask: jax.Array | None = None,
        task_finite: jax.Array | None = None,
        metric: _base.Params | None = None,
        **extra_args: Any,
    ) -> tuple[Any, Any]:
        if needs_gradients:
            _gramian.check_not_gramian(updates, name)
        if isinstance(updates, _gramian.Gramian):
            _check_gramian(updates, num_tasks)
        else:
            _base.check_task_grads(updates, num_tasks, params)
        metric = None if metric is None else check_metric(metric, updates, name)
        if needs_losses or losses is not None:
            _base.check_losses(losses, num_tasks, name, positive=positive_losses, task_mask=task_mask)
        if not jax.tree.leaves(updates):  # optax.partition gives every leaf to somebody else: nothing to balance
            return updates, state

        # A TPU, or a GPU with TF32, keeps a few digits of a float32 product only, unless it is asked for all: for the
        # rule it is, and the user's own function stays at the user's precision.
        if callable(extra_args.get("value_fn")):
            extra_args["value_fn"] = _at_present_precision(extra_args["value_fn"])

        def balance(gramian: jax.Array) -> tuple[Any, Any]:
            present, nonfinite = _base.present_tasks(jnp.diagonal(gramian), losses, task_mask, task_finite)
            gramian = jnp.where(jnp.outer(present, present), gramian, 0)
            of_present = None if losses is None else jnp.where(present, jnp.asarray(losses, gramian.dtype), 1)
            with jax.default_matmul_precision("highest"):
                weights, method_state = rule(
                    gramian,
                    state.method,
                    present=present,
                    losses=of_present,
                    params=params,
                    task_grads=updates,
                    metric=metric,
                    **extra_args,
                )
            weights = _within_range(jnp.where(present, weights, 0), gramian)
            return (
                _gramian.combine(weights, updates),
                _base.next_balance_state(state, weights, present, nonfinite, method_state),
            )

        if needs_gramian and needs_norms:
            return balance(_gramian.task_gramian(updates, metric))
        # In float16 the sum is kept within range: from it, one cannot tell whether all was finite.
        narrowed = any(leaf.dtype == jnp.float16 for leaf in jax.tree.leaves(updates))
        # The condition below costs a copy of the sum, which is more than reading a few tasks' gradients twice.
        few = num_tasks <= _FEW and not _deferred.is_deferred(updates)
        if needs_norms or narrowed or few or isinstance(updates, _gramian.Gramian):
            return balance(jnp.diag(_gramian.task_squared_norms(updates, metric)))
        combined, after = balance(jnp.eye(num_tasks, dtype=_base.accumulator_dtype(updates)))
        finite = jnp.isfinite(_gramian.task_squared_norms(jax.tree.map(lambda update: update[None], combined)))[0]
        # Of a task of weight zero the sum does not tell; where gradients are there, it costs little to look.
        if not _deferred.is_deferred(updates):
            finite &= jnp.all((after.task_weights != 0) | ~after.task_present)
        return lax.cond(
            finite, lambda: (combined, after), lambda: balance(jnp.diag(_gramian.task_squared_norms(updates, metric)))
        )

    return as_weighting(init_fn, update_fn, needs_gradients=needs_gradients)


def _within_range(weights: jax.Array, gramian: jax.Array) -> jax.Array:
    """`weights`, scaled down where the update would be so long that its square overflows (a loss of 1e-30, say)."""
    longest = 0.5 * math.sqrt(jnp.finfo(gramian.dtype).max)
    lengths = jnp.sqrt(jnp.maximum(jnp.diagonal(gramian), 0)) / longest
    return weights / jnp.maximum(jnp.sum(jnp.abs(weights) * lengths), 1).astype(weights.dtype)


def _at_present_precision(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, run at the matrix precision that is the default now, wherever it is called."""
    # What holds here, in a context too; jax.config makes its attributes at run time, so no type checker knows them.
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        with jax.default_matmul_precision(precision):
            return function(*args)

    return run


def check_weighting(inner: Any, method: str) -> Weighting:
    """Returns `inner`, which `method` wraps, if it is a `Weighting`; raises `ValueError` otherwise."""
    if not isinstance(inner, Weighting):
        raise ValueError(
            f"{method} acts on the weights of its inner method, and this one has none, or is wrapped itself: found "
            f"{inner!r}. Give it a weighting as it is, optax_mtl.mgda(num_tasks) say; put chains, "
            "per_task, shared_and_heads and optax.inject_hyperparams around the whole. (Methods that mix elementwise, "
            "like scale_by_mao, have no weights.)"
        )
    return inner


def init_inner(inner: Weighting, params: _base.Params, num_tasks: int, method: str) -> _base.BalanceState:
    """The first state of `inner`, which `method` wraps; raises `ValueError` if it is for another number of tasks."""
    state: Any = inner.init(params)
    if state.task_weights.shape != (num_tasks,):
        raise ValueError(
            f"{method} was built with num_tasks={num_tasks}, and its inner method with {state.task_weights.shape[0]}. "
            "Give both the same."
        )
    return state


def stochastic_weighting(
    name: str,
    num_tasks: int,
    rule: Rule,
    init: Callable[[jnp.dtype, _base.Params], Any] = lambda dtype, params: (),
) -> Weighting:
    """A `weighting` whose rule can look at gradients of other batches than those that it weights.

    `update` takes an extra argument `independent_grads`: the tasks' gradients on two more batches, a pair of trees like
    `task_grads`, or their cross-Gramian, as a `Gramian`. The rule is then given the cross-Gramian in place of the
    Gramian. A task whose gradient is not finite on one of them is absent for the step. (Where the method sees some of
    the leaves only, under `optax.partition` say, whole trees will do.)

    Args:
      name: as for `weighting`.
      num_tasks: as for `weighting`.
      rule: as for `weighting`.
      init: as for `weighting`.

    Returns:
      As `weighting` does.
    """

    def rule_apart(
        gramian: jax.Array, state: Any, *, present: jax.Array, cross_gramian: jax.Array, **kwargs: Any
    ) -> Any:
        cross = jnp.where(jnp.outer(present, present), cross_gramian.astype(gramian.dtype), 0)
        return rule(cross, state, present=present, **kwargs)

    together = weighting(name, num_tasks, rule, init)
    apart = weighting(name, num_tasks, rule_apart, init, needs_gramian=False)

    def update_fn(
        updates: _base.TaskGrads,
        state: Any,
        params: _base.Params | None = None,
        *,
        independent_grads: Any = None,
        task_finite: jax.Array | None = None,
        metric: _base.Params | None = None,
        **extra_args: Any,
    ) -> tuple[Any, Any]:
        extra_args |= {"metric": metric}
        if independent_grads is None or not jax.tree.leaves(updates):
            return together.update(updates, state, params, task_finite=task_finite, **extra_args)
        cross = cross_gramian(name, num_tasks, updates, params, independent_grads, metric)
        finite = jnp.isfinite(jnp.diagonal(cross))
        # What is left can still overflow where one task's gradient is huge in one batch, and another's in the other.
        finite &= jnp.all(jnp.isfinite(jnp.where(jnp.outer(finite, finite), cross, 0)), axis=1)
        finite = finite if task_finite is None else finite & task_finite
        return apart.update(updates, state, params, task_finite=finite, cross_gramian=cross, **extra_args)

    return as_weighting(together.init, update_fn, needs_gradients=False)


def cross_gramian(
    name: str,
    num_tasks: int,
    updates: _base.TaskGrads,
    params: _base.Params | None,
    independent_grads: Any,
    metric: _base.Params | None,
) -> jax.Array:
    """The cross-Gramian `(T, T)` of `independent_grads`, as `stochastic_weighting` describes them, after checks."""
    if isinstance(independent_grads, _gramian.Gramian):
        _check_gramian(independent_grads, num_tasks)
        return jnp.asarray(independent_grads.matrix)
    first, second = check_independent_grads(name, num_tasks, updates, params, independent_grads)
    metric = None if metric is None else check_metric(metric, updates, name)
    return _gramian.task_cross_gramian(first, second, metric)


def check_independent_grads(
    name: str, num_tasks: int, updates: _base.TaskGrads, params: _base.Params | None, independent_grads: Any
) -> tuple[_base.TaskGrads, _base.TaskGrads]:
    """Returns the leaves of both batches' gradients that are in `updates`; raises `ValueError` if any are amiss."""
    if not isinstance(independent_grads, tuple | list) or len(independent_grads) != 2:
        raise ValueError(
            f"{name}: independent_grads must be the tasks' gradients on two more batches: write\n"
            "    updates, opt_state = tx.update(task_grads, opt_state, params, independent_grads=(grads_1, grads_2))"
        )

    like, like_name = updates, "task_grads"
    if isinstance(updates, _gramian.Gramian):
        like, like_name = independent_grads[0], "independent_grads[0]"
    _base.check_task_grads(like, num_tasks, params, name=like_name)
    shapes = jax.tree.map(lambda g: np.broadcast_to(0, jnp.shape(g)[1:]), like)
    pair = []
    for i, grads in enumerate(independent_grads):
        pair.append(_leaves_as_in(like, like_name, grads, f"independent_grads[{i}]"))
        _base.check_task_grads(pair[i], num_tasks, shapes, name=f"independent_grads[{i}]")
    return pair[0], pair[1]


def check_metric(metric: _base.Params, updates: _base.TaskGrads, method: str) -> _base.Params:
    """Returns the leaves of `metric` that are the gradients'; raises `ValueError` if there is one of another shape."""
    if isinstance(updates, _gramian.Gramian):
        raise ValueError(
            f"{method} was given a Gramian, and a metric, which is for gradients. Leave it out, and compute the "
            "Gramian with optax_mtl.task_gramian(task_grads, metric)."
        )
    metric = _leaves_as_in(updates, "task_grads", metric, "metric")
    _gramian.check_metric_shapes(metric, updates)
    return metric


def _leaves_as_in(like: Any, like_name: str, grads: Any, name: str) -> Any:
    """`grads`, masked where `like` is; raises `ValueError` unless they then have the same leaves."""
    treedef: Any
    wanted, treedef = jax.tree_util.tree_flatten_with_path(like, is_leaf=_is_masked)
    found = dict(jax.tree_util.tree_leaves_with_path(grads))
    missing = [path for path, leaf in wanted if not _is_masked(leaf) and path not in found]
    surplus = [path for path in found if all(path[: len(start)] != start for start, _ in wanted)]
    for path in missing or surplus:
        has, lacks = (like_name, name) if missing else (name, like_name)
        where = jax.tree_util.keystr(path)
        raise ValueError(
            f"{name} must be a tree like {like_name}, but {has}{where} is not in {lacks}. Pass trees of the same "
            "structure."
        )
    return treedef.unflatten([leaf if _is_masked(leaf) else found[path] for path, leaf in wanted])


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _check_gramian(gramian: _gramian.Gramian, num_tasks: int) -> None:
    if jnp.shape(gramian.matrix) != (num_tasks, num_tasks):
        raise ValueError(
            f"Gramian has shape {jnp.shape(gramian.matrix)}, wanted ({num_tasks}, {num_tasks}). Compute it with "
            "optax_mtl.Gramian(optax_mtl.task_gramian(task_grads)), with the num_tasks of the method."
        )
