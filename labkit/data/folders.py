"""A folder of folders: each is a class and holds one file for each of its samples, here pictures.

Classes are numbered in the order of their names, numbers in them by value (CT-2 before CT-10), and the data set's note
lists them.

So come TF-Flowers, Extended Yale B and most people's own pictures. Pictures of one size stay as they are (Yale B's 192x168); of
several sizes they are resized, stretched and not cut, to 180x180. They are grey where all of them are, else RGB. Of the files
only JPEG, PNG, BMP and PGM/PPM are opened, by Pillow, and none that unpacks to more than MAX_PIXELS.

Used by `labkit.data.open_dataset` (`from_folder`) and by `labkit.data.nifti` for volumes (the rest).
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from labkit.data.cache import Source, cached, file_key, rows_per_chunk
from labkit.data.dataset import Dataset
from labkit.errors import DataError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".pgm", ".ppm"})
FORMATS = ("JPEG", "PNG", "BMP", "PPM")
GREY = ("1", "L", "I", "I;16")
AMBIENT = "_Ambient.pgm"  # Yale B: the room without flash, another size, no face of the set
SIZE = (180, 180)
MAX_PIXELS = 1 << 26
LISTED = 12  # so many classes are named one by one in the note


def from_folder(path: Path, size: tuple[int, int] | None = None) -> Dataset:
    """(1, H, W) or (3, H, W) of bytes, one class a folder. `size` is (H, W) for all of them."""
    samples = by_class(path, SUFFIXES, skip=AMBIENT)
    size = checked_size(size, "(height, width)", SIZE) if size is not None else None
    return cached_files(path, samples, size, lambda: _plan([file for file, _ in samples], size))


def _plan(files: list[Path], size: tuple[int, int] | None) -> Plan:
    seen = {_header(file) for file in files}
    sizes, modes = {(height, width) for height, width, _ in seen}, {mode for *_, mode in seen}
    height, width = size or (min(sizes) if len(sizes) == 1 else SIZE)
    grey = modes <= set(GREY)
    about = "" if sizes == {(height, width)} else f"Pictures of {len(sizes)} sizes are resized to {height}x{width}."

    def read(file: Path) -> np.ndarray:
        from PIL import Image

        with _opened(file) as picture:
            if picture.mode.startswith("I"):  # 16 bits: conversion would cut them off at 255
                wide = np.asarray(picture, dtype=np.float32) * (255 / 65535)
                picture = Image.fromarray(np.rint(wide).astype(np.uint8))
            if picture.mode in ("P", "LA", "PA"):
                picture = picture.convert("RGBA")  # a palette holds its transparency in bytes
            picture = picture.convert("L" if grey else "RGB")
            if picture.size != (width, height):
                picture = picture.resize((width, height), Image.Resampling.BILINEAR)
            pixels = np.asarray(picture)
        return pixels[None] if grey else np.moveaxis(pixels, -1, 0)

    return Plan((1 if grey else 3, height, width), np.dtype(np.uint8), read, about)


def _header(file: Path) -> tuple[int, int, str]:
    with _opened(file) as picture:
        return picture.height, picture.width, picture.mode


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """The picture, not yet unpacked; DataError with the file's name for what happens while it is open."""
    from PIL import Image

    advice = "Replace it, or take it out of the folder."
    if not file.stat().st_size:
        raise DataError(f"{file} is empty. {advice}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS is stricter
            with Image.open(file, formats=FORMATS) as picture:
                if picture.width * picture.height > MAX_PIXELS:
                    raise DataError(f"{file} has {picture.width}x{picture.height} pixels, more than {MAX_PIXELS}. {advice}")
                yield picture
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(f"{file} is no whole picture: {error}. {advice}") from error


# -- folders of classes, whatever their files hold ----------------------------------------------------------------------


class Plan(NamedTuple):
    """How the files of a data set become samples, and a note on it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Path], np.ndarray]
    about: str


def suffix_of(path: Path) -> str:
    """`.nii.gz`, or the last suffix, in small letters."""
    name = path.name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else Path(name).suffix


def _classes(path: Path) -> list[Path]:
    found = [folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith(".")]
    return sorted(found, key=lambda folder: [(not part.isdigit(), part.zfill(20)) for part in re.split(r"(\d+)", folder.name)])


def suffixes_below(path: Path) -> set[str]:
    """The suffixes of the files in the folders in `path`."""
    return {suffix_of(file) for folder in _classes(path) for file in folder.iterdir() if file.is_file()}


def by_class(path: Path, suffixes: set[str], skip: str = "") -> list[tuple[Path, int]]:
    """The files in each folder with one of `suffixes`, and their class; without those whose names end in `skip`.

    DataError for fewer than two classes and for a class without files. Hidden files are no samples.
    """
    folders = _classes(path)
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


def cached_files(path: Path, samples: list[tuple[Path, int]], size: Any, plan: Callable[[], Plan]) -> Dataset:
    """The data set of `samples` in the folder `path`, read by `plan()`: one file is in memory at a time, or as many as
    make a block. `size` is what was asked for, which makes another data set of the same files.
    """
    files, labels = [file for file, _ in samples], np.array([label for _, label in samples])

    def load() -> tuple[Source, None]:
        shape, dtype, read, about = plan()
        rows = rows_per_chunk((len(files), *shape), dtype)

        def chunks() -> Iterator[np.ndarray]:
            for at in range(0, len(files), rows):
                yield np.stack([read(file) for file in files[at : at + rows]])

        names = [folder.name for folder in _classes(path)]
        listed = ", ".join(f"{label} {name}" for label, name in enumerate(names[:LISTED])) + ", ..." * (len(names) > LISTED)
        about = f"{path.name}: {len(names)} classes: {listed}. {about}".strip()
        return Source((len(files), *shape), dtype, chunks, labels, about), None

    return cached(path.name, hashlib.sha256(f"{file_key(files)} {size}".encode()).hexdigest(), load)


def checked_size(size: Any, axes: str, default: tuple[int, ...]) -> tuple[int, ...]:
    """`size` as a tuple of whole numbers above 0, one for each of `axes`; the default for None."""
    if size is None:
        return default
    if not isinstance(size, tuple | list) or len(size) != len(default) or not all(type(n) is int and n > 0 for n in size):
        raise ValueError(f"size={size!r} is no size. Give {axes}, for instance {default}.")
    return tuple(size)
