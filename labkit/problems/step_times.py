"""How long a training step takes, in each of several ways, measured side by side.

Used by users through `labkit.step_times`.
"""

import os
import time
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch

from labkit.errors import instance, several, whole
from labkit.inner.precision import host, keep
from labkit.models import seeded
from labkit.problems.problem import Clock, Problem, noise

WARM_UP = 3  # steps of each that are not counted
SETTLING = 25  # of one that tries several ways itself


def step_times(
    problems: Mapping[str, Problem], batch_sizes: Sequence[int] | None = None, steps: int = 10, seed: int = 0
) -> pd.DataFrame:
    """The time of a training step of each problem, on this machine: one step of each in a round, so that a load hits all alike.

    In each round they are in another order: torch's own threads wait for more work with a busy core, which slows whoever comes next.

        labkit.step_times({"torch": labkit.Classifier("vgg9", data), "samples": labkit.Classifier("vgg9", data, inner=2)}, [16, 128])

    Parameters
    ----------
    problems : by the names that the table gives them; the first is what the others are compared with. A step is `Problem.step`: gradients
        and optimiser, on a batch that is in memory. One without `inner` computes with the threads that torch has here.
    batch_sizes : samples in a step; by default those of the problems.
    steps : how many of each are counted, after some that are not.
    seed : of the weights and the batches.

    Returns
    -------
    A row for each size and problem: `problem`, `batch_size`, `ms` (the median), `ms_low` and `ms_high` (quartiles), `samples_per_s`, `speedup`
    (the median over steps of the time of the first problem, in the same round, by its own), and `computed`: how its last steps were
    computed, where an inner layer chose, and in which precision, where that was measured. `attrs` hold the threads of torch, the cores and the
    load of the machine, and as `host` its instruction set.

    ValueError or TypeError for a bad argument; ProblemError for a problem that cannot be trained.

    Examples
    --------
    >>> labkit.step_times({"lenet": problem}, batch_sizes=[16, 32], steps=3)["batch_size"].tolist()
    [16, 32]
    """
    if not isinstance(problems, Mapping) or not problems:
        raise TypeError("problems must be a dict of problems by name, {'torch': labkit.Classifier(...), ...}, with one at least.")
    for name, problem in problems.items():
        instance(f"problems[{name!r}]", problem, Problem)
    steps, seed = whole("steps", steps, 3), whole("seed", seed, 0)
    default = sorted({problem.batch_size for problem in problems.values()})
    sizes = default if batch_sizes is None else several("batch_sizes", batch_sizes, whole)
    rows = []
    for size in sizes:
        started = [_Stepped(problem, size, seed) for problem in problems.values()]
        for one in started:
            for _ in range(one.settling):
                one.step()
        seconds = np.empty((steps, len(started)))
        orders = np.random.default_rng(seed).permuted(np.tile(np.arange(len(started)), (steps, 1)), axis=1)
        for number, order in enumerate(orders):
            for at in order:
                seconds[number, at] = started[at].step()
        for at, (name, one) in enumerate(zip(problems, started, strict=True)):
            low, middle, high = np.quantile(seconds[:, at], (0.25, 0.5, 0.75))
            speedup = float(np.median(seconds[:, 0] / seconds[:, at]))
            rows.append([name, size, 1e3 * middle, 1e3 * low, 1e3 * high, one.n / middle, speedup, one.computed()])
    frame = pd.DataFrame(rows, columns=["problem", "batch_size", "ms", "ms_low", "ms_high", "samples_per_s", "speedup", "computed"])
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    frame.attrs |= {"threads": torch.get_num_threads(), "cores": os.cpu_count(), "load": load, "host": host()}
    return frame


class _Stepped:
    """A problem with what a worker has of it, and a batch."""

    def __init__(self, problem: Problem, size: int, seed: int) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        precision = problem.choose_precision(seed, self.device)
        self.problem = problem = problem.in_precision(precision) if precision else problem
        inner = getattr(problem, "inner", None)
        self.settling = SETTLING if inner is not None and inner.split == "auto" else WARM_UP
        with seeded(seed):
            self.module = problem.new_module(seed).to(self.device)
        keep(self.module, precision.float32 if precision else ())
        self.said = "; ".join(precision.lines()) if precision else ""
        self.optimisers = problem.optimisers(self.module)
        indices = problem.train_indices()
        self.batch = problem.load(np.resize(indices, size), "train", self.device)
        self.n, self.clock = size, Clock(0, len(indices), 0.0, noise(seed, 0, device=self.device), torch.get_num_threads())
        self._computed = ""

    def step(self) -> float:
        """Seconds of one step."""
        self.module.train()
        started = time.perf_counter()
        self.problem.step(self.module, self.batch, self.optimisers, self.clock)
        if self.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        self._computed = self.problem.computed(self.module) or self._computed
        return seconds

    def computed(self) -> str:
        return "; ".join(filter(None, [self._computed.rpartition(" *")[0], self.said]))
