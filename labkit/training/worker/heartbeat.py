"""The heartbeat of a worker: a thread that sends a sign of life twice a second, however long a step takes.

During a local pass it also receives, as soon as it comes, what cannot wait for the end of it: stop, regroup, rejoin; or notices that
the connection is gone.

Used by `labkit.training.worker.worker`, and by `labkit.training.worker.allreduce`, whose exchanges it can break off.
"""

import contextlib
import threading
import time
from collections.abc import Iterator

from labkit.errors import WireError
from labkit.training.wire.protocol import HEARTBEAT_S, SERVER_TIMEOUT_S
from labkit.training.wire.transport import Connection

LOOK_S = 0.05  # how soon the thread notices that a local pass has begun or ended


class Heartbeat:
    """Sends signs of life from `start` to `stop`; between two local passes the worker alone receives.

    `interrupt` is the message that ends the local pass early, or None: one of the server, or "lost" when the connection is gone.
    `on_interrupt` is called when there is one: it breaks off an exchange that waits for the other ranks. `error` is what went wrong
    in the thread itself, which closes the connection then.
    """

    def __init__(self) -> None:
        self.lock, self.thread, self.ended = threading.Lock(), None, threading.Event()
        self.interrupt: dict | None = None
        self.error: Exception | None = None
        self.on_interrupt = lambda: None
        self.progress: dict = {}
        self.receiving, self.group = False, 0

    def start(self, connection: Connection) -> None:
        if self.thread is None or self.connection is not connection:
            self.stop()
            self.connection, self.ended, self.interrupt = connection, threading.Event(), None
            self.thread = threading.Thread(target=self._run, args=(connection, self.ended), name="labkit-heartbeat", daemon=True)
            self.thread.start()

    def stop(self) -> None:
        self.ended.set()
        if self.thread:
            self.thread.join(SERVER_TIMEOUT_S)
            self.thread = None

    @contextlib.contextmanager
    def local_pass(self, group: float = 0) -> Iterator[None]:
        """A local pass, in this group of an all-reduce: until its end nobody else receives from the connection."""
        with self.lock:
            self.receiving, self.progress, self.group = True, {}, group
        try:
            yield
        finally:
            with self.lock:
                self.receiving, self.progress = False, {}

    def pop_interrupt(self) -> dict | None:
        message, self.interrupt = self.interrupt, None
        return message

    def _run(self, connection: Connection, ended: threading.Event) -> None:
        try:
            self._beat(connection, ended)
        except Exception as error:
            self.error, self.interrupt = error, {"op": "lost", "reason": str(error)}
            connection.close()
            with contextlib.suppress(Exception):  # it may be what went wrong
                self.on_interrupt()

    def _beat(self, connection: Connection, ended: threading.Event) -> None:
        due = time.monotonic() + HEARTBEAT_S
        while not self._wait(connection, ended, due):
            try:
                if time.monotonic() >= due:
                    connection.send({"op": "heartbeat", **self.progress})
                    due = time.monotonic() + HEARTBEAT_S
                with self.lock:
                    if self.receiving and self.interrupt is None and connection.waiting():
                        message, _ = connection.receive()
                        if message["op"] != "regroup" or message["group"] >= self.group:  # of the group before: that is over
                            self.interrupt = message
            except WireError as error:
                self.interrupt = {"op": "lost", "reason": str(error)}
            if self.interrupt is not None:
                self.on_interrupt()
                if self.interrupt is not None and self.interrupt["op"] == "lost":
                    return

    def _wait(self, connection: Connection, ended: threading.Event, due: float) -> bool:
        """Until the next heartbeat is due, or there is something to receive in a local pass; has it ended?"""
        while (left := due - time.monotonic()) > 0 and not ended.is_set():
            if self.receiving and self.interrupt is None:
                with contextlib.suppress(WireError):  # closed here: the next heartbeat says so
                    if connection.waiting(min(left, LOOK_S)) and self.receiving:
                        break
                    continue
            ended.wait(min(left, LOOK_S))
        return ended.is_set()
