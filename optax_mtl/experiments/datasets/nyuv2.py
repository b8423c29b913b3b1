"""NYUv2: indoor scenes with 13 classes, depth and surface normals for every pixel, as MTAN published them.

N. Silberman et al., "Indoor segmentation and support inference from RGBD images", ECCV 2012; the `.npy` files of 288 x
384 pixels are those of https://github.com/lorenmt/mtan, which LibMTL, CAGrad and Nash-MTL use: see `_dense.py` for
their layout. The depth is in metres.
"""

import os
from typing import NamedTuple

from optax_mtl.experiments.datasets import _common, _dense

NUMBER = {"train": 795, "val": 654}
SIZES = ((288, 384),)
CLASSES = 13
_LAYOUT = (
    "unpack the NYUv2 files of https://github.com/lorenmt/mtan, so that the folder holds train and val, and each "
    "of them image/0.npy, label/0.npy, depth/0.npy, normal/0.npy, 1.npy and so on"
)


class NYUv2(NamedTuple):
    """NYUv2: tasks segmentation, depth and surface normals.

    Attributes:
      train: 795 scenes; index it to read some.
      val: 654 scenes; index it to read some.
    """

    train: _dense.Split
    val: _dense.Split


def load(folder: str | os.PathLike[str], *, checksums: bool = True) -> NYUv2:
    """Finds the files of NYUv2; they are read as the splits are indexed.

    Args:
      folder: holds `train` and `val`, and each of these `image`, `label`, `depth` and `normal`.
      checksums: whether there must be 795 and 654 scenes; checksums are not published.

    Returns:
      An `NYUv2`.
    """
    folder = _common.existing(folder, _LAYOUT)
    parts = ("image", "label", "depth", "normal")
    return NYUv2(*_dense.splits(folder, parts, SIZES, CLASSES, _LAYOUT, NUMBER if checksums else None))


def describe(data: NYUv2) -> list[str]:
    """Lines about what is there, for which all files are read."""
    return _dense.describe(data.train, data.val, CLASSES)
