"""Runs that still go on, or were cut off: a line for each that says where it is and how far, with the call that follows or continues it.

A kernel that was restarted, and a script that is started again, know nothing of the runs of the one before. `labkit.connect` prints these
lines for the folder "runs" below the working folder, once a process for each run: in a notebook below the cell, in a terminal one on standard
error. `labkit.load_run` does for the run that it reads. A script whose output goes to a file is told nothing. To look takes one look-up
for each of at most `FOLDERS` folders; of those that hold a run which has ended, the latest ones of the last day are read.

Used by `labkit.cluster.connect` (by its import path), `labkit.training.run` and `labkit.training.resume`.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from labkit.cluster.notice import front_end, terminal
from labkit.errors import RunError
from labkit.runs import checkpoints, server_file, status
from labkit.runs.config import FILE as CONFIG
from labkit.runs.config import RunConfig
from labkit.runs.events import FILE as EVENTS

FOLDERS = 1000  # that are looked at
READ = 20  # runs of either kind that are read
LINES, LINES_TERMINAL = 3, 1  # that are printed in a notebook, and by a script
RECENT_S = 24 * 3600.0  # what ended before is history
END = 1 << 16  # bytes at the end of the events, in which the latest merge is looked for

_told: set[tuple[Path, str, bool]] = set()  # what this kernel was told of


class Unfinished(NamedTuple):
    path: Path
    id: str
    going: bool  # or it was cut off
    text: str


def tell(folder: str | Path = "runs") -> None:
    """Print, once a process for each run, what `unfinished` finds, where somebody reads it; never an error."""
    with contextlib.suppress(OSError, RunError, ValueError):
        if front_end() or terminal():
            found = [run for run in unfinished(folder) if _is_new(run)]
            most = LINES if front_end() else LINES_TERMINAL
            for run in found[:most]:
                _print(run.text)
            if (more := len(found) - most) > 0:
                _print(f"And {more} more such run{'s' * (more > 1)} in {folder}.")


def tell_of(path: Path, config: RunConfig) -> None:
    """Print, once a process, that this run goes on or was cut off, where somebody reads it; never an error."""
    with contextlib.suppress(OSError, RunError, ValueError):
        if (front_end() or terminal()) and (run := look(path, config)) and _is_new(run):
            _print(run.text)


def _print(line: str) -> None:
    """Below the cell of a notebook; a script's standard output is its own."""
    print(line, file=None if front_end() else sys.stderr)


def _is_new(run: Unfinished) -> bool:
    key = run.path.absolute(), run.id, run.going
    new = key not in _told
    _told.add(key)
    return new


def unfinished(folder: str | Path = "runs") -> list[Unfinished]:
    """The runs in a folder that another kernel has started: those that go on, then those that were cut off in the last day, the latest first."""
    folder, going, ended = Path(folder), [], []
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        for entry in islice(entries, FOLDERS):
            try:
                at = os.stat(f"{entry.path}/{status.FILE}").st_mtime
            except OSError:
                going.append(entry.path)
            else:
                if time.time() - at < RECENT_S:
                    ended.append((at, entry.path))
    going = (path for path in going if os.path.exists(f"{path}/{CONFIG}"))
    found = []
    for path in map(Path, [*islice(going, READ), *(path for _, path in sorted(ended, reverse=True)[:READ])]):
        with contextlib.suppress(RunError, OSError, ValueError):
            run = None if _is_ours(path) else look(path, RunConfig.load(path))
            found += [run] if run else []
    return sorted(found, key=lambda run: not run.going)


def look(path: Path, config: RunConfig) -> Unfinished | None:
    """Whether the run in this directory goes on or was cut off, how far it is, and what to call; None where it has ended otherwise."""
    alive, ended = server_file.alive(path), status.read(path, config.id)
    if ended is not None and not (ended["state"] == "failed" and "labkit.resume(" in ended.get("reason", "")):
        return None
    done, where = merged(path) if ended is None else ended.get("samples"), repr(str(path))
    far = f"after {'some' if done is None else f'{done:,}'} of {config.budget:,} samples"
    if ended is not None or alive is False:
        saved = checkpoints.versions(path)
        call = (
            f"{config.resume_call(path)} continues it from version {saved[-1]}" if saved else "No version was saved: train it again"
        )
        return Unfinished(path, config.id, False, f"Run {path.name!r} was cut off {far}. {call}.")
    call = f"labkit.load_run({where}).attach() follows it"
    if alive is None:
        return Unfinished(path, config.id, True, f"Run {path.name!r} may still go on, {far}, on another machine. There {call}.")
    server = server_file.find(path)
    here = f" in process {server['pid']} on {server['machine']}" if server else ""
    return Unfinished(path, config.id, True, f"Run {path.name!r} still goes on{here}, {far}. {call}.")


def _is_ours(path: Path) -> bool:
    """Is its server a child of this process, which then follows it?"""
    import psutil

    with contextlib.suppress(psutil.Error, RunError):
        server = server_file.find(path)
        return server is not None and psutil.Process(server["pid"]).ppid() == os.getpid()
    return False


def merged(path: Path) -> int | None:
    """The samples that were merged so far, by the end of the events; None where that does not say it."""
    try:
        with open(path / EVENTS, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - END))
            rows = file.read(END).splitlines()
    except OSError:
        return None
    for row in reversed(rows):
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            if b'"merge"' in row and (event := json.loads(row))["kind"] == "merge":
                return int(event["total"])
    return None
