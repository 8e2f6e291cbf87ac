"""A folder of folders: each is a class, and holds one file for each of its samples.

Classes are numbered in the order of their names, numbers in them by value (CT-2 before CT-10), and the data set's note
says which is which.

Used by `labkit.data.pictures` and `labkit.data.nifti`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from labkit.data.shards import Dataset, Source, file_key, rows_per_chunk, shard
from labkit.errors import DataError

NAMED = 12  # so many classes are named one by one in the note


class Plan(NamedTuple):
    """How the files of a data set become samples, and what is to be said of it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Path], np.ndarray]
    about: str


def suffix_of(path: Path) -> str:
    """`.nii.gz`, or the last suffix, in small letters."""
    name = path.name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else Path(name).suffix


def _folders(path: Path) -> list[Path]:
    found = [folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith(".")]
    return sorted(found, key=lambda folder: [(not part.isdigit(), part.zfill(20)) for part in re.split(r"(\d+)", folder.name)])


def suffixes_below(path: Path) -> set[str]:
    """The suffixes of the files in the folders in `path`."""
    return {suffix_of(file) for folder in _folders(path) for file in folder.iterdir() if file.is_file()}


def by_class(path: Path, suffixes: set[str], skip: str = "") -> list[tuple[Path, int]]:
    """The files in each folder with one of `suffixes`, and their class; without those whose names end in `skip`.

    DataError for fewer than two classes and for a class without files. Hidden files are no samples.
    """
    folders = _folders(path)
    if len(folders) < 2:
        raise DataError(f"{path} holds one class, {folders[0].name}. Put each class into a folder of its own, two at least.")
    found = []
    for label, folder in enumerate(folders):
        files = [file for file in sorted(folder.iterdir()) if suffix_of(file) in suffixes and not file.name.startswith(".")]
        files = [file for file in files if file.is_file() and not (skip and file.name.endswith(skip))]
        if not files:
            raise DataError(f"{folder} holds no sample ({', '.join(sorted(suffixes))}). Fill the class or remove the folder.")
        found += [(file, label) for file in files]
    return found


def shard_files(path: Path, samples: list[tuple[Path, int]], size: Any, plan: Callable[[], Plan]) -> Dataset:
    """The data set of `samples` in the folder `path`, read as `plan()` says: one file is in memory at a time, or as many as
    make a block. `size` is what was asked for, which makes another data set of the same files.
    """
    files, labels = [file for file, _ in samples], np.array([label for _, label in samples])

    def load() -> tuple[Source, None]:
        shape, dtype, read, about = plan()
        rows = rows_per_chunk((len(files), *shape), dtype)

        def chunks() -> Iterator[np.ndarray]:
            for at in range(0, len(files), rows):
                yield np.stack([read(file) for file in files[at : at + rows]])

        names = [folder.name for folder in _folders(path)]
        said = ", ".join(f"{label} {name}" for label, name in enumerate(names[:NAMED])) + ", ..." * (len(names) > NAMED)
        about = f"{path.name}: {len(names)} classes: {said}. {about}".strip()
        return Source((len(files), *shape), dtype, chunks, labels, about), None

    return shard(path.name, hashlib.sha256(f"{file_key(files)} {size}".encode()).hexdigest(), load)


def checked_size(size: Any, axes: str, default: tuple[int, ...]) -> tuple[int, ...]:
    """`size` as a tuple of whole numbers above 0, one for each of `axes`; the default for None."""
    if size is None:
        return default
    if not isinstance(size, tuple | list) or len(size) != len(default) or not all(type(n) is int and n > 0 for n in size):
        raise ValueError(f"size={size!r} is not known. Give {axes}, for instance {default}.")
    return tuple(size)
