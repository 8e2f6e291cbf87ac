"""A data set of the user's own that is asked for its items on the workers: `__len__` and `__getitem__`, with whatever transforms it has.

An item is a pair (x, y), ((x1, x2), y), a dict by name, or x alone; each value a number, an array or a tensor. Nothing is converted, and
nothing is normalised: its own transforms decide. Where samples have classes, they are read once when the set is opened, unless it holds them
itself (`targets`, `labels`, a column).

It travels to the workers by value where it is small, else by the import path of a function that makes it there, once a process.

    labkit.Classifier(model, MySet())                       # by value
    labkit.Classifier(model, "my_module:make_my_set")       # a function; it may return (train, test) as well

What it draws from the global generators of Python and numpy is seeded for each batch, and by `labkit.problems` that of torch too, so that a
run can be replayed.

Used by `labkit.data.open_dataset` and `labkit.problems`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import random
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import numpy as np

from labkit.data.cache import Source, check_labels, count_classes, hold_out, print_once
from labkit.data.columns import ANSWERS, NO_LABEL, Asked, check_pad, detached, filled
from labkit.data.dataset import SPLITS, Column, Dataset
from labkit.errors import DataError, calling, did_you_mean, known
from labkit.imports import imported

BY_VALUE = 8 << 20  # bytes of a data set that goes to each worker as it is
LOOKED_AT = 8  # items that are looked at where there is no need to see all

_MADE: dict[str, tuple[Any, dict[str, Any]]] = {}  # by import path: what it stood for, and the data set that this has made
_making = threading.RLock()  # workers in threads share the data set and the global generators
_seed: ContextVar[int] = ContextVar("seed of the items that are read", default=0)


@contextlib.contextmanager
def seeding(seed: int) -> Iterator[None]:
    """Items that are read inside draw their random numbers from `seed`; outside from 0."""
    token = _seed.set(seed)
    try:
        yield
    finally:
        _seed.reset(token)


def seed_of_items() -> int:
    """The seed of the items that are read now."""
    return _seed.get()


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The global generators of Python and numpy as if they had just been seeded, and then as they were; for one thread at a time."""
    with _making:
        before, numpy_before = random.getstate(), np.random.get_state()
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(before)
            np.random.set_state(numpy_before)


class Items(Dataset):
    """A reference to a data set of the user's own, as `Dataset`; `path` is its import path, or says that it goes by value."""

    def __init__(
        self, path: str, meta: dict[str, Any], own: dict[str, Any] | None, labels: dict[str, np.ndarray], asked: Asked
    ) -> None:
        super().__init__(path, meta)
        self._own, self._labels, self._asked = own, labels, asked
        self.pad = asked.pad
        self._keys: dict[str, tuple[Any, ...]] = meta["keys"]
        self._held_out: bool = meta["held_out"]

    @property
    def reference(self) -> Any:
        if self._own is not None:
            return {"by_value": self.name}
        options = {name: value for name, value in dataclasses.asdict(self._asked).items() if value is not None}
        return {"import_path": self.path, "options": options} if options else self.path

    def batch(
        self, indices: Any, split: str = "train", window: tuple[slice, ...] = (), fields: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        names = list(self.fields) if fields is None else [known("fields", name, self.fields) for name in fields]
        items, made = self._items(self._checked(indices, split), split), {}
        for name in names:
            part = self._together(name, split, items)
            made[name] = part[(slice(None), slice(None), *window)] if window and name == self.inputs[0] else part
        return made

    def raw(self, indices: Any, split: str = "train", field: str | None = None) -> np.ndarray:
        name = self.inputs[0] if field is None else known("field", field, self.fields)
        return self._together(name, split, self._items(self._checked(indices, split), split))

    def labels(self, split: str = "train") -> np.ndarray:
        if self.label is None or not self._labels:
            return super().labels(known("split", split, SPLITS)) if self.label is None else self._map(self.label, split)[:]
        return self._labels[known("split", split, SPLITS)].astype(np.int64)

    def stored_type(self, field: str) -> np.dtype:
        return self.fields[field].dtype

    def pad_of(self, field: str) -> float | None:
        return NO_LABEL if self.fields[field].role == "label" and self.pad is not None else self.pad

    def _map(self, field: str, split: str) -> Any:
        return Column(self, field, split)

    def _items(self, at: np.ndarray, split: str) -> list[tuple[int, Any]]:
        """The items at these indices, each with its number in the user's own data set."""
        made = _made(self.path) if self._own is None else self._own
        source = made["train" if self._held_out else split]
        n = self.n_train + self.n_test if self._held_out else {"train": self.n_train, "test": self.n_test}[split]
        if len(source) != n:
            raise DataError(
                f"{self.path} has {len(source)} items in the {split} split on {socket.gethostname()}, but {n} where the problem comes from. "
                "It has to be the same on every machine."
            )
        at = _rows(n, split)[at] if self._held_out else at
        with _seeded(seed_of_items()):
            return _read(self.name, source, at)

    def _together(self, name: str, split: str, items: list[tuple[int, Any]]) -> np.ndarray:
        field, keys = self.fields[name], self._keys[name]
        if not items:
            return np.empty((0, *(n or 0 for n in field.shape)), field.dtype)
        if (quick := _stacked(items, keys)) is not None and quick.shape[1:] == field.shape:
            return quick.astype(field.dtype, copy=False)
        parts = [_value(item, keys, f"{self.name}: item {number}") for number, item in items]
        if (text := next((at for at, part in enumerate(parts) if part.dtype.kind not in "biuf"), None)) is not None:
            raise DataError(f"{self.name}: {name} of item {items[text][0]} is of type {parts[text].dtype}. Give numbers.")
        shapes = {part.shape for part in parts}
        if len(shapes) == 1 and (None in field.shape or field.shape in shapes):
            return np.stack(parts).astype(field.dtype, copy=False)
        tails = {shape[1:] for shape in shapes}
        odd = next((at for at, part in enumerate(parts) if part.shape != field.shape), 0)
        if not field.shape or tails != {field.shape[1:]} or any(part.ndim != len(field.shape) for part in parts):
            raise DataError(
                f"{self.name}: item {items[odd][0]} has {name} of shape {parts[odd].shape}, where {field.shape} is expected."
            )
        lengths = [len(part) for part in parts]
        check_pad(f"{self.name}: item {items[odd][0]} and others", name, self._asked, min(lengths), max(lengths))
        return filled(parts, max(lengths), field.dtype, self.pad_of(name))


def from_items(data: Any, asked: Asked) -> Dataset:
    """The data set of the user's own object, of a pair or a dict of two (train, test), or of an import path that leads to one."""
    own = None
    if isinstance(data, str):
        path, name, splits = data, data.partition(":")[2], _splits(_called(data))
    else:
        import cloudpickle

        own = splits = _splits(data)
        name = type(splits["train"]).__name__
        try:
            payload = cloudpickle.dumps(splits)
        except Exception as error:
            raise DataError(f"{name} cannot travel to the workers: {type(error).__name__}: {error}. {_BY_PATH}") from error
        if len(payload) > BY_VALUE:
            raise DataError(
                f"{name} has {len(payload) / 2**20:.1f} MiB, and by value at most {BY_VALUE >> 20} MiB travel. {_BY_PATH}"
            )
        path = f"{name}-{hashlib.sha256(payload).hexdigest()[:20]}"
    if own is None:
        _MADE[path] = imported(path, DataError), splits
    for split, source in splits.items():
        if not len(source) or (len(splits) == 1 and len(source) < 2):
            raise DataError(f"{name}: the {split} split has {len(source)} item(s). Give 2 at least.")
    meta, labels = _described(name, splits, asked)
    dataset = Items(path, meta, own, labels, asked)
    print_once(dataset.note)
    return dataset


_BY_PATH = 'Put a function that makes it into a module, and give its import path: data="my_module:make_my_set".'


def is_items(data: Any) -> bool:
    """Is this a data set by items: has it a length, and items by number (also a DataLoader of such)?"""
    return (hasattr(data, "__getitem__") and hasattr(data, "__len__")) or _is_loader(data) or _is_iterable(data)


def is_items_path(data: Any) -> bool:
    """Is this the import path of a function that makes one?"""
    module, colon, name = data.partition(":") if isinstance(data, str) else ("", "", "")
    return bool(colon) and all(part.isidentifier() for part in (*module.split("."), *name.split(".")))


def _is_loader(data: Any) -> bool:
    return hasattr(data, "dataset") and hasattr(data, "batch_sampler")


def _is_iterable(data: Any) -> bool:
    return "torch" in sys.modules and isinstance(data, sys.modules["torch"].utils.data.IterableDataset)


def _called(path: str) -> Any:
    make = imported(path, DataError)
    with calling(f"data={path!r}", DataError):
        made = make() if isinstance(make, type) or (callable(make) and not is_items(make)) else make
    if isinstance(made, type):
        raise DataError(f"{path} gave the class {made.__name__}, not a data set.")
    return made


def _splits(data: Any) -> dict[str, Any]:
    if isinstance(data, Mapping):
        if more := [str(split) for split in data if split not in SPLITS]:
            raise DataError(f"there is a split {more[0]!r}. Give two, {{'train': ..., 'test': ...}}.")
        splits = dict(data)
    elif (
        isinstance(data, tuple | list) and len(data) == 2 and all(is_items(part) and not isinstance(part, Mapping) for part in data)
    ):
        splits = dict(zip(SPLITS, data, strict=True))
    else:
        splits = {"train": data}
    splits = {split: source.dataset if _is_loader(source) else source for split, source in splits.items()}
    for source in splits.values():
        if _is_iterable(source) or not is_items(source):
            raise DataError(
                f"{type(source).__name__} has no items by number. Give a data set with __len__ and __getitem__ (map-style): samples are "
                "dealt out to the workers by their numbers."
            )
    if "train" not in splits:
        raise DataError(f"the splits are {', '.join(map(str, data))}. Give 'train', and 'test' if there is one.")
    return splits


def _made(path: str) -> dict[str, Any]:
    """The data set of this import path, made in this process the first time, and anew when its module was loaded again."""
    with _making:
        make = imported(path, DataError)
        if path not in _MADE or _MADE[path][0] is not make:
            _MADE[path] = make, _splits(_called(path))
        return _MADE[path][1]


@functools.lru_cache(maxsize=8)
def _rows(n: int, split: str) -> np.ndarray:
    held = hold_out(n)
    return np.flatnonzero(held if split == "test" else ~held)


def _read(name: str, source: Any, at: np.ndarray) -> list[tuple[int, Any]]:
    """The items at these numbers; DataError that names the one that failed."""
    numbers = at.tolist()
    if hasattr(source, "__getitems__"):
        with contextlib.suppress(Exception):  # one by one then, to see which it is
            return list(zip(numbers, source.__getitems__(numbers), strict=True))
    items = []
    for number in numbers:
        try:
            items.append((number, source[number]))
        except Exception as error:
            raise DataError(f"{name}: item {number} cannot be read: {type(error).__name__}: {error}") from error
    return items


def _value(item: Any, keys: tuple[Any, ...], called: str) -> np.ndarray:
    """What stands at `keys` in an item, as an array."""
    value = item
    try:
        for key in keys:
            value = value[key]
    except (KeyError, IndexError, TypeError):
        raise DataError(f"{called} has no {keys[-1]!r}, as the first one has.") from None
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        raise DataError(f"{called}: {keys[-1]!r} has masked values. Fill them: what is below a mask would be read.")
    try:
        array = np.asarray(detached(value))
    except (ValueError, TypeError, RuntimeError) as error:
        raise DataError(f"{called}: {keys[-1]!r} is no array: {error}.") from error
    if array.dtype.hasobject:
        raise DataError(f"{called}: {keys[-1]!r} is of type {type(value).__name__}. Give numbers, arrays or tensors.")
    return array


def _stacked(items: list[tuple[int, Any]], keys: tuple[Any, ...]) -> np.ndarray | None:
    """What stands at `keys` in all items, where it is tensors of one kind or numbers, which most sets give; else None."""
    with contextlib.suppress(Exception):
        values = [item for _, item in items]
        for key in keys:
            values = [value[key] for value in values]
        kinds = {type(value) for value in values}
        if kinds <= {int} or kinds <= {float}:
            return np.array(values)
        if "torch" in sys.modules and kinds == {sys.modules["torch"].Tensor} and len({value.dtype for value in values}) == 1:
            return sys.modules["torch"].stack(values).detach().numpy()
    return None


def _leaves(item: Any) -> tuple[dict[str, tuple[Any, ...]], list[str]]:
    """Where the values of an item stand, by name; and which of them are answers by their place."""
    if isinstance(item, Mapping):
        return {str(key): (key,) for key in item}, [str(key) for key in item if str(key).lower() in ANSWERS]
    if not isinstance(item, tuple | list):
        return {"x": ()}, []
    if len(item) == 1:
        return {"x": (0,)}, []
    *inputs, last = range(len(item))
    found: dict[str, tuple[Any, ...]] = {}
    for at in inputs:
        found |= _named(item[at], (at,), "x" if len(inputs) == 1 else f"x{at + 1}")
    answers = _named(item[last], (last,), "y")
    return {**found, **answers}, list(answers)


def _named(value: Any, keys: tuple[Any, ...], name: str) -> dict[str, tuple[Any, ...]]:
    if isinstance(value, Mapping):
        return {str(key): (*keys, key) for key in value}
    if isinstance(value, tuple | list) and any(hasattr(part, "shape") for part in value):
        return {f"{name}{at + 1}": (*keys, at) for at in range(len(value))}
    return {name: keys}


def _described(name: str, splits: dict[str, Any], asked: Asked) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The meta data, as of a data set in the cache, and the labels of both splits where samples have a class."""
    with _seeded(0):
        looked = _read(name, splits["train"], np.arange(min(LOOKED_AT, len(splits["train"]))))
    keys, answers = _leaves(looked[0][1])
    keys, roles, notes = _roles(name, looked[0], keys, answers, asked)
    fields: dict[str, dict[str, Any]] = {}
    for field in roles:
        parts = [_value(item, keys[field], f"{name}: item {number}") for number, item in looked]
        first, role = parts[0], roles[field]
        lengths = {part.shape[:1] for part in parts}
        if len(lengths) > 1:
            check_pad(name, field, asked, min(n for (n,) in lengths), max(n for (n,) in lengths))
        shape = [None, *first.shape[1:]] if len(lengths) > 1 else list(first.shape)
        if role == "answer":
            role = "label" if first.dtype.kind in "biu" and not (first.ndim == 1 and _is_multi_hot(parts)) else "target"
        dtype = _batch_type(first.dtype, role, roles[field] == "answer")
        fields[field] = {"shape": shape, "dtype": str(dtype), "role": role}
    held_out = len(splits) == 1
    n = {split: len(_rows(len(splits["train"]), split)) if held_out else len(splits[split]) for split in SPLITS}
    labels = {}
    for field in [field for field, of in fields.items() if of["role"] == "label"]:
        found, note = _labels_of(name, splits, field, keys[field], asked)
        if fields[field]["shape"] == []:
            given = {split: Source((len(y),), y.dtype, lambda: (), y) for split, y in found.items()}
            try:
                found, fields[field]["n_values"], more = check_labels(name, given, field)
            except DataError as error:
                raise DataError(f"{error} If they are numbers to be predicted, give target={field!r}.") from None
            note = " ".join(part for part in (note, more) if part)
            if sum(of["role"] == "label" for of in fields.values()) == 1:
                parts = {split: found["train"][_rows(len(found["train"]), split)] for split in SPLITS} if held_out else found
                labels = {split: part.astype(np.min_scalar_type(int(part.max()))) for split, part in parts.items()}
        else:
            present = set().union(*(np.unique(y).tolist() for y in found.values()))
            present |= {NO_LABEL} if None in fields[field]["shape"] else set()
            fields[field]["n_values"], fields[field]["no_class"], more = count_classes(f"{name}: {field}", present)
            note = " ".join(part for part in (note, more) if part)
        notes.append(note)
    notes.append(f"{name}: read item by item on the workers, as it is: nothing is normalised.")
    meta = {
        "name": name,
        "n": n,
        "fields": fields,
        "keys": keys,
        "synthetic": False,
        "held_out": held_out,
        "classes": _classes(splits["train"], fields),
        "note": " ".join(note for note in notes if note),
        "files": {},
    }
    return meta, labels


def _is_multi_hot(parts: list[np.ndarray]) -> bool:
    return len(parts[0]) > 1 and all(part.min() >= 0 and part.max() <= 1 for part in parts)


def _batch_type(dtype: np.dtype, role: str, decided: bool) -> np.dtype:
    if dtype == np.float64 or (role == "target" and decided and dtype.kind != "f"):
        return np.dtype(np.float32)
    if role == "label" or (dtype.kind in "iu" and dtype != np.uint8):
        return np.dtype(np.int64)
    return dtype


def _roles(
    name: str, first: tuple[int, Any], keys: dict[str, tuple[Any, ...]], answers: list[str], asked: Asked
) -> tuple[dict[str, tuple[Any, ...]], dict[str, str], list[str]]:
    """Which values are read, their roles, and notes."""
    roles: dict[str, str] = {}
    for role in ("label", "target", "input"):
        for field in asked.named(role):
            if field not in keys:
                raise DataError(f"{name}: {field!r} is in no item.{did_you_mean(field, keys)} An item has: {', '.join(keys)}.")
            roles[field] = role
    if asked.answers:
        roles |= {field: asked.answers for field in answers if field not in roles}
    left = []
    for field in keys if asked.inputs is None else ():
        if field not in roles:
            try:
                kind = _value(first[1], keys[field], name).dtype.kind
            except DataError:
                kind = "O"
            (roles.update({field: "input"}) if kind in "biuf" else left.append(field))
    if "input" not in roles.values():
        raise DataError(f"{name}: nothing of an item is an input of numbers. An item has: {', '.join(keys)}.")
    for field in roles:
        if (kind := (value := _value(first[1], keys[field], f"{name}: item {first[0]}")).dtype.kind) not in "biuf":
            raise DataError(f"{name}: {field} of item {first[0]} is of type {value.dtype} ({kind}). Give numbers, such as 0..K-1.")
    ordered = sorted(roles, key=lambda field: roles[field] != "input")
    notes = [f"{name}: left out, as it is no number: {', '.join(left)}."] if left else []
    return {field: keys[field] for field in ordered}, {field: roles[field] for field in ordered}, notes


def _labels_of(
    name: str, splits: dict[str, Any], field: str, keys: tuple[Any, ...], asked: Asked
) -> tuple[dict[str, np.ndarray], str]:
    """All labels of each split: those that the data set holds, where they are those of its items, else by reading each item once."""
    found, began, read = {}, time.perf_counter(), 0
    for split, source in splits.items():
        n = len(source)
        held = _held(source, field, n)
        with _seeded(0):
            if held is not None:
                some = _read(name, source, np.unique([0, n // 3, n // 2, n - 1]))
                if all(np.array_equal(_value(item, keys, name), held[number]) for number, item in some):
                    found[split] = held
                    continue
            parts = []
            for at in range(0, n, 256):
                items = _read(name, source, np.arange(at, min(at + 256, n)))
                parts += [_value(item, keys, f"{name}: item {number}") for number, item in items]
        if (
            len({part.shape for part in parts}) > 1
            and asked.pad is not None
            and len({part.shape[1:] for part in parts}) == 1
            and parts[0].ndim
        ):
            parts = [part.ravel() for part in parts]
            found[split], read = np.concatenate(parts), read + n
            continue
        if len({part.shape for part in parts}) > 1:
            odd = next(at for at, part in enumerate(parts) if part.shape != parts[0].shape)
            raise DataError(f"{name}: item {odd} has {field} of shape {parts[odd].shape}, where {parts[0].shape} is expected.")
        found[split], read = np.stack(parts), read + n
    seconds = time.perf_counter() - began
    return found, f"{name}: all {read} items were read once for {field} ({seconds:.1f} s)." if read and seconds > 1 else ""


def _classes(source: Any, fields: Mapping[str, Mapping[str, Any]]) -> list[str] | None:
    """The names of the classes, where the set has them: `classes`, as torchvision's have, or the features of Hugging Face."""
    labels = [(field, of["n_values"]) for field, of in fields.items() if of["role"] == "label"]
    while hasattr(source, "indices") and hasattr(source, "dataset"):
        source = source.dataset
    for find in (lambda field: source.classes, lambda field: source.features[field].names):
        with contextlib.suppress(Exception):
            ((field, n),) = labels
            names = [str(name) for name in find(field)]
            if len(names) == n == len(set(names)):
                return names
    return None


def _held(source: Any, field: str, n: int) -> np.ndarray | None:
    """The labels that a data set holds itself, if it seems to."""
    if hasattr(source, "indices") and hasattr(source, "dataset"):  # torch.utils.data.Subset
        whole = _held(source.dataset, field, len(source.dataset))
        return None if whole is None else whole[np.asarray(source.indices)]
    with contextlib.suppress(Exception):
        if hasattr(source, "column_names"):
            value = source[field]
        elif hasattr(source, "tensors"):
            value = source.tensors[-1]
        else:
            value = next(getattr(source, name) for name in ("targets", "labels") if hasattr(source, name))
        array = np.asarray(value)
        if array.dtype.kind in "biu" and array.ndim == 1 and len(array) == n:
            return array
    return None
