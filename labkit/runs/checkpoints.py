"""Checkpoints: one file a version, from which weights are read and a run is resumed; whole, or refused by name.

    checkpoints/00000417.npz   an uncompressed zip archive of arrays
      weights      float32 (n,): the global weights of version 417
      a1, a2, ...  arrays of the state; equal ones are stored once, whole numbers in the smallest unsigned type
      state        UTF-8 JSON as uint8: format, run, version, and the state with references to the arrays
      digest       SHA-256 over the names and contents of all members before it

A file gets its name only when it is on the disk. Reading checks the length of every member, the CRC-32 of the archive and the
digest, so a file that is cut short, damaged, mixed from two or of another run is never read as a checkpoint. Nothing is pickled.

One policy says which versions are due (`Policy`) and which files stay (`retained`): snapshots spread evenly over the run, from
which its curve is measured, and the newest few to resume from.

Written by `labkit.training.server.server`; read where a run is measured, resumed or replayed. Imports numpy alone.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from labkit.errors import RunError, whole
from labkit.locks import parsed
from labkit.runs.events import Recorder
from labkit.runs.files import check_owner, read_json, replacing, run_id, write_json

AGE_S = 30.0  # at least so often a version is saved, if there is a new one
FORMAT = 1  # of a checkpoint; a reader refuses what is newer
FOLDER = "checkpoints"
WIDTHS = {"bool": 1, "bfloat16": 2, "complex64": 8, "complex128": 16}  # bytes of the types that buffers may have
WIDTHS |= {f"float{bits}": bits // 8 for bits in (16, 32, 64)}
WIDTHS |= {f"{sign}int{bits}": bits // 8 for sign in ("", "u") for bits in (8, 16, 32, 64)}
PART = 1 << 20  # bytes that are read, or weights that are looked at, at once
LAYOUT = "layout.json"
ARRAY, ITEMS = "__array__", "__items__"  # in the JSON: a reference to a member; a dict whose keys are not all text


# -- what the weights are ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """Which entries of a flat weight vector belong to which tensor: parameters first, then float32 buffers, then other buffers.

    The last len(types) tensors are buffers of these types, whose bytes are entries of their own (`labkit.models.flat`).
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    n_params: int
    n_buffers: int  # entries of all buffers
    types: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        params: Mapping[str, tuple[int, ...]],
        buffers: Mapping[str, tuple[int, ...]],
        exact: Mapping[str, tuple[str, tuple[int, ...]]] | None = None,
    ) -> Layout:
        """From shapes by name, as `labkit.models.flat.Flat.shapes` has them."""
        n_params, n_buffers = (sum(map(math.prod, some.values())) for some in (params, buffers))
        types, shapes = zip(*exact.values(), strict=True) if exact else ((), ())
        made = cls((*params, *buffers, *(exact or ())), (*params.values(), *buffers.values(), *shapes), n_params, n_buffers, types)
        return replace(made, n_buffers=n_buffers + made.n_exact)

    @classmethod
    def load(cls, run: Path, id: str) -> Layout:
        """What layout.json of the run with this id says; `RunError` where that is missing, damaged, or of another run."""
        file = Path(run) / LAYOUT
        stored = read_json(file, id)
        try:
            shapes = tuple(tuple(whole("a side of a shape", side, 0) for side in shape) for shape in stored["shapes"])
            types = tuple(stored.get("types", ()))  # format 4
            n_params, n_buffers = (whole(name, stored[name], 0) for name in ("n_params", "n_buffers"))
            layout = cls(tuple(stored["names"]), shapes, n_params, n_buffers, types)
            ends = list(itertools.accumulate(layout._sizes, initial=0))
            named = len(set(layout.names)) == len(shapes) == len(layout.names) and all(isinstance(n, str) for n in layout.names)
            if not named or (shapes and (layout.size != ends[-1] or layout.n_params not in ends)):  # a simulation names none
                raise ValueError("names, shapes and sizes do not fit each other")
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"{file} is not whole: {error}. Put a copy of it back.") from error
        return layout

    def save(self, run: Path, id: str) -> None:
        write_json(Path(run) / LAYOUT, asdict(self), run=id)

    @property
    def size(self) -> int:
        return self.n_params + self.n_buffers

    @property
    def blocks(self) -> tuple[int, ...]:
        """Sizes of the tensors that make the parameters, in their order."""
        ends = itertools.accumulate(self._sizes)
        return tuple(size for size, end in zip(self._sizes, ends, strict=True) if end <= self.n_params)

    @property
    def averaged(self) -> tuple[int, ...]:
        """Sizes of the tensors with which rules compute, in their order: all but those of bytes."""
        return tuple(self._sizes[: len(self.names) - len(self.types)])

    @property
    def n_exact(self) -> int:
        """Entries, at the end, that are bytes: no rule may compute with them."""
        return sum(self._sizes[len(self._sizes) - len(self.types) :])

    @property
    def _sizes(self) -> list[int]:
        bytes_of = [1] * (len(self.names) - len(self.types)) + [_width(kind) for kind in self.types]
        return [math.prod(shape) * n for shape, n in zip(self.shapes, bytes_of, strict=True)]

    def split(self, flat: np.ndarray) -> dict[str, np.ndarray]:
        """Name -> array of its shape: views into `flat`, but for what is stored as bytes."""
        kinds = (*[""] * (len(self.names) - len(self.types)), *self.types)
        tensors, start = {}, 0
        for name, shape, kind, n in zip(self.names, self.shapes, kinds, self._sizes, strict=True):
            part, start = flat[start : start + n], start + n
            tensors[name] = (_from_bytes(part, kind) if kind else part).reshape(shape)
        return tensors


def _width(kind: Any) -> int:
    if not isinstance(kind, str) or kind not in WIDTHS:
        raise TypeError(f"a buffer of type {kind!r} cannot be stored; those of {', '.join(WIDTHS)} can")
    return WIDTHS[kind]


def _from_bytes(part: np.ndarray, kind: str) -> np.ndarray:
    """The numbers of this type whose bytes are the entries of `part`; bfloat16, which numpy has not, as float32."""
    stored = part.astype(np.uint8)
    if kind == "bfloat16":
        return (stored.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return stored.view(kind)


# -- writing -----------------------------------------------------------------------------------------------------------


def prepare(path: Path) -> None:
    """A folder for the checkpoints of a run that is about to be written; what a killed writer left half-written is deleted."""
    folder = Path(path) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for draft in folder.glob(".*"):
        draft.unlink(missing_ok=True)


def save(recorder: Recorder, version: int, weights: np.ndarray, state: dict | None = None, *, run: str | None = None) -> None:
    """Save a version and the state to resume from, whole or not at all, and record it; `state["done"]` is in samples."""
    recorder.sync()  # no checkpoint is ahead of the record
    size = write(recorder.path, version, weights, state, run=run)
    recorder.event("checkpoint", version=version, total=(state or {}).get("done"), bytes=size)


class _Member(NamedTuple):
    """An array as it lies in the archive."""

    header: bytes
    data: np.ndarray  # uint8 (bytes,)
    sha: bytes


def write(path: Path, version: int, weights: np.ndarray, state: dict | None = None, *, run: str | None = None) -> int:
    """Save a version, whole or not at all; returns the bytes of the file.

    `state` is a nested dict of JSON values and numpy arrays, with keys that are text or whole numbers; tuples come back as lists.
    `run` is the id of the run to which the directory must belong; by default it is the one that is there.
    """
    if run is None:
        run = run_id(path)
    else:
        check_owner(path, run)
    members = {"weights": _member(weights)}
    tree = _referring(state or {}, members, "state")
    head = {"format": FORMAT, "run": run, "version": int(version), "state": tree}
    members["state"] = _member(np.frombuffer(json.dumps(head).encode(), np.uint8))
    members["digest"] = _member(np.frombuffer(_digest({name: member.sha for name, member in members.items()}), np.uint8))
    file = file_of(path, version)
    with replacing(file) as draft, zipfile.ZipFile(draft, "w", zipfile.ZIP_STORED) as archive:
        for name, member in members.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as out:
                out.write(member.header)
                out.write(member.data)
    return file.stat().st_size


def _member(array: np.ndarray) -> _Member:
    array = np.asarray(array, order="C")
    if array.dtype.kind not in "biuf":
        raise TypeError(f"an array of {array.dtype} cannot be stored in a checkpoint: numbers only.")
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    data = array.reshape(-1).view(np.uint8)
    sha = hashlib.sha256(header.getvalue())
    sha.update(data)
    return _Member(header.getvalue(), data, sha.digest())


def _digest(shas: Mapping[str, bytes]) -> bytes:
    return hashlib.sha256(b"".join(name.encode() + b"\0" + sha for name, sha in shas.items())).digest()


def _referring(value: Any, members: dict[str, _Member], where: str) -> Any:
    """`value` as JSON, its arrays put into `members`."""
    if isinstance(value, np.ndarray):
        member = _member(_packed(value))
        name = next((name for name, other in members.items() if other.sha == member.sha), f"a{len(members)}")
        members.setdefault(name, member)
        return {ARRAY: name, "dtype": value.dtype.str}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        wrong = [key for key in value if isinstance(key, bool) or not isinstance(key, (str, int, np.integer))]
        if wrong:
            raise TypeError(f"{where} has the key {wrong[0]!r}; keys of a checkpoint are text or whole numbers.")
        made = {key: _referring(item, members, f"{where}[{key!r}]") for key, item in value.items()}
        if all(isinstance(key, str) for key in made) and not {ARRAY, ITEMS} & set(made):
            return made
        return {ITEMS: [[key if isinstance(key, str) else int(key), item] for key, item in made.items()]}
    if isinstance(value, (list, tuple)):
        return [_referring(item, members, f"{where}[{i}]") for i, item in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{where} is a {type(value).__name__}; a checkpoint holds JSON values and numpy arrays.")


def _packed(array: np.ndarray) -> np.ndarray:
    """Whole numbers of at least 0, such as indices of samples, in the smallest unsigned type that holds them."""
    if array.dtype.kind not in "iu" or not array.size or array.min() < 0:
        return array
    return array.astype(np.min_scalar_type(int(array.max())))


# -- reading -----------------------------------------------------------------------------------------------------------


def versions(path: Path) -> list[int]:
    """The versions that are there, in order."""
    return sorted(int(file.stem) for file in (Path(path) / FOLDER).glob("*.npz") if file.stem.isdecimal())


def read_weights(path: Path, version: int, size: int, *, writable: bool = False) -> np.ndarray:
    """The flat float32 vector of a version (read-only, unless asked otherwise); anything but `size` finite numbers is refused by name."""
    weights = read_state(path, version)[0]
    if weights.shape != (size,):
        raise _refused(path, version, f"holds {len(weights)} weights, and the model of this run has {size}.")
    weights.flags.writeable = writable
    return weights


def read_state(path: Path, version: int) -> tuple[np.ndarray, dict]:
    """Weights (read-only) and state of a version, as they were written; `RunError` with the reason if they are not."""
    file = file_of(path, version)
    try:
        members = _read_members(file)
        head = json.loads(_array(members["state"][0]).tobytes()) if "state" in members else None
        if isinstance(head, dict) and isinstance(head.get("format"), int) and head["format"] > FORMAT:
            later = f"was written by a later labkit (checkpoint format {head['format']}; this one reads {FORMAT})."
            raise RunError(f"{file} {later} Update labkit to read it.")
        if list(members)[:1] != ["weights"] or list(members)[-2:] != ["state", "digest"] or not isinstance(head, dict):
            raise _Foreign(f"it holds {', '.join(list(members)[:4]) or 'nothing'}")
        sha = _digest({name: sha for name, (_, sha) in members.items() if name != "digest"})
        if _array(members["digest"][0]).tobytes() != sha:
            raise ValueError("its contents do not fit its checksum")
        weights = _array(members["weights"][0])
        arrays = {name: _array(data) for name, (data, _) in members.items() if name not in ("state", "digest")}
        state = _resolved(head["state"], arrays, {})
    except FileNotFoundError as error:
        raise RunError(f"{file} is missing. Versions there: {versions(path)}.") from error
    except RunError:
        raise
    except _Foreign as error:
        raise _refused(path, version, f"is no checkpoint of labkit: {error}.") from error
    except Exception as error:  # whatever zipfile, numpy and json make of damaged bytes
        raise _refused(path, version, f"is damaged: {error}.") from error
    if head["run"] != (run := run_id(path)):
        raise _refused(path, version, f"belongs to another run: {head['run'] or 'one without id'}, not {run or 'without id'}.")
    if head["version"] != version:
        raise _refused(path, version, f"holds version {head['version']}: it was renamed.")
    if weights.dtype != np.float32 or weights.ndim != 1:
        raise _refused(path, version, f"holds weights of {weights.dtype} {weights.shape}, not a float32 vector.")
    if not is_finite(weights):
        raise _refused(path, version, "holds NaN or infinity among the weights.")
    weights.flags.writeable = False
    return weights, state


def is_finite(vector: np.ndarray) -> bool:
    """In parts: no array of the same length is made."""
    return all(np.isfinite(vector[start : start + PART]).all() for start in range(0, len(vector), PART))


def read_average(path: Path, version: int, size: int, *, writable: bool = False) -> np.ndarray:
    """The average of the global weights up to a version, where the run makes one; read-only and refused as in `read_weights`."""
    weights, state = read_state(path, version)
    held = state.get("ema")
    average = held.get("weights") if isinstance(held, dict) else None
    fits = isinstance(average, np.ndarray) and average.dtype == np.float32 and average.shape == (size,) == weights.shape
    if not fits or not is_finite(average):
        raise _refused(path, version, f"holds no average of the {size} weights.")
    average.flags.writeable = writable
    return average


def lasting(state: Mapping[str, Any]) -> dict[str, Any]:
    """What of a state is kept where nothing goes on from it: the average."""
    return {name: state[name] for name in ("ema",) if name in state}


def newest(path: Path) -> tuple[int, list[str]]:
    """The newest version that is whole, and for each newer one why it was refused; `RunError` when there is none."""
    refused: list[str] = []
    for version in reversed(versions(path)):
        try:
            read_state(path, version)
            return version, refused
        except RunError as error:
            refused.append(str(error))
    why = "\n".join(refused) or "None was written."
    raise RunError(f"{Path(path) / FOLDER} holds no whole checkpoint, so the run cannot be resumed. Train it again.\n{why}")


class _Foreign(Exception):
    """A file that labkit did not write."""


def file_of(path: Path, version: int) -> Path:
    return Path(path) / FOLDER / f"{version:08d}.npz"


def _refused(path: Path, version: int, why: str) -> RunError:
    others = [other for other in versions(path) if other != version]
    return RunError(f"{file_of(path, version)} {why} Delete it to continue without it; other versions: {others or 'none'}.")


def _read_members(file: Path) -> dict[str, tuple[np.ndarray, bytes]]:
    """Contents and SHA-256 of each member, in order. Lengths are checked before memory is allocated, CRC-32 during reading."""
    size = file.stat().st_size
    with open(file, "rb") as raw:
        beginning = raw.read(6)
        if not beginning:
            raise ValueError("it is empty")
        if beginning[:2] != b"PK":
            kind = "a plain .npy file" if beginning == b"\x93NUMPY" else f"it begins with {beginning!r}"
            raise _Foreign(kind)
        members = {}
        with zipfile.ZipFile(raw) as archive:
            infos = archive.infolist()
            if sum(info.file_size for info in infos) > size:
                raise ValueError(f"its members claim more than the {size} bytes of the file")
            for info in infos:
                if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
                    raise _Foreign(f"its member {info.filename} is compressed")
                name = info.filename.removesuffix(".npy")
                if name in members:
                    raise ValueError(f"it holds {name} twice")
                data, sha = np.empty(info.file_size, np.uint8), hashlib.sha256()
                with archive.open(info) as member:
                    for start in range(0, len(data), PART):
                        part = memoryview(data)[start : start + PART]
                        if member.readinto(part) != len(part):
                            raise ValueError(f"its member {name} is cut short")
                        sha.update(part)
                    member.read(1)  # its end, where the CRC-32 is compared
                members[name] = (data, sha.digest())
    return members


def _head(data: bytes) -> tuple[tuple, int]:
    """Shape, order and type of an array, and where its numbers begin."""
    stream = io.BytesIO(data)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("it holds arrays of another format")
    return np.lib.format.read_array_header_1_0(stream), stream.tell()


def _array(data: np.ndarray) -> np.ndarray:
    """The array of a member, whose bytes these are (without a copy)."""
    (shape, fortran, dtype), begins = parsed(_head, data[:PART].tobytes())
    if dtype.kind not in "biuf" or fortran:
        raise _Foreign(f"it holds an array of {dtype}")
    return np.frombuffer(data, dtype, offset=begins).reshape(shape)


def _resolved(value: Any, arrays: Mapping[str, np.ndarray], made: dict[tuple[str, str], np.ndarray]) -> Any:
    """The state, of which each array is `made` once, however often it is referred to."""
    if isinstance(value, list):
        return [_resolved(item, arrays, made) for item in value]
    if not isinstance(value, dict):
        return value
    if ARRAY in value:
        name, kind = value[ARRAY], np.dtype(value["dtype"])
        array = arrays[name]
        if kind != array.dtype and not (array.dtype.kind == "u" and kind.kind in "iu"):  # as `_packed` makes them
            raise ValueError(f"it holds {name} as {array.dtype}, and calls it {kind}")
        if (name, kind.str) not in made:
            made[name, kind.str] = array.astype(kind, copy=False)
            made[name, kind.str].flags.writeable = False
        return made[name, kind.str]
    if ITEMS in value:
        return {key: _resolved(item, arrays, made) for key, item in value[ITEMS]}
    return {key: _resolved(item, arrays, made) for key, item in value.items()}


# -- which ones are due, and which ones stay ---------------------------------------------------------------------------


class Policy:
    """Which versions of a run are saved: evenly over its `budget`, and in between when the newest has become too old.

    `snapshots` is how many the curve needs. Twice as many are due: a server that is killed while it writes one then loses one
    interval of the curve at most. `age` is in seconds of `clock`; `merged` counts the samples that are part of a version.
    """

    def __init__(self, budget: int, snapshots: int, clock: Callable[[], float], age: float = AGE_S) -> None:
        self.budget, self.snapshots, self.clock, self.age = budget, snapshots, clock, age
        self.newest, self.at, self.number = -1, clock(), -1  # the newest version saved; when, and how many were due by then

    def resume(self, merged: int, version: int) -> None:
        """The run is resumed from a version that is saved already."""
        self.newest, self.number = version, self._due(merged)

    def is_due(self, merged: int) -> bool:
        return self._due(merged) > self.number or self.clock() - self.at > self.age

    def admits(self, merged: int, version: int) -> bool:
        """Each version once: is this one to be saved now? After that it counts as saved."""
        self.number, self.at = self._due(merged), self.clock()
        before, self.newest = self.newest, version
        return version != before

    def missed(self, version: int) -> None:
        """This one could not be saved after all."""
        if self.newest == version:
            self.newest = -1

    def _due(self, merged: int) -> int:
        return 2 * merged * self.snapshots // self.budget


def retained(done: Mapping[int, int], budget: int, snapshots: int = 32, points: int = 2) -> set[int]:
    """The versions to retain, by number and age.

    `done` holds the samples that were trained on by each version. The first version in each of `snapshots` equal parts of the
    budget stays for the curve, and the newest `points` stay to resume from, so that the run survives a damaged newest one.
    """
    first: dict[int, int] = {}
    for version in sorted(done):
        first.setdefault(done[version] * snapshots // budget, version)
    return {*first.values(), *sorted(done)[-points:]}


def prune(path: Path, retained: Iterable[int], *, run: str | None = None) -> list[int]:
    """Delete every version (of the run with the id `run`) that is not among `retained`; returns those that were deleted."""
    if run is not None:
        check_owner(path, run)
    gone = sorted(set(versions(path)) - set(retained))
    for version in gone:
        file_of(path, version).unlink(missing_ok=True)
    return gone


def rewind(path: Path, version: int) -> list[int]:
    """Set aside what is newer than `version`, as <version>.refused: the run continues from there and makes these numbers again."""
    newer = [other for other in versions(path) if other > version]
    for other in newer:
        file_of(path, other).replace(file_of(path, other).with_suffix(".refused"))
    return newer
