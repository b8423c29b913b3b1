"""A loss function in two parts, a shared trunk and a head for each task, that oracles can take apart."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp

from optax_mtl import _base

_KEYS = {"trunk", "heads"}


class Parts(NamedTuple):
    """What `T` tasks' backward passes have in common, after one forward pass.

    Attributes:
      losses: `(T,)`.
      aux: what the heads returned beside their losses, in the structure of the heads; None if nothing.
      cotangents: the losses' gradients with respect to the features, leaves `(T, ...)`.
      head_grads: each head's own gradient, in the structure of the heads.
    """

    losses: jax.Array
    aux: Any
    cotangents: Any
    head_grads: Any


class Split:
    """The losses of `heads` on the features of `trunk`: a loss function that `split` returns.

    Attributes:
      trunk: the shared function.
      heads: the tasks' functions.
      own_inputs: whether each task has a batch of its own.
    """

    def __init__(self, trunk: Callable[..., Any], heads: Any, own_inputs: bool):
        self.trunk = trunk
        self.heads = heads
        self.own_inputs = own_inputs
        self._functions, self._structure = jax.tree.flatten(heads)

    def __call__(self, params: Any, batch: Any) -> jax.Array:
        """The tasks' losses `(T,)`, for `params` of `{"trunk": ..., "heads": ...}`."""
        self.check(params)
        features = None if self.own_inputs else self.trunk(params["trunk"], batch)
        losses = []
        for head, head_params, own in self.each(params, batch):
            out = head(head_params, self.trunk(params["trunk"], own) if self.own_inputs else features, own)
            losses.append(out[0] if isinstance(out, tuple) else out)
        return jnp.stack(losses)

    @property
    def num_tasks(self) -> int:
        return len(self._functions)

    @property
    def shared(self) -> Any:
        """Labels for `shared_and_heads`: the trunk is shared, and each head is its own task's."""
        return {"trunk": True, "heads": self._structure.unflatten(range(self.num_tasks))}

    def check(self, params: Any) -> None:
        """Raises `ValueError` unless `params` has the two parts, and a head's parameters for each head."""
        if not isinstance(params, Mapping) or set(params) != _KEYS:
            found = sorted(params) if isinstance(params, Mapping) else type(params).__name__
            raise ValueError(f'The parameters of a split loss are {{"trunk": ..., "heads": ...}}, found {found}.')
        try:
            self._structure.flatten_up_to(params["heads"])
        except ValueError as error:
            raise ValueError(
                f'params["heads"] must hold the parameters of each head, in the structure of the heads given to '
                f"optax_mtl.split, {self._structure}: found {jax.tree.structure(params['heads'])}."
            ) from error

    def each(self, params: Any, batch: Any) -> list[tuple[Callable[..., Any], Any, Any]]:
        """The heads, each with its parameters and its batch."""
        batches = [batch] * self.num_tasks
        if self.own_inputs:
            try:
                batches = self._structure.flatten_up_to(batch)
            except ValueError as error:
                raise ValueError(
                    f"With own_inputs=True, the batch must hold one batch a task, in the structure of the heads, "
                    f"{self._structure}: found {jax.tree.structure(batch)}."
                ) from error
        return list(zip(self._functions, self._structure.flatten_up_to(params["heads"]), batches, strict=True))

    def unflatten(self, values: Sequence[Any]) -> Any:
        """One value a task, in the structure of the heads."""
        return self._structure.unflatten(values)

    def features(self, trunk_params: Any, batch: Any) -> tuple[Any, Any]:
        """What the trunk returns in two trees: floating point, and the rest (masks, say), with None in their places."""
        features = jax.tree.map(jnp.asarray, self.trunk(trunk_params, batch))
        floating = jax.tree.map(lambda leaf: leaf if _is_floating(leaf) else None, features)
        return floating, jax.tree.map(lambda leaf: None if _is_floating(leaf) else leaf, features)

    def through_heads(self, floating: Any, rest: Any, params: Any, batch: Any, has_aux: bool) -> Parts:
        """Each head forward and backward, once."""
        results = []
        for head, head_params, own in self.each(params, batch):

            def on_floating(head_params: Any, floating: Any, head: Any = head, own: Any = own) -> Any:
                features = jax.tree.map(lambda f, r: r if f is None else f, floating, rest, is_leaf=lambda x: x is None)
                return head(head_params, features, own)

            value_and_grads = jax.value_and_grad(on_floating, argnums=(0, 1), has_aux=has_aux)
            results.append(value_and_grads(head_params, floating))
        return self._collect(results, has_aux)

    def with_own_inputs(self, params: Any, batch: Any, has_aux: bool) -> Parts:
        """Each task's trunk and head, forward and backward, on its own batch; the `cotangents` are of the trunk."""
        results = []
        for head, head_params, own in self.each(params, batch):

            def task(head_params: Any, trunk_params: Any, head: Any = head, own: Any = own) -> Any:
                return head(head_params, self.trunk(trunk_params, own), own)

            value_and_grads = jax.value_and_grad(task, argnums=(0, 1), has_aux=has_aux)
            results.append(value_and_grads(head_params, params["trunk"]))
        return self._collect(results, has_aux)

    def _collect(self, results: list[Any], has_aux: bool) -> Parts:
        values, grads = zip(*results, strict=True)
        losses, auxes = zip(*values, strict=True) if has_aux else (values, None)
        head_grads, cotangents = zip(*grads, strict=True)
        dtype = _base.accumulator_dtype(losses) if len({x.dtype for x in losses}) > 1 else losses[0].dtype
        return Parts(
            jnp.stack([loss.astype(dtype) for loss in losses]),
            None if auxes is None else self.unflatten(auxes),
            jax.tree.map(lambda *leaves: jnp.stack(leaves), *cotangents),
            self.unflatten(head_grads),
        )


def _is_floating(leaf: jax.Array) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def split(trunk: Callable[..., Any], heads: Any, *, own_inputs: bool = False) -> Split:
    """A loss function of a shared trunk and a head for each task.

    It is called like any other, and oracles make use of the parts: each head is pulled back once, for its own task, and
    only the trunk for all `T`.

    Args:
      trunk: `trunk(trunk_params, batch)` returns the features that all heads see: an array, or any tree of arrays
        (with masks and the like among them).
      heads: a function for each task, in a list or a dict by name (or any tree); they may be different functions of
        different parameters. `head(head_params, features, batch)` returns its task's loss, a scalar; or the loss and
        auxiliary data, for oracles with `has_aux=True`. The order of the task axis is that of the tree's leaves (a
        dict's: by name).
      own_inputs: whether each task has its own batch, of any shape: `batch` then has the structure of `heads`, and
        trunk and head of a task are given that task's.

    Returns:
      `loss_fn(params, batch)`, with `params` of `{"trunk": trunk_params, "heads": ...}`, the parameters of the heads in
      the structure of `heads`; it returns losses `(T,)`. Its `shared` is what `shared_and_heads` asks for. Of its
      gradients, those of the trunk have leaves `(T, *shape)`, and those of the heads `(1, *shape)`.

    Raises:
      ValueError: if there are no heads, or one that is no function.

    Example:
      >>> import jax.numpy as jnp, optax, optax_mtl as mtl
      >>> def trunk(w, batch):
      ...     return jnp.tanh(batch["x"] @ w)
      >>> def head(w, features, batch):
      ...     return jnp.mean((features @ w - batch["y"]) ** 2)
      >>> loss_fn = mtl.split(trunk, {"left": head, "right": head})
      >>> params = {"trunk": jnp.ones((3, 2)), "heads": {"left": jnp.ones(2), "right": -jnp.ones(2)}}
      >>> batch = {"x": jnp.ones((4, 3)), "y": jnp.ones(4)}
      >>> tx = optax.chain(mtl.shared_and_heads(mtl.mgda(2), loss_fn.shared), optax.sgd(0.1))
      >>> losses, task_grads = mtl.value_and_task_grads(loss_fn)(params, batch)
      >>> task_grads["trunk"].shape, task_grads["heads"]["left"].shape
      ((2, 3, 2), (1, 2))
      >>> updates, opt_state = tx.update(task_grads, tx.init(params), params, losses=losses)
    """
    functions = jax.tree.leaves(heads)
    if not functions or not all(callable(head) for head in functions):
        raise ValueError(f"split needs a function for each task's head, in a list or a dict, found {heads!r}.")
    return Split(trunk, heads, own_inputs)
