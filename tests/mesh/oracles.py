"""Every oracle with parameters and batch in shards: data parallel, FSDP, tensor parallel, and a mix of them."""

import functools
import warnings

import jax
from jax import lax, numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
import numpy as np

from mesh import common
from mesh.common import T
import optax_mtl as mtl

WAYS = {
    "data": ({"layers": P(), "wide": P()}, P(("data", "model"))),
    "fsdp": ({"layers": P(None, "data"), "wide": P("data")}, P("data")),
    "tensor": ({"layers": P(None, None, "model"), "wide": P("model")}, P()),
    "mixed": ({"layers": P(None, "data", "model"), "wide": P("data", "model")}, P("data")),
}
SMALLEST_LEAF = 32 * 32  # one layer's


def problem():
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32) / 4
    params = {"trunk": {"layers": normal(3, 32, 32), "wide": normal(32, 64)}, "heads": [normal(64) for _ in range(T)]}
    return params, {"x": normal(8, 32), "y": normal(8)}


def trunk(p, batch):
    z, _ = lax.scan(jax.checkpoint(lambda z, w: (jnp.tanh(z @ w), None)), batch["x"], p["layers"])
    return jnp.tanh(z @ p["wide"])


def head(p, z, batch):
    return jnp.mean((z @ p - batch["y"]) ** 2)


SPLIT = mtl.split(trunk, [head] * T)
WHOLE = mtl.shared_and_heads(mtl.upgrad(T), SPLIT.shared)
BLOCKS = mtl.shared_and_heads(mtl.blockwise(mtl.upgrad(T), stacked=lambda path: "layers" in path), SPLIT.shared)
ORACLES = {
    **{s: (mtl.value_and_task_grads(SPLIT, strategy=s), WHOLE) for s in ("unroll", "loop", "vmap")},
    "not split": (mtl.value_and_task_grads(lambda params, batch: SPLIT(params, batch)), WHOLE),
    "light": (mtl.value_and_light_grads(SPLIT), WHOLE),
    "light, blocks": (mtl.value_and_light_grads(SPLIT), BLOCKS),
    "kept": (mtl.value_and_light_grads(SPLIT, recompute=False), WHOLE),
    "feature": (mtl.value_and_feature_grads(SPLIT), WHOLE),
    "sketched": (mtl.value_and_sketched_grads(SPLIT, size=511), WHOLE),
}


def steps(params, batch, oracles=ORACLES):
    updates, states = {}, {}
    for name, (oracle, tx) in oracles.items():
        with jax.named_scope(f"[{name}]"):
            losses, grads = oracle(params, batch)
            updates[name], states[name] = tx.update(grads, tx.init(params), params, losses=losses)
    return updates, states


def under_jit(mesh, params, batch, specs, rows):
    """The updates, in the parameters' shardings, and what crosses devices."""
    placed = params | {"trunk": common.place(mesh, params["trunk"], specs)}
    split = jax.tree.map(lambda x: common.place(mesh, x, rows), batch)
    replicated = NamedSharding(mesh, P())
    shardings = jax.tree.map(lambda x: x.sharding if x.ndim > 1 else replicated, placed)
    by_oracle = (dict.fromkeys(ORACLES, shardings), replicated)
    program = jax.jit(steps, out_shardings=by_oracle).lower(placed, split).compile()
    return program(placed, split), common.collectives(program)


def explicit(params, batch):
    """On a mesh whose axes are in the types of arrays, as `jax.make_mesh` makes them today."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        specs = {"layers": P(None, "data"), "wide": P("data", "model")}
        placed = params | {"trunk": common.place(mesh, params["trunk"], specs)}
        split = jax.tree.map(lambda x: common.place(mesh, x, P("data")), batch)
        oracles = {name: ORACLES[name] for name in ("unroll", "light", "kept", "feature")}
        return jax.jit(functools.partial(steps, oracles=oracles))(placed, split)


def in_shards(mesh, params, batch):
    """By hand: parameters gathered where they are used, and losses that are means over the whole batch."""

    def gathered(p):
        return {
            "layers": lax.all_gather(p["layers"], "model", axis=1, tiled=True),
            "wide": lax.all_gather(p["wide"], "model", axis=0, tiled=True),
        }

    def mean_head(p, z, batch):
        return lax.pmean(head(p, z, batch), ("data", "model"))

    loss_fn = mtl.split(lambda p, batch: trunk(gathered(p), batch), [mean_head] * T)
    oracles = {
        "unroll": mtl.value_and_task_grads(loss_fn, strategy="unroll"),
        "light": mtl.value_and_light_grads(loss_fn),
        "kept": mtl.value_and_light_grads(loss_fn, recompute=False),
        "all in a sketch": mtl.value_and_sketched_grads(loss_fn, size=4095),
    }

    def steps(params, batch):
        updates, states = {}, {}
        for name, oracle in oracles.items():
            tx = mtl.over_axes(WHOLE, ("data", "model"))
            losses, grads = oracle(params, batch)
            updates[name], states[name] = tx.update(grads, tx.init(params), params, losses=losses)
        return updates, states

    specs = {"trunk": {"layers": P(None, "model"), "wide": P("model")}, "heads": [P()] * T}
    by_oracle = (dict.fromkeys(oracles, specs), P())
    run = jax.shard_map(steps, mesh=mesh, in_specs=(specs, P(("data", "model"))), out_specs=by_oracle)
    return jax.jit(run)(params, batch)


def main():
    params, batch = problem()
    expected = jax.jit(steps)(params, batch)
    mesh = common.mesh()
    for way, (specs, rows) in WAYS.items():
        actual, crossing = under_jit(mesh, params, batch, specs, rows)
        common.assert_close(actual, expected)
        # Of what goes from device to device, but for sums: activations, parameters, never all tasks' gradients.
        large = [one for one in crossing if one[0] != "all-reduce" and common.size(one[1]) >= T * SMALLEST_LEAF]
        assert all("[sketched]" in origin for _, _, origin in large), (way, large)
    for tree in expected:
        tree["all in a sketch"] = tree["unroll"]  # as large as the leaf
    for actual in (in_shards(mesh, params, batch), explicit(params, batch)):
        common.assert_close(actual, tuple({name: tree[name] for name in actual[0]} for tree in expected))


if __name__ == "__main__":
    with common.strict(), warnings.catch_warnings(action="ignore"):
        main()
