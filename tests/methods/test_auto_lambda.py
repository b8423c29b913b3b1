"""Auto-lambda: the meta-gradient is the derivative it claims to be, and the weights go where the primary loss falls."""

import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest

import optax_mtl as mtl
import problems


def validation_losses(params):
    """Not the training losses: other centres, and curved otherwise."""
    flat = jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(params)])
    return {"a": jnp.sum(jnp.cosh(flat - 0.3)), "b": jnp.sum((flat + 1) ** 4), "c": jnp.sum(jnp.sin(flat))}


@pytest.mark.parametrize("primary", [(0,), (1, 2)], ids=str)
def test_the_meta_gradient_is_the_derivative_of_the_loss_ahead(primary):
    params, weights, eta = problems.params(), jnp.array([0.1, -0.2, 0.3]), 0.07
    task_grads = problems.tree_of(problems.gradients())
    is_primary = jnp.isin(jnp.arange(3), jnp.array(primary))

    def loss_ahead(weights):
        ahead = jax.tree.map(lambda p, d: p - eta * d, params, mtl.combine(weights, task_grads))
        return sum(jax.tree.leaves(validation_losses(ahead))[i] for i in primary)

    expected = jax.grad(loss_ahead)(weights)
    found = mtl.auto_lambda_meta_grads(validation_losses, params, task_grads, weights, eta, is_primary)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_on_a_linear_loss_it_is_a_row_of_the_gramian():
    """Where the validation gradient is that of training, everywhere: minus the learning rate times `M[primary]`."""
    matrix = problems.gradients()

    def value_fn(params):
        flat = jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(params)])
        return jnp.asarray(matrix, jnp.float32) @ flat

    found = mtl.auto_lambda_meta_grads(
        value_fn, problems.params(), problems.tree_of(matrix), jnp.full(3, 0.1), 0.5, jnp.array([False, True, False])
    )
    np.testing.assert_allclose(found, -0.5 * (matrix @ matrix.T)[1], rtol=1e-4, atol=1e-5)


def test_weights_step_before_they_are_used_and_zero_is_no_trap():
    params = problems.params()
    matrix = problems.gradients()
    tx = mtl.auto_lambda(3, learning_rate=0.1, optimizer=optax.sgd(0.5), init=0.0)
    task_grads = problems.tree_of(matrix)
    update, state = tx.update(task_grads, tx.init(params), params, value_fn=validation_losses)
    meta = mtl.auto_lambda_meta_grads(
        validation_losses, params, task_grads, jnp.zeros(3), 0.1, jnp.array([True, False, False])
    )
    np.testing.assert_allclose(optax.tree.get(state, "task_weights"), -0.5 * meta, rtol=1e-5)
    np.testing.assert_allclose(problems.vector_of(update), -0.5 * np.asarray(meta) @ matrix, rtol=1e-4)


def test_without_a_primary_task_nothing_moves_and_nothing_is_learned():
    params, task_grads = problems.params(), problems.tree_of(problems.gradients())
    tx = mtl.auto_lambda(3, learning_rate=0.1, primary=(0, 2), optimizer=optax.sgd(0.5))
    mask = jnp.array([False, True, False])
    update, state = tx.update(task_grads, tx.init(params), params, value_fn=validation_losses, task_mask=mask)
    np.testing.assert_array_equal(problems.vector_of(update), 0)
    np.testing.assert_allclose(state.method.weights.value, 0.1, rtol=1e-6)


def test_a_schedule_is_read_at_every_step():
    params, task_grads = problems.params(), problems.tree_of(problems.gradients())
    for schedule, rates in ((optax.linear_schedule(0.1, 0.3, 2), (0.1, 0.2)), (0.1, (0.1, 0.1))):
        tx = mtl.auto_lambda(3, learning_rate=schedule, optimizer=optax.sgd(0.5))
        weights, state = jnp.full(3, 0.1), tx.init(params)
        for rate in rates:
            meta = mtl.auto_lambda_meta_grads(
                validation_losses, params, task_grads, weights, rate, jnp.array([True, False, False])
            )
            weights = weights - 0.5 * meta
            _, state = tx.update(task_grads, state, params, value_fn=validation_losses)
            np.testing.assert_allclose(optax.tree.get(state, "task_weights"), weights, rtol=1e-5)


def test_a_validation_loss_that_is_not_finite_teaches_nothing():
    params, task_grads = problems.params(), problems.tree_of(problems.gradients())
    tx = mtl.auto_lambda(3, learning_rate=0.1, optimizer=optax.sgd(0.5))

    def broken(params):
        return {name: jnp.nan * loss for name, loss in validation_losses(params).items()}

    update, state = tx.update(task_grads, tx.init(params), params, value_fn=broken)
    np.testing.assert_allclose(optax.tree.get(state, "task_weights"), 0.1, rtol=1e-6)
    assert np.isfinite(problems.vector_of(update)).all()


def test_value_fn_must_return_the_losses_of_all_tasks():
    params, task_grads = problems.params(), problems.tree_of(problems.gradients())
    tx = mtl.auto_lambda(3, learning_rate=0.1)
    with pytest.raises(ValueError, match="auto_lambda: value_fn returned 1 losses, wanted those of all 3 tasks"):
        tx.update(task_grads, tx.init(params), params, value_fn=lambda params: validation_losses(params)["a"])
