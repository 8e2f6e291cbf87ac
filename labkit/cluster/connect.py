"""connect(): from a request, in the words of a notebook, to a `Lab`.

    threads       Dask's in-process cluster: starts at once, 1 GB is enough (Binder, tests)
    dask          local worker processes; or any scheduler by address; or a Client or cluster object handed in
    ipyparallel   local engines, also under MPI; or those of a running cluster, by its profile or a Client
    slurm         Dask workers as jobs of a batch system

There is one lab in a process: the same request gives the same lab again, a changed one closes it first.

Used by every notebook.
"""

from __future__ import annotations

import atexit
import difflib
import inspect
import math
import os
import shutil
import tempfile
import threading
from collections.abc import Sequence
from typing import Any

from labkit.cluster.dask_backend import join_cluster, own_cluster, quiet, start_local
from labkit.cluster.emulation import make_stalls, opposite
from labkit.cluster.lab import Lab
from labkit.errors import ClusterError

KINDS = ("threads", "dask", "ipyparallel", "slurm")
ENGINES = ("local", "mpi")
_current: tuple[tuple, Lab] | None = None  # the lab of this process, and the request that made it
_connecting = threading.Lock()


def connect(
    kind: str | None = None,
    n_workers: int | None = None,
    *,
    threads_per_worker: int = 1,
    slowdown: Sequence[float] | None = None,
    jitter: float = 0.0,
    drift: float = 0.0,
    stalls: Sequence[float] | None = None,
    address: str | None = None,
    client: Any = None,
    security: Any = None,
    resources: dict[str, float] | None = None,
    engines: str = "local",
    profile: str | None = None,
    timeout: float = 60.0,
    **job: Any,
) -> Lab:
    """Connect to workers, starting them where none are given.

    The same request in one kernel gives the same lab; a changed one closes the old lab first.

    Parameters
    ----------
    kind
        "threads" (in this process), "dask" (processes), "ipyparallel" (engines) or "slurm" (jobs). Default: "dask", or "threads"
        where LABKIT_SMALL is set, as on Binder; `client` and `profile` tell by themselves.
    n_workers
        How many; 2 by default, and all of them for a cluster that runs already.
    threads_per_worker
        torch threads of each worker.
    slowdown
        Emulated slowness, one factor of at least 1 for each worker: `[1, 4]` makes worker 1 four times slower.
    jitter
        Standard deviation of the logarithm of a random factor on every step's emulated duration; 0 is none. No step is quicker than
        the worker is without emulation, so jitter makes a worker without slowdown slower on average, too.
    drift
        Seconds of a period in which the slowdown of each worker moves smoothly (its logarithm as a cosine) to that of the worker at
        the other end of the list, and back: who is slow changes while a run goes. 0 is none.
    stalls
        `(every, seconds)`: a worker stands still for `seconds`, at most 30, after times of work that are exponentially distributed
        with a mean of `every` seconds, so that all it does takes 1 + seconds / every times as long. It is alive all the while.
    address, security
        A running Dask scheduler ("tcp://host:8786", or "tls://..." with a `distributed.Security`), or the file
        "scheduler.json" that it has written. Left running at `close`, as are `client` and `profile`.
    client
        A Dask `Client` or cluster object, or an ipyparallel `Client`, of your own.
    resources
        What a Dask worker must have to be taken, and what each task claims there: `{"GPU": 1}`. Local workers start with it.
    engines
        How ipyparallel's engines start: "local", or "mpi" for one MPI job (`pip install labkit[mpi]`, or the system's mpiexec).
    profile
        The IPython profile of an ipyparallel cluster that runs already.
    timeout
        Seconds to wait for the workers.
    job
        For "slurm": what its jobs ask for (see `labkit.cluster.slurm.start_cluster`).

    Raises
    ------
    ClusterError
        The workers did not arrive, or the request makes no sense.
    """
    global _current
    if kind is None:
        kind = _kind(address, client, profile)
    joins = address is not None or client is not None or profile is not None
    _check_numbers(n_workers, threads_per_worker, slowdown, joins)
    stalls = _check_unsteadiness(jitter, drift, stalls, slowdown)
    _check_place(kind, address, client, security, resources, engines, profile, job)
    if n_workers is None and not joins:
        n_workers = 2
    request = (
        kind,
        n_workers,
        threads_per_worker,
        tuple(slowdown or ()),
        jitter,
        drift,
        stalls,
        address,
        id(client),
        id(security),
        repr(resources),
        engines,
        profile,
        repr(sorted(job.items())),
    )
    with _connecting:
        if _current:
            made_for, lab = _current
            if made_for == request and not lab.closed and not lab.broken():
                return lab
            lab.close()
            _current = None
        scratch = None if joins else tempfile.mkdtemp(prefix="labkit-")
        with quiet():
            try:
                backend = None
                if kind == "ipyparallel" and joins:
                    from labkit.cluster.ipyparallel_backend import join_engines

                    backend = join_engines(profile, client, timeout)
                elif kind == "ipyparallel":
                    from labkit.cluster.ipyparallel_backend import start_engines

                    backend = start_engines(n_workers, threads_per_worker, mpi=engines == "mpi", timeout=timeout, scratch=scratch)
                elif joins:
                    backend = join_cluster(address, client, security=security, resources=resources, timeout=timeout)
                elif kind == "slurm":
                    from labkit.cluster import slurm

                    cluster = slurm.start_cluster(n_workers, threads=threads_per_worker, timeout=timeout, **job)
                    backend = own_cluster(cluster, resources=resources, timeout=timeout)
                else:
                    processes = kind != "threads"
                    backend = start_local(
                        n_workers, threads_per_worker, processes=processes, resources=resources, timeout=timeout, scratch=scratch
                    )
                lab = Lab(
                    kind,
                    backend,
                    threads=threads_per_worker,
                    jitter=jitter,
                    drift=drift,
                    stalls=stalls,
                    limit=n_workers if joins else None,
                    scratch=scratch,
                )
                lab.admit(n_workers or len(slowdown or [0]), slowdown, timeout)
            except BaseException:
                if backend:
                    backend.close()
                shutil.rmtree(scratch or "", ignore_errors=True)
                raise
        _current = (request, lab)
    return lab


def current() -> Lab | None:
    """The lab of this process, if one is open."""
    return None if _current is None or _current[1].closed else _current[1]


@atexit.register
def _close_at_exit() -> None:
    if _current:
        _current[1].close()


def _kind(address: str | None, client: Any, profile: str | None) -> str:
    if profile is not None or _is_ipyparallel(client):
        return "ipyparallel"
    return "threads" if os.environ.get("LABKIT_SMALL") and address is None and client is None else "dask"


def _is_ipyparallel(client: Any) -> bool:
    return any(cls.__module__.startswith("ipyparallel.") for cls in type(client).__mro__)


def _check_numbers(n_workers, threads_per_worker, slowdown, joins) -> None:
    if n_workers is not None and (int(n_workers) != n_workers or n_workers < 1):
        raise ClusterError(f"n_workers={n_workers}: a lab needs at least one worker.")
    if int(threads_per_worker) != threads_per_worker or threads_per_worker < 1:
        raise ClusterError(f"threads_per_worker={threads_per_worker}: at least one thread is needed.")
    if slowdown is not None:
        n = n_workers or (None if joins else 2)
        if n is not None and len(slowdown) != n:
            raise ClusterError(f"slowdown has {len(slowdown)} entries for {n} workers. Give one factor for each worker.")
        if not all(factor >= 1 for factor in slowdown):
            raise ClusterError(f"slowdown={list(slowdown)}: a factor below 1 would be a speed-up; 1 is the true speed.")


def _check_unsteadiness(jitter, drift, stalls, slowdown) -> tuple[float, float] | None:
    for name, value in {"jitter": jitter, "drift": drift}.items():
        if not 0 <= value < math.inf:
            raise ClusterError(f"{name}={value} must not be negative." if value < 0 else f"{name}={value} must be finite.")
    try:
        opposite(slowdown or [1.0], drift)
        return make_stalls(stalls)
    except ValueError as error:
        raise ClusterError(str(error)) from None


def _check_place(kind, address, client, security, resources, engines, profile, job) -> None:
    _check_word("kind", kind, KINDS)
    _check_word("engines", engines, ENGINES)
    if kind == "slurm" and job:
        from labkit.cluster import slurm

        for name in job:
            _check_word("connect(kind='slurm') argument", name, tuple(inspect.signature(slurm.start_cluster).parameters))
    elif job:
        raise TypeError(f"connect() has no argument {next(iter(job))!r}; what a job asks for goes with kind='slurm'.")
    if sum(place is not None for place in (address, client, profile)) > 1:
        raise ClusterError(f"give {'address or client' if profile is None else 'profile or client'}, not both.")
    if kind == "ipyparallel" and (address is not None or (client is not None and not _is_ipyparallel(client))):
        raise ClusterError("kind='ipyparallel' finds a running cluster by profile='...', or by an ipyparallel Client: client=...")
    if kind != "ipyparallel" and (profile is not None or _is_ipyparallel(client) or engines != "local"):
        raise ClusterError(f"profile, engines and an ipyparallel Client go with kind='ipyparallel', not with {kind!r}.")
    if security is not None and address is None:
        raise ClusterError("security goes with address='tls://...'; a Client or cluster object has its own.")
    if resources is not None and kind == "ipyparallel":
        raise ClusterError("ipyparallel's engines have no resources; they go with kind='dask'.")


def _check_word(what: str, word: Any, known: Sequence[str]) -> None:
    if word not in known:
        close = difflib.get_close_matches(str(word), known, n=1)
        raise ClusterError(
            f"unknown {what} {word!r}. Known: {', '.join(known)}." + (f" Did you mean {close[0]!r}?" if close else "")
        )
