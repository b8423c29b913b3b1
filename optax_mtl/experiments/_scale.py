"""What a training step of a large network takes on many chips: compiled for them, on a machine that has none."""

from collections.abc import Callable, Sequence
import itertools
import json
import pathlib
import platform
import re
import time
from typing import Any, NamedTuple

import jax
from jax import lax, numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import numpy as np
import optax
import tqdm

import optax_mtl as mtl
from optax_mtl import _xla
from optax_mtl.experiments import _collectives, _report, _tpu

PLAIN, EXACT, LIGHT, FEATURES = "plain sum", "exact", "light", "feature-level"
WAYS = (PLAIN, EXACT, LIGHT, FEATURES)
CHIP_BYTES = int(15.75 * 2**30)  # of the 16 GB of a v5e, what programs can have
_HEAD = 128  # numbers in a head of attention
_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

# Otherwise parts of one collective stand in several places of the program, and it could not be told how many there are.
_COUNTABLE: dict[str, str | bool] = {"xla_tpu_enable_async_collective_fusion": False}

_Row = dict[str, Any]


class Sizes(NamedTuple):
    """Of the network and its batch."""

    layers: int = 20
    width: int = 2048
    tasks: int = 8
    sequences: int = 1  # on each chip
    length: int = 1024
    vocabulary: int = 32_768
    classes: int = 1024  # that a task tells apart, at every position


# -- The network -------------------------------------------------------------------------------------------------------


def network(sizes: Sizes, mesh: Mesh) -> tuple[Any, Any, Any]:
    """A transformer with a head for each task, fully sharded: parameters over all chips, and the batch.

    Layers are scanned and rematerialised; parameters are float32, and activations bfloat16.

    Args:
      sizes: of the network.
      mesh: of one axis, "chips".

    Returns:
      A split loss; and shapes, with shardings, of parameters and batch.
    """

    def pinned(params: Any) -> Any:
        """Parameters that stay where they are until they are used, and their gradients where they will be needed."""
        return jax.tree.map(lambda x: lax.with_sharding_constraint(x, _over_chips(x.shape, mesh)), params)

    def by_sequence(x: jax.Array) -> jax.Array:
        return lax.with_sharding_constraint(x, NamedSharding(mesh, P("chips")))

    def block(x: jax.Array, params: Any) -> tuple[jax.Array, None]:
        p = pinned(params)
        x = by_sequence(x + _dense(p["out"], _attention(_dense(p["qkv"], _norm(p["norm1"], x)))))
        return by_sequence(x + _dense(p["down"], jax.nn.gelu(_dense(p["up"], _norm(p["norm2"], x))))), None

    def trunk(params: Any, batch: Any) -> jax.Array:
        x = by_sequence(pinned(params["embed"]).astype(jnp.bfloat16)[batch["tokens"]])
        x, _ = lax.scan(jax.checkpoint(block), x, params["layers"])
        return _norm(params["norm"], x)

    def head(task: int) -> Callable[..., jax.Array]:
        def loss(params: Any, features: jax.Array, batch: Any) -> jax.Array:
            logits = _dense(pinned(params), features).astype(jnp.float32)
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"][task]))

        return loss

    n, d = sizes.layers, sizes.width
    layers = {"qkv": (d, 3 * d), "out": (d, d), "up": (d, 4 * d), "down": (4 * d, d), "norm1": (d,), "norm2": (d,)}
    shapes = {
        "trunk": {
            "embed": (sizes.vocabulary, d),
            "layers": {name: (n, *shape) for name, shape in layers.items()},
            "norm": (d,),
        },
        "heads": [(d, sizes.classes)] * sizes.tasks,
    }

    def parameter(path: Any, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        stacked = any(getattr(key, "key", None) == "layers" for key in path)
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=_over_chips(shape, mesh, skip=stacked))

    params = jax.tree_util.tree_map_with_path(parameter, shapes, is_leaf=lambda x: isinstance(x, tuple))
    ids = (sizes.sequences * mesh.size, sizes.length)
    batch = {
        "tokens": jax.ShapeDtypeStruct(ids, jnp.int32, sharding=NamedSharding(mesh, P("chips"))),
        "labels": jax.ShapeDtypeStruct((sizes.tasks, *ids), jnp.int32, sharding=NamedSharding(mesh, P(None, "chips"))),
    }
    return mtl.split(trunk, [head(task) for task in range(sizes.tasks)]), params, batch


def _over_chips(shape: tuple[int, ...], mesh: Mesh, *, skip: bool = False) -> NamedSharding:
    """A parameter's last axis that can be shared out is; not the first, which is that of layers, if told to skip it.

    For an embedding that is the width: over the tokens, the cotangents of all positions would go to all chips.
    """
    axes = [axis for axis in range(int(skip), len(shape)) if shape[axis] % mesh.size == 0]
    if not axes:
        return NamedSharding(mesh, P())
    return NamedSharding(mesh, P(*[None] * axes[-1], "chips"))


def _dense(kernel: jax.Array, x: jax.Array) -> jax.Array:
    return x @ kernel.astype(x.dtype)


def _norm(scale: jax.Array, x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    return (wide * lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + 1e-6) * scale).astype(x.dtype)


def _attention(qkv: jax.Array) -> jax.Array:
    batch, length, width = qkv.shape
    q, k, v = jnp.moveaxis(qkv.reshape(batch, length, 3, max(width // (3 * _HEAD), 1), -1), 2, 0)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k).astype(jnp.float32) / q.shape[-1] ** 0.5
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores).astype(v.dtype), v).reshape(batch, length, -1)


# -- The step ----------------------------------------------------------------------------------------------------------


def step(way: str, loss_fn: Any) -> tuple[Callable[..., Any], optax.GradientTransformationExtraArgs]:
    """A training step in one of `WAYS`, with upgrad and Adam; and its transformation."""
    balance = mtl.shared_and_heads(mtl.upgrad(loss_fn.num_tasks), loss_fn.shared)

    def of_sum(params: Any, batch: Any) -> tuple[jax.Array, Any]:
        def total(params: Any) -> tuple[jax.Array, jax.Array]:
            losses = loss_fn(params, batch)
            return jnp.sum(losses), losses

        grads, losses = jax.grad(total, has_aux=True)(params)
        return losses, grads

    gradients, first = {
        PLAIN: (of_sum, optax.identity()),
        EXACT: (mtl.value_and_task_grads(loss_fn, strategy="vmap"), balance),  # as on a TPU; here we are on a CPU
        LIGHT: (mtl.value_and_light_grads(loss_fn), balance),
        FEATURES: (mtl.value_and_feature_grads(loss_fn), balance),
    }[way]
    tx = optax.with_extra_args_support(optax.chain(first, optax.adam(1e-3)))

    def train_step(params: Any, opt_state: Any, batch: Any) -> Any:
        losses, grads = gradients(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params, losses=losses)
        return optax.apply_updates(params, updates), opt_state, losses

    return train_step, tx


def measure(way: str, sizes: Sizes, chips: int) -> _Row:
    """Compiles a step for so many chips.

    Returns:
      For one chip the bytes of arguments (parameters, Adam's moments, batch), of outputs that do not take their place,
      and of temporaries, None if the compiler gave up for want of memory; their sum; whether the chip has as much; the
      collectives of a step by kind; and the seconds it took to compile.
    """
    mesh = Mesh(np.array(_tpu.devices(chips)), ("chips",))
    loss_fn, params, batch = network(sizes, mesh)
    train_step, tx = step(way, loss_fn)
    everywhere = NamedSharding(mesh, P())
    # Adam's moments lie where their parameters are.
    opt_state = optax.tree.map_params(
        tx,
        lambda moment, param: jax.ShapeDtypeStruct(moment.shape, moment.dtype, sharding=param.sharding),
        jax.eval_shape(tx.init, params),
        params,
        transform_non_params=lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
    )
    kept = jax.tree.map(lambda x: x.sharding, (params, opt_state))
    jitted = jax.jit(train_step, donate_argnums=(0, 1), out_shardings=(*kept, everywhere))
    row: _Row = {"way": way, "chips": chips}
    start = time.perf_counter()
    try:
        compiled = jitted.lower(params, opt_state, batch).compile(compiler_options=_COUNTABLE)
    except jax.errors.JaxRuntimeError as error:
        needed = re.search(r"total memory required for \D*\(([\d.]+)([KMGT])\)", str(error))
        if needed is None:
            raise
        total = int(float(needed[1]) * 2 ** (10 * (1 + "KMGT".index(needed[2]))))
        row |= {"argument_bytes": None, "output_bytes": None, "temporary_bytes": None, "total_bytes": total}
        collectives = None  # there is no program
    else:
        memory: Any = compiled.memory_analysis()
        argument, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
        output = memory.output_size_in_bytes - memory.alias_size_in_bytes
        row |= {"argument_bytes": argument, "output_bytes": output, "temporary_bytes": temporary}
        row["total_bytes"] = argument + output + temporary
        collectives = _collectives.by_kind(_collectives.collectives(compiled.as_text() or ""))
    fits = row["total_bytes"] <= CHIP_BYTES
    return row | {"fits": fits, "collectives": collectives, "compile_seconds": time.perf_counter() - start}


# -- The command -------------------------------------------------------------------------------------------------------


def tables(rows: Sequence[_Row]) -> list[_report.Table]:
    """Memory, and collectives, of each way on each number of chips."""
    memory, sent = [], []
    for row in rows:
        name = f"{row['chips']} chip{'s' if row['chips'] > 1 else ''}, {row['way']}"
        parts = [row[f"{part}_bytes"] for part in ("argument", "output", "temporary", "total")]
        memory.append([name, *map(_gigabytes, parts), "yes" if row["fits"] else "no", f"{row['compile_seconds']:.0f}"])
        if row["chips"] > 1:
            kinds = row["collectives"]
            cells = ["–" if kinds is None else _sent(kinds.get(kind)) for kind in _KINDS]
            total = None if kinds is None else sum(kind["bytes"] for kind in kinds.values())
            sent.append([name, *cells, _gigabytes(total)])
    headers = ["GB on a chip", "arguments", "outputs", "temporaries", "in all", "fits", "compiled in, s"]
    return [
        _report.Table(headers, memory),
        _report.Table(["collectives a step: number, GB", *_KINDS, "GB in all"], sent),
    ]


def _gigabytes(number: int | None) -> str:
    return "–" if number is None else f"{number / 1e9:.2f}"


def _sent(kind: dict[str, int] | None) -> str:
    return "0" if kind is None else f"{kind['count']:,}, {_gigabytes(kind['bytes'])}"


def run(
    sizes: Sizes, chips: Sequence[int], ways: Sequence[str], *, command: str, out: pathlib.Path | None = None
) -> None:
    """Compiles every way for every number of chips, and prints tables; leaves them in `out`, `scale.md` and `.json`."""
    _tpu.devices(chips[0])  # says what is missing before anything else is said
    _xla.set_flag()
    jax.config.update("jax_platforms", "cpu")  # nothing runs; where libtpu is installed, JAX would look for a TPU
    _, params, _ = network(sizes, Mesh(np.array(_tpu.devices(1)), ("chips",)))
    number = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
    introduction = (
        f"A transformer of {number:,} parameters in {sizes.layers} layers of width {sizes.width}, {sizes.tasks} tasks, "
        f"{sizes.sequences} x {sizes.length} tokens on each chip: a training step with upgrad and Adam, compiled for "
        f"v5e chips of {CHIP_BYTES / 1e9:.1f} GB. jax {jax.__version__}, libtpu {_tpu.version()}, optax "
        f"{optax.__version__}, python {platform.python_version()}."
    )
    print(introduction, flush=True)
    rows = []
    plan = list(itertools.product(chips, ways))
    with tqdm.tqdm(plan, disable=None, leave=False) as progress:
        for each, way in progress:
            progress.set_description(f"{way}, {each} chips")
            rows.append(measure(way, sizes, each))
    text = "\n\n".join(table.markdown() for table in tables(rows))
    print(f"\n{text}")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "scale.md").write_text(f"{introduction}\n\n`{command}`\n\n{text}\n", encoding="utf-8")
        results = {"sizes": sizes._asdict(), "parameters": number, "command": command, "rows": rows}
        (out / "scale.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        print(f"\nThe tables and all numbers: {out / 'scale.md'}, {out / 'scale.json'}")
