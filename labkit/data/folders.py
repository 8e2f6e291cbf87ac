"""A folder of folders: each is a class and contains one file for each of its samples, here pictures.

So come TF-Flowers, Extended Yale B and most people's own pictures. Pictures of one size stay as they are (Yale B's 192x168); of
several sizes they are resized, stretched and not cut, to 180x180. They are grey where all of them are, else RGB.

Used by `labkit.data.open_dataset` (`from_folder`) and by `labkit.data.nifti` for volumes (the rest).
"""

import hashlib
import re
import warnings
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from labkit.data.cache import Source, cached, file_key, one_by_one, reading
from labkit.data.dataset import Dataset
from labkit.errors import DataError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".pgm", ".ppm"})
FORMATS = ("JPEG", "PNG", "BMP", "PPM")
GREY = ("1", "L", "I", "I;16")
AMBIENT = "_Ambient.pgm"  # Yale B: the room without flash, another size, no face of the set
SIZE = (180, 180)
MAX_PIXELS = 1 << 26  # none that unpacks to more is opened
LISTED = 12  # so many classes are named one by one in the note
ADVICE = "Replace it, or take it out of the folder."


def from_folder(path: Path, size: tuple[int, int] | None = None) -> Dataset:
    """(1, H, W) or (3, H, W) of bytes, one class a folder. `size` is (H, W) for all of them."""
    size = checked_size(size, "(height, width)", SIZE) if size is not None else None
    return cached_classes(path, SUFFIXES, size, partial(_source, size))


def _source(size: tuple[int, int] | None, files: list[Path], labels: list[int], about: str) -> Source:
    headers = {_header(file) for file in files}
    sizes, modes = {(height, width) for height, width, _ in headers}, {mode for *_, mode in headers}
    height, width = size or (min(sizes) if len(sizes) == 1 else SIZE)
    grey = modes <= set(GREY)
    if sizes != {(height, width)}:
        about += f" Pictures of {len(sizes)} sizes are resized to {height}x{width}."

    def read(file: Path) -> np.ndarray:
        from PIL import Image

        with _opened(file) as picture:
            if picture.mode.startswith("I"):  # 16 bits: conversion would cut them off at 255
                wide = np.asarray(picture, dtype=np.float32) * (255 / 65535)
                picture = Image.fromarray(np.rint(wide).astype(np.uint8))
            if picture.mode in ("P", "LA", "PA"):
                picture = picture.convert("RGBA")  # a palette stores its transparency in bytes
            picture = picture.convert("L" if grey else "RGB")
            if picture.size != (width, height):
                picture = picture.resize((width, height), Image.Resampling.BILINEAR)
            pixels = np.asarray(picture)
        return pixels[None] if grey else np.moveaxis(pixels, -1, 0)

    return one_by_one(read, files, (1 if grey else 3, height, width), np.uint8, labels, about)


def _header(file: Path) -> tuple[int, int, str]:
    with _opened(file) as picture:
        return picture.height, picture.width, picture.mode


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """The picture, not yet unpacked; DataError with the file's name for what happens while it is open."""
    from PIL import Image

    with reading(file, "is no whole picture", ADVICE), warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS is stricter
        with Image.open(file, formats=FORMATS) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise DataError(f"{file} has {picture.width}x{picture.height} pixels, more than {MAX_PIXELS}. {ADVICE}")
            yield picture


# -- folders of classes, whatever their files contain -------------------------------------------------------------------


def suffix_of(path: Path) -> str:
    """`.nii.gz`, or the last suffix, in small letters."""
    name = path.name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else Path(name).suffix


def _classes(path: Path) -> list[Path]:
    """The folders in `path` in the order of their names, numbers in them by value: CT-2 before CT-10."""
    found = [folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith(".")]
    return sorted(found, key=lambda folder: [(not part.isdigit(), part.zfill(20)) for part in re.split(r"(\d+)", folder.name)])


def suffixes_below(path: Path) -> set[str]:
    """The suffixes of the files in the folders in `path`."""
    return {suffix_of(file) for folder in _classes(path) for file in folder.iterdir() if file.is_file()}


def cached_classes(path: Path, suffixes: Set[str], size: Any, source: Callable[[list[Path], list[int], str], Source]) -> Dataset:
    """The data set of the files with one of `suffixes` in the folders in `path`, each folder a class, in the order of their names.

    `source(files, labels, about)` reads them, and `size` is what it makes of them. Hidden files are no samples. DataError for
    fewer than two classes, a class without files, and an empty file.
    """
    classes = _classes(path)
    if len(classes) < 2:
        raise DataError(f"{path} holds one class, {classes[0].name}. Put each class into a folder of its own, two at least.")
    files, labels = [], []
    for label, folder in enumerate(classes):
        samples = [file for file in sorted(folder.iterdir()) if suffix_of(file) in suffixes and file.is_file()]
        samples = [file for file in samples if not file.name.startswith(".") and not file.name.endswith(AMBIENT)]
        if not samples:
            raise DataError(f"{folder} holds no sample ({', '.join(sorted(suffixes))}). Fill the class or remove the folder.")
        files += samples
        labels += [label] * len(samples)
    if empty := [file for file in files if not file.stat().st_size]:
        raise DataError(f"{empty[0]} is empty. {ADVICE}")
    listed = ", ".join(f"{label} {folder.name}" for label, folder in enumerate(classes[:LISTED]))
    about = f"{path.name}: {len(classes)} classes: {listed}{', ...' * (len(classes) > LISTED)}."
    key = hashlib.sha256(f"{file_key(files)} {size}".encode()).hexdigest()
    return cached(path.name, key, lambda: (source(files, labels, about), None))


def checked_size(size: Any, axes: str, default: tuple[int, ...]) -> tuple[int, ...]:
    """`size` as a tuple of whole numbers above 0, one for each of `axes`; the default for None."""
    if size is None:
        return default
    if not isinstance(size, tuple | list) or len(size) != len(default) or not all(type(n) is int and n > 0 for n in size):
        raise ValueError(f"size={size!r} is no size. Give {axes}, for instance {default}.")
    return tuple(size)
