"""The server of one run: owns the global weights, answers push and pull, and writes down what happens.

A process of its own that imports numpy but neither torch nor Dask. Each connection has a thread; the course of the run
(`labkit.coordinator`) is changed under one lock, which also gives the order in which pushes are merged. Transfers happen outside
the lock: versions are immutable arrays, so one worker can still be receiving version 7 while another makes version 8.

    worker                                  server
      join (probed speed)        ------->     everyone here?
      go: weights, indices, grant <------     release
      beat (samples, loss)       ------->     progress; who is silent too long is taken to be gone
      push (weights, Q, times)   ------->     merge
      go, or stop                <-------     release; while it is held: hold, hold, ...

Started by `labkit.session` in a process of its own; spoken to by `labkit.worker` and `labkit.session`.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import queue
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from labkit import wire
from labkit.coordinator import Answer, Coordinator, Member
from labkit.errors import ClusterError, WireError
from labkit.messages import checked
from labkit.partition import UDPA
from labkit.record import Recorder, write_json
from labkit.updates import Update

BEAT_S = 0.5  # how often a worker says that it lives, and a waiting worker is told so
SILENCE_S = 120.0  # who says nothing for longer is taken to be gone


@dataclass
class ServerSpec:
    """All that a server needs to know; handed over by its parent through a pipe."""

    path: str  # the run directory
    secret: bytes
    update: Update
    partition: UDPA
    weights: np.ndarray  # float32 (n,): [parameters | buffers]
    n_buffers: int
    n_samples: int
    labels: np.ndarray | None  # int64 (n_samples,), for a stratified partition
    workers: list[int]
    budget: int  # samples to train on, all workers together
    local_steps: int | None  # optimiser steps of a local pass; None: one pass over the shard
    batch_size: int
    seed: int
    checkpoints: int  # how many versions to keep, spread evenly over the run
    host: str = "127.0.0.1"
    patience: float = 300.0  # seconds to wait until every worker has joined


class Server:
    """Serves one run: `serve()` returns when it has ended, and the run directory then says how."""

    def __init__(self, spec: ServerSpec) -> None:
        self.spec = spec
        self.lock = threading.RLock()
        self.recorder = Recorder(Path(spec.path))
        self.listener, self.strangers = wire.listen(spec.host), wire.Strangers()
        self.outboxes: dict[int, queue.SimpleQueue[Answer]] = {}
        self.connections: dict[int, wire.Connection] = {}
        self.versions: queue.SimpleQueue[tuple[int, np.ndarray] | None] = queue.SimpleQueue()
        self.over = threading.Event()
        self.unwritten = ""  # why the record is not complete
        spec.update.start(spec.weights, spec.workers, spec.n_buffers)
        spec.partition.start(spec.n_samples, spec.workers, seed=spec.seed, labels=spec.labels)
        self.course = Coordinator(
            update=spec.update,
            partition=spec.partition,
            workers=spec.workers,
            budget=spec.budget,
            batch_size=spec.batch_size,
            local_steps=spec.local_steps,
            checkpoints=spec.checkpoints,
            deliver=lambda worker, answer: self.outboxes[worker].put(answer),
            record=self.recorder.event,
            save=lambda version, weights: self.versions.put((version, weights)),
            clock=time.time,
        )

    @property
    def address(self) -> tuple[str, int]:
        return self.listener.getsockname()[:2]

    def serve(self) -> dict:
        saver = threading.Thread(target=self._keep_saving)
        saver.start()
        threading.Thread(target=self._accept, daemon=True).start()
        if not self._wait_for_start():
            missing = sorted(set(self.spec.workers) - set(self.course.members))
            with self.lock:
                self._stop("failed", f"workers {missing} did not join within {self.spec.patience:g} s.")
        while not self.over.wait(1.0):
            pass  # ended by the last worker that leaves; the silence of each of them has a limit
        wire.shut(self.listener)
        with self.lock:
            self.course.keep()
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

    def _wait_for_start(self) -> bool:
        limit = time.monotonic() + self.spec.patience
        while not self.course.started and not self.over.wait(0.02):
            if time.monotonic() > limit or self.course.state != "running":
                return self.course.state != "running"
        return True

    # -- connections -----------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        for sock in wire.incoming(self.listener):
            threading.Thread(target=self._talk, args=(sock,), daemon=True).start()

    def _talk(self, sock) -> None:
        try:
            limits = {"timeout": SILENCE_S, "max_body": self.spec.weights.nbytes, "strangers": self.strangers}
            with wire.accept(sock, self.spec.secret, check=checked, **limits) as connection:
                hello, _ = connection.receive()
                if hello["op"] == "watch":
                    self._serve_watcher(connection)
                elif hello["op"] == "join":
                    self._serve_worker(connection, hello)
        except WireError:
            pass  # whoever it was is gone; a worker has been taken out where it was served

    def _serve_watcher(self, connection: wire.Connection) -> None:
        """The side channel of the kernel: status and stop."""
        while True:
            request, _ = connection.receive()
            with self.lock:
                if request["op"] == "stop":
                    self._stop(request.get("state", "stopped"), str(request.get("reason", "")))
                status = self.course.status()
            started = self.recorder.started
            connection.send({"op": "status", "seconds": time.time() - started if started else 0.0, **status})

    def _serve_worker(self, connection: wire.Connection, hello: dict) -> None:
        index, why, refused = int(hello["worker"]), "", ""
        with self.lock:
            if self.course.state == "running" and index not in self.course.members:
                self.outboxes[index], self.connections[index] = queue.SimpleQueue(), connection
            try:
                member = self.course.join(index, str(hello.get("about", "")), hello.get("seconds_per_sample"))
                outbox = self.outboxes[index]
            except ClusterError as error:
                refused = str(error)
            except OSError as error:
                refused = self._cannot_write(error)
                self._leave(self.course.members[index], refused)
        if refused:
            connection.send({"op": "stop", "reason": refused, "wait_s": 0.0})
            return
        buffer = np.empty(len(self.spec.weights), np.float32)
        try:
            self._answer(member, connection, outbox)
            while True:
                header, n = connection.receive(lambda _, n: [buffer] if n == buffer.nbytes else [bytearray(n)])
                if header["op"] == "beat":
                    member.seen, member.loss = int(header["samples"]), header["loss"]
                elif header["op"] == "push":
                    with self.lock:
                        self.course.push(member, header, buffer if n == buffer.nbytes else None, n)
                        if self.course.state != "running":
                            self._tell_the_others()
                    self._answer(member, connection, outbox)
                elif header["op"] == "fail":  # an exception over there; its traceback travels with the worker's task
                    why = str(header["reason"])
                    with self.lock:
                        self._stop("failed", why)
                    return
                else:
                    return
        except WireError as error:
            why = str(error)
        except OSError as error:  # the record cannot be written: nothing that happens from now on would be known
            with self.lock:
                why = self._cannot_write(error)
        finally:
            with self.lock:
                self._leave(member, why)

    def _answer(self, member: Member, connection: wire.Connection, outbox: queue.SimpleQueue[Answer]) -> None:
        """Send this worker its answer when there is one; until then tell it that it is held, which shows a dead peer too."""
        while True:
            try:
                answer = outbox.get(timeout=BEAT_S)
                break
            except queue.Empty:
                connection.send({"op": "hold"})
        n = connection.send(answer.header, *(part for part in (answer.weights, answer.indices) if part is not None))
        if answer.header["op"] == "go":
            self.recorder.event(
                "release",
                worker=member.index,
                incarnation=member.incarnation,
                version=answer.header["version"],
                wait_s=answer.header["wait_s"],
                bytes=n,
            )

    def _leave(self, member: Member, why: str) -> None:
        try:
            self.course.leave(member, why)
        except OSError as error:
            self._cannot_write(error)
            self.course.over = not self.course.members
        if self.course.over:
            self.over.set()

    # -- the end, checkpoints --------------------------------------------------------------------------------------

    def _stop(self, state: str, reason: str) -> None:
        try:
            self.course.stop(state, reason)
        except OSError:
            self.unwritten = self.unwritten or reason
        self._tell_the_others()
        if self.course.over:
            self.over.set()

    def _cannot_write(self, error: OSError) -> str:
        """A run whose record has a hole is no run: it fails, and everybody hears why."""
        self.unwritten = self.unwritten or self._unwritable(error)
        self._stop("failed", self.unwritten)
        return self.unwritten

    def _unwritable(self, error: OSError) -> str:
        return f"the run directory {self.spec.path} cannot be written: {error}."

    def _tell_the_others(self) -> None:
        """Interrupt those who are in the middle of a local pass."""
        for member in list(self.course.members.values()):
            if member.granted:
                threading.Thread(target=_interrupt, args=(self.connections[member.index], self.course.reason), daemon=True).start()

    def _keep_saving(self) -> None:
        """Writes versions to the disk away from the lock, so that a slow disk delays nobody."""
        while (item := self.versions.get()) is not None:
            try:
                self.recorder.checkpoint(*item)
            except OSError as error:
                with self.lock:
                    self._cannot_write(error)


def _interrupt(connection: wire.Connection, reason: str) -> None:
    with contextlib.suppress(WireError):  # it may be gone already
        connection.send({"op": "stop", "reason": reason, "wait_s": 0.0})


def main() -> None:
    """Read the spec from standard input (which only the parent can write), say where we listen, serve, say how it ended."""
    spec = pickle.load(sys.stdin.buffer)
    server = Server(spec)
    try:
        print(json.dumps({"host": server.address[0], "port": server.address[1]}), flush=True)
        print(json.dumps(server.serve()), flush=True)
    except BrokenPipeError:
        pass  # the parent is gone, and nobody else listens
