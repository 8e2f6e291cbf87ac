"""A data set that stays in its Parquet files, and may be larger than memory and disk cache: row groups are read as they are asked for.

    opened     one pass over the files: fields and roles as of a converted set, checks, mean and std of each channel, labels
    noted      that, and where each row group is: all that is in the cache
    unit       a row group; a worker gets whole ones, and trains on one after the other (`labkit.partition`,
               `labkit.training.worker.sampler`), so that each is read once a pass
    in memory  of each thread that reads: the unit in use, the one before, and the next one, which is read ahead; and the score set, if it is small

Without a test split every tenth row group of a permutation with a fixed seed is held out as one.

Used by `labkit.data.open_dataset`.
"""

from __future__ import annotations

import math
import os
import re
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from labkit.data import parquet
from labkit.data.cache import (
    CHUNK_BYTES,
    FORMAT_STREAMED,
    Source,
    converted_key,
    file_key,
    folder_of,
    hold_out,
    is_of_cache,
    print_once,
    reading,
    ready,
    replacing_folder,
    write_fields,
    write_meta,
)
from labkit.data.columns import Asked, Columns, fields, noting, read, unread
from labkit.data.dataset import SPLITS, Column, Dataset
from labkit.errors import DataError
from labkit.locks import parsed

IN_USE = 2  # units that a thread holds beside the one that is read ahead: batches go over the end of one
LARGE_BYTES = 256 << 20  # of a unit: worth a word; of samples that are asked for again and again: not held in memory
ONE_CLASS = 0.5  # a share of units with samples of one class alone: worth a word

Splits = Mapping[str, Sequence[Path]]
Unit = dict[str, np.ndarray]

_held: dict[tuple[str, str], tuple[np.ndarray, Unit]] = {}  # by path and split: samples that are asked for again and again
_footers: dict[str, tuple[tuple[int, int], Any]] = {}  # by path: size and time of change of a file, and its footer
_local = threading.local()  # the reader of a thread


class Streamed(Dataset):
    """A reference to Parquet files that are read row group by row group, as `Dataset`; `path` is the folder of its note in the cache."""

    def __init__(self, path: Any, meta: dict[str, Any], note: str = "") -> None:
        super().__init__(path, meta, note)
        self._parts: list[tuple[str, int]] = meta["parts"]
        self._groups = {split: np.array(groups, np.int64) for split, groups in meta["groups"].items()}
        self._units = {split: np.append(0, np.cumsum(groups[:, 2])) for split, groups in self._groups.items()}
        self._recipes: dict[str, dict[str, Any]] = {
            name: {**of["read"], "stored": of["stored"], "last": of.get("channels_last", False)}
            for name, of in meta["fields"].items()
            if "stored" in of
        }
        self.asked = Asked(**{name: tuple(v) if isinstance(v, list) else v for name, v in meta["asked"].items()})
        self.pad = self.asked.pad
        self._held_out = meta["held_out"]

    def units_of(self, split: str) -> np.ndarray | None:
        return self._units[split]

    def stored_type(self, field: str) -> np.dtype:
        return np.dtype(self._recipes[field]["stored"]) if field in self._recipes else super().stored_type(field)

    @property
    def withheld(self) -> np.ndarray | None:
        """Which of all samples, in the order of the files, are the test split; None where that came by itself."""
        if not self._held_out:
            return None
        groups = np.concatenate([self._groups[split] for split in SPLITS])
        order = np.lexsort((groups[:, 1], groups[:, 0]))
        return np.repeat(order >= len(self._groups["train"]), groups[order, 2])

    def hold(self, indices: np.ndarray, split: str = "train") -> None:
        at = np.unique(indices)
        each = sum(self.stored_type(name).itemsize * math.prod(self.fields[name].shape) for name in self._recipes)
        if len(at) * each > LARGE_BYTES:  # a fold, say: it is read again each time
            return
        if (self.path, split) not in _held or not np.array_equal(_held[self.path, split][0], at):
            _held[self.path, split] = at, self._read(list(self._recipes), split, at)

    def expect(self, indices: np.ndarray, split: str = "train") -> None:
        unit = np.searchsorted(self._units[split], indices, "right") - 1
        self._reader().plan = deque((split, int(at)) for at in unit[np.flatnonzero(np.diff(unit, prepend=-1))])

    def _map(self, field: str, split: str) -> Any:
        return Column(self, field, split) if field in self._recipes else super()._map(field, split)

    def _read(self, names: Sequence[str], split: str, at: np.ndarray, window: tuple[slice, ...] = ()) -> Unit:
        streamed = [name for name in names if name in self._recipes]
        made = super()._read([name for name in names if name not in streamed], split, at)
        if streamed:
            made |= self._gathered(streamed, split, at, window)
        return {name: made[name] for name in names}

    def _gathered(self, names: list[str], split: str, at: np.ndarray, window: tuple[slice, ...]) -> Unit:
        def of(unit: Unit, name: str, rows: np.ndarray) -> np.ndarray:
            return unit[name][(rows, slice(None), *window) if window and name == self.inputs[0] else rows]

        held = _held.get((self.path, split))
        if held and len(held[0]):
            rows = np.minimum(np.searchsorted(held[0], at), len(held[0]) - 1)
            if np.array_equal(held[0][rows], at):
                return {name: of(held[1], name, rows) for name in names}
        offsets, reader = self._units[split], self._reader()
        unit = np.searchsorted(offsets, at, "right") - 1
        parts = []
        for number in dict.fromkeys(unit.tolist()):  # in the order in which they are asked for
            rows, found = np.flatnonzero(unit == number), reader.unit((split, number))
            parts.append((rows, {name: of(found, name, at[rows] - offsets[number]) for name in names}))
        if len(parts) == 1:
            return parts[0][1]
        made = {}
        for name in names:
            like = parts[0][1][name] if parts else np.empty((0, *self.fields[name].shape), self.stored_type(name))
            made[name] = np.empty((len(at), *like.shape[1:]), like.dtype)
            for rows, found in parts:
                made[name][rows] = found[name]
        return made

    def _reader(self) -> _Reader:
        if getattr(_local, "path", None) != self.path:
            _local.path, _local.reader = self.path, _Reader(self._unit)
        return _local.reader

    def _unit(self, key: tuple[str, int]) -> Unit:
        """All fields of a row group, as they are stored."""
        split, number = key
        part, group, rows = self._groups[split][number].tolist()
        name, size = self._parts[part]
        _check_unchanged(Path(name), size)
        columns = list(dict.fromkeys(column for of in self._recipes.values() for column in of["columns"]))
        batches = list(_batches(name, [group], columns, rows))
        made = [{field: _decoded(Path(name), batch, of) for field, of in self._recipes.items()} for batch in batches]
        return made[0] if len(made) == 1 else {field: np.concatenate([one[field] for one in made]) for field in self._recipes}


class _Reader:
    """The units that one thread is reading, in the order of its `plan`."""

    def __init__(self, read: Callable[[tuple[str, int]], Unit]) -> None:
        self.read, self.in_use, self.plan = read, {}, deque()
        self.ahead: _Ahead | None = None

    def unit(self, key: tuple[str, int]) -> Unit:
        found = self.in_use.pop(key, None)
        if found is None:
            ahead, self.ahead = self.ahead, None
            while len(self.in_use) >= IN_USE:
                del self.in_use[next(iter(self.in_use))]
            found = ahead.result() if ahead and ahead.key == key else self.read(key)
        self.in_use[key] = found
        if key in self.plan:
            while self.plan.popleft() != key:
                pass
        if self.plan and self.plan[0] not in self.in_use and (self.ahead is None or self.ahead.key != self.plan[0]):
            self.ahead = _Ahead(self.read, self.plan[0])
        return found


class _Ahead(threading.Thread):
    """Reads a unit while another one is trained on."""

    def __init__(self, read: Callable[[tuple[str, int]], Unit], key: tuple[str, int]) -> None:
        super().__init__(name="labkit-read-ahead", daemon=True)
        self.work, self.key, self.found, self.error = read, key, None, None
        self.start()

    def run(self) -> None:
        try:
            self.found = self.work(self.key)
        except Exception as error:  # raised where the unit is asked for
            self.error = error

    def result(self) -> Unit:
        self.join()
        if self.error:
            raise self.error
        return self.found


def _batches(file: str, groups: list[int], columns: list[str], rows: int) -> Iterator[Any]:
    """The record batches of row groups of a file, of `rows` at most."""
    import pyarrow.parquet as pq

    with reading(Path(file)):
        stat = os.stat(file)
        as_it_is = stat.st_size, stat.st_mtime_ns
        known, footer = _footers.get(file, (None, None))
        with pq.ParquetFile(file, metadata=footer if known == as_it_is else None) as opened:
            _footers[file] = as_it_is, opened.metadata
            yield from (b for b in opened.iter_batches(rows, row_groups=groups, columns=columns, use_threads=False) if b.num_rows)


def _check_unchanged(path: Path, size: int) -> None:
    try:
        now = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}. Each worker must see the files under the same path.") from error
    if now != size:
        raise DataError(f"{path} has {now} bytes, and had {size} when the data set was opened. Open it again.")


def _decoded(path: Path, batch: Any, recipe: Mapping[str, Any]) -> np.ndarray:
    """A field of a record batch, as it is stored: (n, *shape)."""
    if recipe["length"] is None:
        parts = [parquet.values(path, column, batch.column(column), recipe["given"]) for column in recipe["columns"]]
    else:
        column, of = recipe["columns"][0], (recipe["length"], np.dtype(recipe["stored"]), recipe["pad"])
        parts = [parquet.padded(path, column, batch.column(column), *of)]
    x = np.stack(parts, axis=1) if recipe["together"] else parts[0]
    if recipe["last"]:
        x = np.moveaxis(x, -1, 1)
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(x, recipe["stored"]).reshape(len(x), *recipe["shape"])


# -- opening -----------------------------------------------------------------------------------------------------------


def is_parquet(path: Any) -> bool:
    """Is it a Parquet file, or a folder that holds any?"""
    path = Path(path)
    return bool(files_at(path)) if path.is_dir() else path.suffix.lower() == parquet.SUFFIX and path.is_file()


def files_at(path: Path) -> list[Path]:
    """The Parquet files that a path stands for, in order: itself, or those in a folder and in the folders below it."""
    if not path.is_dir():
        return [path]
    inside = (file for file in path.rglob("*") if file.suffix.lower() == parquet.SUFFIX and file.is_file())
    return sorted(file for file in inside if not file.name.startswith((".", "_")))


def splits_of(data: Any) -> dict[str, list[Path]] | None:
    """The Parquet files that a user means by a path, a list of paths, or a dict of either for "train" and "test"; None for all else."""
    if isinstance(data, Mapping):
        found = {split: splits_of(part) for split, part in data.items()} if data and set(data) <= set(SPLITS) else {None: None}
        return {split: files["train"] for split, files in found.items()} if all(found.values()) else None
    paths = [data] if isinstance(data, str | Path) else list(data) if isinstance(data, tuple | list) else []
    if not paths or not all(isinstance(path, str | Path) and is_parquet(path) for path in paths):
        return None
    if len(paths) == 1 and all(is_parquet(Path(data) / split) for split in SPLITS):
        return {split: files_at((Path(paths[0]) / split).resolve()) for split in SPLITS}
    return {"train": [file for path in paths for file in files_at(Path(path).resolve())]}


def opened(path: Path) -> Streamed | None:
    """The data set whose note is in the folder `path` of this cache, as the record of a run names it; else None."""
    meta = ready(path, [FORMAT_STREAMED]) if is_of_cache(path) else None
    return None if meta is None else Streamed(path, meta)


def from_files(splits: Splits, asked: Asked) -> Streamed:
    """The data set of Parquet files, for "train" and, perhaps, "test": they are read once, and noted in the cache."""
    if "train" not in splits:
        raise DataError(f"the splits are {', '.join(splits)}. Give 'train', and 'test' if there is one.")
    first = splits["train"][0]
    name = (
        first.stem if len(splits["train"]) == 1 else first.parent.name if first.parent.name != "train" else first.parent.parent.name
    )
    listed = [(split, file_key(list(files))) for split, files in splits.items()]
    path = folder_of(name, converted_key("streamed", listed, asked))
    meta = ready(path, [FORMAT_STREAMED])
    if meta is None:
        with replacing_folder(path, lambda: ready(path, [FORMAT_STREAMED]) is not None) as folder:
            meta = _noted(folder, name, splits, asked)
    dataset = Streamed(path, meta)
    print_once(dataset.note)
    return dataset


def _noted(folder: Path, name: str, splits: Splits, asked: Asked) -> dict[str, Any]:
    """Look at all samples once, and write labels and `meta.json` into `folder`."""
    schema, parts, groups, n_bytes = _row_groups(splits)
    if held_out := len(groups) == 1:
        if len(groups["train"]) < 2:
            raise DataError(
                f"{name} is one row group of {groups['train'][0][2]} rows, of which no other can be held out as a test split. Write it "
                'in smaller ones (pyarrow.parquet.write_table(..., row_group_size=4096)), or give {"train": ..., "test": ...}.'
            )
        held = hold_out(len(groups["train"]))
        groups = {split: [g for g, out in zip(groups["train"], held, strict=True) if out == (split == "test")] for split in SPLITS}
    given, first, asked = asked, splits["train"][0], _asked(splits["train"][0], schema.names, asked)
    taken = read(dict.fromkeys(schema.names), asked)
    about = unread(name, schema.names, taken)
    columns: dict[str, Columns] = {}
    for split, own in groups.items():
        columns[split] = {c: _column(first, c, schema, parts, own, asked, columns.get("train", {}).get(c)) for c in taken}
    columns["train"] = noting(columns["train"], about)
    train, test = fields(name, columns, asked, True)
    meta = write_fields(folder, name, train, test, False, copied=False)
    for field, of in meta["fields"].items():
        if "stored" in of:
            of["read"] = _recipe(train[field], field, of, columns["train"], asked)
    n = {split: len(part) for split, part in groups.items()}
    rows = [group[2] for part in groups.values() for group in part]
    words = [
        f"{name}: {len(parts)} file{'s' * (len(parts) > 1)} of {n_bytes / 1e6:.0f} MB stay where they are and are read in row groups of "
        f"{min(rows)} to {max(rows)} rows, {n['train']} to train and {n['test']} to test."
    ]
    if (largest := n_bytes / sum(rows) * max(rows)) > LARGE_BYTES:
        words.append(f"{name}: a row group has {largest / 1e6:.0f} MB, and each worker holds three. Smaller ones need less memory.")
    meta |= {"format": FORMAT_STREAMED, "held_out": held_out, "parts": parts, "groups": groups, "asked": asdict(given)}
    meta["note"] = " ".join(filter(None, [*words, meta["note"], _sorted(name, folder, meta)]))
    return write_meta(folder, meta)


def _row_groups(splits: Splits) -> tuple[Any, list[tuple[str, int]], dict[str, list[tuple[int, int, int]]], int]:
    """The schema, the files with their sizes, of each split its row groups (number of the file, of the group in it, rows), and the bytes
    of all samples."""
    import pyarrow.parquet as pq

    schema, parts, groups, n_bytes = None, [], {}, 0
    for split, files in splits.items():
        groups[split] = []
        for path in files:
            with reading(path, advice="Is it a whole Parquet file?"), pq.ParquetFile(path) as file:
                own, footer = file.schema_arrow, file.metadata
            schema = own if schema is None else schema
            if odd := next((c for c in schema.names if c not in own.names or own.field(c).type != schema.field(c).type), None):
                there = own.field(odd).type if odd in own.names else "missing"
                raise DataError(
                    f"{path}: column {odd} is {there}, and {schema.field(odd).type} in {parts[0][0]}. All files need the same."
                )
            found = [footer.row_group(at) for at in range(footer.num_row_groups)]
            groups[split] += [(len(parts), at, group.num_rows) for at, group in enumerate(found) if group.num_rows]
            n_bytes += sum(group.total_byte_size for group in found)
            parts.append((str(path), path.stat().st_size))
        if not groups[split]:
            raise DataError(f"{files[0]}: there are no rows.")
    return schema, parts, groups, n_bytes


def _asked(path: Path, names: list[str], asked: Asked) -> Asked:
    """What to read where nobody has said it: x, or f0, f1, ..., and y, as of a single file."""
    if not asked.says_roles and "y" in names and any(re.fullmatch(r"x|f\d+", name) for name in names):
        return replace(asked, inputs=tuple(parquet.columns_of(path, names)), label=("y",))
    return asked


def _column(path: Path, name: str, schema: Any, parts: list, groups: list, asked: Asked, like: Source | None) -> Source:
    """A column of the row groups `groups`, one after the other; its samples have the shape of those of `like`."""

    def batches() -> Iterator[Any]:
        for part, group, rows in groups:
            yield from _batches(parts[part][0], [group], [name], min(rows, most))

    kind, n = schema.field(name).type, sum(rows for _, _, rows in groups)
    shape = parquet.stated_shape(path, schema, [name]) if like is None else like.shape[1:]
    most, of = 1, {"one_length": asked.pad is None, "shape": shape}
    one = next(batches())
    most = max(1, CHUNK_BYTES // max(1, one.nbytes))
    return parquet.column(path, name, kind, n, asked, batches, **of)


def _recipe(source: Source, field: str, about: Mapping[str, Any], columns: Columns, asked: Asked) -> dict[str, Any]:
    """How a field is made of a record batch."""
    of = list(source.columns or [field])
    given = columns[of[0]].shape[1:]
    return {
        "columns": of,
        "together": bool(source.columns),  # several columns of numbers, side by side
        "given": list(given),
        "shape": about["shape"],
        "length": None if columns[of[0]].padded is None else given[0],
        "pad": asked.pad,
    }


def _sorted(name: str, folder: Path, meta: Mapping[str, Any]) -> str:
    """A note where row groups hold one class each: whoever trains on them sees one class after the other."""
    labels = [(field, of) for field, of in meta["fields"].items() if of["role"] == "label" and not of["shape"]]
    if len(labels) != 1 or labels[0][1]["n_values"] < 2:
        return ""
    y = parsed(np.load, folder / f"{labels[0][1]['stem']}_train.npy", "r")
    offsets = np.append(0, np.cumsum([group[2] for group in meta["groups"]["train"]]))
    alone = [
        at
        for at in range(len(offsets) - 1)
        if offsets[at + 1] - offsets[at] > 1 and len(np.unique(y[offsets[at] : offsets[at + 1]])) == 1
    ]
    if len(alone) < ONE_CLASS * (len(offsets) - 1):
        return ""
    return (
        f"{name}: {len(alone)} of {len(offsets) - 1} row groups hold samples of one class alone, as the rows are sorted: workers see one "
        "class after the other, and a held-out test split lacks some. Shuffle the rows of the file."
    )
