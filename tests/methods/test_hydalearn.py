"""HydaLearn: gains are losses that really fell."""

import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest

import optax_mtl as mtl
import problems


def main_loss(params):
    return sum(jnp.sum((leaf - 1) ** 2) for leaf in jax.tree.leaves(params))


def losses_of(params):
    """The main task; a helper with the same minimum; an enemy."""
    main = main_loss(params)
    return {"main": main, "helper": 0.5 * main, "enemy": -0.2 * main}  # in the order enemy, helper, main


@pytest.mark.parametrize("learning_rate", [1e-3, 0.1, optax.constant_schedule(0.1)], ids=["small", "large", "schedule"])
def test_weights_are_in_the_ratio_of_the_gains(learning_rate):
    params = problems.params()
    losses, task_grads = mtl.value_and_task_grads(losses_of)(params)
    tx = mtl.hydalearn(3, learning_rate=learning_rate, primary=2)
    _, state = jax.jit(lambda g, s: tx.update(g, s, params, value_fn=losses_of))(task_grads, tx.init(params))
    rate = 0.1 if callable(learning_rate) else learning_rate
    gains = np.array(
        [
            float(main_loss(params) - main_loss(jax.tree.map(lambda p, g, i=i: p - rate * g[i], params, task_grads)))
            for i in range(3)
        ]
    )
    assert gains[0] < 0 < gains[1]
    expected = np.maximum(gains, 0) / np.maximum(gains, 0).sum()
    np.testing.assert_allclose(optax.tree.get(state, "task_weights"), expected, rtol=5e-3)


def test_a_step_too_long_is_penalised_by_the_exact_form_only():
    """The helper points the right way, but its step is so long that it harms the main task."""
    params = {"w": jnp.zeros(3)}

    def value_fn(params):
        main = jnp.sum((params["w"] - 1) ** 2)
        return jnp.stack([main, 30 * main])

    _, task_grads = mtl.value_and_task_grads(value_fn)(params)
    weights = {}
    for lookahead in ("exact", "first_order"):
        tx = mtl.hydalearn(2, learning_rate=0.05, lookahead=lookahead)
        _, state = tx.update(task_grads, tx.init(params), params, value_fn=value_fn)
        weights[lookahead] = np.asarray(optax.tree.get(state, "task_weights"))
    np.testing.assert_allclose(weights["exact"], [1, 0], atol=1e-6)
    np.testing.assert_allclose(weights["first_order"], [1 / 31, 30 / 31], rtol=1e-5)


def test_first_order_is_the_limit_of_exact():
    params = problems.params()
    _, task_grads = mtl.value_and_task_grads(losses_of)(params)
    exact, first = (
        mtl.hydalearn(3, learning_rate=1e-3, primary=2, lookahead=lookahead) for lookahead in ("exact", "first_order")
    )
    exact_update, _ = exact.update(task_grads, exact.init(params), params, value_fn=losses_of)
    first_update, _ = first.update(task_grads, first.init(params), params)
    np.testing.assert_allclose(problems.vector_of(exact_update), problems.vector_of(first_update), rtol=2e-2)


@pytest.mark.parametrize(
    ("negative", "expected"), [("clip", [1, 0, 0]), ("abs", [0.5, 0.25, 0.25]), ("raw", [4, -2, -1])]
)
def test_negative_gains(negative, expected):
    """Gains 4, -2, and -2 (or -1 for raw, so that the sum is positive)."""
    gains = jnp.array([4.0, -2.0, -1.0 if negative == "raw" else -2.0])
    np.testing.assert_allclose(mtl.hydalearn_weights(gains, 0, negative=negative), expected, rtol=1e-6)


def test_if_nothing_gains_the_main_task_is_on_its_own():
    np.testing.assert_array_equal(mtl.hydalearn_weights(jnp.array([-1.0, -2.0, 0.0]), 1), [0, 1, 0])
    np.testing.assert_array_equal(mtl.hydalearn_weights(jnp.zeros(3), 2), [0, 0, 1])


def test_without_the_main_task_nothing_moves():
    params = problems.params()
    _, task_grads = mtl.value_and_task_grads(losses_of)(params)
    tx = mtl.hydalearn(3, learning_rate=0.1, primary=2)
    mask = jnp.array([True, True, False])
    update, _ = tx.update(task_grads, tx.init(params), params, value_fn=losses_of, task_mask=mask)
    np.testing.assert_array_equal(problems.vector_of(update), 0)


def test_the_step_of_an_absent_task_cannot_spoil_the_others():
    """A gradient of NaN gives a trial loss of NaN, which must stay with its task."""
    params = problems.params()
    _, task_grads = mtl.value_and_task_grads(losses_of)(params)
    tx = mtl.hydalearn(3, learning_rate=0.1, primary=2)
    broken = jax.tree.map(lambda g: g.at[1].set(jnp.nan), task_grads)
    update, state = tx.update(broken, tx.init(params), params, value_fn=losses_of)
    np.testing.assert_allclose(optax.tree.get(state, "task_weights"), [0, 0, 1])
    assert np.isfinite(problems.vector_of(update)).all()


def test_total_scales_the_weights():
    params = problems.params()
    _, task_grads = mtl.value_and_task_grads(losses_of)(params)
    tx = mtl.hydalearn(3, learning_rate=0.1, primary=2, total=5.0)
    _, state = tx.update(task_grads, tx.init(params), params, value_fn=losses_of)
    np.testing.assert_allclose(np.sum(optax.tree.get(state, "task_weights")), 5, rtol=1e-5)


def test_value_fn_must_return_the_losses_of_all_tasks():
    params = problems.params()
    _, task_grads = mtl.value_and_task_grads(losses_of)(params)
    tx = mtl.hydalearn(3, learning_rate=0.1)
    with pytest.raises(ValueError, match="value_fn returned 1 losses, wanted those of all 3 tasks"):
        tx.update(task_grads, tx.init(params), params, value_fn=main_loss)


def test_primary_must_be_a_task():
    for bad in (3, -4, 1.0):
        with pytest.raises(ValueError, match="primary must be"):
            mtl.hydalearn(3, learning_rate=0.1, primary=bad)
