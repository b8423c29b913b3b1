"""The contract every part agrees on: the task axis, who takes part in a step, the shared state.

Axis 0 of every leaf of `task_grads` is the task axis, of length `num_tasks`; `losses` and `task_mask` are
`(num_tasks,)` in the same order. Whatever breaks that contract is refused here, in words that say what was
found, where, and what to write instead.
"""

from collections.abc import Callable
import functools
import numbers
import operator
from typing import Any, NamedTuple, TypeVar

import jax
from jax import numpy as jnp
import numpy as np
import optax

Params = optax.Params
TaskGrads = optax.Updates  # leaves (num_tasks, *param.shape), or a Gramian
State = TypeVar("State")
Scalar = float | jax.Array


class Bundle(NamedTuple):
    """What `bundle` returns: task gradients, and the other arguments of `update` by their names."""

    task_grads: TaskGrads
    extra_args: dict[str, Any]


class BalanceState(NamedTuple):
    """State of every balancing method.

    Attributes:
      task_weights: `(T,)` weights of the last step: the update was `sum_i task_weights[i] * grad_i`. For methods
        that mix elementwise, each task's share of the update. Zero for absent tasks, and before the first step.
      task_present: `(T,)` bool, the tasks that took part in the last step.
      nonfinite_count: `(T,)` int32, how often a task was set aside because its gradient or loss was not finite. A
        gradient counts as such from a norm of about 1e19 on, whose square overflows in float32, and so does a loss.
      method: what the method itself remembers; `()` if it is stateless. For methods that mix elementwise it has
        `block_weights` `(L, T)`, each task's share of the update of each leaf.
    """

    task_weights: jax.Array
    task_present: jax.Array
    nonfinite_count: jax.Array
    method: Any


def init_balance_state(num_tasks: int, params: Params, method: Any = ()) -> BalanceState:
    """State before the first step, with `method` as the method's own part."""
    return BalanceState(
        task_weights=jnp.zeros(num_tasks, accumulator_dtype(params)),
        task_present=jnp.ones(num_tasks, bool),
        nonfinite_count=jnp.zeros(num_tasks, jnp.int32),
        method=_own_buffers(method),
    )


def _own_buffers(state: Any) -> Any:
    """`state`, fit for donation: no array is in it twice, and its random keys are not the factory's or the user's."""
    seen: set[int] = set()

    def own(leaf: Any) -> Any:
        again, dtype = id(leaf) in seen, jnp.result_type(leaf)
        seen.add(id(leaf))
        is_key = jnp.issubdtype(dtype, jax.dtypes.prng_key) or dtype == jnp.uint32
        return jnp.copy(leaf) if again or is_key else leaf

    return jax.tree.map(own, state)


def next_balance_state(
    state: BalanceState, weights: jax.Array, present: jax.Array, nonfinite: jax.Array, method: Any
) -> BalanceState:
    """State after a step, with the dtypes it had before it: a jitted step is traced once, ever."""
    new = BalanceState(weights, present, state.nonfinite_count + nonfinite.astype(jnp.int32), method)
    return jax.tree.map(lambda n, old: n if n.dtype == old.dtype else n.astype(old.dtype), new, state)


def accumulator_dtype(tree: Any) -> jnp.dtype:
    """Dtype in which sums over `tree` are kept: float64 if any leaf has it, else float32."""
    wide = any(jnp.result_type(leaf) == jnp.float64 for leaf in jax.tree.leaves(tree))
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def zeros_of(params: Params, dtype: Any = None, *, lead: tuple[int, ...] = ()) -> Any:
    """Zeros `(*lead, *shape)` for every parameter, on the devices that hold it and sharded as it is.

    In float32 at least if there is no `dtype`.
    """

    def zeros(param: Any) -> jax.Array:
        like = jnp.zeros_like(param, dtype=dtype or accumulator_dtype(param))
        return jnp.broadcast_to(like, (*lead, *like.shape))

    return jax.tree.map(zeros, params)


def where_present(present: jax.Array, new: State, old: State) -> State:
    """Takes `new` for the tasks that took part and `old` for the others, on leaves with a leading task axis."""

    def select(n: jax.Array, o: jax.Array) -> jax.Array:
        return jnp.where(
            present.reshape((-1,) + (1,) * (n.ndim - 1)), n.astype(o.dtype) if n.dtype != o.dtype else n, o
        )

    selected: State = jax.tree.map(select, new, old)
    return selected


def copies(state: State, number: int) -> State:
    """The state `number` times, stacked along a new first axis, each with random keys of its own.

    The first keeps the keys there are. Keys are typed keys, or uint32 fields whose name has `key` or `rng` in it.
    """

    def stack(path: Any, leaf: Any) -> jax.Array:
        leaf, name = jnp.asarray(leaf), jax.tree_util.keystr(path[-1:]).lower()
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return _keys(leaf, number)
        if leaf.dtype == jnp.uint32 and ("key" in name or "rng" in name):
            return jax.random.key_data(_keys(jax.random.wrap_key_data(leaf), number))
        return jnp.broadcast_to(leaf, (number, *leaf.shape))

    stacked: State = jax.tree_util.tree_map_with_path(stack, state)
    return stacked


def _keys(key: jax.Array, number: int) -> jax.Array:
    # Not the keys that the first will split its own into.
    apart = jax.vmap(lambda one: jax.random.split(jax.random.fold_in(one, 2**31 - 1), number), out_axes=1)
    others = apart(key.reshape(-1)).reshape((number, *key.shape))
    return jnp.where((jnp.arange(number) == 0).reshape((-1,) + (1,) * key.ndim), key, others)


def equal_weights(present: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """One over the number of tasks that are present for each of them, zero for the others; `(T,)`."""
    return present.astype(dtype) / jnp.maximum(jnp.sum(present), 1).astype(dtype)


def preference_or(preference: Any, default: jax.Array, present: jax.Array) -> jax.Array:
    """The user's `preference` `(T,)` in the dtype of `default`, or `default` if it is None; zero for absent tasks."""
    chosen = default if preference is None else jnp.asarray(preference, default.dtype)
    return jnp.where(present, chosen, 0)


# -- Checks of a factory's arguments ---------------------------------------------------------------------------------


def check_static_int(name: str, value: Any, low: int, high: float = float("inf")) -> int:
    """Returns the int `value`, which shapes the program; raises `ValueError` if it is none, or out of `[low, high]`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(
            f"{name} must be a static int, found {value!r}. Under optax.inject_hyperparams, add it to static_args."
        )
    static = int(value)
    if not low <= static <= high:
        bound = f"at least {low}" if high == float("inf") else f"between {low} and {high:.0f}"
        raise ValueError(f"{name} must be {bound}, found {value}.")
    return static


def check_int(name: str, value: Any, low: int, high: float = float("inf")) -> Any:
    """As `check_static_int`, but an integer array (an injected hyper-parameter, say) will do, and is not read."""
    if isinstance(value, jax.Array) and value.ndim == 0 and jnp.issubdtype(value.dtype, jnp.integer):
        return value
    return check_static_int(name, value, low, high)


def check_num_tasks(num_tasks: int) -> int:
    """Returns `num_tasks` if it is an int of at least 1; raises `ValueError` otherwise."""
    return check_static_int("num_tasks", num_tasks, 1)


def check_task_index(name: str, index: int, num_tasks: int) -> Any:
    """Returns the task index `index` made non-negative; raises `ValueError` if there is no such task."""
    return check_int(name, index, -num_tasks, num_tasks - 1) % num_tasks


def primary_tasks(primary: Any, num_tasks: int) -> jax.Array:
    """Which tasks `primary` names, `(T,)` of bool; raises `ValueError` if it names none, or one that there is not.

    It may be an index, or several: a tuple, a list or an array `(n,)`, injected perhaps.
    """
    several = isinstance(primary, tuple | list) or np.ndim(primary) == 1
    named = list(primary) if several else [primary]
    if not named:
        raise ValueError("primary must be the index of a task, or a tuple of such, found none.")
    indices = [check_task_index("primary", each, check_num_tasks(num_tasks)) for each in named]
    return functools.reduce(operator.or_, [jnp.arange(num_tasks) == index for index in indices])


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises `ValueError` unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, found {value!r}.")


def check_number(name: str, value: Any, low: float, high: float = float("inf")) -> None:
    """Raises `ValueError` unless `low <= value <= high`, all of several; JAX arrays (injected, say) are not read."""
    if callable(value):
        raise ValueError(
            f"{name} must be a number, found the function {value!r}. For a schedule, wrap the factory: "
            f'optax.inject_hyperparams(factory, static_args="num_tasks")(num_tasks, {name}=schedule).'
        )
    known = isinstance(value, numbers.Real | list | tuple | np.ndarray)
    if known and not np.all((low <= np.asarray(value)) & (np.asarray(value) <= high)):
        bound = f"at least {low:g}" if high == float("inf") else f"between {low:g} and {high:g}"
        raise ValueError(f"{name} must be {bound}, found {value!r}.")


def check_task_vector(name: str, value: Any, num_tasks: int) -> None:
    """Raises `ValueError` unless `value` holds one number a task."""
    if np.shape(value) != (num_tasks,):
        raise ValueError(f"{name} must hold one number a task, shape ({num_tasks},), found shape {np.shape(value)}.")


def check_preference(preference: Any, num_tasks: int) -> None:
    """Raises `ValueError` unless `preference` is None or one number a task, none negative and not all zero."""
    if preference is None:
        return
    check_task_vector("preference", preference, num_tasks)
    if _is_known(preference) and not (np.all(np.asarray(preference) >= 0) and np.any(np.asarray(preference) > 0)):
        raise ValueError(f"preference must not be negative, nor zero for all tasks, found {preference!r}.")


# -- Checks of an update's arguments ---------------------------------------------------------------------------------


def check_task_grads(
    updates: TaskGrads,
    num_tasks: int,
    params: Params | None = None,
    *,
    single: bool = False,
    name: str = "task_grads",
) -> None:
    """Raises `ValueError` unless every leaf of `updates` is `(num_tasks, *param.shape)`.

    Args:
      updates: per-task gradients.
      num_tasks: length of the task axis.
      params: the parameters, if known; without them only the task axis itself can be checked.
      single: whether a task axis of length 1 will do too (a leaf that only one task reaches).
      name: what the gradients are called, for messages.
    """
    if isinstance(params, optax.LookaheadParams):
        raise ValueError(
            "A balancing method was given fast and slow parameters, and has gradients of the fast ones only: "
            "optax.lookahead goes around the whole chain,\n"
            "    tx = optax.lookahead(optax_mtl.unbundle(optax.chain(method, optimiser)), sync_period, slow_step_size)"
        )
    if isinstance(updates, Bundle):
        raise ValueError(
            f"{name} come in a bundle with other arguments, and the optimiser does not take these apart: wrap the "
            "whole of it, tx = optax_mtl.unbundle(tx)."
        )
    leaves = jax.tree_util.tree_leaves_with_path(updates)
    if params is not None:
        shapes = [jnp.shape(p) for p in jax.tree.leaves(params)]
        if len(shapes) != len(leaves):
            raise ValueError(
                f"{name} has {len(leaves)} leaves but params has {len(shapes)}: pass the gradients and the "
                "parameters as trees of the same structure."
            )
    for i, (path, leaf) in enumerate(leaves):
        found = jnp.shape(leaf)
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} has dtype {jnp.result_type(leaf)}, wanted floating point. "
                "(Optimise the real and imaginary parts of complex parameters: optax.contrib.split_real_and_imaginary.)"
            )
        shape = shapes[i] if params is not None else found[1:]
        if found == (num_tasks, *shape) or (single and found == (1, *shape)):
            continue
        where = jax.tree_util.keystr(path)
        wanted = (num_tasks, *shape) if params is not None else f"({num_tasks}, *param.shape)"
        if params is not None and found == shape:
            why = "This is an ordinary gradient, without the task axis: compute"
        elif params is not None and found[1:] == shape:
            why = f"The task axis has length {found[0]}, but the method was built with num_tasks={num_tasks}; compute"
        else:
            why = "Balancing methods take one gradient a task, stacked along axis 0: compute"
        raise ValueError(
            f"{name}{where} has shape {found}, wanted {wanted}. {why} them with\n"
            "    losses, task_grads = optax_mtl.value_and_task_grads(loss_fn)(params, batch)\n"
            "or stack your own with optax_mtl.stack_task_grads([grads_of_task_0, ...]), and put the balancing method "
            "before every other transformation in optax.chain (or wrap those in optax_mtl.per_task). optax.MultiSteps "
            "comes after it too; to accumulate the tasks' own gradients, wrap the whole chain in "
            "optax_mtl.multi_steps(chain, num_tasks, every)."
        )


def check_losses(
    losses: Any, num_tasks: int, method: str, *, positive: bool = False, task_mask: jax.Array | None = None
) -> None:
    """Raises `ValueError` unless `losses` is `(num_tasks,)` and, if `positive`, none of a present task is negative.

    Values are looked at only where they are known: outside jit. A loss that is not finite is no error here.
    """
    if losses is None:
        raise ValueError(
            f"{method} needs the tasks' losses: write\n"
            "    updates, opt_state = tx.update(task_grads, opt_state, params, losses=losses)"
        )
    if getattr(losses, "shape", None) != (num_tasks,):
        raise ValueError(
            f"{method}: losses must be one array of shape ({num_tasks},), in the order of the task axis, found "
            f"{_describe(losses)}. optax_mtl.value_and_task_grads returns it so."
        )
    check_task_mask(task_mask, num_tasks)
    if not positive or not _is_known(losses) or not _is_known(task_mask):
        return
    known = np.asarray(losses)  # NumPy: inside jit, JAX would trace a comparison of constants too
    negative = np.isfinite(known) & (known < 0) & (True if task_mask is None else np.asarray(task_mask, bool))
    if np.any(negative):
        i = int(np.argmax(negative))
        raise ValueError(
            f"{method} needs losses that are not negative, but losses[{i}] = {known[i]:.6g}. "
            "Shift that loss so that its minimum is zero, or choose a method that does not look at the losses."
        )


def check_kpis(kpis: Any, num_tasks: int, method: str, present: jax.Array) -> None:
    """Raises `ValueError` unless `kpis` is `(num_tasks,)` and none of a present task is outside [0, 1].

    Values are looked at only where they are known: outside jit. A KPI that is not finite is no error here.
    """
    if kpis is None:
        raise ValueError(
            f"{method} needs a key performance indicator of each task (an accuracy, say), in (0, 1): write\n"
            "    updates, opt_state = tx.update(task_grads, opt_state, params, kpis=kpis)"
        )
    if getattr(kpis, "shape", None) != (num_tasks,):
        raise ValueError(
            f"{method}: kpis must be one array of shape ({num_tasks},), in the order of the task axis, found "
            f"{_describe(kpis)}."
        )
    if not _is_known(kpis) or not _is_known(present):
        return
    known = np.asarray(kpis)
    outside = np.isfinite(known) & ((known < 0) | (known > 1)) & np.asarray(present)
    if np.any(outside):
        i = int(np.argmax(outside))
        raise ValueError(
            f"{method} needs key performance indicators in (0, 1), but kpis[{i}] = {known[i]:.6g}. Bring that metric "
            "to an interval where 1 is perfect: a percentage over 100, one minus an error rate."
        )


def check_task_mask(task_mask: Any, num_tasks: int) -> None:
    """Raises `ValueError` unless `task_mask` is None or `(num_tasks,)`."""
    if task_mask is not None and getattr(task_mask, "shape", None) != (num_tasks,):
        raise ValueError(
            f"task_mask must have shape ({num_tasks},), one bool a task (True: it has labels in this batch), found "
            f"{_describe(task_mask)}."
        )


def _is_known(value: Any) -> bool:
    return not isinstance(value, jax.core.Tracer) and getattr(value, "is_fully_addressable", True)


def _describe(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return f"shape {shape}" if shape is not None else f"a {type(value).__name__}"


def check_params(params: Params | None, method: str) -> None:
    """Raises `ValueError` if `params` was not given."""
    if params is None:
        raise ValueError(
            f"{method} needs the parameters: write\n    updates, opt_state = tx.update(task_grads, opt_state, params)"
        )


def check_value_fn(
    params: Params | None, value_fn: Callable[[Params], Any] | None, method: str
) -> tuple[Params, Callable[[Params], Any]]:
    """Returns what a method needs to look at validation losses; raises `ValueError` if it was not given."""
    if params is None or value_fn is None:
        raise ValueError(
            f"{method} looks at the losses of validation data and needs the parameters and these losses as a function "
            "of them: write\n"
            "    updates, opt_state = tx.update(task_grads, opt_state, params,\n"
            "                                   value_fn=lambda params: loss_fn(params, validation_batch))"
        )
    return params, value_fn


# -- Who takes part --------------------------------------------------------------------------------------------------


def present_tasks(
    squared_norms: jax.Array,
    losses: jax.Array | None,
    task_mask: jax.Array | None,
    task_finite: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Which tasks take part in this step, and which would have, had they been finite.

    Args:
      squared_norms: `(T,)` squared gradient norms; not finite where any entry of that task's gradient is not, or
        where the square overflows (norms above 1e19 in float32).
      losses: `(T,)`, or None; not finite too where the square overflows, which means of a run would keep for long.
      task_mask: `(T,)` of bool, False for tasks without labels in this batch; None for all True.
      task_finite: `(T,)` of bool, False for tasks already known not to be finite; None for all True.

    Returns:
      `(present, nonfinite)`, both `(T,)` of bool.
    """
    check_task_mask(task_mask, squared_norms.shape[0])
    finite = jnp.isfinite(squared_norms)
    if losses is not None:
        finite &= jnp.isfinite(jnp.square(jnp.asarray(losses).astype(accumulator_dtype(losses))))
    if task_finite is not None:
        finite &= task_finite
    if task_mask is None:
        return finite, ~finite
    mask = jnp.asarray(task_mask).astype(bool)
    return finite & mask, ~finite & mask


def masked_softmax(x: jax.Array, present: jax.Array) -> jax.Array:
    """The softmax of `x` `(T,)` over the tasks that are present; without any of them it means nothing."""
    return jax.nn.softmax(x, where=present | ~jnp.any(present))


def as_key(method: str, key: jax.Array | int | None) -> jax.Array:
    """A random key from a key or a seed; raises `ValueError` if there is none."""
    if key is None:
        raise ValueError(f"{method} is random: give it a key or a seed, {method}(num_tasks, key=0).")
    is_seed = jnp.ndim(key) == 0 and jnp.issubdtype(jnp.result_type(key), jnp.integer)
    return jax.random.key(key) if is_seed else jnp.asarray(key)


def draw_orders(order: str, key: jax.Array | None, num_tasks: int) -> tuple[jax.Array, jax.Array | None]:
    """In which order each task visits the tasks, in methods that go from one to another.

    Args:
      order: `"per_task"`, an independent random order for each task; or `"shared"`, one for all.
      key: random key; None for the fixed order `0, 1, ...`.
      num_tasks: `T`.

    Returns:
      `(orders, key)`: `(T, T)` of int, a row a task, and the key of the next step.
    """
    orders = jnp.broadcast_to(jnp.arange(num_tasks), (num_tasks, num_tasks))
    if key is None:
        return orders, None
    key, now = jax.random.split(key)
    if order == "shared":
        return jnp.broadcast_to(jax.random.permutation(now, num_tasks), orders.shape), key
    return jax.random.permutation(now, orders, axis=1, independent=True), key
