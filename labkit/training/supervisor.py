"""The supervisor of a run: its server process, its workers' tasks, and the thread of the kernel that follows them to the end.

Workers may be lost and come back, or come for the first time, in mid-run: each gets its task. Every wait in here has a
limit, and whatever goes wrong ends the run with a reason: an error of a worker, of the server or in here, with its traceback, a
server that did not start or died, a folder that cannot be written. A worker whose process ends again and again is not started again
(`labkit.training.server.membership.Losses` counts).

Used by `labkit.training.train`; a `Run` follows it.
"""

import contextlib
import json
import os
import secrets
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import replace
from pathlib import Path

import numpy as np

from labkit.cluster.lab import Lab, Task, Worker
from labkit.errors import ClusterError, LabError, RunError, WireError, WorkerError, traceback_of
from labkit.inner.precision import Precision
from labkit.locks import DirectoryLock, alone
from labkit.problems.problem import Problem
from labkit.problems.trial import Fingerprint
from labkit.runs import status as how_it_ended
from labkit.runs import summary
from labkit.runs.events import Tail
from labkit.sources import dumped, pack
from labkit.training.attach import watch
from labkit.training.evaluation import as_recorded, measure
from labkit.training.monitor import Monitor
from labkit.training.run import Run
from labkit.training.server.server import ServerSpec
from labkit.training.wire.transport import Address
from labkit.training.worker.worker import WorkerSpec, run_worker

POLL_S = 0.2
MEETING = ".ranks-"  # how the names of these files begin
ATTEMPTS = 3  # how often a worker is started again that is alive and could not reach the server
RETRY_S = 10.0  # how long a server that has closed the connection may take to end before another is made
# A version is a new array, and the one before it is free again soon. Without this glibc hands 100 MB back to the system and fetches
# them again at every merge, page by page, which takes longer than the merge. One arena: others cannot hold so large a block.
KEEP_MEMORY = {"MALLOC_ARENA_MAX": "1"} | dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), str(1 << 30))
ENDING_S = 10.0  # how long the workers' tasks may take to end after the server; one that is frozen does not


class Supervisor:
    """One run in the kernel that has started it, from `start` to its end."""

    def __init__(
        self,
        path: Path,
        lab: Lab,
        problem: Problem,
        spec: ServerSpec,
        lock: DirectoryLock,
        monitor: Monitor | None = None,
        *,
        takes_newcomers: bool,
        curve: bool = True,
    ) -> None:
        self.path, self.lab, self.problem, self.spec, self.takes_newcomers = path, lab, problem, spec, takes_newcomers
        self.curve = curve  # is it measured at the end?
        self.lock = lock  # of the run directory: the server inherits it, so that it is held while one of the two lives
        self.monitor, self._reason = monitor, ""  # why the monitor ends the run
        self._failure: BaseException | None = None  # of the monitor
        self.sent = problem  # to the workers
        self.fingerprint: Fingerprint | None = None  # of what is built here, for those in other processes
        self.error: BaseException | None = None
        self._raised: dict[int, BaseException] = {}  # by worker
        self.state = "running"
        self.tasks: dict[int, Task] = {}  # by worker: the latest
        self._events, self._decided, self._printed = Tail(path), [], set()  # what workers compute in, the latest first
        self.started_on: dict[int, Worker] = {}  # the worker as it was then: one that comes back is another process
        self.generations: dict[int, int] = {}  # how often it was started
        self.meeting = f"{MEETING}{secrets.token_hex(4)}"  # where the ranks of an all-reduce find each other
        self._reported: set[tuple[int, int]] = set()  # processes that are gone, and of which the server knows: worker, generation
        self._all_lost_at: float | None = None  # before the start: since when all are lost
        reached = spec.config.resumed[-1] if spec.config.resumed else {}  # by the checkpoint that it goes on from
        self._status: dict = {"state": "running", "budget": spec.config.budget}
        self._status |= {name: int(reached.get(name) or 0) for name in ("samples", "version")}
        self._stop, self._measuring, self._over = threading.Event(), threading.Event(), threading.Event()

        self.server: subprocess.Popen | None = None

    def start(self, run: Run) -> None:
        self.run = run
        try:
            if not all(worker.here for worker in self.lab.workers):
                self.sent = pack(self.problem)  # once, so that who comes late trains the same
                self.fingerprint = self.problem.fingerprint(self.spec.config.seed)
            self._read_precision()
            self.server, self.address = _start_server(self.spec, self.path, self.lock)
            self.spec = replace(self.spec, weights=np.empty(0, np.float32), state=None)  # the server has them
            for index in self.spec.config.indices:
                self._start_worker(index)
        except BaseException as error:
            if self.server:
                _end(self.server)
            self._finish("failed", f"it could not be started: {error}")
            raise
        if self.monitor:
            self.monitor.start(run, self._end_early, self._fail)
        threading.Thread(target=self._follow, name=f"labkit-{run.name}", daemon=True).start()

    def status(self) -> dict:
        return {**self._status, "state": self.state}

    def wait(self, timeout: float) -> bool:
        limit = time.monotonic() + timeout
        while not self._over.wait(0.1):  # short waits, so that an interrupt comes through
            if time.monotonic() > limit:
                return False
        return True

    def stop(self, timeout: float) -> None:
        self._stop.set()
        limit = time.monotonic() + timeout
        while not self._measuring.is_set() and time.monotonic() < limit:  # what is measured now has ended already
            if self._over.wait(0.05):
                return
        if self.server and not self._measuring.is_set():
            self.server.kill()  # it does not answer; the workers see their connections close
            self.wait(10)

    def _end_early(self, reason: str) -> None:
        self._reason = reason
        self._stop.set()

    def _fail(self, error: BaseException) -> None:
        self._failure = error

    def raise_error(self) -> None:
        if self.error:
            __tracebackhide__ = True
            raise self.error.with_traceback(None)  # what matters is in its text; the frames are Dask's

    def _start_worker(self, index: int) -> None:
        self.generations[index] = self.generations.get(index, -1) + 1
        worker = self.started_on[index] = self.lab.workers[index]
        spec = WorkerSpec(
            generation=self.generations[index],
            index=index,
            address=self.address,
            secret=self.spec.secret,
            config=self.spec.config,
            device=worker.device,
            threads=worker.threads,
            uneven=self.lab.unevenness(index),
            meeting=str(self.path / self.meeting) if self.spec.update.collective else None,
            scored=self.spec.update.scored,
            fingerprint=None if worker.here else self.fingerprint,
            precisions=tuple(self._decided),
        )
        self.tasks[index] = self.lab.start(index, run_worker, self.sent, spec)
        self._raised.pop(index, None)

    def _follow(self) -> None:
        """Poll the server until the run has ended; then record how, and measure its curve."""
        state, reason = "failed", ""
        try:
            try:
                self._watch()
                state, reason = self._ending()
                if self.curve and (state == "done" or self._reason):
                    reason = self._measure() or reason
                if self.monitor and state == "done":
                    reason = self._shown() or reason
            except BaseException as error:  # whatever it is, `wait` must end and raise it
                state, reason = "failed", self._failed_here(error)
                self.server.kill()
            self._finish(state, reason)
        except BaseException as error:
            self.state = "failed"
            self._failed_here(error)
        finally:  # also where `_finish` is what failed; twice is fine
            with contextlib.suppress(Exception):
                self.lock.release()
                self.lab.release(self.run.config.id)
                self.lab.runs.remove(self.run)
            self._over.set()

    def _failed_here(self, error: BaseException) -> str:
        """An error that nobody expected in this thread; returns the reason."""
        reason = f"its supervisor failed: {traceback.format_exception_only(error)[-1].strip()}"
        if self.error is None:
            text = traceback_of(error)
            self.error = RunError(f"run {self.run.name} failed: {reason}\n{text}")
            self.error.__cause__ = error
        return reason

    def _measure(self) -> str:
        """The curve, on the workers whose tasks have ended, or else here: a frozen one would keep it waiting.

        A run is done also when that fails; `Run.curve` then tries again and says why.
        """
        self._measuring.set()
        ended = sorted(index for index, task in self.tasks.items() if task.done and not task.lost)
        try:
            problem = as_recorded(self.problem, self.run)
            if ended and problem is self.problem:
                problem = self.sent
            with alone(self.path):  # who asks for it meanwhile, by another handle, waits and reads it
                measure(self.run, problem, self.lab if ended else None, ended)
        except Exception as error:
            return f"its curve is not measured yet: {error}"
        return ""

    def _shown(self) -> str:
        """The last versions have been shown to `on_version`; what it raises now is raised by `wait`, and the run is done."""
        self.monitor.finish()
        if not self._failure:
            return ""
        reason = f"after the end: {_message(self._failure)}"
        self.error = LabError(f"run {self.run.name}: {reason}")
        self.error.__cause__ = self._failure.__cause__ or self._failure
        return reason

    def _watch(self) -> None:
        failures = 0
        while self.server.poll() is None and failures < 3:
            try:
                with watch(self.address, self.spec.secret, timeout=30) as ask:
                    while self.server.poll() is None:
                        self._status = ask(**self._request())
                        failures = 0
                        self._read_precision()
                        if self._status["state"] == "running":
                            self._stop.wait(POLL_S)
                        else:
                            time.sleep(0.05)
            except WireError:  # most likely it has ended
                failures += 1
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.server.wait(timeout=RETRY_S)
        self._last_line = _end(self.server)
        self._read_precision()
        self._await_tasks()

    def _read_precision(self) -> None:
        """What workers have decided to compute in is printed, each line once, and those that are started later hold to it."""
        if self.problem.precision == "float32":
            return
        with contextlib.suppress(RunError):  # not there yet; or damaged, which whoever reads it is told
            for row in self._events.read(continued=True):
                if row["kind"] == "join" and row.get("precision"):
                    self._decided.insert(0, row["precision"])
                    for line in Precision(**row["precision"]).lines():
                        if (what := line.partition(":")[0]) not in self._printed:  # workers measure other numbers
                            self._printed.add(what)
                            print(f"Run {self.run.name!r}, worker {row['worker']}: {line}.", flush=True)

    def _await_tasks(self) -> None:
        limit = time.monotonic() + ENDING_S
        for task in self.tasks.values():
            while not task.done and time.monotonic() < limit:
                time.sleep(0.02)

    def _request(self) -> dict:
        """What the server is asked next: its status, or also to stop, or to begin without the workers that were lost."""
        if self._status["state"] != "running":
            return {"op": "status"}
        if trouble := self._trouble():
            return {"op": "stop", "state": "failed", "reason": trouble}
        if self._stop.is_set():
            return {"op": "stop", "reason": self._reason}
        for index, task in self.tasks.items():
            life = index, self.generations[index]
            if life not in self._reported and (task.lost or self.lab.workers[index] != self.started_on[index]):
                self._reported.add(life)
                why = f"its process {self.started_on[index].pid} is gone: killed, out of memory, or ended by what it ran"
                return {"op": "lost", "worker": index, "generation": life[1], "reason": why}
        here = self._start_workers()
        if here and not self._status.get("started"):
            return {"op": "expect", "workers": here}
        return {"op": "status"}

    def _start_workers(self) -> list[int]:
        """Start the workers that have come back, or come anew and are free; returns all that are here."""
        came = self.lab.refresh(self.run.config.id)
        lost = set(self.lab.lost()) | {int(index) for index in self._status.get("dropped", ())}
        if self.takes_newcomers and (new := [index for index in came if index not in self.tasks]):
            with contextlib.suppress(ClusterError):  # another run was quicker
                self.lab.lease(new, self.run.config.id, self.run.name)
                for index in new:
                    self._try_worker(index)
        for index, task in list(self.tasks.items()):
            if index in lost:
                continue
            came_back = self.lab.workers[index] != self.started_on[index]
            cut_off = self.generations[index] < ATTEMPTS and task.done and _lost_server(self._error(index))
            if came_back or cut_off:
                self._try_worker(index)
        return [index for index in self.tasks if index not in lost]

    def _try_worker(self, index: int) -> None:
        with contextlib.suppress(ClusterError):  # lost again already: seen at the next poll
            self._start_worker(index)

    def _trouble(self) -> str:
        """Why the run must fail although the server would go on. There a worker that merely lost it is treated as any lost one."""
        for index in self.tasks:
            if (error := self._error(index)) and not _lost_server(error):
                return _message(error)
        if self._failure:
            return f"in mid-run, in this kernel: {_message(self._failure)}"
        if self.lab.closed:
            return "the lab was closed."
        if not self._status.get("started"):
            lost = self.lab.lost()
            all_lost = all(index in lost for index in self.tasks)
            self._all_lost_at = (self._all_lost_at or time.monotonic()) if all_lost else None
            if self._all_lost_at and time.monotonic() - self._all_lost_at > self.spec.config.join_timeout:
                return f"workers {sorted(self.tasks)} were lost before the run began. connect() again for a full lab."
        return ""

    def _error(self, index: int) -> BaseException | None:
        if index not in self._raised and (error := self.tasks[index].error()):
            self._raised[index] = error
        return self._raised.get(index)

    def _ending(self) -> tuple[str, str]:
        """State and reason, from the last line of the server; and the error to raise in `wait`."""
        try:
            ended = json.loads(self._last_line)
        except ValueError:
            log = (self.path / "server.log").read_text(errors="replace").strip()
            self.error = RunError(f"the server of run {self.run.name} ended with code {self.server.returncode}.\n{log[-2000:]}")
            return "failed", "the server ended"
        self._status = {**self._status, **ended}
        errors = [error for index in self.tasks if (error := self._error(index)) and not _lost_server(error)]
        if ended["state"] == "done" and errors:
            return "done", f"after the end: {_message(errors[0])}"
        if ended["state"] == "failed":
            # The error of a worker says more than the server's line; the worker that the line names failed first.
            errors.sort(key=lambda error: _message(error) != ended["reason"])
            text = self._status.pop("traceback", "")
            self.error = LabError(f"run {self.run.name} failed: {ended['reason']}" + (f"\n{text}" if text else ""))
            if errors and isinstance(errors[0], WorkerError):
                self.error = errors[0]
            elif errors or self._failure:
                self.error.__cause__ = errors[0] if errors else self._failure.__cause__ or self._failure
        return ended["state"], ended["reason"]

    def _finish(self, state: str, reason: str) -> None:
        self._status = {**self._status, "reason": reason}
        with contextlib.ExitStack() as last:  # all of it, the last line first, whatever fails of it
            last.callback(self._over.set)
            last.callback(setattr, self, "state", state)
            last.callback(lambda: self.run in self.lab.runs and self.lab.runs.remove(self.run))
            last.callback(self.lab.release, self.run.config.id)
            last.callback(self.lock.release)
            if self.monitor:
                last.callback(self.monitor.close)
            for file in self.path.glob(f"{self.meeting}*"):
                file.unlink(missing_ok=True)
            if state == "failed":
                with contextlib.suppress(OSError, RunError):  # an unwritable folder may be why it failed
                    id = self.run.config.id
                    n = (how_it_ended.read(self.path, id) or {}).get("events")  # by the server, if it has come so far
                    how_it_ended.write(self.path, id, {**self._status, "state": "failed"}, n)
            summary.write(self.run)


def _lost_server(error: BaseException | None) -> bool:
    """Was the connection all that this worker lost?"""
    return isinstance(error, WorkerError) and not error.remote_traceback


def _message(error: BaseException) -> str:
    return str(error.args[0]) if isinstance(error, WorkerError) else f"{type(error).__name__}: {error}"


def _start_server(
    spec: ServerSpec, path: Path, lock: DirectoryLock | None = None, timeout: float = 60.0
) -> tuple[subprocess.Popen, Address]:
    """The server in a process of its own; it gets its spec, secret included, through a pipe that nobody else can read.

    It inherits the lock of the run directory, if that is held, and never closes it.
    """
    message = dumped(replace(spec, update=pack(spec.update), partition=pack(spec.partition)))
    environment = {**os.environ, **KEEP_MEMORY, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    # A rule of the user's own may be in any module that can be imported here.
    environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(folder or os.getcwd() for folder in sys.path))
    with open(path / "server.log", "ab") as log:
        server = subprocess.Popen(
            [sys.executable, "-c", "import labkit.training.server.server; labkit.training.server.server.main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            pass_fds=(lock.fd,) if lock else (),
            start_new_session=True,  # an interrupt of the kernel is for the kernel
        )
    watchdog = threading.Timer(timeout, server.kill)
    watchdog.start()
    try:
        server.stdin.write(message)
        server.stdin.close()
        server.stdin = None  # nothing more is sent
        address = json.loads(server.stdout.readline())["address"]
    except (OSError, ValueError) as error:
        _end(server)
        log = (path / "server.log").read_text(errors="replace").strip()
        raise RunError(f"the server did not start: {log[-2000:] or error}") from error
    finally:
        watchdog.cancel()
    return server, tuple(address)


def _end(server: subprocess.Popen) -> bytes:
    """What the server has written to its standard output; it is killed if it still runs. Twice is fine."""
    server.kill()
    server.wait()
    written = b"" if server.stdout.closed else server.stdout.read()
    for pipe in (server.stdin, server.stdout):
        with contextlib.suppress(OSError):  # what it has not read any more
            if pipe:
                pipe.close()
    return written
