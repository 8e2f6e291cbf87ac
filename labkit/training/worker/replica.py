"""The replica of one worker: its copy of the model, its optimisers and its shard, and the local pass over it.

    pull (weights, samples) -> optimiser steps on its shard -> Q on the shared score set -> steps ahead, while it is pushed

No connection, no server and no sleep: a worker does this live, and a replay or a simulation does it again with the same code, so
the same weights, samples and clock give the same bits.

The parameters and buffers of the module are one flat float32 vector (`labkit.models.flat`). The optimisers' state stays with the
replica across pulls: momentum goes on from where it was. All buffers travel: BatchNorm's running statistics, and its step counter
too. A replica is made for one incarnation of a worker: a worker that comes back begins with fresh optimisers, whatever it
had not finished, so that no state remains which the record does not hold.

With steps ahead, W is what was pushed and W' what it has become when the next version V comes: the replica goes on from
V + (W' - W), and its next push, from version V, holds those steps too.

Used by `labkit.training.worker.worker` (live) and `labkit.simulation.offline`.
"""

import contextlib
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from labkit.inner.precision import Precision, keep
from labkit.models import drawing
from labkit.models.flat import Flat
from labkit.problems.problem import Clock, Metrics, Problem, draws, noise
from labkit.problems.splits import batches
from labkit.runs.checkpoints import Layout
from labkit.training.wire.protocol import Grant
from labkit.training.worker.allreduce import ProcessGroup
from labkit.training.worker.process import give_back
from labkit.training.worker.sampler import Shard, steps

# samples; of each entry that steps returned its sum and number of samples; compute_s, load_s (of it, waiting for data), wait_s
PART = 1 << 20  # weights
NOTHING = (0, {}, 0.0, 0.0, 0.0)


class Replica:
    """What one incarnation of a worker holds; `flat` is its vector (n,), `shard` comes with `begin`."""

    def __init__(
        self,
        problem: Problem,
        seed: int,
        worker: int,
        budget: int,
        *,
        device: str = "cpu",
        exact: bool = True,
        after: Callable[..., None] = lambda started, waited=0.0: None,
        halted: Callable[[], object] = lambda: False,
        precision: Precision | None = None,
    ) -> None:
        """`exact` as of `Flat`. `after(started, waited)` is called after each piece of work (emulated slowdown); `halted()` ends a
        local pass early. `precision` is what this worker computes in; None: as the problem says."""
        problem = problem.in_precision(precision) if precision else problem
        self.problem, self.seed, self.worker, self.budget, self.device = problem, seed, worker, budget, device
        self.after, self.halted = after, halted
        self.module = problem.new_module(seed)
        keep(self.module, precision.float32 if precision else ())
        self.state, self.exact = Flat(self.module, device, exact), exact
        self.is_measuring_pure: bool | None = None  # does it leave weights and buffers as they are? None: not known yet
        self.flat, self.layout = self.state.vector, Layout.of(*self.state.shapes)
        self.optimisers = problem.optimisers(self.module)
        self.train_indices, self.scored = problem.train_indices(), problem.score_indices()
        self.units = problem.units()
        if self.units is not None:
            problem.dataset.hold(self.scored)
        self.shard: Shard | None = None
        self.draws: torch.Generator | None = None  # what is random in its batches
        self.noise = noise(seed, worker, device=device)  # and in its steps
        self.own_generator = False  # and what its modules draw from torch's, where no other worker does
        self.begun: tuple | None = None  # where these stood at the beginning of the local pass, in a group
        self.left = np.empty(0, np.int64)  # samples of this grant that are trained on ahead
        self.pushed: torch.Tensor | None = None  # the weights as they were before that
        self.carried = NOTHING  # what was trained on ahead, and belongs to the next push
        self.load_s = 0.0  # that steps have waited for data

    def begin(self, incarnation: int, own_generator: bool = True) -> None:
        """An empty shard and streams of random numbers; one for dropout and the like, unless workers share torch's generator."""
        seeds = [self.seed, self.worker, incarnation]
        self.shard, self.draws, self.noise = Shard(*seeds, self.units), draws(*seeds), noise(*seeds, self.device)
        self.own_generator = own_generator
        if own_generator:
            seed = int(np.random.SeedSequence(seeds).generate_state(1)[0])
            (torch.default_generator.manual_seed if self.device == "cpu" else torch.manual_seed)(seed)

    def go_on(self, before: "Replica") -> None:
        """In the place of one whose optimisers are given up: with its shard, its random numbers and its weights."""
        self.shard, self.draws, self.noise, self.own_generator = before.shard, before.draws, before.noise, before.own_generator
        self.state.load(before.flat)

    def hold(self, retain: int, indices: np.ndarray) -> None:
        """Of the shard only the first `retain` samples stay, and `indices` are added."""
        self.shard.retain(retain)
        self.shard.add(indices)

    def rewind(self) -> None:
        """The latest local pass in a group is to be made again: its samples and random numbers have not been drawn."""
        self.shard.rest, self.shard.epoch, draws, noise, own = self.begun
        self.draws.set_state(draws)
        self.noise.set_state(noise)
        if own is not None:
            torch.set_rng_state(own)

    def clock(self, samples: int) -> Clock:
        """Of a step that begins when all workers have trained on so many samples."""
        return Clock(samples, self.budget, samples / len(self.train_indices), self.noise, torch.get_num_threads())

    def step(self, indices: np.ndarray, clock: Clock, group: ProcessGroup | None = None) -> Metrics:
        """One optimiser step on training samples; returns the loss and whatever else the problem's step does."""
        started = time.perf_counter()
        batch = self.problem.draw(self.train_indices[indices], self.device, self.draws)
        loaded = time.perf_counter()
        turn = contextlib.nullcontext() if self.own_generator else drawing()
        with turn, group.stepping() if group else contextlib.nullcontext():
            metrics = self.problem.step(group.module if group else self.module, batch, self.optimisers, clock)
        waited, ended = group.waited if group else 0.0, time.perf_counter()
        self.after(started, waited)
        slowed = 1 + (time.perf_counter() - ended) / max(1e-9, ended - started - waited)  # by emulation: loading, too
        self.load_s += (loaded - started) * slowed
        return metrics

    def pull(self, weights: torch.Tensor, carry: int) -> None:
        """Go on from `weights` (n,), on any device; with what was trained on ahead on top if the `carry` samples of it count.

        Buffers are those of `weights`: a variance with a difference added might fall below zero.
        """
        n = self.layout.n_params
        if carry:
            self.state.pack()
            self.flat[:n].sub_(self.pushed[:n]).add_(weights[:n].to(self.device))
            self.flat[n:].copy_(weights[n:])
        else:
            self.flat.copy_(weights)
            self.carried = NOTHING
        self.state.unpack()

    def local_pass(
        self,
        grant: Grant,
        *,
        group: ProcessGroup | None = None,
        progress: Callable[[int, torch.Tensor], None] = lambda samples, loss: None,
    ) -> dict | None:
        """Train on the samples of this grant, but for those to be trained on ahead; None when it was halted in between.

        Returns samples, loss (their mean), compute_s, load_s (of it) and wait_s, with those that were trained on ahead before; as `metrics` the
        means of what else the steps returned, if anything; and as `inner` how the steps were computed, if that was chosen. After each step `progress` gets samples and summed loss so far.
        """
        if grant.settle:
            return self._settle(grant)
        if group:
            own = torch.get_rng_state() if self.own_generator else None
            self.begun = self.shard.rest, self.shard.epoch, self.draws.get_state(), self.noise.get_state(), own
        drawn, batch_size = self.shard.draw(grant.samples), self.problem.batch_size
        if self.units is not None:
            self.problem.dataset.expect(self.train_indices[drawn])
        now, self.left = np.split(drawn, [len(drawn) - grant.ahead])
        if group:
            sizes, *plan = steps(grant.rank_samples, group.rank, batch_size)
            parts, done = np.split(now, np.cumsum(sizes)[:-1]), None
            try:
                done = self._train(parts, grant, 0, progress, group, *plan)
            finally:
                if done is None:
                    self.rewind()
        else:
            done = self._train(batches(now, batch_size), grant, 0, progress)
        if done is None:
            return None
        before, self.carried = self.carried, NOTHING
        samples, *seconds = (before[at] + done[at] for at in (0, 2, 3, 4))
        sums = [{name: part.get(name, (0.0, 0)) for name in {**before[1], **done[1]}} for part in (before[1], done[1])]
        means = {name: (sums[0][name][0] + total) / max(1, sums[0][name][1] + n) for name, (total, n) in sums[1].items()}
        made = {"samples": samples, "loss": means.pop("loss")}
        made |= {name: round(value, 6) for name, value in zip(("compute_s", "load_s", "wait_s"), seconds, strict=True)}
        computed = self.problem.computed(self.module)
        return made | ({"inner": computed} if computed else {}) | ({"metrics": means} if means else {})

    def _settle(self, grant: Grant) -> dict:
        """What a milestone asks for, on the newest weights."""
        started = time.perf_counter()
        self.problem.settle(self.module, self.clock(grant.done))
        self.after(started)
        return {"samples": 0, "loss": None, "compute_s": round(time.perf_counter() - started, 6), "wait_s": 0.0}

    def ahead(self, grant: Grant) -> None:
        """Train ahead on samples of this grant, while the weights as they are now, which are being pushed, are under way.

        After it was halted in between, the replica must not go on.
        """
        if len(self.left):
            self.pushed = self.flat.clone() if self.pushed is None else self.pushed.copy_(self.flat)
            parts, self.left = batches(self.left, self.problem.batch_size), self.left[:0]
            self.carried = self._train(parts, grant, grant.samples - grant.ahead) or NOTHING

    def _train(
        self,
        parts: list[np.ndarray],
        grant: Grant,
        before: int,
        progress: Callable[[int, torch.Tensor], None] = lambda samples, loss: None,
        group: ProcessGroup | None = None,
        weights: Sequence[float] = (),
        joint: Sequence[int] = (),
    ) -> tuple | None:
        """Steps on these batches, `before` samples after the beginning of the grant: samples; of each entry that
        they returned the sum and the number of samples; compute_s, load_s, wait_s.

        In a `group`, `weights` and `joint` are those of `steps`: its ranks read one clock, as their parameters stay equal.
        """
        started = time.perf_counter()
        samples, waited, sums, counts = 0, 0.0, {"loss": torch.zeros((), device=self.device)}, {"loss": 0}
        self.load_s = 0.0
        for number, part in enumerate(parts):
            if self.halted():
                return None
            if group:
                group.begin(weights[number])
            seen = min(self.budget, grant.done + (joint[number] if group else int((before + samples) * grant.pace)))
            for name, value in self.step(part, self.clock(seen), group).items():
                if name not in sums:
                    sums[name], counts[name] = torch.zeros((), device=self.device), 0
                sums[name] += torch.as_tensor(value, device=self.device).detach() * len(part)
                counts[name] += len(part)
            samples += len(part)
            waited += group.waited if group else 0.0
            progress(samples, sums["loss"])
        totals = {name: (float(value), counts[name]) for name, value in sums.items()}  # reads the device: the time below is true
        return samples, totals, time.perf_counter() - started - waited, self.load_s, waited

    def score(self) -> float | None:
        """Q in [0, 1], if the problem has one, of the replica's weights on the score set that all workers share."""
        started = time.perf_counter()
        first, before = self.is_measuring_pure is None, None
        if self.is_measuring_pure is not True and self.exact:
            if first:  # the copy is in the place of the gradients, if they are gone, and they in that of the copy
                give_back()
            before = self.state.saved()
        score = self.problem.quality(self.module, self.scored, self.device)
        if before is not None:  # measuring is no training; where it leaves no trace the first time, it is not looked at again
            self.is_measuring_pure = _equal(self.state.pack(), before)
            self.state.load(before)
            del before
            if first:
                give_back()
        self.after(started)
        return score


def _equal(now: torch.Tensor, before: torch.Tensor) -> bool:
    """But for what is NaN now; in parts, as a comparison at once takes as much memory again."""
    pairs = zip(now.split(PART), before.split(PART), strict=True)
    return all(bool((some == others).logical_or(some.isnan()).all()) for some, others in pairs)
