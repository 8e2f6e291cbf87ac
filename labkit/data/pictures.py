"""Images by class: a folder of pictures for each class, as TF-Flowers, Extended Yale B and most people's own sets come.

Pictures of one size stay as they are (Yale B's 192x168); of several sizes they are resized, stretched and not cut, to
180x180. They are grey where all of them are, else RGB. Of the files only JPEG, PNG, BMP and PGM/PPM are opened, by
Pillow, and none that unpacks to more than MAX_PIXELS.

Used by `labkit.data.paths`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from labkit.data.classes import Plan, by_class, checked_size, shard_files
from labkit.data.shards import Dataset
from labkit.errors import DataError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".pgm", ".ppm"})
FORMATS = ("JPEG", "PNG", "BMP", "PPM")
GREY = ("1", "L", "I", "I;16")
AMBIENT = "_Ambient.pgm"  # Yale B: the room without flash, another size, no face of the set
SIZE = (180, 180)
MAX_PIXELS = 1 << 26


def from_folder(path: Path, size: tuple[int, int] | None = None) -> Dataset:
    """(1, H, W) or (3, H, W) of bytes, one class a folder. `size` is (H, W) for all of them."""
    samples = by_class(path, SUFFIXES, skip=AMBIENT)
    size = checked_size(size, "(height, width)", SIZE) if size is not None else None
    return shard_files(path, samples, size, lambda: _plan([file for file, _ in samples], size))


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
                picture = picture.convert("RGBA")  # transparent parts of a palette are said in bytes
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
