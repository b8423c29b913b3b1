"""Aligned-MTL, IMTL and Krum: what is peculiar to each."""

import functools

import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest

import optax_mtl as mtl
import problems

J2 = np.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
J3 = np.array([[1.0, 2.0, 0.0, -1.0], [-2.0, 1.0, 1.0, 0.5], [0.5, -1.0, 2.0, 1.0]])


def aligned(scale_mode):
    return functools.partial(mtl.aligned_mtl_weights, scale_mode=scale_mode)


@pytest.mark.parametrize(
    ("weights_of", "grads", "factor", "weights"),
    [
        (mtl.imtl_g_weights, J2, 1, (0.59233, 0.40767)),
        (mtl.imtl_g_weights, J3, 1, (0.40296, 0.22844, 0.36860)),
        (mtl.con_fig_weights, J2, 1, (1.22648, 0.84412)),
        (mtl.con_fig_weights, J3, 1, (1.21060, 0.68629, 1.10737)),
        (aligned("min"), J2, 2, (0.55907, 0.40826)),  # these are for the mean of the aligned gradients
        (aligned("median"), J2, 2, (0.55907, 0.40826)),
        (aligned("rmse"), J2, 2, (1.51087, 1.10331)),
        (aligned("min"), J3, 3, (0.34438, 0.25504, 0.32249)),
        (aligned("median"), J3, 3, (0.44531, 0.32979, 0.41701)),
        (aligned("rmse"), J3, 3, (0.44937, 0.33280, 0.42081)),
    ],
)
def test_weights_worked_out_independently(weights_of, grads, factor, weights):
    gramian = jnp.asarray(grads @ grads.T, jnp.float32)
    np.testing.assert_allclose(weights_of(gramian) / factor, weights, atol=2e-5)
    # An absent task in the middle changes nothing.
    wider = np.insert(np.insert(gramian, 1, 7.0, axis=0), 1, 7.0, axis=1)
    present = jnp.asarray(np.arange(len(wider)) != 1)
    kept = np.asarray(weights_of(jnp.asarray(wider), present=present))[np.asarray(present)]
    np.testing.assert_allclose(kept / factor, weights, atol=2e-5)


# -- Aligned-MTL -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scale_mode", "scale"), [("min", np.min), ("median", np.median), ("rmse", np.mean)])
def test_aligned_gradients_are_orthogonal_and_as_long_as_the_component_that_is_chosen(scale_mode, scale):
    """Column `i` of `B` is what the preference for task `i` alone gives."""
    matrix = problems.gradients()
    gramian = jnp.asarray(matrix @ matrix.T, jnp.float32)
    columns = jax.vmap(lambda p: mtl.aligned_mtl_weights(gramian, scale_mode=scale_mode, preference=p))(jnp.eye(3))
    products = np.asarray(columns) @ (matrix @ matrix.T) @ np.asarray(columns).T
    length = scale(np.linalg.eigvalsh(matrix @ matrix.T))
    np.testing.assert_allclose(products, length * np.eye(3), rtol=1e-4, atol=1e-4 * length)


def test_aligned_mtl_leaves_out_components_that_are_zero_but_for_rounding():
    """Two equal gradients are one component, of twice the square: 2 and 9 are kept, and 2 is their median too."""
    matrix = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 3.0]])
    gramian = jnp.asarray(matrix @ matrix.T, jnp.float32)
    for scale_mode, square in (("min", 2), ("median", 2), ("rmse", 5.5)):
        expected = np.sqrt(square) * np.array([1 / np.sqrt(2), 1 / np.sqrt(2), 1 / 3])
        np.testing.assert_allclose(mtl.aligned_mtl_weights(gramian, scale_mode=scale_mode), expected, rtol=1e-5)


# -- IMTL ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gaussian", "conflicting", "badly_scaled", "extremely_scaled", "duplicate"])
def test_imtl_g_projects_equally_on_all_tasks(kind):
    for seed in range(5):
        matrix = problems.gradients(kind, seed=seed)
        weights = np.asarray(mtl.imtl_g_weights(mtl.task_gramian(jnp.asarray(matrix, jnp.float32))), np.float64)
        projections = matrix @ (weights @ matrix) / np.linalg.norm(matrix, axis=1)
        np.testing.assert_allclose(weights.sum(), 1, rtol=1e-3)
        np.testing.assert_allclose(projections / projections[0], 1, rtol=2e-3)


def test_imtl_g_is_edm_and_parallel_to_con_fig_where_no_weight_is_negative():
    matrices = np.stack([problems.gradients(seed=seed) for seed in range(12)])
    gramians = jnp.asarray(matrices @ matrices.swapaxes(1, 2), jnp.float32)
    methods = (mtl.imtl_g_weights, mtl.edm_weights, mtl.con_fig_weights)
    imtl_g, edm, con_fig = (np.asarray(jax.jit(jax.vmap(weights_of))(gramians)) for weights_of in methods)
    positive = np.all(imtl_g > 0, axis=1)
    assert positive.sum() >= 6
    np.testing.assert_allclose(imtl_g[positive], edm[positive], rtol=1e-3)
    np.testing.assert_allclose(imtl_g[positive], (con_fig / con_fig.sum(1, keepdims=True))[positive], rtol=1e-3)


def test_imtl_g_may_ascend_as_published():
    matrix = np.array([[-3.2, 1.6, -1.4], [-0.3, 0, 0], [0, -0.5, 0.2]])
    weights = np.asarray(mtl.imtl_g_weights(jnp.asarray(matrix @ matrix.T, jnp.float32)))
    np.testing.assert_allclose(weights, [-0.20, 2.02, -0.82], atol=5e-3)
    assert np.all(matrix @ (weights @ matrix) < 0)


def test_imtl_g_without_an_answer_is_zero():
    """`1^T C^-1 n^-1` is zero: a combination projects equally, but its weights sum to zero."""
    unit = np.array([[0.6, 0.8, 0.0], [0.6, -0.8, 0.0], [0.8, 0.0, 0.6]])  # the third between the first two
    v = np.linalg.solve(unit @ unit.T, np.ones(3))
    assert (v < 0).any()
    norms = np.where(v < 0, -v[v < 0].sum() / v[v > 0].sum(), 1.0)
    matrix = norms[:, None] * unit
    np.testing.assert_allclose(np.sum(v / norms), 0, atol=1e-12)
    weights = mtl.imtl_g_weights(jnp.asarray(matrix @ matrix.T, jnp.float32))
    np.testing.assert_array_equal(weights, 0)
    opposite = jnp.array([[1.0, -2.0], [-2.0, 4.0]])
    np.testing.assert_array_equal(mtl.imtl_g_weights(opposite), 0)


def test_imtl_learns_scales_and_applies_imtl_g_to_the_scaled_gradients():
    """s <- s - lr (exp(s) L - 1); the heads get the gradients of the scaled losses."""
    losses = np.random.default_rng(0).uniform(0.1, 3, (5, 3))
    tx = mtl.imtl(3, optimizer=optax.sgd(0.3))
    state, s = tx.init(problems.params()), np.zeros(3)
    step = jax.jit(tx.update)
    for k in range(5):
        matrix = problems.gradients(seed=k)
        updates, state = step(problems.tree_of(matrix), state, losses=jnp.asarray(losses[k], jnp.float32))
        scaled = np.exp(s)[:, None] * matrix
        expected = np.asarray(mtl.imtl_g_weights(jnp.asarray(scaled @ scaled.T, jnp.float32))) @ scaled
        np.testing.assert_allclose(problems.vector_of(updates), expected, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(optax.tree.get(state, "head_weights"), np.exp(s), rtol=1e-5)
        s -= 0.3 * (np.exp(s) * losses[k] - 1)
    np.testing.assert_allclose(state.method.log_scales.value, s, rtol=1e-4)


def test_imtl_stays_finite_without_a_loss_and_with_a_negative_one():
    tx = mtl.imtl(2, optimizer=optax.sgd(40.0))
    task_grads, state = jnp.array([[1.0, 0.0], [0.0, 3.0]]), tx.init(jnp.zeros(2))
    for losses in ([0.0, -1.0], [0.0, -1.0], [0.0, -1.0], [1.0, 1.0]):
        updates, state = tx.update(task_grads, state, losses=jnp.array(losses))
        assert np.isfinite(updates).all()
    assert np.isfinite(state.method.log_scales.value).all()


# -- Krum ------------------------------------------------------------------------------------------------------------


def krum(matrix, n_byzantine, n_selected):
    """The paper's definition."""
    scores = []
    for i in range(len(matrix)):
        distances = sorted(np.sum((matrix[i] - matrix[j]) ** 2) for j in range(len(matrix)) if j != i)
        scores.append(sum(distances[: len(matrix) - n_byzantine - 2]))
    weights = np.zeros(len(matrix))
    weights[np.argsort(scores, kind="stable")[:n_selected]] = 1 / n_selected
    return weights


def test_krum_selects_what_the_paper_says():
    for n_byzantine, n_selected in ((0, 1), (1, 1), (2, 1), (2, 3), (4, 7)):
        for seed in range(5):
            matrix = problems.gradients(num_tasks=7, seed=seed)
            gramian = jnp.asarray(matrix @ matrix.T, jnp.float32)
            weights = mtl.krum_weights(gramian, n_byzantine=n_byzantine, n_selected=n_selected)
            np.testing.assert_allclose(weights, krum(matrix, n_byzantine, n_selected), rtol=1e-6)


def test_krum_anchor():
    rows = np.array([[1.0, 1, 1], [1, 0, 1], [75, -666, 23], [1, 2, 3], [2, 0, 1]])
    weights = mtl.krum_weights(jnp.asarray(rows @ rows.T, jnp.float32), n_byzantine=1, n_selected=4)
    np.testing.assert_array_equal(weights, [0.25, 0.25, 0, 0.25, 0.25])


def test_krum_counts_the_tasks_that_are_present():
    matrix = problems.gradients(num_tasks=6)
    tx = mtl.krum(6, n_byzantine=2, n_selected=2)
    task_grads, state = problems.tree_of(matrix), tx.init(problems.params())
    present = np.array([True, True, False, True, True, True])
    _, new = tx.update(task_grads, state, task_mask=jnp.asarray(present))
    np.testing.assert_allclose(new.task_weights[present], krum(matrix[present], 2, 2), rtol=1e-6)
    assert new.task_weights[2] == 0
    # With four there is no neighbour left: all of them, even if fewer are asked for.
    present[0] = False
    _, new = tx.update(task_grads, state, task_mask=jnp.asarray(present))
    np.testing.assert_allclose(new.task_weights, present / 4)
    # Fewer than are asked for, with neighbours.
    _, new = mtl.krum(6, n_selected=6).update(task_grads, state, task_mask=jnp.asarray(present))
    np.testing.assert_allclose(new.task_weights, present / 4)


def test_krum_refuses_what_can_never_work():
    with pytest.raises(ValueError, match="n_byzantine must be between 0 and 2, found 3"):
        mtl.krum(5, n_byzantine=3)
    with pytest.raises(ValueError, match="n_selected must be between 1 and 5, found 6"):
        mtl.krum(5, n_selected=6)
