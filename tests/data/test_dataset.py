"""A reference to a data set: small, opened on first use, normalised by channel, honest about what is gone."""

from __future__ import annotations

import os
import pickle
import shutil
import time

import numpy as np
import pytest

from labkit.data import Dataset, dataset, open_dataset
from labkit.errors import DataError
from tests.data.helpers import some

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *(((2, 3, 4, 5), dtype) for dtype in (np.float16, np.float32, np.float64, np.uint8, np.int64, bool)),
        *((shape, np.float32) for shape in ((5,), (1, 5, 7), (3, 5, 7))),
    ],
)
def test_each_channel_is_standardised_over_the_training_split(shape, dtype):
    x, y = some(shape=shape, dtype=dtype)
    x_test, y_test = some(n=5, shape=shape, dtype=dtype, seed=1)
    data = open_dataset((x, y, x_test, y_test))
    assert data.shape == shape and (data.n_train, data.n_test) == (17, 5)
    got, labels = data.batch(np.arange(17)).values()
    axes = (0, *range(2, x.ndim))
    mean = x.mean(axis=axes, dtype=np.float64, keepdims=True)
    std = x.std(axis=axes, dtype=np.float64, keepdims=True)
    np.testing.assert_allclose(got, (x - mean) / std, atol=2e-3 if dtype == np.float16 else 1e-5)
    np.testing.assert_array_equal(labels, y)
    np.testing.assert_allclose(data.batch([0, 4], "test")["x"], ((x_test - mean) / std)[[0, 4]], atol=2e-3)


def test_batches_are_copies_and_wrong_indices_are_refused():
    data = open_dataset("digits")
    x, y = data.batch([3, 3, 5]).values()
    np.testing.assert_array_equal(x[0], x[1])
    x[:], y[:] = 0, 0
    assert data.batch([3])["x"].any()
    labels = data.labels()
    labels[:] = 99
    assert data.labels().max() == 9
    assert data.batch(np.array([]))["x"].shape == (0, 1, 8, 8)
    for wrong in ([-1], [1617]):
        with pytest.raises(IndexError, match="samples 0 to 1616"):
            data.batch(wrong)
    for wrong in ([True, False], [0.5], [[1]], 3):
        with pytest.raises(TypeError, match="1-D array of integers"):
            data.raw(wrong)
    with pytest.raises(ValueError, match="split='val'"):
        data.labels("val")


def test_the_reference_is_small_and_opens_elsewhere(monkeypatch):
    x, y = some(n=200, shape=(1, 28, 28))
    data = open_dataset((x, y))
    expected = data.batch([0, 7])
    sent = pickle.dumps(data)
    assert len(sent) < 2000
    monkeypatch.setattr(dataset, "_MAPS", {})
    got = pickle.loads(sent)
    assert isinstance(got, Dataset) and not dataset._MAPS  # nothing is opened before it is used
    for a, b in zip(expected.values(), got.batch([0, 7]).values(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (got.name, got.shape, got.n_train, got.note) == (data.name, data.shape, data.n_train, data.note)
    got.batch([1], "test")
    assert len(dataset._MAPS) == 1


def test_a_reference_whose_shards_are_gone_says_so(monkeypatch):
    data = open_dataset("digits")
    monkeypatch.setattr(dataset, "_MAPS", {})
    os.truncate(os.path.join(data.path, "x_train.npy"), 300)
    with pytest.raises(DataError, match="LABKIT_CACHE"):
        data.labels()
    assert open_dataset("digits").batch([0])["x"].shape == (1, 1, 8, 8)  # opening it again mends it
    shutil.rmtree(data.path)
    monkeypatch.setattr(dataset, "_MAPS", {})
    with pytest.raises(DataError, match="finds no whole data set"):
        data.batch([0])


def test_a_ready_data_set_opens_at_once_and_a_batch_is_cheap():
    x, y = some(n=2000, shape=(1, 28, 28), dtype=np.uint8)
    open_dataset((x, y))
    seconds = []
    for _ in range(20):  # of which a busy machine leaves one alone
        start = time.perf_counter()
        data = open_dataset((x, y))
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.05
    rng, seconds = np.random.default_rng(0), []
    for _ in range(50):
        indices = rng.integers(0, data.n_train, 64)
        start = time.perf_counter()
        data.batch(indices)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1e-3
