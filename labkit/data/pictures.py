"""Pictures by class: a folder of JPEG, PNG, BMP, PGM/PPM, WebP, TIFF or GIF files for each class, read by Pillow.

Pictures of one size stay as they are (Yale B's 192x168), and so do more than half that are of one size, to which the others are
resized; of several sizes they are resized, stretched and not cut, to 180x180. They
are grey where all of them are, else RGB; bytes, or float32 where the files hold more than 8 bits. They are turned upright by their
EXIF tag and laid on a ground where they are transparent.

Used by `labkit.data.open_dataset`.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from labkit.data.cache import Source, one_by_one, reading
from labkit.data.dataset import Dataset
from labkit.data.folders import ADVICE, Groups, cached_classes, checked_size
from labkit.errors import DataError

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".pgm", ".ppm", ".pbm", ".pnm", ".webp", ".tif", ".tiff", ".gif"}
)
FORMATS = ("JPEG", "PNG", "BMP", "DIB", "PPM", "WEBP", "TIFF", "GIF")
ALPHA = ("RGBA", "RGBa", "LA", "La", "PA")
TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
ORIENTATION = 0x0112  # the EXIF tag that says how a picture is to be turned
SIZE = (180, 180)
GROUND = "white"
MAX_PIXELS = 1 << 26  # none that unpacks to more is opened


def from_folder(path: Path, size: tuple[int, int] | None = None, ground: str = GROUND) -> Dataset:
    """(1, H, W) or (3, H, W), one class a folder; `size` is (H, W) for all of them, `ground` the colour below transparency.

    Bytes, but float32 where the files hold more than 8 bits, whose values then stay as they are.
    """
    size = checked_size(size, "(height, width)", SIZE) if size is not None else None
    if ground != GROUND:
        _colour(ground)  # a worker opens what is ready without Pillow
    return cached_classes(path, SUFFIXES, (size or "common", ground), partial(_sources, size, ground))


def _colour(ground: Any) -> tuple[int, int, int]:
    from PIL import ImageColor

    try:
        return ImageColor.getrgb(ground)[:3]
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"ground={ground!r} is no colour. Give a name such as 'black', or '#rrggbb'.") from error


class _Header(NamedTuple):
    """What a file says of its picture: the size when it is upright, and how its values are stored."""

    height: int
    width: int
    grey: bool
    depth: str  # "8 bits", "16 bits", "32 bits" or "floats"
    cut: bool  # 16 bits a colour, of which Pillow reads 8
    turned: bool
    more: bool  # further pictures follow in the file


def _sources(size: tuple[int, int] | None, ground: str, groups: Groups, about: str) -> list[Source]:
    files = [file for own, _ in groups for file in own]
    headers = [_header(file) for file in files]
    sizes = Counter((header.height, header.width) for header in headers)
    common, n = sizes.most_common(1)[0]
    height, width = size or (common if 2 * n > len(files) else SIZE)
    grey = all(header.grey for header in headers)
    depths = {header.depth: file for header, file in zip(headers, files, strict=True)}
    if len(depths) > 1 and not depths.keys() <= {"8 bits", "16 bits"}:
        one, other = list(depths.items())[:2]
        raise DataError(f"{one[1]} holds {one[0]} and {other[1]} {other[0]}, which have no common scale. Keep one kind.")
    (deep,) = depths if len(depths) == 1 else ("mixed",)
    others = [file for file, header in zip(files, headers, strict=True) if (header.height, header.width) != (height, width)]
    if others and sizes[height, width]:
        is_common = f", the size of the other {sizes[height, width]}"
        about += f" Resized to {height}x{width}{is_common}: {len(others)} ({others[0].name})."
    elif others:
        about += f" Pictures of {len(sizes)} sizes are resized to {height}x{width}."
    if deep == "mixed":
        about += f" Of 16 bits, divided by 257 to the scale of bytes: {_count(h.depth == '16 bits' for h in headers)}."
    elif deep != "8 bits":
        about += f" Values are {deep} and stay as they are in the files."
    for found, said in (
        (_count(h.cut for h in headers), "Of 16 bits a colour, read to the upper 8"),
        (_count(h.turned for h in headers), "Turned upright by EXIF orientation"),
        (_count(h.more for h in headers), "Several in one file (animation, pages), only the first read"),
    ):
        about += f" {said}: {found}." if found else ""
    below, clear = _colour(ground), set()

    def read(file: Path) -> np.ndarray:
        from PIL import Image

        with _opened(file) as picture:
            _scale_key(picture)
            picture = _upright(picture)
            if _has_alpha(picture):
                picture, is_clear = _on_ground(file, picture.convert("RGBA"), below, ground)
                clear.update([file] * is_clear)
            if _depth(picture) == "8 bits":
                picture = picture.convert("L" if grey else "RGB")
            else:  # conversion would cut off at 255
                values = np.asarray(picture, dtype=np.float32)
                if isinstance(key := picture.info.get("transparency"), int) and (values == key).any():
                    values = _filled(file, values, key, below, ground)
                    clear.add(file)
                if not np.isfinite(values).all():
                    raise DataError(f"{file} holds values that are no numbers. {ADVICE}")
                picture = Image.fromarray(values / np.float32(257) if deep == "mixed" else values)
            if picture.size != (width, height):
                picture = picture.resize((width, height), Image.Resampling.BILINEAR)
            pixels = np.asarray(picture)
        if pixels.ndim == 2:
            return np.broadcast_to(pixels, (1 if grey else 3, height, width))
        return np.moveaxis(pixels, -1, 0)

    def said() -> str:
        return about + (f" With transparency, laid on {ground} (ground=...): {len(clear)}." if clear else "")

    shape = (1 if grey else 3, height, width)
    kind = np.uint8 if deep == "8 bits" else np.float32
    return [one_by_one(read, own, shape, kind, labels, said) for own, labels in groups]


def _count(found: Iterable[bool]) -> int:
    return sum(map(bool, found))


def _header(file: Path) -> _Header:
    with _opened(file) as picture:
        frames = picture.format != "MPO" and getattr(picture, "n_frames", 1) > 1  # MPO: a JPEG with a preview of it
        # before the tags are read, as for those of a PNG it is unpacked
        cut = _depth(picture) == "8 bits" and any(";16" in str(tile[3]) for tile in picture.tile)
        grey = picture.mode in ("1", "L", "LA", "La", "F") or picture.mode.startswith("I")
        turn = _turn(picture)
        height, width = picture.height, picture.width
        if picture.format == "TIFF" and turn:
            picture.load()  # turns it
            height, width = picture.height, picture.width
        elif turn > 4:
            height, width = width, height
        return _Header(height, width, grey, _depth(picture), cut, turn > 1, frames)


def _depth(picture: Any) -> str:
    if picture.mode == "F":
        return "floats"
    if picture.mode == "I" and picture.format not in ("PNG", "PPM", None):
        return "32 bits"
    return "16 bits" if picture.mode.startswith("I") else "8 bits"


def _turn(picture: Any) -> int:
    """The EXIF orientation, 1 to 8; 0 where there is none that can be read."""
    try:
        found = picture.getexif().get(ORIENTATION, 0)
    except Exception:  # a damaged tag is no damaged picture
        return 0
    return found if found in (1, *TURNS) else 0


def _upright(picture: Any) -> Any:
    from PIL import Image

    turn = 0 if picture.format == "TIFF" else _turn(picture)  # Pillow turns TIFF itself
    if turn not in TURNS:
        picture.load()
        return picture
    kind = picture.format
    picture = picture.transpose(Image.Transpose[TURNS[turn]])
    picture.format = kind
    return picture


def _scale_key(picture: Any) -> None:
    """A PNG may say which value stands for transparency, in the bits of the file: to be called before it is unpacked to 8 bits."""
    raw, key = str(picture.tile[0][3]) if picture.tile else "", picture.info.get("transparency")
    if isinstance(key, tuple) and ";16" in raw:
        picture.info["transparency"] = tuple(value >> 8 for value in key)
    elif isinstance(key, int) and raw in ("L;2", "L;4"):
        picture.info["transparency"] = key * 255 // (2 ** int(raw[2:]) - 1)


def _has_alpha(picture: Any) -> bool:
    return picture.mode in ALPHA or (picture.mode in ("1", "L", "P", "RGB") and "transparency" in picture.info)


def _on_ground(file: Path, picture: Any, below: tuple[int, int, int], ground: str) -> tuple[Any, bool]:
    """An RGBA picture laid on a ground, and whether any of it is transparent; DataError where nothing can be told apart on it."""
    from PIL import Image

    laid = Image.alpha_composite(Image.new("RGBA", picture.size, (*below, 255)), picture).convert("RGB")
    alpha = picture.getchannel("A").getextrema()
    if all(low == high for low, high in laid.getextrema()) and any(low != high for low, high in picture.getextrema()):
        raise _unseen(file, ground, everywhere=alpha[1] == 0)
    return laid, alpha[0] < 255


def _filled(file: Path, values: np.ndarray, key: int, below: tuple[int, int, int], ground: str) -> np.ndarray:
    """Grey values of 16 bits, of which one stands for transparency, laid on a ground; DataError as of `_on_ground`."""
    from PIL import Image

    laid = np.where(values == key, np.float32(257 * Image.new("RGB", (1, 1), below).convert("L").getpixel((0, 0))), values)
    if laid.min() == laid.max():
        raise _unseen(file, ground, everywhere=bool((values == key).all()))
    return laid


def _unseen(file: Path, ground: str, everywhere: bool) -> DataError:
    if everywhere:
        return DataError(f"{file} is transparent everywhere. {ADVICE}")
    other = "grey" if ground == "black" else "black"
    return DataError(
        f"{file} has transparency, and nothing of it is seen on a {ground} ground. Give another, such as ground={other!r}."
    )


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """The picture, not yet unpacked; DataError with the file's name for what happens while it is open."""
    from PIL import Image

    with reading(file, "is no whole picture", ADVICE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of damaged tags, and of sizes, for which MAX_PIXELS is stricter
        with Image.open(file, formats=FORMATS) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise DataError(f"{file} has {picture.width}x{picture.height} pixels, more than {MAX_PIXELS}. {ADVICE}")
            yield picture
