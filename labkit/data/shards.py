"""The shard format: a data set as four `.npy` files and a `meta.json` in the cache, written once, opened by reference.

A folder is named after what it holds and a key of its content or source, is written under another name and renamed
when it is whole, so that two processes may make the same one at the same time. Images stay as they came (bytes stay
bytes); a batch is (x / scale - mean) / std, with mean and std of each channel of the training split, and costs a
gather and two multiply-adds.

Used by the other files of `labkit.data`, which say where the samples come from; `Dataset` is used by everyone.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs

from labkit.data.checks import Layout, check_labels, check_shapes, finite_block, plan_layout
from labkit.errors import DataError

FORMAT = 1
CHUNK_BYTES = 1 << 24  # samples are converted and checked in blocks of about this size
SPLITS = ("train", "test")
STALE_S = 86400  # a half-written folder older than this was left by a process that died

_MAPS: dict[str, dict[str, np.ndarray]] = {}  # the open memory maps of this process, by path
_SAID: set[str] = set()


@dataclass(frozen=True)
class Source:
    """One split on its way into a shard: `chunks()` gives its samples in order, as often as asked; `y` the labels.

    `about` of the training split is what is to be said of the data set, and is kept with it.
    """

    shape: tuple[int, ...]  # (N, ...)
    dtype: np.dtype
    chunks: Callable[[], Iterable[np.ndarray]]
    y: np.ndarray
    about: str = ""


class Dataset:
    """A reference to a data set: small, picklable, opened on first use in whichever process it has come to.

    Attributes
    ----------
    name : str
        The registered name, `"arrays"`, or the name of the user's file.
    path : str
        Folder of the `.npy` shards; each worker must see it under this path.
    shape : tuple of int
        Of one sample: (F,), (C, H, W) or (C, D, H, W).
    n_classes : int or None
        K, where labels are 0..K-1.
    n_train, n_test : int
        Samples in each split.
    synthetic : bool
        True for generated data, also where only a part of each sample was generated; the note says which.
    note : str
        What was decided on the user's behalf, such as another set taken in its place; `""` if nothing was.
    """

    def __init__(self, path: str | os.PathLike[str], meta: dict[str, Any], note: str = "") -> None:
        self.path = str(path)
        self.name: str = meta["name"]
        self.shape: tuple[int, ...] = tuple(meta["shape"])
        self.n_classes: int | None = meta["n_classes"]
        self.n_train: int = meta["n"]["train"]
        self.n_test: int = meta["n"]["test"]
        self.synthetic: bool = meta["synthetic"]
        self.note: str = " ".join(part for part in (note, meta["note"]) if part)
        ones = (1,) * (len(self.shape) - 1)
        mean, std = (np.asarray(meta[key], dtype=np.float64).reshape(-1, *ones) for key in ("mean", "std"))
        # in units of the stored values, so that bytes need no division of their own
        self._centre = (mean * meta["scale"]).astype(np.float32)
        self._rate = (1.0 / (std * meta["scale"])).astype(np.float32)
        self._files: dict[str, int] = meta["files"]

    @property
    def affine(self) -> tuple[np.ndarray, np.ndarray]:
        """(centre, rate) of each channel, float32: a batch is (values as they were given - centre) * rate."""
        return self._centre.ravel(), self._rate.ravel()

    def __repr__(self) -> str:
        return (
            f"Dataset({self.name!r}, shape={self.shape}, n_classes={self.n_classes}, n_train={self.n_train}, n_test={self.n_test})"
        )

    def batch(self, indices: Any, split: str = "train", window: tuple[slice, ...] = ()) -> tuple[np.ndarray, np.ndarray]:
        """The samples at `indices`, or a window of each (slices of the axes behind the channels), ready for a network.

        Returns x, float32 of shape (n, *shape), with mean 0 and standard deviation 1 in each channel of the training
        split, and y, int64 of shape (n,). Both are new arrays. An index outside 0..N-1 is an IndexError.
        """
        at = self._checked(indices, split)
        x = self._map("x", split)[(at, slice(None), *window) if window else at].astype(np.float32)
        x -= self._centre
        x *= self._rate
        return x, self._map("y", split)[at]

    def raw(self, indices: Any, split: str = "train") -> np.ndarray:
        """The samples at `indices` as they were given (bytes stay bytes), shape (n, *shape): for figures."""
        return self._map("x", split)[self._checked(indices, split)]

    def labels(self, split: str = "train") -> np.ndarray:
        """All labels of a split, int64 of shape (N,), as a new array."""
        return np.array(self._map("y", split))

    def _checked(self, indices: Any, split: str) -> np.ndarray:
        at, n = np.asarray(indices), len(self._map("y", split))
        if at.ndim != 1 or (at.dtype.kind not in "iu" and at.size):
            raise TypeError(f"indices are {at.dtype} of shape {at.shape}. Give a 1-D array of integers.")
        if at.size and (at.min() < 0 or at.max() >= n):
            raise IndexError(
                f"indices are {at.min()} to {at.max()}, but the {split} split of {self.name} has samples 0 to {n - 1}."
            )
        return at.astype(np.intp, copy=False)

    def _map(self, letter: str, split: str) -> np.ndarray:
        if split not in SPLITS:
            raise ValueError(f"split={split!r} is not known. Use 'train' or 'test'.")
        maps = _MAPS.get(self.path)
        if maps is None:
            maps = _MAPS.setdefault(self.path, _open_maps(Path(self.path), self._files))
        return maps[f"{letter}_{split}"]


def _open_maps(path: Path, files: dict[str, int]) -> dict[str, np.ndarray]:
    if not _whole(path, files):
        raise DataError(
            f"{socket.gethostname()} finds no whole data set at {path}. Set LABKIT_CACHE to a folder that all "
            "workers share, or, where it was deleted or damaged, open the data set again."
        )
    # a plain array over the map: indexing np.memmap itself costs several times as much
    return {name.removesuffix(".npy"): np.asarray(np.load(path / name, "r", allow_pickle=False)) for name in files}


def _whole(path: Path, files: dict[str, int]) -> bool:
    try:
        return all((path / name).stat().st_size == size for name, size in files.items())
    except OSError:
        return False


def cache_dir() -> Path:
    """The folder for shards and fetched files: `LABKIT_CACHE`, or the user's cache folder of this system."""
    return Path(os.environ.get("LABKIT_CACHE") or platformdirs.user_cache_dir("labkit")).expanduser().absolute()


def say(message: str) -> None:
    """Print a message, once in this process."""
    if message not in _SAID:
        _SAID.add(message)
        print(f"labkit: {message}", flush=True)


def shard(
    name: str, key: str, load: Callable[[], tuple[Source, Source | None]], *, synthetic: bool = False, note: str = ""
) -> Dataset:
    """The data set under `name` and `key`: opened where its shards are ready, else made from what `load()` gives.

    `load` returns the training and the test split; where the latter is None, every 10th sample of a permutation with a
    fixed seed is held out. `note` is added to the data set's own. Raises DataError for all that a data set must not be.
    """
    path = cache_dir() / "shards" / f"{re.sub(r'[^A-Za-z0-9._-]+', '_', name)}-{key[:20]}"
    meta = _ready(path)
    if meta is None:
        with replacing(path, lambda: _ready(path) is not None) as folder:
            meta = _write(folder, name, load, synthetic)
    dataset = Dataset(path, meta, note)
    if dataset.note:
        say(dataset.note)
    return dataset


def opened(path: Path) -> Dataset | None:
    """The data set whose shards are in the folder `path` of this cache, as the record of a run names it; else None."""
    meta = _ready(path) if path.parent == (cache_dir() / "shards").resolve() else None
    return None if meta is None else Dataset(path, meta)


def _ready(path: Path) -> dict[str, Any] | None:
    try:
        meta = json.loads((path / "meta.json").read_text())
        return meta if meta["format"] == FORMAT and _whole(path, meta["files"]) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not made yet, or damaged: it is only a copy, and is made anew


@contextmanager
def replacing(path: Path, good: Callable[[], bool]) -> Iterator[Path]:
    """A folder to write into; at the end it becomes `path` in one step, unless somebody made that `good` before."""
    folder = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path.parent)
        folder = Path(tempfile.mkdtemp(prefix=".making-", dir=path.parent))
        (folder / "new").mkdir()
        yield folder / "new"
        for _ in range(3):
            try:
                os.rename(folder / "new", path)  # fails where a folder with files is there already
                break
            except OSError:
                if good():
                    break
                if path.exists():
                    os.rename(path, Path(tempfile.mkdtemp(dir=folder)) / "damaged")
        if not good():
            raise DataError(f"{path} could not be put in place. Delete it and try again.")
    except OSError as error:
        raise DataError(
            f"The cache {path.parent} cannot be used: {error}. Set LABKIT_CACHE to a folder that you may write "
            "to and that has room."
        ) from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def file_key(paths: list[Path]) -> str:
    """A key of files by path, size and time of change."""
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return hashlib.sha256(repr(stats).encode()).hexdigest()


def _sweep(parent: Path) -> None:
    for left in parent.glob(".making-*"):
        with suppress(FileNotFoundError):  # another process sweeps, too
            if time.time() - left.stat().st_mtime > STALE_S:
                shutil.rmtree(left, ignore_errors=True)


def hold_out(n: int) -> np.ndarray:
    """Which of n samples are held out as a test split: a mask of every 10th of a permutation with seed 0."""
    mask = np.zeros(n, dtype=bool)
    mask[np.random.default_rng(0).permutation(n)[::10]] = True
    return mask


def _write(folder: Path, name: str, load: Callable[[], tuple[Source, Source | None]], synthetic: bool) -> dict[str, Any]:
    """Check the splits, write them into `folder`, and return the `meta.json` that was written beside them."""
    train, test = load()
    given = {"train": train} if test is None else {"train": train, "test": test}
    check_shapes(name, {split: source.shape for split, source in given.items()})
    labels, n_classes, notes = check_labels(name, {split: (s.y, s.shape[0]) for split, s in given.items()})
    layout = plan_layout(name, given)
    notes = [part for part in (train.about, *notes, layout.note) if part]

    if test is None:
        held_out = hold_out(train.shape[0])
        labels = {"train": labels["train"][~held_out], "test": labels["train"][held_out]}
        jobs = [("x", train, {"train": ~held_out, "test": held_out})]
    else:
        jobs = [(f"x_{s}", source, {s: np.ones(source.shape[0], dtype=bool)}) for s, source in given.items()]
    for split, y in labels.items():
        np.save(folder / f"y_{split}.npy", y)
    for called, source, rows in jobs:
        _write_samples(folder, f"{name}: {called}", source, rows, layout)

    scale = 255 if layout.dtype == np.uint8 else 1
    mean, std = _moments(np.load(folder / "x_train.npy", "r", allow_pickle=False), scale)
    meta = {
        "format": FORMAT,
        "name": name,
        "shape": list(layout.shape),
        "n_classes": n_classes,
        "n": {split: len(labels[split]) for split in SPLITS},
        "scale": scale,
        "mean": mean,
        "std": std,
        "synthetic": synthetic,
        "note": " ".join(notes),
        "files": {f.name: f.stat().st_size for f in sorted(folder.glob("*.npy"))},
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))
    return meta


def _write_samples(folder: Path, called: str, source: Source, rows: dict[str, np.ndarray], layout: Layout) -> None:
    """Write the samples of a source into `x_<split>.npy` for each split in `rows`, a mask over the samples."""
    with ExitStack() as stack:
        files = {split: stack.enter_context(open(folder / f"x_{split}.npy", "wb")) for split in rows}
        for split, file in files.items():
            header = {
                "descr": layout.dtype.str,
                "fortran_order": False,
                "shape": (int(rows[split].sum()), *layout.shape),
            }
            np.lib.format.write_array_header_1_0(file, header)
        seen = 0
        for block in source.chunks():
            part = finite_block(layout.arrange(block), layout.dtype, called, seen)
            for split, file in files.items():  # plain writes: a full disk is an error here, and a crash in a memory map
                file.write(part[rows[split][seen : seen + len(block)]].tobytes())
            seen += len(block)


def rows_per_chunk(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """How many samples of (N, ...) make a block of about CHUNK_BYTES."""
    return max(1, CHUNK_BYTES // max(1, int(np.prod(shape[1:])) * dtype.itemsize))


def _moments(x: np.ndarray, scale: int) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel (axis 1) of x / scale, in float64, in two passes."""
    rows = rows_per_chunk(x.shape, np.dtype(np.float64))
    axes = (0, *range(2, x.ndim))
    count = x.size // x.shape[1]
    blocks = [slice(at, at + rows) for at in range(0, len(x), rows)]
    mean = np.add.reduce([x[b].sum(axis=axes, dtype=np.float64) for b in blocks]) / count
    wide = mean.reshape(1, -1, *(1,) * (x.ndim - 2))
    std = np.sqrt(np.add.reduce([np.square(x[b] - wide).sum(axis=axes) for b in blocks]) / count)
    std[std <= 1e-7 * np.abs(mean)] = scale  # a constant channel is only centred
    return (mean / scale).tolist(), (std / scale).tolist()
