"""Methods that learn or remember, step by step against LibMTL and TorchJD."""

import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest

import optax_mtl as mtl
from parity import records
from parity.records import close, norm

RUNS = records.load("stateful")
groups = pytest.mark.parametrize("group", RUNS)


def learn(tx, run):
    """Weights and states `(runs, steps, ...)` over the recorded losses; the gradients have the recorded norms."""
    _, state = records.all_steps(lambda: tx, run["norms"][..., None], run["losses"])
    return state.task_weights, state.method


@groups
def test_rlw(group):
    run = RUNS[group]
    close(jax.jit(jax.vmap(jax.vmap(mtl.rlw_weights)))(run["z"]), run["libmtl.RLW"], 1, 1e-14)


@groups
def test_dwa(group):
    run = RUNS[group]
    weights, _ = learn(mtl.dwa(run["losses"].shape[2], steps_per_epoch=1, temperature=2.0), run)
    np.testing.assert_allclose(weights, run["libmtl.DWA"], rtol=1e-14)  # TorchJD's are the same


@groups
def test_uncertainty(group):
    run = RUNS[group]
    num_runs, _, num_tasks = run["losses"].shape

    def method(init):
        return mtl.uncertainty(num_tasks, optimizer=optax.sgd(0.1), init=init)

    # TorchJD starts at 0 and LibMTL at -0.5: the runs once with each.
    twice = np.tile(run["norms"], (2, 1, 1))[..., None], np.tile(run["losses"], (2, 1, 1))
    _, state = records.all_steps(method, *twice, np.repeat([0.0, -0.5], num_runs))
    torchjd, libmtl = np.split(np.asarray(state.task_weights), 2)
    np.testing.assert_allclose(torchjd, run["torchjd.UW"], rtol=1e-13)
    np.testing.assert_allclose(libmtl, run["libmtl.UW"], rtol=1e-13)
    torchjd, libmtl = np.split(np.asarray(state.method.value), 2)
    np.testing.assert_allclose(torchjd, run["torchjd.UW.after"], rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(libmtl[:, :-1], run["libmtl.UW.before"][:, 1:], rtol=1e-12, atol=1e-14)


@groups
def test_gradnorm_gradient(group):
    run = RUNS[group]
    ratios = run["losses"] / run["losses"][:, :1]
    weights = run["libmtl.GradNorm"]
    grads = np.asarray(jax.jit(jax.vmap(jax.vmap(mtl.gradnorm_weight_grads)))(run["norms"], weights, ratios))
    # LibMTL learns p and weighs by T softmax(p): the gradient goes through the Jacobian of that.
    np.testing.assert_allclose(weights, weights.shape[2] * jax.nn.softmax(run["libmtl.GradNorm.before"]), rtol=1e-14)
    through = weights * (grads - (weights * grads).mean(-1, keepdims=True))
    # In its first epoch LibMTL does not learn.
    close(through[:, 1:], run["libmtl.GradNorm.grad"][:, 1:], norm(run["norms"][:, 1:]), 1e-13)


@groups
def test_gradnorm_step(group):
    run = RUNS[group]
    # From equal weights, the Jacobian only takes the mean off, as our renormalisation does: a step, after one at rest
    # like LibMTL's first, goes in the direction of LibMTL's.
    optimizer = optax.sgd(lambda count: jnp.where(count == 1, 0.01, 0.0))
    weights, _ = learn(mtl.gradnorm(run["losses"].shape[2], optimizer=optimizer), run)
    np.testing.assert_allclose(weights[:, :2], 1, rtol=1e-14)
    step, gradient = np.asarray(weights[:, 2]) - 1, run["libmtl.GradNorm.grad"][:, 1]
    unit = np.maximum(norm(gradient), 1e-300)[:, None]
    close(step / np.maximum(norm(step), 1e-300)[:, None], -gradient / unit, 1, 1e-10)
