"""What a data set must be: the checks of shapes, types, labels and values, before anything is written or started.

Each check takes what was given and either returns it in the one form that shards have, or says what is wrong with it,
where, and what to do.

Used by `labkit.data.shards`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from labkit.errors import DataError


@dataclass(frozen=True)
class Layout:
    """How samples are stored: shape of one, type, how a block is rearranged to it, and what to say about it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    arrange: Callable[[np.ndarray], np.ndarray]
    note: str = ""


def _label(letter: str, split: str, splits: Any) -> str:
    return letter if len(splits) == 1 else f"{letter}_{split}"


def check_shapes(name: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise DataError unless each split is (N, ...) with 2 to 5 axes, none empty, and all samples have one shape."""
    for split, shape in shapes.items():
        x = _label("x", split, shapes)
        if not 2 <= len(shape) <= 5:
            hint = " For one number a sample use x[:, None]." if len(shape) == 1 else ""
            raise DataError(
                f"{name}: {x} has shape {shape}. Give (N, F) features, (N, H, W) or (N, C, H, W) images, or "
                f"(N, C, D, H, W) volumes.{hint}"
            )
        if 0 in shape:
            raise DataError(f"{name}: {x} is empty, its shape is {shape}. Give at least one sample with one value.")
    if len(shapes) == 1 and shapes["train"][0] < 2:
        raise DataError(f"{name}: x holds 1 sample, and a test split has to be held out. Give 2 samples at least.")
    if len({shape[1:] for shape in shapes.values()}) > 1:
        raise DataError(
            f"{name}: samples of x_train have shape {shapes['train'][1:]}, those of x_test {shapes['test'][1:]}. "
            "Both splits need the same."
        )


def check_labels(name: str, given: Mapping[str, tuple[np.ndarray, int]]) -> tuple[dict[str, np.ndarray], int, list[str]]:
    """Labels as int64, the number of classes K, and notes; `given` holds for each split its labels and the length of
    its x.

    K is the largest training label plus 1. Raises DataError for another number of labels than of samples, for labels
    that are no whole numbers, negative, counted from 1, or so far apart that most classes are empty, and for test
    labels of K or more.
    """
    labels = {split: _integers(f"{name}: {_label('y', split, given)}", y, n) for split, (y, n) in given.items()}
    y_train = _label("y", "train", given)
    n_classes = int(labels["train"].max()) + 1
    if "test" in labels and (beyond := labels["test"] >= n_classes).any():
        at = int(beyond.argmax())
        raise DataError(
            f"{name}: y_test[{at}] is {labels['test'][at]}, but the labels of y_train end at {n_classes - 1}. "
            "Labels are 0..K-1 in both splits."
        )
    present = np.unique(labels["train"])
    n_empty = n_classes - len(present)
    if n_empty == 1 and present[0] == 1 and len(present) > 1:
        raise DataError(f"{name}: the labels in {y_train} are 1..{n_classes - 1}. Labels count from 0: use y - 1.")
    if n_empty > n_classes / 2:
        raise DataError(
            f"{name}: {y_train} holds {len(present)} different labels, but the largest is {n_classes - 1}. "
            "Labels are 0..K-1: look for a stray value, or renumber with y = numpy.unique(y, return_inverse=True)[1]."
        )
    notes = [f"{name}: {n_empty} of {n_classes} classes have no sample in {y_train}."] if n_empty else []
    return labels, n_classes, notes


def _integers(called: str, y: np.ndarray, n: int) -> np.ndarray:
    if y.ndim != 1:
        hint = " For one-hot rows use y.argmax(axis=1)." if y.ndim == 2 and y.shape[1] > 1 else " Use y.reshape(-1)."
        raise DataError(f"{called} has shape {y.shape}. Labels have shape (N,).{hint}")
    if len(y) != n:
        raise DataError(f"{called} holds {len(y)} labels for the {n} samples of x. Give one label for each sample.")
    if y.dtype.kind not in "biuf":
        raise DataError(f"{called} is of type {y.dtype}. Labels are 0..K-1: use y = numpy.unique(y, return_inverse=True)[1].")
    if y.dtype.kind == "f":
        y = y.astype(np.float64)
    if y.dtype.kind == "f" and (odd := ~np.isfinite(y) | (y != np.floor(y)) | (np.abs(y) > 2**31)).any():
        at = int(odd.argmax())
        raise DataError(f"{called}[{at}] is {y[at]}. Labels are whole numbers 0..K-1.")
    if (wrong := (y < 0) | (y > 2**31)).any():
        at = int(wrong.argmax())
        raise DataError(f"{called}[{at}] is {y[at]}. Labels are whole numbers 0..K-1: nothing below 0, or beyond K-1.")
    return y.astype(np.int64)


def plan_layout(name: str, given: Mapping[str, Any]) -> Layout:
    """The layout in which the splits in `given` (name -> Source) are stored.

    Booleans, bytes, and integers within 0..255 become uint8; float16 stays; everything else becomes float32. (N, H, W)
    gets a channel; (N, H, W, C) is recognised by C in (1, 3) where axis 1 is neither, and said. Raises DataError for
    other types.
    """
    dtypes = {split: np.dtype(source.dtype) for split, source in given.items()}
    for split, dtype in dtypes.items():
        if dtype.kind not in "biuf":
            raise DataError(
                f"{name}: {_label('x', split, given)} is of type {dtype}. Give booleans, integers or floats; "
                "arrays of Python objects are not read."
            )
    kinds = {dtype.kind for dtype in dtypes.values()}
    if "f" in kinds:
        stored = np.dtype(np.float16 if all(d == np.float16 for d in dtypes.values()) else np.float32)
    elif all(d in (np.dtype(bool), np.dtype(np.uint8)) for d in dtypes.values()):
        stored = np.dtype(np.uint8)
    else:
        blocks = (block for source in given.values() for block in source.chunks())
        stored = np.dtype(np.uint8 if all(b.min() >= 0 and b.max() <= 255 for b in blocks) else np.float32)

    shape = tuple(given["train"].shape[1:])
    if len(shape) == 2:
        return Layout((1, *shape), stored, lambda block: block[:, None])
    if len(shape) == 3 and shape[2] in (1, 3) and shape[0] not in (1, 3):
        height, width, channels = shape
        note = f"{name}: x of shape (N, {height}, {width}, {channels}) is taken as (N, H, W, C), kept as (N, C, H, W)."
        return Layout((channels, height, width), stored, lambda block: np.moveaxis(block, -1, 1), note)
    return Layout(shape, stored, lambda block: block)


def finite_block(block: np.ndarray, dtype: np.dtype, called: str, first: int) -> np.ndarray:
    """A block of samples in the shard's type; DataError for NaN and infinity. `first` is the index of its first one."""
    with np.errstate(over="ignore", invalid="ignore"):
        out = block.astype(dtype, copy=False)
    if dtype.kind == "f" and not (finite := np.isfinite(out)).all():
        bad = np.flatnonzero(~finite.reshape(len(out), -1).all(axis=1))
        value = out[bad[0]][~finite[bad[0]]][0]
        more = f" ({len(bad)} such samples in this block)" if len(bad) > 1 else ""
        raise DataError(
            f"{called}[{first + bad[0]}] holds {value}{more}. Give finite values within the range of {dtype}: "
            "drop such samples, or fill them with numpy.nan_to_num."
        )
    return out
