"""Where two methods must agree: identities between them, each on gradients where its condition holds."""

import functools

import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest

import optax_mtl as mtl

T, SIZE = 3, 20


def conflicting(seed, num_tasks=T):
    """Every pair of tasks conflicts, and there is a direction that improves all."""
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal((num_tasks, SIZE))
    return matrix - matrix.mean(0) + 0.3 * rng.standard_normal(SIZE)


def agreeing(seed):
    """No pair of tasks conflicts."""
    return np.abs(np.random.default_rng(seed).standard_normal((T, SIZE)))


@functools.cache
def program(factory, *hyperparams, num_tasks=T):
    tx = factory(num_tasks, **dict(hyperparams))
    return tx, jax.jit(tx.update)


def weights(factory, matrix, losses=None, steps=1, **hyperparams):
    """The weights of the last of some equal steps, `(T,)`."""
    tx, update = program(factory, *hyperparams.items(), num_tasks=len(matrix))
    state = tx.init(jnp.zeros(SIZE))
    losses = None if losses is None else jnp.asarray(losses, jnp.float32)
    for _ in range(steps):
        _, state = update(jnp.asarray(matrix, jnp.float32), state, losses=losses)
    return np.asarray(optax.tree.get(state, "task_weights"), np.float64)


def same_direction(ours, theirs):
    np.testing.assert_allclose(ours / np.abs(ours).sum(), theirs / np.abs(theirs).sum(), rtol=1e-4, atol=1e-6)


seeds = pytest.mark.parametrize("seed", range(4))


@seeds
def test_fairgrad_of_one_is_nash(seed):
    matrix = conflicting(seed)
    nash = weights(mtl.nash_mtl, matrix, max_norm=None)
    np.testing.assert_allclose(weights(mtl.fairgrad, matrix, alpha=1.0), nash, rtol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(nash @ matrix) ** 2, T, rtol=1e-4)


@seeds
def test_upgrad_of_two_is_half_of_pcgrad(seed):
    matrix = conflicting(seed, num_tasks=2)
    np.testing.assert_allclose(weights(mtl.upgrad, matrix), weights(mtl.pcgrad, matrix) / 2, rtol=1e-4)


@seeds
def test_without_conflict_projections_are_the_mean(seed):
    matrix = agreeing(seed)
    np.testing.assert_allclose(weights(mtl.upgrad, matrix), 1 / T, rtol=1e-6)
    np.testing.assert_allclose(weights(mtl.dual_proj, matrix), 1 / T, rtol=1e-6)
    np.testing.assert_allclose(weights(mtl.pcgrad, matrix, order="fixed"), 1, rtol=1e-6)


@seeds
def test_central_directions(seed):
    matrix = conflicting(seed)  # the min-norm point of the unit gradients is inside: all three are the bisector
    edm = weights(mtl.edm, matrix)
    assert np.all(edm > 0)
    np.testing.assert_allclose(weights(mtl.imtl_g, matrix), edm, rtol=1e-3)
    same_direction(weights(mtl.con_fig, matrix), edm)
    lengths = np.linalg.norm(matrix, axis=1)
    same_direction(weights(mtl.mgda, matrix / lengths[:, None]) / lengths, edm)


@seeds
def test_nash_of_two_is_the_bisector(seed):
    matrix = conflicting(seed, num_tasks=2)
    same_direction(weights(mtl.nash_mtl, matrix), weights(mtl.edm, matrix))


@seeds
def test_gradvac_starts_as_pcgrad(seed):
    matrix = conflicting(seed)
    np.testing.assert_allclose(
        weights(mtl.gradvac, matrix, order="fixed"), weights(mtl.pcgrad, matrix, order="fixed"), rtol=1e-4
    )


@seeds
def test_cagrad_without_a_radius_is_the_mean(seed):
    np.testing.assert_allclose(weights(mtl.cagrad, conflicting(seed), c=0.0), 1 / T, rtol=1e-6)


@seeds
def test_the_logarithm_of_the_losses(seed):
    """GLS, and the fixed points of uncertainty weighting and IMTL-L, weigh a task by one over its loss."""
    matrix, losses = conflicting(seed), np.random.default_rng(seed).uniform(0.2, 3, T)
    inverse = weights(mtl.scale_invariant, matrix, losses)
    np.testing.assert_allclose(inverse, 1 / losses, rtol=1e-5)
    same_direction(weights(mtl.gls, matrix, losses), inverse)
    rate = optax.sgd(0.3)
    same_direction(weights(mtl.uncertainty, matrix, losses, steps=200, optimizer=rate), inverse)
    same_direction(weights(mtl.imtl_l, matrix, losses, steps=200, optimizer=rate), inverse)


@seeds
def test_cdtt_with_equal_pulls_of_two_is_edm(seed):
    matrix = conflicting(seed, num_tasks=2)
    cdtt = weights(mtl.cdtt, matrix, [1.0, 1.0], steps=3, window=1)
    np.testing.assert_allclose(cdtt, weights(mtl.edm, matrix), rtol=1e-3)


@seeds
def test_cr_mogm_without_memory_is_its_inner_method(seed):
    matrix = conflicting(seed)
    wrapped = weights(lambda num_tasks: mtl.cr_mogm(num_tasks, mtl.upgrad(num_tasks), alpha=0.0), matrix, steps=2)
    np.testing.assert_allclose(wrapped, weights(mtl.upgrad, matrix), rtol=1e-6)
