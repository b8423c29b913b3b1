"""Text that ships with Python: windows of words from its documentation and from its library's source code.

Nothing has to be downloaded: `pydoc_data.topics` is what `help("types")` shows, and a module's source stands beside it.
Of each window four things are asked, of different difficulty. The words and pairs of neighbours are hashed into a
vector of counts, as in Joulin et al., "Bag of tricks for efficient text classification", EACL 2017.
"""

from collections.abc import Sequence
import functools
import importlib.util
import pathlib
import pydoc_data.topics
import re
from typing import NamedTuple
import zlib

import numpy as np

# None of them contains another, as some of the pages do.
PROSE = (
    "compound",
    "debugger",
    "formatstrings",
    "specialnames",
    "string-methods",
    "types",
    "typesmapping",
    "typesseq",
)
CODE = ("argparse", "configparser", "difflib", "doctest", "inspect", "pickle", "tarfile", "threading")
FILES = (*PROSE, *CODE)
TASKS = {"kind": 2, "shuffled": 2, "quarter": 4, "file": len(FILES)}  # task: number of classes
WINDOW = 24  # words
SPAN = 48  # words that are in one of the splits, all of them
MAX_WORDS = 6_000  # of a file
BUCKETS = (256, 512)  # of words and of pairs


class Windows(NamedTuple):
    """Windows and their labels.

    Attributes:
      counts: `(N, features)` uint8: how often words and pairs of neighbours of each bucket are there.
      labels: `(N, 4)` int32: code or prose, whether the words have been shuffled, quarter of the file, file.
      places: `(N,)` int32, where each begins, counted through all files.
    """

    counts: np.ndarray
    labels: np.ndarray
    places: np.ndarray


def windows(seed: int, sizes: Sequence[int]) -> list[Windows]:
    """Splits of windows, no word of a file in two of them; the same for the same seed (and the same Python).

    Every file is cut into spans of `SPAN` words, which go to the splits at random, six in ten to the first and the
    others in equal parts to the rest; a window lies within a span. Files are equally probable, and half of the windows
    have their words shuffled.

    Args:
      seed: decides the splits and the windows.
      sizes: numbers of windows: training, and others.

    Returns:
      One `Windows` for each of `sizes`.
    """
    rng = np.random.default_rng(seed)
    words, lengths = _hashed_files()
    spans = [rng.permutation(length // SPAN) for length in lengths]
    cuts = np.linspace(0.6, 1, len(sizes))[:-1]
    parts = [np.split(order, (cuts * len(order)).astype(int)) for order in spans]
    return [_sample(rng, words, lengths, [part[k] for part in parts], size) for k, size in enumerate(sizes)]


def _sample(
    rng: np.random.Generator, words: np.ndarray, lengths: np.ndarray, spans: Sequence[np.ndarray], size: int
) -> Windows:
    file = rng.integers(len(lengths), size=size)
    span = np.array([rng.choice(spans[f]) for f in file])
    within = span * SPAN + rng.integers(SPAN - WINDOW + 1, size=size)
    places = (np.cumsum(lengths) - lengths)[file] + within
    shown = words[places[:, None] + np.arange(WINDOW)]
    shuffled = rng.random(size) < 0.5
    shown[shuffled] = rng.permuted(shown[shuffled], axis=1)
    labels = np.stack([file >= len(PROSE), shuffled, 4 * within // lengths[file], file], axis=1)
    return Windows(_counts(shown), labels.astype(np.int32), places.astype(np.int32))


def _counts(words: np.ndarray) -> np.ndarray:
    """`(N, sum(BUCKETS))` from hashed words `(N, WINDOW)`."""
    pairs = words[:, :-1] * np.uint64(1_000_003) ^ words[:, 1:]
    found = [part % np.uint64(number) for part, number in zip((words, pairs), BUCKETS, strict=True)]
    buckets = np.concatenate([found[0], found[1] + np.uint64(BUCKETS[0])], axis=1).astype(np.intp)
    counts = np.zeros((len(words), sum(BUCKETS)), np.uint8)
    np.add.at(counts, (np.arange(len(words))[:, None], buckets), 1)
    return counts


@functools.cache
def _hashed_files() -> tuple[np.ndarray, np.ndarray]:
    """The words of all files, one after the other, as numbers, and how many each file has."""
    hashed = [[zlib.crc32(word.encode()) for word in read(name)] for name in FILES]
    return np.concatenate(hashed).astype(np.uint64), np.array([len(file) for file in hashed])


def read(name: str) -> list[str]:
    """The words of a page of the documentation or of a module's source, in small letters, without anything between."""
    if name in PROSE:
        text = pydoc_data.topics.topics[name]
    else:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None or not pathlib.Path(found.origin).is_file():
            raise FileNotFoundError(
                f"the source of the module {name!r} of the standard library is not there: this experiment needs a "
                "Python whose library is installed as .py files"
            )
        text = pathlib.Path(found.origin).read_text(encoding="utf-8")
    return re.findall("[a-z_]+", text.lower())[:MAX_WORDS]
