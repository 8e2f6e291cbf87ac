"""A run followed from another kernel than the one that started it: over a watcher's connection to its server.

The server announces itself in the run directory (`labkit.runs.server_file`). Each question is a connection of its own, so nothing
stays open and nothing runs in the background; how the run ended is read from its directory.

Used by `Run.attach`; it answers what `Run` asks of a `labkit.training.supervisor.Session`.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import TYPE_CHECKING

from labkit.errors import RunError, WireError
from labkit.runs import server_file as presence
from labkit.training.wire import transport as wire

if TYPE_CHECKING:
    from labkit.training.run import Run

POLL_S = 0.2  # between two questions to the server
ANSWER_S = 10.0  # it has so long to answer


class Attached:
    """The server of a run that somebody else started.

    Raises `RunError` when the run does not go, or its server cannot be reached from here.
    """

    lab = None  # the workers are somebody else's: the curve is measured here

    def __init__(self, run: Run) -> None:
        self.run, self._lock = run, threading.Lock()
        standing = run.recorded()
        place = presence.find(run.path)
        if place is None or standing["state"] != "running":
            why = f": {standing['reason']}" if standing.get("reason") else ""
            raise RunError(f"run {run.name} does not go any more, it is {standing['state']}{why}.")
        here = socket.gethostname()
        if place["machine"] != here and presence.loopback(place["host"]):
            raise RunError(
                f"run {run.name} goes on {place['machine']} and listens there alone, and this is {here}. Attach from there, or "
                f"delete {run.path / presence.FILE} if it goes no more."
            )
        self._place = place
        try:
            self._status, self._asked = self._ask(), time.monotonic()
        except WireError as error:
            where = f"process {place['pid']} on {place['machine']}"
            raise RunError(f"the server of run {run.name} ({where}) does not let us in: {error}") from error

    @property
    def state(self) -> str:
        return self.status()["state"]

    def status(self) -> dict:
        """What the server says, at most so old as `POLL_S`; "running" until the record says how the run ended."""
        with self._lock:
            if self._status["state"] == "running" and time.monotonic() - self._asked > POLL_S:
                with contextlib.suppress(WireError):  # busy, or just ended: then the record tells
                    self._status = self._ask()
                recorded = self.run.recorded()
                self._status = {**self._status, **recorded} if recorded["state"] != "running" else self._status
                self._asked = time.monotonic()
            return dict(self._status)

    def wait(self, timeout: float) -> bool:
        limit = time.monotonic() + timeout
        while self.state == "running":
            if time.monotonic() > limit:
                return False
            time.sleep(0.05)
        return True

    def stop(self, timeout: float) -> None:
        if self.state == "running":
            with contextlib.suppress(WireError):  # it may end by itself this moment
                self._ask(op="stop", reason="")
            self.wait(timeout)

    def raise_error(self) -> None:
        status = self.status()
        if status["state"] == "failed":
            raise RunError(f"run {self.run.name} failed: {status.get('reason')}")

    def _ask(self, **request: str) -> dict:
        address = (self._place["host"], self._place["port"])
        with wire.connect(address, self._place["secret"], timeout=ANSWER_S) as connection:
            connection.send({"op": "watch"})
            connection.send({"op": "status", **request})
            return {**connection.receive()[0], "state": "running", "reason": ""}
