"""ipyparallel as a back end: engines of our own, under MPI or not, or those of a running cluster.

A task runs in a thread of its engine, one after the other, and is asked for its outcome now and then. So the main thread of the
engine stays free, and `%%px` works beside a run. Functions travel as cloudpickle bytes; exceptions come back as themselves, with
the traceback of the engine as a note. Weights never pass the controller: workers talk to the run's server.

Found by `labkit.cluster.connect`.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
import traceback
import uuid
from collections.abc import Iterable
from typing import Any

from labkit.cluster.backend import Request, describe, made_by
from labkit.cluster.ipyparallel_local import LocalEngines, mpiexec
from labkit.cluster.leases import Lease, at_work, give_back, lease_all
from labkit.errors import ClusterError, WorkerError, known
from labkit.locks import Scratch

ENGINES = ("local", "mpi")
LEASE_S = 5.0  # the longest wait for the engines' answers about a lease
SHORT_S = 0.02  # what a new task may take before the engine answers that it is at work
POLL_S = (0.01, 0.5)  # pause before a task is asked for again: it grows from the first to the second


class Engines:
    """Engines of an ipyparallel cluster, by their ids; `close` ends those that were started here."""

    keeps_names = False  # an engine that is started again gets a new id
    dashboard = ""

    def __init__(self, client: Any, local: LocalEngines | None = None, *, own_client: bool = True) -> None:
        self.client, self._local, self._own_client, self._closed = client, local, own_client, False
        self._leased: dict[str, set[int]] = {}  # holder -> engines
        self._lock = threading.RLock()  # the kernel's cells and the threads that follow runs share the client
        with contextlib.suppress(ImportError):
            from IPython import get_ipython

            if get_ipython() is not None:
                client.direct_view("all", block=True).activate()  # %px and %%px

    def alive(self) -> dict[int, str]:
        if self._closed or (self._local and self._local.ended()):
            return {}
        with self._lock:
            return {} if self.client._closed else {id: str(id) for id in self.client.ids}

    def describe(self, id: int) -> _Answer:
        return _Answer(self.ask(id, describe), id)

    def submit(self, id: int, pid: int, fn: Any, args: tuple) -> _Task:  # the id of an engine is never given again
        return _Task(self, id, fn, args)

    def add(self, n: int) -> None:
        if self._local is None:
            raise ClusterError("this lab did not start its engines, so it cannot add any. Start them there: they are noticed.")
        self._local.start(n)

    def lease(self, ids: Iterable[int], holder: str, name: str, path: str = "") -> dict[int, Lease]:
        ids = sorted(set(ids) - self._leased.get(holder, set()))
        others = lease_all(ids, Lease(holder, name, path), self._ask_each)
        if not others:
            self._leased.setdefault(holder, set()).update(ids)
        return others

    def release(self, holder: str) -> None:
        self._ask_each(sorted(self._leased.pop(holder, set()) & set(self.alive())), give_back, holder)

    def _ask_each(self, ids: Iterable[int], fn: Any, *args: Any) -> dict[int, Any]:
        """What `fn(*args)` returns on each engine; None of one that does not answer."""
        asked, found = {id: self.ask(id, fn, *args) for id in ids}, dict.fromkeys(ids)
        limit = time.monotonic() + LEASE_S
        for id, answer in asked.items():
            with contextlib.suppress(Exception):  # frozen, or gone
                found[id] = answer.get(timeout=max(0.1, limit - time.monotonic()))
        return found

    def trouble(self) -> str:
        """The last lines of what engines and controller have written."""
        return self._local.log() if self._local else ""

    def close(self) -> None:
        for holder in list(self._leased):
            self.release(holder)
        self._closed = True
        with self._lock:
            if self._own_client:
                self.client.close(linger=0)
        if self._local:
            self._local.close()

    def ask(self, id: int, fn: Any, *args: Any) -> Any:
        """A short call on an engine, as an AsyncResult; None if the engine is gone."""
        import ipyparallel

        with self._lock:
            try:
                answer = self.client.direct_view(id).apply_async(fn, *args)
            except (IndexError, KeyError, OSError, RuntimeError, ipyparallel.error.NoEnginesRegistered):
                return None
            for message in answer.msg_ids:  # a list that would grow with every question
                with contextlib.suppress(ValueError):
                    self.client.history.remove(message)
            return answer


class _Answer:
    """What an engine answers at once, also when a task is at work there."""

    def __init__(self, answer: Any, id: int) -> None:
        self.answer, self.id = answer, id

    def done(self) -> bool:
        return self.answer is None or self.answer.ready()

    def result(self, timeout: float) -> Any:
        if self.answer is None:
            raise ClusterError(f"engine {self.id} is gone.")
        if not self.answer.wait(timeout):
            raise TimeoutError(f"engine {self.id} did not answer within {timeout:g} s")
        try:
            return self.answer.get(timeout=1)
        except Exception as error:
            raise ClusterError(f"engine {self.id} cannot run labkit's tasks: {_plain(error)}. Is labkit installed there?") from None


class _Task:
    """A function on an engine: begun there, and then asked for until its outcome is here."""

    def __init__(self, engines: Engines, id: int, fn: Any, args: tuple) -> None:
        import cloudpickle

        self.engines, self.id, self.token = engines, id, uuid.uuid4().hex
        self._outcome: tuple[bool, Any] | None = None
        self._lock = threading.Lock()
        self._pause, self._next = POLL_S[0], 0.0
        self._answer = engines.ask(id, _begin, self.token, cloudpickle.dumps((fn, args)))

    def done(self) -> bool:
        with self._lock:
            if self._outcome is not None:
                return True
            if self._answer is None and time.monotonic() >= self._next:
                self._answer = self.engines.ask(self.id, _outcome, self.token)
            if self._answer is None or not self._answer.ready():
                return False
            answer, self._answer = self._answer, None
            try:
                reply = answer.get(timeout=5)
            except Exception as error:
                if getattr(error, "ename", "") == "EngineError":  # it died, by its client's account: the lab reports that
                    self._next = float("inf")
                    return False
                self._outcome = False, WorkerError(f"engine {self.id} cannot run labkit's tasks: {_plain(error)}", None, "")
                return True
            if reply is None:
                self._next = time.monotonic() + self._pause
                self._pause = min(POLL_S[1], 1.5 * self._pause)
                return False
            self._outcome = _unpack(reply, self.id)
            return True

    def result(self, timeout: float = 30.0) -> Any:
        good, value = self._wait(timeout)
        if good:
            return value
        raise value

    def exception(self, timeout: float = 30.0) -> BaseException | None:
        good, value = self._wait(timeout)
        return None if good else value

    def release(self) -> None:
        self.engines.ask(self.id, _forget, self.token)

    def _wait(self, timeout: float) -> tuple[bool, Any]:
        limit = time.monotonic() + timeout
        while not self.done():
            if time.monotonic() > limit:
                raise TimeoutError(f"engine {self.id} did not answer within {timeout:g} s")
            time.sleep(0.005)
        return self._outcome


def _plain(error: BaseException) -> str:
    """A RemoteError without its coloured traceback."""
    name, value = getattr(error, "ename", type(error).__name__), getattr(error, "evalue", str(error))
    return f"{name}: {value}"


def _unpack(reply: bytes, id: int) -> tuple[bool, Any]:
    import cloudpickle

    good, payload, text = cloudpickle.loads(reply)
    if good:
        return True, cloudpickle.loads(payload)
    try:
        error = cloudpickle.loads(payload)
    except Exception:  # its class cannot be had here
        return False, WorkerError(f"engine {id} failed: {text.strip().splitlines()[-1]}", None, text)
    if not getattr(error, "remote_traceback", ""):
        error.add_note(f"On engine {id}:\n{text}")
    return False, error


def check(request: Request) -> None:
    """Does this request make sense to ipyparallel?"""
    known("engines", request.engines, ENGINES, error=ClusterError)
    if request.address is not None or not (request.client is None or _is_client(request.client)):
        got = "" if request.client is None else f" (not a {type(request.client).__name__})"
        if hasattr(request.client, "connect_client_sync"):
            got = "; of this Cluster: client=cluster.connect_client_sync(), or, before it is started, cluster.start_and_connect_sync()"
        raise ClusterError(
            f"kind='ipyparallel' finds a running cluster by profile='...', or by an ipyparallel Client: client=...{got}"
        )
    if request.security is not None:
        raise ClusterError("security goes with address='tls://...', and that with kind='dask'.")
    if request.resources is not None:
        raise ClusterError("ipyparallel's engines have no resources; they go with kind='dask'.")
    request.refuse_job()


def _is_client(client: Any) -> bool:
    return made_by(client, "ipyparallel") and hasattr(client, "direct_view")


def open(request: Request) -> Engines:
    """The engines of a running cluster, by its profile or a Client, which stays open; or those of one that is started here."""
    from ipyparallel import Client

    if request.client is not None:
        return Engines(request.client, own_client=False)
    if request.joins:
        try:
            return Engines(Client(profile=request.profile, timeout=request.timeout))
        except (OSError, TimeoutError) as error:
            why = f"no controller answers for profile {request.profile!r}: {error}"
            raise ClusterError(f"{why}. Start one: ipcluster start.") from error
    mpi = request.engines == "mpi"
    if mpi:
        mpiexec(request.n_workers)  # is there one?
    local = LocalEngines(Scratch("labkit-"), request.threads, mpi)
    try:
        local.start_controller(request.timeout)
        local.start(request.n_workers)
        return Engines(Client(str(local.connection), profile_dir=str(local.folder), timeout=request.timeout), local)
    except BaseException:
        local.close()
        raise


# -- on the engine -------------------------------------------------------------------------------------------------

_tasks: queue.SimpleQueue = queue.SimpleQueue()
_waiting: dict[str, bytes] = {}  # by token: function and arguments
_done: dict[str, bytes] = {}  # by token: what came out of it, until it is fetched
_finished = threading.Condition()


def _begin(token: str, payload: bytes) -> bytes | None:
    """Take a task on; its outcome if it is a short one."""
    if not any(thread.name == "labkit-tasks" for thread in threading.enumerate()):
        threading.Thread(target=_work, name="labkit-tasks", daemon=True).start()
    _waiting[token] = payload
    _tasks.put(token)
    with _finished:
        _finished.wait_for(lambda: token in _done, SHORT_S)
    return _outcome(token)


def _outcome(token: str) -> bytes | None:
    return _done.pop(token, None)


def _forget(token: str) -> None:
    _waiting.pop(token, None)


def _work() -> None:
    """One task after the other, as a Dask worker with one thread does."""
    while True:
        token = _tasks.get()
        if payload := _waiting.pop(token, None):
            with at_work():
                reply = _run(payload)
            with _finished:
                _done[token] = reply
                _finished.notify_all()


def _run(payload: bytes) -> bytes:
    import cloudpickle

    try:
        fn, args = cloudpickle.loads(payload)
        return cloudpickle.dumps((True, cloudpickle.dumps(fn(*args)), ""))
    except BaseException as error:
        text = traceback.format_exc()
        try:
            return cloudpickle.dumps((False, cloudpickle.dumps(error), text))
        except Exception:
            return cloudpickle.dumps((False, b"", text))
