"""The readers of published data sets, on small files made here in exactly the published formats."""

import csv
import gzip
import io
import pathlib
import pickle
import pickletools
import struct
import tarfile

import numpy as np
from PIL import Image
import pytest

from optax_mtl.experiments import datasets
from optax_mtl.experiments.datasets import (
    _common,
    _dense,
    _pickled,
    ag_news,
    cifar100,
    cityscapes,
    multimnist,
    nyuv2,
)

RNG = np.random.default_rng(0)


def refused(call, *args, **kwargs):
    """What a reader says when it refuses; one line."""
    with pytest.raises(datasets.DataError) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def truncate(path, size=-1):
    path.write_bytes(path.read_bytes()[:size])


# -- CIFAR-100 -----------------------------------------------------------------

FINE_NAMES = [f"fine_{k}".encode() for k in range(100)]
COARSE_NAMES = [f"coarse_{k}".encode() for k in range(20)]
CIFAR = {
    name: {
        b"filenames": [f"{name}_s_{k:06}.png".encode() for k in range(size)],
        b"batch_label": f"{name}ing batch 1 of 1".encode(),
        b"fine_labels": RNG.integers(100, size=size).tolist(),
        b"coarse_labels": RNG.integers(20, size=size).tolist(),
        b"data": RNG.integers(256, size=(size, 3072), dtype=np.uint8),
    }
    for name, size in (("train", 7), ("test", 3))
}
META = {b"fine_label_names": FINE_NAMES, b"coarse_label_names": COARSE_NAMES}


class Python2Pickler(pickle._Pickler):
    """Writes bytes and names as Python 2 does in protocol 2."""

    dispatch = pickle._Pickler.dispatch.copy()

    def __init__(self, file):
        super().__init__(file, protocol=2)

    def save_bytes(self, content):
        short = len(content) < 256
        size = struct.pack("<B" if short else "<i", len(content))
        self.write((pickle.SHORT_BINSTRING if short else pickle.BINSTRING) + size + content)
        self.memoize(content)

    def save_str(self, text):
        self.save_bytes(text.encode())

    def save_global(self, obj, name=None):
        module = obj.__module__.replace("_core", "core")
        self.write(pickle.GLOBAL + f"{module}\n{name or obj.__name__}\n".encode())
        self.memoize(obj)

    dispatch[bytes] = save_bytes
    dispatch[str] = save_str


def python2(content):
    file = io.BytesIO()
    Python2Pickler(file).dump(content)
    return file.getvalue()


def cifar_files(form):
    if form == "cifar-100-python":
        return {name: python2(content) for name, content in (CIFAR | {"meta": META}).items()}
    files = {"fine_label_names.txt": b"\n".join(FINE_NAMES) + b"\n"}
    files["coarse_label_names.txt"] = b"\n".join(COARSE_NAMES) + b"\n"
    for name, split in CIFAR.items():
        labels = np.stack([split[b"coarse_labels"], split[b"fine_labels"]], axis=1).astype(np.uint8)
        files[f"{name}.bin"] = np.concatenate([labels, split[b"data"]], axis=1).tobytes()
    return files


def write_files(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def write_archive(folder, form, files):
    with tarfile.open(folder / f"{form}.tar.gz", "w:gz") as tar:
        top = tarfile.TarInfo(form)
        top.type = tarfile.DIRTYPE
        tar.addfile(top)
        for name, content in files.items():
            member = tarfile.TarInfo(f"{form}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return folder


FORMS = ("cifar-100-binary", "cifar-100-python")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("place", ["archive", "inside", "direct"])
def test_cifar100_is_read_from_every_published_form(tmp_path, form, place):
    if place == "archive":
        write_archive(tmp_path, form, cifar_files(form))
    else:
        write_files(tmp_path / form if place == "inside" else tmp_path, cifar_files(form))
    data = cifar100.load(tmp_path, checksums=False)
    assert data.fine_names == tuple(name.decode() for name in FINE_NAMES)
    assert data.coarse_names == tuple(name.decode() for name in COARSE_NAMES)
    for name in ("train", "test"):
        split, wanted = getattr(data, name), CIFAR[name]
        assert split.images.dtype == np.uint8
        assert split.images.shape == (len(wanted[b"data"]), 32, 32, 3)
        assert split.fine.dtype == split.coarse.dtype == np.int32
        np.testing.assert_array_equal(split.fine, wanted[b"fine_labels"])
        np.testing.assert_array_equal(split.coarse, wanted[b"coarse_labels"])
        for k, row, column, channel in ((0, 0, 0, 0), (1, 0, 31, 0), (2, 31, 5, 1), (1, 7, 11, 2)):
            pixel = wanted[b"data"][k, 1024 * channel + 32 * row + column]
            assert split.images[k, row, column, channel] == pixel


def test_the_binary_form_goes_before_the_pickled_one(tmp_path):
    write_archive(tmp_path, "cifar-100-binary", cifar_files("cifar-100-binary"))
    write_files(tmp_path / "cifar-100-python", dict.fromkeys(("train", "test", "meta"), b"not read"))
    assert len(cifar100.load(tmp_path, checksums=False).train.fine) == 7


@pytest.mark.filterwarnings("ignore:numpy.core.multiarray is deprecated")
def test_what_is_read_without_unpickling_is_what_unpickling_gives():
    for content in (*CIFAR.values(), META):
        pickled = python2(content)
        codes = {opcode.name for opcode, _, _ in pickletools.genops(pickled)}
        assert codes.isdisjoint({"BINUNICODE", "BINBYTES", "STACK_GLOBAL", "FRAME", "MEMOIZE"})  # not of Python 2
        unpickled = pickle.loads(pickled, encoding="bytes")
        read = _pickled.read(pickled, "file")
        assert read.keys() == unpickled.keys() == content.keys()
        for key, value in unpickled.items():
            np.testing.assert_array_equal(read[key], value)
            assert type(read[key]) is type(value)


def test_an_array_by_columns_is_read_as_such():
    pixels = np.asfortranarray(np.arange(12, dtype=np.uint8).reshape(3, 4))
    np.testing.assert_array_equal(_pickled.read(python2({b"data": pixels}), "file")[b"data"], pixels)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def malicious(path):
    """Files that make a file when they are unpickled, and others that would do worse."""
    evil = Malicious(path)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        yield pickle.dumps(evil, protocol)
        yield pickle.dumps({b"data": evil, b"fine_labels": [evil]}, protocol)
    yield b"cos\nsystem\n(S'touch " + str(path).encode() + b"'\ntR."
    yield b"(S'touch " + str(path).encode() + b"'\nios\nsystem\n."
    yield b"\x80\x02cbuiltins\neval\n(U\x01ktR."
    yield b"\x80\x02}(U\x04datacnumpy\nload\n(U\x01ktRu."
    yield b"\x80\x02cnumpy\ndtype.__class__\n(U\x01ktR."
    yield b"\x80\x02U\x01kQ."  # a persistent id
    yield b"\x80\x02\x82\x01."  # a registered extension


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path):
    mark = tmp_path / "mark"
    for content in malicious(mark):
        files = cifar_files("cifar-100-python") | {"meta": content}
        said = refused(cifar100.load, write_files(tmp_path / "data", files), checksums=False)
        assert "meta" in said
        assert "published" in said
        assert not mark.exists()
    said = refused(cifar100.load, write_files(tmp_path / "data", {"meta": b"\x80\x02cos\nsystem\n."}), checksums=False)
    assert "'os.system'" in said
    assert "nothing of it was run" in said
    pickle.loads(next(iter(malicious(mark))))  # what it would have done
    assert mark.exists()


def test_no_damage_to_a_pickle_gets_through_as_another_error():
    whole = python2({b"data": CIFAR["test"][b"data"][:1, :9].copy(), b"fine_labels": [3, 400], b"n": b"x" * 300})
    for size in range(len(whole)):
        refused(_pickled.read, whole[:size], "file")
    rng = np.random.default_rng(1)
    survived = 0
    for _ in range(1_500):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] = rng.integers(256)
        try:
            _pickled.read(bytes(damaged), "file")
            survived += 1  # content, not structure
        except datasets.DataError:
            pass
    assert 0 < survived < 1_500


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        (b"fine_labels", [0, 1, 100], "a label 100, wanted whole numbers from 0 to 99"),
        (b"coarse_labels", [0, 20, 1], "a label 20, wanted whole numbers from 0 to 19"),
        (b"coarse_labels", [0, -1, 1], "a label -1"),
        (b"fine_labels", [0, 1], "3 images, 2 fine and 3 coarse labels"),
        (b"fine_labels", b"abc", "no list of numbers at 'fine_labels'"),
        (b"fine_labels", [0, [1], 2], "no list of numbers at 'fine_labels'"),
        (b"data", np.zeros((3, 3071), np.uint8), "shape (3, 3071)"),
        (b"data", np.zeros((3, 3072), np.float32), "something else than bytes"),
        (b"data", [0], "wanted (N, 3072) and uint8"),
        (b"data", None, "no entry 'data'"),
    ],
)
def test_wrong_content_of_a_python_file_is_named(tmp_path, key, value, said):
    content = CIFAR["test"] | {key: value}
    if value is None:
        del content[key]
    write_files(tmp_path, cifar_files("cifar-100-python") | {"test": python2(content)})
    found = refused(cifar100.load, tmp_path, checksums=False)
    assert said in found
    assert str(tmp_path / "test") in found


def test_wrong_content_of_binary_files_is_named(tmp_path):
    files = cifar_files("cifar-100-binary")
    for name, content, said in (
        ("train.bin", files["train.bin"][:-1], "bytes, wanted a multiple of 3,074"),
        ("train.bin", b"", "has 0 bytes"),
        ("train.bin", b"\x14" + files["train.bin"][1:], "coarse labels) has a label 20"),
        ("test.bin", b"\x00\x64" + files["test.bin"][2:], "fine labels) has a label 100"),
        ("fine_label_names.txt", b"apple\n", "does not hold 100 names"),
        ("coarse_label_names.txt", b"\n".join(FINE_NAMES), "does not hold 20 names"),
    ):
        found = refused(cifar100.load, write_files(tmp_path, files | {name: content}), checksums=False)
        assert said in found
        assert str(tmp_path / name) in found
    write_files(tmp_path, files)
    (tmp_path / "test.bin").unlink()
    assert f"{tmp_path / 'test.bin'} is missing" in refused(cifar100.load, tmp_path)


def test_damaged_archives_are_named(tmp_path):
    form = "cifar-100-binary"
    path = write_archive(tmp_path, form, cifar_files(form)) / f"{form}.tar.gz"
    whole = path.read_bytes()
    for size in (0, 5, 100, len(whole) // 2):
        path.write_bytes(whole[:size])
        assert f"{path} is truncated or damaged" in refused(cifar100.load, tmp_path, checksums=False)
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 255
    path.write_bytes(damaged)
    refused(cifar100.load, tmp_path, checksums=False)
    files = cifar_files(form)
    del files["test.bin"]
    write_archive(tmp_path, form, files)
    assert f"{path} has no {form}/test.bin" in refused(cifar100.load, tmp_path, checksums=False)
    link = tarfile.TarInfo(f"{form}/test.bin")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(link)
    assert f"{path} has no {form}/train.bin" in refused(cifar100.load, tmp_path, checksums=False)


def test_an_empty_folder_says_what_it_must_hold(tmp_path):
    for name, module in datasets.DATASETS.items():
        said = refused(module.load, tmp_path)
        assert str(tmp_path) in said
        for missing in (tmp_path / "nowhere", pathlib.Path(__file__)):
            told = refused(datasets.describe, name, missing)
            assert str(missing) in told
            assert "nothing is downloaded" in told
            assert ("a file, not a folder" in told) == missing.is_file()
    assert "cifar-100-binary.tar.gz" in refused(cifar100.load, tmp_path)


# -- checksums -----------------------------------------------------------------


def md5(path):
    return _common.hashlib.md5(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("form", [*FORMS, "unpacked"])
def test_checksums_and_numbers_of_cifar100(tmp_path, monkeypatch, form):
    if form == "unpacked":
        files = [write_files(tmp_path, cifar_files("cifar-100-python")) / name for name in ("train", "test", "meta")]
    else:
        files = [write_archive(tmp_path, form, cifar_files(form)) / f"{form}.tar.gz"]
    check_checksums(cifar100, tmp_path, files, monkeypatch)


def check_checksums(module, folder, files, monkeypatch):
    """A file with another checksum is refused, and one with the right checksum is not; then the number counts."""
    for path in files:
        said = refused(module.load, folder)
        assert f"{path} has MD5 checksum {md5(path)}, wanted {module.MD5[path.name]}" in said
        assert "checksums=False" in said
        monkeypatch.setitem(module.MD5, path.name, md5(path))
    said = refused(module.load, folder)
    wanted = module.NUMBER["train"]
    assert f"examples, wanted {wanted:,}" in said
    loaded = module.load(folder, checksums=False)
    for name in module.NUMBER:
        monkeypatch.setitem(module.NUMBER, name, len(getattr(loaded, name)[0]))
    module.load(folder)


# -- AG News -------------------------------------------------------------------

NEWS = [
    (3, "Wall St. Bears Claw Back (Reuters)", 'Reuters - Short-sellers, Wall Street\'s "dwindling\\band" of cynics.'),
    (4, 'He said "so", twice', 'A comma, ""two quotes"", and a backslash at the end \\'),
    (1, "Olympics #39;s best (AP)", "AP - &lt;b&gt;Gold&lt;/b&gt; for all."),
    (2, "Plain", "LONDON (AFP) - Nobody won; the AP was not asked."),
    (2, "", ""),
]


def news_file(rows):
    """As published: every field in double quotes, those inside doubled, rows ended by a line feed."""
    return "".join(",".join('"' + str(field).replace('"', '""') + '"' for field in row) + "\n" for row in rows).encode()


@pytest.fixture
def news(tmp_path):
    return write_files(tmp_path, {"train.csv": news_file(NEWS), "test.csv": news_file(NEWS[:2])})


def test_news_are_read_as_they_are(news):
    data = ag_news.load(news, checksums=False)
    assert len(data.test.titles) == 2
    topics, titles, descriptions = zip(*NEWS, strict=True)
    np.testing.assert_array_equal(data.train.topics, np.array(topics) - 1)
    assert data.train.topics.dtype == np.int32
    assert data.train.titles == list(titles)
    assert data.train.descriptions == list(descriptions)
    news.joinpath("train.csv").rename(write_files(news / "ag_news_csv", {}) / "train.csv")
    news.joinpath("test.csv").rename(news / "ag_news_csv" / "test.csv")
    assert ag_news.load(news, checksums=False).train.titles == list(titles)


def test_a_truncated_file_of_news_is_refused_or_ends_with_a_row(news):
    whole = news_file(NEWS[:3])
    ends = {k + 1 for k, byte in enumerate(whole) if byte == ord("\n")}
    for size in range(len(whole)):
        (news / "train.csv").write_bytes(whole[:size])
        if size in ends:
            assert len(ag_news.load(news, checksums=False).train.topics) == sum(end <= size for end in ends)
        else:
            assert str(news / "train.csv") in refused(ag_news.load, news, checksums=False)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (news_file([(5, "a", "b")]), "a label 5, wanted whole numbers from 1 to 4"),
        (news_file([(0, "a", "b")]), "a label 0, wanted whole numbers from 1 to 4"),
        (news_file([*NEWS, ("Class Index", "a", "b")]), "after row 5"),
        (news_file([(1, "a")]), "after row 0"),
        (news_file([(1, "a", "b", "c")]), "topic, title and description"),
        (b'"1","\xff","b"\n', "utf-8"),
        (b"", "is empty"),
    ],
)
def test_wrong_news_are_named(news, content, said):
    (news / "test.csv").write_bytes(content)
    found = refused(ag_news.load, news, checksums=False)
    assert said in found
    assert str(news / "test.csv") in found


def test_checksums_and_numbers_of_news(news, monkeypatch):
    check_checksums(ag_news, news, [news / "train.csv", news / "test.csv"], monkeypatch)
    (news / "test.csv").unlink()
    assert f"{news / 'test.csv'} is missing" in refused(ag_news.load, news)


def test_words_are_numbers_the_same_everywhere():
    assert " ".join(ag_news.words(NEWS[0][2])) == "reuters short sellers wall street s dwindling band of cynics"
    assert ag_news.words("R amp;D costs \\$12 million\\posted;") == ["r", "d", "costs", "12", "million", "posted"]
    assert ag_news.words("It #39;s &lt;b&gt;BIG&lt;/b&gt; &amp; quot;new quot;") == ["it", "s", "big", "new"]
    ids = ag_news.word_ids(["Gold, gold and silver", "", "silver"], length=3, size=100)
    assert ids.dtype == np.int32
    assert ids.tolist() == [[21, 21, 76], [0, 0, 0], [8, 0, 0]]
    assert ag_news.word_ids(["the Reuters gold"], length=3, size=100, without=["reuters", "the"]).tolist() == [
        [21, 0, 0]
    ]
    many = ag_news.word_ids([" ".join(f"w{k}" for k in range(500))], length=500, size=7)
    assert set(many.ravel().tolist()) == set(range(1, 7))


def test_the_agency_is_a_task_and_not_among_the_words(news):
    data = ag_news.load(news, checksums=False)
    named = [ag_news.AGENCIES[k] for k in ag_news.agencies(data.train)]
    assert named == ["Reuters", "none named", "AP", "AFP", "none named"]
    tasks = datasets.classification("ag_news", news, checksums=False)
    assert tasks.classes == {"topic": 4, "agency": 4}
    np.testing.assert_array_equal(tasks.train.labels[:, 0], data.train.topics)
    np.testing.assert_array_equal(tasks.train.labels[:, 1], ag_news.agencies(data.train))
    names = ag_news.word_ids(["reuters", "ap", "afp"], length=1)
    assert not np.isin(tasks.train.features, names).any()
    assert tasks.train.features.shape == (5, 64)
    assert not tasks.train.features[4].any()


# -- MultiMNIST ----------------------------------------------------------------

DIGITS = {name: RNG.integers(256, size=(size, 28, 28), dtype=np.uint8) for name, size in (("train", 12), ("t10k", 5))}
DIGIT_LABELS = {name: RNG.integers(10, size=len(digits), dtype=np.uint8) for name, digits in DIGITS.items()}


def idx(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def mnist_files():
    files = {f"{name}-images-idx3-ubyte": idx(digits) for name, digits in DIGITS.items()}
    return files | {f"{name}-labels-idx1-ubyte": idx(labels) for name, labels in DIGIT_LABELS.items()}


def write_mnist(folder, packed):
    files = mnist_files()
    return write_files(folder, {f"{k}.gz": gzip.compress(v) for k, v in files.items()} if packed else files)


def test_the_header_of_idx_is_that_of_mnist():
    assert idx(np.zeros((60_000, 28, 28), np.uint8))[:16].hex() == "000008030000ea600000001c0000001c"
    assert idx(np.zeros(10_000, np.uint8))[:8].hex() == "0000080100002710"


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("side", [28, 36])
def test_multimnist_is_composed_as_published(tmp_path, packed, side):
    write_mnist(tmp_path / "MNIST" / "raw" if packed else tmp_path, packed)
    data = multimnist.load(tmp_path, side=side, checksums=False)
    for split, name in zip(data, DIGITS, strict=True):
        digits, labels = DIGITS[name].astype(np.float64), DIGIT_LABELS[name]
        assert split.images.dtype == np.uint8
        assert split.left.dtype == split.right.dtype == split.sources.dtype == np.int32
        assert len(split.images) == len(digits)
        np.testing.assert_array_equal(split.sources[:, 0], np.arange(len(digits)))
        for image, left, right, (first, second) in zip(*split, strict=True):
            assert (left, right) == (labels[first], labels[second])
            canvas = np.zeros((36, 36))  # step by step as in the published code
            canvas[0:28, 0:28] = digits[first]
            canvas[6:34, 6:34] = digits[second]
            canvas[6:28, 6:28] = np.maximum(digits[first][6:28, 6:28], digits[second][0:22, 0:22])
            resized = Image.fromarray(canvas.astype(np.uint8)).resize((side, side), Image.Resampling.NEAREST)
            np.testing.assert_array_equal(image, np.asarray(resized))


def test_a_seed_decides_the_right_digits(tmp_path):
    write_mnist(tmp_path, packed=True)
    first, same, other = (multimnist.load(tmp_path, seed=seed, checksums=False) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.train.sources, same.train.sources)
    assert not np.array_equal(first.train.sources, other.train.sources)
    assert "28" in refused(multimnist.load, tmp_path, side=30)


@pytest.mark.parametrize("packed", [True, False])
def test_checksums_and_numbers_of_mnist(tmp_path, monkeypatch, packed):
    write_mnist(tmp_path, packed)
    order = [f"{name}-{what}-ubyte" for name in DIGITS for what in ("images-idx3", "labels-idx1")]
    monkeypatch.setitem(multimnist.NUMBER, "train", 12)  # so that it gets to the second split
    files = [tmp_path / (f"{name}.gz" if packed else name) for name in order]
    monkeypatch.setitem(multimnist.NUMBER, "test", 0)
    for path in files:
        said = refused(multimnist.load, tmp_path)
        assert f"{path} has MD5 checksum {md5(path)}, wanted {multimnist.MD5[path.name]}" in said
        monkeypatch.setitem(multimnist.MD5, path.name, md5(path))
    assert "5 examples, wanted 0" in refused(multimnist.load, tmp_path)
    monkeypatch.setitem(multimnist.NUMBER, "test", 5)
    multimnist.load(tmp_path)


def test_wrong_files_of_mnist_are_named(tmp_path):
    images, labels = "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
    files = mnist_files()
    for name, content, said in (
        (images, files[images][:-1], "truncated or damaged: 9,423 bytes, wanted 9,424"),
        (images, files[images] + b"\0", "9,425 bytes, wanted 9,424"),
        (images, files[images][:9], "9 bytes of 16 of its header"),
        (images, b"", "starts with nothing"),
        (images, b"\x1f\x8b\x08\x00" + files[images], "starts with 1f8b0800, wanted 000008"),
        (images, idx(np.zeros((12, 28, 27), np.uint8)), "has shape (12, 28, 27), wanted (N, 28, 28)"),
        (images, idx(np.zeros((0, 28, 28), np.uint8)), "truncated"),
        (labels, idx(np.zeros(4, np.uint8)), "has shape (4,), wanted (5,)"),
        (labels, idx(np.array([0, 1, 2, 3, 10], np.uint8)), "a label 10, wanted whole numbers from 0 to 9"),
    ):
        found = refused(multimnist.load, write_files(tmp_path, files | {name: content}), checksums=False)
        assert said in found
        assert str(tmp_path / name) in found
    (tmp_path / labels).unlink()
    assert f"{tmp_path / labels} is missing" in refused(multimnist.load, tmp_path, checksums=False)


def test_damaged_packed_files_of_mnist_are_named(tmp_path):
    path = write_mnist(tmp_path, packed=True) / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:1], b"no gzip", whole[:-8] + b"\0" * 8, whole[:50] + whole[60:]):
        path.write_bytes(content)
        found = refused(multimnist.load, tmp_path, checksums=False)
        assert str(path) in found
        assert "truncated" in found


# -- Cityscapes and NYUv2 ------------------------------------------------------


def write_dense(folder, size, classes, sizes, labels="label", normals=True, dtype=np.float64):
    """A tree of files as MTAN published it; returns what is in it, by split and part."""
    rng = np.random.default_rng(2)
    written = {}
    for name, number in sizes.items():
        parts = {
            "image": rng.random((number, *size, 3)),
            labels: rng.integers(-1, classes, (number, *size)),
            "depth": np.maximum(rng.random((number, *size, 1)) - 0.25, 0),
        }
        if normals:
            parts["normal"] = rng.uniform(-1, 1, (number, *size, 3))
            parts["normal"][:, :9] = 0
        for part, arrays in parts.items():
            (folder / name / part).mkdir(parents=True)
            for k, array in enumerate(arrays):
                np.save(folder / name / part / f"{k}.npy", array.astype(dtype))
        written[name] = parts
    return written


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_nyuv2_is_read_by_batches(tmp_path, dtype):
    written = write_dense(tmp_path, (288, 384), 13, {"train": 3, "val": 1}, dtype=dtype)
    data = nyuv2.load(tmp_path, checksums=False)
    assert (len(data.train), len(data.val)) == (3, 1)
    assert data.train.size == (288, 384)
    parts = {part: array.astype(dtype) for part, array in written["train"].items()}
    for index in (slice(None), slice(1, 3), [2, 0], 1, -1, np.array([True, False, True])):
        batch = data.train[index]
        np.testing.assert_array_equal(batch.images, parts["image"][index].astype(np.float32))
        np.testing.assert_array_equal(batch.labels, parts["label"][index])
        np.testing.assert_array_equal(batch.labels_known, parts["label"][index] != -1)
        np.testing.assert_array_equal(batch.depth, parts["depth"][index].astype(np.float32))
        np.testing.assert_array_equal(batch.depth_known, parts["depth"][index] > 0)
        np.testing.assert_array_equal(batch.normals, parts["normal"][index].astype(np.float32))
        assert batch.normals_known.shape == batch.depth.shape
        assert not batch.normals_known[..., :9, :, :].any()
        assert batch.normals_known[..., 9:, :, :].all()
        assert [array.dtype for array in batch] == [np.float32, np.int32, bool, np.float32, bool, np.float32, bool]
    with pytest.raises(IndexError):
        data.train[3]
    with pytest.raises(IndexError, match="shape"):
        data.train[3:]
    assert [len(batch.images) for batch in data.train.batches(2)] == [2, 1]


@pytest.mark.parametrize(
    ("labels", "classes", "size"), [("label", 7, (128, 256)), ("label_7", 7, (256, 512)), ("label_19", 19, (128, 256))]
)
def test_cityscapes_has_no_normals(tmp_path, labels, classes, size):
    written = write_dense(tmp_path, size, classes, {"train": 2, "val": 1}, labels=labels, normals=False)
    data = cityscapes.load(tmp_path, classes=classes, checksums=False)
    batch = data.train[:]
    assert data.classes == classes
    assert data.train.size == size
    np.testing.assert_array_equal(batch.labels, written["train"][labels])
    assert batch.normals is batch.normals_known is None
    assert np.all(np.stack([batch.labels_known, batch.depth_known[..., 0]]).mean((1, 2, 3)) < 1)
    wrong = 26 - classes
    assert f"label_{wrong}" in refused(cityscapes.load, tmp_path, classes=wrong, checksums=False)
    assert "wanted 7 or 19" in refused(cityscapes.load, tmp_path, classes=2)


@pytest.fixture(scope="module")
def small_nyuv2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nyuv2")
    write_dense(folder, (288, 384), 13, {"train": 3, "val": 1}, dtype=np.float32)
    return folder


def pretend(monkeypatch, path, content):
    """Has one file of the tree hold something else, in this test."""
    read = _dense._read
    monkeypatch.setattr(_dense, "_read", lambda name: content if name == path else read(name))


@pytest.mark.parametrize(
    ("part", "content", "said"),
    [
        ("image", np.zeros((288, 384, 4)), "shape (288, 384, 4), wanted (288, 384, 3)"),
        ("image", np.zeros((3, 288, 384)), "shape (3, 288, 384), wanted (288, 384, 3)"),
        ("image", np.full((288, 384, 3), 255.0), "values from 255 to 255, wanted finite ones, from 0 to 1"),
        ("image", np.full((288, 384, 3), np.nan), "wanted finite ones"),
        ("image", np.zeros((288, 384, 3), np.uint8), "dtype uint8, wanted floats, from 0 to 1"),
        ("label", np.full((288, 384), 13.0), "a label 13, wanted whole numbers from -1 to 12"),
        ("label", np.full((288, 384), 255, np.uint8), "a label 255"),
        ("label", np.full((288, 384), -2), "a label -2"),
        ("label", np.full((288, 384), 0.5), "a label 0.5"),
        ("label", np.full((288, 384), np.nan), "a label nan"),
        ("label", np.zeros((288, 384), bool), "dtype bool, wanted numbers"),
        ("label", np.zeros((288, 384, 1)), "shape (288, 384, 1), wanted (288, 384)"),
        ("depth", np.zeros((288, 384)), "shape (288, 384), wanted (288, 384, 1)"),
        ("depth", np.full((288, 384, 1), -1.0), "values from -1 to -1, wanted finite ones, 0 (not known) or above"),
        ("normal", np.full((288, 384, 3), 1.5), "wanted finite ones, from -1 to 1"),
    ],
)
def test_wrong_dense_files_are_named(small_nyuv2, monkeypatch, part, content, said):
    path = small_nyuv2 / "train" / part / "0.npy"
    pretend(monkeypatch, path, content)
    found = refused(nyuv2.load, small_nyuv2, checksums=False)
    assert said in found
    assert str(path) in found


def test_a_file_in_the_middle_is_looked_at_when_it_is_read(small_nyuv2, monkeypatch):
    path = small_nyuv2 / "train" / "depth" / "1.npy"
    pretend(monkeypatch, path, np.full((288, 384, 1), np.inf))
    data = nyuv2.load(small_nyuv2, checksums=False)
    assert len(data.train[::2].depth) == 2
    assert str(path) in refused(data.train.__getitem__, slice(0, 2))


def test_damaged_and_foreign_npy_files_are_refused(small_nyuv2, tmp_path):
    path = tmp_path / "0.npy"
    whole = (small_nyuv2 / "val" / "depth" / "0.npy").read_bytes()
    mark = tmp_path / "mark"
    objects = io.BytesIO()
    np.save(objects, np.array([Malicious(mark)]), allow_pickle=True)
    packed = io.BytesIO()
    np.savez(packed, a=np.zeros(3))
    for content in (
        *(whole[:size] for size in (0, 5, 40, 1_000, len(whole) - 1)),
        *malicious(mark),
        objects.getvalue(),
        packed.getvalue(),
    ):
        path.write_bytes(content)
        assert f"{path} is truncated, or no file of numbers" in refused(_dense._read, path)
    assert not mark.exists()


def test_missing_dense_files_are_named(tmp_path):
    write_dense(tmp_path, (288, 384), 13, {"train": 3, "val": 1}, dtype=np.float32)
    assert "3 examples, wanted 795" in refused(nyuv2.load, tmp_path)
    train = tmp_path / "train"
    kept = (train / "depth" / "2.npy").read_bytes()
    (train / "depth" / "2.npy").unlink()
    assert f"{train / 'depth' / '2.npy'} is missing" in refused(nyuv2.load, tmp_path)
    for name in ("2", "3"):
        (train / "depth" / f"{name}.npy").write_bytes(kept)
    assert "depth has 4 files" in refused(nyuv2.load, tmp_path)
    (train / "image" / "0.npy").unlink()
    assert f"{train / 'image' / '0.npy'} is missing" in refused(nyuv2.load, tmp_path)
    (tmp_path / "val").rename(tmp_path / "test")
    (train / "normal").rename(train / "normals")
    assert f"{train / 'image' / '0.npy'} is missing" in refused(nyuv2.load, tmp_path)
    for k in range(1, 3):
        (train / "image" / f"{k}.npy").unlink()
    assert f"{train / 'image' / '0.npy'} is missing" in refused(nyuv2.load, tmp_path)


# -- all of them ---------------------------------------------------------------


def test_images_become_tasks_of_classification(tmp_path):
    write_files(tmp_path, cifar_files("cifar-100-binary"))
    write_mnist(tmp_path, packed=True)
    cifar = datasets.classification("cifar100", tmp_path, checksums=False)
    assert cifar.classes == {"fine": 100, "coarse": 20}
    assert cifar.train.features.shape == (7, 32, 32, 3)
    np.testing.assert_array_equal(cifar.test.labels[:, 0], CIFAR["test"][b"fine_labels"])
    np.testing.assert_array_equal(cifar.test.labels[:, 1], CIFAR["test"][b"coarse_labels"])
    digits = datasets.classification("multimnist", tmp_path, checksums=False)
    assert digits.classes == {"left": 10, "right": 10}
    assert digits.train.features.shape == (12, 28, 28)
    np.testing.assert_array_equal(digits.train.labels[:, 0], DIGIT_LABELS["train"])
    for examples in (*cifar[:2], *digits[:2]):
        assert examples.features.dtype == np.float32
        assert examples.labels.dtype == np.int32
        assert 0 <= examples.features.min() < 0.01
        assert 0.99 < examples.features.max() <= 1
    assert "choose from cifar100, ag_news, multimnist" in refused(datasets.classification, "nyuv2", tmp_path)


def test_descriptions_count_what_is_there(tmp_path, news, small_nyuv2):
    write_files(tmp_path, cifar_files("cifar-100-python"))
    said = datasets.describe("cifar100", tmp_path, checksums=False)
    assert said.startswith(f"cifar100 in {tmp_path}\n")
    assert "train: 7 photographs (32, 32, 3) uint8" in said
    assert "fine, 100 classes: from 0 examples (of fine_" in said
    counts = np.bincount(CIFAR["test"][b"coarse_labels"], minlength=20)
    assert ", ".join(f"coarse_{k}: {count}" for k, count in enumerate(counts)) in said
    write_mnist(tmp_path, packed=False)
    said = datasets.describe("multimnist", tmp_path, checksums=False)
    assert "train: 12 canvases (28, 28) uint8" in said
    assert ", ".join(f"{k}: {count}" for k, count in enumerate(np.bincount(DIGIT_LABELS["t10k"], minlength=10))) in said
    said = datasets.describe("ag_news", news, checksums=False)
    assert "topic, 4 classes: World: 1, Sports: 2, Business: 1, Sci/Tech: 1" in said
    assert "none named: 2, Reuters: 1, AP: 1, AFP: 1" in said
    said = datasets.describe("nyuv2", small_nyuv2, checksums=False)
    batch = nyuv2.load(small_nyuv2, checksums=False).train[:]
    assert "train: 3 images (288, 384, 3)" in said
    assert f"{np.mean(batch.labels == -1):.1%} of the pixels void" in said
    assert f"class 12: {np.mean(batch.labels == 12):.1%}" in said
    assert f"{np.mean(batch.depth == 0):.1%} of the pixels not known" in said
    assert f"normals: {9 / 288:.1%} of the pixels not known" in said
    write_dense(tmp_path / "city", (128, 256), 7, {"train": 2, "val": 1}, normals=False)
    said = datasets.describe("cityscapes", tmp_path / "city", checksums=False)
    assert "val: 1 images (128, 256, 3)" in said
    assert "normals" not in said
    assert "choose from cifar100" in refused(datasets.describe, "mnist", tmp_path)


def test_classes_of_equal_size_are_said_so():
    assert _common.counted("a", "xy", np.array([0, 1, 1, 0])).endswith("2 classes: 2 examples of each")


def test_files_are_written_as_the_csv_module_reads_them():
    """The helper above writes what an independent reader takes for the same rows."""
    rows = list(csv.reader(io.StringIO(news_file(NEWS).decode())))
    assert rows == [[str(topic), title, text] for topic, title, text in NEWS]
