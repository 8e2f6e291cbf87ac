"""The pulse of a worker: a thread that says twice a second that it lives, however long a step takes.

During a local pass it also hears what cannot wait for its end: stop, regroup, rejoin; or that the connection is gone.

Used by `labkit.training.worker.worker`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from labkit.errors import WireError
from labkit.training.server.connection import BEAT_S, SILENCE_S
from labkit.training.wire import transport as wire


class Pulse:
    """Says twice a second that this worker lives; during a local pass it also hears what cannot wait: stop, regroup, rejoin."""

    def __init__(self) -> None:
        self.lock, self.thread, self.ended = threading.Lock(), None, threading.Event()
        self.told: dict | None = None  # what the server said; "lost" when it can no longer be heard
        self.alarm = lambda: None  # called when something was heard: breaks off an exchange that waits for the others
        self.progress: dict = {}
        self.open, self.group = False, 0

    def start(self, connection: wire.Connection) -> None:
        if self.thread is None or self.connection is not connection:
            self.stop()
            self.connection, self.ended, self.told = connection, threading.Event(), None
            self.thread = threading.Thread(target=self._beat, args=(connection, self.ended), name="labkit-pulse", daemon=True)
            self.thread.start()

    def stop(self) -> None:
        self.ended.set()
        if self.thread:
            self.thread.join(SILENCE_S)
            self.thread = None

    @contextlib.contextmanager
    def listening(self, group: int = 0) -> Iterator[None]:
        """A local pass, in this group of an all-reduce: until its end nobody else receives from the connection."""
        with self.lock:
            self.open, self.progress, self.group = True, {}, group
        try:
            yield
        finally:
            with self.lock:
                self.open, self.progress = False, {}

    def heard(self) -> dict | None:
        told, self.told = self.told, None
        return told

    def _beat(self, connection: wire.Connection, ended: threading.Event) -> None:
        while not ended.wait(BEAT_S):
            try:
                connection.send({"op": "beat", **self.progress})
                with self.lock:
                    if self.open and self.told is None and connection.waiting():
                        word, _ = connection.receive()
                        if word["op"] != "regroup" or word["group"] >= self.group:  # of the group before: that is over
                            self.told = word
            except WireError as error:
                self.told = {"op": "lost", "reason": str(error)}
            if self.told is not None:
                self.alarm()
                if self.told is not None and self.told["op"] == "lost":
                    return
