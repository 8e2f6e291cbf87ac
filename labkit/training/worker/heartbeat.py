"""The heartbeat of a worker: a thread that sends a sign of life twice a second, however long a step takes.

During a local pass it also receives what cannot wait for the end of it: stop, regroup, rejoin; or notices that the connection is
gone.

Used by `labkit.training.worker.worker`, and by `labkit.training.worker.allreduce`, whose exchanges it can break off.
"""

import contextlib
import threading
from collections.abc import Iterator

from labkit.errors import WireError
from labkit.training.wire.protocol import HEARTBEAT_S, SERVER_TIMEOUT_S
from labkit.training.wire.transport import Connection


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
        while not ended.wait(HEARTBEAT_S):
            try:
                connection.send({"op": "heartbeat", **self.progress})
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
