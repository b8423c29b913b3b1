"""Half precision and loss scales: what the recipe in docs/scale.md promises.

(That Gramians of half precision are summed in float32, and that every method is the same in bfloat16, is in
`test_gramian.py` and `test_laws.py`.)
"""

import functools

import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest

import optax_mtl as mtl
import problems

T = 3
LIGHT = mtl.value_and_light_grads


def problem(dtype, factors=(1.0, 1.0, 1.0)):
    """Losses of a network that computes in `dtype` on float32 parameters; `factors` are of the tasks' losses."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32) / 2
    params = {"w": normal(5, 8), "v": normal(8, T)}
    x, y = normal(12, 5), normal(12, T)

    def loss_fn(params, scale):
        """The scaled losses: each scaled where it is still exact, and pulled back in half precision."""
        half = jax.tree.map(lambda p: p.astype(dtype), params)
        outputs = jnp.tanh(x.astype(dtype) @ half["w"]) @ half["v"]
        errors = jnp.mean((outputs.astype(jnp.float32) - y) ** 2, axis=0)
        return errors * jnp.asarray(factors, jnp.float32) * scale

    return loss_fn, params


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def scaled_step(tx, loss_fn, oracle, params, state, scale):
    """As in the docs: `scale` is one number, or one a task."""
    losses, task_grads = oracle(loss_fn)(params, scale)
    per_task = jnp.broadcast_to(scale, losses.shape)
    task_grads = jax.tree.map(lambda g: g / per_task.reshape(-1, *[1] * (g.ndim - 1)), task_grads)
    return tx.update(task_grads, state, params, losses=losses / scale)


METHODS = {
    "upgrad": mtl.upgrad,
    "nash_mtl": mtl.nash_mtl,
    "pcgrad": lambda n: mtl.pcgrad(n, order="fixed"),
    "gradnorm": mtl.gradnorm,
    "scale_by_mao": mtl.scale_by_mao,
}


@pytest.mark.parametrize("method", METHODS)
def test_a_scale_that_is_taken_out_again_changes_nothing(method):
    """Not a bit, if it is a power of two and nothing over- or underflows; so for each task's own."""
    loss_fn, params = problem(jnp.bfloat16)
    with problems.relaxed_promotion():
        tx = METHODS[method](T)
        step = lambda scale: scaled_step(
            tx, loss_fn, mtl.value_and_task_grads, params, tx.init(params), jnp.asarray(scale)
        )
        expected = step(jnp.ones(T))
        for scale in (2.0**12 * jnp.ones(T), 2.0 ** jnp.array([-3, 0, 10])):
            jax.tree.map(np.testing.assert_array_equal, step(scale), expected)


@pytest.mark.parametrize("make", [mtl.upgrad, mtl.nash_mtl, mtl.mgda], ids=lambda make: make.__name__)
def test_deferred_gradients_are_scaled_in_the_update(make):
    """They cannot be divided: the update can, by what the method makes of a common factor."""
    loss_fn, params = problem(jnp.float32)
    tx, scale = make(T), 2.0**10
    power = 0 if make is mtl.nash_mtl else 1
    update = jax.jit(lambda params: tx.update(LIGHT(loss_fn)(params, scale)[1], tx.init(params), params)[0])(params)
    expected, _ = scaled_step(tx, loss_fn, mtl.value_and_task_grads, params, tx.init(params), jnp.asarray(1.0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a / scale**power, b, rtol=1e-4, atol=1e-5), update, expected)


def test_in_float16_a_scale_saves_small_gradients():
    """A loss in small units: its gradients vanish on the way back, or do not."""
    factors = (1.0, 1.0, 1e-7)
    small = lambda dtype: problem(dtype, factors)
    tx = mtl.nash_mtl(T)
    (loss_fn, params), (exact, _) = small(jnp.float16), small(jnp.float32)
    step = lambda loss_fn, scale: scaled_step(
        tx, loss_fn, mtl.value_and_task_grads, params, tx.init(params), jnp.asarray(scale)
    )
    expected, reference = step(exact, jnp.ones(T))
    _, without = step(loss_fn, jnp.ones(T))
    assert without.task_weights[2] == 0  # a gradient of zeros
    updates, state = step(loss_fn, jnp.array([1.0, 1.0, 2.0**20]))
    np.testing.assert_allclose(state.task_weights, reference.task_weights, rtol=2e-2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-2), updates, expected)


def test_a_scale_for_each_task_that_comes_down_where_it_overflows():
    """The task is set aside for the step, the others go on as if it were not there, and it is back soon."""
    loss_fn, params = problem(jnp.float16, (1.0, 1.0, 1e4))
    tx = mtl.upgrad(T)

    @jax.jit
    def train_step(params, state, scale):
        before = state.nonfinite_count
        updates, state = scaled_step(tx, loss_fn, mtl.value_and_task_grads, params, state, scale)
        overflowed = state.nonfinite_count > before
        scale = jnp.where(overflowed, scale / 2, jnp.minimum(scale * 2, 2.0**15))
        return updates, jax.tree.map(lambda p, u: p - 1e-6 * u, params, updates), state, scale

    alone = lambda params, mask: jax.jit(
        lambda params: tx.update(
            mtl.value_and_task_grads(loss_fn)(params, jnp.ones(T))[1], tx.init(params), params, task_mask=mask
        )[0]
    )(params)
    expected = alone(params, jnp.array([True, True, False]))
    state, scale, present, scales = tx.init(params), jnp.full(T, 2.0**12), [], []
    for k in range(16):
        updates, params, state, scale = train_step(params, state, scale)
        present.append(np.asarray(state.task_present))
        scales.append(np.asarray(scale))
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((updates, params)))
        if k == 0:
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-2, atol=1e-3), updates, expected)
    present = np.array(present)
    assert not present[0, 2]
    assert present[:, :2].all()
    assert present[9:, 2].mean() >= 0.4  # from then on it overflows at most every other time, as the scale is tried
    np.testing.assert_array_equal(np.array(scales)[-1, :2], 2.0**15)
    np.testing.assert_array_equal(state.nonfinite_count[:2], 0)
    optax.tree.get(state, "nonfinite_count")
