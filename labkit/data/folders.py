"""A folder of folders: each is a class, and what is below it are its samples, a file each.

So come TF-Flowers, Extended Yale B, MosMedData and most people's own pictures. All files are counted: how many were read, and
what was left out and why, is in the data set's note. Two folders `train` and `test` of such folders are the splits. Folders that
may be something else than classes are refused.

Used by `labkit.data.pictures` and `labkit.data.nifti`; `checked_size` also by `labkit.data.synthetic`.
"""

import hashlib
import math
import os
import re
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any, NamedTuple

from labkit.data.cache import Source, cached, converted_key, file_key
from labkit.data.dataset import Dataset
from labkit.errors import DataError, several, whole

AMBIENT = "_Ambient.pgm"  # Yale B: the room without flash, another size, no face of the set
SYSTEM = ("thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx")
SPLIT_NAMES = frozenset({"train", "training", "test", "testing", "val", "valid", "validation", "dev"})
LISTED = 12  # so many classes are named one by one in the note
ADVICE = "Replace it, or take it out of the folder."
MOST = 1 << 28  # values of a sample: what is asked to be larger does not fit into memory


def suffix_of(path: Path) -> str:
    """`.nii.gz`, or the last suffix, in small letters."""
    name = path.name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else Path(name).suffix


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM or name == "Icon\r"


def _classes(path: Path) -> list[Path]:
    """The folders in `path` in the order of their names, numbers in them by value: CT-2 before CT-10."""
    found = [folder for folder in path.iterdir() if folder.is_dir() and not _is_hidden(folder.name)]
    return sorted(found, key=lambda folder: (_natural(folder.name), folder.name))


def _natural(name: str) -> list[str | int]:
    """Texts and numbers of a name in turn."""
    return [int(part) if at % 2 else part for at, part in enumerate(re.split(r"(\d+)", name))]


def _below(folder: Path) -> tuple[list[Path], list[Path]]:
    """All files in a folder and the folders in it, through links too, in the order of their names; and the hidden ones."""

    def failed(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be read: {error}. Make it readable, or take it out of the folder.") from error

    files, hidden, seen = [], [], set()
    for where, inner, names in os.walk(folder, onerror=failed, followlinks=True):
        if (real := os.path.realpath(where)) in seen:  # a link to a folder above it, or to one that was read
            inner.clear()
            continue
        seen.add(real)
        hidden += [Path(where, name) for name in inner if _is_hidden(name)]
        inner[:] = sorted(name for name in inner if not _is_hidden(name))
        for name in names:
            (hidden if _is_hidden(name) else files).append(Path(where, name))
    return sorted(files), sorted(hidden)


def suffixes_below(path: Path) -> set[str]:
    """The suffixes of the files below the folders in `path`, hidden ones aside."""
    return {suffix_of(file) for folder in _classes(path) for file in _below(folder)[0]}


Groups = list[tuple[list[Path], list[int]]]  # files and labels: of the training split, and of the test split where there is one


def cached_classes(path: Path, suffixes: Set[str], options: Any, sources: Callable[[Groups, str], list[Source]]) -> Dataset:
    """The data set of the files with one of `suffixes` below the folders in `path`, each a class, in the order of their names; or
    below such folders in `train` and in `test` (or `val`), which are then its splits.

    `sources(groups, about)` reads the files of one split or of both in one way, and `options` are what it makes of them. What is no
    sample is counted in the note. DataError for fewer than two classes, folders of splits beside others, a class without files,
    classes of the test split that are not in the training split, and an empty file.
    """
    splits = _splits(path)
    classes, beside = _some_classes(splits[0]), [_found(split, suffixes, _classes(split)) for split in splits[1:]]
    first = _found(splits[0], suffixes, classes)
    names = [folder.name for folder in classes]
    for split in splits[1:]:
        if unknown := [folder.name for folder in _classes(split) if folder.name not in names]:
            raise DataError(
                f"{split} holds {', '.join(unknown[:LISTED])}, and {splits[0]} no such class. Each class has to be in both."
            )
    found = [first, *beside]
    groups = [(one.files, [names.index(folder) for folder in one.classes]) for one in found]
    files, labels = [file for own, _ in groups for file in own], [label for _, own in groups for label in own]
    if empty := [file for file in files if not file.stat().st_size]:
        raise DataError(f"{empty[0]} is empty. {ADVICE}")
    hidden = [unseen for one in found for unseen in one.hidden] + [each for each in sorted(path.iterdir()) if _is_hidden(each.name)]
    roots = [path, *splits] if len(splits) > 1 else [path]
    loose = [file for root in roots for file in sorted(root.iterdir()) if not file.is_dir() and not _is_hidden(file.name)]
    counts = _counts(path, files, [file for one in found for file in one.left], loose, len(splits) > 1)
    listed = ", ".join(f"{label} {folder.name}" for label, folder in enumerate(classes[:LISTED]))
    about = f"{path.name}: {len(classes)} classes: {listed}{', ...' * (len(classes) > LISTED)}. {counts}"
    if len(splits) > 1:
        parts = " and ".join(f"{len(own)} in {split.name}" for split, (own, _) in zip(splits, groups, strict=True))
        about += f" The splits are those of the folders: {parts}."
        if unused := [each.name for each in _classes(path) if each not in splits]:
            about += f" Not used: {', '.join(unused)}; each run holds samples out of the training split to score itself."
    about = about.encode(errors="replace").decode()  # file names may be bytes of any kind

    def load() -> tuple[Source, Source | None]:
        # hidden files come and go with whoever looks into a folder: they are no reason to convert it again
        aside = f" Hidden or of the system, left out: {len(hidden)} ({hidden[0].name})." if hidden else ""
        train, *test = sources(groups, about + aside + _copies(path, files, labels))
        return train, test[0] if test else None

    named = [folder.name.encode(errors="replace").decode() for folder in classes]
    key = (file_key(files), options, counts, *[split.name for split in splits[1:]])
    return cached(path.name, converted_key(*key), load, classes=named)


def _splits(path: Path) -> list[Path]:
    """The folders of the training and the test split in `path`; itself where it holds none. DataError where they cannot be told."""
    folders = _classes(path)
    named = {folder: folder.name.lower() for folder in folders}
    splits = [folder for folder in folders if named[folder] in SPLIT_NAMES]
    if len(splits) < 2:
        return [path]
    train = [folder for folder in splits if named[folder].startswith("train")]
    test = [folder for folder in splits if named[folder].startswith("test")] or [folder for folder in splits if folder not in train]
    if len(train) == len(test) == 1 and splits == folders:
        return train + test
    splits.sort(key=lambda folder: folder not in train)
    raise DataError(
        f"{path} holds {', '.join(folder.name for folder in splits)}, which are splits and no classes"
        + (f", beside {', '.join(f.name for f in folders if f not in splits)}" if splits != folders else "")
        + f". Leave one folder train and one folder test (or val) in it, or give one of them, such as {splits[0]}: a tenth is then held "
        "out as the test split."
    )


def _some_classes(path: Path) -> list[Path]:
    classes = _classes(path)
    if len(classes) < 2:
        inner = _classes(classes[0]) if classes else []
        hint = f" If the folders in it are the classes, give {classes[0]}." if len(inner) > 1 else ""
        one = f"one class, {classes[0].name}" if classes else "no class"
        raise DataError(f"{path} holds {one}. Put each class into a folder of its own, two at least.{hint}")
    return classes


class _Found(NamedTuple):
    """The samples below some folders: their files, the name of the class of each, and what is left out."""

    files: list[Path]
    classes: list[str]
    left: list[Path]
    hidden: list[Path]


def _found(path: Path, suffixes: Set[str], classes: list[Path]) -> _Found:
    files, names, left, hidden = [], [], [], []
    for folder in classes:
        found, unseen = _below(folder)
        samples = [file for file in found if suffix_of(file) in suffixes and not file.name.endswith(AMBIENT) and file.is_file()]
        if not samples:
            other = ", ".join(sorted({suffix_of(file) or file.name for file in found})[:LISTED])
            raise DataError(
                f"{folder} holds no sample ({', '.join(sorted(suffixes))}). Fill the class or remove the folder."
                + (f" It holds {len(found)} other files ({other})." if found else "")
            )
        files += samples
        names += [folder.name] * len(samples)
        taken = set(samples)
        left += [file for file in found if file not in taken]
        hidden += unseen
    _check_levels(path, classes, files)
    return _Found(files, names, left, hidden)


def _check_levels(path: Path, classes: list[Path], files: list[Path]) -> None:
    """DataError where the folders in the classes might be the classes: all have the same ones, and no files beside them."""
    inner: dict[Path, set[str]] = {folder: set() for folder in classes}
    for file in files:
        folder, *deeper = file.relative_to(path).parts[:-1]
        if not deeper:
            return
        inner[path / folder].add(deeper[0])
    first, *others = inner.values()
    if len(first) > 1 and all(names == first for names in others):
        all_of, inside = (", ".join(names[:LISTED]) for names in ([folder.name for folder in classes], sorted(first)))
        raise DataError(
            f"{path}: {all_of} all hold the folders {inside}. Which are the classes? Give one of the former, such as {classes[0]}, "
            "or put all files of a class into its folder."
        )


def _counts(path: Path, files: list[Path], left: list[Path], beside: list[Path], in_splits: bool) -> str:
    """How many files were taken, and what was left out, in one line."""
    nested = sum(len(file.relative_to(path).parts) > 2 + in_splits for file in files)
    said = f"{len(files)} files read" + (f", {nested} of them in subfolders" if nested else "")
    kinds: dict[str, list[Path]] = {}
    for file in left:
        is_broken, is_ambient = not file.is_file(), file.name.endswith(AMBIENT)
        kind = "broken link" if is_broken else AMBIENT if is_ambient else suffix_of(file) or "without a suffix"
        kinds.setdefault(kind, []).append(file)
    reasons = [f"{len(found)} {kind} ({found[0].relative_to(path)})" for kind, found in sorted(kinds.items())]
    if beside:
        reasons.append(f"{len(beside)} beside the class folders ({beside[0].name})")
    more = ", ..." * (len(reasons) > LISTED)
    return f"{said}; left out: {', '.join(reasons[:LISTED])}{more}." if reasons else f"{said}."


def _copies(path: Path, files: list[Path], labels: list[int]) -> str:
    """A note on files of one content: copies may be in both splits, or in two classes."""
    by_size: dict[int, list[int]] = {}
    for at, file in enumerate(files):
        by_size.setdefault(file.stat().st_size, []).append(at)
    by_content: dict[str, list[int]] = {}
    for alike in by_size.values():
        for at in alike if len(alike) > 1 else ():
            with open(files[at], "rb") as stream:
                by_content.setdefault(hashlib.file_digest(stream, "sha256").hexdigest(), []).append(at)
    groups = [found for found in by_content.values() if len(found) > 1]
    if not groups:
        return ""
    of_two = sum(len({labels[at] for at in found}) > 1 for found in groups)
    one, other = (files[at].relative_to(path) for at in groups[0][:2])
    also = f"; in more than one class: {of_two}" if of_two else ""
    return f" Copies of other files: {sum(len(found) - 1 for found in groups)} ({other} is {one}){also}."


def checked_size(size: Any, axes: str, default: tuple[int, ...]) -> tuple[int, ...]:
    """`size` as a tuple of whole numbers above 0, one for each of `axes`; the default for None."""
    if size is None:
        return default
    try:
        sides = tuple(several("size", size, whole))
    except (TypeError, ValueError):
        sides = ()
    if len(sides) == len(default):
        if (n := math.prod(sides)) > MOST:
            raise ValueError(f"size={size!r}: a sample of {n:,} values is too large. Give at most {MOST:,}.")
        return sides
    raise ValueError(f"size={size!r} is no size. Give {axes}, for instance {default}.")
