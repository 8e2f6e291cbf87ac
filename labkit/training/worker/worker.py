"""The loop of one worker: pull, local pass, score, push.

    join -> [ weights, new samples, grant -> optimiser steps on my shard -> Q on the shared score set -> push ] ... -> leave

What is trained between a pull and a push is the worker's `labkit.training.worker.replica`; on their way the weights are a `labkit.training.worker.buffers`, which in
the plain case is the replica's own memory.

With `overlap` a second thread pushes and pulls while this one goes on: it measures Q, if the rule does not ask for it, and computes
the next batches, if the rule allows that.

A thread says twice a second that the worker lives, however long a step takes, and hears what cannot wait for the end of a local
pass. A worker whose connection breaks, or that was taken to be gone (it was frozen, say), joins again: a new incarnation
with an empty shard and fresh optimisers, whose unfinished local pass does not count.

Runs on the workers of a `Lab`, sent there by `labkit.training.supervisor`.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from labkit.cluster.emulation import Slowness, Unevenness
from labkit.errors import WireError, WorkerError
from labkit.problems.problem import Clock, Problem
from labkit.training.server.connection import BEAT_S, SCORE_S, SILENCE_S
from labkit.training.wire import transport as wire
from labkit.training.worker.allreduce import Broken, Group
from labkit.training.worker.buffers import Parcel
from labkit.training.worker.heartbeat import Pulse
from labkit.training.worker.replica import Replica

PROBE_STEPS = 4
RETRY_S = 10.0  # how long a worker whose link is down tries to reach its server again


@dataclass(frozen=True)
class WorkerSpec:
    """What one worker needs to know beside the problem."""

    index: int
    address: tuple[str, int]
    secret: bytes
    seed: int
    budget: int
    device: str = "cpu"
    threads: int = 1
    uneven: Unevenness = field(default_factory=Unevenness)
    collective: str | None = None  # beginning of the names of the files where the ranks of an all-reduce find each other
    one_process: bool = False  # all workers are threads of one process
    generation: int = 0  # how often this worker has been started in this run before
    exchange: str = "float32"  # how weights travel: `labkit.training.wire.compression`
    overlap: int = 0  # batches that are computed while a push is under way
    scored: bool = True  # does the rule ask for Q?


def keep_memory() -> None:
    """Let this process keep the memory that it frees.

    Dask starts its workers with MALLOC_TRIM_THRESHOLD_=65536, for the sake of data frames: glibc then hands every activation of a
    network back to the system and fetches it again at the next step, which makes training on a CPU 1.6 to 2 times slower.
    """
    if sys.platform == "linux":
        try:
            mallopt = ctypes.CDLL(None).mallopt
        except (OSError, AttributeError):
            return  # another C library: nothing to mend
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD


def run_worker(problem: Problem, spec: WorkerSpec) -> dict:
    """Train until the server says stop; returns {"samples": ..., "passes": ...}.

    Raises
    ------
    WorkerError
        Anything that went wrong here, with the traceback; the server is told first, so that the others stop.
    """
    worker = _Worker(problem, spec)
    try:
        return worker.run()
    except WireError as error:
        failure = WorkerError(f"worker {spec.index} lost the server: {error}", spec.index)
    except Exception as error:
        message = f"worker {spec.index} ({spec.device}) failed at version {worker.version}: {type(error).__name__}: {error}"
        worker.tell_failure(message)
        failure = WorkerError(message, spec.index, traceback.format_exc())
    finally:
        worker.close()
    raise failure  # out here the frames of the error are gone, and with them what they held of the group


class _Worker:
    def __init__(self, problem: Problem, spec: WorkerSpec) -> None:
        self.problem, self.spec, self.version, self.connection, self.group = problem, spec, 0, None, None
        self.pulse = Pulse()
        self.courier = ThreadPoolExecutor(1, "labkit-courier") if spec.overlap else None
        self.broken = -1  # the latest group of an all-reduce that the server has called broken between two passes

    def run(self) -> dict:
        self._prepare()
        speed = self._probe()
        self.done = {"samples": 0, "passes": 0}
        spec = self.spec
        hello = {
            "op": "join",
            "worker": spec.index,
            "generation": spec.generation,
            "seconds_per_sample": speed,
            "device": spec.device,
            "threads": spec.threads,
            "generator": "shared" if spec.one_process else "own",
            "about": f"pid {os.getpid()}, {spec.device}, {spec.threads} thread(s)",
        }
        self._build()
        self.connection = wire.connect(spec.address, spec.secret, timeout=SILENCE_S)
        while True:
            try:
                self.connection.send(hello)
                self.pulse.start(self.connection)
                if not self._serve():
                    self.connection.send({"op": "leave"})
                    return self.done
            except WireError as error:
                self._connect_again(error)
            self._build()

    def _prepare(self) -> None:
        spec = self.spec
        keep_memory()
        if torch.get_num_threads() != spec.threads:
            torch.set_num_threads(spec.threads)
        if spec.device != "cpu":
            torch.cuda.set_device(spec.device)  # pinned memory and NCCL go by it, and cuda:0 is somebody else's

    def _slow(self, uneven: Unevenness) -> None:
        spec = self.spec
        self.slowness = Slowness(uneven, spec.seed, spec.index, spec.device, woken=lambda: self.pulse.told)

    def _replica(self) -> Replica:
        spec = self.spec
        return Replica(self.problem, spec.seed, spec.index, spec.budget, device=spec.device, after=self.slowness.after)

    def _build(self) -> None:
        self.replica = self._replica()
        self.parcel = Parcel(self.replica, self.spec.exchange, apart=self.spec.overlap > 0)

    def _connect_again(self, error: WireError) -> None:
        """The link is down; the server may be there all the same. Nobody listening any more means that the run is over."""
        self._close_group()
        self.connection.close()
        self.pulse.stop()
        limit, pause = time.monotonic() + RETRY_S, 0.05
        while True:
            try:
                self.connection = wire.connect(self.spec.address, self.spec.secret, timeout=SILENCE_S)
                return
            except WireError as again:
                if isinstance(again.__cause__, ConnectionRefusedError) or time.monotonic() > limit:
                    raise error from again
            time.sleep(pause)
            pause = min(1.0, 2 * pause)

    def _serve(self) -> bool:
        """Local passes of one incarnation: until the server says stop (False), or wants this worker to join anew (True)."""
        self.send_s = self.hidden_s = 0.0
        self.scored_at = -math.inf  # perf_counter
        go = self._pull()
        while go["op"] == "go":
            self._begin(go)
            done, broken = None, ""
            try:
                with self.pulse.listening(go["group"]):
                    if go["group"] <= self.broken:  # the word has overtaken the weights
                        raise Broken("the server says that a worker is gone")
                    done = self._local_pass(self._trained(go), go)
            except Broken as error:
                broken = str(error)
            word = self.pulse.heard()
            if word and word["op"] != "regroup":
                go = word
                break
            if done is None:  # one of the all-reduce is gone
                self._close_group()
                self.connection.send({"op": "regroup", "reason": broken})
                go = self._pull()
                continue
            go = self._exchange(done, go)  # also when a regroup came too late: this pass is complete
            self.done = {"samples": self.done["samples"] + done["samples"], "passes": self.done["passes"] + 1}
        if go["op"] == "lost":
            raise WireError(go["reason"])
        self._close_group()
        return go["op"] == "rejoin"

    def _trained(self, go: dict) -> torch.nn.Module:
        """The module to train: with an all-reduce it is wrapped, anew whenever the group has changed."""
        if not self.spec.collective:
            return self.replica.module
        if self.group is None or self.group.number != go["group"]:
            if self.group is not None or go["group"] > 1:  # others have another momentum, or none
                self._close_group()
                weights, shard = self.replica.flat, self.replica.shard
                self._build()
                self.replica.flat.copy_(weights)
                self.replica.shard = shard
            self.group = Group(self.spec, go["ranks"], go["group"], self.pulse)
            self.wrapped = self.group.wrap(self.replica.module)
        return self.wrapped

    def tell_failure(self, message: str) -> None:
        try:
            if self.connection:
                self.connection.send({"op": "fail", "reason": message})
        except WireError:
            pass  # then the server sees the connection close

    def close(self) -> None:
        self._close_group()
        if self.connection:
            self.connection.close()
        if self.courier:
            self.courier.shutdown()  # what it was at has ended with the connection
        self.pulse.stop()

    def _close_group(self) -> None:
        group, self.group, self.wrapped = self.group, None, None
        if group:
            group.close()

    def _probe(self) -> float:
        """Seconds per sample, from a few steps of a replica that is then thrown away; slowness begins anew after them."""
        self._slow(replace(self.spec.uneven, stalls=None))
        replica, times = self._replica(), []
        indices = np.arange(min(self.problem.batch_size, len(replica.train_indices)))
        for _ in range(PROBE_STEPS):
            started = time.perf_counter()
            replica.step(indices, Clock(0, self.spec.budget, 0.0))
            if self.spec.device != "cpu":  # there a step is only queued
                torch.cuda.synchronize(self.spec.device)
            times.append((time.perf_counter() - started) / len(indices))
        self._slow(self.spec.uneven)
        return float(np.median(times[1:]))

    def _pull(self) -> dict:
        """Wait for the next version, whose weights are received into the parcel; or for another word: stop, rejoin."""
        while True:
            header, _ = self.connection.receive(self._place)
            if header["op"] == "regroup":
                self.broken = header["group"]
            if header["op"] not in ("hold", "regroup"):
                return header

    def _place(self, header: dict, n: int) -> list[memoryview]:
        self.new_indices = np.empty(header["indices"], np.int64)
        return [self.parcel.place(), memoryview(self.new_indices)]

    def _begin(self, go: dict) -> None:
        """The replica takes in what was pulled."""
        self.version = go["version"]
        if self.replica.shard is None:
            self.replica.begin(go["incarnation"], own_generator=not self.spec.one_process)
        self.parcel.arrived(go["carry"])
        self.replica.hold(go["keep"], self.new_indices)

    def _local_pass(self, module: torch.nn.Module, go: dict) -> dict | None:
        """Train on the granted samples; None when the run was stopped in between."""
        beaten = time.perf_counter()

        def progress(samples: int, loss: torch.Tensor) -> None:
            nonlocal beaten
            if time.perf_counter() - beaten > BEAT_S:
                beaten = time.perf_counter()
                self.pulse.progress = {"samples": samples, "loss": float(loss) / samples}

        return self.replica.local_pass(go, module=module, group=self.group, halted=lambda: self.pulse.told, progress=progress)

    def _exchange(self, done: dict, go: dict) -> dict:
        """Score, push and pull; returns the next word. With `overlap` as much of it as may be is done at the same time."""
        late = self.courier is not None and not self.spec.scored
        score, score_s = (None, 0.0) if late else self._score()
        times = {"score_s": score_s, "send_s": self.send_s} | ({"hidden_s": self.hidden_s} if self.courier else {})
        body, started = self.parcel.leaves(), time.perf_counter()
        header = {"op": "push", "version": self.version, "score": score, "shift": self.parcel.shift, **times, **done}
        if self.courier is None:
            word, ended = self._talk(header, body)
            free = started
        else:
            answer = self.courier.submit(self._talk, header, body)
            score, score_s = self._score() if late else (None, 0.0)
            self.replica.ahead(go, halted=lambda: self.pulse.told)
            free = time.perf_counter()
            word, ended = answer.result()
            if score is not None and word["op"] in ("go", "stop"):
                self.connection.send({"op": "score", "score": score, "score_s": score_s})
        # What the round trip took, less the time that the server held us; and how much of it nobody stood still for.
        trip = max(0.0, ended - started - word.get("wait_s", 0.0))
        self.send_s = round(min(trip, max(0.0, ended - max(started, free))), 6)
        self.hidden_s = round(trip - self.send_s, 6)
        if self.pulse.told is word:  # a link that the pulse has lost meanwhile is not forgotten
            self.pulse.told = None
        return word

    def _talk(self, header: dict, body: memoryview) -> tuple[dict, float]:
        """Push and pull; returns the next word and when it came (perf_counter)."""
        self.connection.send(header, body)
        word = self._pull()
        if word["op"] != "go":
            self.pulse.told = word  # whoever computes meanwhile need not go on
        return word, time.perf_counter()

    def _score(self) -> tuple[float | None, float]:
        """Q and the seconds that it took; nothing where the rule does not ask for it and the latest is not old."""
        started = time.perf_counter()
        if not self.spec.scored and started - self.scored_at < SCORE_S:
            return None, 0.0
        score, self.scored_at = self.replica.score(), started
        return score, round(time.perf_counter() - started, 6)
