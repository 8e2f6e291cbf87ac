"""What the server of a run and one worker say to each other, from the worker's join until it is gone.

    worker                                  server
      join (probed speed)        ------->     everyone here?
      go: weights, indices, grant <------     release
      heartbeat (samples, loss)  ------->     progress; who is silent too long is taken to be gone
      push (weights, Q, times)   ------->     merge
      go, or stop                <-------     release; while it is held: hold, hold, ...
      (score)                    ------->     recorded: that of its push, where it was measured meanwhile
      (late heartbeat or push)       ------->     refused and recorded
      join again                 <-------     rejoin
                                 <-------     regroup: one of this group of the all-reduce is gone
      regroup                    ------->     begins anew with those who are left

Used by `labkit.training.server.server`, one thread a connection; the other side is `labkit.training.worker`.
"""

from __future__ import annotations

import contextlib
import queue
import time
from typing import TYPE_CHECKING

import numpy as np

from labkit.errors import UpdateError, WireError
from labkit.training.server.membership import Member
from labkit.training.wire import compression as exchange
from labkit.training.wire import transport as wire
from labkit.training.wire.protocol import HEARTBEAT_S, SERVER_TIMEOUT_S, Answer

if TYPE_CHECKING:
    from labkit.training.server.server import Server


class Conversation:
    """One incarnation of a worker on one connection; `hello` is its join."""

    def __init__(self, server: Server, connection: wire.Connection, hello: dict) -> None:
        self.server, self.connection, self.hello = server, connection, hello
        self.course, self.heartbeat_timeout = server.course, server.config.heartbeat_timeout
        self.outbox: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        self.exchange, n = server.config.exchange, len(server.spec.weights)
        self.buffer = exchange.buffer(self.exchange, n)  # of its pushes, as they come
        self.weights = self.buffer if self.exchange == "float32" else np.empty(n, np.float32)
        self.given = server.spec.weights  # with which it was released last

    def serve(self) -> dict | None:
        """Until the worker is gone; its new hello, if it comes back on the same connection."""
        member, refused = self._admit()
        if member is None:
            self.connection.send({"op": "stop", "reason": refused, "wait_s": 0.0})
            return None
        why = ""
        self.connection.patience(self.heartbeat_timeout)
        try:
            self._answer(member)
            while self._hear(member):
                self._answer(member)
        except _Silent as silent:
            why = str(silent)
        except WireError as error:
            why = str(error)
            raise
        except OSError as error:  # the record cannot be written: nothing that happens from now on would be known
            with self.server.lock:
                why = self.server.cannot_write(error)
            tell(self.connection, {"op": "stop", "reason": why, "wait_s": 0.0})
        finally:
            with self.server.lock:
                self.server.leave(member, why)
        return self._late(member) if why and self.course.state == "running" else None

    def _admit(self) -> tuple[Member | None, str]:
        """A worker joins, for the first time or again; or the reason why it cannot."""
        server, hello = self.server, self.hello
        index, generation = hello["worker"], hello.get("generation") or 0
        with server.lock:
            if self.course.state != "running" or self.course.finished:
                return None, "the run has ended."
            if generation < server.generations.get(index, 0):
                return None, f"worker {index} has been started again elsewhere."
            before = server.connections.get(index)
            server.generations[index], server.outboxes[index], server.connections[index] = generation, self.outbox, self.connection
            try:
                about = {key: hello[key] for key in ("device", "threads", "generator") if hello.get(key) is not None}
                member = self.course.join(index, hello.get("about") or "", hello.get("seconds_per_sample"), **about)
            except OSError as error:
                refused = server.cannot_write(error)
                server.leave(self.course.members[index], refused)
                return None, refused
        if before is not None and before is not self.connection:
            before.close()
        return member, ""

    def _hear(self, member: Member) -> bool:
        """Take in what a worker says during its local pass, until it needs an answer (True) or leaves (False)."""
        while True:
            if not self.connection.waiting(self.heartbeat_timeout):
                raise self._no_sign_of_life()
            header, n = self.connection.receive(self._place)
            if header["op"] == "heartbeat":
                member.seen = min(header.get("samples") or 0, member.granted)
                if header.get("loss") is not None:
                    member.loss = header["loss"]
                continue
            weights = self._pushed(n, header.get("shift") or 0) if header["op"] == "push" else None
            with self.server.lock:
                if self.course.members.get(member.index) is not member:
                    raise _Silent("it came again")
                if header["op"] == "score":
                    self._score(member, header)
                    continue
                if header["op"] == "push":
                    self.course.push(member, header, weights, n)
                    if self.course.state != "running":
                        self.server.tell_the_others()
                    return True
                if header["op"] == "regroup":
                    self.course.regroup(member, header.get("reason") or "")
                    return True
                if header["op"] == "fail":  # an exception over there; its traceback travels with the worker's task
                    self.server.stop("failed", header["reason"])
                return False

    def _answer(self, member: Member) -> None:
        """Send this worker its answer when there is one; until then tell it that it is held, which shows a dead peer too."""
        heard = time.monotonic()
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
                heard = time.monotonic()
            if time.monotonic() - heard > self.heartbeat_timeout:
                raise self._no_sign_of_life()
        n = self.connection.send(answer.header(), *self._packed(answer))
        if grant := answer.grant:
            who = {"worker": member.index, "incarnation": member.incarnation}
            self.server.recorder.event("release", bytes=n, **who, version=grant.version, wait_s=grant.wait_s)

    def _packed(self, answer: Answer) -> list[np.ndarray]:
        """What goes over the wire with this answer."""
        if not answer.grant:
            return []
        if self.exchange != "float32":
            self.given = answer.weights
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
        if self.exchange != "float32":
            exchange.add_change(self.given, self.buffer, self.exchange, shift, self.weights, self.course.update.n_params)
        return self.weights

    def _score(self, member: Member, header: dict) -> None:
        """Measured while the push was under way, for a rule that does not ask for it."""
        member.score = header["score"]
        who = {"worker": member.index, "incarnation": member.incarnation, "pass": member.passes}
        self.server.recorder.event("score", **who, score=header["score"], score_s=header["score_s"])

    def _late(self, member: Member) -> dict | None:
        """Who was taken to be gone is heard again: nothing that it has done counts; it is asked to join anew."""
        self.connection.patience(SERVER_TIMEOUT_S)
        asked = False
        while not self.server.over.is_set():
            if not self.connection.waiting(HEARTBEAT_S):
                continue
            header, _ = self.connection.receive(self._place)
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

    def _place(self, _: dict, n: int) -> list:
        return [self.buffer] if n == self.buffer.nbytes else [bytearray(n)]

    def _no_sign_of_life(self) -> Exception:
        return _Silent(f"no sign of life for {self.heartbeat_timeout:g} s")


class _Silent(Exception):
    """A worker has said nothing for too long, or another one speaks for it now."""


def tell(connection: wire.Connection, word: dict) -> None:
    """Say something to whoever may be gone already."""
    with contextlib.suppress(WireError):
        connection.send(word)
