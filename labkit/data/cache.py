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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import platformdirs

from labkit.data.dataset import SPLITS, Dataset, digest_of, forget, is_whole
from labkit.errors import DataError
from labkit.locks import parsed

FORMAT = 1  # x and y
FORMAT_FIELDS = 2  # fields of any name
FORMAT_STREAMED = 3  # fields of any name that stay where they are (`labkit.data.streamed`)
CONVERSION = 3  # count up when what is made of the same files or arrays changes: what was made before is then made again
CHUNK_BYTES = 1 << 24  # samples are converted and checked in blocks of about this size
STEPS = 100  # values of a feature that are closer than 1 / STEPS of its range are merged: worth a word
SCALES_APART = 20  # between the largest values of the training and of the test split: worth a word
STALE_S = 86400  # a half-written folder older than this was left by a process that died

_PRINTED: set[str] = set()


@dataclass(frozen=True)
class Source:
    """One split on its way into the cache.

    `about` of the training split becomes a part of the data set's note; a function is called when all samples have been written.
    `channels` is where the channels are: "first", "last", "none", or None where the shape has to tell. `made` says that the samples
    were made out of files of another kind, so that equal ones were not given as such.

    A split with named fields is a dict of these, each with its role and without `y`; what is `as_given` is not normalised, and what is
    `padded` was filled up to one length.
    """

    shape: tuple[int, ...]  # (N, ...)
    dtype: np.dtype
    chunks: Callable[[], Iterable[np.ndarray]]  # all samples in order, a new iterator at each call
    y: np.ndarray | None = None
    about: str | Callable[[], str] = ""
    channels: str | None = None
    made: bool = False
    role: str = "input"
    as_given: bool = False
    padded: float | None = None  # with what shorter samples were filled up to one length
    classes: tuple[str, ...] | None = None  # the names of labels that were texts
    columns: tuple[str, ...] | None = None  # of a table, of which this is made


Split = Source | dict[str, Source]


def blocks(x: Any) -> Iterator[np.ndarray]:
    """The samples of an array, in memory or in a file, about CHUNK_BYTES at a time."""
    rows = rows_per_chunk(x.shape, x.dtype)
    return (x[at : at + rows] for at in range(0, x.shape[0], rows))


def in_blocks(x: np.ndarray, y: Any, about: str = "", channels: str | None = None) -> Source:
    """The split of an array."""
    return Source(x.shape, x.dtype, lambda: blocks(x), np.asarray(y), about, channels)


def one_by_one(
    make: Callable[[Any], np.ndarray],
    items: Sequence[Any],
    shape: tuple[int, ...],
    dtype: type,
    y: Any,
    about: str | Callable[[], str] = "",
) -> Source:
    """The split of the samples `make(item)`, each of `shape`, channels first, of which a block is in memory at a time."""
    shape, dtype = (len(items), *shape), np.dtype(dtype)
    rows = rows_per_chunk(shape, dtype)

    def chunks() -> Iterator[np.ndarray]:
        return (np.stack([make(item) for item in items[at : at + rows]]) for at in range(0, len(items), rows))

    return Source(shape, dtype, chunks, np.asarray(y), about, "first", made=True)


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
    name: str,
    key: str,
    load: Callable[[], tuple[Split, Split | None]],
    *,
    synthetic: bool = False,
    note: str = "",
    classes: Sequence[str] | None = None,
) -> Dataset:
    """The data set under `name` and `key`: opened where it is ready, else made from `load()`, its training and test split.

    Where the latter is None, a test split is held out. `note` is added to the data set's own, `classes` are their names. DataError
    where the samples or labels cannot be used, or the cache cannot be written.
    """
    path = folder_of(name, key)
    meta = ready(path)
    if meta is None:
        with replacing_folder(path, lambda: ready(path) is not None) as folder:
            meta = _write(folder, name, load, synthetic, classes)
    dataset = Dataset(path, {**meta, "classes": list(classes)} if classes else meta, note)
    if dataset.note:
        print_once(dataset.note)
    return dataset


def opened(path: Path) -> Dataset | None:
    """The data set in the folder `path` of this cache, as the record of a run names it; else None."""
    meta = ready(path) if is_of_cache(path) else None
    return None if meta is None else Dataset(path, meta)


def is_of_cache(path: Path) -> bool:
    """Is it a folder of this cache?"""
    return path.parent == (cache_dir() / "shards").resolve()


def folder_of(name: str, key: str) -> Path:
    """The folder of a data set in the cache."""
    return cache_dir() / "shards" / f"{re.sub(r'[^A-Za-z0-9._-]+', '_', name)}-{key[:20]}"


def ready(path: Path, formats: Sequence[int] = (FORMAT, FORMAT_FIELDS)) -> dict[str, Any] | None:
    """The `meta.json` of a data set that is whole, and of one of these formats; else None."""
    try:
        meta = json.loads((path / "meta.json").read_text())
        digest = meta.pop("digest", None)
        if meta["format"] not in formats or (digest is None and "digests" in meta) or (digest and digest != _digest(meta)):
            return None
        return meta if is_whole(path, meta["files"], meta.get("digests", {})) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None  # not made yet, or damaged: it is only a copy, and is made again


def write_meta(folder: Path, meta: dict[str, Any]) -> dict[str, Any]:
    """Write `meta.json` of a data set whose files are in the folder, with their digests and its own; returns what `ready` will."""
    meta = json.loads(json.dumps({**meta, "digests": {name: digest_of(folder / name) for name in meta["files"]}}))
    (folder / "meta.json").write_text(json.dumps({**meta, "digest": _digest(meta)}, indent=1))
    return meta


def _digest(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


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
                    forget(path)
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


def converted_key(*of: Any) -> str:
    """A key of what is converted, and of the way in which it is."""
    return hashlib.sha256(repr((CONVERSION, of)).encode()).hexdigest()


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


def _write(
    folder: Path, name: str, load: Callable[[], tuple[Split, Split | None]], synthetic: bool, classes: Sequence[str] | None
) -> dict[str, Any]:
    """Check the splits, write them into `folder`, and return the `meta.json` that was written beside them."""
    train, test = load()
    if isinstance(train, dict):
        return write_meta(folder, write_fields(folder, name, train, test, synthetic))
    given = {"train": train} if test is None else {"train": train, "test": test}
    _check_shapes(name, given)
    labels, n_classes, note = check_labels(name, given)
    stored = _stored_as(name, given)

    if test is None:
        held_out = hold_out(train.shape[0])
        labels = {"train": labels["train"][~held_out], "test": labels["train"][held_out]}
        rows = {"train": {"train": ~held_out, "test": held_out}}
    else:
        rows = {split: {split: np.ones(source.shape[0], dtype=bool)} for split, source in given.items()}
    ranges = {}
    for split, source in given.items():
        called = f"{name}: {_label('x', split, given)}"
        ranges[split] = _write_samples(folder, called, source, rows[split], stored)
        about = train.about() if callable(train.about) else train.about
        ranges[split].check(called, source.made, about)
    for split, y in labels.items():
        np.save(folder / f"y_{split}.npy", y)

    scale = 255 if stored.dtype == np.uint8 else 1
    mean, std = _moments(parsed(np.load, folder / "x_train.npy", "r", allow_pickle=False), scale)
    ranges["train"].check_normalised(f"{name}: {_label('x', 'train', given)}", scale * np.array(mean), scale * np.array(std))
    notes = (
        about,
        note,
        _withheld(name, labels),
        stored.note,
        *(found.note(name) for found in ranges.values()),
        _apart(name, ranges),
    )
    meta = {
        "format": FORMAT,
        "name": name,
        "shape": list(stored.shape),
        "n_classes": n_classes,
        "n": {split: len(labels[split]) for split in SPLITS},
        "scale": scale,
        "mean": mean,
        "std": std,
        "channels_last": stored.channels_last,
        "synthetic": synthetic,
        "held_out": test is None,
        "classes": list(classes) if classes else None,
        "note": " ".join(part for part in notes if part),
        "files": {f.name: f.stat().st_size for f in sorted(folder.glob("*.npy"))},
    }
    return write_meta(folder, meta)


def _write_samples(
    folder: Path | None,
    called: str,
    source: Source,
    rows: dict[str, np.ndarray],
    stored: StoredAs,
    stem: str = "x",
    moments: Moments | None = None,
) -> Ranges:
    """Write the samples of a source into `<stem>_<split>.npy` for each split in `rows`, a mask over the samples; their ranges.

    Without a folder they are only looked at, and their `moments` are taken.
    """
    ranges = Ranges(called.partition(": ")[2], stored)
    with _opened_files(folder, stem, rows, stored.shape, stored.dtype) as files:
        seen = 0
        for block in source.chunks():
            arranged = stored.arrange(block)
            part = _finite_block(arranged, stored.dtype, called, seen)
            ranges.add(arranged, part, seen)
            if moments:
                moments.add(part)
            for split, file in files.items():  # plain writes: a full disk is an error here, and a crash in a memory map
                file.write(part[rows[split][seen : seen + len(block)]].tobytes())
            seen += len(block)
    return ranges


@contextmanager
def _opened_files(
    folder: Path | None, stem: str, rows: dict[str, np.ndarray], shape: tuple[int, ...], dtype: np.dtype
) -> Iterator[dict[str, BinaryIO]]:
    """Files `<stem>_<split>.npy` with their headers, for the samples of each split in `rows`; none without a folder."""
    with ExitStack() as stack:
        files = {split: stack.enter_context(open(folder / f"{stem}_{split}.npy", "wb")) for split in rows if folder}
        for split, file in files.items():
            about = {"descr": dtype.str, "fortran_order": False, "shape": (int(rows[split].sum()), *shape)}
            np.lib.format.write_array_header_1_0(file, about)
        yield files


def write_fields(
    folder: Path, name: str, train: dict[str, Source], test: dict[str, Source] | None, synthetic: bool, *, copied: bool = True
) -> dict[str, Any]:
    """Check fields of any name, write them into `folder`, and return the `meta.json` to be written beside them.

    Where they are not to be `copied`, labels of one number a sample are written alone; what else there is, is looked at once.
    """
    splits = {"train": train} if test is None else {"train": train, "test": test}
    for split, fields in splits.items():
        counts = {_label(field, split, splits): source.shape[0] for field, source in fields.items()}
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"{field} {n}" for field, n in counts.items())
            raise DataError(f"{name}: fields have different numbers of samples: {listed}. Each sample needs all of them.")
        if min(counts.values()) < (2 if test is None else 1):
            raise DataError(f"{name}: the {split} split has {min(counts.values())} sample(s). Give 2 at least.")
    if test is None:
        held_out = hold_out(next(iter(train.values())).shape[0])
        rows = {"train": {"train": ~held_out, "test": held_out}}
    else:
        rows = {split: {split: np.ones(next(iter(f.values())).shape[0], dtype=bool)} for split, f in splits.items()}
    fields, notes, labels = {}, [], [source for source in train.values() if source.role == "label"]
    for number, field in enumerate(train):
        stem = field if re.fullmatch(r"[A-Za-z0-9._-]+", field) else f"field{number}"
        given = {split: own[field] for split, own in splits.items()}
        about = [source.about() if callable(source.about) else source.about for source in given.values()]
        write = _write_as_given if given["train"].as_given else _write_normalised
        fields[field], note = write(folder, name, field, stem, given, rows, copied)
        fields[field]["stem"] = stem
        if given["train"].columns:
            fields[field]["columns"] = list(given["train"].columns)
        notes += [*dict.fromkeys(about), note]
    meta = {
        "format": FORMAT_FIELDS,
        "name": name,
        "n": {split: sum(int(own[split].sum()) for own in rows.values() if split in own) for split in SPLITS},
        "fields": fields,
        "synthetic": synthetic,
        "held_out": test is None,
        "classes": next((list(s.classes) for s in train.values() if s.classes), None) if len(labels) == 1 else None,
        "note": " ".join(part for part in notes if part),
        "files": {f.name: f.stat().st_size for f in sorted(folder.glob("*.npy"))},
    }
    return meta


def _write_normalised(
    folder: Path,
    name: str,
    field: str,
    stem: str,
    given: dict[str, Source],
    rows: dict[str, dict[str, np.ndarray]],
    copied: bool = True,
) -> tuple[dict[str, Any], str]:
    """Write an input of images, volumes or features, with mean and standard deviation by channel; what of it is in the meta, a note."""
    if len(given["train"].shape) == 1:  # one number a sample
        given = {
            split: replace(source, shape=(*source.shape, 1), chunks=lambda source=source: (b[:, None] for b in source.chunks()))
            for split, source in given.items()
        }
    _check_shapes(name, given, field)
    stored = _stored_as(name, given, field)
    ranges, moments = {}, {split: None if copied else Moments() for split in given}
    for split, source in given.items():
        called = f"{name}: {_label(field, split, given)}"
        ranges[split] = _write_samples(folder if copied else None, called, source, rows[split], stored, stem, moments[split])
        ranges[split].check(called, source.made, "")
    scale = 255 if stored.dtype == np.uint8 else 1
    if copied:
        mean, std = _moments(parsed(np.load, folder / f"{stem}_train.npy", "r", allow_pickle=False), scale)
    else:
        mean, std = _as_given(*moments["train"].found(), scale)
    called = f"{name}: {_label(field, 'train', given)}"
    ranges["train"].check_normalised(called, scale * np.array(mean), scale * np.array(std))
    notes = (stored.note, *(found.note(name) for found in ranges.values()), _apart(name, ranges, field))
    about = {"shape": list(stored.shape), "dtype": "float32", "role": "input", "scale": scale, "mean": mean, "std": std}
    about["channels_last"] = stored.channels_last
    if not copied:
        about["stored"] = stored.dtype.str
    return about, " ".join(note for note in notes if note)


def _write_as_given(
    folder: Path,
    name: str,
    field: str,
    stem: str,
    given: dict[str, Source],
    rows: dict[str, dict[str, np.ndarray]],
    copied: bool = True,
) -> tuple[dict[str, Any], str]:
    """Write labels, targets, token ids and what else is not normalised; what of it is in the meta, and a note.

    Labels are checked to be 0..K-1 (in an array of labels those below 0 are left to the loss, to be ignored).
    """
    role, shape = given["train"].role, tuple(given["train"].shape[1:])
    for split, source in given.items():
        if source.shape[1:] != shape:
            raise DataError(
                f"{name}: samples of {_label(field, split, given)} have shape {source.shape[1:]}, those of "
                f"{_label(field, 'train', given)} {shape}. Both splits need the same."
            )
        if 0 in source.shape[1:]:
            raise DataError(f"{name}: {_label(field, split, given)} is empty, its shape is {source.shape}.")
    n_values, note, no_class = None, "", ()
    at = folder if copied or (role == "label" and not shape) else None
    if role == "label" and not shape:
        full = {s: np.concatenate(list(source.chunks())) for s, source in given.items()}
        try:
            labels, n_values, note = check_labels(name, {s: replace(source, y=full[s]) for s, source in given.items()}, field)
        except DataError as error:
            raise DataError(f"{error} If they are numbers to be predicted, give target={field!r}.") from None
        given = {s: in_blocks(labels[s], None) for s in given}
        full = {split: labels[of][mask] for of, masks in rows.items() for split, mask in masks.items()}
        note = " ".join(n for n in (note, _withheld(name, full)) if n)
    dtypes = {source.dtype for source in given.values()}
    if role == "label" and any(dtype.kind not in "biu" for dtype in dtypes):
        raise DataError(
            f"{name}: {field} is of type {dtypes.pop()}, and labels are integers 0..K-1. Give target={field!r} for numbers."
        )
    kept, dtype = _as_torch_has_it(np.result_type(*dtypes), role)
    low, high, present = np.inf, -np.inf, set()
    least, most = (np.full(shape, value) for value in (np.inf, -np.inf))  # of each number of a sample
    for split, source in given.items():
        called, seen = f"{name}: {_label(field, split, given)}", 0
        with _opened_files(at, stem, rows[split], shape, kept) as files:
            for block in source.chunks():
                part = _finite_block(block, kept, called, seen)
                least, most = np.minimum(least, part.min(axis=0)), np.maximum(most, part.max(axis=0))
                if kept.kind in "iu":
                    low, high = min(low, int(part.min())), max(high, int(part.max()))
                    if role == "label" and shape:
                        present |= set(np.unique(part).tolist())
                for own, file in files.items():
                    file.write(np.ascontiguousarray(part[rows[split][own][seen : seen + len(block)]]).tobytes())
                seen += len(block)
    if n_values is None and kept.kind in "iu" and role != "target":
        n_values, no_class, note = count_classes(f"{name}: {field}", present) if present else (int(high) + 1, (), "")
    if not (role == "label" and not shape):
        note = " ".join(n for n in (note, _constant(f"{name}: {field}", least, most)) if n)
    about = {"shape": list(shape), "dtype": str(dtype), "role": role, "n_values": n_values, "no_class": no_class}
    about |= {} if given["train"].padded is None else {"pad": given["train"].padded}
    return about if at else {**about, "stored": kept.str}, note


def _constant(called: str, least: np.ndarray, most: np.ndarray) -> str:
    """A note on what is the same in all samples, of a field whose numbers go from `least` to `most`."""
    same = np.flatnonzero(least == most)
    if len(same) == least.size and least.min() == most.max():
        return f"{called} is {least.flat[0]:g} in all samples."
    if len(same) and least.ndim == 1:
        return f"{called}: {len(same)} of {least.size} numbers are the same in all samples ({_listed(same)})."
    return ""


def count_classes(called: str, present: set[int]) -> tuple[int, tuple[int, ...], str]:
    """K of arrays of labels that hold the values `present`; those that are no class, and a note on them.

    No class is what is below 0, and one value far above all others: 255, usually. DataError where fewer than half of 0..K-1 occur.
    """
    values, no_class = sorted(value for value in present if value >= 0), sorted(value for value in present if value < 0)
    if len(values) > 2 and (2 * len(values) < values[-1] + 1 or values[-1] == 255 > values[-2] + 1):
        no_class.append(values.pop())
    if 2 * len(values) < (values or [0])[-1] + 1:
        raise DataError(
            f"{called} holds {len(present)} different labels, {min(present)} to {max(present)}. Labels are 0..K-1: number them, for instance "
            "by numpy.unique(y, return_inverse=True)."
        )
    listed = ", ".join(map(str, no_class))
    note = f"{called} is {listed} in places: that is no class, and the loss has to ignore it (ignore_index)." if no_class else ""
    return values[-1] + 1, tuple(no_class), note


def _as_torch_has_it(dtype: np.dtype, role: str) -> tuple[np.dtype, np.dtype]:
    """The type in which a field that is not normalised is stored, and the one in which batches have it."""
    if dtype.kind == "f":
        return (dtype, dtype) if dtype.itemsize <= 4 else (np.dtype(np.float32),) * 2
    if dtype.kind == "b" and role == "label":
        return np.dtype(np.uint8), np.dtype(np.int64)
    if dtype.kind == "b":
        return (np.dtype(np.float32 if role == "target" else bool),) * 2
    return (dtype if dtype != np.uint64 else np.dtype(np.int64)), np.dtype(np.int64)


def _moments(x: np.ndarray, scale: int) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel (axis 1) of x / scale, in float64, in two passes."""
    rows = rows_per_chunk(x.shape, np.dtype(np.float64))
    axes = (0, *range(2, x.ndim))
    count = x.size // x.shape[1]
    blocks = [slice(at, at + rows) for at in range(0, len(x), rows)]
    mean = np.add.reduce([x[b].sum(axis=axes, dtype=np.float64) for b in blocks]) / count
    wide = mean.reshape(1, -1, *(1,) * (x.ndim - 2))
    std = np.sqrt(np.add.reduce([np.square(x[b] - wide).sum(axis=axes) for b in blocks]) / count)
    return _as_given(mean, std, scale)


def _as_given(mean: np.ndarray, std: np.ndarray, scale: int) -> tuple[list[float], list[float]]:
    std = np.where(std <= 1e-7 * np.abs(mean), scale, std)  # a constant channel is only centred
    return (mean / scale).tolist(), (std / scale).tolist()


class Moments:
    """Mean and standard deviation of each channel of what passes once, block by block, in float64 (Chan, Golub, LeVeque 1979)."""

    def __init__(self) -> None:
        self.n, self.mean, self.squares = 0, np.zeros(1), np.zeros(1)

    def add(self, block: np.ndarray) -> None:
        """A block of samples (n, C, ...)."""
        axes, n = (0, *range(2, block.ndim)), block.size // block.shape[1]
        mean = block.mean(axis=axes, dtype=np.float64)
        spread = block - mean.reshape(1, -1, *(1,) * (block.ndim - 2))
        share, apart = n / (self.n + n), mean - self.mean
        self.squares = self.squares + np.square(spread, out=spread).sum(axis=axes) + np.square(apart) * self.n * share
        self.mean, self.n = self.mean + apart * share, self.n + n

    def found(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation (C,) each."""
        return self.mean, np.sqrt(self.squares / self.n)


# -- what a data set must be -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredAs:
    """How samples are stored: shape of one, type, how a block is rearranged to it, a note on it, and were their channels the last axis?"""

    shape: tuple[int, ...]
    dtype: np.dtype
    arrange: Callable[[np.ndarray], np.ndarray]
    note: str = ""
    channels_last: bool = False


def _label(letter: str, split: str, splits: Any) -> str:
    return letter if len(splits) == 1 else f"{letter}_{split}"


def _check_shapes(name: str, given: dict[str, Source], field: str = "x") -> None:
    """Raise DataError unless each split is (N, ...) with 2 to 5 axes, none empty, and all samples have one shape."""
    shapes = {split: source.shape for split, source in given.items()}
    for split, shape in shapes.items():
        x = _label(field, split, shapes)
        if not 2 <= len(shape) <= 5:
            hint = " For one number a sample use x[:, None]." if len(shape) == 1 else ""
            raise DataError(
                f"{name}: {x} has shape {shape}. Give (N, F) features, (N, H, W) or (N, C, H, W) images, or "
                f"(N, C, D, H, W) volumes.{hint}"
            )
        if 0 in shape:
            raise DataError(f"{name}: {x} is empty, its shape is {shape}. Give at least one sample with one value.")
    if len(shapes) == 1 and shapes["train"][0] < 2:
        raise DataError(f"{name}: {field} holds 1 sample, and a test split has to be held out. Give 2 samples at least.")
    if len({shape[1:] for shape in shapes.values()}) > 1:
        raise DataError(
            f"{name}: samples of {field}_train have shape {shapes['train'][1:]}, those of {field}_test {shapes['test'][1:]}. "
            "Both splits need the same."
        )


def check_labels(name: str, given: dict[str, Source], field: str = "y") -> tuple[dict[str, np.ndarray], int, str]:
    """Labels as int64, the number of classes K (the largest training label plus 1), and a note; DataError for wrong ones."""
    labels = {split: _integers(f"{name}: {_label(field, split, given)}", s.y, s.shape[0]) for split, s in given.items()}
    y_train = _label(field, "train", given)
    n_classes = int(labels["train"].max()) + 1
    if "test" in labels and (beyond := labels["test"] >= n_classes).any():
        at = int(beyond.argmax())
        raise DataError(
            f"{name}: {field}_test[{at}] is {labels['test'][at]}, but the labels of {y_train} end at {n_classes - 1}. "
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


UNIQUE = " Renumber them with y = numpy.unique(y, return_inverse=True)[1]."


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
        advice = ""
        if np.isfinite(y[at]) and y[at] != np.floor(y[at]):
            advice = " For numbers to be predicted give open_dataset(..., target='y')."
        elif np.isfinite(y).all() and y[at] < 0:
            values = np.unique(y).astype(np.float64)
            even = len(values) == values[-1] - values[0] + 1
            advice = (
                f" They are {values[0]:.0f}..{values[-1]:.0f}: use y + {-values[0]:.0f}, or leave out what is no class."
                if even
                else UNIQUE
            )
        raise DataError(f"{called}[{at}] is {y[at]}. Labels are whole numbers 0..K-1: nothing below 0, or beyond K-1.{advice}")
    return y.astype(np.int64)


def _stored_as(name: str, given: dict[str, Source], field: str = "x") -> StoredAs:
    """Booleans, bytes, and integers within 0..255 become uint8; float16 stays; everything else becomes float32."""
    for split, source in given.items():
        if source.dtype.kind not in "biuf":
            raise DataError(
                f"{name}: {_label(field, split, given)} is of type {source.dtype}. Give booleans, integers or floats; "
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

    shape, channels = tuple(given["train"].shape[1:]), given["train"].channels
    written, axes = f"(N, {', '.join(map(str, shape))})", ("D", "H", "W")[-max(len(shape) - 1, 1) :]
    if len(shape) == 1:
        if channels in ("last", "none"):
            raise DataError(f"{name}: {field} of shape {written} has features and no channels. Leave channels={channels!r} out.")
        return StoredAs(shape, stored, lambda block: block)
    if len(shape) == 2 or channels == "none":
        if len(shape) > 3 or (len(shape) == 2 and channels not in (None, "none")):
            raise DataError(f"{name}: {field} has shape {written}, which does not fit channels={channels!r}.")
        note = f"{name}: {field} of shape {written} is read as pictures of {'x'.join(map(str, shape))} with one channel."
        note += f" Give channels='none' if they are; for sequences (N, steps, features) a dict of arrays, with as_given={field!r}."
        return StoredAs((1, *shape), stored, lambda block: block[:, None], "" if channels else note)
    where = channels or _where_channels_are(shape)
    if where is None:
        raise DataError(
            f"{name}: the shape {written} does not tell which axis holds the channels. Give open_dataset(..., channels='first') "
            f"for (N, C, {', '.join(axes)}), 'last' for (N, {', '.join(axes)}, C)"
            + (", or 'none' for volumes (N, D, H, W) without channels." if len(shape) == 3 else ".")
        )
    if where == "last":
        note = f"{name}: {field} of shape {written} is read as (N, {', '.join(axes)}, C), stored as (N, C, {', '.join(axes)})."
        if channels is None and shape[-1] not in (1, 3):
            note += f" Give channels='first'{' or ' + repr('none') if len(shape) == 3 else ''} if it is not."
        return StoredAs((shape[-1], *shape[:-1]), stored, lambda block: np.moveaxis(block, -1, 1), note, channels_last=True)
    if channels is None and shape[0] > FEW:
        others = "'last' or 'none'" if len(shape) == 3 else "'last'"
        note = f"{name}: {field} of shape {written} is read as {shape[0]} channels of {'x'.join(map(str, shape[1:]))}."
        return StoredAs(shape, stored, lambda block: block, f"{note} Give channels={others} if it is not.")
    return StoredAs(shape, stored, lambda block: block)


FEW = 4  # channels: more are rarely meant without a word


def _where_channels_are(shape: tuple[int, ...]) -> str | None:
    """ "first" or "last", as far as the shape of a picture or volume tells it; else None."""
    one, other, first, last = shape[0], shape[-1], set(shape[1:]), set(shape[:-1])
    if one in (1, 3) and other not in (1, 3):
        return "first"
    if (len(first) == 1) != (len(last) == 1):  # all other sides are equal
        return "first" if len(first) == 1 else "last"
    if other in (1, 3) and one not in (1, 3):
        return "last"
    if one == 1:
        return "first"
    if one <= FEW and other <= FEW:
        return None
    if (one <= FEW and one < min(first)) or 2 * one <= min(first):
        return "first"
    if (other <= FEW and other < min(last)) or 2 * other <= min(last):
        return "last"
    return None


class Ranges:
    """The lowest and highest value of each channel or feature of a split, as given and as stored, and which samples are uniform.

    Tells what a conversion has made equal, and what was so before.
    """

    def __init__(self, x: str, stored: StoredAs) -> None:
        self.x, self.stored, self.n = x, stored, 0
        self.low = self.high = self.low_stored = self.high_stored = None
        self.uniform: list[int] = []  # samples of one value everywhere
        self.first: np.ndarray | None = None  # a sample, as long as all others are equal to it

    def add(self, given: np.ndarray, stored: np.ndarray, first: int) -> None:
        axes = (0, *range(2, stored.ndim))
        self.low_stored, self.high_stored = self._joined(self.low_stored, self.high_stored, stored, axes)
        self.low, self.high = (
            (self.low_stored, self.high_stored)
            if np.can_cast(given.dtype, stored.dtype)
            else self._joined(self.low, self.high, given, axes)
        )
        if stored.ndim > 2:
            flat = stored.reshape(len(stored), -1)
            self.uniform += (first + np.flatnonzero(flat.min(axis=1) == flat.max(axis=1))).tolist()
        if not self.n:
            self.first = stored[0].copy()
        if self.first is not None and not (stored == self.first).all():
            self.first = None
        self.n += len(stored)

    @staticmethod
    def _joined(low: Any, high: Any, block: np.ndarray, axes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        found = block.min(axis=axes), block.max(axis=axes)
        return found if low is None else (np.minimum(low, found[0]), np.maximum(high, found[1]))

    def check(self, called: str, made: bool, about: str) -> None:
        """DataError where what differed has become equal."""
        lost = np.flatnonzero((self.low < self.high) & (self.low_stored == self.high_stored))
        if len(lost):
            at = lost[0]
            more = f" ({len(lost)} such)" if len(lost) > 1 else ""
            raise DataError(
                f"{called}: {self._what()} {at}{more} goes from {self.low[at]} to {self.high[at]}, which is one value, "
                f"{self.low_stored[at]}, in {self.stored.dtype}. Subtract its mean or rescale it."
            )
        if made and (self.low_stored.min() == self.high_stored.max()):
            raise DataError(
                f"{called}: all {self.n} samples are {self.low_stored[0]} everywhere after conversion: nothing is left in them. "
                f"{about}"
            )

    def check_normalised(self, called: str, mean: np.ndarray, std: np.ndarray) -> None:
        """DataError where a value that is stored cannot be normalised in float32."""
        with np.errstate(all="ignore"):
            centre, rate = mean.astype(np.float32), (1 / std).astype(np.float32)
            ends = [(end.astype(np.float32) - centre) * rate for end in (self.low_stored, self.high_stored)]
        wrong = np.flatnonzero(~np.isfinite(ends).all(axis=0) | (rate == 0))
        if len(wrong):
            at = wrong[0]
            raise DataError(
                f"{called}: {self._what()} {at} goes from {self.low_stored[at]} to {self.high_stored[at]}, beyond what can be "
                "normalised in float32. Rescale it."
            )

    def note(self, name: str) -> str:
        constant = np.flatnonzero(self.low_stored == self.high_stored)
        n, said = len(self.low_stored), []
        if len(constant) and self.low_stored.min() == self.high_stored.max():
            said.append(f"{name}: {self.x} is {self.low_stored[0]} everywhere: nothing can be learned from it.")
        elif self.first is not None and self.n > 1:
            said.append(f"{name}: all samples of {self.x} are equal: nothing can be learned from it.")
        elif len(constant):
            said.append(f"{name}: {len(constant)} of {n} {self._what()}s of {self.x} are constant ({_listed(constant)}).")
        elif self.uniform:
            where = _listed(self.uniform)
            said.append(f"{name}: one value everywhere: {len(self.uniform)} of {self.n} samples of {self.x} (indices {where}).")
        if self.low is not self.low_stored:
            with np.errstate(all="ignore"):
                step = np.spacing(np.maximum(np.abs(self.low_stored), np.abs(self.high_stored)).astype(self.stored.dtype))
                span = self.high.astype(np.float64) - self.low.astype(np.float64)
                coarse = np.flatnonzero((span > 0) & (span < STEPS * step) & ((step > 1) | (self.low.dtype.kind == "f")))
            if len(coarse):
                at, what = coarse[0], self._what()
                said.append(
                    f"{name}: {what} {_listed(coarse)} of {self.x} is coarser in {self.stored.dtype}: {what} {at} goes from "
                    f"{self.low[at]} to {self.high[at]} in steps of {step[at]:g}. Subtract its mean to keep them apart."
                )
        return " ".join(said)

    def _what(self) -> str:
        return "feature" if len(self.stored.shape) == 1 else "channel"


def _listed(found: Sequence[int], most: int = 5) -> str:
    return ", ".join(map(str, found[:most])) + ", ..." * (len(found) > most)


def _apart(name: str, ranges: dict[str, Ranges], field: str = "x") -> str:
    """A note where the two splits cannot be of one scale."""
    if len(ranges) < 2:
        return ""
    train, test = (max(abs(float(r.low_stored.min())), abs(float(r.high_stored.max()))) for r in ranges.values())
    if max(train, test) <= SCALES_APART * min(train, test):
        return ""
    return f"{name}: values reach {train:g} in {field}_train and {test:g} in {field}_test. Scale both splits in one way."


def _withheld(name: str, labels: dict[str, np.ndarray]) -> str:
    """A note on classes of which the training split has nothing, though the test split has; and on labels that are all one."""
    train, test = np.unique(labels["train"]), np.unique(labels["test"])
    if len(train) == 1 and not len(np.setdiff1d(test, train)):
        return f"{name}: all labels are {train[0]}: there is one class, and any network is right."
    if len(only := np.setdiff1d(test, train)):
        return f"{name}: all samples of class {_listed(only)} are in the test split. Give more samples, or a test split."
    return ""


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
