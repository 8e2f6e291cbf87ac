"""What may end a run before its budget is spent: its retained versions, measured on the score set while it goes.

A thread of the kernel measures each version that stays on the disk for the curve. Training goes on meanwhile, on a machine that is
shared with it where the workers are here; so a run whose times are to be compared has neither target nor patience.

Used by `labkit.training.train` and `labkit.training.resume`; `best` by `Run.model("best")`.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from labkit.errors import RunError, calling
from labkit.imports import short
from labkit.models.flat import Flat
from labkit.runs import checkpoints
from labkit.runs.config import RunConfig

if TYPE_CHECKING:
    from labkit.problems.problem import Problem
    from labkit.runs.record import RunRecord

POLL_S = 0.1

OnVersion = Callable[["RunRecord", int, dict[str, float]], object]


class Monitor:
    """Measures the retained versions of one run as they appear, and says when it is to end.

    `target`: the score at which the run ends. `patience`: it ends when so many retained versions in a row were no better than the
    best before them. `on_version` is called in the kernel as `on_version(run, version, measured)` for each; what it raises fails
    the run, and `wait` raises it.
    """

    def __init__(self, problem: Problem, config: RunConfig, on_version: OnVersion | None = None) -> None:
        self.config, self.on_version = config, on_version
        self.since = config.resumed[-1]["version"] if config.resumed else -1  # those up to here say only what is best
        self.measure = _measurer(problem, config)  # made before workers in this process draw from torch's generator
        self.best, self.worse = -math.inf, 0  # the best score (of which more is better), and how many versions have come since
        self._over, self._done = threading.Event(), threading.Event()

    def start(self, run: RunRecord, end: Callable[[str], None], fail: Callable[[BaseException], None]) -> None:
        """Follow the run from here on; `end(reason)` is called once, or `fail(error)`."""
        named = {"name": f"labkit-monitor-{run.name}", "daemon": True}
        self._thread = threading.Thread(target=self._follow, args=(run, end, fail), **named)
        self._thread.start()

    def finish(self) -> None:
        """The run is done: wait until what is left has been measured and shown."""
        self._done.set()
        self._thread.join()

    def close(self) -> None:
        """The run has ended; nothing is measured any more. After `finish` it is nothing new."""
        self._over.set()

    @staticmethod
    def of(problem: Problem, config: RunConfig, on_version: OnVersion | None) -> Monitor | None:
        """The monitor of a run that needs one."""
        needed = on_version is not None or config.target is not None or config.patience is not None
        return Monitor(problem, config, on_version) if needed else None

    def _follow(self, run: RunRecord, end: Callable[[str], None], fail: Callable[[BaseException], None]) -> None:
        try:
            for version, weights in _retained_as_they_come(run.path, self.config, self._over, self._done):
                measured = self.measure(weights)
                if version <= self.since:
                    self.best = max(self.best, merit(measured, self.config))
                    continue
                if self.on_version:
                    with calling(f"on_version={short(self.on_version)} at version {version}", RunError, passes=()):
                        self.on_version(run, version, dict(measured))
                if reason := self.verdict(version, measured):
                    return end(reason)
        except BaseException as error:
            fail(error)

    def verdict(self, version: int, measured: Mapping[str, float]) -> str:
        """Why the run is to end with this version, or ""."""
        score, sign = merit(measured, self.config), -1 if self.config.lower_is_better else 1
        if self.config.target is not None and score >= sign * self.config.target:
            return f"version {version} has score {sign * score:.4g} on the score set, and the target is {self.config.target:g}"
        self.worse = 0 if score > self.best else self.worse + 1
        self.best = max(self.best, score)
        if self.config.patience is not None and self.worse >= self.config.patience:
            return f"{self.worse} retained versions up to {version} were no better than score {sign * self.best:.4g} (patience)"
        return ""


def merit(measured: Mapping[str, float], config: RunConfig) -> float:
    """What is compared, the more the better: the score, less the score where lower is better, less the loss where there is none."""
    value = measured.get("score")
    value = -measured["loss"] if value is None else -value if config.lower_is_better else value
    return value if value == value else -math.inf


def best(run: RunRecord, problem: Problem) -> int:
    """The retained version with the best score (without one, the lowest loss) on the score set, which no curve is measured on; the earliest of equals."""
    measure, size, scores = _measurer(problem, run.config), run.layout.size, {}
    for version in checkpoints.versions(run.path):
        with contextlib.suppress(FileNotFoundError):  # the run goes on, and it was one of the newest only
            measured = measure(checkpoints.read_weights(run.path, version, size))
            scores[version] = merit(measured, run.config)
    if not scores:
        raise RunError(f"run {run.name} has no weights in {run.path / checkpoints.FOLDER}.")
    return max(scores, key=scores.__getitem__)


def _measurer(problem: Problem, config: RunConfig) -> Callable[[np.ndarray], dict[str, float]]:
    """Measures global weights on the score set."""
    module, indices = problem.new_module(config.seed), problem.score_indices()
    if not len(indices):
        raise RunError("this problem has no score set: target, patience and the best version need score_samples of at least 1.")
    state = Flat(module, exact=config.exact_buffers)

    def measure(weights: np.ndarray) -> dict[str, float]:
        state.load(torch.from_numpy(np.array(weights)))
        return problem.measure(module, indices, "train")

    return measure


def _retained_as_they_come(
    path: Path, config: RunConfig, over: threading.Event, done: threading.Event
) -> Iterator[tuple[int, np.ndarray]]:
    """Version and weights of each checkpoint that stays for the curve (`labkit.runs.checkpoints.retained`), once, until the run is
    `over`; when it is `done`, none comes any more, and those that are there are the last."""
    seen: set[int] = set()
    parts: set[int] = set()
    while not over.is_set():
        last = done.is_set()
        for version in _new(path, seen):
            with contextlib.suppress(OSError, RunError):  # pruned meanwhile
                weights, state = checkpoints.read_state(path, version)
                part = int(state.get("done", 0)) * config.checkpoints // config.budget
                if part not in parts:
                    parts.add(part)
                    yield version, weights
        if last:
            return
        done.wait(POLL_S)


def _new(path: Path, seen: set[int]) -> Iterable[int]:
    new = [version for version in checkpoints.versions(path) if version not in seen]
    seen.update(new)
    return new
