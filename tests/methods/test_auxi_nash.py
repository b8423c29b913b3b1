"""AuxiNash: the implicit derivative, one whole step of the powers by hand, and when there is none."""

import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest

import optax_mtl as mtl
import problems

T = 3


def run(tx, matrices, value_fn, masks=None):
    params = problems.params()
    step = jax.jit(lambda g, s, mask: tx.update(g, s, params, value_fn=value_fn, task_mask=mask))
    state, updates, states = tx.init(params), [], []
    for k, matrix in enumerate(matrices):
        mask = np.ones(matrix.shape[0], bool) if masks is None else masks[k]
        update, state = step(problems.tree_of(matrix), state, jnp.asarray(mask))
        updates.append(problems.vector_of(update))
        states.append(state)
    return np.stack(updates), states


def test_the_implicit_derivative_is_that_of_the_solution():
    """Central differences of the exact solution, in double precision."""
    matrix = problems.gradients() * np.array([[1.0], [30.0], [0.01]])
    products, powers, h = np.array([0.3, -2.0, 0.05]), np.array([0.5, 1.8, 0.7]), 1e-5
    with problems.enable_x64():
        gramian = jnp.asarray(matrix @ matrix.T)

        def taken(powers):
            weights = mtl.nash_mtl_weights(gramian, preference=jnp.asarray(powers))
            return -products @ np.asarray(weights)

        expected = [(taken(powers + h * e) - taken(powers - h * e)) / (2 * h) for e in np.eye(T)]
        weights = mtl.nash_mtl_weights(gramian, preference=jnp.asarray(powers))
        found = mtl.auxi_nash_preference_grads(gramian, weights, jnp.asarray(powers), jnp.asarray(products))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("primary", [1, (0, 2)], ids=str)
def test_two_steps_of_the_powers_by_hand(primary):
    """On quadratic losses, whose Hessians are multiples of the identity: Neumann's terms are known."""
    rate, momentum, factor, every = 0.3, 0.9, 0.01, 2
    main = [primary] if isinstance(primary, int) else list(primary)
    value_fn = problems.value_fn(T)
    jacobian = problems.vector_of(jax.jacobian(value_fn)(problems.params()))
    curvatures = 2 * np.arange(1, T + 1)
    matrices = np.stack([problems.gradients(seed=k) for k in range(4)])
    powers, velocity, expected = np.ones(T), np.zeros(T), []
    for k, matrix in enumerate(matrices):
        gramian = matrix @ matrix.T
        weights = np.asarray(mtl.nash_mtl_weights(jnp.asarray(gramian, jnp.float32), preference=powers), np.float64)
        if (k + 1) % every == 0:
            shrunk = 1 - factor * (weights / weights.mean()) @ curvatures
            vector = jacobian[main].sum(0) * (1 + shrunk + shrunk**2 + shrunk**3)
            derivative = np.linalg.inv(gramian + np.diag(powers / weights**2)) @ np.diag(1 / weights)
            grads = -(matrix @ vector) @ derivative
            velocity = momentum * velocity + grads / max(np.linalg.norm(grads), 1)
            powers = np.maximum(powers - rate * velocity, 1e-4)
            powers = T * powers / powers.sum()
        expected.append(powers)
    tx = mtl.auxi_nash(
        T, primary=primary, every=every, neumann_rate=factor, optimizer=optax.sgd(rate, momentum=momentum)
    )
    updates, states = run(tx, matrices, value_fn)
    np.testing.assert_allclose([state.method.preference.value for state in states], expected, rtol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(updates, axis=1), 1, rtol=1e-4)
    assert np.abs(powers - 1).max() > 0.1


def test_between_changes_it_is_nash_with_unequal_powers():
    powers = jnp.array([2.0, 0.5, 0.5])
    matrices = np.stack([problems.gradients(seed=k) for k in range(2)])
    ours, states = run(mtl.auxi_nash(T, preference=10 * powers, max_norm=None), matrices, problems.value_fn(T))
    nash, _ = run(mtl.nash_mtl(T, preference=powers, max_norm=None), matrices, problems.value_fn(T))
    np.testing.assert_allclose(ours, nash, rtol=1e-5)
    assert float(states[-1].method.residual) < 1e-5


def test_absent_tasks_keep_their_power_and_without_the_primary_nothing_counts():
    matrices = np.stack([problems.gradients(seed=k) for k in range(4)])
    masks = np.array([[1, 1, 1], [0, 1, 1], [1, 1, 0], [1, 1, 1]], bool)
    tx = mtl.auxi_nash(T, every=2, optimizer=optax.sgd(0.3))
    updates, states = run(tx, matrices, problems.value_fn(T), masks)
    np.testing.assert_array_equal(updates[1], 0)
    powers = np.stack([state.method.preference.value for state in states])
    np.testing.assert_array_equal(powers[:2], 1)
    assert powers[2, 2] == 1
    assert np.all(powers[2, :2] != 1)
    np.testing.assert_allclose(powers.sum(1), T, rtol=1e-6)


def test_a_validation_loss_that_is_not_finite_teaches_nothing():
    tx = mtl.auxi_nash(T, every=1)
    updates, states = run(tx, [problems.gradients()], lambda params: jnp.nan * problems.value_fn(T)(params))
    np.testing.assert_array_equal(states[-1].method.preference.value, 1)
    assert np.isfinite(updates).all()


def test_a_norm_of_zero_is_refused():
    with pytest.raises(ValueError, match="write max_norm=None"):
        mtl.auxi_nash(T, max_norm=0)
