"""Events: what happened in a run, written while it happens and read afterwards.

`events.jsonl` is append-only and is the truth: one JSON object a line, one line an event; every table and figure comes from it.
A run that was cut off is resumed in the same file: seq and the clock continue, and an event "resume" holds the version, so
what came after that version does not count (`effective`). Readers: all rows (`read_rows`, or as a table `read_events`), those that
have been added since (`Tail`), and the table with them (`Table`). Nothing here is pickled.

The last key of a line is its CRC-32, which begins with the id of the run, so a line that was changed or is of another run is refused
by its number; seq finds those that are missing or out of place. Formats 1 to 3 had none: columns, kinds and types are checked.

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
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from labkit.errors import RunError
from labkit.runs.files import read_lines_since, run_id

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = [
    "seq", "time", "seconds", "kind", "worker", "incarnation", "pass", "base_version", "version", "staleness",
    "samples", "total", "loss", "score", "coefficient",
    "compute_s", "score_s", "wait_s", "send_s",
    "load_s",  # of compute_s: the part during which the worker waited for data
    "hidden_s",  # of an exchange: the part during which the worker computed
    "bytes",
    "probe_s",  # of a join: seconds per sample, as probed
    "threads",  # of a join: of torch
    "device",
    "generator",  # of a join: does the worker draw random numbers from its "own", or is torch's "shared" with other threads?
    "message",
    "precision",  # of a join: what the worker computes in, where that is not float32 by the problem (`labkit.inner.precision.Precision`)
    "inner",  # of a push: how its steps were computed, where the inner layer chose
    "metrics",  # of a push: means over its samples of what the problem's step returned beside the loss, by name
]  # fmt: skip
TEXT_COLUMNS = ("kind", "device", "generator", "message", "inner")
TABLE_COLUMNS = ("precision", "metrics")
NO_NUMBERS = (*TEXT_COLUMNS, *TABLE_COLUMNS)
KNOWN = frozenset(COLUMNS)
LARGEST = 2**53  # whole numbers beyond it are not the same in every JSON reader
KINDS = frozenset(  # of formats 1 to 3, whose lines have no checksum
    [
        "join",
        "leave",
        "start",
        "resume",
        "missing",
        "expire",
        "stop",
        "error",
        "allocate",
        "reclaim",
        "pull",
        "push",
        "score",
        "merge",
        "drop",
        "hold",
        "release",
        "regroup",
        "refuse",
        "checkpoint",
    ]
)
VERSIONS = ("merge", "settle")  # kinds of events that make a version
WHOLE = ("worker", "incarnation", "pass", "base_version", "version", "staleness", "samples", "total", "bytes", "threads")
FINITE = ("time", "seconds", "coefficient", "compute_s", "score_s", "wait_s", "send_s", "load_s", "hidden_s", "probe_s")
NEEDED = {  # what events of these kinds always have
    "allocate": ("worker", "pass", "samples", "total"),
    "push": ("worker", "pass", "samples"),
    "merge": ("worker", "version", "samples", "total", "staleness", "coefficient"),
    **dict.fromkeys(("settle", "checkpoint", "resume"), ("version",)),
}
FILE = "events.jsonl"
CRC = b',"crc":"%08x"}'
RESTORE = "Put a copy of the file back; weights and a measured curve can be read without it."
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
        self._lock, self._run = threading.Lock(), _of_run(self.path)
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

    @property
    def closed(self) -> bool:
        return self._file.closed

    def _time(self, kind: str) -> tuple[float, float | None]:
        now = time.time()
        if kind == "start":
            self.started = now - (self._before or 0.0)
        return round(now, 6), self._before if self.started is None else round(now - self.started, 6)

    @property
    def events(self) -> int:
        """How many events the record holds."""
        return self._seq

    def _append(self, row: dict) -> None:
        body = _in_json({"seq": self._seq} | row | {"seq": self._seq})[:-1]  # seq first, wherever it was in the row
        self._file.write(body + (CRC % zlib.crc32(body.encode(), self._run)).decode() + "\n")
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
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) and isinstance(row.get("seq"), int) else {}


def _of_run(path: Path) -> int:
    """With what the checksums of its lines begin."""
    return zlib.crc32(run_id(path).encode())


def read_rows(path: Path) -> list[dict]:
    """The events of a run as they were written; a line that is still being written is left out."""
    return Tail(path).read()


class Tail:
    """The events of a run as they come: `read` returns those that were written since it was last called."""

    def __init__(self, path: Path) -> None:
        self.file = Path(path) / FILE
        self.offset = self.lines = 0  # bytes and lines that have been read
        self._run: int | None = None
        self._checked = False  # has a line had its checksum? Then all that follow have

    def read(self, continued: bool = False) -> list[dict]:
        """Raises `RunError` for a file that cannot be read, and by its number for a line that is damaged or out of place.

        Of a record that is to be `continued`, what a crash left at its end is not read: `Recorder` cuts it off.
        """
        try:
            lines, offset = read_lines_since(self.file, self.offset)
        except OSError as error:
            raise RunError(f"{self.file} cannot be read: {error}.") from error
        while continued and lines and not _row(lines[-1]):
            offset -= len(lines.pop()) + 1
        if lines and self._run is None:
            self._run = _of_run(self.file.parent)
        fitting = [self._fitting(number, line) for number, line in enumerate(lines, self.lines)]
        try:
            rows = json.loads(b"[" + b",".join(filter(None, fitting)) + b"]")  # at once: in half of the time
        except (ValueError, RecursionError) as error:  # whoever made the checksum
            raise RunError(f"{self.file} is damaged: {error}. {RESTORE}") from error
        if len(rows) < len(lines):  # of an earlier format
            earlier = len(lines) - len(rows)
            rows = [self._row(number, line) for number, line in enumerate(lines[:earlier], self.lines)] + rows
        for number, row in enumerate(rows, self.lines):
            if not isinstance(row, dict) or row.get("seq") != number:
                there = row.get("seq") if isinstance(row, dict) else row
                wrong = f"event {number} is missing or out of place: line {number + 1} holds event {there!r:.40}"
                raise RunError(f"{self.file}: {wrong}. {RESTORE}")
        self.offset, self.lines = offset, self.lines + len(lines)
        return rows

    def _fitting(self, number: int, line: bytes) -> bytes | None:
        """A line without its checksum, which must fit; None for one of an earlier format, which has none."""
        at = len(line) - len(CRC % 0)
        body = line[: max(at, 0)]
        if at > 0 and line[at:] == CRC % zlib.crc32(body, self._run):
            self._checked = True
            return body + b"}"
        if self._checked or line[at:][:8] == CRC[:8]:
            whose = " or of another run" if not number else ""
            raise self._damaged(number, f"it does not fit its checksum{whose}")
        return None

    def _row(self, number: int, line: bytes) -> dict:
        """An event of a line without a checksum: columns, kinds and types at least must be right."""
        try:
            row = json.loads(line.decode())
            if not isinstance(row, dict):
                raise ValueError(f"it holds {line[:40]!r}, not an event")
            for name, value in row.items():
                if name not in KNOWN or (name == "kind" and value not in KINDS):
                    raise ValueError(f"{value if name == 'kind' else name!r} is not known")
                of_type = dict if name in TABLE_COLUMNS else str if name in TEXT_COLUMNS else (int, float)
                if value is not None and (not isinstance(value, of_type) or isinstance(value, bool)):
                    raise ValueError(f"its {name} is {value!r}")
        except (ValueError, TypeError, RecursionError) as error:
            raise self._damaged(number, str(error)) from error
        return row

    def _damaged(self, number: int, why: str) -> RunError:
        return RunError(f"{self.file}, line {number + 1} is damaged: {why}. {RESTORE}")


class Table:
    """All events of a run as a table (`read_events`), of which only what was added since is read; safe from several threads."""

    def __init__(self, path: Path) -> None:
        self.path, self._reading = Path(path), threading.Lock()
        self._begin()

    def read(self) -> pd.DataFrame:
        """The table; it is the same object as before where nothing was added."""
        with self._reading:
            return self._refresh()

    def _refresh(self) -> pd.DataFrame:
        try:
            about = (self.path / FILE).stat()
            stamp = about.st_size, about.st_mtime_ns, about.st_ino
        except OSError:
            stamp = 0, 0, 0
        if stamp != self._stamp:
            if stamp[0] <= self._stamp[0] or stamp[2] != self._stamp[2]:  # another file, or written anew
                self._begin()
            if stamp[0] and (rows := self._tail.read()):
                added = _columns(rows)
                _check(self._tail.file, added, self._tail.lines - len(rows))
                self._read = {name: np.concatenate([before, added[name]]) for name, before in self._read.items()}
                self._frame = None
            self._stamp = stamp
        if self._frame is None:
            self._frame = _frame(self._read)
        return self._frame

    def _begin(self) -> None:
        self._tail, self._stamp, self._read = Tail(self.path), (0, 0, 0), _columns([])
        self._frame: pd.DataFrame | None = None


def read_events(path: Path) -> pd.DataFrame:
    """The events of a run, one row each, `COLUMNS` as columns (`read_rows`)."""
    return Table(path).read()


def as_table(rows: list[dict]) -> pd.DataFrame:
    """Rows as `Tail` reads them, as a table like that of `read_events`."""
    return _frame(_columns(rows))


def _check(file: Path, columns: dict[str, np.ndarray], first: int) -> None:
    """`RunError`, by its line, for an event that no run writes; `first` is the number of the first of them.

    A checksum finds what was damaged, and does not prove who wrote it.
    """
    kinds, wrong = columns["kind"], {}
    for name in (*WHOLE, *FINITE):
        values, whole = columns[name], name in WHOLE
        if values.dtype.kind == "f":
            fits = np.isfinite(values) & (not whole or (values >= 0) & (values < LARGEST) & (values == np.trunc(values)))
            wrong[name] = ~fits & ~np.isnan(values)
        elif whole:
            wrong[name] = (values < 0) | (values >= LARGEST)
    for name in NO_NUMBERS:
        types = dict if name in TABLE_COLUMNS else str
        wrong[name] = _where(columns[name], lambda value, types=types: value is not None and type(value) is not types)
    wrong["kind"] |= _where(kinds, lambda value: value is None)
    wrong["metrics"] |= _where(
        columns["metrics"], lambda value: type(value) is dict and not {*map(type, value.values())} <= {int, float}
    )
    for kind, names in NEEDED.items():
        of_kind = kinds == kind
        for name in names:
            wrong[name] = wrong.get(name, False) | (of_kind & np.isnan(columns[name]))
    for name, where in wrong.items():
        if np.any(where):
            at = int(np.argmax(where))
            said = f"the {name} of {str(kinds[at])[:20]!r} is {str(columns[name][at])[:40]!r}"
            raise RunError(f"{file}, line {first + at + 1} holds what no run writes: {said}. {RESTORE}")


def _where(values: np.ndarray, holds: Callable[[Any], bool]) -> np.ndarray:
    return np.fromiter(map(holds, values), bool, len(values))


def _columns(rows: list[dict]) -> dict[str, np.ndarray]:
    """Numbers as float64, or int64 where all are whole and there; the rest as objects."""
    columns = {}
    for name in COLUMNS:
        values = [row.get(name) for row in rows]
        if name in NO_NUMBERS:
            columns[name] = np.array([_encodable(value) for value in values], object)
        else:
            whole = all(type(value) is int for value in values)
            try:
                columns[name] = np.array(values, np.int64 if whole else np.float64)  # None is NaN
            except (ValueError, TypeError, OverflowError):  # what is no number, or too large for one, is missing
                columns[name] = np.array([value if _a_number(value) else np.nan for value in values], np.float64)
    return columns


def _encodable(value: Any) -> Any:
    """A text without halves of surrogate pairs, which JSON may hold and a table cannot."""
    return value.encode(errors="replace").decode() if isinstance(value, str) and not value.isascii() else value


def _a_number(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < LARGEST)


def _frame(columns: dict[str, np.ndarray]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame({name: values.tolist() if name in NO_NUMBERS else values for name, values in columns.items()})


def effective(events: pd.DataFrame) -> pd.DataFrame:
    """The events without what a "resume" has undone, so that no sample counts twice.

    A run that is resumed from version v makes the versions after v again: pushes, merges and drops between those of v and the
    resume, and checkpoints of later versions, do not count. All other rows stay, as the time was spent.
    """
    kind, version = events.kind.to_numpy(), events.version.to_numpy(float)
    counts, row = np.ones(len(events), bool), np.arange(len(events))
    for resume in np.flatnonzero(kind == "resume"):
        earlier = counts & (row < resume)
        made = np.flatnonzero(earlier & np.isin(kind, VERSIONS) & (version <= version[resume]))
        after = earlier & (row > (made[-1] if len(made) else -1))
        counts &= ~(after & np.isin(kind, ("push", "score", "merge", "drop", "settle")))
        counts &= ~(earlier & (kind == "checkpoint") & (version > version[resume]))
    return events if counts.all() else events[counts]
