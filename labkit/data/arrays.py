"""Users' own arrays: in memory, in a folder of `.npy` or in HDF5, read in blocks so that a file may be larger than memory.

Nothing is unpickled: arrays of Python objects are refused by name.

Used by `labkit.data.open_dataset`, whose docstring says what each of them must hold.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from labkit.data.cache import Source, cached, file_key, rows_per_chunk
from labkit.data.dataset import Dataset
from labkit.errors import DataError

FOUR = ("x_train", "y_train", "x_test", "y_test")


def from_arrays(data: Sequence[Any]) -> Dataset:
    """The data set of `(x, y)` or `(x_train, y_train, x_test, y_test)`, known again by the SHA-256 of its content."""
    if len(data) not in (2, 4):
        raise DataError(f"{len(data)} arrays were given. Give two, (x, y), or four, ({', '.join(FOUR)}).")
    called = FOUR if len(data) == 4 else ("x", "y")
    held = {name: _array(name, value) for name, value in zip(called, data, strict=True)}
    digest = hashlib.sha256()
    for array in held.values():
        digest.update(f"{array.dtype.str} {array.shape}".encode())
        for block in _blocks(array) if array.ndim else [array]:
            digest.update(np.ascontiguousarray(block).view(np.uint8).data if block.size else b"")
    return cached("arrays", digest.hexdigest(), lambda: _splits(held))


def _array(name: str, value: Any) -> np.ndarray:
    try:
        array = np.asarray(value)
    except (ValueError, TypeError) as error:
        raise DataError(f"arrays: {name} is no array: {error}. Give numpy arrays.") from error
    if array.dtype.hasobject:
        raise DataError(f"arrays: {name} is of type object. Give arrays of numbers, all samples of one shape.")
    return array


def _blocks(x: Any) -> Iterator[np.ndarray]:
    rows = rows_per_chunk(x.shape, x.dtype)
    for at in range(0, x.shape[0], rows):
        yield x[at : at + rows]


def _splits(held: Mapping[str, np.ndarray]) -> tuple[Source, Source | None]:
    def source(x: np.ndarray, y: np.ndarray) -> Source:
        return Source(x.shape, x.dtype, lambda: _blocks(x), np.asarray(y))

    if "x" in held:
        return source(held["x"], held["y"]), None
    train = source(held["x_train"], held["y_train"])
    return train, source(held["x_test"], held["y_test"]) if "x_test" in held else None


def _which(present: Iterable[str], where: str, optional_test: bool) -> tuple[str, ...]:
    """Which of the known names are there, x before y; DataError where they make no data set."""
    present = set(present)
    if not optional_test and not present & set(FOUR):
        names: tuple[str, ...] = ("x", "y")
    elif optional_test and not present & set(FOUR[2:]):
        names = FOUR[:2]
    else:
        names = FOUR
    if missing := [name for name in names if name not in present]:
        raise DataError(f"{where} lacks {', '.join(missing)}; it has {', '.join(sorted(present)) or 'nothing'}.")
    return names


def from_npy(path: Path) -> Dataset:
    """The data set in a folder of `.npy` files."""
    present = [file.stem for file in path.glob("*.npy")]
    if not present:
        raise DataError(
            f"{path} holds no .npy files, no batches of CIFAR-10, and no folders with pictures or volumes. Put x_train.npy "
            "and y_train.npy there, or a folder for each class."
        )
    called = _which(present, str(path), optional_test=True)
    files = [path / f"{name}.npy" for name in called]

    def load() -> tuple[Source, Source | None]:
        return _splits({file.stem: _npy(file) for file in files})

    return cached(path.name, file_key(files), load)


def _npy(path: Path) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read: {error} Write it with numpy.save from an array of numbers.") from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise DataError(f"{path} is an .npz archive. Write each array with numpy.save.")
    return array


def from_hdf5(path: Path) -> Dataset:
    """The data set in an HDF5 file."""
    return cached(path.stem, file_key([path]), lambda: _hdf5(path))


def _hdf5(path: Path) -> tuple[Source, Source | None]:
    import h5py

    def source(x_name: str, y_name: str) -> Source:
        x, y = file[x_name], file[y_name]
        for name, held in ((x_name, x), (y_name, y)):
            if not isinstance(held, h5py.Dataset) or held.shape is None:
                raise DataError(f"{path}: {name} is no array. Store it with create_dataset.")
            if held.dtype.hasobject:
                raise DataError(f"{path}: {name} is of type {held.dtype}, of no fixed size. Store numbers.")
        return Source(x.shape, x.dtype, lambda: _hdf5_blocks(path, x_name), y[()])

    try:
        with h5py.File(path, "r") as file:
            called = _which(file.keys(), str(path), optional_test=False)
            train = source(*called[:2])
            return train, source(*called[2:]) if len(called) == 4 else None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}. Is it a whole HDF5 file?") from error


def _hdf5_blocks(path: Path, name: str) -> Iterator[np.ndarray]:
    import h5py

    try:
        with h5py.File(path, "r") as file:
            yield from _blocks(file[name])
    except OSError as error:
        raise DataError(f"{path} cannot be read: {name}: {error}. Write it again.") from error
