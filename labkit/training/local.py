"""Plain training: one module in one process, epoch after epoch, stopped early by a held-out split.

Orders and batches are those of a worker that trains alone, so without early stopping the weights are bit for bit those of
`labkit.train` on one worker with SGWU, UDPA and as many passes. With it, the weights of the best epoch stay.

Used by `labkit.subnets`: on the workers, for the coarse network, and for several subnets in one pass.
"""

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from labkit.errors import ProblemError
from labkit.inner.precision import keep
from labkit.models.flat import Flat
from labkit.partition import UDPA
from labkit.problems import Clock, Problem, evaluating
from labkit.problems.metrics import together
from labkit.problems.problem import draws, noise
from labkit.problems.splits import batches
from labkit.training.worker.sampler import Shard

BATCH = 256  # samples measured at once


@dataclass
class Fit:
    """How a training went. `best` is the epoch whose weights stay, `seconds` the time of training and held-out measuring."""

    epochs: int = 0
    best: int = 0
    loss: float = math.inf
    score: float = -1.0
    seconds: float = 0.0


class State(Protocol):
    """All that training changes of a module, such as a `Flat`: a copy of it, and back to one."""

    def saved(self) -> Any: ...
    def load(self, saved: Any) -> None: ...


def fit(
    problem: Problem,
    module: nn.Module,
    train: np.ndarray,
    held: np.ndarray,
    *,
    seed: int,
    device: str = "cpu",
    each: Callable[[int, float, float | None], bool] = lambda epoch, loss, score: False,
    **settings: Any,
) -> Fit:
    """Train `module` in place on the samples `train` (split "train" of the problem); `settings` as of `fit_epochs`.

    `each(epoch, loss, score)` is called after each epoch, with the score where it was measured; if it returns true, training ends.
    """
    if problem.precision == "bfloat16" and (precision := problem.choose_precision(seed, device)).float32:
        warnings.warn("; ".join(precision.lines()), stacklevel=2)
        keep(module, precision.float32)
    state = Flat(module, device)
    optimisers, generator = problem.optimisers(module), draws(seed, 0)

    def step(drawn: list[np.ndarray], clock: Clock) -> torch.Tensor:
        metrics = problem.step(module, problem.draw(drawn[0], device, generator), optimisers, clock)
        return torch.as_tensor(metrics["loss"], device=device).reshape(1)

    one = [problem], [module], [state]
    return fit_epochs(*one, step, train, held, seeds=[seed], device=device, each=[each], **settings)[0]


def fit_epochs(
    problems: Sequence[Problem],
    modules: Sequence[nn.Module],
    states: Sequence[State],
    step: Callable[[list[np.ndarray], Clock], torch.Tensor],
    train: np.ndarray,
    held: np.ndarray,
    *,
    seeds: Sequence[int],
    epochs: int,
    patience: int | None,
    each: Sequence[Callable[[int, float, float | None], bool]],
    device: str = "cpu",
    after: Callable[[float], None] = lambda started: None,
) -> list[Fit]:
    """Train M modules for `epochs` epochs, each in the orders of its seed: `step(batches, clock)` trains them on the samples of a
    batch each and gives their losses (M,).

    With a `patience` the training of a module ends when its score on `held` has not grown for so many epochs (of equal scores the
    lower loss is better), and what its state, all that training changes, was in the best epoch is put back. `after(started)`
    is called after each step and each measuring: emulated slowdown.
    """
    n, seen, started = len(train), 0, time.perf_counter()
    shards, generator = [alone(n, seed) for seed in seeds], noise(seeds[0], 0, device=device)
    fits, best, training = [Fit() for _ in seeds], {}, list(range(len(seeds)))
    for epoch in range(1, epochs + 1):
        total = torch.zeros(len(seeds), device=device)
        for drawn in zip(*(batches(shard.draw(n), problems[0].batch_size) for shard in shards), strict=True):
            began = time.perf_counter()
            losses = step([train[batch] for batch in drawn], Clock(seen, epochs * n, seen / n, generator, torch.get_num_threads()))
            total += losses.detach() * len(drawn[0])
            seen += len(drawn[0])
            after(began)
        for number in list(training):
            problem, done, loss, score = problems[number], fits[number], float(total[number]) / n, None
            if not math.isfinite(loss):
                raise ProblemError(f"{problem._title()}: the loss is {loss} after epoch {epoch} of {epochs}. Give a smaller lr.")
            done.epochs = epoch
            if epoch == epochs or patience is not None:
                began = time.perf_counter()
                measured = problem.measure(modules[number], held, device=device)
                score, loss = measured["score"], measured["loss"]
                after(began)
                if patience is None or (score, -loss) > (done.score, -done.loss):
                    done.best, done.score, done.loss = epoch, score, loss
                    best[number] = states[number].saved()
            if each[number](epoch, loss, score) or (patience is not None and epoch - done.best >= patience):
                training.remove(number)
        if not training:
            break
    seconds = time.perf_counter() - started
    for number, done in enumerate(fits):
        done.seconds = seconds
        if number in best:
            states[number].load(best[number])
    return fits


def alone(n: int, seed: int) -> Shard:
    """All of n samples, in the orders of a worker that trains alone."""
    partition, shard = UDPA(), Shard(seed, 0)
    partition.start(n, [0], seed=seed)
    shard.add(partition.allocate([0])[0])
    return shard


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
    return together(found).numpy()
