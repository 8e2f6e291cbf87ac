"""Data sets: everything that a problem can be trained on, memory-mapped from files that travel by reference.

Whatever the user has is checked and written once as plain `.npy` files in the cache; from then on a data set is a path, workers
open it by that path, and only indices travel.

Used by `labkit.problems` and by users.
"""

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from labkit.data import arrays, cifar, columns, folders, named, nifti, parquet, pictures, streamed
from labkit.data.cache import is_of_cache, opened
from labkit.data.columns import Asked
from labkit.data.dataset import Dataset, Field
from labkit.data.items import from_items, is_items, is_items_path
from labkit.errors import DataError, did_you_mean, file_path, flag, known
from labkit.imports import imported
from labkit.names import face

__all__ = ["Dataset", "Field", "names", "open_dataset"]
__getattr__, __dir__ = face(__name__)

OPTIONS = ("n", "size", "seed")  # those of the generated sets
OF_PATHS = {
    "size": "images and volumes by class",
    "ground": "pictures by class",
    "units": "volumes by class",
    "channels": "arrays",
    "external": "HDF5 files",
}
OF_COLUMNS = ("label", "target", "inputs", "tokens", "as_given", "pad")
OF_ITEMS = ("label", "target", "inputs", "pad")
_TABLE = "Read it with pandas, and give the table: labkit.open_dataset(pandas.read_csv(path), label=...). "
_ADVICE = {
    ".csv": _TABLE,
    ".tsv": _TABLE,
    ".npz": "Give its arrays: with numpy.load(path) as file: data = dict(file). ",
    ".pt": "Load it with torch.load, and give the tensors (x, y), or a Dataset of yours. ",
}
CHANNELS = ("first", "last", "none")
FILES = {".parquet": parquet.from_file, ".h5": arrays.from_hdf5, ".hdf5": arrays.from_hdf5}
HDF5 = (".h5", ".hdf5")
BY_CLASS = {pictures.from_folder: (pictures.SUFFIXES, ("size", "ground")), nifti.from_folder: (nifti.SUFFIXES, ("size", "units"))}


def names() -> list[str]:
    """The registered data sets, by the names that `open_dataset` accepts.

    Examples
    --------
    >>> "digits" in labkit.data.names()
    True
    """
    return list(named.NAMED)


def open_dataset(data: Any, **options: Any) -> Dataset:
    """Open a data set: it is checked and converted into the cache the first time, and ready there afterwards.

    Parameters
    ----------
    **options
        Of some data sets:

        - `channels="first"`, `"last"`, or `"none"` (volumes (N, D, H, W)) for arrays whose shape does not tell;
        - `size=(H, W)` and `ground="black"`, a colour for what is transparent (white by default), for pictures by class;
        - `size=(D, H, W)` and `units="HU"` (CT) or `"file"` (values as they are, for MRI) for volumes by class;
        - `n`, `size`, `seed` for "head-lesions" and "chest-phantom";
        - `label=`, `target=`, `inputs=`: which columns of a dict, a DataFrame, a Parquet or HDF5 file are labels 0..K-1 (or texts, which
          are numbered), targets (numbers, left as they are) and inputs, each a name or a list of names. Without the first two, columns
          called y, label(s) or target(s) are labels where they hold whole numbers, else targets, and with `target=True` targets in any
          case (a `Regressor` opens its data so); without the last, all others are inputs;
        - `tokens=`: which inputs are token ids or categories, int64 and not normalised; `as_given=`: which inputs are not normalised,
          and keep their shape; a name, names, or True;
        - `pad=0`: what stands behind the end of samples that are shorter than the longest (behind labels: -100, which losses ignore);
        - `stream=True`: a `.parquet` file is not converted into the cache, but read row group by row group while it is trained on, so
          that it may be larger than memory and disk. It is read once when it is opened. Partitions deal out whole row groups, of which
          a worker holds three in memory at a time: some 4 to 64 MB each are best, of rows in random order;
        - `external=True`: of an HDF5 file that names other files (external links, external storage, virtual data sets) these are read
          too. Without it such a file is refused.
    data
        One of

        - a registered name: see `names()`;
        - arrays `(x, y)` or `(x_train, y_train, x_test, y_test)`, also as `{"train": (x, y), "test": (x, y)}` of numpy arrays or tensors;
        - a dict of arrays or of lists of samples, `{"image": ..., "age": ..., "label": ...}`; one number a sample is an input of shape
          (1,). Texts are labels only. Names in _train and _test, or `{"train": {...}, "test": {...}}`, are two splits;
        - a pandas DataFrame, whose columns of numbers are one input "x" together (also `{"train": frame, "test": frame}`);
        - a folder with `x_train.npy`, `y_train.npy` and, optionally, `x_test.npy`, `y_test.npy`;
        - a `.parquet` file: column `y` and either `x` (lists of one length, nested lists, tensors) or numbers `f0`,
          `f1`, ...; flat lists get their shape from the metadata `shape` of the column or the file, a JSON list such
          as `[1, 28, 28]`;
        - an `.h5` / `.hdf5` file with `x_train`, `y_train`, `x_test`, `y_test`, or with `x`, `y`;
        - a folder of `.parquet` files (also in folders below it; `train` and `test` in it are two splits), a list of them, or
          `{"train": ..., "test": ...}` of either: read as with `stream=True`;
        - either of these files with columns of other names, which `label=`, `target=` or `inputs=` tell;
        - CIFAR-10's folder `cifar-10-batches-py`;
        - a folder with a folder for each class, that holds JPEG, PNG, BMP, PGM/PPM, WebP, TIFF or GIF pictures (TF-Flowers;
          Extended Yale B) or NIfTI volumes (MosMedData's CT-0, CT-1, ...; needs nibabel), also in folders below it;
        - a torch `Dataset` (map-style) of your own, whose items `(x, y)`, `((x1, x2), y)` or dicts are made on the workers by its own
          code, transforms included, and are not normalised; anything with `__len__` and `__getitem__` that gives such items will do. Two of
          them, as a pair or `{"train": ..., "test": ...}`, are two splits. Its attribute `classes` are the names of the classes. It travels
          by value up to 8 MiB; a larger one is made on each worker by a function: `"my_module:make_my_set"`;
        - a `Dataset` of labkit, which is returned as it is.

        `x` is (N, F) features, (N, H, W) grey images (sequences (N, steps, features) keep their shape with `as_given="x"`),
        (N, C, H, W) images or (N, C, D, H, W) volumes, of booleans, integers or floats. (N, H, W, C) and (N, D, H, W, C) are recognised where the sides tell them apart (C = 1 or 3 where
        axis 1 is neither, or one side much smaller than the others, or the others equal), converted, and noted in `.note`; where
        they do not, `channels` is asked for. `y` is (N,) integers 0..K-1, also as floats, or texts; (N, ...) integers, a class for each
        pixel or token, where what is below 0 or one value far above all others (255) is no class; (N, K) of 0 and 1, several labels
        a sample; with `target=True` numbers to be predicted, of any shape. Without a test split every 10th sample of a
        permutation with a fixed seed is held out as one.

        What was read, left out or decided is in `.note`: files and columns that were not read, pictures that were turned or
        laid on a ground, features that are constant, values that float32 merges.

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
        Files are missing or damaged, shapes or types do not fit or do not tell where the channels are, values are not
        finite, labels are out of range, or nothing is left of what differed before the conversion.

    Examples
    --------
    >>> digits = labkit.open_dataset("digits")
    >>> digits.shape, digits.n_classes
    ((1, 8, 8), 10)
    """
    if _pairs_by_split(data):
        data = (*data["train"], *data["test"])
    if isinstance(data, str) and data in named.NAMED:
        open_it = named.NAMED[data]
        if isinstance(open_it, str):
            open_it = imported(open_it)
        _check_options(data, options, [name for name in inspect.signature(open_it).parameters if name in OPTIONS])
        return open_it(**options)
    if (stream := options.get("stream")) is not None:
        flag("stream", stream)
    if (files := _streamed(data, stream)) is not None:
        _check_options("a set of Parquet files", options, ["channels", *OF_COLUMNS, "stream"])
        return streamed.from_files(files, _asked({name: value for name, value in options.items() if name != "stream"}))
    if isinstance(data, str | os.PathLike):
        path = file_path("data", data)
        if path.exists():
            _check_options(str(data), options, [*OF_PATHS, *OF_COLUMNS, "stream"])
            if options.pop("stream", None):
                raise ValueError(f"stream=True is for Parquet files; {path} is none.")
            return _from_path(path.resolve(), **options)
        if is_items_path(data):
            _check_options(data, options, OF_ITEMS)
            return from_items(data, _asked(options))
        raise DataError(
            f"No data set and no file or folder is called {str(data)!r}"
            + ("" if path.is_absolute() or str(data).isidentifier() else f" in {os.getcwd()}")
            + f". Registered names: {', '.join(names())}.{did_you_mean(data, names())}"
        )
    pair, named_columns = isinstance(data, tuple | list), isinstance(data, Mapping) or hasattr(data, "iloc")
    if isinstance(data, Mapping) and set(data) == {"import_path", "options"}:  # as a record names it
        return open_dataset(data["import_path"], **data["options"])
    items = not isinstance(data, Dataset) and by_items(data)
    fitting = OF_ITEMS if items else ["channels", *OF_COLUMNS] if pair or named_columns else []
    _check_options(f"data of type {type(data).__name__}", options, fitting)
    if isinstance(data, Dataset):
        return data
    if items:
        return from_items(data, _asked(options))
    if named_columns:
        return columns.from_mapping(data, _asked(options))
    if pair:
        return arrays.from_pair(data, _asked(options))
    raise DataError(
        f"data is a {type(data).__name__}. Give a registered name ({', '.join(names())}), arrays (x, y) or "
        "(x_train, y_train, x_test, y_test), a dict of arrays, a DataFrame, a torch Dataset, a .parquet, .h5 or .hdf5 file, or a folder of .npy files, of pictures or of "
        "volumes."
    )


def _pairs_by_split(data: Any) -> bool:
    """Is it {"train": (x, y), "test": (x, y)}, of arrays?"""
    return (
        isinstance(data, Mapping)
        and set(data) == {"train", "test"}
        and all(
            isinstance(pair, tuple | list) and len(pair) == 2 and all(hasattr(array, "shape") for array in pair)
            for pair in data.values()
        )
    )


def _streamed(data: Any, stream: bool | None) -> dict[str, list[Path]] | None:
    """The files by split, where `data` are Parquet files that are read while they are trained on."""
    single = isinstance(data, str | os.PathLike) and not os.path.isdir(data)
    if single and not stream:
        return None
    plain = os.fspath(data) if isinstance(data, os.PathLike) else data
    if (files := streamed.splits_of(plain)) is not None and stream is False:
        raise ValueError("stream=False: one Parquet file is converted into the cache. Several are read while they are trained on.")
    return files


def _check_options(data: str, options: dict[str, Any], known: list[str]) -> None:
    if unknown := [name for name in options if name not in known]:
        raise ValueError(f"{data} has no option {', '.join(unknown)}. It has {', '.join(known) or 'none'}.")


def by_items(data: Any) -> bool:
    """Is it a data set of the user's own, or a dict or pair of two, rather than arrays or columns?"""
    if isinstance(data, Mapping):
        return "train" in data and all(by_items(part) for part in data.values())
    if isinstance(data, list) and data and isinstance(data[0], Mapping):
        return True
    if isinstance(data, tuple | list):
        return len(data) == 2 and all(not isinstance(part, tuple | list | Mapping) and by_items(part) for part in data)
    return is_items(data) and not isinstance(data, str | bytes) and not hasattr(data, "iloc") and not hasattr(data, "dtype")


def _asked(options: dict[str, Any]) -> Asked:
    _channels(options)
    return Asked.of(**{name: value for name, value in options.items() if value is not None})


def _channels(options: dict[str, Any]) -> str | None:
    channels = options.get("channels")
    return None if channels is None else known("channels", channels, CHANNELS)


def _from_path(path: Path, **options: Any) -> Dataset:
    """The data set at `path`, recognised by what is there. ValueError for an option that is for something else."""
    is_cifar = path.is_dir() and cifar.looks_like(path)
    is_npy = path.is_dir() and any(path.glob("*.npy"))
    if path.is_dir() and not is_cifar and not is_npy:
        found = folders.suffixes_below(path) & frozenset().union(*(suffixes for suffixes, _ in BY_CLASS.values()))
        readers = {reader: fitting for reader, (suffixes, fitting) in BY_CLASS.items() if found & suffixes}
        if len(readers) > 1:
            raise DataError(f"{path} holds both pictures and volumes ({', '.join(sorted(found))}). Keep one kind in it.")
        for reader, fitting in readers.items():
            _check_fitting(path, options, fitting)
            return reader(path, **options)
    by_column = path.suffix.lower() in FILES and path.is_file()
    external = ("external",) if path.suffix.lower() in HDF5 else ()
    _check_fitting(path, options, () if is_cifar else ("channels", *OF_COLUMNS, *external) if by_column else ("channels",))
    channels, outside = _channels(options), {name: flag(name, options.pop(name)) for name in external if name in options}
    if path.is_dir():
        if is_cifar:
            return cifar.from_folder(path)
        if (made := opened(path) or streamed.opened(path)) is None:
            if is_of_cache(path):
                raise DataError(
                    f"{path} is damaged: it is no longer what labkit has converted. Open the data set again from what it was made of."
                )
            return arrays.from_npy(path, channels)
        _check_fitting(path, options, ())
        return made
    if not path.stat().st_size:
        raise DataError(f"{path} is empty. Write it again.")
    if path.suffix.lower() not in FILES:
        raise DataError(
            f"{path} ends in {path.suffix or 'nothing'!r}. {_ADVICE.get(path.suffix.lower(), '')}Known are {', '.join(FILES)}, folders of .npy files, CIFAR-10's "
            "unpacked folder, and folders of pictures or .nii.gz volumes, one for each class."
        )
    return FILES[path.suffix.lower()](path, _asked(options), **outside)


def _check_fitting(path: Path, options: dict[str, Any], fitting: tuple[str, ...]) -> None:
    for name, value in options.items():
        if name not in fitting:
            raise ValueError(f"{name}={value!r} is for {OF_PATHS.get(name, 'columns')}; {path} holds none.")
