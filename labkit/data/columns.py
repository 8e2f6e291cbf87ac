"""Data sets of named columns: which of them are inputs, labels and targets, and how each is stored.

    label=, target=, inputs=   say it; without them y, label(s) and target(s) are what is to be learned, and the rest is seen
    whole numbers              to be learned are labels 0..K-1 (texts are numbered); rows of 0 and 1 are targets, one for each yes or no
    floats                     to be learned are targets, left as they are but for float64, which becomes float32
    inputs                     are normalised by channel, as in every data set, unless they are tokens (`tokens=`) or `as_given=`
    samples of many lengths    are filled with `pad=` behind their end, to the length of the longest; labels with -100, which is no class

What was decided on the user's behalf is in the note.

Used by `labkit.data` for dicts, DataFrames, and Parquet and HDF5 files whose columns are named.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from labkit.data.cache import Source, blocks, cached, converted_key, rows_per_chunk
from labkit.data.dataset import SPLITS, Dataset
from labkit.errors import DataError, did_you_mean, real

ANSWERS = ("y", "label", "labels", "target", "targets")
IDS = ("ids", "input_ids", "token_ids", "tokens", "attention_mask", "token_type_ids")
NO_LABEL = -100  # behind the end of labels of many lengths: what losses of torch ignore
LISTED = 12  # names that a note lists

Columns = dict[str, Source]


@dataclass(frozen=True)
class Asked:
    """What the user says of the columns: names, all of them for True, None where labkit decides."""

    label: tuple[str, ...] | bool | None = None  # True: what columns called y, label(s) or target(s) are
    target: tuple[str, ...] | bool | None = None
    inputs: tuple[str, ...] | None = None
    tokens: tuple[str, ...] | bool | None = None
    as_given: tuple[str, ...] | bool | None = None
    pad: float | None = None
    channels: str | None = None

    @classmethod
    def of(cls, **options: Any) -> Asked:
        """TypeError for what is neither a name nor names, or no number."""
        for name, value in options.items():
            if name == "pad":
                options[name] = real(name, value)  # what is behind the end of shorter samples
            elif name != "channels" and not isinstance(value, bool):
                options[name] = _names(name, value)
            elif value is False or (value is True and name == "inputs"):
                raise TypeError(f"{name}={value!r}: give the name of a column, or several in a list.")
        if options.get("label") is True and options.get("target") is True:
            raise TypeError("label=True and target=True: give one of them, or names.")
        return cls(**options)

    @property
    def answers(self) -> str | None:
        """The role of columns called y, label(s) or target(s): "answer" where their values decide, None where others are named."""
        named = {role: getattr(self, role) for role in ("label", "target")}
        return next((role for role, names in named.items() if names is True), None if any(named.values()) else "answer")

    def named(self, role: str) -> tuple[str, ...]:
        """The columns that are asked for by name in this role, "input", "label" or "target"."""
        names = self.inputs if role == "input" else getattr(self, role)
        return names if isinstance(names, tuple) else ()

    @property
    def says_roles(self) -> bool:
        return self != Asked(channels=self.channels)

    def includes(self, option: str, name: str) -> bool:
        """Is the column `name` one that `option` asks for?"""
        value = getattr(self, option)
        return value is True or (value is not None and value is not False and name in value)


def _names(option: str, value: Any) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list | tuple | set) else (None,)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"{option}={value!r}: give the name of a column, a text, or several in a list.")
    return names


def stored(name: str, digest: str, load: Callable[[], dict[str, Columns]], asked: Asked, *, features: bool = False) -> Dataset:
    """The data set of the columns that `load` gives for "train" and, perhaps, "test"; made the first time.

    `digest` tells the content. With `features` all inputs of one number a sample are one input "x" together, as in a table.
    """
    key = converted_key(digest, asked, features)
    return cached(name, key, lambda: fields(name, load(), asked, features))


def fields(name: str, splits: dict[str, Columns], asked: Asked, features: bool) -> tuple[Columns, Columns | None]:
    """The fields of both splits, with their roles; the note goes with the first one."""
    train = splits["train"]
    if missing := [
        column for split in splits.values() for column in {**train, **split} if column not in train or column not in split
    ]:
        raise DataError(f"{name}: {missing[0]} is in one split only. Both need the same columns.")
    for split, columns in splits.items():
        if empty := [column for column, source in columns.items() if not source.shape[0]]:
            raise DataError(f"{name}: {empty[0]} of the {split} split is empty. Give at least one sample.")
    roles, notes = _roles(name, train, asked)
    notes += dict.fromkeys(source.about for source in train.values())
    if left := [column for column in train if column not in roles]:
        notes.append(f"{name}: left out: {_listed(left)}.")
    splits = {split: {column: columns[column] for column in roles} for split, columns in splits.items()}
    texts: dict[str, np.ndarray] = {}
    for column, role in roles.items():
        given = {split: columns[column] for split, columns in splits.items()}
        if given["train"].dtype.kind in "US":
            texts[column] = _texts(name, column, role, given)
            n, listed = len(texts[column]), _listed(texts[column].tolist())
            notes.append(f"{name}: {column} is text: {n} classes, 0 to {n - 1} are {listed}.")
            for split, source in given.items():
                number = np.searchsorted(texts[column], np.concatenate(list(source.chunks())))
                splits[split][column] = dataclasses.replace(
                    of_array(number.astype(np.int64)), classes=tuple(texts[column].tolist())
                )
            roles[column] = "label"
    if features and (scalar := [c for c, role in roles.items() if role == "input" and len(train[c].shape) == 1]):
        others = [column for column, role in roles.items() if role == "input" and column not in scalar]
        stack = "x" if "x" not in {*others, *(c for c in roles if c not in scalar)} else "features"
        notes.append(f"{name}: input {stack} is the columns {_listed(scalar)}.")
        splits = {
            split: {
                stack: _side_by_side(name, {c: columns[c] for c in scalar}),
                **{c: s for c, s in columns.items() if c not in scalar},
            }
            for split, columns in splits.items()
        }
        roles = {stack: "input", **{c: role for c, role in roles.items() if c not in scalar}}
    made = {split: {} for split in splits}
    for column, role in roles.items():
        given = {split: columns[column] for split, columns in splits.items()}
        role, as_given, note = _decided(name, column, role, given, asked)
        notes.append(note)
        tokens = role == "input" and as_given and not asked.includes("as_given", column)
        if role != "label" and as_given and roles[column] != "target" and not tokens and given["train"].dtype.kind != "f":
            given = {split: _as_floats(source) for split, source in given.items()}
        for split, source in given.items():
            made[split][column] = dataclasses.replace(source, role=role, as_given=as_given, channels=asked.channels, about="")
    if asked.answers == "answer":
        found = [
            f"{c} is read as {'labels' if s.role == 'label' else 'targets'}" for c, s in made["train"].items() if s.role != "input"
        ]
        notes.append(f"{name}: {', '.join(found) or 'nothing is read as labels or targets'}.")
    first = next(iter(made["train"]))
    made["train"][first] = dataclasses.replace(made["train"][first], about=" ".join(note for note in notes if note))
    return made["train"], made.get("test")


def _listed(names: Sequence[Any]) -> str:
    return ", ".join(map(str, names[:LISTED])) + ", ..." * (len(names) > LISTED)


def _roles(name: str, columns: Mapping[str, Source], asked: Asked) -> tuple[dict[str, str], list[str]]:
    """The role of each column that is read; "answer" where label or target is still to be decided."""
    wanted = {role: asked.named(role) for role in ("label", "target", "input")}
    options = {**wanted, "tokens": asked.tokens, "as_given": asked.as_given}
    for option, names in options.items():
        for column in names if isinstance(names, tuple) else ():
            if column not in columns:
                option = "inputs" if option == "input" else option
                raise DataError(
                    f"{name}: {option}={column!r} is no column.{did_you_mean(column, columns)} It has: {_listed(list(columns))}."
                )
    roles: dict[str, str] = {}
    for role, names in wanted.items():
        for column in names:
            if column in roles:
                raise DataError(f"{name}: column {column} is asked for as {roles[column]} and as {role}. Give it once.")
            roles[column] = role
    if asked.answers:
        roles |= {column: asked.answers for column in columns if column.lower() in ANSWERS and column not in roles}
    if asked.inputs is None:
        roles |= {column: "input" for column in columns if column not in roles}
    if "input" not in roles.values():
        raise DataError(f"{name}: no column is left as an input. It has: {_listed(list(columns))}.")
    ordered = sorted(roles, key=lambda column: roles[column] != "input")  # otherwise in the order asked for, or that of the columns
    read_as_input = [c for c in ordered if roles[c] == "input" and c.lower() in ANSWERS and asked.inputs is None]
    notes = [f"{name}: {_listed(read_as_input)} is read as an input; give inputs=[...] if it is not one."] if read_as_input else []
    return {column: roles[column] for column in ordered}, notes


def _texts(name: str, column: str, role: str, given: Mapping[str, Source]) -> np.ndarray:
    """The different texts of a column of labels, in order; DataError for texts in another role."""
    if role not in ("label", "answer") or len(given["train"].shape) > 1:
        is_class = f" Where it is the class of a sample: labkit.open_dataset(data, label={column!r})." if role == "input" else ""
        raise DataError(
            f"{name}: column {column} is text, and an {role} is numbers. Leave it out (inputs=[...]), or encode it, for instance by "
            f"pandas.get_dummies.{is_class}"
        )
    found = {split: np.unique(np.concatenate(list(source.chunks()))) for split, source in given.items()}
    if len(new := np.setdiff1d(found.get("test", found["train"]), found["train"])):
        raise DataError(f"{name}: the test split has {column} {new[0]!r}, of which the training split has none.")
    return found["train"]


def _decided(name: str, column: str, role: str, given: Mapping[str, Source], asked: Asked) -> tuple[str, bool, str]:
    """The role, whether values are left as given, and a note."""
    kinds, shape = {source.dtype.kind for source in given.values()}, given["train"].shape[1:]
    if kinds - set("biuf"):
        kind = next(iter(kinds - set("biuf")))
        dtype = next(source.dtype for source in given.values() if source.dtype.kind == kind)
        raise DataError(f"{name}: {column} is of type {dtype}. Give booleans, integers or floats.")
    whole = kinds <= set("biu")
    if role == "answer":
        if not whole:
            return "target", True, ""
        if len(shape) == 1 and shape[0] > 1 and all(b.min() >= 0 and b.max() <= 1 for s in given.values() for b in s.chunks()):
            one_hot = all((block.sum(1) == 1).all() for source in given.values() for block in source.chunks())
            how = f"it is one-hot; for classes give {column}.argmax(1)" if one_hot else f"give label={column!r} for classes"
            note = f"{name}: {column} is {shape[0]} answers of yes or no a sample; {how}."
            return "target", True, note
        return "label", True, ""
    if role == "input":
        if asked.includes("tokens", column) and not whole:
            raise DataError(f"{name}: tokens={column!r} is of type {given['train'].dtype}. Token ids are integers.")
        unnormalised, padded = asked.includes("as_given", column), given["train"].padded is not None
        guessed = asked.tokens is None and not unnormalised and (column.lower() in IDS or padded) and "b" not in kinds
        if whole and (asked.includes("tokens", column) or (guessed and len(shape) == 1)):
            if (least := min(block.min() for source in given.values() for block in source.chunks())) < 0:
                raise DataError(
                    f"{name}: {column} goes down to {least}. Token ids count from 0; as_given={column!r} reads numbers."
                )
            return "input", True, "" if asked.tokens else f"{name}: {column} is read as token ids (tokens=[] for numbers)."
        if padded and not unnormalised:
            return "input", True, f"{name}: {column} is filled up behind its end, and is not normalised."
        return "input", unnormalised, ""
    return role, True, ""


def _as_floats(source: Source) -> Source:
    return dataclasses.replace(source, dtype=np.dtype(np.float32), chunks=lambda: (b.astype(np.float32) for b in source.chunks()))


# -- columns of arrays -------------------------------------------------------------------------------------------------


def from_mapping(data: Mapping[str, Any], asked: Asked, name: str = "arrays") -> Dataset:
    """The data set of a dict of arrays, of a dict of such dicts or tables for "train" and "test", or of a DataFrame.

    The names of a flat dict may end in _train and _test.
    """
    table = hasattr(data, "iloc")
    if not table and set(data) <= set(SPLITS) and all(hasattr(part, "keys") for part in data.values()):
        if "train" not in data:
            raise DataError(f"{name}: the splits are {', '.join(data)}. Give 'train', and 'test' if there is one.")
        splits, table = dict(data), all(hasattr(part, "iloc") for part in data.values())
    elif not table and data and all(str(column).endswith(("_train", "_test")) for column in data):
        splits = {s: {c.removesuffix(f"_{s}"): v for c, v in data.items() if c.endswith(f"_{s}")} for s in SPLITS}
        splits = {split: columns for split, columns in splits.items() if columns}
    else:
        splits = {"train": data}
    name = "table" if table and name == "arrays" else name
    for columns in splits.values():
        _check_rows_and_names(name, columns)
    given = {split: {column: columns[column] for column in columns.keys()} for split, columns in splits.items()}  # noqa: SIM118
    if not all(given.values()):
        raise DataError(f"{name}: there are no columns.")
    chosen = read(given["train"], asked)
    arrays = {split: {c: in_memory(name, c, v) for c, v in columns.items() if c in chosen} for split, columns in given.items()}
    about = unread(name, given["train"], chosen)

    def load() -> dict[str, Columns]:
        return {split: noting(columns, about) for split, columns in of_arrays(name, arrays, asked).items()}

    return stored(name, _digest(arrays) + about, load, asked, features=table)


def _check_rows_and_names(name: str, columns: Mapping[str, Any]) -> None:
    """DataError for columns without a name or with one name, and for those of pandas in which a row is another sample each."""
    named = list(columns.keys())
    for column in named:
        if not isinstance(column, str):
            how = f" Name them so: {name}.columns = {name}.columns.map(str)." if hasattr(columns, "iloc") else ""
            raise DataError(f"{name}: the column {column!r} is not named by a text, as columns are here.{how}")
        if named.count(column) > 1:
            raise DataError(f"{name}: {named.count(column)} columns are called {column!r}. Rename them, or drop all but one.")
    rows = (
        {} if hasattr(columns, "iloc") else {column: columns[column].index for column in named if hasattr(columns[column], "iloc")}
    )
    for column, index in rows.items():
        first = next(iter(rows))
        if len(index) == len(rows[first]) and not index.equals(rows[first]):
            raise DataError(
                f"{name}: {first} and {column} have different indexes, and rows are taken by position. Align them "
                f"({column}.loc[{first}.index]), or drop both indexes with reset_index(drop=True)."
            )


def read(columns: Mapping[str, Any], asked: Asked) -> list[str]:
    """The columns that are read at all: with `inputs` others may hold anything."""
    if asked.inputs is None:
        return list(columns)
    named = {*asked.inputs, *asked.named("label"), *asked.named("target")}
    named |= {c for c in columns if c.lower() in ANSWERS and asked.answers}
    return [column for column in columns if column in named] or list(columns)


def unread(name: str, present: Iterable[str], taken: Iterable[str]) -> str:
    """What of the columns that are `present` is not taken, for the note; "" where all is."""
    left = [column for column in present if column not in taken]
    return f"{name}: left out: {_listed(left)}." if left else ""


def noting(columns: Columns, about: str) -> Columns:
    """The columns, with `about` before the note on the first."""
    first, *_ = columns
    return {**columns, first: dataclasses.replace(columns[first], about=" ".join(filter(None, (about, columns[first].about))))}


def detached(value: Any) -> Any:
    """A tensor without its gradient, on the CPU, and in a type that numpy has; anything else as it is."""
    if not hasattr(value, "detach"):
        return value
    value = value.detach().cpu()
    return value.float() if str(value.dtype) == "torch.bfloat16" else value


def in_memory(name: str, column: str, value: Any) -> np.ndarray | list[np.ndarray]:
    """An array, or a list of samples of different lengths; DataError for what is neither, or has missing values."""
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        raise DataError(f"{name}: {column} has masked values. Fill or drop them: what is below a mask would be read.")
    if hasattr(value, "isna") and (n := int(value.isna().sum())):
        raise DataError(f"{name}: column {column} has {n} missing values. Fill or drop them.")
    if hasattr(value, "cat") and hasattr(getattr(value, "dtype", None), "categories"):
        value = value.astype(value.dtype.categories.dtype)
    try:
        array = np.asarray(detached(value))
    except (ValueError, TypeError, RuntimeError):
        array = None  # samples of different lengths
    if array is not None and array.ndim == 0:
        raise DataError(f"{name}: {column} is one value, {value!r}. Give an array with one entry for each sample.")
    if array is not None and not array.dtype.hasobject and array.dtype.kind != "T":
        return array
    items = list(value if array is None else array)
    if items and all(isinstance(item, str) for item in items):
        return np.array(items, dtype=np.str_)
    if items and all(isinstance(item, int | float | np.number | bool) for item in items):
        return np.array(items)
    parts = []
    for at, item in enumerate(items):
        try:
            part = np.asarray(item)
        except (ValueError, TypeError, RuntimeError):
            part = np.asarray(None)
        if part.dtype.hasobject or part.dtype.kind not in "biuf" or not part.ndim:
            raise DataError(
                f"{name}: {column}[{at}] is of type {type(item).__name__} in a column of type object. Give arrays of numbers: all "
                "samples of one shape, or of different lengths along the first axis with pad=0."
            )
        parts.append(part)
    if len({part.shape for part in parts}) == 1:
        return np.stack(parts)
    if len({part.shape[1:] for part in parts}) > 1:
        odd = next(at for at, part in enumerate(parts) if part.shape[1:] != parts[0].shape[1:])
        raise DataError(
            f"{name}: samples of {column} have the shapes {parts[0].shape} (the first) and {parts[odd].shape} (number {odd}). They may "
            "differ along the first axis alone, with pad=."
        )
    return parts


def _digest(arrays: Mapping[str, Mapping[str, Any]]) -> str:
    digest = hashlib.sha256()
    for split, columns in arrays.items():
        for column, value in columns.items():
            digest.update(f"{split} {column} {len(value)}".encode())
            for array in value if isinstance(value, list) else [value]:
                digest.update(f"{array.dtype.str} {array.shape}".encode())
                for block in blocks(array) if array.size else ():
                    digest.update(np.ascontiguousarray(block).view(np.uint8).data)
    return digest.hexdigest()


def of_array(array: np.ndarray) -> Source:
    """A column of an array."""
    return Source(array.shape, array.dtype, lambda: blocks(array))


def of_arrays(name: str, arrays: Mapping[str, Mapping[str, Any]], asked: Asked) -> dict[str, Columns]:
    """Columns of arrays, or of lists of samples of different lengths, which are filled up to the longest of both splits."""
    made: dict[str, Columns] = {split: {} for split in arrays}
    for column in arrays["train"]:
        given = {split: columns[column] for split, columns in arrays.items() if column in columns}
        ragged = [value for value in given.values() if isinstance(value, list)]
        lengths = [len(part) for value in given.values() for part in value] if ragged else []
        for split, value in given.items():
            made[split][column] = padded(name, column, value, asked, min(lengths), max(lengths)) if ragged else of_array(value)
    return made


def padded(name: str, column: str, samples: Sequence[np.ndarray], asked: Asked, least: int, most: int) -> Source:
    """The column of samples of `least` to `most` entries along the first axis, filled up behind their end."""
    check_pad(name, column, asked, least, most)
    dtype, pad = np.result_type(*{part.dtype for part in samples}) if len(samples) else np.dtype(np.float32), asked.pad
    is_answer = asked.answers in ("answer", "label") and column.lower() in ANSWERS
    if (is_answer or column in asked.named("label")) and dtype.kind in "biu":
        dtype, pad = np.result_type(dtype, np.int8), NO_LABEL
    shape = (len(samples), most, *samples[0].shape[1:])

    def chunks() -> Iterator[np.ndarray]:
        for at in range(0, len(samples), rows := rows_per_chunk(shape, dtype)):
            yield filled(samples[at : at + rows], most, dtype, pad)

    about = f"{name}: {column} has {least} to {most} entries a sample, filled up with {pad:g} to {most}."
    return Source(shape, dtype, chunks, about=about, padded=pad)


def check_pad(name: str, column: str, asked: Asked, least: int, most: int) -> None:
    """DataError where samples have different lengths and nobody has said what fills them up."""
    if asked.pad is None:
        raise DataError(
            f"{name}: samples of {column} have {least} to {most} entries along the first axis. Give pad=0 (what stands behind the end "
            "of the shorter ones), or cut all to one length."
        )


def filled(samples: Iterable[np.ndarray], length: int, dtype: np.dtype, pad: float) -> np.ndarray:
    """One array of samples that have different lengths, with `pad` behind their end."""
    samples = list(samples)
    out = np.full((len(samples), length, *samples[0].shape[1:]), pad, dtype)
    for row, sample in zip(out, samples, strict=True):
        row[: len(sample)] = sample
    return out


def _side_by_side(name: str, columns: Columns) -> Source:
    """One column (N, F) of F columns of one number a sample."""
    for column, source in columns.items():
        if source.dtype.kind not in "biuf":
            raise DataError(f"{name}: column {column} is of type {source.dtype}. Give numbers, or leave it out with inputs=[...].")
    dtype = np.result_type(*(source.dtype for source in columns.values()))
    dtype = dtype if dtype.kind in "biuf" else np.dtype(np.float64)
    n = {source.shape[0] for source in columns.values()}
    if len(n) > 1:
        raise DataError(f"{name}: columns have {min(n)} to {max(n)} rows.")

    def chunks() -> Iterator[np.ndarray]:
        for parts in zip(*(_even(source) for source in columns.values()), strict=True):
            yield np.stack([part.astype(dtype, copy=False) for part in parts], axis=1)

    return Source((n.pop(), len(columns)), dtype, chunks, columns=tuple(columns))


ROWS = 4096


def _even(source: Source) -> Iterator[np.ndarray]:
    """The samples of a column, ROWS at a time, however it is read."""
    held, n = [], 0
    for block in source.chunks():
        held.append(block)
        n += len(block)
        while n >= ROWS:
            joined = np.concatenate(held)
            yield joined[:ROWS]
            held, n = [joined[ROWS:]], n - ROWS
    if n:
        yield np.concatenate(held)
