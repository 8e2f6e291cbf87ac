"""Users' own arrays: in memory, in a folder of `.npy` or in HDF5, read in blocks and never unpickled.

Used by `labkit.data.open_dataset`, whose docstring lists what each of them must contain.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from labkit.data import columns, hdf5
from labkit.data.cache import Source, blocks, cached, converted_key, file_key, in_blocks, reading
from labkit.data.columns import Asked
from labkit.data.dataset import Dataset
from labkit.errors import DataError
from labkit.locks import parsed

LISTED = 12  # names that a note lists
FOUR = ("x_train", "y_train", "x_test", "y_test")


def from_arrays(data: Sequence[Any], channels: str | None = None) -> Dataset:
    """The data set of `(x, y)` or `(x_train, y_train, x_test, y_test)`, identified by the SHA-256 of its content.

    `channels` is "first", "last" or "none", None where the shape tells.
    """
    if len(data) not in (2, 4):
        raise DataError(f"{len(data)} arrays were given. Give two, (x, y), or four, ({', '.join(FOUR)}).")
    called = FOUR if len(data) == 4 else ("x", "y")
    arrays = [array_of(name, value) for name, value in zip(called, data, strict=True)]
    for at in range(0, len(data), 2):
        _check_order(called[at : at + 2], *data[at : at + 2])
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str} {array.shape}".encode())
        for block in blocks(array) if array.ndim else [array]:
            digest.update(np.ascontiguousarray(block).view(np.uint8).data if block.size else b"")
    return cached("arrays", converted_key(digest.hexdigest(), channels), lambda: _splits(arrays, channels))


def from_pair(data: Sequence[Any], asked: Asked) -> Dataset:
    """The data set of `(x, y)` or of the four; as columns where `y` is asked for as something, or is texts or an array a sample, or
    where samples have different lengths."""
    names = FOUR if len(data) == 4 else ("x", "y")
    if len(data) in (2, 4) and (asked.says_roles or any(map(_is_column, data[1::2])) or any(map(_is_ragged, data[::2]))):
        for at in range(0, len(data), 2):
            _check_order(names[at : at + 2], *data[at : at + 2])
        own = {name: _is_text(value) or _is_ragged(value) for name, value in zip(names, data, strict=True)}
        arrays = {name: value if own[name] else array_of(name, value) for name, value in zip(names, data, strict=True)}
        return columns.from_mapping(arrays, asked)
    return from_arrays(data, asked.channels)


def _is_column(y: Any) -> bool:
    if hasattr(y, "iloc") or isinstance(y, list | tuple):
        return _is_text(y) or (isinstance(y, list) and len(y) > 0 and isinstance(y[0], list) and len(y[0]) > 1)
    shape = tuple(getattr(y, "shape", ()))
    return _is_text(y) or (len(shape) > 1 and math.prod(shape[1:]) > 1)


def _is_ragged(x: Any) -> bool:
    """Are these samples of different lengths?"""
    if not isinstance(x, list | tuple) and getattr(getattr(x, "dtype", None), "kind", "") != "O":
        return False
    try:
        return len({len(sample) for sample in x}) > 1 and not any(isinstance(sample, str) for sample in x)
    except TypeError:  # numbers
        return False


def _is_text(y: Any) -> bool:
    values = y.tolist() if hasattr(y, "dtype") and getattr(y, "ndim", 0) == 1 and not hasattr(y, "detach") else y
    return isinstance(values, list) and len(values) > 0 and all(isinstance(value, str) for value in values)


def array_of(name: str, value: Any) -> np.ndarray:
    """An array of numbers of a user, which messages call `name`; DataError for what is none."""
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        at = int(np.flatnonzero(np.ma.getmaskarray(value).reshape(len(value), -1).any(axis=1))[0]) if value.ndim else 0
        raise DataError(f"arrays: {name}[{at}] is masked. Fill or drop masked values: what is below a mask would be read.")
    try:
        array = np.asarray(columns.detached(value))
    except (ValueError, TypeError, RuntimeError) as error:
        if "inhomogeneous" in str(error):
            advice = "Give all of them one shape, or shapes that differ along the first axis alone, with pad=0."
            raise DataError(f"arrays: samples of {name} have different shapes. {advice}") from error
        raise DataError(f"arrays: {name} is no array: {error}. Give numpy arrays.") from error
    if array.dtype.hasobject:
        if name.startswith("y"):
            raise DataError(
                f"arrays: {name} is of type object. Labels are 0..K-1: use y = numpy.unique(y, return_inverse=True)[1]."
            )
        hint = " For a DataFrame use x.to_numpy(float), for categories their codes." if hasattr(value, "iloc") else ""
        raise DataError(f"arrays: {name} is of type object. Give arrays of numbers, all samples of one shape.{hint}")
    return array


def _check_order(names: Sequence[str], x: Any, y: Any) -> None:
    """DataError where x and y are of pandas and have other indexes: rows are taken by their position here."""
    if all(hasattr(part, "iloc") for part in (x, y)) and len(x) == len(y) and not x.index.equals(y.index):
        raise DataError(
            f"arrays: {names[0]} and {names[1]} have different indexes, and rows are taken by position. Align them "
            "(y = y.loc[x.index]), or drop both indexes with reset_index(drop=True)."
        )


def _splits(arrays: Sequence[np.ndarray], channels: str | None, about: str = "") -> tuple[Source, Source | None]:
    x, y, *test = arrays
    return in_blocks(x, y, about, channels), in_blocks(*test, channels=channels) if test else None


def _left_out(path: Path, names: Iterable[str], taken: Iterable[str]) -> str:
    """What of `names` in `path` is not read, for the note; "" where all is."""
    left = sorted(set(names) - set(taken))
    if not left:
        return ""
    listed = ", ".join(left[:LISTED]) + ", ..." * (len(left) > LISTED)
    return f"{path.name}: {', '.join(taken)} are read; left out: {listed}."


def _which(path: Path, present: Iterable[str], fewer: tuple[str, str]) -> tuple[str, ...]:
    """All four names, or the two `fewer` where only these make a data set; DataError where one of them is missing."""
    present = set(present)
    names = FOUR if present & (set(FOUR) - set(fewer)) else fewer
    if missing := [name for name in names if name not in present]:
        advice = "" if fewer == FOUR[:2] else " Give label=..., target=... or inputs=... for other names."
        raise DataError(f"{path} lacks {', '.join(missing)}; it has {', '.join(sorted(present)) or 'nothing'}.{advice}")
    return names


def from_npy(path: Path, channels: str | None = None) -> Dataset:
    """The data set in a folder of `.npy` files."""
    present = [file.stem for file in path.glob("*.npy")]
    if not present:
        raise DataError(
            f"{path} holds no .npy files, no batches of CIFAR-10, and no folders with pictures or volumes. Put x_train.npy "
            f"and y_train.npy there, or a folder for each class.{_held(path)}"
        )
    files = [path / f"{name}.npy" for name in _which(path, present, FOUR[:2])]
    beside = [file.name for file in path.iterdir() if not file.name.startswith(".")]
    about = _left_out(path, beside, [file.name for file in files])
    key = converted_key(file_key(files), channels, about)
    return cached(path.name, key, lambda: _splits([_npy(file) for file in files], channels, about))


def _held(path: Path) -> str:
    """What files there are in a folder that nothing reads, for its message."""
    kinds = Counter(file.suffix or "without a suffix" for file in islice(path.rglob("*"), 10_000) if file.is_file())
    return f" It holds {', '.join(f'{n} {kind}' for kind, n in kinds.most_common(5))} files." if kinds else ""


def _npy(path: Path) -> np.ndarray:
    with reading(path, advice="Write it with numpy.save from an array of numbers."):
        array = parsed(np.load, path, mmap_mode="r", allow_pickle=False)
    if not isinstance(array, np.ndarray):
        array.close()
        raise DataError(f"{path} is an .npz archive. Write each array with numpy.save.")
    return array


def from_hdf5(path: Path, asked: Asked, *, external: bool = False) -> Dataset:
    """The data set in an HDF5 file: of `x` and `y`, or of the columns that are asked for by name."""
    files = file_key([path, *(hdf5.named_files(path) if external else ())])
    if asked.says_roles:
        return columns.stored(path.stem, files, lambda: _hdf5_columns(path, asked, external), asked)
    channels = asked.channels
    return cached(path.stem, converted_key(files, channels), lambda: _hdf5(path, channels, external))


def _hdf5(path: Path, channels: str | None, external: bool) -> tuple[Source, Source | None]:
    def source(x_name: str, y_name: str) -> Source:
        return replace(
            _hdf5_column(path, file, x_name, external), y=_hdf5_held(path, file, y_name)[()], about=about, channels=channels
        )

    with hdf5.opened(path, external) as file:
        x, y, *test = taken = _which(path, file, ("x", "y"))
        about = _left_out(path, file, taken)
        return source(x, y), source(*test) if test else None


def _hdf5_columns(path: Path, asked: Asked, external: bool) -> dict[str, columns.Columns]:
    """All arrays of an HDF5 file as columns, by split where all names end in _train or _test."""
    with hdf5.opened(path, external) as file:
        held = list(file)
        splits = {"train": dict(zip(held, held, strict=True))}
        if all(name.endswith(("_train", "_test")) for name in held):
            splits = {s: {name.removesuffix(f"_{s}"): name for name in held if name.endswith(f"_{s}")} for s in ("train", "test")}
        read = columns.read(splits["train"], asked)
        about = columns.unread(path.stem, splits["train"], read)
        return {
            split: columns.noting(
                {c: _hdf5_column(path, file, name, external, asked, c) for c, name in found.items() if c in read}, about
            )
            for split, found in splits.items()
            if found
        }


def _hdf5_held(path: Path, file: hdf5.Members, name: str) -> Any:
    import h5py

    held = file[name]
    if not isinstance(held, h5py.Dataset) or held.shape is None:
        raise DataError(f"{path}: {name} is no array. Store it with create_dataset.")
    if held.dtype.hasobject:
        raise DataError(f"{path}: {name} is of type {held.dtype}, of no fixed size. Store numbers.")
    return held


def _hdf5_column(path: Path, file: hdf5.Members, name: str, external: bool, asked: Asked | None = None, column: str = "") -> Source:
    import h5py

    held = file[name]
    if asked is not None and isinstance(held, h5py.Dataset) and held.shape and held.dtype.hasobject:
        texts = h5py.check_string_dtype(held.dtype) is not None
        value = list(held.asstr()[()] if texts else held[()])
        return columns.of_arrays(path.stem, {"train": {column: columns.in_memory(path.stem, column, value)}}, asked)["train"][
            column
        ]
    held = _hdf5_held(path, file, name)

    def chunks() -> Iterator[np.ndarray]:
        with hdf5.opened(path, external) as again:
            yield from (np.char.decode(block, "utf-8") if block.dtype.kind == "S" else block for block in blocks(again[name]))

    return Source(held.shape, np.dtype(f"U{held.dtype.itemsize}") if held.dtype.kind == "S" else held.dtype, chunks)
