"""What is stored of a data set, what is refused before that, and that the cache is safe to make and to share."""

from __future__ import annotations

import json
import os
import pickle
import re
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
    got = open_dataset((x, y, x, y)).batch(np.arange(17))["x"]
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


def test_pictures_without_channels_are_told_from_sequences(capsys):
    x, y = some(shape=(12, 6))
    given = {"x": x, "y": y}
    for data in (open_dataset((x, y)), open_dataset(given)):
        assert data.shape == (1, 12, 6)
        assert "x of shape (N, 12, 6) is read as pictures of 12x6 with one channel. Give channels='none' if they are" in data.note
    assert capsys.readouterr().out.count("as_given='x'") == 2  # one line each
    assert "pictures" not in open_dataset((x, y), channels="none").note
    sequences = open_dataset(given, as_given="x")
    assert sequences.shape == (12, 6) and "pictures" not in sequences.note
    np.testing.assert_array_equal(sequences.batch([3])["x"], everything(sequences)[[3]])


@pytest.mark.parametrize(
    ("shape", "stored", "said"),
    [
        ((9, 9, 4), (4, 9, 9), "channels='first' or 'none'"),  # RGBA
        ((9, 9, 13), (13, 9, 9), "(N, H, W, C)"),  # more bands than a side is long
        ((30, 40, 13), (13, 30, 40), "(N, H, W, C)"),
        ((6, 9, 9, 1), (1, 6, 9, 9), "(N, D, H, W, C)"),
        ((6, 9, 9, 4), (4, 6, 9, 9), "(N, D, H, W, C)"),
        ((13, 9, 9), (13, 9, 9), "13 channels of 9x9"),
        ((4, 9, 9), (4, 9, 9), ""),
        ((2, 20, 30), (2, 20, 30), ""),
        ((1, 7, 3), (1, 7, 3), ""),
        ((1, 7, 1), (1, 7, 1), ""),
        ((3, 6, 9, 9), (3, 6, 9, 9), ""),
    ],
)
def test_channels_are_where_the_shape_tells_and_asked_for_where_it_does_not(shape, stored, said):
    x, y = some(shape=shape)
    data = open_dataset((x, y, x, y))
    assert data.shape == stored and (said in data.note if said else not data.note)
    np.testing.assert_array_equal(everything(data), x if shape == stored else np.moveaxis(x, -1, 1))


def test_channels_that_cannot_be_told_are_an_argument():
    for shape in ((9, 9, 9), (10, 12, 15), (3, 5, 3), (3, 9, 1), (4, 9, 4), (8, 8, 8, 8)):
        refused(some(shape=shape), "does not tell", "channels='first'")
    x, y = some(shape=(10, 12, 15))
    made = {where: open_dataset((x, y, x, y), channels=where) for where in ("first", "last", "none")}
    for where, expected in {"first": x, "last": np.moveaxis(x, -1, 1), "none": x[:, None]}.items():
        np.testing.assert_array_equal(everything(made[where]), expected)
    with pytest.raises(ValueError, match="channels='NHWC' is not known"):
        open_dataset((x, y), channels="NHWC")
    with pytest.raises(DataError, match="does not fit channels='none'"):
        open_dataset(some(shape=(4, 5, 6, 7)), channels="none")


def test_what_a_conversion_makes_equal_is_refused_and_what_it_merges_is_said():
    n, y = np.arange(20), np.arange(20) % 2
    refused((np.stack([1_600_000_000 + n, n], 1), y), "feature 0", "one value", "float32")  # seconds since 1970
    refused((np.outer(n, [1e-60, 1.0]), y), "feature 0", "one value")
    refused((np.outer(n + 1, [1.0, 1e-41]), y), "feature 1", "normalised")
    for x in (1_600_000_000 + 300 * n, 1 + 2e-7 * n):
        data = open_dataset((np.stack([n, x], 1), y))
        assert "feature 1 of x is coarser in float32" in data.note
    for exact in ((1 << 24) - 1 - n, 1000.5 + 300 * n, (1 << 40) * n):
        assert open_dataset((np.stack([n, exact], 1), y)).note == ""


def test_what_is_constant_is_said():
    x, y = some(n=20, shape=(5,), k=2)
    x[:, [1, 3]] = 7
    assert "2 of 5 features of x are constant (1, 3)" in open_dataset((x, y)).note
    assert "x is 0.0 everywhere" in open_dataset((x * 0, y)).note
    assert "all samples of x are equal" in open_dataset((x * 0 + np.arange(5), y)).note
    assert "all labels are 0" in open_dataset((x, y * 0)).note
    images, y = some(n=20, shape=(1, 4, 4), k=2)
    images[[2, 11]] = 3
    assert "one value everywhere: 2 of 20 samples of x (indices 2, 11)" in open_dataset((images, y)).note


def test_splits_of_two_scales_and_classes_held_out_are_said():
    x, y = some(n=20, shape=(1, 4, 4), k=2, dtype=np.uint8)
    data = open_dataset((x, y, x / 255, y))
    assert "x_train" in data.note and "Scale both splits in one way" in data.note
    alone = np.flatnonzero(cache.hold_out(20))[0]
    data = open_dataset((x, np.where(np.arange(20) == alone, 2, np.arange(20) % 2)))
    assert "all samples of class 2 are in the test split" in data.note


def test_what_an_earlier_version_converted_is_made_again(monkeypatch):
    x, y = some()
    now = open_dataset((x, y)).path
    monkeypatch.setattr(cache, "CONVERSION", cache.CONVERSION - 1)
    before = open_dataset((x, y)).path
    assert before != now
    assert open_dataset(before).path == before  # a record names it, and what a run was trained on stays readable


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
    expected = everything(whole), everything(whole, "test"), whole.batch([0, 5])["x"]
    shutil.rmtree(whole.path)
    dataset._MAPS.clear()
    monkeypatch.setattr(cache, "CHUNK_BYTES", 3 * x[0].nbytes)
    again = open_dataset((x, y))
    for a, b in zip(expected, (everything(again), everything(again, "test"), again.batch([0, 5])["x"]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"format": 0}'])
def test_a_damaged_meta_file_is_made_anew(damage):
    data = open_dataset("digits")
    with open(os.path.join(data.path, "meta.json"), "w") as file:
        file.write(damage)
    assert open_dataset("digits").n_train == 1617


def flipped(path, at=-1, by=64):
    """One bit of a file is another, its size and its time are not; no process has read it before."""
    content, times = bytearray(path.read_bytes()), path.stat()
    content[at] ^= by
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    dataset._DIGESTS.clear()
    dataset._MAPS.clear()


@pytest.mark.parametrize("name", ["x_train.npy", "y_train.npy", "x_test.npy", "meta.json"])
@pytest.mark.parametrize("kind", ["arrays", "columns"])
def test_a_flipped_bit_in_the_cache_is_noticed_and_mended(kind, name):
    x, y = some(dtype=np.uint8)
    given = {"data": (x, y)} if kind == "arrays" else {"data": {"x": x, "y": y}, "label": "y"}
    data = open_dataset(**given)
    expected = data.batch([0, 5]), data.labels()
    flipped(Path(data.path) / name, at=-9 if name != "meta.json" else (Path(data.path) / name).read_text().index('"mean"') + 14)
    other = pickle.loads(pickle.dumps(data))
    if name != "meta.json":  # a worker has what its meta says, and maps the files
        with pytest.raises(DataError, match="finds no whole data set"):
            other.batch([0])
    with pytest.raises(DataError, match="is damaged: it is no longer what"):
        open_dataset(data.path)
    again = open_dataset(**given)
    assert again.path == data.path
    for part, before in zip((again.batch([0, 5]), {"y": again.labels()}), (expected[0], {"y": expected[1]}), strict=True):
        for field in part:
            np.testing.assert_array_equal(part[field], before[field])
    assert open_dataset(data.path).n_train == data.n_train


def test_a_file_is_read_once_to_be_checked(tmp_path, monkeypatch):
    file = tmp_path / "a.npy"
    file.write_bytes(bytes(1000))
    first = dataset.digest_of(file)
    monkeypatch.setattr("builtins.open", None)
    assert dataset.digest_of(file) == first
    monkeypatch.undo()
    file.write_bytes(bytes(999) + b"1")
    os.utime(file, ns=(1, 1))
    assert dataset.digest_of(file) != first


def test_of_a_large_file_its_ends_and_blocks_between_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "BLOCK", 10)
    monkeypatch.setattr(dataset, "WHOLE", 40)
    file, found = tmp_path / "a.npy", {}
    for at in (None, 0, 335, 666, 999):
        file.write_bytes(b"".join(b"1" if number == at else b"0" for number in range(1000)))
        os.utime(file, ns=(1, 1 + (at or 0) + 10 * (at is not None)))
        found[at] = dataset.digest_of(file)
    assert len(set(found.values())) == 5
    file.write_bytes(bytes(999))
    assert dataset.digest_of(file) not in found.values()


def test_what_was_converted_before_there_were_digests_is_opened():
    data = open_dataset(some())
    file = Path(data.path) / "meta.json"
    meta = json.loads(file.read_text())
    del meta["digests"], meta["digest"]
    file.write_text(json.dumps(meta))
    dataset._MAPS.clear()
    assert len(open_dataset(data.path).batch([0])["x"]) == 1


def test_two_processes_may_make_the_same_shards_at_once(own_cache):
    code = """
import sys, time, numpy as np
from labkit.data import open_dataset
x, y = np.arange(400_000, dtype=np.int64).reshape(-1, 1, 20, 20), np.arange(1000) % 10
time.sleep(max(0, float(sys.argv[1]) - time.time()))
data = open_dataset((x, y))
print(data.path, data.batch([0, 1])["x"].sum())
"""
    command = [sys.executable, "-c", code, str(time.time() + 1.5)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    results = {process.communicate(timeout=110)[0] for process in processes}
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
    refused((x, y[:, None]), "reshape")
    refused((np.float32(3), y), "shape ()")
    refused(([[1, 2], [3]], [0, 1]), "samples of x have 1 to 2 entries", "pad=0")


@pytest.mark.parametrize("dtype", [np.complex64, "M8[s]", object])
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


@pytest.mark.parametrize("labels", [(-1, 0, 1), (1, 2, 3), (-1, 1), (-30, -10, 5), (-2.0, -1.0)])
def test_labels_that_do_not_count_from_0_are_mended_by_what_the_message_says(labels):
    x, y = np.random.default_rng(0).random((30, 4)), np.resize(labels, 30)
    with pytest.raises(DataError) as caught:
        open_dataset((x, y))
    (mended,) = re.findall(r"(?:use|with y =) (y [+-] \d+|numpy\.unique\(y, return_inverse=True\)\[1\])", str(caught.value))
    data = open_dataset((x, eval(mended, {"y": y, "numpy": np})))
    assert data.n_classes == len(labels)


def test_an_empty_class_is_noted():
    x, y = some(k=4)
    data = open_dataset((x, np.where(y == 1, 0, y)))
    assert data.n_classes == 4 and "1 of 4 classes" in data.note
