"""A dry run of a whole optimiser, for mistakes that no single transformation in it can see."""

from typing import Any

import jax
from jax import numpy as jnp
import optax

from optax_mtl import _base


def checked(
    tx: optax.GradientTransformation, num_tasks: int, **extra_args: Any
) -> optax.GradientTransformationExtraArgs:
    """Refuses an optimiser that mixes up tasks and parameters, before the first step.

    A balancing method sees only what it is handed. It cannot see that `optax.adam` stands before it in the chain (and
    keeps one moment for all tasks), nor that `optax.masked` lets the task axis of a leaf through to the parameters,
    where `optax.apply_updates` broadcasts it. Wrapped around the whole chain, `checked` sees both: `init` runs one
    update on shapes alone, without arithmetic, and every `update` is checked again when it is traced. It adds nothing
    to the compiled program.

    Args:
      tx: the whole optimiser: it takes task gradients and returns updates for the parameters.
      num_tasks: number of tasks `T`.
      **extra_args: for the dry run, whatever `tx` needs beside `losses` and `value_fn`: an example of the `value` of
        `optax.contrib.reduce_on_plateau`, say.

    Returns:
      `tx`, checked; the state is that of `tx`.

    Raises:
      ValueError: if the updates are not shaped like the parameters, or the state changes its shape in an update; it
        names the leaf and the remedy. Errors that the update raises by itself have a note with the order to write.

    Example:
      >>> import jax.numpy as jnp, optax, optax_mtl as mtl
      >>> tx = mtl.checked(optax.chain(optax.adam(1e-3), mtl.mgda(2)), num_tasks=2)
      >>> tx.init({"w": jnp.zeros(3)})  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      ...
      ValueError: The optimiser's state at ...mu['w'] is (3,) before an update and (2, 3) after it: ...
    """
    num_tasks = _base.check_num_tasks(num_tasks)
    tx = optax.with_extra_args_support(tx)

    def init_fn(params: _base.Params) -> Any:
        state = tx.init(params)
        if jax.tree.leaves(params):
            task_grads = jax.tree.map(
                lambda p: jax.ShapeDtypeStruct((num_tasks, *jnp.shape(p)), jnp.result_type(p)), params
            )
            losses = jax.ShapeDtypeStruct((num_tasks,), _base.accumulator_dtype(task_grads))

            def dry_run(task_grads: Any, state: Any, params: Any, losses: Any) -> Any:
                value_fn = lambda _: losses  # noqa: E731
                return tx.update(task_grads, state, params, **{"losses": losses, "value_fn": value_fn, **extra_args})

            try:
                updates, after = jax.eval_shape(dry_run, task_grads, state, params, losses)
            except Exception as error:
                error.add_note(_NOTE)
                raise
            _check_shapes(updates, params, state, after)
        return state

    def update_fn(
        updates: _base.TaskGrads, state: Any, params: _base.Params | None = None, **update_args: Any
    ) -> tuple[Any, Any]:
        _base.check_task_grads(updates, num_tasks, params, single=True)
        try:
            balanced, after = tx.update(updates, state, params, **update_args)
        except Exception as error:
            error.add_note(_NOTE)
            raise
        _check_shapes(balanced, params, state, after)
        return balanced, after

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


# Others' errors, of `lax.cond` say, name no order.
_NOTE = (
    "This was raised in an update of an optimiser in optax_mtl.checked. The order to write is\n"
    "    optax.chain(optax_mtl.per_task(clipping, num_tasks), method, optax.apply_if_finite(optimiser, 5))\n"
    "with what acts on each task's gradient in per_task, and what wraps an optimiser (optax.apply_if_finite, "
    "optax.MultiSteps) around what stands behind the method. To accumulate the tasks' gradients, wrap the whole chain "
    "in optax_mtl.multi_steps; optax.lookahead goes around checked. If the optimiser needs extra arguments, give "
    "examples of them: optax_mtl.checked(tx, num_tasks, value=0.0)."
)


def _check_shapes(updates: Any, params: Any, before: Any, after: Any) -> None:
    if jax.tree.structure(before) != jax.tree.structure(after):
        raise ValueError(
            f"The optimiser's state is {jax.tree.structure(before)} before an update and "
            f"{jax.tree.structure(after)} after it: an update must keep its structure."
        )
    for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True):
        if jnp.shape(old) != jnp.shape(new):
            raise ValueError(
                f"The optimiser's state at {jax.tree_util.keystr(path)} is {jnp.shape(old)} before an update and "
                f"{jnp.shape(new)} after it: a transformation that keeps state for each parameter is fed one gradient "
                "a task. If it stands before the balancing method, put it after that, or wrap it: "
                "optax_mtl.per_task(optax.scale_by_adam(), num_tasks). If it stands after, optax.masked or "
                "optax.partition has let this leaf past the balancing method: give it optax_mtl.sum_tasks, or use "
                "optax_mtl.shared_and_heads."
            )
    if params is None:
        return
    for (path, param), update in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(updates), strict=True
    ):
        if jnp.shape(param) != jnp.shape(update):
            raise ValueError(
                f"The update of params{jax.tree_util.keystr(path)} has shape {jnp.shape(update)}, wanted "
                f"{jnp.shape(param)}: the task axis was not collapsed. optax.masked and optax.partition let the leaves "
                "that a balancing method does not see through unchanged; give those leaves optax_mtl.sum_tasks, or "
                "use optax_mtl.shared_and_heads."
            )
