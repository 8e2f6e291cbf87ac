"""What is stored of a data set, what is refused before that, and that the cache is safe to make and to share."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from labkit.data import cache, dataset, open_dataset
from labkit.errors import DataError
from tests.data.helpers import everything, refused, some

pytestmark = pytest.mark.usefixtures("own_cache")


def test_bytes_stay_bytes_and_their_scale_is_255():
    x, y = some(dtype=np.uint8)
    for given in (x, x.astype(np.int64)):
        data = open_dataset((given, y, given, y))
        assert everything(data).dtype == np.uint8 and np.array_equal(everything(data), x)
        meta = json.loads(Path(data.path, "meta.json").read_text())
        assert meta["scale"] == 255
        np.testing.assert_allclose(meta["mean"], (x / 255).mean(axis=(0, 2, 3)))
        np.testing.assert_allclose(meta["std"], (x / 255).std(axis=(0, 2, 3)))


def test_wide_integers_become_floats():
    x, y = some(dtype=np.int32)
    data = open_dataset((x * 1000 - 7, y, x, y))
    assert everything(data).dtype == np.float32 and np.array_equal(everything(data), x * 1000 - 7)


def test_a_constant_channel_is_only_centred():
    x, y = some()
    x[:, 1] = 0.1
    got, _ = open_dataset((x, y, x, y)).batch(np.arange(17))
    assert np.isfinite(got).all() and np.abs(got[:, 1]).max() < 1e-6


def test_three_axes_get_a_channel_and_channels_last_is_turned_with_a_note(capsys):
    x, y = some(shape=(5, 7))
    assert open_dataset((x, y)).shape == (1, 5, 7)
    x, y = some(shape=(5, 7, 3))
    data = open_dataset((x, y, x, y))
    assert data.shape == (3, 5, 7) and "(N, H, W, C)" in data.note
    np.testing.assert_array_equal(everything(data), np.moveaxis(x, -1, 1))
    assert "(N, H, W, C)" in capsys.readouterr().out
    assert open_dataset((x, y, x, y)).note == data.note  # also when it was ready
    assert not capsys.readouterr().out  # printed once
    x, y = some(shape=(3, 5, 3))  # may be either: taken as it is documented
    data = open_dataset((x, y, x, y))
    assert data.shape == (3, 5, 3) and data.note == ""


@pytest.mark.parametrize("n", [2, 10, 11, 97])
def test_a_tenth_is_held_out_disjoint_whole_and_the_same_each_time(n):
    x, y = np.arange(n, dtype=np.float64)[:, None], np.arange(n) % 2
    data = open_dataset((x, y))
    train, test = everything(data)[:, 0], everything(data, "test")[:, 0]
    assert len(test) == -(-n // 10)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, test])), x[:, 0])
    np.testing.assert_array_equal(data.labels(), train.astype(int) % 2)
    np.testing.assert_array_equal(data.labels("test"), test.astype(int) % 2)
    np.testing.assert_array_equal(np.flatnonzero(cache.hold_out(n)), test)


def test_blocks_do_not_change_the_result(monkeypatch):
    x, y = some(n=23)
    whole = open_dataset((x, y))
    expected = everything(whole), everything(whole, "test"), whole.batch([0, 5])[0]
    shutil.rmtree(whole.path)
    dataset._MAPS.clear()
    monkeypatch.setattr(cache, "CHUNK_BYTES", 3 * x[0].nbytes)
    again = open_dataset((x, y))
    for a, b in zip(expected, (everything(again), everything(again, "test"), again.batch([0, 5])[0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"format": 0}'])
def test_a_damaged_meta_file_is_made_anew(damage):
    data = open_dataset("digits")
    with open(os.path.join(data.path, "meta.json"), "w") as file:
        file.write(damage)
    assert open_dataset("digits").n_train == 1617


def test_two_processes_may_make_the_same_shards_at_once(own_cache):
    code = """
import sys, time, numpy as np
from labkit.data import open_dataset
x, y = np.arange(400_000, dtype=np.int64).reshape(-1, 1, 20, 20), np.arange(1000) % 10
time.sleep(max(0, float(sys.argv[1]) - time.time()))
data = open_dataset((x, y))
print(data.path, data.batch([0, 1])[0].sum())
"""
    command = [sys.executable, "-c", code, str(time.time() + 1.5)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    results = {process.communicate(timeout=60)[0] for process in processes}
    assert not any(process.returncode for process in processes) and len(results) == 1
    assert [str(path) for path in (own_cache / "shards").iterdir()] == [results.pop().split()[0]]


def test_the_second_to_finish_gives_way_and_old_remains_are_swept(own_cache):
    target = own_cache / "shards" / "a"
    old, young = own_cache / "shards" / ".making-old", own_cache / "shards" / ".making-young"
    for path in (old, young):
        path.mkdir(parents=True)
    os.utime(old, (1, 1))
    with cache.replacing_folder(target, lambda: target.exists()) as mine:
        (mine / "file").write_text("mine")
        with cache.replacing_folder(target, lambda: target.exists()) as other:
            (other / "file").write_text("other")
    assert (target / "file").read_text() == "other"
    assert sorted(path.name for path in target.parent.iterdir()) == [".making-young", "a"]


def test_a_cache_that_cannot_be_written_is_an_error(own_cache):
    own_cache.write_text("a file, not a folder")
    with pytest.raises(DataError, match="Set LABKIT_CACHE"):
        open_dataset("digits")


def test_wrong_shapes_are_refused():
    x, y = some()
    refused((x, y, x), "3 arrays")
    refused((x[:, 0, 0, 0], y), "x[:, None]")
    refused((np.zeros((4, 1, 1, 1, 1, 1)), y[:4]), "(4, 1, 1, 1, 1, 1)")
    refused((x[:0], y[:0]), "empty")
    refused((x[:, :, :0], y), "empty")
    refused((x[:1], y[:1] * 0), "Give 2 samples")
    refused((x, y[:-1]), "16 labels", "17 samples")
    refused((x, y, x[:0], y[:0]), "x_test is empty")
    refused((x, y, x[:, :2], y), "(3, 5, 7)", "(2, 5, 7)")
    refused((x, np.eye(3)[y]), "argmax")
    refused((x, y[:, None]), "reshape")
    refused((np.float32(3), y), "shape ()")
    refused(([[1, 2], [3]], [0, 1]), "x is no array")


@pytest.mark.parametrize("dtype", [np.complex64, "U3", "M8[s]", object])
def test_types_that_are_no_numbers_are_refused(dtype):
    x, y = some(shape=(5,), dtype=np.uint8)
    refused((x.astype(np.int64).astype(dtype), y), "x is of type")
    refused((x, y.astype(dtype)), "y is of type")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_values_that_are_not_finite_are_refused_with_their_index(value):
    x, y = some(dtype=np.float64)
    x[11, 1, 2, 3] = value
    refused((x, y), "x[11] holds", "nan_to_num")
    refused((x[:5], y[:5], x, y), "x_test[11] holds")


def test_labels_out_of_range_are_refused():
    x, y = some()
    for at, value, words in [
        (4, -1, ("y[4] is -1",)),
        (4, 99, ("largest is 99", "stray")),
        (4, 0.5, ("y[4] is 0.5",)),
        (4, np.nan, ("y[4] is nan",)),
        (4, 1e12, ("y[4] is",)),
    ]:
        wrong = y.astype(np.float64)
        wrong[at] = value
        refused((x, wrong), *words)
    refused((x, y + 1), "y - 1")
    refused((x, y, x, np.where(np.arange(17) == 6, 3, y)), "y_test[6] is 3", "end at 2")
    refused((x, np.full(17, 2**63, dtype=np.uint64)), "y[0] is")


def test_an_empty_class_is_noted():
    x, y = some(k=4)
    data = open_dataset((x, np.where(y == 1, 0, y)))
    assert data.n_classes == 4 and "1 of 4 classes" in data.note
