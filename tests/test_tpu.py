"""Every method and every oracle, compiled for TPUs on a machine that has none: `make tpu`.

Nothing runs, so this is about what the compiler for TPUs refuses, and what it is given to compile.
"""

import functools

import jax
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import numpy as np
import pytest

import cases
import optax_mtl as mtl
from optax_mtl.experiments import __main__ as command_line, _scale, _tpu
import problems
from test_laws import context
from test_oracle_counts import KEPT, LIGHT, scanned, wide

pytestmark = pytest.mark.tpu
T = 3
ORACLES = {
    "unroll": functools.partial(mtl.value_and_task_grads, strategy="unroll"),
    "loop": functools.partial(mtl.value_and_task_grads, strategy="loop"),
    "vmap": functools.partial(mtl.value_and_task_grads, strategy="vmap"),
    "light": LIGHT,
    "kept": KEPT,
    "sketched": mtl.value_and_sketched_grads,
    "features": mtl.value_and_feature_grads,
}


@pytest.fixture(scope="module")
def chips():
    """Four, in a square."""
    return np.array(_tpu.devices(4))


def on(sharding, tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_every_method_compiles(case, chips):
    tx = case.make(T)

    def step(task_grads, state, params, losses, task_mask):
        extra_args = problems.extra_args(losses) | {"value_fn": problems.value_fn(T)}
        return tx.update(task_grads, state, params, losses=losses, task_mask=task_mask, **extra_args)

    with context(case):
        params = problems.params()
        given = (problems.tree_of(problems.gradients()), tx.init(params), params, jnp.ones(T), jnp.ones(T, bool))
        one = jax.sharding.SingleDeviceSharding(chips[0])
        compiled = jax.jit(step).lower(*on(one, given)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**24  # small arrays in whole tiles, a megabyte or two


@pytest.mark.parametrize("wrap", [lambda tx: tx, mtl.blockwise], ids=["whole", "leaves"])
@pytest.mark.parametrize("problem", [scanned, wide])
@pytest.mark.parametrize("oracle", ORACLES)
def test_every_oracle_compiles_for_a_mesh(oracle, problem, wrap, chips):
    if oracle == "features" and wrap is mtl.blockwise:
        pytest.skip("at the features there are no leaves")
    loss_fn, params, batch = problem(T)
    tx = mtl.shared_and_heads(wrap(mtl.upgrad(T)), loss_fn.shared)

    def step(params, state, batch):
        losses, grads = ORACLES[oracle](loss_fn)(params, batch)
        return tx.update(grads, state, params, losses=losses)

    mesh = Mesh(chips, ("chips",))
    sharded, rows = NamedSharding(mesh, P(None, "chips")), NamedSharding(mesh, P("chips"))
    placed = on(NamedSharding(mesh, P()), params) | {"trunk": jax.tree.map(lambda x: on(sharded, x), params["trunk"])}
    state = on(NamedSharding(mesh, P()), jax.eval_shape(tx.init, params))
    compiled = jax.jit(step).lower(placed, state, on(rows, batch)).compile()
    assert "all-reduce" in compiled.as_text()


def test_the_scale_command(capsys, tmp_path):
    """At a tiny size: all ways on four chips, in tables and numbers."""
    sizes = [
        "--layers",
        "2",
        "--width",
        "128",
        "--tasks",
        "2",
        "--length",
        "16",
        "--vocabulary",
        "64",
        "--classes",
        "8",
    ]
    with problems.relaxed_promotion():
        command_line.main(["scale", "--chips", "4", "--out", str(tmp_path), *sizes])
    said = capsys.readouterr().out
    written = (tmp_path / "scale.md").read_text(encoding="utf-8")
    for text in (said, written):
        for way in _scale.WAYS:
            assert text.count(f"| 4 chips, {way} |") == 2  # memory, and collectives
        assert "libtpu 0." in text


def test_the_step_that_does_not_fit_is_told_of():
    sizes = _scale.Sizes(layers=2, width=16_384, tasks=2, length=128, vocabulary=128)
    with problems.relaxed_promotion():
        row = _scale.measure(_scale.PLAIN, sizes, 1)
    assert not row["fits"]
    assert row["total_bytes"] > _scale.CHIP_BYTES
    assert row["collectives"] is None
