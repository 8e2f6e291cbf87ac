"""The named image sets: Fashion-MNIST, looked for and fetched, and the digits inside scikit-learn.

Fashion-MNIST (Xiao, Rasul, Vollgraf 2017, arXiv:1708.07747): 70,000 grey images of 28x28 in 10 classes. It is found in
this order: the folder `LABKIT_DATA`; where Debian's package `dataset-fashion-mnist` puts it; the cache, fetched once
without root rights. Where nothing can be had, the 1,797 digits of 8x8 take its place, said aloud and in the data set's
note.

Used by `labkit.data.open_dataset`.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import zlib
from pathlib import Path

import numpy as np

from labkit.data.fetch import fetch
from labkit.data.shards import Dataset, Source, cache_dir, file_key, shard
from labkit.errors import DataError

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
# name -> shape, SHA-256 of the uncompressed content. Debian's and the published .gz differ in their gzip header
# (Debian's has neither file name nor the time of 2017), so the content is what both routes share. Putting name and
# time back into Debian's files gives the published ones, MD5 8d4fb7e6c68d591d4c3dfef9ec88bf0d for the training images.
FILES: dict[str, tuple[tuple[int, ...], str]] = {
    "train-images-idx3-ubyte.gz": (
        (60000, 28, 28),
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    ),
    "train-labels-idx1-ubyte.gz": ((60000,), "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"),
    "t10k-images-idx3-ubyte.gz": ((10000, 28, 28), "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"),
    "t10k-labels-idx1-ubyte.gz": ((10000,), "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"),
}


def fashion_mnist() -> Dataset:
    """All 70,000 images: (1, 28, 28), 60,000 to train and 10,000 to test, 10 classes; or the digits, with a note
    saying why.

    `LABKIT_DATA` holds the four published `.gz` files itself or in a subfolder `fashion-mnist`. Raises DataError where
    that folder does not exist, holds only some of them, or where files found anywhere are not the published ones.
    """
    folder, reasons = _find()
    if folder is None:
        note = (
            f"Fashion-MNIST could not be had ({'; '.join(reasons)}); the 8x8 digits inside scikit-learn take its "
            "place. Set LABKIT_DATA to a folder with its four .gz files to use it."
        )
        return digits(note=note)

    def load() -> tuple[Source, Source]:
        return _split(folder, "train"), _split(folder, "t10k")

    return shard("fashion-mnist", file_key([folder / name for name in FILES]), load)


def _find() -> tuple[Path | None, list[str]]:
    """The folder that holds the four files, or None and the reasons why there is none."""
    if given := os.environ.get("LABKIT_DATA"):
        base = Path(given).expanduser().absolute()
        if not base.is_dir():
            raise DataError(f"LABKIT_DATA is {given!r}, which is no folder. Make it, or unset LABKIT_DATA.")
        for folder in (base / "fashion-mnist", base):
            missing = [name for name in FILES if not (folder / name).is_file()]
            if not missing:
                return folder, []
            if len(missing) < len(FILES):
                raise DataError(f"{folder} lacks {', '.join(missing)} of Fashion-MNIST. Put all four files there, or none.")
    cached = cache_dir() / "fashion-mnist"
    for folder in (DEBIAN, cached):
        if _complete(folder):
            return folder, []
    reasons = fetch(cached, list(FILES), good=_complete, check=_check_files)
    return (None, reasons) if reasons else (cached, [])


def _complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in FILES)


def _check_files(folder: Path) -> None:
    for name in FILES:
        read_idx(folder / name)


def _split(folder: Path, prefix: str) -> Source:
    images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz")
    return Source(images.shape, images.dtype, lambda: [images], labels)


def read_idx(path: Path) -> np.ndarray:
    """The bytes of one of `FILES`, as uint8 of the shape given there; DataError if the file is not that one."""
    shape, digest = FILES[path.name]
    header = bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)
    size = len(header) + int(np.prod(shape))
    advice = "Get it anew from Debian's package dataset-fashion-mnist or github.com/zalandoresearch/fashion-mnist."
    try:
        with gzip.open(path) as file:
            content = file.read(size + 1)  # never more, whatever a damaged file unpacks to
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is truncated or damaged: {error}. {advice}") from error
    if content[: len(header)] != header:
        found = content[: len(header)].hex(" ", 4) or "nothing"
        raise DataError(f"{path} begins with {found}, where IDX of shape {shape} begins {header.hex(' ', 4)}. {advice}")
    if len(content) != size:
        raise DataError(f"{path} holds {len(content)} bytes or more, where {size} were expected. {advice}")
    if (found := hashlib.sha256(content).hexdigest()) != digest:
        raise DataError(f"{path} is not the published file: SHA-256 of its content is {found}, not {digest}. {advice}")
    return np.frombuffer(content, dtype=np.uint8, offset=len(header)).reshape(shape)


def digits(note: str = "") -> Dataset:
    """The digits inside scikit-learn: (1, 8, 8), values 0 to 16, 1,617 to train and 180 held out, 10 classes."""

    def load() -> tuple[Source, None]:
        from sklearn.datasets import load_digits  # slow to import, and needed only once

        images, labels = load_digits(return_X_y=True)
        images = images.reshape(-1, 8, 8).astype(np.uint8)
        return Source(images.shape, images.dtype, lambda: [images], labels), None

    return shard("digits", "1", load, note=note)
