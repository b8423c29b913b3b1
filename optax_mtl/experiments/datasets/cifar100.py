"""CIFAR-100: 32 x 32 photographs of 100 classes (fine labels) in 20 superclasses (coarse labels).

A. Krizhevsky, "Learning multiple layers of features from tiny images", 2009; https://www.cs.toronto.edu/~kriz/cifar.html.
Two of the published forms are read, each from its archive or unpacked. The binary one is taken where both are there: a
record is the coarse label, the fine label, and 3,072 pixels (red, green, blue, each row by row), one byte each. The
Python one is pickled; it is read without unpickling, so that a file from elsewhere can run nothing.
"""

from collections.abc import Callable
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np

from optax_mtl.experiments.datasets import _common, _pickled
from optax_mtl.experiments.datasets._common import Classification, DataError, Examples

NUMBER = {"train": 50_000, "test": 10_000}
MD5 = {  # of the archives as their page gives them, of the unpacked Python files as torchvision checks them
    "cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8",
    "cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85",
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    "meta": "7973b15100ade9c7d40fb424638fde48",
}
_FINE, _COARSE, _PIXELS = 100, 20, 3 * 32 * 32
_BINARY_FILES = ("train.bin", "test.bin", "fine_label_names.txt", "coarse_label_names.txt")
_PYTHON_FILES = ("train", "test", "meta")
_LAYOUT = (
    "from https://www.cs.toronto.edu/~kriz/cifar.html, put cifar-100-binary.tar.gz or cifar-100-python.tar.gz into the "
    "folder, or what is in one of them"
)


class Split(NamedTuple):
    """Photographs and their labels.

    Attributes:
      images: `(N, 32, 32, 3)` uint8, red, green and blue.
      fine: `(N,)` int32 from 0 to 99.
      coarse: `(N,)` int32 from 0 to 19.
    """

    images: np.ndarray
    fine: np.ndarray
    coarse: np.ndarray


class Cifar100(NamedTuple):
    """CIFAR-100.

    Attributes:
      train: 50,000 photographs.
      test: 10,000 photographs.
      fine_names: names of the 100 classes.
      coarse_names: names of the 20 superclasses.
    """

    train: Split
    test: Split
    fine_names: tuple[str, ...]
    coarse_names: tuple[str, ...]


def load(folder: str | os.PathLike[str], *, checksums: bool = True) -> Cifar100:
    """Reads CIFAR-100.

    Args:
      folder: holds `cifar-100-binary.tar.gz` or `cifar-100-python.tar.gz`, or the folder in one of them; or is the
        latter.
      checksums: whether the files must be the published ones: by their checksums where those are public (both archives,
        and the unpacked Python form), and 50,000 and 10,000 in number.

    Returns:
      A `Cifar100`.
    """
    folder = _common.existing(folder, _LAYOUT)
    data = _read(folder, checksums)
    if checksums:
        for name, number in NUMBER.items():
            _common.check_number(f"{folder}: {name}", len(getattr(data, name).fine), number)
    return data


def _read(folder: pathlib.Path, checksums: bool) -> Cifar100:
    md5 = MD5 if checksums else {}
    forms: dict[str, tuple[tuple[str, ...], Callable[..., Cifar100]]] = {
        "cifar-100-binary": (_BINARY_FILES, _from_binary),
        "cifar-100-python": (_PYTHON_FILES, _from_python),
    }
    for form, (names, read) in forms.items():
        for place in (folder / form, folder):
            if any((place / name).is_file() for name in names):
                return read(_common.read_folder(place, names, md5, _LAYOUT), place)
        archive = folder / f"{form}.tar.gz"
        if archive.is_file():
            return read(_common.read_archive(archive, form, names, md5), archive / form)
    raise DataError(f"CIFAR-100 is not in {folder}: {_LAYOUT}")


def _from_binary(files: dict[str, bytes], where: pathlib.Path) -> Cifar100:
    def split(name: str) -> Split:
        size = 2 + _PIXELS
        if not files[name] or len(files[name]) % size:
            raise DataError(
                f"{where / name} has {len(files[name]):,} bytes, wanted a multiple of {size:,} (two labels and "
                f"{_PIXELS:,} pixels): it is truncated; fetch it again"
            )
        records = np.frombuffer(files[name], np.uint8).reshape(-1, size)
        return _split(records[:, 2:], fine=records[:, 1], coarse=records[:, 0], where=where / name)

    def names(name: str, number: int) -> tuple[str, ...]:
        return _names(files[name].split(), number, where / name)

    return Cifar100(
        train=split("train.bin"),
        test=split("test.bin"),
        fine_names=names("fine_label_names.txt", _FINE),
        coarse_names=names("coarse_label_names.txt", _COARSE),
    )


def _from_python(files: dict[str, bytes], where: pathlib.Path) -> Cifar100:
    def entry(name: str, key: bytes) -> Any:
        if key not in pickled[name]:
            raise DataError(
                f"{where / name} has no entry {key.decode()!r}: it is not the published file; fetch it again"
            )
        return pickled[name][key]

    def labels(name: str, key: bytes) -> np.ndarray:
        found = entry(name, key)
        if not isinstance(found, list) or any(type(label) is not int for label in found):
            raise DataError(f"{where / name} has no list of numbers at {key.decode()!r}: fetch it again")
        return np.array(found, np.int64)

    def split(name: str) -> Split:
        pixels = np.asarray(entry(name, b"data"))
        if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != _PIXELS:
            raise DataError(
                f"{where / name} has images of shape {pixels.shape} and {pixels.dtype}, wanted (N, {_PIXELS}) and "
                "uint8: it is not the published file; fetch it again"
            )
        fine, coarse = labels(name, b"fine_labels"), labels(name, b"coarse_labels")
        if not len(pixels) == len(fine) == len(coarse):
            raise DataError(
                f"{where / name} has {len(pixels):,} images, {len(fine):,} fine and {len(coarse):,} coarse labels, "
                "wanted as many of each: it is not the published file; fetch it again"
            )
        return _split(pixels, fine=fine, coarse=coarse, where=where / name)

    pickled = {name: _pickled.read(content, where / name) for name, content in files.items()}
    return Cifar100(
        train=split("train"),
        test=split("test"),
        fine_names=_names(entry("meta", b"fine_label_names"), _FINE, where / "meta"),
        coarse_names=_names(entry("meta", b"coarse_label_names"), _COARSE, where / "meta"),
    )


def _split(pixels: np.ndarray, *, fine: np.ndarray, coarse: np.ndarray, where: object) -> Split:
    _common.check_labels(f"{where} (fine labels)", fine, _FINE)
    _common.check_labels(f"{where} (coarse labels)", coarse, _COARSE)
    images = np.moveaxis(pixels.reshape(-1, 3, 32, 32), 1, -1)
    return Split(images.copy(), fine.astype(np.int32), coarse.astype(np.int32))


def _names(found: object, number: int, where: object) -> tuple[str, ...]:
    if not isinstance(found, list) or len(found) != number or not all(isinstance(name, bytes) for name in found):
        raise DataError(
            f"{where} does not hold {number} names of classes: it is not the published file; fetch it again"
        )
    return tuple(name.decode("latin-1") for name in found)


def classification(folder: str | os.PathLike[str], *, checksums: bool = True) -> Classification:
    """The tasks fine (100 classes) and coarse (20), on images `(N, 32, 32, 3)` float32 in [0, 1].

    Args:
      folder: as for `load`.
      checksums: as for `load`.

    Returns:
      A `Classification`.
    """
    data = load(folder, checksums=checksums)

    def examples(split: Split) -> Examples:
        features = np.divide(split.images, np.float32(255), dtype=np.float32)
        return Examples(features, np.stack([split.fine, split.coarse], axis=1))

    return Classification(examples(data.train), examples(data.test), {"fine": _FINE, "coarse": _COARSE})


def describe(data: Cifar100) -> list[str]:
    """Lines about what was read."""
    lines = []
    for name in NUMBER:
        split = getattr(data, name)
        lines += [
            f"{name}: {len(split.images):,} photographs (32, 32, 3) uint8",
            _common.counted("fine", data.fine_names, split.fine),
            _common.counted("coarse", data.coarse_names, split.coarse),
        ]
    return lines
