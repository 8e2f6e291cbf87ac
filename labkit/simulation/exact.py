"""Replay: the recorded course of a run is driven again in one process, event by event.

    recorded join, push, leave, expire, ... ->  the same Coordinator, update and partition  ->  what follows: allocate, merge, ...
    recorded push                           ->  the worker's replica makes its local pass   ->  weights, loss, score

A `Course` of a run gives bit-identical weights on a CPU and proves it as it goes: what follows must be what was recorded, each
loss and score must have the same bits, and so must every version that the run has retained. What the clock decided (who came when,
measured speeds) is taken from the record; weights, orders and random numbers are computed again. Nobody sleeps.

Used by `labkit.simulation.replay`.
"""

from __future__ import annotations

import json
import math
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np

from labkit.errors import RunError
from labkit.partition import Partition
from labkit.problems.problem import Problem
from labkit.runs import checkpoints
from labkit.runs.config import environment
from labkit.runs.events import VERSIONS, read_rows
from labkit.runs.files import read_json
from labkit.simulation.joint import Ranks
from labkit.simulation.offline import Ledger, Progress, Replicas, begin_course
from labkit.training.run import Run
from labkit.training.server.coordinator import AGAIN, no_room
from labkit.training.server.membership import Member
from labkit.training.wire.compression import n_bytes
from labkit.updates import BadPush, Update

BESIDE = (
    "release",
    "checkpoint",
    "refuse",
    "score",
    "slow",
)  # rows that change nothing: the server's own, and what it did not take in
STAMPS = ("seq", "time", "seconds")


class Life(NamedTuple):
    """The part of a record that one server wrote: a run that was resumed has had several."""

    workers: list[dict]  # with which it began, as the settings have them
    version: int | None  # from which it went on; None for the first
    rows: list[dict]
    last: bool
    lasting: float  # the last version that no later server has made again


def read_lives(run: Run) -> list[Life]:
    """The record of a run, server by server; RunError where it is not whole."""
    rows = read_rows(run.path)
    for number, row in enumerate(rows):
        if row.get("seq") != number:
            raise RunError(
                f"events.jsonl of run {run.name} cannot be replayed: event {number} is missing or out of place; seq "
                f"{row.get('seq')} stands there."
            )
    if not any(row["kind"] == "start" for row in rows):
        raise RunError(f"run {run.name} cannot be replayed: its record has no start.")
    notes, lives = list(run.config.resumed), []
    cuts = [number for number, row in enumerate(rows) if row["kind"] == "resume"]
    versions = [rows[cut]["version"] for cut in cuts]
    for first, end, version in zip([0, *cuts], [*cuts, len(rows)], [None, *versions], strict=True):
        while version is not None and notes and notes.pop(0)["version"] != version:
            pass  # it was begun from elsewhere in between, and has written nothing
        workers = notes[0]["before"]["workers"] if notes else run.config.workers
        lasting = min(versions[len(lives) :], default=math.inf)
        lives.append(Life(workers, version, rows[first:end], end == len(rows), lasting))
    return lives


class Course:
    """The course of one server, driven by its rows and compared with them."""

    def __init__(
        self, run: Run, problem: Problem, update: Update, partition: Partition, ledger: Ledger, life: Life, progress: Progress
    ) -> None:
        self.run, self.ledger, self.progress = run, ledger, progress
        workers, version, self.rows, self.last, lasting = life
        self.retained = {v for v in checkpoints.versions(run.path) if (version or -1) < v <= lasting}
        self.newest = max((row["version"] for row in self.rows if row["kind"] in VERSIONS), default=version or 0)
        self.at, self.now, self.compared, self.passes = 0, self.rows[0]["time"], 0, 0
        self.answers, self.problem = {}, problem
        together = {"answers": self.answers, "computed": self._computed_next}
        self.replicas = Ranks(problem, run.config, **together) if update.collective else Replicas(problem, run.config)
        weights = state = None
        if version is not None:
            weights, state = checkpoints.read_state(run.path, version)
            if "done" not in state:
                raise RunError(f"version {version}, from which run {run.name} went on, holds no state: it cannot be replayed.")
        self.it = begin_course(
            run.config.replace(workers=workers),
            problem,
            update,
            partition,
            weights,
            state=state,
            deliver=self.answers.__setitem__,
            record=self._follows,
            save=self._compare,
            clock=lambda: self.now,
            age=-1.0,  # each version is seen
        )

    def drive(self) -> Course:
        """All rows; RunError at the first that differs."""
        with closing(self.replicas):
            while (row := self._next()) is not None:
                at, self.now = self.at, row["time"]
                self._happens(row)
                if self.at == at:
                    raise self._differs(row, f"{row['kind']!r} does not follow from what is recorded before it")
        missing = sorted(version for version in self.retained if version > self.it.update.version)
        if missing and self.last:
            raise RunError(
                f"run {self.run.name} holds version {missing[-1]}, but its events lead only to version "
                f"{self.it.update.version}: the end of events.jsonl is missing."
            )
        return self

    # -- what happened ---------------------------------------------------------------------------------------------

    def _happens(self, row: dict) -> None:
        kind, worker = row["kind"], row.get("worker")
        if kind == "leave" and row.get("message") == AGAIN:  # a part of its next join
            later = (r for r in self.rows[self.at :] if r["kind"] == "join" and r["worker"] == worker)
            if row := next(later, None):
                kind = "join"
        if kind == "join":
            self._join(row)
        elif kind == "missing":
            self.it.expect(set(self.it.workers) - {worker})
        elif kind in ("stop", "error"):
            self.it.stop("failed" if kind == "error" else "stopped", row["message"])
        elif kind == "expire":
            self.now = max(self.now, self.it.expires or 0.0)  # what is recorded is rounded, and of another clock
            self.it.tick()
        elif kind in ("push", "settle", "leave", "regroup"):
            if (member := self.it.members.get(worker)) is None:
                raise self._differs(row, f"worker {worker} is not there")
            if kind == "leave":
                self.it.leave(member, row["message"])
            elif kind == "regroup":
                self._regroup(member, row)
            else:
                self._push(row)

    def _join(self, row: dict) -> None:
        where = {key: row[key] for key in ("device", "threads", "generator", "precision") if key in row}
        if where.get("device", "cpu") != "cpu":
            raise RunError(
                f"worker {row['worker']} of run {self.run.name} computed on {where['device']}, whose sums depend on the order in "
                "which they happen to be made, so it cannot be replayed bit for bit. replay(run, update=...) can: it computes anew."
            )
        self.replicas.join(row["worker"], where.get("threads", 1), where.get("generator") == "shared", where.get("precision"))
        self.it.join(row["worker"], row.get("message", ""), row.get("probe_s"), **where)

    def _regroup(self, member: Member, row: dict) -> None:
        if (answer := self.answers.pop(member.index, None)) is None or not answer.grant:
            raise self._differs(row, f"worker {member.index} is in no group")
        self.replicas.give_up(member.index, answer, row["message"])
        self.it.regroup(member, row["message"])

    def _push(self, row: dict) -> None:
        worker, answer = row["worker"], self.answers.pop(row["worker"], None)
        if answer is None or not answer.grant:
            raise self._differs(row, f"worker {worker} has nothing to push")
        done, weights = self.replicas.work(worker, answer, row.get("inner"))
        if row["kind"] == "push":
            self._agrees(row, "samples", done["samples"])
            self._agrees(row, "loss", done["loss"])
            if "metrics" in row:
                self._agrees(row, "metrics", done.get("metrics"))
            if row["score"] is not None:
                self._agrees(row, "score", self.replicas.score(worker))
            self.passes += 1
        header = {**row, "op": "push", "version": row["base_version"]}
        fits, at = row["bytes"] == n_bytes(self.run.config.exchange, len(weights)), self.at
        try:
            self.it.push(self.it.members[worker], header, weights if fits else None, row["bytes"], room=self._had_room(row))
        except BadPush:  # what came of it is the next row
            if self.at == at:  # earlier servers recorded it
                self._copy()
        self.progress(self.it.grants.done)

    def _had_room(self, push: dict) -> bool:
        """Was there memory for this push, which is the row at hand? Where there was none, its worker's leave says so, by its version."""
        rows = (self.rows[at] for at in range(self.at + 1, len(self.rows)))
        of_worker = (row for row in rows if row.get("worker") == push["worker"] and row["kind"] in ("push", "join", "leave"))
        row = next(of_worker, {"kind": ""})
        return row["kind"] != "leave" or row.get("message") != no_room(push["worker"], push["base_version"])

    def _computed_next(self, worker: int) -> str | None:
        """How the steps of the next push of this worker were computed."""
        rows = (self.rows[at] for at in range(self.at, len(self.rows)))
        of_worker = (row for row in rows if row.get("worker") == worker and row["kind"] in ("push", "join", "leave", "regroup"))
        row = next(of_worker, {"kind": "leave"})
        if row["kind"] != "push" and getattr(self.problem, "inner", None) is not None and self.problem.inner.split == "auto":
            raise RunError(
                f"worker {worker} of run {self.run.name} was lost, or its group was, before its push, which would have recorded how it computed its "
                "last steps (Inner(split='auto')), and the others have averaged with them: such an all-reduce cannot be replayed."
            )
        while row["kind"] == "regroup":
            row = next(of_worker, {"kind": "leave"})
        return row.get("inner")

    # -- what follows ----------------------------------------------------------------------------------------------

    def _next(self) -> dict | None:
        """The next row that belongs to the course; those beside it are copied as they are."""
        while self.at < len(self.rows) and self.rows[self.at]["kind"] in BESIDE:
            self._copy()
        return self.rows[self.at] if self.at < len(self.rows) else None

    def _copy(self) -> None:
        row = self.rows[self.at]
        if row["kind"] == "score":
            self._agrees(row, "score", self.replicas.score(row["worker"]))
        self.ledger.recorder.copy(row)
        self.at += 1

    def _agrees(self, row: dict, key: str, value: Any) -> None:
        if not _same(row[key], value):
            raise self._differs(row, f"its {key} is {row[key]!r} by the record, and {value!r} now")

    def _follows(self, kind: str, **fields: Any) -> None:
        """An event of the coordinator, which must be the recorded one; what a server that was killed could not write is skipped."""
        row = self._next()
        made = json.loads(json.dumps({"kind": kind, **fields}))
        if row is None:
            if not self.last or self.run.state == "failed":
                return
            raise self._differs(self.rows[-1], f"a {kind!r} should follow, and the record ends")
        timed = {*STAMPS, *(("wait_s",) if kind == "leave" else ())}
        wrong = [k for k in {**row, **made} if k not in timed and not _same(row.get(k), made.get(k))]
        if wrong:
            key = wrong[0]
            raise self._differs(row, f"{key} is {row.get(key)!r} by the record, and {made.get(key)!r} now")
        self._copy()

    def _compare(self, version: int, weights: np.ndarray, state: dict) -> None:
        if version in self.retained:
            pairs = {f"version {version}": (checkpoints.read_weights(self.run.path, version, len(weights)), weights)}
            if "ema" in state:
                average = checkpoints.read_average(self.run.path, version, len(weights))
                pairs[f"the average up to version {version}"] = average, state["ema"]["weights"]
            for what, (then, now) in pairs.items():
                if not np.array_equal(then.view(np.uint32), now.view(np.uint32)):
                    n, apart = int((then != now).sum()), float(np.abs(then - now).max())
                    row = self.rows[min(self.at, len(self.rows)) - 1]
                    raise self._differs(row, f"{n} of {len(now)} weights of {what} differ, by {apart:.3g} at most")
            self.compared += 1
        if version in self.retained or (self.last and version == self.newest):
            checkpoints.write(self.ledger.path, version, weights, checkpoints.lasting(state), run=self.ledger.config.id)

    def _differs(self, row: dict, what: str) -> RunError:
        who = f" of worker {row['worker']}" if "worker" in row else ""
        then, now = (
            {name: e["versions"].get(name) for name in ("torch", "numpy")} | {"on": e["platform"]}
            for e in (read_json(self.run.path / "environment.json"), environment())
        )
        other = [f"{name} {there}" for name, there in then.items() if there != now[name]]
        made = f" It was made with {', '.join(other)}, which is not what is here." if other else ""
        return RunError(f"the replay of run {self.run.name} differs at event {row.get('seq')} ({row['kind']}{who}): {what}.{made}")


def _same(a: Any, b: Any) -> bool:
    """Equal to the last bit; nothing and no entry are the same."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[name], b[name]) for name in a)
    return a == b or (isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b))
