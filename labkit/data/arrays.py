"""Users' own arrays: in memory, in a folder of `.npy` or in HDF5, read in blocks and never unpickled.

Used by `labkit.data.open_dataset`, whose docstring lists what each of them must contain.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from labkit.data.cache import Source, blocks, cached, file_key, in_blocks, reading
from labkit.data.dataset import Dataset
from labkit.errors import DataError

FOUR = ("x_train", "y_train", "x_test", "y_test")


def from_arrays(data: Sequence[Any]) -> Dataset:
    """The data set of `(x, y)` or `(x_train, y_train, x_test, y_test)`, identified by the SHA-256 of its content."""
    if len(data) not in (2, 4):
        raise DataError(f"{len(data)} arrays were given. Give two, (x, y), or four, ({', '.join(FOUR)}).")
    called = FOUR if len(data) == 4 else ("x", "y")
    arrays = [_array(name, value) for name, value in zip(called, data, strict=True)]
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str} {array.shape}".encode())
        for block in blocks(array) if array.ndim else [array]:
            digest.update(np.ascontiguousarray(block).view(np.uint8).data if block.size else b"")
    return cached("arrays", digest.hexdigest(), lambda: _splits(arrays))


def _array(name: str, value: Any) -> np.ndarray:
    try:
        array = np.asarray(value)
    except (ValueError, TypeError) as error:
        raise DataError(f"arrays: {name} is no array: {error}. Give numpy arrays.") from error
    if array.dtype.hasobject:
        raise DataError(f"arrays: {name} is of type object. Give arrays of numbers, all samples of one shape.")
    return array


def _splits(arrays: Sequence[np.ndarray]) -> tuple[Source, Source | None]:
    x, y, *test = arrays
    return in_blocks(x, y), in_blocks(*test) if test else None


def _which(path: Path, present: Iterable[str], fewer: tuple[str, str]) -> tuple[str, ...]:
    """All four names, or the two `fewer` where only these make a data set; DataError where one of them is missing."""
    present = set(present)
    names = FOUR if present & (set(FOUR) - set(fewer)) else fewer
    if missing := [name for name in names if name not in present]:
        raise DataError(f"{path} lacks {', '.join(missing)}; it has {', '.join(sorted(present)) or 'nothing'}.")
    return names


def from_npy(path: Path) -> Dataset:
    """The data set in a folder of `.npy` files."""
    present = [file.stem for file in path.glob("*.npy")]
    if not present:
        raise DataError(
            f"{path} holds no .npy files, no batches of CIFAR-10, and no folders with pictures or volumes. Put x_train.npy "
            "and y_train.npy there, or a folder for each class."
        )
    files = [path / f"{name}.npy" for name in _which(path, present, FOUR[:2])]
    return cached(path.name, file_key(files), lambda: _splits([_npy(file) for file in files]))


def _npy(path: Path) -> np.ndarray:
    with reading(path, advice="Write it with numpy.save from an array of numbers."):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
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
        return Source(x.shape, x.dtype, partial(chunks, x_name), y[()])

    def chunks(name: str) -> Iterator[np.ndarray]:
        with reading(path), h5py.File(path, "r") as file:
            yield from blocks(file[name])

    with reading(path, advice="Is it a whole HDF5 file?"), h5py.File(path, "r") as file:
        x, y, *test = _which(path, file.keys(), ("x", "y"))
        return source(x, y), source(*test) if test else None
