"""CDTT: what its formulas say of special cases."""

import jax
from jax import numpy as jnp
import numpy as np

import optax_mtl as mtl
import problems


@jax.jit
def solve(gramian, tension, passes):
    central = mtl.edm_weights(gramian)
    return mtl.cdtt_weights(gramian, central, tension, passes=passes), central


def weights(matrix, tension, passes=1):
    pulled, central = solve(jnp.asarray(matrix @ matrix.T, jnp.float32), jnp.asarray(tension, jnp.float32), passes)
    return np.asarray(pulled), central


def test_equal_tensions_of_two_tasks_cancel():
    matrix = problems.gradients(num_tasks=2)
    pulled, central = weights(matrix, [1.3, 1.3])
    np.testing.assert_allclose(pulled, central, rtol=1e-4)


def test_a_pull_has_the_length_of_the_tension():
    """Before the correction: v = d + sum of tension times the unit vector to each gradient."""
    matrix = problems.gradients(num_tasks=3)
    tension = np.array([0.9, 1.1, 1.3])
    pulled, central = weights(matrix, tension, passes=0)
    d = np.asarray(central) @ matrix
    unit = (matrix - d) / np.linalg.norm(matrix - d, axis=1, keepdims=True)
    np.testing.assert_allclose(pulled @ matrix, d + tension @ unit, rtol=1e-3, atol=1e-4)


def test_two_tasks_are_left_without_conflict_and_more_passes_leave_less():
    residues = {1: 0, 20: 0}
    for seed in range(40):
        matrix = problems.gradients("conflicting", 2, seed)
        pulled, _ = weights(matrix, [0.7, 1.5])
        norms = np.linalg.norm(matrix, axis=1)
        assert np.all(matrix @ (pulled @ matrix) >= -1e-4 * norms)
        matrix = problems.gradients("conflicting", 5, seed)
        for passes in residues:
            pulled, _ = weights(matrix, np.linspace(0.7, 1.5, 5), passes)
            residues[passes] += np.any(matrix @ (pulled @ matrix) < -1e-3)
    assert residues[20] < residues[1]


def test_relative_tension_scales_with_the_direction():
    matrix = problems.gradients(num_tasks=2)
    losses = jnp.array([10.0, 0.1])
    updates = {}
    for tension in ("absolute", "relative"):
        tx = mtl.cdtt(2, window=1, tension=tension)
        state = tx.init(problems.params())
        for _ in range(2):
            update, state = tx.update(problems.tree_of(matrix), state, losses=losses)
        updates[tension] = problems.vector_of(update)
    central = np.asarray(mtl.edm_weights(jnp.asarray(matrix @ matrix.T, jnp.float32))) @ matrix
    pulls = {tension: update - central for tension, update in updates.items()}
    np.testing.assert_allclose(pulls["relative"], np.linalg.norm(central) * pulls["absolute"], rtol=1e-2, atol=1e-4)
    assert np.linalg.norm(pulls["absolute"]) > 0.05


def test_tension_grows_with_the_loss_and_stays_in_its_range():
    losses = jnp.array([1e-6, 0.1, 1.0, 10.0, 1e6])
    tension = np.asarray(mtl.cdtt_tension(jnp.ones(5), losses, 0.3))
    assert np.all(np.diff(tension) > 0)
    assert np.all((tension >= 0.7) & (tension <= 1))
    np.testing.assert_allclose(tension[2], 0.85, rtol=1e-6)  # no change of norm, a loss of one
    np.testing.assert_array_equal(mtl.cdtt_tension(jnp.ones(5), losses, 0.0), 1)
