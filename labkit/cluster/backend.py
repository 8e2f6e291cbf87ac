"""The interface of back ends, which manage the workers of a lab and run functions on them.

A back end is a module with two functions, and a line in `labkit.cluster.connect.BACKENDS`:

    check(request)              a `ClusterError` where a request makes no sense here; starts nothing
    open(request) -> Backend    start workers, or join those that are there already

Workers have ids that are never reused: a worker started again after a loss is another process, with another id.
Nothing here waits without a limit, and all of it may be called from several threads at once.

Implemented by `labkit.cluster.dask_backend` (also for `labkit.cluster.slurm`) and `labkit.cluster.ipyparallel_backend`; used by
`labkit.cluster.lab` and `labkit.cluster.connect`.
"""

import glob
import logging
import os
import socket
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, Protocol

from labkit.errors import ClusterError
from labkit.names import where_given

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
RANK_VARIABLES = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK")


@dataclass(frozen=True)
class Request:
    """What `labkit.connect` was asked for (its docstring says what each setting means); the numbers in it have been checked.

    Two that are equal ask for the same lab.
    """

    kind: str
    n_workers: int | None = None  # None: all that there are
    threads: int = 1
    slowdown: tuple[float, ...] = ()
    jitter: float = 0.0
    drift: float = 0.0
    stalls: tuple[float, float] | None = None
    address: str | None = None
    client: Any = None
    security: Any = None
    resources: Mapping[str, float] | None = None
    engines: str = "local"
    profile: str | None = None
    name: str = "lab"
    timeout: float = field(default=60.0, compare=False)
    job: Mapping[str, Any] = field(default_factory=dict)

    @property
    def joins(self) -> bool:
        """Are the workers there already, started by somebody else?"""
        return self.address is not None or self.client is not None or self.profile is not None

    def refuse_job(self) -> None:
        """For `check` of a back end that has no settings of its own."""
        for name in self.job:
            names = [about.name for about in fields(self) if about.name not in ("threads", "job")]
            advice = where_given(name, [*names[:2], "threads_per_worker", *names[2:]])
            raise TypeError(f"connect() has no argument {name!r}; what a job asks for goes with kind='slurm'.{advice}")


class About(NamedTuple):
    """What is known of a worker, as `describe` finds it there."""

    host: str
    pid: int
    gpus: int  # how many there are
    visible: str  # which of them it may see: CUDA_VISIBLE_DEVICES
    rank: int  # under MPI; else 0


class Answer(Protocol):
    """A result that is on its way."""

    def done(self) -> bool: ...
    def result(self, timeout: float) -> Any:
        """The result, or the exception that was raised instead; TimeoutError when it is not there in time."""


class TaskAnswer(Answer, Protocol):
    """That of a function that was submitted."""

    def exception(self, timeout: float) -> BaseException | None: ...
    def release(self) -> None:
        """Take the function back if it has not begun; forget its result otherwise."""


class Backend(Protocol):
    """The workers of one lab."""

    client: Any  # Dask's or ipyparallel's own; None where there is none
    dashboard: str  # address of one; "" where there is none
    holders: Callable[[], list[str]]  # set by the lab: the names of the runs that hold workers
    keeps_names: bool  # does a worker that was killed come back by itself, under its old name?

    def alive(self) -> Mapping[Hashable, str]:
        """{id: name} of the workers that are there now, a second old at most; none after `close`."""

    def describe(self, id: Hashable) -> Answer:
        """An `About`: what `describe` returns there, also while a task is at work."""

    def submit(self, id: Hashable, pid: int, fn: Callable, args: tuple) -> TaskAnswer:
        """fn(*args) on this worker, in this process, one at a time, and never twice."""

    def add(self, n: int) -> None:
        """Start n more workers; a `ClusterError` where this back end started none."""

    def lease(self, ids: Iterable[Hashable], holder: str, name: str, path: str = "") -> Mapping[Hashable, Any]:
        """Lease workers to a holder in the sight of other notebooks, all or none; {id: who holds it}, if others do.

        `holder` identifies the holder, `name` is what others read of it; `path` is the directory of its run. The lease ends with
        the run (`labkit.cluster.leases`), also where this kernel dies.
        """

    def release(self, holder: str) -> None:
        """Give back what the holder has leased; twice is fine."""

    def trouble(self) -> str:
        """Why no workers come, if that is known; else ""."""

    def close(self) -> None:
        """End what was started here, and nothing else; twice is fine."""


class Again(ClusterError):
    """A task was about to be run a second time, after its worker was lost."""


def describe() -> About:
    """Runs on a worker. torch is asked for GPUs only where there is a driver for one."""
    gpus = 0
    if glob.glob("/dev/nvidia[0-9]*"):
        import torch

        gpus = torch.cuda.device_count()
    rank = next((int(os.environ[name]) for name in RANK_VARIABLES if name in os.environ), 0)
    return About(socket.gethostname(), os.getpid(), gpus, os.environ.get("CUDA_VISIBLE_DEVICES", ""), rank)


def made_by(thing: Any, package: str) -> bool:
    """Is this an object of a package? Asked by name, as the package need not be loaded, or installed."""
    return any(cls.__module__.partition(".")[0] == package for cls in type(thing).__mro__)


_levels: dict[str, int] = {}  # of the loggers that are quiet: as it was before
_inside = [0]
_quieting = threading.Lock()


@contextmanager
def quiet() -> Iterator[None]:
    """Dask logs a lot about workers that come and go; in a notebook that reads like failure. Several threads may be inside at once."""
    with _quieting:
        _inside[0] += 1
        below = [name for name in list(logging.root.manager.loggerDict) if name.startswith("distributed.")]
        for name in ("distributed", "tornado", "asyncio", "bokeh", *below):
            _levels.setdefault(name, logging.getLogger(name).level)
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        with _quieting:
            _inside[0] -= 1
            if not _inside[0]:
                for name, level in _levels.items():
                    logging.getLogger(name).setLevel(level)
                _levels.clear()
