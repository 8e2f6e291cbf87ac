"""The course of one run: who is here, who may go on with which samples, what is merged, and when it is over.

Between the update and the partition (pure rules) and whoever drives them (live: the sockets and threads of
`labkit.training.server.server`). It knows no socket, no thread and no file: answers go out through `deliver`, rows through
`record`, versions to keep through `save`, and time comes from `clock`, so that another driver can bring a virtual one. A rule's
time limit goes to `alarm`, and the driver calls `tick` then.

    join    -> start barrier -> go         all workers of the run begin together, and the clock starts
    push    -> update.push -> replies      one reply releases one worker: partition.reclaim and allocate, then a grant
    tick    -> update.expire -> replies    a rule that waits for others, but not for ever
    leave   -> the shard goes back, update.leave may release those who waited
    join    -> update.join -> a reply      in mid-run: a new incarnation, served from what the others give back
    regroup -> update.join -> replies      an all-reduce whose group has broken begins anew from the latest version

A run trains on `budget` samples, counted over all workers (`labkit.training.server.grants`); what a rule throws away does not
count. Who finds all of it granted is sent "stop". When the last worker is lost it waits for others; its driver says how
long (`alone_since`).

Used by `labkit.training.server.server` (live) and `labkit.simulation.offline` (replays and simulations).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from labkit.errors import ClusterError, PartitionError, UpdateError
from labkit.partition import Partition
from labkit.runs.checkpoints import AGE_S, Policy
from labkit.runs.config import RunConfig
from labkit.training.server.grants import Allotment, Part
from labkit.training.server.membership import Member
from labkit.training.wire.protocol import Answer
from labkit.updates import Push, Reply, Update

TOLD = ("samples", "loss", "score", "compute_s", "score_s", "wait_s", "send_s", "hidden_s")  # by a worker, of its local pass
AGAIN = "it came again."  # why a worker leaves whose next incarnation joins


class Coordinator:
    """One run from the first join to the last leave. Not safe for threads: its driver holds a lock.

    `state` is "running" until it is "done", "stopped" or "failed"; `over` says that also the last worker has left.
    """

    def __init__(
        self,
        config: RunConfig,
        update: Update,
        partition: Partition,
        *,
        deliver: Callable[[int, Answer], None],
        record: Callable[..., None],
        save: Callable[[int, np.ndarray, dict], None],
        clock: Callable[[], float],
        alarm: Callable[[float], None] = lambda at: None,
        state: dict | None = None,
        age: float = AGE_S,
    ) -> None:
        self.update, self.partition, self.workers = update, partition, config.indices
        self.deliver, self.record, self.clock, self.alarm = deliver, record, clock, alarm
        self.members: dict[int, Member] = {}
        joint = config.local_steps and config.local_steps * config.batch_size
        ahead = config.overlap * config.batch_size if update.ahead else 0
        self.samples = Allotment(partition, config.budget, joint, update, self.members, record, ahead)
        self.policy, self.save = Policy(config.budget, config.checkpoints, clock, age), save
        self.incarnations: dict[int, int] = {}
        self.round = 0  # local passes of the quickest worker; who comes counts on from there, so that no number comes twice
        self.idle: set[int] = set()  # workers for whom the budget leaves nothing, unless another one is lost
        self.hungry: set[int] = set()  # workers for whom no samples are in the pool yet; the update does not know them
        self.expires: float | None = None  # when the rule does not want to wait any longer: `tick`
        self.alone_since: float | None = None  # when the last worker of a run that goes was lost
        self.started = self.finished = self.over = False  # finished: the budget is met, and all have been told
        self.state, self.reason = "running", ""
        if state:
            self._go_on(state)
        else:
            self.keep()

    # -- what workers do -------------------------------------------------------------------------------------------

    def expect(self, workers: Iterable[int]) -> None:
        """Begin with these alone; who was lost before the start may come later."""
        if self.started or self.state != "running" or set(workers) == set(self.workers):
            return
        for index in sorted(set(self.workers) - set(workers) - set(self.members)):
            self.record("missing", worker=index)
            self.workers.remove(index)
            self.partition.leave(index)
            self.update.leave(index)
        self._begin()

    def join(self, index: int, about: str = "", seconds: float | None = None, **fields: Any) -> Member:
        """A worker comes; it is answered when everyone is here, or at once if the run goes already. `fields` are for the record.

        Its earlier incarnation, if that is still thought to be here, leaves. Raises `ClusterError` when the run has ended.
        """
        if self.state != "running" or self.finished:
            raise ClusterError("the run has ended.")
        if index in self.members:
            self.leave(self.members[index], AGAIN)
        incarnation = self.incarnations[index] = self.incarnations.get(index, -1) + 1
        member = self.members[index] = Member(index, incarnation, passes=self.round, seconds=seconds or None)
        self.alone_since = None
        self._row("join", member, message=about, probe_s=seconds, **fields)
        if self.finished:  # by the leave of its earlier incarnation
            self._dismiss(member)
        elif self.started:
            member.held_since = self.clock()
            self.partition.join(index, seconds)
            self._release(self.update.join(index))
        else:
            if seconds and index not in self.partition.seconds:
                self.samples.seconds[index] = float(seconds)
            self._begin()
        return member

    def _begin(self) -> None:
        if not self.members or not set(self.members) >= set(self.workers):
            return
        self.started = True
        self.record("start")
        replies = [Reply(worker, self.update.version, self.update.weights) for worker in sorted(self.workers)]
        for index in sorted(set(self.members) - set(self.workers)):  # was given up, and has come after all
            self.partition.join(index, self.samples.seconds.pop(index, None))
            replies += self.update.join(index)
        self._release(replies)

    def regroup(self, member: Member, why: str) -> None:
        """The group of an all-reduce has broken under `member`: it drops its local pass, and goes on when the others do."""
        self._row("regroup", member, version=self.update.version, message=why)
        self.samples.take_back(member)
        member.held_since = self.clock()
        self.samples.group.disband()
        if self.state != "running":
            return self._dismiss(member)
        self._release(self.update.join(member.index))

    def refuse(self, member: Member, header: dict) -> None:
        """Something came from a worker that was taken to be gone: it changes nothing, and it is written down."""
        samples = int(header.get("samples") or 0)
        late = f"a late {header['op']} of {samples} samples, from a worker that was taken to be gone"
        self._row("refuse", member, version=self.update.version, samples=samples, message=late)

    def push(self, member: Member, header: dict, weights: np.ndarray | None, n_bytes: int) -> None:
        """A worker has finished a local pass. `weights` is only read until the worker is answered; None: of the wrong size."""
        index, samples, version = member.index, int(header["samples"]), int(header["version"])
        member.passes += 1
        self.round = max(self.round, member.passes)
        member.loss, member.score = header["loss"], member.score if header["score"] is None else header["score"]
        told = {"pass": member.passes, **{key: header[key] for key in TOLD if key in header}}
        self._row("push", member, base_version=version, staleness=self.update.version - version, bytes=n_bytes, **told)
        member.held_since = self.clock()
        granted = self.samples.take_back(member)
        if self.state != "running":
            return self._dismiss(member)
        try:
            if samples != granted:
                raise UpdateError(f"a push of {samples} samples, but {granted} were granted.")
            if weights is None:
                raise UpdateError(f"a push of {n_bytes} bytes, which are not the {len(self.update.weights)} weights of this model.")
            replies = self.update.push(Push(index, version, weights, header["score"], samples))
        except Exception as error:  # the rule may be a user's own
            why = error if isinstance(error, UpdateError) else repr(error)
            return self.stop("failed", f"worker {index} at version {version}: {why}")
        self.samples.pushed(member, samples, header["compute_s"] + header["score_s"])
        if all(reply.worker != index for reply in replies):
            member.unmerged = samples
            self._hold(member)
        self._release(replies)

    def tick(self) -> None:
        """Time has passed: from `expires` on, when its driver comes by, the rule hears that it need not wait any longer."""
        if self.state != "running" or self.expires is None or self.clock() < self.expires:
            return
        self.record("expire", version=self.update.version)
        try:
            replies = self.update.expire()
        except UpdateError as error:
            return self.stop("failed", str(error))
        self._release(replies)

    def leave(self, member: Member, why: str = "") -> None:
        """A worker is gone, for whatever reason; its samples and what it had not finished are for the others."""
        if self.members.get(member.index) is not member:
            return
        del self.members[member.index]
        self._row("leave", member, wait_s=member.waited, message=why)
        self.samples.lost(member)
        if self.state == "running" and self.started and not self.finished:
            self.idle.discard(member.index)
            self.hungry.discard(member.index)
            self.partition.leave(member.index)
            self.samples.group.disband()
            try:
                replies = self.update.leave(member.index)
            except UpdateError as error:  # the others' round closes, and cannot be merged
                self.stop("failed", str(error))
            else:
                self._release(replies)
                self._feed()
                self._wake()
        if not self.members:
            if self.state == "running" and self.finished:
                self.state = "done"
            elif self.state == "running" and self.started:
                self.alone_since = self.clock()
            self.over = self.state != "running"

    def stop(self, state: str, reason: str) -> None:
        """Nobody gets another local pass; who is in the middle of one is to be told by the driver."""
        if self.state != "running":
            return
        self.state, self.reason = state, reason
        self.over = not self.members
        for member in self.members.values():
            if not member.busy:
                self._dismiss(member)
        # Last: also when it cannot be written, everybody is told.
        self.record("error" if state == "failed" else "stop", message=reason)

    def keep(self) -> None:
        """Save the newest version, if it is not saved yet, with all that is needed to go on from it."""
        if self.policy.admits(self.samples.merged, self.update.version):
            self.save(self.update.version, self.update.weights, self.state_dict())

    def state_dict(self) -> dict:
        """What a run goes on from: what is merged, and who holds what. Local passes under way are left out."""
        return {
            "version": self.update.version,
            "done": self.samples.merged,
            "update": self.update.lasting(),
            "partition": self.partition.state_dict(),
            "incarnations": dict(self.incarnations),
            "round": self.round,
        }

    def _go_on(self, state: dict) -> None:
        """Begin where a checkpoint ends; update and partition stand there already. The workers may be others than before."""
        self.samples.go_on(int(state["done"]), self.workers)
        self.incarnations = {int(worker): int(n) for worker, n in state["incarnations"].items()}
        self.round = int(state["round"])
        self.policy.go_on(self.samples.merged, self.update.version)
        self.record("resume", version=self.update.version, total=self.samples.done)

    # -- how they are answered -------------------------------------------------------------------------------------

    def _release(self, replies: list[Reply]) -> None:
        """Record what was merged, then give each released worker new samples and a grant, or the end."""
        dropped = self._settle()
        self._mind_deadline()
        self._grant(replies)
        if dropped:
            self._wake()

    def _mind_deadline(self) -> None:
        if self.update.deadline is None:
            self.expires = None
        elif self.expires is None:
            self.expires = self.clock() + self.update.deadline
            self.alarm(self.expires)

    def _settle(self) -> bool:
        """What the latest call of the rule has done is counted, and its version kept if that is due; was anything dropped?"""
        dropped = self.samples.settle()
        if self.update.merges and self.policy.is_due(self.samples.merged):
            self.keep()
        return dropped

    def _grant(self, replies: list[Reply]) -> None:
        members = [self.members[reply.worker] for reply in replies]
        if self.samples.remaining < (len(members) if self.update.collective else 1):
            return self._rest(replies)
        if not members:
            return
        try:
            at_work = self.samples.grant(members)
        except (PartitionError, ClusterError) as error:
            return self.stop("failed", str(error))
        for member, reply in zip(members, replies, strict=True):
            if part := at_work.get(member.index):
                self.deliver(member.index, self.samples.go(member, reply, part, self._waited(member)))
        for member in (member for member in members if member.index not in at_work):  # until another one gives something back
            self.hungry.add(member.index)
            self.samples.forget(member)
            self._hold(member)
            self._release(self.update.leave(member.index))
        self._feed()

    def _rest(self, replies: list[Reply]) -> None:
        """Nothing is left of the budget for these. When nobody is at work any more, the run ends."""
        for reply in replies:
            member = self.members[reply.worker]
            if member.granted:  # it pushes what it has trained on ahead
                self.deliver(member.index, self.samples.go(member, reply, Part(0, []), self._waited(member)))
            else:
                self.idle.add(member.index)
        if not any(member.busy for member in self.members.values()):
            waits = next((member for member in self.members.values() if member.granted), None)  # held, with samples ahead
            return self._rest(self.update.join(waits.index)) if waits else self._finish()
        for reply in replies:
            if reply.worker in self.idle:
                self._hold(self.members[reply.worker])

    def _wake(self) -> None:
        """What has come back of the budget is for those for whom nothing was left."""
        while self.idle and self.samples.remaining > 0 and self.state == "running":
            self.idle.remove(index := min(self.idle))
            self._release(self.update.join(index))

    def _feed(self) -> None:
        """The pool has samples again: the next of those who wait for some."""
        if self.hungry and len(self.partition.pool) and self.state == "running":
            self.hungry.remove(index := min(self.hungry))
            self._release(self.update.join(index))

    def _finish(self) -> None:
        """The budget is met and nobody is under way: what the rule has kept back is merged, and everybody is told."""
        self.finished = True
        try:
            self.update.finish()
        except UpdateError as error:
            return self.stop("failed", str(error))
        self._settle()
        for index in sorted(self.members):
            self._dismiss(self.members[index])
        self.idle.clear()
        self.hungry.clear()

    def _dismiss(self, member: Member) -> None:
        member.waited = self._waited(member)
        self.deliver(member.index, Answer(None, reason=self.reason, wait_s=member.waited))

    def _hold(self, member: Member) -> None:
        self._row("hold", member, version=self.update.version)

    def _row(self, kind: str, member: Member, **fields: Any) -> None:
        self.record(kind, worker=member.index, incarnation=member.incarnation, **fields)

    def _waited(self, member: Member) -> float:
        since, member.held_since = member.held_since, None
        return 0.0 if since is None else round(self.clock() - since, 6)
