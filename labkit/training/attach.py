"""The client of a run's server: `watch` asks it for its status, or to stop, from any kernel of its owner; `slow_down` and `kill` do to a worker.

A server announces itself in the run directory (`labkit.runs.server_file`). `Attached` follows a run that another kernel has
started: each request has a connection of its own, so nothing stays open and nothing runs in the background; how the run ended is
read from its directory.

`watch` is used by `labkit.training.supervisor` and `labkit.chaos`, the functions by runs and their pages; `Attached`, a `labkit.training.run.Follower`, by `Run.attach`.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import psutil

from labkit.errors import ClusterError, RunError, WireError
from labkit.runs import server_file
from labkit.training.wire import transport
from labkit.training.wire.protocol import check_reply

if TYPE_CHECKING:
    from labkit.runs.record import RunRecord

POLL_S = 0.2  # between two requests for the status
ANSWER_S = 10.0  # the server has so long to answer


@contextlib.contextmanager
def watch(address: transport.Address, secret: bytes, timeout: float = ANSWER_S) -> Iterator[Callable[..., dict[str, Any]]]:
    """A connection to the server of a run: `ask(op, **fields)` sends a request and returns its status.

    Raises `WireError` when the server is gone, or is silent for `timeout` seconds.
    """
    with transport.connect(address, secret, timeout=timeout, check=check_reply) as connection:
        connection.send({"op": "watch"})

        def ask(op: str = "status", **fields: Any) -> dict[str, Any]:
            connection.send({"op": op, **fields})
            return connection.receive()[0]

        yield ask


def request(run: RunRecord, op: str, timeout: float = ANSWER_S, **fields: Any) -> dict[str, Any]:
    """Ask the server of a run for something, and return its status; `timeout` is how long it may be silent.

    Raises `RunError` where the run has ended, `WireError` where its server does not answer.
    """
    server = server_file.find(run.path)
    if server is None:
        raise RunError(f"run {run.name} is not running: it has no server.")
    with watch(server_file.address(server), server["secret"], timeout) as ask:
        return ask(op, **fields)


def slow_down(run: RunRecord, worker: int, factor: float, timeout: float = ANSWER_S) -> None:
    """From now on all work of a worker lasts `factor` times as long as on its machine alone; `ClusterError` where it is not in the run."""
    _here(run, worker, request(run, "slow", timeout, worker=worker, factor=factor))


def kill(run: RunRecord, worker: int, timeout: float = ANSWER_S) -> int:
    """End the process of a worker of a running run (SIGKILL), if it is here and its own; returns the number that it had.

    It must hold a connection to the server of the run: what a worker says of itself is no reason to end some other process.
    Raises `ClusterError` where there is no such process.
    """
    about = _here(run, worker, request(run, "status", timeout))
    if run.config.one_process:
        raise ClusterError(
            f"the workers of run {run.name} are threads of their kernel, which would end with one of them. Use connect(kind='dask')."
        )
    if about.get("host") != (here := socket.gethostname()):
        raise ClusterError(f"worker {worker} is on {about.get('host')}, not here ({here}): its process cannot be ended from here.")
    pid, server = about.get("pid"), server_file.find(run.path)
    try:
        process = psutil.Process(pid)
        links = process.net_connections("tcp")
        if pid is None or server is None or not any(link.raddr and link.raddr.port == server["port"] for link in links):
            raise ClusterError(f"process {pid} has no connection to the server of run {run.name}.")
        process.kill()
    except psutil.Error as error:
        raise ClusterError(f"process {pid} of worker {worker} cannot be ended: {error}.") from error
    return pid


def _here(run: RunRecord, worker: int, status: dict[str, Any]) -> dict[str, Any]:
    """What this status says of a worker; `ClusterError` where it is not in the run."""
    workers = status.get("workers") or {}
    if str(worker) not in workers:
        there = "none is now: run.status().get('started') says whether it has begun"
        if workers:
            there = f"workers {sorted(map(int, workers))} are"
        raise ClusterError(f"worker {worker} is not in run {run.name}; {there}.")
    return workers[str(worker)]


class Attached:
    """The server of a run that another kernel has started.

    Raises `RunError` when the run has ended, or its server cannot be reached from here.
    """

    lab = None  # the workers are those of another kernel: the curve is measured here

    def __init__(self, run: RunRecord) -> None:
        self.run, self._lock = run, threading.Lock()
        recorded = run.recorded()
        server = server_file.find(run.path)
        if server is None or recorded["state"] != "running":
            why = f": {recorded['reason']}" if recorded.get("reason") else ""
            raise RunError(f"run {run.name} is not running any more, it is {recorded['state']}{why}.")
        here = socket.gethostname()
        if server["machine"] != here and server_file.loopback(server["host"]):
            raise RunError(
                f"run {run.name} runs on {server['machine']} and listens there alone, and this is {here}. Attach from there, or "
                f"delete {run.path / server_file.FILE} if it has ended."
            )
        self._server = server
        try:
            self._status, self._asked = self._ask(), time.monotonic()
        except WireError as error:
            where = f"process {server['pid']} on {server['machine']}"
            raise RunError(f"the server of run {run.name} ({where}) does not let us in: {error}") from error

    @property
    def state(self) -> str:
        return self.status()["state"]

    def status(self) -> dict:
        """What the server says, at most so old as `POLL_S`; "running" until the record says how the run ended."""
        with self._lock:
            if self._status["state"] == "running" and time.monotonic() - self._asked > POLL_S:
                with contextlib.suppress(WireError):  # busy, or just ended: then the record says so
                    self._status = self._ask()
                recorded = self.run.recorded()
                self._status = {**self._status, **recorded} if recorded["state"] != "running" else self._status
                self._asked = time.monotonic()
            return dict(self._status)

    def wait(self, timeout: float) -> bool:
        limit = time.monotonic() + timeout
        if not self._ended(limit):
            return False
        while self.run.being_measured and time.monotonic() < limit:
            time.sleep(0.05)
        return True

    def _ended(self, limit: float) -> bool:
        while self.state == "running":
            if time.monotonic() > limit:
                return False
            time.sleep(0.05)
        return True

    def stop(self, timeout: float) -> None:
        if self.state == "running":
            with contextlib.suppress(WireError):  # it may end by itself this moment
                self._ask("stop", reason="")
            self._ended(time.monotonic() + timeout)

    def raise_error(self) -> None:
        status = self.status()
        if status["state"] == "failed":
            raise RunError(f"run {self.run.name} failed: {status.get('reason')}")

    def _ask(self, op: str = "status", **fields: str) -> dict:
        with watch(server_file.address(self._server), self._server["secret"]) as ask:
            return {**ask(op, **fields), "state": "running", "reason": ""}
