"""Data sets: everything that a problem can be trained on, as memory-mapped shards that travel by reference.

Whatever the user has (a registered name, arrays, files of arrays, pictures or volumes by class) is checked and written
once as plain `.npy` files in the cache; from then on a data set is a path, workers open it by that path, and only
indices travel.

Used by `labkit.problems.problem`; the parts are `shards` (the format), `images` and `volumes` (named sets), `fetch`, `arrays` and
`paths` (users' data).
"""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from labkit.data import arrays, images, paths, volumes
from labkit.data.shards import Dataset, cache_dir
from labkit.errors import DataError

__all__ = ["Dataset", "cache_dir", "names", "open_dataset"]

_NAMED: dict[str, Callable[..., Dataset]] = {
    "fashion-mnist": images.fashion_mnist,
    "fashion-mnist-32": partial(images.fashion_mnist, pad=2),
    "mnist": images.mnist,
    "digits": images.digits,
    "lfw-faces": images.lfw_faces,
    "head-lesions": volumes.head_lesions,
    "chest-phantom": volumes.chest_phantom,
}
OPTIONS = ("n", "size", "seed")  # those of the generated sets


def names() -> list[str]:
    """The registered data sets, by the names that `open_dataset` takes."""
    return list(_NAMED)


def open_dataset(data: Any, **options: Any) -> Dataset:
    """Open a data set: check it and write its shards the first time, find them ready afterwards.

    Parameters
    ----------
    **options
        Of some data sets: `size=(H, W)` for pictures by class, `size=(D, H, W)` for volumes by class, and
        `n`, `size`, `seed` for "head-lesions" and "chest-phantom".
    data
        One of

        - a registered name: see `names()`;
        - arrays `(x, y)` or `(x_train, y_train, x_test, y_test)`;
        - a folder with `x_train.npy`, `y_train.npy` and, optionally, `x_test.npy`, `y_test.npy`;
        - a `.parquet` file: column `y` and either `x` (lists of one length, nested lists, tensors) or numbers `f0`,
          `f1`, ...; flat lists take their shape from the metadata `shape` of the column or the file, a JSON list such
          as `[1, 28, 28]`;
        - an `.h5` / `.hdf5` file with `x_train`, `y_train`, `x_test`, `y_test`, or with `x`, `y`;
        - CIFAR-10's folder `cifar-10-batches-py`;
        - a folder with a folder for each class, that holds JPEG, PNG, BMP or PGM/PPM pictures (TF-Flowers; Extended
          Yale B) or NIfTI volumes (MosMedData's CT-0, CT-1, ...; needs nibabel);
        - a `Dataset`, which is returned as it is.

        `x` is (N, F) features, (N, H, W) grey images, (N, C, H, W) images or (N, C, D, H, W) volumes, of booleans,
        integers or floats. (N, H, W, C) with C = 1 or 3 is recognised where axis 1 is neither 1 nor 3, converted, and
        said in `.note`. `y` is (N,) integers 0..K-1, also as floats. Without a test split every 10th sample of a
        permutation with a fixed seed is held out as one.

    Returns
    -------
    Dataset
        A small reference. Arrays are known again by their content, files by path, size and time of change: a file that
        is changed within its size and its time stamp is not noticed.

    Raises
    ------
    ValueError
        An option is not one of this data set's.
    DataError
        Files are missing or damaged, shapes or types do not fit, values are not finite, labels are out of range.
    """
    if isinstance(data, str) and data in _NAMED:
        taken = [name for name in inspect.signature(_NAMED[data]).parameters if name in OPTIONS]
        _refuse(data, {name: value for name, value in options.items() if name not in taken}, taken)
        return _NAMED[data](**options)
    if isinstance(data, str | os.PathLike):
        path = Path(data).expanduser()
        if path.exists():
            _refuse(str(data), {name: value for name, value in options.items() if name != "size"}, ["size"])
            return paths.from_path(path.resolve(), **options)
        near = difflib.get_close_matches(str(data), _NAMED, n=1)
        raise DataError(
            f"No data set and no file or folder is called {str(data)!r}. Registered names: {', '.join(_NAMED)}."
            + (f" Did you mean {near[0]!r}?" if near else "")
        )
    _refuse(f"data of type {type(data).__name__}", options, [])
    if isinstance(data, Dataset):
        return data
    if isinstance(data, tuple | list):
        return arrays.from_arrays(data)
    raise DataError(
        f"data is a {type(data).__name__}. Give a registered name ({', '.join(_NAMED)}), arrays (x, y) or "
        "(x_train, y_train, x_test, y_test), a .parquet, .h5 or .hdf5 file, or a folder of .npy files, of pictures or of "
        "volumes."
    )


def _refuse(data: str, unknown: dict[str, Any], taken: list[str]) -> None:
    if unknown:
        raise ValueError(f"{data} has no option {', '.join(unknown)}. It has {', '.join(taken) or 'none'}.")
