"""From a function that returns every task's loss to one gradient a task."""

from collections.abc import Callable, Sequence
import functools
import operator
from typing import Any

import chex
import jax
from jax import lax, numpy as jnp
from jax.extend import core

from optax_mtl import _base, _split, _xla

_STRATEGIES = ("auto", "unroll", "loop", "vmap")
_UNROLL = 32  # tasks; beyond, compile time and memory speak for the loop


def value_and_task_grads(
    loss_fn: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    strategy: str = "auto",
) -> Callable[..., tuple[Any, _base.TaskGrads]]:
    """Losses and gradients of all tasks, as `jax.value_and_grad` gives those of one.

    The forward pass runs once and is pulled back once a task: with a backward pass twice the cost of a forward one, the
    floor is `(1 + 2T) / 3` of an ordinary training step. (Weightings can do without the gradients, for less:
    `value_and_light_grads`.)

    Args:
      loss_fn: returns the tasks' losses, as an array `(T,)` or as any pytree of scalars (a dict of named losses, say),
        and also auxiliary data if `has_aux`; or what `split` returned, whose heads are pulled back once each.
      argnums: which positional arguments to differentiate with respect to.
      has_aux: whether `loss_fn` returns `(losses, aux)`. (Do not forget it: a pair is a pytree, and a scalar in it
        would count as one more task.)
      strategy: how the `T` pullbacks run, all in one program. `"unroll"`: one after another, written out; of losses
        given as a pytree, each is pulled back through its own head only. `"loop"`: one after another in a `lax` loop;
        the least memory and compile time, but every head is pulled back for every task. `"vmap"`: at once, batched.
        `"auto"`: `"vmap"`, but on CPU, where it is slower unless there are loops in the program, `"unroll"` up to 32
        tasks and then `"loop"`. (A CPU, that is, as JAX's default when the step is traced. To compile on a CPU for
        other devices, say `"vmap"`.)

    Returns:
      A function of `loss_fn`'s arguments that returns `(losses, task_grads)`, or `((losses, aux), task_grads)`:
      `losses` an array `(T,)` whatever `loss_fn` returns, in the order that `task_names` tells; `task_grads` like the
      argument (a tuple for several `argnums`), with leaves `(T, *shape)`.

    Raises:
      ValueError: if the losses are not scalars or one array `(T,)`, or an argument to differentiate has leaves that are
        not floating-point arrays.

    Example:
      >>> import jax.numpy as jnp, optax_mtl as mtl
      >>> loss_fn = lambda w, x: {"cube": jnp.sum(w**3) * x, "square": jnp.sum(w**2)}
      >>> mtl.value_and_task_grads(loss_fn)(jnp.array([1.0, 2.0]), 2.0)
      (Array([18.,  5.], dtype=float32), Array([[ 6., 24.],
             [ 2.,  4.]], dtype=float32))
    """
    _base.check_choice("strategy", strategy, _STRATEGIES)
    if isinstance(loss_fn, _split.Split):
        check_split_arguments(argnums)
        return functools.partial(_split_value_and_task_grads, loss_fn, has_aux, strategy)

    @functools.wraps(loss_fn)
    def value_and_task_grads_fn(*args: Any, **kwargs: Any) -> tuple[Any, _base.TaskGrads]:
        inputs, losses_of = differentiated(loss_fn, argnums, has_aux, args, kwargs)
        out, pushforward, aux = jax.linearize(losses_of, *inputs, has_aux=True)
        losses = stack_losses(out)
        grads = _pull_back_each(pushforward, inputs, out, strategy)
        value = (losses, aux) if has_aux else losses
        return value, grads if isinstance(argnums, Sequence) else grads[0]

    return value_and_task_grads_fn


def _split_value_and_task_grads(
    loss_fn: _split.Split, has_aux: bool, strategy: str, params: Any, batch: Any
) -> tuple[Any, _base.TaskGrads]:
    check_split_parameters(loss_fn, params)
    if loss_fn.own_inputs:
        parts = loss_fn.with_own_inputs(params, batch, has_aux)
        stacked = parts.cotangents
    else:
        features, pullback, rest = jax.vjp(lambda trunk: loss_fn.features(trunk, batch), params["trunk"], has_aux=True)
        parts = loss_fn.through_heads(features, rest, params, batch, has_aux)
        (stacked,) = pull_back_all(pullback, parts.cotangents, strategy)
    grads = {"trunk": stacked, "heads": jax.tree.map(lambda g: g[None], parts.head_grads)}
    return (parts.losses, parts.aux) if has_aux else parts.losses, grads


def check_split_parameters(loss_fn: _split.Split, params: Any) -> None:
    """Raises `ValueError` unless `params` are those of the split loss, and floating-point arrays."""
    loss_fn.check(params)
    _check_differentiable((params,))


def check_split_arguments(argnums: int | Sequence[int]) -> None:
    """Raises `ValueError` unless `argnums` is the parameters of a split loss."""
    if argnums != 0:
        raise ValueError(f"A split loss is differentiated with respect to its parameters, argnums=0; found {argnums}.")


def differentiated(
    loss_fn: Callable[..., Any], argnums: int | Sequence[int], has_aux: bool, args: tuple[Any, ...], kwargs: Any
) -> tuple[tuple[Any, ...], Callable[..., tuple[Any, Any]]]:
    """The arguments that `argnums` names, and the function of these alone that returns losses and auxiliary data.

    Raises:
      ValueError: if there is no such argument, or one with leaves that are not floating-point arrays.
    """
    nums = tuple(argnums) if isinstance(argnums, Sequence) else (operator.index(argnums),)
    if max(nums) >= len(args):
        raise ValueError(
            f"value_and_task_grads: argnums={argnums} asks for argument {max(nums)}, but {len(args)} positional "
            "arguments were given: pass what to differentiate with respect to by position."
        )
    inputs = tuple(args[i] for i in nums)
    _check_differentiable(inputs)

    def losses_of(*inputs: Any) -> tuple[Any, Any]:
        full = list(args)
        for i, value in zip(nums, inputs, strict=True):
            full[i] = value
        out = loss_fn(*full, **kwargs)
        return out if has_aux else (out, None)

    return inputs, losses_of


def _pull_back_each(pushforward: Callable[..., Any], inputs: tuple[Any, ...], out: Any, strategy: str) -> Any:
    """The gradients of all losses, stacked; `pushforward` is linear from tangents of `inputs` to tangents of `out`."""
    losses = jax.eval_shape(stack_losses, out)
    pullback = jax.linear_transpose(lambda *tangents: stack_losses(pushforward(*tangents)), *inputs)
    one_hots = jnp.eye(losses.shape[0], dtype=losses.dtype)
    if _fastest(strategy, pullback, one_hots) != "unroll" or jax.tree.leaves(out)[0].ndim == 1:
        return pull_back_all(pullback, one_hots, strategy)

    # Transposing towards one loss alone leaves out what does not lead to it; a one-hot cotangent for all of them would
    # pull zeros back through every other head.
    def pull_back(task: int) -> Any:
        def loss_tangent(*tangents: Any) -> jax.Array:
            return jax.tree.leaves(pushforward(*tangents))[task]

        one = jnp.ones((), jax.eval_shape(loss_tangent, *inputs).dtype)
        return jax.linear_transpose(loss_tangent, *inputs)(one)

    return stack_task_grads([pull_back(task) for task in range(losses.shape[0])])


def pull_back_all(pullback: Callable[[Any], Any], cotangents: Any, strategy: str = "auto") -> Any:
    """What `pullback` makes of each of the cotangents, leaves `(T, ...)`, stacked in the same way."""
    strategy = _fastest(strategy, pullback, cotangents)
    if strategy == "vmap":
        _xla.warn_if_batching_is_wrong('strategy="vmap"')
        return jax.vmap(pullback)(cotangents)
    if strategy == "loop":
        return lax.map(pullback, cotangents)
    leaves, treedef = jax.tree.flatten(cotangents)
    return stack_task_grads([pullback(treedef.unflatten(one)) for one in zip(*leaves, strict=True)])


def _fastest(strategy: str, pullback: Callable[[Any], Any], cotangents: Any) -> str:
    if strategy != "auto":
        return strategy
    if jax.default_backend() != "cpu":
        return "vmap"
    # On a CPU large products are slower in a batch. But in a loop the products are small, and its iterations expensive.
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), cotangents)
    if not _xla.batching_is_wrong() and _has_loop(jax.make_jaxpr(pullback)(one).jaxpr):
        return "vmap"
    return "unroll" if jax.tree.leaves(cotangents)[0].shape[0] <= _UNROLL else "loop"


def _has_loop(jaxpr: core.Jaxpr) -> bool:
    for eqn in jaxpr.eqns:
        inner = eqn.params.get("jaxpr")
        if eqn.primitive.name == "while" or (
            eqn.primitive.name == "scan" and eqn.params["unroll"] < eqn.params["length"]
        ):
            return True
        if inner is not None and _has_loop(getattr(inner, "jaxpr", inner)):
            return True
    return False


def stack_task_grads(task_grads: Sequence[chex.ArrayTree]) -> _base.TaskGrads:
    """Stacks the gradients of the tasks, one tree each, along a new leading axis.

    Args:
      task_grads: `T` trees of the same structure, leaves `(*shape)`.

    Returns:
      One tree, leaves `(T, *shape)`.

    Raises:
      ValueError: if there are none, or their structures or shapes differ.

    Example:
      >>> import jax.numpy as jnp, optax_mtl as mtl
      >>> mtl.stack_task_grads([{"w": jnp.array([1.0])}, {"w": jnp.array([2.0])}])
      {'w': Array([[1.],
             [2.]], dtype=float32)}
    """
    if not task_grads:
        raise ValueError("stack_task_grads needs the gradients of at least one task, found none.")
    first = jax.tree.structure(task_grads[0])
    for i, tree in enumerate(task_grads):
        if jax.tree.structure(tree) != first:
            raise ValueError(
                f"stack_task_grads: the gradients of task {i} have the structure {jax.tree.structure(tree)}, those of "
                f"task 0 have {first}. Differentiate every loss with respect to the same parameters; where a task "
                "does not reach a leaf its gradient is zeros."
            )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *task_grads)


def stack_losses(losses: Any) -> jax.Array:
    """The tasks' losses as one array `(T,)`.

    Args:
      losses: an array `(T,)`, or any pytree of scalars.

    Returns:
      `(T,)`, in the order of the tree's leaves.

    Raises:
      ValueError: if a leaf is not a scalar.
    """
    leaves = jax.tree_util.tree_leaves_with_path(losses)
    if len(leaves) == 1 and jnp.ndim(leaves[0][1]) == 1:
        return leaves[0][1]
    for path, leaf in leaves:
        if jnp.ndim(leaf) != 0:
            raise ValueError(
                f"The loss at losses{jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)}, wanted a scalar: return "
                "one array (num_tasks,) or a pytree of scalars, each reduced over its batch (jnp.mean)."
            )
    if not leaves:
        raise ValueError("loss_fn returned no losses: return an array (num_tasks,) or a pytree of scalars.")
    arrays = [jnp.asarray(leaf) for _, leaf in leaves]
    dtype = arrays[0].dtype if len({a.dtype for a in arrays}) == 1 else _base.accumulator_dtype(arrays)
    return jnp.stack([a.astype(dtype) for a in arrays])


def losses_at(value_fn: Callable[[_base.Params], Any], params: _base.Params, num_tasks: int, method: str) -> jax.Array:
    """The losses `(T,)` that `value_fn` gives for `params`; raises `ValueError` if they are not those of all tasks."""
    losses = stack_losses(value_fn(params))
    if losses.shape != (num_tasks,):
        raise ValueError(
            f"{method}: value_fn returned {losses.shape[0]} losses, wanted those of all {num_tasks} tasks, as "
            "value_and_task_grads takes them (without auxiliary data)."
        )
    return losses


def task_names(loss_fn: Callable[..., Any], has_aux: bool = False) -> Callable[..., tuple[str, ...]]:
    """The names of the tasks, in the order of the task axis.

    Args:
      loss_fn: as for `value_and_task_grads`.
      has_aux: whether `loss_fn` returns `(losses, aux)`.

    Returns:
      A function of `loss_fn`'s arguments that returns `T` strings without running it: the paths of the losses in what
      `loss_fn` returns, or their indices if that is an array.

    Example:
      >>> import jax.numpy as jnp, optax_mtl as mtl
      >>> mtl.task_names(lambda w: {"depth": jnp.sum(w), "camera": {"pose": jnp.max(w)}})(jnp.ones(3))
      ('camera/pose', 'depth')
    """

    def task_names_fn(*args: Any, **kwargs: Any) -> tuple[str, ...]:
        out = jax.eval_shape(functools.partial(loss_fn, **kwargs), *args)
        leaves = jax.tree_util.tree_leaves_with_path(out[0] if has_aux else out)
        if len(leaves) == 1 and leaves[0][1].ndim == 1:
            return tuple(str(i) for i in range(leaves[0][1].shape[0]))
        names = (jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves)
        return tuple(name or "0" for name in names)

    return task_names_fn


def _check_differentiable(inputs: Any) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(inputs):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise ValueError(
                f"value_and_task_grads: argument {jax.tree_util.keystr(path)} has dtype {jnp.result_type(leaf)}, which "
                "has no real gradient. Split the parameters from the rest (flax.nnx.split, equinox.partition) and "
                "differentiate with respect to the parameters only."
            )
