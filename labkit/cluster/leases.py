"""Leases: which run holds a worker. The worker itself knows it, so that a lease outlives the kernel that took it, and ends with the run.

    take       on a worker: lease it to a run, unless another one holds it
    give_back  on a worker: the run has ended
    at_work    on a worker: around each task; as long as one is at work, the worker is held, whoever's kernel has died

The next kernel learns from the workers which run holds them, and judges whether that has ended (`Held.ended`): its directory is not
held any more (`labkit.locks`), or, where that cannot be seen, nothing of it has been at work for a while.

Used by `labkit.cluster.dask_backend` and `labkit.cluster.ipyparallel_backend`; nobody else sees the workers of one process.
"""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from labkit.locks import held

IDLE_S = 30.0  # a lease that nobody can see the directory of ends when its worker was idle for so long
LEAVE_S = 10.0  # how long the workers of a run that has ended may take to leave


@dataclass(frozen=True)
class Lease:
    """The worker is held by the run `holder` (its id), which is recorded in `path`; `machine` and `pid` are those of its kernel."""

    holder: str
    name: str
    path: str = ""
    machine: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)

    def __repr__(self) -> str:
        where = f"run {self.holder} in {self.path}; " if self.path else ""
        return f"{self.name!r} ({where}another notebook, process {self.pid} on {self.machine})"


@dataclass(frozen=True)
class Held:
    """What a worker answers that another run holds."""

    lease: Lease
    working: bool  # is a task at work there?
    idle_s: float  # since one was, or since the lease was taken

    @property
    def ended(self) -> bool:
        """Has the run ended that holds this worker, as far as can be seen from here?"""
        lease = self.lease
        lives = held(Path(lease.path), lease.holder) if lease.path else None
        if lives is False and lease.machine == socket.gethostname():
            return True
        return not lives and not self.working and self.idle_s > IDLE_S


# -- in the kernel -----------------------------------------------------------------------------------------------------


def lease_all(ids: Sequence[Any], lease: Lease, ask: Callable[..., Mapping[Any, Any]]) -> dict[Any, Lease]:
    """Lease workers, all or none; {id: lease} of those that others hold. `ask(ids, fn, *args)` calls `fn(*args)` on each worker.

    A worker that does not answer, a frozen one, is leased all the same.
    """
    limit, ended = time.monotonic() + LEAVE_S, frozenset()
    while True:
        answers = {id: answer for id, answer in ask(ids, take, lease, ended).items() if answer is not None}
        over = {id: answer for id, answer in answers.items() if answer.ended}
        if not answers:
            return {}
        ask([id for id in ids if id not in answers], give_back, lease.holder)
        if len(over) < len(answers) or time.monotonic() > limit:
            return {id: answer.lease for id, answer in answers.items()}
        ended |= {answer.lease.holder for answer in over.values()}
        if any(answer.working for answer in over.values()):  # it is about to leave
            time.sleep(0.1)


# -- on a worker -------------------------------------------------------------------------------------------------------

_leases: dict[str, Lease] = {}  # by worker: those of one process share this
_lock = threading.Lock()
_working, _since = 0, time.monotonic()


def take(lease: Lease, ended: frozenset[str] = frozenset(), dask_worker: Any = None) -> Held | None:
    """Lease this worker; what holds it, if another run does that is not among the `ended`, or still has a task at work here."""
    global _since
    key = getattr(dask_worker, "address", "")
    with _lock:
        there = _leases.get(key, lease)
        if there.holder != lease.holder and (_working or there.holder not in ended):
            return Held(there, _working > 0, time.monotonic() - _since)
        _leases[key], _since = lease, time.monotonic()
    return None


def give_back(holder: str, dask_worker: Any = None) -> None:
    key = getattr(dask_worker, "address", "")
    with _lock:
        if key in _leases and _leases[key].holder == holder:
            del _leases[key]


@contextlib.contextmanager
def at_work() -> Iterator[None]:
    """A task is at work in this process."""
    global _working, _since
    with _lock:
        _working += 1
    try:
        yield
    finally:
        with _lock:
            _working, _since = _working - 1, time.monotonic()
