"""The server of one run: owns the global weights, answers push and pull, and writes down what happens.

A process of its own that imports numpy but neither torch nor Dask. Each connection has a thread; the course of the run
(`labkit.training.server.coordinator`) is changed under one lock, which also gives the order in which pushes are merged. Transfers
happen outside the lock: versions are immutable arrays, so one worker can still be receiving version 7 while another makes version
8. `labkit.training.wire.protocol` shows the messages in both directions.

Started by `labkit.training.supervisor` in a process of its own; asked by it and by others through `labkit.training.attach`.
"""

import contextlib
import json
import pickle
import queue
import secrets
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from labkit.errors import UpdateError, WireError
from labkit.partition import Partition
from labkit.runs import checkpoints, server_file
from labkit.runs.checkpoints import Layout
from labkit.runs.config import RunConfig
from labkit.runs.events import Recorder
from labkit.runs.files import write_json
from labkit.training.server.coordinator import Coordinator
from labkit.training.server.membership import Member
from labkit.training.wire import compression, transport
from labkit.training.wire.protocol import HEARTBEAT_S, SERVER_TIMEOUT_S, Answer, check_request
from labkit.updates import Update


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


class Server:
    """Serves one run: `serve()` returns when it has ended, and the run directory then says how."""

    def __init__(self, spec: ServerSpec) -> None:
        self.spec, self.config = spec, spec.config
        self.lock = threading.RLock()
        self.recorder = Recorder(Path(spec.path))
        checkpoints.prepare(self.recorder.path)
        self.listener, self.handshakes = transport.listen(spec.host), transport.Handshakes()
        self.outboxes: dict[int, queue.SimpleQueue[Answer]] = {}
        self.connections: dict[int, transport.Connection] = {}
        self.generations: dict[int, int] = {}  # by worker: how often the kernel has started its task
        self.versions: queue.SimpleQueue[tuple[int, np.ndarray, dict] | None] = queue.SimpleQueue()  # to be saved
        self.over, self.wake_up = threading.Event(), threading.Event()  # wake_up: look at the time, or at `over`
        self.unwritten = ""  # why the record is not complete
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
            record=self.recorder.event,
            save=lambda *version: self.versions.put(version),
            clock=time.monotonic,
            alarm=lambda _: self.wake_up.set(),
            age=spec.age,
        )
        server_file.announce(Path(spec.path), self.address, spec.secret)  # before its parent is sent the address

    @property
    def address(self) -> tuple[str, int]:
        return self.listener.getsockname()[:2]

    def serve(self) -> dict:
        try:
            return self._serve()
        finally:
            server_file.withdraw(Path(self.spec.path))

    def _serve(self) -> dict:
        saver = threading.Thread(target=self._save_versions)
        saver.start()
        threading.Thread(target=self._accept, daemon=True).start()
        self._wait_for_start()
        while not self.over.is_set():  # ended by the last worker that leaves; how long each may be silent has a limit
            expires = self.course.expires
            self.wake_up.wait(0.5 if expires is None else min(0.5, max(0.001, expires - time.monotonic())))
            self.wake_up.clear()
            with self.lock:
                self._fail_without_workers()
                self._tick()
        transport.shut(self.listener)
        with self.lock:
            self.course.checkpoint()
        self.versions.put(None)
        saver.join()
        status = {key: self.course.status()[key] for key in ("state", "reason", "version", "samples")}
        for last in (self.recorder.close, lambda: write_json(Path(self.spec.path) / "status.json", status)):
            try:
                last()
            except OSError as error:
                self.unwritten = self.unwritten or self._unwritable(error)
            if self.unwritten:
                status.update(state="failed", reason=self.unwritten)
        return status

    def _wait_for_start(self) -> None:
        """Until everybody has joined; after `join_timeout` it begins with those who have, and the others may come later."""
        limit = time.monotonic() + self.config.join_timeout
        while not self.course.started and self.course.state == "running" and not self.over.wait(0.02):
            if time.monotonic() > limit:
                with self.lock:
                    if self.course.members:
                        self.course.expect(self.course.members)
                    else:
                        self.stop("failed", f"no worker joined within {self.config.join_timeout:g} s.")

    def _fail_without_workers(self) -> None:
        since, timeout = self.course.last_lost_at, self.config.join_timeout
        if since is not None and time.monotonic() - since > timeout:
            done = f"{self.course.grants.done} of {self.course.grants.budget} samples"
            self.stop("failed", f"every worker was lost after {done}, and none came back within {timeout:g} s.")

    def _tick(self) -> None:
        try:
            self.course.tick()
        except OSError as error:
            self.cannot_write(error)
        if self.course.state != "running":
            self.stop_workers()

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
        for sock in transport.incoming(self.listener):
            threading.Thread(target=self._serve_peer, args=(sock,), daemon=True).start()

    def _serve_peer(self, sock: socket.socket) -> None:
        """A thread of its own for each peer: a worker, or a kernel that watches."""
        try:
            limits = {"timeout": SERVER_TIMEOUT_S, "max_body": self.spec.weights.nbytes, "handshakes": self.handshakes}
            with transport.accept(sock, self.spec.secret, check=check_request, **limits) as connection:
                request, _ = connection.receive()
                if request["op"] == "watch":
                    self._serve_watcher(connection)
                while request and request["op"] == "join":
                    request = WorkerConnection(self, connection, request).serve()
        except WireError:
            pass  # the peer is gone; a worker has been taken out where it was served

    def _serve_watcher(self, connection: transport.Connection) -> None:
        """The side channel of the kernel: status and stop, and which workers are here."""
        while True:
            request, _ = connection.receive()
            with self.lock:
                if request["op"] == "stop":
                    self.stop(request.get("state") or "stopped", request.get("reason") or "")
                elif request["op"] == "expect":
                    self.course.expect(request["workers"])
                elif request["op"] == "drop":
                    for index in set(request["workers"]) & set(self.connections):
                        self.connections[index].close()
                status = self.course.status()
            started = self.recorder.started
            connection.send({"op": "status", "seconds": time.time() - started if started else 0.0, **status})

    def leave(self, member: Member, why: str) -> None:
        try:
            self.course.leave(member, why)
        except OSError as error:
            self.cannot_write(error)
            self.course.over = not self.course.members
        if self.course.state != "running":
            self.stop_workers()
        elif self.course.update.collective and member.busy:  # the others wait for it in the middle of a step
            self._interrupt({"op": "regroup", "group": member.group})
        self._end_if_over()

    # -- the end, checkpoints ------------------------------------------------------------------------------------------

    def stop(self, state: str, reason: str) -> None:
        try:
            self.course.stop(state, reason)
        except OSError:
            self.unwritten = self.unwritten or reason
        self.stop_workers()
        self._end_if_over()

    def _end_if_over(self) -> None:
        if self.course.over:
            self.over.set()
            self.wake_up.set()

    def cannot_write(self, error: OSError) -> str:
        """A run whose record has a hole is no run: it fails, and every worker is sent the reason."""
        self.unwritten = self.unwritten or self._unwritable(error)
        self.stop("failed", self.unwritten)
        return self.unwritten

    def _unwritable(self, error: OSError) -> str:
        return f"the run directory {self.spec.path} cannot be written: {error}."

    def stop_workers(self) -> None:
        """Those that are in the middle of a local pass; the others are answered by the coordinator."""
        self._interrupt({"op": "stop", "reason": self.course.reason, "wait_s": 0.0})

    def _interrupt(self, message: dict) -> None:
        for member in list(self.course.members.values()):
            if member.busy:
                threading.Thread(target=_notify, args=(self.connections[member.index], message), daemon=True).start()

    def _save_versions(self) -> None:
        """Writes versions to the disk away from the lock, so that a slow disk delays no worker."""
        path = Path(self.spec.path)
        while (item := self.versions.get()) is not None:
            try:
                checkpoints.save(self.recorder, *item)
                retained = checkpoints.retained(self.recorder.saved, self.config.budget, self.config.checkpoints)
                checkpoints.prune(path, retained | self.recorder.resumed)
            except Exception as error:  # whatever it is: without its versions a run is not whole
                with self.lock:
                    self.cannot_write(error)


class WorkerConnection:
    """One incarnation of a worker, served from its `join` until it is gone."""

    def __init__(self, server: Server, connection: transport.Connection, join: dict) -> None:
        self.server, self.connection, self.join = server, connection, join
        self.course, self.heartbeat_timeout = server.course, server.config.heartbeat_timeout
        self.outbox: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        self.dtype, n = server.config.exchange, len(server.spec.weights)
        self.buffer = compression.buffer(self.dtype, n)  # of its pushes, as they come
        self.weights = self.buffer if self.dtype == "float32" else np.empty(n, np.float32)
        self.pulled = server.spec.weights  # with which it was released last

    def serve(self) -> dict | None:
        """Until the worker is gone; its next join, if it comes back on the same connection."""
        member, refused = self._admit()
        if member is None:
            self.connection.send({"op": "stop", "reason": refused, "wait_s": 0.0})
            return None
        why = ""
        self.connection.set_timeout(self.heartbeat_timeout)
        try:
            self._answer(member)
            while self._receive(member):
                self._answer(member)
        except _Expired as expired:
            why = str(expired)
        except WireError as error:
            why = str(error)
            raise
        except OSError as error:  # the record cannot be written: nothing that happens from now on would be known
            with self.server.lock:
                why = self.server.cannot_write(error)
            _notify(self.connection, {"op": "stop", "reason": why, "wait_s": 0.0})
        finally:
            with self.server.lock:
                self.server.leave(member, why)
        return self._serve_expired(member) if why and self.course.state == "running" else None

    def _admit(self) -> tuple[Member | None, str]:
        """A worker joins, for the first time or again; or the reason why it cannot."""
        server, join = self.server, self.join
        index, generation = join["worker"], join.get("generation") or 0
        with server.lock:
            if self.course.state != "running" or self.course.finished:
                return None, "the run has ended."
            if generation < server.generations.get(index, 0):
                return None, f"worker {index} has been started again elsewhere."
            before = server.connections.get(index)
            server.generations[index], server.outboxes[index], server.connections[index] = generation, self.outbox, self.connection
            try:
                about = {key: join[key] for key in ("device", "threads", "generator") if join.get(key) is not None}
                member = self.course.join(index, join.get("about") or "", join.get("seconds_per_sample"), **about)
            except OSError as error:
                refused = server.cannot_write(error)
                server.leave(self.course.members[index], refused)
                return None, refused
        if before is not None and before is not self.connection:
            before.close()
        return member, ""

    def _receive(self, member: Member) -> bool:
        """Process the messages of a local pass, until the worker needs an answer (True) or leaves (False)."""
        while True:
            if not self.connection.waiting(self.heartbeat_timeout):
                raise self._expired()
            header, n = self.connection.receive(self._buffer_for)
            if header["op"] == "heartbeat":
                member.seen = min(header.get("samples") or 0, member.granted)
                if header.get("loss") is not None:
                    member.loss = header["loss"]
                continue
            weights = self._pushed(n, header.get("shift") or 0) if header["op"] == "push" else None
            with self.server.lock:
                if self.course.members.get(member.index) is not member:
                    raise _Expired("it came again")
                if header["op"] == "score":
                    self._score(member, header)
                    continue
                if header["op"] == "push":
                    self.course.push(member, header, weights, n)
                    if self.course.state != "running":
                        self.server.stop_workers()
                    return True
                if header["op"] == "regroup":
                    self.course.regroup(member, header.get("reason") or "")
                    return True
                if header["op"] == "fail":  # an exception over there; its traceback travels with the worker's task
                    self.server.stop("failed", header["reason"])
                return False

    def _answer(self, member: Member) -> None:
        """Send this worker its answer when there is one; until then a "hold" now and then, which finds a dead peer too."""
        heartbeat_at = time.monotonic()
        while True:
            try:
                answer = self.outbox.get(timeout=HEARTBEAT_S)
                break
            except queue.Empty:
                self.connection.send({"op": "hold"})
            while self.connection.waiting():
                header, _ = self.connection.receive()
                if header["op"] == "fail":
                    with self.server.lock:
                        self.server.stop("failed", header["reason"])
                elif header["op"] != "heartbeat":
                    raise WireError(f"a {header['op']!r} message came from a worker that is held.")
                heartbeat_at = time.monotonic()
            if time.monotonic() - heartbeat_at > self.heartbeat_timeout:
                raise self._expired()
        n = self.connection.send(answer.header(), *self._packed(answer))
        if grant := answer.grant:
            who = {"worker": member.index, "incarnation": member.incarnation}
            self.server.recorder.event("release", bytes=n, **who, version=grant.version, wait_s=grant.wait_s)

    def _packed(self, answer: Answer) -> list[np.ndarray]:
        """What goes over the wire with this answer."""
        if not answer.grant:
            return []
        if self.dtype != "float32":
            self.pulled = answer.weights
        try:
            return [self.server.packed(answer.weights), answer.indices]
        except UpdateError as error:
            with self.server.lock:
                self.server.stop("failed", f"version {answer.grant.version}: {error}")
            raise WireError(str(error)) from error

    def _pushed(self, n: int, shift: int) -> np.ndarray | None:
        """The weights of a push of n bytes; None if it is not of the right size."""
        if n != self.buffer.nbytes:
            return None
        if self.dtype != "float32":
            compression.add_change(self.pulled, self.buffer, self.dtype, shift, self.weights, self.course.update.n_params)
        return self.weights

    def _score(self, member: Member, header: dict) -> None:
        """Measured while the push was under way, for a rule that does not ask for it."""
        member.score = header["score"]
        who = {"worker": member.index, "incarnation": member.incarnation, "pass": member.passes}
        self.server.recorder.event("score", **who, score=header["score"], score_s=header["score_s"])

    def _serve_expired(self, member: Member) -> dict | None:
        """A worker that was taken to be gone sends again: nothing that it has done counts; it is asked to join anew."""
        self.connection.set_timeout(SERVER_TIMEOUT_S)
        asked = False
        while not self.server.over.is_set():
            if not self.connection.waiting(HEARTBEAT_S):
                continue
            header, _ = self.connection.receive(self._buffer_for)
            if header["op"] in ("join", "leave", "fail"):
                return header
            if not asked or header["op"] == "push":
                with self.server.lock:
                    self.course.refuse(member, header)
            if not asked:
                self.connection.send({"op": "rejoin"})
                asked = True
        self.connection.send({"op": "stop", "reason": "the run has ended.", "wait_s": 0.0})
        return None

    def _buffer_for(self, _: dict, n: int) -> list:
        return [self.buffer] if n == self.buffer.nbytes else [bytearray(n)]

    def _expired(self) -> Exception:
        return _Expired(f"no sign of life for {self.heartbeat_timeout:g} s")


class _Expired(Exception):
    """A worker has sent nothing for too long, or another incarnation has taken its place."""


def _notify(connection: transport.Connection, message: dict) -> None:
    """Send to a worker that may be gone already."""
    with contextlib.suppress(WireError):
        connection.send(message)


def main() -> None:
    """Read the spec from standard input (which only the parent can write), print where it listens, serve, print how it ended."""
    spec = pickle.load(sys.stdin.buffer)
    server = Server(spec)
    try:
        print(json.dumps({"host": server.address[0], "port": server.address[1]}), flush=True)
        print(json.dumps(server.serve()), flush=True)
    except BrokenPipeError:
        pass  # the parent is gone
