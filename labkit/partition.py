"""Partitions: which worker holds which samples.

    UDPA   every worker gets n/m samples at once                                              the usual way
    IDPA   A batches; batch 1 by declared or probed speed, batch a by measured speed:         BPT-CNN 2019
           T = (a n/A) / sum_l (1/t_l),   target_j = T / t_j,   batch_j = target_j - held_j   t_j = seconds per sample

A partition is a pure state machine: seconds per sample go in, sample indices come out; it reads no clock and moves no data. The
samples are shuffled once by seed. At every moment each sample is held by one worker or by none. A shard only grows, with one
exception that is not in the paper: for a worker that comes late, the others give back what exceeds their shares (`reclaim`).
The shard of a worker that leaves goes to the others. Rounding is by largest remainders; a target below what a worker already
holds is clamped to nothing, and the others are rescaled so that the batch has its size.

Samples that are read together (a row group of a Parquet file) are a *unit*, and units are dealt out whole: the pool is a permutation
of units, targets are samples as ever, and what is handed out or given back is the nearest number of whole units.

Used by `labkit.training.server.coordinator`, which calls `allocate` whenever it releases workers.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import numpy as np

from labkit.cards import Card, Carded, rule_card, rule_text
from labkit.errors import PartitionError, flag, real, several, whole
from labkit.imports import make_rule, rule_config

QUICKEST, SLOWEST = 1e-18, 1e18  # seconds per sample: what is beyond counts as this, so that shares and their sums are finite


def usable(seconds: float) -> float | None:
    """Measured seconds per sample as a partition can compute with them: None for what is no number, no time is 0 or infinite."""
    seconds = float(seconds)
    return None if math.isnan(seconds) else min(max(seconds, QUICKEST), SLOWEST)


def largest_remainder(total: int, shares: Sequence[float] | np.ndarray) -> np.ndarray:
    """Split `total` into whole numbers in proportion to `shares` (int64, sums to `total` exactly).

    Infinite shares get all, NaN is no share.
    """
    shares = np.asarray(shares, dtype=np.float64)
    with np.errstate(over="ignore"):
        fits = math.isfinite(max(1, total) * shares.sum())
    if not fits:
        endless, shares = np.isposinf(shares), np.where(np.isfinite(shares), shares, 0.0)
        shares = endless.astype(float) if endless.any() else shares / max(1.0, shares.max())
    if shares.sum() <= 0:
        shares = np.ones_like(shares)
    exact = total * shares / shares.sum()
    counts = np.floor(exact).astype(np.int64)
    order = np.argsort(-(exact - counts), kind="stable")
    counts[order[: total - int(counts.sum())]] += 1
    return counts


def shuffled(n: int, seed: int, labels: np.ndarray | None = None, units: np.ndarray | None = None) -> np.ndarray:
    """A permutation of n samples by seed; with `labels` every run of neighbours holds the classes in their true shares, with `units`
    (their offsets) it is one of units, whose samples stay together in their order."""
    generator = np.random.default_rng(np.random.SeedSequence([seed, n]))
    if units is not None:
        return np.concatenate([np.arange(units[at], units[at + 1]) for at in generator.permutation(len(units) - 1)])
    order = generator.permutation(n)
    if labels is None:
        return order
    classes, label, counts = np.unique(labels, return_inverse=True, return_counts=True)
    by_class = order[np.argsort(label.astype(np.min_scalar_type(len(classes)))[order], kind="stable")]  # one class behind the other
    offsets, sizes = np.repeat(generator.random(len(classes)), counts), np.repeat(counts, counts)
    within = np.arange(n) - np.repeat(np.cumsum(counts) - counts, counts)
    rank = np.empty(n)  # of a sample within its own class, in [0, 1)
    rank[by_class] = (within + offsets) / sizes
    return np.argsort(rank, kind="stable")


class Partition(Carded):
    """Which worker holds which samples, and how shards grow; a rule adds `_speeds`, to which shares are proportional.

    `stratified=True` gives each shard the classes in their true shares.
    """

    name = ""
    batches = 1  # allocations until all samples are handed out
    units: np.ndarray | None = None  # offsets of the units, int64 from 0 to n_samples; None: each sample by itself

    def __init__(self, *, stratified: bool = False) -> None:
        self.stratified = flag("stratified", stratified)

    def start(
        self,
        n_samples: int,
        workers: Iterable[int],
        *,
        seed: int = 0,
        labels: np.ndarray | None = None,
        units: Sequence[int] | np.ndarray | None = None,
    ) -> None:
        """Shuffle the samples and forget every allocation; `labels` (n_samples,) is needed when stratified.

        `units` are the offsets, from 0 to `n_samples`, of runs of samples that are read together: these are handed out whole.
        """
        self.workers = sorted(int(worker) for worker in workers)
        self._set_units(units, int(n_samples))
        if self.units is not None and len(self.units) <= len(self.workers):
            raise PartitionError(
                f"{len(self.units) - 1} units (row groups) cannot fill {len(self.workers)} shards (one each at least). Use "
                f"n_workers <= {len(self.units) - 1}, or write the file with smaller row groups."
            )
        smallest = n_samples if self.units is not None else n_samples // self.batches
        if smallest < len(self.workers):
            of = f"{n_samples} samples" + (f" in {self.batches} batches" if self.batches > 1 else "")
            fewer = "" if self.batches == 1 else " or fewer batches"
            raise PartitionError(
                f"{of} cannot fill {len(self.workers)} shards (one sample each at least). "
                f"Use n_workers <= {max(1, smallest)}{fewer}."
            )
        if self.stratified and labels is None:
            raise PartitionError("a stratified partition needs labels, and this data set has none. Use stratified=False.")
        if self.stratified and self.units is not None:
            raise PartitionError(
                "a stratified partition picks single samples, and this data set is dealt out by row groups. Use stratified=False (row "
                "groups of a shuffled file hold the classes in their shares), or stream=False."
            )
        self.n_samples = int(n_samples)
        self.pool = shuffled(self.n_samples, seed, labels if self.stratified else None, self.units)  # not handed out yet
        self.held = dict.fromkeys(self.workers, 0)
        self.count = dict.fromkeys(self.workers, 0)  # allocations that each worker has had
        self.shards: dict[int, list[np.ndarray]] = {worker: [] for worker in self.workers}
        self.seconds: dict[int, float] = {}  # smoothed seconds per sample
        self.late: set[int] = set()  # who came after the start and does not hold its share yet
        self.reached = 0  # the largest count so far, also of those who are gone
        self._members_changed()

    def allocate(self, workers: Iterable[int], seconds: Mapping[int, float] | None = None) -> dict[int, np.ndarray]:
        """The indices to add to the shards of `workers`, which are about to begin their next local pass.

        `seconds` maps a worker to the seconds per sample of its latest local pass (of a probe, before the first); workers
        without an entry, or with one that is no number, retain their earlier value, and times of 0 or without end are taken to be very
        short or long. Returns int64 arrays, empty where a worker gets nothing. Under a barrier
        all workers are named in one call and share the batch exactly; otherwise each worker's own count of allocations
        says which batch it is at.
        """
        workers = sorted(workers)
        if seconds:
            self._learn(seconds)
            self._targets.clear()
        for worker in workers:
            self.count[worker] += 1
        add = self._batch(workers) if len(self.pool) else [0] * len(workers)
        given, carry = {}, 0  # what rounding to units leaves of one is for the next
        for worker, n in zip(workers, add, strict=True):
            given[worker] = self._hand_out(worker, int(n) + carry)
            carry = 0 if self.units is None else int(n) + carry - len(given[worker])
        for worker in workers:
            if self.held[worker]:
                self.reached = max(self.reached, self.count[worker])
            else:  # nothing was there to be had
                self.count[worker] -= 1
        return given

    def reclaim(self, worker: int) -> int:
        """How many samples `worker`, about to begin its next local pass, gives back for those who came late: the last of its shard.

        They go to the pool, from which `allocate` serves the latecomers. 0 where nobody waits for samples.
        """
        missing = self._owed() - len(self.pool)
        if missing <= 0 or (worker in self.late and any(n > 1 for other, n in self.held.items() if other not in self.late)):
            return 0
        n = 0 if worker in self.late else min(self.held[worker] - max(1, self._target(worker)), missing)
        if n <= 0 and self.held[worker] > 1 and not len(self.pool) and self._set_aside():
            n = 1
        if n <= 0:
            return 0
        shard = self.shard(worker)
        if self.units is not None and not (n := self._back(shard, n)):
            return 0
        self.shards[worker], self.pool = [shard[:-n]], np.concatenate([self.pool, shard[-n:]])
        self.held[worker] -= n
        return n

    def join(self, worker: int, seconds: float | None = None) -> None:
        """A worker more, after the start; `seconds` per sample as probed. It gets what the others give back (`reclaim`)."""
        if worker not in self.workers:
            self.workers = sorted([*self.workers, worker])
            self.held[worker], self.count[worker], self.shards[worker] = 0, self.reached, []
            self.late.add(worker)
            if seconds and (each := usable(seconds)):
                self.seconds[worker] = each
            self._members_changed()

    def leave(self, worker: int) -> None:
        """A worker is gone: its shard goes back and is handed to the others with their next allocations."""
        if worker in self.workers:
            self.workers.remove(worker)
            self.pool = np.concatenate([self.pool, *self.shards.pop(worker)]).astype(np.int64)
            self.held.pop(worker), self.count.pop(worker), self.seconds.pop(worker, None)
            self.late.discard(worker)
            self._members_changed()

    def shard(self, worker: int) -> np.ndarray:
        """All indices that `worker` holds, in the order in which they came (int64)."""
        return np.concatenate([np.empty(0, np.int64), *self.shards[worker]])

    def state_dict(self) -> dict:
        """Everything that the future of the partition depends on: numbers, dicts and arrays; no objects."""
        state = {"n_samples": self.n_samples, "workers": list(self.workers), "late": sorted(self.late), "pool": self.pool.copy()}
        state |= {"reached": self.reached, "shards": {worker: self.shard(worker) for worker in self.workers}}
        state |= {} if self.units is None else {"units": self.units.copy()}
        return state | {"count": dict(self.count), "seconds": dict(self.seconds)}

    def load_state_dict(self, state: dict) -> None:
        """Go on from a `state_dict`, also without `start`; `PartitionError` unless it holds every sample exactly once."""
        shards = {worker: np.array(state["shards"][worker], np.int64) for worker in state["workers"]}
        pool, n = np.array(state["pool"], np.int64), int(state["n_samples"])
        held = np.concatenate([pool, *shards.values()])
        if len(held) != n or not np.array_equal(np.sort(held), np.arange(n)):
            raise PartitionError(f"the saved partition holds {len(np.unique(held))} different samples of {n}, {len(held)} in all.")
        self._set_units(state.get("units"), n)
        self.n_samples, self.workers, self.late, self.pool = n, list(state["workers"]), set(state["late"]), pool
        self.shards = {worker: [shard] for worker, shard in shards.items()}
        self.held = {worker: len(shard) for worker, shard in shards.items()}
        self.count, self.seconds, self.reached = dict(state["count"]), dict(state["seconds"]), int(state["reached"])
        self._members_changed()

    def config(self) -> dict:
        """Name (a user's own class: its import path) and settings, stored as attributes, as JSON for `make_partition`."""
        return rule_config(self, PartitionError)

    def __repr__(self) -> str:
        return rule_text(self)

    def _card(self) -> Card:
        return rule_card(self, "partition", "labkit.train(problem, lab, partition=...)")

    def _learn(self, seconds: Mapping[int, float]) -> None:
        """Take in measured (or, before a worker's first allocation, probed) seconds per sample; a rule may ignore them."""

    def _speeds(self) -> np.ndarray:
        """The relative speed of each of `self.workers`, float64: their shares are in proportion."""
        raise NotImplementedError

    def _due(self, count: int) -> int:
        """Samples that all workers together should hold after `count` allocations."""
        return self.n_samples * min(count, self.batches) // self.batches

    def _target(self, worker: int) -> int:
        """What `worker` should hold after as many allocations as it has had."""
        count = min(self.count[worker], self.batches)
        if count not in self._targets:
            self._targets[count] = largest_remainder(self._due(count), self._speeds())
        return int(self._targets[count][self.workers.index(worker)])

    def _members_changed(self) -> None:
        self._targets: dict[int, np.ndarray] = {}  # of all workers, by the number of allocations; until speeds change

    def _owed(self, but: int | None = None) -> int:
        """Samples that those who came late still miss, `but` left out."""
        return sum(self._missing(worker) for worker in self.late if worker != but)

    def _missing(self, worker: int) -> int:
        """Samples that a worker misses of its target; less than half a unit is nothing."""
        n = max(int(self._slowest(worker)), self._target(worker) - self.held[worker])
        return n if 2 * n > self._grain or not self.held[worker] else 0

    def _slowest(self, worker: int) -> bool:
        """Does it hold nothing, and is so slow that nothing is its share? It begins with one sample."""
        return not self.held[worker] and not self._target(worker)

    def _set_aside(self, but: int | None = None) -> int:
        """One sample for each who came late and holds nothing, if nothing is its share or nobody holds more than its own."""
        empty = [worker for worker in self.late if worker != but and not self.held[worker]]
        if empty and any(held > max(1, self._target(worker)) for worker, held in self.held.items()):
            empty = [worker for worker in empty if not self._target(worker)]
        return len(empty)

    def _batch(self, workers: list[int]) -> np.ndarray:
        """How many samples of the pool each of `workers` is to get."""
        together = workers == self.workers and len({min(self.count[w], self.batches) for w in workers}) == 1
        add = np.array([self._wanted(worker) for worker in workers], dtype=np.int64)
        if together:
            room = self._due(self.count[workers[0]]) - (self.n_samples - len(self.pool))
            add = largest_remainder(max(0, room), add if add.sum() else self._speeds())
            for i in np.flatnonzero((add == 0) & [self.held[worker] == 0 for worker in workers]):
                if add.max() > 1:  # nobody begins with nothing
                    add[i], add[np.argmax(add)] = 1, add.max() - 1
        return add

    def _wanted(self, worker: int) -> int:
        add = max(0 if self.held[worker] else 1, self._target(worker) - self.held[worker])  # nobody begins with nothing
        if self.count[worker] > self.batches <= min(self.count.values()):  # all batches are out: what is left
            shares = self._speeds()
            left = max(0, len(self.pool) - self._owed(but=worker))
            add = max(add, int(np.ceil(left * shares[self.workers.index(worker)] / sum(shares.tolist()))))
        room = len(self.pool) - self._set_aside(but=worker)
        return min(add, 1 if room <= 0 and self._goes_first(worker) else max(0, room))

    def _goes_first(self, worker: int) -> bool:
        """Of several who hold nothing, and for each of whom what there is was set aside for the others, one begins."""
        empty = [late for late in self.late if not self.held[late]]
        return worker in empty and worker == min(empty) and all(len(self.pool) <= self._set_aside(but=late) for late in empty)

    def _hand_out(self, worker: int, n: int) -> np.ndarray:
        n = n if self.units is None else self._front(worker, n)
        given, self.pool = self.pool[:n], self.pool[n:]
        if len(given):
            self.shards[worker].append(given)
            self.held[worker] += len(given)
        if worker in self.late and not self._missing(worker):
            self.late.remove(worker)
        return given

    # -- units ---------------------------------------------------------------------------------------------------------

    def _set_units(self, units: Sequence[int] | np.ndarray | None, n_samples: int) -> None:
        self.units, self._grain = None, 1  # the samples of the largest
        if units is not None:
            self.units = np.array(units, np.int64)
            lengths = np.diff(self.units)
            if len(self.units) < 2 or self.units[0] or self.units[-1] != n_samples or (lengths <= 0).any():
                raise PartitionError(f"units are offsets that grow from 0 to {n_samples}; these are {self.units[:5].tolist()}, ...")
            self._grain = int(lengths.max())
            self._begins = np.zeros(n_samples, bool)
            self._begins[self.units[:-1]] = True

    def _ends(self, samples: np.ndarray) -> np.ndarray:
        """0, and where each of the units ends of which `samples` consist: whole ones, each in its order."""
        return np.append(np.flatnonzero(self._begins[samples]), len(samples))

    def _front(self, worker: int, n: int) -> int:
        """How many samples at the front of the pool are the whole units nearest to n.

        At least one for a worker that holds none, and when all batches are out and only what is left is dealt; and one stays there for
        each other worker that holds none.
        """
        ends = self._ends(self.pool)
        least = not self.held[worker] or (n > 0 and self.count[worker] > self.batches <= min(self.count.values()))
        most = len(ends) - 1 - sum(not held for other, held in self.held.items() if other != worker)
        nearest = int(np.abs(ends - n).argmin())
        return int(ends[min(max(min(nearest, most), int(least)), len(ends) - 1)])

    def _back(self, shard: np.ndarray, n: int) -> int:
        """How many samples at the end of a shard are the whole units nearest to n, all but one at most; at least one where a worker
        that came late holds none, and nothing is in the pool for it."""
        possible = len(shard) - self._ends(shard)[:0:-1]  # 0, the last unit, the last two, ...
        empty = not len(self.pool) and any(not self.held[late] for late in self.late)
        return int(possible[min(max(int(np.abs(possible - n).argmin()), int(empty)), len(possible) - 1)])


class UDPA(Partition):
    """Uniform partition: n/m samples for each of m workers, all at once, whatever their speed.

    `stratified=True` gives each shard the classes in their true shares.

    Examples
    --------
    >>> labkit.train(problem, lab, partition=labkit.UDPA(stratified=True), passes=1).wait().config.partition["stratified"]
    True
    """

    name = "udpa"

    def _speeds(self) -> np.ndarray:
        return np.ones(len(self.workers))


class IDPA(Partition):
    """Incremental partition by measured speed (BPT-CNN 2019): data handed out in batches, each correcting the one before.

    Parameters
    ----------
    batches
        A: the number of allocations, one before each of the first A local passes. The first A passes see a/A of the data.
    speeds
        Relative speed of each worker for batch 1: a list by worker index ("declared"), or None for the speed probed by
        timing a few optimiser steps before the start.
    smoothing
        The time per sample is the median over so many of a worker's latest passes, so that one pass that was disturbed does not
        shape the shards; 1 trusts the latest pass alone.
    stratified
        Each batch holds the classes in their true shares.

    Examples
    --------
    >>> labkit.train(problem, lab, partition=labkit.IDPA(batches=2, speeds=[1, 4]), passes=2).wait().state
    'done'
    """

    name = "idpa"

    def __init__(
        self, batches: int = 4, *, speeds: Iterable[float] | None = None, smoothing: int = 5, stratified: bool = False
    ) -> None:
        super().__init__(stratified=stratified)
        self.batches, self.smoothing = (whole(*n, error=ValueError) for n in (("batches", batches), ("smoothing", smoothing)))
        self.speeds = None if speeds is None else several("speeds", speeds, partial(real, above=0))

    def start(
        self,
        n_samples: int,
        workers: Iterable[int],
        *,
        seed: int = 0,
        labels: np.ndarray | None = None,
        units: Sequence[int] | np.ndarray | None = None,
    ) -> None:
        super().start(n_samples, workers, seed=seed, labels=labels, units=units)
        self._measured: dict[int, list[float]] = {}
        if self.speeds is not None:
            if len(self.speeds) != len(self.workers):
                raise PartitionError(
                    f"speeds has {len(self.speeds)} entries for {len(self.workers)} workers. Give one for each worker."
                )
            self.seconds = {worker: self._declared(at) for at, worker in enumerate(self.workers)}

    def state_dict(self) -> dict:
        return {**super().state_dict(), "measured": {worker: list(times) for worker, times in self._measured.items()}}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self._measured = {worker: list(times) for worker, times in state["measured"].items()}

    def join(self, worker: int, seconds: float | None = None) -> None:
        if self.speeds is not None and worker < len(self.speeds):  # it comes back
            seconds = self._declared(worker)
        super().join(worker, seconds)

    def _declared(self, at: int) -> float:
        """Seconds per sample of the worker with this place in `speeds`."""
        return usable(1 / max(self.speeds[at], 1 / SLOWEST))

    def leave(self, worker: int) -> None:
        super().leave(worker)
        self._measured.pop(worker, None)

    def _learn(self, seconds: Mapping[int, float]) -> None:
        for worker, measured in seconds.items():
            if (value := usable(measured)) is None:  # what was known of it stands
                continue
            if self.count.get(worker, 0) == 0:  # a probe: declared speeds stand, and the first true pass replaces it
                self.seconds.setdefault(worker, value)
            else:
                latest = [*self._measured.get(worker, []), value][-self.smoothing :]
                self._measured[worker], self.seconds[worker] = latest, statistics.median(latest)
            if self._known is not None and worker in self.count:
                self._known[self.workers.index(worker)] = 1 / self.seconds[worker]

    def _speeds(self) -> np.ndarray:
        if self._known is None:
            self._known = 1 / np.array([self.seconds.get(worker, math.nan) for worker in self.workers])
        missing = np.isnan(self._known)
        if not missing.any():
            return self._known
        # Who is not known yet is taken to be as quick as the others on average.
        return np.where(missing, 1.0 if missing.all() else self._known[~missing].mean(), self._known)

    def _members_changed(self) -> None:
        super()._members_changed()
        self._known: np.ndarray | None = None  # the speed of each worker, nan where it is not known


PARTITIONS = {rule.name: rule for rule in (UDPA, IDPA)}


def make_partition(partition: str | dict | Partition) -> Partition:
    """A partition from its name ("idpa"), an import path ("my_module:Mine"), name and settings (its `config()`), or itself.

    ValueError with the known ones where a name or a setting does not exist.
    """
    return partition if isinstance(partition, Partition) else make_rule("partition", partition, PARTITIONS, Partition)
