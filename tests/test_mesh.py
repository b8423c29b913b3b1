"""Many devices, and many processes. (In processes of their own: devices are fixed when JAX starts.)"""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import jax
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import optax_mtl as mtl

PROGRAMS = pathlib.Path(__file__).parent / "mesh"


def start(program, *args, devices):
    """A program of the folder `mesh`, which is given the modules of this one, and so many devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    path = os.pathsep.join([str(PROGRAMS.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    return subprocess.Popen(
        [sys.executable, str(PROGRAMS / program), *map(str, args)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(processes, timeout):
    """Waits for the processes; none of them is left when one fails, or time is up, and what they said is shown."""
    end = time.monotonic() + timeout
    try:
        while any(process.poll() is None for process in processes) and time.monotonic() < end:
            if any(process.poll() for process in processes):
                break
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
        errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(errors)


@pytest.mark.slow
@pytest.mark.parametrize("program", ["methods.py", "oracles.py", "page.py"])
def test_on_a_mesh_as_on_one_device(program):
    """Sharded parameters and batches, under jit and in shard_map: the same updates, and nothing large is sent."""
    finish([start(program, devices=8)], timeout=600)


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = [start("processes.py", port, index, 2, tmp_path / str(index), devices=2) for index in range(2)]
    alone = start("processes.py", port, 0, 1, tmp_path / "alone", devices=1)
    finish([*together, alone], timeout=240)
    first, second, expected = (json.loads((tmp_path / name).read_text()) for name in ("0", "1", "alone"))
    assert first == second
    for ours, theirs in zip(first, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [mtl.upgrad(3), mtl.gls(3), mtl.scale_by_mao(3), mtl.blockwise(mtl.mgda(3))])
def test_every_leaf_in_shards_where_types_do_not_tell(method):
    """With `jax.vmap` over the shards in the place of devices."""
    matrix = jnp.asarray(np.random.default_rng(0).standard_normal((3, 8)), jnp.float32)
    shards = jnp.moveaxis(matrix.reshape(3, 4, 2), 1, 0)
    in_shards = mtl.over_axes(method, "shards", every_leaf=True)
    arguments = {"losses": jnp.ones(3)}
    expected, state = method.update(matrix, method.init(matrix[0]), matrix[0], **arguments)

    def update(grads):
        return in_shards.update(grads, in_shards.init(grads[0]), grads[0], **arguments)

    updates, states = jax.jit(jax.vmap(update, axis_name="shards"))(shards)
    np.testing.assert_allclose(updates.ravel(), expected, rtol=1e-5)
    for weights in optax.tree.get(states, "task_weights"):
        np.testing.assert_allclose(weights, optax.tree.get(state, "task_weights"), rtol=1e-5)


def on_one_device(function, *specs, **kwargs):
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("model",))
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=P("model"), **kwargs))


def test_what_over_axes_cannot_know_it_refuses():
    tx = mtl.over_axes(mtl.mgda(2), "model")
    grads, params = jnp.ones((2, 4)), jnp.ones(4)

    def update(params, grads):
        return tx.update(grads, tx.init(params), params)[0]

    with pytest.raises(ValueError, match="no axis 'model' here"):
        update(params, grads)
    with pytest.raises(ValueError, match="types of arrays do not tell"):
        on_one_device(update, P("model"), P(None, "model"), check_vma=False)(params, grads)
    with pytest.raises(ValueError, match="the gradient of a part of the batch"):
        on_one_device(update, P(), P(None, "model"))(params, grads)
    with pytest.raises(ValueError, match="no axis 'model' here"):
        mtl.task_gramian(grads, axis_name="model")
    gramian = on_one_device(lambda g: mtl.task_gramian(g, axis_name="model")[None], P(None, "model"))(grads)
    np.testing.assert_array_equal(gramian[0], 4)


def test_features_are_no_parameters():
    loss_fn = mtl.split(lambda w, x: x * w, [lambda p, z, x: jnp.sum(z * p)] * 2)
    tx = mtl.over_axes(mtl.shared_and_heads(mtl.mgda(2), loss_fn.shared), "model")
    params = {"trunk": jnp.ones(4), "heads": [jnp.ones(4)] * 2}

    def update(params, x):
        return tx.update(mtl.value_and_feature_grads(loss_fn)(params, x)[1], tx.init(params), params)[0]

    with pytest.raises(ValueError, match="not those of parameters"):
        on_one_device(update, P("model"), P("model"))(params, jnp.ones(4))
