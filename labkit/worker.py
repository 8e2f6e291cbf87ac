"""The loop of one worker: pull, local pass, score, push.

    join -> [ weights, new samples, grant -> optimiser steps on my shard -> Q on the shared score set -> push ] ... -> leave

The parameters and buffers of the module are views into one flat float32 vector, so a pull is received straight into the model
and a push is sent straight out of it. The optimiser's state stays with the worker across pulls: momentum goes on from where it
was. BatchNorm's running statistics travel as buffers; integer buffers (its step counter) stay at home. Every local pass draws
a new order of the shard from (seed, worker, pass, incarnation), so a run can be repeated and replayed.

A thread says twice a second that the worker lives, however long a step takes, and hears what cannot wait for the end of a local
pass. A worker whose connection breaks, or that was taken to be gone (it was frozen, say), joins again: a new incarnation
with an empty shard, whose unfinished local pass does not count.

Emulated slowness is honest: after each piece of work the worker sleeps in proportion to the time that piece took.

Runs on the workers of a `Lab`, sent there by `labkit.session`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import time
import traceback
from dataclasses import dataclass

import numpy as np
import torch

from labkit import wire
from labkit.collective import Broken, Group, steps
from labkit.conversation import BEAT_S, SILENCE_S
from labkit.errors import WireError, WorkerError
from labkit.layout import flatten
from labkit.problems import Clock, Problem
from labkit.pulse import Pulse
from labkit.shard import Shard, batches

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
    slowdown: float = 1.0
    jitter: float = 0.0
    collective: str | None = None  # beginning of the names of the files where the ranks of an all-reduce find each other
    one_process: bool = False  # all workers are threads of one process
    generation: int = 0  # how often this worker has been started in this run before


class Slowness:
    """Emulated speed: after work that took t seconds, sleep (factor - 1) t; factor = max(1, slowdown * exp(jitter z)), z normal."""

    def __init__(self, slowdown: float, jitter: float, seed: int, worker: int, device: str) -> None:
        self.slowdown, self.jitter, self.device = slowdown, jitter, device
        self.generator = np.random.default_rng(np.random.SeedSequence([seed, worker, 1 << 20]))

    @property
    def on(self) -> bool:
        return self.slowdown != 1.0 or self.jitter > 0

    def after(self, started: float, waited: float = 0.0) -> None:
        """Sleep for work that began at `started` (perf_counter), of which `waited` seconds were spent on others."""
        if not self.on:
            return
        if self.device != "cpu":
            torch.cuda.synchronize(self.device)
        factor = self.slowdown
        if self.jitter:
            factor *= float(np.exp(self.jitter * self.generator.standard_normal()))
        time.sleep(max(0.0, factor - 1.0) * max(0.0, time.perf_counter() - started - waited))


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
        self.broken = -1  # the latest group of an all-reduce that the server has called broken between two passes

    def run(self) -> dict:
        self._prepare()
        speed = self._probe()
        self.optimisers = self.problem.optimisers(self.module)  # fresh: the probe has left its momentum in the old ones
        self.done = {"samples": 0, "passes": 0}
        about = f"pid {os.getpid()}, {self.spec.device}, {self.spec.threads} thread(s)"
        hello = {"op": "join", "worker": self.spec.index, "generation": self.spec.generation, "about": about}
        self.connection = wire.connect(self.spec.address, self.spec.secret, timeout=SILENCE_S)
        while True:
            try:
                self.connection.send({**hello, "seconds_per_sample": speed})
                self.pulse.start(self.connection)
                if not self._serve():
                    self.connection.send({"op": "leave"})
                    return self.done
            except WireError as error:
                self._connect_again(error)

    def _prepare(self) -> None:
        problem, spec = self.problem, self.spec
        keep_memory()
        if torch.get_num_threads() != spec.threads:
            torch.set_num_threads(spec.threads)
        if spec.device != "cpu":
            torch.cuda.set_device(spec.device)  # pinned memory and NCCL go by it, and cuda:0 is somebody else's
        self._build()
        self.slowness = Slowness(spec.slowdown, spec.jitter, spec.seed, spec.index, spec.device)
        self.score_batches = batches(problem.score_indices(), 256)
        self.train_indices = problem.train_indices()
        self.n_train = len(self.train_indices)

    def _build(self) -> None:
        self.module = self.problem.build(self.spec.seed)
        self.flat, self.layout = flatten(self.module, self.spec.device)
        self.vector = self.flat if self.spec.device == "cpu" else self.flat.to("cpu").pin_memory()
        self.bytes = memoryview(self.vector.numpy()).cast("B")

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
        self.shard, self.send_s, self.pushed_at = None, 0.0, None
        while (go := self._pull())["op"] == "go":
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
                continue
            self._push(done)  # also when a regroup came too late: this pass is complete
            self.done = {"samples": self.done["samples"] + done["samples"], "passes": self.done["passes"] + 1}
        if go["op"] == "lost":
            raise WireError(go["reason"])
        self._close_group()
        return go["op"] == "rejoin"

    def _trained(self, go: dict) -> torch.nn.Module:
        """The module to train: with an all-reduce it is wrapped, anew whenever the group has changed."""
        if not self.spec.collective:
            return self.module
        if self.group is None or self.group.number != go["group"]:
            if self.group is not None or go["group"] > 1:  # others have another momentum, or none
                self._close_group()
                weights = self.flat.clone()
                self._build()
                self.flat.copy_(weights)
                self.optimisers = self.problem.optimisers(self.module)
            self.group = Group(self.spec, go["ranks"], go["group"], self.pulse)
            self.wrapped = self.group.wrap(self.module)
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
        self.pulse.stop()

    def _close_group(self) -> None:
        group, self.group, self.wrapped = self.group, None, None
        if group:
            group.close()

    def _probe(self) -> float:
        """Seconds per sample, from a few steps on weights that the first pull then replaces."""
        optimisers = self.problem.optimisers(self.module)
        counters = [(b, b.clone()) for b in self.module.buffers() if not b.is_floating_point()]  # these are not pulled
        indices = self.train_indices[: self.problem.batch_size]
        times = []
        for _ in range(PROBE_STEPS):
            started = time.perf_counter()
            self._step(self.module, indices, optimisers, Clock(0, self.spec.budget, 0.0))
            if self.spec.device != "cpu":  # there a step is only queued
                torch.cuda.synchronize(self.spec.device)
            times.append((time.perf_counter() - started) / len(indices))
        for counter, before in counters:
            counter.copy_(before)
        return float(np.median(times[1:]))

    def _step(self, module: torch.nn.Module, indices: np.ndarray, optimisers: tuple, clock: Clock) -> dict:
        started = time.perf_counter()
        batch = self._load(indices)
        with self.group.exchanging() if self.group else contextlib.nullcontext():
            metrics = self.problem.step(module, batch, optimisers, clock)
        self.slowness.after(started, self.group.waited if self.group else 0.0)
        return metrics

    def _pull(self) -> dict:
        """Wait for the next version, whose weights are received into the model; or for another word: stop, rejoin."""
        while True:
            header, _ = self.connection.receive(self._place)
            if header["op"] == "regroup":
                self.broken = header["group"]
            if header["op"] in ("hold", "regroup"):
                continue
            if self.pushed_at is not None:  # what the round trip took, less the time that the server held us
                self.send_s = round(max(0.0, time.perf_counter() - self.pushed_at - header.get("wait_s", 0.0)), 6)
            if header["op"] != "go":
                return header
            if self.vector is not self.flat:
                self.flat.copy_(self.vector)
            self.version = header["version"]
            if self.shard is None:
                self._begin(header["incarnation"])
            self.shard.keep(header["keep"])
            self.shard.add(self.new_indices)
            return header

    def _begin(self, incarnation: int) -> None:
        """The first pull of an incarnation: an empty shard, and for dropout and the like a stream of random numbers of its own."""
        seeds = [self.spec.seed, self.spec.index, incarnation]
        self.shard = Shard(*seeds)
        if not self.spec.one_process:
            torch.manual_seed(int(np.random.SeedSequence(seeds).generate_state(1)[0]))

    def _place(self, header: dict, n: int) -> list[memoryview]:
        self.new_indices = np.empty(header["indices"], np.int64)
        return [self.bytes, memoryview(self.new_indices)]

    def _local_pass(self, module: torch.nn.Module, go: dict) -> dict | None:
        """Train on the granted samples; None when the run was stopped in between."""
        indices, batch_size = self.shard.take(go["samples"]), self.problem.batch_size
        if self.group:
            sizes, weights = steps(go["grants"], self.group.rank, batch_size)
            parts = np.split(indices, np.cumsum(sizes)[:-1])
        else:
            parts = batches(indices, batch_size)
        started = beaten = time.perf_counter()
        samples, waited, loss = 0, 0.0, torch.zeros((), device=self.spec.device)
        for number, part in enumerate(parts):
            if self.pulse.told:
                return None
            if self.group:
                self.group.begin(weights[number])
            seen = min(self.spec.budget, go["done"] + int(samples * go["pace"]))
            clock = Clock(seen, self.spec.budget, seen / self.n_train)
            metrics = self._step(module, self.train_indices[part], self.optimisers, clock)
            loss += torch.as_tensor(metrics["loss"], device=self.spec.device).detach() * len(part)
            samples += len(part)
            waited += self.group.waited if self.group else 0.0
            if time.perf_counter() - beaten > BEAT_S:
                beaten = time.perf_counter()
                self.pulse.progress = {"samples": samples, "loss": float(loss) / samples}
        mean_loss = float(loss) / max(1, samples)  # reads the device, so the time below is true on a GPU
        compute_s = time.perf_counter() - started - waited
        return {"samples": samples, "loss": mean_loss, "compute_s": round(compute_s, 6), "wait_s": round(waited, 6)}

    def _push(self, done: dict) -> None:
        started = time.perf_counter()
        parts = [(self.problem.score(self.module, self._load(part)), len(part)) for part in self.score_batches]
        score = sum(q * n for q, n in parts) / max(1, sum(n for _, n in parts))
        self.slowness.after(started)
        if self.vector is not self.flat:
            self.vector.copy_(self.flat)
        header = {
            "op": "push",
            "version": self.version,
            "score": score,
            "score_s": round(time.perf_counter() - started, 6),
            "send_s": self.send_s,
            **done,
        }
        self.pushed_at = time.perf_counter()
        self.connection.send(header, self.bytes)

    def _load(self, indices: np.ndarray) -> tuple:
        return self.problem.load(indices, "train", self.spec.device)
