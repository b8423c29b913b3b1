"""What the readers share: the error they raise, files that must be there and whole, and counts of labels."""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import gzip
import hashlib
import io
import os
import pathlib
import tarfile
from typing import NamedTuple
import zlib

import numpy as np


class DataError(ValueError):
    """A folder or file is not what it must be; one line says what was found, where, and what to do."""

    def __init__(self, message: str):
        super().__init__(message.replace("\n", " "))  # what is quoted in it may be of several lines


class Examples(NamedTuple):
    """Examples of a data set.

    Attributes:
      features: `(N, ...)` float32, or int32 ids of words.
      labels: `(N, T)` int32, the classes of an example in each task.
    """

    features: np.ndarray
    labels: np.ndarray


class Classification(NamedTuple):
    """Tasks that classify the same examples.

    Attributes:
      train: examples to train on.
      test: examples to test on.
      classes: the number of classes of each task, by name, in the order of the labels' columns.
    """

    train: Examples
    test: Examples
    classes: dict[str, int]


def existing(folder: str | os.PathLike[str], layout: str) -> pathlib.Path:
    """The folder, which must be there; `layout` says what it must hold, and where one gets it."""
    path = pathlib.Path(folder).expanduser()
    if not path.is_dir():
        kind = "is a file, not a folder" if path.exists() else "is not there"
        raise DataError(f"folder {path} {kind}; nothing is downloaded: {layout}")
    return path


@contextlib.contextmanager
def reading(path: object) -> Iterator[None]:
    """Says of which file it is that it cannot be read to its end."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, tarfile.TarError, zlib.error) as error:
        raise DataError(f"{path} is truncated or damaged ({error}): fetch it again") from error


def check_md5(path: pathlib.Path, content: bytes, wanted: str) -> None:
    """The file is the published one, byte for byte."""
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != wanted:
        raise DataError(
            f"{path} has MD5 checksum {found}, wanted {wanted}: it is truncated, damaged or another version; fetch it "
            "again, or read it as it is with checksums=False (--no-checksums)"
        )


def check_number(where: object, found: int, wanted: int) -> None:
    """A split has as many examples as the published one."""
    if found != wanted:
        raise DataError(
            f"{where} has {found:,} examples, wanted {wanted:,}: some are missing or too many; fetch it again, or read "
            "it as it is with checksums=False (--no-checksums)"
        )


def check_labels(where: object, labels: np.ndarray, classes: int, lowest: int = 0) -> None:
    """All labels are from `lowest` to `classes - 1`."""
    wrong = (labels < lowest) | (labels >= classes) | (labels != np.round(labels))
    if wrong.any():
        raise DataError(
            f"{where} has a label {labels[wrong][0]:g}, wanted whole numbers from {lowest} to {classes - 1}: it is not "
            "the published file, or damaged; fetch it again"
        )


def read_folder(folder: pathlib.Path, names: Sequence[str], md5: Mapping[str, str], layout: str) -> dict[str, bytes]:
    """The contents of files, by name; `md5` has checksums of some."""
    contents = {}
    for name in names:
        if not (folder / name).is_file():
            raise DataError(f"{folder / name} is missing: {layout}")
        contents[name] = (folder / name).read_bytes()
        if name in md5:
            check_md5(folder / name, contents[name], md5[name])
    return contents


def read_archive(archive: pathlib.Path, inside: str, names: Sequence[str], md5: Mapping[str, str]) -> dict[str, bytes]:
    """The contents of files in a folder inside a `.tar.gz`, by name; nothing is unpacked on the disk."""
    packed = archive.read_bytes()
    if archive.name in md5:
        check_md5(archive, packed, md5[archive.name])
    contents = {}
    with reading(archive), tarfile.open(fileobj=io.BytesIO(packed), mode="r:gz") as tar:
        for member in tar:
            name = member.name.removeprefix("./").removeprefix(f"{inside}/")
            file = tar.extractfile(member) if name in names and member.isreg() else None
            if file is not None:
                contents[name] = file.read()
    missing = [name for name in names if name not in contents]
    if missing:
        raise DataError(f"{archive} has no {inside}/{missing[0]}: it is not the published archive; fetch it again")
    return contents


def counted(task: str, names: Sequence[str], labels: np.ndarray) -> str:
    """A line: a task, its number of classes, and how many examples each has."""
    counts = np.bincount(labels, minlength=len(names))
    fewest, most = int(counts.argmin()), int(counts.argmax())
    if counts[fewest] == counts[most]:
        found = f"{counts[0]:,} examples of each"
    elif len(names) <= 20:
        found = ", ".join(f"{name}: {count:,}" for name, count in zip(names, counts, strict=True))
    else:
        found = f"from {counts[fewest]:,} examples (of {names[fewest]}) to {counts[most]:,} (of {names[most]})"
    return f"  {task}, {len(names)} classes: {found}"
