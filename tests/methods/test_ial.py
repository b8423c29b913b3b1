"""IAL: the established part exactly, the readings as documented."""

import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest

import optax_mtl as mtl

PARAMS = {"encoder": jnp.zeros(4), "heads": {"a": jnp.zeros(1), "b": jnp.zeros(1), "c": jnp.zeros(1)}}
LABELS = {"encoder": "shared", "heads": {"a": 0, "b": 1, "c": 2}}
LOSSES = jnp.array([0.5, 2.0, 1.0])


def task_grads(scales=(1.0, 1.0, 1.0)):
    encoder = jax.random.normal(jax.random.key(0), (3, 4)) * jnp.array(scales)[:, None]
    return {"encoder": encoder, "heads": {name: jnp.ones((1, 1)) for name in "abc"}}


def test_auxiliary_gradients_have_the_primarys_norm():
    tx = mtl.ial(3, primary=1, shared=LABELS, uncertainty_fn="none", optimizer=optax.sgd(0.1))
    grads = task_grads((1.0, 10.0, 1e-3))
    updates, state = tx.update(grads, tx.init(PARAMS), PARAMS, losses=LOSSES)
    norms = np.linalg.norm(grads["encoder"], axis=1)
    weights = np.asarray(optax.tree.get(state, "task_weights"))
    np.testing.assert_allclose(weights * norms, norms[1], rtol=1e-5)
    np.testing.assert_allclose(updates["encoder"], weights @ np.asarray(grads["encoder"]), rtol=1e-4)


def test_the_encoder_does_not_depend_on_an_auxiliary_tasks_scale():
    tx = mtl.ial(3, shared=LABELS, optimizer=optax.sgd(0.1))
    updates = [
        tx.update(task_grads(scales), tx.init(PARAMS), PARAMS, losses=LOSSES)[0]["encoder"]
        for scales in ((1.0, 1.0, 1.0), (1.0, 1e3, 1e-3))
    ]
    np.testing.assert_allclose(updates[0], updates[1], rtol=1e-4)


def test_decoders_are_weighted_by_their_own_uncertainty_alone():
    """s <- s - lr (1/2 - exp(-s) L / 2), from zero: weights exp(-s) / 2, whatever the gradients are."""
    tx = mtl.ial(3, shared=LABELS, optimizer=optax.sgd(0.1))
    state, s = tx.init(PARAMS), np.zeros(3)
    for scales in ((1.0, 1.0, 1.0), (5.0, 0.1, 3.0), (1.0, 1.0, 1.0)):
        updates, state = tx.update(task_grads(scales), state, PARAMS, losses=LOSSES)
        heads = np.concatenate([updates["heads"][name] for name in "abc"])
        np.testing.assert_allclose(heads, np.exp(-s) / 2, rtol=1e-5)
        s = s - 0.1 * (0.5 - np.exp(-s) * np.asarray(LOSSES) / 2)


@pytest.mark.parametrize(
    ("uncertainty_fn", "expected"),
    [
        ("exp", lambda v: np.exp(-v)),
        ("ratio", lambda v: np.minimum(1, v[0] / v)),
        ("none", np.ones_like),
        (lambda variances, primary: 1 / (1 + variances), lambda v: 1 / (1 + v)),
    ],
    ids=["exp", "ratio", "none", "callable"],
)
def test_factors_follow_the_uncertainties(uncertainty_fn, expected):
    tx = mtl.ial(3, shared=LABELS, uncertainty_fn=uncertainty_fn, optimizer=optax.sgd(0.5))
    state = tx.init(PARAMS)
    for _ in range(3):
        variances = np.exp(np.asarray(optax.tree.get(state, "value")))
        _, state = tx.update(task_grads(), state, PARAMS, losses=LOSSES)
    norms = np.linalg.norm(task_grads()["encoder"], axis=1)
    factors = np.asarray(optax.tree.get(state, "task_weights")) * norms / norms[0]
    np.testing.assert_allclose(factors[1:], expected(variances)[1:], rtol=1e-4)
    np.testing.assert_allclose(factors[0], 1, rtol=1e-5)


def test_without_the_primary_the_encoder_rests_and_the_decoders_learn():
    tx = mtl.ial(3, shared=LABELS, optimizer=optax.sgd(0.1))
    mask = jnp.array([False, True, True])
    updates, _ = tx.update(task_grads(), tx.init(PARAMS), PARAMS, losses=LOSSES, task_mask=mask)
    np.testing.assert_array_equal(updates["encoder"], 0)
    np.testing.assert_array_equal(updates["heads"]["a"], 0)
    np.testing.assert_allclose(updates["heads"]["b"], 0.5)


def test_an_unknown_uncertainty_function_is_refused():
    with pytest.raises(ValueError, match="uncertainty_fn must be one of 'exp', 'ratio', 'none', found 'log'"):
        mtl.ial(2, uncertainty_fn="log")
