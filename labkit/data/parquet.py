"""Parquet files, read in batches of rows, so that a file may be larger than memory.

Used by `labkit.data.open_dataset`, whose docstring lists the columns.
"""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from labkit.data.cache import Source, cached, converted_key, file_key, reading
from labkit.data.dataset import Dataset
from labkit.errors import DataError

ROWS = 4096
LISTED = 12  # names that the note lists


def from_file(path: Path, channels: str | None = None) -> Dataset:
    """The data set in a Parquet file."""
    return cached(path.stem, converted_key(file_key([path]), channels), lambda: (_source(path, channels), None))


def _source(path: Path, channels: str | None) -> Source:
    import pyarrow.parquet as pq

    with reading(path, advice="Is it a whole Parquet file?"), pq.ParquetFile(path) as file:
        schema, n = file.schema_arrow, file.metadata.num_rows
        columns = _columns(path, schema.names)
        shape = _stated_shape(path, schema, columns)
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
        read = "x" if columns == ["x"] else f"f0 to f{len(columns) - 1}" if len(columns) > 1 else "f0"
        listed = ", ".join(left[:LISTED]) + ", ..." * (len(left) > LISTED)
        about = f"{path.name}: columns {read} and y are read; left out: {listed}."
    return Source((n, *first.shape[1:]), first.dtype, chunks, y, about, channels)


def _named_axes(schema: Any, columns: list[str]) -> str | None:
    """Where the channels are, as the names of a tensor's axes say; None where they say nothing."""
    names = [str(name).lower() for name in getattr(schema.field("x").type, "dim_names", None) or ()] if columns == ["x"] else []
    named = [name in ("c", "channel", "channels") for name in names]
    return {(True, False): "first", (False, True): "last"}.get((named[0], named[-1])) if len(named) > 2 else None


def _columns(path: Path, names: list[str]) -> list[str]:
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
    stated = {**(schema.metadata or {}), **(schema.field("x").metadata or {})}.get(b"shape")
    if stated is None:
        return None
    with suppress(ValueError):
        shape = json.loads(stated)
        if isinstance(shape, list) and shape and all(type(n) is int and n > 0 for n in shape):
            return tuple(shape)
    raise DataError(f"{path}: the metadata 'shape' is {stated!r}. Give a JSON list such as [1, 28, 28].")


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
