"""Locks of the operating system on folders, which end with the process that holds them, also when it is killed; and one of threads.

    alone(folder)         a block in which one thread or process at a time works on a folder
    DirectoryLock(path)   a run directory is in use: nobody else writes, renames, prunes or resumes it
    held(path)            does anybody hold that?
    parsed(parse, ...)    what comes of a text of Python, which one thread at a time may parse
    Scratch(prefix)       a temporary folder that goes with its process: what a killed one has left is deleted by the next

The lock of a run directory is one on the file `.run-lock` in it. It belongs to the open file, not to a process: the server of a run
inherits it from its kernel, so that the directory is held without a gap for as long as one of the two lives.

Used by `labkit.runs.server_file`, which says whether a run lives, also where a file system has no locks; and by all others.
"""

import contextlib
import os
import shutil
import stat
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

LOCK = ".run-lock"
TRIES = 10  # of `parsed`
LOOK_S = 0.2  # so long a lock is tried: `held` holds it for a moment
_parsing = threading.RLock()


class DirectoryLock:
    """A run directory that is held until `release`, or until every process that has inherited `fd` has ended.

    `id` is that of its run, for those who look (`held`). `BlockingIOError` if another one holds it. Where the file system has no locks, nobody is kept out.
    """

    def __init__(self, path: Path, id: str = "") -> None:
        self.path = Path(path)
        file = self.path / LOCK
        self.fd = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        self._close = weakref.finalize(self, os.close, self.fd)
        _open.add(self)
        limit = time.monotonic() + LOOK_S
        while (locked := _flock(self.fd, exclusive=True)) is False and time.monotonic() < limit:
            time.sleep(0.01)
        if locked is False or not _same(self.fd, file):  # or it was renamed meanwhile, and another one is there
            self._close()
            raise BlockingIOError(f"{self.path} is in use.")
        if id and not os.pread(self.fd, 1, 0):
            os.pwrite(self.fd, id.encode(), 0)

    def release(self) -> None:
        """Nobody holds the directory any more, whoever has inherited the lock. Twice is fine."""
        if self._close.alive:
            _flock(self.fd, unlock=True)
            self._close()


_open: weakref.WeakSet[DirectoryLock] = weakref.WeakSet()
# What this process forks without starting another program, such as a pool of processes, is no owner of its run.
os.register_at_fork(after_in_child=lambda: [lock._close() for lock in list(_open)])


def held(path: Path, id: str | None = None) -> bool | None:
    """Is this run directory held (by the run with this id)? None where that cannot be seen: no file, no locks, another run's."""
    try:
        fd = os.open(Path(path) / LOCK, os.O_RDONLY)
    except OSError:
        return None
    try:
        if id is not None and os.pread(fd, 200, 0).decode(errors="replace") != id:
            return None
        free = _flock(fd)
        return None if free is None else not free
    finally:
        os.close(fd)


class Scratch:
    """A new temporary folder at `path`, until `close`. First those of this `prefix` are deleted that killed processes of this user have left.

    `parent` is the folder of the system for such files by default. Where the file system has no locks, nothing is deleted.
    """

    def __init__(self, prefix: str, parent: str | None = None) -> None:
        parent = parent or tempfile.gettempdir()
        for left in Path(parent).glob(f"{prefix}*"):
            with contextlib.suppress(OSError):
                about = left.lstat()
                if stat.S_ISDIR(about.st_mode) and about.st_uid == os.geteuid() and held(left) is False:
                    shutil.rmtree(left, ignore_errors=True)
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
            try:
                self._lock = DirectoryLock(self.path)
                break
            except (BlockingIOError, FileNotFoundError):  # deleted by another one before it was held
                continue

    def close(self) -> None:
        """Delete the folder. Twice is fine."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.release()


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One at a time is in this block for a folder, of all threads and processes; where the file system has locks of folders."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        _flock(fd, exclusive=True, wait=True)
        yield
    finally:
        os.close(fd)


def parsed(parse: Callable, *arguments: Any, **options: Any) -> Any:
    """What `parse` returns, such as `ast.parse`, or `numpy.load`, as the head of its files is such a text.

    One thread at a time: CPython 3.11 and 3.12 count the depth of all trees that are being made together, and raise a SystemError where that
    is not the one before, as when another thread's turn comes in the middle. Other libraries parse, too: then it is tried again.
    """
    with _parsing:
        for _ in range(TRIES - 1):
            with contextlib.suppress(SystemError):
                return parse(*arguments, **options)
        return parse(*arguments, **options)


def _flock(fd: int, *, exclusive: bool = False, wait: bool = False, unlock: bool = False) -> bool | None:
    """Lock an open file, or unlock it; False if another one holds it, None where there are no locks."""
    try:
        import fcntl

        how = fcntl.LOCK_UN if unlock else fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
        fcntl.flock(fd, how | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return None
    return True


def _same(fd: int, file: Path) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(fd), os.stat(file))
    return False
