"""Users' own data: arrays, a folder of `.npy`, Parquet and HDF5, each read in blocks so that a file may be larger than
memory.

Nothing is unpickled: arrays of Python objects are refused by name.

Used by `labkit.data.open_dataset`, whose docstring says what each of them must hold, and `labkit.data.paths`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from labkit.data.shards import Dataset, Source, file_key, rows_per_chunk, shard
from labkit.errors import DataError

FOUR = ("x_train", "y_train", "x_test", "y_test")
PARQUET_ROWS = 4096


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
    return shard("arrays", digest.hexdigest(), lambda: _splits(held))


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


def from_file(path: Path) -> Dataset:
    """The data set in a Parquet or HDF5 file."""
    if not path.stat().st_size:
        raise DataError(f"{path} is empty. Write it again.")
    if path.suffix == ".parquet":
        return shard(path.stem, file_key([path]), lambda: (_parquet(path), None))
    if path.suffix in (".h5", ".hdf5"):
        return shard(path.stem, file_key([path]), lambda: _hdf5(path))
    raise DataError(
        f"{path} ends in {path.suffix or 'nothing'!r}. Known are .parquet, .h5, .hdf5, folders of .npy files, CIFAR-10's "
        "unpacked folder, and folders of pictures or .nii.gz volumes, one for each class."
    )


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

    return shard(path.name, file_key(files), load)


def _npy(path: Path) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read: {error} Write it with numpy.save from an array of numbers.") from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise DataError(f"{path} is an .npz archive. Write each array with numpy.save.")
    return array


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


def _parquet(path: Path) -> Source:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            schema, n = file.schema_arrow, file.metadata.num_rows
            columns = _parquet_columns(path, schema.names)
            shape = _stated_shape(path, schema, columns)
            y = _numbers(path, "y", file.read(columns=["y"]).column("y").combine_chunks())
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read: {error}. Is it a whole Parquet file?") from error

    def chunks() -> Iterator[np.ndarray]:
        try:
            with pq.ParquetFile(path) as file:
                sample = shape
                for batch in file.iter_batches(PARQUET_ROWS, columns=columns):
                    if batch.num_rows:
                        x = _samples(path, batch, columns)
                        sample = sample or x.shape[1:]
                        if x[0].size != np.prod(sample) or (shape is None and x.shape[1:] != sample):
                            raise DataError(
                                f"{path}: a sample in column x has shape {x.shape[1:]}, where {sample} is expected "
                                "from the metadata or the samples before. All need one shape."
                            )
                        yield x.reshape(len(x), *sample)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path} cannot be read: {error}. Write it again.") from error

    first = next(chunks(), None)
    if first is None:
        raise DataError(f"{path} is empty: it has no rows.")
    return Source((n, *first.shape[1:]), first.dtype, chunks, y)


def _parquet_columns(path: Path, names: list[str]) -> list[str]:
    has = f"It has {', '.join(names) or 'none'}."
    if "y" not in names:
        raise DataError(f"{path} has no column 'y' for the labels. {has}")
    if "x" in names:
        return ["x"]
    numbered = {name for name in names if re.fullmatch(r"f\d+", name)}
    wanted = [f"f{i}" for i in range(len(numbered))]
    if not numbered:
        raise DataError(f"{path} has neither a column 'x' nor columns f0, f1, ... {has}")
    if missing := [name for name in wanted if name not in numbered]:
        raise DataError(f"{path} lacks the column {missing[0]} between f0 and f{len(numbered)}. {has}")
    return wanted


def _stated_shape(path: Path, schema: Any, columns: list[str]) -> tuple[int, ...] | None:
    """The shape of a sample from the metadata `shape` of the column x or of the file, None where neither states it."""
    if columns != ["x"]:
        return None
    held = {**(schema.metadata or {}), **(schema.field("x").metadata or {})}
    if b"shape" not in held:
        return None
    try:
        shape = json.loads(held[b"shape"])
        if isinstance(shape, list) and shape and all(type(n) is int and n > 0 for n in shape):
            return tuple(shape)
    except ValueError:
        pass
    raise DataError(f"{path}: the metadata 'shape' is {held[b'shape']!r}. Give a JSON list such as [1, 28, 28].")


def _samples(path: Path, batch: Any, columns: list[str]) -> np.ndarray:
    """The samples of a record batch, shape (n, ...)."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if columns != ["x"]:
        return np.stack([_numbers(path, name, batch.column(name)) for name in columns], axis=1)
    values, shape = batch.column("x"), [batch.num_rows]
    if isinstance(values.type, pa.FixedShapeTensorType):
        shape += values.type.shape
        if values.type.permutation not in (None, list(range(len(values.type.shape)))):
            raise DataError(f"{path}: the tensors of column x are permuted. Store them in row-major order.")
        values = values.storage.flatten()
    while pa.types.is_list(values.type) or pa.types.is_large_list(values.type) or pa.types.is_fixed_size_list(values.type):
        lengths = pc.unique(pc.list_value_length(values)).to_pylist()
        if len(lengths) != 1 or not lengths[0]:
            raise DataError(f"{path}: lists in column x have the lengths {lengths[:5]}. All need one length above 0.")
        shape.append(lengths[0])
        values = values.flatten()
    return _numbers(path, "x", values).reshape(shape)


def _numbers(path: Path, name: str, values: Any) -> np.ndarray:
    import pyarrow as pa

    kind = values.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise DataError(f"{path}: column {name} is of type {kind}. Give numbers, or for x lists of numbers.")
    if values.null_count:
        raise DataError(f"{path}: column {name} has {values.null_count} missing values. Fill or drop them.")
    return values.to_numpy(zero_copy_only=False)
