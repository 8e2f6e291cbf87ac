"""Back pressure: how many large pushes may be in the memory of the server at once. The others are not read yet, and TCP has their senders wait.

A push takes memory from its first byte until it is merged. Under an asynchronous rule the server holds the newest version and those that
workers still work from; pushes that come at once would add one each. So half of the members at a time may be in a push. A worker pulls
for about as long as it pushes, so in the long run nobody loses by that: there is always a place for as many as have something to send.

A sender that stalls holds nobody up: after `STALL_S` without a byte of it the next one is read beside it. Nobody waits longer than
`LONGEST_S`, on slow links or behind a slow rule; the bound gives way then. Where a rule waits for the pushes of a whole round it holds
them anyway, and nobody waits.

Used by `labkit.training.server.server`.
"""

import threading
import time
from collections.abc import Callable

from labkit.training.wire.protocol import SERVER_TIMEOUT_S
from labkit.training.wire.transport import Connection

LARGE = 32_000_000  # bytes of a push to which this applies
STALL_S = 1.0  # less than the shortest time after which a silent worker is taken to be gone
LONGEST_S = SERVER_TIMEOUT_S / 3  # long before the worker takes the server to be gone


class Backpressure:
    """`members()` is how many workers are here. Called from a thread for each connection; the lock of the server is not needed."""

    def __init__(self, members: Callable[[], int]) -> None:
        self.members = members
        self._changed = threading.Condition()
        self._waiting: list[Connection] = []  # in the order in which they came
        self._whole: dict[Connection, bool] = {}  # of the pushes in memory: have they come as a whole?

    def begin(self, connection: Connection) -> None:
        """Wait until a large push of this connection may be received. Until `end` it counts."""
        limit = time.monotonic() + LONGEST_S
        with self._changed:
            self._waiting.append(connection)
            while (left := min(self._wait_s(connection), limit - time.monotonic())) > 0:
                self._changed.wait(left)
            self._waiting.remove(connection)
            self._whole[connection] = False
            connection.came_at = time.monotonic()  # what was before is no stall
            self._changed.notify_all()

    def received(self, connection: Connection) -> None:
        """The push has come as a whole: until it is merged nothing can stall."""
        with self._changed:
            if connection in self._whole:
                self._whole[connection] = True

    def end(self, connection: Connection) -> None:
        """The push is merged, refused or broken off; or there was none."""
        with self._changed:
            if self._whole.pop(connection, None) is not None:
                self._changed.notify_all()

    def _wait_s(self, connection: Connection) -> float:
        """Seconds after which to look again, if nothing changes before; 0: it is this one's turn."""
        now = time.monotonic()
        stalls = [LONGEST_S if whole else STALL_S - (now - other.came_at) for other, whole in self._whole.items()]
        stalls = sorted(left for left in stalls if left > 0)
        if self._waiting[0] is connection and len(stalls) < max(1, (self.members() + 1) // 2):
            return 0.0
        return stalls[0] if stalls else LONGEST_S
