"""Samples that are given after the training, for a network that was trained on a data set: converted and normalised as its own were.

    (x, y), x, {"x": ..., "y": ...}    arrays: rearranged to the shapes of its fields, in the units that it was given in
    a name, a path, a `Dataset`        the test split it comes with; all samples, in their order, where it has none of its own. Measured is
                                       of the set of the training the test split alone

Used by `labkit.training.run` for `Run.predict` and `Run.evaluate`; `arranged` also by `labkit.subnets.result`.
"""

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from labkit.data import by_items, named, open_dataset, streamed
from labkit.data.arrays import array_of
from labkit.data.cache import hold_out
from labkit.data.columns import filled, in_memory
from labkit.data.dataset import Dataset, Field
from labkit.errors import DataError

LOOKED_AT = 64  # samples of another data set, to see in which units they are
SCALES_APART = 50  # between the spread of what is given and of what was trained on: not the same units


class Given(Dataset):
    """Samples with the fields and the normalisation of the data set `like`; they are its test split."""

    def __init__(self, like: Dataset, samples: Mapping[str, Any], is_own: bool = False) -> None:
        self.__dict__.update(vars(like))
        self.is_own = is_own  # the test split of `like` itself
        self._samples = dict(samples)
        self.fields = {name: field for name, field in like.fields.items() if name in samples}
        self.answers = [name for name in like.answers if name in samples]
        self.n_train, self.n_test = 0, len(next(iter(samples.values())))
        if not self.n_test:
            raise DataError("no samples were given. Give one at least.")

    def _map(self, field: str, split: str) -> Any:
        return self._samples[field]


class Whole:
    """One field of a data set whose test split was held out of the samples that were given: all of them, in their order."""

    def __init__(self, train: np.ndarray, test: np.ndarray, pad: float | None = None, held: np.ndarray | None = None) -> None:
        self.pad = pad  # behind the end of samples that are shorter than others
        self.parts, held = (train, test), hold_out(len(train) + len(test)) if held is None else held
        self.split, self.at = held.astype(int), np.where(held, np.cumsum(held), np.cumsum(~held)) - 1

    def __len__(self) -> int:
        return len(self.at)

    def __getitem__(self, key: Any) -> np.ndarray:
        at, *rest = key if isinstance(key, tuple) else (key,)
        split = self.split[at]
        found = [part[(self.at[at][split == number], *rest)] for number, part in enumerate(self.parts)]
        shape = np.max([part.shape[1:] for part in found], axis=0).astype(int)
        made = np.full((len(at), *shape), self.pad or 0, found[0].dtype)
        for number, part in enumerate(found):
            rows = np.flatnonzero(split == number)
            made[(rows, slice(part.shape[1])) if part.ndim > 1 else rows] = part
        return made


def given(data: Any, like: Dataset, answers: bool) -> Given:
    """`data` as samples of the kind of `like`; with labels and targets if `answers`. DataError where they do not fit."""
    names = [*like.inputs, *like.answers] if answers else like.inputs
    if by_items(data) or (isinstance(data, Mapping | tuple | list) and streamed.splits_of(data)):
        return _of_dataset(data, like, names, answers)
    if hasattr(data, "iloc") and hasattr(data, "columns") and _has_columns_of(data, like):
        data = _of_table(data, like, names)
    if isinstance(data, Mapping):
        if missing := [name for name in names if name not in data]:
            raise DataError(f"{', '.join(missing)} missing: give {', '.join(names)}; the data hold {', '.join(map(str, data))}.")
        return _of_arrays({name: data[name] for name in names}, like)
    if not hasattr(data, "dtype") and not isinstance(data, tuple | list) and not hasattr(data, "iloc"):
        return _of_dataset(data, like, names, answers)
    parts = data if len(names) > 1 or (answers and isinstance(data, tuple)) else (data,)
    if hasattr(parts, "dtype") or len(parts) != len(names):
        raise DataError(f"give a tuple of {len(names)}, ({', '.join(names)}), a name, a path or a data set.")
    return _of_arrays(dict(zip(names, parts, strict=True)), like)


def _has_columns_of(table: Any, like: Dataset) -> bool:
    """Are the columns of a table to be taken by their names: has it those, or has a network of named features got a table of such?"""
    named = like.columns_of(like.inputs[0])
    return set(named) <= set(table.columns) or (named != [like.inputs[0]] and all(isinstance(c, str) for c in table.columns))


def _of_table(table: Any, like: Dataset, names: list[str]) -> dict[str, Any]:
    """The columns of a DataFrame as the fields that they are in `like`, texts as the numbers of their classes."""
    made = {}
    for name in names:
        columns = like.columns_of(name)
        if missing := [column for column in columns if column not in table.columns]:
            raise DataError(f"{', '.join(missing)} missing: the table has {', '.join(map(str, table.columns))}.")
        if (n := int(table[columns].isna().to_numpy().sum())) > 0:
            raise DataError(f"{name} has {n} missing values. Fill or drop them.")
        values = table[columns].to_numpy(float) if columns != [name] or like.fields[name].shape == (1,) else table[name].to_numpy()
        if like.classes and name == like.label and values.dtype.kind not in "biuf":
            numbers = {text: number for number, text in enumerate(like.classes)}
            if unknown := [text for text in dict.fromkeys(values.tolist()) if text not in numbers]:
                raise DataError(f"{name} {unknown[0]!r} is new; the network knows {', '.join(like.classes)}.")
            values = np.array([numbers[text] for text in values.tolist()], dtype=np.int64)
        made[name] = values
    return made


def _of_arrays(arrays: Mapping[str, Any], like: Dataset) -> Given:
    samples = {}
    for name, value in arrays.items():
        field = like.fields[name]
        value = _filled_up(value, field, like.pad_of(name), name)
        if field.role == "input":
            samples[name] = arranged(value, field, like.affine_of(name), like.stored_type(name), name, like.is_channels_last(name))
        else:
            names = like.classes if name == like.label else None
            samples[name] = _answers(_numbered(value, names, name) if names else value, field, name)
    n = {name: len(part) for name, part in samples.items()}
    if len(set(n.values())) > 1:
        raise DataError(f"the arrays are of different lengths: {', '.join(f'{name} {length}' for name, length in n.items())}.")
    return Given(like, samples)


def _filled_up(value: Any, field: Field, pad: float | None, name: str) -> Any:
    """Samples that are shorter than those of the training, filled up behind their end as those were (`pad`; None: they were not)."""
    if pad is None or not field.shape:
        return value
    samples = in_memory("samples", name, value)
    if not len(samples) or (not isinstance(samples, list) and (samples.ndim < 2 or field.shape[0] in (None, samples.shape[1]))):
        return value
    longest = max(map(len, samples))
    if longest > (most := field.shape[0] or longest):
        raise DataError(f"{name}: a sample has {longest} entries, and those of the training had {most} at most. Cut it.")
    return filled(samples, most, np.result_type(np.int8, *{part.dtype for part in samples}), pad)


def arranged(
    x: Any,
    field: Field,
    affine: tuple[np.ndarray, np.ndarray] | None,
    stored: np.dtype,
    name: str = "x",
    channels_last: bool = False,
) -> np.ndarray:
    """Raw inputs (n, *field.shape), in the type in which those of the training were stored, or in float32.

    A single channel may be left out, and channels may be last: (n, H, W), (n, H, W, C); where the shape does not tell, they are where
    they were in the training (`channels_last`). DataError for other shapes and for what is no number; a warning where the values cannot be
    in the units of the training.
    """
    x, shape = array_of(name, x), tuple(field.shape)
    if x.dtype.kind not in "biuf" or not np.isfinite(x).all():
        raise DataError(f"{name} of {x.dtype} were given that are not all finite numbers; nothing can be predicted from those.")
    own = x.shape[1:]
    if channels_last and own == (*shape[1:], shape[0]):
        x = np.moveaxis(x, -1, 1)
    elif own != shape and None not in shape:
        if own == shape[1:] and shape[0] == 1:
            x = x[:, None]
        elif len(shape) > 1 and own == (*shape[1:], shape[0]):
            x = np.moveaxis(x, -1, 1)
        else:
            hint = f" For one sample give {name}[None]." if x.shape in (shape, shape[1:], (*shape[1:], shape[0])) else ""
            raise DataError(f"{name} has shape {x.shape}; this network needs (n, {', '.join(map(str, shape))}).{hint}")
    if affine is None:
        return x.astype(field.dtype)
    if not x.size:
        return x.astype(np.float32)
    _compare_units(name, x, affine)
    return x if x.dtype == stored else x.astype(np.float16 if stored == np.float16 else np.float32)


def _compare_units(name: str, x: np.ndarray, affine: tuple[np.ndarray, np.ndarray]) -> None:
    """A warning where samples (n, C, ...) cannot be in the units of the training."""
    spread = (
        x.std(axis=(0, *range(2, x.ndim)), dtype=np.float64) * affine[1].ravel()
    )  # of each channel, in the units of the training
    if (spread > 0).any() and not 1 / SCALES_APART < (times := float(np.median(spread[spread > 0]))) < SCALES_APART:
        warnings.warn(
            f"{name} spreads {times:.3g} times as much as the data of the training: is it in the units of those? They are normalised by "
            "themselves; give them as they were given for the training.",
            stacklevel=5,
        )


def _numbered(y: Any, classes: list[str], name: str) -> Any:
    """Labels that are names of classes by their numbers; others as they are."""
    texts = np.asarray(y)
    if texts.dtype.kind not in "UO" or not all(isinstance(text, str) for text in texts.flat):
        return y
    if unknown := sorted({*texts.flat} - {*classes}):
        raise DataError(f"{name} holds {', '.join(unknown[:5])}; the network knows {', '.join(classes)}.")
    return np.vectorize(classes.index, otypes=[np.int64])(texts)


def _answers(y: Any, field: Field, name: str) -> np.ndarray:
    y = array_of(name, y)
    if not y.ndim or not _is_of(y.shape[1:], field.shape):
        raise DataError(f"{name} has shape {y.shape}; give (n{''.join(f', {n}' for n in field.shape)}).")
    if field.role == "label":
        known = y[~np.isin(y, field.no_class)] if field.no_class else y
        if y.dtype.kind not in "biuf" or not np.isfinite(y).all() or (y != np.floor(y)).any() or (known < 0).any():
            raise DataError(f"{name} are no labels: give whole numbers 0..{(field.n_values or 2) - 1}, as for the training.")
        if field.n_values is not None and known.size and known.max() >= field.n_values:
            raise DataError(f"{name} reaches {known.max()}; the network was trained on labels 0..{field.n_values - 1}.")
    return y.astype(field.dtype)


def _is_of(shape: Sequence[int | None], like: Sequence[int | None]) -> bool:
    """Are samples of this shape, with None for a length that varies, of the kind of those of the training?"""
    return len(shape) == len(like) and all(n == m or m is None for n, m in zip(shape, like, strict=True))


def _of_dataset(data: Any, like: Dataset, names: list[str], answers: bool) -> Given:
    if isinstance(data, list) and len(data) == 1 and by_items(data):  # of which none can be held out
        data = {"train": data, "test": data}
    roles = {} if isinstance(data, Dataset) or not by_items(data) else {"pad": getattr(like, "pad", None)}
    for option, role in (("label", "label"), ("target", "target"), ("inputs", "input")) if roles else ():
        roles[option] = [name for name in names if like.fields[name].role == role] or None
    files = streamed.splits_of(data) if isinstance(like, streamed.Streamed) else None  # with the columns of the training
    other = streamed.from_files(files, like.asked) if files else open_dataset(data, **roles)
    if isinstance(data, str | os.PathLike) and other.classes and like.classes and other.shape != like.shape:
        other = open_dataset(data, size=tuple(like.shape[1:]))  # as the pictures and volumes of the training were
    if missing := [name for name in names if name not in other.fields]:
        raise DataError(f"data {other.name!r} have no {', '.join(missing)}: {other.described()}.")
    for name in names:
        here, there = other.fields[name], like.fields[name]
        if not _is_of(here.shape, there.shape) or here.role != there.role:
            raise DataError(
                f"data {other.name!r}: {name} is {here.role} {here.shape}; the network was trained on {there.role} {there.shape} of "
                f"{like.name!r}. Open it with the options of the training: run.evaluate(labkit.open_dataset(..., size=...))."
            )
    is_own = other.path == like.path
    is_whole = other.held_out and not (is_own and answers) and not (isinstance(data, str) and data in named.NAMED)
    split = {name: [other._map(name, split) for split in ("train", "test")] for name in names}
    samples = {
        name: Whole(*parts, getattr(other, "pad", None), getattr(other, "withheld", None)) if is_whole else parts[1]
        for name, parts in split.items()
    }
    if like.label in samples:
        samples[like.label] = _renumbered(samples[like.label], other, like)
    for name in (name for name in names if not is_own and like.affine_of(name)):
        _compare_units(name, samples[name][np.arange(min(len(samples[name]), LOOKED_AT))], like.affine_of(name))
    return Given(like, samples, is_own)


def _renumbered(y: Any, other: Dataset, like: Dataset) -> np.ndarray:
    """Labels by the numbers that the classes had in the training, where the classes of both have names (folders)."""
    y = y[np.arange(len(y))]
    if other.classes and like.classes and other.classes != like.classes:
        if unknown := [name for name in other.classes if name not in like.classes]:
            raise DataError(f"data {other.name!r} hold {', '.join(unknown)}; the network knows {', '.join(like.classes)}.")
        y = np.array([like.classes.index(name) for name in other.classes])[y]
    elif (other.classes or like.classes) and other.classes != like.classes and other.n_classes != like.n_classes:
        raise DataError(
            f"data {other.name!r} have {other.n_classes} classes and the training had {like.n_classes}; which is which cannot be told. "
            "Give arrays (x, y) with the labels of the training."
        )
    if like.n_classes is not None and len(y) and y.max() >= like.n_classes:
        raise DataError(f"data {other.name!r} reach label {y.max()}; the network was trained on labels 0..{like.n_classes - 1}.")
    return y
