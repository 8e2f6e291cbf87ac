"""Dask as a back end: a client, the workers behind it, tasks pinned to one of them, and leases that other notebooks respect.

Workers run in threads of this process (kind "threads"), in processes on this machine (kind "dask"), or wherever a running
scheduler has them. The id of a worker is its address and the folder of its process, as an address may be had again.

Found by `labkit.cluster.connect`; used by `labkit.cluster.slurm`, and loaded by Dask in each worker process (`dask_setup`).
"""

import ast
import asyncio
import concurrent.futures
import contextlib
import functools
import json
import logging
import multiprocessing.spawn
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from labkit.cluster.backend import THREAD_VARIABLES, About, Again, Request, describe, made_by, quiet
from labkit.cluster.leases import Lease, at_work, give_back, lease_all
from labkit.errors import ClusterError
from labkit.locks import Scratch, parsed

ASK_S = 0.5  # how old the list of workers may be before the scheduler is asked again
SILENT_S = 15.0  # a scheduler that has not answered for so long is gone
RESTART = {
    "distributed.deploy.lost-worker-timeout": "300s"
}  # to start a killed worker again; then Dask gives it up. Read when one is lost
# Worker processes are forked from one that has loaded what they import, so that one comes, and comes back, in a second: torch and Dask
# take three to load. It ends with this process, and serves all labs of it. Not on macOS, whose frameworks must not be loaded in a process that forks.
FORKED = {"distributed.worker.multiprocessing-method": "forkserver"} if sys.platform == "linux" else {}
LOADED = ("distributed", "torch", "torch._dynamo", "labkit.training.worker.worker", "labkit.cluster.dask_backend")
LEASE_S = 5.0  # the longest wait for a worker's answer about a lease
SETTINGS = {  # what Dask should do otherwise in a cluster of ours
    "distributed.worker.profile.enabled": False,  # it samples every 10 ms and would be timed too
    "distributed.admin.system-monitor.gil.enabled": False,
    "distributed.admin.tick.interval": "1s",  # every 20 ms, each worker and the kernel lose 1.5 % of a core
    "distributed.scheduler.worker-ttl": None,  # a long step that holds the GIL is no dead worker
}
UNSET = "LABKIT_UNSET"  # in a worker's environment: the variables that it is to forget
_begun: set[str] = set()  # tasks that have begun in this process
_named: set[str] = set()  # the variables that the environment of this process had when a lab was opened


class Held:
    """Settings of Dask while any lab of this process needs them: labs are closed in any order."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings, self.n, self.lock, self.undo = settings, 0, threading.Lock(), contextlib.ExitStack()

    def __enter__(self) -> None:
        import dask

        with self.lock:
            self.n += 1
            if self.n == 1:
                self.undo.enter_context(dask.config.set(self.settings))

    def __exit__(self, *exc: object) -> None:
        with self.lock:
            self.n -= 1
            if self.n == 0:
                self.undo.close()


_restarting, _forking = Held(RESTART), Held(FORKED)


class DaskWorkers:
    """The workers of a Dask cluster, which `close` ends if they were started here.

    `owned` is what to close, the client first; `scratch` is a folder that goes with them; `settings` are of Dask, and are undone with
    them.
    """

    def __init__(
        self,
        client: Any,
        cluster: Any = None,
        owned: Iterable[Any] = (),
        resources: Mapping | None = None,
        scratch: Scratch | None = None,
        settings: contextlib.ExitStack | None = None,
    ) -> None:
        self.client, self.cluster, self.owned, self.resources, self.scratch = client, cluster, list(owned), resources, scratch
        self.closed = False
        self.holders: Callable[[], list[str]] = list  # the runs that hold workers; the lab says it
        if isinstance(client, _client_class()):
            client.labkit_holders = lambda: self.holders()
        self._known: dict[str, str] = {}
        self._question: tuple[concurrent.futures.Future, float] | None = None
        self._asked = -ASK_S
        self._asking = threading.Lock()
        self._describing: list[concurrent.futures.Future] = []
        self._leased: dict[str, set[str]] = {}  # holder -> worker ids
        self._settings = settings or contextlib.ExitStack()
        if cluster is not None:
            self._settings.enter_context(_restarting)

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
        if self.closed:
            return {}
        if self.in_process:
            # At once, as its own thread adds and removes workers meanwhile: what it holds is a dict that yields its values by their keys.
            states = list(dict.values(self.client.cluster.scheduler.workers))
            return {f"{s.address} {s.local_directory}": s.name for s in states if self._has_resources(s.resources)}
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
                f"{address} {about['local_directory']}": about["name"]
                for address, about in workers.items()
                if self._has_resources(about["resources"])
            }
        return self._known

    def describe(self, id: str) -> concurrent.futures.Future:
        async def ask() -> About:  # it is the event loop of the worker that answers, so a busy one does too
            return (await self.client._run(describe, workers=[_address(id)]))[_address(id)]

        self._describing = [future for future in self._describing if not future.done()] + [self._ask(ask())]
        return self._describing[-1]

    def submit(self, id: str, pid: int, fn: Any, args: tuple) -> Any:
        from distributed import Client

        return Client.submit(
            self.client,
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

        with dask.config.set(SETTINGS):
            self.cluster.scale(len(self.cluster.plan) + n)

    def lease(self, ids: Iterable[str], holder: str, name: str, path: str = "") -> dict[str, Lease]:
        if self.client.scheduler.address.startswith("inproc"):
            return {}  # no other process can reach it
        ids = sorted(set(ids) - self._leased.get(holder, set()))
        others = lease_all(ids, Lease(holder, name, path), self._ask_each)
        if not others:
            self._leased.setdefault(holder, set()).update(ids)
        return others

    def release(self, holder: str) -> None:
        with contextlib.suppress(ClusterError):  # the scheduler is gone, and its workers with it
            self._ask_each(sorted(self._leased.pop(holder, set()) & set(self.alive())), give_back, holder)

    def _ask_each(self, ids: Iterable[str], fn: Any, *args: Any) -> dict[str, Any]:
        """What `fn(*args)` returns on each worker, in its event loop; None of one that does not answer."""

        async def one(id: str) -> Any:
            with contextlib.suppress(Exception):  # frozen, or gone
                return (await asyncio.wait_for(self.client._run(fn, *args, workers=[_address(id)]), LEASE_S))[_address(id)]

        async def each() -> dict[str, Any]:
            return dict(zip(ids, await asyncio.gather(*map(one, ids)), strict=True))

        try:
            return self._ask(each()).result(2 * LEASE_S) if ids else {}
        except (OSError, RuntimeError, concurrent.futures.CancelledError) as error:
            raise ClusterError(f"the Dask scheduler does not answer: {error or type(error).__name__}.") from error

    def trouble(self) -> str:
        return ""

    def close(self) -> None:
        if self.closed:
            return
        for holder in list(self._leased):
            self.release(holder)
        self.closed = True
        for future in [*self._describing, *(self._question or ())[:1]]:
            future.cancel()
        for nanny in getattr(self.cluster, "workers", {}).values():  # a frozen worker does not handle the request to end
            if pid := getattr(getattr(nanny, "process", None), "pid", None):
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGCONT)
        with quiet():
            for thing in self.owned:
                thing.close(timeout=10)
        self._settings.close()
        if self.scratch:
            self.scratch.close()

    def _has_resources(self, has: dict) -> bool:
        return all(has.get(name, 0) >= amount for name, amount in (self.resources or {}).items())

    def _ask(self, coroutine: Any) -> concurrent.futures.Future:
        try:
            return asyncio.run_coroutine_threadsafe(coroutine, self.client.loop.asyncio_loop)
        except RuntimeError:  # the loop is closed
            coroutine.close()
            raise


def _address(id: str) -> str:
    return id.split(" ", 1)[0]


@functools.cache
def _client_class() -> type:
    """A Dask client that says when what users give to it has to wait for a run, which has the one task of each of its workers."""
    from distributed import Client

    class LabClient(Client):
        labkit_holders: Callable[[], list[str]] = list
        labkit_said: tuple[str, ...] = ()

        def _labkit_tell(self) -> None:
            names = tuple(self.labkit_holders())
            if names and names != self.labkit_said:
                print(
                    f"{' and '.join(map(repr, names))} holds workers of this lab, which do one task at a time: what is given to this client "
                    "waits until that has ended (run.wait(), or run.stop()), unless another worker is free."
                )
            self.labkit_said = names

        def submit(self, *args: Any, **kwargs: Any) -> Any:
            self._labkit_tell()
            return super().submit(*args, **kwargs)

        def map(self, *args: Any, **kwargs: Any) -> Any:
            self._labkit_tell()
            return super().map(*args, **kwargs)

        def compute(self, *args: Any, **kwargs: Any) -> Any:
            self._labkit_tell()
            return super().compute(*args, **kwargs)

        def persist(self, *args: Any, **kwargs: Any) -> Any:
            self._labkit_tell()
            return super().persist(*args, **kwargs)

    LabClient.__name__ = LabClient.__qualname__ = "Client"
    return LabClient


def check(request: Request) -> None:
    """Does this request make sense to Dask?"""
    if request.profile is not None or made_by(request.client, "ipyparallel") or request.engines != "local":
        raise ClusterError(f"profile, engines and an ipyparallel Client go with kind='ipyparallel', not with {request.kind!r}.")
    if request.client is not None and not any(hasattr(request.client, has) for has in ("scheduler_address", "scheduler_info")):
        given = request.client
        what = f"the class {given.__name__}" if isinstance(given, type) else type(given).__name__
        raise ClusterError(
            f"client={given!r:.80} must be a Dask Client or cluster object, not {what}. The address of a scheduler is given as address=..., "
            "engines as client=ipyparallel.Client(...) or profile=..., and labkit.connect(n_workers=2) starts workers here."
        )
    if request.security is not None and request.address is None:
        raise ClusterError("security goes with address='tls://...'; a Client or cluster object has its own.")
    if request.security is not None and not (
        hasattr(request.security, "get_connection_args") or isinstance(request.security, Mapping)
    ):
        raise ClusterError(
            f"security={request.security!r:.80} must be a distributed.Security, not {type(request.security).__name__}."
        )
    request.refuse_job()
    if request.kind == "dask" and not request.joins:
        _check_guard()


def _check_guard() -> None:
    """Refuse a script that starts workers in what it does when it is imported, as each worker process imports it, too.

    The line of the script is looked up from which this call comes; where an earlier `if` asks for `__name__`, it may have left
    the script, and then it is the worker's import that is refused.
    """
    main = sys.modules["__main__"]
    vars(main).setdefault("__spec__", None)  # multiprocessing needs it, and %reset in a notebook deletes it
    script = getattr(main, "__file__", None) or ""
    why = (
        f"each worker process imports {os.path.basename(script)} when it starts, and so would start workers itself. Put what the "
        "script does under `if __name__ == \"__main__\":`, or connect(kind='threads')."
    )
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise ClusterError(why)
    imports = multiprocessing.spawn.get_preparation_data("worker")  # what a worker process does at first
    if "init_main_from_path" not in imports and imports.get("init_main_from_name", ".__main__").endswith(".__main__"):
        return
    frame, line = sys._getframe(), 0
    while frame := frame.f_back:
        if frame.f_globals is main.__dict__ and frame.f_code.co_name == "<module>" and frame.f_code.co_filename == script:
            line = frame.f_lineno
    try:
        tree = parsed(ast.parse, Path(script).read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    asks = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)]
    if line and not any(asked <= line for asked in asks):
        raise ClusterError(f"line {line} starts workers, but {why}")


def open(request: Request) -> DaskWorkers:
    """The workers of a running cluster, or of one that is started on this machine, in threads or in processes of their own."""
    if request.joins:
        return join_cluster(request)
    import dask
    from distributed import LocalCluster
    from distributed.utils import get_mp_context

    scratch = Scratch("labkit-")
    changes = {
        "distributed.comm.timeouts.connect": f"{request.timeout:g}s",
        "temporary-directory": str(scratch.path),  # the scheduler's; the workers' is local_directory
    }
    processes = request.kind != "threads"
    forked, settings = processes and bool(FORKED), contextlib.ExitStack()
    apart = {
        "host": "127.0.0.1",
        "env": (_environment() if forked else {}) | dict.fromkeys(THREAD_VARIABLES, str(request.threads)),
        "preload": ["labkit.cluster.dask_backend"],  # calls dask_setup there
    }
    try:
        if forked:
            settings.enter_context(_forking)  # read when a worker is started again, too
            get_mp_context().set_forkserver_preload(list(LOADED))
        with dask.config.set(SETTINGS | changes):
            cluster = LocalCluster(
                n_workers=request.n_workers,
                threads_per_worker=1,  # one task at a time; torch's threads are set by the worker
                processes=processes,
                dashboard_address="127.0.0.1:0",
                memory_limit=None,
                local_directory=str(scratch.path),
                silence_logs=logging.CRITICAL,
                resources=request.resources,
                **(apart if processes else {}),
            )
            return own_cluster(cluster, request, scratch, settings)
    except BaseException as error:
        settings.close()
        scratch.close()
        if processes and type(error) is RuntimeError:  # "Nanny failed to start."
            guard = 'A script has to do its work under `if __name__ == "__main__":`, as each worker process imports it.'
            raise ClusterError(f"Dask could not start the worker processes: {error} {guard}") from error
        raise


def _environment() -> dict[str, str]:
    """Of a worker that is forked: as this process has it now, whatever it was when the process was started from which they are forked."""
    _named.update(os.environ)
    return {**os.environ, UNSET: "\n".join(_named - set(os.environ) - set(THREAD_VARIABLES))}


def own_cluster(
    cluster: Any, request: Request, scratch: Scratch | None = None, settings: contextlib.ExitStack | None = None
) -> DaskWorkers:
    """A cluster object that was made for this lab and ends with it."""
    try:
        client = _client_class()(cluster, timeout=request.timeout, set_as_default=False)
    except BaseException:
        cluster.close()
        raise
    return DaskWorkers(client, cluster, [client, cluster], request.resources, scratch, settings)


def join_cluster(request: Request) -> DaskWorkers:
    """A cluster that is there already: by the address of its scheduler, by a file with it, by a Client or cluster object."""
    from distributed import Client

    if isinstance(request.client, Client):
        return DaskWorkers(request.client, resources=request.resources)
    address, security, timeout = request.address, request.security, request.timeout
    target = request.client if request.client is not None else address
    if address and address.endswith(".json"):
        target, limit = None, time.monotonic() + timeout
        while target is None:
            with contextlib.suppress(OSError, ValueError, KeyError):  # not written yet, or half
                target = json.loads(Path(address).read_text())["address"]
            if target is None and time.monotonic() > limit:
                raise ClusterError(f"no scheduler file appeared at {Path(address).absolute()} in {timeout:g} s. Is the cluster up?")
            time.sleep(0.05)
    if security is None and isinstance(target, str) and target.startswith("tls://"):
        raise ClusterError(f"{target} uses TLS. Give connect() its certificates: security=distributed.Security(...).")
    try:
        client = _client_class()(
            target, timeout=timeout, set_as_default=False, **({"security": security} if security is not None else {})
        )
    except (OSError, ValueError) as error:
        raise ClusterError(f"no Dask scheduler answers at {target}: {error}.") from error
    return DaskWorkers(client, owned=[client], resources=request.resources)


def dask_setup(worker: Any) -> None:
    """Called by Dask in each worker process: an interrupt of the notebook, sent to the process group, stops the kernel alone.

    Those that are forked from one process begin with random numbers of their own, as Python's are, and with the environment and the
    number of threads of their lab.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    np.random.seed()
    if (unset := os.environ.pop(UNSET, None)) is not None:
        for name in unset.split("\n"):
            os.environ.pop(name, None)
        if torch := sys.modules.get("torch"):  # it was loaded for any number
            torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def _only_once(token: str, pid: int, fn: Any, *args: Any) -> Any:
    """Runs on a worker. Dask runs a task again when its worker was lost; for a long task with effects that would be wrong."""
    if token in _begun or os.getpid() != pid:
        raise Again(f"process {pid} was lost while its task ran; it is not run again.")
    _begun.add(token)
    with at_work():
        return fn(*args)
