"""A folder of folders: each is a class and contains one file for each of its samples, here pictures.

So come TF-Flowers, Extended Yale B and most people's own pictures. Pictures of one size stay as they are (Yale B's 192x168); of
several sizes they are resized, stretched and not cut, to 180x180. They are grey where all of them are, else RGB. They are turned
upright by their EXIF tag and laid on a ground where they are transparent. What was read or left out is counted in the note.

Used by `labkit.data.open_dataset` (`from_folder`) and by `labkit.data.nifti` for volumes (the rest).
"""

import hashlib
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from labkit.data.cache import Source, cached, converted_key, file_key, one_by_one, reading
from labkit.data.dataset import Dataset
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
AMBIENT = "_Ambient.pgm"  # Yale B: the room without flash, another size, no face of the set
SYSTEM = ("thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx")
SPLIT_NAMES = frozenset({"train", "training", "test", "testing", "val", "valid", "validation", "dev"})
SIZE = (180, 180)
GROUND = "white"
MAX_PIXELS = 1 << 26  # none that unpacks to more is opened
LISTED = 12  # so many classes are named one by one in the note
ADVICE = "Replace it, or take it out of the folder."


def from_folder(path: Path, size: tuple[int, int] | None = None, ground: str = GROUND) -> Dataset:
    """(1, H, W) or (3, H, W), one class a folder; `size` is (H, W) for all of them, `ground` the colour below transparency.

    Bytes, but float32 where the files hold more than 8 bits, whose values then stay as they are.
    """
    size = checked_size(size, "(height, width)", SIZE) if size is not None else None
    if ground != GROUND:
        _colour(ground)  # a worker opens what is ready without Pillow
    return cached_classes(path, SUFFIXES, (size, ground), partial(_source, size, ground))


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


def _source(size: tuple[int, int] | None, ground: str, files: list[Path], labels: list[int], about: str) -> Source:
    headers = [_header(file) for file in files]
    sizes = {(header.height, header.width) for header in headers}
    height, width = size or (min(sizes) if len(sizes) == 1 else SIZE)
    grey = all(header.grey for header in headers)
    depths = {header.depth: file for header, file in zip(headers, files, strict=True)}
    if len(depths) > 1 and not depths.keys() <= {"8 bits", "16 bits"}:
        one, other = list(depths.items())[:2]
        raise DataError(f"{one[1]} holds {one[0]} and {other[1]} {other[0]}, which have no common scale. Keep one kind.")
    (deep,) = depths if len(depths) == 1 else ("mixed",)
    if sizes != {(height, width)}:
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
            picture = _upright(picture)
            if _has_alpha(picture):
                picture, is_clear = _on_ground(file, picture.convert("RGBA"), below, ground)
                clear.update([file] * is_clear)
            if _depth(picture) == "8 bits":
                picture = picture.convert("L" if grey else "RGB")
            else:  # conversion would cut off at 255
                values = np.asarray(picture, dtype=np.float32)
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
    return one_by_one(read, files, shape, np.uint8 if deep == "8 bits" else np.float32, labels, said)


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


def _has_alpha(picture: Any) -> bool:
    return picture.mode in ALPHA or (picture.mode in ("1", "L", "P", "RGB") and "transparency" in picture.info)


def _on_ground(file: Path, picture: Any, below: tuple[int, int, int], ground: str) -> tuple[Any, bool]:
    """An RGBA picture laid on a ground, and whether any of it is transparent; DataError where nothing can be told apart on it."""
    from PIL import Image

    laid = Image.alpha_composite(Image.new("RGBA", picture.size, (*below, 255)), picture).convert("RGB")
    alpha = picture.getchannel("A").getextrema()
    if all(low == high for low, high in laid.getextrema()) and any(low != high for low, high in picture.getextrema()):
        if alpha[1] == 0:
            raise DataError(f"{file} is transparent everywhere. {ADVICE}")
        other = "grey" if ground == "black" else "black"
        raise DataError(
            f"{file} has transparency, and nothing of it is seen on a {ground} ground. Give another, such as ground={other!r}."
        )
    return laid, alpha[0] < 255


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


# -- folders of classes, whatever their files contain -------------------------------------------------------------------


def suffix_of(path: Path) -> str:
    """`.nii.gz`, or the last suffix, in small letters."""
    name = path.name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else Path(name).suffix


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM or name == "Icon\r"


def _classes(path: Path) -> list[Path]:
    """The folders in `path` in the order of their names, numbers in them by value: CT-2 before CT-10."""
    found = [folder for folder in path.iterdir() if folder.is_dir() and not _is_hidden(folder.name)]
    return sorted(found, key=lambda folder: [(not part.isdigit(), part.zfill(20)) for part in re.split(r"(\d+)", folder.name)])


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


def cached_classes(path: Path, suffixes: Set[str], options: Any, source: Callable[[list[Path], list[int], str], Source]) -> Dataset:
    """The data set of the files with one of `suffixes` below the folders in `path`, each a class, in the order of their names.

    `source(files, labels, about)` reads them, and `options` are what it makes of them. What is no sample is counted in the
    note. DataError for fewer than two classes, folders of splits, a class without files, and an empty file.
    """
    classes = _classes(path)
    if len(classes) < 2:
        inner = _classes(classes[0])
        hint = f" If the folders in it are the classes, give {classes[0]}." if len(inner) > 1 else ""
        raise DataError(f"{path} holds one class, {classes[0].name}. Put each class into a folder of its own, two at least.{hint}")
    splits = [folder.name for folder in classes if folder.name.lower() in SPLIT_NAMES]
    if len(splits) > 1:
        splits.sort(key=lambda name: not name.lower().startswith("train"))
        raise DataError(
            f"{path} holds {', '.join(splits)}, which are splits and no classes. Give one of them, such as {path / splits[0]}, or "
            "put the files of each class into one folder; a tenth is held out as the test split."
        )
    files, labels, left, hidden = [], [], [], []
    for label, folder in enumerate(classes):
        found, unseen = _below(folder)
        samples = [file for file in found if suffix_of(file) in suffixes and not file.name.endswith(AMBIENT) and file.is_file()]
        if not samples:
            other = ", ".join(sorted({suffix_of(file) or file.name for file in found})[:LISTED])
            raise DataError(
                f"{folder} holds no sample ({', '.join(sorted(suffixes))}). Fill the class or remove the folder."
                + (f" It holds {len(found)} other files ({other})." if found else "")
            )
        files += samples
        labels += [label] * len(samples)
        taken = set(samples)
        left += [file for file in found if file not in taken]
        hidden += unseen
    _check_levels(path, classes, files)
    if empty := [file for file in files if not file.stat().st_size]:
        raise DataError(f"{empty[0]} is empty. {ADVICE}")
    hidden += [found for found in sorted(path.iterdir()) if _is_hidden(found.name)]
    beside = [file for file in sorted(path.iterdir()) if not file.is_dir() and not _is_hidden(file.name)]
    counts = _counts(path, files, left, beside)
    listed = ", ".join(f"{label} {folder.name}" for label, folder in enumerate(classes[:LISTED]))
    about = f"{path.name}: {len(classes)} classes: {listed}{', ...' * (len(classes) > LISTED)}. {counts}"
    about = about.encode(errors="replace").decode()  # file names may be bytes of any kind

    def load() -> tuple[Source, None]:
        # hidden files come and go with whoever looks into a folder: they are no reason to convert it again
        aside = f" Hidden or of the system, left out: {len(hidden)} ({hidden[0].name})." if hidden else ""
        return source(files, labels, about + aside + _copies(path, files, labels)), None

    return cached(path.name, converted_key(file_key(files), options, counts), load)


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


def _counts(path: Path, files: list[Path], left: list[Path], beside: list[Path]) -> str:
    """How many files were taken, and what was left out, in one line."""
    nested = sum(len(file.relative_to(path).parts) > 2 for file in files)
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
    if not isinstance(size, tuple | list) or len(size) != len(default) or not all(type(n) is int and n > 0 for n in size):
        raise ValueError(f"size={size!r} is no size. Give {axes}, for instance {default}.")
    return tuple(size)
