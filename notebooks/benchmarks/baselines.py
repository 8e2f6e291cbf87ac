"""The ideal that exchanges are measured against: workers that train and never communicate, and weights that are only copied.

The loops are written by hand in plain torch, with the same model, batches, optimiser and number of threads, and know nothing of
labkit's worker. Used by the benchmark notebooks; it travels to the workers by value.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import sys
import time
from collections.abc import Iterator
from unittest import mock

import cloudpickle
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from labkit.training.worker.process import keep_memory

cloudpickle.register_pickle_by_value(sys.modules[__name__])


def plain_loops(problem, lab, samples: int, n_workers: int | None = None) -> float:
    """Samples/s of the first `n_workers` (of all) together, each training on its share of `samples`, from the common start to the
    last end."""
    workers = lab.workers[:n_workers]
    share = samples // len(workers)
    begin = time.time() + 1.0  # all begin together
    tasks = [lab.start(worker.index, plain_loop, problem, share, worker.index, begin) for worker in workers]
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


def plain_step(problem, steps: int, device: str) -> float:
    """Seconds of one step on `device`, as anybody would write it for the precision and the memory layout of `problem`."""
    keep_memory()
    torch.set_num_threads(1)
    module = problem.build(0).to(device)
    if problem.channels_last:
        module = module.to(memory_format=torch.channels_last)
    optimiser = torch.optim.SGD(module.parameters(), lr=problem.lr, momentum=problem.momentum)
    indices = np.random.default_rng(0).permutation(problem.train_indices())
    batches = [indices[i : i + problem.batch_size] for i in range(0, len(indices) - problem.batch_size + 1, problem.batch_size)]
    for number in range(5 + steps):
        if number == 5:  # by now the card has chosen its kernels
            started = seconds(device)
        train(module, optimiser, problem.load(batches[number % len(batches)], device=device), problem.precision)
    return (seconds(device) - started) / steps


def train(module, optimiser, batch, precision: str = "float32") -> None:
    x, y = batch
    optimiser.zero_grad()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        loss = F.cross_entropy(module(x), y)
    loss.backward()
    optimiser.step()


def copies(megabytes: float, device: str, rounds: int = 7) -> dict[str, float]:
    """Milliseconds for each MB of a flat float32 vector between `device` and memory of the host, pinned and ordinary."""
    flat, times = torch.zeros(round(megabytes * 250_000), device=device), {}
    for memory in ("pinned", "ordinary") if device != "cpu" else ("ordinary",):
        vector = torch.zeros(len(flat), pin_memory=memory == "pinned")
        for way, (target, source) in {"to host": (vector, flat), "to device": (flat, vector)}.items():
            taken = []
            for _ in range(rounds):
                started = seconds(device)
                target.copy_(source)
                taken.append(seconds(device) - started)
            times[f"{memory}, {way}"] = 1e3 * statistics.median(taken) / megabytes
    return times


def seconds(device: str) -> float:
    """The time, when `device` has done what it was asked to."""
    if device != "cpu":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def card(device: str) -> str:
    """What a worker's device is called."""
    return "CPU" if device == "cpu" else torch.cuda.get_device_name(device)


@contextlib.contextmanager
def beyond_loopback(there: bool) -> Iterator[None]:
    """If `there`, runs that are started in here have a server that listens as for workers on other machines: everything goes by TLS."""
    with mock.patch("labkit.training.train.server_host", lambda lab: "0.0.0.0") if there else contextlib.nullcontext():
        yield


def wide(shape, n_classes: int, megabytes: float = 1.0) -> nn.Module:
    """A network with so many MB of weights and little to compute."""
    n = math.prod(shape)
    width = round(megabytes * 250_000 / (n + 1 + n_classes))
    return nn.Sequential(nn.Flatten(), nn.Linear(n, width), nn.ReLU(), nn.Linear(width, n_classes))
