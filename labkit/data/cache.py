"""The cache of converted data sets: each is checked and written once as four `.npy` files and a `meta.json`, and then opened.

A folder is written under another name and renamed when it is whole, so that two processes may make the same one at the same time.

Used by the readers of `labkit.data`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs

from labkit.data.dataset import SPLITS, Dataset, is_whole
from labkit.errors import DataError

FORMAT = 1
CHUNK_BYTES = 1 << 24  # samples are converted and checked in blocks of about this size
STALE_S = 86400  # a half-written folder older than this was left by a process that died

_PRINTED: set[str] = set()


@dataclass(frozen=True)
class Source:
    """One split on its way into the cache; `about` of the training split becomes a part of the data set's note."""

    shape: tuple[int, ...]  # (N, ...)
    dtype: np.dtype
    chunks: Callable[[], Iterable[np.ndarray]]  # all samples in order, a new iterator at each call
    y: np.ndarray
    about: str = ""


def blocks(x: Any) -> Iterator[np.ndarray]:
    """The samples of an array, in memory or in a file, about CHUNK_BYTES at a time."""
    rows = rows_per_chunk(x.shape, x.dtype)
    return (x[at : at + rows] for at in range(0, x.shape[0], rows))


def in_blocks(x: np.ndarray, y: Any) -> Source:
    """The split of an array."""
    return Source(x.shape, x.dtype, lambda: blocks(x), np.asarray(y))


def one_by_one(
    make: Callable[[Any], np.ndarray], items: Sequence[Any], shape: tuple[int, ...], dtype: type, y: Any, about: str = ""
) -> Source:
    """The split of the samples `make(item)`, each of `shape`, of which a block is in memory at a time."""
    shape, dtype = (len(items), *shape), np.dtype(dtype)
    rows = rows_per_chunk(shape, dtype)

    def chunks() -> Iterator[np.ndarray]:
        return (np.stack([make(item) for item in items[at : at + rows]]) for at in range(0, len(items), rows))

    return Source(shape, dtype, chunks, np.asarray(y), about)


@contextmanager
def reading(path: Path, fault: str = "cannot be read", advice: str = "Write it again.") -> Iterator[None]:
    """A DataError with the name of the file for whatever its library raises where the file is damaged."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{path} {fault}: {type(error).__name__}: {error}. {advice}") from error


def cache_dir() -> Path:
    """The folder for shards and fetched files: `LABKIT_CACHE`, or the user's cache folder of this system."""
    return Path(os.environ.get("LABKIT_CACHE") or platformdirs.user_cache_dir("labkit")).expanduser().absolute()


def print_once(message: str) -> None:
    if message not in _PRINTED:
        _PRINTED.add(message)
        print(f"labkit: {message}", flush=True)


def rows_per_chunk(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """How many samples of (N, ...) make a block of about CHUNK_BYTES."""
    return max(1, CHUNK_BYTES // max(1, int(np.prod(shape[1:])) * dtype.itemsize))


def cached(
    name: str, key: str, load: Callable[[], tuple[Source, Source | None]], *, synthetic: bool = False, note: str = ""
) -> Dataset:
    """The data set under `name` and `key`: opened where it is ready, else made from `load()`, its training and test split.

    Where the latter is None, a test split is held out. `note` is added to the data set's own. DataError where the samples or
    labels cannot be used, or the cache cannot be written.
    """
    path = cache_dir() / "shards" / f"{re.sub(r'[^A-Za-z0-9._-]+', '_', name)}-{key[:20]}"
    meta = _ready(path)
    if meta is None:
        with replacing_folder(path, lambda: _ready(path) is not None) as folder:
            meta = _write(folder, name, load, synthetic)
    dataset = Dataset(path, meta, note)
    if dataset.note:
        print_once(dataset.note)
    return dataset


def opened(path: Path) -> Dataset | None:
    """The data set in the folder `path` of this cache, as the record of a run names it; else None."""
    meta = _ready(path) if path.parent == (cache_dir() / "shards").resolve() else None
    return None if meta is None else Dataset(path, meta)


def _ready(path: Path) -> dict[str, Any] | None:
    try:
        meta = json.loads((path / "meta.json").read_text())
        return meta if meta["format"] == FORMAT and is_whole(path, meta["files"]) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not made yet, or damaged: it is only a copy, and is made again


@contextmanager
def replacing_folder(path: Path, good: Callable[[], bool]) -> Iterator[Path]:
    """A folder to write into; at the end it becomes `path` in one step, unless another process has made it `good` before."""
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
            raise DataError(f"{path} could not be replaced. Delete it and try again.")
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
        with suppress(FileNotFoundError):  # another process sweeps too
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
    _check_shapes(name, given)
    labels, n_classes, note = _check_labels(name, given)
    stored = _stored_as(name, given)

    if test is None:
        held_out = hold_out(train.shape[0])
        labels = {"train": labels["train"][~held_out], "test": labels["train"][held_out]}
        _write_samples(folder, f"{name}: x", train, {"train": ~held_out, "test": held_out}, stored)
    else:
        for split, source in given.items():
            _write_samples(folder, f"{name}: x_{split}", source, {split: np.ones(source.shape[0], dtype=bool)}, stored)
    for split, y in labels.items():
        np.save(folder / f"y_{split}.npy", y)

    scale = 255 if stored.dtype == np.uint8 else 1
    mean, std = _moments(np.load(folder / "x_train.npy", "r", allow_pickle=False), scale)
    meta = {
        "format": FORMAT,
        "name": name,
        "shape": list(stored.shape),
        "n_classes": n_classes,
        "n": {split: len(labels[split]) for split in SPLITS},
        "scale": scale,
        "mean": mean,
        "std": std,
        "synthetic": synthetic,
        "note": " ".join(part for part in (train.about, note, stored.note) if part),
        "files": {f.name: f.stat().st_size for f in sorted(folder.glob("*.npy"))},
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))
    return meta


def _write_samples(folder: Path, called: str, source: Source, rows: dict[str, np.ndarray], stored: StoredAs) -> None:
    """Write the samples of a source into `x_<split>.npy` for each split in `rows`, a mask over the samples."""
    with ExitStack() as stack:
        files = {split: stack.enter_context(open(folder / f"x_{split}.npy", "wb")) for split in rows}
        for split, file in files.items():
            shape = (int(rows[split].sum()), *stored.shape)
            np.lib.format.write_array_header_1_0(file, {"descr": stored.dtype.str, "fortran_order": False, "shape": shape})
        seen = 0
        for block in source.chunks():
            part = _finite_block(stored.arrange(block), stored.dtype, called, seen)
            for split, file in files.items():  # plain writes: a full disk is an error here, and a crash in a memory map
                file.write(part[rows[split][seen : seen + len(block)]].tobytes())
            seen += len(block)


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


# -- what a data set must be -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredAs:
    """How samples are stored: shape of one, type, how a block is rearranged to it, and a note on it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    arrange: Callable[[np.ndarray], np.ndarray]
    note: str = ""


def _label(letter: str, split: str, splits: Any) -> str:
    return letter if len(splits) == 1 else f"{letter}_{split}"


def _check_shapes(name: str, given: dict[str, Source]) -> None:
    """Raise DataError unless each split is (N, ...) with 2 to 5 axes, none empty, and all samples have one shape."""
    shapes = {split: source.shape for split, source in given.items()}
    for split, shape in shapes.items():
        x = _label("x", split, shapes)
        if not 2 <= len(shape) <= 5:
            hint = " For one number a sample use x[:, None]." if len(shape) == 1 else ""
            raise DataError(
                f"{name}: {x} has shape {shape}. Give (N, F) features, (N, H, W) or (N, C, H, W) images, or "
                f"(N, C, D, H, W) volumes.{hint}"
            )
        if 0 in shape:
            raise DataError(f"{name}: {x} is empty, its shape is {shape}. Give at least one sample with one value.")
    if len(shapes) == 1 and shapes["train"][0] < 2:
        raise DataError(f"{name}: x holds 1 sample, and a test split has to be held out. Give 2 samples at least.")
    if len({shape[1:] for shape in shapes.values()}) > 1:
        raise DataError(
            f"{name}: samples of x_train have shape {shapes['train'][1:]}, those of x_test {shapes['test'][1:]}. "
            "Both splits need the same."
        )


def _check_labels(name: str, given: dict[str, Source]) -> tuple[dict[str, np.ndarray], int, str]:
    """Labels as int64, the number of classes K (the largest training label plus 1), and a note; DataError for wrong ones."""
    labels = {split: _integers(f"{name}: {_label('y', split, given)}", s.y, s.shape[0]) for split, s in given.items()}
    y_train = _label("y", "train", given)
    n_classes = int(labels["train"].max()) + 1
    if "test" in labels and (beyond := labels["test"] >= n_classes).any():
        at = int(beyond.argmax())
        raise DataError(
            f"{name}: y_test[{at}] is {labels['test'][at]}, but the labels of y_train end at {n_classes - 1}. "
            "Labels are 0..K-1 in both splits."
        )
    present = np.unique(labels["train"])
    n_empty = n_classes - len(present)
    if n_empty == 1 and present[0] == 1 and len(present) > 1:
        raise DataError(f"{name}: the labels in {y_train} are 1..{n_classes - 1}. Labels count from 0: use y - 1.")
    if n_empty > n_classes / 2:
        raise DataError(
            f"{name}: {y_train} holds {len(present)} different labels, but the largest is {n_classes - 1}. "
            "Labels are 0..K-1: look for a stray value, or renumber with y = numpy.unique(y, return_inverse=True)[1]."
        )
    return labels, n_classes, f"{name}: {n_empty} of {n_classes} classes have no sample in {y_train}." if n_empty else ""


def _integers(called: str, y: np.ndarray, n: int) -> np.ndarray:
    if y.ndim != 1:
        hint = " For one-hot rows use y.argmax(axis=1)." if y.ndim == 2 and y.shape[1] > 1 else " Use y.reshape(-1)."
        raise DataError(f"{called} has shape {y.shape}. Labels have shape (N,).{hint}")
    if len(y) != n:
        raise DataError(f"{called} holds {len(y)} labels for the {n} samples of x. Give one label for each sample.")
    if y.dtype.kind not in "biuf":
        raise DataError(f"{called} is of type {y.dtype}. Labels are 0..K-1: use y = numpy.unique(y, return_inverse=True)[1].")
    y = y.astype(np.float64) if y.dtype.kind == "f" else y
    if (wrong := ~np.isfinite(y) | (y < 0) | (y > 2**31) | (y != np.floor(y))).any():
        at = int(wrong.argmax())
        raise DataError(f"{called}[{at}] is {y[at]}. Labels are whole numbers 0..K-1: nothing below 0, or beyond K-1.")
    return y.astype(np.int64)


def _stored_as(name: str, given: dict[str, Source]) -> StoredAs:
    """Booleans, bytes, and integers within 0..255 become uint8; float16 stays; everything else becomes float32."""
    for split, source in given.items():
        if source.dtype.kind not in "biuf":
            raise DataError(
                f"{name}: {_label('x', split, given)} is of type {source.dtype}. Give booleans, integers or floats; "
                "arrays of Python objects are not read."
            )
    dtypes = {source.dtype for source in given.values()}
    if any(dtype.kind == "f" for dtype in dtypes):
        stored = np.dtype(np.float16 if dtypes == {np.dtype(np.float16)} else np.float32)
    elif dtypes <= {np.dtype(bool), np.dtype(np.uint8)}:
        stored = np.dtype(np.uint8)
    else:
        chunks = (block for source in given.values() for block in source.chunks())
        stored = np.dtype(np.uint8 if all(b.min() >= 0 and b.max() <= 255 for b in chunks) else np.float32)

    shape = tuple(given["train"].shape[1:])
    if len(shape) == 2:
        return StoredAs((1, *shape), stored, lambda block: block[:, None])
    if len(shape) == 3 and shape[2] in (1, 3) and shape[0] not in (1, 3):
        height, width, channels = shape
        note = f"{name}: x of shape (N, {height}, {width}, {channels}) is read as (N, H, W, C), stored as (N, C, H, W)."
        return StoredAs((channels, height, width), stored, lambda block: np.moveaxis(block, -1, 1), note)
    return StoredAs(shape, stored, lambda block: block)


def _finite_block(block: np.ndarray, dtype: np.dtype, called: str, first: int) -> np.ndarray:
    """A block of samples in the type that is stored; DataError for NaN and infinity. `first` is the index of its first one."""
    with np.errstate(over="ignore", invalid="ignore"):
        out = block.astype(dtype, copy=False)
    if dtype.kind == "f" and not (finite := np.isfinite(out)).all():
        bad = np.flatnonzero(~finite.reshape(len(out), -1).all(axis=1))
        value = out[bad[0]][~finite[bad[0]]][0]
        more = f" ({len(bad)} such samples in this block)" if len(bad) > 1 else ""
        raise DataError(
            f"{called}[{first + bad[0]}] holds {value}{more}. Give finite values within the range of {dtype}: "
            "drop such samples, or fill them with numpy.nan_to_num."
        )
    return out
