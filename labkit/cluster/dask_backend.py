"""Dask's side of a lab: a client, the workers behind it, tasks pinned to one of them, and leases that other notebooks respect.

A back end is what `labkit.cluster.lab.Lab` stands on. It knows workers by an id that no second worker ever gets (here the address
and the folder of the process, as an address may be had again) and answers these, none of which waits without a limit:

    alive() -> {id: name}                   who is there now; a second old at most
    describe(id) -> future                  of (host, process id, number of GPUs, which of them it may see, rank under MPI)
    submit(id, pid, fn, args) -> future     that fn runs on this worker, in this process, and never twice
    add(n)                                  start n more workers; a ClusterError where this lab started none
    lease(ids, holder) -> {id: holder}      take them in the sight of other notebooks; who holds them, if somebody does
    release(holder), dashboard, client, close()
    keeps_names                             does a worker that was killed come back by itself, under its old name?
    trouble() -> str                        why nobody comes, if it knows

A future has `done()` and `result(timeout)`; that of a task also `exception(timeout)` and `release()`, which takes it back if it has
not begun.

Used by `labkit.cluster.connect`; Dask loads it in each local worker process (`dask_setup`).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import glob
import json
import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from labkit.errors import ClusterError

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
ASK_S = 0.5  # how old the list of workers may be before the scheduler is asked again
SILENT_S = 15.0  # a scheduler that has not answered for so long is gone
LEASE_S = 5.0  # the longest wait for the scheduler's word on a lease
_begun: set[str] = set()  # tasks that have begun in this process


class DaskWorkers:
    """The workers of a Dask cluster, which `close` ends if they were started here (`owned`: what to close, the client first)."""

    def __init__(self, client: Any, cluster: Any = None, owned: Iterable[Any] = (), resources: dict | None = None) -> None:
        self.client, self.cluster, self.owned, self.resources = client, cluster, list(owned), resources
        self._known: dict[str, str] = {}
        self._question: tuple[concurrent.futures.Future, float] | None = None
        self._asked = -ASK_S
        self._asking = threading.Lock()
        self._describing: list[concurrent.futures.Future] = []
        self._locks: dict[str, dict[str, Any]] = {}  # holder -> worker id -> semaphore

    @property
    def keeps_names(self) -> bool:
        """Does a nanny of ours start a killed worker again, under its old name?"""
        return self.cluster is not None

    @property
    def in_process(self) -> bool:
        """Is the scheduler an object of this process?"""
        from distributed import Scheduler

        return isinstance(getattr(self.client.cluster, "scheduler", None), Scheduler)

    @property
    def dashboard(self) -> str:
        import dask

        link = self.client.dashboard_link or ""
        if link and self.in_process and dask.config.get("distributed.dashboard.link").startswith("{scheme}://{host}"):
            return f"http://127.0.0.1:{link.rsplit(':', 1)[1]}"  # Dask names the host; our dashboard is on loopback alone
        return link

    def alive(self) -> dict[str, str]:
        if self.in_process:
            for _ in range(3):
                with contextlib.suppress(RuntimeError):  # it changed while it was read
                    states = list(self.client.cluster.scheduler.workers.values())
                    return {_id(s.address, s.local_directory): s.name for s in states if self._has_resources(s.resources)}
            return self._known
        with self._asking:
            return self._ask_who_is_there()

    def _ask_who_is_there(self) -> dict[str, str]:
        now = time.monotonic()
        if self._question is None and now - self._asked > ASK_S:
            try:
                self._question = self._ask(self.client.scheduler.identity(n_workers=-1)), now
            except (AttributeError, RuntimeError):  # the client is closed
                return {}
        if self._question:
            answer, asked = self._question
            try:
                workers = answer.result(timeout=0.3)["workers"]
            except TimeoutError:
                return self._known if now - asked < SILENT_S else {}
            except (OSError, RuntimeError, concurrent.futures.CancelledError):
                workers = {}
            self._question, self._asked = None, time.monotonic()
            self._known = {
                _id(address, about["local_directory"]): about["name"]
                for address, about in workers.items()
                if self._has_resources(about["resources"])
            }
        return self._known

    def describe(self, id: str) -> concurrent.futures.Future:
        async def ask() -> tuple:  # it is the event loop of the worker that answers, so a busy one does too
            return (await self.client._run(describe, workers=[_address(id)]))[_address(id)]

        self._describing = [future for future in self._describing if not future.done()] + [self._ask(ask())]
        return self._describing[-1]

    def submit(self, id: str, pid: int, fn: Any, args: tuple) -> Any:
        return self.client.submit(
            _only_once,
            uuid.uuid4().hex,
            pid,
            fn,
            *args,
            workers=[_address(id)],
            allow_other_workers=False,
            pure=False,
            retries=0,
            resources=self.resources,
            key=f"labkit-{getattr(fn, '__name__', 'task')}-{uuid.uuid4().hex}",
        )

    def add(self, n: int) -> None:
        if self.cluster is None:
            raise ClusterError("this lab did not start its cluster, so it cannot add workers. Start them there: they are noticed.")
        import dask

        with dask.config.set(settings(None)):
            self.cluster.scale(len(self.cluster.plan) + n)

    def lease(self, ids: Iterable[str], holder: str) -> dict[str, str]:
        # A semaphore that its client refreshes: when a kernel dies, its leases end after Dask's locks.lease-timeout (30 s).
        # Nobody waits while holding one, so two runs cannot wait for each other.
        if self.client.scheduler.address.startswith("inproc"):
            return {}  # nobody else can reach it
        from distributed import Semaphore

        taken: dict[str, Any] = {}
        try:
            for id in sorted(set(ids) - set(self._locks.get(holder, {}))):
                lock = Semaphore(1, f"labkit-{_address(id)}", scheduler_rpc=self.client.scheduler, loop=self.client.loop)
                taken[id] = lock
                if not self.client.sync(lock._acquire, timeout=0, callback_timeout=LEASE_S):
                    other = self.client.sync(
                        self.client.scheduler.get_metadata, keys=["labkit", _address(id)], default=None, callback_timeout=LEASE_S
                    )
                    self._give_back(taken)
                    return {id: other or "another notebook"}
                words = f"{holder} (another notebook, process {os.getpid()} on {socket.gethostname()})"
                self.client.sync(
                    self.client.scheduler.set_metadata, keys=["labkit", _address(id)], value=words, callback_timeout=LEASE_S
                )
        except (OSError, RuntimeError) as error:
            self._give_back(taken)
            raise ClusterError(f"the Dask scheduler does not answer: {error or type(error).__name__}.") from error
        self._locks.setdefault(holder, {}).update(taken)
        return {}

    def release(self, holder: str) -> None:
        self._give_back(self._locks.pop(holder, {}))

    def _give_back(self, locks: dict[str, Any]) -> None:
        for lock in locks.values():
            with contextlib.suppress(OSError, RuntimeError):  # the scheduler is gone, and its leases with it
                self.client.loop.add_callback(lock.refresh_callback.stop)
                if lock._leases:
                    self.client.sync(lock._release, lock._leases.popleft(), callback_timeout=LEASE_S)

    def trouble(self) -> str:
        return ""

    def close(self) -> None:
        for holder in list(self._locks):
            self.release(holder)
        for future in [*self._describing, *(self._question or ())[:1]]:
            future.cancel()
        for nanny in getattr(self.cluster, "workers", {}).values():  # a frozen worker would not hear that it should end
            if pid := getattr(getattr(nanny, "process", None), "pid", None):
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGCONT)
        with quiet():
            for thing in self.owned:
                thing.close(timeout=10)

    def _has_resources(self, has: dict) -> bool:
        return all(has.get(name, 0) >= amount for name, amount in (self.resources or {}).items())

    def _ask(self, coroutine: Any) -> concurrent.futures.Future:
        try:
            return asyncio.run_coroutine_threadsafe(coroutine, self.client.loop.asyncio_loop)
        except RuntimeError:  # the loop is closed
            coroutine.close()
            raise


class Again(ClusterError):
    """Dask was about to run a task a second time, after its worker was lost."""


def _id(address: str, folder: str) -> str:
    return f"{address} {folder}"


def _address(id: str) -> str:
    return id.split(" ", 1)[0]


def settings(scratch: str | None) -> dict[str, Any]:
    """What Dask should do otherwise in a cluster of ours."""
    changes = {
        "distributed.worker.profile.enabled": False,  # it samples every 10 ms and would be timed too
        "distributed.admin.system-monitor.gil.enabled": False,
        "distributed.scheduler.worker-ttl": None,  # a long step that holds the GIL is no dead worker
    }
    return changes | ({"temporary-directory": scratch} if scratch else {})  # the scheduler's too


def start_local(
    n_workers: int, threads: int, *, processes: bool, resources: dict | None, timeout: float, scratch: str
) -> DaskWorkers:
    """A cluster on this machine, in threads of this process or in processes of its own."""
    import dask
    from distributed import LocalCluster

    with dask.config.set(settings(scratch) | {"distributed.comm.timeouts.connect": f"{timeout:g}s"}):
        apart = {
            "host": "127.0.0.1",
            "env": dict.fromkeys(THREAD_VARIABLES, str(threads)),
            "preload": ["labkit.cluster.dask_backend"],  # calls dask_setup there
        }
        cluster = LocalCluster(
            n_workers=n_workers,
            threads_per_worker=1,  # one task at a time; torch's threads are set by the worker
            processes=processes,
            dashboard_address="127.0.0.1:0",
            memory_limit=None,
            local_directory=scratch,
            silence_logs=logging.CRITICAL,
            resources=resources,
            **(apart if processes else {}),
        )
        return own_cluster(cluster, resources=resources, timeout=timeout)


def own_cluster(cluster: Any, *, resources: dict | None, timeout: float) -> DaskWorkers:
    """A cluster object that was made for this lab and ends with it."""
    from distributed import Client

    try:
        client = Client(cluster, timeout=timeout, set_as_default=False)
    except BaseException:
        cluster.close()
        raise
    return DaskWorkers(client, cluster, [client, cluster], resources)


def join_cluster(address: str | None, client: Any, *, security: Any, resources: dict | None, timeout: float) -> DaskWorkers:
    """A cluster that is there already: by the address of its scheduler, by a file with it, by a Client or cluster object."""
    from distributed import Client

    if isinstance(client, Client):
        return DaskWorkers(client, resources=resources)
    place = client if client is not None else address
    if address and address.endswith(".json"):
        place, limit = None, time.monotonic() + timeout
        while place is None:
            with contextlib.suppress(OSError, ValueError, KeyError):  # not written yet, or half
                place = json.loads(Path(address).read_text())["address"]
            if place is None and time.monotonic() > limit:
                raise ClusterError(f"no scheduler file appeared at {Path(address).absolute()} in {timeout:g} s. Is the cluster up?")
            time.sleep(0.05)
    if security is None and isinstance(place, str) and place.startswith("tls://"):
        raise ClusterError(f"{place} speaks TLS. Give connect() its certificates: security=distributed.Security(...).")
    try:
        made = Client(place, timeout=timeout, set_as_default=False, **({"security": security} if security is not None else {}))
    except (OSError, ValueError) as error:
        raise ClusterError(f"no Dask scheduler answers at {place}: {error}.") from error
    return DaskWorkers(made, owned=[made], resources=resources)


def dask_setup(worker: Any) -> None:
    """Dask calls this in each worker process. An interrupt of the notebook reaches the whole process group; it is for the kernel,
    and the workers have to outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def describe() -> tuple[str, int, int, str, int]:
    """Runs on a worker: host, process id, number of GPUs, which it may see, rank. torch is asked only with a GPU driver there."""
    gpus = 0
    if glob.glob("/dev/nvidia[0-9]*"):
        import torch

        gpus = torch.cuda.device_count()
    rank = next((int(os.environ[name]) for name in ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK") if name in os.environ), 0)
    return socket.gethostname(), os.getpid(), gpus, os.environ.get("CUDA_VISIBLE_DEVICES", ""), rank


def _only_once(token: str, pid: int, fn: Any, *args: Any) -> Any:
    """Runs on a worker. Dask runs a task again when its worker was lost; for a long task with effects that would be wrong."""
    if token in _begun or os.getpid() != pid:
        raise Again(f"process {pid} was lost while its task ran; it is not run again.")
    _begun.add(token)
    return fn(*args)


@contextmanager
def quiet():
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
