"""APT: momentum that gives way to the balanced gradient where the two disagree."""

from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
import optax

from optax_mtl import _base, _gramian, _shards, _solvers


class APTState(NamedTuple):
    """State of `apt`.

    Attributes:
      inner: the state of the balancing method.
      steps: () int32, steps in which any task took part.
      beta_product: `(L,)`, one a leaf: the product of all momenta so far.
      moment: `(*shape)` first moment of the balanced gradients.
      second_moment: `(*shape)` second moment of the balanced gradients.
    """

    inner: Any
    steps: jax.Array
    beta_product: jax.Array
    moment: Any
    second_moment: Any


def apt(
    num_tasks: int,
    inner: optax.GradientTransformation,
    *,
    beta_min: _base.Scalar = 0.5,
    beta_max: _base.Scalar = 0.9,
    b2: _base.Scalar = 0.999,
    eps: _base.Scalar = 1e-8,
    granularity: str = "whole",
) -> optax.GradientTransformationExtraArgs:
    r"""APT: balances by any method, then Adam with a momentum that goes with how far past and present agree.

    With the balanced gradient `d` of the inner method,

    .. math:: \beta_t = \beta_{\min} + (\beta_{\max} - \beta_{\min})\, \frac{1 + \cos(m_{t-1}, d_t)}{2}, \qquad
       m_t = \beta_t m_{t-1} + (1-\beta_t)\, d_t

    .. math:: v_t = \beta_2 v_{t-1} + (1-\beta_2)\, d_t^2, \qquad
       \Delta = \frac{\hat m_t}{\sqrt{\hat v_t} + \epsilon}, \quad \hat m_t = \frac{m_t}{1 - \prod_s \beta_s}

    A balancing method finds a direction for this step, and behind it Adam's momentum of 0.9 lets a tenth of it through:
    most of the update is what was balanced before. Here a history that points elsewhere has less say, down to
    :math:`\beta_{\min}` where it is opposite, and one that agrees keeps all of :math:`\beta_{\max}`. With both equal
    it is Adam behind the inner method. Choose it with methods that solve for a direction at every step.

    The result is already preconditioned: follow it with weight decay, if any, and a learning rate
    (`optax.scale_by_learning_rate`), not with Adam. For the heads to get the same, put `shared_and_heads` inside.

    Needs what the inner method needs, and gradients. The state holds two moments, as Adam's does.

    Args:
      num_tasks: number of tasks `T`.
      inner: a balancing method for as many tasks, or a chain with one: anything from leaves `(T, *shape)` to
        `(*shape)`.
      beta_min: the momentum for opposite directions.
      beta_max: the momentum for equal ones.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      granularity: `"whole"`: one cosine and one momentum over all leaves; `"leaf"`: one each.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves `(T, *shape)` to `(*shape)`. `task_weights` are the inner
      method's.

    Raises:
      ValueError: if `beta_min` is more than `beta_max`; if `inner` is no balancing method, or one for another number of
        tasks; if it is given a `Gramian`.

    Example:
      >>> import jax.numpy as jnp, optax, optax_mtl as mtl
      >>> tx = optax.chain(mtl.apt(2, mtl.mgda(2)), optax.scale_by_learning_rate(1e-3))
      >>> tx.update(jnp.array([[1.0, 0.0], [0.0, 3.0]]), tx.init(jnp.zeros(2)))[0].tolist()
      [-0.001, -0.001]

    References:
      Zhou et al., `Delve into the Applicability of Advanced Optimizers for Multi-Task Learning
      <https://arxiv.org/abs/2604.08939>`_, 2026

    Note:
      **This is a reading of the paper and may not be its algorithm**: only the abstract and third-party summaries could
      be read. The abstract says that with advanced optimisers the present gradients play a marginal part in the update,
      and that APT's momentum is adaptive; a summary, that it goes by a cosine similarity, with :math:`\beta_{\min}` and
      :math:`\beta_{\max}` that may need tuning for each data set. Not established are between which vectors the cosine
      is taken and how the momentum depends on it; whether over all parameters or leaf by leaf; the bias correction; and
      the values of the bounds. All these are ours. The direction preservation that the paper adds for Muon is not
      provided.

      Before the first step, and where `d` is zero, the cosine counts as zero. A step without any task is no step: the
      update is zero and the moments stay. They are kept in float32 at least, whatever the parameters' dtype.
    """
    num_tasks = _base.check_num_tasks(num_tasks)
    _base.check_number("beta_min", beta_min, 0, 1)
    _base.check_number("beta_max", beta_max, beta_min if isinstance(beta_min, float | int) else 0, 1)
    _base.check_number("b2", b2, 0, 1)
    _base.check_number("eps", eps, 0)
    _base.check_choice("granularity", granularity, ("whole", "leaf"))
    if not isinstance(inner, optax.GradientTransformation):
        raise ValueError(f"apt balances by its inner method, apt(num_tasks, mgda(num_tasks)); found {inner!r}.")
    balance = optax.with_extra_args_support(inner)

    def init_fn(params: _base.Params) -> APTState:
        state = balance.init(params)
        _check_balances(state, num_tasks)

        # Anew for each moment, so that a jitted step may be given both buffers to write in.
        return APTState(
            inner=state,
            steps=jnp.zeros((), jnp.int32),
            beta_product=jnp.ones(len(jax.tree.leaves(params)), _base.accumulator_dtype(params)),
            moment=_base.zeros_of(params),
            second_moment=_base.zeros_of(params),
        )

    def update_fn(
        updates: _base.TaskGrads, state: Any, params: _base.Params | None = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        _gramian.check_not_gramian(updates, "apt")
        balanced, balance_state = balance.update(updates, state.inner, params, **extra_args)
        if not jax.tree.leaves(updates):
            return updates, state
        present = [jnp.any(leaf) for _, leaf in optax.tree.get_all_with_path(balance_state, "task_present")]
        anyone = jnp.any(jnp.stack(present))
        dtype = state.beta_product.dtype

        direction = jax.tree.map(lambda d, m: d.astype(m.dtype), balanced, state.moment)
        low, high = jnp.asarray(beta_min, dtype), jnp.asarray(beta_max, dtype)
        beta = low + (high - low) * (1 + _cosines(state.moment, direction, granularity, dtype)) / 2
        steps, product = state.steps + 1, beta * state.beta_product

        def decayed(decay: jax.Array | _base.Scalar, mean: jax.Array, new: jax.Array) -> jax.Array:
            decay = jnp.asarray(decay, mean.dtype)
            return decay * mean + (1 - decay) * new

        def precondition(m: jax.Array, v: jax.Array, product: jax.Array, like: jax.Array) -> jax.Array:
            m_hat = m / (1 - product.astype(m.dtype))
            v_hat = v / (1 - jnp.asarray(b2, v.dtype) ** steps.astype(v.dtype))
            step = _solvers.ratio(m_hat, jnp.sqrt(v_hat) + jnp.asarray(eps, v.dtype))
            return jnp.where(anyone, step, 0).astype(like.dtype)

        by_leaf = jax.tree.structure(direction).unflatten
        moment = jax.tree.map(decayed, by_leaf(list(beta)), state.moment, direction)
        second = jax.tree.map(lambda v, d: decayed(b2, v, jnp.square(d)), state.second_moment, direction)
        update = jax.tree.map(precondition, moment, second, by_leaf(list(product)), balanced)

        moved = (steps, product, moment, second)
        moved = jax.tree.map(lambda new, old: jnp.where(anyone, new, old), moved, state[1:])
        return update, APTState(balance_state, *moved)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_balances(state: Any, num_tasks: int) -> None:
    """Raises `ValueError` unless `state`, of the inner method, is that of a balancing method for `num_tasks`."""
    found = [jnp.shape(weights) for _, weights in optax.tree.get_all_with_path(state, "task_weights")]
    if not found:
        raise ValueError(
            "apt balances by its inner method, and this one has no task_weights in its state: give it a balancing "
            "method, apt(num_tasks, optax_mtl.mgda(num_tasks)), or a chain with one."
        )
    if (num_tasks,) not in found:
        raise ValueError(
            f"apt was built with num_tasks={num_tasks}, and its inner method with {found[0][0]}. Give both the same."
        )


def _cosines(first: Any, second: Any, granularity: str, dtype: jnp.dtype) -> jax.Array:
    """`(L,)`, for each leaf the cosine of the two trees there, or over all leaves; zero where either is zero."""

    def products(a: Any, b: Any) -> jax.Array:
        by_leaf = jax.tree.leaves(jax.tree.map(lambda x, y: jnp.sum(x * y).astype(dtype), a, b))
        if granularity == "leaf":
            return jnp.stack([_shards.total([of_leaf]) for of_leaf in by_leaf])
        return jnp.broadcast_to(_shards.total(by_leaf), len(by_leaf))

    lengths = jnp.sqrt(products(first, first)) * jnp.sqrt(products(second, second))
    return jnp.clip(products(first, second) * _solvers.reciprocal(lengths), -1, 1)
