"""The shard of one worker: which samples it holds, in which order it goes through them, and how they are cut into batches.

Every pass draws a new order from (seed, worker, pass, incarnation), so a run can be repeated and replayed.

Used by `labkit.training.worker.replica` and `labkit.training.local`.
"""

from __future__ import annotations

import numpy as np

from labkit.errors import WorkerError


def pass_order(shard: np.ndarray, seed: int, worker: int, epoch: int, incarnation: int = 0) -> np.ndarray:
    """The order in which this incarnation of `worker` goes through its shard for the `epoch`-th time (0, 1, ...)."""
    generator = np.random.default_rng(np.random.SeedSequence([seed, worker, epoch, incarnation]))
    return shard[generator.permutation(len(shard))]


def batches(indices: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Cut into batches of `batch_size`; the rest is a smaller last one, except a single sample, which joins its neighbour
    (BatchNorm cannot train on one sample). Nothing makes no batch."""
    if not len(indices):
        return []
    cuts = list(range(batch_size, len(indices), batch_size))
    if cuts and batch_size > 1 and len(indices) - cuts[-1] == 1:
        cuts.pop()
    return np.split(indices, cuts)


class Shard:
    """The samples that a worker holds, served pass after pass; without `local_steps` a pass is the shard once, in a new order."""

    def __init__(self, seed: int, worker: int, incarnation: int = 0) -> None:
        self.seed, self.worker, self.incarnation, self.epoch = seed, worker, incarnation, 0
        self.indices = self.rest = np.empty(0, np.int64)

    def add(self, indices: np.ndarray) -> None:
        if len(indices):  # at an exchange every batch it nearly always is nothing
            self.indices = np.concatenate([self.indices, indices])

    def keep(self, n: int) -> None:
        """Give back all but the first n samples."""
        if n < len(self.indices):
            self.indices, gone = self.indices[:n], self.indices[n:]
            self.rest = self.rest[~np.isin(self.rest, gone)]

    def take(self, n: int) -> np.ndarray:
        """The next n samples; a new order is drawn whenever the shard has been gone through."""
        if n > 0 and not len(self.indices):
            raise WorkerError(f"worker {self.worker} was asked to train on {n} samples and holds none.", self.worker)
        taken = []
        while n > 0:
            if not len(self.rest):
                self.rest = pass_order(self.indices, self.seed, self.worker, self.epoch, self.incarnation)
                self.epoch += 1
            taken.append(self.rest[:n])
            self.rest, n = self.rest[n:], n - len(taken[-1])
        return np.concatenate(taken) if taken else self.indices[:0]
