"""The sampler of one worker: the samples of its shard, and their order in each pass.

Every pass draws a new order from (seed, worker, pass, incarnation), so a run can be repeated and replayed. Of a data set that is read
in units (row groups) it is an order of units, and then of the samples within each, so that a unit is read once a pass. In an all-reduce all
ranks take the same number of steps, with batches in proportion to their shards (`steps`).

Used by `labkit.training.worker.replica` and `labkit.training.local`.
"""

from collections.abc import Sequence

import numpy as np

from labkit.errors import WorkerError


def pass_order(
    shard: np.ndarray, seed: int, worker: int, epoch: int, incarnation: int = 0, units: np.ndarray | None = None
) -> np.ndarray:
    """The order of the shard of this incarnation of `worker` in its `epoch`-th pass (0, 1, ...); unit by unit where there are `units`,
    offsets as of `Problem.units`."""
    generator = np.random.default_rng(np.random.SeedSequence([seed, worker, epoch, incarnation]))
    order = generator.permutation(len(shard))
    if units is None:
        return shard[order]
    held, unit = np.unique(np.searchsorted(units, shard[order], "right"), return_inverse=True)
    return shard[order[np.argsort(generator.permutation(len(held))[unit], kind="stable")]]


def steps(samples: Sequence[int], rank: int, batch_size: int) -> tuple[list[int], list[float], list[int]]:
    """The optimiser steps of this rank of an all-reduce, as many as on every rank: its batch sizes, its weights, and the samples
    of all ranks before each step, by which they all set their schedules.

    `samples` is what each rank trains on. A step takes `batch_size` samples a rank on average, in proportion to them; what is left
    over makes a smaller last one. BatchNorm cannot train on one sample, so a rank whose share would be so small gets fewer, larger
    steps.
    """
    total, least = sum(samples), min(2, batch_size)
    joint = max(batch_size * len(samples), -(-total // max(1, min(samples) // least)))
    ends = [*range(joint, total, joint), total]
    cuts = [[n * end // total for n in samples] for end in ends]
    if len(cuts) > 1 and min(np.subtract(cuts[-1], cuts[-2])) < least:
        del cuts[-2]
    sizes = np.diff(cuts, axis=0, prepend=[[0] * len(samples)])
    of_all = sizes.sum(axis=1)
    return sizes[:, rank].tolist(), (sizes[:, rank] / of_all).tolist(), (np.cumsum(of_all) - of_all).tolist()


class Shard:
    """The samples that a worker holds, served pass after pass; without `local_steps` a pass is the shard once, in a new order."""

    def __init__(self, seed: int, worker: int, incarnation: int = 0, units: np.ndarray | None = None) -> None:
        self.units = units
        self.seed, self.worker, self.incarnation, self.epoch = seed, worker, incarnation, 0
        self.indices = self.rest = np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self.indices)

    def add(self, indices: np.ndarray) -> None:
        if len(indices):  # at an exchange every batch it nearly always is nothing
            self.indices = np.concatenate([self.indices, indices])

    def retain(self, n: int) -> None:
        """Give back all but the first n samples."""
        if n > len(self):
            raise WorkerError(f"worker {self.worker} cannot retain {n} samples: it holds {len(self)}.", self.worker)
        if n < len(self):
            self.indices, gone = self.indices[:n], self.indices[n:]
            self.rest = self.rest[~np.isin(self.rest, gone)]

    def draw(self, n: int) -> np.ndarray:
        """The next n samples; a new order is drawn after each pass over the shard."""
        if n > 0 and not len(self):
            raise WorkerError(f"worker {self.worker} was asked to train on {n} samples and holds none.", self.worker)
        drawn = []
        while n > 0:
            if not len(self.rest):
                self.rest = pass_order(self.indices, self.seed, self.worker, self.epoch, self.incarnation, self.units)
                self.epoch += 1
            drawn.append(self.rest[:n])
            self.rest, n = self.rest[n:], n - len(drawn[-1])
        return np.concatenate(drawn) if drawn else self.indices[:0]
