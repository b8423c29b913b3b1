r"""AG News: titles and first sentences of news on four topics.

X. Zhang, J. Zhao, Y. LeCun, "Character-level convolutional networks for text classification", NeurIPS 2015, from
A. Gulli's corpus of news articles. A row of `train.csv` and `test.csv` is the topic's number from 1 to 4, the title and
the description, in double quotes, with a double quote inside written twice; a backslash stands where a line ended,
and before a dollar sign.
"""

from collections.abc import Sequence
import csv
import io
import os
import pathlib
import re
from typing import NamedTuple
import zlib

import numpy as np

from optax_mtl.experiments.datasets import _common
from optax_mtl.experiments.datasets._common import Classification, DataError, Examples

TOPICS = ("World", "Sports", "Business", "Sci/Tech")
AGENCIES = ("none named", "Reuters", "AP", "AFP")
NUMBER = {"train": 120_000, "test": 7_600}
MD5 = {  # as torchtext checks them
    "train.csv": "b1a00f826fdfbd249f79597b59e1dc12",
    "test.csv": "d52ea96a97a2d943681189a97654912d",
}
_LAYOUT = "put train.csv and test.csv of ag_news_csv.tar.gz (Zhang, Zhao and LeCun, 2015) into the folder"
_NAMED = re.compile(r"\((Reuters|AP|AFP)\)|^(Reuters|AP|AFP) - ")
_NOT_WORDS = re.compile(r"&lt;.*?&gt;|&\w+;|#\d+;|\b(?:amp|quot);")  # tags and characters by name, left by web pages
_WORD = re.compile(r"[a-z0-9]+")


class Split(NamedTuple):
    """News.

    Attributes:
      topics: `(N,)` int32 from 0 to 3, in the order of `TOPICS` (from 1 to 4 in the file).
      titles: N strings, as in the file.
      descriptions: N strings, as in the file.
    """

    topics: np.ndarray
    titles: list[str]
    descriptions: list[str]


class AGNews(NamedTuple):
    """AG News.

    Attributes:
      train: 120,000 news.
      test: 7,600 news.
    """

    train: Split
    test: Split


def load(folder: str | os.PathLike[str], *, checksums: bool = True) -> AGNews:
    """Reads AG News.

    Args:
      folder: holds `train.csv` and `test.csv`, or the folder `ag_news_csv` with them.
      checksums: whether the files must be the published ones, by their checksums and numbers of rows.

    Returns:
      An `AGNews`.
    """
    folder = _common.existing(folder, _LAYOUT)
    inner = folder / "ag_news_csv"
    place = inner if inner.is_dir() else folder
    files = _common.read_folder(place, tuple(MD5), MD5 if checksums else {}, _LAYOUT)
    data = AGNews(*(_rows(content, place / name) for name, content in files.items()))
    if checksums:
        for name, number in NUMBER.items():
            _common.check_number(place / f"{name}.csv", len(getattr(data, name).topics), number)
    return data


def _rows(content: bytes, where: pathlib.Path) -> Split:
    titles, descriptions, topics = [], [], []
    try:
        lines = io.TextIOWrapper(io.BytesIO(content), "utf-8", newline="")
        for topic, title, description in csv.reader(lines, strict=True):
            topics.append(int(topic))
            titles.append(title)
            descriptions.append(description)
    except (ValueError, csv.Error) as error:  # too few fields, no number, no UTF-8, no closing quote
        raise DataError(
            f"{where} is truncated, or not the published file, after row {len(topics):,} ({error}): wanted rows of "
            "topic, title and description; fetch it again"
        ) from error
    if not content.endswith(b"\n"):  # else a text cut off at a double quote would look whole
        raise DataError(f"{where} is {'truncated: its last row does not end' if topics else 'empty'}; fetch it again")
    _common.check_labels(where, np.array(topics), len(TOPICS) + 1, lowest=1)
    return Split(np.array(topics, np.int32) - 1, titles, descriptions)


def words(text: str) -> list[str]:
    """The words of a text, in lower case, without what web pages left in it (`&lt;b&gt;`, `#39;`)."""
    return _WORD.findall(_NOT_WORDS.sub(" ", text).lower())


def word_ids(texts: Sequence[str], length: int = 64, size: int = 2**15, without: Sequence[str] = ()) -> np.ndarray:
    """Texts as rows of numbers, one for each word.

    A word's number is a checksum of its letters, so that no vocabulary has to be fitted or kept: the same word has the
    same number in every text, run and split. Words may share a number: with the default size, of 5,000 words one in
    seven does with another of them.

    Args:
      texts: N texts.
      length: of a row; later words are left out, and shorter texts end in zeros.
      size: numbers are from 1 to `size - 1`.
      without: words to leave out.

    Returns:
      `(N, length)` int32.
    """
    known: dict[str, int] = dict.fromkeys(without, 0)
    ids = np.zeros((len(texts), length), np.int32)
    for row, text in zip(ids, texts, strict=True):
        numbers = []
        for word in words(text):
            if word not in known:
                known[word] = zlib.crc32(word.encode()) % (size - 1) + 1
            if known[word]:
                numbers.append(known[word])
        row[: len(numbers)] = numbers[:length]
    return ids


def agencies(split: Split) -> np.ndarray:
    """Which news agency a text names as its source: `(N,)` int32, in the order of `AGENCIES`.

    This is no published label. It is read off the mark in title or description, as in "(Reuters)" or "Reuters - ".
    """

    def agency(title: str, description: str) -> int:
        mark = _NAMED.search(title) or _NAMED.search(description)
        return AGENCIES.index(mark[1] or mark[2]) if mark else 0

    return np.array([agency(*texts) for texts in zip(split.titles, split.descriptions, strict=True)], np.int32)


def classification(folder: str | os.PathLike[str], *, checksums: bool = True) -> Classification:
    """The tasks topic (4 classes) and agency (4), on words `(N, 64)` int32 below 32,768 (see `word_ids`).

    Topic is the data set's label. Agency is made from the text, by `agencies`; the agencies' names are then taken out
    of the words, or else the task would be to find them.

    Args:
      folder: as for `load`.
      checksums: as for `load`.

    Returns:
      A `Classification`.
    """
    data = load(folder, checksums=checksums)
    names = [name.lower() for name in AGENCIES[1:]]

    def examples(split: Split) -> Examples:
        texts = [" ".join(both) for both in zip(split.titles, split.descriptions, strict=True)]
        return Examples(word_ids(texts, without=names), np.stack([split.topics, agencies(split)], axis=1))

    return Classification(examples(data.train), examples(data.test), {"topic": len(TOPICS), "agency": len(AGENCIES)})


def describe(data: AGNews) -> list[str]:
    """Lines about what was read."""
    lines = []
    for name in NUMBER:
        split = getattr(data, name)
        lengths = [len(words(" ".join(both))) for both in zip(split.titles, split.descriptions, strict=True)]
        lines += [
            f"{name}: {len(split.topics):,} news of {np.median(lengths):.0f} words (median)",
            _common.counted("topic", TOPICS, split.topics),
            _common.counted("agency (read off the text)", AGENCIES, agencies(split)),
        ]
    return lines
