"""CIFAR-10 as it is published for Python: six pickled batches, read without running anything that is in them.

Pickle can name any function and have it called, so these files are read by an unpickler of our own: of all names it
accepts the five with which numpy writes an array of bytes, and for each it has a stand-in that makes nothing else.

Used by `labkit.data.open_dataset`.
"""

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from labkit.data.cache import Source, cached, file_key, reading
from labkit.data.dataset import Dataset
from labkit.errors import DataError

SHAPE = (3, 32, 32)
TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
TEST = "test_batch"
MAX_BYTES = 64 << 20  # a published batch has 31 MB
ADVICE = "Unpack cifar-10-python.tar.gz anew."


def looks_like(folder: Path) -> bool:
    """Is there any batch of CIFAR-10 in the folder?"""
    return any((folder / name).exists() for name in (*TRAIN, TEST))


def from_folder(folder: Path) -> Dataset:
    """(3, 32, 32), 10 classes, five batches to train and one to test; DataError where one is missing or not a batch."""
    paths = [folder / name for name in (*TRAIN, TEST)]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise DataError(f"{folder} lacks {', '.join(missing)} of CIFAR-10. {ADVICE}")

    def load() -> tuple[Source, Source]:
        read = [read_batch(path) for path in paths]  # 184 MB
        return _source(read[:-1]), _source(read[-1:])

    return cached("cifar-10", file_key(paths), load)


def _source(batches: list[tuple[np.ndarray, np.ndarray]]) -> Source:
    labels = np.concatenate([y for _, y in batches])
    return Source((len(labels), *SHAPE), np.dtype(np.uint8), lambda: (x for x, _ in batches), labels, channels="first")


def read_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The images, uint8 (n, 3, 32, 32), and labels of one batch; DataError with the file's name for anything else."""
    if path.stat().st_size > MAX_BYTES:
        raise DataError(f"{path} has {path.stat().st_size} bytes, a batch of CIFAR-10 has 31 MB. {ADVICE}")
    with reading(path, "is truncated or damaged", ADVICE):
        try:
            held = _Batch(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        except _Refused as error:
            raise DataError(f"{path} is no batch of CIFAR-10 and was not opened: {error}") from None
    if not isinstance(held, dict):
        raise DataError(f"{path} holds a {type(held).__name__}, where CIFAR-10 has a dict. {ADVICE}")
    held = {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in held.items()}
    images, labels = held.get("data"), held.get("labels")
    if not isinstance(images, _Array) or not isinstance(labels, list):
        raise DataError(f"{path} lacks an array 'data' or a list 'labels'. It has {', '.join(map(str, held))}. {ADVICE}")
    n = len(labels)
    if images.shape != (n, 3072) or len(images.content) != n * 3072 or not n:
        raise DataError(
            f"{path}: data has shape {images.shape} and {len(images.content)} bytes for {n} labels, where CIFAR-10 has "
            f"(n, 3072). {ADVICE}"
        )
    if wrong := [label for label in labels if type(label) is not int or not 0 <= label < 10]:
        raise DataError(f"{path}: a label is {str(wrong[0])[:40]}, where CIFAR-10 has 0 to 9. {ADVICE}")
    return np.frombuffer(images.content, dtype=np.uint8).reshape(n, *SHAPE), np.array(labels)


class _Refused(pickle.UnpicklingError):
    """The pickle names something that is not in a batch of CIFAR-10."""


class _Array:
    """What the pickle holds of an array, as it is there: nothing is allocated from it."""

    __slots__ = ("content", "shape")

    def __setstate__(self, state: Any) -> None:
        _, self.shape, dtype, fortran, self.content = state
        if not isinstance(dtype, _Bytes) or fortran or type(self.content) is not bytes:
            raise _Refused("it holds an array of something else than bytes, row by row.")


class _Bytes:
    """The type of an array of bytes: the only one."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        """Byte order and alignment mean nothing for bytes."""


class _Batch(pickle.Unpickler):
    """Accepts five names. The stand-ins are functions made for one file: nothing in a pickle can change what the next one uses."""

    def find_class(self, module: str, name: str) -> Callable[..., Any] | str:
        def reconstruct(kind: Any, *of: Any) -> _Array:
            if kind != "an array":
                raise _Refused(f"it makes an array of {kind!r}.")
            return _Array()

        def dtype(code: Any, *flags: Any) -> _Bytes:
            if code not in ("u1", b"u1"):
                raise _Refused(f"it holds an array of type {code!r}, where images are bytes.")
            return _Bytes()

        def encode(text: Any, *codec: Any) -> bytes:  # how Python 3 writes bytes for Python 2
            return text.encode("latin1")

        def from_buffer(content: Any, code: Any, shape: Any, order: Any) -> _Array:  # protocol 5
            if not isinstance(content, bytes | bytearray):  # bytes(n) would be n of them
                raise _Refused(f"it makes an array of a {type(content).__name__}.")
            array = _Array()
            array.__setstate__((1, shape, code, order != "C", bytes(content)))
            return array

        known = {"ndarray": "an array", "dtype": dtype, "encode": encode, "_reconstruct": reconstruct, "_frombuffer": from_buffer}
        homes = {"numpy": ("ndarray", "dtype"), "_codecs": ("encode",)}
        for core in ("numpy.core", "numpy._core"):
            homes |= {f"{core}.multiarray": ("_reconstruct",), f"{core}.numeric": ("_frombuffer",)}
        if name not in homes.get(module, ()):
            raise _Refused(f"it names {module}.{name}, which could run code.")
        return known[name]

    def persistent_load(self, pid: Any) -> Any:
        raise _Refused("it refers to something outside of the file.")
