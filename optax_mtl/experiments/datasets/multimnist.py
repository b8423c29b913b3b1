"""MultiMNIST: two handwritten digits on one canvas, made from the files of MNIST.

The construction of S. Sabour, N. Frosst, G. Hinton, "Dynamic routing between capsules", NeurIPS 2017, as O. Sener and
V. Koltun publish it with "Multi-task learning as multi-objective optimization", NeurIPS 2018: one digit of 28 x 28
pixels in the upper left corner of a canvas of 36 x 36, another 6 pixels further right and down, the brighter of the two
at every pixel; then the canvas is reduced to 28 x 28, each pixel that of the canvas nearest to its place. Every digit
of MNIST is the left one once, the right one is drawn from the same split.

MNIST: Y. LeCun, C. Cortes, C. Burges; four files of the format idx: two zero bytes, the type (8: bytes), the number of
axes, the length of each in four bytes, the most significant first, and the content.
"""

import gzip
import math
import os
import pathlib
import struct
from typing import NamedTuple

import numpy as np

from optax_mtl.experiments.datasets import _common
from optax_mtl.experiments.datasets._common import Classification, DataError, Examples

CANVAS, SHIFT, DIGIT = 36, 6, 28
NUMBER = {"train": 60_000, "test": 10_000}
MD5 = {  # as torchvision checks the packed files; the others are those unpacked
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
_LAYOUT = (
    "put MNIST's train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, "
    "each packed (.gz) or not, into the folder (from http://yann.lecun.com/exdb/mnist/ or a mirror of it)"
)


class Split(NamedTuple):
    """Canvases.

    Attributes:
      images: `(N, side, side)` uint8.
      left: `(N,)` int32, the digit further left and up.
      right: `(N,)` int32, the digit further right and down.
      sources: `(N, 2)` int32, which images of MNIST's split the two are.
    """

    images: np.ndarray
    left: np.ndarray
    right: np.ndarray
    sources: np.ndarray


class MultiMNIST(NamedTuple):
    """MultiMNIST.

    Attributes:
      train: 60,000 canvases, of MNIST's training digits.
      test: 10,000 canvases, of MNIST's test digits.
    """

    train: Split
    test: Split


def load(folder: str | os.PathLike[str], *, seed: int = 0, side: int = DIGIT, checksums: bool = True) -> MultiMNIST:
    """Reads MNIST and makes MultiMNIST of it, the same for the same seed.

    The published code draws the right digits anew at every build and publishes none, so no seed gives those of the
    papers. It also stretches the brightness of each canvas to the full range, which this does not: nearly all digits
    have a pixel of full brightness.

    Args:
      folder: holds the four files of MNIST, packed or not; or is torchvision's, which holds `MNIST/raw` with them.
      seed: decides which digits are the right ones.
      side: 28 for canvases as published, 36 for canvases not reduced.
      checksums: whether the files must be the published ones, byte for byte and in number.

    Returns:
      A `MultiMNIST`.
    """
    if side not in (DIGIT, CANVAS):
        raise DataError(f"side is {side}, wanted {DIGIT} (canvases reduced, as published) or {CANVAS} (as composed)")
    folder = _common.existing(folder, _LAYOUT)
    raw = folder / "MNIST" / "raw"
    place = raw if raw.is_dir() else folder
    splits = []
    for stream, (name, prefix) in enumerate({"train": "train", "test": "t10k"}.items()):
        digits, where = _idx(place, f"{prefix}-images-idx3-ubyte", checksums)
        labels, labels_where = _idx(place, f"{prefix}-labels-idx1-ubyte", checksums)
        if digits.ndim != 3 or digits.shape[1:] != (DIGIT, DIGIT):
            raise DataError(f"{where} has shape {digits.shape}, wanted (N, {DIGIT}, {DIGIT}): fetch it again")
        if labels.shape != digits.shape[:1]:
            raise DataError(
                f"{labels_where} has shape {labels.shape}, wanted ({len(digits)},), a label for each image of {where}: "
                "fetch both again"
            )
        _common.check_labels(labels_where, labels, 10)
        if checksums:
            _common.check_number(where, len(digits), NUMBER[name])
        splits.append(_composed(digits, labels, np.random.default_rng([seed, stream]), side))
    return MultiMNIST(*splits)


def _idx(folder: pathlib.Path, name: str, checksums: bool) -> tuple[np.ndarray, pathlib.Path]:
    packed = folder / f"{name}.gz"
    path = packed if packed.is_file() else folder / name
    (content,) = _common.read_folder(folder, [path.name], MD5 if checksums else {}, _LAYOUT).values()
    if path == packed:
        with _common.reading(path):
            content = gzip.decompress(content)
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise DataError(
            f"{path} starts with {content[:4].hex() or 'nothing'}, wanted 000008 (idx, bytes): fetch it again"
        )
    axes = content[3]
    start = 4 + 4 * axes
    if len(content) < start:
        raise DataError(f"{path} is truncated: {len(content)} bytes of {start} of its header; fetch it again")
    shape = struct.unpack(f">{axes}I", content[4:start])
    wanted = start + math.prod(shape)
    if len(content) != wanted or not content[start:]:
        raise DataError(
            f"{path} is truncated or damaged: {len(content):,} bytes, wanted {wanted:,} for shape {shape}; fetch it "
            "again"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape), path


def _composed(digits: np.ndarray, labels: np.ndarray, rng: np.random.Generator, side: int) -> Split:
    left = np.arange(len(digits))
    right = rng.integers(len(digits), size=len(digits))
    canvas = np.zeros((len(digits), CANVAS, CANVAS), np.uint8)
    canvas[:, :DIGIT, :DIGIT] = digits
    overlap = canvas[:, SHIFT : SHIFT + DIGIT, SHIFT : SHIFT + DIGIT]
    np.maximum(overlap, digits[right], out=overlap)
    nearest = ((np.arange(side) + 0.5) * CANVAS / side).astype(np.int64)
    return Split(
        images=canvas[:, nearest[:, None], nearest],
        left=labels[left].astype(np.int32),
        right=labels[right].astype(np.int32),
        sources=np.stack([left, right], axis=1).astype(np.int32),
    )


def classification(
    folder: str | os.PathLike[str], *, seed: int = 0, side: int = DIGIT, checksums: bool = True
) -> Classification:
    """The tasks left and right (10 classes each), on images `(N, side, side)` float32 in [0, 1].

    Args:
      folder: as for `load`.
      seed: as for `load`.
      side: as for `load`.
      checksums: as for `load`.

    Returns:
      A `Classification`.
    """
    data = load(folder, seed=seed, side=side, checksums=checksums)

    def examples(split: Split) -> Examples:
        features = np.divide(split.images, np.float32(255), dtype=np.float32)
        return Examples(features, np.stack([split.left, split.right], axis=1))

    return Classification(examples(data.train), examples(data.test), {"left": 10, "right": 10})


def describe(data: MultiMNIST) -> list[str]:
    """Lines about what was read."""
    lines = []
    for name in NUMBER:
        split = getattr(data, name)
        digits = [str(digit) for digit in range(10)]
        lines += [
            f"{name}: {len(split.images):,} canvases {split.images.shape[1:]} uint8",
            _common.counted("left", digits, split.left),
            _common.counted("right", digits, split.right),
        ]
    return lines
