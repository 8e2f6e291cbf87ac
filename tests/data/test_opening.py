"""Tests of labkit.data: what each source gives, what is refused, and that shards are safe to make and to share."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from labkit.data import Dataset, fetch, images, names, open_dataset, shards
from labkit.errors import DataError

really_fetch = fetch.fetch


pytestmark = pytest.mark.usefixtures("own_cache")


def some(n=17, shape=(3, 5, 7), k=3, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    y = np.concatenate([np.arange(k), rng.integers(0, k, n - k)])
    if np.dtype(dtype).kind == "f":
        return rng.normal(4, 2, (n, *shape)).astype(dtype), y
    return rng.integers(0, 2 if dtype is bool else 100, (n, *shape)).astype(dtype), y


def refused(data, *words):
    """The data set is refused with a DataError that has these words, and nothing is left in the cache."""
    with pytest.raises(DataError) as caught:
        open_dataset(data)
    for word in words:
        assert word in str(caught.value)
    left = list((shards.cache_dir() / "shards").glob("*")) if shards.cache_dir().exists() else []
    assert not [path for path in left if not path.name.startswith("digits")]


def everything(dataset, split="train"):
    return dataset.raw(np.arange(getattr(dataset, f"n_{split}")), split)


# --- what a data set is


def test_digits_are_real_whole_and_normalised():
    data = open_dataset("digits")
    assert (data.name, data.shape, data.n_classes) == ("digits", (1, 8, 8), 10)
    assert (data.n_train, data.n_test, data.synthetic, data.note) == (1617, 180, False, "")
    x, y = data.batch(np.arange(data.n_train))
    assert x.dtype == np.float32 and y.dtype == np.int64 and x.shape == (1617, 1, 8, 8)
    assert abs(x.mean()) < 1e-4 and abs(x.std() - 1) < 1e-4
    assert everything(data).dtype == np.uint8 and everything(data).max() == 16
    assert np.array_equal(np.unique(data.labels()), np.arange(10)) and data.labels("test").shape == (180,)


def test_names_are_the_ones_that_open():
    assert names() == ["fashion-mnist", "fashion-mnist-32", "mnist", "digits", "lfw-faces", "head-lesions", "chest-phantom"]
    with pytest.raises(DataError, match="Did you mean 'digits'"):
        open_dataset("digit")
    with pytest.raises(DataError, match="data is a int"):
        open_dataset(3)


def test_a_dataset_is_returned_as_it_is():
    data = open_dataset("digits")
    assert open_dataset(data) is data


@pytest.mark.parametrize("shape", [(5,), (1, 5, 7), (3, 5, 7), (2, 3, 4, 5)])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.uint8, np.int64, bool])
def test_each_channel_is_standardised_over_the_training_split(shape, dtype):
    x, y = some(shape=shape, dtype=dtype)
    x_test, y_test = some(n=5, shape=shape, dtype=dtype, seed=1)
    data = open_dataset((x, y, x_test, y_test))
    assert data.shape == shape and (data.n_train, data.n_test) == (17, 5)
    got, labels = data.batch(np.arange(17))
    axes = (0, *range(2, x.ndim))
    mean = x.mean(axis=axes, dtype=np.float64, keepdims=True)
    std = x.std(axis=axes, dtype=np.float64, keepdims=True)
    np.testing.assert_allclose(got, (x - mean) / std, atol=2e-3 if dtype == np.float16 else 1e-5)
    np.testing.assert_array_equal(labels, y)
    np.testing.assert_allclose(data.batch([0, 4], "test")[0], ((x_test - mean) / std)[[0, 4]], atol=2e-3)


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


def test_three_axes_get_a_channel_and_channels_last_is_turned_and_said(capsys):
    x, y = some(shape=(5, 7))
    assert open_dataset((x, y)).shape == (1, 5, 7)
    x, y = some(shape=(5, 7, 3))
    data = open_dataset((x, y, x, y))
    assert data.shape == (3, 5, 7) and "(N, H, W, C)" in data.note
    np.testing.assert_array_equal(everything(data), np.moveaxis(x, -1, 1))
    assert "(N, H, W, C)" in capsys.readouterr().out
    assert open_dataset((x, y, x, y)).note == data.note  # also when it was ready
    assert not capsys.readouterr().out  # said once
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
    np.testing.assert_array_equal(np.flatnonzero(shards.hold_out(n)), test)


def test_blocks_do_not_change_the_result(monkeypatch):
    x, y = some(n=23)
    whole = open_dataset((x, y))
    expected = everything(whole), everything(whole, "test"), whole.batch([0, 5])[0]
    shutil.rmtree(whole.path)
    shards._MAPS.clear()
    monkeypatch.setattr(shards, "CHUNK_BYTES", 3 * x[0].nbytes)
    again = open_dataset((x, y))
    for a, b in zip(expected, (everything(again), everything(again, "test"), again.batch([0, 5])[0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_whole_floats_are_labels_and_order_in_memory_does_not_matter():
    x, y = some()
    one = open_dataset((x, y.astype(np.float64)))
    two = open_dataset((np.asfortranarray(x)[::1], y.astype(np.float64)))
    assert one.path == two.path and one.labels().dtype == np.int64


def test_another_content_is_another_data_set():
    x, y = some()
    other = x.copy()
    other[-1, -1, -1, -1] += 1
    assert open_dataset((x, y)).path != open_dataset((other, y)).path


# --- a reference


def test_batches_are_copies_and_wrong_indices_are_refused():
    data = open_dataset("digits")
    x, y = data.batch([3, 3, 5])
    np.testing.assert_array_equal(x[0], x[1])
    x[:], y[:] = 0, 0
    assert data.batch([3])[0].any()
    labels = data.labels()
    labels[:] = 99
    assert data.labels().max() == 9
    assert data.batch(np.array([]))[0].shape == (0, 1, 8, 8)
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
    monkeypatch.setattr(shards, "_MAPS", {})
    got = pickle.loads(sent)
    assert isinstance(got, Dataset) and not shards._MAPS  # nothing is opened before it is used
    for a, b in zip(expected, got.batch([0, 7]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (got.name, got.shape, got.n_train, got.note) == (data.name, data.shape, data.n_train, data.note)
    got.batch([1], "test")
    assert len(shards._MAPS) == 1


def test_a_reference_whose_shards_are_gone_says_so(monkeypatch):
    data = open_dataset("digits")
    monkeypatch.setattr(shards, "_MAPS", {})
    os.truncate(os.path.join(data.path, "x_train.npy"), 300)
    with pytest.raises(DataError, match="LABKIT_CACHE"):
        data.labels()
    assert open_dataset("digits").batch([0])[0].shape == (1, 1, 8, 8)  # opening it again mends it
    shutil.rmtree(data.path)
    monkeypatch.setattr(shards, "_MAPS", {})
    with pytest.raises(DataError, match="finds no whole data set"):
        data.batch([0])


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
    with shards.replacing(target, lambda: target.exists()) as mine:
        (mine / "file").write_text("mine")
        with shards.replacing(target, lambda: target.exists()) as other:
            (other / "file").write_text("other")
    assert (target / "file").read_text() == "other"
    assert sorted(path.name for path in target.parent.iterdir()) == [".making-young", "a"]


def test_a_cache_that_cannot_be_written_is_an_error(own_cache):
    own_cache.write_text("a file, not a folder")
    with pytest.raises(DataError, match="Set LABKIT_CACHE"):
        open_dataset("digits")


def test_a_ready_data_set_opens_at_once_and_a_batch_is_cheap():
    x, y = some(n=2000, shape=(1, 28, 28), dtype=np.uint8)
    open_dataset((x, y))
    start = time.perf_counter()
    data = open_dataset((x, y))
    assert time.perf_counter() - start < 0.05
    rng, seconds = np.random.default_rng(0), []
    for _ in range(50):
        indices = rng.integers(0, data.n_train, 64)
        start = time.perf_counter()
        data.batch(indices)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.3e-3


# --- arrays that are refused


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
def test_values_that_are_not_finite_are_refused_with_their_place(value):
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


def test_an_empty_class_is_said():
    x, y = some(k=4)
    data = open_dataset((x, np.where(y == 1, 0, y)))
    assert data.n_classes == 4 and "1 of 4 classes" in data.note


# --- files


def write_folder(folder, **arrays):
    folder.mkdir(exist_ok=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return folder


def test_a_folder_of_npy_is_the_same_as_its_arrays(tmp_path):
    x, y = some()
    x_test, y_test = some(n=5, seed=1)
    two = open_dataset(write_folder(tmp_path / "two", x_train=x, y_train=y))
    assert two.name == "two" and (two.n_train, two.n_test) == (15, 2)
    np.testing.assert_array_equal(everything(two), everything(open_dataset((x, y))))
    folder = write_folder(tmp_path / "four", x_train=x, y_train=y, x_test=x_test, y_test=y_test)
    four = open_dataset(str(folder))
    np.testing.assert_array_equal(everything(four, "test"), x_test)
    write_folder(folder, x_train=x[:9], y_train=y[:9])  # a changed file is another data set
    assert open_dataset(folder).n_train == 9


def test_damaged_npy_files_are_refused(tmp_path):
    x, y = some()
    folder = tmp_path / "set"
    folder.mkdir()
    refused(folder, "no .npy files")
    write_folder(folder, x_train=x)
    refused(folder, "lacks y_train", "it has x_train")
    write_folder(folder, y_train=y, x_test=x)
    refused(folder, "lacks y_test")
    (folder / "x_test.npy").unlink()
    good = (folder / "x_train.npy").read_bytes()
    for damaged in (good[:-1], good[:50], good[:5], b"", b"x" * 300):
        (folder / "x_train.npy").write_bytes(damaged)
        refused(folder, str(folder / "x_train.npy"), "cannot be read")
    np.save(folder / "x_train.npy", np.array([{}] * 17))
    refused(folder, "cannot be read", "numbers")
    np.save(folder / "x_train.npy", x[:0])
    refused(folder, "x is empty")
    with open(folder / "x_train.npy", "wb") as file:
        np.savez(file, x=x)
    refused(folder, ".npz archive")


class Trap:
    """Unpickling this writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_nothing_is_unpickled(tmp_path):
    _, y = some()
    folder = write_folder(tmp_path / "set", y_train=y)
    for dump in (
        lambda: np.save(folder / "x_train.npy", np.array([Trap(tmp_path / "sprung")] * 17), allow_pickle=True),
        lambda: (folder / "x_train.npy").write_bytes(pickle.dumps(Trap(tmp_path / "sprung"))),
    ):
        dump()
        refused(folder, "cannot be read")
        assert not (tmp_path / "sprung").exists()


def test_unknown_and_missing_paths_are_refused(tmp_path):
    refused(str(tmp_path / "nothing.parquet"), "nothing.parquet", "Registered names")
    (tmp_path / "a.csv").write_text("1,2")
    refused(tmp_path / "a.csv", "ends in '.csv'", ".parquet")
    (tmp_path / "a.h5").write_bytes(b"")
    refused(tmp_path / "a.h5", "is empty")


@pytest.fixture
def parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    def write(columns, metadata=None, **options):
        table = pa.table(columns)
        pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "set.parquet", **options)
        return tmp_path / "set.parquet"

    return write


def test_parquet_layouts_give_the_same_samples(parquet):
    import pyarrow as pa

    x, y = some(shape=(3, 2, 5))
    expected = everything(open_dataset((x, y)))
    flat = pa.array(x.reshape(-1))
    tensor = pa.fixed_shape_tensor(pa.float32(), (3, 2, 5))
    layouts = {
        "nested lists": ({"x": pa.array(x.tolist(), pa.list_(pa.list_(pa.list_(pa.float32())))), "y": y}, None),
        "fixed lists": ({"x": pa.FixedSizeListArray.from_arrays(flat, 30), "y": y}, {"shape": "[3, 2, 5]"}),
        "flat lists": ({"x": list(x.reshape(17, -1)), "y": y}, {"shape": "[3, 2, 5]"}),
        "tensors": (
            {"x": pa.ExtensionArray.from_storage(tensor, pa.FixedSizeListArray.from_arrays(flat, 30)), "y": y},
            None,
        ),
    }
    for name, (columns, metadata) in layouts.items():
        data = open_dataset(parquet(columns, metadata, row_group_size=4))
        assert data.shape == (3, 2, 5), name
        np.testing.assert_array_equal(everything(data), expected, err_msg=name)


def test_parquet_features_are_taken_in_the_order_of_their_numbers(parquet, monkeypatch):
    monkeypatch.setattr("labkit.data.arrays.PARQUET_ROWS", 5)
    x, y = some(shape=(11,), dtype=np.float64)
    columns = {f"f{i}": x[:, i] for i in reversed(range(11))}
    data = open_dataset(parquet({**columns, "y": y, "other": y}))
    assert data.shape == (11,) and data.name == "set"
    np.testing.assert_array_equal(everything(data), everything(open_dataset((x, y))))


def test_damaged_parquet_is_refused(parquet, monkeypatch):
    import pyarrow as pa

    x, y = some(shape=(4,))
    lists = list(x)
    refused(parquet({"x": lists, "label": y}), "no column 'y'", "x, label")
    refused(parquet({"pixels": lists, "y": y}), "neither a column 'x'", "pixels, y")
    refused(parquet({"f0": x[:, 0], "f2": x[:, 1], "y": y}), "lacks the column f1")
    refused(parquet({"x": [*lists[:-1], x[-1, :3]], "y": y}), "lengths")
    refused(parquet({"x": [*lists[:-1], None], "y": y}), "lengths")
    refused(parquet({"x": pa.array([[1.0, None]] * 17), "y": y}), "missing values")
    refused(parquet({"x": lists, "y": pa.array([0, None] + [1] * 15)}), "column y has 1 missing")
    refused(parquet({"x": ["a"] * 17, "y": y}), "column x is of type string")
    refused(parquet({"x": lists, "y": ["cat"] * 17}), "column y is of type string")
    refused(parquet({"x": lists, "y": y}, {"shape": "2x2"}), "metadata 'shape'", "2x2")
    refused(parquet({"x": lists, "y": y}, {"shape": "[3, 3]"}), "(4,)", "(3, 3)")
    refused(parquet({"x": [float(v) for v in y], "y": y}), "x[:, None]")
    refused(parquet({"x": pa.array([], pa.list_(pa.float32())), "y": pa.array([], pa.int64())}), "no rows")
    refused(parquet({"x": [*lists[:-1], x[-1] * np.nan], "y": y}), "x[16] holds nan")
    monkeypatch.setattr("labkit.data.arrays.PARQUET_ROWS", 8)
    refused(parquet({"x": [*lists[:8], *(v[:3] for v in lists[8:])], "y": y}), "(3,)", "(4,)")
    path = parquet({"x": lists, "y": y})
    good = path.read_bytes()
    for damaged in (good[:-9], good[:100], b"PAR1", b"x" * 100):
        path.write_bytes(damaged)
        refused(path, "cannot be read")


@pytest.fixture
def hdf5(tmp_path):
    h5py = pytest.importorskip("h5py")

    def write(**arrays):
        with h5py.File(tmp_path / "set.h5", "w") as file:
            for name, array in arrays.items():
                file[name] = array
        return tmp_path / "set.h5"

    return write


def test_hdf5_is_the_same_as_its_arrays(hdf5, monkeypatch):
    x, y = some(n=23, dtype=np.uint8)
    monkeypatch.setattr(shards, "CHUNK_BYTES", 5 * x[0].nbytes)
    data = open_dataset(hdf5(x=x, y=y))
    np.testing.assert_array_equal(everything(data), everything(open_dataset((x, y))))
    data = open_dataset(hdf5(x_train=x, y_train=y, x_test=x[:3], y_test=y[:3], more=y))
    np.testing.assert_array_equal(everything(data, "test"), x[:3])


def test_damaged_hdf5_is_refused(hdf5):
    x, y = some()
    refused(hdf5(a=x, y=y), "lacks x", "it has a, y")
    refused(hdf5(x_train=x, y_train=y), "lacks x_test, y_test")
    refused(hdf5(x=["a"] * 17, y=y), "x is of type object")
    refused(hdf5(**{"x/deeper": x, "y": y}), "x is no array")
    path = hdf5(x=x, y=y)
    good = path.read_bytes()
    for damaged in (good[: len(good) // 2], good[:9], b"x" * 900):
        path.write_bytes(damaged)
        refused(path, "cannot be read")


# --- Fashion-MNIST


@pytest.fixture
def little_fashion(tmp_path, monkeypatch):
    """Files in the form of Fashion-MNIST, 30 and 10 images of 5x5, whose content is the one expected now."""
    folder, files = tmp_path / "files", {}
    folder.mkdir()
    rng = np.random.default_rng(0)
    for prefix, n in (("train", 30), ("t10k", 10)):
        for kind, array in (
            ("images-idx3", rng.integers(0, 256, (n, 5, 5), dtype=np.uint8)),
            ("labels-idx1", np.arange(n, dtype=np.uint8) % 10),
        ):
            content = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()
            name = f"{prefix}-{kind}-ubyte.gz"
            (folder / name).write_bytes(gzip.compress(content))
            files[name] = (array.shape, hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(images, "FILES", files)
    return folder


def test_fashion_mnist_is_looked_for_in_order(little_fashion, tmp_path, monkeypatch, own_cache):
    shutil.copytree(little_fashion, own_cache / "fashion-mnist")
    cached = open_dataset("fashion-mnist")
    assert (cached.name, cached.shape, cached.n_train, cached.n_test) == ("fashion-mnist", (1, 5, 5), 30, 10)
    installed = shutil.copytree(little_fashion, fetch.ROOT / images.FASHION.unpacked)
    debian = open_dataset("fashion-mnist")
    (tmp_path / "mine").mkdir()
    monkeypatch.setenv("LABKIT_DATA", str(tmp_path / "mine"))
    assert open_dataset("fashion-mnist").path == debian.path  # nothing of it there: the next place
    shutil.copytree(little_fashion, tmp_path / "mine" / "fashion-mnist")
    mine = open_dataset("fashion-mnist")
    monkeypatch.setenv("LABKIT_DATA", str(installed))  # the files themselves; the same files as Debian's here
    assert open_dataset("fashion-mnist").path == debian.path
    assert len({data.path for data in (cached, debian, mine)}) == 3
    for data in (debian, mine):
        np.testing.assert_array_equal(everything(data), everything(cached))


def test_damaged_fashion_mnist_is_refused(little_fashion, monkeypatch):
    monkeypatch.setenv("LABKIT_DATA", str(little_fashion))
    path = little_fashion / "train-images-idx3-ubyte.gz"
    good = path.read_bytes()
    content = gzip.decompress(good)
    flipped = content[:-1] + bytes([content[-1] ^ 1])
    for damaged, words in [
        (good[:-20], "truncated or damaged"),
        (good[:60], "truncated or damaged"),
        (b"", "nothing"),
        (content, "truncated or damaged"),
        (gzip.compress(b"\0\0\x0d" + content[3:]), "begins with"),
        (gzip.compress(content[:7] + b"\x09" + content[8:]), "begins with"),
        (gzip.compress(content[:-5]), "bytes"),
        (gzip.compress(content + b"x"), "bytes"),
        (gzip.compress(flipped), "SHA-256"),
    ]:
        path.write_bytes(damaged)
        refused("fashion-mnist", str(path), words, "dataset-fashion-mnist")
    path.unlink()
    refused("fashion-mnist", "lacks train-images-idx3-ubyte.gz")
    monkeypatch.setenv("LABKIT_DATA", str(little_fashion / "nowhere"))
    refused("fashion-mnist", "which is no folder")


def test_falling_back_to_digits_is_said(capsys):
    data = open_dataset("fashion-mnist")
    assert data.name == "digits" and data.shape == (1, 8, 8) and not data.synthetic
    for word in ("Fashion-MNIST could not be had", "no network in this test", "digits", "LABKIT_DATA"):
        assert word in data.note
    open_dataset("fashion-mnist")
    assert capsys.readouterr().out.count("could not be had") == 1
    assert pickle.loads(pickle.dumps(data)).note == data.note
    assert open_dataset("digits").note == ""


def test_published_files_are_fetched_checked_and_kept(little_fashion, monkeypatch, own_cache, capsys):
    monkeypatch.setattr(fetch, "fetch", really_fetch)
    monkeypatch.setattr(fetch, "_has_apt", lambda: False)
    published = little_fashion.parent / "published" / "a" / "b"
    urls = (published.parent.as_uri() + "/first", published.as_uri())
    monkeypatch.setattr(images, "FASHION", replace(images.FASHION, urls=urls))
    shutil.copytree(little_fashion, published)
    first = shutil.copytree(little_fashion, published.parent / "first")
    path = first / "t10k-images-idx3-ubyte.gz"  # the first place gives something else, the second is right
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1] + b"!"))
    data = open_dataset("fashion-mnist")
    assert data.name == "fashion-mnist" and data.note == ""
    assert "fetching it" in capsys.readouterr().out
    assert sorted(path.name for path in (own_cache / "fashion-mnist").iterdir()) == sorted(images.FILES)
    assert sorted(path.name for path in own_cache.iterdir()) == ["fashion-mnist", "shards"]
    shutil.rmtree(published.parent)
    assert open_dataset("fashion-mnist").path == data.path  # and not fetched again


def test_a_fetch_that_fails_gives_the_reasons_once(little_fashion, monkeypatch, own_cache):
    monkeypatch.setattr(fetch, "fetch", really_fetch)
    monkeypatch.setattr(fetch, "_has_apt", lambda: True)
    monkeypatch.setattr(images, "FASHION", replace(images.FASHION, urls=((little_fashion / "not-here").as_uri(),)))
    tried = []

    def no_apt(origin, folder, names, end):
        tried.append(folder)
        raise OSError("Unable to locate package")

    monkeypatch.setattr(fetch, "_from_apt", no_apt)
    for _ in range(2):
        data = open_dataset("fashion-mnist")
        assert data.name == "digits" and "apt-get: Unable to locate package" in data.note
        assert "not-here" in data.note
    assert len(tried) == 1
    assert [path.name for path in own_cache.iterdir()] == ["shards"]


def test_a_command_is_ended_at_the_time_limit_with_its_children(tmp_path):
    command = [sys.executable, "-c", "import subprocess; subprocess.run(['sleep', '60'])"]
    start = time.monotonic()
    with pytest.raises(OSError, match="time limit"):
        fetch._run(command, tmp_path, start + 0.5)
    assert time.monotonic() - start < 10
    with pytest.raises(OSError, match=r"^it went wrong$"):
        fetch._run(["sh", "-c", "echo first; echo 'E: it went wrong'; echo last; exit 3"], tmp_path, start + 60)


@pytest.mark.slow
@pytest.mark.parametrize("lists", ["the system's", "none"])
def test_the_real_set_is_fetched_by_apt_without_root(lists, tmp_path, monkeypatch):
    if not fetch._has_apt():
        pytest.skip("this system has no apt-get")
    if lists == "none":
        (tmp_path / "apt.conf").write_text(f'Dir::State::lists "{tmp_path}/empty";')
        monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))
    monkeypatch.setattr(fetch, "fetch", really_fetch)
    monkeypatch.setattr(images, "FASHION", replace(images.FASHION, urls=()))
    data = open_dataset("fashion-mnist")
    if data.name == "digits":
        pytest.skip(data.note)
    assert (data.shape, data.n_train, data.n_test, data.n_classes) == ((1, 28, 28), 60000, 10000, 10)
    assert np.array_equal(np.bincount(data.labels()), [6000] * 10)
    meta = json.loads(Path(data.path, "meta.json").read_text())
    assert abs(meta["mean"][0] - 0.2860) < 1e-4 and abs(meta["std"][0] - 0.3530) < 1e-4


def test_importing_it_brings_neither_pyarrow_nor_h5py():
    code = "import sys, labkit.data; print([m for m in ('torch', 'pyarrow', 'h5py', 'sklearn') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout
    assert re.fullmatch(r"\[\]\s*", out)
