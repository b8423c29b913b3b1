"""Methods that learn or remember, step by step against LibMTL and TorchJD."""

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
