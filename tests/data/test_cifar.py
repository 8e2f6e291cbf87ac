"""CIFAR-10: batches put together opcode by opcode as Python 2 wrote them, and pickles that run nothing."""

from __future__ import annotations

import gzip
import os
import pickle

import numpy as np
import pytest

from labkit.data import cifar, open_dataset
from tests.data.helpers import refused

pytestmark = pytest.mark.usefixtures("own_cache")


def python2(value):
    """The opcodes with which Python 2 pickled `value`: an array of bytes, a dict, a list, a string or an int."""
    if isinstance(value, np.ndarray):
        rows, columns = (b"J" + int(n).to_bytes(4, "little") for n in value.shape)
        array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\x01b\x87R(K\x01" + rows + columns + b"\x86"
        dtype = b"cnumpy\ndtype\nU\x02u1K\0K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
        return array + dtype + b"\x89T" + value.size.to_bytes(4, "little") + value.tobytes() + b"tb"
    if isinstance(value, dict):
        return b"}(" + b"".join(python2(key) + python2(of) for key, of in value.items()) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(python2, value)) + b"e"
    return b"U" + bytes([len(value)]) + value.encode() if isinstance(value, str) else b"K" + bytes([value])


def batch(i=0, n=4, **changed):
    data = np.random.default_rng(i).integers(0, 256, (n, 3072), dtype=np.uint8)
    labels = [(2 * i + j) % 10 for j in range(n)]
    names = [f"car_{j}.png" for j in range(n)]
    held = {"batch_label": f"training batch {i} of 5", "labels": labels, "data": data, "filenames": names}
    return held | changed


@pytest.fixture
def cifar10(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for i, name in enumerate((*cifar.TRAIN, cifar.TEST)):
        (folder / name).write_bytes(b"\x80\x02" + python2(batch(i)) + b".")
    (folder / "batches.meta").write_bytes(b"never opened")
    (folder / "readme.html").write_text("")
    return folder


def test_cifar_10_is_read_as_python_2_wrote_it(cifar10):
    data = open_dataset(cifar10)
    assert (data.name, data.shape, data.n_classes, data.n_train, data.n_test) == ("cifar-10", (3, 32, 32), 10, 20, 4)
    first = batch(0)
    np.testing.assert_array_equal(data.raw(np.arange(4)), first["data"].reshape(4, 3, 32, 32))
    np.testing.assert_array_equal(data.raw(np.arange(4), "test"), batch(5)["data"].reshape(4, 3, 32, 32))
    assert data.labels()[:8].tolist() == first["labels"] + batch(1)["labels"]
    assert open_dataset(str(cifar10)).path == data.path
    assert data.raw([0]).dtype == np.uint8 and data.note == ""


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_batches_that_python_3_wrote_are_read_too(protocol, cifar10):
    held = batch(3)
    (cifar10 / "data_batch_4").write_bytes(pickle.dumps({key.encode(): of for key, of in held.items()}, protocol))
    x, y = cifar.read_batch(cifar10 / "data_batch_4")
    np.testing.assert_array_equal(x.reshape(4, -1), held["data"])
    assert y.tolist() == held["labels"]


class Calls:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (os.system, ("touch {mark}",), "system"),
        (eval, ("open({mark!r}, 'w')",), "eval, which"),
        (open, ("{mark}", "w"), "open"),
        (getattr, ("", "join"), "getattr, which"),
        (np.fromfile, ("{mark}",), "fromfile"),
        (np.load, ("{mark}",), "load"),
        (np.zeros, (1 << 40,), "zeros"),
    ],
)
def test_nothing_in_a_batch_is_run(function, arguments, name, cifar10, tmp_path):
    mark = tmp_path / "mark"
    arguments = [of.format(mark=str(mark)) if isinstance(of, str) else of for of in arguments]
    for protocol in (0, 2, 5):
        (cifar10 / "data_batch_2").write_bytes(pickle.dumps({"data": Calls(function, *arguments)}, protocol))
        refused(cifar10, cifar10 / "data_batch_2", name, "was not opened")
    assert not mark.exists()


@pytest.mark.parametrize(
    ("pickled", "words"),
    [
        (b"cnumpy.core.multiarray\nscalar\n.", "multiarray.scalar"),
        (b"cnumpy\nfromstring\n.", "numpy.fromstring"),
        (b"cnumpy\nndarray\n)\x81.", "truncated or damaged"),  # the name is there, the class is not
        (b"cnumpy.core.multiarray\n_reconstruct\n(U\x01ltR.", "it makes an array of b'l'"),
        (b"cnumpy\ndtype\n(U\x01OK\0K\x01tR.", "type b'O'"),
        (b"U\x01xQ.", "outside of the file"),
        (b"I1\n.", "holds a int"),
        (b"(lp1\n.", "holds a list"),
    ],
)
def test_a_batch_admits_nothing_but_an_array_of_bytes(pickled, words, cifar10):
    (cifar10 / "test_batch").write_bytes(pickled)
    refused(cifar10, cifar10 / "test_batch", words)


def test_damaged_batches_are_refused(cifar10):
    path = cifar10 / "data_batch_3"
    good = path.read_bytes()
    for damaged in (b"", good[:1], good[: len(good) // 2], good[:-1], b"\0" * 50, gzip.compress(good)):
        path.write_bytes(damaged)
        refused(cifar10, path, "truncated or damaged")
    wrong = batch(2)
    for held, words in [
        ({"data": wrong["data"]}, "lacks an array 'data' or a list 'labels'"),
        (wrong | {"labels": [1, 2, 3]}, "3 labels"),
        (wrong | {"labels": [1, 2, 3, 10]}, "a label is 10"),
        (wrong | {"labels": [1, 2, 3, "4"]}, "a label is b'4'"),
        (wrong | {"data": wrong["data"][:, :-1]}, "(4, 3071)"),
        (wrong | {"data": wrong["data"][:0], "labels": []}, "0 labels"),
        (wrong | {"data": "text"}, "lacks an array"),
    ]:
        path.write_bytes(b"\x80\x02" + python2(held) + b".")
        refused(cifar10, path, words)
    path.write_bytes(good.replace(b"J\x04\0\0\0J\0\x0c\0\0", b"J\xff\xff\xff\x7fJ\0\x0c\0\0"))  # a header of a huge array
    refused(cifar10, path, "2147483647")
    path.unlink()
    refused(cifar10, cifar10, "lacks data_batch_3")
    with open(path, "wb") as file:
        file.truncate(cifar.MAX_BYTES + 1)
    refused(cifar10, path, "31 MB")
