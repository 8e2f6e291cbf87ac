"""Tasks: one function at work on one worker, and many spread over the workers.

Used by `labkit.cluster.lab`.
"""

import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from labkit.cluster.backend import Again, Backend, TaskAnswer
from labkit.errors import ClusterError, real
from labkit.sources import Returned

LOSSES = 3  # an item that has lost so many workers is not tried again


class Task:
    """A function at work on one worker. It stays on the process where it began: when that is lost, so is the task."""

    def __init__(self, future: TaskAnswer, worker: int, backend: Backend, id: Hashable) -> None:
        self.future, self.worker, self._backend, self._id = future, worker, backend, id

    @property
    def done(self) -> bool:
        return self.future.done() or self.lost

    @property
    def lost(self) -> bool:
        """Is the process gone on which it began?"""
        return self._id not in self._backend.alive()

    def result(self, timeout: float = 60.0) -> Any:
        """What the function returned; its own exception if it raised; `ClusterError` when the worker is lost or time is up."""
        limit = time.monotonic() + real("timeout", timeout, least=0, finite=False)
        while True:
            if self.future.done():
                try:
                    made = self.future.result(timeout=5)
                    return made.value() if isinstance(made, Returned) else made
                except TimeoutError:  # not the function's own: that is raised below
                    if self.future.done() and self.error() is not None:
                        raise
            elif self.lost:
                self.cancel()  # Dask would hold it for an address that may never come back
                raise ClusterError(f"worker {self.worker} was lost while its task ran. connect() again for a full lab.")
            if time.monotonic() > limit:
                raise ClusterError(f"worker {self.worker} did not finish within {timeout:g} s. Give result() a longer timeout.")
            time.sleep(0.01)

    def error(self) -> BaseException | None:
        """The exception that the function raised; None while it runs, when it succeeded, or when its worker was lost."""
        if not self.future.done():
            return None
        try:
            error = self.future.exception(timeout=5)
        except Exception:  # cancelled, or gone with its worker
            return None
        return None if isinstance(error, Again) else error

    def cancel(self) -> None:
        """Take the task back if it has not begun; forget its result otherwise."""
        self.future.release()


def spread(
    items: Sequence[Any],
    idle: Callable[[], set[int]],
    start: Callable[[int, Any], Task],
    timeout: float,
    each: Callable[[int, Any], None] | None = None,
) -> list[Any]:
    """The result of each item, in their order, one item on each worker at a time; the first exception is raised here.

    `idle()` returns the workers that may be given an item now, apart from those that are at work on one; `start(worker, item)`
    gives it. An item whose worker is lost goes to another one. `each(number, result)` is called when an item is done, once for
    each.
    """
    limit = time.monotonic() + timeout
    todo, results, losses = deque(range(len(items))), {}, [0] * len(items)
    working: dict[int, tuple[int, Task]] = {}
    try:
        while len(results) < len(items):
            workers = idle()
            if not workers and not working:
                raise ClusterError("every worker of this lab is lost. connect() again for a full lab.")
            for worker in sorted(workers - set(working))[: len(todo)]:
                number = todo.popleft()
                try:
                    working[worker] = number, start(worker, items[number])
                except ClusterError:
                    if worker in idle():
                        raise
                    # else it was lost just now
                    todo.appendleft(number)
            for worker, (number, task) in list(working.items()):
                if task.future.done():
                    results[number] = task.result(30)
                    del working[worker]
                    if each:
                        each(number, results[number])
                elif task.lost:
                    task.cancel()
                    losses[number] += 1
                    if losses[number] == LOSSES:
                        raise ClusterError(f"item {number} was given to {LOSSES} workers, and each was lost.")
                    todo.append(number)
                    del working[worker]
            if time.monotonic() > limit and len(results) < len(items):
                left = len(items) - len(results)
                raise ClusterError(f"{left} of {len(items)} tasks were not done within {timeout:g} s; they were cancelled.")
            if working:
                time.sleep(0.003)
    finally:
        for _, task in working.values():
            task.cancel()
    return [results[number] for number in range(len(items))]
