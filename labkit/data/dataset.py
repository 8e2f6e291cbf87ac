"""`Dataset`: a reference to a data set in the cache, whose files each process maps into its memory on first use.

A sample has named fields, each with a role:

    "input"   what the network sees. Images stay as they came (bytes stay bytes); a batch is (x / scale - mean) / std, with mean and
              std of each channel of the training split, and costs a gather and two multiply-adds. Token ids (int64) stay as they are.
    "label"   whole numbers 0..K-1, one a sample or an array of them (a class for each pixel)
    "target"  numbers of any type, as they were given

Made by `labkit.data.cache`; used by everyone.
"""

import hashlib
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from labkit.cards import Card, Carded
from labkit.errors import DataError, known
from labkit.locks import parsed
from labkit.names import Public

SPLITS = ("train", "test")
OF_INPUT = ("shape", "mean", "std", "scale", "channels_last")  # what `meta.json` has of an input

WHOLE = 1 << 28  # bytes: what is larger is not read as a whole to be checked, but these blocks of it
BLOCK = 1 << 20

_DIGESTS: dict[tuple[int, ...], str] = {}  # of the files that this process has read, by what tells a file from a changed one
_MAPS: dict[str, dict[str, np.ndarray]] = {}  # the open memory maps of this process, by path


class Field(NamedTuple):
    """One field of a sample, as a batch has it.

    `shape` is that of one sample, with None for a first axis of varying length; `role` is "input", "label" or "target"; `n_values` is K
    where the values are known to be 0..K-1 (labels, token ids), else None; `no_class` are those of an array of labels that are none of
    them, such as 255 for what nobody has labelled.

    Examples
    --------
    >>> field = labkit.data.Field((1, 8, 8), np.dtype("uint8"), "input")
    >>> field.role
    'input'
    """

    shape: tuple[int | None, ...]
    dtype: np.dtype
    role: str
    n_values: int | None = None
    no_class: tuple[int, ...] = ()


class Dataset(Carded, Public):
    """A reference to a data set: small, picklable, opened on first use in whichever process it has come to.

    Attributes
    ----------
    name : str
        The registered name, `"arrays"`, or the name of the user's file.
    path : str
        Folder of the `.npy` files; each worker must see it under this path.
    fields : dict of str to Field
        What a sample consists of, by name and in order: `{"x": Field((1, 28, 28), float32, "input"), "y": Field((), int64, "label")}`.
    shape : tuple of int
        Of the first input of one sample: (F,), (C, H, W) or (C, D, H, W).
    n_classes : int or None
        K, where there is one field of labels, 0..K-1; else None.
    inputs, answers : list of str
        The names of the inputs, and of the labels and targets, in order.
    label : str or None
        The name of the field by which samples have classes: the only field of labels, if it is one number a sample.
    n_train, n_test : int
        Samples in each split.
    units : numpy.ndarray or None
        Offsets of the training samples that are read together (row groups), int64 from 0 to n_train; None where each is read by itself.
    held_out : bool
        True where the samples came without a test split, and every tenth of a permutation was held out.
    classes : list of str or None
        The names of the classes, where folders or texts have given them.
    synthetic : bool
        True for generated data, also where only a part of each sample was generated, as the note explains.
    note : str
        What was read of files, left out, converted or decided on the user's behalf, such as another set used instead; `""`
        where everything is as it was given.

    Examples
    --------
    >>> digits = labkit.open_dataset("digits")
    >>> digits.batch([0, 1, 2], "test")["x"].shape
    (3, 1, 8, 8)
    """

    internal: ClassVar = frozenset(
        ("described", "expect", "hold", "is_channels_last", "pad_of", "reference", "stored_type", "units_of")
    )

    def __init__(self, path: str | os.PathLike[str], meta: dict[str, Any], note: str = "") -> None:
        self.path = str(path)
        self.name: str = meta["name"]
        self.n_train: int = meta["n"]["train"]
        self.n_test: int = meta["n"]["test"]
        self.held_out: bool = meta.get("held_out", 10 * self.n_test - self.n_train - self.n_test in range(10))  # as far as one sees
        self.classes: list[str] | None = meta.get("classes")
        self.synthetic: bool = meta["synthetic"]
        self.note: str = " ".join(part for part in (note, meta["note"]) if part)
        self._files: dict[str, int] = meta["files"]
        self._digests: dict[str, str] = meta.get("digests", {})  # of what labkit has written since it does that
        stored = meta.get("fields") or {
            "x": {**{key: meta.get(key) for key in OF_INPUT}, "dtype": "float32", "role": "input"},
            "y": {"shape": [], "dtype": "int64", "role": "label", "n_values": meta["n_classes"]},
        }
        self.fields = {
            name: Field(tuple(of["shape"]), np.dtype(of["dtype"]), of["role"], of.get("n_values"), tuple(of.get("no_class", ())))
            for name, of in stored.items()
        }
        self._stems = {name: of.get("stem", name) for name, of in stored.items()}
        self._channels_last = {name for name, of in stored.items() if of.get("channels_last")}
        self._pads = {name: of["pad"] for name, of in stored.items() if "pad" in of}
        self._columns = {name: of["columns"] for name, of in stored.items() if "columns" in of}
        self._affine = {name: _affine(of) for name, of in stored.items() if "mean" in of}
        self.inputs = [name for name, field in self.fields.items() if field.role == "input"]
        self.answers = [name for name in self.fields if name not in self.inputs]
        self.shape: tuple[int | None, ...] = self.fields[self.inputs[0]].shape
        labels = [name for name, field in self.fields.items() if field.role == "label"]
        self.n_classes: int | None = self.fields[labels[0]].n_values if len(labels) == 1 else None
        self.label: str | None = labels[0] if len(labels) == 1 and self.fields[labels[0]].shape == () else None

    @property
    def affine(self) -> tuple[np.ndarray, np.ndarray]:
        """(centre, rate) of each channel of the first input, float32: a batch is (values as they were given - centre) * rate."""
        centre, rate = self._affine.get(self.inputs[0], (np.zeros(1, np.float32), np.ones(1, np.float32)))
        return centre.ravel(), rate.ravel()

    @property
    def reference(self) -> Any:
        """What a record names it by: its path, an import path, or {"by_value": name}."""
        return self.path

    def affine_of(self, field: str) -> tuple[np.ndarray, np.ndarray] | None:
        """(centre, rate) of a field, each (C, 1, ...), by which it is normalised; None where it stays as it is."""
        return self._affine.get(field)

    def is_channels_last(self, field: str) -> bool:
        """Were samples of this input given with their channels as the last axis? Batches have them first."""
        return field in self._channels_last

    def columns_of(self, field: str) -> list[str]:
        """The columns of a table that a field is made of: several features are one input."""
        return self._columns.get(field, [field])

    def pad_of(self, field: str) -> float | None:
        """What stands behind the end of samples of a field that are shorter than others; None where all have one length."""
        return self._pads.get(field)

    def stored_type(self, field: str) -> np.dtype:
        """The type in which a field is stored: bytes stay bytes."""
        return self._map(field, "train").dtype

    def __repr__(self) -> str:
        about = f"shape={self.shape}, n_classes={self.n_classes}" if list(self.fields) == ["x", "y"] else self.described()
        return f"Dataset({self.name!r}, {about}, n_train={self.n_train}, n_test={self.n_test})"

    def _card(self) -> Card:
        fields = [
            {"field": name, "shape": str(each.shape), "type": str(each.dtype), "is": each.role}
            for name, each in self.fields.items()
        ]
        rows = {"training samples": self.n_train, "test samples": self.n_test}
        rows |= {"classes": self.n_classes} if self.n_classes else {}
        calls = {"labkit.Classifier(model, data)" if self.n_classes else "labkit.Regressor(model, data)": "trains on it"}
        return Card(f"Dataset {self.name}", self.note, rows, table=fields, calls=calls)

    def batch(
        self, indices: Any, split: str = "train", window: tuple[slice, ...] = (), fields: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        """The samples at `indices`, ready for a network: the `fields` asked for, by default all, by name and in order.

        An array has shape (n, *shape) and is new. Inputs that are floats have mean 0 and standard deviation 1 in each channel of the
        training split; of the first input a `window` is read, if given (slices of the axes behind the channels). An index outside
        0..N-1 is an IndexError, a name that is no field a ValueError.
        """
        names = list(self.fields) if fields is None else [known("fields", name, self.fields) for name in fields]
        read, made = self._read(names, split, self._checked(indices, split), window), {}
        for name, part in read.items():
            if name in self._affine:
                centre, rate = self._affine[name]
                part = part.astype(np.float32)
                part -= centre
                part *= rate
            else:
                part = part.astype(self.fields[name].dtype, copy=False)
            made[name] = part
        return made

    def raw(self, indices: Any, split: str = "train", field: str | None = None) -> np.ndarray:
        """One field of the samples at `indices` as it was given (bytes stay bytes), by default the first input: for figures."""
        name = self.inputs[0] if field is None else known("field", field, self.fields)
        return self._read([name], split, self._checked(indices, split))[name]

    @property
    def units(self) -> np.ndarray | None:
        """Offsets of the runs of training samples that are read together (row groups), int64 from 0 to n_train; None where each sample is
        read by itself."""
        return self.units_of("train")

    def units_of(self, split: str) -> np.ndarray | None:
        """The same of either split."""
        return None

    def hold(self, indices: np.ndarray, split: str = "train") -> None:
        """These samples will be asked for again and again: where they are not at hand, they are read once and held in memory."""

    def expect(self, indices: np.ndarray, split: str = "train") -> None:
        """These will be asked for next, in this order: where they are read in units, the next unit is read ahead."""

    def labels(self, split: str = "train") -> np.ndarray:
        """All labels of a split, int64 of shape (N,), as a new array; DataError where samples have no class."""
        if self.label is None:
            raise DataError(f"data {self.name!r} have no field with one label a sample: {self.described()}.")
        return np.array(self._map(self.label, split), dtype=np.int64)

    def described(self) -> str:
        """The fields in words, for messages."""
        return ", ".join(f"{name} ({field.role} {field.dtype} {field.shape})" for name, field in self.fields.items())

    def _read(self, names: Sequence[str], split: str, at: np.ndarray, window: tuple[slice, ...] = ()) -> dict[str, np.ndarray]:
        """Fields of the samples `at`, as they are stored, new arrays."""
        window = (slice(None), *window) if window else ()
        return {name: self._map(name, split)[(at, *(window if name == self.inputs[0] else ()))] for name in names}

    def _checked(self, indices: Any, split: str) -> np.ndarray:
        at, n = np.asarray(indices), {"train": self.n_train, "test": self.n_test}[known("split", split, SPLITS)]
        if at.ndim != 1 or (at.dtype.kind not in "iu" and at.size):
            raise TypeError(f"indices are {at.dtype} of shape {at.shape}. Give a 1-D array of integers.")
        if at.size and (at.min() < 0 or at.max() >= n):
            raise IndexError(
                f"indices are {at.min()} to {at.max()}, but the {split} split of {self.name} has samples 0 to {n - 1}."
            )
        return at.astype(np.intp, copy=False)

    def _map(self, field: str, split: str) -> np.ndarray:
        known("split", split, SPLITS)
        if self.path not in _MAPS:
            path = Path(self.path)
            if not is_whole(path, self._files, self._digests):
                raise DataError(
                    f"{socket.gethostname()} finds no whole data set at {path}. Set LABKIT_CACHE to a folder that all "
                    "workers share, or, where it was deleted or damaged, open the data set again."
                )
            # plain arrays over the maps: indexing np.memmap itself costs several times as much
            _MAPS[self.path] = {name: np.asarray(parsed(np.load, path / name, "r", allow_pickle=False)) for name in self._files}
        return _MAPS[self.path][f"{self._stems[field]}_{split}.npy"]


class Column:
    """One field of one split, which is read as it is indexed."""

    def __init__(self, data: Dataset, field: str, split: str) -> None:
        self.data, self.field, self.split = data, field, split
        self.dtype, self.n = data.stored_type(field), {"train": data.n_train, "test": data.n_test}[split]

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, key: Any) -> np.ndarray:
        at, *rest = key if isinstance(key, tuple) else (key,)
        found = self.data.raw(np.arange(self.n)[at], self.split, self.field)
        return found[(slice(None), *rest)] if rest else found


def _affine(stored: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Centre and rate of each channel, in units of the stored values, so that bytes need no division of their own."""
    ones = (1,) * (len(stored["shape"]) - 1)
    mean, std = (np.asarray(stored[key], dtype=np.float64).reshape(-1, *ones) for key in ("mean", "std"))
    return (mean * stored["scale"]).astype(np.float32), (1.0 / (std * stored["scale"])).astype(np.float32)


def is_whole(path: Path, files: Mapping[str, int], digests: Mapping[str, str]) -> bool:
    """Are the files there, each with its size in bytes and, where it is known, its digest?"""
    try:
        sizes = all((path / name).stat().st_size == size for name, size in files.items())
        return sizes and all(digest_of(path / name) == digest for name, digest in digests.items())
    except OSError:
        return False


def digest_of(file: Path) -> str:
    """SHA-256 of a file; of one of more than `WHOLE` bytes that of its size and as many bytes in blocks spread evenly over it.

    It is read once by a process, and again when its time of change, its size or its place on the disk is another.
    """
    about = file.stat()
    key = about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns
    if key not in _DIGESTS:
        n, n_blocks = about.st_size, -(-about.st_size // BLOCK)
        read = n_blocks if n <= WHOLE else WHOLE // BLOCK
        digest = hashlib.sha256(str(n).encode())
        with open(file, "rb") as stream:
            for number in range(read):
                stream.seek(BLOCK * (number * (n_blocks - 1) // max(1, read - 1)))
                digest.update(stream.read(BLOCK))
        _DIGESTS[key] = digest.hexdigest()
    return _DIGESTS[key]


def forget(path: Path) -> None:
    """What is at this path is another data set from now on."""
    _MAPS.pop(str(path), None)
