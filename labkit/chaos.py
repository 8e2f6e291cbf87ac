"""Faults on purpose: what a lab must survive, as functions.

    kill, freeze, thaw      a worker process of this machine (SIGKILL, SIGSTOP, SIGCONT)
    drop_link               the connection between a worker and the server of a run
    kill_server             the server of a run
    corrupt_checkpoint      one bit of a kept version
    fill_disk, free_disk    the server can write no more, as on a full disk (Linux)
    Storm                   kills, freezes, thaws and newcomers at random moments of a run, by seed

Used by the chaos notebook and the tests; also good for asking whether one's own set-up would survive the night.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from labkit import presence, wire
from labkit.errors import ClusterError, LabError, RunError

if TYPE_CHECKING:
    import pandas as pd

    from labkit.lab import Lab
    from labkit.run import Run

FAULTS = ("kill", "freeze", "join", "drop")


def kill(lab: Lab, worker: int) -> None:
    """End a worker process at once (SIGKILL). Dask's nanny starts it again; it then comes back under its index."""
    _signal(lab, worker, signal.SIGKILL)


def freeze(lab: Lab, worker: int) -> None:
    """Stop a worker process (SIGSTOP) until `thaw`: it is there and does nothing, as when its machine swaps or sleeps."""
    _signal(lab, worker, signal.SIGSTOP)


def thaw(lab: Lab, worker: int) -> None:
    """Let a frozen worker go on (SIGCONT)."""
    _signal(lab, worker, signal.SIGCONT)


def drop_link(run: Run, worker: int) -> None:
    """Cut the connection between a worker and the server of a run that goes; both stay alive."""
    place = _server(run)
    with wire.connect((place["host"], place["port"]), place["secret"], timeout=10) as connection:
        connection.send({"op": "watch"})
        connection.send({"op": "drop", "workers": [worker]})
        connection.receive()


def kill_server(run: Run) -> None:
    """End the server process of a run at once (SIGKILL); `labkit.resume` goes on from the newest checkpoint."""
    os.kill(_server(run)["pid"], signal.SIGKILL)


def corrupt_checkpoint(run: Run, version: int | None = None, seed: int = 0) -> Path:
    """Flip one bit of a kept version (the newest by default); returns the file."""
    files = sorted((run.path / "checkpoints").glob("[0-9]*"))
    if version is not None:
        files = [file for file in files if int(file.stem) == version]
    if not files:
        raise RunError(f"run {run.name} has kept no such version in {run.path / 'checkpoints'}.")
    data = bytearray(files[-1].read_bytes())
    chance = np.random.default_rng(seed)
    data[chance.integers(len(data))] ^= 1 << int(chance.integers(8))
    files[-1].write_bytes(data)
    return files[-1]


def fill_disk(run: Run) -> None:
    """From now on the server of a run can write no more: its files may not grow (RLIMIT_FSIZE; Linux)."""
    _limit_files(run, (run.path / "events.jsonl").stat().st_size)


def free_disk(run: Run) -> None:
    """Undo `fill_disk`."""
    _limit_files(run, -1)


class Storm:
    """Faults at random moments of a run, in a thread, until `stop` or the end of the run; all frozen workers are thawed then.

    Parameters
    ----------
    faults
        Kinds to draw from: "kill", "freeze" (thawed after a while), "join" (a new worker), "drop" (a link).
    every
        Mean number of seconds between two faults.
    most
        At most so many faults; and at most so many workers that join.
    seed
        Which faults, which workers and which moments.

    Attributes
    ----------
    table
        What was done: seconds since the start of the storm, fault, worker.
    """

    def __init__(
        self, run: Run, lab: Lab, *, faults=FAULTS, every: float = 2.0, most: int = 10, most_joins: int = 2, seed: int = 0
    ) -> None:
        unknown = set(faults) - set(FAULTS)
        if unknown:
            raise ValueError(f"unknown faults {sorted(unknown)}. Known: {', '.join(FAULTS)}.")
        self.run, self.lab, self.faults, self.every, self.most = run, lab, list(faults), every, most
        self.joins_left, self.chance = most_joins, np.random.default_rng(seed)
        self.rows: list[dict] = []
        self.frozen: dict[int, float] = {}  # worker -> when it is thawed
        self._over = threading.Event()
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._rage, name="labkit-storm", daemon=True)
        self._thread.start()

    @property
    def table(self) -> pd.DataFrame:
        import pandas as pd

        return pd.DataFrame(self.rows, columns=["seconds", "fault", "worker"])

    def stop(self) -> Storm:
        """No more faults; twice is fine."""
        self._over.set()
        self._thread.join(60)
        return self

    def _rage(self) -> None:
        ahead = self.chance.exponential(self.every)
        next_at = time.monotonic() + ahead
        while not self._over.wait(0.05) and self.run.state == "running":
            now = time.monotonic()
            for worker in [w for w, end in self.frozen.items() if end < now]:
                self._thaw(worker)
            if now >= next_at and len(self.rows) < self.most:
                next_at = now + self.chance.exponential(self.every)
                with contextlib.suppress(LabError, OSError):  # the worker may be gone already, the run over
                    self._strike()
        for worker in list(self.frozen):
            self._thaw(worker)

    def _strike(self) -> None:
        fault = str(self.chance.choice(self.faults))
        lost = self.lab.lost()
        there = [w.index for w in self.lab.workers if w.index not in lost and w.index not in self.frozen]
        worker = int(self.chance.choice(there)) if there else None
        if fault == "join":
            if not self.joins_left:
                return
            self.joins_left -= 1
            [worker] = self.lab.add(1)
        elif worker is None:
            return
        elif fault == "kill":
            kill(self.lab, worker)
        elif fault == "freeze":
            freeze(self.lab, worker)
            self.frozen[worker] = time.monotonic() + self.chance.uniform(0.5, 8.0)
        elif fault == "drop":
            drop_link(self.run, worker)
        self.rows.append({"seconds": round(time.monotonic() - self._began, 3), "fault": fault, "worker": worker})

    def _thaw(self, worker: int) -> None:
        del self.frozen[worker]
        with contextlib.suppress(LabError, OSError):
            thaw(self.lab, worker)
        self.rows.append({"seconds": round(time.monotonic() - self._began, 3), "fault": "thaw", "worker": worker})


def _signal(lab: Lab, worker: int, number: int) -> None:
    if not 0 <= worker < len(lab.workers):
        raise ClusterError(f"there is no worker {worker}; this lab has workers 0 to {len(lab.workers) - 1}.")
    about = lab.workers[worker]
    if about.host != socket.gethostname():
        raise ClusterError(f"worker {worker} is on {about.host}, not here: it cannot be sent a signal.")
    if about.pid == os.getpid():
        raise ClusterError(f"worker {worker} is a thread of this process. Use connect(kind='dask') to do this to a process.")
    if worker in lab.lost():
        raise ClusterError(f"worker {worker} was lost already.")
    os.kill(about.pid, number)


def _server(run: Run) -> dict:
    """Where the server of a run is, on this machine."""
    place = presence.find(run.path)
    if place is None or presence.alive(run.path) is False:
        raise RunError(f"run {run.name} does not go: it has no server.")
    if place["machine"] != socket.gethostname():
        raise ClusterError(f"the server of run {run.name} is on {place['machine']}, not here.")
    return place


def _limit_files(run: Run, size: int) -> None:
    if sys.platform != "linux":
        raise LabError("a full disk is made with prlimit(), which only Linux has.")
    import resource

    resource.prlimit(_server(run)["pid"], resource.RLIMIT_FSIZE, (size, -1))
