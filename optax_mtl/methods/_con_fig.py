"""ConFIG: the direction that makes prescribed angles with all tasks; and its momentum form."""

from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
import optax

from optax_mtl import _base, _gramian, _solvers
from optax_mtl._combinators import check_gradients
from optax_mtl._weighting import weighting

_LENGTHS = ("projection", "min", "max", "harmonic", "arithmetic", "geometric")


@_solvers.full_precision
def con_fig_weights(
    gramian: jax.Array, *, preference: Any = None, length: str = "projection", present: jax.Array | None = None
) -> jax.Array:
    """Weights of the conflict-free direction. See `con_fig`.

    Args:
      gramian: `(T, T)`; tasks with zero rows are left out.
      preference: `(T,)`; ones if None.
      length: `"projection"`, `"min"`, `"max"`, `"harmonic"`, `"arithmetic"` or `"geometric"`.
      present: `(T,)` of bool, the tasks that take part; all if None.

    Returns:
      `(T,)`; single weights may be negative. All zero if there is no such direction.
    """
    if present is not None:
        gramian = jnp.where(jnp.outer(present, present), gramian, 0)
    unit, norms = _solvers.cosines(gramian)
    v = _solvers.pseudo_solve(unit, _base.preference_or(preference, jnp.ones_like(norms), norms > 0))
    projections = unit @ v  # <u_i, x> for x = sum_i v_i u_i
    square = v @ projections  # |x|^2
    factor = _length_along(projections, norms, length) * _solvers.reciprocal(square)
    return factor * v * _solvers.reciprocal(norms)


def _length_along(projections: jax.Array, norms: jax.Array, length: str) -> jax.Array:
    """The sum of the gradients' projections, with their own norms or with one mean norm for all that are not zero."""
    if length == "projection":
        return jnp.sum(norms * projections)
    kept = norms > 0
    number = jnp.maximum(jnp.sum(kept), 1).astype(norms.dtype)
    if length == "min":
        norm = jnp.min(jnp.where(kept, norms, jnp.max(norms)))
    elif length == "max":
        norm = jnp.max(norms)
    elif length == "harmonic":
        norm = number * _solvers.reciprocal(jnp.sum(_solvers.reciprocal(norms)))
    elif length == "arithmetic":
        norm = jnp.sum(norms) / number
    else:
        norm = jnp.exp(jnp.sum(jnp.log(jnp.where(kept, norms, 1))) / number)
    return norm * jnp.sum(projections)


def con_fig(
    num_tasks: int, *, preference: Any = None, length: str = "projection"
) -> optax.GradientTransformationExtraArgs:
    r"""ConFIG: the direction that makes the same angle with every task, as long as their projections on it together.

    With the unit gradients :math:`u_i` as the rows of `U`,

    .. math:: x = U^{+} p, \qquad d = \Bigl(\sum_i \Bigl\langle g_i, \frac{x}{\lVert x\rVert}\Bigr\rangle\Bigr)
       \frac{x}{\lVert x\rVert}

    where `p` holds ones, or prescribed cosines up to a common factor. Independent gradients all get a cosine that is
    positive: there is no conflict, whatever their scales, and a loss times a constant does not turn `d`. Choose it for
    losses that pull with very different force, as in physics-informed networks. It grows with the gradients, and is
    long where they agree and short where they do not.

    Needs the Gramian only, of which the pseudo-inverse is taken at unit diagonal.

    Args:
      num_tasks: number of tasks `T`.
      preference: `p`, `(T,)`, not negative; ones if None.
      length: `"projection"`, as above; or the gradients are first given one common norm, which is the `"min"`, the
        `"max"`, or the `"harmonic"`, `"arithmetic"` or `"geometric"` mean of their own.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves `(T, *shape)` to `(*shape)`.

    Example:
      >>> import jax.numpy as jnp, optax_mtl as mtl
      >>> tx = mtl.con_fig(num_tasks=2)
      >>> tx.update(jnp.array([[1.0, 0.0], [0.0, 3.0]]), tx.init(jnp.zeros(2)))[0].tolist()
      [2., 2.]

    References:
      Liu et al., `ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks
      <https://arxiv.org/abs/2408.11104>`_, ICLR 2025

    Note:
      Dependent gradients get the least-squares solution, which may conflict with some of them; eigenvalues of the
      cosine matrix below `T` times the dtype's epsilon, relative to the largest, count as zero. Tasks whose gradient is
      zero are left out, of the mean norms too. If nothing is left of `p` (opposite gradients), the update is zero. The
      authors' code for two tasks gives NaN for parallel gradients; its option to track a single task's norm is not
      offered.
    """
    _base.check_choice("length", length, _LENGTHS)
    _base.check_preference(preference, _base.check_num_tasks(num_tasks))

    def rule(gramian: jax.Array, state: Any, *, present: jax.Array, **_: Any) -> tuple[jax.Array, Any]:
        return con_fig_weights(gramian, preference=preference, length=length, present=present), state

    return weighting("con_fig", num_tasks, rule)


class ConFIGMomentumState(NamedTuple):
    """State of `con_fig_momentum`.

    Attributes:
      task_steps: `(T,)` int32, steps in which the task took part.
      moments: `(T, *shape)` first moments of the tasks' gradients.
      steps: () int32, steps in which any task took part.
      moment: `(*shape)`, what would have been the first moment of the mixed gradient in the last step.
      second_moment: `(*shape)`, of the gradients that such first moments imply.
    """

    task_steps: jax.Array
    moments: Any
    steps: jax.Array
    moment: Any
    second_moment: Any


def con_fig_momentum(
    num_tasks: int,
    *,
    preference: Any = None,
    length: str = "projection",
    b1: _base.Scalar = 0.9,
    b2: _base.Scalar = 0.999,
    eps: _base.Scalar = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    r"""M-ConFIG: Adam with a first moment for each task, mixed by ConFIG, and one second moment for the mixture.

    .. math:: m_i \leftarrow \beta_1 m_i + (1-\beta_1) g_i, \quad d = \mathrm{ConFIG}(\hat m_1, \dots, \hat m_T), \quad
       \tilde g = \frac{\tilde m - \beta_1 \tilde m_{\text{last}}}{1-\beta_1}, \; \tilde m = (1 - \beta_1^t)\, d

    .. math:: s \leftarrow \beta_2 s + (1-\beta_2)\, \tilde g^2, \qquad \Delta = \frac{d}{\sqrt{\hat s} + \epsilon}

    :math:`\tilde g` is the gradient of which `d` would be the first moment. **An absent task takes part with the moment
    that it had**: compute the gradient of one task a step, in turn, with `task_mask` true for that task alone, and a
    step costs what it costs without multi-task learning. That is the reason to choose it over `con_fig`.

    The result is already preconditioned: follow it with a learning rate (`optax.scale_by_learning_rate`), not with
    Adam. For one task it is Adam.

    Needs gradients. The state holds `T + 2` times the parameters.

    Args:
      num_tasks: number of tasks `T`.
      preference: see `con_fig`.
      length: see `con_fig`.
      b1: decay of the first moments.
      b2: decay of the second moment.
      eps: added to the root of the second moment.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves `(T, *shape)` to `(*shape)`. Its `task_weights` are those
      of the bias-corrected first moments in `d`.

    Raises:
      ValueError: if it is given a `Gramian`.

    Example:
      >>> import jax.numpy as jnp, optax_mtl as mtl
      >>> tx = mtl.con_fig_momentum(num_tasks=2)
      >>> state = tx.init(jnp.zeros(2))
      >>> for mask in ([True, False], [False, True]):  # one task a step
      ...     task_grads = jnp.array([[1.0, 0.0], [0.0, 3.0]])
      ...     updates, state = tx.update(task_grads, state, task_mask=jnp.array(mask))
      >>> updates.tolist(), state.task_weights.tolist()
      ([0.922, 0.744], [2.0, 0.667])

    References:
      Liu et al., `ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks
      <https://arxiv.org/abs/2408.11104>`_, ICLR 2025

    Note:
      As the authors' code, but for the first steps: theirs does not move until every task has been seen, here the tasks
      that have been seen go ahead. A step without any task is no step: the update is zero and the state stays.
      All moments are kept in float32 at least, whatever the parameters' dtype.
    """
    num_tasks = _base.check_num_tasks(num_tasks)
    _base.check_choice("length", length, _LENGTHS)
    _base.check_preference(preference, num_tasks)

    def init_fn(params: _base.Params) -> _base.BalanceState:
        zeros = _base.zeros_of(params)
        method = ConFIGMomentumState(
            task_steps=jnp.zeros(num_tasks, jnp.int32),
            moments=_base.zeros_of(params, lead=(num_tasks,)),
            steps=jnp.zeros((), jnp.int32),
            moment=zeros,
            second_moment=zeros,
        )
        return _base.init_balance_state(num_tasks, params, method)

    def update_fn(
        updates: _base.TaskGrads,
        state: Any,
        params: _base.Params | None = None,
        *,
        losses: jax.Array | None = None,
        task_mask: jax.Array | None = None,
        task_finite: jax.Array | None = None,
        **extra_args: Any,
    ) -> tuple[Any, Any]:
        check_gradients(updates, num_tasks, params, losses, "con_fig_momentum")
        if not jax.tree.leaves(updates):
            return updates, state
        norms = _gramian.task_squared_norms(updates)
        present, nonfinite = _base.present_tasks(norms, losses, task_mask, task_finite)
        anyone = jnp.any(present)
        method: ConFIGMomentumState = state.method

        task_steps = method.task_steps + present.astype(jnp.int32)
        moments = jax.tree.map(lambda m, g: _decayed(b1, m, g.astype(m.dtype)), method.moments, updates)
        moments = _base.where_present(present, moments, method.moments)
        correction = 1 / _seen(b1, task_steps, norms.dtype)
        gramian = _solvers.scaled(_gramian.task_gramian(moments), correction)
        weights = con_fig_weights(gramian, preference=preference, length=length, present=task_steps > 0)
        mixed = _gramian.combine(weights * correction, moments)

        steps = method.steps + 1
        moment = jax.tree.map(lambda d: _seen(b1, steps, d.dtype) * d, mixed)
        implied = jax.tree.map(lambda m, last: _undecayed(b1, last, m), moment, method.moment)
        second = jax.tree.map(lambda s, g: _decayed(b2, s, jnp.square(g)), method.second_moment, implied)

        def precondition(d: jax.Array, s: jax.Array, like: jax.Array) -> jax.Array:
            root = jnp.sqrt(s / _seen(b2, steps, s.dtype)) + jnp.asarray(eps, s.dtype)
            return jnp.where(anyone, d / root, 0).astype(like.dtype)

        # Tasks that are absent have kept theirs already: to choose once more would keep both alive, T times as large.
        moved = jax.tree.map(lambda n, old: jnp.where(anyone, n, old), (steps, moment, second), method[2:])
        new = ConFIGMomentumState(task_steps, moments, *moved)
        weights = jnp.where(anyone, weights, 0)
        return (
            jax.tree.map(precondition, mixed, second, updates),
            _base.next_balance_state(state, weights, present, nonfinite, new),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _decayed(decay: _base.Scalar, last: jax.Array, new: jax.Array) -> jax.Array:
    decay = jnp.asarray(decay, new.dtype)
    return decay * last + (1 - decay) * new


def _undecayed(decay: _base.Scalar, last: jax.Array, mean: jax.Array) -> jax.Array:
    """What `_decayed` was given to make `mean` of `last`."""
    decay = jnp.asarray(decay, mean.dtype)
    return (mean - decay * last) / (1 - decay)


def _seen(decay: _base.Scalar, steps: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """What bias correction divides by: the part of a running mean that is not its start at zero; one at step 0."""
    return jnp.where(steps > 0, 1 - jnp.asarray(decay, dtype) ** steps.astype(dtype), 1)
