"""A run whose tasks change: the state of an optimiser for some tasks, made into one for more of them, or fewer."""

from collections.abc import Sequence
import itertools
from typing import Any

import jax
from jax import numpy as jnp
import numpy as np
import optax

# Arrays `(..., B, T)` of `blockwise`, the mixers and `monitor`: their axis of blocks is no axis of tasks.
_OF_BLOCKS = (".block_weights", ".shares", ".update_cosines")


def change_tasks(
    opt_state: Any, tx: optax.GradientTransformation, params: optax.Params, tasks: Sequence[int | None] | None = None
) -> Any:
    """Adds tasks to a run, or takes some away: the state goes on for those that stay, and begins for the new ones.

    What the state holds for each task (weights, means of losses, counts, the moments of `per_task`, whatever stands
    where in a chain) is kept for the tasks that stay, and is what `tx.init(params)` gives for new ones; what it holds
    of pairs of tasks is kept for pairs that stay. All the rest is kept as it is: the moments of the optimiser behind,
    random keys, step counts, injected hyper-parameters. For parameters that are new, a head say, it begins as well.

    Which axes are axes of tasks is not guessed from names: those whose length differs between the two states. So the
    number of tasks has to change; to put a task in the place of another, add it first and take the other away then.

    Args:
      opt_state: the state of the run so far, of `T` tasks.
      tx: the transformation for the new number of tasks; otherwise like that of the run so far.
      params: the parameters from now on, with those of new tasks' heads.
      tasks: for each task from now on, the index it has had, or None for a new one. By default all tasks stay where
        they are and the new ones follow. Where losses are a dict, tasks are in the order of its sorted keys: a new task
        may well come first, `(None, 0, 1)`. `(0, 2)` takes the second of three away.

    Returns:
      The state for `tx`. Its arrays may be those of `opt_state`.

    Raises:
      ValueError: if the number of tasks is the same; if `tasks` does not fit it; if the states differ in anything else
        than their tasks and new parameters.

    Example:
      >>> import jax.numpy as jnp, optax, optax_mtl as mtl
      >>> make = lambda num_tasks: optax.chain(mtl.dwa(num_tasks, steps_per_epoch=1), optax.adam(1e-3))
      >>> params = {"w": jnp.ones(2)}
      >>> _, opt_state = make(2).update({"w": jnp.eye(2)}, make(2).init(params), params, losses=jnp.array([3.0, 5.0]))
      >>> opt_state = mtl.change_tasks(opt_state, make(3), params, tasks=(0, None, 1))
      >>> optax.tree.get(opt_state, "task_weights").tolist(), optax.tree.get(opt_state, "epochs").tolist()
      ([1.0, 0.0, 1.0], [1, 0, 1])

    Note:
      New parameters have fresh moments under the optimiser's old step count, with which Adam's bias correction is over:
      its first steps for them are up to `(1 - b1) / sqrt(1 - b2)`, about three times, as long as at the start of a run.
    """
    fresh = tx.init(params)
    old = dict(jax.tree_util.tree_leaves_with_path(opt_state))
    treedef: Any
    new, treedef = jax.tree_util.tree_flatten_with_path(fresh)
    before, after = _numbers_of_tasks(old, new)
    if tasks is None:
        tasks = (*range(min(before, after)), *[None] * (after - before))
    stay = [task for task in tasks if task is not None]
    if len(tasks) != after or len(set(stay)) != len(stay) or not all(0 <= task < before for task in stay):
        raise ValueError(
            f"change_tasks: tasks must have one entry for each of the {after} tasks from now on, the index it has had "
            f"among the {before} so far, each at most once, or None. Found {tuple(tasks)}."
        )
    _check_paths(set(old), {path for path, _ in new}, tasks, before)
    along = _indices(before, tasks)
    return treedef.unflatten([_merge(path, old[path], leaf, along) if path in old else leaf for path, leaf in new])


def _numbers_of_tasks(old: dict[Any, Any], new: list[tuple[Any, Any]]) -> tuple[int, int]:
    changed = [(path, _changed(old[path], leaf)) for path, leaf in new if path in old]
    weights = [pairs for path, pairs in changed if jax.tree_util.keystr(path).endswith(".task_weights")]
    found = [pair for pairs in weights or [pairs for _, pairs in changed] for pair in pairs.values()]
    if not found:
        raise ValueError(
            "change_tasks: the state has as many tasks as that of `tx`, or none at all. Build `tx` for the number of "
            "tasks from now on. To put a task in the place of another, add it first, and take the other away then."
        )
    return min(found)  # of pairs of tasks there are at least as many


def _changed(old: Any, new: Any) -> dict[int, tuple[int, int]]:
    """The axes along which two arrays differ, with both lengths."""
    pairs = zip(jnp.shape(old), jnp.shape(new), strict=False)
    return {axis: lengths for axis, lengths in enumerate(pairs) if lengths[0] != lengths[1]}


def _check_paths(old: set[Any], new: set[Any], tasks: Sequence[int | None], before: int) -> None:
    """Raises `ValueError` if leaves come or go without tasks that do, or in a list of which the middle changes."""
    stay = [task for task in tasks if task is not None]
    in_front = list(tasks[: len(stay)]) == list(range(len(stay)))
    for paths, others, may_differ, what in (
        (old - new, new, len(stay) < before, "is no longer there, though all tasks stay"),
        (new - old, old, len(stay) < len(tasks), "was not there before, though no task is new"),
    ):
        starts = {other[:length] for other in others for length in range(len(other) + 1)}
        for path in paths:
            where = jax.tree_util.keystr(path)
            if not may_differ:
                raise ValueError(
                    f"change_tasks: the state at {where} {what}. Build `tx` as before, but for the number of tasks; "
                    "parameters are those from now on."
                )
            parting = next(path[length - 1] for length in range(1, len(path) + 1) if path[:length] not in starts)
            if isinstance(parting, jax.tree_util.SequenceKey) and not in_front:
                raise ValueError(
                    f"change_tasks: at {where} a list or tuple has changed its length, and it cannot be told which of "
                    "its entries are which. Keep heads in a dict by name; or let the tasks that stay come first, in "
                    f"the order they had; found tasks={tuple(tasks)}."
                )


def _indices(before: int, tasks: Sequence[int | None]) -> dict[tuple[int, int], tuple[list[int], list[int]]]:
    """For an axis of tasks, or of pairs of tasks, by its lengths: what stays, and where it is from now on."""
    number = {pair: k for k, pair in enumerate(itertools.combinations_with_replacement(range(before), 2))}
    pairs = [sorted(t for t in pair if t is not None) for pair in itertools.combinations_with_replacement(tasks, 2)]
    tasks_stay = [(task, i) for i, task in enumerate(tasks) if task is not None]
    pairs_stay = [(number[pair[0], pair[1]], i) for i, pair in enumerate(pairs) if len(pair) == 2]

    def columns(entries: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
        return [entry[0] for entry in entries], [entry[1] for entry in entries]

    return {(len(number), len(pairs)): columns(pairs_stay), (before, len(tasks)): columns(tasks_stay)}


def _merge(path: Any, old: Any, new: Any, along: dict[tuple[int, int], tuple[list[int], list[int]]]) -> Any:
    name, changed = jax.tree_util.keystr(path), _changed(old, new)
    blocks = jnp.ndim(new) - 2 if name.endswith(_OF_BLOCKS) else None
    same_kind = jnp.ndim(old) == jnp.ndim(new) and jnp.result_type(old) == jnp.result_type(new)
    if not same_kind or blocks in changed or any(lengths not in along for lengths in changed.values()):
        raise ValueError(
            f"change_tasks: the state at {name} is {_describe(old)}, and would be {_describe(new)}, which is another "
            "change than one of the number of tasks. Build `tx` as before, but for that number. (Where heads are "
            "blocks of `blockwise` or `monitor`, put `shared_and_heads` around it: new ones would be new blocks.)"
        )
    if not changed:
        return old
    stay, places = (np.ix_(*[along[lengths][side] for lengths in changed.values()]) for side in (0, 1))
    axes = {axis: k for k, axis in enumerate(changed)}

    def index(open_mesh: Any) -> tuple[Any, ...]:
        return tuple(open_mesh[axes[axis]] if axis in axes else slice(None) for axis in range(jnp.ndim(new)))

    return jnp.asarray(new).at[index(places)].set(jnp.asarray(old)[index(stay)])


def _describe(leaf: Any) -> str:
    return f"{jnp.result_type(leaf)}{jnp.shape(leaf)}"
