"""Events: what happened in a run, written while it happens and read afterwards.

`events.jsonl` is append-only and is the truth: one JSON object a line, one line an event; every table and figure comes from it.
A run that was cut off is resumed in the same file: seq and the clock continue, and an event "resume" holds the version, so
what came after that version does not count (`effective`). Readers: all rows (`read_rows`, or as a table `read_events`), and
those that have been added since (`Tail`). Nothing here is pickled.

Written by `labkit.training.server.server` and, without a cluster, by `labkit.simulation.offline`; read by `labkit.runs.record` and
`labkit.plots.live`. Imports numpy alone, so that the server stays small; pandas comes with the reading functions.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from labkit.errors import RunError
from labkit.runs.files import read_lines_since

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = [
    "seq", "time", "seconds", "kind", "worker", "incarnation", "pass", "base_version", "version", "staleness",
    "samples", "total", "loss", "score", "coefficient",
    "compute_s", "score_s", "wait_s", "send_s",
    "hidden_s",  # of an exchange: the part during which the worker computed
    "bytes",
    "probe_s",  # of a join: seconds per sample, as probed
    "threads",  # of a join: of torch
    "device",
    "generator",  # of a join: does the worker draw random numbers from its "own", or is torch's "shared" with other threads?
    "message",
]  # fmt: skip
TEXT_COLUMNS = ("kind", "device", "generator", "message")
KNOWN = frozenset(COLUMNS)
FILE = "events.jsonl"
_in_json = json.JSONEncoder(separators=(",", ":")).encode  # json.dumps would make one for each row


class Recorder:
    """Appends events to the record of one run; safe from several threads; closing twice is fine.

    A record that exists is continued: what a killed writer left half-written is cut off, seq continues, and the clock stays
    where it was until the next event "start". `saved` are the samples that were trained on by each checkpoint.

    A driver without a cluster brings its own `clock`, which returns what `time` and `seconds` of the next event are.

    Raises `RunError` while another process writes the same record.
    """

    def __init__(self, path: Path, clock: Callable[[], tuple[float, float | None]] | None = None) -> None:
        self.path, self.clock = Path(path), clock
        self.started: float | None = None  # Unix time at which the clock of the run was 0; None while it does not run
        self.saved: dict[int, int] = {}  # version: samples
        self.resumed: set[int] = set()  # versions from which the run was resumed: a replay continues from them too
        # Each line is written at once; open until `close`.
        self._file = open(self.path / FILE, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        self._lock = threading.Lock()
        self._seq, self._before = 0, None  # seconds on the clock of the earlier writer
        try:
            _lock_out_others(self._file)
            self._continue()
        except BaseException:
            self._file.close()
            raise

    def event(self, kind: str, **fields: Any) -> None:
        """Append one row; `fields` are columns of `COLUMNS`. The clock of the run begins, or continues, with the event "start"."""
        assert KNOWN.issuperset(fields), f"events have no column {set(fields) - KNOWN}"
        with self._lock:
            now, seconds = self.clock() if self.clock else self._time(kind)
            self._append({"time": now, "seconds": seconds, "kind": kind, **fields})

    def copy(self, row: dict) -> None:
        """Append an event of another record with the time that it had there; its number is a new one."""
        with self._lock:
            self._append(row)

    def sync(self) -> None:
        """All events are on the disk: no checkpoint may be ahead of the record."""
        with self._lock:
            try:
                os.fsync(self._file.fileno())
            except OSError as error:
                if error.errno != errno.EINVAL:  # what is on no disk cannot be synchronised
                    raise

    def close(self) -> None:
        with self._lock:
            if not self._file.closed:
                self._file.close()

    def _time(self, kind: str) -> tuple[float, float | None]:
        now = time.time()
        if kind == "start":
            self.started = now - (self._before or 0.0)
        return round(now, 6), self._before if self.started is None else round(now - self.started, 6)

    def _append(self, row: dict) -> None:
        self._file.write(_in_json({"seq": self._seq} | row | {"seq": self._seq}) + "\n")  # first, wherever it was in the row
        self._seq += 1
        self._count(row)

    def _continue(self) -> None:
        file, size = self.path / FILE, os.fstat(self._file.fileno()).st_size
        if not size:
            return
        lines = file.read_bytes().split(b"\n")
        lines.pop()  # behind the last newline: nothing, or half an event
        while lines and not _row(lines[-1]):  # a crash of the whole machine leaves zeros
            lines.pop()
        whole = sum(len(line) + 1 for line in lines)
        if whole < size:
            os.truncate(file, whole)
        if lines:
            self._seq = _row(lines[-1])["seq"] + 1
        clock = (_row(line).get("seconds") for line in reversed(lines))
        self._before = next((seconds for seconds in clock if seconds is not None), None)
        for line in lines:
            if b'"checkpoint"' in line or b'"resume"' in line:
                self._count(_row(line))

    def _count(self, row: dict) -> None:
        if row.get("kind") == "checkpoint" and row.get("total") is not None:
            self.saved[row["version"]] = row["total"]
        elif row.get("kind") == "resume":
            self.resumed.add(row["version"])
            self.saved = {version: done for version, done in self.saved.items() if version <= row["version"]}


def _lock_out_others(file: Any) -> None:
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RunError(f"{file.name} is being written by another process: the run is running. Wait, or stop it first.") from error
    except OSError:
        pass  # a file system without locks


def _row(line: bytes) -> dict:
    """An event; empty if the line is none."""
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) and isinstance(row.get("seq"), int) else {}


def read_rows(path: Path) -> list[dict]:
    """The events of a run as they were written; a line that is still being written is left out."""
    return Tail(path).read()


class Tail:
    """The events of a run as they come: `read` returns those that were written since it was last called."""

    def __init__(self, path: Path) -> None:
        self.file = Path(path) / FILE
        self.offset = self.lines = 0  # bytes and lines that have been read

    def read(self) -> list[dict]:
        """Raises `RunError` for a file that cannot be read, and for a damaged line, by its number."""
        try:
            lines, offset = read_lines_since(self.file, self.offset)
            text = [line.decode() for line in lines]
        except (OSError, UnicodeDecodeError) as error:
            raise RunError(f"{self.file} cannot be read: {error}.") from error
        rows = []
        for number, line in enumerate(text, self.lines + 1):
            try:
                rows.append(json.loads(line))
                if not isinstance(rows[-1], dict):
                    raise ValueError(f"it holds {line[:40]!r}, not an event")
            except ValueError as error:
                raise RunError(f"{self.file}, line {number} is damaged: {error}. Remove the line to read the rest.") from error
        self.offset, self.lines = offset, self.lines + len(lines)
        return rows


def read_events(path: Path) -> pd.DataFrame:
    """The events of a run, one row each, `COLUMNS` as columns (`read_rows`)."""
    import pandas as pd

    frame = pd.DataFrame(read_rows(path), columns=COLUMNS)
    numbers = [column for column in COLUMNS if column not in TEXT_COLUMNS]
    frame[numbers] = frame[numbers].apply(pd.to_numeric, errors="coerce")
    return frame


def effective(events: pd.DataFrame) -> pd.DataFrame:
    """The events without what a "resume" has undone, so that no sample counts twice.

    A run that is resumed from version v makes the versions after v again: pushes, merges and drops between those of v and the
    resume, and checkpoints of later versions, do not count. All other rows stay, as the time was spent.
    """
    kind, version = events.kind.to_numpy(), events.version.to_numpy(float)
    counts, row = np.ones(len(events), bool), np.arange(len(events))
    for resume in np.flatnonzero(kind == "resume"):
        earlier = counts & (row < resume)
        made = np.flatnonzero(earlier & (kind == "merge") & (version <= version[resume]))
        after = earlier & (row > (made[-1] if len(made) else -1))
        counts &= ~(after & np.isin(kind, ("push", "score", "merge", "drop")))
        counts &= ~(earlier & (kind == "checkpoint") & (version > version[resume]))
    return events if counts.all() else events[counts]
