"""CT and other volumes by class: a folder of NIfTI files for each class, as MosMedData comes (CT-0, CT-1, ...).

CT, in HU, is clipped to [-1000, 400] (air to bone) and scaled to [0, 1]; volumes in other units, such as MRI, have values that
stay as they are. Which of the two a set is, is given as `units`, or seen from its values: CT shows air, far below 0. All are
resized to 64 slices of 128x128, the way of the Keras example on MosMedData. Axes are those of DICOM whatever the file's own: slices
from foot to head, rows from front to back, columns from the patient's right to the left. Where a file does not say its own, says two, or is
oblique, the note counts it.

Used by `labkit.data.open_dataset`.
"""

import gzip
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from labkit.data.cache import Source, one_by_one, reading
from labkit.data.dataset import Dataset
from labkit.data.folders import ADVICE, Groups, cached_classes, checked_size
from labkit.data.synthetic.fields import resize_weights
from labkit.errors import DataError, known

SUFFIXES = frozenset({".nii", ".nii.gz"})
SIZE = (64, 128, 128)
WINDOW = (-1000.0, 400.0)  # HU
AIR = -500.0  # HU: each CT has voxels below it
PADDING = -5000.0  # HU: few scanners write less around a patient, and other units may
UNITS = ("HU", "file")
MAX_SIDE = 4096  # a header may contain anything
OBLIQUE = 20.0  # degrees between an axis of a file and that of the patient, from which on it is said
DOUBTS = {
    "none": "Axes not given in the file (sform and qform code 0), taken to go from right to left, back to front and foot to head",
    "two": "Of two orientations in the file (sform, qform) the sform taken",
    "oblique": f"Oblique by more than {OBLIQUE:g} degrees, read along the nearest axes",
}


def from_folder(path: Path, size: tuple[int, int, int] | None = None, units: str | None = None) -> Dataset:
    """(1, D, H, W), one class a folder; `size` is (D, H, W).

    `units` are "HU", float16 in [0, 1], or "file", float32 as in the files; None where the values tell.
    """
    shape = checked_size(size, "(depth, height, width)", SIZE)
    if units is not None:
        known("units", units, UNITS)
    resized = f"volumes resized to {'x'.join(map(str, shape))}."

    def sources(groups: Groups, about: str) -> list[Source]:
        files = [file for own, _ in groups for file in own]
        spans, doubts = {}, {}

        def read(file: Path, window: tuple[float, float] | None = WINDOW) -> np.ndarray:
            volume, spans[file], doubts[file] = _read(file, shape, window)
            return volume[None]

        def doubtful() -> str:
            counts = {said: sum(kind in found for found in doubts.values()) for kind, said in DOUBTS.items()}
            return "".join(f" {said}: {n}." for said, n in counts.items() if n)

        found, why = (units, "Values" if units == "file" else "(units='HU')") if units else _units(files)
        if found == "file":
            about += f" {why} stay as they are in the files, {resized}"
            as_stored, text = partial(read, window=None), lambda: about + doubtful()
            return [one_by_one(as_stored, own, (1, *shape), np.float32, labels, text) for own, labels in groups]

        def said() -> str:
            low, high = WINDOW
            text = f"{about} HU clipped to [{low:g}, {high:g}] and scaled to [0, 1] {why}, {resized}"
            least, most = min(lowest for lowest, _ in spans.values()), max(highest for _, highest in spans.values())
            if airless := sum(lowest > AIR for lowest, _ in spans.values()):
                text += (
                    f" {airless} of {len(spans)} volumes have no value below {AIR:g}, as CT has (all values are from {least:g} to "
                    f"{most:g}); the window cuts or flattens other values. Give units='file' for MRI."
                )
            return text + doubtful()

        return [one_by_one(read, own, (1, *shape), np.float16, labels, said) for own, labels in groups]

    return cached_classes(path, SUFFIXES, (shape, units), sources)


def _units(files: list[Path]) -> tuple[str, str]:
    """The units of the volumes, from the lowest value of each, and the words for it; DataError where they are of both kinds."""
    spans = {file: _span(file) for file in files}
    least, most = min(low for low, _ in spans.values()), max(high for _, high in spans.values())
    between = f"{least:g} to {most:g}"
    with_air = [file for file, (low, _) in spans.items() if low <= AIR]
    if least < PADDING:
        lowest = min(spans, key=lambda file: spans[file][0])
        raise DataError(
            f"{lowest} has the value {least:g}, which is neither air in HU nor usual in MRI. Give open_dataset(..., "
            "units='HU') for CT, or units='file' for values as they are."
        )
    if len(with_air) == len(files):
        return "HU", f"(taken as CT: values go from {between}, each volume has air; else give units='file')"
    if with_air:
        other = next(file for file in files if file not in with_air)
        raise DataError(
            f"{with_air[0]} has values below {AIR:g}, as CT in HU has, and {other} has none. Give open_dataset(..., "
            "units='HU') for CT, or units='file' for values as they are, such as those of MRI."
        )
    return "file", f"Values go from {between} and are not taken as CT in HU (no air; else give units='HU'): they"


def read_volume(path: Path, size: tuple[int, int, int], window: tuple[float, float] | None = WINDOW) -> np.ndarray:
    """One volume (D, H, W): float16 in [0, 1] between the ends of `window`, or without one float32 with the values of the file.

    DataError with the file's name where it is no whole volume.
    """
    return _read(path, size, window)[0]


def _read(
    path: Path, size: tuple[int, int, int], window: tuple[float, float] | None
) -> tuple[np.ndarray, tuple[float, float], list[str]]:
    """The volume, the lowest and highest value in its file, and which of `DOUBTS` hold of its axes."""
    from nibabel import orientations

    with _opened(path) as (image, shape):
        turn = orientations.io_orientation(image.affine)  # the patient's axis nearest to each axis of the file, and its sign
        if np.isnan(turn).any() or (doubts := _doubts(image)) is None:
            raise ValueError("its affine has no direction for one of the axes")
        small, span = _resized(path, image.dataobj, shape, tuple(size[2 - int(axis)] for axis in turn[:, 0]), window)
    to_dicom = orientations.ornt_transform(turn, orientations.axcodes2ornt("LPS"))
    volume = orientations.apply_orientation(small, to_dicom).T
    return volume.astype(np.float32 if window is None else np.float16), span, doubts


def _doubts(image: Any) -> list[str] | None:
    """What is doubtful about the axes of a volume, of `DOUBTS`; None where two of them have one direction."""
    from nibabel import aff2axcodes

    ways = image.affine[:3, :3] / np.linalg.norm(image.affine[:3, :3], axis=0)
    if abs(np.linalg.det(ways)) < 1e-3:
        return None
    header = image.header
    coded = [bool(header[name]) for name in ("sform_code", "qform_code")]
    other = all(coded) and aff2axcodes(header.get_sform()) != aff2axcodes(header.get_qform())
    found = {"none": not any(coded), "two": other}
    found["oblique"] = bool((np.abs(ways).max(axis=0) < np.cos(np.radians(OBLIQUE))).any())
    return [kind for kind, holds in found.items() if holds]


def _span(path: Path) -> tuple[float, float]:
    """The lowest and highest value in a file."""
    with _opened(path) as (image, shape):
        ends = [(one.min(), one.max()) for one in _slices(path, image.dataobj, shape)]
    return float(min(low for low, _ in ends)), float(max(high for _, high in ends))


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, tuple[int, ...]]]:
    """The image, whose values are to be read slice by slice, and its three sides."""
    try:
        from nibabel import Nifti1Image
    except ImportError as error:
        raise DataError(f"{path} is read with nibabel, which is not here ({error}). pip install labkit[volumes]") from error
    open_it = gzip.open if path.suffix.lower() == ".gz" else open
    with reading(path, "is no whole NIfTI volume", ADVICE), warnings.catch_warnings(), open_it(path, "rb") as stream:
        warnings.simplefilter("ignore")  # values that are no numbers: they are an error below
        image = Nifti1Image.from_stream(stream)  # one pass through the file for all slices
        shape = image.shape[:3] if image.shape[3:] in ((), (1,)) else image.shape
        if len(shape) != 3 or not all(2 <= side <= MAX_SIDE for side in shape):
            raise DataError(f"{path} has shape {image.shape}, where a volume of three axes is expected. {ADVICE}")
        if image.get_data_dtype().kind not in "iuf":
            raise DataError(f"{path} holds values of type {image.get_data_dtype()}, where one number a voxel is expected. {ADVICE}")
        yield image, shape
        while stream.read(1 << 20):  # gzip notices damage at the end only
            pass


def _slices(path: Path, stored: Any, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """The slices of the last axis, float32; DataError for values that are no numbers."""
    for at in range(shape[2]):
        one_slice = np.asarray(stored[:, :, at] if len(stored.shape) == 3 else stored[:, :, at, 0], dtype=np.float32)
        if not np.isfinite(one_slice).all():
            raise DataError(f"{path} holds values that are no numbers in slice {at}. Take it out of the folder.")
        yield one_slice


def _resized(
    path: Path, stored: Any, shape: tuple[int, ...], size: tuple[int, ...], window: tuple[float, float] | None
) -> tuple[np.ndarray, tuple[float, float]]:
    """The volume, scaled from `window` to [0, 1] if there is one, of `size` along the axes of the file, one slice at a time."""
    one, two, three = (resize_weights(old, new) for old, new in zip(shape, size, strict=True))
    small, low, high = np.zeros(size, dtype=np.float32), np.inf, -np.inf
    for at, values in enumerate(_slices(path, stored, shape)):
        low, high = min(low, float(values.min())), max(high, float(values.max()))
        if window is not None:
            values = (np.clip(values, *window) - window[0]) / (window[1] - window[0])
        resized = one @ values @ two.T
        for to in np.flatnonzero(three[:, at]):
            small[:, :, to] += three[to, at] * resized
    return small if window is None else np.clip(small, 0, 1), (low, high)
