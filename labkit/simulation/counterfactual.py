"""Replay with another rule: the recorded arrivals of a run drive another update.

The same workers push in the same order at the same times, but what they push is computed from what that rule has given them, and
grants follow from its own course. A worker that the rule holds cannot push: its arrivals wait and are merged, in recorded order, as
soon as it is released. When the record is used up and the budget is not, those who are at work push in the order in which they were
released. So all of the budget is trained on, and only the order is borrowed; what the rule would have cost in time is a question
for `simulate`.

Used by `labkit.simulation.replay`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from labkit.errors import RunError
from labkit.models.flat import flatten
from labkit.partition import Partition
from labkit.problems.problem import Problem
from labkit.simulation.exact import Lives
from labkit.simulation.offline import Ledger, Replicas, begin_course
from labkit.training.run import Run
from labkit.training.server.coordinator import AGAIN, Coordinator
from labkit.training.wire import compression
from labkit.training.wire.protocol import Answer
from labkit.updates import Update


class Arrivals:
    """The arrivals of a run under another update."""

    def __init__(
        self,
        run: Run,
        problem: Problem,
        update: Update,
        partition: Partition,
        ledger: Ledger,
        lives: Lives,
        told: Callable[[int], None],
    ) -> None:
        if len(lives.servers) > 1:
            raise RunError(
                f"run {run.name} was resumed: some of its arrivals happened twice, and another rule has no part in that."
            )
        self.run, self.ledger, self.told = run, ledger, told
        workers, _, self.rows = lives.servers[0]
        self.row, self.paces, self.done = self.rows[0], {}, {}
        ledger.recorder.clock = lambda: (self.row["time"], self.row["seconds"])
        self.queue: list[dict] = []  # pushes that came while their worker was held
        self.work: dict[int, Answer] = {}  # who is at work, in the order of release
        self.replicas = Replicas(problem, run.config)
        weights, *_ = flatten(problem.build(run.config.seed))
        layout = run.layout
        self.n_bytes = compression.n_bytes(self.replicas.exchange, layout.size)
        self.it: Coordinator = begin_course(
            run.config.replace(workers=workers, batch_size=problem.batch_size),
            update,
            partition,
            weights.numpy(),
            layout.n_buffers,
            blocks=layout.blocks,
            labels=problem.labels(problem.train_indices()) if partition.stratified else None,
            deliver=self._deliver,
            record=self._write,
            save=self._keep,
            clock=lambda: self.row["time"],
            age=math.inf,
        )

    def drive(self) -> None:
        """The arrivals in recorded order, then whoever is still at work."""
        try:
            for row in self.rows:
                self.row = row  # the clock
                self.it.tick()
                self._settle()
                self._happens(row)
                self._settle()
            while self.it.state == "running" and self.work:
                worker = next(iter(self.work))
                self._push(self.paces.get(worker) or self._unknown(worker))
                self._settle()
        finally:
            self.replicas.close()
        if self.it.state == "running":
            self.it.stop("stopped", "nobody is left to push.")
        self.it.checkpoint()

    def _happens(self, row: dict) -> None:
        kind, worker = row["kind"], row.get("worker")
        member = self.it.members.get(worker)
        if kind == "join" and self.it.state == "running" and not self.it.finished:
            self.work.pop(worker, None)
            self.queue = [r for r in self.queue if r["worker"] != worker]
            self.replicas.join(worker, row.get("threads", 1))
            self.it.join(worker, row.get("message", ""), row.get("probe_s"))
        elif kind == "missing":
            self.it.expect(set(self.it.workers) - {worker})
        elif kind in ("stop", "error"):
            self.it.stop("stopped", row["message"])
        elif kind == "leave" and row["message"] not in ("", AGAIN) and member and member.incarnation == row["incarnation"]:
            self.work.pop(worker, None)
            self.queue = [r for r in self.queue if r["worker"] != worker]
            self.it.leave(member, row["message"])
        elif kind == "push" and member and member.incarnation == row["incarnation"]:
            self.queue.append(row)

    def _settle(self) -> None:
        """Who has been dismissed leaves, and arrivals that waited for the release of their worker are merged."""
        while True:
            for worker in sorted(self.done):
                self.it.leave(self.it.members[worker])
                del self.done[worker]
            row = next((row for row in self.queue if row["worker"] in self.work), None)
            if row is None or self.it.state != "running":
                return
            self.queue.remove(row)
            self._push(row)

    def _push(self, row: dict) -> None:
        """What the worker would have pushed now; its pace is that of the recorded pass."""
        worker, self.paces[row["worker"]] = row["worker"], row
        go = self.work.pop(worker)
        done, weights = self.replicas.work(worker, go)
        score = self.replicas.score(worker) if self.it.update.scored else None
        pace = done["samples"] / max(1, row["samples"])
        header = {"op": "push", "version": go.grant.version, "score": score, **done, "wait_s": 0.0}
        header |= {key: row[key] for key in ("score_s", "send_s", "hidden_s") if key in row}
        header |= {"compute_s": round(row["compute_s"] * pace, 6)}
        self.it.push(self.it.members[worker], header, weights, self.n_bytes)
        self.told(self.it.grants.done)

    def _unknown(self, worker: int) -> dict:
        """A worker that has never pushed: as the probe says."""
        joined = next(row for row in reversed(self.rows) if row["kind"] == "join" and row["worker"] == worker)
        return {"worker": worker, "samples": 1, "compute_s": joined.get("probe_s") or 0.0, "score_s": 0.0, "send_s": 0.0}

    def _deliver(self, worker: int, answer: Answer) -> None:
        if grant := answer.grant:
            self.work[worker] = answer
            who = {"worker": worker, "incarnation": grant.incarnation, "version": grant.version}
            self._write("release", **who, wait_s=grant.wait_s, bytes=self.n_bytes)
        else:
            self.done[worker] = answer

    def _write(self, kind: str, **fields: Any) -> None:
        self.ledger.recorder.event(kind, **fields)

    def _keep(self, version: int, weights: np.ndarray, state: dict) -> None:
        size = self.ledger.save(version, weights)
        self._write("checkpoint", version=version, total=state["done"], bytes=size)
