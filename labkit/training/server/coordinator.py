"""The course of one run: its members, which samples each is granted, what is merged, and when it is over.

Between the update and the partition (pure rules) and what drives them (live: the sockets and threads of
`labkit.training.server.server`). It holds no socket, no thread and no file: answers leave through `deliver`, rows through
`record`, versions to save through `save`, and time comes from `clock`, so that another driver can bring a virtual one. A rule's
time limit goes to `alarm`, and the driver calls `tick` then.

    join    -> start barrier -> grant      all workers of the run begin together, and the clock starts
    push    -> update.push -> replies      one reply releases one worker: partition.reclaim and allocate, then a grant
    tick    -> update.expire -> replies    a rule that waits for others up to a deadline
    leave   -> the shard is given back, update.leave may release workers that were held
    join    -> update.join -> a reply      in mid-run: a new incarnation, served from what the others give back
    regroup -> update.join -> replies      an all-reduce whose group has broken begins anew from the latest version
    milestone -> one worker settles -> update.restart -> replies      when all up to it is merged and nobody is at work

A run trains on `budget` samples, counted over all workers (`labkit.training.server.grants`); what a rule throws away does not
count. A worker for which nothing is left of it is sent "stop". When the last worker is lost the run waits for others; its driver
says how long (`last_lost_at`).

Used by `labkit.training.server.server` (live) and `labkit.simulation.offline` (replays and simulations).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from labkit.errors import ClusterError, PartitionError, UpdateError, traceback_of
from labkit.partition import Partition
from labkit.runs.checkpoints import AGE_S, Layout, Policy
from labkit.runs.config import RunConfig
from labkit.training.server.average import Average
from labkit.training.server.grants import Grants, Share
from labkit.training.server.membership import Member
from labkit.training.wire import compression
from labkit.training.wire.protocol import Answer
from labkit.updates import BadPush, Diverged, Push, Reply, Update

REPORTED = (
    "samples",
    "loss",
    "score",
    "compute_s",
    "load_s",
    "score_s",
    "wait_s",
    "send_s",
    "hidden_s",
    "inner",
    "metrics",
)  # by a worker, of its local pass
NO_ROOM = "its push was refused: the server has no memory for it."
AGAIN = "it came again."  # the reason of a worker's leave when its next incarnation joins


class NoRoom(BadPush):
    """There is no memory for a push now; its worker, which joins anew, has done nothing wrong."""


def no_room(worker: int, version: int) -> str:
    """The reason of a worker's leave where there was no memory to merge its push, which is in the record."""
    return f"worker {worker} at version {version}: {NO_ROOM}"


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
        room: Callable[[], bool] = lambda: True,
    ) -> None:
        self.update, self.partition, self.workers = update, partition, config.indices
        self.deliver, self.record, self.clock, self.alarm = deliver, record, clock, alarm
        self.members: dict[int, Member] = {}
        joint = config.local_steps and config.local_steps * config.batch_size
        ahead = config.overlap * config.batch_size if update.ahead else 0
        end = {"milestones": config.milestones, "balanced": config.balanced_end, "batch_size": config.batch_size or 1}
        self.grants = Grants(partition, config.budget, joint, update, self.members, record, ahead, **end)
        self.policy, self.save, self.room = Policy(config.budget, config.checkpoints, clock, age), save, room
        self.incarnations: dict[int, int] = {}
        self.round = 0  # local passes of the quickest worker; one that joins counts on from there, so that no number comes twice
        self.idle: set[int] = set()  # workers for which nothing is left of the budget, unless another one is lost
        self.shardless: set[int] = set()  # workers for which no samples are in the pool yet; the update does not know them
        self._serving = False  # one of them is being served now
        self.settling = False  # everybody waits for what a milestone asks for
        self.expires: float | None = None  # the deadline of the rule: `tick`
        self.last_lost_at: float | None = None  # when the last worker of a running run was lost
        self.started = self.finished = self.over = False  # finished: the budget is met, and all have been answered
        self.state, self.reason = "running", ""
        self.traceback = ""  # of a rule that has raised
        self.limit = compression.largest(config.exchange)  # of a weight that can be sent to the others
        self.average = Average(config, update.weights, update.n_exact) if config.ema else None
        if state:
            self._restore(state)
        else:
            self.checkpoint()

    @classmethod
    def begin(
        cls,
        config: RunConfig,
        update: Update,
        partition: Partition,
        weights: np.ndarray,
        layout: Layout,
        *,
        labels: np.ndarray | None = None,
        state: dict | None = None,
        **options: Any,
    ) -> Coordinator:
        """With update and partition at their start, or where the checkpoint of `weights` and `state` ends."""
        update.n_exact, update.tensors = layout.n_exact, layout.averaged if config.still else ()
        if state:
            update.go_on(weights, config.indices, layout.n_buffers, state["update"])
            partition.load_state_dict(state["partition"])
        else:
            update.start(weights, config.indices, layout.n_buffers, layout.blocks)
            units = {"units": config.units} if config.units else {}
            partition.start(config.n_train, config.indices, seed=config.seed, labels=labels, **units)
        return cls(config, update, partition, state=state, **options)

    # -- what workers do -----------------------------------------------------------------------------------------------

    def expect(self, workers: Iterable[int]) -> None:
        """Begin with these alone; a worker that was lost before the start may come later."""
        if self.started or self.state != "running" or set(workers) == set(self.workers):
            return
        for index in sorted(set(self.workers) - set(workers) - set(self.members)):
            self.record("missing", worker=index)
            self.workers.remove(index)
            self.partition.leave(index)
            self.update.leave(index)
        self._begin()

    def join(self, index: int, about: str = "", seconds: float | None = None, **fields: Any) -> Member:
        """A worker joins; it is answered when all have, or at once if the run has started. `fields` are for the record.

        Its earlier incarnation, if that is still thought to be here, leaves. Raises `ClusterError` when the run has ended.
        """
        if self.state != "running" or self.finished:
            raise ClusterError("the run has ended.")
        if index in self.members:
            self.leave(self.members[index], AGAIN)
        incarnation = self.incarnations[index] = self.incarnations.get(index, -1) + 1
        member = self.members[index] = Member(index, incarnation, passes=self.round, seconds=seconds or None)
        self.last_lost_at = None
        self._row("join", member, message=about, probe_s=seconds, **fields)
        if self.finished:  # by the leave of its earlier incarnation
            self._dismiss(member)
        elif self.started:
            member.held_since = self.clock()
            self.partition.join(index, seconds)
            self._release(self.update.join(index))
        else:
            if seconds and index not in self.partition.seconds:
                self.grants.seconds[index] = float(seconds)
            self._begin()
        return member

    def _begin(self) -> None:
        if not self.members or not set(self.members) >= set(self.workers):
            return
        self.started = True
        self.record("start")
        replies = [Reply(worker, self.update.version, self.update.weights) for worker in sorted(self.workers)]
        for index in sorted(set(self.members) - set(self.workers)):  # was not waited for any longer, and has come after all
            self.partition.join(index, self.grants.seconds.pop(index, None))
            replies += self.update.join(index)
        self._release(replies)

    def regroup(self, member: Member, why: str) -> None:
        """The group of an all-reduce has broken under `member`: what it was doing is dropped, and it is released when the others are."""
        self._row("regroup", member, version=self.update.version, message=why)
        self.grants.end_pass(member)
        member.held_since = self.clock()
        self.grants.ranks.disband()
        if self.state != "running":
            return self._dismiss(member)
        self._release(self.update.join(member.index))

    def refuse(self, member: Member, header: dict) -> None:
        """A message came from a worker that was taken to be gone: it changes nothing, and it is recorded."""
        samples = int(header.get("samples") or 0)
        late = f"a late {header['op']} of {samples} samples, from a worker that was taken to be gone"
        self._row("refuse", member, version=self.update.version, samples=samples, message=late)

    def push(
        self, member: Member, header: dict, weights: np.ndarray | None, n_bytes: int, *, own: bool = False, room: bool = True
    ) -> None:
        """A worker has finished a local pass. `weights` is only read until the worker is answered, unless it is the rule's `own`, to be
        written into; None: of the wrong size. Without `room` it is treated as when there is no memory for the merge.

        Raises `BadPush` for one that cannot be merged: its worker should leave, and nothing else has changed. Where that is for want of
        memory (`NoRoom`) it is not the fault of the worker.
        """
        if member.settles:
            return self._settled(member, header, weights, n_bytes)
        index, samples, version = member.index, int(header["samples"]), int(header["version"])
        push = Push(index, version, weights, header["score"], samples, own)
        if self.state == "running":
            try:
                self._check(member, push, n_bytes)
            except BadPush as error:
                raise type(error)(f"worker {index} at version {version}: {error}") from error
            except UpdateError as error:  # of the rule, which has made a version of NaN
                return self._fail(error, f"worker {index} at version {version}: ")
        member.passes += 1
        self.round = max(self.round, member.passes)
        member.loss, member.score = header["loss"], member.score if header["score"] is None else header["score"]
        reported = {"pass": member.passes, **{key: header[key] for key in REPORTED if key in header}}
        self._row("push", member, base_version=version, staleness=self.update.version - version, bytes=n_bytes, **reported)
        member.held_since = self.clock()
        self.grants.end_pass(member)
        if self.state != "running":
            return self._dismiss(member)
        try:
            if not room:
                raise MemoryError
            replies = self.update.merge(push)
        except MemoryError as error:
            raise NoRoom(no_room(index, version)) from error
        except BadPush as error:  # its local pass is over, and counts for nothing
            raise type(error)(f"worker {index} at version {version}: {error}") from error
        except Exception as error:  # the rule may be a user's own
            return self._fail(error, f"worker {index} at version {version}: ")
        self.grants.pushed(member, samples, header["compute_s"] + header["score_s"], header.get("send_s") or 0.0)
        if all(reply.worker != index for reply in replies):
            member.unmerged = samples
            self._hold(member)
        self._release(replies)

    def _check(self, member: Member, push: Push, n_bytes: int) -> None:
        granted = member.granted - member.ahead
        if push.samples != granted or not member.busy:
            raise BadPush(f"a push of {push.samples} samples, but {granted if member.busy else 0} were granted.")
        if push.weights is None:
            raise BadPush(f"a push of {n_bytes} bytes, which are not the {len(self.update.weights)} weights of this model.")
        try:
            largest = self.update.check(push)
        except Diverged as error:
            if self.limit == math.inf:
                raise
            raise Diverged(
                f"{error} Or they are beyond {self.limit:g}: float16 holds no more, exchange='bfloat16' does."
            ) from error
        if largest > self.limit:
            raise BadPush(f"weights as large as {largest:.3g} do not fit into float16 ({self.limit:g}). Use exchange='bfloat16'.")

    def tick(self) -> None:
        """Time has passed: from `expires` on the rule releases the workers that it holds."""
        if self.state != "running" or self.finished or self.expires is None or self.clock() < self.expires:
            return
        self.record("expire", version=self.update.version)
        try:
            replies = self.update.expire()
        except Exception as error:
            return self._fail(error)
        self._release(replies)

    def leave(self, member: Member, why: str = "") -> None:
        """A worker is gone, for whatever reason; its samples, and what it had not finished, go to the others."""
        if self.members.get(member.index) is not member:
            return
        del self.members[member.index]
        self._row("leave", member, wait_s=member.waited, message=why)
        self.grants.lost(member)
        if self.state == "running" and self.started and not self.finished:
            self.idle.discard(member.index)
            self.shardless.discard(member.index)
            self.partition.leave(member.index)
            self.grants.ranks.disband()
            try:
                replies = self.update.leave(member.index)
            except Exception as error:  # the others' round closes, and cannot be merged
                self._fail(error)
            else:
                self._release(replies)
                self._serve_shardless()
                self._serve_idle()
        if not self.members:
            if self.state == "running" and self.finished:
                self.state = "done"
            elif self.state == "running" and self.started:
                self.last_lost_at = self.clock()
            self.over = self.state != "running"

    def stop(self, state: str, reason: str) -> None:
        """Nobody gets another local pass; those that are in the middle of one are for the driver to interrupt."""
        if self.state != "running":
            return
        self.state, self.reason = state, reason
        self.over = not self.members
        for member in self.members.values():
            if not member.busy and not self.finished:  # else it has been answered
                self._dismiss(member)
        # Last: when it cannot be written, all have been answered nevertheless.
        self.record("error" if state == "failed" else "stop", message=reason)

    def _fail(self, error: Exception, where: str = "") -> None:
        """The rule has raised: the run ends, with its traceback."""
        self.traceback = traceback_of(error)
        self.stop("failed", f"{where}{error if isinstance(error, UpdateError) else repr(error)}")

    def checkpoint(self) -> None:
        """Save the newest version, if it is not saved yet, with all that is needed to resume from it."""
        if not self.policy.admits(self.grants.merged, self.update.version):
            return
        try:
            self.save(self.update.version, self.update.weights, self.state_dict())
        except MemoryError:
            self.skipped(self.update.version)

    def save_if_due(self) -> None:
        """The newest version, when there is `room`: the driver asks again when there is."""
        if self.policy.is_due(self.grants.merged) and self.room():
            self.checkpoint()

    def skipped(self, version: int) -> None:
        """For want of memory or files a version is not saved. The run goes on; the next one is saved when it is due."""
        self.policy.missed(version)
        self.record("refuse", version=version, message=f"version {version} was not saved: there was no room for it.")

    def status(self) -> dict:
        """How far the run is: as its kernel gets it."""
        members = self.members.values()
        return {
            "state": self.state,
            "reason": self.reason,
            "started": self.started,
            "version": self.update.version,
            "samples": self.grants.done + sum(member.seen for member in members),
            "budget": self.grants.budget,
            "workers": {
                member.index: {
                    "loss": member.loss,
                    "score": member.score,
                    "passes": member.passes,
                    "host": member.host,
                    "pid": member.pid,
                }
                for member in members
            },
        }

    def state_dict(self) -> dict:
        """What a run resumes from: what is merged, and which worker holds what. Local passes under way are left out."""
        return {
            "version": self.update.version,
            "done": self.grants.merged,
            "update": self.update.lasting(),
            "partition": self.partition.state_dict(),
            "incarnations": dict(self.incarnations),
            "round": self.round,
            "settled": self.grants.settled,
            **({"ema": self.average.state_dict()} if self.average else {}),
        }

    def _restore(self, state: dict) -> None:
        """Begin where a checkpoint ends; update and partition stand there already. The workers may be others than before."""
        self.grants.restore(int(state["done"]), self.workers, int(state.get("settled", 0)))
        self.incarnations = {int(worker): int(n) for worker, n in state["incarnations"].items()}
        self.round = int(state["round"])
        self.policy.resume(self.grants.merged, self.update.version)
        if self.average:
            self.average.load_state_dict(state["ema"], self.grants.merged)
        self.record("resume", version=self.update.version, total=self.grants.done)

    # -- answers -------------------------------------------------------------------------------------------------------

    def _release(self, replies: list[Reply]) -> None:
        """Record what was merged, then give each released worker new samples and a grant, or the end."""
        dropped = self._count()
        self._set_deadline()
        self._grant(replies)
        if dropped:
            self._serve_idle()

    def _set_deadline(self) -> None:
        if self.update.deadline is None:
            self.expires = None
        elif self.expires is None:
            self.expires = self.clock() + self.update.deadline
            self.alarm(self.expires)

    def _count(self) -> bool:
        """Count what the latest call of the rule has done, and save its version if that is due; was anything dropped?"""
        dropped = self.grants.count()
        if self.update.merges and self.average:
            self.average.follow(self.update.weights, self.grants.merged, self.update.still)
        if self.update.merges:
            self.save_if_due()
        return dropped

    def _grant(self, replies: list[Reply]) -> None:
        members = [self.members[reply.worker] for reply in replies]
        if self.settling:
            return self._settle(replies)
        if self.grants.remaining < (len(members) if self.update.collective else 1):
            return self._leave_idle(replies)
        if not members:
            return
        try:
            shares = self.grants.share(members)
        except (PartitionError, ClusterError) as error:
            return self.stop("failed", str(error))
        for member, reply in zip(members, replies, strict=True):
            if share := shares.get(member.index):
                self.deliver(member.index, self.grants.make(member, reply, share, self._waited(member)))
        for member in (member for member in members if member.index not in shares):  # until another one gives something back
            self.shardless.add(member.index)
            self.grants.cancel_ahead(member)
            self._hold(member)
            self._release(self.update.leave(member.index))
        self._serve_shardless()

    def _leave_idle(self, replies: list[Reply]) -> None:
        """Nothing is left of the budget for these. When no local pass is under way any more, the run ends."""
        for reply in replies:
            member = self.members[reply.worker]
            if member.granted:  # it pushes what it has trained on ahead
                self.deliver(member.index, self.grants.make(member, reply, Share(0, []), self._waited(member)))
            else:
                self.idle.add(member.index)
        if not any(member.busy for member in self.members.values()):
            waits = next((member for member in self.members.values() if member.granted), None)  # held, with samples ahead
            return self._leave_idle(self.update.join(waits.index)) if waits else self._finish()
        for reply in replies:
            if reply.worker in self.idle:
                self._hold(self.members[reply.worker])

    def _serve_idle(self) -> None:
        """What has come back of the budget is for the idle workers."""
        while self.idle and self.grants.remaining > 0 and self.state == "running" and not self.settling:
            self.idle.remove(index := min(self.idle))
            self._release(self.update.join(index))

    def _serve_shardless(self) -> None:
        """The pool has samples again: for the workers that have none, one after the other, as long as one of them gets any."""
        waiting: set[int] | None = None
        while not self._serving and self.shardless != waiting:
            waiting = set(self.shardless)
            for index in sorted(waiting):
                if index in self.shardless and len(self.partition.pool) and self.state == "running" and not self.settling:
                    self.shardless.remove(index)
                    self._serving = True  # what is there may be set aside for another one: it then waits on
                    try:
                        self._release(self.update.join(index))
                    finally:
                        self._serving = False

    def _finish(self) -> None:
        """The limit is met and no local pass is under way: what the rule has held back is merged, and all are answered."""
        try:
            self.update.finish()
        except Exception as error:
            return self._fail(error)
        self._count()
        if len(self.grants.limits) > 1:
            return self._settle()
        self.finished = True
        for index in sorted(self.members):
            self._dismiss(self.members[index])
        self.idle.clear()
        self.shardless.clear()

    def _settle(self, replies: Iterable[Reply] = ()) -> None:
        """A milestone is reached: the first worker that is here settles the newest version, and everybody waits for it."""
        self.settling = True
        for reply in replies:
            self.idle.add(reply.worker)
            self._hold(self.members[reply.worker])
        if not self.members or any(member.settles for member in self.members.values()):
            return  # when the first one comes, or when it has
        member = self.members[min(set(self.members) - self.shardless or self.members)]
        reply = Reply(member.index, self.update.version, self.update.weights)
        self.deliver(member.index, self.grants.settle(member, reply, self._waited(member)))

    def _settled(self, member: Member, header: dict, weights: np.ndarray | None, n_bytes: int) -> None:
        """It has: its weights are the next version, from which all begin."""
        if weights is None:
            raise BadPush(f"a push of {n_bytes} bytes, which are not the {len(self.update.weights)} weights of this model.")
        self.settling, member.held_since = False, self.clock()
        self.grants.end_pass(member)
        if self.state != "running":
            return self._dismiss(member)
        before, members = self.update.version, sorted(set(self.members) - self.shardless)
        try:
            replies = self.update.restart(weights, members)
        except MemoryError as error:
            self.settling = True  # the next one does
            raise NoRoom(f"worker {member.index} settled version {before}: {NO_ROOM}") from error
        except Exception as error:
            return self._fail(error, f"worker {member.index} settled version {before}: ")
        reported = {key: header[key] for key in REPORTED if header.get(key) is not None}
        versions = {"base_version": before, "version": self.update.version, "total": self.grants.merged}
        self._row("settle", member, bytes=n_bytes, **versions, **reported)
        del self.grants.limits[0]
        if self.average:
            self.average.restart(self.update.weights, self.grants.merged)
        self.idle.clear()
        self.checkpoint()
        self._release(replies)

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
