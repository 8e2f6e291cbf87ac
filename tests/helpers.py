"""What several test files lend each other: small runs, their problems and settings, and a course without a server.

Used by the tests.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import time

import numpy as np
import torch
from torch import nn

import labkit
from labkit.partition import UDPA
from labkit.runs.config import RunConfig
from labkit.runs.files import write_json
from labkit.training.server.coordinator import Coordinator
from labkit.training.worker.sampler import pass_order


def settings(workers=(0, 1), **changes):
    """The settings of a small run, but for what a test wants otherwise."""
    about = [{"index": index, "name": str(index), "host": "here", "pid": 1, "threads": 1, "slowdown": 1.0} for index in workers]
    common = {"name": "r", "update": {"name": "agwu"}, "partition": {"name": "udpa"}, "workers": about, "n_workers": len(about)}
    common |= {"n_train": 17, "passes": 2.0, "budget": 34, "batch_size": 4, "checkpoints": 4, "join_timeout": 10.0}
    return RunConfig(**common | changes)


# -- runs of small problems ---------------------------------------------------------------------------------------------

SEED, LR, MOMENTUM, DECAY = 5, 0.05, 0.9, 0.01


def data(n=231):
    generator = np.random.default_rng(0)
    y = np.arange(n) % 3
    x = generator.normal(size=(n, 1, 6, 6)).astype(np.float32)
    x[np.arange(n), 0, y] += 2
    return x, y


def net(shape, n_classes, width=7):
    n = int(np.prod(shape))
    return nn.Sequential(nn.Flatten(), nn.Linear(n, width), nn.ReLU(), nn.Linear(width, n_classes))


def net_with_statistics(shape, n_classes):
    n = int(np.prod(shape))
    return nn.Sequential(
        nn.Conv2d(1, 2, 3),
        nn.BatchNorm2d(2),
        nn.Flatten(),
        nn.Linear(2 * (shape[1] - 2) * (shape[2] - 2), n // 4),
        nn.BatchNorm1d(n // 4),
        nn.ReLU(),
        nn.Linear(n // 4, n_classes),
    )


class Poisoned(labkit.Classifier):
    """Raises at one sample, which one worker alone holds; the others are slow enough to be in the middle of something."""

    def step(self, module, batch, optimisers, clock):
        time.sleep(0.01)
        if clock.total > 1 and (batch[0] > 8).any():
            raise RuntimeError("this sample is poisoned")
        return super().step(module, batch, optimisers, clock)


def cut_off(monkeypatch, after=0):
    """Worker 1 loses its link at every push once it has come past this version."""
    from labkit.training.worker.worker import _Worker

    push_and_pull = _Worker._push_and_pull

    def lossy(self, *push):
        if self.spec.index == 1 and self.version > after:
            self.connection.close()
        return push_and_pull(self, *push)

    monkeypatch.setattr(_Worker, "_push_and_pull", lossy)


class Slow(labkit.Classifier):
    pause = 0.01  # seconds; longer where times are compared: a busy machine makes a step last a few hundredths longer

    def step(self, module, batch, optimisers, clock):
        time.sleep(self.pause)
        return super().step(module, batch, optimisers, clock)


def problem(model=net, kind=labkit.Classifier, xy=None, **options):
    options = {"batch_size": 16, "lr": LR, "momentum": MOMENTUM, "score_samples": 20, **options}
    return kind(model, xy or data(), **options)


def poisoned(worker):
    """A problem with a sample in the middle of the shard of `worker` (of 2, with UDPA and SEED) that makes its step raise."""
    x, y = data()
    x /= np.abs(x).max()  # a lone bright image survives the normalisation
    indices = problem(xy=(x, y)).train_indices()
    partition = UDPA()
    partition.start(len(indices), [0, 1], seed=SEED)
    shard = pass_order(partition.allocate([0, 1])[worker], SEED, worker, 0)
    x[indices[next(i for i in shard[40:] if i >= 16)]] = 50  # the first batch is the one that every worker probes its speed with
    return problem(xy=(x, y), kind=Poisoned)


def until(condition, limit=90.0):
    """Poll until the condition holds; fail when it does not within `limit` seconds."""
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, f"not within {limit:g} s"
        time.sleep(0.01)


def shortened(run, samples=500):
    """Of a run that was stopped, long before its end however busy the machine was, so much is left and not all of it."""
    done = run.summary()["samples"]
    write_json(run.path / "config.json", {**run.config, "budget": done + samples})
    return run.path


def ended(run, state="done", timeout=200):
    run.wait(timeout)
    assert run.state == state
    return run


@contextlib.contextmanager
def stopped_at_last(**defaults):
    """train() with other defaults; what it has begun is stopped if the test fails on the way."""
    made = []

    def begin(a_problem, lab, **options):
        made.append(labkit.train(a_problem, lab, **{"seed": SEED, "partition": "udpa", **defaults, **options}))
        return made[-1]

    try:
        yield begin
    finally:
        for run in made:
            run.stop()


# -- the course of a run, without a server -----------------------------------------------------------------------------

WORKERS, SAMPLES, SIZE = [0, 1, 2], 17, 5


class Course:
    """A coordinator, what it sent, wrote and saved, and a time that only we move."""

    def __init__(
        self,
        update,
        partition=None,
        *,
        budget=2 * SAMPLES,
        workers=WORKERS,
        local_steps=None,
        batch_size=2,
        checkpoints=4,
        state=None,
        overlap=0,
        milestones=(),
        ema=None,
        balanced_end=True,
    ):
        self.now, self.answers, self.rows, self.saved = 0.0, {w: [] for w in workers}, [], []
        partition = partition or UDPA()
        if state:
            update.go_on(np.zeros(SIZE, np.float32), workers, 1, state["update"])
            partition.load_state_dict(state["partition"])
        else:
            update.start(np.zeros(SIZE, np.float32), workers, 1)
            partition.start(SAMPLES, workers, seed=3)
        lengths = {"budget": budget, "checkpoints": checkpoints, "n_train": SAMPLES, "milestones": milestones, "ema": ema}
        lengths["balanced_end"] = balanced_end
        self.it = Coordinator(
            settings(workers, **lengths, batch_size=batch_size, local_steps=local_steps, overlap=overlap),
            update,
            partition,
            deliver=lambda worker, answer: self.answers[worker].append(answer),
            record=lambda kind, **fields: self.rows.append({"kind": kind, **fields}),
            save=lambda version, weights, state: self.saved.append((version, weights)),
            clock=lambda: self.now,
            state=state,
        )
        self.members, self.indices = {}, {w: [] for w in workers}

    def join(self, *workers, seconds=1.0):
        for worker in workers:
            self.answers[worker], self.indices[worker] = [], []  # a new incarnation begins with nothing
            self.members[worker] = self.it.join(worker, f"about {worker}", seconds)
        return self

    def answer(self, worker):
        """The one answer that has come for a worker, taken out; None if there is none."""
        assert len(self.answers[worker]) <= 1
        answer = self.answers[worker].pop() if self.answers[worker] else None
        if answer and answer.grant:
            assert len(answer.indices) == answer.grant.n_indices
            self.indices[worker] = self.indices[worker][: answer.grant.retain] + answer.indices.tolist()
            assert answer.grant.settle or self.indices[worker] == self.it.partition.shard(worker).tolist()
        return answer

    def push(self, worker, answer, seconds=1.0, **changes):
        weights = answer.weights + np.float32(1 if self.it.update.collective else 1 + worker)  # replicas are equal
        samples = answer.grant.carry + answer.grant.samples - answer.grant.ahead
        header = {"samples": samples, "version": answer.grant.version, "loss": 1.0, "score": 0.5}
        header |= {"compute_s": seconds, "score_s": 0.0, "wait_s": 0.0, "send_s": 0.0}
        self.it.push(self.members[worker], header | changes, weights, weights.nbytes)

    def of(self, kind, **fields):
        return [row for row in self.rows if row["kind"] == kind and all(row[k] == v for k, v in fields.items())]

    def finish(self, pending=None, speeds=None):
        """Everybody works, the quickest first, until all are told to stop; returns the grants of each worker."""
        working = dict(pending or {})
        grants, ready = {w: [] for w in self.members}, {}
        for _ in range(10_000):
            for worker in list(self.it.members):
                if worker not in working and (answer := self.answer(worker)):
                    if answer.grant is None:
                        self.it.leave(self.members[worker])
                    else:
                        working[worker] = answer
            for worker, answer in working.items():
                if worker not in ready:
                    seconds = answer.grant.samples * (speeds or {}).get(worker, 1.0)
                    ready[worker] = (self.now + seconds, worker, seconds)
            if not working:
                break
            self.now, worker, seconds = min(ready.values())
            del ready[worker]
            answer = working.pop(worker)
            grants[worker].append(answer.grant.samples)
            self.push(worker, answer, seconds)
        assert self.it.over and not self.it.members
        return grants


def begun(update, **options):
    course = Course(update, **options).join(*WORKERS)
    return course, {worker: course.answer(worker) for worker in WORKERS}


class Settling(labkit.Classifier):
    """Counts its milestones in the bias of the last layer, which is exact in every exchange; a file says who has settled."""

    at = (1.0, 2.0)
    log = None
    pause = 0.0
    go_on = None  # a file that is waited for

    def milestones(self):
        return self.at

    def settle(self, module, clock):
        if self.log:
            with open(self.log, "a") as file:
                file.write(f"{os.getpid()} {clock.passes:g}\n")
        time.sleep(self.pause)
        if self.go_on:
            until(self.go_on.exists)
        with torch.no_grad():
            module[-1].bias.fill_(clock.samples)


def module_of(path):
    """A script beside the package, as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
