"""Work on a lab: one function at work on one worker, and many spread over the workers.

Used by `labkit.cluster.lab`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from labkit.cluster.dask_backend import Again
from labkit.errors import ClusterError

if TYPE_CHECKING:
    from labkit.cluster.lab import Lab

DEATHS = 3  # an item that has lost so many workers is not tried again


class Task:
    """A function at work on one worker. It stays on the process where it began: when that is lost, so is the task."""

    def __init__(self, future: Any, worker: int, lab: Lab) -> None:
        self.future, self.worker, self._lab, self._id = future, worker, lab, lab._ids[worker]

    @property
    def done(self) -> bool:
        return self.future.done() or self.lost

    @property
    def lost(self) -> bool:
        """Is the process gone on which it began?"""
        return self._lab.closed or self._id not in self._lab._backend.alive()

    def result(self, timeout: float = 60.0) -> Any:
        """What the function returned; its own exception if it raised; `ClusterError` when the worker is lost or time is up."""
        limit = time.monotonic() + timeout
        while True:
            if self.future.done():
                try:
                    return self.future.result(timeout=5)
                except TimeoutError:  # not the function's own: that is raised below
                    if self.future.done() and self.error() is not None:
                        raise
            elif self.lost:
                self.cancel()  # Dask would keep it for an address that may never come back
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
    lab: Lab,
    fn: Callable,
    items: list,
    timeout: float,
    workers: Sequence[int] | None,
    placed: bool = False,
    each: Callable[[int, Any], None] | None = None,
) -> list[Any]:
    """`[fn(item) for item in items]`, one item on each worker at a time; see `Lab.map`."""
    limit = time.monotonic() + timeout
    todo, results, deaths = deque(range(len(items))), {}, [0] * len(items)
    working: dict[int, tuple[int, Task]] = {}
    try:
        while len(results) < len(items):
            idle = set(workers if workers is not None else lab.free() or range(len(lab))) - set(lab.lost())
            if not idle and not working:
                raise ClusterError("every worker of this lab is lost. connect() again for a full lab.")
            for worker in sorted(idle - set(working))[: len(todo)]:
                number = todo.popleft()
                try:
                    about = (lab.workers[worker],) if placed else ()
                    working[worker] = number, lab.start(worker, fn, items[number], *about)
                except ClusterError:  # lost just now
                    todo.appendleft(number)
            for worker, (number, task) in list(working.items()):
                if task.future.done():
                    results[number] = task.result(30)
                    del working[worker]
                    if each:
                        each(number, results[number])
                elif task.lost:
                    task.cancel()
                    deaths[number] += 1
                    if deaths[number] == DEATHS:
                        raise ClusterError(f"item {number} was given to {DEATHS} workers, and each was lost.")
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
