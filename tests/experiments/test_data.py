"""MultiDigits is what it says: a clean split, the right labels, the same for the same seed."""

import jax
import numpy as np
import pytest
from sklearn import datasets

from optax_mtl.experiments import _data


@pytest.fixture(scope="module")
def data():
    return _data.multi_digits(0, train_size=500, test_size=200)


@pytest.mark.parametrize("seed", range(5))
def test_no_source_image_is_in_train_and_test(seed):
    data = _data.multi_digits(seed)
    assert not np.intersect1d(data.train.sources, data.test.sources).size


def test_labels_are_those_of_the_sources(data):
    digits = datasets.load_digits().target
    for split in data:
        left, right, parity = split.labels.T
        np.testing.assert_array_equal(left, digits[split.sources[:, 0]])
        np.testing.assert_array_equal(right, digits[split.sources[:, 1]])
        np.testing.assert_array_equal(parity, (left + right) % 2)


def test_canvas_is_the_brighter_of_two_shifted_digits(data):
    digits = datasets.load_digits().images / 16
    left, right = data.test.sources[7]
    expected = np.maximum(np.pad(digits[left], (0, _data.SHIFT)), np.pad(digits[right], (_data.SHIFT, 0)))
    np.testing.assert_allclose(data.test.images[7].reshape(_data.SIDE, _data.SIDE), expected)


def test_same_seed_same_data_and_another_seed_other_data(data):
    again, other = (_data.multi_digits(seed, train_size=500, test_size=200) for seed in (0, 1))
    jax.tree.map(np.testing.assert_array_equal, data, again)
    assert not np.array_equal(data.train.sources, other.train.sources)


def test_an_epoch_shows_every_example_once():
    order = _data.epochs(0, size=10, batch_size=3, steps=7)
    assert order.shape == (7, 3)
    for epoch in (order[:3], order[3:6]):
        assert len(np.unique(epoch)) == 9
    assert not np.array_equal(order[:3], order[3:6])
