"""Arrays in memory, in `.npy` and in HDF5 give the same samples; nothing is unpickled, what is damaged is refused."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from labkit.data import cache, open_dataset
from labkit.errors import DataError
from tests.data.helpers import everything, refused, some, write_folder

pytestmark = pytest.mark.usefixtures("own_cache")


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


def test_what_is_not_read_of_a_folder_is_said(tmp_path):
    x, y = some()
    folder = write_folder(tmp_path / "set", x_train=x, y_train=y, x_val=x, y_val=y)
    (folder / "classes.txt").write_text("a b c")
    data = open_dataset(folder)
    assert "left out: classes.txt, x_val.npy, y_val.npy" in data.note
    (folder / "classes.txt").unlink()
    assert "classes.txt" not in open_dataset(folder).note


@pytest.mark.parametrize("of", [list, lambda x: np.array(x, dtype=object), lambda x: [sample.tolist() for sample in x]])
def test_samples_of_different_lengths_need_a_pad(of):
    x = of([np.arange(1.0 + i % 4) for i in range(20)])
    with pytest.raises(DataError, match=r"samples of x have 1 to 4 entries along the first axis\. Give pad=0"):
        open_dataset((x, np.arange(20) % 2))
    data = open_dataset((x, np.arange(20) % 2), pad=-1)
    assert data.shape == (4,) and data.raw([1]).min() == -1
    with pytest.raises(DataError, match=r"samples of x have different shapes\. .* first axis alone"):
        open_dataset(([np.zeros((2, 1 + i % 3)) for i in range(20)], np.arange(20) % 2))


def test_masked_values_and_unaligned_rows_are_refused():
    pandas = pytest.importorskip("pandas")
    x, y = some(shape=(5,))
    mask = np.zeros(x.shape, dtype=bool)
    mask[4, 2] = True
    refused((np.ma.masked_array(x, mask), y), "x[4] is masked")
    refused((x, np.ma.masked_equal(y, y[3])), "is masked")
    np.testing.assert_array_equal(everything(open_dataset((np.ma.masked_array(x), y))), everything(open_dataset((x, y))))
    frame, labels = pandas.DataFrame(x), pandas.Series(y)
    shuffled = frame.sample(frac=1, random_state=0)
    refused((shuffled, labels), "x and y have different indexes", "reset_index")
    refused((frame, labels, shuffled, labels), "x_test and y_test")
    data = open_dataset((shuffled, labels.loc[shuffled.index], frame, labels))
    np.testing.assert_array_equal(data.labels()[np.argsort(shuffled.index)], y)
    refused((frame, pandas.Series(["cat", 1] * 8 + ["cat"], dtype=object)), "return_inverse")
    assert open_dataset((frame, pandas.Series(["cat", "dog"] * 8 + ["cat"], dtype=object))).classes == ["cat", "dog"]
    refused((frame.assign(name="a"), labels), "x is of type object", "to_numpy(float)")


@pytest.mark.parametrize(
    ("name", "shape", "descr"),
    [
        ("x", (10**12, 3), "<f4"),
        ("x", (17, 10**12), "|u1"),
        ("x", (10**12, 0), "<f4"),
        ("x", (10**12, 3), "<U0"),
        ("x", (17,), "<U20000"),
        ("x", (17,), [("a", "<U20000")]),
        ("y", (17,), "<U20000"),
        ("y", (10**12,), "|S0"),
        ("y", (10**12, 0), "<i8"),
    ],
)
def test_a_header_that_claims_more_than_its_file_holds_takes_no_memory(name, shape, descr, tmp_path):
    x, y = some()
    folder = write_folder(tmp_path / "set", x_train=x, y_train=y)
    with open(folder / f"{name}_train.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
        file.write(bytes(1000))
    refused(folder)


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
    monkeypatch.setattr(cache, "CHUNK_BYTES", 5 * x[0].nbytes)
    data = open_dataset(hdf5(x=x, y=y))
    np.testing.assert_array_equal(everything(data), everything(open_dataset((x, y))))
    data = open_dataset(hdf5(x_train=x, y_train=y, x_test=x[:3], y_test=y[:3], more=y))
    np.testing.assert_array_equal(everything(data, "test"), x[:3])
    assert "left out: more" in data.note
    data = open_dataset(hdf5(x=np.moveaxis(x, 1, -1), y=y, groups=y), channels="last")
    np.testing.assert_array_equal(everything(data), everything(open_dataset((x, y))))
    assert "left out: groups" in data.note


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
