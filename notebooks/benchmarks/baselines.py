"""The ideal that exchanges are measured against: workers that train and never talk.

The loop is written by hand in plain torch, with the same model, batches, optimiser and number of threads, and knows nothing of
labkit's worker. Used by the benchmark notebooks; it travels to the workers by value.
"""

from __future__ import annotations

import sys
import time

import cloudpickle
import numpy as np
import torch
from torch.nn import functional as F

from labkit.worker import keep_memory

cloudpickle.register_pickle_by_value(sys.modules[__name__])


def plain_loops(problem, lab, samples: int) -> float:
    """Samples/s of all workers together, each training on its share of `samples`, from the common start to the last end."""
    share = samples // len(lab.workers)
    begin = time.time() + 1.0  # all begin together
    tasks = [lab.start(worker.index, plain_loop, problem, share, worker.index, begin) for worker in lab.workers]
    ends = [task.result(timeout=600) for task in tasks]
    return share * len(ends) / (max(ends) - begin)


def plain_loop(problem, samples: int, index: int, begin: float) -> float:
    """Train as anybody would; returns the Unix time of the end. Waits for `begin`, when model and data are ready."""
    keep_memory()  # the same memory for all
    torch.set_num_threads(1)
    module = problem.build(0)
    optimiser = torch.optim.SGD(module.parameters(), lr=problem.lr, momentum=problem.momentum)
    indices = np.random.default_rng(index).permutation(problem.train_indices())
    batches = [indices[i : i + problem.batch_size] for i in range(0, len(indices), problem.batch_size)]
    left, number = samples, 0
    train(module, optimiser, problem.load(batches[-1]))
    time.sleep(max(0.0, begin - time.time()))
    while left > 0:
        batch = batches[number % len(batches)][:left]
        train(module, optimiser, problem.load(batch))
        left, number = left - len(batch), number + 1
    return time.time()


def train(module, optimiser, batch) -> None:
    x, y = batch
    optimiser.zero_grad()
    loss = F.cross_entropy(module(x), y)
    loss.backward()
    optimiser.step()
