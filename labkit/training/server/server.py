"""The server of one run: owns the global weights, answers push and pull, and writes down what happens.

A process of its own that imports numpy but neither torch nor Dask. Each connection has a thread; the course of the run
(`labkit.training.server.coordinator`) is changed under one lock, which also gives the order in which pushes are merged. Transfers
happen outside the lock: versions are immutable arrays, so one worker can still be receiving version 7 while another makes version
8. `labkit.training.wire.protocol` shows the messages in both directions.

A push is received into memory of its own, which becomes the rule's: those of labkit make the next version in it. So there are the
newest version, under asynchronous rules those that workers still work from, the pushes under way (of a synchronous rule, of the whole
round; of large ones under an asynchronous rule, half as many as workers: `labkit.training.server.backpressure`), one version that is
being saved, and what the rule remembers (a momentum, an average). Where there is no memory for a push it is
refused and its worker joins anew; a version for which there is none is not saved.

A worker whose message cannot be meant is dropped, with the reason in the record, and may join again, as one may that was lost:
after a pause that grows, and not when that has happened `LOSSES` times in a row without a push that counts. The run fails when
nobody is left. Any other exception, in whatever thread, is a fault of the server or of the user's rule: the run fails with its
traceback (`Server.fail`).

A server ends by itself: `ENDING_S` after the run has ended at the latest, and that it has, `join_timeout` after its last worker is
gone; who vanishes without closing its connection is gone after its heartbeat time-out (`FailureDetector`). Whether its kernel is there
is all one to it, as long as there are workers: it is the kernel that starts those that were lost again, and those of a local lab end with it.

Started by `labkit.training.supervisor` in a process of its own; asked by it and by others through `labkit.training.attach`.
"""

import contextlib
import errno
import itertools
import json
import os
import pickle
import queue
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from labkit.errors import LabError, RunError, UpdateError, WireError, traceback_of
from labkit.partition import Partition
from labkit.runs import checkpoints, server_file
from labkit.runs import status as how_it_ended
from labkit.runs.checkpoints import Layout
from labkit.runs.config import RunConfig
from labkit.runs.events import Recorder
from labkit.runs.files import check_owner
from labkit.training.server.backpressure import LARGE, Backpressure
from labkit.training.server.coordinator import AGAIN, NO_ROOM, Coordinator, NoRoom
from labkit.training.server.membership import LOSSES, FailureDetector, Losses, Member
from labkit.training.wire import compression, tls, transport
from labkit.training.wire.protocol import HEARTBEAT_S, SERVER_TIMEOUT_S, Answer, Refused, check_request
from labkit.updates import BadPush, Diverged, Update

ENDING_S = 5.0  # how long workers may take to leave when the run has been stopped or has failed
LEAVING_S = 2.0  # how long the threads of those who did not may take to record it, once their links are closed
ORPHANED_S = 2.0  # a run without a kernel is over when it was without workers for so long
LATE_PUSHES = 3  # of a worker that was taken to be gone: what was on its way when it was asked to join anew
PASSING = errno.EMFILE, errno.ENFILE, errno.ENOMEM  # errors of a moment: others may give files and memory back
PASSING_S = 10.0  # so long a version is tried again
NO_ROOM_S = 0.25  # so long a worker waits before it comes again, where there was no memory for what it sent or was to be sent
DRAIN = 1 << 16  # bytes of memory for a body that nobody wants
LOG_BYTES = 500_000  # of server.log that one server writes at most


@dataclass
class ServerSpec:
    """All that a server needs to know beside the settings of its run; handed over by its parent through a pipe."""

    config: RunConfig
    path: str  # the run directory
    update: Update
    partition: Partition
    weights: np.ndarray  # float32 (n,): [parameters | buffers]
    layout: Layout
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(32))  # of all processes of the run
    labels: np.ndarray | None = None  # int64 (n_train,), for a stratified partition
    host: str = "127.0.0.1"
    age: float = checkpoints.AGE_S  # seconds after which the newest version is saved, also between the checkpoints
    state: dict | None = None  # of the checkpoint that a run is resumed from (`labkit.runs.checkpoints.read_state`)
    kernel: int | None = None  # the process that has started this one, which starts lost workers again
    local: bool = False  # do the workers end with it?


class Server:
    """Serves one run: `serve()` returns when it has ended, and the run directory then says how."""

    def __init__(self, spec: ServerSpec) -> None:
        self.spec, self.config = replace(spec, weights=np.empty(0, np.float32), state=None), spec.config  # the course has them
        self.size = len(spec.weights)
        self.lock = threading.RLock()
        self.recorder = Recorder(Path(spec.path))
        checkpoints.prepare(self.recorder.path)
        self.listener, self.handshakes = transport.listen(spec.host), transport.Handshakes()
        self.identity = None if server_file.loopback(spec.host) else tls.Identity()
        self.outboxes: dict[int, queue.SimpleQueue[Answer]] = {}
        self.connections: dict[int, transport.Connection] = {}
        self.generations: dict[int, int] = {}  # by worker: how often the kernel has started its task
        self.versions: queue.SimpleQueue[tuple[int, np.ndarray, dict] | None] = queue.SimpleQueue()  # to be saved
        self.unsaved = 0  # of them, also the one that is being written; under the lock
        self.pushes = Backpressure(lambda: len(self.course.members))
        self.over, self.wake_up = threading.Event(), threading.Event()  # wake_up: look at the time, or at `over`
        self.losses = Losses()
        self.asked: dict[int, tuple[int, queue.SimpleQueue[dict]]] = {}  # by number: the worker that is inspected, and its answer
        self.numbers = itertools.count()
        self.slowed: dict[str, float] = {}  # by worker, in mid-run; as JSON has it
        self.failure: dict = {}  # of the server itself or the user's rule: how the run ends then
        self._packing = threading.Lock()
        self._packed: tuple[np.ndarray, np.ndarray] | None = None  # the version that was packed last, and as what
        self.course = Coordinator.begin(
            self.config,
            spec.update,
            spec.partition,
            spec.weights,
            spec.layout,
            labels=spec.labels,
            state=spec.state,
            deliver=lambda worker, answer: self.outboxes[worker].put(answer),
            record=self._record,
            save=self._to_be_saved,
            room=lambda: not self.unsaved,
            clock=time.monotonic,
            alarm=lambda _: self.wake_up.set(),
            age=spec.age,
        )
        check_owner(self.recorder.path, self.config.id)
        server_file.announce(self.recorder.path, self.address, spec.secret)  # before its parent is sent the address

    @property
    def address(self) -> transport.Address:
        return self.listener.getsockname()[:2] + ((self.identity.certificate,) if self.identity else ())

    @property
    def dropped(self) -> dict[str, str]:
        """By worker, why it is not let in again; as JSON has it."""
        return {str(worker): why for worker, why in self.losses.all_out().items()}

    def serve(self) -> dict:
        """Until the run has ended; returns how. Whatever goes wrong in here ends it too."""
        saver = self._thread(self._save_versions)
        self._guarded(self._serve)
        if self.course.state == "running":
            self._guarded(self.stop, "failed", "the server ended.")
        transport.shut(self.listener)
        with self.lock:
            self._guarded(self.course.checkpoint)
            links = list(self.connections.values())
        for link in links if self.course.members else ():  # of workers that did not leave in time
            link.close()
        limit = time.monotonic() + LEAVING_S
        while self.course.members and time.monotonic() < limit:
            time.sleep(0.005)
        self.versions.put(None)
        saver.join()
        status: dict = {}

        def write() -> None:
            how_it_ended.write(Path(self.spec.path), self.config.id, status, self.recorder.events)

        for last in (self._ended, self.recorder.close, write):
            try:
                status |= (last() or {}) | self.failure
            except OSError as error:
                self.failure = self.failure or {"state": "failed", "reason": self._unwritable(error)}
            except Exception as error:
                self.fail(error)
            status |= self.failure
        with contextlib.suppress(RunError):  # of another run
            check_owner(self.recorder.path, self.config.id)
            server_file.withdraw(self.recorder.path)
        return status

    def _ended(self) -> dict:
        """How the run has ended."""
        status = {key: self.course.status()[key] for key in ("state", "reason", "version", "samples")}
        more = {"dropped": self.dropped, "slowed": self.slowed, "traceback": self.course.traceback}
        return status | {key: value for key, value in more.items() if value}

    def _serve(self) -> None:
        self._thread(self._accept)
        self._wait_for_start()
        limit = None
        while not self.over.is_set():  # ended by the last worker that leaves
            expires = self.course.expires
            self.wake_up.wait(0.5 if expires is None else min(0.5, max(0.001, expires - time.monotonic())))
            self.wake_up.clear()
            with self.lock:
                self._fail_without_kernel()
                self._fail_without_workers()
                self.course.tick()
                if self.course.state != "running":
                    self.stop_workers()
            if self.course.state in ("stopped", "failed"):
                limit = limit or time.monotonic() + ENDING_S
                if time.monotonic() > limit:
                    return

    # -- what goes wrong here ------------------------------------------------------------------------------------------

    def _thread(self, work: Callable[..., None], *arguments: Any) -> threading.Thread:
        thread = threading.Thread(target=self._guarded, args=(work, *arguments), daemon=True)
        thread.start()
        return thread

    def _guarded(self, work: Callable[..., None], *arguments: Any) -> None:
        try:
            work(*arguments)
        except Exception as error:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """Whatever nobody expected, in any thread: the run has failed, with the traceback. The first error counts."""
        reason = str(error) if isinstance(error, LabError) else f"{type(error).__name__}: {error}"
        text = traceback_of(error)
        first = not self.failure
        self.failure = self.failure or {"state": "failed", "reason": f"the server failed: {reason}", "traceback": text}
        try:
            with self.lock:
                if self.course.state == "running":
                    self.stop("failed", self.failure["reason"])
        except Exception:  # nothing works any more; `serve` closes the connections
            self.course.state = "failed"
            self.over.set()
            self.wake_up.set()
        if first:
            print(text, file=sys.stderr)

    def _record(self, kind: str, **fields: Any) -> None:
        """A run whose record has a hole is no run: it fails, and every worker is sent the reason."""
        try:
            self.recorder.event(kind, **fields)
        except OSError as error:
            reason = self._unwritable(error)
            self.failure = self.failure or {"state": "failed", "reason": reason}
            raise _Unwritable(reason) from error
        except ValueError:
            if not self.recorder.closed:  # a thread that is later than `LEAVING_S`: how the run has ended is said already
                raise

    def _unwritable(self, error: OSError) -> str:
        return f"the run directory {self.spec.path} cannot be written: {error}."

    def _wait_for_start(self) -> None:
        """Until everybody has joined; after `join_timeout` it begins with those who have, and the others may come later."""
        limit = time.monotonic() + self.config.join_timeout
        while not self.course.started and self.course.state == "running" and not self.over.wait(0.02):
            with self.lock:
                self._fail_without_kernel()
            if time.monotonic() > limit:
                with self.lock:
                    if self.course.members:
                        self.course.expect(self.course.members)
                    else:
                        self.stop("failed", f"no worker joined within {self.config.join_timeout:g} s.{self.losses.said()}")

    def _fail_without_kernel(self) -> None:
        if not self.spec.kernel or os.getppid() == self.spec.kernel or self.course.state != "running":
            return
        since, again = self.course.last_lost_at, f"{self.spec.config.resume_call(self.spec.path)} continues it"
        if self.spec.local:
            self.stop("failed", f"its kernel is gone, and the workers of its local lab with it; {again}.")
        elif since is not None and time.monotonic() - since > ORPHANED_S:
            self.stop("failed", f"its kernel is gone, and every worker; {again}.")

    def _fail_without_workers(self) -> None:
        since, timeout = self.course.last_lost_at, self.config.join_timeout
        if since is not None and time.monotonic() - since > timeout:
            done = f"{self.course.grants.done} of {self.course.grants.budget} samples"
            self.stop("failed", f"every worker was lost after {done}, and none came back within {timeout:g} s.{self.losses.said()}")

    def lost(self, worker: int, why: str, *, diverged: bool = False) -> str:
        """A worker was lost, or dropped: returns why, with the count. The run fails if none is left that may come back."""
        why, known = self.losses.add(worker, why), {*self.generations, *self.course.workers}
        self.losses.diverged |= {worker} if diverged else set()
        out = self.losses.all_out()
        if self.course.state != "running" or self.course.finished:
            pass
        elif known <= self.losses.diverged | set(out) and diverged:
            self.stop("failed", f"{why} So it is with every worker." if len(known) > 1 else why)
        elif known <= set(out):
            self.stop("failed", "no worker is left. " + " ".join(f"Worker {index}: {reason}." for index, reason in out.items()))
        elif worker in out and not self.course.started and (there := set(self.course.workers) - set(out)):
            self.course.expect(there)
        return why

    def packed(self, weights: np.ndarray) -> np.ndarray:
        """A version as it goes over the wire; that of several workers at a time is made once."""
        if self.config.exchange == "float32":
            return weights
        with self._packing:
            if self._packed is None or self._packed[0] is not weights:
                self._packed = weights, compression.pack(weights, self.config.exchange)
            return self._packed[1]

    # -- connections ---------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        while True:
            try:
                for sock in self.handshakes.admitted(self.listener, self.spec.secret):
                    self._start_serving(sock)
                return
            except MemoryError:  # those who had not proved who they are come again
                self.over.wait(0.05)

    def _start_serving(self, sock: socket.socket) -> None:
        while not self.over.is_set():
            try:
                self._thread(self._serve_peer, sock)
                return
            except (RuntimeError, MemoryError):  # no thread can be started: somebody else's may end
                self.over.wait(0.05)

    def _serve_peer(self, sock: socket.socket) -> None:
        """A thread of its own for each member: a worker, or a kernel that watches."""
        try:
            link = self.identity.secured(sock, self.spec.secret) if self.identity else sock
            with transport.Connection(link, SERVER_TIMEOUT_S, 4 * self.size, check_request) as connection:
                request, _ = connection.receive()
                if request["op"] == "watch":
                    self._serve_watcher(connection)
                detector = FailureDetector(self.config.heartbeat_timeout, time.monotonic)
                while request and request["op"] == "join":
                    request = WorkerConnection(self, connection, request, detector).serve()
        except (WireError, OSError, MemoryError):
            pass  # the peer is gone, or there is no room for it; a worker has been taken out where it was served

    def _serve_watcher(self, connection: transport.Connection) -> None:
        """The side channel of the kernel: status and stop, and which workers are here."""
        while True:
            request, _ = connection.receive()
            more = {}
            if request["op"] == "checkpoint":
                more = {"saved": self._checkpoint(request["within"])}
            elif request["op"] == "inspect":
                try:
                    more = {"inspected": self._inspect(request["worker"], request["within"])}
                except Exception as error:  # it changes nothing: no reason for the run to end
                    more = {"inspected": {"error": traceback_of(error)}}
            with self.lock:
                if request["op"] == "stop":
                    self.stop(request.get("state") or "stopped", request.get("reason") or "")
                elif request["op"] == "expect":
                    self.course.expect(request["workers"])
                elif request["op"] == "drop":
                    for index in set(request["workers"]) & set(self.connections):
                        self.connections[index].close()
                elif request["op"] == "slow":
                    self._slow(request["worker"], float(request["factor"]))
                elif request["op"] == "lost":
                    self._lost_process(**{key: request[key] for key in ("worker", "generation", "reason")})
                status = self.course.status() | {"dropped": self.dropped, "slowed": self.slowed}
            started = self.recorder.started
            connection.send({"op": "status", "seconds": time.time() - started if started else 0.0, **status, **more})

    def _checkpoint(self, timeout: float) -> int | None:
        """Save the newest version; its number once it is on the disk, None where that took too long."""
        limit, version = time.monotonic() + min(timeout, SERVER_TIMEOUT_S), None
        while time.monotonic() < limit and not self.over.wait(0.01):
            with self.lock:
                if version is None and self.course.room():
                    self.course.checkpoint()
                    version = self.course.policy.newest
            if version in self.recorder.saved:
                return version
        return None

    def _inspect(self, worker: int, timeout: float) -> dict | None:
        """What a worker says of itself, None if it says nothing in time, and what is known of it here; None where there is none."""
        answers: queue.SimpleQueue[dict] = queue.SimpleQueue()
        limit, answer, number = time.monotonic() + min(timeout, SERVER_TIMEOUT_S), None, next(self.numbers)
        try:
            with self.lock:
                member = self.course.members.get(worker)
                if member is None:
                    return None
                self.asked[number] = worker, answers
                self._tell(worker, {"op": "inspect", "number": number})
            while answer is None and time.monotonic() < limit and not self.over.is_set():
                with contextlib.suppress(queue.Empty):
                    answer = answers.get(timeout=min(0.1, max(0.001, limit - time.monotonic())))
        finally:
            self.asked.pop(number, None)
        with self.lock:
            names = ("host", "pid", "passes", "busy", "granted", "seen", "loss", "heard")
            known = {name: getattr(member, name) for name in names} | {"heard_s": time.monotonic() - member.heard_at}
        return {"answer": answer, "known": known}

    def inspected(self, worker: int, answer: dict) -> None:
        """A worker has answered; what nobody waits for any more is dropped."""
        asked, answers = self.asked.get(answer["number"], (None, None))
        if asked == worker:
            answers.put(answer)

    def _slow(self, worker: int, factor: float) -> None:
        """From now on all work of this worker lasts so many times as long as it would; recorded, as it is emulated."""
        if (member := self.course.members.get(worker)) is None:
            return
        self.slowed[str(worker)] = factor
        self._record(
            "slow", worker=worker, incarnation=member.incarnation, message=f"{factor:g} times as slow as its machine, in all"
        )
        self._tell(worker, {"op": "slow", "factor": factor})

    def _lost_process(self, worker: int, generation: int, reason: str) -> None:
        """The process of a worker has ended. If it had joined, that was noticed here; one that never did is counted now."""
        joined = generation <= self.generations.get(worker, -1)
        if reasons := self.losses.reasons.get(worker) if joined else None:
            reasons[-1] = reason  # the connection did not say as much
        why = reason if joined else self.lost(worker, reason)
        self._record("refuse", worker=worker, message=why)

    def leave(self, member: Member, why: str, *, diverged: bool = False, short: bool = False) -> None:
        """A worker is gone; `why`, if that was no orderly end. `short` of memory: that does not count against it."""
        if self.course.members.get(member.index) is not member:
            return
        if not why and member.busy and self.course.state == "running":
            why = "it left in the middle of a local pass"
        counts = why and not short and self.course.state == "running" and not self.course.finished
        try:
            self.course.leave(member, self.lost(member.index, why, diverged=diverged) if counts else why)
        except _Unwritable as error:
            self.fail(error)
        if self.course.state != "running":
            self.stop_workers()
        elif self.course.update.collective and member.busy and member.group:  # the others wait for it in the middle of a step
            self._interrupt({"op": "regroup", "group": member.group}, member.group)
        self._end_if_over()

    # -- the end, checkpoints ------------------------------------------------------------------------------------------

    def stop(self, state: str, reason: str) -> None:
        with contextlib.suppress(_Unwritable):  # everybody has been answered, and `failure` says why
            self.course.stop(state, reason)
        self.stop_workers()
        self._end_if_over()

    def _end_if_over(self) -> None:
        if self.course.state != "running" and not self.course.members:
            self.over.set()
            self.wake_up.set()

    def stop_workers(self) -> None:
        """Those that are in the middle of a local pass; the others are answered by the coordinator."""
        self._interrupt({"op": "stop", "reason": self.course.reason, "wait_s": 0.0})

    def _interrupt(self, message: dict, group: int | None = None) -> None:
        for member in list(self.course.members.values()):
            if member.busy and group in (None, member.group):
                self._tell(member.index, message)

    def _tell(self, worker: int, message: dict) -> None:
        """In a thread of its own: the worker may take nothing."""
        try:
            self._thread(_notify, self.connections[worker], message)
        except RuntimeError:  # no thread can be started
            _notify(self.connections[worker], message)

    def _to_be_saved(self, version: int, weights: np.ndarray, state: dict) -> None:
        self.versions.put((version, weights, state))
        self.unsaved += 1

    def _save_versions(self) -> None:
        """Writes versions to the disk away from the lock, so that a slow disk delays no worker."""
        path = Path(self.spec.path)
        while (item := self.versions.get()) is not None:
            try:
                self._save(*item)
                retained = checkpoints.retained(self.recorder.saved, self.config.budget, self.config.checkpoints)
                checkpoints.prune(path, retained | self.recorder.resumed, run=self.config.id)
            except OSError as error:  # without its versions a run is not whole
                self.fail(RunError(self._unwritable(error)))
            except Exception as error:
                self.fail(error)
            item = None
            with self.lock:  # what was due meanwhile
                self.unsaved -= 1
                self._guarded(self.course.save_if_due)

    def _save(self, version: int, weights: np.ndarray, state: dict) -> None:
        """Tried again while files or memory are short; after that the run goes on without this version, unless it is the last one."""
        limit = time.monotonic() + PASSING_S
        while True:
            try:
                return checkpoints.save(self.recorder, version, weights, state, run=self.config.id)
            except (OSError, MemoryError) as error:
                if not isinstance(error, MemoryError) and error.errno not in PASSING:
                    raise
                if time.monotonic() > limit:
                    with self.lock:
                        if self.over.is_set() or self.course.state != "running":
                            raise
                        return self.course.skipped(version)
            time.sleep(0.1)


class _Unwritable(RunError):
    """The record cannot be written; `Server.failure` says why."""


class WorkerConnection:
    """One incarnation of a worker, served from its `join` until it is gone."""

    def __init__(self, server: Server, connection: transport.Connection, join: dict, detector: FailureDetector) -> None:
        self.server, self.connection, self.join = server, connection, join
        self.course, self.detector = server.course, detector
        self.outbox: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        self.dtype = server.config.exchange
        self.push_bytes = compression.n_bytes(self.dtype, server.size)
        self.bounded = self.push_bytes >= LARGE and self.course.update.ahead  # a rule of rounds holds all pushes of one anyway
        self.buffer: np.ndarray | None = None  # of a push, as it comes; the rule keeps it, or nobody does
        self.pulled: np.ndarray | None = None  # with which it was released last, where it pushes changes
        self.unscored = False  # has it pushed without a score, which may come later?

    def serve(self) -> dict | None:
        """Until the worker is gone; its next join, if it comes back on the same connection."""
        server, index = self.server, self.join["worker"]
        member, why, dropped, diverged, short = None, "", False, False, False
        try:
            server.over.wait(server.losses.pause(index))
            with server.lock:
                member, refused = self._admit()
            if member is None:
                self.connection.send({"op": "stop", "reason": refused, "wait_s": 0.0})
                return None
            self.detector.begin()
            self.connection.set_timeout(self.detector.timeout)
            self._answer(member)
            while self._receive(member):
                server.pushes.end(self.connection)
                self._answer(member)
        except _Expired as expired:
            why = str(expired)
        except NoRoom as error:
            why, dropped, short = str(error), True, True
        except BadPush as error:
            why, dropped, diverged = str(error), True, isinstance(error, Diverged)
        except WireError as error:
            silent = isinstance(error.__cause__, TimeoutError)  # in the middle of a message, one way or the other
            why = str(self._expired() if silent else error)
            raise
        except Exception as error:
            server.fail(error)
            why = server.failure["reason"]
        finally:
            self.buffer = None
            server.pushes.end(self.connection)
            with server.lock:
                if member is None and server.connections.get(index) is self.connection:  # it was about to join
                    member = self.course.members.get(index)
                if member:
                    server.leave(member, why, diverged=diverged, short=short)
        if short:
            server.over.wait(NO_ROOM_S)
        if why and self.course.state == "running":
            return self._serve_expired(member, why if dropped else "")
        if why:
            _notify(self.connection, {"op": "stop", "reason": self.course.reason or why, "wait_s": 0.0})
        return None

    def _admit(self) -> tuple[Member | None, str]:
        """A worker joins, for the first time or again; or the reason why it cannot."""
        server, join = self.server, self.join
        index, generation = join["worker"], join.get("generation") or 0
        if self.course.state != "running" or self.course.finished:
            return None, "the run has ended."
        if generation < server.generations.get(index, 0):
            return None, f"worker {index} has been started again elsewhere."
        if index in self.course.members:
            server.lost(index, AGAIN)
        if out := server.losses.out(index):
            return None, out
        before = server.connections.get(index)
        server.generations[index], server.outboxes[index], server.connections[index] = generation, self.outbox, self.connection
        if before is not None and before is not self.connection:
            before.close()
        about = {key: join[key] for key in ("device", "threads", "generator", "precision") if join.get(key) is not None}
        member = self.course.join(index, join.get("about") or "", join.get("seconds_per_sample"), **about)
        member.host, member.pid, member.heard_at = join.get("host") or "", join.get("pid"), time.monotonic()
        if factor := server.slowed.get(str(index)):  # its process may be another one
            server._tell(index, {"op": "slow", "factor": factor})
        return member, ""

    def _receive(self, member: Member) -> bool:
        """Process the messages of a local pass, until the worker needs an answer (True) or leaves (False)."""
        while True:
            header, n = self._next()
            member.heard, member.heard_at = header["op"], time.monotonic()
            if header["op"] == "inspected":
                self.server.inspected(member.index, header)
                continue
            if header["op"] == "heartbeat":
                member.seen = min(header.get("samples") or 0, member.granted)
                if header.get("loss") is not None:
                    member.loss = header["loss"]
                continue
            weights = self._pushed(n, header.get("shift") or 0) if header["op"] == "push" else None
            self.buffer = None
            with self.server.lock:
                if self.course.members.get(member.index) is not member:
                    raise _Expired("it came again")
                if header["op"] == "score":
                    self._score(member, header)
                    continue
                if header["op"] == "push":
                    self.course.push(member, header, weights, n, own=True)
                    self.unscored = header["score"] is None
                    if self.course.state == "running":
                        self.server.losses.counts(member.index)
                    else:
                        self.server.stop_workers()
                    return True
                if header["op"] == "regroup" and not member.group:
                    raise Refused("a 'regroup' message was refused: this worker is in no group.")
                if header["op"] == "regroup":
                    self._regroup(member, header.get("reason") or "")
                    return True
                if header["op"] == "fail":  # an exception over there; its traceback travels with the worker's task
                    self.server.stop("failed", header["reason"])
                elif header["op"] != "leave":
                    raise Refused(f"a {header['op']!r} message was refused: it is unknown, or out of place.")
                return False

    def _next(self) -> tuple[dict, int]:
        """The next message, which is a sign of life when it begins; a large one takes its time."""
        if not self.connection.waiting(self.detector.left):
            raise self._expired()
        self.detector.heard()
        self.connection.set_timeout(self.detector.timeout)
        try:
            message = self.connection.receive(self._buffer_for)
        except MemoryError as error:
            raise NoRoom("there is no memory for its message.") from error
        self.server.pushes.received(self.connection)
        self.detector.begin()
        return message

    def _regroup(self, member: Member, why: str) -> None:
        """A rank says that its group is broken. If nobody of it is gone, and nobody has said so before, it is this one that breaks it: that
        is counted as a loss, and the others are notified."""
        server, ranks, group = self.server, self.course.grants.ranks, member.group
        if first := bool(ranks.members) and ranks.number == group:
            reason = f"it asked for another group of the all-reduce, of which nobody was gone: {why or 'without a reason'}"
            if len(server.losses.reasons.get(member.index, ())) >= LOSSES - 1:
                raise BadPush(f"worker {member.index} at version {self.course.update.version}: {reason}")
            server.losses.add(member.index, reason)
        self.course.regroup(member, why)
        if first:
            server._interrupt({"op": "regroup", "group": group}, group)

    def _answer(self, member: Member) -> None:
        """Send this worker its answer when there is one; until then a "hold" now and then, which finds a dead peer too."""
        while True:
            try:
                answer = self.outbox.get(timeout=min(HEARTBEAT_S, self.detector.left))
                break
            except queue.Empty:
                self.connection.send({"op": "hold"})
            while self.connection.waiting():
                header, _ = self._next()
                if header["op"] == "fail":
                    with self.server.lock:
                        self.server.stop("failed", header["reason"])
                elif header["op"] == "inspected":
                    self.server.inspected(member.index, header)
                elif header["op"] != "heartbeat":
                    raise WireError(f"a {header['op']!r} message came from a worker that is held.")
                member.heard, member.heard_at = header["op"], time.monotonic()
            if not self.detector.left:
                raise self._expired()
        n = self.connection.send(answer.header(), *self._packed(answer))
        self.detector.begin()  # while this was sent nobody has looked for heartbeats
        if grant := answer.grant:
            who = {"worker": member.index, "incarnation": member.incarnation}
            self.server._record("release", bytes=n, **who, version=grant.version, wait_s=grant.wait_s)

    def _packed(self, answer: Answer) -> list[np.ndarray]:
        """What goes over the wire with this answer."""
        if not answer.grant:
            return []
        if self.dtype != "float32":
            self.pulled = answer.weights
        try:
            return [self.server.packed(answer.weights), answer.indices]
        except MemoryError as error:
            raise NoRoom(f"there is no memory to send it version {answer.grant.version}.") from error
        except UpdateError as error:
            with self.server.lock:
                self.server.stop("failed", f"version {answer.grant.version}: {error}")
            raise WireError(str(error)) from error

    def _pushed(self, n: int, shift: int) -> np.ndarray | None:
        """The weights of a push of n bytes; None if it is not of the right size. `NoRoom` when there was none for it."""
        if n != self.push_bytes:
            return None
        if self.dtype == "float32" and self.buffer is not None:
            return self.buffer
        try:
            if self.buffer is None:
                raise MemoryError
            weights = np.empty(self.server.size, np.float32)
            sizes = self.course.update.n_params, self.server.config.still
            pulled = self.course.update.weights if self.pulled is None else self.pulled
            compression.add_change(pulled, self.buffer, self.dtype, shift, weights, *sizes)
        except MemoryError as error:
            raise NoRoom(NO_ROOM) from error
        return weights

    def _score(self, member: Member, header: dict) -> None:
        """Measured while the push was under way, for a rule that does not ask for it."""
        if not self.unscored:
            raise Refused("a 'score' message was refused: there is no push that waits for one.")
        self.unscored = False
        member.score = header["score"]
        who = {"worker": member.index, "incarnation": member.incarnation, "pass": member.passes}
        self.server._record("score", **who, score=header["score"], score_s=header["score_s"])

    def _serve_expired(self, member: Member, dropped: str = "") -> dict | None:
        """A worker that was dropped, or was taken to be gone and sends again: nothing counts until it has joined anew."""
        self.connection.set_timeout(SERVER_TIMEOUT_S)
        asked, late = bool(dropped), 0
        if dropped:
            self.connection.send({"op": "rejoin", "reason": dropped})
        while not self.server.over.is_set():
            if not self.connection.waiting(HEARTBEAT_S):
                continue
            header, _ = self.connection.receive(_drain)
            if not dropped:
                self.detector.heard()
            if header["op"] in ("join", "leave", "fail"):
                return header
            if header["op"] == "inspected":
                continue
            late += header["op"] == "push"
            if late > LATE_PUSHES:
                raise WireError("it goes on pushing without joining anew.")
            if not asked or header["op"] == "push":
                with self.server.lock:
                    self.course.refuse(member, header)
            if not asked:
                self.connection.send({"op": "rejoin"})
                asked = True
        self.connection.send({"op": "stop", "reason": "the run has ended.", "wait_s": 0.0})
        return None

    def _buffer_for(self, header: dict, n: int) -> Sequence[memoryview]:
        if n != self.push_bytes or header["op"] != "push":
            return _drain(header, n)
        if self.bounded:
            self.server.pushes.begin(self.connection)
        try:
            self.buffer = compression.buffer(self.dtype, self.server.size)
        except MemoryError:
            return _drain(header, n)
        return [memoryview(self.buffer)]

    def _expired(self) -> Exception:
        return _Expired(f"no sign of life for {self.detector.timeout:.3g} s")


class _Expired(Exception):
    """A worker has sent nothing for too long, or another incarnation has taken its place."""


def _drain(_: dict, n: int) -> Sequence[memoryview]:
    """Memory for a body that nobody wants, or for which there is none: a little of it, again and again."""
    part = memoryview(bytearray(min(n, DRAIN)))
    return [*[part] * (n // DRAIN), part[: n % DRAIN]] if n > DRAIN else [part]


def _notify(connection: transport.Connection, message: dict) -> None:
    """Send to a worker that may be gone already."""
    with contextlib.suppress(WireError):
        connection.send(message)


class _Log:
    """Standard error, up to `LOG_BYTES`: a rule of the user's own may print at each push."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.left = stream, LOG_BYTES

    def write(self, text: str) -> int:
        if self.left > 0:
            self.left -= len(text)
            self.stream.write(text if self.left > 0 else "\n... and so on: the rest is left out.\n")
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def main() -> None:
    """Read the spec from standard input (which only the parent can write), print where it listens, serve, print how it ended."""
    parent, sys.stdout = sys.stdout, _Log(sys.stderr)  # what a rule prints is no message to the parent
    sys.stderr = sys.stdout
    server = Server(pickle.load(sys.stdin.buffer))
    threading.excepthook = lambda args: server.fail(args.exc_value)  # of threads that a rule has started
    with contextlib.suppress(BrokenPipeError):  # the parent is gone
        print(json.dumps({"address": server.address}), file=parent, flush=True)
        print(json.dumps(server.serve()), file=parent, flush=True)
