"""Plain training: one module in one process, epoch after epoch, stopped early by a held-out split.

Orders and batches are those of a worker that trains alone, so without early stopping the weights are bit for bit those of
`labkit.train` on one worker with SGWU, UDPA and as many passes. With it, the weights of the best epoch stay.

Used by `labkit.subnets`: on the workers, for the coarse network, and in pieces where subnets are trained in one pass.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from labkit.errors import ProblemError
from labkit.models.flat import flatten
from labkit.partition import UDPA
from labkit.problems import Clock, Problem, evaluating
from labkit.problems.splits import batches
from labkit.training.worker.sampler import Shard

BATCH = 256  # samples measured at once


@dataclass(frozen=True)
class Fit:
    """How a training went. `best` is the epoch whose weights stay, `seconds` what training and held-out measuring took."""

    epochs: int
    best: int
    loss: float
    score: float
    seconds: float


def fit(
    problem: Problem,
    module: nn.Module,
    train: np.ndarray,
    held: np.ndarray,
    *,
    epochs: int,
    patience: int | None,
    seed: int,
    device: str = "cpu",
    after: Callable[[float], None] = lambda started: None,
    each: Callable[[int, float, float | None], bool] = lambda epoch, loss, score: False,
) -> Fit:
    """Train `module` in place on the samples `train` (split "train" of the problem), for `epochs` epochs.

    With a `patience` training ends when the score on `held` has not grown for so many epochs (of equal scores the lower loss is
    better), and the best weights are put back. `after(started)` is called after each piece of work: emulated slowness; and
    `each(epoch, loss, score)` after each epoch, with the score where it was measured; if it returns true, training ends there.
    """
    flat, *_ = flatten(module, device)
    optimisers, shard, best = problem.optimisers(module), alone(len(train), seed), Best([flat], epochs, patience)
    seen, seconds = 0, 0.0
    for epoch in range(1, epochs + 1):
        started = time.perf_counter()
        total = torch.zeros((), device=device)
        for part in batches(shard.draw(len(train)), problem.batch_size):
            began = time.perf_counter()
            clock = Clock(seen, epochs * len(train), seen / len(train))
            metrics = problem.step(module, problem.load(train[part], "train", device), optimisers, clock)
            total += torch.as_tensor(metrics["loss"], device=device).detach() * len(part)
            seen += len(part)
            after(began)
        check_loss(problem, loss := float(total) / len(train), epoch, epochs)
        began = time.perf_counter()
        score = None
        if best.measures(epoch):
            measured = problem.measure(module, held, device=device)
            score, loss = measured["score"], measured["loss"]
        after(began)
        seconds += time.perf_counter() - started
        stop = each(epoch, loss, score)
        if best.over(epoch, score, loss) or stop:
            break
    return best.fit(seconds)


class Best:
    """The best epoch of one training, and whether the training is at its end: without a `patience` both are the last.

    `tensors` are all that the training changes; what they held in the best epoch is put back in the end.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], epochs: int, patience: int | None) -> None:
        self.tensors, self.epochs, self.patience = tensors, epochs, patience
        self.epoch, self.best, self.score, self.loss, self.weights = 0, 0, -1.0, math.inf, None

    def measures(self, epoch: int) -> bool:
        """Must the score after this epoch be known?"""
        return self.patience is not None or epoch == self.epochs

    def over(self, epoch: int, score: float | None, loss: float) -> bool:
        """Count an epoch; is it the last one?"""
        self.epoch, end = epoch, epoch == self.epochs
        if self.measures(epoch) and (self.patience is None or (score, -loss) > (self.score, -self.loss)):
            self.best, self.score, self.loss = epoch, score, loss
            self.weights = [tensor.clone() for tensor in self.tensors] if not end else None
        return end or (self.patience is not None and epoch - self.best >= self.patience)

    def fit(self, seconds: float) -> Fit:
        """Put the best weights back; how it went."""
        if self.weights:
            for tensor, weights in zip(self.tensors, self.weights, strict=True):
                tensor.copy_(weights)
        return Fit(self.epoch, self.best, self.loss, self.score, seconds)


def alone(n: int, seed: int) -> Shard:
    """All of n samples, in the orders of a worker that trains alone."""
    partition, shard = UDPA(), Shard(seed, 0)
    partition.start(n, [0], seed=seed)
    shard.add(partition.allocate([0])[0])
    return shard


def check_loss(problem: Problem, loss: float, epoch: int, epochs: int) -> None:
    if not math.isfinite(loss):
        raise ProblemError(f"{problem._title()}: the loss is {loss} after epoch {epoch} of {epochs}. Give a smaller lr.")


def outputs(
    problem: Problem,
    module: nn.Module,
    indices: np.ndarray,
    split: str = "train",
    device: str = "cpu",
    forward: Callable[[nn.Module, torch.Tensor], torch.Tensor] = lambda net, x: net(x),
) -> np.ndarray:
    """What `forward(module, samples)` gives, by default the logits (n, K), float32."""
    with evaluating(module) as plain:
        found = [forward(plain, problem.load(part, split, device)[0]).float().cpu() for part in batches(indices, BATCH)]
    return torch.cat(found).numpy()
