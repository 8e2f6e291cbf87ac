"""`Dataset`: a reference to a data set in the cache, whose files each process maps into its memory on first use.

Images stay as they came (bytes stay bytes); a batch is (x / scale - mean) / std, with mean and std of each channel of the
training split, and costs a gather and two multiply-adds.

Made by `labkit.data.cache`; used by everyone.
"""

import os
import socket
from pathlib import Path
from typing import Any

import numpy as np

from labkit.errors import DataError, known

SPLITS = ("train", "test")

_MAPS: dict[str, dict[str, np.ndarray]] = {}  # the open memory maps of this process, by path


class Dataset:
    """A reference to a data set: small, picklable, opened on first use in whichever process it has come to.

    Attributes
    ----------
    name : str
        The registered name, `"arrays"`, or the name of the user's file.
    path : str
        Folder of the `.npy` files; each worker must see it under this path.
    shape : tuple of int
        Of one sample: (F,), (C, H, W) or (C, D, H, W).
    n_classes : int or None
        K, where labels are 0..K-1.
    n_train, n_test : int
        Samples in each split.
    synthetic : bool
        True for generated data, also where only a part of each sample was generated, as the note explains.
    note : str
        What was read of files, left out, converted or decided on the user's behalf, such as another set used instead; `""`
        where everything is as it was given.
    """

    def __init__(self, path: str | os.PathLike[str], meta: dict[str, Any], note: str = "") -> None:
        self.path = str(path)
        self.name: str = meta["name"]
        self.shape: tuple[int, ...] = tuple(meta["shape"])
        self.n_classes: int | None = meta["n_classes"]
        self.n_train: int = meta["n"]["train"]
        self.n_test: int = meta["n"]["test"]
        self.synthetic: bool = meta["synthetic"]
        self.note: str = " ".join(part for part in (note, meta["note"]) if part)
        ones = (1,) * (len(self.shape) - 1)
        mean, std = (np.asarray(meta[key], dtype=np.float64).reshape(-1, *ones) for key in ("mean", "std"))
        # in units of the stored values, so that bytes need no division of their own
        self._centre = (mean * meta["scale"]).astype(np.float32)
        self._rate = (1.0 / (std * meta["scale"])).astype(np.float32)
        self._files: dict[str, int] = meta["files"]

    @property
    def affine(self) -> tuple[np.ndarray, np.ndarray]:
        """(centre, rate) of each channel, float32: a batch is (values as they were given - centre) * rate."""
        return self._centre.ravel(), self._rate.ravel()

    def __repr__(self) -> str:
        return (
            f"Dataset({self.name!r}, shape={self.shape}, n_classes={self.n_classes}, n_train={self.n_train}, n_test={self.n_test})"
        )

    def batch(self, indices: Any, split: str = "train", window: tuple[slice, ...] = ()) -> tuple[np.ndarray, np.ndarray]:
        """The samples at `indices`, or a window of each (slices of the axes behind the channels), ready for a network.

        Returns x, float32 of shape (n, *shape), with mean 0 and standard deviation 1 in each channel of the training
        split, and y, int64 of shape (n,). Both are new arrays. An index outside 0..N-1 is an IndexError.
        """
        at = self._checked(indices, split)
        x = self._map("x", split)[(at, slice(None), *window) if window else at].astype(np.float32)
        x -= self._centre
        x *= self._rate
        return x, self._map("y", split)[at]

    def raw(self, indices: Any, split: str = "train") -> np.ndarray:
        """The samples at `indices` as they were given (bytes stay bytes), shape (n, *shape): for figures."""
        return self._map("x", split)[self._checked(indices, split)]

    def labels(self, split: str = "train") -> np.ndarray:
        """All labels of a split, int64 of shape (N,), as a new array."""
        return np.array(self._map("y", split))

    def _checked(self, indices: Any, split: str) -> np.ndarray:
        at, n = np.asarray(indices), len(self._map("y", split))
        if at.ndim != 1 or (at.dtype.kind not in "iu" and at.size):
            raise TypeError(f"indices are {at.dtype} of shape {at.shape}. Give a 1-D array of integers.")
        if at.size and (at.min() < 0 or at.max() >= n):
            raise IndexError(
                f"indices are {at.min()} to {at.max()}, but the {split} split of {self.name} has samples 0 to {n - 1}."
            )
        return at.astype(np.intp, copy=False)

    def _map(self, letter: str, split: str) -> np.ndarray:
        known("split", split, SPLITS)
        if self.path not in _MAPS:
            path = Path(self.path)
            if not is_whole(path, self._files):
                raise DataError(
                    f"{socket.gethostname()} finds no whole data set at {path}. Set LABKIT_CACHE to a folder that all "
                    "workers share, or, where it was deleted or damaged, open the data set again."
                )
            # plain arrays over the maps: indexing np.memmap itself costs several times as much
            _MAPS[self.path] = {name: np.asarray(np.load(path / name, "r", allow_pickle=False)) for name in self._files}
        return _MAPS[self.path][f"{letter}_{split}.npy"]


def is_whole(path: Path, files: dict[str, int]) -> bool:
    """Are the files there, each with its size in bytes?"""
    try:
        return all((path / name).stat().st_size == size for name, size in files.items())
    except OSError:
        return False
