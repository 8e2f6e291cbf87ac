"""What tests of data sets lend each other: samples, files in their true formats, and how a refusal looks."""

from __future__ import annotations

import gzip
import hashlib

import numpy as np
import pytest
from PIL import Image

from labkit.data import cache, fetch, open_dataset
from labkit.errors import DataError

really_fetch = fetch.fetch


def some(n=17, shape=(3, 5, 7), k=3, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    y = np.concatenate([np.arange(k), rng.integers(0, k, n - k)])
    if np.dtype(dtype).kind == "f":
        return rng.normal(4, 2, (n, *shape)).astype(dtype), y
    return rng.integers(0, 2 if dtype is bool else 100, (n, *shape)).astype(dtype), y


def refused(data, *words):
    """The data set is refused with a DataError that has these words, and nothing of it is left in the cache."""

    def held():
        return set((cache.cache_dir() / "shards").glob("*")) if cache.cache_dir().exists() else set()

    before = held()
    with pytest.raises(DataError) as caught:
        open_dataset(data)
    for word in words:
        assert str(word) in str(caught.value)
    assert not [path for path in held() - before if not path.name.startswith("digits")]


def everything(data, split="train"):
    return data.raw(np.arange(getattr(data, f"n_{split}")), split)


def write_folder(folder, **arrays):
    folder.mkdir(exist_ok=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return folder


def write_fashion(folder, side):
    """Files in the form of Fashion-MNIST, 30 and 10 images of side x side; what `named.FILES` has to be for them."""
    rng, files = np.random.default_rng(0), {}
    folder.mkdir()
    for prefix, n in (("train", 30), ("t10k", 10)):
        for kind, array in (
            ("images-idx3", rng.integers(0, 256, (n, side, side), dtype=np.uint8)),
            ("labels-idx1", np.arange(n, dtype=np.uint8) % 10),
        ):
            content = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()
            name = f"{prefix}-{kind}-ubyte.gz"
            (folder / name).write_bytes(gzip.compress(content))
            files[name] = (array.shape, hashlib.sha256(content).hexdigest())
    return files


def every(dataset):
    """All samples and labels of both splits, sorted as the test split was held out: in the order of the files."""
    n = dataset.n_train + dataset.n_test
    held_out = cache.hold_out(n)
    x, y = np.empty((n, *dataset.shape), dataset.raw([0]).dtype), np.empty(n, dtype=int)
    for split, rows in (("train", ~held_out), ("test", held_out)):
        x[rows], y[rows] = dataset.raw(np.arange(rows.sum()), split), dataset.labels(split)
    return x, y


def picture(path, height, width, seed=0, mode="RGB", **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(path, **how)
    return pixels


def nifti(path, hu, affine=None, dtype=np.int16):
    nibabel = pytest.importorskip("nibabel")
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(np.asarray(hu, dtype=dtype), np.eye(4) if affine is None else affine), path)
    return path


def body(shape=(20, 24, 10)):
    """A volume with a gradient along each axis: x to the right, y to the front, z to the head."""
    x, y, z = np.meshgrid(*(np.linspace(0, 1, n) for n in shape), indexing="ij")
    return np.rint(-1200 + 300 * x + 600 * y + 900 * z)
