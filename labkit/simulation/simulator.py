"""Simulation: the course of a run on a clock that only jumps from event to event.

    released --exchange + compute + score--> queue of the server --> push: Coordinator, seconds for each merge --> released ...

The server takes pushes one after the other, in the order in which they come; while it merges the clock goes on. Update, partition
and coordinator are the objects of live runs; how long things take comes from a `Timing`. Weights are one number (times
alone: a thousand workers in seconds), or real: then each local pass is made by the worker's replica, and accuracy stands against
simulated time.

Used by `labkit.simulation.simulate`.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from labkit.cluster.emulation import Slowness
from labkit.partition import Partition
from labkit.problems.problem import Problem
from labkit.runs.checkpoints import Layout
from labkit.runs.config import RunConfig
from labkit.simulation.cost_model import Pace, Timing, stretch
from labkit.simulation.offline import Ledger, Progress, Replicas, begin_course, push
from labkit.training.server.coordinator import Coordinator
from labkit.training.wire.compression import n_bytes
from labkit.training.wire.protocol import SCORE_EVERY_S, Answer, Grant
from labkit.updates import Update

STEP = np.float32(1e-3)  # what a local pass changes where nothing is trained: no rule has to divide by nothing


@dataclass(frozen=True)
class Change:
    """At `seconds` a worker is lost, or comes (for the first time, or again)."""

    seconds: float
    worker: int
    comes: bool


class Simulation:
    """One run of this `config` (as `train` writes it), with these times; rows go to `ledger`, or nowhere (without a `problem`)."""

    def __init__(
        self,
        config: RunConfig,
        timing: Timing,
        n_weights: int,
        *,
        update: Update,
        partition: Partition,
        changes: Sequence[Change] = (),
        problem: Problem | None = None,
        ledger: Ledger | None = None,
        progress: Progress = lambda done: None,
    ) -> None:
        self.config, self.timing, self.ledger, self.progress = config, timing, ledger, progress
        self.n_bytes = n_bytes(config.exchange, n_weights)
        self.merge_s = timing.server(4 * n_weights)  # float32 on the server, whatever travels
        self.slowness: dict[int, tuple[Slowness, float]] = {}  # of each incarnation, and when it came
        self.now, self.busy, self.merged_at = 0.0, 0.0, 0.0
        self.queue: list[tuple[float, int, Callable, tuple]] = []
        if ledger:
            ledger.recorder.clock = lambda: (round(self.now, 6),) * 2
        self.numbers, self.chance = itertools.count(), {}
        # When a worker is done with what it computes while its push is under way, and how long it computes there.
        self.free: dict[int, tuple[float, float]] = {}
        self.scored: dict[int, float] = {}  # when a worker has measured its score last
        self.late_score = config.overlap > 0 and not update.scored
        self.replicas = Replicas(problem, config) if problem else None
        options = {"deliver": self._deliver, "record": self._write, "clock": lambda: self.now, "age": math.inf}
        options |= {"alarm": lambda at: self._at(at, self.it.tick)}
        if problem:
            self.it = begin_course(config, problem, update, partition, save=ledger.save, **options)
        else:  # no weights and no versions to keep; any classes do for a stratified partition
            config, one = config.replace(checkpoints=0), Layout((), (), 1, 0)
            options |= {"save": lambda *version: None, "labels": np.arange(config.n_train) % 10}
            self.it = Coordinator.begin(config, update, partition, np.zeros(1, np.float32), one, **options)
        for worker in config.indices:
            self._join(worker)
        for change in changes:
            self._at(change.seconds, self._join if change.comes else self._leave, change.worker)

    def run(self) -> Simulation:
        """To the end; the times are then in `merged_at` (the last merge) and `busy` (the server)."""
        with closing(self.replicas) if self.replicas else nullcontext():
            while self.queue and not self.it.over:
                seconds, _, what, arguments = heapq.heappop(self.queue)
                self.now = max(self.now, seconds)
                what(*arguments)
            if self.it.state == "running":
                self.it.stop("failed", f"every worker was lost after {self.it.grants.done} of {self.it.grants.budget} samples.")
            self.it.checkpoint()
        return self

    # -- what happens ----------------------------------------------------------------------------------------------

    def _at(self, seconds: float, what: Callable, *arguments: Any) -> None:
        heapq.heappush(self.queue, (seconds, next(self.numbers), what, arguments))

    def _join(self, worker: int) -> None:
        if self.it.state != "running" or self.it.finished:
            return
        self.slowness[worker] = Slowness(self.config.unevenness(worker), self.config.seed, worker), self.now
        self.free.pop(worker, None), self.scored.pop(worker, None)
        self.chance.setdefault(worker, np.random.default_rng(np.random.SeedSequence([self.config.seed, worker, 1 << 21])))
        if self.replicas:
            self.replicas.join(worker)
        pace, chance = self._pace(worker), self.chance[worker]
        slow = stretch(self.slowness[worker][0].uneven, np.zeros(1))[0][0]
        probed = pace.seconds * slow * pace.probe[chance.integers(len(pace.probe))]
        self.it.join(worker, "simulated", probed, threads=1, device="cpu", generator="own")

    def _push(self, worker: int, incarnation: int, answer: Answer, times: dict) -> None:
        member = self.it.members.get(worker)
        if member is None or member.incarnation != incarnation:
            return  # lost on the way
        done, weights, score = {"samples": member.granted - member.ahead, "loss": None}, answer.weights + STEP, None
        if self.replicas:
            made, weights = self.replicas.work(worker, answer)
            done |= {name: made[name] for name in ("samples", "loss", "metrics") if name in made}
        if not answer.grant.settle and (times["score_s"] or self.it.update.scored):
            score = self.replicas.score(worker) if self.replicas else self.timing.score
        late = {"score": score, "score_s": times["score_s"]}
        done["score"] = None if self.late_score else score
        times |= {"score_s": 0.0} if self.late_score else {}
        push(self.it, worker, {"op": "push", "version": answer.grant.version, **done, **times}, weights, self.n_bytes)
        if self.late_score and score is not None:
            self._write("score", worker=worker, incarnation=incarnation, **{"pass": member.passes}, **late)
        self.progress(self.it.grants.done)

    def _deliver(self, worker: int, answer: Answer) -> None:
        if not (grant := answer.grant):
            self._at(self.now, self._leave, worker, "", self.it.members[worker].incarnation)
            return
        who = {"worker": worker, "incarnation": grant.incarnation, "version": grant.version}
        self._write("release", **who, wait_s=grant.wait_s, bytes=self.n_bytes)
        trip, compute, ahead, score = self.timing.exchange(self.n_bytes), *self._work(worker, grant)
        here = self.now + trip / 2
        free, carried = self.free.get(worker, (here - trip, 0.0))  # of its latest push, if it has made one
        stood = min(trip, max(0.0, here - free))
        sent = max(here, free) + compute + (0.0 if self.late_score else score)
        self.free[worker] = sent + ahead + (score if self.late_score else 0.0), ahead
        times = {"compute_s": carried + compute, "score_s": score, "wait_s": 0.0, "send_s": stood}
        times |= {"hidden_s": trip - stood} if self.config.overlap else {}
        times = {key: round(seconds, 6) for key, seconds in times.items()}
        self._at(sent + trip / 2, self._push, worker, grant.incarnation, answer, times)

    def _work(self, worker: int, grant: Grant) -> tuple[float, float, float]:
        """Seconds of a local pass, up to its push and while that is under way, and of a score."""
        pace, chance, samples = self._pace(worker), self.chance[worker], grant.samples
        steps, (slowness, came) = max(1, round(samples / self.config.batch_size)), self.slowness[worker]
        if grant.settle:
            return self.timing.settle_s, 0.0, 0.0
        compute = pace.seconds * samples * pace.spread[chance.integers(len(pace.spread))]
        compute = slowness.stretched(compute, self.now - came, steps)
        ahead, score = compute * grant.ahead / max(1, samples), 0.0
        if self.it.update.scored or self.now - self.scored.get(worker, -math.inf) >= SCORE_EVERY_S:
            score, self.scored[worker] = slowness.stretched(pace.score_s, self.now - came + compute), self.now
        return compute - ahead, ahead, score

    def _leave(self, worker: int, why: str = "lost, as simulated", incarnation: int | None = None) -> None:
        """Of any incarnation, or only of this one."""
        member = self.it.members.get(worker)
        if member and incarnation in (None, member.incarnation):
            self.it.leave(member, why)

    def _pace(self, worker: int) -> Pace:
        return self.timing.paces[worker % len(self.timing.paces)]

    def _write(self, kind: str, **fields: Any) -> None:
        if kind == "merge":
            self.busy += self.merge_s
            self.now += self.merge_s
            self.merged_at = self.now
        if self.ledger:
            self.ledger.recorder.event(kind, **fields)
