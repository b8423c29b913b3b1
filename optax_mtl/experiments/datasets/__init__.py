"""Readers of the papers' own data sets, from files that you have fetched; nothing here downloads anything.

Each module reads one published format: `load(folder)` gives arrays, or for large images a split that reads a batch of
files when it is indexed; `describe(data)` says in lines what is there; `classification(folder)`, where a data set has
labels of whole examples, gives features and labels of all its tasks. What is missing, damaged or not as published is a
`DataError` of one line: what was found, where, and what to do.
"""

import os
from types import ModuleType

from optax_mtl.experiments.datasets import ag_news, cifar100, cityscapes, multimnist, nyuv2
from optax_mtl.experiments.datasets._common import Classification, DataError, Examples

__all__ = ["DATASETS", "Classification", "DataError", "Examples", "classification", "describe"]

DATASETS: dict[str, ModuleType] = {
    "cifar100": cifar100,
    "ag_news": ag_news,
    "multimnist": multimnist,
    "cityscapes": cityscapes,
    "nyuv2": nyuv2,
}


def classification(name: str, folder: str | os.PathLike[str], *, checksums: bool = True) -> Classification:
    """Features and labels of a data set's tasks.

    Args:
      name: `"cifar100"` (tasks fine and coarse), `"ag_news"` (topic, and agency, which is read off the text) or
        `"multimnist"` (left and right).
      folder: where its files are.
      checksums: whether the files must be the published ones, byte for byte and in number.

    Returns:
      A `Classification`.
    """
    able = [known for known, module in DATASETS.items() if hasattr(module, "classification")]
    if name not in able:
        raise DataError(f"no labels of whole examples in {name!r}: choose from {', '.join(able)}")
    return DATASETS[name].classification(folder, checksums=checksums)


def describe(name: str, folder: str | os.PathLike[str], *, checksums: bool = True) -> str:
    """Reads a data set, all of it, and says what is there: splits, shapes, classes, examples a class, share of void.

    Args:
      name: one of `DATASETS`.
      folder: where its files are.
      checksums: whether the files must be the published ones, byte for byte and in number.

    Returns:
      Some lines of text.
    """
    if name not in DATASETS:
        raise DataError(f"unknown data set {name!r}: choose from {', '.join(DATASETS)}")
    module = DATASETS[name]
    return "\n".join([f"{name} in {os.fspath(folder)}", *module.describe(module.load(folder, checksums=checksums))])
