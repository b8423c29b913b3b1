"""Networks to time training steps on: a trunk, and as many heads as tasks, in plain JAX.

`_speed_peers.py` builds the same networks in torch from their parameters; what one does the other must do.
"""

from collections.abc import Callable, Sequence
import itertools
from typing import Any, NamedTuple

import jax
from jax import lax, numpy as jnp
import numpy as np

ATTENTION_HEADS = 4
_OUTPUTS = 10

_Params = Any
_Batch = dict[str, jax.Array]


class Workload(NamedTuple):
    """A network of several tasks, with weights and one batch.

    Attributes:
      trunk: from `params["trunk"]` and the batch to features.
      heads: each from its part of `params["heads"]`, the features and the batch to its task's loss.
      params: `{"trunk": ..., "heads": [...]}`.
      batch: what all tasks see, `"x"`, and what each is to say of it, `"y"` `(T, ...)`.
    """

    trunk: Callable[[_Params, _Batch], jax.Array]
    heads: list[Callable[[_Params, jax.Array, _Batch], jax.Array]]
    params: dict[str, _Params]
    batch: _Batch


def mlp(
    num_tasks: int,
    heavy: bool = False,
    *,
    inputs: int = 784,
    widths: Sequence[int] = (1024, 512, 512),
    batch: int = 128,
) -> Workload:
    """A wide network of dense layers; 1.6 million parameters."""
    rng = np.random.default_rng(0)
    sizes = [inputs, *widths]
    params = [_dense_params(rng, m, n) for m, n in zip(sizes, widths, strict=False)]

    def trunk(params: _Params, batch: _Batch) -> jax.Array:
        x = batch["x"]
        for layer in params:
            x = jax.nn.relu(_dense(layer, x))
        return x

    return _with_heads(rng, trunk, params, (batch, inputs), (batch, widths[-1]), num_tasks, heavy)


def conv(
    num_tasks: int, heavy: bool = False, *, side: int = 32, widths: Sequence[int] = (32, 64, 128, 256), batch: int = 32
) -> Workload:
    """A small convolutional network on square images: 3 x 3 kernels, all but the first with stride 2."""
    rng = np.random.default_rng(0)
    params = []
    for m, n in zip([3, *widths], widths, strict=False):
        kernel = rng.standard_normal((3, 3, m, n)) * np.sqrt(2 / (9 * m))
        params.append({"kernel": kernel, "bias": 0.1 * rng.standard_normal(n)})

    def trunk(params: _Params, batch: _Batch) -> jax.Array:
        x = batch["x"]
        for i, layer in enumerate(params):
            strides, padding = (1 + (i > 0),) * 2, ((1, 1), (1, 1))
            numbers = ("NHWC", "HWIO", "NHWC")
            x = lax.conv_general_dilated(x, layer["kernel"], strides, padding, dimension_numbers=numbers)
            x = jax.nn.relu(x + layer["bias"])
        return jnp.mean(x, axis=(1, 2))

    return _with_heads(rng, trunk, params, (batch, side, side, 3), (batch, widths[-1]), num_tasks, heavy)


def transformer(
    num_tasks: int, heavy: bool = False, *, layers: int = 4, width: int = 128, length: int = 32, batch: int = 16
) -> Workload:
    """A small transformer, a prediction for every token; its layers are stacked, and the scan over them is unrolled."""
    rng = np.random.default_rng(0)

    def layer() -> _Params:
        return {
            "norm1": _norm_params(rng, width),
            "qkv": _dense_params(rng, width, 3 * width),
            "out": _dense_params(rng, width, width),
            "norm2": _norm_params(rng, width),
            "up": _dense_params(rng, width, 4 * width),
            "down": _dense_params(rng, 4 * width, width),
        }

    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *(layer() for _ in range(layers)))
    params = {"embed": _dense_params(rng, width, width), "layers": stacked, "norm": _norm_params(rng, width)}

    def block(x: jax.Array, p: _Params) -> tuple[jax.Array, None]:
        x = x + _dense(p["out"], _attention(_dense(p["qkv"], _norm(p["norm1"], x))))
        x = x + _dense(p["down"], jax.nn.gelu(_dense(p["up"], _norm(p["norm2"], x))))
        return x, None

    def trunk(params: _Params, batch: _Batch) -> jax.Array:
        x, _ = lax.scan(block, _dense(params["embed"], batch["x"]), params["layers"], unroll=True)
        return _norm(params["norm"], x)

    shape = (batch, length, width)
    return _with_heads(rng, trunk, params, shape, shape, num_tasks, heavy)


WORKLOADS: dict[str, Callable[[int, bool], Workload]] = {"mlp": mlp, "conv": conv, "transformer": transformer}


def _with_heads(
    rng: np.random.Generator,
    trunk: Callable[[_Params, _Batch], jax.Array],
    params: _Params,
    inputs: tuple[int, ...],
    features: tuple[int, ...],
    num_tasks: int,
    heavy: bool,
) -> Workload:
    """Heads of one dense layer each, or heavy ones of three, on features of the given shape.

    The heads start alike and are to say opposite things, for tasks that conflict: else there is little to balance.
    """
    width = features[-1]
    sizes = [width, width, width, _OUTPUTS] if heavy else [width, _OUTPUTS]

    def head(task: int) -> Callable[[_Params, jax.Array, _Batch], jax.Array]:
        def loss(params: _Params, features: jax.Array, batch: _Batch) -> jax.Array:
            x = features
            for layer in params[:-1]:
                x = jax.nn.relu(_dense(layer, x))
            return jnp.mean((_dense(params[-1], x) - batch["y"][task]) ** 2)

        return loss

    alike = [_dense_params(rng, m, n) for m, n in itertools.pairwise(sizes)]
    head_params = [
        jax.tree.map(lambda a: a + 0.5 * a.std() * rng.standard_normal(a.shape), alike) for _ in range(num_tasks)
    ]
    signs = np.resize([1.0, -1.0], num_tasks).reshape(-1, *[1] * len(features))
    shape = (*features[:-1], _OUTPUTS)
    y = 4 * signs * rng.standard_normal(_OUTPUTS) + rng.standard_normal((num_tasks, *shape))
    data = {"x": rng.standard_normal(inputs), "y": y}
    params, data = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), ({"trunk": params, "heads": head_params}, data))
    return Workload(trunk, [head(task) for task in range(num_tasks)], params, data)


def _dense_params(rng: np.random.Generator, m: int, n: int) -> _Params:
    return {"kernel": rng.standard_normal((m, n)) * np.sqrt(2 / m), "bias": 0.1 * rng.standard_normal(n)}


def _dense(p: _Params, x: jax.Array) -> jax.Array:
    return x @ p["kernel"] + p["bias"]


def _norm_params(rng: np.random.Generator, n: int) -> _Params:
    return {"scale": 1 + 0.1 * rng.standard_normal(n), "bias": 0.1 * rng.standard_normal(n)}


def _norm(p: _Params, x: jax.Array) -> jax.Array:
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(centred**2, axis=-1, keepdims=True)
    # Not with lax.rsqrt: jaxlib 0.10.2 batches its derivative wrongly on CPU, as in jax-ml/jax#39103.
    return centred / jnp.sqrt(variance + 1e-5) * p["scale"] + p["bias"]


def _attention(qkv: jax.Array) -> jax.Array:
    batch, length, _ = qkv.shape
    q, k, v = jnp.moveaxis(qkv.reshape(batch, length, 3, ATTENTION_HEADS, -1), 2, 0)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v).reshape(batch, length, -1)
