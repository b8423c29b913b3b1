"""Programs whose parameters are tapped: what is wanted of their gradients comes out, and not the gradients.

Under `jax.vmap` over the tasks' cotangents, the cotangent of a parameter is the stack of its `T` gradients. A tap is an
identity that a parameter passes on its way to where it is used; on the way back it sees that stack, contracts it, and
sends on the result as the cotangent of a companion of the parameter. So the stack is gone before the next layer's is
there, and what is summed over the layers is small.

Where a parameter is only multiplied with activations, even the stack of one leaf need not be computed. The gradient of
`w` in `x @ w` is `x.T @ D_i` for the cotangents `D_i` of the product, so that

    <x.T @ D_i, x.T @ D_j> = <D_i, (x @ x.T) @ D_j>,    sum_i a_i (x.T @ D_i) = x.T @ (sum_i a_i D_i),

which is much less work for fewer rows in `x` than columns.

The taps are set by interpreting the program's jaxpr: a parameter is followed into compiled, rematerialised and scanned
functions as long as it goes to one place only. If it is used in several, it is tapped before the first of them: its
gradients are sums over all.
"""

from collections import Counter
from collections.abc import Callable, Sequence
import math
from typing import Any, NamedTuple, Protocol

import jax
from jax import lax, numpy as jnp
from jax.custom_batching import custom_vmap
from jax.extend import core

from optax_mtl import _blocks, _gramian


class Tapped(NamedTuple):
    """A parameter that is on its way to the place where it is used.

    Attributes:
      value: the parameter, or as much of it as gets there: one layer's slice, in a scan over layers.
      companion: what the tap is given: `(T,)`, or `(L, T)` for the layers along the first axis of `value`; or something
        else that the taps know.
      metric: as `value`, or None.
      constrain: how the program says that `value` is sharded, to be said of its gradients too; None if it does not.
    """

    value: jax.Array
    companion: Any
    metric: jax.Array | None = None
    constrain: Callable[[jax.Array], jax.Array] | None = None

    @property
    def layered(self) -> bool:
        """Whether each layer along the first axis has a companion of its own."""
        return jnp.ndim(self.companion) == 2


class Product(NamedTuple):
    """The product of activations with a parameter, of `N` rows in `K` columns with `K` columns of `O` outputs.

    Attributes:
      multiply: from activations and parameter to the product, each in its own layout.
      x_rows: from the activations to `(N, K)`.
      result_rows: from the product, or a cotangent of it, to `(N, O)`.
      shape: `(N, K, O)`.
    """

    multiply: Callable[[jax.Array, jax.Array], jax.Array]
    x_rows: Callable[[jax.Array], jax.Array]
    result_rows: Callable[[jax.Array], jax.Array]
    shape: tuple[int, int, int]


class Taps(Protocol):
    """What is done where parameters are used.

    Attributes:
      follow: whether parameters are followed into loops and rematerialised functions, and where they are rearranged or
        in another dtype.
    """

    follow: bool

    def tap(self, tapped: Tapped) -> jax.Array:
        """The value, as any equation is given it."""

    def multiply(self, product: Product, x: jax.Array, tapped: Tapped) -> jax.Array | None:
        """The product of `x` with the value; or None if it is to be tapped before."""


def evaluate(jaxpr: core.Jaxpr, consts: Sequence[Any], args: Sequence[Any], taps: Taps) -> list[Any]:
    """Evaluates `jaxpr`, some of whose `args` are `Tapped`."""
    uses = Counter(var for eqn in jaxpr.eqns for var in eqn.invars if not isinstance(var, core.Literal))
    uses.update(var for var in jaxpr.outvars if not isinstance(var, core.Literal))
    values: dict[Any, Any] = {}

    def write(variables: Sequence[Any], new: Sequence[Any]) -> None:
        for var, value in zip(variables, new, strict=True):
            values[var] = _tap(value, taps) if uses[var] > 1 else value

    def read(var: Any) -> Any:
        return var.val if isinstance(var, core.Literal) else values[var]

    write(jaxpr.constvars, consts)
    write(jaxpr.invars, args)
    for eqn in jaxpr.eqns:
        operands = [read(var) for var in eqn.invars]
        results = None
        if any(isinstance(operand, Tapped) for operand in operands) and eqn.primitive.name in _RULES:
            results = _RULES[eqn.primitive.name](eqn, operands, taps)
        if results is None:
            results = _bind(eqn, [_tap(operand, taps) for operand in operands])
        write(eqn.outvars, results)
    return [_tap(read(var), taps) if isinstance(var, core.Var) else jnp.asarray(var.val) for var in jaxpr.outvars]


def _bind(eqn: core.JaxprEqn, operands: Sequence[Any]) -> list[Any]:
    """The results of one equation, as JAX itself evaluates it."""
    params = eqn.primitive.get_bind_params(eqn.params)
    functions, params = params if isinstance(params, tuple) else ((), params)  # a pair before jax 0.8
    with eqn.ctx.manager:
        results = eqn.primitive.bind(*functions, *operands, **params)
    return list(results) if eqn.primitive.multiple_results else [results]


def _tap(value: Any, taps: Taps) -> Any:
    return taps.tap(value) if isinstance(value, Tapped) else value


# -- Where a parameter may go ----------------------------------------------------------------------------------------
# Each rule returns the results of an equation, or None if the parameters among its operands are to be tapped before.


def _into_call(eqn: core.JaxprEqn, operands: Sequence[Any], taps: Taps) -> list[Any]:
    closed = eqn.params["jaxpr"]
    return evaluate(closed.jaxpr, closed.consts, operands, taps)


def _into_checkpoint(eqn: core.JaxprEqn, operands: Sequence[Any], taps: Taps) -> list[Any] | None:
    if not taps.follow:
        return None

    constraints = [x.constrain if isinstance(x, Tapped) else None for x in operands]

    def function(*operands: Any) -> list[Any]:
        again = [
            x if constrain is None else x._replace(constrain=constrain)
            for x, constrain in zip(operands, constraints, strict=True)
        ]
        return evaluate(eqn.params["jaxpr"], (), again, taps)

    arrays = [x._replace(constrain=None) if isinstance(x, Tapped) else x for x in operands]
    return jax.checkpoint(function, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])(*arrays)


def _into_scan(eqn: core.JaxprEqn, operands: Sequence[Any], taps: Taps) -> list[Any] | None:
    if not taps.follow:
        return None
    # What is the same in all iterations is used several times; slices are used once each, and share a companion,
    # whose cotangent is summed over them, unless they are layers with one each.
    closed, num_consts = eqn.params["jaxpr"], eqn.params["num_consts"]
    first = num_consts + eqn.params["num_carry"]
    start = [_tap(operand, taps) for operand in operands[:first]]
    shared = [x.companion if isinstance(x, Tapped) and not x.layered else None for x in operands[first:]]
    # How all layers together are sharded says nothing about one.
    scanned = [
        x if not isinstance(x, Tapped) else x._replace(companion=x.companion if x.layered else None, constrain=None)
        for x in operands[first:]
    ]

    def step(carry: Any, slices: Any) -> Any:
        slices = [
            x if companion is None else x._replace(companion=companion)
            for x, companion in zip(slices, shared, strict=True)
        ]
        results = evaluate(closed.jaxpr, closed.consts, [*start[:num_consts], *carry, *slices], taps)
        return results[: len(carry)], results[len(carry) :]

    static = {
        name: eqn.params[name] for name in ("length", "reverse", "unroll", "_split_transpose") if name in eqn.params
    }
    carry, stacked = lax.scan(step, start[num_consts:], scanned, **static)
    return [*carry, *stacked]


def _elementwise(eqn: core.JaxprEqn, operands: Sequence[Any], taps: Taps) -> list[Any] | None:
    (tapped,) = operands
    value = _bind(eqn, [tapped.value])[0]
    return [tapped._replace(value=value)] if taps.follow and jnp.issubdtype(value.dtype, jnp.floating) else None


def _rearranged(eqn: core.JaxprEqn, operands: Sequence[Any], taps: Taps) -> list[Any] | None:
    (tapped,) = operands
    if not taps.follow or tapped.layered or tapped.metric is not None:
        return None
    return [tapped._replace(value=_bind(eqn, [tapped.value])[0], constrain=None)]


def _constrained(eqn: core.JaxprEqn, operands: Sequence[Any], taps: Taps) -> list[Any] | None:
    # A sum of the gradients' products does not tell the compiler that they could be sharded like the parameter: each
    # device would be sent all of them.
    results = _elementwise(eqn, operands, taps)
    return None if results is None else [results[0]._replace(constrain=lambda x: _bind(eqn, [x])[0])]


def _product(eqn: core.JaxprEqn, operands: Sequence[Any], taps: Taps) -> list[Any] | None:
    contracted, batched = eqn.params["dimension_numbers"]
    side = 0 if isinstance(operands[0], Tapped) else 1
    tapped, x = operands[side], operands[1 - side]
    if isinstance(x, Tapped) or batched[0] or tapped.metric is not None or tapped.layered:
        return None
    x_axes = contracted[1 - side]
    columns = math.prod(x.shape[axis] for axis in x_axes)
    rows = math.prod(x.shape) // max(columns, 1)
    outputs = math.prod(tapped.value.shape) // max(columns, 1)
    if 0 in (rows, columns, outputs):
        return None
    free = [axis for axis in range(x.ndim) if axis not in x_axes]
    product = Product(
        lambda x, w: _bind(eqn, [w, x] if side == 0 else [x, w])[0],
        lambda x: jnp.transpose(x, (*free, *x_axes)).reshape(rows, columns),
        lambda y: y.reshape(outputs, rows).T if side == 0 else y.reshape(rows, outputs),
        (rows, columns, outputs),
    )
    result = taps.multiply(product, x, tapped)
    return None if result is None else [result]


_RULES: dict[str, Callable[..., list[Any] | None]] = {
    "checkpoint": _into_checkpoint,
    "convert_element_type": _elementwise,
    "dot_general": _product,
    "jit": _into_call,
    "pjit": _into_call,  # its name before jax 0.7
    "remat2": _into_checkpoint,
    "reshape": _rearranged,
    "scan": _into_scan,
    "sharding_constraint": _constrained,
    "squeeze": _rearranged,
    "transpose": _rearranged,
}


# -- Two kinds of taps ------------------------------------------------------------------------------------------------


def _at_all_tasks(one: Callable[..., Any], all_tasks: Callable[..., tuple[Any, bool]]) -> Callable[..., Any]:
    """`one(cotangent, companion, *others)`, which under `jax.vmap` over the tasks is `all_tasks` of the same."""
    function = custom_vmap(one)

    @function.def_vmap
    def batched(axis_size: int, in_batched: Any, cotangent: jax.Array, companion: jax.Array, *others: Any) -> Any:
        if in_batched[0] and not any(jax.tree.leaves(in_batched[1:])) and axis_size == companion.shape[-1]:
            return all_tasks(cotangent, companion, *others)
        # Mapped over something else, the seeds of a study say, in the ordinary backward pass, in which none asks.
        flags = jax.tree.leaves(in_batched)
        axes = jax.tree.unflatten(jax.tree.structure(in_batched), [0 if flag else None for flag in flags])
        return jax.vmap(one, axes)(cotangent, companion, *others), True

    return function


def _row(cotangent: jax.Array, companion: jax.Array, *others: jax.Array) -> jax.Array:
    return jnp.zeros_like(companion)  # a task's row of the Gramian: it takes all tasks to tell


def _gradient_rows(stack: jax.Array, companion: jax.Array, metric: jax.Array | None = None) -> tuple[jax.Array, bool]:
    layers = None if companion.ndim == 1 else companion.shape[0]
    gramian = _blocks.leaf_gramian(stack, metric, layers).astype(companion.dtype)
    return gramian if layers is None else jnp.swapaxes(gramian, 0, 1), True


def _product_rows(stack: jax.Array, companion: jax.Array, x: jax.Array) -> tuple[jax.Array, bool]:
    return product_gramian(stack, x, companion.dtype), True


def product_gramian(cotangents: jax.Array, x: jax.Array, dtype: Any) -> jax.Array:
    """The Gramian `(T, T)` of the gradients `x.T @ D_i`, from `D` `(T, N, O)` and `x` `(N, K)`."""
    between = jnp.matmul(x, x.T, precision="highest", preferred_element_type=dtype)
    cotangents = cotangents.astype(dtype)
    # As a batch of products: with the tasks among the columns, the result would have to be transposed.
    batch = jnp.broadcast_to(between, (cotangents.shape[0], *between.shape))
    return _gramian.task_cross_gramian(cotangents, jnp.matmul(batch, cotangents, precision="highest"))


def _combined(stack: jax.Array, weights: jax.Array) -> tuple[jax.Array, bool]:
    return _gramian.combine_leaf(weights, stack), False


_gradient_row = _at_all_tasks(_row, _gradient_rows)
_product_row = _at_all_tasks(_row, _product_rows)
_combination = _at_all_tasks(lambda cotangent, weights: cotangent, _combined)


def less_work(num_tasks: int, product: Product) -> bool:
    """Whether multiply-adds of `D_i (x x.T) D_j` are fewer than those of `x.T D_i` and their inner products."""
    rows, columns, outputs = product.shape
    through_rows = rows * rows * (columns + num_tasks * outputs) + num_tasks**2 * rows * outputs
    return through_rows < num_tasks * (rows + num_tasks) * columns * outputs


class _VjpTaps:
    """Taps that are told of the cotangents that pass.

    Args:
      gradient: from one task's cotangent of a value, the companion and the metric to the cotangents of value and
        companion; under `jax.vmap` over the tasks it sees them all.
      product: the same for a product, from its cotangent, that in rows, the companion, and `x` in rows; what it returns
        first is pulled back to the parameter.
      pays: whether to use `product`, for `T` and a product, and not `gradient` of the parameter.
    """

    follow = True

    def __init__(self, gradient: Callable[..., Any], product: Callable[..., Any], pays: Callable[[int, Product], bool]):
        self._gradient = gradient
        self._product = product
        self._pays = pays

    def tap(self, tapped: Tapped) -> jax.Array:
        """See `Taps`."""

        @jax.custom_vjp
        def identity(value: jax.Array, companion: jax.Array, metric: jax.Array | None) -> jax.Array:
            return value

        def forward(value: jax.Array, companion: jax.Array, metric: jax.Array | None) -> Any:
            return value, (companion, metric)

        def backward(residuals: Any, cotangent: jax.Array) -> Any:
            cotangent = cotangent if tapped.constrain is None else tapped.constrain(cotangent)
            return *self._gradient(cotangent, *residuals), None

        identity.defvjp(forward, backward)
        return identity(tapped.value, tapped.companion, tapped.metric)

    def multiply(self, product: Product, x: jax.Array, tapped: Tapped) -> jax.Array | None:
        """See `Taps`."""
        is_explicit = _gramian.explicit_sharding(x, tapped.value) is not None  # it would have to be told where it ends
        if is_explicit or not self._pays(tapped.companion.shape[0], product):
            return None

        @jax.custom_vjp
        def multiply(x: jax.Array, w: jax.Array, companion: jax.Array) -> jax.Array:
            return product.multiply(x, w)

        def forward(x: jax.Array, w: jax.Array, companion: jax.Array) -> Any:
            return product.multiply(x, w), (x, w, companion)

        def backward(residuals: Any, cotangent: jax.Array) -> Any:
            x, w, companion = residuals
            rows = product.result_rows(cotangent)
            towards_w, of_companion = self._product(cotangent, rows, companion, product.x_rows(x))
            of_x = None  # of integers and bools there are no cotangents
            if jnp.issubdtype(x.dtype, jnp.floating):
                (of_x,) = jax.linear_transpose(lambda x: product.multiply(x, w), x)(cotangent)
            (of_w,) = jax.linear_transpose(lambda w: product.multiply(x, w), w)(towards_w)
            return of_x, of_w, of_companion

        multiply.defvjp(forward, backward)
        return multiply(x, tapped.value, tapped.companion)


# The cotangent of a companion, `(T,)` of zeros, is a row of the Gramian; that of a value is its gradient.
GRAMIAN = _VjpTaps(
    gradient=lambda d, companion, metric: (
        d,
        _gradient_row(d, companion) if metric is None else _gradient_row(d, companion, metric),
    ),
    product=lambda d, d_rows, companion, x_rows: (d, _product_row(d_rows, companion, x_rows)),
    pays=less_work,
)

# The cotangent of a value is its gradients' sum with weights, its companion; it is the same for all tasks.
COMBINATION = _VjpTaps(
    gradient=lambda d, weights, metric: (_combination(d, weights), None),
    product=lambda d, d_rows, weights, x_rows: (_combination(d, weights), None),
    pays=lambda num_tasks, product: True,
)
