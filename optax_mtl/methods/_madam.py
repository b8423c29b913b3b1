"""MAdam: what a weighting makes of the gradients, preconditioned as if its present weights had always been there."""

from typing import Any, NamedTuple

import jax
from jax import lax, numpy as jnp
import numpy as np
import optax

from optax_mtl import _base, _gramian, _solvers
from optax_mtl._weighting import check_weighting, init_inner


class MAdamState(NamedTuple):
    """State of `madam`.

    There are `P` pairs of tasks: all `(i, j)` with `i <= j`, row by row; for `cross=False`, the `(i, i)` only.

    Attributes:
      inner: what the inner method remembers.
      pair_steps: `(P,)` int32, steps in which both tasks of the pair took part.
      products: `F`, leaves `(P, *shape)`: running means of the products of the two tasks' gradients.
    """

    inner: Any
    pair_steps: jax.Array
    products: Any


def madam(
    num_tasks: int,
    inner: optax.GradientTransformation,
    *,
    b2: _base.Scalar = 0.999,
    eps: _base.Scalar = 1e-8,
    cross: bool = True,
    ramp_steps: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""MAdam: runs any weighting, and preconditions its update for the weights of this very step, before Adam does.

    .. math:: F_{ij} \leftarrow \beta_2 F_{ij} + (1-\beta_2)\, g_i \odot g_j, \qquad
       C = \sum_{ij} \lambda_i \lambda_j \hat F_{ij}, \qquad
       d = \frac{\sum_i \lambda_i g_i}{\sqrt{C} + \epsilon}

    with the weights :math:`\lambda` of the inner method. Adam, behind a balancing method, divides by the second moment
    of what it was given: an average over all weights that there have been. For as long as its memory lasts it does not
    know that they have changed, and a task with large gradients that hardly counts any more still slows the others. `C`
    is the second moment that Adam would have, had the weights always been the present ones. Choose it where the weights
    move a lot, or are changed by hand.

    Follow it with ordinary Adam, which adds the first moment and changes little else, as what it is given is already of
    size one.

    Needs what the inner method needs, and gradients. The state holds `T (T + 1) / 2` times the parameters, or `T` times
    for `cross=False`. Multiplying all weights by a positive number changes nothing.

    Args:
      num_tasks: number of tasks `T`.
      inner: a weighting for as many tasks: any method of this library that weights whole gradients.
      b2: decay of the running means.
      eps: added to the root of `C`, for weights whose absolute values sum to one.
      cross: whether products of different tasks count; if not, `C` is the sum of :math:`\lambda_i^2\hat F_{ii}` only.
      ramp_steps: over how many steps the update goes, linearly, from the weighted gradient (by weights that sum to one)
        to the preconditioned one; 0 for none. As gradients are mostly far below one, this is a warm-up.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves `(T, *shape)` to `(*shape)`. Its `task_weights` are the
      inner method's.

    Raises:
      ValueError: if `inner` is not a weighting, or one for another number of tasks; if it is given a `Gramian`.

    Example:
      >>> import jax.numpy as jnp, optax, optax_mtl as mtl
      >>> method = mtl.madam(2, mtl.mgda(2))
      >>> tx = optax.chain(method, optax.adam(1e-3))
      >>> task_grads = jnp.array([[1.0, 0.0], [0.0, 3.0]])
      >>> method.update(task_grads, method.init(jnp.zeros(2)))[0].tolist()
      [1., 1.]
      >>> tx.update(task_grads, tx.init(jnp.zeros(2)))[0].tolist()
      [-0.001, -0.001]

    References:
      Liu et al., `MAdam: Metric-Aware Multi-Objective Adam <https://arxiv.org/abs/2606.03904>`_, 2026

    Note:
      The abstract, and the equations above, without bias correction, as a public catalogue of optimisers quotes them,
      are what could be read; the paper itself and its code could not. There the metric is blended with the
      identity early on, and pairs are sampled at random to save backward passes. How either is done is not established:
      the ramp here is ours, and off unless asked for; pairs are not sampled, as all gradients are there. The bias
      correction is ours too, as Adam's.

      The paper has weights on the simplex. Others are first divided by the sum of their absolute values, which `C`,
      of degree two in them, would undo anyway, but for `eps`.

      A pair of which a task is absent keeps its mean, and has a bias correction of its own; a step without any task is
      zero, and no step. Where pairs have seen different steps, `C` need not be a second moment of anything, nor
      positive: with `cross`, it counts as no less than what the present step by itself adds to it. Means are kept in
      float32 at least, whatever the parameters' dtype, as the terms of `C` cancel where tasks conflict.
    """
    num_tasks = _base.check_num_tasks(num_tasks)
    weigher = check_weighting(inner, "madam")
    _base.check_number("b2", b2, 0, 1)
    _base.check_number("eps", eps, 0)
    ramp_steps = _base.check_int("ramp_steps", ramp_steps, 0)
    first, second = np.triu_indices(num_tasks) if cross else (np.arange(num_tasks),) * 2

    def init_fn(params: _base.Params) -> _base.BalanceState:
        state = init_inner(weigher, params, num_tasks, "madam")
        products = _base.zeros_of(params, lead=(len(first),))
        return state._replace(method=MAdamState(state.method, jnp.zeros(len(first), jnp.int32), products))

    def update_fn(
        updates: _base.TaskGrads, state: Any, params: _base.Params | None = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        _gramian.check_not_gramian(updates, "madam")
        latest: Any
        method: MAdamState = state.method
        # Under jit, the update that comes back as well is never computed.
        _, latest = weigher.update(updates, state._replace(method=method.inner), params, **extra_args)
        if not jax.tree.leaves(updates):
            return updates, state
        grads = jax.tree.map(lambda g: g.astype(_base.accumulator_dtype(g)), updates)
        weights, present = latest.task_weights, latest.task_present

        def decayed(mean: jax.Array, g: jax.Array) -> jax.Array:
            decay = jnp.asarray(b2, mean.dtype)
            return decay * mean + (1 - decay) * g[first] * g[second]

        pair_steps, products = _base.where_present(
            present[first] & present[second],
            (method.pair_steps + 1, jax.tree.map(decayed, method.products, grads)),
            (method.pair_steps, method.products),
        )

        weights = weights * _solvers.reciprocal(jnp.sum(jnp.abs(weights)))
        seen = 1 - jnp.asarray(b2, weights.dtype) ** pair_steps.astype(weights.dtype)
        ordered = jnp.asarray(np.where(first == second, 1, 2), weights.dtype)  # C has (i, j) and (j, i)
        factors = ordered * weights[first] * weights[second] * _solvers.reciprocal(seen)
        curvature = jax.tree.map(
            lambda f: jnp.tensordot(factors.astype(f.dtype), f, axes=1, precision=lax.Precision.HIGHEST), products
        )
        ramp = jnp.minimum(jnp.max(pair_steps) / jnp.maximum(ramp_steps, 1), 1)

        def precondition(d: jax.Array, c: jax.Array, like: jax.Array) -> jax.Array:
            least = (1 - jnp.asarray(b2, d.dtype)) * jnp.square(d) if cross else 0
            whitened = _solvers.ratio(d, jnp.sqrt(jnp.maximum(c, least)) + jnp.asarray(eps, d.dtype))
            share = ramp.astype(d.dtype)
            return ((1 - share) * d + share * whitened).astype(like.dtype)

        update = jax.tree.map(precondition, _gramian.combine(weights, grads), curvature, updates)
        return update, latest._replace(method=MAdamState(latest.method, pair_steps, products))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
