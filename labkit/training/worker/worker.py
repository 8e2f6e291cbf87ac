"""The loop of one worker: pull, local pass, score, push.

    join -> [ weights, new samples, grant -> optimiser steps on its shard -> Q on the shared score set -> push ] ... -> leave

What is trained between a pull and a push is the worker's `Replica`. Its weights travel in `WeightBuffers`, which in the plain case
(float32 on a CPU) are the replica's own memory, and nothing is copied.

With `overlap` a sender thread pushes and pulls while this one computes: it measures Q, if the rule does not need it, and computes
the next batches, if the rule allows that.

A worker whose connection breaks, or that was taken to be gone (it was frozen, say), joins again: a new incarnation with an empty
shard and fresh optimisers, whose unfinished local pass does not count.

Runs on the workers of a `Lab`, started there by `labkit.training.supervisor`.
"""

import contextlib
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from labkit.cluster.emulation import Slowness, Unevenness
from labkit.errors import WireError, WorkerError, traceback_of
from labkit.problems.problem import Problem
from labkit.problems.trial import Fingerprint
from labkit.runs.config import RunConfig
from labkit.training.wire import compression, transport
from labkit.training.wire.protocol import ASIDE, HEARTBEAT_S, SCORE_EVERY_S, SERVER_TIMEOUT_S, Grant, Refused, check_reply
from labkit.training.worker.allreduce import GONE, Broken, ProcessGroup, Unused, gradients, networks_of
from labkit.training.worker.heartbeat import Heartbeat
from labkit.training.worker.inspection import bounded, memory_of, stacks_of
from labkit.training.worker.process import give_back, prepare, synchroniser
from labkit.training.worker.replica import Replica

PROBE_STEPS = 4
RETRY_S = 10.0  # how long a worker whose link is down tries to reach its server again


@dataclass(frozen=True)
class WorkerSpec:
    """What one worker is started with, beside the problem."""

    config: RunConfig
    index: int
    address: transport.Address
    secret: bytes
    device: str = "cpu"
    threads: int = 1
    uneven: Unevenness = field(default_factory=Unevenness)
    meeting: str | None = None  # beginning of the names of the files where the ranks of an all-reduce find each other
    generation: int = 0  # how often this worker has been started in this run before
    scored: bool = True  # does the rule need Q?
    fingerprint: Fingerprint | None = None  # of what the kernel has built; None where this is its process
    precisions: Sequence[Mapping[str, Any]] = ()  # what workers of this run have computed in so far, the latest first


def run_worker(problem: Problem, spec: WorkerSpec) -> None:
    """Train until the server says stop.

    Raises
    ------
    WorkerError
        Anything that went wrong here, with the traceback; the server is notified first, so that the others stop.
    """
    worker = failure = None
    try:
        try:
            worker = _Worker(problem, spec)
            worker.run()
        except BaseException as error:  # also a step that calls sys.exit()
            failure = _failure(error, worker, spec)
        finally:
            if worker:
                worker.close()
    except Exception as error:  # in here
        failure = failure or _failure(error, worker, spec)
    worker = None
    give_back()
    if failure:
        raise failure  # out here the frames of the error are gone, and with them what they held of the group


def _failure(error: BaseException, worker: "_Worker | None", spec: WorkerSpec) -> WorkerError:
    """What the run is to raise; the server is sent the message, unless it is the server that was lost."""
    if isinstance(error, WireError) and not isinstance(error, Refused):
        return WorkerError(f"worker {spec.index} lost the server: {error}", spec.index)
    version = worker.version if worker else 0
    message = f"worker {spec.index} ({spec.device}) failed at version {version}: {type(error).__name__}: {error}"
    if worker:
        worker.notify_failure(message)
    return WorkerError(message, spec.index, traceback_of(error))


class _Worker:
    def __init__(self, problem: Problem, spec: WorkerSpec) -> None:
        self.problem, self.spec, self.version, self.connection, self.group = problem, spec, 0, None, None
        self.heartbeat = Heartbeat(self._aside)
        self.threads = {"worker": threading.get_ident()}  # those of this worker, whose stacks are asked for
        self.exchange: dict[str, float] = {}  # of the latest one
        self.sender = ThreadPoolExecutor(1, "labkit-sender") if spec.config.overlap else None
        self.unused = False  # do steps leave parameters without a gradient?
        self.broken = -1  # the latest group of an all-reduce that the server has called broken between two passes

    def run(self) -> None:
        spec = self.spec
        prepare(spec.device, spec.threads)
        give_back()  # what an earlier run of this process has left
        if spec.fingerprint:
            self.problem.check_same(spec.config.seed, spec.fingerprint)
        self.precision = self.problem.choose_precision(spec.config.seed, spec.device, spec.precisions)
        speed = self._probe()
        give_back()
        join = {
            "op": "join",
            "worker": spec.index,
            "generation": spec.generation,
            "seconds_per_sample": speed,
            "device": spec.device,
            "threads": spec.threads,
            "generator": "shared" if spec.config.one_process else "own",
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "about": f"pid {os.getpid()}, {spec.device}, {spec.threads} thread(s)",
            **({"precision": asdict(self.precision)} if self.precision else {}),
        }
        self._build()
        self._connect()
        while True:
            try:
                self.connection.send(join)
                self.heartbeat.start(self.connection)
                if not self._serve():
                    self.connection.send({"op": "leave"})
                    return
            except Refused:
                raise
            except WireError as error:
                self._connect_again(error)
            self._build()

    def _slow(self, uneven: Unevenness) -> None:
        who, synchronise = (self.spec.config.seed, self.spec.index), synchroniser(self.spec.device)
        self.slowness = Slowness(uneven, *who, synchronise, woken=lambda: self.heartbeat.interrupt)

    def _replica(self) -> Replica:
        config, live = self.spec.config, {"after": self.slowness.after, "halted": lambda: self.heartbeat.interrupt}
        how = {"device": self.spec.device, "exact": config.exact_buffers, "precision": self.precision}
        return Replica(self.problem, config.seed, self.spec.index, config.budget, **how, **live)

    def _build(self) -> None:
        self.replica = self.buffers = None  # not two at a time
        self.replica = self._replica()
        self.buffers = WeightBuffers(self.replica, self.spec.config.exchange, apart=self.spec.config.overlap > 0)

    def _connect(self) -> None:
        """Also where strangers push this worker out, or its link is down. Where nothing listens any more, the run is over."""
        limit, pause = time.monotonic() + RETRY_S, 0.05
        while True:
            try:
                self.connection = transport.connect(
                    self.spec.address, self.spec.secret, timeout=SERVER_TIMEOUT_S, check=check_reply
                )
                return
            except WireError as error:
                if isinstance(error.__cause__, ConnectionRefusedError) or time.monotonic() > limit:
                    raise
            time.sleep(pause)
            pause = min(1.0, 2 * pause)

    def _connect_again(self, error: WireError) -> None:
        """The link is down; the server may be there all the same."""
        if self.heartbeat.error:  # which has closed it
            raise self.heartbeat.error
        self._close_group()
        self.connection.close()
        self.heartbeat.stop()
        try:
            self._connect()
        except WireError as again:
            raise error from again

    def _serve(self) -> bool:
        """Local passes of one incarnation: until the server says stop (False), or "rejoin" (True)."""
        self.send_s = self.hidden_s = 0.0
        self.scored_at = -math.inf  # perf_counter
        message = self._pull()
        while message["op"] == "grant":
            grant = self._begin(message)
            done, broken = None, ""
            group = math.inf if grant.settle else grant.group  # who settles is in no group: none that breaks is its own
            try:
                with self.heartbeat.local_pass(group):
                    if group <= self.broken:  # the message has overtaken the weights
                        raise Broken(GONE)
                    self._join_group(grant)
                    done = self._local_pass(grant)
            except Broken as error:
                broken, self.unused = str(error), self.unused or isinstance(error, Unused)
            interrupt = self.heartbeat.pop_interrupt()
            if interrupt and interrupt["op"] != "regroup":
                message = interrupt
                break
            if done is None:  # one of the all-reduce is gone
                self._close_group()
                self.connection.send({"op": "regroup", "reason": broken})
                message = self._pull()
                continue
            message = self._exchange(done, grant)  # also when a regroup came too late: this pass is complete
        if message["op"] == "lost":
            raise WireError(message["reason"])
        self._close_group()
        return message["op"] == "rejoin"

    def _join_group(self, grant: Grant) -> None:
        """With an all-reduce the module is wrapped, anew whenever the group has changed."""
        spec = self.spec
        if not spec.meeting or grant.settle or (self.group and self.group.number == grant.group):
            return
        if self.group or grant.group > 1:  # others have another momentum, or none
            self._close_group()
            before = self.replica
            before.optimisers = ()
            self._build()
            self.replica.go_on(before)
        where = {"meeting": spec.meeting, "device": spec.device, "one_process": spec.config.one_process}
        how = {"unused": self.unused, "sync_batchnorm": spec.config.update.get("sync_batchnorm", False)}
        self.group = ProcessGroup(spec.index, grant.ranks, grant.group, self.heartbeat, **where, **how)
        self.group.wrap(self.replica.module, networks_of(self.problem, self.replica.module))

    def notify_failure(self, message: str) -> None:
        if self.connection:
            with contextlib.suppress(Exception):  # then the server sees the connection close
                self.connection.send({"op": "fail", "reason": message})

    def close(self) -> None:
        with contextlib.ExitStack() as last:  # all of it, the last line first, whatever fails of it
            last.callback(vars(self).update, replica=None, buffers=None)  # the weights go now, not when garbage is collected
            last.callback(self.heartbeat.stop)
            if self.sender:
                last.callback(self.sender.shutdown)  # what it was doing has ended with the connection
            if self.connection:
                last.callback(self.connection.close)
            self._close_group()

    def _close_group(self) -> None:
        group, self.group = self.group, None
        if group:
            group.close()

    def _probe(self) -> float:
        """Seconds per sample, from a few steps of a replica that is then thrown away; the emulation begins anew after them."""
        self._slow(replace(self.spec.uneven, stalls=None))
        seconds, self.unused = probed(self._replica(), self.slowness.synchronise)
        self._slow(self.spec.uneven)
        return seconds

    def _aside(self, message: dict) -> None:
        """What is asked, or changed, while the worker goes on with what it does."""
        if message["op"] == "slow":
            uneven = self.slowness.uneven
            self.slowness.become(replace(uneven, slowdown=message["factor"], drifts_to=message["factor"], drift=0.0))
            return
        about = {"version": self.version, "device": self.spec.device, "doing": self.heartbeat.doing}
        try:
            report = self._report()
        except Exception as error:  # it changes nothing: no reason for the run to end
            report = {"threads": 0, "stacks": {}, "memory": {}, "exchange": {}, "error": bounded(traceback_of(error))}
        self.connection.send({"op": "inspected", "number": message["number"], **about, **report})

    def _report(self) -> dict:
        """Threads, stacks, memory and the latest exchange, for who inspects this worker."""
        ago = {"seconds_ago": round(time.perf_counter() - self.exchanged_at, 3)} if self.exchange else {}
        return {
            "threads": torch.get_num_threads(),
            "stacks": stacks_of(self.threads),
            "memory": memory_of(self.spec.device),
            "exchange": {**self.exchange, **ago},
        }

    def _pull(self) -> dict:
        """Wait for the next grant, whose weights are received into their buffer; or for another message: stop, rejoin."""
        while True:
            if self.heartbeat.kept:
                header, self.n_received = self.heartbeat.kept.pop(0), 0
            else:
                header, self.n_received = self.connection.receive(self._receive_into)
            if header["op"] in ASIDE:
                self._aside(header)
                continue
            if header["op"] == "regroup":
                self.broken = header["group"]
            if header["op"] not in ("hold", "regroup"):
                return header

    def _receive_into(self, header: dict, n: int) -> list[memoryview]:
        self.new_indices = np.empty(max(0, n - self.buffers.received.nbytes) // 8, np.int64)
        return [self.buffers.received, memoryview(self.new_indices)]

    def _begin(self, message: dict) -> Grant:
        """The replica goes on from what was pulled."""
        n_bytes = self.n_received - self.buffers.received.nbytes
        grant = Grant.read(message, worker=self.spec.index, budget=self.spec.config.budget, n_bytes=n_bytes)
        self.version = grant.version
        if self.replica.shard is None:
            self.replica.begin(grant.incarnation, own_generator=not self.spec.config.one_process)
        self.buffers.unpack(grant.carry)
        self.replica.hold(grant.retain, self.new_indices)
        return grant

    def _local_pass(self, grant: Grant) -> dict | None:
        """Train on the granted samples; None when the run was stopped in between."""
        updated = time.perf_counter()

        def progress(samples: int, loss: torch.Tensor) -> None:
            nonlocal updated
            if time.perf_counter() - updated > HEARTBEAT_S:  # reading the loss makes a GPU wait
                updated = time.perf_counter()
                self.heartbeat.progress = {"samples": samples, "loss": float(loss) / samples}

        return self.replica.local_pass(grant, group=self.group, progress=progress)

    def _exchange(self, done: dict, grant: Grant) -> dict:
        """Score, push and pull; returns the next message. With `overlap` as much of it as possible is done at the same time."""
        late = self.sender is not None and not self.spec.scored and not grant.settle
        body = self.buffers.pack()  # before Q is measured: a forward pass may change the module, and a replay does it in this order
        with self.heartbeat.keeping():
            score, score_s = (None, 0.0) if late or grant.settle else self._score()
        times = {"score_s": score_s, "send_s": self.send_s} | ({"hidden_s": self.hidden_s} if self.sender else {})
        started = time.perf_counter()
        header = {"op": "push", "version": self.version, "score": score, "shift": self.buffers.shift, **times, **done}
        if self.sender is None:
            message, ended = self._push_and_pull(header, body)
            free = started
        else:
            answer = self.sender.submit(self._push_and_pull, header, body)
            score, score_s = self._score() if late else (None, 0.0)
            self.replica.ahead(grant)
            free = time.perf_counter()
            message, ended = answer.result()
            if score is not None and message["op"] in ("grant", "stop"):
                self.connection.send({"op": "score", "score": score, "score_s": score_s})
        # What the round trip took, less the time that the server held us; and during how much of it this worker computed.
        trip = max(0.0, ended - started - message.get("wait_s", 0.0))
        self.send_s = round(min(trip, max(0.0, ended - max(started, free))), 6)
        self.hidden_s = round(trip - self.send_s, 6)
        self.exchanged_at = ended  # first: who inspects this worker may look in between
        self.exchange = {"send_s": self.send_s, "hidden_s": self.hidden_s, "bytes": len(body) + self.n_received}
        if self.heartbeat.interrupt is message:  # a link that was lost meanwhile is not forgotten
            self.heartbeat.interrupt = None
        return message

    def _push_and_pull(self, header: dict, body: memoryview) -> tuple[dict, float]:
        """Returns the next message and when it came (perf_counter)."""
        if self.sender:
            self.threads["sender"] = threading.get_ident()
        self.connection.send(header, body)
        message = self._pull()
        if message["op"] != "grant":
            self.heartbeat.interrupt = message  # what is computed meanwhile may stop
        return message, time.perf_counter()

    def _score(self) -> tuple[float | None, float]:
        """Q and the seconds that it took; nothing where the rule does not need it and the latest is not old."""
        started = time.perf_counter()
        if not self.spec.scored and started - self.scored_at < SCORE_EVERY_S:
            return None, 0.0
        score, self.scored_at = self.replica.score(), started
        return score, round(time.perf_counter() - started, 6)


def probed(replica: Replica, synchronise: Callable[[], object] = lambda: None) -> tuple[float, bool]:
    """Of a few steps: seconds per sample, and do they leave parameters without a gradient?"""
    indices, times = np.arange(min(replica.problem.batch_size, len(replica.train_indices))), []
    with gradients(replica.module) as unused:
        for _ in range(PROBE_STEPS):
            started = time.perf_counter()
            replica.step(indices, replica.clock(0))
            synchronise()
            times.append((time.perf_counter() - started) / len(indices))
    return float(np.median(times[1:])), bool(unused)


class WeightBuffers:
    """Where the weights of `replica` are received (a pull) and from where they are sent (a push), in the `dtype` of the wire.

    In float32 on a CPU both are the replica's own vector. Where the weights travel in 16 bits, live on a GPU, or are exchanged
    while the replica trains on (`apart`), they have buffers of their own here.
    """

    def __init__(self, replica: Replica, dtype: str, apart: bool) -> None:
        self.replica, self.dtype = replica, dtype
        flat, on_cpu = replica.flat, replica.device == "cpu"
        self.host = flat if on_cpu and not apart else torch.empty(len(flat), pin_memory=not on_cpu)
        self.weights = self.host.numpy()
        own = dtype != "float32"
        self.pulled = compression.buffer(dtype, len(flat)) if own else self.weights
        self.pushed = compression.buffer(dtype, len(flat)) if own else self.weights
        self.shift = 0  # of the change that is pushed: what it was multiplied by, as a power of two

    @property
    def received(self) -> memoryview:
        """The memory for the next pull."""
        return memoryview(self.pulled).cast("B")

    def unpack(self, carry: int) -> None:
        """A pull is complete: the replica goes on from it, with the `carry` samples that it has trained on meanwhile."""
        if self.dtype != "float32":
            compression.unpack(self.pulled, self.dtype, self.weights)
        if self.host is not self.replica.flat:
            self.replica.pull(self.host, carry)
        else:
            self.replica.state.unpack()

    def pack(self) -> memoryview:
        """The weights of the replica as they are now, to be sent before the next pull."""
        self.replica.state.pack()
        if self.host is not self.replica.flat:
            self.host.copy_(self.replica.flat)
        if self.dtype != "float32":
            n = self.replica.layout.n_params
            self.shift = compression.pack_change(self.weights, self.pulled, self.dtype, self.pushed, n)
        return memoryview(self.pushed).cast("B")
