"""Dense tasks in the layout of `.npy` files that MTAN published, and LibMTL, CAGrad and Nash-MTL read.

`train/` and `val/` hold a folder for the images and one for each task, and these a file for each image, numbered from
0: `train/image/0.npy` `(H, W, 3)`, floats in [0, 1]; `train/label/0.npy` `(H, W)`, classes as numbers of any dtype, -1
where the pixel is void; `train/depth/0.npy` `(H, W, 1)`, floats, 0 where it is not known; `train/normal/0.npy`
`(H, W, 3)`, floats in [-1, 1], all three 0 where it is not known. S. Liu, E. Johns, A. Davison, "End-to-end multi-task
learning with attention", CVPR 2019; https://github.com/lorenmt/mtan.
"""

from collections.abc import Iterator, Sequence
import pathlib
from typing import Any, NamedTuple

import numpy as np

from optax_mtl.experiments.datasets import _common
from optax_mtl.experiments.datasets._common import DataError

_CHANNELS = {"image": 3, "depth": 1, "normal": 3}
_RANGES = {"image": (-0.05, 1.05), "depth": (0, np.inf), "normal": (-1.001, 1.001)}  # with some room for rounding
_WANTED = {"image": "from 0 to 1", "depth": "0 (not known) or above", "normal": "from -1 to 1"}


class Batch(NamedTuple):
    """Images with labels for every pixel, `(B, ...)`; or one, without the first axis.

    Attributes:
      images: `(B, H, W, 3)` float32 in [0, 1].
      labels: `(B, H, W)` int32, -1 where the pixel is void.
      labels_known: `(B, H, W)` bool, where the labels count.
      depth: `(B, H, W, 1)` float32, 0 where it is not known.
      depth_known: `(B, H, W, 1)` bool, where the depth counts.
      normals: `(B, H, W, 3)` float32, surface normals, 0 where they are not known; None if there are none.
      normals_known: `(B, H, W, 1)` bool, where the normals count; None if there are none.
    """

    images: np.ndarray
    labels: np.ndarray
    labels_known: np.ndarray
    depth: np.ndarray
    depth_known: np.ndarray
    normals: np.ndarray | None = None
    normals_known: np.ndarray | None = None


class Split:
    """Examples on disk: `split[7]` reads one, `split[:8]` and `split[[3, 1, 4]]` read a `Batch`, and `len` counts them.

    Args:
      folder: holds a folder of files for each of `parts`.
      parts: names of these folders: images, labels, depth, and normals if there are any.
      sizes: heights and widths that the files may have; all have the same.
      classes: number of classes that the labels tell apart.
      layout: what the data set's folder must look like, for error messages.
    """

    def __init__(
        self, folder: pathlib.Path, parts: Sequence[str], sizes: Sequence[tuple[int, int]], classes: int, layout: str
    ):
        self._folder, self._parts, self._classes = folder, tuple(parts), classes
        self._length = _count(folder, self._parts, layout)
        first = _read(folder / "image" / "0.npy")
        if first.shape[:2] not in sizes:
            wanted = " or ".join(f"({h}, {w}, 3)" for h, w in sizes)
            raise DataError(f"{folder / 'image' / '0.npy'} has shape {first.shape}, wanted {wanted}")
        self.size: tuple[int, int] = first.shape[:2]
        for index in {0, self._length - 1}:  # the others are looked at when they are read
            self[index]

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Batch:
        chosen = np.arange(self._length)[index]
        if chosen.ndim == 0:
            return self._example(int(chosen))
        if chosen.ndim > 1 or not chosen.size:
            raise IndexError(f"wanted one number, or some in a row, found an index that gives shape {chosen.shape}")
        examples = [self._example(int(number)) for number in chosen]
        parts = zip(*examples, strict=True)
        return Batch._make(None if part[0] is None else np.stack(part) for part in parts)

    def batches(self, size: int) -> Iterator[Batch]:
        """All examples in order, `size` at a time; the last batch may be smaller."""
        return (self[start : start + size] for start in range(0, self._length, size))

    def _example(self, number: int) -> Batch:
        image, labels, depth, *normals = (self._part(part, number) for part in self._parts)
        known = [np.any(part != 0, axis=-1, keepdims=True) for part in (depth, *normals)]
        masked = [array for pair in zip((depth, *normals), known, strict=True) for array in pair]
        return Batch(image, labels, labels >= 0, *masked)

    def _part(self, part: str, number: int) -> np.ndarray:
        path = self._folder / part / f"{number}.npy"
        found = _read(path)
        wanted = (*self.size, _CHANNELS[part]) if part in _CHANNELS else self.size
        if found.shape != wanted:
            raise DataError(f"{path} has shape {found.shape}, wanted {wanted}: height, width, channels")
        if part not in _CHANNELS:
            if found.dtype.kind not in "fiu":
                raise DataError(f"{path} is of dtype {found.dtype}, wanted numbers")
            _common.check_labels(path, found, self._classes, lowest=-1)
            return found.astype(np.int32)
        if found.dtype.kind != "f":
            raise DataError(f"{path} is of dtype {found.dtype}, wanted floats, {_WANTED[part]}")
        low, high = _RANGES[part]
        if not np.all(np.isfinite(found) & (found >= low) & (found <= high)):
            raise DataError(
                f"{path} has values from {np.min(found):g} to {np.max(found):g}, wanted finite ones, {_WANTED[part]}"
            )
        return found.astype(np.float32)


def _count(folder: pathlib.Path, parts: Sequence[str], layout: str) -> int:
    number = None
    for part in parts:
        if not (folder / part).is_dir():
            raise DataError(f"folder {folder / part} is missing: {layout}")
        found = {path.name for path in (folder / part).glob("*.npy")}
        if number is None:
            number = len(found)
        missing = [name for name in (f"{k}.npy" for k in range(max(number, len(found)))) if name not in found]
        if missing or not found:
            raise DataError(f"{folder / part / (missing or ['0.npy'])[0]} is missing: {layout}")
        if len(found) != number:
            raise DataError(
                f"{folder / part} has {len(found):,} files, and {folder / parts[0]} has {number:,}: wanted one for "
                "each image, numbered from 0"
            )
    return number or 0


def _read(path: pathlib.Path) -> np.ndarray:
    try:
        with path.open("rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise DataError(
            f"{path} is truncated, or no file of numbers that NumPy wrote ({error}): fetch it again"
        ) from error


def splits(
    folder: pathlib.Path,
    parts: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    classes: int,
    layout: str,
    numbers: dict[str, int] | None,
) -> tuple[Split, Split]:
    """The splits train and val; `numbers` says how many examples they must have."""
    found = {name: Split(folder / name, parts, sizes, classes, layout) for name in ("train", "val")}
    for name, number in (numbers or {}).items():
        _common.check_number(folder / name, len(found[name]), number)
    return found["train"], found["val"]


def describe(train: Split, val: Split, classes: int) -> list[str]:
    """Lines about what is there, for which all files are read."""
    lines = []
    for name, split in (("train", train), ("val", val)):
        counts = np.zeros(classes + 1, np.int64)
        unknown = {"depth": 0, "normals": 0}
        deepest = 0.0
        for batch in split.batches(16):
            counts += np.bincount(batch.labels.ravel() + 1, minlength=classes + 1)
            deepest = max(deepest, float(batch.depth.max()))
            unknown["depth"] += np.sum(~batch.depth_known)
            if batch.normals_known is not None:
                unknown["normals"] += np.sum(~batch.normals_known)
        pixels = counts.sum()
        void, *shares = counts / pixels
        lines += [
            f"{name}: {len(split):,} images {(*split.size, 3)}",
            f"  labels, {classes} classes: {void:.1%} of the pixels void, "
            + ", ".join(f"class {k}: {share:.1%}" for k, share in enumerate(shares)),
            f"  depth: up to {deepest:.4g}, {unknown['depth'] / pixels:.1%} of the pixels not known",
        ]
        if batch.normals is not None:
            lines.append(f"  normals: {unknown['normals'] / pixels:.1%} of the pixels not known")
    return lines
