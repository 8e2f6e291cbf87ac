"""What tests give to workers to do, in a file that loads neither torch nor the rest of labkit: each new process imports it first.

Used by the tests of this folder.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

from labkit.errors import WorkerError


def where():
    return os.getpid() if threading.current_thread().name == "labkit-tasks" else (os.getpid(), threading.current_thread().name)


def boom(x=0):
    raise ZeroDivisionError(f"no {x}")


class Odd(Exception):
    """One that cannot be pickled."""

    def __init__(self, a, b):
        super().__init__(a)
        self.lock = threading.Lock()


def odd():
    raise Odd(1, 2)


def work(path, seconds):
    with open(path, "a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(seconds)


def slow(x):
    begun = time.time()
    time.sleep(0.3)
    return begun, time.time()


def together(folder, index):
    """Begins, and ends when the other one has begun."""
    Path(folder, str(index)).touch()
    limit = time.monotonic() + 60
    while not Path(folder, str(1 - index)).exists():
        if time.monotonic() > limit:
            return False
        time.sleep(0.02)
    return True


def worker_error():
    raise WorkerError("worker 3 failed", 3, "over there")
