"""A pool of native threads that compute one training step together; torch computes with one thread in each.

Torch's operators release the interpreter's lock, so that the threads of a pool run side by side. One intra-op thread each, because
each Python thread has an OpenMP team of its own: two threads of two would be four on two cores.

Used by `labkit.inner`.
"""

import threading
import weakref
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any

import torch


class ThreadPool:
    """`threads` native threads, started at once; they end with the pool."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        own, self._answers = torch.get_num_threads(), SimpleQueue()
        self._inboxes = [SimpleQueue() for _ in range(threads)]
        for inbox in self._inboxes:
            threading.Thread(target=_work, args=(inbox,), name="labkit-inner", daemon=True).start()
        # Torch sets the number for a thread when it first computes, from what was set last anywhere: so each sets its own here.
        self.run([lambda: torch.set_num_threads(1)] * threads)
        torch.set_num_threads(own)
        self.close = weakref.finalize(self, _end, self._inboxes)

    def run(self, functions: Sequence[Callable[[], Any]]) -> list[Any]:
        """What each of at most `threads` functions returns; they run at the same time, each on its own thread.

        The first error is raised once all have ended; one that only says that another function has failed (`Abandoned`) comes last.
        """
        if len(functions) > self.threads:
            raise ValueError(f"{len(functions)} functions cannot run at once on {self.threads} threads.")
        for at, function in enumerate(functions):
            self._inboxes[at].put((at, function, self._answers))
        ended = dict(self._answers.get() for _ in functions)
        errors = [error for at in range(len(functions)) if (error := ended[at][1]) is not None]
        if errors:
            raise min(errors, key=lambda error: isinstance(error, Abandoned))
        return [ended[at][0] for at in range(len(functions))]


def _work(inbox: SimpleQueue) -> None:
    while (item := inbox.get()) is not None:
        at, function, answers = item
        try:
            answer = at, (function(), None)
        except BaseException as error:
            answer = at, (None, error)
        answers.put(answer)
        del item, function, answers, answer  # what a step has made may be large


def _end(inboxes: Sequence[SimpleQueue]) -> None:
    for inbox in inboxes:
        inbox.put(None)


class Abandoned(RuntimeError):
    """Another thread of the same step has failed."""


class Exchange:
    """Where the threads of one step wait for what the others have computed."""

    def __init__(self, n: int) -> None:
        self.n = n
        self._changed, self._slots, self._is_broken = threading.Condition(), {}, False

    def gather(self, key: Any, at: int, value: Any) -> list[Any]:
        """The values that all n threads give under this key, each at its place; waits for them. Abandoned where one has failed."""
        with self._changed:
            slots = self._slots.setdefault(key, {})
            slots[at] = value
            if len(slots) == self.n:
                self._changed.notify_all()
            self._changed.wait_for(lambda: len(slots) == self.n or self._is_broken)
            if len(slots) < self.n:
                raise Abandoned("another thread of this step has failed")
        return [slots[place] for place in range(self.n)]

    def abandon(self) -> None:
        """Nobody waits any more."""
        with self._changed:
            self._is_broken = True
            self._changed.notify_all()
