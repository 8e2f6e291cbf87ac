"""The samples of a run: how many of its budget are granted, done and merged, and which worker trains on which of them next.

    granted >= done >= merged        of the budget: given to a worker, pushed, part of a version

A *grant* is the number of samples of a worker's next local pass: one pass over its shard, or so many that the mean of all is what
was asked for. Shards, given back and newly allocated, are up to the partition.

Workers that train independently are not through at the same time. The last grants, of the budget or up to a milestone, are
therefore shorter: as long as it takes each to the moment at which all end, by their measured speeds (`balanced`).

A worker may have to train on some samples *ahead*, while its push is under way. Its first grant is longer by so many; from
then on it carries as many into each local pass as it leaves for the next.

Used by `labkit.training.server.coordinator`.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from labkit.errors import ClusterError
from labkit.partition import Partition, largest_remainder
from labkit.training.server.membership import FRUITLESS, Member, Ranks
from labkit.training.wire.protocol import Answer, Grant
from labkit.updates import Reply, Update

FAR = 10  # local passes of every worker: with more left than that nobody thinks of the end yet


class Share(NamedTuple):
    """What one worker gets of the samples that are granted at a time."""

    samples: int
    of_all: list[int]  # the same of each worker that was granted something at that time
    added: int = 0  # samples that its shard has grown by
    pace: float = 0.0  # how many samples all workers train on while this one trains on one: the clock of learning-rate schedules
    more: int = 0  # samples beside these, to train on ahead from now on


class Grants:
    """The counts, and the shards as the members hold them. `joint`: samples of a local pass, on average; None: the whole shard.

    `members` are those of the coordinator, `record` writes a row; `ahead` is how many samples a worker trains on while its push
    is under way; `milestones` are numbers of samples at which everybody waits; `balanced`: the last grants end together, and are
    then whole batches of `batch_size`.
    """

    def __init__(
        self,
        partition: Partition,
        budget: int,
        joint: int | None,
        update: Update,
        members: Mapping[int, Member],
        record: Callable[..., None],
        ahead: int = 0,
        milestones: Sequence[int] = (),
        balanced: bool = True,
        batch_size: int = 1,
    ) -> None:
        self.limits = [*milestones, budget]  # up to which samples are granted, one after the other
        self.partition, self.budget, self.joint, self.update = partition, budget, joint, update
        self.members, self.record, self.ahead = members, record, ahead
        self._n_limits, self.balanced, self.batch_size = len(self.limits), balanced, max(2, batch_size)
        self.now = 0.0  # `Member.elapsed` of the worker that has pushed last; no clock is read, so that a replay finds the same
        self.granted = self.done = self.merged = 0
        self.seconds: dict[int, float] = {}  # per sample, measured (probed at first) and not yet known to the partition
        self.ranks = Ranks()  # of an all-reduce

    @property
    def remaining(self) -> int:
        """What is left to be granted, of the budget or up to the next milestone."""
        return self.limits[0] - self.granted

    @property
    def settled(self) -> int:
        """How many milestones are behind us."""
        return self._n_limits - len(self.limits)

    def restore(self, done: int, workers: list[int], settled: int = 0) -> None:
        """Begin where a checkpoint ends; the workers may be others than before."""
        del self.limits[:settled]
        self.granted = self.done = self.merged = done
        for worker in set(workers) - set(self.partition.workers):
            self.partition.join(worker)
        for worker in set(self.partition.workers) - set(workers):
            self.partition.leave(worker)

    # -- ends of local passes ------------------------------------------------------------------------------------------

    def end_pass(self, member: Member) -> int:
        """Its local pass is over, one way or another; returns what was granted for it, without what it trains on ahead."""
        granted, member.granted, member.ahead = member.granted - member.ahead, member.ahead, 0
        member.seen, member.busy, member.settles = 0, False, False
        self.granted -= granted
        return granted

    def cancel_ahead(self, member: Member) -> None:
        """What it has trained on ahead does not count."""
        self.granted -= member.granted
        member.granted = 0

    def pushed(self, member: Member, samples: int, seconds: float, sent: float = 0.0) -> None:
        """A push counts, though it may yet be dropped or lost; `seconds` is what the local pass took, `sent` the exchange before it."""
        member.sent = sent
        member.elapsed += seconds + sent
        self.now = member.elapsed
        self.granted += samples
        self.done += samples
        each = self.seconds[member.index] = max(1e-9, seconds) / max(1, samples)
        if samples:
            member.seconds = (each + (member.seconds or each)) / 2

    def count(self) -> bool:
        """What the latest call of the rule has merged, and what it has thrown away, counted and recorded; was anything dropped?

        Dropped samples are no longer done: as many are granted again.
        """
        merges, drops = self.update.merges, self.update.drops
        self.merged += sum(merge.samples for merge in merges)
        for kind, merge in [("merge", merge) for merge in merges] + [("drop", drop) for drop in drops]:
            about = {name: getattr(merge, name) for name in ("worker", "version", "staleness", "samples")}
            self.record(kind, **about, total=self.merged, coefficient=round(merge.coefficient, 9))
            if merge.worker in self.members:
                self.members[merge.worker].unmerged = 0
        for drop in drops:
            self.granted, self.done = self.granted - drop.samples, self.done - drop.samples
        if merges:
            self.ranks.fruitless = 0
        return bool(drops)

    def lost(self, member: Member) -> None:
        """A worker is gone: what it had not finished, and what it had pushed and is not merged, is granted again."""
        self.seconds.pop(member.index, None)
        self.granted -= member.granted + member.unmerged
        self.done -= member.unmerged

    # -- grants --------------------------------------------------------------------------------------------------------

    def share(self, members: list[Member]) -> dict[int, Share]:
        """New samples for the shards of these, and a part of what remains for each that holds any; others are not in what returns.

        Raises `PartitionError` as `allocate` does, and `ClusterError` when the group of an all-reduce breaks again and again.
        """
        measured, self.seconds = self.seconds, {}  # each measurement once: the partition averages them
        for member in members:
            if n := self.partition.reclaim(member.index):
                self.record("reclaim", worker=member.index, incarnation=member.incarnation, samples=n)
                member.held = min(member.held, self.partition.held[member.index])  # after a resume it holds nothing yet
        added = self.partition.allocate([member.index for member in members], measured)
        members = [member for member in members if self.partition.held[member.index]]
        if not members:
            return {}
        if self.update.collective and not self.ranks.form(members):
            raise ClusterError(f"the group of the all-reduce broke {FRUITLESS} times in a row at version {self.update.version}.")
        proportions = self._proportions()
        wanted = local_pass([member.index for member in members], proportions, self.joint)
        samples = self._end_together(members, wanted) or up_to(self.remaining, wanted)
        total, shares, left = sum(proportions.values()), {}, self.remaining - sum(samples)
        for member, own in zip(members, samples, strict=True):
            more, index = min(max(0, self.ahead - member.granted), left), member.index
            more += left - more == 1  # no worker is granted a single sample (BatchNorm)
            shares[index], left = Share(own, samples, len(added[index]), total / max(1, proportions[index]), more), left - more
        return shares

    def make(self, member: Member, reply: Reply, share: Share, wait_s: float) -> Answer:
        """The grant of a worker's next local pass, with the indices that it does not have yet.

        A share of no samples asks for what it has trained on ahead.
        """
        index, who = member.index, {"worker": member.index, "incarnation": member.incarnation}
        held, retain = int(self.partition.held[index]), member.held
        if share.added:
            self.record("allocate", **who, samples=share.added, total=held, **{"pass": int(self.partition.count[index])})
        if not retain:
            self.record("pull", **who, version=reply.version)
        new = self.partition.shard(index)[retain:] if held > retain else []  # the first time, the whole shard
        indices = np.ascontiguousarray(new, np.int64)
        carry, samples = member.granted, share.samples + share.more
        member.elapsed = max(member.elapsed, self.now)  # it may have been held, or is new
        self.granted += samples
        ahead = ahead_of(samples, carry + share.more) if self.remaining else 0
        member.granted, member.ahead = carry + samples, ahead
        member.group, member.held, member.busy = self.ranks.number, held, True
        grant = Grant(
            incarnation=member.incarnation,
            version=reply.version,
            wait_s=wait_s,
            retain=retain,
            n_indices=len(indices),
            samples=samples,
            ahead=ahead,
            carry=carry,
            ranks=tuple(index for index, _ in self.ranks.members),
            rank_samples=tuple(share.of_all) if self.ranks.members else (),
            group=self.ranks.number,
            done=self.done,
            pace=share.pace,
        )
        return Answer(grant, reply.weights, indices)

    def settle(self, member: Member, reply: Reply, wait_s: float) -> Answer:
        """No samples: this worker does what a milestone asks for."""
        member.busy, member.settles, member.group = True, True, 0
        who = {"incarnation": member.incarnation, "version": reply.version, "retain": member.held, "done": self.done}
        return Answer(Grant(**who, wait_s=wait_s, settle=1), reply.weights, np.empty(0, np.int64))

    def _end_together(self, members: list[Member], wanted: list[int]) -> list[int]:
        """The samples of these when the end is near and others are at work: so many that all are through at the same time, by their
        measured speeds. Empty where nobody's local pass gets shorter by an eighth of it and by what an exchange takes."""
        if not self.balanced or self.update.collective or self.remaining > FAR * max(wanted) * len(self.members):
            return []
        others = [one for one in self.members.values() if one.busy and one not in members]
        speeds = speeds_of([*members, *others])
        if not others or not any(speeds):
            return []
        under_way = zip(others, speeds[len(members) :], strict=True)
        begun = [one.sent for one in members]
        free = begun + [one.sent + max(0.0, one.elapsed + one.granted / speed - self.now) for one, speed in under_way]
        end = end_of(self.remaining, free, speeds)
        samples, shorter = [], False
        for n, exchange, speed in zip(wanted, begun, speeds, strict=False):
            batches = max(1, round((end - exchange) * speed / self.batch_size))
            samples.append(min(n, batches * self.batch_size))
            shorter |= n - samples[-1] > max(n / 8, exchange * speed)
        return samples if shorter and self.remaining - sum(samples) >= max(2, max(wanted) / 8) else []

    def _proportions(self) -> Mapping[int, int]:
        """In what proportion the workers train: as their shards, or for a paced rule as their speeds."""
        return by_speed(self.partition.held, self.members) if self.update.paced else self.partition.held


def ahead_of(samples: int, most: int) -> int:
    """How many of a grant are trained on ahead: `most`, but no single sample is left over on either side (BatchNorm)."""
    ahead = min(samples, most)
    if most > 1 and samples - ahead == 1:
        ahead -= 1
    return 0 if ahead == 1 < most else ahead


def local_pass(workers: list[int], held: Mapping[int, int], joint: int | None) -> list[int]:
    """Samples of a local pass of each of `workers`; `held` is the size of every worker's shard.

    A local pass is one pass over the shard; or, with `joint` samples for a worker on average, in proportion to the shards, so that a
    balanced partition stays balanced.
    """
    if joint is None:
        return [int(held[worker]) for worker in workers]
    lengths = _in_proportion(joint, tuple(held), tuple(held.values()))
    return [lengths[worker] for worker in workers]


def up_to(remaining: int, wanted: list[int]) -> list[int]:
    """So many samples, or what `remaining` is left; also the few that would be left over."""
    last = remaining - sum(wanted) < 2 * len(wanted)
    return divide(remaining, wanted) if last else wanted


def end_of(samples: int, free: list[float], speeds: list[float]) -> float:
    """When workers that are free at these times are through with so many samples, in seconds, if all end at the same time.

    Who is not free by then takes none of them.
    """
    at, speed = np.array(free, float), np.array(speeds, float)
    order = np.argsort(at, kind="stable")
    ends = (samples + np.cumsum((at * speed)[order])) / np.cumsum(speed[order])  # of the first one alone, of the first two, ...
    return float(ends.min())


@functools.lru_cache(maxsize=1)  # shards grow at first and then they stay; of a thousand workers it takes longer than a merge
def _in_proportion(joint: int, workers: tuple[int, ...], held: tuple[int, ...]) -> Mapping[int, int]:
    """`joint` samples for each worker that holds any, on average, in proportion to the shards."""
    shards = {worker: int(n) for worker, n in zip(workers, held, strict=True) if n}
    lengths = divide(joint * len(shards), list(shards.values()))
    return {worker: max(1, n) for worker, n in zip(shards, lengths, strict=True)}


def by_speed(held: Mapping[int, int], members: Mapping[int, Member]) -> dict[int, int]:
    """The sizes of the shards if they were proportional to measured speed; where it is not known yet, to the mean of the others."""
    workers = [worker for worker, n in held.items() if n and worker in members]
    speeds = speeds_of([members[worker] for worker in workers])
    shares = np.maximum(1, largest_remainder(sum(held.values()), speeds if any(speeds) else [1.0] * len(speeds)))
    return dict(zip(workers, shares.tolist(), strict=True))


def speeds_of(members: Iterable[Member]) -> list[float]:
    """Samples per second; where it is not known yet, the mean of the others. All 0 where nobody's is known."""
    known = [1 / max(1e-12, member.seconds) if member.seconds else None for member in members]
    speeds = [speed for speed in known if speed]
    middle = sum(speeds) / len(speeds) if speeds else 0.0
    return [speed or middle for speed in known]


def divide(total: int, shares: list[int]) -> list[int]:
    """`total` in proportion to `shares`, with two for each if there are so many: BatchNorm cannot train on one sample."""
    least = min(2, total // len(shares))
    return (least + largest_remainder(total - least * len(shares), [max(0, n - least) for n in shares])).tolist()
