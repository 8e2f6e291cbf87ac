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
import logging
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

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
        return _gather(self.client, futures, timeout)

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
        with _quiet():
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
            if made_for == request and not lab.closed and not lab.lost():
                return lab
            lab.close()
        with _quiet():
            scratch = None if address or client is not None else tempfile.mkdtemp(prefix="labkit-")
            try:
                dask_client, owned = _client(kind, n_workers, threads_per_worker, address, client, timeout, scratch)
            except BaseException:
                shutil.rmtree(scratch or "", ignore_errors=True)
                raise
            lab = Lab(kind, dask_client, [], [], jitter=jitter, owned=owned, scratch=scratch)
            try:
                _find_workers(lab, n_workers, threads_per_worker, slowdown, timeout)
            except BaseException:
                lab.close()
                raise
        _current = (request, lab)
    return lab


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


def _client(kind, n_workers, threads, address, client, timeout, scratch) -> tuple[Any, list[Any]]:
    """A Dask client, and what this lab has to close (the client first)."""
    import dask
    from distributed import Client, LocalCluster

    if client is not None:
        if isinstance(client, Client):
            return client, []
        made = Client(client, timeout=timeout, set_as_default=False)
        return made, [made]
    if address:
        try:
            made = Client(address, timeout=timeout, set_as_default=False)
        except (OSError, ValueError) as error:
            raise ClusterError(f"no Dask scheduler answers at {address}: {error}.") from error
        return made, [made]
    settings = {
        "temporary-directory": scratch,  # the scheduler's too
        "distributed.worker.profile.enabled": False,  # it samples every 10 ms and would be timed too
        "distributed.admin.system-monitor.gil.enabled": False,
        "distributed.scheduler.worker-ttl": None,  # a long step that holds the GIL is no dead worker
        "distributed.comm.timeouts.connect": f"{timeout:g}s",
    }
    with dask.config.set(settings):
        processes = {
            "host": "127.0.0.1",
            "env": dict.fromkeys(_THREAD_VARIABLES, str(threads)),
            "preload": ["labkit.lab"],  # calls dask_setup there
        }
        cluster = LocalCluster(
            n_workers=n_workers,
            threads_per_worker=1,  # one task at a time; torch's threads are set by the worker
            processes=kind != "threads",
            dashboard_address="127.0.0.1:0",
            memory_limit=None,
            local_directory=scratch,
            silence_logs=logging.CRITICAL,
            **(processes if kind != "threads" else {}),
        )
        made = Client(cluster, timeout=timeout, set_as_default=False)
    return made, [made, cluster]


def dask_setup(worker: Any) -> None:
    """Dask calls this in each worker process. An interrupt of the notebook reaches the whole process group; it is for the kernel,
    and the workers have to outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def _find_workers(lab: Lab, n_workers, threads, slowdown, timeout) -> None:
    """Wait until the workers are there, order them by name, ask each of them who it is."""
    client, wanted = lab.client, n_workers or len(slowdown or [0])
    limit = time.monotonic() + timeout
    while len(known := client.scheduler_info(n_workers=-1)["workers"]) < wanted:
        if time.monotonic() > limit:
            raise ClusterError(
                f"{len(known)} of {wanted} workers arrived in {timeout:g} s. Try connect(n_workers=1, kind='threads'), "
                "or give a longer timeout."
            )
        time.sleep(0.05)
    addresses = sorted(known, key=lambda address: (isinstance(known[address]["name"], str), known[address]["name"], address))
    addresses = addresses[: n_workers or len(addresses)]
    if slowdown is not None and len(slowdown) != len(addresses):
        raise ClusterError(f"slowdown has {len(slowdown)} entries for {len(addresses)} workers. Give one factor for each worker.")
    about = client.run(_describe, workers=addresses)
    for index, address in enumerate(addresses):
        host, pid, gpus = about[address]
        device = f"cuda:{index % gpus}" if gpus else "cpu"
        factor = float(slowdown[index]) if slowdown is not None else 1.0
        lab.workers.append(Worker(index, str(known[address]["name"]), host, device, threads, pid, factor))
    lab._addresses, lab._alive, lab._asked = addresses, known, time.monotonic()


def _describe() -> tuple[str, int, int]:
    """Runs on a worker: host, process id, number of GPUs. torch is asked only where a GPU driver is there."""
    import glob
    import socket

    gpus = 0
    if glob.glob("/dev/nvidia[0-9]*"):
        import torch

        gpus = torch.cuda.device_count()
    return socket.gethostname(), os.getpid(), gpus


def _gather(client: Any, futures: list[Any], timeout: float) -> list[Any]:
    from distributed import wait

    try:
        with client.as_current():
            wait(futures, timeout=timeout)
    except TimeoutError as error:
        left = sum(not future.done() for future in futures)
        client.cancel(futures)
        raise ClusterError(f"{left} of {len(futures)} tasks were not done within {timeout:g} s; they were cancelled.") from error
    return client.gather(futures)


@contextmanager
def _quiet():
    """Dask says a lot about workers that come and go; in a notebook that reads like failure."""
    loggers = [logging.getLogger(name) for name in ("distributed", "tornado", "asyncio", "bokeh")]
    names = [name for name in logging.root.manager.loggerDict if name.startswith("distributed.")]
    loggers += [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
