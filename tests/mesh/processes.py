"""One of several processes that train together: `processes.py PORT INDEX COUNT FILE`. Writes losses and parameters."""

import json
import pathlib
import sys

import jax
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import numpy as np
import optax

import optax_mtl as mtl

STEPS, TASKS = 3, 3
port, index, count = map(int, sys.argv[1:4])
if count > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", count, index, initialization_timeout=60)
    assert jax.process_count() == count
    assert jax.device_count() == 2 * count
mesh = Mesh(np.array(jax.devices()).reshape(count, -1), ("data", "model"))  # each process has its part of the batch
rng = np.random.default_rng(0)
PARAMS = {"trunk": {"w": rng.standard_normal((8, 16)) / 3}, "heads": [rng.standard_normal(16) / 4] * TASKS}
SPECS = {"trunk": {"w": P("data", "model")}, "heads": [P("model")] * TASKS}
X, Y = rng.standard_normal((STEPS, 12, 8)), rng.standard_normal((STEPS, 12, TASKS))


def on_mesh(value, spec):
    value = np.asarray(value, np.float32)
    return jax.make_array_from_callback(value.shape, NamedSharding(mesh, spec), lambda part: value[part])


def own_rows(values):
    rows = np.split(np.asarray(values, np.float32), count)[index]
    return jax.make_array_from_process_local_data(NamedSharding(mesh, P("data")), rows)


def trunk(p, batch):
    return jnp.tanh(batch["x"] @ p["w"])


def head(task, p, z, batch):
    return jnp.mean((z @ p - batch["y"][:, task]) ** 2)


def train(oracle):
    loss_fn = mtl.split(trunk, [lambda *args, task=task: head(task, *args) for task in range(TASKS)])
    tx = optax.chain(mtl.shared_and_heads(mtl.upgrad(TASKS), loss_fn.shared), optax.adam(0.01))
    params = jax.tree.map(on_mesh, PARAMS, SPECS)
    opt_state = tx.init(params)

    @jax.jit
    def step(params, opt_state, batch):
        losses, task_grads = oracle(loss_fn)(params, batch)
        updates, opt_state = tx.update(task_grads, opt_state, params, losses=losses)
        return optax.apply_updates(params, updates), opt_state, losses

    losses = []
    for x, y in zip(X, Y, strict=True):
        params, opt_state, now = step(params, opt_state, {"x": own_rows(x), "y": own_rows(y)})
        losses.append(now)
    w = params["trunk"]["w"]
    assert w.sharding.is_equivalent_to(NamedSharding(mesh, SPECS["trunk"]["w"]), w.ndim)
    whole = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, P()))((losses, params))
    return [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(whole)]


trained = [train(oracle) for oracle in (mtl.value_and_task_grads, mtl.value_and_light_grads)]
pathlib.Path(sys.argv[4]).write_text(json.dumps(trained))
