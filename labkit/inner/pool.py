"""A pool of native threads that compute one training step together; torch computes with one thread in each.

Torch's operators release the interpreter's lock, so that the threads of a pool run side by side. One intra-op thread each, because
each Python thread has an OpenMP team of its own: two threads of two would be four on two cores.

Used by `labkit.inner`.
"""

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any

import torch

from labkit.errors import ProblemError


class ThreadPool:
    """`threads` native threads, started at once; they end with the pool."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        own = torch.get_num_threads()
        self._inboxes = [SimpleQueue() for _ in range(threads)]
        for inbox in self._inboxes:
            threading.Thread(target=_work, args=(inbox,), name="labkit-inner", daemon=True).start()
        self.run([_one_thread_of_torch] * threads)
        torch.set_num_threads(own)
        self.close = weakref.finalize(self, _end, self._inboxes)

    def run(self, functions: Sequence[Callable[[], Any]]) -> list[Any]:
        """What each of at most `threads` functions returns; they run at the same time, each on its own thread.

        The first error is raised once all have ended; one that only says that another function has failed (`Abandoned`) comes last.
        """
        if len(functions) > self.threads:
            raise ValueError(f"{len(functions)} functions cannot run at once on {self.threads} threads.")
        answers, ended = SimpleQueue(), {}
        for at, function in enumerate(functions):
            self._inboxes[at].put((at, function, answers))
        try:
            while len(ended) < len(functions):
                at, answer = answers.get()
                ended[at] = answer
        except BaseException:  # KeyboardInterrupt: what has begun works on the network of the next step
            while len(ended) < len(functions):
                at, answer = answers.get()
                ended[at] = answer
            raise
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


def _one_thread_of_torch() -> None:
    """Torch sets the number for a thread when it is asked first, to what was set last anywhere: so it is asked before."""
    torch.get_num_threads()
    torch.set_num_threads(1)


def _end(inboxes: Sequence[SimpleQueue]) -> None:
    for inbox in inboxes:
        inbox.put(None)


FAILED = "another thread of this step has failed"


class Abandoned(RuntimeError):
    """Another thread of the same step has failed."""


class Exchange:
    """Where the threads of one step wait for what the others have computed."""

    def __init__(self, n: int) -> None:
        self.n = n
        self._changed, self._slots, self._error = threading.Condition(), {}, ""
        self._calls: Counter[tuple[Any, int]] = Counter()
        self._waiting = self._ended = 0

    def gather(self, key: Any, at: int, value: Any) -> list[Any]:
        """The values that all n threads give under this key, each at its place; waits for them. A key may come again, on all of them.

        Abandoned where one has failed; ProblemError where all wait, for different keys, or have ended.
        """
        with self._changed:
            self._calls[key, at] += 1
            call = key, self._calls[key, at]
            slots = self._slots.setdefault(call, {})
            slots[at] = value
            if len(slots) == self.n:
                del self._slots[call]  # who waits has it, and what is in it may be large
                self._waiting -= self.n - 1
                self._changed.notify_all()
            else:
                self._waiting += 1
                self._look()
            self._changed.wait_for(lambda: len(slots) == self.n or self._error)
            if len(slots) < self.n:
                raise (Abandoned if self._error == FAILED else ProblemError)(self._error)
        return [slots[place] for place in range(self.n)]

    def end(self, failed: bool = False) -> None:
        """A thread gives nothing any more; where it has failed, nobody waits any longer."""
        with self._changed:
            self._ended += 1
            self._error = self._error or (FAILED if failed else "")
            self._look()
            self._changed.notify_all()

    def _look(self) -> None:
        if self._waiting and self._waiting + self._ended == self.n and not self._error:
            self._error = (
                "the inner layer cannot split this network: for one part of a batch its forward() calls layers that it does not call for another, "
                "and they need all parts (BatchNorm, say). Leave the step undivided, with Inner(split='none')."
            )
            self._changed.notify_all()
