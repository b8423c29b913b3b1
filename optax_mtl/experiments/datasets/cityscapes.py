"""Cityscapes: street scenes with classes and inverse depth for every pixel, as MTAN published them.

M. Cordts et al., "The Cityscapes dataset for semantic urban scene understanding", CVPR 2016; the `.npy` files, of 128 x
256 or 256 x 512 pixels, are those of https://github.com/lorenmt/mtan, which LibMTL and CAGrad use: see `_dense.py` for
their layout. The depth is the disparity, the inverse of a distance.
"""

import os
from typing import NamedTuple

from optax_mtl.experiments.datasets import _common, _dense
from optax_mtl.experiments.datasets._common import DataError

NUMBER = {"train": 2_975, "val": 500}
SIZES = ((128, 256), (256, 512))


class Cityscapes(NamedTuple):
    """Cityscapes: tasks segmentation and depth.

    Attributes:
      train: 2,975 scenes; index it to read some.
      val: 500 scenes; index it to read some.
      classes: number of classes that the labels tell apart.
    """

    train: _dense.Split
    val: _dense.Split
    classes: int


def load(folder: str | os.PathLike[str], *, classes: int = 7, checksums: bool = True) -> Cityscapes:
    """Finds the files of Cityscapes; they are read as the splits are indexed.

    Args:
      folder: holds `train` and `val`, and each of these `image`, `depth` and `label_7` or, as LibMTL names it, `label`.
      classes: 7, or 19 to read `label_19`.
      checksums: whether there must be 2,975 and 500 scenes; checksums are not published.

    Returns:
      A `Cityscapes`.
    """
    if classes not in (7, 19):
        raise DataError(f"classes is {classes}, wanted 7 or 19")
    labels = f"label_{classes}"
    layout = (
        f"unpack the Cityscapes files of https://github.com/lorenmt/mtan, so that the folder holds train and val, and "
        f"each of them image/0.npy, {labels}/0.npy, depth/0.npy, 1.npy and so on"
    )
    folder = _common.existing(folder, layout)
    if classes == 7 and not (folder / "train" / labels).is_dir() and (folder / "train" / "label").is_dir():
        labels = "label"
    parts = ("image", labels, "depth")
    return Cityscapes(*_dense.splits(folder, parts, SIZES, classes, layout, NUMBER if checksums else None), classes)


def describe(data: Cityscapes) -> list[str]:
    """Lines about what is there, for which all files are read."""
    return _dense.describe(data.train, data.val, data.classes)
