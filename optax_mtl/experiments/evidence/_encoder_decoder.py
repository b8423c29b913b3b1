"""A small encoder and decoder for three dense tasks, their losses, and the metrics of the literature on them.

A U-Net in small (Ronneberger et al., MICCAI 2015): three resolutions, a short cut at each, and one 1 x 1 convolution
a task. Convolutions are products of stacked neighbours: under `vmap` over seeds, XLA's own are slow on a CPU.
"""

from typing import Any

import jax
from jax import numpy as jnp
import optax

from optax_mtl.experiments.evidence import _scenes

TASKS = ("segmentation", "depth", "normals")
METRICS = {  # name: (task, whether more is better)
    "mIoU, %": (0, True),
    "pixels, %": (0, True),
    "depth error, m": (1, False),
    "relative, %": (1, False),
    "angle, °": (2, False),
    "< 11.25°, %": (2, True),
    "< 22.5°, %": (2, True),
    "< 30°, %": (2, True),
}
_DEPTH = 4.0  # metres, where depth starts


def init(key: jax.Array, width: int, classes: int) -> dict[str, Any]:
    """First parameters: a `"trunk"` that all tasks share, `"heads"` by task. `width` channels at the finest grid."""
    fine, middle, coarse = width, 2 * width, 4 * width
    shapes = {  # a 3 x 3 neighbourhood is 9 inputs, a 2 x 2 block is 4
        "fine": (9 * 4 * 3, fine),
        "to_middle": (4 * fine, middle),
        "middle": (9 * middle, middle),
        "to_coarse": (4 * middle, coarse),
        "coarse": (9 * coarse, coarse),
        "up_middle": (coarse, 4 * middle),
        "middle_out": (9 * middle, middle),
        "up_fine": (middle, 4 * fine),
        "fine_out": (9 * fine, fine),
    }
    outputs = {"segmentation": classes, "depth": 1, "normals": 3}
    keys = iter(jax.random.split(key, len(shapes) + len(outputs)))

    def layer(inputs: int, outputs: int, gain: float = 2.0) -> dict[str, jax.Array]:
        kernel = jax.random.normal(next(keys), (inputs, outputs)) * (gain / inputs) ** 0.5
        return {"kernel": kernel, "bias": jnp.zeros(outputs)}

    trunk = {name: layer(*shape) for name, shape in shapes.items()}
    heads = {task: layer(fine, 4 * number, 0.1) for task, number in outputs.items()}
    heads["depth"]["bias"] += _DEPTH
    return {"trunk": trunk, "heads": heads}


def predict(params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Logits `(N, H, W, classes)`, depth `(N, H, W)` and normals `(N, H, W, 3)` of length one, for `(N, H, W, 3)`."""
    features = _trunk(params["trunk"], images)
    logits, depth, normals = (_up(_dense(params["heads"][task], features)) for task in TASKS)
    length = jnp.sqrt(jnp.sum(normals**2, axis=-1, keepdims=True) + 1e-6)
    return logits, depth[..., 0], normals / length


def losses(params: Any, scenes: _scenes.Scenes) -> jax.Array:
    """`(3,)`: mean cross-entropy, mean absolute error of the depth, one minus the mean cosine of the normals."""
    logits, depth, normals = predict(params, jnp.asarray(scenes.images))
    known = scenes.classes != _scenes.UNKNOWN
    labels = jnp.where(known, scenes.classes, 0)
    per_pixel = (
        optax.softmax_cross_entropy_with_integer_labels(logits, labels),
        jnp.abs(depth - scenes.depth),
        1 - jnp.sum(normals * scenes.normals, axis=-1),
    )
    return jnp.stack([jnp.mean(errors, where=known) for errors in per_pixel])


def metrics(params: Any, scenes: _scenes.Scenes) -> jax.Array:
    """`(8,)`, the `METRICS`, over all pixels whose truth is known."""
    logits, depth, normals = predict(params, jnp.asarray(scenes.images))
    known = scenes.classes != _scenes.UNKNOWN
    guess = jnp.argmax(logits, axis=-1)
    right = guess == scenes.classes
    either = [known & ((guess == c) | (scenes.classes == c)) for c in range(logits.shape[-1])]
    errors = jnp.abs(depth - scenes.depth)
    angles = jnp.degrees(jnp.arccos(jnp.clip(jnp.sum(normals * scenes.normals, axis=-1), -1, 1)))
    return jnp.stack(
        [
            100 * jnp.mean(jnp.stack([jnp.mean(right, where=mask) for mask in either])),  # intersection over union
            100 * jnp.mean(right, where=known),
            jnp.mean(errors, where=known),
            100 * jnp.mean(errors / scenes.depth, where=known),
            jnp.mean(angles, where=known),
            *(100 * jnp.mean(angles < bound, where=known) for bound in (11.25, 22.5, 30)),
        ]
    )


def _trunk(params: Any, images: jax.Array) -> jax.Array:
    fine = jax.nn.relu(_around(params["fine"], _down(images)))
    middle = _refined(params["middle"], jax.nn.relu(_dense(params["to_middle"], _down(fine))))
    coarse = _refined(params["coarse"], jax.nn.relu(_dense(params["to_coarse"], _down(middle))))
    middle = _refined(params["middle_out"], middle + _up(_dense(params["up_middle"], coarse)))
    return _refined(params["fine_out"], fine + _up(_dense(params["up_fine"], middle)))


def _refined(params: Any, x: jax.Array) -> jax.Array:
    return x + jax.nn.relu(_around(params, x))


def _around(params: Any, x: jax.Array) -> jax.Array:
    """A 3 x 3 convolution."""
    height, width = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    above = jnp.concatenate([padded[:, i : i + height] for i in range(3)], axis=-1)
    return _dense(params, jnp.concatenate([above[:, :, i : i + width] for i in range(3)], axis=-1))


def _dense(params: Any, x: jax.Array) -> jax.Array:
    """A 1 x 1 convolution."""
    return x @ params["kernel"] + params["bias"][None, None, None]


def _down(x: jax.Array) -> jax.Array:
    """Blocks of 2 x 2 pixels become one with four times the channels."""
    n, height, width, channels = x.shape
    blocks = x.reshape(n, height // 2, 2, width // 2, 2, channels)
    return blocks.transpose(0, 1, 3, 2, 4, 5).reshape(n, height // 2, width // 2, 4 * channels)


def _up(x: jax.Array) -> jax.Array:
    """The way back from `_down`."""
    n, height, width, channels = x.shape
    blocks = x.reshape(n, height, width, 2, 2, channels // 4)
    return blocks.transpose(0, 1, 3, 2, 4, 5).reshape(n, 2 * height, 2 * width, channels // 4)
