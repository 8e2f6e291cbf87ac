"""The run directory: what happened in a run, written while it happens and read afterwards.

    config.json  environment.json  layout.json  events.jsonl  status.json  checkpoints/<version>.npy  metrics.parquet

`events.jsonl` is append-only and is the truth: one JSON object a line, one line an event; every table and figure comes from it.
A checkpoint is one flat float32 vector; `layout.json` says which entries belong to which tensor. Files that are replaced are
written beside their place and renamed, so that a reader never sees half of one. Nothing here is pickled.

Written by `labkit.server` (events, checkpoints) and `labkit.training` (the rest); read by `labkit.run`. Imports numpy alone, so
that the server stays small; pandas and pyarrow come with the reading functions.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from labkit.errors import RunError

if TYPE_CHECKING:
    import pandas as pd

FORMAT = 1  # of the run directory; a reader refuses what is newer
COLUMNS = [
    "seq",
    "time",
    "seconds",
    "kind",
    "worker",
    "incarnation",
    "pass",
    "base_version",
    "version",
    "staleness",
    "samples",
    "total",
    "loss",
    "score",
    "coefficient",
    "compute_s",
    "score_s",
    "wait_s",
    "send_s",
    "bytes",
    "message",
]
TEXT_COLUMNS = ("kind", "message")


class Recorder:
    """Appends events and saves checkpoints of one run; safe from several threads; closing twice is fine."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.started: float | None = None  # Unix time at which the clock of the run began; seconds are empty before
        (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
        # One line is on its way at once; open until `close`.
        self._file = open(self.path / "events.jsonl", "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        self._lock = threading.Lock()
        self._seq = 0

    def event(self, kind: str, **fields: Any) -> None:
        """Append one row; `fields` are columns of `COLUMNS`. The clock of the run begins with the event "start"."""
        unknown = set(fields) - set(COLUMNS)
        assert not unknown, f"events have no column {unknown}"
        with self._lock:
            now = time.time()
            if kind == "start":
                self.started = now
            seconds = None if self.started is None else round(now - self.started, 6)
            row = {"seq": self._seq, "time": round(now, 6), "seconds": seconds, "kind": kind, **fields}
            self._file.write(json.dumps(row, separators=(",", ":")) + "\n")
            self._seq += 1

    def checkpoint(self, version: int, weights: np.ndarray) -> None:
        """Save the weights of a version, whole or not at all, and record it."""
        with replacing(self.path / "checkpoints" / f"{version:08d}.npy") as file:
            np.save(file, weights, allow_pickle=False)
        self.event("checkpoint", version=version, bytes=int(weights.nbytes))

    def close(self) -> None:
        with self._lock:
            if not self._file.closed:
                self._file.close()


@contextmanager
def replacing(path: Path) -> Iterator[Any]:
    """A binary file that takes the place of `path` only once it is written and on the disk."""
    path = Path(path)
    draft = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with open(draft, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_json(path: Path, value: dict) -> None:
    with replacing(path) as file:
        file.write(json.dumps(value, indent=2).encode() + b"\n")


def read_json(path: Path) -> dict:
    """A JSON object of a run directory; what is missing or damaged is refused by name."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunError(f"{path} is missing: is {Path(path).parent} a run directory?") from error
    except (ValueError, OSError) as error:
        raise RunError(f"{path} cannot be read: {error}.") from error
    if not isinstance(value, dict):
        raise RunError(f"{path} holds a {type(value).__name__}, not a JSON object: it was not written by labkit.")
    return value


def read_events(path: Path) -> pd.DataFrame:
    """The events of a run, one row each, `COLUMNS` as columns; a line that is still being written is left out."""
    import pandas as pd

    file = Path(path) / "events.jsonl"
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        text = ""
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{file} cannot be read: {error}.") from error
    lines = text.split("\n")[:-1]  # whatever follows the last newline is not finished
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
            if not isinstance(rows[-1], dict):
                raise ValueError(f"it holds {line[:40]!r}, not an event")
        except ValueError as error:
            raise RunError(f"{file}, line {number} is damaged: {error}. Remove the line to read the rest.") from error
    frame = pd.DataFrame(rows, columns=COLUMNS)
    numbers = [column for column in COLUMNS if column not in TEXT_COLUMNS]
    frame[numbers] = frame[numbers].apply(pd.to_numeric, errors="coerce")
    return frame


def checkpoint_versions(path: Path) -> list[int]:
    """The versions whose weights are kept, in order."""
    return sorted(int(file.stem) for file in (Path(path) / "checkpoints").glob("*.npy") if file.stem.isdecimal())


def read_checkpoint(path: Path, version: int, size: int) -> np.ndarray:
    """The flat float32 vector of a version (memory-mapped); anything but `size` finite float32 numbers is refused by name."""
    file = Path(path) / "checkpoints" / f"{version:08d}.npy"
    try:
        weights = np.load(file, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise RunError(f"{file} is missing. Kept versions: {checkpoint_versions(path)}.") from error
    except (ValueError, OSError, EOFError) as error:
        raise RunError(f"{file} is damaged or no checkpoint: {error}.") from error
    if not isinstance(weights, np.ndarray):  # a zip archive in its place
        raise RunError(f"{file} is no checkpoint: it holds a {type(weights).__name__}.")
    if weights.shape != (size,) or weights.dtype != np.float32:
        raise RunError(f"{file} holds {weights.dtype} of shape {weights.shape}; this run has float32 of ({size},).")
    if not np.isfinite(np.add.reduce(weights)):
        raise RunError(f"{file} holds NaN or infinity: it is damaged.")
    return weights


def environment() -> dict:
    """Where and with what a run was made: versions, machine, load."""
    import platform
    import sys
    from importlib import metadata

    packages = ["labkit", "torch", "numpy", "dask", "distributed", "ipyparallel", "papermill", "hvplot"]
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "load_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "versions": versions,
    }
