"""connect(): from a request, in the words of a notebook, to a `Lab`.

    threads       Dask's in-process cluster: starts at once, 1 GB is enough (Binder, tests)
    dask          local worker processes; or any scheduler by address; or a Client or cluster object handed in
    ipyparallel   local engines, also under MPI; or those of a running cluster, by its profile or a Client
    slurm         Dask workers as jobs of a batch system

There is one lab of each name in a process: the same request gives the same lab again, a changed one closes it first, unless a run trains
on it (an error then) or it is in its `with` block (both stay open then).

Used by every notebook.
"""

import atexit
import contextlib
import importlib
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any

from labkit.cluster.backend import Request, made_by, quiet
from labkit.cluster.emulation import jitter_of, make_stalls, opposite, slowdown_of
from labkit.cluster.lab import Lab
from labkit.cluster.notice import telling
from labkit.errors import LONGEST_WAIT_S, ClusterError, file_path, instance, known, real, several, text, whole
from labkit.imports import imported

MOST_WORKERS = 1 << 16  # as many as a run can have; and threads of one
BACKENDS = {  # kind -> module with `check` and `open`, which is loaded when it is asked for (`labkit.cluster.backend`)
    "threads": "labkit.cluster.dask_backend",
    "dask": "labkit.cluster.dask_backend",
    "ipyparallel": "labkit.cluster.ipyparallel_backend",
    "slurm": "labkit.cluster.slurm",
}
UNFINISHED = "labkit.runs.unfinished:tell"  # says which runs of an earlier kernel or script there are; this layer knows no runs
_labs: dict[str, tuple[Request, Lab]] = {}  # by name, the labs of this process and the requests that made them, the latest last
_beside: list[Lab] = []  # labs whose name another one has taken while they were in their `with` blocks
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
    name: str = "lab",
    timeout: float = 60.0,
    **job: Any,
) -> Lab:
    """Connect to workers, starting them where none are given.

    The same request in one kernel gives the same lab; a changed one closes the old lab first. A lab on which a run trains is not closed
    by that: it is an error that says how to end it, or how to have both (`name`). A lab in its `with` block stays open, too.

    In a notebook a line is printed for each run in the folder "runs" that goes on or was cut off, and that another kernel has started, the
    one before a restart for instance, with the call that follows or continues it. A script in a terminal has the first of them on standard
    error, and how many more there are.

    Parameters
    ----------
    kind
        "threads" (in this process), "dask" (processes), "ipyparallel" (engines) or "slurm" (jobs). Default: "dask", or "threads"
        where LABKIT_SMALL is set, as on Binder; `client` and `profile` imply it.
    n_workers
        How many; 2 by default, and all of them for a cluster that runs already.
    threads_per_worker
        torch threads of each worker.
    slowdown
        Emulated heterogeneity, one factor of at least 1 for each worker: `[1, 4]` makes worker 1 four times slower.
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
        A Dask `Client` or cluster object, or an ipyparallel `Client`, of your own. What you give to a Dask `Client` of your own while a run
        trains waits for a free thread of a worker, as the task of the run is one, without a word: it is yours, and no method of it is
        replaced. `lab.client` of a lab that labkit has made, or joined by `address`, says so.
    resources
        What a Dask worker must have to be taken, and what each task claims there: `{"GPU": 1}`. Local workers start with it.
    engines
        How ipyparallel's engines start: "local", or "mpi" for one MPI job (`pip install labkit[mpi]`, or the system's mpiexec).
    profile
        The IPython profile of an ipyparallel cluster that runs already.
    name
        Which lab of this kernel: labs of two names are open side by side, `connect(...)` and `connect(..., name="second")`.
    timeout
        Seconds to wait for the workers.
    job
        What one kind alone asks for; with "slurm" what its jobs ask for (see `labkit.cluster.slurm.start_cluster`).

    Raises
    ------
    ClusterError
        The workers did not arrive, the request makes no sense, or it is another one than that of a lab on which a run trains.

    Examples
    --------
    >>> with labkit.connect("threads", 2, slowdown=[1, 4]) as uneven:
    ...     uneven.table()["slowdown"].tolist()
    [1.0, 4.0]
    """
    if isinstance(client, type):
        raise ClusterError(_of_class(client))
    if isinstance(kind, Integral) and not isinstance(kind, bool):
        raise ClusterError(f"kind={kind!r} is not known. Known: {', '.join(BACKENDS)}. Did you mean connect(n_workers={kind})?")
    kind = known("kind", _kind(address, client, profile) if kind is None else kind, BACKENDS, error=ClusterError)
    joins = sum(there is not None for there in (address, client, profile))
    if joins > 1:
        raise ClusterError(f"give {'address or client' if profile is None else 'profile or client'}, not both.")
    n_workers = 2 if n_workers is None and not joins else n_workers
    uneven = {"slowdown": slowdown, "jitter": jitter, "drift": drift, "stalls": stalls}
    there = {"address": address, "client": client, "security": security, "profile": profile, "engines": engines}
    how = {"threads": threads_per_worker, "resources": resources, "name": name, "timeout": timeout, "job": job}
    request = _checked(Request(kind, n_workers, **uneven, **there, **how))
    module, name = importlib.import_module(BACKENDS[kind]), request.name
    module.check(request)
    with _connecting:
        if name in _labs:
            made_for, lab = _labs[name]
            if made_for == request and not lab.closed and (not (lost := lab.lost()) or _is_at_work(lab, lost)):
                _labs[name] = _labs.pop(name)
                return lab
            _make_room(name, lab)
        with quiet(), telling(f"Connecting to the workers ({kind})."):
            backend = module.open(request)
            try:
                lab = Lab(request, backend)
                lab.admit(request)
            except BaseException:
                backend.close()
                raise
        _labs[name] = request, lab
    imported(UNFINISHED)()
    return lab


def _is_at_work(lab: Lab, lost: Sequence[int]) -> bool:
    """Does a run go on without the workers that are lost? Then it keeps its lab, which is said."""
    if not (names := lab.holders()):
        return False
    print(
        f"Workers {list(lost)} of this lab are lost, and {_listed(names)} goes on with the others: this is the same lab. For a full one end "
        "that first (run.stop(), or lab.close()) and connect() again."
    )
    return True


def _make_room(name: str, lab: Lab) -> None:
    """Close a lab whose name is asked for with another request, unless it is in use."""
    if lab.entered and not lab.closed:
        _beside[:] = [other for other in _beside if not other.closed] + [lab]
    elif names := lab.holders():
        raise ClusterError(
            f"{_listed(names)} trains on the lab of this kernel, which is another one than asked for, and would end with it. Wait for "
            f"it (run.wait()) or end it (run.stop(), or lab.close()) first; or have both: connect(..., name='{_free_name()}')."
        )
    else:
        lab.close()
    del _labs[name]


def _listed(names: Sequence[str]) -> str:
    return " and ".join(map(repr, names))


def _free_name() -> str:
    return next(name for name in ("second", *(f"lab-{number}" for number in range(3, len(_labs) + 4))) if name not in _labs)


def current() -> Lab | None:
    """The lab of this process that was asked for last, of those that are open."""
    return next((lab for _, lab in reversed(list(_labs.values())) if not lab.closed), None)


@atexit.register
def close_all() -> None:
    """Close every lab of this process."""
    for lab in [*_beside, *(lab for _, lab in list(_labs.values()))]:
        lab.close()
    if getattr(sys, "last_type", None) is KeyboardInterrupt and not hasattr(sys, "ps1"):
        # An interrupt ends this script, and Python means to end by the signal (130 in a shell). It forgets that with every text that is
        # executed, which dataclasses of modules that are imported only now do; a text that is interrupted reminds it.
        with contextlib.suppress(KeyboardInterrupt):
            exec("raise KeyboardInterrupt")


def _of_class(client: type) -> str:
    """What to give instead of a class."""
    own = f"client={client.__name__} is a class. Give one of its objects"
    if client.__module__.partition(".")[0] != "ipyparallel":
        return f"{own}: labkit.connect(client={client.__name__}(...)); or let labkit start workers: labkit.connect(n_workers=2)."
    made = f"{client.__name__}(n=2).start_and_connect_sync()" if client.__name__ == "Cluster" else f"{client.__name__}(...)"
    return f"{own}: labkit.connect(client=ipyparallel.{made}); or let labkit start engines: labkit.connect('ipyparallel', n_workers=2)."


def _kind(address: str | None, client: Any, profile: str | None) -> str:
    if profile is not None or made_by(client, "ipyparallel"):
        return "ipyparallel"
    return "threads" if os.environ.get("LABKIT_SMALL") and address is None and client is None else "dask"


def _checked(request: Request) -> Request:
    """The request with everything in the plain type that back ends use; a `ClusterError` where something makes no sense."""
    given, resources = request, request.resources
    try:
        instance("resources", {} if resources is None else resources, Mapping)
        request = replace(
            given,
            n_workers=None if given.n_workers is None else whole("n_workers", given.n_workers, most=MOST_WORKERS),
            threads=whole("threads_per_worker", given.threads, most=MOST_WORKERS),
            slowdown=() if given.slowdown is None else tuple(several("slowdown", given.slowdown, slowdown_of)),
            jitter=jitter_of("jitter", given.jitter),
            drift=real("drift", given.drift, least=0),
            stalls=make_stalls(given.stalls),
            address=None if given.address is None else _address(given.address),
            resources=None
            if resources is None
            else {text("resources", name): real(f"resources[{name!r}]", resources[name], least=0) for name in resources},
            engines=text("engines", given.engines),
            profile=None if given.profile is None else text("profile", given.profile),
            name=text("name", given.name),
            timeout=real("timeout", given.timeout, above=0, most=LONGEST_WAIT_S),
        )
        n_workers, slowdown = request.n_workers, request.slowdown
        if slowdown and n_workers not in (None, len(slowdown)):
            raise ClusterError(f"slowdown has {len(slowdown)} entries for {n_workers} workers. Give one factor for each worker.")
        opposite(slowdown or [1.0], request.drift)
    except (TypeError, ValueError) as error:
        raise ClusterError(str(error)) from None
    return request


def _address(given: Any) -> str:
    """Of a scheduler, or of a file with it."""
    path = os.fspath(file_path("address", given))
    return path if path.endswith(".json") else text("address", given)
