"""The lab: the connected cluster that runs train on.

A lab can do four things and no more: list its workers, start a long task pinned to one of them, map independent tasks over
them, and tell which are lost. Whatever else a back end can do stays behind this.

    threads   Dask's in-process cluster: starts at once, 1 GB is enough (Binder, tests)
    dask      local worker processes; or any scheduler by address; or a Client or cluster object handed in

Used by `labkit.training`, `labkit.sweeps` and every notebook.
"""

from __future__ import annotations

import atexit
import difflib
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from labkit.dask_workers import find_workers, gather, quiet, start_client
from labkit.errors import ClusterError

KINDS = ("threads", "dask")
_current: tuple[tuple, Lab] | None = None  # the lab of this process, and the request that made it
_connecting = threading.Lock()


@dataclass(frozen=True)
class Worker:
    """One worker of a lab. `slowdown` is its emulated factor (1 is its true speed)."""

    index: int
    name: str
    host: str
    device: str
    threads: int
    pid: int
    slowdown: float


class Task:
    """A function at work on one worker."""

    def __init__(self, future: Any, worker: int, lab: Lab) -> None:
        self.future, self.worker, self._lab = future, worker, lab

    @property
    def done(self) -> bool:
        return self.future.done() or self.worker in self._lab.lost()

    def result(self, timeout: float = 60.0) -> Any:
        """What the function returned; its own exception if it raised; `ClusterError` when the worker is lost or time is up."""
        limit = time.monotonic() + timeout
        while not self.future.done():
            if self.worker in self._lab.lost():
                raise ClusterError(f"worker {self.worker} was lost while its task ran. connect() again for a full lab.")
            if time.monotonic() > limit:
                raise ClusterError(f"worker {self.worker} did not finish within {timeout:g} s. Give result() a longer timeout.")
            time.sleep(0.01)
        return self.future.result(timeout=30)

    def cancel(self) -> None:
        """Take the task back if it has not begun; forget its result otherwise."""
        self.future.release()


class Lab:
    """The connected cluster; made by `connect`, closed by `close` or at the end of a `with` block. Closing twice is fine."""

    def __init__(
        self,
        kind: str,
        client: Any,
        workers: Sequence[Worker],
        addresses: Sequence[str],
        *,
        jitter: float = 0.0,
        owned: Sequence[Any] = (),
        scratch: str | None = None,
    ) -> None:
        self.kind, self.client, self.workers, self.jitter = kind, client, list(workers), jitter
        self._addresses, self._owned, self._scratch = list(addresses), list(owned), scratch
        self.run = None  # the run that trains on this lab now, set by labkit.training
        self.closed = False
        self._alive, self._asked = dict.fromkeys(addresses), time.monotonic()

    @property
    def emulated(self) -> bool:
        """Are some workers slower than they are?"""
        return self.jitter > 0 or any(worker.slowdown != 1 for worker in self.workers)

    @property
    def dashboard(self) -> str:
        """Address of Dask's dashboard, or "" where there is none."""
        import dask

        link = "" if self.closed else self.client.dashboard_link or ""
        if link and self._in_process() and dask.config.get("distributed.dashboard.link").startswith("{scheme}://{host}"):
            return f"http://127.0.0.1:{link.rsplit(':', 1)[1]}"  # Dask names the host; our dashboard is on loopback alone
        return link

    @property
    def one_process(self) -> bool:
        """Are all workers threads of one process?"""
        return len({(worker.host, worker.pid) for worker in self.workers}) == 1 and len(self.workers) > 1

    @property
    def one_host(self) -> bool:
        return len({worker.host for worker in self.workers}) == 1

    def start(self, worker: int, fn: Callable, *args: Any) -> Task:
        """Run `fn(*args)` on one worker, however long it takes; it is never moved to another one and never run twice."""
        self._check_open()
        if not 0 <= worker < len(self.workers):
            raise ClusterError(f"there is no worker {worker}; this lab has workers 0 to {len(self.workers) - 1}.")
        if worker in self.lost():
            raise ClusterError(f"worker {worker} was lost. connect() again for a full lab.")
        future = self.client.submit(fn, *args, workers=[self._addresses[worker]], allow_other_workers=False, pure=False, retries=0)
        return Task(future, worker, self)

    def map(self, fn: Callable, items: Iterable[Any], timeout: float = 3600.0) -> list[Any]:
        """`[fn(item) for item in items]`, spread over the workers; the first exception is raised here."""
        self._check_open()
        if len(self.lost()) == len(self.workers):
            raise ClusterError("every worker of this lab is lost. connect() again for a full lab.")
        futures = self.client.map(fn, list(items), pure=False, workers=self._addresses)
        return gather(self.client, futures, timeout)

    def lost(self) -> list[int]:
        """Indices of workers that are gone."""
        if self.closed:
            return [worker.index for worker in self.workers]
        if self._in_process():
            alive = self.client.cluster.scheduler.workers
        else:
            if time.monotonic() - self._asked > 1.0:  # a question to the scheduler: at most one a second
                self._alive, self._asked = self.client.scheduler_info(n_workers=-1)["workers"], time.monotonic()
            alive = self._alive
        return [worker.index for worker, address in zip(self.workers, self._addresses, strict=True) if address not in alive]

    def broken(self) -> bool:
        """Is a worker lost, or the connection to all of them?"""
        try:
            return bool(self.lost())
        except (OSError, RuntimeError):  # the client was closed by its owner
            return True

    def close(self) -> None:
        """End the workers that this lab started; a cluster that was handed in stays as it was."""
        global _current
        if self.closed:
            return
        if self.run is not None:
            self.run.stop()
        self.closed = True
        if _current and _current[1] is self:
            _current = None
        with quiet():
            for thing in self._owned:
                thing.close(timeout=10)
        if self._scratch:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def __len__(self) -> int:
        return len(self.workers)

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if self.closed:
            return f"<Lab {self.kind}, closed>"
        lines = [f"Lab: {len(self.workers)} workers ({self.kind})" + (f", dashboard {self.dashboard}" if self.dashboard else "")]
        for worker in self.workers:
            slow = f", emulated {worker.slowdown:g}x slower" if worker.slowdown != 1 else ""
            lines.append(
                f"  worker {worker.index}: {worker.host}, pid {worker.pid}, {worker.device}, {worker.threads} torch thread(s){slow}"
            )
        return "\n".join(lines)

    def table(self):
        """The workers as a DataFrame, one row each."""
        import pandas as pd

        return pd.DataFrame([asdict(worker) for worker in self.workers]).set_index("index")

    def _in_process(self) -> bool:
        from distributed import Scheduler

        return isinstance(getattr(self.client.cluster, "scheduler", None), Scheduler)

    def _check_open(self) -> None:
        if self.closed:
            raise ClusterError("this lab is closed. Run the cell with connect() again.")


def connect(
    kind: str | None = None,
    n_workers: int | None = None,
    *,
    threads_per_worker: int = 1,
    slowdown: Sequence[float] | None = None,
    jitter: float = 0.0,
    address: str | None = None,
    client: Any = None,
    timeout: float = 60.0,
) -> Lab:
    """Connect to workers, starting them where none are given.

    The same request in one kernel gives the same lab; a changed one closes the old lab first.

    Parameters
    ----------
    kind
        "threads" (in this process) or "dask" (processes). Default: "dask", or "threads" where LABKIT_SMALL is set, as on Binder.
    n_workers
        How many; 2 by default, and all of them for `address` and `client`.
    threads_per_worker
        torch threads of each worker.
    slowdown
        Emulated slowness, one factor of at least 1 for each worker: `[1, 4]` makes worker 1 four times slower.
    jitter
        Standard deviation of the logarithm of a random factor on every step's emulated duration; 0 is none.
    address, client
        A running Dask scheduler ("tcp://host:8786"), or a `Client` or cluster object of your own; both are left running at `close`.
    timeout
        Seconds to wait for the workers.

    Raises
    ------
    ClusterError
        The workers did not arrive, or the request makes no sense.
    """
    global _current
    if kind is None:
        kind = "threads" if os.environ.get("LABKIT_SMALL") and not (address or client) else "dask"
    _check_request(kind, n_workers, threads_per_worker, slowdown, jitter, address, client)
    if n_workers is None and not (address or client):
        n_workers = 2
    request = (
        kind,
        n_workers,
        threads_per_worker,
        tuple(slowdown or ()),
        jitter,
        address,
        id(client) if client is not None else None,
    )
    with _connecting:
        if _current:
            made_for, lab = _current
            if made_for == request and not lab.closed and not lab.broken():
                return lab
            lab.close()
        with quiet():
            scratch = None if address or client is not None else tempfile.mkdtemp(prefix="labkit-")
            try:
                dask_client, owned = start_client(kind, n_workers, threads_per_worker, address, client, timeout, scratch)
            except BaseException:
                shutil.rmtree(scratch or "", ignore_errors=True)
                raise
            try:
                found = find_workers(dask_client, n_workers, slowdown, timeout)
            except BaseException:
                Lab(kind, dask_client, [], [], owned=owned, scratch=scratch).close()
                raise
            workers = []
            for index, (name, host, pid, gpus) in enumerate(found.values()):
                device = f"cuda:{index % gpus}" if gpus else "cpu"
                factor = float(slowdown[index]) if slowdown is not None else 1.0
                workers.append(Worker(index, name, host, device, threads_per_worker, pid, factor))
            lab = Lab(kind, dask_client, workers, list(found), jitter=jitter, owned=owned, scratch=scratch)
        _current = (request, lab)
    return lab


def current() -> Lab | None:
    """The lab of this process, if one is open."""
    return None if _current is None or _current[1].closed else _current[1]


@atexit.register
def _close_at_exit() -> None:
    if _current:
        _current[1].close()


def _check_request(kind, n_workers, threads_per_worker, slowdown, jitter, address, client) -> None:
    if kind not in KINDS:
        close = difflib.get_close_matches(str(kind), KINDS, n=1)
        raise ClusterError(f"unknown kind {kind!r}. Known: {', '.join(KINDS)}." + (f" Did you mean {close[0]!r}?" if close else ""))
    if n_workers is not None and (int(n_workers) != n_workers or n_workers < 1):
        raise ClusterError(f"n_workers={n_workers}: a lab needs at least one worker.")
    if int(threads_per_worker) != threads_per_worker or threads_per_worker < 1:
        raise ClusterError(f"threads_per_worker={threads_per_worker}: at least one thread is needed.")
    if jitter < 0:
        raise ClusterError(f"jitter={jitter} must not be negative.")
    if slowdown is not None:
        n = n_workers or (None if address or client else 2)
        if n is not None and len(slowdown) != n:
            raise ClusterError(f"slowdown has {len(slowdown)} entries for {n} workers. Give one factor for each worker.")
        if not all(factor >= 1 for factor in slowdown):
            raise ClusterError(f"slowdown={list(slowdown)}: a factor below 1 would be a speed-up; 1 is the true speed.")
    if address and client is not None:
        raise ClusterError("give address or client, not both.")
