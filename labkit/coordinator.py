"""The course of one run: who is here, who may go on with which samples, what is merged, and when it is over.

Between the update and the partition (pure rules) and whoever drives them (sockets and threads in `labkit.server`). It knows no
socket, no thread and no file: answers go out through `deliver`, rows through `record`, versions to keep through `save`, and
time comes from `clock`, so that another driver can bring a virtual one.

    join   -> start barrier -> go          all workers of the run begin together, and the clock starts
    push   -> update.push -> replies       one reply releases one worker: partition.allocate, then a grant
    leave  -> the shard goes back, update.leave may release those who waited

A run trains on `budget` samples, counted over all workers. A *grant* is the number of samples of the next local pass; who finds the
budget granted is told to stop.

Used by `labkit.server`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from labkit.errors import ClusterError, PartitionError, UpdateError
from labkit.partition import UDPA, largest_remainder
from labkit.updates import Push, Reply, Update


@dataclass
class Member:
    """What is known about one worker that is here."""

    index: int
    incarnation: int
    passes: int = 0
    granted: int = 0  # samples of the local pass that is under way
    seen: int = 0  # of these, trained on so far
    unmerged: int = 0  # samples of a push that waits for the others
    held_since: float | None = None
    waited: float = 0.0  # seconds, before it was told to stop
    loss: float | None = None
    score: float | None = None


@dataclass(frozen=True)
class Answer:
    """What a worker is told: "go" with weights and new indices, or "stop"."""

    header: dict
    weights: np.ndarray | None = None
    indices: np.ndarray | None = None


class Coordinator:
    """One run from the first join to the last leave. Not safe for threads: its driver holds a lock.

    `state` is "running" until it is "done", "stopped" or "failed"; `over` says that also the last worker has left.
    """

    def __init__(
        self,
        *,
        update: Update,
        partition: UDPA,
        workers: list[int],
        budget: int,
        batch_size: int,
        local_steps: int | None,
        checkpoints: int,
        deliver: Callable[[int, Answer], None],
        record: Callable[..., None],
        save: Callable[[int, np.ndarray], None],
        clock: Callable[[], float],
    ) -> None:
        self.update, self.partition, self.workers = update, partition, workers
        self.budget, self.batch_size, self.local_steps, self.checkpoints = budget, batch_size, local_steps, checkpoints
        self.deliver, self.record, self.save, self.clock = deliver, record, save, clock
        self.members: dict[int, Member] = {}
        self.incarnations: dict[int, int] = {}
        self.seconds: dict[int, float] = {}  # per sample, measured (probed at first) and not yet known to the partition
        self.granted = self.done = 0  # samples; what is granted contains what is done
        self.idle: set[int] = set()  # workers for whom no samples are left, unless another one is lost
        self.started = self.over = False
        self.state, self.reason = "running", ""
        self.saved = self.saves_due = -1  # newest version that is kept, and how many were due by then
        self.keep()

    # -- what workers do -------------------------------------------------------------------------------------------

    def join(self, index: int, about: str = "", seconds: float | None = None) -> Member:
        """A worker comes; it is answered when everyone is here, or at once if the run goes already.

        Raises `ClusterError` when the run has ended or this worker is here already.
        """
        if self.state != "running":
            raise ClusterError("the run has ended.")
        if index in self.members:
            raise ClusterError(f"worker {index} is here already.")
        incarnation = self.incarnations[index] = self.incarnations.get(index, -1) + 1
        member = self.members[index] = Member(index, incarnation)
        if seconds:
            self.seconds[index] = float(seconds)
        self.record("join", worker=index, incarnation=incarnation, message=about)
        if self.started:
            self.partition.join(index)
            self._release(self.update.join(index))
        elif set(self.members) == set(self.workers):
            self.started = True
            self.record("start")
            self._release([Reply(worker, self.update.version, self.update.weights) for worker in sorted(self.members)])
        return member

    def push(self, member: Member, header: dict, weights: np.ndarray | None, n_bytes: int) -> None:
        """A worker has finished a local pass. `weights` is only read until the worker is answered; None: of the wrong size."""
        index, samples, version = member.index, int(header["samples"]), int(header["version"])
        member.passes += 1
        member.loss, member.score, member.seen = header["loss"], header["score"], 0
        self.record(
            "push",
            worker=index,
            incarnation=member.incarnation,
            base_version=version,
            staleness=self.update.version - version,
            bytes=n_bytes,
            **{"pass": member.passes},
            **{key: header[key] for key in ("samples", "loss", "score", "compute_s", "score_s", "wait_s", "send_s")},
        )
        member.held_since = self.clock()
        granted, member.granted = member.granted, 0
        self.granted -= granted
        if self.state != "running":
            return self._dismiss(member)
        try:
            if samples != granted:
                raise UpdateError(f"a push of {samples} samples, but {granted} were granted.")
            if weights is None:
                raise UpdateError(f"a push of {n_bytes} bytes, but this model has {self.update.weights.nbytes}.")
            replies = self.update.push(Push(index, version, weights, float(header["score"]), samples))
        except UpdateError as error:
            return self.stop("failed", f"worker {index} at version {version}: {error}")
        self.granted += samples
        self.done += samples
        member.unmerged = samples
        self.seconds[index] = max(1e-9, header["compute_s"] + header["score_s"]) / max(1, samples)
        if all(reply.worker != index for reply in replies):
            self.record("hold", worker=index, incarnation=member.incarnation, version=self.update.version)
        self._release(replies)

    def leave(self, member: Member, why: str = "") -> None:
        """A worker is gone, for whatever reason; its samples and what it had not finished are for the others."""
        if self.members.get(member.index) is not member:
            return
        del self.members[member.index]
        self.seconds.pop(member.index, None)
        self.record("leave", worker=member.index, incarnation=member.incarnation, wait_s=member.waited, message=why)
        if self.state == "running" and self.started:
            self.granted -= member.granted + member.unmerged
            self.done -= member.unmerged
            self.idle.discard(member.index)
            self.partition.leave(member.index)
            self._release(self.update.leave(member.index))
            while self.idle and self.granted < self.budget:  # what it leaves undone is for those who had nothing left to do
                index = min(self.idle)
                self.idle.remove(index)
                self._release(self.update.join(index))
        if not self.members:
            if self.state == "running" and self.started:
                finished = self.budget - self.done < (len(self.workers) if self.update.collective else 1)
                self.state = "done" if finished else "failed"
                self.reason = "" if finished else f"every worker was lost after {self.done} of {self.budget} samples."
            self.over = self.started or self.state != "running"

    def stop(self, state: str, reason: str) -> list[Member]:
        """Nobody gets another local pass. Returns the members who are in the middle of one and must be told to drop it."""
        if self.state != "running":
            return []
        self.state, self.reason = state, reason
        if not self.members:
            self.over = True
        for member in self.members.values():
            if not member.granted:
                self._dismiss(member)
        if state == "failed":
            self.record("error", message=reason)  # last: also when it cannot be written, everybody is told
        return [member for member in self.members.values() if member.granted]

    def keep(self) -> None:
        """Keep the newest version."""
        self.saves_due = self.done * self.checkpoints // self.budget
        if self.update.version != self.saved:
            self.saved = self.update.version
            self.save(self.update.version, self.update.weights)

    def status(self) -> dict:
        return {
            "state": self.state,
            "reason": self.reason,
            "started": self.started,
            "version": self.update.version,
            "samples": self.done + sum(member.seen for member in self.members.values()),
            "budget": self.budget,
            "workers": {m.index: {"loss": m.loss, "score": m.score, "passes": m.passes} for m in self.members.values()},
        }

    # -- how they are answered -------------------------------------------------------------------------------------

    def _release(self, replies: list[Reply]) -> None:
        """Record what was merged, then give each released worker new samples and a grant, or the end."""
        for merge in self.update.merges:
            self.record(
                "merge",
                worker=merge.worker,
                version=merge.version,
                staleness=merge.staleness,
                samples=merge.samples,
                total=self.done,
                coefficient=round(merge.coefficient, 9),
            )
            self.members[merge.worker].unmerged = 0
        if self.update.merges and self.done * self.checkpoints // self.budget > self.saves_due:
            self.keep()
        members = [self.members[reply.worker] for reply in replies]
        remaining = self.budget - self.granted
        if remaining < (len(members) if self.update.collective else 1):
            self.idle.update(member.index for member in members)
            if self.granted == self.done:  # nobody is under way
                self._dismiss_idle()
            else:
                for member in members:
                    self.record("hold", worker=member.index, incarnation=member.incarnation, version=self.update.version)
            return
        if not members:
            return
        measured, self.seconds = self.seconds, {}  # each measurement once: the partition smooths them
        try:
            added = self.partition.allocate([member.index for member in members], measured)
        except PartitionError as error:
            self.stop("failed", str(error))
            return
        grants = self._grants(members, remaining)
        for member, reply, grant in zip(members, replies, grants, strict=True):
            self._go(member, reply, grant, grants, np.ascontiguousarray(added[member.index], np.int64))

    def _go(self, member: Member, reply: Reply, grant: int, grants: list[int], indices: np.ndarray) -> None:
        index, who = member.index, {"worker": member.index, "incarnation": member.incarnation}
        held = int(self.partition.held[index])
        if len(indices):
            count = int(self.partition.count[index])
            self.record("allocate", samples=len(indices), total=held, **{"pass": count}, **who)
        if member.passes == 0:
            self.record("pull", version=reply.version, **who)
        member.granted = grant
        self.granted += grant
        header = {
            "op": "go",
            "version": reply.version,
            "wait_s": self._held(member),
            "indices": len(indices),
            "samples": grant,
            "grants": grants,
            "done": self.done,
            # How many samples all workers train on while this one trains on one: the clock of learning-rate schedules.
            "pace": sum(self.partition.held.values()) / max(1, held),
        }
        self.deliver(index, Answer(header, reply.weights, indices))

    def _grants(self, members: list[Member], remaining: int) -> list[int]:
        """Samples of the next local pass of each member; together at most what is left of the budget."""
        held = {worker: int(n) for worker, n in self.partition.held.items()}
        if self.local_steps is None:
            wanted = [held[member.index] for member in members]
        else:  # in proportion to the shards, so that a balanced partition stays balanced
            parts = dict(zip(held, _share(self.local_steps * self.batch_size * len(held), list(held.values())), strict=True))
            wanted = [max(1, parts[member.index]) for member in members]
        last = remaining - sum(wanted) < 2 * len(members)  # then also the few that would be left over
        return _share(remaining, wanted) if last else wanted

    def _dismiss_idle(self) -> None:
        for index in sorted(self.idle):
            self._dismiss(self.members[index])
        self.idle.clear()

    def _dismiss(self, member: Member) -> None:
        member.waited = self._held(member)
        self.deliver(member.index, Answer({"op": "stop", "reason": self.reason, "wait_s": member.waited}))

    def _held(self, member: Member) -> float:
        since, member.held_since = member.held_since, None
        return 0.0 if since is None else round(self.clock() - since, 6)


def _share(total: int, shares: list[int]) -> list[int]:
    """`total` in proportion to `shares`, with two for everybody if there are so many: BatchNorm cannot train on one sample."""
    least = min(2, total // len(shares))
    return [least + int(n) for n in largest_remainder(total - least * len(shares), [max(0, n - least) for n in shares])]
