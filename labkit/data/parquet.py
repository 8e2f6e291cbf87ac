"""Parquet files, read in batches of rows, so that a file may be larger than memory.

Used by `labkit.data.open_dataset`, whose docstring lists the columns, and by `labkit.data.streamed`.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from labkit.data.cache import Source, cached, converted_key, file_key, print_once, reading
from labkit.data.columns import Asked, Columns, check_pad, filled, noting, of_array, read, stored, unread
from labkit.data.dataset import Dataset
from labkit.errors import DataError

SUFFIX = ".parquet"
ROWS = 4096
LARGE = 0.5  # of the memory of this machine, as a file: worth a word
LISTED = 12  # names that the note lists


def from_file(path: Path, asked: Asked) -> Dataset:
    """The data set in a Parquet file: of `x` (or f0, f1, ...) and `y`, or of the columns that are asked for by name."""
    if asked.says_roles:
        return stored(path.stem, file_key([path]), lambda: {"train": _named(path, asked)}, asked, features=True)
    channels = asked.channels
    return cached(path.stem, converted_key(file_key([path]), channels), lambda: (_source(path, channels), None))


def _mention_streaming(path: Path) -> None:
    """Printed where a copy of a file is about to be made that this machine can hardly hold in memory."""
    if (size := path.stat().st_size) > LARGE * psutil.virtual_memory().total:
        print_once(f"{path.name} has {size / 1e9:.1f} GB and is converted into the cache; stream=True reads it where it is.")


def _named(path: Path, asked: Asked) -> Columns:
    """The columns of a file by name, each read a batch of rows at a time."""
    import pyarrow.parquet as pq

    _mention_streaming(path)
    with reading(path, advice="Is it a whole Parquet file?"), pq.ParquetFile(path) as file:
        schema, n = file.schema_arrow, file.metadata.num_rows
    if not n:
        raise DataError(f"{path} is empty: it has no rows.")

    def batches(name: str) -> Iterator[Any]:
        with reading(path), pq.ParquetFile(path) as file:
            yield from (batch for batch in file.iter_batches(ROWS, columns=[name]) if batch.num_rows)

    taken = read(dict.fromkeys(schema.names), asked)
    made = {name: column(path, name, schema.field(name).type, n, asked, partial(batches, name)) for name in taken}
    return noting(made, unread(path.stem, schema.names, taken))


def column(
    path: Path,
    name: str,
    kind: Any,
    n: int,
    asked: Asked,
    batches: Callable[[], Iterator[Any]],
    *,
    one_length: bool = False,
    shape: tuple[int, ...] | None = None,
) -> Source:
    """A column of n rows, which `batches` gives in record batches. With `one_length` lists are not read to see how long they are, with
    a `shape` flat ones are samples of it."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        texts = [text for batch in batches() for text in batch.column(name).to_pylist()]
        if missing := texts.count(None):
            raise DataError(f"{path}: column {name} has {missing} missing values. Fill or drop them.")
        return of_array(np.array(texts, dtype=np.str_))
    if (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and not one_length:
        lengths = [pc.min_max(pc.list_value_length(batch.column(name))).as_py() for batch in batches()]
        if None in (least := [found["min"] for found in lengths]):
            raise DataError(f"{path}: column {name} has missing values. Fill or drop them.")
        least, most = min(least), max(found["max"] for found in lengths)
        if least != most:
            check_pad(path.stem, name, asked, least, most)
            dtype = np.dtype(kind.value_type.to_pandas_dtype())

            def whole() -> Iterator[np.ndarray]:
                return (padded(path, name, batch.column(name), most, dtype, asked.pad) for batch in batches())

            about = f"{path.stem}: {name} has {least} to {most} entries a sample, filled up with {asked.pad:g} to {most}."
            return Source((n, most), dtype, whole, about=about, padded=asked.pad)

    first = values(path, name, next(batches()).column(name), shape)

    def chunks() -> Iterator[np.ndarray]:
        return (values(path, name, batch.column(name), first.shape[1:]) for batch in batches())

    return Source((n, *first.shape[1:]), first.dtype, chunks)


def values(path: Path, name: str, held: Any, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """A column of a record batch as an array (n, ...), of samples of this `shape` if it is given; without a copy where that can be."""
    import pyarrow as pa

    nested = pa.types.is_nested(held.type) or isinstance(held.type, pa.FixedShapeTensorType)
    x = _tensors(path, name, held) if nested else _numbers(path, name, held)
    if shape is None or x.shape[1:] == tuple(shape):
        return x
    if x.ndim != 2 or x[0].size != np.prod(shape):
        raise DataError(
            f"{path}: a sample in column {name} has shape {x.shape[1:]}, where {tuple(shape)} is expected from the metadata or the "
            "samples before. All need one shape; pad=0 fills up lists of different lengths."
        )
    return x.reshape(len(x), *shape)


def padded(path: Path, name: str, held: Any, length: int, dtype: np.dtype, pad: float) -> np.ndarray:
    """A column of lists of a record batch, filled up behind their end: (n, length)."""
    import pyarrow.compute as pc

    numbers, ends = _numbers(path, name, held.flatten()), np.cumsum(pc.list_value_length(held).to_numpy())
    return filled(np.split(numbers, ends[:-1]), length, dtype, pad)


def _source(path: Path, channels: str | None) -> Source:
    import pyarrow.parquet as pq

    _mention_streaming(path)
    with reading(path, advice="Is it a whole Parquet file?"), pq.ParquetFile(path) as file:
        schema, n = file.schema_arrow, file.metadata.num_rows
        columns = columns_of(path, schema.names)
        shape = stated_shape(path, schema, columns)
        channels = channels or _named_axes(schema, columns)
        left = [name for name in schema.names if name not in (*columns, "y")]
        y = _numbers(path, "y", file.read(columns=["y"]).column("y").combine_chunks())

    def chunks() -> Iterator[np.ndarray]:
        with reading(path), pq.ParquetFile(path) as file:
            sample = shape
            for batch in file.iter_batches(ROWS, columns=columns):
                if batch.num_rows:
                    x = _samples(path, batch, columns)
                    sample = sample or x.shape[1:]
                    if x[0].size != np.prod(sample) or (shape is None and x.shape[1:] != sample):
                        raise DataError(
                            f"{path}: a sample in column x has shape {x.shape[1:]}, where {sample} is expected "
                            "from the metadata or the samples before. All need one shape."
                        )
                    yield x.reshape(len(x), *sample)

    first = next(chunks(), None)
    if first is None:
        raise DataError(f"{path} is empty: it has no rows.")
    about = ""
    if left:
        taken = "x" if columns == ["x"] else f"f0 to f{len(columns) - 1}" if len(columns) > 1 else "f0"
        listed = ", ".join(left[:LISTED]) + ", ..." * (len(left) > LISTED)
        about = f"{path.name}: columns {taken} and y are read; left out: {listed}."
    return Source((n, *first.shape[1:]), first.dtype, chunks, y, about, channels)


def _named_axes(schema: Any, columns: list[str]) -> str | None:
    """Where the channels are, as the names of a tensor's axes say; None where they say nothing."""
    names = [str(name).lower() for name in getattr(schema.field("x").type, "dim_names", None) or ()] if columns == ["x"] else []
    named = [name in ("c", "channel", "channels") for name in names]
    return {(True, False): "first", (False, True): "last"}.get((named[0], named[-1])) if len(named) > 2 else None


def columns_of(path: Path, names: list[str]) -> list[str]:
    """The columns that samples are made of where nobody has named any: x, or f0, f1, ..."""
    has = f"It has {', '.join(names) or 'none'}."
    if "y" not in names:
        raise DataError(f"{path} has no column 'y' for the labels. {has} Give label=... or target=... for another.")
    if "x" in names:
        return ["x"]
    numbered = {name for name in names if re.fullmatch(r"f\d+", name)}
    wanted = [f"f{i}" for i in range(len(numbered))]
    if not numbered:
        raise DataError(f"{path} has neither a column 'x' nor columns f0, f1, ... {has} Give inputs=[...] for others.")
    if missing := [name for name in wanted if name not in numbered]:
        raise DataError(f"{path} lacks the column {missing[0]} between f0 and f{len(numbered)}. {has}")
    return wanted


def stated_shape(path: Path, schema: Any, columns: list[str]) -> tuple[int, ...] | None:
    """The shape of a sample from the metadata `shape` of its only column or, for x, of the file; None where neither states it."""
    if len(columns) != 1:
        return None
    of_file = schema.metadata if columns == ["x"] else None
    stated = {**(of_file or {}), **(schema.field(columns[0]).metadata or {})}.get(b"shape")
    if stated is None:
        return None
    with suppress(ValueError, RecursionError):
        shape = json.loads(stated)
        if isinstance(shape, list) and shape and all(type(n) is int and n > 0 for n in shape):
            return tuple(shape)
    raise DataError(f"{path}: the metadata 'shape' is {stated!r}. Give a JSON list such as [1, 28, 28].")


def _samples(path: Path, batch: Any, columns: list[str]) -> np.ndarray:
    """The samples of a record batch, shape (n, ...)."""
    if columns != ["x"]:
        return np.stack([_numbers(path, name, batch.column(name)) for name in columns], axis=1)
    return _tensors(path, "x", batch.column("x"))


def _tensors(path: Path, name: str, values: Any) -> np.ndarray:
    """The samples of a column of lists or tensors, shape (n, ...)."""
    import pyarrow as pa
    import pyarrow.compute as pc

    shape = [len(values)]
    if isinstance(values.type, pa.FixedShapeTensorType):
        shape += values.type.shape
        if values.type.permutation not in (None, list(range(len(values.type.shape)))):
            raise DataError(f"{path}: the tensors of column {name} are permuted. Store them in row-major order.")
        values = values.storage.flatten()
    while pa.types.is_list(values.type) or pa.types.is_large_list(values.type) or pa.types.is_fixed_size_list(values.type):
        lengths = pc.unique(pc.list_value_length(values)).to_pylist()
        if len(lengths) != 1 or not lengths[0]:
            raise DataError(f"{path}: lists in column {name} have the lengths {lengths[:5]}. All need one length above 0.")
        shape.append(lengths[0])
        values = values.flatten()
    return _numbers(path, name, values).reshape(shape)


def _numbers(path: Path, name: str, values: Any) -> np.ndarray:
    import pyarrow as pa

    kind = values.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise DataError(f"{path}: column {name} is of type {kind}. Give numbers, or for x lists of numbers.")
    if values.null_count:
        raise DataError(f"{path}: column {name} has {values.null_count} missing values. Fill or drop them.")
    return values.to_numpy(zero_copy_only=False)
