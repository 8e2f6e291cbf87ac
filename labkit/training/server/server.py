"""The server of one run: owns the global weights, answers push and pull, and writes down what happens.

A process of its own that imports numpy but neither torch nor Dask. Each connection has a thread; the course of the run
(`labkit.training.server.coordinator`) is changed under one lock, which also gives the order in which pushes are merged. Transfers
happen outside the lock: versions are immutable arrays, so one worker can still be receiving version 7 while another makes version
8.

What is said to a worker, and by it, is `labkit.training.server.connection`.

Started by `labkit.training.supervisor` in a process of its own; watched by it and by `labkit.training.attach`.
"""

from __future__ import annotations

import json
import pickle
import queue
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from labkit.errors import WireError
from labkit.partition import Partition
from labkit.runs import checkpoints
from labkit.runs import server_file as presence
from labkit.runs.checkpoints import Layout
from labkit.runs.config import RunConfig
from labkit.runs.events import Recorder
from labkit.runs.files import write_json
from labkit.training.server.connection import Conversation, tell
from labkit.training.server.coordinator import Coordinator
from labkit.training.server.membership import Member, standing
from labkit.training.wire import compression as exchange
from labkit.training.wire import transport as wire
from labkit.training.wire.protocol import SERVER_TIMEOUT_S, Answer, check_request
from labkit.updates import Update


@dataclass
class ServerSpec:
    """All that a server needs to know beside the settings of its run; handed over by its parent through a pipe."""

    config: RunConfig
    path: str  # the run directory
    secret: bytes
    update: Update
    partition: Partition
    weights: np.ndarray  # float32 (n,): [parameters | buffers]
    layout: Layout
    labels: np.ndarray | None = None  # int64 (n_train,), for a stratified partition
    host: str = "127.0.0.1"
    age: float = checkpoints.AGE_S  # seconds after which the newest version is kept, also between the checkpoints
    state: dict | None = None  # of the checkpoint that a run goes on from (`labkit.runs.checkpoints.read_state`)


class Server:
    """Serves one run: `serve()` returns when it has ended, and the run directory then says how."""

    def __init__(self, spec: ServerSpec) -> None:
        self.spec, self.config = spec, spec.config
        self.lock = threading.RLock()
        self.recorder = Recorder(Path(spec.path))
        checkpoints.prepare(self.recorder.path)
        self.listener, self.strangers = wire.listen(spec.host), wire.Strangers()
        self.outboxes: dict[int, queue.SimpleQueue[Answer]] = {}
        self.connections: dict[int, wire.Connection] = {}
        self.generations: dict[int, int] = {}  # by worker: how often the kernel has started its task
        self.versions: queue.SimpleQueue[tuple[int, np.ndarray, dict] | None] = queue.SimpleQueue()
        self.over, self.bell = threading.Event(), threading.Event()  # the bell: look at the time, or at `over`
        self.unwritten = ""  # why the record is not complete
        self._packing = threading.Lock()
        self._packed: tuple[np.ndarray, np.ndarray] | None = None  # the version that was packed last, and as what
        if spec.state:
            spec.update.go_on(spec.weights, self.config.indices, spec.layout.n_buffers, spec.state["update"])
            spec.partition.load_state_dict(spec.state["partition"])
        else:
            spec.update.start(spec.weights, self.config.indices, spec.layout.n_buffers, spec.layout.blocks)
            spec.partition.start(self.config.n_train, self.config.indices, seed=self.config.seed, labels=spec.labels)
        self.course = Coordinator(
            self.config,
            spec.update,
            spec.partition,
            deliver=lambda worker, answer: self.outboxes[worker].put(answer),
            record=self.recorder.event,
            save=lambda *version: self.versions.put(version),
            clock=time.monotonic,
            alarm=lambda _: self.bell.set(),
            state=spec.state,
            age=spec.age,
        )
        presence.announce(Path(spec.path), self.address, spec.secret)  # before anybody is told of the run

    @property
    def address(self) -> tuple[str, int]:
        return self.listener.getsockname()[:2]

    def serve(self) -> dict:
        try:
            return self._serve()
        finally:
            presence.withdraw(Path(self.spec.path))

    def _serve(self) -> dict:
        saver = threading.Thread(target=self._keep_saving)
        saver.start()
        threading.Thread(target=self._accept, daemon=True).start()
        self._wait_for_start()
        while not self.over.is_set():  # ended by the last worker that leaves; the silence of each of them has a limit
            self.bell.wait(self._pause())
            self.bell.clear()
            with self.lock:
                self._mind_loneliness()
                self._tick()
        wire.shut(self.listener)
        with self.lock:
            self.course.keep()
        self.versions.put(None)
        saver.join()
        status = {key: standing(self.course)[key] for key in ("state", "reason", "version", "samples")}
        for last in (self.recorder.close, lambda: write_json(Path(self.spec.path) / "status.json", status)):
            try:
                last()
            except OSError as error:
                self.unwritten = self.unwritten or self._unwritable(error)
            if self.unwritten:
                status.update(state="failed", reason=self.unwritten)
        return status

    def _wait_for_start(self) -> None:
        """Until everybody is here; at the end of patience it begins with those who are, and the others may come later."""
        limit = time.monotonic() + self.config.join_timeout
        while not self.course.started and self.course.state == "running" and not self.over.wait(0.02):
            if time.monotonic() > limit:
                with self.lock:
                    if self.course.members:
                        self.course.expect(self.course.members)
                    else:
                        self.stop("failed", f"no worker joined within {self.config.join_timeout:g} s.")

    def _mind_loneliness(self) -> None:
        since = self.course.alone_since
        if since is not None and time.monotonic() - since > self.config.join_timeout:
            done = f"{self.course.samples.done} of {self.course.samples.budget} samples"
            self.stop("failed", f"every worker was lost after {done}, and none came back within {self.config.join_timeout:g} s.")

    def _pause(self) -> float:
        """Seconds until the time is looked at again, if the bell does not ring before."""
        expires = self.course.expires
        return 0.5 if expires is None else min(0.5, max(0.001, expires - time.monotonic()))

    def _tick(self) -> None:
        try:
            self.course.tick()
        except OSError as error:
            self.cannot_write(error)
        if self.course.state != "running":
            self.tell_the_others()

    def packed(self, weights: np.ndarray) -> np.ndarray:
        """A version as it goes over the wire; that of several workers at a time is made once."""
        if self.config.exchange == "float32":
            return weights
        with self._packing:
            if self._packed is None or self._packed[0] is not weights:
                self._packed = weights, exchange.pack(weights, self.config.exchange)
            return self._packed[1]

    # -- connections -----------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        for sock in wire.incoming(self.listener):
            threading.Thread(target=self._talk, args=(sock,), daemon=True).start()

    def _talk(self, sock) -> None:
        try:
            limits = {"timeout": SERVER_TIMEOUT_S, "max_body": self.spec.weights.nbytes, "strangers": self.strangers}
            with wire.accept(sock, self.spec.secret, check=check_request, **limits) as connection:
                hello, _ = connection.receive()
                if hello["op"] == "watch":
                    self._serve_watcher(connection)
                while hello and hello["op"] == "join":
                    hello = Conversation(self, connection, hello).serve()
        except WireError:
            pass  # whoever it was is gone; a worker has been taken out where it was served

    def _serve_watcher(self, connection: wire.Connection) -> None:
        """The side channel of the kernel: status and stop, and what it knows about the workers."""
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
                status = standing(self.course)
            started = self.recorder.started
            connection.send({"op": "status", "seconds": time.time() - started if started else 0.0, **status})

    def leave(self, member: Member, why: str) -> None:
        try:
            self.course.leave(member, why)
        except OSError as error:
            self.cannot_write(error)
            self.course.over = not self.course.members
        if self.course.state != "running":
            self.tell_the_others()
        elif self.course.update.collective and member.busy:  # the others wait for it in the middle of a step
            self._interrupt({"op": "regroup", "group": member.group})
        self._end_if_over()

    # -- the end, checkpoints --------------------------------------------------------------------------------------

    def stop(self, state: str, reason: str) -> None:
        try:
            self.course.stop(state, reason)
        except OSError:
            self.unwritten = self.unwritten or reason
        self.tell_the_others()
        self._end_if_over()

    def _end_if_over(self) -> None:
        if self.course.over:
            self.over.set()
            self.bell.set()

    def cannot_write(self, error: OSError) -> str:
        """A run whose record has a hole is no run: it fails, and everybody hears why."""
        self.unwritten = self.unwritten or self._unwritable(error)
        self.stop("failed", self.unwritten)
        return self.unwritten

    def _unwritable(self, error: OSError) -> str:
        return f"the run directory {self.spec.path} cannot be written: {error}."

    def tell_the_others(self) -> None:
        self._interrupt({"op": "stop", "reason": self.course.reason, "wait_s": 0.0})

    def _interrupt(self, word: dict) -> None:
        """Tell those who are in the middle of a local pass."""
        for member in list(self.course.members.values()):
            if member.busy:
                threading.Thread(target=tell, args=(self.connections[member.index], word), daemon=True).start()

    def _keep_saving(self) -> None:
        """Writes versions to the disk away from the lock, so that a slow disk delays nobody."""
        path = Path(self.spec.path)
        while (item := self.versions.get()) is not None:
            try:
                checkpoints.save(self.recorder, *item)
                retained = checkpoints.retained(self.recorder.kept, self.config.budget, self.config.checkpoints)
                checkpoints.prune(path, retained | self.recorder.resumed)
            except Exception as error:  # whatever it is: without its versions a run is not whole
                with self.lock:
                    self.cannot_write(error)


def main() -> None:
    """Read the spec from standard input (which only the parent can write), say where we listen, serve, say how it ended."""
    spec = pickle.load(sys.stdin.buffer)
    server = Server(spec)
    try:
        print(json.dumps({"host": server.address[0], "port": server.address[1]}), flush=True)
        print(json.dumps(server.serve()), flush=True)
    except BrokenPipeError:
        pass  # the parent is gone, and nobody else listens
