"""The heartbeat of a worker: a thread that sends a sign of life twice a second, however long a step takes.

During a local pass it also receives, as soon as it comes, what cannot wait for the end of it: stop, regroup, rejoin; or notices that
the connection is gone. While a worker computes something else, `keeping` has it receive what it is to answer at once, and keep the rest for later.

Used by `labkit.training.worker.worker`, and by `labkit.training.worker.allreduce`, whose exchanges it can break off.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from labkit.errors import WireError
from labkit.training.wire.protocol import ASIDE, HEARTBEAT_S, SERVER_TIMEOUT_S
from labkit.training.wire.transport import Connection

LOOK_S = 0.05  # how soon the thread notices that a local pass has begun or ended


class Heartbeat:
    """Sends signs of life from `start` to `stop`; between two local passes the worker alone receives.

    `interrupt` is the message that ends the local pass early, or None: one of the server, or "lost" when the connection is gone.
    `on_interrupt` is called when there is one: it breaks off an exchange that waits for the other ranks. `error` is what went wrong
    in the thread itself, which closes the connection then. `aside(message)` takes those of `ASIDE`, which end nothing; `kept` are
    those that came while nobody waited for one.
    """

    def __init__(self, aside: Callable[[dict], None] = lambda message: None) -> None:
        self.lock, self.thread, self.ended = threading.Lock(), None, threading.Event()
        self.interrupt: dict | None = None
        self.error: Exception | None = None
        self.on_interrupt = lambda: None
        self.progress: dict = {}
        self.receiving, self.keeps, self.group = False, False, 0
        self.aside, self.kept = aside, []

    def start(self, connection: Connection) -> None:
        if self.thread is None or self.connection is not connection:
            self.stop()
            self.connection, self.ended, self.interrupt, self.kept = connection, threading.Event(), None, []
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

    @contextlib.contextmanager
    def keeping(self) -> Iterator[None]:
        """Something else than a local pass is computed; until its end nobody else receives from the connection."""
        with self.lock:
            self.keeps = True
        try:
            yield
        finally:
            with self.lock:
                self.keeps = False

    @property
    def doing(self) -> str:
        return (
            "a local pass"
            if self.receiving
            else "measuring its score"
            if self.keeps
            else "exchanging weights, or waiting for others"
        )

    @property
    def _receives(self) -> bool:
        return self.keeps or (self.receiving and self.interrupt is None)

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
                    while self._receives and connection.waiting():
                        message, _ = connection.receive()
                        if message["op"] in ASIDE:
                            self.aside(message)
                        elif self.keeps:
                            self.kept.append(message)
                        elif message["op"] != "regroup" or message["group"] >= self.group:  # of the group before: that is over
                            self.interrupt = message
            except WireError as error:
                self.interrupt = {"op": "lost", "reason": str(error)}
            if self.interrupt is not None:
                self.on_interrupt()
                if self.interrupt is not None and self.interrupt["op"] == "lost":
                    return

    def _wait(self, connection: Connection, ended: threading.Event, due: float) -> bool:
        """Until the next heartbeat is due, or there is something to receive here; has it ended?"""
        while (left := due - time.monotonic()) > 0 and not ended.is_set():
            if self._receives:
                with contextlib.suppress(WireError):  # closed here: the next heartbeat says so
                    if connection.waiting(min(left, LOOK_S)) and self._receives:
                        break
                    continue
            ended.wait(min(left, LOOK_S))
        return ended.is_set()
