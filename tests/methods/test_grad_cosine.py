"""Gradient cosine against the vectors themselves, in NumPy."""

from jax import numpy as jnp
import numpy as np
import pytest

import optax_mtl as mtl
import problems


def by_hand(matrix, primary, mode):
    main = matrix[list(primary)].sum(0)
    update = main.copy()
    for i, gradient in enumerate(matrix):
        if i in primary:
            continue
        product = main @ gradient
        cosine = product / np.linalg.norm(main) / np.linalg.norm(gradient)
        if mode == "unweighted":
            update += (cosine > 0) * gradient
        elif mode == "weighted":
            update += max(cosine, 0) * gradient
        else:
            update += gradient - min(product, 0) / (main @ main) * main
    return update


@pytest.mark.parametrize("mode", ["unweighted", "weighted", "project"])
@pytest.mark.parametrize("primary", [(0,), (1, 4)], ids=str)
def test_against_the_vectors(mode, primary):
    tx = mtl.grad_cosine(5, primary=primary if len(primary) > 1 else primary[0], mode=mode)
    params = problems.params()
    for seed in range(10):
        matrix = problems.gradients(num_tasks=5, seed=seed) * np.logspace(-2, 2, 5)[:, None]
        update, _ = tx.update(problems.tree_of(matrix), tx.init(params), params)
        expected = by_hand(matrix, primary, mode)
        scale = np.abs(matrix).max()
        np.testing.assert_allclose(problems.vector_of(update), expected, rtol=1e-4, atol=1e-5 * scale)
        main = matrix[list(primary)].sum(0)
        assert main @ problems.vector_of(update) >= main @ main - 1e-4 * np.linalg.norm(main) * scale


@pytest.mark.parametrize("mode", ["unweighted", "weighted", "project"])
def test_without_a_primary_task_nothing_moves(mode):
    """Of two primary tasks the one that is present will do; without either the helpers do not train."""
    gramian = jnp.asarray(problems.gradients() @ problems.gradients().T, jnp.float32)
    primary = jnp.array([True, False, True])
    without = mtl.grad_cosine_weights(gramian, primary, mode=mode, present=jnp.array([False, True, False]))
    np.testing.assert_array_equal(without, 0)
    one_left = mtl.grad_cosine_weights(gramian, primary, mode=mode, present=jnp.array([False, True, True]))
    alone = mtl.grad_cosine_weights(gramian, jnp.array([False, False, True]), mode=mode)
    np.testing.assert_allclose(one_left[1:], alone[1:], rtol=1e-6)


def test_primary_gradients_that_cancel_are_no_direction():
    gradient = problems.gradients(num_tasks=1)[0]
    matrix = np.stack([gradient, -gradient, gradient + 1e-3])
    gramian = jnp.asarray(matrix @ matrix.T, jnp.float32)
    primary = jnp.array([True, True, False])
    np.testing.assert_array_equal(mtl.grad_cosine_weights(gramian, primary), [1, 1, 0])
    np.testing.assert_array_equal(mtl.grad_cosine_weights(gramian, primary, mode="project"), [1, 1, 1])


@pytest.mark.parametrize(("bad", "words"), [(3, "between -3 and 2"), ((), "found none"), ((0, 1.0), "static int")])
def test_primary_must_name_tasks(bad, words):
    with pytest.raises(ValueError, match=words):
        mtl.grad_cosine(3, primary=bad)


@pytest.mark.parametrize("primary", [np.array([0, -1]), jnp.array([0, 2]), np.array([0, 2], np.uint8)], ids=repr)
def test_primary_may_be_an_array(primary):
    matrix = problems.gradients("conflicting")
    updates = []
    for named in ((0, 2), primary):
        tx = mtl.grad_cosine(3, primary=named)
        updates.append(problems.vector_of(tx.update(problems.tree_of(matrix), tx.init(problems.params()))[0]))
    np.testing.assert_array_equal(*updates)
    for bad, words in (
        (np.array([3]), "between -3 and 2"),
        (np.zeros(0, int), "found none"),
        (np.ones(2), "static int"),
    ):
        with pytest.raises(ValueError, match=words):
            mtl.grad_cosine(3, primary=bad)
