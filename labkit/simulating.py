"""Simulation: the course of a run on a clock that only jumps from event to event.

    released --exchange + compute + score--> at the server's door --> push: the Coordinator's word, a while a merge --> released ...

The server takes pushes one after the other, in the order in which they come; while it merges the clock goes on. Update, partition
and coordinator are the objects of live runs; how long things take comes from a `Timing`. Weights are one number (times
alone: a thousand workers in seconds), or real: then each local pass is made by the worker's replica, and accuracy stands against
simulated time.

Used by `labkit.drivers`.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from labkit.layout import flatten
from labkit.members import Answer
from labkit.offline import Ledger, Replicas, begin_course
from labkit.partition import UDPA
from labkit.problems import Problem
from labkit.timing import Pace, Timing, slowness
from labkit.updates import Update

STEP = np.float32(1e-3)  # what a local pass changes where nothing is trained: no rule has to divide by nothing


@dataclass(frozen=True)
class Change:
    """At `seconds` a worker is lost, or comes (for the first time, or again)."""

    seconds: float
    worker: int
    comes: bool


class Simulation:
    """One run of this `config` (as `train` writes it), with these times; rows go to `ledger`, or nowhere."""

    def __init__(
        self,
        config: dict,
        timing: Timing,
        n_bytes: int,
        *,
        update: Update,
        partition: UDPA,
        batch_size: int,
        changes: Sequence[Change] = (),
        problem: Problem | None = None,
        ledger: Ledger | None = None,
        told: Callable[[int], None] = lambda done: None,
    ) -> None:
        self.config, self.timing, self.n_bytes, self.ledger, self.told = config, timing, n_bytes, ledger, told
        self.batch_size, self.jitter = batch_size, float(config["jitter"])
        self.slowdowns = {worker["index"]: float(worker["slowdown"]) for worker in config["workers"]}
        self.now, self.busy, self.merged_at = 0.0, 0.0, 0.0
        self.queue: list[tuple[float, int, Callable, tuple]] = []
        self.numbers, self.chance = itertools.count(), {}
        self.replicas, weights, n_buffers, blocks = None, np.zeros(1, np.float32), 0, ()
        if problem is not None:
            self.replicas = Replicas(problem, config["seed"], config["budget"])
            flat, layout = flatten(problem.build(config["seed"]))
            weights, n_buffers, blocks = flat.numpy(), layout.n_buffers, layout.blocks
        workers = sorted(self.slowdowns)
        self.it = begin_course(
            config if problem else {**config, "checkpoints": 0},  # without weights there are no versions to keep
            workers,
            update,
            partition,
            weights,
            n_buffers,
            blocks=blocks,
            labels=self._labels(problem) if partition.stratified else None,
            batch_size=batch_size,
            deliver=self._deliver,
            record=self._write,
            save=self._keep,
            clock=lambda: self.now,
            alarm=lambda at: self._at(at, self.it.tick),
            age=math.inf,
        )
        for worker in workers:
            self._join(worker)
        for change in changes:
            self._at(change.seconds, self._join if change.comes else self._lose, change.worker)

    def run(self) -> Simulation:
        """To the end; the times are then in `merged_at` (the last merge) and `busy` (the server)."""
        try:
            while self.queue and not self.it.over:
                seconds, _, what, arguments = heapq.heappop(self.queue)
                self.now = max(self.now, seconds)
                what(*arguments)
            if self.it.state == "running":
                self.it.stop("failed", f"every worker was lost after {self.it.samples.done} of {self.it.samples.budget} samples.")
            self.it.keep()
        finally:
            if self.replicas:
                self.replicas.close()
        return self

    # -- what happens ----------------------------------------------------------------------------------------------

    def _at(self, seconds: float, what: Callable, *arguments: Any) -> None:
        heapq.heappush(self.queue, (seconds, next(self.numbers), what, arguments))

    def _join(self, worker: int) -> None:
        if self.it.state != "running" or self.it.finished:
            return
        self.slowdowns.setdefault(worker, 1.0)
        self.chance.setdefault(worker, np.random.default_rng(np.random.SeedSequence([self.config["seed"], worker, 1 << 21])))
        if self.replicas:
            self.replicas.join(worker)
        pace, chance = self._pace(worker), self.chance[worker]
        probed = pace.seconds * slowness(self.slowdowns[worker], self.jitter)[0] * pace.probe[chance.integers(len(pace.probe))]
        self.it.join(worker, "simulated", probed, threads=1, device="cpu", generator="own")

    def _lose(self, worker: int) -> None:
        if member := self.it.members.get(worker):
            self.it.leave(member, "lost, as simulated")

    def _push(self, worker: int, incarnation: int, go: Answer, times: dict) -> None:
        member = self.it.members.get(worker)
        if member is None or member.incarnation != incarnation:
            return  # lost on the way
        done = {"samples": go.header["samples"], "loss": None, "score": self.timing.score}
        weights = go.weights + STEP
        if self.replicas:
            made, score = self.replicas.work(worker, go)
            done, weights = {"samples": made["samples"], "loss": made["loss"], "score": score}, self.replicas.vector(worker)
        self.it.push(member, {"op": "push", "version": go.header["version"], **done, **times}, weights, self.n_bytes)
        self.told(self.it.samples.done)

    def _deliver(self, worker: int, answer: Answer) -> None:
        if answer.header["op"] != "go":
            self._at(self.now, self._leave, worker, self.it.members[worker].incarnation)
            return
        header = answer.header
        self._write(
            "release",
            worker=worker,
            incarnation=header["incarnation"],
            version=header["version"],
            wait_s=header["wait_s"],
            bytes=self.n_bytes,
        )
        pace, chance = self._pace(worker), self.chance[worker]
        steps = max(1, round(header["samples"] / self.batch_size))
        compute = pace.seconds * header["samples"] * pace.spread[chance.integers(len(pace.spread))] * self._stretched(worker, steps)
        score, exchange = pace.score_s * self._stretched(worker, 1), self.timing.exchange(self.n_bytes)
        times = {"compute_s": compute, "score_s": score, "wait_s": 0.0, "send_s": exchange}
        times = {key: round(seconds, 6) for key, seconds in times.items()}
        self._at(self.now + compute + score + exchange, self._push, worker, header["incarnation"], answer, times)

    def _leave(self, worker: int, incarnation: int) -> None:
        member = self.it.members.get(worker)
        if member and member.incarnation == incarnation:
            self.it.leave(member)

    def _labels(self, problem: Problem | None) -> np.ndarray:
        """Classes for a stratified partition; any will do where nothing is trained."""
        return np.arange(self.config["n_train"]) % 10 if problem is None else problem.labels(problem.train_indices())

    def _pace(self, worker: int) -> Pace:
        return self.timing.paces[worker % len(self.timing.paces)]

    def _stretched(self, worker: int, steps: int) -> float:
        """By how much slowness stretches so many steps."""
        slowdown = self.slowdowns[worker]
        if not self.jitter:
            return max(1.0, slowdown)
        return float(np.maximum(1.0, slowdown * np.exp(self.jitter * self.chance[worker].standard_normal(steps))).mean())

    # -- what is written down --------------------------------------------------------------------------------------

    def _write(self, kind: str, **fields: Any) -> None:
        if kind == "merge":
            self.busy += self.timing.server(self.n_bytes)
            self.now += self.timing.server(self.n_bytes)
            self.merged_at = self.now
        if self.ledger:
            row = {"seq": 0, "time": round(self.now, 6), "seconds": round(self.now, 6), "kind": kind, **fields}
            self.ledger.write(row)

    def _keep(self, version: int, weights: np.ndarray, state: dict) -> None:
        if self.ledger and self.replicas:
            size = self.ledger.keep(version, weights)
            self._write("checkpoint", version=version, total=state["done"], bytes=size)
