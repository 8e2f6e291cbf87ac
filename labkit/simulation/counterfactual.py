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
from contextlib import closing

from labkit.partition import Partition
from labkit.problems.problem import Problem
from labkit.simulation.exact import Life
from labkit.simulation.offline import Ledger, Progress, Replicas, begin_course, push
from labkit.training.run import Run
from labkit.training.server.coordinator import AGAIN
from labkit.training.wire.compression import n_bytes
from labkit.training.wire.protocol import Answer
from labkit.updates import Update


class Arrivals:
    """The arrivals of a run under another update."""

    def __init__(
        self, run: Run, problem: Problem, update: Update, partition: Partition, ledger: Ledger, life: Life, progress: Progress
    ) -> None:
        self.ledger, self.progress = ledger, progress
        self.rows = life.rows
        self.row, self.paces, self.dismissed = self.rows[0], {}, set()
        ledger.recorder.clock = lambda: (self.row["time"], self.row["seconds"])
        self.queue: list[dict] = []  # pushes that came while their worker was held
        self.work: dict[int, Answer] = {}  # who is at work, in the order of release
        self.replicas = Replicas(problem, run.config)
        self.n_bytes = n_bytes(run.config.exchange, run.layout.size)
        self.it = begin_course(
            run.config.replace(workers=life.workers),
            problem,
            update,
            partition,
            deliver=self._deliver,
            record=ledger.recorder.event,
            save=ledger.save,
            clock=lambda: self.row["time"],
            age=math.inf,
        )

    def drive(self) -> Arrivals:
        """The arrivals in recorded order, then whoever is still at work."""
        with closing(self.replicas):
            for row in self.rows:
                self.row = row  # the clock
                self.it.tick()
                self._catch_up()
                self._happens(row)
                self._catch_up()
            while self.it.state == "running" and self.work:
                worker = next(iter(self.work))
                self._push(self.paces.get(worker) or self._unknown(worker))
                self._catch_up()
        if self.it.state == "running":
            self.it.stop("stopped", "nobody is left to push.")
        self.it.checkpoint()
        return self

    def _happens(self, row: dict) -> None:
        kind, worker = row["kind"], row.get("worker")
        member = self.it.members.get(worker)
        if kind == "join" and self.it.state == "running" and not self.it.finished:
            self._forget(worker)
            how = {"precision": row["precision"]} if "precision" in row else {}
            self.replicas.join(worker, row.get("threads", 1), **how)
            self.it.join(worker, row.get("message", ""), row.get("probe_s"), **how)
        elif kind == "missing":
            self.it.expect(set(self.it.workers) - {worker})
        elif kind in ("stop", "error"):
            self.it.stop("stopped", row["message"])
        elif kind == "leave" and row["message"] not in ("", AGAIN) and member and member.incarnation == row["incarnation"]:
            self._forget(worker)
            self.it.leave(member, row["message"])
        elif kind == "push" and member and member.incarnation == row["incarnation"]:
            self.queue.append(row)

    def _forget(self, worker: int) -> None:
        self.work.pop(worker, None)
        self.queue = [row for row in self.queue if row["worker"] != worker]

    def _catch_up(self) -> None:
        """Who has been dismissed leaves, a milestone is done at once, and arrivals that waited for their worker are merged."""
        while True:
            for worker in [worker for worker, answer in self.work.items() if answer.grant.settle]:
                self._push(self.paces.get(worker) or self._unknown(worker))
            for worker in sorted(self.dismissed):
                self.it.leave(self.it.members[worker])
                self.dismissed.remove(worker)
            row = next((row for row in self.queue if row["worker"] in self.work), None)
            if row is None or self.it.state != "running":
                return
            self.queue.remove(row)
            self._push(row)

    def _push(self, row: dict) -> None:
        """What the worker would have pushed now; its pace is that of the recorded pass."""
        worker, self.paces[row["worker"]] = row["worker"], row
        answer = self.work.pop(worker)
        done, weights = self.replicas.work(worker, answer)
        score = self.replicas.score(worker) if self.it.update.scored and not answer.grant.settle else None
        pace = done["samples"] / max(1, row["samples"])
        header = {"op": "push", "version": answer.grant.version, "score": score, **done, "wait_s": 0.0}
        header |= {key: row[key] for key in ("score_s", "send_s", "hidden_s") if key in row}
        header |= {} if answer.grant.settle else {"compute_s": round(row["compute_s"] * pace, 6)}
        push(self.it, worker, header, weights, self.n_bytes)
        self.progress(self.it.grants.done)

    def _unknown(self, worker: int) -> dict:
        """A worker that has never pushed: as the probe says."""
        joined = next(row for row in reversed(self.rows) if row["kind"] == "join" and row["worker"] == worker)
        return {"worker": worker, "samples": 1, "compute_s": joined.get("probe_s") or 0.0, "score_s": 0.0, "send_s": 0.0}

    def _deliver(self, worker: int, answer: Answer) -> None:
        if grant := answer.grant:
            self.work[worker] = answer
            who = {"worker": worker, "incarnation": grant.incarnation, "version": grant.version}
            self.ledger.recorder.event("release", **who, wait_s=grant.wait_s, bytes=self.n_bytes)
        else:
            self.dismissed.add(worker)
