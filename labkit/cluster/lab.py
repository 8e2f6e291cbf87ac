"""The lab: the connected cluster that runs train on.

A lab can do a few things and no more: list its workers, start a long task pinned to one of them, map independent tasks over
them, tell which are lost and which have come, and lease workers to a run. Whatever else a back end can do stays behind this
(`labkit.cluster.backend` defines a back end).

A worker that comes takes the index of one that was lost, its emulated slowdown and its lease included, or else gets a new index.
A lease is held under the id of a run, as two runs may have one name; messages show the name.

Made by `labkit.cluster.connect`; used by `labkit.training.train`, `labkit.training.supervisor`, `labkit.experiments.sweep` and
every notebook.
"""

import math
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar, NoReturn

from labkit.cards import Card, Carded
from labkit.cluster.backend import About, Answer, Backend, Request, quiet
from labkit.cluster.emulation import Unevenness, opposite, unsteadiness
from labkit.cluster.tasks import Task, spread
from labkit.errors import ClusterError, instance, like, real, several, whole
from labkit.names import Public
from labkit.sources import pack_call

LOCAL = ("threads", "dask", "ipyparallel")  # kinds of labs whose workers are on this machine, unless others have started them
DESCRIBE_S = 1.0  # how long `refresh` waits for a newcomer's description; the next time it looks again


@dataclass(frozen=True)
class Worker:
    """One worker of a lab. `slowdown` is its emulated factor (1 is its true speed), `drifts_to` that of half a period later."""

    index: int
    name: str
    host: str
    device: str
    threads: int
    pid: int
    slowdown: float
    drifts_to: float

    @property
    def here(self) -> bool:
        """Is it a thread of this process?"""
        return self.pid == os.getpid() and self.host == socket.gethostname()


class Lab(Carded, Public, AbstractContextManager):
    """The connected cluster; made by `connect`, closed by `close` or at the end of a `with` block. Closing twice is fine.

    Examples
    --------
    >>> [worker.device for worker in lab.workers]
    ['cpu', 'cpu']
    >>> lab.free()
    [0, 1]
    >>> lab.map(lambda item: item**2, [1, 2, 3])
    [1, 4, 9]
    """

    internal: ClassVar = frozenset(
        (
            "admit",
            "checked",
            "closing",
            "entered",
            "holders",
            "lease",
            "local",
            "one_process",
            "refresh",
            "release",
            "settings",
            "unevenness",
        )
    )

    def __init__(self, request: Request, backend: Backend) -> None:
        self.kind, self.workers, self.closed = request.kind, [], False
        self.closing = False  # from before the first run is stopped, so that whoever holds several knows why they end
        self.local = request.kind in LOCAL and not request.joins  # do its workers end with this process, however it ends?
        self.jitter, self.drift, self.stalls = request.jitter, request.drift, request.stalls
        self.entered = 0  # in how many `with` blocks it is
        self.runs: list[Any] = []  # the runs that train here now, set by labkit.training.train
        self._backend, self._threads = backend, request.threads
        backend.holders = self.holders
        self._limit = request.n_workers if request.joins else None  # on a cluster of others
        self._ids: list[Hashable] = []  # of the back end, by index
        self._visible: list[tuple[str, str]] = []  # host and visible GPUs, by index: who shares them counts devices together
        self._leases: dict[int, str] = {}  # index -> holder
        self._names: dict[str, str] = {}  # holder -> what messages call it
        self._paths: dict[str, str] = {}  # holder -> the directory of its run
        self._arrivals: list[int] = []
        self._added: set[int] = set()  # places in these of the workers that `add` has returned
        self._seen: dict[str, int] = {}  # holder -> how many arrivals it has been given
        self._asked: dict[Hashable, Answer | None] = {}  # newcomers that were asked who they are
        self._lock = threading.RLock()

    @property
    def client(self) -> Any:
        """Dask's or ipyparallel's own client."""
        return self._backend.client

    @property
    def emulated(self) -> bool:
        """Are some workers slower than they are?"""
        return any(self.unevenness(worker.index).on for worker in self.workers)

    def unevenness(self, worker: int) -> Unevenness:
        """How one worker is made slower than it is."""
        slow = self.workers[worker]
        return Unevenness(slow.slowdown, self.jitter, self.drift, slow.drifts_to, self.stalls)

    @property
    def dashboard(self) -> str:
        """Address of Dask's dashboard, or "" where there is none."""
        return "" if self.closed else self._backend.dashboard

    @property
    def one_process(self) -> bool:
        """Are all workers threads of one process?"""
        return len({(worker.host, worker.pid) for worker in self.workers}) == 1 and len(self.workers) > 1

    # -- work ----------------------------------------------------------------------------------------------------

    def start(self, worker: int, fn: Callable, *args: Any) -> Task:
        """Run `fn(*args)` on one worker, however long it takes; it is never moved to another one and never run twice."""
        self._check_open()
        instance("fn", fn, Callable, " such as a function")
        (worker,) = self.checked([worker])
        if worker in self.lost():
            raise ClusterError(f"worker {worker} was lost. connect() again for a full lab.")
        with self._lock:
            id, about = self._ids[worker], self.workers[worker]
            return Task(self._backend.submit(id, about.pid, pack_call(fn, args, about.here), ()), worker, self._backend, id)

    def map(
        self,
        fn: Callable,
        items: Iterable[Any],
        timeout: float = 3600.0,
        workers: Sequence[int] | None = None,
        *,
        placed: bool = False,
        each: Callable[[int, Any], None] | None = None,
    ) -> list[Any]:
        """`[fn(item) for item in items]`, spread over the workers, one item on each at a time; the first exception is raised here.

        Without `workers`, those that no run holds do the work, or all where every one is held. An item whose worker is lost is
        given to another one. With `placed` it is `fn(item, worker)`, the `Worker` telling device, threads and slowdown; `each` is
        called here as `each(number, result)` when an item is done, once for each.
        """
        self._check_open()
        instance("fn", fn, Callable, " such as a function")
        items = list(like("items", items, ("__iter__",), "a list"))
        workers, timeout = None if workers is None else self.checked(workers), real("timeout", timeout, above=0, finite=False)

        def idle() -> set[int]:
            return set(workers if workers is not None else self.free() or range(len(self))) - set(self.lost())

        def start(worker: int, item: Any) -> Task:
            return self.start(worker, fn, item, *((self.workers[worker],) if placed else ()))

        return spread(items, idle, start, timeout, each)

    # -- who is there --------------------------------------------------------------------------------------------

    def lost(self) -> list[int]:
        """Indices of workers that are gone."""
        alive = self._backend.alive()
        return [index for index, id in enumerate(self._ids) if id not in alive]

    def refresh(self, holder: str = "") -> list[int]:
        """Look for workers that have come; the indices of those that are new or back since `holder` looked last.

        A run asks as the holder of its lease, and is given workers that are free or its own. It never waits for long.
        """
        if self.closed:
            return []
        with self._lock:
            self._admit(DESCRIBE_S)
            since = self._seen.get(holder, 0)
            self._seen[holder] = len(self._arrivals)
            here = set(range(len(self))) - set(self.lost())
            return sorted(i for i in {*self._arrivals[since:]} & here if self._leases.get(i, holder) == holder)

    def add(self, n: int = 1, timeout: float = 60.0) -> list[int]:
        """Start n more workers, where this lab started the cluster itself; their indices, once they have come."""
        self._check_open()
        n, timeout = whole("n", n, error=ClusterError), real("timeout", timeout, above=0)
        limit = time.monotonic() + timeout
        with quiet():
            with self._lock:
                before = len(self._arrivals)
                known = len(self) if self._backend.keeps_names else 0  # who comes back to an old index meanwhile is not new
                self._backend.add(n)
            while len(came := self._came(before, known, n)) < n:
                if time.monotonic() > limit:
                    raise ClusterError(f"{len(came)} of {n} new workers came in {timeout:g} s. {self._backend.trouble()}".strip())
                time.sleep(0.05)
                with self._lock:
                    self._admit(DESCRIBE_S)
        return came

    def _came(self, before: int, known: int, n: int) -> list[int]:
        """Those of the arrivals behind `before` that are new, and not of another thread that adds workers, too: n of them, or all if they are
        fewer."""
        with self._lock:
            new = [at for at in range(before, len(self._arrivals)) if self._arrivals[at] >= known and at not in self._added]
            if len(new) >= n:
                self._added.update(new[:n])
            return [self._arrivals[at] for at in new[:n]]

    def admit(self, request: Request) -> None:
        """Wait for the first workers and number them in the order of their names, or of their ranks under MPI."""
        slowdown, timeout = request.slowdown, request.timeout
        wanted, limit = request.n_workers or len(slowdown) or 1, time.monotonic() + timeout
        while len(alive := self._backend.alive()) < wanted:
            if time.monotonic() > limit:
                raise ClusterError(
                    f"{len(alive)} of {wanted} workers arrived in {timeout:g} s. Try connect(n_workers=1, kind='threads'), "
                    f"or give a longer timeout. {self._backend.trouble()}".strip()
                )
            time.sleep(0.03)
        order = sorted(alive, key=lambda id: (_natural(alive[id]), str(id)))
        order = order[: self._limit or len(order)]
        if slowdown and len(slowdown) != len(order):
            raise ClusterError(f"slowdown has {len(slowdown)} entries for {len(order)} workers. Give one factor for each worker.")
        factors = [float(factor) for factor in slowdown or [1] * len(order)]
        slow = list(zip(factors, opposite(factors, self.drift), strict=True))
        asked = {id: self._backend.describe(id) for id in order}
        try:
            about = {id: asked[id].result(timeout=max(1.0, limit - time.monotonic())) for id in order}
        except TimeoutError as error:
            raise ClusterError(f"a worker is there but did not say who it is within {timeout:g} s. Is it frozen?") from error
        for number, id in enumerate(sorted(order, key=lambda id: about[id].rank)):  # stable: without MPI all ranks are 0
            self._list(number, id, alive[id], about[id], slow[number])
        self._arrivals.clear()

    def _admit(self, timeout: float) -> None:
        """Give the workers that have come an index."""
        alive = self._backend.alive()
        unknown = [id for id in alive if id not in self._ids]
        self._asked = {id: asked for id, asked in self._asked.items() if id in unknown}
        lost = [index for index, id in enumerate(self._ids) if id not in alive]
        by_name = {self.workers[index].name: index for index in lost}
        limit = time.monotonic() + timeout
        for id in unknown:
            name = str(alive[id])
            if name in by_name:
                index = by_name[name]
            elif lost and not self._backend.keeps_names:
                index = lost[0]
            elif self._limit is None:
                index = len(self)
            else:
                continue  # on a cluster of others a lab has as many workers as it asked for
            asked = self._asked.get(id)
            if first := asked is None:
                asked = self._asked[id] = self._backend.describe(id)
            while first and not asked.done() and time.monotonic() < limit:
                time.sleep(0.01)
            if not asked.done():
                continue  # perhaps it is frozen; it is looked at again the next time
            try:
                about = asked.result(timeout=1.0)
            except Exception:  # it has died meanwhile
                self._asked[id] = None
                continue
            holder = self._leases.get(index)
            if holder and self._backend.lease([id], holder, self._names[holder], self._paths[holder]):
                continue  # another notebook was quicker
            before = self.workers[index] if index < len(self) else None
            self._list(index, id, name, about, (before.slowdown, before.drifts_to) if before else (1.0, 1.0))
            lost = [other for other in lost if other != index]
            by_name.pop(name, None)

    def _list(self, index: int, id: Hashable, name: Any, about: About, slow: tuple[float, float]) -> None:
        host, pid, gpus, visible, _ = about
        if self._visible[index : index + 1] == [(host, visible)]:
            device = self.workers[index].device
        else:
            rank = sum(sees == (host, visible) for other, sees in enumerate(self._visible) if other != index)
            device = f"cuda:{rank % gpus}" if gpus else "cpu"
        worker = Worker(index, str(name), host, device, self._threads, pid, *slow)
        for known, new in ((self._ids, id), (self._visible, (host, visible)), (self.workers, worker)):
            known[index : index + 1] = [new]  # in the place of the one before, or at the end
        self._arrivals.append(index)

    # -- leases --------------------------------------------------------------------------------------------------

    def lease(self, workers: Iterable[int], holder: str, name: str = "", path: str = "") -> None:
        """Lease workers to one holder, all of them or, with a `ClusterError` that names the holders, none.

        `holder` is the id of a run, `name` what messages call it, `path` its directory. On a cluster that other notebooks use the
        lease is the run's: it lasts while that lives, also when this kernel dies.
        """
        self._check_open()
        workers = sorted(set(self.checked(workers)))
        with self._lock:
            name, path = name or self._names.get(holder, holder), path or self._paths.get(holder, "")
            held = {index: self._names[other] for index in workers if (other := self._leases.get(index, holder)) != holder}
            if not held:
                gone = set(self.lost())
                others = self._backend.lease([self._ids[index] for index in workers if index not in gone], holder, name, path)
                held = {index: others[id] for index in workers if (id := self._ids[index]) in others}
            if held:
                who = ", ".join(f"worker {index} by {other!r}" for index, other in held.items())
                there = dict.fromkeys(filter(None, (getattr(other, "path", "") for other in held.values())))
                how = "".join(
                    f" Stop it: labkit.load_run({at!r}).attach().stop(); its card then has the call that goes on with it."
                    for at in there
                )
                raise ClusterError(f"workers are held: {who}. Wait for that run, stop it, or train on others: workers=[...].{how}")
            self._seen.setdefault(holder, len(self._arrivals))
            self._names[holder], self._paths[holder] = name, path
            self._leases.update(dict.fromkeys(workers, holder))

    def release(self, holder: str) -> None:
        """Give back what the holder has; twice is fine."""
        with self._lock:
            self._leases = {index: other for index, other in self._leases.items() if other != holder}
            self._seen.pop(holder, None)
            self._names.pop(holder, None)
            self._paths.pop(holder, None)
            if not self.closed:
                self._backend.release(holder)

    def holders(self) -> list[str]:
        """The names of the runs and searches that hold workers; none once it is closed."""
        with self._lock:
            return [] if self.closed else list(dict.fromkeys(self._names[holder] for holder in self._leases.values()))

    def free(self, holder: str = "") -> list[int]:
        """Indices of workers that are there, those that have come meanwhile too, and that no run holds, or `holder` itself."""
        with self._lock:
            self._admit(0.0)
        gone = set(self.lost())
        return [index for index in range(len(self)) if index not in gone and self._leases.get(index, holder) == holder]

    # -- the end, and how it looks -------------------------------------------------------------------------------

    def close(self) -> None:
        """End the workers that this lab started; a cluster that was handed in stays as it was."""
        if self.closed:
            return
        self.closing = True
        for run in list(self.runs):
            run.stop()
        self.closed = True
        self._backend.close()

    def __len__(self) -> int:
        return len(self.workers)

    def __enter__(self) -> "Lab":
        self.entered += 1
        return self

    def __exit__(self, *exc: object) -> None:
        self.entered -= 1
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a lab holds connections of the process that made it, and stays there. In code for workers leave it out: give them what "
            "they need of it, such as n = len(lab)"
        )

    def __repr__(self) -> str:
        if self.closed:
            return f"<Lab {self.kind}, closed>"
        lines = [f"Lab: {len(self.workers)} workers ({self.kind})" + (f", dashboard {self.dashboard}" if self.dashboard else "")]
        lines += [f"  emulated: {ways}" for ways in [unsteadiness(self.jitter, self.drift, self.stalls)] if ways]
        for worker in self.workers:
            drifts = f", drifting to {worker.drifts_to:g}x" if worker.drifts_to != worker.slowdown else ""
            slow = f", emulated {worker.slowdown:g}x slower{drifts}" if worker.slowdown != 1 or drifts else ""
            lines.append(
                f"  worker {worker.index}: {worker.host}, pid {worker.pid}, {worker.device}, {worker.threads} torch thread(s){slow}"
            )
        return "\n".join(lines)

    def _card(self) -> Card:
        if self.closed:
            return Card(f"Lab: {self.kind}, closed", calls={"labkit.connect(...)": "connects again"})
        rows = {"emulated": ways} if (ways := unsteadiness(self.jitter, self.drift, self.stalls)) else {}
        rows |= {"dashboard": self.dashboard} if self.dashboard else {}
        rows |= {"training": ", ".join(run.name for run in self.runs)} if self.runs else {}
        lost, workers = set(self.lost()), []
        for worker in self.workers:
            drifts = f", drifting to {worker.drifts_to:g}x" if worker.drifts_to != worker.slowdown else ""
            row = {
                "worker": worker.index,
                "host": worker.host,
                "device": worker.device,
                "threads": worker.threads,
                "process": str(worker.pid),
            }
            row |= {"emulated": f"{worker.slowdown:g}x slower{drifts}"} if worker.slowdown != 1 or drifts else {}
            workers.append(row | ({"state": "lost"} if worker.index in lost else {}))
        calls = {"labkit.train(problem, lab)": "trains on it", "lab.close()": "ends what was started here"}
        n = len(self.workers)
        return Card(f"Lab: {n} worker{'s' * (n != 1)} ({self.kind})", rows=rows, table=workers, calls=calls)

    def settings(self, workers: Sequence[int]) -> dict[str, Any]:
        """Where a run on these workers goes, by the names of `labkit.runs.config.RunConfig`."""
        workers = self.checked(workers)
        return {
            "kind": self.kind,
            "n_workers": len(workers),
            "workers": [asdict(self.workers[index]) for index in workers],
            "one_process": self.one_process,
            "jitter": self.jitter,
            "drift": self.drift,
            "stalls": self.stalls,
            "emulated": self.emulated,
        }

    def table(self):
        """The workers as a DataFrame, one row each."""
        import pandas as pd

        return pd.DataFrame([asdict(worker) for worker in self.workers]).set_index("index")

    def _check_open(self) -> None:
        if self.closed:
            raise ClusterError("this lab is closed. Run the cell with connect() again.")

    def checked(self, workers: Iterable[int]) -> list[int]:
        """Indices of workers that this lab has, as ints."""
        workers = several("workers", workers, partial(whole, least=-math.inf, most=math.inf, error=ClusterError), ClusterError)
        for worker in workers:
            if not 0 <= worker < len(self):
                raise ClusterError(f"there is no worker {worker}; this lab has workers 0 to {len(self) - 1}.")
        return workers


def _natural(name: Any) -> list[str | int]:
    """Sorts worker 10 behind worker 9, and node-10 behind node-9."""
    return [int(part) if at % 2 else part for at, part in enumerate(re.split(r"(\d+)", str(name)))]
