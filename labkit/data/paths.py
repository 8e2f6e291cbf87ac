"""What a path holds: which reader opens it, told by what is there.

| there is | it is read as |
| --- | --- |
| a file `.parquet`, `.h5`, `.hdf5` | arrays |
| a folder with `.npy` files | arrays |
| a folder with `data_batch_1`, ... | CIFAR-10, python version |
| a folder of folders with `.nii`, `.nii.gz` | volumes by class (MosMedData: CT-0, CT-1, ...) |
| a folder of folders with pictures | images by class (TF-Flowers; Extended Yale B's yaleB01, ...) |

Used by `labkit.data.open_dataset`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from labkit.data import arrays, cifar, classes, nifti, pictures
from labkit.data.shards import Dataset, opened
from labkit.errors import DataError


def from_path(path: Path, size: Any = None) -> Dataset:
    """The data set at `path`. `size`, that images or volumes get, goes with those only: elsewhere it is a ValueError."""
    by_class = _by_class(path) if path.is_dir() else None
    if by_class is not None:
        return by_class(path, size)
    if size is not None:
        raise ValueError(f"size={size!r} is for images and volumes by class; {path} holds none.")
    if not path.is_dir():
        return arrays.from_file(path)
    if cifar.looks_like(path):
        return cifar.from_folder(path)
    return opened(path) or arrays.from_npy(path)


def _by_class(path: Path) -> Any:
    """The reader of a folder of classes, or None where it is something else."""
    if any(path.glob("*.npy")) or cifar.looks_like(path):
        return None
    found = {reader: classes.suffixes_below(path) & known for reader, known in READERS.items()}
    readers = [reader for reader, suffixes in found.items() if suffixes]
    if len(readers) > 1:
        raise DataError(
            f"{path} holds both pictures and volumes ({', '.join(sorted(set.union(*found.values())))}). Keep one kind in it."
        )
    return readers[0] if readers else None


READERS = {pictures.from_folder: pictures.SUFFIXES, nifti.from_folder: nifti.SUFFIXES}
