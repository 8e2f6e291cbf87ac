"""How a process or thread is set up before it trains or evaluates: its memory, its number of torch threads, its device.

A worker holds its weights, which it also sends and receives, their gradient and the state of the optimiser: 2 times the weights with
plain SGD, 3 with momentum, 4 with Adam, and what the largest tensor needs for a step. One more copy is made while it first measures its
score, when labkit's own problems hold no gradient; one with `overlap`, half of one each way where the wire has 16 bits.

Used by `labkit.training.worker.worker`, `labkit.training.evaluation` and `labkit.subnets` on the workers of a lab.
"""

import contextlib
import ctypes
import sys
from collections.abc import Callable, Mapping
from functools import partial

import torch

from labkit.cluster.emulation import Slowness, Unevenness
from labkit.cluster.lab import Worker


def prepare(device: str = "cpu", threads: int | None = None) -> None:
    """Set up the calling process; without `threads` torch computes with as many as before."""
    keep_memory()
    if threads is not None and torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    if device != "cpu":
        torch.cuda.set_device(device)  # pinned memory and NCCL go by it, and cuda:0 may be another worker's


def keep_memory() -> None:
    """Let this process keep the memory that it frees.

    Dask starts its workers with MALLOC_TRIM_THRESHOLD_=65536, for the sake of data frames: glibc then hands every activation of a
    network back to the system and fetches it again at the next step, which makes training on a CPU 1.6 to 2 times slower.
    """
    if sys.platform == "linux":
        try:
            mallopt = ctypes.CDLL(None).mallopt
        except (OSError, AttributeError):
            return  # another C library: nothing to mend
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD


def give_back() -> None:
    """Give the system the memory that is free here: what comes next does not need blocks of the same sizes.

    Between two runs, that is, and before the first step; between two steps it would cost more than it is worth (`keep_memory`).
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def prepare_alone(worker: Worker, lab: Mapping, seed: int) -> Slowness:
    """Set up this process to train without a server, as a worker of a lab with these `Lab.settings`; its emulated slowdown."""
    prepare(worker.device, worker.threads)
    if not lab["one_process"]:  # dropout and the like; threads share one generator
        torch.manual_seed(seed)
    uneven = Unevenness(worker.slowdown, lab["jitter"], lab["drift"], worker.drifts_to, lab["stalls"])
    return Slowness(uneven, seed, worker.index, synchroniser(worker.device))


def synchroniser(device: str) -> Callable[[], object]:
    """Waits until the device has done what it was given: on a GPU a step is only queued, on a CPU done when it returns."""
    return partial(torch.cuda.synchronize, device) if device != "cpu" else lambda: None
