"""Back pressure: how many large pushes may be in the memory of the server at once. The others are not read yet, and TCP has their senders wait.

A push takes memory from its first byte until it is merged. Under an asynchronous rule the server holds the newest version and those that
workers still work from; pushes that come at once would add one each. So half of the members at a time may be in a push. A worker pulls
for about as long as it pushes, so that workers which compute in between lose nothing; two that do nothing but exchange made a quarter
fewer exchanges.

A sender that stalls, or sends less than a MiB a second, holds nobody up: after `STALL_S` without one the next is read beside it. Nobody
waits longer than `LONGEST_S`, behind a slow rule; the bound gives way then. One that is gone while it waits is noticed within `LOOK_S`.
Rules that do not train on while a push is under way (`Update.ahead`), among them those that wait for the pushes of a whole round and
hold them anyway, have no bound.

Used by `labkit.training.server.server`.
"""

import threading
import time
from collections.abc import Callable

from labkit.errors import WireError
from labkit.training.wire.protocol import SERVER_TIMEOUT_S
from labkit.training.wire.transport import Connection

LARGE = 32_000_000  # bytes of a push to which this applies
STALL_S = 1.0  # less than the shortest time after which a silent worker is taken to be gone
LOOK_S = 0.5  # between two looks at whether a waiting sender is still there, and how many members there are
LONGEST_S = SERVER_TIMEOUT_S / 3  # long before the worker takes the server to be gone


class Backpressure:
    """`members()` is how many workers are here. Called from a thread for each connection; the lock of the server is not needed."""

    def __init__(self, members: Callable[[], int]) -> None:
        self.members = members
        self._changed = threading.Condition()
        self._waiting: list[Connection] = []  # in the order in which they came
        self._whole: dict[Connection, bool] = {}  # of the pushes in memory: have they come as a whole?

    def begin(self, connection: Connection) -> None:
        """Wait until a large push of this connection may be received. Until `end` it counts. `WireError` where the connection is over."""
        limit = time.monotonic() + LONGEST_S
        with self._changed:
            self._waiting.append(connection)
            try:
                while (left := min(self._wait_s(connection), limit - time.monotonic())) > 0:
                    self._changed.wait(min(left, LOOK_S))
                    if connection.is_over():
                        raise WireError("the connection was closed while its push waited.")
            finally:
                self._waiting.remove(connection)
                self._changed.notify_all()
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
