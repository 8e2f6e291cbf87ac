"""CT volumes by class: a folder of NIfTI files for each class, as MosMedData comes (CT-0, CT-1, ...).

Each volume is clipped to [-1000, 400] HU (air to bone), scaled to [0, 1], and resized to 64 slices of 128x128, the way
of the Keras example on this set. Axes are those of DICOM whatever the file's own: slices from foot to head, rows from front to
back, columns from the patient's right to the left.

Used by `labkit.data.open_dataset`.
"""

import gzip
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from labkit.data.cache import Source, one_by_one, reading
from labkit.data.dataset import Dataset
from labkit.data.folders import ADVICE, cached_classes, checked_size
from labkit.data.synthetic.fields import resize_weights
from labkit.errors import DataError

SUFFIXES = frozenset({".nii", ".nii.gz"})
SIZE = (64, 128, 128)
WINDOW = (-1000.0, 400.0)  # HU
MAX_SIDE = 4096  # a header may contain anything


def from_folder(path: Path, size: tuple[int, int, int] | None = None) -> Dataset:
    """(1, D, H, W), float16 in [0, 1], one class a folder; `size` is (D, H, W)."""
    shape = checked_size(size, "(depth, height, width)", SIZE)
    how = f"HU clipped to [{WINDOW[0]:g}, {WINDOW[1]:g}] and scaled to [0, 1], volumes resized to {'x'.join(map(str, shape))}."

    def source(files: list[Path], labels: list[int], about: str) -> Source:
        return one_by_one(lambda file: read_volume(file, shape)[None], files, (1, *shape), np.float16, labels, f"{about} {how}")

    return cached_classes(path, SUFFIXES, shape, source)


def read_volume(path: Path, size: tuple[int, int, int]) -> np.ndarray:
    """One volume, float16 (D, H, W) in [0, 1]; DataError with the file's name where it is no whole volume."""
    try:
        from nibabel import Nifti1Image, orientations
    except ImportError as error:
        raise DataError(f"{path} is read with nibabel, which is not here ({error}). pip install labkit[volumes]") from error
    open_it = gzip.open if path.suffix.lower() == ".gz" else open
    with reading(path, "is no whole NIfTI volume", ADVICE), warnings.catch_warnings(), open_it(path, "rb") as stream:
        warnings.simplefilter("ignore")  # values that are no numbers: they are an error below
        image = Nifti1Image.from_stream(stream)  # one pass through the file for all slices
        shape = image.shape[:3] if image.shape[3:] in ((), (1,)) else image.shape
        if len(shape) != 3 or not all(2 <= side <= MAX_SIDE for side in shape):
            raise DataError(f"{path} has shape {image.shape}, where a volume of three axes is expected. {ADVICE}")
        turn = orientations.io_orientation(image.affine)  # the patient's axis nearest to each axis of the file, and its sign
        if np.isnan(turn).any():
            raise ValueError("its affine has no direction for one of the axes")
        small = _resized(path, image.dataobj, shape, tuple(size[2 - int(axis)] for axis in turn[:, 0]))
        while stream.read(1 << 20):  # gzip notices damage at the end only
            pass
    to_dicom = orientations.ornt_transform(turn, orientations.axcodes2ornt("LPS"))
    return orientations.apply_orientation(small, to_dicom).T.astype(np.float16)


def _resized(path: Path, stored: Any, shape: tuple[int, ...], size: tuple[int, ...]) -> np.ndarray:
    """The volume in HU -> [0, 1], of `size` along the axes of the file, one slice of the last axis at a time."""
    one, two, three = (resize_weights(old, new) for old, new in zip(shape, size, strict=True))
    small = np.zeros(size, dtype=np.float32)
    for at in range(shape[2]):
        one_slice = np.asarray(stored[:, :, at] if len(stored.shape) == 3 else stored[:, :, at, 0], dtype=np.float32)
        if not np.isfinite(one_slice).all():
            raise DataError(f"{path} holds values that are no numbers in slice {at}. Take it out of the folder.")
        low, high = WINDOW
        one_slice = one @ ((np.clip(one_slice, low, high) - low) / (high - low)) @ two.T
        for to in np.flatnonzero(three[:, at]):
            small[:, :, to] += three[to, at] * one_slice
    return np.clip(small, 0, 1)
